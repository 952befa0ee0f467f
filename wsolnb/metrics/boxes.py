"""Boxes from score maps, and how boxes are compared: the published protocols, to the pixel.

The package's boxes are half-open, `x0, y0, x1, y1` with width `x1 - x0` (see `wsolnb.data.sample`). Published
evaluation code mixes them with inclusive coordinates. All such behaviour is in `published_boxes` and, for the IoU of
inclusive boxes, in `box_overlap`. Everything else calls these two functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from wsolnb.errors import ParameterError, nearest
from wsolnb.metrics._contours import all_boxes, largest_boxes
from wsolnb.metrics.checks import check_gt_boxes, check_score_map, check_thresholds


@dataclass(frozen=True)
class BoxProtocol:
    """What a published protocol does to the coordinates of boxes.

    clip_prediction: the right and lower end of a predicted box, one past its last pixel, is clipped to W - 1, H - 1.
    clip_truth: ground truth is clipped to 0..W - 1, 0..H - 1 before it is truncated.
    truncate_truth: ground truth is truncated to integers; False compares it as the annotation has it.
    empty: the box of a map without foreground.
    """

    name: str
    clip_prediction: bool
    clip_truth: bool
    empty: tuple[int, int, int, int]
    truncate_truth: bool = True


WSOLEVALUATION = BoxProtocol("wsolevaluation", clip_prediction=True, clip_truth=False, empty=(0, 0, 0, 0))
"""MaxBoxAcc of Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020."""

TSCAM = BoxProtocol("tscam", clip_prediction=False, clip_truth=True, empty=(0, 0, 1, 1))
"""The evaluation of TS-CAM (Gao et al., ICCV 2021), which other programs inherited."""

SCM = BoxProtocol("scm", clip_prediction=True, clip_truth=False, empty=(0, 0, 0, 0), truncate_truth=False)
"""The evaluation of SCM's released code (Bai et al., ECCV 2022): predictions as in wsolevaluation, truth untouched."""

PROTOCOLS = {protocol.name: protocol for protocol in (WSOLEVALUATION, TSCAM, SCM)}


