"""One pass of a model over a data set, and every metric of its maps on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from wsolnb import maps as score_maps
from wsolnb.data import LocalizationDataset, Sample
from wsolnb.data.loading import make_loader
from wsolnb.data.transforms import Transform
from wsolnb.errors import DataError
from wsolnb.methods.base import LocalizationModel
from wsolnb.metrics import TSCAM, LocalizationAccuracy, MaxBoxAcc, PartCoverage, PxAP, box_iou
from wsolnb.metrics.boxes import ground_truth
from wsolnb.metrics.localization import BoxAccuracy, Localization, PixelPrecision
from wsolnb.metrics.parts import Coverage
from wsolnb.train.loop import Scorer

THRESHOLDS = np.round(np.arange(0, 1, 0.01), 2)
"""Thresholds of the curves: a validation threshold needs no finer grid than 0.01."""

METRICS: dict[str, Callable[[], Any]] = {
    "localization": partial(LocalizationAccuracy, THRESHOLDS),
    "v1": partial(MaxBoxAcc, THRESHOLDS),
    "v2": partial(MaxBoxAcc, THRESHOLDS, multi_contour=True),
    "pixels": PxAP,
    "parts": partial(PartCoverage, THRESHOLDS),
}
"""What makes each field of `Evaluation`."""


class Reader(LocalizationModel):
    """Other maps of trained models, for `predict` and `evaluate`; a model of this kind is never trained itself."""

    @property
    def head(self) -> nn.Module:
        """An empty list of layers: nothing is trained."""
        return nn.ModuleList()


class Prediction(NamedTuple):
    """One image with what the model made of it.

    sample: transformed as the model saw it. logits: (C,), or None if nothing was classified; then every image counts as
    rightly classified. ranking: (C,) classes from most to least likely, or None.
    maps: by name, (H, W) float32 in [0, 1], of the true class.
    """

    sample: Sample
    logits: np.ndarray | None
    ranking: np.ndarray | None
    maps: dict[str, np.ndarray]


def predict(
    model: LocalizationModel, dataset: LocalizationDataset, transform: Transform | None, batch_size: int = 50
) -> Iterator[Prediction]:
    """Run a single-label model over a data set; yields a `Prediction` per image, in order.

    Maps are upsampled bilinearly to the image and min-max normalised. The model runs on the device it is on.
    Memory: `batch_size` images, each with its sample and its maps, names x H x W x 4 bytes; two batches while the next
    one is read.
    """
    device = next(model.parameters()).device
    model.eval()
    for batch in make_loader(dataset, transform, batch_size, truth=True, mean=model.mean, std=model.std):
        with torch.inference_mode():
            output = model(batch["image"].to(device))
            found = model.localize(output, batch["label"].to(device))
            size = batch["image"].shape[2:]
            named = {name: score_maps.upsample(values, size).cpu().numpy() for name, values in found.items()}
            logits = output.logits.float()
            ranking = logits.argsort(dim=1, descending=True, stable=True).cpu().numpy()
        logits = logits.cpu().numpy()
        for i, sample in enumerate(batch["samples"]):
            yield Prediction(sample, logits[i], ranking[i], {name: values[i] for name, values in named.items()})


class Evaluation(NamedTuple):
    """What a model's maps scored on one set of images; every dictionary is by the name of the map.

    localization: GT-known, top-k and errors. v1, v2: box accuracies of one and of all contours.
    pixels: against masks. parts: coverage of the parts. What was not measured (`quick`, no masks, no parts) is empty.
    """

    localization: dict[str, Localization]
    v1: dict[str, BoxAccuracy]
    v2: dict[str, BoxAccuracy]
    pixels: dict[str, PixelPrecision]
    parts: dict[str, Coverage]

    def summary(self) -> dict[str, float]:
        """Return top-1 and, of each map, GT-known and top-1 localization at the best threshold of *these* images.

        Meant for validation images, on which thresholds are chosen. Names without a prefix belong to the method's own
        map.
        """
        own = next(iter(self.localization.values()))
        threshold, gt_known = own.best("gt_known")
        row = {"top1": own.top1_cls, "gt_known": gt_known, "top1_loc": own.best("top1_loc")[1], "threshold": threshold}
        return row | {f"gt_known_{name}": found.best("gt_known")[1] for name, found in self.localization.items()}

    def thresholds(self) -> dict[str, float]:
        """Return for each map the threshold at which GT-known is best on *these* images, which should be validation
        images."""
        return {name: found.best("gt_known")[0] for name, found in self.localization.items()}

    def table(self, validation: Evaluation) -> list[dict[str, Any]]:
        """Return one row per map: scores of these images at thresholds chosen on `validation`.

        `oracle` is GT-known at the best threshold of these images themselves; it shows how much the choice costs. If no
        validation image has a box, nothing chooses a threshold, and every score that depends on it is NaN.
        """
        rows = []
        for name, found in self.localization.items():
            threshold, _ = validation.localization[name].best("gt_known")
            scores = found.at(threshold)
            row = {"map": name, "threshold": threshold, "top1": scores["top1_cls"], "gt_known": scores["gt_known"]}
            row |= {"oracle": found.best("gt_known")[1], "top1_loc": scores["top1_loc"], "top5_loc": scores["top5_loc"]}
            if name in self.v1 and name in validation.v1:
                row["maxboxacc_v1"] = self.v1[name].at(validation.v1[name].best["iou_0.5"][0])["iou_0.5"]
                row["maxboxacc_v2"] = self.v2[name].at([t for t, _ in validation.v2[name].best.values()])["mean"]
            elif np.isnan(row["gt_known"]):
                row["maxboxacc_v1"] = row["maxboxacc_v2"] = np.nan
            if name in self.pixels:
                row["pxap"] = self.pixels[name].average_precision
                if name in validation.pixels:
                    row["mask_iou"] = self.pixels[name].at(validation.pixels[name].best("iou")[0])["iou"]
            if name in self.parts:
                covered = self.parts[name].at(threshold)
                row |= {f"covers_{part}": covered[part] for part in ("discriminative", "rest", "context")}
            rows.append(row)
        return rows


def evaluate(
    model: LocalizationModel, dataset: LocalizationDataset, transform: Transform | None, quick: bool = False
) -> Evaluation:
    """Score every map of a single-label model on a data set, in one pass; see `score`."""
    return score(predict(model, dataset, transform), quick)


def score(predictions: Iterable[Prediction], quick: bool = False) -> Evaluation:
    """Score the maps of predictions against the truth of their samples, image by image.

    quick: measure only what choosing an epoch needs, `Evaluation.localization`. Images without a box are left out of
    box metrics, and images without mask or parts out of the metrics of these. If no image has a box, `localization`
    holds the class accuracies and NaN for all else. Memory: one prediction at a time, and counts by threshold.

    Raises MapError when the maps hold NaN, or there is no image.
    """
    metrics: dict[str, dict[str, Any]] = {kind: {} for kind in Evaluation._fields}
    for found in predictions:
        sample = found.sample
        logits = np.eye(sample.label + 1)[sample.label] if found.logits is None else found.logits
        truth = {"localization": (sample.boxes, sample.label, logits)}
        if not quick:
            truth |= {"v1": (sample.boxes,), "v2": (sample.boxes,), "pixels": (sample.mask,), "parts": (sample.parts,)}
        for name, score_map in found.maps.items():
            for kind, known in truth.items():
                if known[0] is None or (kind in ("v1", "v2") and not len(known[0])):
                    continue
                if name not in metrics[kind]:
                    metrics[kind][name] = METRICS[kind]()
                if len(known[0]):
                    metrics[kind][name].update(score_map, *known)
                else:
                    metrics[kind][name].classify(sample.label, logits)
    return Evaluation(*({name: metric.compute() for name, metric in group.items()} for group in metrics.values()))


def validator(dataset: LocalizationDataset, transform: Transform) -> Scorer:
    """Return the function that `fit` calls after every epoch: scores on validation images, and the model's own
    scalars."""
    return lambda model: evaluate(model, dataset, transform, quick=True).summary() | model.scalars()


def require_boxes(*datasets: LocalizationDataset) -> None:
    """Raise DataError, before any training, unless each of the data sets has a box.

    Images are read until the first one with a box.
    """
    for dataset in datasets:
        if not any(len(dataset[index].boxes) for index in range(len(dataset))):
            problem = f"no image of {dataset} has a box, and this notebook compares methods by their boxes"
            remedy = "give val and test boxes or masks: of the data sets `folder` and `csv` in boxes.csv or masks/"
            raise DataError(problem, f"{remedy}; notebooks 03, 11, 20, 21 and 30 need none")


def beside(*streams: Iterable[Prediction]) -> Iterator[Prediction]:
    """Join the predictions of several sources for the same samples: yield the first source's, with the maps of all."""
    for group in zip(*streams, strict=True):
        yield group[0]._replace(maps={name: found for one in group for name, found in one.maps.items()})


