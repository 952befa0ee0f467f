"""Convolutional networks of timm without their classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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

    Raises ParameterError for a network whose features are not a map (B, C, h, w) for images of any size, such as a
    Swin.
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
    def dilated(self) -> bool:
        """Whether a convolution reads cells that are not neighbours, in place of a stride that was taken out."""
        return any(isinstance(layer, nn.Conv2d) and max(layer.dilation) > 1 for layer in self.cnn.modules())

    def undilate(self) -> None:
        """Make every convolution read neighbouring cells; the size of each map stays."""
        for layer in self.cnn.modules():
            if isinstance(layer, nn.Conv2d):
                layer.padding = tuple(side // step for side, step in zip(layer.padding, layer.dilation, strict=True))
                layer.dilation = (1, 1)

    @property
    def resnet(self) -> ResNet:
        """The network where it is a ResNet, for methods that read its stages; else ParameterError."""
        if not isinstance(self.cnn, ResNet):
            raise ParameterError(
                f"the stages of a ResNet were asked of {self.name!r} ({type(self.cnn).__name__})",
                "use resnet_mini, resnet18, resnet50 or another ResNet of timm",
            )
        return self.cnn

    def stages(self, images: Tensor) -> list[Tensor]:
        """Return five feature maps of (B, 3, H, W) normalised images: a stem of stride 4, and stages of 4 to `stride`.

        The stem of a ResNet is the output of its max pooling. For other networks, such as EfficientNet, it is the first
        stage, of stride 2, after a max pooling of the same kind. Raises ParameterError for a network that has no such
        stages, such as ConvNeXt.
        """
        if isinstance(self.cnn, ResNet):
            cnn = self.cnn
            found = [cnn.maxpool(cnn.act1(cnn.bn1(cnn.conv1(images))))]
            for layer in (cnn.layer1, cnn.layer2, cnn.layer3, cnn.layer4):
                found.append(layer(found[-1]))
            return found
        first, *found = self.cnn.forward_intermediates(images, intermediates_only=True)
        found = [F.max_pool2d(first, 3, stride=2, padding=1), *found]
        sides = [stage.shape[-1] for stage in found]
        if len(sides) != 5 or sides[0] != sides[1]:
            raise ParameterError(
                f"{self.name!r} ({type(self.cnn).__name__}) gives {len(sides)} stages, {sides} cells wide",
                "five are wanted, the first two alike: use a ResNet or an EfficientNet",
            )
        return found

    @torch.no_grad()
    def stage_channels(self) -> tuple[int, ...]:
        """Return the number of channels of each of the `stages`; raises as they do."""
        training, device = self.cnn.training, next(self.cnn.parameters()).device
        try:
            self.cnn.eval()
            return tuple(stage.shape[1] for stage in self.stages(torch.zeros(1, 3, PROBE, PROBE, device=device)))
        finally:
            self.cnn.train(training)

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
