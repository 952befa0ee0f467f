"""Segmentation metrics: predicted masks against true ones, and seed maps against true masks at every threshold.

Masks hold class indices, 0 for the background; 255 is not counted. A class's scores come from three counts of pixels
over all images: truth T (pixels of the class), prediction P (pixels predicted as it) and hits H (both). With the union
U = T + P - H: IoU = H / U, false positives FP = (P - H) / U, false negatives FN = (T - H) / U, precision = H / P,
recall = H / T. For one class IoU + FP + FN = 1.

Means are over the classes that occur, of two kinds. `miou`, `fp`, `fn`, `precision` and `recall` count the background
as a class: mIoU + FP + FN = 1. `fp_foreground` and `fn_foreground` leave it out. In the tables of LPCAM mIoU, FP and FN
add to more than 1 (VOC: 1.014 and 1.015). Means over all classes always add to 1. With foreground means of FP and FN
the sum is above 1 if the background's IoU is above the mean of the others. So the foreground means are compared with
the paper's numbers. The released code computes neither.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from wsolnb.data.sample import IGNORE
from wsolnb.errors import MapError, ParameterError
from wsolnb.metrics.checks import check_mask, check_score_map, check_thresholds
from wsolnb.metrics.curves import Scored, ThresholdCurve


@dataclass(frozen=True)
class Segmentation:
    """Scores of each class, and their means.

    iou, fp, fn, precision, recall: (C,) in [0, 1]; NaN where the denominator is 0, as for a class that occurs neither
    in truth nor in prediction.
    """

    iou: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    precision: np.ndarray
    recall: np.ndarray

    @property
    def miou(self) -> float:
        """Mean IoU over all classes that occur, the background among them."""
        return self.mean("iou")

    def mean(self, name: str, background: bool = True) -> float:
        """Return the mean over classes of `iou`, `fp`, `fn`, `precision` or `recall`, leaving NaN out.

        background: count class 0 too. NaN when no class has a value.
        """
        return float(_mean(getattr(self, name)[0 if background else 1 :]))

    def means(self) -> dict[str, float]:
        """Return the means over classes, by name (`MEANS`)."""
        return {name: float(values) for name, values in _means(vars(self)).items()}


MEANS = ("miou", "fp", "fn", "precision", "recall", "fp_foreground", "fn_foreground")
"""Names of the means over classes: with the background, and of two without it."""


def _mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis without NaN; NaN when nothing else is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis=-1)


def _means(classes: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return `MEANS` of scores per class, each (..., C)."""
    of = {name: (name.replace("miou", "iou"), 0) for name in MEANS[:5]}
    of |= {f"{name}_foreground": (name, 1) for name in ("fp", "fn")}
    return {name: _mean(classes[score][..., first:]) for name, (score, first) in of.items()}


def _ratios(truth: np.ndarray, predicted: np.ndarray, hits: np.ndarray) -> dict[str, np.ndarray]:
    """Return the scores of the module's equations from counts of pixels (..., C)."""
    union = truth + predicted - hits
    parts = {
        "iou": (hits, union),
        "fp": (predicted - hits, union),
        "fn": (truth - hits, union),
        "precision": (hits, predicted),
        "recall": (hits, truth),
    }
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        return {name: over / np.asarray(under, np.float64) for name, (over, under) in parts.items()}


def _check_classes(num_classes: int) -> int:
    """Return the number of classes, background included; ParameterError outside of 2..255."""
    if not 2 <= num_classes <= IGNORE:
        raise ParameterError(f"{num_classes} classes", "count the background as one: 21 for VOC, 2 for object masks")
    return num_classes


def _check_range(values: np.ndarray, num_classes: int, name: str) -> np.ndarray:
    """Return `values` as int64 if all are in 0..num_classes - 1; MapError otherwise."""
    if values.size and (values.min() < 0 or values.max() >= num_classes):
        raise MapError(
            f"the {name} holds values {values.min()} to {values.max()}, there are {num_classes} classes",
            "0 is the background, class index c is c + 1, 255 is not counted",
        )
    return values.astype(np.int64)


