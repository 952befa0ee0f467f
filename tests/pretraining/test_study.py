"""What notebooks 04 and 06 measure, against loops over images and layers."""

import numpy as np
import pandas as pd
import pytest
import torch

from wsolnb.backbones import create_backbone
from wsolnb.data import aviary, transforms
from wsolnb.data.splits import load_splits
from wsolnb.metrics import TSCAM, box_iou, boxes_from_score_map, pixel_auc, spill
from wsolnb.metrics.boxes import ground_truth
from wsolnb.notebook import runs
from wsolnb.notebook.params import notebook_parameters
from wsolnb.pretraining import recipes, study
from wsolnb.pretraining.scenes import CreatureConfig
from wsolnb.train.evaluation import box_accuracy, centre_box, predict
from wsolnb.train.loop import TrainingConfig


@pytest.fixture
def tuning():
    defaults = {name: parameter.default for name, parameter in notebook_parameters("04_pretraining").items()}
    return study.FineTuning(**{**defaults, "device": "cpu", "epochs": 1, "batch_size": 8})


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    config = aviary.AviaryConfig(classes=4, train=16, val=4, test=4)
    cache = tmp_path_factory.mktemp("cache")
    return study.Splits(*(aviary.load(config, split, cache) for split in ("train", "val", "test")))


def test_starts_differ_in_what_is_trained_and_how(tuning):
    mini, dino, random, resnet = (
        tuning.recipe(name, 3) for name in ("vit_mini", "vit_mini_dino", "random", "resnet_mini")
    )
    assert (mini.tuned_layers, mini.training.label_smoothing, mini.pretrained) == (2, 0.3, True)
    assert (dino.tuned_layers, dino.training.label_smoothing, dino.pretrained) == (None, 0.0, True)
    assert (random.backbone, random.pretrained, random.tuned_layers) == ("vit_mini", False, None)
    assert (resnet.method, resnet.output_stride) == ("cam", 8)
    assert {recipe.training.seed for recipe in (mini, dino, random, resnet)} == {3}


def test_scores_equal_a_loop_over_images(tuning, splits):
    model = tuning.recipe("vit_mini", 0).build(4).eval()
    found = study.score(model, splits.val, study.TESTED, ["attention", "semantic"])
    for name, lies in found.items():
        rows = []
        for one in predict(model, splits.val, study.TESTED):
            auc, own = pixel_auc(one.maps[name], one.sample.mask), spill(one.maps[name], one.sample.mask)
            rows.append(
                [auc, own.object, own.background, own.frame, spill(one.maps[name], one.sample.mask, away=16).frame]
            )
        np.testing.assert_allclose(list(lies.means().values()), np.nanmean(rows, axis=0))
        assert list(lies.means()) == ["auc", "object", "background", "frame", "far_frame"]


def test_the_last_layers_are_means_over_what_is_left(tuning, splits):
    model = tuning.recipe("vit_mini", 0).build(4).eval()
    reader = study.LastLayers(model)
    assert reader.maps == ("attention", "layers 2 to 4", "layers 3 to 4", "layer 4")
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        output = reader(images)
        maps = reader.localize(output, torch.tensor([0, 1]))
    for first, name in enumerate(reader.maps):
        by_hand = sum(output.attention[:, layer].mean(dim=1) for layer in range(first, 4)) / (4 - first)
        torch.testing.assert_close(maps[name].flatten(1), by_hand)
    rows = pd.DataFrame(study.score_rows(reader, splits, study.TESTED, choose=True))
    assert (rows.split == "val").sum() == 4
    assert rows[rows.split == "test"]["map"].iloc[0] == "attention"
    assert (rows.split == "test").sum() in (1, 2)


def test_a_map_of_one_image_is_that_of_the_evaluation(tuning, splits):
    model = tuning.recipe("vit_mini", 0).build(4).eval()
    one = next(predict(model, splits.val, study.TESTED))
    np.testing.assert_allclose(study.attention_map(model, one.sample.image), one.maps["attention"], atol=1e-5)
    assert study.semantic_map(model, one.sample.image).shape == (112, 112)
    resnet = tuning.recipe("resnet_mini", 0).build(4).eval()
    assert study.attention_map(resnet, one.sample.image).max() == 1


def test_photographs_are_cut_off_centre_and_hold_both(splits):
    whole = list(study.photographs(splits.val, off_centre=False))
    assert [s.image_id for s in whole] == list(splits.val.image_ids)
    for sample, original in zip(whole, splits.val, strict=True):
        assert np.array_equal(sample.image, transforms.resize(original, (112, 112)).image)
    shifted = list(study.photographs(splits.val, off_centre=True))
    assert all((s.mask == 0).any() and (s.mask == 1).any() for s in shifted)
    model = study.TSCAM(create_backbone("vit_mini"), 4).eval()
    rows = pd.DataFrame(study.photograph_rows({"random": model}, splits.val))
    best = rows[rows["map"] == "best possible at 14 x 14"].auc
    assert len(rows) == 6
    assert (best > 0.95).all()


