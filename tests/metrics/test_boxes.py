import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_maps import random_map

from wsolnb.errors import MapError, ParameterError
from wsolnb.metrics import TSCAM, WSOLEVALUATION, BoxProtocol, box_iou, boxes_from_score_map, plain
from wsolnb.metrics.boxes import PROTOCOLS, ground_truth, published_boxes


def assert_same(score_map, thresholds, protocol="wsolevaluation"):
    for multi in (False, True):
        found = boxes_from_score_map(score_map, thresholds, multi, protocol)
        assert len(found) == len(thresholds)
        for t, boxes in zip(thresholds, found, strict=True):
            assert boxes.dtype.kind == "i"
            assert boxes.tolist() == plain.boxes(score_map, t, multi, protocol), (score_map.shape, t, multi)


@pytest.mark.parametrize("seed", range(8))
def test_boxes_equal_opencv_on_tiny_maps(seed):
    rng = np.random.default_rng(seed)
    for i in range(250):
        height, width = rng.integers(1, 8, 2)
        thresholds = rng.random(4).round(2)
        assert_same(random_map(rng, height, width, i % 8), thresholds, ("wsolevaluation", "tscam", "scm")[i % 3])


@pytest.mark.parametrize("kind", range(8))
def test_boxes_equal_opencv_on_larger_maps(kind):
    rng = np.random.default_rng(kind)
    for _ in range(8):
        height, width = rng.integers(8, 60, 2)
        assert_same(random_map(rng, height, width, kind), np.linspace(0, 1, 30))


def test_boxes_equal_opencv_with_thousands_of_contours():
    assert_same(np.random.default_rng(0).random((150, 170)).astype(np.float32), np.array([0.1, 0.3, 0.5, 0.7, 0.97]))


def test_holes_at_the_end_of_a_long_winding_path():
    # A background corridor that turns every second row: it takes many turns to see what it connects to the frame.
    score_map = np.full((61, 61), 0.9, np.float32)
    score_map[1:-1:2, 1:-1] = np.linspace(0.1, 0.5, 59)
    score_map[2:-2:4, -2] = score_map[4:-2:4, 1] = 0.2
    score_map[30:33, 20:24] = 0.0
    assert_same(score_map, np.linspace(0, 0.99, 80))
    score_map[0, 1] = 0.0  # its mouth
    assert_same(score_map, np.linspace(0, 0.99, 80))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_boxes_equal_opencv_whatever_the_pixels(data):
    height, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    levels = data.draw(st.lists(st.integers(0, 4), min_size=height * width, max_size=height * width))
    score_map = (np.array(levels, np.float32) / 4).reshape(height, width)
    assert_same(score_map, np.array([0.0, 0.26, 0.51, 0.76, 1.0]))


def test_every_grey_level_is_found_among_1000_thresholds():
    ramp = np.tile(np.arange(256) / 255, (3, 1)).astype(np.float32)
    assert_same(ramp, np.arange(0, 1, 0.001))


def box_map(*boxes, size=(6, 9), value=1.0):
    score_map = np.zeros(size, np.float32)
    for x0, y0, x1, y1 in boxes:
        score_map[y0:y1, x0:x1] = value
    return score_map


@pytest.mark.parametrize(
    ("score_map", "expected", "expected_tscam"),
    [
        (box_map((2, 1, 5, 4)), [2, 1, 5, 4], [2, 1, 5, 4]),
        (box_map((3, 2, 4, 3)), [3, 2, 4, 3], [3, 2, 4, 3]),  # one pixel
        (box_map((6, 3, 9, 6)), [6, 3, 8, 5], [6, 3, 9, 6]),  # at the lower right border
        (np.full((6, 9), 0.3, np.float32), [0, 0, 8, 5], [0, 0, 9, 6]),
        (np.zeros((6, 9), np.float32), [0, 0, 0, 0], [0, 0, 1, 1]),
        (np.full((1, 1), 1, np.float32), [0, 0, 0, 0], [0, 0, 1, 1]),
        (np.full((6, 9), 0.0039, np.float32), [0, 0, 0, 0], [0, 0, 1, 1]),  # below the first grey level
        # A long line has no area, and so loses against a square.
        (box_map((0, 0, 9, 1), (4, 3, 6, 5)), [4, 3, 6, 5], [4, 3, 6, 5]),
        # Equal areas: OpenCV lists what begins further down first.
        (box_map((0, 0, 2, 2), (5, 3, 7, 5)), [5, 3, 7, 5], [5, 3, 7, 5]),
        (box_map((0, 0, 2, 2), (5, 0, 7, 2)), [5, 0, 7, 2], [5, 0, 7, 2]),
    ],
)
def test_hand_made_maps(score_map, expected, expected_tscam):
    (box,) = boxes_from_score_map(score_map, [0.5])
    assert box.tolist() == [expected]
    (box,) = boxes_from_score_map(score_map, [0.5], protocol="tscam")
    assert box.tolist() == [expected_tscam]


