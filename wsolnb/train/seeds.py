"""Seed maps against true masks: scores at every threshold, coverage of the parts, and the features behind them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wsolnb.data.base import LocalizationDataset
from wsolnb.data.sample import CONTEXT, DISCRIMINATIVE, IGNORE, REST
from wsolnb.data.store import ClassMaps, Store
from wsolnb.data.transforms import resize_map
from wsolnb.errors import MapError
from wsolnb.methods.features import FeatureSource, LiveFeatures
from wsolnb.methods.lpcam import Directions, LPCAMConfig
from wsolnb.methods.prototypes import variant_maps
from wsolnb.metrics import PartCoverage, SeedScores, SegmentationScores, seed_mask
from wsolnb.metrics.parts import Coverage
from wsolnb.metrics.segmentation import SeedSegmentation
from wsolnb.train.segmentation import class_mask

THRESHOLDS = np.round(np.arange(0, 1, 0.01), 2)
"""The 100 thresholds that seed maps are judged at."""


NO_MASKS = (
    "give val and test images masks: of the data sets `folder` and `csv` in masks/, of VOC in SegmentationClass; "
    "notebooks 20 and 21 need none"
)


class SeedEvaluation(NamedTuple):
    """What the maps of one kind scored.

    segmentation: of the seed masks at every threshold. parts: coverage of head, rest and context, per class map and
    then averaged; None where the data set has no part maps.
    """

    segmentation: SeedSegmentation
    parts: Coverage | None


def has_masks(dataset: LocalizationDataset) -> bool:
    """Return whether any image has a mask; images are read until the first one that has."""
    return any(dataset[index].mask is not None for index in range(len(dataset)))


def evaluate(
    found: Iterable[dict[str, ClassMaps]],
    dataset: LocalizationDataset,
    thresholds: Sequence[float] = THRESHOLDS,
    parts: bool = True,
) -> dict[str, SeedEvaluation]:
    """Score maps by kind against the masks of a data set, in one streaming pass; images without a mask are left out.

    Memory: one image's maps by kind at a time, kinds x K x H x W x 4 bytes, and counts by class and threshold.
    parts: measure part coverage too, where there are part maps; it takes most of the time.
    In single-label data sets the mask of the object counts as the image's class. In part coverage objects of other
    classes are not counted, so `context` is background.
    Raises MapError when no image has a mask.
    """
    position = {name: index for index, name in enumerate(dataset.image_ids)}
    scores: dict[str, SeedScores] = {}
    coverage: dict[str, PartCoverage] = {}
    for by_kind in found:
        sample = dataset[position[next(iter(by_kind.values())).image_id]]
        if sample.mask is None:
            continue
        mask = class_mask(sample, dataset.multi_label)
        for kind, image in by_kind.items():
            if kind not in scores:
                scores[kind] = SeedScores(len(dataset.class_names) + 1, thresholds)
            scores[kind].update(image.maps, image.classes, mask)
            if not parts or sample.parts is None:
                continue
            for score_map, label in zip(image.maps, image.classes, strict=True):
                own = np.where((mask == 0) | (mask == label + 1), sample.parts, IGNORE).astype(np.uint8)
                coverage.setdefault(kind, PartCoverage(thresholds)).update(score_map, own)
    if not scores:
        raise MapError("no image has a mask to be judged by", NO_MASKS)
    return {
        kind: SeedEvaluation(score.compute(), coverage[kind].compute() if kind in coverage else None)
        for kind, score in scores.items()
    }


def scored(validation: SeedEvaluation, test: SeedEvaluation, fixed: float = 0.3) -> dict[str, float]:
    """Return a row of test scores: at the threshold of the highest validation mIoU, at a fixed one, and coverage.

    `threshold` is the validation threshold; the means over classes (`segmentation.MEANS`) are taken there. miou_fixed:
    the mIoU at `fixed`. oracle: the mIoU at the test images' own best threshold. covers_*: shares of the parts above
    the validation threshold.
    """
    threshold = validation.segmentation.best()[0]
    curve = test.segmentation.curve
    row = {"threshold": threshold} | curve.at(threshold)
    row |= {"miou_fixed": curve.at(fixed)["miou"], "oracle": curve.best("miou")[1]}
    if test.parts is not None:
        shares = test.parts.at(threshold)
        row |= {f"covers_{name}": shares[name] for name in ("discriminative", "rest", "context") if name in shares}
    return row


def score_variants(
    val: LiveFeatures, test: LiveFeatures, by_name: Mapping[str, Directions | None], config: LPCAMConfig
) -> list[dict[str, float]]:
    """Return `scored` of each variant of `variant_maps`, in their order: chosen on `val`, measured on `test`."""
    found = [evaluate(variant_maps(source, by_name, config), source.dataset) for source in (val, test)]
    return [scored(*(one[name] for one in found)) for name in by_name]


def best_thresholds(
    source: LiveFeatures, by_name: Mapping[str, Directions | None], config: LPCAMConfig
) -> list[dict[str, float]]:
    """Return the `threshold` of the highest `miou` on a source's own images, of each variant in its order."""
    found = evaluate(variant_maps(source, by_name, config), source.dataset, parts=False)
    return [best_threshold(found[name].segmentation) for name in by_name]


