import copy

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from wsolnb import keys
from wsolnb.data.store import Store, WithMasks
from wsolnb.errors import ParameterError
from wsolnb.methods import grabcut
from wsolnb.methods.locloc import Enhance, LocLoc
from wsolnb.methods.ppd import described, logistic
from wsolnb.metrics import ERRORS
from wsolnb.notebook import runs
from wsolnb.notebook.params import notebook_parameters
from wsolnb.papers import locloc
from wsolnb.train import evaluation
from wsolnb.train.loop import history

NOTEBOOKS = ("30_locloc_grabcut", "31_locloc_generator", "32_locloc_classifier")
DECLARED = {notebook: notebook_parameters(notebook) for notebook in NOTEBOOKS}
PARTS = ("generator", "decoder", "classifier", "probe")
SMALL = {"classes": 4, "train_images": 16, "val_images": 4, "test_images": 4, "batch_size": 4, "channels": 4}
SMALL |= {"ppd_hidden": 8, "ppd_channels": 4, "generator_images": 8, "device": "cpu", "precision": "fp32", "jobs": 1}
SMALL |= {f"{part}_epochs": 1 for part in PARTS}


def small(**changes):
    """The notebooks' parameters, in small, with some changes."""
    masks, decoders, classifiers = (
        {name: {**SMALL, **changes}.get(name, parameter.default) for name, parameter in declared.items()}
        for declared in DECLARED.values()
    )
    return locloc.Experiment(masks=masks, decoders=decoders, classifiers=classifiers)


@pytest.fixture(scope="module")
def splits(root):
    return small().masks.splits()


@pytest.fixture
def run(root):
    return runs.start("x", {"seed": 0})


@pytest.fixture
def taught(run, splits):
    return small().masks.taught(run, splits.train)


# Settings


def test_the_settings_are_the_notebooks_parameters():
    for (_, settings), declared in zip(small(), DECLARED.values(), strict=True):
        assert type(settings).model_fields.keys() <= declared.keys()
    with pytest.raises(ValidationError, match="preset"):
        small(preset="papper")


def test_the_masks_configuration_is_that_of_the_parameters():
    config = small(fg_threshold=0.4, heads=2, seed=3).masks.grabcut()
    assert (config.fg_threshold, config.heads, config.seed, config.fallback) == (0.4, 2, 3, None)
    assert small().masks.grabcut(iterations=5).iterations == 5


def test_changes_reach_their_part():
    experiment = small()
    assert experiment.recipe("generator", 0, third_level=True).options["config"]["third_level"]
    assert experiment.recipe("generator", 0, preset="paper").options["config"]["third_level"]
    assert experiment.recipe("decoder", 0, threshold=0.07).options["threshold"] == 0.07
    assert experiment.recipe("decoder", 0).options["threshold"] is None, "0 stands for soft targets"
    assert not experiment.recipe("classifier", 0, enhance_training=False).options["config"]["enhance_training"]
    with pytest.raises(ValidationError, match="third_levl"):
        experiment.recipe("generator", 0, third_levl=True)


def test_parameters_of_the_classifier_do_not_change_the_generator():
    plain, other = small(), small(drop_path=0.3, classifier_epochs=7, classifier_lr=0.5, probe_lr=0.5)
    without = locloc.Experiment(masks=plain.masks, decoders=plain.decoders)
    for part in ("generator", "decoder"):
        assert plain.recipe(part, 0) == other.recipe(part, 0) == without.recipe(part, 0)
    assert other.recipe("classifier", 0).options["drop_path"] == 0.3
    with pytest.raises(ParameterError, match="notebook 32"):
        without.recipe("classifier", 0)


def test_parameters_of_the_decoders_do_not_change_the_classifiers():
    plain, other = small(), small(channels=8, momentum=0.5, ppd_hidden=16, generator_images=3, generator_epochs=7)
    for part in ("classifier", "probe"):
        assert plain.recipe(part, 0) == other.recipe(part, 0)


@pytest.mark.parametrize("part", PARTS)
def test_a_new_part_does_not_depend_on_the_draws_of_its_backbone(part):
    """Weights of the backbone are drawn before they are loaded; the part's come from the seed alone."""
    one = small().recipe(part, 3).build(4)
    other = small(pretrained=False).recipe(part, 3).build(4)
    own = [n for n, _ in one.named_parameters() if not n.startswith("frozen") and "blocks" not in n and "norm" not in n]
    assert own
    assert all(torch.equal(one.get_parameter(name), other.get_parameter(name)) for name in own)
    torch.manual_seed(3)
    backbone = one.frozen.backbone
    plain = type(one).create(copy.deepcopy(backbone), 4, **small().recipe(part, 3).options)
    assert all(torch.equal(one.get_parameter(name), plain.get_parameter(name)) for name in own)


