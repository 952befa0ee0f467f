"""Convolutional networks of timm without their classifier."""

from __future__ import annotations

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from wsolnb.backbones.base import Backbone
from wsolnb.errors import ParameterError

STRIDES = (8, 16, 32)
"""Strides that a final map can be asked to have."""

PROBE = 64
"""Side in pixels of the image that tells a network's stride and width."""


class ConvBackbone(Backbone):
    """A convolutional network of timm without its classifier.

    dim: channels of the final map. stride: pixels per cell of the final map. Both are measured, by one small image.
    cnn: timm's model.

    Raises ParameterError for a network whose features are no map (B, C, h, w) of images of any size, as a Swin's.
    """

    def __init__(self, cnn: nn.Module, name: str):
        cnn.reset_classifier(0, "")
        shape = _probe(cnn)
        if len(shape) != 4 or shape[2] != shape[3] or PROBE // shape[2] not in STRIDES:
            raise ParameterError(
                f"backbone {name!r} ({type(cnn).__name__}) is no convolutional network with a final map (B, C, h, w) "
                "of images of any size, and no plain vision transformer whose class-token attention can be read",
                "use a ViT, DeiT or DINOv2, or a network such as ResNet, EfficientNet or ConvNeXt; a Swin, for one, "
                "has no class token, and DINOv3, BEiT and CaiT have blocks of their own",
            )
        super().__init__(cnn, name, shape[1])
        # Channels last: a training step on the CPU takes two thirds of the time, and a GPU's tensor cores want it so.
        self.cnn = cnn.to(memory_format=torch.channels_last)
        self.stride = PROBE // shape[2]

    @property
    def resnet(self) -> ResNet:
        """The network where it is a ResNet, for methods that read its stages; else ParameterError."""
        if not isinstance(self.cnn, ResNet):
            raise ParameterError(
                f"the stages of a ResNet were asked of {self.name!r} ({type(self.cnn).__name__})",
                "use resnet_mini, resnet18, resnet50 or another ResNet of timm",
            )
        return self.cnn

    def forward(self, images: Tensor) -> Tensor:
        """Return the final feature map (B, dim, H / stride, W / stride) of (B, 3, H, W) normalised images."""
        return self.cnn.forward_features(images)


@torch.no_grad()
def _probe(cnn: nn.Module) -> torch.Size:
    """Return the shape of a small image's features; an empty one where the network refuses its size."""
    training = cnn.training
    try:
        found = cnn.eval().forward_features(torch.zeros(1, 3, PROBE, PROBE))
    except (AssertionError, IndexError, RuntimeError, ValueError):
        return torch.Size()
    finally:
        cnn.train(training)
    return found.shape if isinstance(found, Tensor) else torch.Size()