def centre_box(samples: Iterable[Sample], steps: int = 20) -> tuple[np.ndarray, float]:
    """Find the centred box that is right most often; a localizer must beat it.

    samples: of one image size, with boxes; gone through once, one held at a time. Tries `steps` x `steps` sizes.
    Returns (box (4,), GT-known on `samples`); NaN for no samples.
    """
    shares = np.linspace(0, 1, steps + 1)[1:]
    sizes = np.array([[1 - w, 1 - h, 1 + w, 1 + h] for w in shares for h in shares])
    candidates, hits, count = np.full((1, 4), np.nan), np.zeros(1), 0
    for sample in samples:
        if not count:
            height, width = sample.size
            candidates, hits = np.array([width, height, width, height]) / 2 * sizes, np.zeros(len(sizes), np.int64)
        hits += _right(candidates, sample)
        count += 1
    scores = hits / count if count else np.full(1, np.nan)
    best = int(np.argmax(scores))
    return candidates[best], float(scores[best])


def box_hits(box: np.ndarray, samples: Iterable[Sample]) -> np.ndarray:
    """Return of which samples one fixed box (4,) is right, (n,) bool: IoU >= 0.5, compared as TS-CAM does.

    samples: gone through once, one held at a time. A box of NaN is right nowhere.
    """
    if np.isnan(box).any():
        return np.zeros(sum(1 for _ in samples), bool)
    return np.array([_right(np.asarray(box)[None], sample)[0] for sample in samples], bool)