# Training


def test_every_part_trains_once_and_is_found_again(run, splits, taught, capsys):
    experiment = small()
    assert taught.store.count(splits.train.image_ids, "outcome").total() == 16
    for part in PARTS:
        model, folder = experiment.fit(run, part, 0, taught, progress=False)
        again, same = small(jobs=2, num_workers=0).fit(run, part, 0, taught, progress=False)
        assert same == folder
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        fresh = experiment.recipe(part, 0).build(4).state_dict()
        changed = [name for name, value in model.named_parameters() if not torch.equal(value, fresh[name])]
        assert changed
        assert not any(name.startswith("frozen") for name in changed)
        assert not model.frozen.backbone.training
    assert experiment.fit(run, "probe", 1, taught, False)[1] == folder, "logistic regression has no seed"
    sgd = small(probe="sgd")
    assert sgd.fit(run, "probe", 1, taught, False)[1] != sgd.fit(run, "probe", 0, taught, False)[1] != folder
    out = capsys.readouterr().out
    assert out.count("reusing generator-0") == 1


def test_a_decoder_sees_some_of_the_images_and_a_classifier_all(run, taught):
    steps = {}
    for part in ("generator", "classifier"):
        model, folder = small().fit(run, part, 0, taught, progress=False)
        norm = next(m for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d) and "frozen" not in n)
        steps[part] = int(norm.num_batches_tracked)
        assert len(history(folder)) == 1
    assert steps == {"generator": 2, "classifier": 4}


def test_only_what_learns_from_masks_is_given_any(run, splits, taught, monkeypatch):
    seen = {}
    monkeypatch.setattr(locloc, "fit", lambda run, name, recipe, data, *_: seen.update({name: data}) or (None, None))
    for part in PARTS:
        small(probe="sgd").fit(run, part, 0, taught)
    assert isinstance(seen["generator-0"], WithMasks)
    assert isinstance(seen["classifier-0"], WithMasks)
    assert seen["decoder-0"] is seen["probe-0"] is splits.train
    small().fit(run, "classifier", 1, taught, enhance_training=False)
    assert seen["classifier-1"] is splits.train
    # The data set's own masks are the truth, which nothing may learn from.
    assert splits.train[0].mask is not None
    for part in ("generator", "classifier"):
        with pytest.raises(ParameterError, match=f"{part} learns from masks"):
            small().fit(run, part, 0, splits.train)
        model = small().recipe(part, 0).build(4)
        assert model.learns_from_masks
        assert model.first_transforms() == ([Enhance(rectangle=True)] if part == "classifier" else [])
    plain = small().recipe("classifier", 0, enhance_training=False).build(4)
    assert not plain.learns_from_masks
    assert plain.first_transforms() == []


def test_masks_are_another_artefact_by_what_makes_them(run, splits):
    masks = small().masks
    folder = masks.store(run, splits.val, progress=False).folder
    assert small(jobs=2, batch_size=8, search_images=9).masks.store(run, splits.val, progress=False).folder == folder
    others = [
        masks.store(run, splits.val, masks.grabcut(iterations=2), False),
        masks.store(run, splits.val, masks.grabcut(heads=2), False),
        small(pretrained=False).masks.store(run, splits.val, progress=False),
        masks.store(run, splits.val.subset([0, 1]), progress=False),
    ]
    assert len({folder, *(other.folder for other in others)}) == 5


def test_masks_that_were_damaged_since_are_made_anew(run, splits):
    store = small().masks.store(run, splits.val, progress=False)
    file = store.path(splits.val.image_ids[1], ".png")
    whole = file.read_bytes()
    file.write_bytes(whole[:50])
    assert small().masks.store(run, splits.val, progress=False).folder == store.folder
    assert file.read_bytes() == whole


def test_the_logistic_probe_is_that_of_plain_images(run, splits, taught):
    model, folder = small().fit(run, "probe", 0, taught, progress=False)
    (features, labels), (held, _) = (described(model, part, small().test_transform()) for part in splits[:2])
    choice = pd.read_csv(folder / "choice.csv")
    weight, bias = logistic(features, labels, choice.C[choice["validation top-1"].idxmax()])
    linear = model.probe.linear.cpu()
    assert np.allclose(linear.weight.detach().numpy(), weight, atol=1e-4)
    with torch.no_grad():
        assert np.allclose(linear(torch.from_numpy(held)).numpy(), held @ weight.T + bias, atol=1e-3)


