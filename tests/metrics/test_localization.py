import numpy as np
import pytest
from random_maps import random_map

from wsolnb.errors import MapError, ParameterError
from wsolnb.metrics import ERRORS, LocalizationAccuracy, MaxBoxAcc, PxAP, pixel_auc, plain

THRESHOLDS = np.round(np.arange(0, 1, 0.05), 2)


def random_images(rng, count, classes=6):
    """Maps of all kinds with one to three boxes each, a label, and logits that know the label more often than not."""
    for i in range(count):
        height, width = rng.integers(4, 30, 2)
        corners = np.sort(rng.random((rng.integers(1, 4), 2, 2)), axis=1)
        boxes = (corners * [width, height]).reshape(-1, 4)
        label = int(rng.integers(classes))
        logits = rng.random(classes) + 0.8 * (np.arange(classes) == label)
        yield random_map(rng, height, width, i % 8), boxes, label, logits


# --- MaxBoxAcc ---


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("protocol", ["wsolevaluation", "tscam", "scm"])
def test_max_box_acc_equals_loops(multi, protocol):
    ious = (0.3, 0.5, 0.7)
    metric = MaxBoxAcc(THRESHOLDS, ious, multi, protocol)
    correct = np.zeros((3, THRESHOLDS.size))
    images = list(random_images(np.random.default_rng(multi), 40))
    for score_map, boxes, _, _ in images:
        metric.update(score_map, boxes)
        for j, t in enumerate(THRESHOLDS):
            best = plain.best_iou(score_map, boxes.tolist(), t, multi, protocol)
            correct[:, j] += [best >= iou for iou in ious]
    result = metric.compute()
    accuracy = correct / len(images)
    assert result.images == len(images)
    for row, iou in zip(accuracy, ious, strict=True):
        np.testing.assert_array_equal(result.curve[f"iou_{iou}"], row)
        assert result.best[f"iou_{iou}"] == (THRESHOLDS[row.argmax()], row.max())
    if multi:
        assert result.v2 == pytest.approx(accuracy.max(axis=1).mean())
    else:
        assert result.v1 == accuracy[1].max()


def square(x0, y0, x1, y1, size=(20, 20)):
    score_map = np.zeros(size, np.float32)
    score_map[y0:y1, x0:x1] = 1
    return score_map


def test_max_box_acc_by_hand():
    metric = MaxBoxAcc([0.0, 0.6], iou_thresholds=(0.5, 1.0))
    metric.update(square(2, 2, 10, 10), [[2, 2, 10, 10]])  # right at both
    metric.update(square(2, 2, 10, 10) * 0.5 + square(12, 12, 16, 16) * 0.5, [[12, 12, 16, 16]])
    metric.update(square(2, 2, 10, 10), [[2, 2, 10, 16]])  # 9 x 9 of 9 x 15 inclusive pixels
    result = metric.compute()
    # Both squares of the second map are equally bright: the large one is the box.
    assert result.curve["iou_0.5"].tolist() == [2 / 3, 2 / 3]
    assert result.curve["iou_1"].tolist() == [1 / 3, 1 / 3]
    assert result.v1 == 2 / 3
    assert result.at(0.6) == {"iou_0.5": 2 / 3, "iou_1": 1 / 3, "mean": 0.5}
    assert result.at([0.0, 0.6]) == result.at(0.6)


def test_iou_threshold_is_met_by_equality():
    metric = MaxBoxAcc([0.5], iou_thresholds=(0.5, 0.51), protocol="tscam")
    metric.update(square(0, 0, 9, 9), [[0, 0, 9, 19]])  # 10 x 10 of 10 x 20 inclusive pixels
    assert metric.compute().at(0.5) == {"iou_0.5": 1.0, "iou_0.51": 0.0, "mean": 0.5}


def test_v2_takes_any_box_and_v1_the_largest():
    score_map = np.maximum(square(0, 0, 8, 8), square(12, 12, 16, 16))
    accuracies = []
    for multi in (False, True):
        metric = MaxBoxAcc(multi_contour=multi)
        metric.update(score_map, [[12, 12, 16, 16]])
        accuracies.append(metric.compute())
    assert accuracies[0].v1 == 0
    assert accuracies[1].v2 == 1
    assert accuracies[0].curve.thresholds.size == 1000
    with pytest.raises(ParameterError, match="one box"):
        _ = accuracies[1].v1
    with pytest.raises(ParameterError, match="all boxes"):
        _ = accuracies[0].v2


