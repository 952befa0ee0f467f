"""UPerNet (Xiao et al., 2018) on a Swin transformer of timm, both from segmentation-models-pytorch.

    model = create_method("upernet", UPerNet.make_backbone("swin_tiny_patch4_window7_224"), num_classes=20)

It learns from masks; the background is a class of its own, index 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import segmentation_models_pytorch as smp
import torch.nn.functional as F
from torch import Tensor, nn

from wsolnb.errors import ParameterError, WeightsError
from wsolnb.methods import register
from wsolnb.methods.base import SegmentationModel

STEP = 32
"""Pixels that the sides of the encoder's input must be a multiple of."""


class Encoder(NamedTuple):
    """The encoder of UPerNet: timm's name of a Swin, and whether it starts from published weights."""

    name: str
    pretrained: bool = False


@register("upernet")
class UPerNet(SegmentationModel):
    """A Swin with UPerNet's decoder. Images of any size: padded to what the encoder takes, and cut back.

    encoder: as `make_backbone` gives it. classes: with the background.
    Raises WeightsError when published weights are asked for and cannot be had, ParameterError for another encoder.
    """

    def __init__(self, encoder: Encoder, classes: int):
        super().__init__()
        name, pretrained = encoder
        if not name.startswith("swin"):
            raise ParameterError(f"UPerNet was given the encoder {name!r}", "use a Swin of timm: swin_tiny_...")
        weights = "imagenet" if pretrained else None
        try:
            self.net = smp.UPerNet(f"tu-{name}", encoder_weights=weights, classes=classes, strict_img_size=False)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            problem = f"UPerNet with {name!r} could not be built: {str(error).splitlines()[0]}"
            remedy = (
                "check the name (timm.list_models('swin*')); published weights need a network or timm's filled cache"
            )
            raise WeightsError(problem, remedy) from error

    @classmethod
    def make_backbone(
        cls, name: str, pretrained: bool = False, checkpoint: str | Path | None = None, **_options: Any
    ) -> Encoder:
        """Return the encoder by name: the library builds encoder and decoder together. No other option applies."""
        if checkpoint:
            raise ParameterError("UPerNet takes no checkpoint", "set pretrained, or load weights into the network")
        return Encoder(name, pretrained)

    @property
    def head(self) -> nn.Module:
        """The decoder, trained at the encoder's rate unless `head_lr` says otherwise."""
        return nn.ModuleList([self.net.decoder, self.net.segmentation_head])

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes, H, W) of (B, 3, H, W) normalised images."""
        height, width = images.shape[-2:]
        down, right = -height % STEP, -width % STEP
        return self.net(F.pad(images, (0, right, 0, down)))[..., :height, :width]
