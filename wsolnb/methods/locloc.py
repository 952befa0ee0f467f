"""LocLoc (ACM MM 2023): a generator learns GrabCut's masks from frozen tokens, a second transformer classifies.

One pass of the frozen transformer serves both (supplement, listing B.3). Its patch tokens behind the last block go to
the generator (GEG). Its tokens before the first block go to the classifier (LFDM), whose blocks start as copies of the
frozen ones and are trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from timm.layers import DropPath
from torch import Tensor, nn

from wsolnb.backbones import TransformerBackbone, plain_block, run_blocks
from wsolnb.data.loading import IMAGENET_MEAN, IMAGENET_STD
from wsolnb.data.sample import Sample
from wsolnb.errors import ParameterError
from wsolnb.maps import upsample
from wsolnb.methods import register
from wsolnb.methods.base import pick
from wsolnb.methods.frozen import FrozenBackbone, OnFrozen, deconvolutions, half_squared_error, map_targets


class LocLocConfig(BaseModel):
    """Switches in which the supplement and the released code differ, and the sizes of the generator.

    third_level: whether the second up block reads the first one's output. In the released code it reads the third map
        instead, so the deepest level is computed and never used.
    enhance_training: the classifier is trained on images that are black outside of their mask.
    rectangle: a random rectangle is left as it was.
    enhance_test: the classifier is shown such images at test, too, masked by the generator's map above `mask_threshold`
        (min-max).
    base: channels of the U-Net's levels are 2, 4, 8 times this. channels: of the transposed convolutions.
    momentum: of the U-Net's batch normalisations.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    third_level: bool = False
    enhance_training: bool = True
    rectangle: bool = True
    enhance_test: bool = False
    mask_threshold: float = Field(0.05, ge=0, lt=1)
    base: int = Field(4, ge=1)
    channels: int = Field(256, ge=1)
    momentum: float = Field(0.01, gt=0, le=1)

    @classmethod
    def paper(cls, **changes) -> LocLocConfig:
        """The supplement's settings: three levels down and up, enhanced images in training and at test."""
        return cls(**{"third_level": True, "rectangle": False, "enhance_test": True, **changes})

    @classmethod
    def released(cls, **changes) -> LocLocConfig:
        """The released code's settings."""
        return cls(**changes)


class _Double(nn.Sequential):
    """Twice 3x3 convolution, batch normalisation, LeakyReLU."""

    def __init__(self, in_channels: int, channels: int, momentum: float):
        layers: list[nn.Module] = []
        for source in (in_channels, channels):
            convolution = nn.Conv2d(source, channels, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(channels, momentum=momentum), nn.LeakyReLU(inplace=True)]
        super().__init__(*layers)


