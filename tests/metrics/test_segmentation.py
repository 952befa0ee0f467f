import numpy as np
import pytest

from wsolnb.errors import MapError, ParameterError
from wsolnb.metrics import SeedScores, SegmentationScores

SCORES = ("iou", "fp", "fn", "precision", "recall")


def plain_scores(predictions, masks, num_classes):
    """Per class, from sets of pixels; NaN where there is nothing to divide by."""
    rows = {name: [] for name in SCORES}
    for c in range(num_classes):
        truth, predicted = set(), set()
        for i, (prediction, mask) in enumerate(zip(predictions, masks, strict=True)):
            for pixel in np.ndindex(mask.shape):
                if mask[pixel] != 255:
                    truth |= {(i, pixel)} if mask[pixel] == c else set()
                    predicted |= {(i, pixel)} if prediction[pixel] == c else set()
        share = lambda part, whole: len(part) / len(whole) if whole else np.nan  # noqa: E731
        rows["iou"].append(share(truth & predicted, truth | predicted))
        rows["fp"].append(share(predicted - truth, truth | predicted))
        rows["fn"].append(share(truth - predicted, truth | predicted))
        rows["precision"].append(share(truth & predicted, predicted))
        rows["recall"].append(share(truth & predicted, truth))
    return rows


def random_mask(rng, size, num_classes):
    mask = rng.integers(0, num_classes, size)
    mask[rng.random(size) < 0.1] = 255
    return mask.astype(np.uint8)


def test_segmentation_equals_sets():
    rng = np.random.default_rng(0)
    metric = SegmentationScores(6)
    sizes = [rng.integers(2, 9, 2) for _ in range(8)]
    masks = [random_mask(rng, size, 4) for size in sizes]  # class 4 is only predicted, class 5 does not occur
    predictions = [np.where(rng.random(m.shape) < 0.5, m % 255 % 4, rng.integers(0, 5, m.shape)) for m in masks]
    for prediction, mask in zip(predictions, masks, strict=True):
        metric.update(prediction, mask)
    result = metric.compute()
    expected = plain_scores(predictions, masks, 6)
    for name in SCORES:
        np.testing.assert_allclose(getattr(result, name), expected[name], err_msg=name)
        assert result.mean(name) == pytest.approx(np.nanmean(expected[name]))
        assert result.mean(name, background=False) == pytest.approx(np.nanmean(expected[name][1:]))
    assert result.miou == result.mean("iou")
    means = result.means()
    plain = {name: [v for v in expected[name] if not np.isnan(v)] for name in SCORES}
    for name in SCORES:
        assert means["miou" if name == "iou" else name] == pytest.approx(sum(plain[name]) / len(plain[name]))
    for name in ("fp", "fn"):  # the background is the first class, which occurs
        assert means[f"{name}_foreground"] == pytest.approx(sum(plain[name][1:]) / (len(plain[name]) - 1))
    assert set(means) == {"miou", *SCORES[1:], "fp_foreground", "fn_foreground"}
    np.testing.assert_allclose((result.iou + result.fp + result.fn)[:5], 1)


