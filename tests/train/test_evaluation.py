import numpy as np
import pytest
import torch
from torch import nn

from wsolnb.data import Sample, aviary, transforms
from wsolnb.data.aviary import AviaryConfig
from wsolnb.data.base import Derived
from wsolnb.errors import DataError, MapError
from wsolnb.methods.base import LocalizationModel
from wsolnb.methods.cam import CAMOutput
from wsolnb.metrics import LocalizationAccuracy, MaxBoxAcc, PartCoverage, PxAP
from wsolnb.train import evaluation


class Brightness(LocalizationModel):
    """Two maps that need no training: how red a cell is, and the same mirrored; logits from the cell means."""

    maps = ("red", "mirrored")

    def __init__(self, classes=4, poison=False):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(classes))
        self.poison = poison

    @property
    def head(self):
        return self

    def forward(self, images):
        cells = nn.functional.avg_pool2d(images, 8)
        return CAMOutput(cells.mean(dim=(2, 3)).sum(1, keepdim=True) * self.scale.cumsum(0), cells)

    def localize(self, output, classes):
        red = output.features[:, 0] * (1 + classes[:, None, None])
        red = red * float("nan") if self.poison else red
        return {"red": red, "mirrored": red.flip(-1)}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    config = AviaryConfig(classes=4, train=4, val=12, test=16)
    cache = tmp_path_factory.mktemp("cache")
    return {split: aviary.load(config, split, cache) for split in ("val", "test")}


TRANSFORM = transforms.Resize(64)


def by_hand(dataset):
    """Every metric of the first map, image by image, without the loader."""
    metrics = LocalizationAccuracy(evaluation.THRESHOLDS), MaxBoxAcc(evaluation.THRESHOLDS), PxAP()
    parts = PartCoverage(evaluation.THRESHOLDS)
    mean = np.array([0.485, 0.456, 0.406])
    std = np.array([0.229, 0.224, 0.225])
    for index in range(len(dataset)):
        sample = TRANSFORM(dataset[index])
        pixels = (sample.image / 255 - mean) / std
        cells = pixels.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3))
        score = cv_resize(cells[..., 0] * (1 + sample.label))
        logits = cells.mean(axis=(0, 1)).sum() * np.arange(1, 5)
        metrics[0].update(score, sample.boxes, sample.label, logits)
        metrics[1].update(score, sample.boxes)
        metrics[2].update(score, sample.mask)
        parts.update(score, sample.parts)
    return *(metric.compute() for metric in metrics), parts.compute()


def cv_resize(cells):
    wide = torch.nn.functional.interpolate(torch.tensor(cells)[None, None], size=(64, 64), mode="bilinear")[
        0, 0
    ].numpy()
    return ((wide - wide.min()) / (wide.max() - wide.min())).astype(np.float32)


def test_one_pass_equals_the_metrics_image_by_image(splits):
    found = evaluation.score(evaluation.predict(Brightness(), splits["test"], TRANSFORM, batch_size=5))
    localization, v1, pixels, parts = by_hand(splits["test"])
    assert list(found.localization) == ["red", "mirrored"]
    got = found.localization["red"]
    assert (got.top1_cls, got.images) == (localization.top1_cls, 16)
    # Grey levels are truncated, so a rounding difference of one unit may move a box: compare with room for one image.
    np.testing.assert_allclose(got.curve["gt_known"], localization.curve["gt_known"], atol=1 / 16)
    np.testing.assert_allclose(found.v1["red"].curve["iou_0.5"], v1.curve["iou_0.5"], atol=1 / 16)
    assert found.pixels["red"].average_precision == pytest.approx(pixels.average_precision, abs=1e-4)
    np.testing.assert_allclose(found.parts["red"].curve["context"], parts.curve["context"], atol=5e-3)


def test_the_table_takes_thresholds_from_validation(splits):
    val, test = (evaluation.evaluate(Brightness(), splits[name], TRANSFORM) for name in ("val", "test"))
    for row in test.table(val):
        name = row["map"]
        threshold, _ = val.localization[name].best("gt_known")
        assert row["threshold"] == threshold
        assert row["gt_known"] == test.localization[name].at(threshold)["gt_known"]
        assert row["oracle"] == test.localization[name].best("gt_known")[1] >= row["gt_known"]
        assert row["covers_rest"] == test.parts[name].at(threshold)["rest"]
        assert row["maxboxacc_v1"] <= test.v1[name].v1
        assert row["maxboxacc_v2"] <= test.v2[name].v2


def test_quick_measures_what_choosing_an_epoch_needs(splits):
    found = evaluation.evaluate(Brightness(), splits["val"], TRANSFORM, quick=True)
    assert found.v1 == found.v2 == found.pixels == found.parts == {}
    assert set(found.summary()) == {"top1", "gt_known", "top1_loc", "threshold", "gt_known_red", "gt_known_mirrored"}


def test_predictions_come_in_order_with_ranked_classes(splits):
    found = list(evaluation.predict(Brightness(), splits["val"], TRANSFORM, batch_size=5))
    assert [p.sample.image_id for p in found] == list(splits["val"].image_ids)
    for prediction in found:
        np.testing.assert_array_equal(np.argsort(-prediction.logits, kind="stable"), prediction.ranking)


