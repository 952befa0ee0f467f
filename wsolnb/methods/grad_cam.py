"""Grad-CAM (Selvaraju et al., ICCV 2017, https://arxiv.org/abs/1610.02391): a map of any layer, by gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wsolnb.backbones import ConvBackbone
from wsolnb.methods import register
from wsolnb.methods.cam import CAMClassifier, cam, check_layer, find_layer, layer_gradients


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return ReLU(sum_k alpha_k A_k) with alpha_k the mean over the positions of d y_c / d A_k; (B, h, w), >= 0.

    activations A and gradients of the class score with respect to them: (B, K, h, w), of the same layer.
    """
    check_layer(activations, gradients)
    return torch.einsum("bkhw,bk->bhw", activations, gradients.mean(dim=(2, 3))).relu()


class GradCAMOutput(NamedTuple):
    """logits: (B, C). features: (B, K, h, w), the final map. images: (B, 3, H, W), for another pass with gradients."""

    logits: Tensor
    features: Tensor
    images: Tensor


@register("grad_cam")
class GradCAM(CAMClassifier):
    """Grad-CAM of a classifier that is trained as CAM's (https://arxiv.org/abs/1610.02391).

    Eq. 1 and 2, for the score y_c of class c and the h * w maps A_k of a layer:

        alpha_k = 1 / (h w) sum_xy d y_c / d A_k(x, y),  M_c = ReLU(sum_k alpha_k A_k)

    layer: name of a submodule of the backbone. "" is the final map, of which Grad-CAM is CAM / (h w).

        model = create_method("grad_cam", create_backbone("resnet50"), 200, layer="resnet.layer3").eval()
        maps = model.localize(model(images), labels)["grad_cam"]
    """

    maps = ("grad_cam", "cam")

    def __init__(self, backbone: ConvBackbone, num_classes: int, layer: str = "", bias: bool = False):
        super().__init__(backbone, num_classes, bias)
        find_layer(backbone, layer)
        self.layer = layer

    @classmethod
    def over(cls, model: CAMClassifier, layer: str = "") -> GradCAM:
        """Return a model that draws Grad-CAM of a layer of a trained classifier, in evaluation mode, with its weights.

        Raises ParameterError for an unknown layer.
        """
        found = cls._behind(model.backbone, model.classifier, model.class_names)
        found.multi_label, found.layer = model.multi_label, layer
        find_layer(found.backbone, layer)
        return found

    def forward(self, images: Tensor) -> GradCAMOutput:
        """Classify (B, 3, H, W) normalised images."""
        return GradCAMOutput(*super().forward(images), images)

    def localize(self, output: GradCAMOutput, classes: Tensor) -> dict[str, Tensor]:
        """Grad-CAM of the layer, in its resolution, and CAM of the final map; each (B, h, w).

        Runs the images again, because an output of `torch.inference_mode` has no gradients.
        Raises ParameterError for a class that the model lacks, or a layer that the forward pass does not run.
        """
        layer = find_layer(self.backbone, self.layer)
        activations, gradients = layer_gradients(self, output.images, classes, layer)
        plain = cam(output.features.detach().float(), self.classifier.weight.detach().float(), classes)
        return {"grad_cam": grad_cam(activations.float(), gradients.float()), "cam": plain}