def test_false_positives_and_negatives_of_two_kinds():
    """With the background they add to one with the mIoU; without it they do not, unless its IoU is the others' mean."""
    metric = SegmentationScores(3)
    # Background: 6 of 8 pixels hit, one more predicted, IoU 6/9. Class 1: 2 hits, 1 wrong, 1 missed. Class 2: 1, 1, 0.
    metric.update(np.array([[0, 0, 0, 0, 0, 0, 1, 2, 1, 1, 0, 2]]), np.array([[0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2]]))
    found = metric.compute().means()
    assert found["miou"] == pytest.approx((6 / 9 + 2 / 4 + 1 / 2) / 3)
    assert found["fp"] == pytest.approx((1 / 9 + 1 / 4 + 1 / 2) / 3)
    assert found["fn"] == pytest.approx((2 / 9 + 1 / 4 + 0) / 3)
    assert found["miou"] + found["fp"] + found["fn"] == pytest.approx(1)
    assert found["fp_foreground"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert found["fn_foreground"] == pytest.approx((1 / 4 + 0) / 2)
    excess = found["miou"] + found["fp_foreground"] + found["fn_foreground"] - 1
    assert excess == pytest.approx((6 / 9 - (2 / 4 + 1 / 2) / 2) / 3)  # background's IoU less the others' mean, over C


def test_segmentation_by_hand():
    metric = SegmentationScores(2)
    metric.update(np.array([[0, 1, 1, 1]]), np.array([[0, 0, 1, 255]]))
    result = metric.compute()
    assert result.iou.tolist() == [0.5, 0.5]
    assert result.fp.tolist() == [0.0, 0.5]
    assert result.fn.tolist() == [0.5, 0.0]
    assert result.precision.tolist() == [1.0, 0.5]
    assert result.recall.tolist() == [0.5, 1.0]


def test_segmentation_refuses():
    metric = SegmentationScores(3)
    mask = np.zeros((2, 2), np.uint8)
    with pytest.raises(MapError, match="no pixel"):
        metric.compute()
    metric.update(mask, np.full((2, 2), 255, np.uint8))
    with pytest.raises(MapError, match="no pixel"):
        metric.compute()
    with pytest.raises(MapError, match="the mask holds values 0 to 3"):
        metric.update(mask, np.array([[0, 3], [0, 0]]))
    with pytest.raises(MapError, match="the prediction holds values 0 to 3"):
        metric.update(np.array([[0, 3], [0, 0]]), mask)
    with pytest.raises(MapError, match="shape"):
        metric.update(mask, np.zeros((2, 3), np.uint8))
    with pytest.raises(MapError, match="float64"):
        metric.update(mask.astype(float), mask)
    with pytest.raises(MapError, match="no mask"):
        metric.update(np.zeros((0, 3), np.uint8), np.zeros((0, 3), np.uint8))
    with pytest.raises(ParameterError, match="classes"):
        SegmentationScores(1)


def seed_mask(maps, class_indices, threshold):
    """As the released code writes it: the argmax over the threshold and the maps."""
    stacked = np.pad(maps, ((1, 0), (0, 0), (0, 0)), constant_values=threshold)
    return np.pad(np.asarray(class_indices, int) + 1, (1, 0))[np.argmax(stacked, axis=0)]


def test_seeds_equal_masks_made_at_every_threshold():
    rng = np.random.default_rng(1)
    thresholds = np.round(np.arange(0, 1, 0.07), 2)
    metric = SeedScores(5, thresholds)
    images = []
    for i in range(10):
        size = rng.integers(2, 10, 2)
        classes = rng.permutation(4)[: i % 4]  # also none
        maps = rng.random((len(classes), *size)).astype(np.float32)
        if i % 2:  # ties between classes, and with thresholds
            maps = np.round(maps / 0.07).clip(0, 14).astype(np.float32) * np.float32(0.07)
            maps[maps > 1] = 1
        images.append((maps, classes, random_mask(rng, size, 5)))
        metric.update(*images[-1])
    result = metric.compute()
    for j, t in enumerate(thresholds):
        whole = SegmentationScores(5)
        for maps, classes, mask in images:
            whole.update(seed_mask(maps, classes, t), mask)
        expected = whole.compute()
        for name in SCORES:
            np.testing.assert_array_equal(result.classes[name][j], getattr(expected, name), err_msg=f"{name} at {t}")
            np.testing.assert_array_equal(getattr(result.at(t), name), getattr(expected, name))
            curve = result.curve["miou" if name == "iou" else name]
            assert curve[j] == pytest.approx(expected.mean(name))
        assert result.curve.at(t) == pytest.approx(expected.means())
    best = np.argmax(result.curve["miou"])
    assert result.best() == (thresholds[best], result.curve["miou"][best])
    assert result.images == 10


def test_seeds_by_hand():
    metric = SeedScores(3, [0.0, 0.25, 0.5])
    maps = np.array([[[0.0, 0.5, 0.9]], [[0.0, 0.5, 0.2]]], np.float32)
    metric.update(maps, [1, 0], np.array([[0, 2, 1]]))
    result = metric.compute()
    # Of equal scores the first map wins, here class 1; a score equal to the threshold is background.
    assert result.classes["iou"].tolist() == [[1, 0, 0.5], [1, 0, 0.5], [0.5, 0, 0]]
    assert result.best() == (0.0, 0.5)
    assert result.at(0.5).miou == pytest.approx(0.5 / 3)


def test_memory_does_not_grow_with_the_images():
    metric = SeedScores(21, np.arange(0, 1, 0.01))
    size = metric._pixels.nbytes + metric._truth.nbytes
    for _ in range(5):
        metric.update(np.random.rand(2, 8, 8).astype(np.float32), [3, 7], np.zeros((8, 8), np.uint8))  # noqa: NPY002
    assert metric._pixels.nbytes + metric._truth.nbytes == size < 100_000


def test_seeds_refuse():
    metric = SeedScores(4)
    maps, mask = np.zeros((2, 3, 3), np.float32), np.zeros((3, 3), np.uint8)
    with pytest.raises(MapError, match="no pixel"):
        metric.compute()
    with pytest.raises(MapError, match="1 classes"):
        metric.update(maps, [0], mask)
    with pytest.raises(MapError, match="two maps"):
        metric.update(maps, [1, 1], mask)
    with pytest.raises(MapError, match="list of classes"):
        metric.update(maps, [0, 3], mask)
    with pytest.raises(MapError, match="the mask holds"):
        metric.update(maps, [0, 1], mask + 4)
    with pytest.raises(MapError, match="NaN"):
        metric.update(maps * np.nan, [0, 1], mask)
    with pytest.raises(MapError, match="shape"):
        metric.update(maps, [0, 1], mask[1:])
    with pytest.raises(MapError, match="no pixel"):
        metric.compute()


@pytest.mark.parametrize("value", [0, 255])
def test_masks_without_an_object_score_nothing(value):
    mask = np.zeros((4, 4), np.uint8)
    mask[1:3, 1:3] = value
    scores, seeds = SegmentationScores(2), SeedScores(2, [0.5])
    scores.update(np.zeros((4, 4), np.uint8), mask)
    seeds.update(np.zeros((1, 4, 4), np.float32), [0], mask)
    for one in (scores, seeds):
        with pytest.raises(MapError, match="no mask has a pixel of an object") as error:
            one.compute()
        assert "255 is not counted" in error.value.remedy
    mask[0, 0] = 1
    scores.update(np.zeros((4, 4), np.uint8), mask)
    seeds.update(np.zeros((1, 4, 4), np.float32), [0], mask)
    assert scores.compute().miou < 1
    assert seeds.compute().at(0.5).miou < 1
