"""What all backbones have in common: a name, a width, and how their images are normalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

Colour = tuple[float, float, float]
"""One number per channel of RGB values in [0, 1]."""


class Backbone(nn.Module):
    """A feature extractor without a classifier.

    name: the name that was asked for. dim: channels of a token or of a cell of the final map.
    mean, std: of the normalisation that the weights were trained with, per channel of RGB values in [0, 1]. They are
        those of the model's timm configuration, or else ImageNet's.
    """

    def __init__(self, model: nn.Module, name: str, dim: int):
        super().__init__()
        self.name, self.dim = name, dim
        self.mean, self.std = colours(getattr(model, "pretrained_cfg", None))


def colours(config: Mapping[str, Any] | None = None) -> tuple[Colour, Colour]:
    """Return mean and std of a timm configuration; ImageNet's if it does not state them."""
    config = config or {}
    return tuple(config.get("mean", IMAGENET_DEFAULT_MEAN)), tuple(config.get("std", IMAGENET_DEFAULT_STD))
