import math
import pickle
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import trees

from wsolnb.data import aviary, open_dataset
from wsolnb.data.store import ClassMaps, Store, WithMasks
from wsolnb.data.transforms import resize
from wsolnb.errors import ParameterError
from wsolnb.maps import upsample
from wsolnb.methods.irn import IRNConfig, irn_labels
from wsolnb.methods.lpcam import LPCAMConfig
from wsolnb.methods.prototypes import ClassPrototypes, directions_by_kind, variant_maps
from wsolnb.notebook import params, runs
from wsolnb.papers import lpcam, pseudo_masks
from wsolnb.train import multilabel
from wsolnb.train.seeds import evaluate, region_features, scored
from wsolnb.train.segmentation import class_mask

ROOT_NOTEBOOKS = ("20_lpcam_classifier", "21_lpcam_prototypes", "22_lpcam_results", "23_lpcam_segmentation")


def defaults(notebook, **changes):
    """The parameters that a notebook declares."""
    return {name: p.default for name, p in params.notebook_parameters(notebook).items()} | changes


SMALL = {
    "classes": 3, "train_images": 12, "val_images": 4, "test_images": 4, "image_size": 64, "epochs": 1,
    "batch_size": 4, "pretrained": False, "device": "cpu", "precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.start("23_lpcam_segmentation", {"seed": 0}, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def host(run):
    return lpcam.Classifier(**defaults("20_lpcam_classifier", **SMALL)).host(run)


@pytest.fixture(scope="module")
def base():
    chosen = {"clusters": 2, "images_per_class": 3, "features_per_class": 200}
    return lpcam.Prototypes(**defaults("21_lpcam_prototypes", **chosen)).config()


def test_the_settings_are_the_parameters_of_the_notebooks():
    pairs = zip(
        ROOT_NOTEBOOKS, (lpcam.Classifier, lpcam.Prototypes, lpcam.Claim, pseudo_masks.Segmentation), strict=True
    )  # each field is declared by its notebook, and none has a value of its own
    for notebook, kind in pairs:
        assert set(kind.model_fields) <= set(defaults(notebook)), notebook
        assert all(field.is_required() for field in kind.model_fields.values())
        kind(**defaults(notebook))


def test_voc_s_seeds_are_judged_on_training_images_and_segmentation_on_val(tmp_path):
    config = aviary.AviaryConfig(variant="scenes", classes=3, size=48, train=12, val=6, test=4)
    root = aviary.load(config, "train", tmp_path).root  # the scenes are written in VOC's layout
    settings = defaults(
        "20_lpcam_classifier", dataset="voc", data_root=str(root), optimizer="sgd", lr=0.1, head_lr=1.0,
        backbone="resnet50", image_size=512, output_stride=16, long_side=[320, 640],
    )  # fmt: skip
    classifier = lpcam.Classifier(**settings)
    found, recipe = classifier.splits(), classifier.recipe()
    published = {name: open_dataset("voc", root, name).image_ids for name in ("train", "val")}
    assert set(found.train.image_ids) == set(found.test.image_ids) == set(published["train"]) - set(found.val.image_ids)
    assert 0 < len(found.val) < len(found.test)
    assert set(found.val.image_ids) < set(published["train"])
    assert classifier.evaluation(found).image_ids == published["val"]
    assert not set(published["val"]) & {name for split in found for name in split.image_ids}
    assert found.test[0].mask is not None
    assert found.val[0].mask is not None
    of_birds = classifier.changed(dataset="aviary", data_root="")
    assert of_birds.evaluation(found) is found.test
    assert recipe.map_size is None
    assert (recipe.training.momentum, recipe.training.schedule, recipe.training.clip) == (0.0, "poly", 0.0)
    assert recipe.train_transform()(found.train[0], np.random.default_rng(0)).size == (512, 512)
    listed = root / "some.txt"
    names = (found.val.image_ids[0], found.train.image_ids[3])
    listed.write_text("".join(f"/JPEGImages/{name}.jpg /SegmentationClass/{name}.png\n" for name in names))
    enlarged = classifier.changed(train_list=str(listed)).splits()  # what is for choices is never trained on
    assert enlarged.train.image_ids == (found.train.image_ids[3],)
    assert enlarged.val.image_ids == found.val.image_ids


def test_scenes_are_rendered_at_the_size_that_is_asked_for():
    sizes = {}
    for side in (48, 96):
        settings = defaults("20_lpcam_classifier", **SMALL, render_size=side)
        sizes[side] = [part[0].image.shape for part in lpcam.Classifier(**settings).splits()]
    assert sizes == {side: 3 * [(side, side, 3)] for side in (48, 96)}


def test_coco_is_evaluated_on_the_published_val_images(tmp_path):
    settings = defaults("20_lpcam_classifier", dataset="coco", data_root=str(trees.coco(tmp_path)))
    classifier = lpcam.Classifier(**settings)
    found = classifier.splits()
    published = open_dataset("coco", settings["data_root"], "trainval").image_ids
    assert sorted(found.train.image_ids + found.val.image_ids) == sorted(published)
    assert len(published) == 24  # all but the one without an object
    evaluated = classifier.evaluation(found).image_ids
    assert len(evaluated) == 8
    assert all(name.startswith("COCO_val2014") for name in evaluated)


def test_only_what_the_released_programs_leave_undilated_is(tmp_path):
    settings = pseudo_masks.Segmentation(**defaults("23_lpcam_segmentation"))
    for dilate in (True, False):
        classifier = lpcam.Classifier(**defaults("20_lpcam_classifier", output_stride=16, dilate=dilate))
        models = [classifier.recipe(), settings.recipe("irn", classifier), settings.recipe("segmenter", classifier)]
        backbones = [recipe.empty(3).backbone for recipe in models]
        assert [one.dilated for one in backbones] == [dilate, dilate, True]
        assert [one.stride for one in backbones] == [16, 16, 8]


def test_pictures_show_a_class_with_clusters_and_an_image(host):
    def of(*sizes):
        """Prototypes of classes with so many foreground and context centres."""
        return [ClassPrototypes(torch.zeros(f, 4), torch.zeros(c, 4), 1, (f, c)) for f, c in sizes]

    dataset = host.splits.test.subset([i for i, own in enumerate(host.splits.test.labels) if 0 not in own])
    assert dataset.labels
    shown = next(label for own in dataset.labels for label in own)
    assert lpcam.shown_class(of((2, 2), (2, 2), (2, 2)), dataset, shown) == shown
    assert lpcam.shown_class(of((2, 2), (2, 2), (2, 2)), dataset, 0) in {
        label for own in dataset.labels for label in own
    }
    without = [(2, 2), (2, 2), (2, 2)]
    without[shown] = (0, 2)
    assert lpcam.shown_class(of(*without), host.splits.test, shown) == 0
    with pytest.raises(ParameterError, match=r"no class of .* has centres"):
        lpcam.shown_class(of((0, 2), (2, 0), (0, 0)), host.splits.test, 0)


def test_prototypes_are_shared_by_what_selects_differently(run, host, base, capsys):
    _, folder = lpcam.cached_prototypes(run, host, base)
    _, same = lpcam.cached_prototypes(run, host, base.model_copy(update={"mu_f": 0.1, "mu_b_least": 0.05}))
    assert same == folder
    _, other = lpcam.cached_prototypes(run, host, base.model_copy(update={"tau": 0.5}))
    assert other != folder
    again = lpcam.Classifier(**defaults("20_lpcam_classifier", **SMALL)).host(run)  # another notebook's
    assert again.folder == host.folder
    assert lpcam.cached_prototypes(run, again, base)[1] == folder


def test_the_claim_has_a_row_for_each_map_and_choice(run, host, base):
    claim = lpcam.Claim(**defaults("22_lpcam_results", grid_mu_f=[0.1, 0.9], grid_mu_b=[0.9]))
    rows = list(claim.measured(run, host.classifier, base, "claim", {"epochs": 1}))
    assert [(row["map"], row["hyper"]) for row in rows] == [
        ("cam", "paper"), ("lpcam-f", "paper"), ("lpcam", "paper"), ("lpcam-f", "chosen"), ("lpcam", "chosen"),
        ("lpcam", "chosen, floor"),
    ]  # fmt: skip
    assert all(0 <= row["miou"] <= row["oracle"] + 1e-12 for row in rows)
    best, kept = [], []
    for c, own in enumerate(lpcam.cached_prototypes(run, host, base)[0]):
        logits = [[float(centre @ weight) for weight in host.weight] for centre in own.foreground]
        shares = [math.exp(row[c]) / sum(math.exp(value) for value in row) for row in logits]
        best.append(max(shares))
        kept.append(sum(share > base.mu_f for share in shares))
    for row in rows:
        assert row["best_centre"] == pytest.approx(sum(best) / len(best))
        assert row["kept_centres"] == sum(kept) / len(kept)
    table = pd.DataFrame(rows)
    table = pd.concat([table, table.assign(seed=1, miou=table.miou + 0.1 * (table["map"] == "lpcam"))])
    compared = lpcam.against_cam(table, "claim", ["epochs"]).iloc[0]
    difference = rows[2]["miou"] - rows[0]["miou"]
    assert compared["lpcam, paper"].startswith(f"{difference + 0.05:+.3f} ± ")
    assert compared.seeds == 2
    errors = lpcam.differences(table, "claim", ["epochs"], ["fp", "miou"], hyper="paper").iloc[0]
    assert errors["miou"] == compared["lpcam, paper"]
    assert errors["fp"] == f"{rows[2]['fp'] - rows[0]['fp']:+.3f} ± 0.000"
    context = lpcam.differences(table, "claim", ["epochs"], ["fp"], hyper="paper", less=("lpcam-f", "paper")).iloc[0]
    by_map = {row["map"]: row["fp"] for row in rows if row["hyper"] == "paper"}
    assert context["fp"] == f"{by_map['lpcam'] - by_map['lpcam-f']:+.3f} ± 0.000"
    for row in rows:  # with the background as a class they add to one
        assert row["miou"] + row["fp"] + row["fn"] == pytest.approx(1)
        assert {"fp_foreground", "fn_foreground"} <= set(row)
    assert rows[-1]["hyper"] == "chosen, floor"
    assert lpcam.FLOOR == {"mu_b_least": 0.05}  # the floor alone
    first = lpcam.CHECKED["clustering"][0]
    assert next(lpcam.checked(run, host, base, "clustering"))["variant"] == ", ".join(
        f"{k} {v}" for k, v in first.items()
    )


def test_variants_in_one_pass_score_as_each_alone(host, run, base, monkeypatch):
    tried = [{"mu_f": 0.1}, {"flip": "none"}, {"flip": "none", "mu_f": 0.1}, {"mu_f": 0.9, "tau": 0.3}]
    monkeypatch.setitem(lpcam.CHECKED, "switches", tried)
    rows = list(lpcam.checked(run, host, base, "switches"))
    for changes, row in zip(tried, rows, strict=True):
        changed = base.model_copy(update=changes)
        prototypes, _ = lpcam.cached_prototypes(run, host, changed)
        by_kind = directions_by_kind(prototypes, host.weight, changed, missing="zero")
        alone = lpcam.best_thresholds(host.sources.val, by_kind, changed)
        assert [row[kind] for kind in by_kind] == [one["miou"] for one in alone]
        assert row["threshold"] == alone[-1]["threshold"]


def test_the_common_threshold_is_that_of_the_curve(host, run, base):
    rows = list(lpcam.checked(run, host, base, "threshold"))
    prototypes, _ = lpcam.cached_prototypes(run, host, base)
    by_kind = directions_by_kind(prototypes, host.weight, base, missing="zero")
    found = evaluate(variant_maps(host.sources.val, by_kind, base), host.splits.val, parts=False)
    for row, cut in zip(rows, lpcam.CUTS, strict=True):
        assert row["variant"] == f"threshold {cut}"
        for kind in by_kind:
            assert row[kind] == found[kind].segmentation.curve.at(cut)["miou"]


def test_photographs_are_checked_with_the_paper_s_selection(host, run, base, monkeypatch):
    claim = lpcam.Claim(**defaults("22_lpcam_results", photos_root="pets", checked_on=["photographs"]))
    asked = []
    monkeypatch.setattr(lpcam.Classifier, "host", lambda own, run: asked.append(own) or host)
    _, config = claim.checked_host(run, host.classifier, base, "photographs", 3)
    assert (asked[0].dataset, asked[0].data_root, asked[0].seed, asked[0].train_seed) == ("pets", "pets", 3, 3)
    assert asked[0].frozen
    assert config == base.model_copy(update={"scales": LPCAMConfig.paper().scales, "seed": 3})
    _, config = claim.checked_host(run, host.classifier, base, "scenes", 3)
    assert config == claim.choose(run, host, lpcam.cached_prototypes(run, host, base)[0], base)["lpcam"]


def test_the_ladder_differs_in_the_epochs_alone(host):
    claim = lpcam.Claim(**defaults("22_lpcam_results", ladder=[2, 7], claim_seeds=[0, 3]))
    cases = list(claim.trainings("ladder", host.classifier))
    assert [(where["epochs"], changes["train_seed"]) for where, changes in cases] == [(2, 0), (2, 3), (7, 0), (7, 3)]
    trained = [host.classifier.changed(**changes) for _, changes in cases]
    assert len({one.changed(epochs=1, train_seed=0) for one in trained}) == 1
    assert trained[0].train_images == claim.study_train_images


def test_the_pretrainings_differ_in_the_start_alone(host, run, monkeypatch):
    def start_of(run, name, seed):
        return {"pretrained": False, "checkpoint": f"{name}-{seed}.safetensors"}

    monkeypatch.setattr(lpcam, "start_of", start_of)
    claim = lpcam.Claim(**defaults("22_lpcam_results", pretraining_seeds=[0, 2], claim_seeds=[0, 3]))
    cases, changes = zip(*claim.trainings("pretrainings", host.classifier, run), strict=True)
    assert [(where["pretraining"], one["train_seed"]) for where, one in zip(cases, changes, strict=True)] == [
        (0, 0), (0, 3), (2, 0), (2, 3),
    ]  # fmt: skip
    embedded, other = (host.classifier.changed(**changes[place]) for place in (0, 2))
    _, of_the_claim = next(claim.trainings("claim", host.classifier))
    assert embedded == host.classifier.changed(**of_the_claim)
    assert other.recipe().checkpoint == f"{embedded.backbone}-2.safetensors"
    assert other.changed(pretrained=embedded.pretrained, checkpoint="") == embedded


def test_the_imagenet_study_trains_no_feature_and_draws_other_images_and_clusters(host, run, base, monkeypatch):
    claim = lpcam.Claim(**defaults("22_lpcam_results", claim_seeds=[0, 3], photos_root="pets"))
    cases, changes = zip(*claim.trainings("imagenet", host.classifier), strict=True)
    assert list(cases) == [{"epochs": 0}] * 2
    assert [(one["seed"], one["train_seed"]) for one in changes] == [(0, 0), (3, 3)]
    assert {(one["dataset"], one["data_root"], one["frozen"]) for one in changes} == {("pets", "pets", True)}
    asked = []
    monkeypatch.setattr(lpcam, "cached_prototypes", lambda run, host, config: asked.append(config) or 1 / 0)
    for study in ("imagenet", "photographs"):
        with pytest.raises(ZeroDivisionError):
            next(claim.measured(run, host.classifier.changed(seed=0, frozen=True), base, study, {}))
    assert asked[0].scales == LPCAMConfig.paper().scales != base.scales
    assert asked[1].scales == base.scales


def test_a_frozen_host_is_made_once_and_a_transformer_is_none(run, host, capsys):
    frozen = host.classifier.changed(frozen=True).host(run)
    again = host.classifier.changed(frozen=True, lr=0.5).host(run)
    assert "reusing classifier-0" in capsys.readouterr().out
    assert frozen.folder == again.folder != host.folder
    assert torch.equal(frozen.weight, again.weight)
    assert not frozen.model.training
    for method in ("mctformer", "cam"):
        with pytest.raises(ParameterError, match=f"frozen features of 'vit_mini' for the method '{method}'"):
            host.classifier.changed(frozen=True, method=method, backbone="vit_mini").host(run)
    with pytest.raises(ParameterError, match="leave long_side empty"):
        host.classifier.changed(frozen=True, long_side=(40, 60)).host(run)
    claim = lpcam.Claim(**defaults("22_lpcam_results"))
    started_frozen = host.classifier.changed(frozen=True, long_side=(40, 60))
    for study, learns in (("claim", True), ("photographs", True), ("hosts", True), ("imagenet", False)):
        _, changes = next(claim.trainings(study, started_frozen))
        assert started_frozen.changed(**changes).frozen is not learns


def test_the_shared_dimensions_are_counted_one_by_one(host):
    table = lpcam.weight_overlap(host, top=3).set_index("class")
    regions = region_features(host.sources.val, host.splits.val)
    for c, name in enumerate(host.splits.val.class_names):
        weight = host.weight[c].double()
        own = sorted(range(len(weight)), key=lambda d: -weight[d])[:3]
        for r, region in enumerate(("head", "rest", "context")):
            feature = regions.raw[c, r]
            theirs = sorted(range(len(feature)), key=lambda d: -feature[d])[:3]
            assert table.loc[name, region] == sum(d in theirs for d in own)
            cosine = float(weight @ feature / (weight.norm() * feature.norm()))
            assert table.loc[name, f"cosine {region}"] == pytest.approx(cosine, abs=0.006, nan_ok=True)
    assert (table.chance == round(9 / len(weight), 1)).all()


def test_confusing_classes_and_what_their_maps_cover_are_counted_one_by_one(run):
    more = SMALL | {"classes": 6, "val_images": 12, "test_images": 12}
    host = lpcam.Classifier(**defaults("20_lpcam_classifier", **more)).host(run)
    logits, shown = multilabel.predict(host.judge, host.splits.val, host.classifier.image_size)
    found = lpcam.confusing_classes(host)
    for label, others in found.items():
        means = {}
        for k in set(range(len(found))) - {label}:
            of = [z[k] for z, y in zip(logits, shown, strict=True) if y[label] and not y[k]]
            if of:
                means[k] = sum(of) / len(of)
        assert others == [k for _, k in sorted(((-v, k) for k, v in means.items()))][:2]

    rows, test = {"confusing": [], "other absent": []}, host.splits.test
    for index, sample in enumerate(test):
        above, truth = lpcam.cams_of_all_classes(host, index) > 0.2, class_mask(sample, test.multi_label)
        for label in sample.labels:
            pixels = [(y, x) for y, x in np.ndindex(truth.shape) if truth[y, x] == label + 1]
            regions = [[p for p in pixels if above[label][p]], [p for p in pixels if not above[label][p]]]
            regions.append([p for p in np.ndindex(truth.shape) if truth[p] == 0])
            absent = [k for k in range(len(above)) if k not in sample.labels]
            kinds = [[k for k in absent if k in found[label]], [k for k in absent if k not in found[label]]]
            if all(kinds) and all(regions):
                for own, classes in zip(rows.values(), kinds, strict=True):
                    shares = [[sum(above[k][p] for p in region) / len(region) for k in classes] for region in regions]
                    own.append([len(regions[0]) / len(pixels), *(sum(s) / len(s) for s in shares)])
    table = lpcam.confusion(host, 0.2, images=len(test))
    assert min(map(len, rows.values())) > 0
    for kind, own in rows.items():
        assert np.allclose(table.loc[kind], np.mean(own, axis=0))


def test_the_studies_of_several_classifiers(run, host, base, monkeypatch):
    few = {"checked_seeds": [0, 1], "claim_seeds": [0, 1], "grid_mu_f": [0.1, 0.9], "grid_mu_b": [0.9]}
    claim = lpcam.Claim(**defaults("22_lpcam_results", **few))
    monkeypatch.setitem(lpcam.CHECKED, "tau", [{"tau": 0.1}])
    monkeypatch.setattr(lpcam, "confusing_classes", partial(lpcam.confusing_classes, count=1))  # of three classes
    _, checked = claim.tables(run, ["tau", "bias", "confusion"], host.classifier, base)
    checked = checked[checked.data == "scenes"]  # of which none is left of the recorded ones
    tau, bias = (checked[checked.study == name] for name in ("tau", "bias"))
    assert list(tau.seed) == [0, 1]
    assert list(tau.variant) == ["tau 0.1"] * 2
    assert sorted(bias[bias.seed == 1].variant) == sorted(host.splits.val.class_names)
    confusion = checked[checked.study == "confusion"]
    assert [(row.seed, row.variant) for row in confusion.itertuples()] == [
        (n, kind) for n in (0, 1) for kind in ("confusing", "other absent")
    ]
    assert confusion.threshold.between(0, 1).all()
    own = lpcam.weight_overlap(host).set_index("class")
    assert list(bias[bias.seed == host.number].set_index("variant")["head"]) == list(own["head"])
    hosts = list(claim.trainings("hosts", host.classifier))
    asked = [(where["host"], where["epochs"], host.classifier.changed(**changes)) for where, changes in hosts]
    assert [(name, own.train_seed) for name, _, own in asked] == [
        ("mctformer", 0), ("mctformer", 1), ("amn", 0), ("amn", 1), ("edam", 0), ("edam", 1),
    ]  # fmt: skip
    assert all(name == own.method and epochs == own.epochs for name, epochs, own in asked)
    assert [own.backbone for _, _, own in asked[::2]] == ["vit_mini", "resnet_mini", "resnet_mini"]


@pytest.fixture(scope="module")
def mctformer(run):
    changes = {"method": "mctformer", "backbone": "vit_mini", "lr": 0.0002, "head_lr": 0.002}
    return lpcam.Classifier(**defaults("20_lpcam_classifier", **SMALL, **changes)).host(run)


def test_mctformers_own_map_is_refined_attention_times_cam(mctformer, base):
    data = mctformer.splits.val
    found = list(lpcam.plugged(mctformer, {"cam": None}, base, data))
    model = mctformer.model.eval()
    for sample, maps in zip(data, (one["cam"] for one in found), strict=True):
        assert maps.image_id == sample.image_id
        image = torch.from_numpy(resize(sample, (64, 64)).image).permute(2, 0, 1)[None] / 255
        image = (image - torch.tensor(model.mean).view(3, 1, 1)) / torch.tensor(model.std).view(3, 1, 1)
        with torch.no_grad():
            output = model(image)
        for c, values in zip(maps.classes, maps.maps, strict=True):
            product = (output.attention.mean(dim=1)[0, c] * output.semantic_map[0, c].relu()).flatten()
            by_hand = torch.stack([(row * product).sum() for row in output.affinity[0]]).view(1, *model.backbone.grid)
            np.testing.assert_allclose(values, upsample(by_hand, sample.size)[0].numpy(), atol=1e-4)


def test_lpcam_in_mctformer_takes_the_place_of_cam(run, mctformer, base):
    prototypes, _ = lpcam.cached_prototypes(run, mctformer, base)
    by_name = {"cam": None} | directions_by_kind(prototypes, mctformer.weight, base, ["lpcam"], "zero")
    both = list(lpcam.plugged(mctformer, by_name, base, mctformer.splits.test))
    assert all(set(one) == {"cam", "lpcam"} and one["lpcam"].maps.shape == one["cam"].maps.shape for one in both)
    assert any(not np.allclose(one["lpcam"].maps, one["cam"].maps, atol=0.01) for one in both)
    claim = lpcam.Claim(**defaults("22_lpcam_results", grid_mu_f=[0.9], grid_mu_b=[0.9]))
    rows = pd.DataFrame(claim.measured(run, mctformer.classifier, base, "hosts", {"epochs": 1}))
    inside = rows[rows.study == "mctformer"]
    assert list(zip(inside["map"], inside.hyper, strict=True)) == [
        ("cam", "paper"), ("lpcam", "paper"), ("lpcam", "chosen, floor"),
    ]  # fmt: skip
    held = mctformer.splits[1:]
    expected = scored(*(evaluate(lpcam.plugged(mctformer, {"x": None}, base, part), part)["x"] for part in held))
    assert all(inside.iloc[0][name] == pytest.approx(value, nan_ok=True) for name, value in expected.items())
    assert (rows.study == "hosts").sum() == 6


@pytest.fixture(scope="module")
def amn(run, host):
    return host.classifier.changed(method="amn").host(run)


@pytest.fixture(scope="module")
def edam(run, host):
    return host.classifier.changed(method="edam").host(run)


def by_hand(model, image, labels):
    """An image as the network sees it, and which classes it has, (1, C)."""
    image = torch.from_numpy(resize(image, (64, 64)).image).permute(2, 0, 1)[None] / 255
    present = torch.zeros(1, model.num_classes)
    present[0, list(labels)] = 1
    return (image - torch.tensor(model.mean).view(3, 1, 1)) / torch.tensor(model.std).view(3, 1, 1), present


def over_maximum(maps, size):
    """Maps (K, h, w) enlarged to pixels, each divided by its maximum."""
    full = torch.nn.functional.interpolate(maps[None], size=size, mode="bilinear")[0]
    return (full / full.amax(dim=(1, 2), keepdim=True)).numpy()


def test_amn_learns_confident_seeds_of_the_plain_classifier(amn, host, run):
    assert amn.first.folder == host.folder
    assert amn.mean_average_precision == host.mean_average_precision
    threshold = lpcam.best_thresholds(host.sources.val, {"cam": None}, lpcam.SEED_SCALES)[0]["threshold"]
    sure = IRNConfig(foreground=min(threshold + 0.2, 0.95), background=max(threshold - 0.1, 0.02))
    labels = [folder for folder in run.checkpoints.glob("seed-labels-cam-0-*") if folder.is_dir()]
    taught = WithMasks(host.splits.train, Store(labels[0]))
    cam = variant_maps(host.source(host.splits.train), {"cam": None}, lpcam.SEED_SCALES)
    for sample, maps in zip(taught, cam, strict=True):
        stored = maps["cam"]._replace(maps=maps["cam"].maps.astype(np.float16).astype(np.float32))
        np.testing.assert_array_equal(sample.mask, irn_labels(stored, sample.image, sure, lpcam.SEED_CRF))


def test_lpcam_in_amn_teaches_it_other_seeds(run, amn, base):
    claim = lpcam.Claim(**defaults("22_lpcam_results", grid_mu_f=[0.9], grid_mu_b=[0.9]))
    rows = pd.DataFrame(claim.measured(run, amn.classifier, base, "hosts", {"host": "amn", "epochs": 1}))
    assert (rows.study == "hosts").sum() == 6
    inside = rows[rows.study == "amn"]
    assert [f"{row['map']}, {row.hyper}" for _, row in inside.iterrows()] == list(lpcam.INSIDE)
    assert set(inside["host"]) == {"amn"}
    _, _, directions = claim.variants(run, amn.first, base)
    for name, own in zip(lpcam.INSIDE, inside.to_dict("records"), strict=True):
        other = amn if name == "cam, paper" else lpcam.taught(run, amn.classifier, amn.first, name, directions[name])
        assert (other.folder == amn.folder) is (name == "cam, paper")
        found = []
        for data in amn.splits[1:]:
            maps = []
            for sample in data:
                image, present = by_hand(other.model, sample, sample.labels)
                with torch.no_grad():
                    both = [other.model(view, present).scores.softmax(dim=1)[0, 1:] for view in (image, image.flip(3))]
                total = (both[0] + both[1].flip(2))[list(sample.labels)]
                maps.append({"x": ClassMaps(sample.image_id, sample.labels, over_maximum(total, sample.size))})
            found.append(evaluate(maps, data, parts=False)["x"])
        expected = scored(*found)
        assert own["miou"] == pytest.approx(expected["miou"], abs=1e-6)
        assert own["threshold"] == expected["threshold"]


def test_edams_mask_and_lpcam_in_its_place_behind_the_cue(run, edam, base):
    data = edam.splits.val
    prototypes, _ = lpcam.cached_prototypes(run, edam, base)
    directions = directions_by_kind(prototypes, edam.weight, base, ["lpcam"], "zero")
    cue = lpcam.salient(run, edam, data)
    plain = list(lpcam.drawn({"edam": edam}, directions, base, data))
    masked = list(lpcam.where_salient(run, edam, partial(lpcam.drawn, {"edam": edam}, directions, base), data))
    alone = variant_maps(edam.source(data), directions, base)
    for sample, own, cut, lpcams in zip(data, plain, masked, alone, strict=True):
        image, _ = by_hand(edam.model, sample, ())
        with torch.no_grad():
            both = [edam.model(view).responses[0].abs() for view in (image, image.flip(3))]
        total = (both[0] + both[1].flip(2))[list(sample.labels)]
        np.testing.assert_allclose(own["edam"].maps, over_maximum(total, sample.size), atol=1e-5)
        np.testing.assert_array_equal(own["lpcam"].maps, lpcams["lpcam"].maps)
        mask = cue.read_mask(sample.image_id)[0]
        rows, columns = ((np.arange(side) + 0.5) * 112 // side for side in sample.size)
        inside = mask[rows.astype(int)][:, columns.astype(int)]
        assert 0 < inside.mean() < 1
        for name in ("edam", "lpcam"):
            np.testing.assert_array_equal(cut[name].maps, np.where(inside, own[name].maps, 0))
    claim = lpcam.Claim(**defaults("22_lpcam_results", grid_mu_f=[0.9], grid_mu_b=[0.9]))
    rows = pd.DataFrame(claim.measured(run, edam.classifier, base, "hosts", {"host": "edam", "epochs": 1}))
    assert rows.groupby("study", sort=False).size().to_dict() == {"hosts": 6, "edam": 3, "edam, cue": 3}
    of_hosts = rows[(rows.study == "hosts") & (rows["map"] == "lpcam") & (rows.hyper == "paper")].iloc[0]
    assert rows[rows.study == "edam"].iloc[1].miou == of_hosts.miou  # the same maps
    assert rows[rows.study == "edam, cue"].iloc[1].miou != of_hosts.miou


STAGES = {
    "images": 8, "tuning_images": 4, "grid_mu": [0.1, 0.9], "floors": [0.0], "crf_side": 16, "label_radius": 3,
    "walk_radius": 3, "steps": [0, 2], "dampings": [0.0, 1.0], "irn_width": 8, "irn_size": 64, "irn_epochs": 1,
    "irn_batch_size": 4, "dilations": [1, 2], "segmenter_size": 64, "segmenter_epochs": 1,
    "segmenter_batch_size": 4,
}  # fmt: skip
"""Notebook 23 in small."""


def test_pseudo_masks_of_a_hosts_own_maps(run, edam, base):
    """LPCAM among EDAM's features is what the plain pipeline makes of that host; EDAM's own mask is another map."""
    settings = pseudo_masks.Segmentation(**defaults("23_lpcam_segmentation", **STAGES | {"grid_mu": []}))
    claim = lpcam.Claim(**defaults("22_lpcam_results", grid_mu_f=[0.9], grid_mu_b=[0.9]))
    found = pd.DataFrame(pseudo_masks.of_host(claim, run, edam.classifier, base, settings, {"host": "edam"}))
    assert len(found) == 2 * 3 * len(lpcam.INSIDE)
    assert set(found.study) == {"edam", "edam, cue"}
    rows = found[(found.study == "edam") & (found.hyper == "paper")].set_index(["stage", "map"])
    plain = pd.DataFrame(pseudo_masks.Pipeline(run, edam, base, settings).rows()).set_index(["stage", "map"])
    measures = ["threshold", "miou", "fp", "fn", "precision", "recall"]
    for stage in ("seeds", "seeds, CRF", "pseudo masks"):
        assert rows.loc[(stage, "lpcam"), measures].tolist() == plain.loc[(stage, "lpcam"), measures].tolist()
    assert rows.loc[("seeds", "cam"), "miou"] != plain.loc[("seeds", "cam"), "miou"]
    train, val = edam.splits.train.subset(range(8)), edam.splits.val.subset(range(4))
    draw = partial(lpcam.drawn, {"x": edam}, {}, base)
    val_own, train_own = (evaluate(lpcam.where_salient(run, edam, draw, part), part)["x"] for part in (val, train))
    expected = scored(val_own, train_own)
    behind = found[(found.study == "edam, cue") & (found.stage == "seeds") & (found["map"] == "cam")].iloc[0]
    assert behind.miou == pytest.approx(expected["miou"], abs=2e-3)  # maps are stored in half precision
    assert behind.threshold == pytest.approx(expected["threshold"])


def test_every_stage_after_the_other(run, host, base, capsys):
    """From maps to segmentation on a few scenes: each stage is made of the one before it, and found again."""
    settings = pseudo_masks.Segmentation(**defaults("23_lpcam_segmentation", **STAGES))
    pipeline = pseudo_masks.Pipeline(run, host, base, settings)
    assert [row["stage"] for row in pipeline.rows()].count(pseudo_masks.BOUND) == 0
    rows = list(pipeline.rows(bound=True))
    stages = ["seeds", "seeds, CRF", "pseudo masks", pseudo_masks.BOUND, "segmentation"]
    assert [(row["stage"], row["map"]) for row in rows] == [
        *((stage, kind) for stage in stages for kind in pseudo_masks.COMPARED), ("segmentation", "true masks"),
    ]  # fmt: skip
    assert all(0 <= row["miou"] <= 1 for row in rows)
    assert all(math.isnan(row["threshold"]) == (row["stage"] == "segmentation") for row in rows)
    own = pipeline.stages["lpcam"]
    assert own.walk.exp_times in (0, 2)
    assert max(walk["miou"] for walk in own.walks) == next(
        walk["miou"] for walk in own.walks
        if (walk["damping"], walk["steps"]) == (own.walk.damping, own.walk.exp_times)
    )  # fmt: skip
    pickle.loads(pickle.dumps(own.irn[0]))  # as worker processes are sent it
    assert len(own.pseudo_masks) == len(own.labels("labels", own.around)) == 8
    bounds = [one.bound for one in pipeline.stages.values()]
    assert len({one.irn[1] for one in bounds}) == 1  # one IRN of the true masks
    assert len({one.irn[1] for one in pipeline.stages.values()}) == 2
    assert bounds[1].pseudo_masks.store.folder != own.pseudo_masks.store.folder
    assert bounds[1].seeds == own.seeds
    capsys.readouterr()
    again = list(pseudo_masks.Pipeline(run, host, base, settings).rows(bound=True))
    assert all(line.startswith("reusing") for line in capsys.readouterr().out.splitlines())
    assert pd.DataFrame(again).equals(pd.DataFrame(rows))
    longer = settings.model_copy(update={"segmenter_epochs": 2})
    list(pseudo_masks.Pipeline(run, host, base, longer).rows())
    built = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("built")]
    assert {name.partition("-")[0] for name in built} == {"segmenter", "segmentation"}


def test_boxes_are_scored_on_the_maps_that_masks_are_scored_on(host, run, base):
    one = host.splits.val
    flat = LPCAMConfig(**{**base.model_dump(), "scales": (1.0,)})
    prototypes, _ = lpcam.cached_prototypes(run, host, flat)
    by_name = directions_by_kind(prototypes, host.weight, flat, missing="zero")
    reader = lpcam.Directed(host.model, by_name | {lpcam.SIGNED: None})
    resized = [torch.from_numpy(resize(one[i], (64, 64)).image) for i in range(len(one))]
    images = torch.stack(resized).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (reader.mean, reader.std))
    with torch.no_grad():
        output = reader.eval()((images - mean) / std)
        assert torch.equal(output.logits, host.model((images - mean) / std).logits)
    expected = list(variant_maps(host.sources.val, by_name, flat))
    for place in range(2):  # each of an image's classes
        classes = torch.tensor([own[min(place, len(own) - 1)] for own in one.labels])
        with torch.no_grad():
            found = reader.localize(output, classes)
        assert tuple(found) == reader.maps == (*by_name, lpcam.SIGNED)
        signed = found.pop(lpcam.SIGNED)
        assert (signed < 0).any()
        for index, own in enumerate(signed):
            weight = host.model.classifier.weight[classes[index]]
            seen = torch.stack([(weight[:, None, None] * one).sum(dim=0) for one in output.features[index]])
            torch.testing.assert_close(own, seen.sum(dim=0), atol=1e-4, rtol=1e-4)
        for name, maps in found.items():
            assert maps.shape == (len(one), 8, 8)
            for index, own in enumerate(maps):
                there = expected[index][name]
                of_class = there.maps[there.classes.index(int(classes[index]))]
                enlarged = upsample(own[None], one[index].size)[0].numpy()
                # `upsample` scales to [0, 1], the maps of masks are divided by their maximum.
                of_class = (of_class - of_class.min()) / max(np.ptp(of_class), 1e-12)
                np.testing.assert_allclose(enlarged, of_class, atol=2e-4)


