"""The experiments of notebooks 03, 11 and 12: recipes, studies, and what is made of trained models' factors."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import wsolnb.methods
from wsolnb.errors import ParameterError
from wsolnb.maps import upsample
from wsolnb.methods.cam import CAMClassifier
from wsolnb.methods.scm import SCMConfig
from wsolnb.metrics import LocalizationAccuracy
from wsolnb.notebook import runs
from wsolnb.notebook.params import notebook_parameters
from wsolnb.papers import scm
from wsolnb.train.evaluation import THRESHOLDS, evaluate, predict

FEW = {"train_images": 16, "val_images": 6, "test_images": 6, "classes": 4, "batch_size": 8, "device": "cpu"}


def defaults(notebook, **changes):
    return {name: parameter.default for name, parameter in notebook_parameters(notebook).items()} | changes


@pytest.fixture
def run(tmp_path):
    return runs.start("x", {"seed": 0, "run_folder": str(tmp_path)})


@pytest.fixture(scope="module")
def pair():
    return scm.Pair(**defaults("11_scm_training", **FEW, epochs=1, backbone="vit_mini"))


@pytest.fixture(scope="module")
def trained(pair, tmp_path_factory):
    run = runs.start("x", {"seed": 0, "run_folder": str(tmp_path_factory.mktemp("run"))})
    splits = pair.splits()
    return splits, {method: pair.fit(run, method, 0, splits, progress=False) for method in scm.PAIR}


def test_the_recipes_of_a_pair_differ_in_the_module_only():
    pair = scm.Pair(**defaults("11_scm_training"))
    plain, module = (pair.recipe("tscam", 3).model_dump(), pair.recipe("scm", 3, blocks=2).model_dump())
    assert module["options"].pop("config") == SCMConfig.released(blocks=2).model_dump()
    assert (plain.pop("method"), module.pop("method")) == ("tscam", "scm")
    assert plain == module
    assert plain["training"]["seed"] == 3
    with pytest.raises(ValidationError, match="preset"):
        pair.changed(preset="released_code")


def test_a_checkpoint_is_that_of_the_backbone_it_was_given_for():
    start = {"backbone": "conformer_tiny", "pretrained": False, "checkpoint": "conformer.pth"}
    pair = scm.Pair(**defaults("11_scm_training", **start))
    assert [pair.recipe(method, 0).checkpoint for method in scm.PAIR] == ["conformer.pth"] * 2
    assert pair.changed(epochs=3, backbone="conformer_tiny").recipe("scm", 0).checkpoint == "conformer.pth"
    assert pair.changed(backbone="vit_mini").recipe("scm", 0).checkpoint is None
    assert scm.Pair(**defaults("11_scm_training")).recipe("scm", 0).checkpoint is None


def test_baselines_train_each_method_on_the_backbone_that_its_class_takes():
    baselines = scm.Baselines(**defaults("03_cam_and_tscam", method_options={"acol": {"hidden": 128}}))
    for method in ("cam", "has", "cutmix", "adl", "acol", "grad_cam"):
        recipe = baselines.recipe(method, 1)
        assert (recipe.backbone, recipe.training.epochs, recipe.training.head_lr) == ("resnet_mini", 7, None)
    assert baselines.recipe("acol", 1).options == {"hidden": 128}
    recipe = baselines.recipe("tscam", 1)
    assert (recipe.backbone, recipe.training.epochs, recipe.training.head_lr) == ("vit_mini_plain", 12, 5e-4)
    assert recipe.options == {"padding": "replicate"}
    assert baselines.recipe("scm", 1, padding="zeros").options == {"padding": "zeros"}
    with pytest.raises(ParameterError, match="did you mean 'adl'"):
        baselines.recipe("adll", 1)
    with pytest.raises((ParameterError, ValidationError), match="did you mean 'acol'"):
        baselines.changed(method_options={"acoll": {}})


def test_a_method_of_ones_own_is_trained_beside_the_others(run, monkeypatch):
    class Own(CAMClassifier):
        def __init__(self, backbone, num_classes, power=1.0):
            super().__init__(backbone, num_classes)
            self.power = power

    monkeypatch.setitem(wsolnb.methods._METHODS, "own", Own)
    options = {"own": {"power": 2.0}, "acol": {"hidden": 8}}
    baselines = scm.Baselines(**defaults("03_cam_and_tscam", **FEW, cam_epochs=1, method_options=options))
    splits = baselines.splits()
    with pytest.raises(ParameterError, match="did you mean 'acol'"):
        baselines.fit_all(run, ["own", "acoll"], [0], splits)
    assert not any(run.checkpoints.iterdir()), "an unknown method is an error before the first training"
    table, _ = scm.score_all(baselines.fit_all(run, ["own", "acol"], [0], splits), splits, ("last",))
    assert [(row.method, row.map) for row in table.itertuples()] == [
        ("own", "cam"),
        ("own", "layercam"),
        *(("acol", name) for name in ("acol", "first", "second")),
    ]
    assert set(table.epoch) == {"last"}


def test_scores_are_those_of_the_epoch_and_the_models_end_at_the_last(trained):
    splits, found = trained
    table, evaluations = scm.score_all({(name, 0): one for name, one in found.items()}, splits)
    assert list(table.groupby("method", sort=False).size()) == [6, 6]
    val, test = evaluations["scm", 0, "last"]
    row = table[(table.method == "scm") & (table.epoch == "last") & (table["map"] == "tscam")].iloc[0]
    assert row.gt_known == test.localization["tscam"].at(val.thresholds()["tscam"])["gt_known"]
    last = found["scm"].model.state_dict()
    assert all(torch.equal(last[name], value) for name, value in found["scm"].at("last").state_dict().items())


def slow_gt_known(maps, samples):
    metric = LocalizationAccuracy(THRESHOLDS)
    for score_map, sample in zip(maps, samples, strict=True):
        metric.update(score_map, sample.boxes, sample.label, logits=np.eye(4)[sample.label])
    return metric.compute()


def test_swapped_factors_equal_products_made_by_hand(pair, trained):
    splits, found = trained
    models, transform = {name: one.model for name, one in found.items()}, found["scm"].transform
    start = pair.start(0, models["scm"])
    rows = scm.swapped(models, start, splits, transform)
    assert [(r["attention of"], r["semantic map of"]) for r in rows] == [
        (a, s) for a in ("start", "tscam", "scm") for s in ("tscam", "scm")
    ]

    def product(part, attention, semantic):
        first, second = (
            list(predict_raw(m, part, transform)) for m in ({**models, "start": start}[attention], models[semantic])
        )
        return [
            upsample((a["attention"] * s["semantic"])[None], (112, 112))[0].numpy()
            for a, s in zip(first, second, strict=True)
        ]

    for row in rows:
        pieces = []
        for part in (splits.val, splits.test):
            samples = [transform(part[i]) for i in range(len(part))]
            pieces.append(slow_gt_known(product(part, row["attention of"], row["semantic map of"]), samples))
        assert row["gt_known"] == pieces[1].at(pieces[0].best("gt_known")[0])["gt_known"]


def predict_raw(model, part, transform):
    """The raw maps of the true class, image by image."""
    from wsolnb.data.loading import make_loader

    for batch in make_loader(part, transform, 1):
        with torch.no_grad():
            maps = model.localize(model(batch["image"]), batch["label"])
        yield {name: values[0] for name, values in maps.items()}


def test_couplings_start_with_the_models_own_product_up_to_scale(trained):
    splits, found = trained
    model, _, transform = found["scm"]
    cascade = scm.Couplings(model)
    assert len(cascade.maps) == cascade.levels**2 == 25
    own = next(predict(model, splits.val, transform))
    coupled = next(predict(cascade, splits.val, transform))
    with torch.no_grad():
        image = torch.from_numpy(own.sample.image).permute(2, 0, 1)[None] / 255.0
        output = model((image - torch.tensor(model.mean).view(3, 1, 1)) / torch.tensor(model.std).view(3, 1, 1))
        levels = model.calibration(output.attention, output.semantic_map)
    for name, i, j in (("S0 F0", 0, 0), ("S2 F4", 2, 4)):
        raw = levels[i].semantic[:, own.sample.label] * levels[j].attention
        np.testing.assert_allclose(coupled.maps[name], upsample(raw, (112, 112))[0].numpy(), atol=1e-3)
    rows = scm.coupled(model, splits.val, transform)
    assert [row["coupling"] for row in rows] == list(cascade.maps)
    assert {(row["coupling"], row["semantic_level"], row["attention_level"]) for row in rows} >= {("S2 F4", 2, 4)}
    own = evaluate(model, splits.val, transform).localization
    assert rows[0]["gt_known"] == pytest.approx(next(iter(own.values())).best("gt_known")[1])


def test_drift_is_half_the_distance_of_two_maps(pair, trained):
    splits, found = trained
    model, _, transform = found["tscam"]
    start = pair.start(0, model)
    assert scm.drift(start, start, splits.val, transform) == 0
    maps = [[m["attention"].flatten() for m in predict_raw(one, splits.val, transform)] for one in (start, model)]
    by_hand = [float((a / a.sum() - b / b.sum()).abs().sum()) / 2 for a, b in zip(*maps, strict=True)]
    assert scm.drift(model, start, splits.val, transform) == pytest.approx(np.mean(by_hand), rel=1e-4)
    assert np.mean(by_hand) > 0


def plan(pair, **changes):
    settings = defaults(
        "12_scm_results", pair_seeds=[0, 1], study_seeds=[2], cues=[0.2], starts=["a", "b"], rates=[1e-4],
        photo_starts=["vit_mini", "vit_photo"], **changes,
    )  # fmt: skip
    return scm.Studies(pair=pair, **settings)


def test_studies_change_one_thing_at_a_time(pair):
    trials = list(plan(pair).trials("pairs"))
    assert [(t.pair.backbone, t.seed, t.method) for t in trials] == [
        (b, n, m) for b in ("a", "b") for n in (0, 1) for m in ("tscam", "scm")
    ]
    assert {t.pair.epochs for t in trials} == {2}
    regimes = {t.variant: t.pair for t in plan(pair).trials("regimes")}
    assert regimes["five epochs"].epochs == 5
    assert regimes["head rate 0.001"].changed(head_lr=pair.head_lr) == regimes["as studied"]
    switches = list(plan(pair).trials("switches"))
    assert [t.variant for t in switches] == [scm.BASELINE, *scm.SWITCHES, "paper", "paper, no residual"]
    assert [t.method for t in switches] == ["tscam"] + ["scm"] * (len(switches) - 1)
    assert [(t.pair.preset, t.pair.epochs, t.module) for t in switches[-2:]] == [
        ("paper", switches[0].pair.epochs, {}), ("paper", 1, {"residual": False}),
    ]  # fmt: skip
    photographs = {t.pair.backbone: t.pair for t in plan(pair).trials("photographs")}
    assert {(one.dataset, one.epochs) for one in photographs.values()} == {("pets", 10)}
    assert {name: one.image_size for name, one in photographs.items()} == {
        "vit_mini": pair.image_size, "vit_photo": 160,
    }  # fmt: skip
    tiny = list(plan(pair).trials("tiny"))
    assert [(t.method, t.seed, t.pair.backbone) for t in tiny[:2]] == [(m, 0, "vit_photo") for m in ("tscam", "scm")]
    assert (tiny[0].pair.dataset, tiny[0].pair.image_size, tiny[0].pair.recipe("scm", 0).images) == (
        "tiny_imagenet", 160, 5000,
    )  # fmt: skip
    for study in scm.VARIANTS:
        for trial in plan(pair).trials(study):
            trial.pair.recipe("scm", trial.seed, **trial.module)  # every change is one that the module knows


def test_pairs_from_other_pretrainings_start_from_their_weights(run, pair, monkeypatch):
    asked = []

    def start_of(run, name, seed):
        asked.append((run.folder, name, seed))
        return {"pretrained": not seed, "checkpoint": f"{name}-{seed}.safetensors" if seed else ""}

    monkeypatch.setattr(scm, "start_of", start_of)
    trials = list(plan(pair).trials("pretrainings", run))
    assert asked == [(run.folder, name, seed) for name in ("a", "b") for seed in (0, 1)]
    assert [(t.variant, t.seed, t.method) for t in trials[4:8]] == [
        ("pretraining 1", n, m) for n in (0, 1) for m in ("tscam", "scm")
    ]
    monkeypatch.setattr(scm.taught, "taught_start", lambda run, *of: {"checkpoint": "-".join(map(str, of))})
    for name in scm.taught.RECIPES:
        photographs = list(plan(pair, tiny_root="tiny", tiny_starts=[name]).trials("pretrainings", run))[len(trials) :]
        assert {(t.variant, t.pair.backbone, t.pair.dataset, t.pair.checkpoint) for t in photographs} == {
            (f"pretraining {seed}", name, "tiny_imagenet", f"{name}-{seed}-tiny") for seed in (0, 1)
        }
    for method in scm.PAIR:
        embedded, other = trials[0].pair.recipe(method, 0), trials[4].pair.recipe(method, 0)
        assert (embedded.pretrained, embedded.checkpoint) == (True, None)
        assert (other.pretrained, other.checkpoint) == (False, "a-1.safetensors")
        assert other.model_copy(update={"pretrained": True, "checkpoint": None}) == embedded


def test_a_row_of_a_study_says_what_was_trained(run, pair):
    trial = scm.Trial("steps", "p = 2", "scm", 0, pair, {"steps": 2, "first_steps": 2})
    rows = list(scm.measured(run, trial))
    assert [row["epoch"] for row in rows] == ["best", "last"]
    assert (rows[0]["variant"], rows[0]["lr"], rows[0]["epochs"]) == ("p = 2", pair.lr, 1)
    assert rows[0]["drift"] > 0
    assert {k: v for k, v in rows[0].items() if k != "epoch"} == {k: v for k, v in rows[1].items() if k != "epoch"}
    model = pair.fit(run, "scm", 0, pair.splits(), progress=False, **trial.module).model
    for number, block in enumerate(model.calibration.blocks, 1):
        assert rows[1][f"lambda_{number}"] == pytest.approx(float(block.lam))
        assert rows[1][f"beta_{number}"] == pytest.approx(float(block.beta))
    assert "lambda_1" not in next(scm.measured(run, trial._replace(method="tscam", module={})))


def test_the_epochs_of_the_longest_regime_are_those_of_its_trainings(run, pair, monkeypatch):
    monkeypatch.setitem(scm.REGIMES, scm.LONGEST, {"epochs": 2})
    monkeypatch.setattr(scm, "PAIR", {"scm": "SCM"})
    studies = plan(pair, study_start=pair.backbone)
    rows = list(studies.epochs(run))
    trial = next(t for t in studies.trials("regimes") if t.variant == scm.LONGEST)
    history = trial.pair.fit(run, "scm", 2, pair.splits(), progress=False).history
    assert [(row["method"], row["seed"], row["epoch"]) for row in rows] == [("scm", 2, 1), ("scm", 2, 2)]
    for name in ("top1", "gt_known", "gt_known_attention"):
        assert [row[name] for row in rows] == history[name].tolist()
