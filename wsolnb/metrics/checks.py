"""What every metric accepts. Each kind of input has one check, whose error names what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wsolnb.data.sample import IGNORE
from wsolnb.errors import MapError, ParameterError

DEFAULT_THRESHOLDS = np.arange(0, 1, 0.001)
"""The 1,000 thresholds of the wsolevaluation protocol."""
DEFAULT_THRESHOLDS.flags.writeable = False


def check_score_map(score_map: np.ndarray) -> np.ndarray:
    """Return `score_map` if it is a score map: (H, W), float32 (or float64), not empty, values in [0, 1].

    Raises MapError for any other shape or type, for NaN, infinity and values out of range.
    """
    if not isinstance(score_map, np.ndarray) or score_map.dtype not in (np.float32, np.float64):
        kind = f"{score_map.dtype} array" if isinstance(score_map, np.ndarray) else type(score_map).__name__
        raise MapError(f"the score map is a {kind}", "pass a NumPy float32 array with values in [0, 1]")
    if score_map.ndim != 2 or score_map.size == 0:
        raise MapError(f"the score map has shape {score_map.shape}", "pass one map (H, W) with at least one pixel")
    low, high = score_map.min(), score_map.max()
    if not (low >= 0 and high <= 1):  # also false for NaN, which min and max pass on
        if np.isnan(low):
            raise MapError(
                "the score map holds NaN",
                "look for a division by a zero range, as when a constant map is normalized by (x - min) / (max - min)",
            )
        raise MapError(
            f"the score map has values from {low:g} to {high:g}",
            "normalize it to [0, 1], for example by (x - min) / (max - min)",
        )
    return score_map


def check_mask(mask: np.ndarray, shape: tuple[int, int], name: str = "mask") -> np.ndarray:
    """Return `mask` if it is an integer (or boolean) array of the given shape (H, W).

    Raises MapError, naming it `name`.
    """
    if not isinstance(mask, np.ndarray) or mask.dtype.kind not in "uib":
        kind = f"{mask.dtype} array" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise MapError(f"the {name} is a {kind}", "pass a NumPy array of integers, one value per pixel")
    if mask.shape != tuple(shape):
        raise MapError(
            f"the {name} has shape {mask.shape}, the map {tuple(shape)}",
            "bring both to one size: nearest neighbour for truth, bilinear for score maps",
        )
    return mask


def object_and_background(
    mask: np.ndarray, shape: tuple[int, int], both: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return where a mask (H, W) has object and where background: 0 background, 255 not counted, else object.

    Raises MapError for an invalid mask or another shape; with `both`, also when the mask lacks object or background.
    """
    background = check_mask(mask, shape) == 0
    objects = ~background & (mask != IGNORE)
    if both and not (background.any() and objects.any()):
        problem = f"the mask has {objects.sum()} object and {background.sum()} background pixels"
        raise MapError(problem, "leave images out that lack one of them")
    return objects, background


def check_gt_boxes(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return ground-truth boxes as (n, 4) float64, n >= 1: half-open `x0, y0, x1, y1` in an image of size (H, W).

    A box may leave the image by up to one pixel, as rounded annotations do.
    Raises MapError if there is no box, for another shape, NaN, x1 < x0 or y1 < y0, for boxes outside of the image, and
    for boxes that all lie in its first pixel, as those do that are given in shares of the image's sides.
    """
    boxes = np.asarray(boxes, dtype=np.float64)
    if boxes.size == 0:
        raise MapError("there is no ground-truth box", "leave images without boxes out of a box metric")
    if boxes.shape == (4,):
        boxes = boxes[None]
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise MapError(f"the ground-truth boxes have shape {boxes.shape}", "pass (n, 4): x0, y0, x1, y1")
    if not np.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
        raise MapError(f"a ground-truth box is no box: {boxes.tolist()}", "give x0 <= x1 and y0 <= y1, not x, y, w, h")
    if boxes.min() >= 0 and boxes.max() <= 1 and (boxes % 1).any():  # would count as missed, whatever the map is
        problem = f"the ground-truth boxes are in shares of the image's sides, not in pixels: {boxes.tolist()}"
        raise MapError(problem, "multiply x by the width and y by the height")
    height, width = size
    if boxes.min() < -1 or (boxes > np.array([width, height, width, height]) + 1.0).any():
        raise MapError(
            f"a ground-truth box leaves the {width} x {height} pixels it belongs to: {boxes.tolist()}",
            "scale the boxes with the image, or say in `image_size` what they refer to",
        )
    return boxes


def check_thresholds(thresholds: Sequence[float] | np.ndarray, ascending: bool = True) -> np.ndarray:
    """Return `thresholds` as (T,) float64, T >= 1, each in [0, 1] and, if `ascending`, larger than the one before.

    Raises ParameterError otherwise.
    """
    array = np.array(thresholds, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ParameterError(f"thresholds of shape {array.shape}", "pass a list of at least one number")
    if not ((array >= 0) & (array <= 1)).all():
        raise ParameterError(f"a threshold is outside of [0, 1]: {array.min():g} to {array.max():g}", "choose within")
    if ascending and not (np.diff(array) > 0).all():
        raise ParameterError("the thresholds do not ascend", "sort them and drop repetitions: np.unique(thresholds)")
    return array
