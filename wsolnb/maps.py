"""From the numbers of a network to score maps: float32, (B, H, W), in [0, 1]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def normalise(maps: Tensor) -> Tensor:
    """Min-max each map of (B, h, w) to [0, 1], float32. A constant map becomes zero everywhere.

    Constant is what varies by no more than float32's rounding (1e-6 of its largest magnitude): stretching that to the
    full range would show noise. Not a number stays one, so that the metrics report it instead of a silent empty map.
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
    resized = F.interpolate(maps.float()[:, None], size=size, mode="bilinear", align_corners=False)
    return normalise(resized[:, 0])
