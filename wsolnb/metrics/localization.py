"""Localization metrics: MaxBoxAcc, GT-known and top-k localization with an error taxonomy, PxAP, pixel AUC.

All but the AUC are functions of the threshold at which a score map becomes a box or a mask, and return the whole curve
(`wsolnb.metrics.curves`). Accuracies are in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wsolnb.errors import MapError, ParameterError
from wsolnb.metrics.boxes import (
    TSCAM,
    WSOLEVALUATION,
    BoxProtocol,
    box_iou,
    box_overlap,
    find_protocol,
    ground_truth,
    level_boxes,
)
from wsolnb.metrics.checks import DEFAULT_THRESHOLDS, check_score_map, check_thresholds, object_and_background
from wsolnb.metrics.curves import Scored, ThresholdCurve


def _some(count: int) -> int:
    """Return `count`, the number of images added; MapError when it is 0."""
    if count == 0:
        raise MapError("no image was added to the metric", "call `update` before `compute`")
    return count


@dataclass(frozen=True)
class BoxAccuracy:
    """What `MaxBoxAcc.compute` returns.

    curve: the share of images with a correct box, per threshold, one score `iou_0.5` for each IoU threshold.
    iou_thresholds: those IoU thresholds. multi_contour: whether any of several boxes may be the correct one.
    images: number of images.
    """

    curve: ThresholdCurve
    iou_thresholds: tuple[float, ...]
    multi_contour: bool
    images: int

    @property
    def best(self) -> dict[str, tuple[float, float]]:
        """(threshold, accuracy) at the maximum of each curve: `MaxBoxAcc` of each IoU threshold."""
        return {name: self.curve.best(name) for name in self.curve.scores}

    @property
    def v1(self) -> float:
        """MaxBoxAcc: the maximum over thresholds at IoU 0.5, one box per image.

        Raises ParameterError when several boxes were allowed or IoU 0.5 was left out.
        """
        if self.multi_contour:
            raise ParameterError("MaxBoxAcc (V1) takes one box per image", "use MaxBoxAcc(multi_contour=False)")
        return self.curve.best("iou_0.5")[1]

    @property
    def v2(self) -> float:
        """MaxBoxAccV2: the mean over the IoU thresholds of the maxima; any box of an image may be the correct one.

        Raises ParameterError when only one box per image was allowed.
        """
        if not self.multi_contour:
            raise ParameterError("MaxBoxAccV2 takes all boxes of an image", "use MaxBoxAcc(multi_contour=True)")
        return float(np.mean([accuracy for _, accuracy in self.best.values()]))

    def at(self, threshold: float | Sequence[float]) -> dict[str, float]:
        """Return the accuracies at a threshold chosen elsewhere, and their `mean`.

        threshold: one for all, or one per IoU threshold, as V2 chooses them:
        `test.at([t for t, _ in validation.best.values()])`. Raises ParameterError when the curve lacks the threshold.
        """
        each = np.broadcast_to(np.asarray(threshold, np.float64), len(self.iou_thresholds))
        scores = {name: self.curve.at(t)[name] for name, t in zip(self.curve.scores, each, strict=True)}
        return scores | {"mean": float(np.mean(list(scores.values())))}


class MaxBoxAcc:
    """Box accuracy at every threshold (Choe et al., CVPR 2020; V2 in its journal version).

    An image counts as correct where the best IoU between its boxes and its ground-truth boxes is >= the IoU threshold.
    V1 is `MaxBoxAcc().compute().v1`, V2 is `MaxBoxAcc(multi_contour=True).compute().v2`.

    thresholds: (T,) ascending, in [0, 1]. iou_thresholds: in (0, 1].
    multi_contour: take the boxes of all contours instead of the box of the largest contour.
    protocol: see `boxes_from_score_map`.
    """

    def __init__(
        self,
        thresholds: Sequence[float] | np.ndarray = DEFAULT_THRESHOLDS,
        iou_thresholds: Sequence[float] = (0.3, 0.5, 0.7),
        multi_contour: bool = False,
        protocol: str | BoxProtocol = WSOLEVALUATION,
    ):
        self.thresholds = check_thresholds(thresholds)
        self.iou_thresholds = tuple(float(iou) for iou in iou_thresholds)
        if not self.iou_thresholds or not all(0 < iou <= 1 for iou in self.iou_thresholds):
            problem = f"IoU thresholds {self.iou_thresholds}"
            raise ParameterError(problem, "choose some in (0, 1], such as 0.3, 0.5, 0.7")
        self.multi_contour = multi_contour
        self.protocol = find_protocol(protocol)
        self._correct = np.zeros((len(self.iou_thresholds), self.thresholds.size), np.int64)
        self._images = 0

    def update(self, score_map: np.ndarray, gt_boxes: np.ndarray, image_size: tuple[int, int] | None = None) -> None:
        """Add one image.

        score_map: (H, W) float32 in [0, 1]. gt_boxes: (n, 4), n >= 1, half-open `x0, y0, x1, y1` in pixels of the map,
        or of an image of `image_size` (H, W) if that is given; truncated as the protocol does.
        Raises MapError for an invalid map or invalid boxes.
        """
        boxes, which = level_boxes(score_map, self.thresholds, self.multi_contour, self.protocol)
        best = _best_iou(boxes, ground_truth(gt_boxes, score_map.shape, self.protocol, image_size))
        self._correct += np.stack([best >= iou for iou in self.iou_thresholds])[:, which]
        self._images += 1

    def compute(self) -> BoxAccuracy:
        """Return the accuracies of the images so far; MapError when there are none."""
        curves = self._correct / _some(self._images)
        scores = {f"iou_{iou:g}": curve for iou, curve in zip(self.iou_thresholds, curves, strict=True)}
        curve = ThresholdCurve(self.thresholds, scores)
        return BoxAccuracy(curve, self.iou_thresholds, self.multi_contour, self._images)


def _best_iou(boxes: list[np.ndarray], truth: np.ndarray) -> np.ndarray:
    """Return for each array of boxes (n, 4) the best IoU with any box of `truth` (m, 4)."""
    starts = np.cumsum([0] + [len(b) for b in boxes[:-1]])
    return np.maximum.reduceat(box_iou(np.concatenate(boxes), truth).max(axis=1), starts)


ERRORS = ("wrong_class", "several_instances", "part", "more", "other")
"""The error taxonomy of `LocalizationAccuracy`; with `top1_loc` the shares add up to 1."""


@dataclass(frozen=True)
class Localization(Scored):
    """What `LocalizationAccuracy.compute` returns.

    curve: per threshold `gt_known`, `top1_loc`, `top5_loc` and the shares of the errors (`ERRORS`); with maps of the
    predicted classes also `gt_known_predicted`, `gt_known_any5` and `top5_loc_any5`.
    top1_cls, top5_cls: classification accuracy. images: number of images.
    If no image had a box, all curves are NaN, and the classification is that of the images given to `classify`.
    """

    MAIN = "gt_known"

    top1_cls: float
    top5_cls: float
    images: int

    def at(self, threshold: float) -> dict[str, float]:
        """Return all scores at a threshold chosen elsewhere, with `top1_cls` and `top5_cls`."""
        return super().at(threshold) | {"top1_cls": self.top1_cls, "top5_cls": self.top5_cls}


class LocalizationAccuracy:
    """GT-known, top-1 and top-5 localization, and what goes wrong, at every threshold (as in TS-CAM, ICCV 2021).

    From the box of the map of the true class and its best IoU with a ground-truth box:
    `gt_known`: IoU >= 0.5. `top1_loc`, `top5_loc`: the class is the first / among the first five, and IoU > 0.5.

    An image that is not `top1_loc` has the first of these errors that applies: `wrong_class`: the first class is wrong.
    `several_instances`: of several ground-truth boxes more than one is covered by more than 0.3 of its area. The next
    two compare with the ground-truth box of best IoU. `part`: more than 0.5 of the predicted box is inside of it.
    `more`: at least 0.7 of it is covered (>= as in the released code). `other`: the rest.

    When the maps of the predicted classes are given too, there are also variants that some released code reports.
    `gt_known_predicted`: IoU >= 0.5 for the map of the first predicted class, right or wrong. `gt_known_any5`: IoU >=
    0.5 for any of the given maps. `top5_loc_any5`: the class is among the first five and any of the given maps has IoU
    > 0.5.

    thresholds: (T,) ascending, in [0, 1]. protocol: see `boxes_from_score_map`.
    """

    def __init__(
        self, thresholds: Sequence[float] | np.ndarray = DEFAULT_THRESHOLDS, protocol: str | BoxProtocol = TSCAM
    ):
        self.thresholds = check_thresholds(thresholds)
        self.protocol = find_protocol(protocol)
        self._counts: dict[str, np.ndarray] = {}
        self._top1 = self._top5 = self._images = 0
        self._unboxed: list[tuple[bool, bool]] = []

    def classify(self, label: int, logits: np.ndarray) -> None:
        """Add an image without a box. It counts only if no image has a box: then only class accuracies are reported.

        label, logits: as for `update`.
        """
        ranking = _ranking(label, logits, None)
        self._unboxed.append((ranking[0] == label, label in ranking))

    def update(
        self,
        score_map: np.ndarray,
        gt_boxes: np.ndarray,
        label: int,
        logits: np.ndarray | None = None,
        *,
        ranked: Sequence[int] | None = None,
        predicted_maps: Sequence[np.ndarray] | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        """Add one image.

        score_map: (H, W) float32 in [0, 1], the map of the true class.
        gt_boxes, image_size: as for `MaxBoxAcc.update`.
        label: the true class index.
        logits: (C,) scores of the classes; or ranked: class indices, best first, five if there are as many.
        predicted_maps: 1 to 5 maps (H, W), of the classes ranked first, best first. Either all images have them or none
        has.
        Raises MapError for invalid maps, boxes or logits, ParameterError for contradicting arguments.
        """
        ranking = _ranking(label, logits, ranked)
        if predicted_maps is not None and not 1 <= len(predicted_maps) <= len(ranking):
            raise ParameterError(
                f"{len(predicted_maps)} maps of predicted classes for the {len(ranking)} classes ranked first",
                "give one map per class, best class first, at most five",
            )
        boxes, which = level_boxes(score_map, self.thresholds, False, self.protocol)
        size = score_map.shape
        truth = ground_truth(gt_boxes, size, self.protocol, image_size)
        first, among = ranking[0] == label, label in ranking
        iou, error = _diagnose(np.concatenate(boxes), truth)
        found = iou > 0.5
        outcome = {"gt_known": iou >= 0.5, "top1_loc": found & first, "top5_loc": found & among}
        outcome["wrong_class"] = np.full(iou.shape, not first)
        outcome |= {name: error == name if first else np.zeros(iou.shape, bool) for name in ERRORS[1:]}
        outcome = {name: hit[which] for name, hit in outcome.items()}
        if predicted_maps is not None:
            ious = []
            for predicted in predicted_maps:
                boxes, which = level_boxes(predicted, self.thresholds, False, self.protocol)
                if predicted.shape != size:
                    raise MapError(
                        f"the map of a predicted class has shape {predicted.shape}, that of the true class {size}",
                        "give all maps of an image in one size",
                    )
                ious.append(_best_iou(boxes, truth)[which])
            outcome["gt_known_predicted"] = ious[0] >= 0.5
            outcome["gt_known_any5"] = np.max(ious, axis=0) >= 0.5
            outcome["top5_loc_any5"] = (np.max(ious, axis=0) > 0.5) & among
        if self._images == 0:
            self._counts = {name: np.zeros(self.thresholds.size, np.int64) for name in outcome}
        elif self._counts.keys() != outcome.keys():
            raise ParameterError("some images have maps of predicted classes, others not", "give them for all or none")
        for name, hit in outcome.items():
            self._counts[name] += hit
        self._top1 += first
        self._top5 += among
        self._images += 1

    def compute(self) -> Localization:
        """Return the accuracies of the images so far; MapError when there are none."""
        if self._unboxed and not self._images:
            names = ("gt_known", "top1_loc", "top5_loc", *ERRORS)
            curve = ThresholdCurve(self.thresholds, {name: np.full(self.thresholds.size, np.nan) for name in names})
            top1, top5 = np.mean(self._unboxed, axis=0).tolist()
            return Localization(curve, top1, top5, len(self._unboxed))
        images = _some(self._images)
        curve = ThresholdCurve(self.thresholds, {name: hits / images for name, hits in self._counts.items()})
        return Localization(curve, self._top1 / images, self._top5 / images, images)


def _ranking(label: int, logits: np.ndarray | None, ranked: Sequence[int] | None) -> list[int]:
    """Return up to five class indices, best first; of equal logits the lower index first."""
    if (logits is None) == (ranked is None):
        raise ParameterError("give either logits or ranked classes", "pass logits=(C,) or ranked=[best, second, ...]")
    if ranked is not None:
        if len(ranked) == 0 or len(set(ranked)) != len(ranked):
            raise ParameterError(f"the ranked classes are {list(ranked)}", "give each class once, at least one")
        return [int(c) for c in ranked[:5]]
    logits = np.asarray(logits)
    if logits.ndim != 1 or logits.size == 0 or np.isnan(logits).any():
        raise MapError(f"logits of shape {logits.shape}, or holding NaN", "pass the scores (C,) of one image")
    if not 0 <= label < logits.size:
        raise ParameterError(f"the label is {label}, with {logits.size} logits", "class indices count from 0")
    return np.argsort(-logits, kind="stable")[:5].tolist()


def _diagnose(boxes: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the best IoU (n,) of boxes (n, 4) with boxes of `truth` (m, 4), and the error (n,), "" if IoU > 0.5."""
    intersection, area, gt_area = box_overlap(boxes, truth)
    iou = intersection / (area + gt_area - intersection)
    covered = intersection / gt_area
    nearest = iou.argmax(axis=1)
    rows = np.arange(len(boxes))
    best = iou[rows, nearest]
    # `covered` of several boxes can exceed 0.3 only when there are several.
    cases = [
        best > 0.5,
        (covered > 0.3).sum(axis=1) > 1,
        (intersection / area)[rows, nearest] > 0.5,
        covered[rows, nearest] >= 0.7,
    ]
    return best, np.select(cases, ["", "several_instances", "part", "more"], "other")