@pytest.mark.parametrize("name", ["vit_mini", "resnet_mini"])
def test_a_probed_backbone_classifies_the_mean_of_what_its_map_shows(splits, name):
    backbone = create_backbone(name, pretrained=True, output_stride=8)
    before = [p.clone() for p in backbone.parameters()]
    model = study.probed(backbone, splits.train, splits.val, study.TESTED)
    assert all(torch.equal(*pair) for pair in zip(before, backbone.parameters(), strict=True))
    assert model.maps == (("cam", "attention") if name == "vit_mini" else ("cam",))
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        output = model(images)
        maps = model.localize(output, torch.tensor([3, 1]))
        tokens = backbone(images)
        places = tokens.flatten(2).transpose(1, 2) if name == "resnet_mini" else tokens.patches
    for image, label in enumerate((3, 1)):
        scores = places[image] @ model.linear.weight[label]
        whole = scores.mean() + model.linear.bias[label]
        torch.testing.assert_close(output.logits[image, label], whole, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(maps["cam"][image].flatten(), scores.clamp(min=0), atol=1e-4, rtol=1e-4)
    if name == "vit_mini":
        torch.testing.assert_close(maps["attention"].flatten(1), tokens.attention.mean(dim=(1, 2)))
    right = [one.logits.argmax() == one.sample.label for one in predict(model, splits.train, study.TESTED)]
    assert np.mean(right) > 0.7  # of four classes


def test_untouched_backbones_beside_the_box_in_the_middle(splits):
    backbones = {"start": create_backbone("vit_mini", pretrained=True)}
    crop = transforms.ResizeCenterCrop(128, 112, keep_aspect=True)
    table = pd.DataFrame(study.start_rows(backbones, splits, {"resize": study.TESTED, "crop": crop}, 12))
    assert list(table["map"]) == ["cam", "attention", "box in the middle"] * 2
    assert list(table.protocol) == ["resize"] * 3 + ["crop"] * 3
    seen = splits.train.subset([0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 15])  # twelve of sixteen, evenly spaced
    for transform, (_, rows) in zip((study.TESTED, crop), table.groupby("protocol", sort=False), strict=True):
        rows = rows.set_index("map")
        model = study.probed(backbones["start"], seen, splits.val, transform)
        found = list(predict(model, splits.test, transform))
        assert rows.top1["cam"] == pytest.approx(np.mean([one.ranking[0] == one.sample.label for one in found]))
        val, test = ([transform(sample) for sample in part] for part in splits[1:])
        box, _ = centre_box(val)
        assert rows.gt_known["box in the middle"] == box_accuracy(box, test)
        for name in ("cam", "attention"):
            threshold = rows.threshold[name]
            boxes = [boxes_from_score_map(one.maps[name], [threshold], protocol="tscam")[0] for one in found]
            right = [ious(own, sample)[0] >= 0.5 for own, sample in zip(boxes, test, strict=True)]
            assert rows.gt_known[name] == pytest.approx(np.mean(right))
            less = np.array(right, float) - [ious(np.trunc(box)[None], sample)[0] >= 0.5 for sample in test]
            assert rows.lead[name] == pytest.approx(less.mean())
            assert rows.lead_se[name] == pytest.approx(less.std(ddof=1) / np.sqrt(len(less)))


def ious(boxes, sample):
    """IoU of boxes with a sample's only one, both as TS-CAM compares them."""
    return box_iou(boxes, ground_truth(sample.boxes, sample.size, TSCAM)).max(axis=1)


def test_an_ablation_is_pretrained_and_tuned_once(tmp_path, monkeypatch, tuning, capsys):
    monkeypatch.setenv("WSOLNB_ROOT", str(tmp_path))
    tiny = CreatureConfig(scenes=8, frames=2)
    few = TrainingConfig(epochs=1, lr=1e-3, device="cpu")

    def small(name, epochs, seed):
        config = recipes.RECIPES[recipes.ABLATIONS[name][0]]
        return config.model_copy(update={"scenes": tiny, "batch_size": 4, "training": few})

    monkeypatch.setattr(study, "ablation", small)
    run = runs.start("04_pretraining", {"run_folder": str(tmp_path / "run"), "seed": 0})
    splits = load_splits("aviary", classes=4, train=16, val=4, test=4)
    ask = ["nothing (supervised)", "nothing (self-distilled)"]
    first, second = (list(study.ablation_rows(run, tuning, ask, [0], splits, 1)) for _ in range(2))
    assert first == second
    assert set(first[0]) - set(first[1]) == {"tuned top1", "semantic auc", "spill"}
    said = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["built"] * 3 + ["reusing"] * 3
