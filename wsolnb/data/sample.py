"""The one sample type of every reader, and the one box convention of the package.

Boxes are `x0, y0, x1, y1` in pixels, half-open: pixel column `i` covers `[i, i + 1)`, a box that covers the whole of a
W x H image is `0, 0, W, H`, and its width is `x1 - x0`. Scaling an image by `s` scales a box by `s`: no off-by-one.
What published protocols do differently (truncation, clipping to W - 1, +1 in the IoU) is in `wsolnb.metrics.boxes`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from wsolnb.errors import DataError

IGNORE = 255
"""Mask value of pixels that no metric counts."""

CONTEXT, DISCRIMINATIVE, REST = 0, 1, 2
"""Part map values: outside of the object; the part that tells the class; the rest of the object."""


@dataclass
class Sample:
    """One image with all that is known of it.

    image: (H, W, 3) uint8, RGB.
    image_id: the data set's own name of the image, unique within the data set.
    labels: sorted 0-based class indices present in the image (one for single-label data sets).
    boxes: (n, 4) float64, half-open `x0, y0, x1, y1` in pixels of `image`; n may be 0 when no box is annotated.
    box_labels: (n,) int64, the class index of each box.
    mask: (H, W) uint8 or None: 0 background, 255 ignored (`IGNORE`), else `class index + 1` where the data set is
        multi-label and 1 where it is single-label.
    parts: (H, W) uint8 or None: `CONTEXT`, `DISCRIMINATIVE` or `REST` per pixel.
    """

    image: np.ndarray
    image_id: str
    labels: tuple[int, ...]
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    box_labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    mask: np.ndarray | None = None
    parts: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def label(self) -> int:
        """The class index of a single-label sample.

        Raises DataError when the sample has none or several.
        """
        if len(self.labels) != 1:
            problem = f"image {self.image_id!r} has {len(self.labels)} classes, one was asked for"
            raise DataError(problem, "use .labels, or a single-label data set")
        return self.labels[0]


def tight_box(mask: np.ndarray) -> np.ndarray:
    """Return the half-open box (4,) float64 around the non-zero pixels of `mask` (H, W); zeros if there are none."""
    rows = np.flatnonzero(mask.any(axis=1))
    if rows.size == 0:
        return np.zeros(4)
    columns = np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)