@dataclass(frozen=True)
class PixelPrecision(Scored):
    """What `PxAP.compute` returns.

    average_precision: area under the precision-recall curve, in [0, 1].
    curve: `precision`, `recall`, `iou` and `f1` of the pixels with score >= threshold. The precision of no pixel is 1.
    images: number of images.
    """

    MAIN = "iou"

    average_precision: float
    images: int


class PxAP:
    """Pixel average precision (Choe et al., CVPR 2020): one histogram over the pixels of all images.

    The edges of the bins are the thresholds t_0 < ... < t_T-1, then 1, 2 and 3. Precision and recall are those of the
    pixels with score >= t. The average precision is the sum of precision times the increase of recall from the next
    higher threshold. Pixels below t_0 are not counted at all, as in the published code, so thresholds should start at
    0.

    thresholds: (T,) ascending, in [0, 1].
    """

    def __init__(self, thresholds: Sequence[float] | np.ndarray = DEFAULT_THRESHOLDS):
        self.thresholds = check_thresholds(thresholds)
        self._edges = np.append(self.thresholds, [1.0, 2.0, 3.0])
        self._histograms = np.zeros((2, self.thresholds.size + 2), np.int64)  # background, object
        self._images = 0

    def update(self, score_map: np.ndarray, mask: np.ndarray) -> None:
        """Add one image.

        score_map: (H, W) float32 in [0, 1]. mask: (H, W) integers: 0 background, 255 not counted, else object.
        Raises MapError for an invalid map or mask.
        """
        check_score_map(score_map)
        objects, background = object_and_background(mask, score_map.shape)
        for row, pixels in enumerate((background, objects)):
            self._histograms[row] += np.histogram(score_map[pixels], bins=self._edges)[0]
        self._images += 1

    def compute(self) -> PixelPrecision:
        """Return the scores of the images so far; MapError when there are none, or no object pixel in them."""
        _some(self._images)
        false, true = self._histograms[:, ::-1].cumsum(axis=1)  # from the highest edge down
        objects = true[-1]
        if objects == 0:
            raise MapError("no mask has an object pixel", "objects are the pixels of the mask that are not 0 or 255")
        predicted = true + false
        precision = np.divide(true, predicted, out=np.ones(true.size), where=predicted > 0)
        recall = true / objects
        average = float(np.sum((precision[1:] * np.diff(recall))[predicted[1:] > 0]))
        scores = {
            "precision": precision,
            "recall": recall,
            "iou": true / (objects + false),
            "f1": 2 * true / (predicted + objects),
        }
        count = self.thresholds.size
        curve = ThresholdCurve(self.thresholds, {name: score[::-1][:count] for name, score in scores.items()})
        return PixelPrecision(curve, average, self._images)


def pixel_auc(score_map: np.ndarray, mask: np.ndarray) -> float:
    """Return the area under the ROC curve of one map: how often an object pixel scores above a background pixel.

    Exact (rank statistic), equal scores count half.

    score_map: (H, W) float32 in [0, 1]. mask: (H, W) integers: 0 background, 255 not counted, else object.
    Raises MapError for an invalid map or mask, or when the mask lacks object or background.
    """
    check_score_map(score_map)
    objects, background = (np.sort(score_map[p]) for p in object_and_background(mask, score_map.shape, both=True))
    below = np.searchsorted(background, objects, "left").sum() + np.searchsorted(background, objects, "right").sum()
    return float(below / (2 * background.size * objects.size))