def test_truth_in_pixels_of_the_original_image():
    one, other = MaxBoxAcc(), MaxBoxAcc()
    one.update(square(2, 2, 10, 10), [[20, 30, 100, 150]], image_size=(300, 200))
    other.update(square(2, 2, 10, 10), [[2, 2, 10, 10]])
    assert one.compute().curve["iou_0.7"].tolist() == other.compute().curve["iou_0.7"].tolist()
    with pytest.raises(MapError, match="leaves"):
        one.update(square(2, 2, 10, 10), [[20, 30, 100, 150]])


def test_threshold_of_the_validation_split_must_be_on_the_curve():
    metric = MaxBoxAcc([0.1, 0.2])
    metric.update(square(2, 2, 10, 10), [[2, 2, 10, 10]])
    with pytest.raises(ParameterError, match=r"0\.15"):
        metric.compute().at(0.15)


def test_max_box_acc_refuses():
    metric = MaxBoxAcc()
    with pytest.raises(MapError, match="no image"):
        metric.compute()
    with pytest.raises(MapError, match="no ground-truth box"):
        metric.update(square(2, 2, 10, 10), np.zeros((0, 4)))
    with pytest.raises(MapError, match="NaN"):
        metric.update(np.full((4, 4), np.nan, np.float32), [[0, 0, 2, 2]])
    with pytest.raises(MapError, match="no image"):  # nothing of the refused ones was counted
        metric.compute()
    with pytest.raises(ParameterError, match="ascend"):
        MaxBoxAcc([0.2, 0.1])
    with pytest.raises(ParameterError, match="IoU"):
        MaxBoxAcc(iou_thresholds=(30, 50, 70))


# --- LocalizationAccuracy ---


@pytest.mark.parametrize("protocol", ["wsolevaluation", "tscam", "scm"])
def test_localization_equals_loops(protocol):
    metric = LocalizationAccuracy(THRESHOLDS, protocol)
    names = ("gt_known", "top1_loc", "top5_loc", *ERRORS)
    counts = {name: np.zeros(THRESHOLDS.size) for name in names}
    images = list(random_images(np.random.default_rng(5), 60))
    top1 = top5 = 0
    for score_map, boxes, label, logits in images:
        metric.update(score_map, boxes, label, logits)
        ranking = sorted(range(logits.size), key=lambda c: -logits[c])[:5]
        first, among = ranking[0] == label, label in ranking
        top1, top5 = top1 + first, top5 + among
        for j, t in enumerate(THRESHOLDS):
            best = plain.best_iou(score_map, boxes.tolist(), t, False, protocol)
            counts["gt_known"][j] += best >= 0.5
            counts["top1_loc"][j] += first and best > 0.5
            counts["top5_loc"][j] += among and best > 0.5
            error = plain.error(score_map, boxes.tolist(), t, protocol) if first else "wrong_class"
            if error:
                counts[error][j] += 1
    result = metric.compute()
    for name in names:
        np.testing.assert_array_equal(result.curve[name], counts[name] / len(images), err_msg=name)
    assert (result.top1_cls, result.top5_cls) == (top1 / len(images), top5 / len(images))
    assert all(counts[name].sum() for name in names), "the images do not test every error"
    total = result.curve["top1_loc"] + sum(result.curve[name] for name in ERRORS)
    np.testing.assert_allclose(total, 1)
    best = result.best()
    assert best == (THRESHOLDS[counts["gt_known"].argmax()], counts["gt_known"].max() / len(images))
    assert result.at(best[0])["gt_known"] == best[1]
    assert result.at(best[0])["top1_cls"] == result.top1_cls


@pytest.mark.parametrize(
    ("predicted", "truth", "kind"),
    [
        ((2, 2, 10, 10), [[2, 2, 10, 10]], "top1_loc"),
        ((0, 0, 19, 9), [[0, 0, 9, 9], [11, 0, 19, 9]], "several_instances"),
        ((0, 0, 19, 19), [[0, 0, 9, 9]], "more"),
        ((4, 4, 8, 8), [[0, 0, 19, 19]], "part"),
        ((4, 4, 8, 8), [[14, 14, 19, 19]], "other"),
        ((0, 0, 6, 19), [[4, 0, 15, 12]], "other"),  # neither mostly inside nor mostly covering
        ((4, 0, 8, 8), [[6, 0, 19, 19], [0, 12, 3, 19]], "part"),
    ],
)
def test_error_taxonomy_by_hand(predicted, truth, kind):
    metric = LocalizationAccuracy([0.5])
    metric.update(square(*predicted), truth, 1, ranked=[1, 0])
    scores = metric.compute().at(0.5)
    assert [name for name in ("top1_loc", *ERRORS) if scores[name] == 1] == [kind]
    metric = LocalizationAccuracy([0.5])
    metric.update(square(*predicted), truth, 1, ranked=[0, 1])
    scores = metric.compute().at(0.5)
    assert [name for name in ("top1_loc", *ERRORS) if scores[name] == 1] == ["wrong_class"]
    assert scores["top5_loc"] == (kind == "top1_loc")


