"""What PPD and LocLoc share: a frozen transformer, and decoders that learn a map from its patch tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsolnb.backbones import ConformerBackbone, TransformerBackbone, embed, plain_block, run_blocks
from wsolnb.data.sample import IGNORE, Sample
from wsolnb.errors import ParameterError
from wsolnb.methods.base import LocalizationModel


class FrozenTokens(NamedTuple):
    """What one pass of a frozen transformer leaves.

    embedded: (B, P + N, D) prefix and patch tokens with their position embedding, before any block.
    last: outputs (B, P + N, D) of the last blocks, in their order, before the final normalisation.
    """

    embedded: Tensor
    last: tuple[Tensor, ...]


class FrozenBackbone(nn.Module):
    """A transformer that is never trained: no gradient, always in evaluation mode.

    Its P prefix tokens, the class token and registers, come before the N patch tokens.
    Raises ParameterError for a backbone that is no plain vision transformer.
    """

    def __init__(self, backbone: TransformerBackbone):
        super().__init__()
        if not isinstance(backbone, TransformerBackbone) or isinstance(backbone, ConformerBackbone):
            problem = f"PPD and LocLoc read the tokens of a plain vision transformer, got {type(backbone).__name__}"
            raise ParameterError(problem, "use vit_mini_dino, dino_small or deit_small")
        self.backbone = backbone.requires_grad_(False).eval()
        self.dim, self.grid = backbone.dim, backbone.grid

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Stay in evaluation mode, whatever the model around it does: else batch statistics would follow the data."""
        return super().train(False)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens (B, P + N, D) of normalised images (B, 3, H, W) before any block."""
        return embed(self.backbone.vit, images)

    @torch.no_grad()
    def forward(self, images: Tensor, last: int = 1) -> FrozenTokens:
        """Run all blocks once; keep the outputs of the `last` ones."""
        embedded = self.embed(images)
        ran = run_blocks(self.backbone.vit.blocks, embedded, self.backbone.masks, plain_block)
        return FrozenTokens(embedded, tuple(x for x, _ in ran)[-last:])

    def normalise(self, tokens: Tensor) -> Tensor:
        """Apply the final layer normalisation to tokens (B, P + N, D)."""
        return self.backbone.vit.norm(tokens)

    def to_grid(self, tokens: Tensor) -> Tensor:
        """Return the patch tokens of (B, P + N, D) as a feature map (B, D, h, w)."""
        return tokens[:, self.backbone.prefix_tokens :].transpose(1, 2).unflatten(2, self.grid)


class OnFrozen(LocalizationModel):
    """A localization model on a frozen transformer, `frozen`, and its trained parts."""

    frozen: FrozenBackbone

    @classmethod
    def make_backbone(cls, name: str, **options: Any) -> Any:
        """Return the backbone that is to be frozen; the options are those of `create_backbone`.

        It leaves the random numbers as if it had drawn none. So with one seed a part starts from the same weights on
        every backbone of that width, whatever was built before.
        """
        with torch.random.fork_rng(devices=[]):
            return super().make_backbone(name, **options)


def deconvolutions(in_channels: int, channels: int, count: int, momentum: float = 0.1) -> nn.Sequential:
    """Return `count` transposed 4x4 convolutions of stride 2, each with batch normalisation and ReLU.

    Each doubles the side of the map. momentum: of the batch normalisation's running statistics.
    """
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [
            nn.ConvTranspose2d(in_channels, channels, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels, momentum=momentum),
            nn.ReLU(inplace=True),
        ]
        in_channels = channels
    return nn.Sequential(*layers)


def map_targets(samples: Sequence[Sample], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return what a decoder should draw: for each cell (B, h, w) the share of object and the share of known pixels.

    A cell's share of object is taken among its known pixels. If no pixel is known (at the border of a shifted image),
    it is 0.
    Raises ParameterError when a sample has no mask.
    """
    for sample in samples:
        if sample.mask is None:
            raise ParameterError(f"image {sample.image_id!r} has no mask to learn from", "train on `WithMasks`")
    masks = torch.from_numpy(np.stack([sample.mask for sample in samples]))
    known = (masks != IGNORE).float()
    objects = known * (masks > 0)
    known, objects = (F.interpolate(part[:, None], size=size, mode="area")[:, 0] for part in (known, objects))
    return objects / known.clamp(min=1e-6), known


def half_squared_error(maps: Tensor, targets: Tensor, known: Tensor | None = None) -> Tensor:
    """Half the mean squared error between maps and targets (B, h, w); each cell weighs as much as its share `known`."""
    error = (maps.float() - targets).square()
    return 0.5 * (error.mean() if known is None else (error * known).sum() / known.sum().clamp(min=1e-6))