def _check_counted(truth: np.ndarray) -> None:
    """Raise MapError unless pixels of some class but the background were counted; truth: (C,) of them."""
    if not truth.any():
        raise MapError("no pixel was counted", "call `update` first, with masks that are not 255 throughout")
    if not truth[1:].any():
        problem = "no mask has a pixel of an object"
        raise MapError(problem, "masks of 0 and 255 have none, as 255 is not counted: write class index + 1")


def _check_maps(maps: np.ndarray, classes: Sequence[int] | np.ndarray) -> None:
    """Raise MapError unless there is one map per class."""
    if not isinstance(maps, np.ndarray) or maps.ndim != 3 or len(maps) != len(classes):
        problem = f"maps of shape {np.shape(maps)} for {len(classes)} classes"
        raise MapError(problem, "pass one map per class: (K, H, W)")


class SegmentationScores:
    """Segmentation scores of predicted masks, over all images.

    num_classes: number of classes with the background, so 21 for VOC and 2 for single-label object masks.
    """

    def __init__(self, num_classes: int):
        self.num_classes = _check_classes(num_classes)
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        """(C, C) counts of pixels: row truth, column prediction."""

    def update(self, prediction: np.ndarray, mask: np.ndarray) -> None:
        """Add one image.

        prediction: (H, W) integers in 0..num_classes - 1. mask: (H, W) integers, the same or 255 (not counted).
        Raises MapError for values out of range and for different sizes.
        """
        if not isinstance(prediction, np.ndarray) or prediction.ndim != 2 or prediction.size == 0:
            raise MapError(f"the prediction is no mask: shape {np.shape(prediction)}", "pass one mask (H, W)")
        prediction = check_mask(prediction, prediction.shape, "prediction")
        counted = check_mask(mask, prediction.shape) != IGNORE
        truth = _check_range(mask[counted], self.num_classes, "mask")
        predicted = _check_range(prediction[counted], self.num_classes, "prediction")
        pairs = np.bincount(truth * self.num_classes + predicted, minlength=self.num_classes**2)
        self.confusion += pairs.reshape(self.num_classes, -1)

    def compute(self) -> Segmentation:
        """Return the scores of the images so far; MapError when no pixel was counted, or none is of an object."""
        _check_counted(self.confusion.sum(axis=1))
        return Segmentation(**_ratios(self.confusion.sum(axis=1), self.confusion.sum(axis=0), np.diag(self.confusion)))


@njit(cache=True)
def _count_seeds(maps, values, mask, thresholds, pixels):
    """Add the pixels of an image to `pixels` (C, 3, T + 1), which `SeedScores` describes."""
    for y in range(mask.shape[0]):
        for x in range(mask.shape[1]):
            truth = mask[y, x]
            if truth == IGNORE:
                continue
            best = 0
            for k in range(1, values.size):
                if maps[k, y, x] > maps[best, y, x]:
                    best = k
            score = maps[best, y, x]
            low, high = 0, thresholds.size  # thresholds[:low] < score <= thresholds[high:]
            while low < high:
                middle = (low + high) // 2
                if thresholds[middle] < score:
                    low = middle + 1
                else:
                    high = middle
            kind = 0 if truth == values[best] else 1 if truth == 0 else 2
            pixels[values[best], kind, low] += 1


@dataclass(frozen=True)
class SeedSegmentation(Scored):
    """What `SeedScores.compute` returns.

    curve: per threshold the means over classes that occur, by name (`MEANS`).
    classes: the same per class, name -> (T, C), NaN as in `Segmentation`. images: number of images.
    """

    MAIN = "miou"

    classes: dict[str, np.ndarray]
    images: int

    def at(self, threshold: float) -> Segmentation:
        """Return the scores at a threshold chosen elsewhere."""
        index = self.curve.index(threshold)
        return Segmentation(**{name: values[index] for name, values in self.classes.items()})


