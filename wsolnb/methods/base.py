"""What every localization model gives: logits and, for chosen classes, maps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from wsolnb.errors import ParameterError


class LocalizationModel(nn.Module, ABC):
    """An image classifier whose forward pass also holds what its maps are made of.

    maps: names of the maps that `localize` returns; the first is the method's own, the others are its ingredients.
    """

    maps: ClassVar[tuple[str, ...]]

    @abstractmethod
    def forward(self, images: Tensor):
        """Return an output with `logits` (B, C) for normalised images (B, 3, H, W)."""

    @abstractmethod
    def localize(self, output, classes: Tensor) -> dict[str, Tensor]:
        """Return raw maps (B, h, w) by name for one class per image, `classes` (B,), from a forward output."""

    @property
    @abstractmethod
    def head(self) -> nn.Module:
        """The layers that start from random weights and are trained at the head's learning rate."""

    def scalars(self) -> dict[str, float]:
        """Return learnable numbers by name that the history of a training keeps next to the scores; here none."""
        return {}


def pick(class_maps: Tensor, classes: Tensor) -> Tensor:
    """Return (B, h, w): of each image's (C, h, w) maps the one of its class in `classes` (B,).

    Raises ParameterError for a class index that the model does not have.
    """
    if classes.shape != class_maps.shape[:1]:
        raise ParameterError(
            f"{tuple(classes.shape)} classes for {class_maps.shape[0]} images", "give one class index per image"
        )
    if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < class_maps.shape[1]:
        raise ParameterError(
            f"class {int(classes.max())} asked of a model with {class_maps.shape[1]} classes", "use 0-based classes"
        )
    return class_maps[range(len(classes)), classes]