def test_maps_that_are_not_numbers_are_reported(splits):
    with pytest.raises(MapError, match="NaN"):
        evaluation.evaluate(Brightness(poison=True), splits["val"], TRANSFORM)


class Unboxed(Derived):
    """Images as they are, without their boxes; with `masks` alone the masks stay."""

    def __init__(self, dataset, masks=False):
        super().__init__(dataset)
        self.masks = masks

    def read(self, index, truth=True):
        kept = self.dataset.read(index, truth)
        return Sample(kept.image, kept.image_id, kept.labels, mask=kept.mask if self.masks else None)


def test_without_any_box_classes_are_scored_and_boxes_are_nan(splits):
    model = Brightness()
    bare, boxed = Unboxed(splits["test"]), splits["test"]
    val = evaluation.evaluate(model, Unboxed(splits["val"]), TRANSFORM)
    test = evaluation.evaluate(model, bare, TRANSFORM)
    expected = evaluation.evaluate(model, boxed, TRANSFORM).localization["red"]
    found = test.localization["red"]
    assert (found.top1_cls, found.top5_cls, found.images) == (expected.top1_cls, expected.top5_cls, len(boxed))
    assert (test.v1, test.v2, test.pixels, test.parts) == ({}, {}, {}, {})
    row = test.table(val)[0]
    assert row["top1"] == expected.top1_cls
    assert all(np.isnan(row[name]) for name in ("threshold", "gt_known", "oracle", "top1_loc", "maxboxacc_v2"))
    assert np.isnan(val.summary()["gt_known"])
    assert np.isnan(val.thresholds()["red"])


def test_boxes_of_test_images_alone_choose_nothing_but_the_oracle(splits):
    model = Brightness()
    val = evaluation.evaluate(model, Unboxed(splits["val"], masks=True), TRANSFORM)
    test = evaluation.evaluate(model, splits["test"], TRANSFORM)
    row = test.table(val)[0]
    assert np.isnan(row["gt_known"])
    assert np.isnan(row["maxboxacc_v1"])
    assert row["oracle"] == test.localization["red"].best()[1]
    assert np.isfinite(row["mask_iou"])  # masks of both are known


def test_images_without_a_box_do_not_count_among_images_with_one():
    one, both = LocalizationAccuracy([0.5]), LocalizationAccuracy([0.5])
    score_map, box = np.eye(8, dtype=np.float32), np.array([[0.0, 0, 8, 8]])
    for metric in (one, both):
        metric.update(score_map, box, 0, np.array([1.0, 0]))
    both.classify(0, np.array([0, 1.0]))
    assert both.compute().top1_cls == one.compute().top1_cls == 1


def test_what_needs_boxes_says_so_before_it_trains(splits):
    evaluation.require_boxes(splits["val"], splits["test"])
    with pytest.raises(DataError, match=r"no image of aviary.* has a box.*\n.*boxes\.csv or masks/"):
        evaluation.require_boxes(splits["val"], Unboxed(splits["test"], masks=True))


def test_no_samples_have_no_centre_box():
    box, score = evaluation.centre_box([])
    assert np.isnan([*box, score, evaluation.box_accuracy(box, [])]).all()


def test_centre_box_is_the_best_of_all_sizes(splits):
    samples = [splits["val"][i] for i in range(12)]
    box, score = evaluation.centre_box(samples, steps=7)
    best = 0
    for w in range(1, 8):
        for h in range(1, 8):
            x0, y0, x1, y1 = (int(56 * s) for s in (1 - w / 7, 1 - h / 7, 1 + w / 7, 1 + h / 7))
            hits = 0
            for sample in samples:
                a0, b0, a1, b1 = np.trunc(np.minimum(sample.boxes[0], 111))
                wide = min(x1, a1) - max(x0, a0) + 1
                high = min(y1, b1) - max(y0, b0) + 1
                both = max(0, wide) * max(0, high)
                either = (x1 - x0 + 1) * (y1 - y0 + 1) + (a1 - a0 + 1) * (b1 - b0 + 1) - both
                hits += both / either >= 0.5
            best = max(best, hits / 12)
    assert score == pytest.approx(best)
    assert evaluation.box_accuracy(box, samples) == score


def test_an_image_whose_box_is_cropped_away_is_a_miss_and_counts():
    crop = transforms.ResizeCenterCrop(64, 32)
    boxes = [[16, 16, 48, 48], [0, 0, 10, 10], [20, 20, 44, 44], [50, 0, 64, 12]]
    found = []
    for number, box in enumerate(boxes):
        sample = Sample(np.zeros((64, 64, 3), np.uint8), str(number), (0,), np.array([box], float), np.array([0]))
        maps = {"whole": np.ones((32, 32), np.float32)}
        logits = np.array([1.0, 0.0] if number % 2 == 0 else [0.0, 1.0])
        found.append(evaluation.Prediction(crop(sample), logits, logits.argsort()[::-1], maps))
    scores = evaluation.score(found)
    row = scores.table(scores)[0]
    assert row["top1"] == 0.5  # of all images, not of the two whose box is seen
    assert row["gt_known"] == 0.5  # the whole crop is right for the first and the third
    assert scores.v1["whole"].images == scores.localization["whole"].images == 4
