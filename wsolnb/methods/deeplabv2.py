"""DeepLabV2 (Chen et al., 2018): a dilated backbone and four convolutions of growing dilation, all summed.

    model = create_method("deeplabv2", create_backbone("resnet101", output_stride=8), num_classes=20)

It learns from masks; the background is a class of its own, index 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsolnb.backbones import ConvBackbone, TransformerBackbone
from wsolnb.methods import register
from wsolnb.methods.base import SegmentationModel


@register("deeplabv2")
class DeepLabV2(SegmentationModel):
    """A dilated backbone and ASPP: 3 x 3 convolutions side by side, whose logits are *summed*.

    backbone: a ResNet of stride 8, or a transformer, whose patch tokens are the map. classes: with the background.
    dilations: of the convolutions, in cells.
    """

    def __init__(
        self, backbone: ConvBackbone | TransformerBackbone, classes: int, dilations: tuple[int, ...] = (6, 12, 18, 24)
    ):
        super().__init__()
        self.backbone = backbone
        self.aspp = nn.ModuleList(nn.Conv2d(backbone.dim, classes, 3, padding=d, dilation=d) for d in dilations)
        for branch in self.aspp:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    @property
    def head(self) -> nn.Module:
        """The ASPP, whose learning rate is ten times the backbone's in the published training."""
        return self.aspp

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes, H, W) of (B, 3, H, W) normalised images, resized bilinearly from the grid."""
        features = self.backbone(images)
        if isinstance(self.backbone, TransformerBackbone):
            features = features.patches.transpose(1, 2).unflatten(2, self.backbone.grid)
        logits = torch.stack([branch(features) for branch in self.aspp]).sum(dim=0)
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