class GrabCutEnhancedGenerator(nn.Module):
    """GEG: feature map (B, D, h, w) -> map (B, 8h, 8w) in [0, 1] (Algorithm 1, F^u and F^a).

    A U-Net (three times max pooling by 2, rounded down) brings the tokens to `num_classes` channels, three transposed
    convolutions enlarge them, a convolution with batch normalisation and sigmoid makes the map.
    dim: channels D of the tokens. config: see `LocLocConfig`. Raises ParameterError for a grid smaller than 8.
    """

    def __init__(self, dim: int, num_classes: int, config: LocLocConfig | None = None):
        super().__init__()
        self.config = config = config or LocLocConfig.released()
        base, momentum = config.base, config.momentum
        self.down_1 = _Double(dim, 2 * base, momentum)
        self.down_2 = _Double(2 * base, 4 * base, momentum)
        self.down_3 = _Double(4 * base, 8 * base, momentum)
        self.up_1 = _Double(12 * base, 4 * base, momentum)
        self.up_2 = _Double(6 * base, 3 * base, momentum)
        self.up_3 = _Double(3 * base + dim, num_classes, momentum)
        self.enlarge = deconvolutions(num_classes, config.channels, 3)
        self.to_map = nn.Sequential(nn.Conv2d(config.channels, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Tensor) -> Tensor:
        """Return the map of each image."""
        if min(features.shape[2:]) < 8:
            raise ParameterError(f"a grid of {tuple(features.shape[2:])} tokens", "three poolings need 8 x 8 or more")
        second = self.down_1(F.max_pool2d(features, 2))
        third = self.down_2(F.max_pool2d(second, 2))
        deepest = self.down_3(F.max_pool2d(third, 2))
        up = _join(self.up_1, deepest, third) if self.config.third_level else third
        up = _join(self.up_2, up, second)
        up = _join(self.up_3, up, features)
        return self.to_map(self.enlarge(up))[:, 0].sigmoid()

    def unused(self) -> tuple[nn.Module, ...]:
        """The parts that the map does not depend on."""
        return () if self.config.third_level else (self.down_3, self.up_1)


def _join(block: nn.Module, deep: Tensor, skip: Tensor) -> Tensor:
    """Bring the deeper map to the size of the skipped one, put it behind that, and convolve."""
    deep = F.interpolate(deep, size=skip.shape[2:], mode="bilinear", align_corners=False)
    return block(torch.cat([skip, deep], dim=1))


class LocalFeatureDigging(nn.Module):
    """LFDM: tokens before any block (B, P + N, D) -> class maps (B, C, h, w) >= 0, whose means are the logits.

    Blocks and final normalisation start as copies of the backbone's, and are trained. Behind them: 3x3 convolution,
    ReLU, 3x3 convolution to the classes, batch normalisation, ReLU, 3x3 average pooling.
    drop_path: stochastic depth, rising linearly to the last block.
    """

    def __init__(self, backbone: TransformerBackbone, num_classes: int, drop_path: float = 0.0):
        super().__init__()
        self.grid, self.prefix_tokens = backbone.grid, backbone.prefix_tokens
        self.blocks = copy.deepcopy(backbone.vit.blocks).requires_grad_(True)
        self.norm = copy.deepcopy(backbone.vit.norm).requires_grad_(True)
        for position, block in enumerate(self.blocks):
            rate = drop_path * position / max(1, len(self.blocks) - 1)
            block.drop_path1, block.drop_path2 = (DropPath(rate) if rate else nn.Identity() for _ in range(2))
        for layer, mask in enumerate(backbone.masks):
            self.register_buffer(f"mask_{layer}", mask, persistent=False)
        self.masked = bool(backbone.masks)
        self.classifier = nn.Sequential(
            nn.Conv2d(backbone.dim, backbone.dim, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(backbone.dim, num_classes, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_classes),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(3, stride=1, padding=1),
        )

    def forward(self, embedded: Tensor) -> Tensor:
        """Return the class maps."""
        masks = [getattr(self, f"mask_{layer}") for layer in range(len(self.blocks))] if self.masked else ()
        for x, _ in run_blocks(self.blocks, embedded, masks, plain_block):  # noqa: B007
            pass
        patches = self.norm(x)[:, self.prefix_tokens :]
        return self.classifier(patches.transpose(1, 2).unflatten(2, self.grid))


class LocLocOutput(NamedTuple):
    """What the joint model returns. The output of a missing part is None, and logits are zeros without a classifier.

    logits: (B, C). generated: (B, h', w') in [0, 1], the generator's map. class_maps: (B, C, h, w), the classifier's.
    """

    logits: Tensor
    generated: Tensor | None
    class_maps: Tensor | None


@register("locloc")
class LocLoc(OnFrozen):
    """Frozen transformer, generator and classifier. Generator or classifier may be missing: each is trained alone.

    config: the fields that concern more than the generator are read here. With `enhance_test` the masked image is
    embedded anew. This takes no block of the frozen transformer, so it is still one pass.
    Raises ParameterError without both parts, and for `enhance_test` without a generator when it is run.
    """

    def __init__(
        self, backbone: TransformerBackbone, num_classes: int, generator: GrabCutEnhancedGenerator | None = None,
        classifier: LocalFeatureDigging | None = None, config: LocLocConfig | None = None,
    ):  # fmt: skip
        super().__init__()
        if generator is None and classifier is None:
            raise ParameterError("a LocLoc of neither generator nor classifier", "give one of them, or both")
        self.frozen, self.num_classes = FrozenBackbone(backbone), num_classes
        self.generator, self.classifier = generator, classifier
        self.config = config or LocLocConfig.released()
        self.learns_from_masks = classifier is None or self.config.enhance_training
        names = {"generated": generator, "classifier": classifier}
        self.maps = tuple(name for name, part in names.items() if part is not None)
        self.classifies = classifier is not None

    @classmethod
    def create(
        cls, backbone: TransformerBackbone, num_classes: int, part: Literal["generator", "classifier"] = "generator",
        config: LocLocConfig | dict[str, Any] | None = None, drop_path: float = 0.1,
    ) -> LocLoc:  # fmt: skip
        """Return a model with one part alone, to be trained.

        config: default `LocLocConfig.released()`. drop_path: stochastic depth of the classifier's last block.
        Raises ParameterError for an unknown part.
        """
        config = LocLocConfig.model_validate(config or LocLocConfig.released())
        if part == "generator":
            return cls(backbone, num_classes, GrabCutEnhancedGenerator(backbone.dim, num_classes, config), None, config)
        if part != "classifier":
            raise ParameterError(f"LocLoc has no part {part!r}", "use generator or classifier")
        # Alone it has no map that could enhance its test images.
        config = config.model_copy(update={"enhance_test": False})
        return cls(backbone, num_classes, None, LocalFeatureDigging(backbone, num_classes, drop_path), config)

    @property
    def head(self) -> nn.Module:
        """The classifier's convolutions, or without a classifier the generator."""
        return self.generator if self.classifier is None else self.classifier.classifier

    def forward(self, images: Tensor) -> LocLocOutput:
        """Localize and classify (B, 3, H, W) normalised images with one pass of the frozen transformer."""
        if self.generator is None:
            if self.config.enhance_test and not self.training:
                raise ParameterError("enhance_test without a generator, whose map is the mask", "give a generator")
            embedded, generated = self.frozen.embed(images), None
        else:
            tokens = self.frozen(images)
            embedded, generated = tokens.embedded, self.generator(self.frozen.to_grid(tokens.last[-1]))
        if self.classifier is None:
            return LocLocOutput(images.new_zeros(len(images), self.num_classes), generated, None)
        if self.config.enhance_test and not self.training:
            mask = upsample(generated, images.shape[2:]) >= self.config.mask_threshold
            embedded = self.frozen.embed(blacken(images, mask, self.mean, self.std))
        class_maps = self.classifier(embedded)
        return LocLocOutput(class_maps.mean(dim=(2, 3)), generated, class_maps)

    def localize(self, output: LocLocOutput, classes: Tensor) -> dict[str, Tensor]:
        """generated: the generator's map, the same for every class. classifier: the map of each image's class."""
        found = {}
        if output.generated is not None:
            found["generated"] = output.generated.float()
        if output.class_maps is not None:
            found["classifier"] = pick(output.class_maps, classes).float()
        return found

    def loss(self, forward: Callable[[Tensor], Any], batch: dict[str, Any], label_smoothing: float = 0.0) -> Tensor:
        """Return the loss of a batch: the classifier's cross-entropy, or the generator's error.

        The generator's is half the squared error to the masks of `batch["samples"]`, where these are known.
        Raises ParameterError for a model of both parts, which are trained one by one.
        """
        if self.classifier is None:
            generated = forward(batch["image"]).generated
            target, known = (part.to(generated.device) for part in map_targets(batch["samples"], generated.shape[1:]))
            return half_squared_error(generated, target, known)
        if self.generator is not None:
            raise ParameterError("generator and classifier learn from different images", "train each of them alone")
        return super().loss(forward, batch, label_smoothing)

    def first_transforms(self) -> list[Callable]:
        """Return the transform that blackens a classifier's training images, if the configuration asks for it."""
        return [Enhance(self.config.rectangle)] if self.classifier is not None and self.config.enhance_training else []


# Enhanced images


def blacken(
    images: Tensor, mask: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """Return normalised images (B, 3, H, W) that are black (pixel value 0) where `mask` (B, H, W) is false.

    mean, std: what the images were normalised with, per channel.
    """
    black = -images.new_tensor(mean) / images.new_tensor(std)
    return torch.where(mask[:, None], images, black.view(1, 3, 1, 1))


@dataclass(frozen=True)
class Enhance:
    """Blacken a sample's image outside of its mask: the enhanced image (I, M^G) of Algorithm 1.

    rectangle: leave a random rectangle as it was, as the released code does: its centre uniform in the image, its sides
        a share sqrt(1 - l) of the image's, l uniform in [0, 1], cut off at the image's border.
    Pixels that are unknown in the mask stay as they are. A sample without a mask raises ParameterError.
    """

    rectangle: bool = False

    def __call__(self, sample: Sample, rng: np.random.Generator | None = None) -> Sample:
        """Return the sample with its image blackened; `rng` is needed for the rectangle."""
        if sample.mask is None:
            raise ParameterError(f"image {sample.image_id!r} has no mask", "read it from `WithMasks`")
        keep = sample.mask != 0
        if self.rectangle:
            height, width = sample.size
            share = np.sqrt(1 - rng.uniform())
            half_height, half_width = int(height * share) // 2, int(width * share) // 2
            row, column = int(rng.integers(height)), int(rng.integers(width))
            top, left = max(0, row - half_height), max(0, column - half_width)
            keep[top : row + half_height, left : column + half_width] = True
        return replace(sample, image=np.where(keep[..., None], sample.image, 0).astype(np.uint8))
