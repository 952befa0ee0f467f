"""Proxy probing decoder (Xu et al., ACM MM 2022): frozen tokens, decoded to their attention, probed for the class.

The baseline of LocLoc. As the listing of LocLoc's supplement (B.3) has it, class and map come from separate passes of
the frozen transformer over images that are loaded separately.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsolnb.backbones import TransformerBackbone
from wsolnb.errors import ParameterError
from wsolnb.maps import normalise
from wsolnb.methods import register
from wsolnb.methods.frozen import FrozenBackbone, OnFrozen, deconvolutions, half_squared_error


class ProxyProbingDecoder(nn.Module):
    """Feature map (B, D, h, w) -> map (B, 4h, 4w), unbounded: 3x3 convolution, pooling by 2, three times up by 2.

    dim: channels D of the tokens. hidden: of the first convolution. channels: of the transposed convolutions.
    The pooling halves h and w, rounded up, so the map of 14 x 14 tokens is 56 x 56.
    """

    def __init__(self, dim: int, hidden: int = 2048, channels: int = 256):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(dim, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
            deconvolutions(hidden, channels, 3),
            nn.Conv2d(channels, 1, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return the map of each image."""
        return self.layers(features)[:, 0]


class LinearProbe(nn.Module):
    """Linear classifier of the class tokens of the last blocks and, with `pool`, of the last one's mean patch token.

    dim: channels D of the tokens. PPD sets `prefix_tokens`, how many come before the patches, to those of the backbone.
    """

    def __init__(self, dim: int, num_classes: int, blocks: int = 4, pool: bool = True):
        super().__init__()
        self.blocks, self.pool, self.prefix_tokens = blocks, pool, 1
        self.linear = nn.Linear(dim * (blocks + pool), num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, last: list[Tensor]) -> Tensor:
        """Return logits (B, C) from the normalised outputs (B, P + N, D) of the last blocks, in their order."""
        features = [tokens[:, 0] for tokens in last[-self.blocks :]]
        if self.pool:
            features.append(last[-1][:, self.prefix_tokens :].mean(dim=1))
        return self.linear(torch.cat(features, dim=-1))


class PPDOutput(NamedTuple):
    """logits: (B, C), zeros without a probe. proxy: (B, h, w), the decoder's map; None without a decoder."""

    logits: Tensor
    proxy: Tensor | None


@register("ppd")
class PPD(OnFrozen):
    """Frozen transformer, decoder and probe; either of the two may be missing, so that each is trained alone.

    threshold: makes the attention that the decoder learns 0 and 1 (>= threshold); None: it is soft.
    """

    maps = ("proxy",)

    def __init__(
        self, backbone: TransformerBackbone, num_classes: int, decoder: ProxyProbingDecoder | None = None,
        probe: LinearProbe | None = None, threshold: float | None = None,
    ):  # fmt: skip
        super().__init__()
        if decoder is None and probe is None:
            raise ParameterError("a PPD of neither decoder nor probe", "give one of them, or both")
        self.frozen, self.num_classes = FrozenBackbone(backbone), num_classes
        self.decoder, self.probe, self.threshold = decoder, probe, threshold
        if probe is not None:
            probe.prefix_tokens = backbone.prefix_tokens

    @classmethod
    def create(
        cls, backbone: TransformerBackbone, num_classes: int, part: Literal["decoder", "probe"] = "decoder",
        hidden: int = 2048, channels: int = 256, threshold: float | None = None,
    ) -> PPD:  # fmt: skip
        """Return a model with one part alone, to be trained.

        hidden, channels: of the `ProxyProbingDecoder`. threshold: of the attention that it learns.
        Raises ParameterError for an unknown part.
        """
        if part == "decoder":
            decoder = ProxyProbingDecoder(backbone.dim, hidden, channels)
            return cls(backbone, num_classes, decoder, threshold=threshold)
        if part != "probe":
            raise ParameterError(f"PPD has no part {part!r}", "use decoder or probe")
        return cls(backbone, num_classes, probe=LinearProbe(backbone.dim, num_classes))

    @property
    def head(self) -> nn.Module:
        """The probe, or without one the decoder."""
        return self.decoder if self.probe is None else self.probe

    def classify(self, images: Tensor) -> Tensor:
        """Return logits (B, C): one pass of the transformer, then the probe."""
        if self.probe is None:
            return images.new_zeros(len(images), self.num_classes)
        last = self.frozen(images, self.probe.blocks).last
        return self.probe([self.frozen.normalise(tokens) for tokens in last])

    def draw(self, images: Tensor) -> Tensor | None:
        """Return maps (B, h, w): another pass of the transformer, then the decoder."""
        if self.decoder is None:
            return None
        tokens = self.frozen.normalise(self.frozen(images).last[-1])
        return self.decoder(self.frozen.to_grid(tokens))

    def forward(self, images: Tensor, class_images: Tensor | None = None) -> PPDOutput:
        """Classify `class_images` (B, 3, H, W), by default the images, and draw the maps of `images` (B, 3, H, W)."""
        return PPDOutput(self.classify(images if class_images is None else class_images), self.draw(images))

    def localize(self, output: PPDOutput, classes: Tensor) -> dict[str, Tensor]:
        """The decoder's map, the same for every class; uniform (so no box) without a decoder."""
        empty = output.logits.new_zeros(len(classes), *self.frozen.grid)
        return {"proxy": empty if output.proxy is None else output.proxy.float()}

    def loss(self, forward: Callable[[Tensor], Any], batch: dict[str, Any], label_smoothing: float = 0.0) -> Tensor:
        """Return the loss of a batch: the probe's cross-entropy, or half the decoder's squared error to the attention.

        The target is the class token's attention of the same frozen transformer, last layer, mean over heads, min-max
        normalised, resized bilinearly to the decoder's grid, and thresholded if the model has a threshold.
        Raises ParameterError for a model of both parts, which are trained one by one.
        """
        if self.decoder is None:
            return super().loss(forward, batch, label_smoothing)
        if self.probe is not None:
            raise ParameterError("decoder and probe have losses of their own", "train each of them alone")
        drawn = forward(batch["image"]).proxy
        with torch.no_grad():
            # Not through `forward`: that may be a wrapper, which joins the gradients of several processes.
            backbone = self.frozen.backbone
            attention = backbone(batch["image"]).attention[:, -1].mean(dim=1)
            target = normalise(attention.unflatten(1, backbone.grid))
            target = F.interpolate(target[:, None], size=drawn.shape[1:], mode="bilinear", align_corners=False)[:, 0]
            if self.threshold is not None:
                target = (target >= self.threshold).float()
        return half_squared_error(drawn, target)
