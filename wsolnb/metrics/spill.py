"""How much of a score map lies beside the object, and whether the border of the image draws a frame into it."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from wsolnb.metrics.checks import check_score_map, object_and_background


class Spill(NamedTuple):
    """Means of a map in [0, 1].

    object, background: over the pixels of the object and of the rest. frame: mean over the background of the outermost
    ring minus that over the inner background, NaN when either is empty. Positive: the border lights up.
    """

    object: float
    background: float
    frame: float


def spill(score_map: np.ndarray, mask: np.ndarray, ring: int = 8, away: int = 0) -> Spill:
    """Return where a map (H, W) in [0, 1] lies, given a mask (H, W): 0 background, 255 not counted, else object.

    ring: width of the outermost ring in pixels, the side of a patch for a transformer's map.
    away: how far from the object, in pixels along rows and columns, background begins to count for `frame`. A blurred
        map, for example of a 3x3 head on coarse tokens, has a halo around the object. The inner background holds more
        of this halo than the ring does. So without a distance `frame` mixes halo and border.
    Raises MapError for an invalid map or mask, or when the mask lacks object or background.
    """
    check_score_map(score_map)
    thing, background = object_and_background(mask, score_map.shape, both=True)
    inner = np.zeros(mask.shape, bool)
    inner[ring:-ring, ring:-ring] = True
    far = background & (cv2.dilate(thing.astype(np.uint8), np.ones((2 * away + 1, 2 * away + 1), np.uint8)) == 0)
    edge, middle = far & ~inner, far & inner
    frame = float(score_map[edge].mean() - score_map[middle].mean()) if edge.any() and middle.any() else float("nan")
    return Spill(float(score_map[thing].mean()), float(score_map[background].mean()), frame)