def miou_at(
    source: LiveFeatures, by_name: Mapping[str, Directions | None], config: LPCAMConfig, thresholds: Sequence[float]
) -> list[dict[str, float]]:
    """Return the mean IoU on a source's own images at each of the thresholds, by name of the variant."""
    found = evaluate(variant_maps(source, by_name, config), source.dataset, thresholds, parts=False)
    return [{name: one.segmentation.at(t).miou for name, one in found.items()} for t in thresholds]


def best_threshold(found: SeedSegmentation) -> dict[str, float]:
    """Return the `threshold` of the highest mean IoU, and that `miou`."""
    return dict(zip(("threshold", "miou"), map(float, found.best()), strict=True))


def score_stored(
    maps: Store, dataset: LocalizationDataset, val_maps: Store, val: LocalizationDataset
) -> list[dict[str, float]]:
    """Return one row: the `threshold` chosen on validation maps, its `val_miou`, and the means of the other images."""
    chosen = best_threshold(_of_stored(val_maps, val))
    found = _of_stored(maps, dataset).at(chosen["threshold"])
    return [{"threshold": chosen["threshold"], "val_miou": chosen["miou"], **found.means()}]


def _of_stored(maps: Store, dataset: LocalizationDataset) -> SeedSegmentation:
    found = ({"one": one} for one in maps.all_maps(dataset.image_ids))
    return evaluate(found, dataset, parts=False)["one"].segmentation


def image_scores(
    source: LiveFeatures, by_name: Mapping[str, Directions | None], config: LPCAMConfig, thresholds: Mapping[str, float]
) -> Iterator[dict[str, float]]:
    """Yield the mean IoU of each image's seed mask, by name of the variant, at a threshold for each.

    One image's maps are held at a time, as of `variant_maps`.
    It is NaN for an image whose mask has no pixel of an object.
    """
    for index, found in enumerate(variant_maps(source, by_name, config)):
        mask = class_mask(source.dataset[index], source.dataset.multi_label)
        row = dict.fromkeys(found, float("nan"))
        for name, image in found.items() if ((mask > 0) & (mask != IGNORE)).any() else ():
            scores = SegmentationScores(len(source.class_names) + 1)
            scores.update(seed_mask(image.maps, image.classes, thresholds[name]), mask)
            row[name] = scores.compute().miou
        yield row


REGIONS = {"head": DISCRIMINATIVE, "rest": REST, "context": CONTEXT}
"""Parts of a class's objects, and the background of their images."""


class RegionFeatures(NamedTuple):
    """Local features by class and region (`REGIONS`), averaged: raw, and scaled to length one; each (C, 3, D) float64.

    NaN where a class has no cell of a region.
    """

    raw: Tensor
    unit: Tensor

    def similarity(self) -> dict[str, float]:
        """Return the mean cosine of two local features by pair of regions (`head, rest`), averaged over classes."""
        pairs = combinations_with_replacement(enumerate(REGIONS), 2)
        # The mean of all cosines between two sets is the product of their mean unit vectors.
        found = {f"{one}, {other}": (self.unit[:, i] * self.unit[:, j]).sum(dim=1) for (i, one), (j, other) in pairs}
        return {pair: float(value.nanmean()) for pair, value in found.items()}


def region_features(source: FeatureSource, dataset: LocalizationDataset) -> RegionFeatures:
    """Average a source's local features over the true regions of each class: an analysis, not a step of the method.

    A cell belongs to the region of the pixel at its centre. Memory: the source's batch of features, and the sums.
    Raises MapError when the data set has no masks or no part maps.
    """
    shape = (len(source.weight), len(REGIONS), source.weight.shape[1])
    raw, unit = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    counts = torch.zeros(*shape[:2], 1, dtype=torch.float64)
    position = {name: index for index, name in enumerate(dataset.image_ids)}
    for found in source.images():
        sample = dataset[position[found.image_id]]
        if sample.mask is None or sample.parts is None:
            raise MapError(f"{found.image_id} has no mask or no part map", "use the rendered benchmark")
        features = found.scales[0][0].double().cpu()
        mask, parts = (torch.from_numpy(resize_map(m, features.shape[1:])) for m in (sample.mask, sample.parts))
        for label in found.labels:
            for row, value in enumerate(REGIONS.values()):
                inside = features[:, (parts == value) & (mask == (0 if value == CONTEXT else label + 1))]
                raw[label, row] += inside.sum(dim=1)
                unit[label, row] += F.normalize(inside, dim=0).sum(dim=1)
                counts[label, row] += inside.shape[1]
    return RegionFeatures(raw / counts, unit / counts)
