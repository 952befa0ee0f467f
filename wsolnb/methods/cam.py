"""Class activation maps of convolutional classifiers: CAM (Zhou et al., 2016) and LayerCAM (Jiang et al., 2021)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from wsolnb.backbones import ConvBackbone
from wsolnb.errors import ParameterError
from wsolnb.methods import register
from wsolnb.methods.base import LocalizationModel


def cam(features: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """CAM, M_c(x, y) = ReLU(sum_k w_k^c f_k(x, y)).

    features: (B, K, h, w), the maps that global average pooling sees. weight: (C, K) of the linear classifier.
    classes: (B,) class of each image. Returns (B, h, w), not normalised, >= 0.
    """
    if features.ndim != 4 or weight.ndim != 2 or features.shape[1] != weight.shape[1]:
        raise ParameterError(
            f"features {tuple(features.shape)} and classifier weights {tuple(weight.shape)} do not fit",
            "give (B, K, h, w) features and (C, K) weights of the layer behind the pooling",
        )
    return torch.einsum("bkhw,bk->bhw", features, weight[classes]).relu()


def layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """LayerCAM, M_c(x, y) = ReLU(sum_k ReLU(d y_c / d A_k(x, y)) A_k(x, y)).

    activations A and gradients of the class score with respect to them: (B, K, h, w), of any layer.
    Returns (B, h, w), not normalised, >= 0.
    """
    if activations.shape != gradients.shape or activations.ndim != 4:
        raise ParameterError(
            f"activations {tuple(activations.shape)} and gradients {tuple(gradients.shape)} differ",
            "give both as (B, K, h, w) of the same layer",
        )
    return (gradients.relu() * activations).sum(dim=1).relu()


class CAMOutput(NamedTuple):
    """logits: (B, C). features: (B, K, h, w), the final feature map."""

    logits: Tensor
    features: Tensor


@register("cam")
class CAMClassifier(LocalizationModel):
    """A convolutional backbone, global average pooling and a linear classifier without bias."""

    maps = ("cam", "layercam")

    def __init__(self, backbone: ConvBackbone, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.dim, num_classes, bias=False)

    @property
    def head(self) -> nn.Module:
        """The classifier."""
        return self.classifier

    def forward(self, images: Tensor) -> CAMOutput:
        """Classify (B, 3, H, W) normalised images."""
        return self._classify(self.backbone(images))

    def _classify(self, features: Tensor) -> CAMOutput:
        return CAMOutput(self.classifier(features.mean(dim=(2, 3))), features)

    def localize(self, output: CAMOutput, classes: Tensor) -> dict[str, Tensor]:
        """CAM and LayerCAM of the final layer for one class per image; each (B, h, w)."""
        features = output.features.detach().float()
        weight = self.classifier.weight.detach().float()
        # Behind the final layer lie only the pooling and the linear classifier, so d y_c / d f_k(x, y) = w_k^c / hw.
        gradients = weight[classes][:, :, None, None].expand_as(features) / features[0, 0].numel()
        return {"cam": cam(features, weight, classes), "layercam": layer_cam(features, gradients)}

    def layer_cam(self, images: Tensor, classes: Tensor, layer: nn.Module) -> Tensor:
        """LayerCAM of any layer inside the backbone, such as `model.backbone.resnet.layer2`; (B, h, w)."""
        held: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _module, _inputs, value: held.append(value))
        try:
            with torch.enable_grad():
                logits = self(images).logits.float()
                score = logits.gather(1, classes[:, None]).sum()
                (gradients,) = torch.autograd.grad(score, held[0])
        finally:
            handle.remove()
        return layer_cam(held[0].detach(), gradients)