# Notebook 30


def test_iou_leaves_out_what_is_unknown():
    mask = np.array([[True, True, False, False]])
    assert locloc.mask_iou(mask, np.array([[1, 0, 1, 0]])) == pytest.approx(1 / 3)
    assert locloc.mask_iou(mask, np.array([[1, 255, 255, 0]])) == 1
    assert locloc.mask_iou(~mask & mask, np.zeros((1, 4))) == 0


def test_the_search_is_a_loop_over_images_and_thresholds(run, splits, monkeypatch):
    monkeypatch.setattr(locloc, "FG", (0.3,))
    monkeypatch.setattr(locloc, "BG", (0.005, 0.03))
    masks = small(search_images=3, size=56).masks
    found = locloc.search(run, masks, splits.val)
    attend = masks.attend()
    for row in found[found.by != "attention"].itertuples():
        iou, fell_back = [], []
        for index in (0, 1, 3):
            sample = splits.val[index]
            side = row.by.removeprefix("GrabCut, ")
            config = masks.grabcut(fg_threshold=row.fg, bg_threshold=row.bg, uncertain=side)
            cut = grabcut.enhance_sample(sample, attend([sample])[0], config)
            iou.append(locloc.mask_iou(cut.mask, sample.mask[::2, ::2]))
            fell_back.append(cut.outcome != "enhanced")
        assert row.iou == pytest.approx(np.mean(iou), abs=0.03)  # the truth's own resizing is another one
        assert row.fell_back == pytest.approx(np.mean(fell_back))
    assert len(found) == 9 + 12 + 2 * 2
    assert locloc.search(run, masks.model_copy(update={"fg_threshold": 0.5}), splits.val).equals(found)


def test_pairs_are_before_and_after(run, splits):
    masks = small().masks
    found = locloc.pairs(run, masks, splits.val, 0.1)
    store, attend = masks.store(run, splits.val, progress=False), masks.attend()
    assert list(found.image) == [0, 1, 2, 3]
    for row in found.itertuples():
        sample = splits.val[row.image]
        after, facts = store.read_mask(sample.image_id)
        assert row.after == pytest.approx(locloc.mask_iou(after, sample.mask))
        assert row.outcome == facts["outcome"]
        before = grabcut.enlarge(attend([sample])[0], (112, 112)) >= 0.1
        assert row.before == pytest.approx(locloc.mask_iou(before, sample.mask), abs=1e-3)


def test_without_true_masks_the_given_thresholds_stand(run, splits):
    """As of ILSVRC: `WithMasks` of an empty store reads an image without any truth."""

    class Bare(WithMasks):
        def read(self, index, truth=True):
            return self.dataset.read(index, truth=False)

    bare, masks = Bare(splits.val, Store(run.folder / "none")), small(fg_threshold=0.4).masks
    found = locloc.search(run, masks, bare)
    assert list(found.by) == ["attention", "GrabCut"]
    assert set(found.fg) == {0.4}
    assert found.iou.isna().all()
    assert len(locloc.pairs(run, masks, bare, 0.4)) == 0


# Maps and scores