def box_accuracy(box: np.ndarray, samples: Iterable[Sample]) -> float:
    """Return GT-known of one fixed box (4,): the share of `box_hits`. NaN for no samples, and for a box of NaN."""
    hits = box_hits(box, samples)
    return float(hits.mean()) if hits.size and not np.isnan(box).any() else np.nan


def map_hits(predictions: Iterable[Prediction], thresholds: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Return of which images the box of a map is right, (n,) bool by name of the map: GT-known, image by image.

    thresholds: by name of the map, as of `Evaluation.thresholds`. Memory: one prediction at a time.
    """
    hits: dict[str, list[bool]] = {name: [] for name in thresholds}
    for sample, _, _, maps in predictions:
        for name, threshold in thresholds.items():
            metric = LocalizationAccuracy([threshold])
            metric.update(maps[name], sample.boxes, sample.label, np.eye(sample.label + 1)[sample.label])
            hits[name].append(metric.compute().at(threshold)["gt_known"] == 1)
    return {name: np.array(found, bool) for name, found in hits.items()}


def _right(boxes: np.ndarray, sample: Sample) -> np.ndarray:
    """Return which of some boxes (n, 4) have an IoU >= 0.5 with a true one of a sample, (n,)."""
    # One past the last pixel, as the protocol leaves predicted boxes.
    return box_iou(np.trunc(boxes), ground_truth(sample.boxes, sample.size, TSCAM)).max(axis=1) >= 0.5