def test_ring_with_an_island():
    score_map = box_map((1, 1, 8, 8), size=(10, 12))
    score_map[2:7, 2:7] = 0
    score_map[4, 4] = 0.6
    one, none_left = boxes_from_score_map(score_map, [0.5, 0.7], multi_contour=True)
    assert one.tolist() == [[1, 1, 8, 8], [1, 1, 8, 8], [4, 4, 5, 5]]  # ring, its hole, the island
    assert none_left.tolist() == [[1, 1, 8, 8], [1, 1, 8, 8]]
    assert boxes_from_score_map(score_map, [0.5])[0].tolist() == [[1, 1, 8, 8]]


def test_a_diagonal_joins_the_foreground_and_parts_the_background():
    score_map = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], np.float32)
    (boxes,) = boxes_from_score_map(score_map, [0.5], multi_contour=True, protocol="tscam")
    assert boxes.tolist() == [[0, 0, 3, 3], [0, 0, 3, 3]]


def test_threshold_is_strict_and_truncated():
    score_map = np.array([[0.0, 100 / 255 + 1e-4, 201 / 255 + 1e-4, 1.0]], np.float32)
    at = lambda t: boxes_from_score_map(score_map, [t], protocol="tscam")[0].tolist()[0]  # noqa: E731
    assert at(99.9 / 255) == [1, 0, 4, 1]  # level 99
    assert at(100.9 / 255) == [2, 0, 4, 1]  # level 100: grey 100 is no more foreground
    assert at(1.0) == [0, 0, 1, 1]


def test_grey_is_truncated_in_the_precision_of_the_map():
    value = np.nextafter(np.float64(0.2), 0)  # 255 * value is 50.99..., but 51 in float32
    single = np.array([[value, 1.0]], np.float32)
    double = np.array([[value, 1.0]], np.float64)
    for score_map in (single, double):
        assert_same(score_map, [50 / 255 + 1e-6, 0.0])
    starts = [boxes_from_score_map(m, [50.5 / 255], protocol="tscam")[0][0, 0] for m in (single, double)]
    assert starts == [0, 1]


def test_thresholds_in_any_order_and_equal_foregrounds_share_an_array():
    score_map = box_map((1, 1, 4, 4)) * 0.5 + box_map((2, 2, 3, 3)) * 0.5
    found = boxes_from_score_map(score_map, [0.9, 0.1, 0.8, 0.1])
    assert [b.tolist()[0] for b in found] == [[2, 2, 3, 3], [1, 1, 4, 4], [2, 2, 3, 3], [1, 1, 4, 4]]
    assert found[0] is found[2]
    with pytest.raises(ValueError, match="read-only"):
        found[0][0, 0] = 7


def test_non_contiguous_and_read_only_maps():
    score_map = np.random.default_rng(3).random((20, 30)).astype(np.float32)
    score_map.flags.writeable = False
    assert_same(score_map.T[::2], [0.2, 0.6])


def test_a_protocol_of_ones_own():
    mine = BoxProtocol("mine", clip_prediction=False, clip_truth=False, empty=(9, 9, 9, 9))
    assert boxes_from_score_map(np.zeros((4, 4), np.float32), [0.1], protocol=mine)[0].tolist() == [[9, 9, 9, 9]]
    with pytest.raises(ParameterError, match=r"did you mean 'tscam'"):
        boxes_from_score_map(np.zeros((4, 4), np.float32), [0.1], protocol="ts-cam")