def test_gt_known_includes_one_half_and_top1_loc_does_not():
    metric = LocalizationAccuracy([0.5])
    metric.update(square(0, 0, 9, 9), [[0, 0, 9, 19]], 0, [1.0, 0.0])  # IoU is 1/2
    scores = metric.compute().at(0.5)
    assert (scores["gt_known"], scores["top1_loc"], scores["top5_loc"]) == (1, 0, 0)


def test_gt_known_is_max_box_acc_under_one_protocol():
    localization, boxes = LocalizationAccuracy(protocol="wsolevaluation"), MaxBoxAcc()
    for score_map, truth, label, logits in random_images(np.random.default_rng(8), 30):
        localization.update(score_map, truth, label, logits)
        boxes.update(score_map, truth)
    assert localization.compute().best("gt_known")[1] == boxes.compute().v1


def test_maps_of_predicted_classes():
    right, wrong = square(2, 2, 10, 10), square(12, 12, 19, 19)
    truth = [[2, 2, 10, 10]]

    def scores(own, predicted, ranked, label=0):
        metric = LocalizationAccuracy([0.5])
        metric.update(own, truth, label, ranked=ranked, predicted_maps=predicted)
        return metric.compute().at(0.5)

    # The class is wrong, but the map of the wrong class is right.
    found = scores(wrong, [right, wrong], [3, 0])
    assert (found["gt_known"], found["gt_known_predicted"], found["gt_known_any5"]) == (0, 1, 1)
    assert (found["top5_loc"], found["top5_loc_any5"]) == (0, 1)
    # The second map is right, the class is not among the five.
    found = scores(right, [wrong, right], [3, 1, 2, 4, 5])
    assert (found["gt_known"], found["gt_known_predicted"], found["gt_known_any5"]) == (1, 0, 1)
    assert (found["top5_loc"], found["top5_loc_any5"]) == (0, 0)
    assert found["top1_cls"] == found["top5_cls"] == 0


def test_only_the_first_five_classes_count():
    metric = LocalizationAccuracy([0.5])
    metric.update(square(2, 2, 10, 10), [[2, 2, 10, 10]], 5, np.arange(10, 0, -1.0))
    metric.update(square(2, 2, 10, 10), [[2, 2, 10, 10]], 4, np.arange(10, 0, -1.0))
    metric.update(square(2, 2, 10, 10), [[2, 2, 10, 10]], 5, ranked=range(10))
    metric.update(square(2, 2, 10, 10), [[2, 2, 10, 10]], 4, ranked=range(10))
    scores = metric.compute().at(0.5)
    assert (scores["top1_cls"], scores["top5_cls"], scores["top1_loc"], scores["top5_loc"]) == (0, 0.5, 0, 0.5)


def test_localization_refuses():
    metric = LocalizationAccuracy([0.5])
    score_map, truth = square(2, 2, 10, 10), [[2, 2, 10, 10]]
    with pytest.raises(MapError, match="no image"):
        metric.compute()
    with pytest.raises(ParameterError, match="either"):
        metric.update(score_map, truth, 0)
    with pytest.raises(ParameterError, match="either"):
        metric.update(score_map, truth, 0, [0.1, 0.2], ranked=[1, 0])
    with pytest.raises(MapError, match="NaN"):
        metric.update(score_map, truth, 0, [0.1, np.nan])
    with pytest.raises(ParameterError, match="label is 2"):
        metric.update(score_map, truth, 2, [0.1, 0.2])
    with pytest.raises(ParameterError, match="once"):
        metric.update(score_map, truth, 0, ranked=[1, 1])
    with pytest.raises(ParameterError, match="3 maps"):
        metric.update(score_map, truth, 0, ranked=[1, 0], predicted_maps=[score_map] * 3)
    with pytest.raises(MapError, match="shape"):
        metric.update(score_map, truth, 0, ranked=[1, 0], predicted_maps=[score_map[1:]])
    metric.update(score_map, truth, 0, ranked=[1, 0])
    with pytest.raises(ParameterError, match="others not"):
        metric.update(score_map, truth, 0, ranked=[1, 0], predicted_maps=[score_map])
    assert metric.compute().images == 1


# --- PxAP and pixel AUC ---


