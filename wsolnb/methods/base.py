"""What every localization model returns: logits and, for chosen classes, maps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsolnb.backbones import create_backbone, normalisation
from wsolnb.data.sample import IGNORE
from wsolnb.errors import ParameterError


class Trainable(nn.Module, ABC):
    """A network that the training loop can train. It says which layers are new, and what the loss of a batch is.

    learns_from_masks: whether the loss also reads the truth in `batch["samples"]`, and not only image labels.
    """

    learns_from_masks: bool = False

    @classmethod
    def make_backbone(cls, name: str, **options: Any) -> Any:
        """Return the backbone that `create` takes; the options are those of `create_backbone`."""
        return create_backbone(name, **options)

    @classmethod
    def create(cls, backbone: Any, num_classes: int, **options: Any) -> Trainable:
        """Return a model with fresh layers on a backbone; the options are the method's own."""
        return cls(backbone, num_classes, **options)

    @property
    @abstractmethod
    def head(self) -> nn.Module:
        """The layers that start from random weights and are trained at the head's learning rate."""

    @property
    def mean(self) -> tuple[float, float, float]:
        """What is subtracted from RGB values in [0, 1] per channel, as the backbone's weights were trained."""
        return normalisation(self)[0]

    @property
    def std(self) -> tuple[float, float, float]:
        """What they are then divided by, per channel."""
        return normalisation(self)[1]

    def loss(self, forward: Callable[[Tensor], Any], batch: dict[str, Any], label_smoothing: float = 0.0) -> Tensor:
        """Return the training loss of a batch; by default that of its classification.

        forward: this model, wrapped as the training loop needs it; to be called once, with (B, 3, H, W) images.
        batch: `image` (B, 3, H, W) normalised, `label` (B,) or multi-hot (B, C), and `samples` where truth is loaded.
        """
        return classification_loss(forward(batch["image"]).logits.float(), batch["label"], label_smoothing)

    def first_transforms(self) -> list[Callable]:
        """Return transforms of training samples that are applied before those of the recipe; by default none."""
        return []

    def scalars(self) -> dict[str, float]:
        """Return learnable numbers by name that the history of a training keeps beside the scores; by default none."""
        return {}


class LocalizationModel(Trainable):
    """An image classifier whose forward output also holds what its maps are made of.

    maps: names of the maps that `localize` returns; the first is the method's own, the others are its ingredients.
    class_names: of its classes, in their order, where they are known; else empty.
    multi_label: whether an image can have several classes; each logit is then read alone, through a sigmoid.
    classifies: whether the logits mean anything. A decoder that only draws a map returns zeros.
    """

    maps: ClassVar[tuple[str, ...]]
    class_names: tuple[str, ...] = ()
    multi_label: bool = False
    classifies: bool = True

    @abstractmethod
    def forward(self, images: Tensor):
        """Return an output with `logits` (B, C) for normalised images (B, 3, H, W)."""

    @abstractmethod
    def localize(self, output, classes: Tensor) -> dict[str, Tensor]:
        """Return raw maps (B, h, w) by name for one class per image, `classes` (B,), from a forward output."""


class SegmentationModel(Trainable):
    """A network that learns from masks; the background is a class of its own, index 0.

    `forward` returns logits (B, classes, H, W) of normalised images (B, 3, H, W).
    """

    learns_from_masks = True

    @classmethod
    def create(cls, backbone: Any, num_classes: int, **options: Any) -> Trainable:
        """Return a network for `num_classes` classes and the background."""
        return cls(backbone, num_classes + 1, **options)

    def loss(self, forward: Callable[[Tensor], Any], batch: dict[str, Any], label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy over the pixels whose mask in `batch["samples"]` is not 255; 0 without any."""
        logits = forward(batch["image"]).float()
        masks = torch.from_numpy(np.stack([sample.mask for sample in batch["samples"]])).to(logits.device).long()
        loss = F.cross_entropy(logits, masks, ignore_index=IGNORE, label_smoothing=label_smoothing, reduction="sum")
        return loss / (masks != IGNORE).sum().clamp(min=1)


def classification_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy for class indices (B,), multi-label soft margin loss for multi-hot labels (B, C)."""
    if labels.ndim == 2:
        return F.multilabel_soft_margin_loss(logits, labels.float())
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def pick(class_maps: Tensor, classes: Tensor) -> Tensor:
    """Return (B, h, w): for each image the map of its class in `classes` (B,), out of its (C, h, w) maps.

    Raises ParameterError for a class index that the model does not have.
    """
    if classes.shape != class_maps.shape[:1]:
        problem = f"{tuple(classes.shape)} classes for {class_maps.shape[0]} images"
        raise ParameterError(problem, "give one class index per image")
    if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < class_maps.shape[1]:
        odd = classes.min() if classes.min() < 0 else classes.max()
        problem = f"class {int(odd)} asked of a model with {class_maps.shape[1]} classes"
        raise ParameterError(problem, "use 0-based classes")
    return class_maps[range(len(classes)), classes]