def test_maps_of_masks_and_of_attention(run, splits):
    experiment = small()
    masks, transform = experiment.masks, experiment.test_transform()
    store, attend = masks.store(run, splits.val, progress=False), masks.attend()
    cut = list(locloc.mask_maps(store, splits.val, transform))[2]
    assert np.array_equal(cut.maps["GrabCut mask"] == 1, store.read_mask(splits.val.image_ids[2])[0])
    assert np.array_equal(cut.sample.mask, splits.val[2].mask), "the sample has the truth"
    attention = list(locloc.attention_maps(attend, splits.val, transform))[2].maps["attention"]
    assert attention.shape == cut.maps["GrabCut mask"].shape == (112, 112)
    assert (attention.min(), attention.max()) == (0, 1)
    guide = attend([splits.val[2]])[0]
    assert guide.shape == (14, 14)
    row, column = np.unravel_index(guide.argmax(), guide.shape)
    peak = np.unravel_index(attention.argmax(), (112, 112))
    assert (peak[0] // 8, peak[1] // 8) == (row, column)


def test_masks_move_as_their_image_does(run, splits):
    """The protocol `crop` cuts the image's border off, and that of its mask."""
    experiment = small(protocol="crop")
    store = experiment.masks.store(run, splits.val, progress=False)
    found = next(locloc.mask_maps(store, splits.val, experiment.test_transform()))
    whole = store.read_mask(splits.val.image_ids[0])[0]
    inner = whole[7:-7, 7:-7]
    assert found.maps["GrabCut mask"].shape == (112, 112)
    assert found.maps["GrabCut mask"].mean() == pytest.approx(inner.mean(), abs=0.02)


def test_four_maps_are_those_of_their_sources(run, splits, taught):
    experiment = small()
    transform, attend = experiment.test_transform(), experiment.masks.attend()
    store = experiment.masks.store(run, splits.val, progress=False)
    parts = {"GEG": "generator", "PPD": "decoder"}
    models = {name: experiment.fit(run, part, 0, taught, False)[0] for name, part in parts.items()}
    found = list(locloc.four_maps(attend, store, models, splits.val, transform))
    assert [one.sample.image_id for one in found] == list(splits.val.image_ids)
    assert {one.logits for one in found} == {None}
    alone = [
        locloc.attention_maps(attend, splits.val, transform),
        locloc.mask_maps(store, splits.val, transform),
        *(evaluation.predict(model, splits.val, transform) for model in models.values()),
    ]
    for together, *single in zip(found, *alone, strict=True):
        assert list(together.maps) == ["attention", "GrabCut mask", "GEG", "PPD"]
        for one, score_map in zip(single, together.maps.values(), strict=True):
            assert np.array_equal(next(iter(one.maps.values())), score_map)
    scores = locloc.map_scores(run, experiment, splits, models)
    assert list(scores["map"]) == ["attention", "GrabCut mask", "GEG", "PPD"]
    test, val = (evaluation.evaluate(models["GEG"], part, transform) for part in (splits.test, splits.val))
    expected = test.table(val)[0]
    row = scores.set_index("map").loc["GEG"]
    assert all(row[name] == pytest.approx(expected[name]) for name in ("gt_known", "maxboxacc_v2", "mask_iou", "pxap"))
    assert scores[["right", *ERRORS[1:]]].sum(axis=1).tolist() == pytest.approx([1] * 4)


def test_the_whole_is_put_together_from_what_was_trained(run, splits, taught, capsys):
    experiment = small()
    single = {part: experiment.fit(run, part, 0, taught, False)[0] for part in PARTS}
    capsys.readouterr()
    models = experiment.assemble(run, 0, taught, False)
    out = capsys.readouterr().out
    assert out.count("reusing") == len(out.splitlines()) == 4, "the parts are those of notebooks 31 and 32"
    assert models["LocLoc"].config == experiment.config()
    for whole, part, name in (("LocLoc", "generator", "generator"), ("LocLoc", "classifier", "classifier"),
                              ("PPD", "decoder", "decoder"), ("PPD", "probe", "probe")):  # fmt: skip
        own, put = getattr(single[part], name).state_dict(), getattr(models[whole], name).state_dict()
        assert all(torch.equal(value, put[key]) for key, value in own.items())
    transform = experiment.test_transform()
    rows = locloc.whole_scores(run, experiment, splits, models, 0)
    for row, model in zip(rows, models.values(), strict=True):
        test, val = (evaluation.evaluate(model, part, transform) for part in (splits.test, splits.val))
        expected = test.table(val)[0]
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        logits = [one.logits for one in evaluation.predict(model, splits.test, transform)]
        first = np.argsort(-np.stack(logits), axis=1, kind="stable")[:, :5]
        labels = [label for (label,) in splits.test.labels]
        assert row["top5"] == np.mean([label in ranks for label, ranks in zip(labels, first, strict=True)])
        assert row["top1"] == locloc.top1(model, splits.test, transform)


def test_class_scores_and_studies(run, splits, taught):
    experiment = small()
    three = (experiment.fit(run, part, 0, taught, False)[0] for part in ("generator", "classifier", "probe"))
    generator, classifier, probe = three
    scores = locloc.class_scores(run, experiment, splits, generator, classifier, probe)
    assert list(scores.classifier) == ["LFDM", "LFDM", "linear probe", "LFDM, enhanced at test"]
    assert list(scores["map"][:2]) == ["generated", "classifier"]
    whole = LocLoc(generator.frozen.backbone, 4, generator.generator, classifier.classifier)
    assert scores.top1[0] == locloc.top1(whole, splits.test, experiment.test_transform())
    variants = ["LFDM", "LFDM, plain images", "linear probe"]
    table = pd.DataFrame(locloc.study(run, experiment, splits, variants, [0], generator))
    assert list(table.variant) == variants
    assert table.top1[0] == scores.top1[0]
    assert table.top1_enhanced[0] == scores.top1[3]
    epochs = experiment.recipe("classifier", 0).training.epochs
    assert table.epochs.tolist()[:2] == [epochs] * 2
    assert table.epochs.isna()[2], "the probe is no training of epochs"
    maps = pd.DataFrame(locloc.study(run, experiment, splits, ["GEG", "GEG, attention >= 0.07"], [0]))
    assert list(maps.variant) == ["GEG", "GEG, attention >= 0.07"]
    assert not {"map", "top1", "top1_loc"} & set(maps)


def test_a_classifier_of_the_paper_is_shown_masked_images_at_test(run, splits, taught, monkeypatch):
    experiment, transform, shown = small(), small().test_transform(), []

    def top1(model, dataset, asked, measure=locloc.top1):
        shown.append([asked(dataset[index], None).image for index in range(len(dataset))])
        return measure(model, dataset, asked)

    monkeypatch.setattr(locloc, "top1", top1)
    generator = experiment.fit(run, "generator", 0, taught, False)[0]
    level = evaluation.evaluate(generator, splits.val, transform).thresholds()["generated"]
    images = [sample.image for sample in splits.test]
    masks = {
        "LFDM, GrabCut": [one.mask for one in experiment.masks.taught(run, splits.test)],
        "LFDM, generator": [
            f.maps["generated"] >= level for f in evaluation.predict(generator, splits.test, transform)
        ],
        "LFDM, truth": [sample.mask for sample in splits.test],
    }
    rows = list(locloc.study(run, experiment, splits, [*masks], [0], generator))
    for name, row, plain, black in zip(masks, rows, shown[::2], shown[1::2], strict=True):
        assert np.array_equal(plain, images)
        assert np.array_equal(
            black, [image * (mask != 0)[..., None] for image, mask in zip(images, masks[name], strict=True)]
        )
        assert np.array_equal(plain, black) == (name == "LFDM, generator" and level == 0), "a mask hides something"
        assert {"top1", "top1_plain"} <= set(row)
    kinds = ("GrabCut", "generator", "true")
    data = [locloc.masked_by(run, experiment, splits, kind, generator)(splits.train) for kind in kinds]
    trained = {experiment.fit(run, "classifier", 0, one, False, **locloc.PAPER)[1] for one in data}
    assert len(trained) == 3, "each learns from masks of its own"


def test_a_classifier_alone_is_shown_plain_images(run, splits, taught):
    """Of the preset `paper`, too, whose joint model masks its test images."""
    experiment = small(preset="paper")
    model, _ = experiment.fit(run, "classifier", 0, taught, False)
    assert experiment.config().enhance_test
    assert next(evaluation.predict(model, splits.val, experiment.test_transform())).logits.shape == (4,)


def test_the_variants_of_the_studies_are_those_that_the_notebooks_offer():
    offered = "".join(DECLARED[notebook]["variants"].type for notebook in NOTEBOOKS[1:])
    assert offered.count("'") == 2 * len(locloc.VARIANTS)
    assert all(repr(name) in offered for name in locloc.VARIANTS)


def test_longer_multiplies_the_epochs_and_changes_nothing_else():
    for part in ("generator", "decoder", "classifier"):
        short, long = (small().recipe(part, 1, longer=longer) for longer in (1, 4))
        assert short == small().recipe(part, 1)
        assert long.training.epochs == 4 * short.training.epochs
        same = long.training.model_copy(update={"epochs": short.training.epochs})
        assert long.model_copy(update={"training": same}) == short


def test_paired_differences_over_seeds():
    table = pd.DataFrame({"seed": [0, 1, 0, 1], "variant": ["a", "a", "b", "b"], "iou": [0.5, 0.75, 0.25, 0.75]})
    assert locloc.paired(table, "variant", "iou", "a", "b") == "+0.125 ± 1.588 (above 0 for 1 of 2 seeds)"
    more = pd.concat([table, pd.DataFrame({"seed": [2], "variant": ["a"], "iou": [0.9]})])
    assert locloc.paired(more, "variant", "iou", "a", "b") == "+0.125 ± 1.588 (above 0 for 1 of 2 seeds)"


def test_a_store_with_a_changed_mask_is_another_key(run, splits, tmp_path):
    store = Store(tmp_path)
    for image_id in splits.val.image_ids:
        store.write_mask(image_id, np.zeros((112, 112), bool), outcome="empty")
    before = keys.key_of(WithMasks(splits.val, store)).hash
    store.write_mask(splits.val.image_ids[0], np.ones((112, 112), bool), outcome="full")
    assert keys.key_of(WithMasks(splits.val, store)).hash != before