def random_masks(rng, count):
    for i in range(count):
        height, width = rng.integers(3, 20, 2)
        score_map = random_map(rng, height, width, i % 8)
        mask = rng.choice([0, 1, 3, 255], (height, width), p=[0.5, 0.2, 0.2, 0.1])
        mask[0, :2] = 0, 1
        yield score_map, mask.astype(np.uint8)


def test_pxap_equals_loops():
    metric = PxAP(THRESHOLDS)
    scores, objects = [], []
    for score_map, mask in random_masks(np.random.default_rng(2), 12):
        metric.update(score_map, mask)
        for score, value in zip(score_map.ravel().tolist(), mask.ravel().tolist(), strict=True):
            if value != 255:
                scores.append(score)
                objects.append(value != 0)
    result = metric.compute()
    total = sum(objects)
    expected = {name: [] for name in ("precision", "recall", "iou", "f1")}
    for t in THRESHOLDS:
        hits = sum(o for s, o in zip(scores, objects, strict=True) if s >= t)
        taken = sum(s >= t for s in scores)
        expected["precision"].append(hits / taken if taken else 1)
        expected["recall"].append(hits / total)
        expected["iou"].append(hits / (total + taken - hits))
        expected["f1"].append(2 * hits / (total + taken))
    for name, values in expected.items():
        np.testing.assert_allclose(result.curve[name], values, err_msg=name)
    average, before = 0.0, 0.0
    for t in [1.0, *THRESHOLDS[::-1]]:
        hits = sum(o for s, o in zip(scores, objects, strict=True) if s >= t)
        taken = sum(s >= t for s in scores)
        if taken:
            average += hits / taken * (hits / total - before)
        before = hits / total
    assert result.average_precision == pytest.approx(average)
    assert result.best() == (THRESHOLDS[np.argmax(expected["iou"])], pytest.approx(max(expected["iou"])))


def test_pxap_by_hand():
    metric = PxAP([0.0, 0.5])
    metric.update(np.array([[1.0, 0.6, 0.2, 0.4, 0.9]], np.float32), np.array([[1, 0, 1, 0, 255]]))
    result = metric.compute()
    # >= 1: 1 of 1, recall 1/2; >= 0.5: 1 of 2, recall 1/2; >= 0: 2 of 4, recall 1.
    # The area starts at the recall of the highest edge, so that the pixel of score 1 counts.
    assert result.average_precision == 0.5 * 1 + 0 + 0.5 * 0.5
    assert result.at(0.5) == {"precision": 0.5, "recall": 0.5, "iou": 1 / 3, "f1": 0.5}


def test_pxap_of_a_perfect_and_of_an_empty_map():
    mask = np.array([[0, 1], [1, 0]])
    perfect = PxAP()
    perfect.update(mask.astype(np.float32), mask)
    assert perfect.compute().average_precision == 1
    assert perfect.compute().best() == (0.001, 1.0)
    empty = PxAP()
    empty.update(np.zeros((2, 2), np.float32), mask)
    assert empty.compute().average_precision == 0.5


def test_pxap_refuses():
    metric = PxAP()
    with pytest.raises(MapError, match="no image"):
        metric.compute()
    with pytest.raises(MapError, match=r"shape \(3, 3\)"):
        metric.update(np.zeros((2, 3), np.float32), np.zeros((3, 3), np.uint8))
    with pytest.raises(MapError, match="float64"):
        metric.update(np.zeros((2, 3), np.float32), np.zeros((2, 3)))
    metric.update(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.uint8))
    with pytest.raises(MapError, match="no mask has an object"):
        metric.compute()


def test_pixel_auc_equals_loops():
    for score_map, mask in random_masks(np.random.default_rng(4), 16):
        pairs = [
            (1.0 if o > b else 0.5 if o == b else 0.0)
            for o in score_map[(mask != 0) & (mask != 255)].tolist()
            for b in score_map[mask == 0].tolist()
        ]
        assert pixel_auc(score_map, mask) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_pixel_auc_by_hand():
    assert pixel_auc(np.array([[0.1, 0.9]], np.float32), np.array([[0, 1]])) == 1
    assert pixel_auc(np.array([[0.9, 0.1]], np.float32), np.array([[0, 1]])) == 0
    assert pixel_auc(np.full((3, 4), 0.7, np.float32), np.eye(3, 4, dtype=int)) == 0.5
    for mask in (np.zeros((1, 2), int), np.ones((1, 2), int), np.full((1, 2), 255)):
        with pytest.raises(MapError, match="pixels"):
            pixel_auc(np.array([[0.1, 0.9]], np.float32), mask)
