"""Part coverage: how much of the discriminative part, of the rest of the object and of the context a map covers.

It puts a number on partial activation, the usual complaint about class activation maps: they cover the discriminative
part and leave out the rest of the object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wsolnb.data.sample import CONTEXT, DISCRIMINATIVE, IGNORE, REST
from wsolnb.errors import MapError
from wsolnb.metrics.boxes import foreground_levels
from wsolnb.metrics.checks import DEFAULT_THRESHOLDS, check_mask, check_thresholds
from wsolnb.metrics.curves import Scored, ThresholdCurve

REGIONS = {
    "discriminative": (DISCRIMINATIVE,),
    "rest": (REST,),
    "object": (DISCRIMINATIVE, REST),
    "context": (CONTEXT,),
}
"""The regions that coverage is reported of, and their values in a part map."""


@dataclass(frozen=True)
class Coverage(Scored):
    """What `PartCoverage.compute` returns; all shares are means over images, in [0, 1].

    curve: per threshold the covered share of each region (`REGIONS`), and `contrast`, object minus context.
    mass: region -> mean value of the map there, without a threshold.
    images: region -> number of images that have it; a region that none has is left out throughout.
    """

    MAIN = "contrast"

    mass: dict[str, float]
    images: dict[str, int]


class PartCoverage:
    """Covered shares of parts at every threshold, per image and then averaged.

    The rule is that of boxes (`boxes_from_score_map`): with grey = trunc(255 * map), a pixel is covered at threshold t
    if grey > int(t * max(grey)). An image that lacks a region is left out of the region's mean. An image that lacks
    object or context is left out of the mean contrast.

    thresholds: (T,) ascending, in [0, 1].
    """

    def __init__(self, thresholds: Sequence[float] | np.ndarray = DEFAULT_THRESHOLDS):
        self.thresholds = check_thresholds(thresholds)
        self._covered = {name: np.zeros(self.thresholds.size) for name in (*REGIONS, "contrast")}
        self._mass = dict.fromkeys(REGIONS, 0.0)
        self._images = dict.fromkeys((*REGIONS, "contrast"), 0)

    def update(self, score_map: np.ndarray, parts: np.ndarray) -> None:
        """Add one image.

        score_map: (H, W) float32 in [0, 1]. parts: (H, W) integers, `CONTEXT`, `DISCRIMINATIVE` or `REST` of
        `wsolnb.data.sample`, or 255 (not counted).
        Raises MapError for an invalid map or part map.
        """
        grey, levels = foreground_levels(score_map, self.thresholds)
        parts = check_mask(parts, score_map.shape, "part map")
        unknown = np.setdiff1d(parts, (CONTEXT, DISCRIMINATIVE, REST, IGNORE))
        if unknown.size:
            raise MapError(
                f"the part map holds {unknown.tolist()}",
                f"{CONTEXT} is context, {DISCRIMINATIVE} discriminative, {REST} rest of the object, {IGNORE} ignored",
            )
        shares = {}
        for name, values in REGIONS.items():
            inside = np.isin(parts, values)
            pixels = np.count_nonzero(inside)
            if pixels == 0:
                continue
            at_most = np.bincount(grey[inside], minlength=256).cumsum()
            shares[name] = 1 - at_most[levels] / pixels
            self._mass[name] += float(score_map[inside].mean(dtype=np.float64))
        if "object" in shares and "context" in shares:
            shares["contrast"] = shares["object"] - shares["context"]
        for name, share in shares.items():
            self._covered[name] += share
            self._images[name] += 1

    def compute(self) -> Coverage:
        """Return the shares of the images so far; MapError when no image has any region."""
        images = {name: count for name, count in self._images.items() if count}
        if not images:
            raise MapError("no pixel was counted", "call `update` first, with part maps that are not 255 throughout")
        curve = ThresholdCurve(self.thresholds, {name: self._covered[name] / n for name, n in images.items()})
        return Coverage(curve, {name: self._mass[name] / images[name] for name in REGIONS if name in images}, images)