def test_the_study_of_boxes_chooses_on_validation_images(tmp_path, run, host, base, monkeypatch):
    settings = defaults(
        "22_lpcam_results", claim_seeds=[0, 1], tiny_root=str(trees.tiny(tmp_path)), tiny_images=12,
        grid_mu_f=[0.2, 0.9], grid_mu_b=[0.5],
    )  # fmt: skip
    claim = lpcam.Claim(**settings)
    monkeypatch.setitem(lpcam.IMAGENET, "backbone", "resnet_mini")
    monkeypatch.setitem(lpcam.IMAGENET, "output_stride", 8)
    asked = []
    whole = lpcam.box_rows

    def rows(host, prototypes, grids, base):
        asked.append((host, prototypes, grids, base))
        return whole(host, prototypes, grids, base)

    monkeypatch.setattr(lpcam, "box_rows", rows)
    table = pd.DataFrame(claim.boxes(run, host.classifier, base))
    names = [
        ("cam", "paper"),
        ("cam", "signed"),
        ("lpcam-f", "paper"),
        ("lpcam", "paper"),
        ("lpcam-f", "chosen"),
        ("lpcam", "chosen"),
    ]
    assert list(zip(table["map"], table.hyper, strict=True)) == 2 * names
    assert table.seed.tolist() == 6 * [0] + 6 * [1]
    for seed, (own, prototypes, grids, config) in enumerate(asked):
        assert (config.seed, own.classifier.seed, len(own.splits.train)) == (seed, seed, 12)
        assert (own.classifier.image_size, own.classifier.frozen) == (160, True)
        assert own.folder.joinpath("choice.csv").exists()  # logistic regression of frozen features
        mine = table[table.seed == seed].set_index(["map", "hyper"])
        for kind, tried in grids.items():
            scores = []
            for one in tried:
                by_name = directions_by_kind(prototypes, own.weight, one, [kind], missing="zero")
                reader, size = lpcam.Directed(own.model, by_name), lpcam.Resize(160)
                val, test = (lpcam.score_boxes(reader, part, size) for part in own.splits[1:])
                scores.append((val.localization[kind].best("gt_known")[1], test.table(val)[0], one))
            best = max(range(len(tried)), key=lambda n: scores[n][0])
            _, row, one = scores[best]
            got = mine.loc[kind, "chosen"]
            assert (got.mu_f, got.mu_b, got.gt_known, got.threshold) == (
                one.mu_f, one.mu_b, row["gt_known"], row["threshold"],
            )  # fmt: skip
        assert mine.loc["cam", "paper"].gt_known <= mine.loc["cam", "paper"].oracle