def find_protocol(protocol: str | BoxProtocol) -> BoxProtocol:
    """Return the protocol of that name (`wsolevaluation`, `tscam`, `scm`); ParameterError when there is none."""
    if isinstance(protocol, BoxProtocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ParameterError(
            f"no box protocol is called {protocol!r}{nearest(str(protocol), PROTOCOLS)}",
            f"choose one of {', '.join(PROTOCOLS)}",
        )
    return PROTOCOLS[protocol]


def published_boxes(
    boxes: np.ndarray,
    map_size: tuple[int, int],
    protocol: BoxProtocol,
    truth: bool = False,
    image_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Turn half-open boxes into the numbers that a published protocol compares, (n, 4).

    Predictions (`truth=False`), (n, 4) integers: clipped to W - 1, H - 1 or not; `protocol.empty` if there are none;
    int32. Ground truth (`truth=True`), (n, 4) floats: scaled by x * new / old in this order of operations when
    `image_size`, the (H, W) they refer to, is given; clipped or not; truncated towards zero, int32, or left as float64.

    map_size: (H, W) of the score map.
    """
    height, width = map_size
    last = np.array([width - 1, height - 1, width - 1, height - 1], np.int32)
    if not truth:
        if len(boxes) == 0:
            return np.array([protocol.empty], np.int32)
        return np.minimum(boxes, last, dtype=np.int32) if protocol.clip_prediction else boxes
    if image_size is not None:
        new, old = np.array([width, height, width, height]), np.array([image_size[1], image_size[0]] * 2)
        boxes = boxes * new / old
    if protocol.clip_truth:
        boxes = np.clip(boxes, 0, last)
    return np.trunc(boxes).astype(np.int32) if protocol.truncate_truth else boxes.astype(np.float64)


def ground_truth(
    boxes: np.ndarray,
    map_size: tuple[int, int],
    protocol: BoxProtocol,
    image_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Check ground-truth boxes (n, 4) and return them as the protocol compares them (n, 4), see `published_boxes`.

    They are in pixels of the map, or of an image of `image_size` (H, W) if that is given. Raises MapError as
    `check_gt_boxes` does.
    """
    return published_boxes(check_gt_boxes(boxes, image_size or map_size), map_size, protocol, True, image_size)


def foreground_levels(score_map: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return grey = trunc(255 * map), uint8 (H, W), and the levels int(t * max(grey)), int64 (T,), of the thresholds.

    The foreground at a threshold are the pixels with grey > level. The product is taken in the map's own precision, as
    in the published codes. Raises MapError for an invalid map.
    """
    grey = (check_score_map(score_map) * 255).astype(np.uint8)
    return grey, np.trunc(thresholds * int(grey.max())).astype(np.int64)


def level_boxes(
    score_map: np.ndarray, thresholds: np.ndarray, multi_contour: bool, protocol: BoxProtocol
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the boxes of the distinct foregrounds among the thresholds, and which of them each threshold (T,) has.

    This is `boxes_from_score_map` without repeated boxes: 1,000 thresholds have at most 256 different foregrounds.
    """
    grey, wanted = foreground_levels(score_map, thresholds)
    # Levels between which no grey value lies have the same foreground: keep the lowest of them.
    present = cv2.calcHist([grey], [0], None, [256], [0, 256])[:, 0] > 0
    same = np.maximum.accumulate(np.where(present, np.arange(256), 0))
    levels, which = np.unique(same[wanted], return_inverse=True)
    below = int(np.searchsorted(levels, grey.max()))
    size = score_map.shape
    boxes = []
    if below and multi_contour:
        found, begin, count = all_boxes(grey, levels[:below])
        found = published_boxes(found, size, protocol)
        boxes = [found[b : b + n] for b, n in zip(begin.tolist(), count.tolist(), strict=True)]
    elif below:
        boxes = list(published_boxes(largest_boxes(grey, levels[:below]), size, protocol)[:, None])
    if below < levels.size:
        boxes.append(published_boxes(np.empty((0, 4), np.int32), size, protocol))
    return boxes, which


def boxes_from_score_map(
    score_map: np.ndarray,
    thresholds: Sequence[float] | np.ndarray,
    multi_contour: bool = False,
    protocol: str | BoxProtocol = WSOLEVALUATION,
) -> list[np.ndarray]:
    """Extract boxes from a score map at every threshold.

    With grey = trunc(255 * map), the foreground at threshold t is grey > int(t * max(grey)). Its contours are those of
    `cv2.findContours(RETR_TREE, CHAIN_APPROX_SIMPLE)`, borders of holes included; the box of a contour is its bounding
    rectangle. By default each threshold has one box, that of the first contour with the largest `cv2.contourArea`.
    `multi_contour=True` gives the boxes of all contours, in OpenCV's order. The time hardly depends on the number of
    thresholds.

    score_map: (H, W) float32 in [0, 1]. thresholds: (T,) in [0, 1], in any order.
    protocol: `wsolevaluation`, `tscam` or `scm`, or a `BoxProtocol`; the first two differ in clipping and in the empty
        box, `scm` is `wsolevaluation` here.
    Returns T integer arrays (n, 4), n >= 1. Thresholds of the same foreground share one array; it is read-only.
    Raises MapError for an invalid map, ParameterError for thresholds out of range or an unknown protocol.
    """
    thresholds = check_thresholds(thresholds, ascending=False)
    boxes, which = level_boxes(score_map, thresholds, multi_contour, find_protocol(protocol))
    for b in boxes:
        b.flags.writeable = False
    return [boxes[i] for i in which.tolist()]


def box_overlap(boxes_a: np.ndarray, boxes_b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return intersections (n, m) and areas (n, 1) and (1, m) of boxes whose ends are inclusive, so x1 - x0 + 1 wide.

    boxes_a: (n, 4); boxes_b: (m, 4); both `x0, y0, x1, y1`.
    """
    a = np.asarray(boxes_a, dtype=np.float64).reshape(-1, 1, 4)
    b = np.asarray(boxes_b, dtype=np.float64).reshape(1, -1, 4)
    extent = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + 1
    area_a, area_b = (np.prod(box[..., 2:] - box[..., :2] + 1, axis=-1) for box in (a, b))
    return np.prod(np.maximum(extent, 0), axis=-1), area_a, area_b


def box_iou(boxes_a: np.ndarray, boxes_b: np.ndarray) -> np.ndarray:
    """Return the intersection over union (n, m) float64 of boxes (n, 4) and (m, 4) with inclusive ends.

    As in the published protocols: widths are x1 - x0 + 1, so that a box `0, 0, 0, 0` has one pixel.
    """
    intersection, area_a, area_b = box_overlap(boxes_a, boxes_b)
    return intersection / (area_a + area_b - intersection)