class SeedScores:
    """Segmentation scores of seed masks at every background threshold, over all images.

    The seed mask of an image is the argmax over the threshold (background) and the maps of its classes. A pixel whose
    highest score equals the threshold is background; among equal classes the first one wins. Thresholds are rounded to
    float32, as in the released code, which stacks them with the maps. Memory does not grow with the number of images.
    For each class and threshold only three counts are kept: the pixels that first exceed it, split by their truth into
    class, background and other.

    num_classes: number of classes with the background. thresholds: (T,) ascending, in [0, 1].
    """

    def __init__(self, num_classes: int, thresholds: Sequence[float] | np.ndarray = np.arange(0, 1, 0.01)):  # noqa: B008
        self.num_classes = _check_classes(num_classes)
        self.thresholds = check_thresholds(thresholds)
        self._rounded = self.thresholds.astype(np.float32)
        # (predicted class, truth: 0 the class, 1 background, 2 other, number of thresholds below the score)
        self._pixels = np.zeros((num_classes, 3, self.thresholds.size + 1), np.int64)
        self._truth = np.zeros(num_classes, np.int64)
        self._images = 0

    def update(self, maps: np.ndarray, class_indices: Sequence[int] | np.ndarray, mask: np.ndarray) -> None:
        """Add one image.

        maps: (K, H, W) float32 in [0, 1], one per class of the image; K may be 0.
        class_indices: (K,) distinct class indices from 0; the mask value of class c is c + 1.
        mask: (H, W) integers in 0..num_classes - 1, or 255 (not counted).
        Raises MapError for maps, classes or a mask that do not belong together or are out of range.
        """
        classes = np.asarray(class_indices, np.int64).reshape(-1)
        _check_maps(maps, classes)
        if len(set(classes.tolist())) != len(classes):
            raise MapError(f"a class has two maps: {classes.tolist()}", "pass each class once")
        values = _check_range(classes + 1, self.num_classes, "list of classes")
        counted = check_mask(mask, maps.shape[1:]) != IGNORE
        truth = _check_range(mask[counted], self.num_classes, "mask")
        if len(classes):
            check_score_map(maps.reshape(len(maps), -1))
            _count_seeds(np.ascontiguousarray(maps), values, mask.astype(np.uint8), self._rounded, self._pixels)
        self._truth += np.bincount(truth, minlength=self.num_classes)
        self._images += 1

    def compute(self) -> SeedSegmentation:
        """Return the scores of the images so far; MapError when no pixel was counted, or none is of an object."""
        _check_counted(self._truth)
        # Pixels predicted as a class at threshold j are those whose score exceeds j + 1 thresholds or more.
        exceeding = self._pixels[:, :, ::-1].cumsum(axis=2)[:, :, ::-1][:, :, 1:]
        hits = exceeding[:, 0].T.copy()
        predicted = exceeding.sum(axis=1).T.copy()
        predicted[:, 0] = self._truth.sum() - predicted[:, 1:].sum(axis=1)
        hits[:, 0] = self._truth[0] - exceeding[:, 1].sum(axis=0)
        classes = _ratios(self._truth, predicted, hits)
        return SeedSegmentation(ThresholdCurve(self.thresholds, _means(classes)), classes, self._images)


def seed_mask(maps: np.ndarray, classes: Sequence[int], threshold: float) -> np.ndarray:
    """Return the seed mask (H, W) uint8: 0 background, class index + 1; the rule of `SeedScores`.

    maps: (K, H, W) in [0, 1], one per class; K = 0 gives background. A pixel belongs to the class of its highest map if
    this map exceeds the threshold; among equal maps the first one counts.
    """
    _check_maps(maps, classes)
    if not len(maps):
        return np.zeros(maps.shape[1:], np.uint8)
    best = maps.argmax(axis=0)
    values = np.asarray(classes, np.uint8)[best] + np.uint8(1)
    return np.where(maps.max(axis=0) > np.float32(threshold), values, 0).astype(np.uint8)
