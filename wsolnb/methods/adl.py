"""Attention-based dropout layer, ADL (Choe & Shim, CVPR 2019, https://arxiv.org/abs/1908.10028)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wsolnb.backbones import ConvBackbone
from wsolnb.errors import ParameterError
from wsolnb.methods import register
from wsolnb.methods.cam import CAMClassifier, CAMOutput, find_layer


def drop_mask(attention: Tensor, gamma: float) -> Tensor:
    """Return (B, 1, h, w): 0 where an image's attention reaches gamma times its maximum, else 1."""
    return (attention < gamma * attention.amax(dim=(2, 3), keepdim=True)).to(attention.dtype)


@register("adl")
class ADL(CAMClassifier):
    """CAM of a classifier whose feature maps F lose or stress the attended region (https://arxiv.org/abs/1908.10028).

    With the attention A = mean_k F_k, in training only, and one choice per layer and step for the whole batch:

        F' = F [A < gamma max A]  with probability drop_rate,  else  F' = F sigmoid(A)

    gamma: share of the maximum from which on positions are dropped; the authors' commands have 0.8 for VGG and 0.9 for
    ResNet50-SE. drop_rate: 0.75 in both. layers: names of the backbone's submodules behind which the layer stands; ""
    is the final map. For ResNet50-SE the authors have three: behind the first block of the third and of the fourth
    stage, and "".

        model = create_method("adl", create_backbone("resnet50"), 200, gamma=0.9, layers=["resnet.layer4.0", ""])
        model.loss(model, {"image": images, "label": labels}).backward()
    """

    def __init__(
        self, backbone: ConvBackbone, num_classes: int, gamma: float = 0.8, drop_rate: float = 0.75,
        layers: Sequence[str] = ("",),
    ):  # fmt: skip
        super().__init__(backbone, num_classes)
        for name, value in (("gamma", gamma), ("drop_rate", drop_rate)):
            if not 0 <= value <= 1:
                raise ParameterError(f"{name}={value}", "choose within [0, 1]")
        if isinstance(layers, str) or not layers:
            raise ParameterError(f"layers={layers!r}", 'give a list of names; [""] is the final map alone')
        self.gamma, self.drop_rate, self.layers = gamma, drop_rate, tuple(layers)
        for name in layers:
            find_layer(backbone, name)

    def forward(self, images: Tensor) -> CAMOutput:
        """Classify (B, 3, H, W) normalised images; in training mode through the dropout layers."""
        if not self.training:
            return super().forward(images)
        # Hooks for this pass only, so that a backbone that is used elsewhere is the plain one.
        self._done = 0
        handles = [find_layer(self.backbone, name).register_forward_hook(self._drop) for name in self.layers]
        try:
            output = super().forward(images)
        finally:
            for handle in handles:
                handle.remove()
        if self._done < len(self.layers):
            raise ParameterError(f"the forward pass does not run all of {self.layers}", "leave out what it does not")
        return output

    def _drop(self, _layer: nn.Module, _inputs: tuple, features: Tensor) -> Tensor:
        self._done += 1
        attention = features.mean(dim=1, keepdim=True)
        # Drawn on the CPU, whose generator the training loop stores.
        if torch.rand(()) < self.drop_rate:
            return features * drop_mask(attention, self.gamma)
        return features * attention.sigmoid()
