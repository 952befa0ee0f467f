"""CutMix (Yun et al., ICCV 2019, https://arxiv.org/abs/1905.04899): boxes and labels of other training images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wsolnb.backbones import ConvBackbone
from wsolnb.errors import ParameterError
from wsolnb.methods import register
from wsolnb.methods.base import classification_loss
from wsolnb.methods.cam import CAMClassifier


def cut_box(kept: float, row: int, column: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, bottom, left, right) of the box around a pixel, clipped to the image.

    Eq. 2: its sides are H sqrt(1 - kept) and W sqrt(1 - kept), so that before clipping it has the area 1 - kept.
    """
    ratio = (1 - kept) ** 0.5
    box: list[int] = []
    for centre, side in ((row, height), (column, width)):
        length = int(side * ratio)
        box += [max(0, centre - length // 2), min(side, centre - length // 2 + length)]
    return box[0], box[1], box[2], box[3]


def cut_mix(images: Tensor, partner: Tensor, box: tuple[int, int, int, int]) -> tuple[Tensor, float]:
    """Return (B, C, H, W) images with the box of their partners (B,), and the share of pixels that they kept."""
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])


@register("cutmix")
class CutMix(CAMClassifier):
    """CAM of a classifier that was trained on mixed images (https://arxiv.org/abs/1905.04899).

    Eq. 1, with a box M of zeros among ones, and a lambda ~ Beta(alpha, alpha) that is set to the mean of the clipped M:

        x' = M x_a + (1 - M) x_b,  y' = lambda y_a + (1 - lambda) y_b,  in training only.

    alpha: of the Beta distribution; 1 is uniform, as in the paper. probability: of mixing a batch. The paper has 1 on
    ImageNet, and so has the comparison of localization methods by Choe et al. (https://arxiv.org/abs/2007.04178).

        model = create_method("cutmix", create_backbone("resnet50"), 200, alpha=1.0)
        model.loss(model, {"image": images, "label": labels}).backward()
    """

    def __init__(self, backbone: ConvBackbone, num_classes: int, alpha: float = 1.0, probability: float = 1.0):
        super().__init__(backbone, num_classes)
        if not 0 < alpha < float("inf"):
            raise ParameterError(f"alpha={alpha}", "choose above 0; 1 draws lambda uniformly")
        if not 0 <= probability <= 1:
            raise ParameterError(f"probability={probability}", "choose within [0, 1]")
        self.alpha, self.probability = alpha, probability

    def loss(self, forward: Callable[[Tensor], Any], batch: dict[str, Any], label_smoothing: float = 0.0) -> Tensor:
        """Return the loss of mixed images with mixed labels; in evaluation mode that of the images as they are."""
        if not self.training or torch.rand(()) >= self.probability:
            return super().loss(forward, batch, label_smoothing)
        images, labels = batch["image"], batch["label"]
        height, width = images.shape[2:]
        # All draws are on the CPU, whose generator the training loop stores: a resumed training mixes the same.
        share = float(torch.distributions.Beta(self.alpha, self.alpha).sample())
        row, column = int(torch.randint(height, ())), int(torch.randint(width, ()))
        partner = torch.randperm(len(images)).to(images.device)
        mixed, kept = cut_mix(images, partner, cut_box(share, row, column, height, width))
        logits = forward(mixed).logits.float()
        # Both losses are linear in the labels, so that mixing the losses is mixing the labels.
        own = classification_loss(logits, labels, label_smoothing)
        return kept * own + (1 - kept) * classification_loss(logits, labels[partner], label_smoothing)