@pytest.mark.parametrize(
    ("score_map", "message"),
    [
        (np.array([[0.1, np.nan]], np.float32), "NaN"),
        (np.array([[0.1, np.inf]], np.float32), "inf"),
        (np.array([[0.1, -np.inf]], np.float32), "-inf"),
        (np.array([[0.1, 1.1]], np.float32), "1.1"),
        (np.array([[-0.1, 1.0]], np.float32), "-0.1"),
        (np.zeros(5, np.float32), r"\(5,\)"),
        (np.zeros((1, 5, 5), np.float32), r"\(1, 5, 5\)"),
        (np.zeros((0, 5), np.float32), r"\(0, 5\)"),
        (np.zeros((5, 5), np.uint8), "uint8"),
        ([[0.0, 1.0]], "list"),
    ],
)
def test_what_is_no_score_map(score_map, message):
    with pytest.raises(MapError, match=message) as caught:
        boxes_from_score_map(score_map, [0.5])
    assert caught.value.remedy


@pytest.mark.parametrize("thresholds", [[], [[0.1]], [-0.1], [1.1], [np.nan], 0.5])
def test_what_are_no_thresholds(thresholds):
    with pytest.raises(ParameterError, match="threshold"):
        boxes_from_score_map(np.ones((3, 3), np.float32), thresholds)


def test_iou_of_inclusive_boxes():
    assert box_iou([[0, 0, 0, 0]], [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]]).tolist() == [[1.0, 0.0, 0.5]]
    assert box_iou([[0, 0, 9, 9]], [[5, 0, 14, 9]]).tolist() == [[50 / 150]]
    rng = np.random.default_rng(0)
    a, b = (np.sort(rng.integers(0, 20, (n, 2, 2)), axis=1).reshape(n, 4) for n in (7, 5))
    assert box_iou(a, b).tolist() == [[plain.iou(p, q) for q in b.tolist()] for p in a.tolist()]


def test_ground_truth_is_scaled_then_truncated():
    boxes = [[60.0, 27.0, 385.0, 331.0]]
    # x * new / old in this order: 60 * 224 / 500 = 26.88, 385 * 224 / 500 = 172.48, 27 * 224 / 336 = 18
    expected = [[26, 18, 172, 220]]
    assert ground_truth(boxes, (224, 224), WSOLEVALUATION, image_size=(336, 500)).tolist() == expected
    assert ground_truth([[26.88, 18.0, 172.48, 220.9]], (224, 224), WSOLEVALUATION).tolist() == expected
    whole = [[0.0, 0.0, 224.0, 224.0]]
    assert ground_truth(whole, (224, 224), WSOLEVALUATION).tolist() == [[0, 0, 224, 224]]
    assert ground_truth(whole, (224, 224), TSCAM).tolist() == [[0, 0, 223, 223]]
    assert ground_truth([-0.5, 0, 7.5, 8.5], (8, 8), TSCAM).tolist() == [[0, 0, 7, 7]]
    assert ground_truth([0.5, 0, 7.5, 8.5], (8, 8), PROTOCOLS["scm"]).tolist() == [[0.5, 0, 7.5, 8.5]]
    assert ground_truth([1, 0, 2, 3], (224, 224), PROTOCOLS["scm"], (7, 7)).tolist() == [[32, 0, 64, 96]]


def test_scaling_truncates_as_the_protocol_does_for_all_integers():
    for old in (320, 333, 640):  # x * (new / old) would differ: 180 of 640 is 62.99...
        x = np.arange(old + 1)
        boxes = np.stack([x, x, x, x], axis=1).astype(float)
        found = published_boxes(boxes, (224, 224), WSOLEVALUATION, truth=True, image_size=(old, old))
        assert found[:, 0].tolist() == [int(float(v) * 224.0 / float(old)) for v in x.tolist()]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (np.zeros((0, 4)), "no ground-truth box"),
        ([], "no ground-truth box"),
        ([[1, 2, 3]], "shape"),
        ([[1, 2, np.nan, 4]], "no box"),
        ([[4, 1, 2, 3]], "no box"),
        ([[1, 4, 2, 3]], "no box"),
        ([[-2, 0, 5, 5]], "leaves"),
        ([[0, 0, 9, 12]], "leaves"),  # in pixels of the original image, say
        ([[0.1, 0.2, 0.9, 1]], "in shares of the image's sides"),
    ],
)
def test_what_is_no_ground_truth(boxes, message):
    with pytest.raises(MapError, match=message) as caught:
        ground_truth(boxes, (10, 10), WSOLEVALUATION)
    assert caught.value.remedy


def test_opencv_is_one_of_the_versions_whose_contours_are_reproduced():
    assert cv2.__version__.startswith("4.")
