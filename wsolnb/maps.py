"""From the numbers of a network to score maps: float32, (B, H, W), in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def normalise(maps: Tensor) -> Tensor:
    """Min-max each map of (B, h, w) to [0, 1], float32. A constant map becomes zero everywhere.

    A map counts as constant if it varies by no more than float32's rounding (1e-6 of its largest magnitude); stretching
    it to the full range would show noise. NaN stays NaN, so that the metrics report it instead of scoring an empty map.
    """
    flat = maps.float().flatten(1)
    low, high = flat.amin(dim=1, keepdim=True), flat.amax(dim=1, keepdim=True)
    span = high - low
    constant = span <= 1e-6 * flat.abs().amax(dim=1, keepdim=True)
    scaled = ((flat - low) / span.masked_fill(constant, 1.0)).masked_fill(constant, 0.0)
    # Rounding of the quotient can pass 1 by one unit in the last place.
    return scaled.clamp(max=1.0).view(maps.shape)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, h, w) maps bilinearly to `size` = (H, W), pixel centres aligned, then min-max each to [0, 1]."""
    return normalise(enlarge(maps.float(), size))


def seen_area(
    cells: Sequence[int], stride: int, given: Sequence[int], size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Return the (height, width) in pixels of the area that a network's cells see of an image of `size`.

    cells: (h, w) of the grid. stride: pixels of the network's input per cell. given: (height, width) of that input: the
    image resized from `size`, or itself. If the stride does not divide a side, the last cell reaches beyond the image:
    24 cells of stride 16 see 384 pixels of an image of 375. The area is never smaller than the image.
    """
    sides = zip(cells, given, size or given, strict=True)
    height, width = (max(side, round(count * stride * side / seen)) for count, seen, side in sides)
    return height, width


def enlarge(maps: Tensor, size: tuple[int, int], area: tuple[int, int] | None = None) -> Tensor:
    """Resize (B, h, w) maps bilinearly, pixel centres aligned, to the `area` that their cells see, and crop to `size`.

    area: what `seen_area` returns; None if it is exactly the image. Stretching the grid to `size` instead would move
    the lower and right edge by up to a cell.
    """
    height, width = size
    full = F.interpolate(maps[:, None], size=area or size, mode="bilinear", align_corners=False)[:, 0]
    return full[:, :height, :width]
