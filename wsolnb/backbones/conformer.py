"""Conformer (Peng et al., ICCV 2021): a convolutional and a transformer branch that exchange features in every block.

This module has only what the tokens of the transformer branch depend on. It leaves out both classifiers, and what the
last block gives back to the convolutions. Names of modules are those of the published weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from wsolnb.backbones.vit import Tokens, TransformerBackbone, run_block

RunBlock = Callable[[Block, Tensor], tuple[Tensor, Tensor]]
_norm2d, _norm = partial(nn.BatchNorm2d, eps=1e-6), partial(nn.LayerNorm, eps=1e-6)


class ConvBlock(nn.Module):
    """A bottleneck of a quarter of the width; tokens of the transformer may be added inside of it."""

    def __init__(self, inner: int, outer: int, stride: int = 1, project: bool = False, whole: bool = True):
        super().__init__()
        width = outer // 4
        self.conv1, self.bn1 = nn.Conv2d(inner, width, 1, bias=False), _norm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), _norm2d(width)
        if whole:
            self.conv3, self.bn3 = nn.Conv2d(width, outer, 1, bias=False), _norm2d(outer)
        if project:
            self.residual_conv = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.residual_bn = _norm2d(outer)
        self.project = project

    def inside(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return what is inside of the bottleneck, (B, outer / 4, h, w): what the tokens are fed with."""
        x = self.bn1(self.conv1(x)).relu()
        return self.bn2(self.conv2(x if added is None else x + added)).relu()

    def outside(self, x: Tensor, inside: Tensor) -> Tensor:
        """Return the block's output (B, outer, h, w)."""
        skipped = self.residual_bn(self.residual_conv(x)) if self.project else x
        return (self.bn3(self.conv3(inside)) + skipped).relu()

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return (B, outer, h, w) of (B, inner, H, W)."""
        return self.outside(x, self.inside(x, added))


class ToTokens(nn.Module):
    """Features to patch tokens: projection, average pooling to the patch grid, normalisation."""

    def __init__(self, channels: int, dim: int, stride: int):
        super().__init__()
        self.conv_project, self.ln, self.stride = nn.Conv2d(channels, dim, 1), _norm(dim), stride

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, dim) of (B, channels, h, w)."""
        return F.gelu(self.ln(F.avg_pool2d(self.conv_project(x), self.stride).flatten(2).transpose(1, 2)))


class ToFeatures(nn.Module):
    """Patch tokens to features: projection, and repetition to the resolution of the convolutions."""

    def __init__(self, dim: int, channels: int, stride: int):
        super().__init__()
        self.conv_project, self.bn, self.stride = nn.Conv2d(dim, channels, 1), _norm2d(channels), stride

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return (B, channels, h, w) of (B, 1 + N, dim) tokens."""
        x = tokens[:, 1:].transpose(1, 2).unflatten(2, grid)
        return F.interpolate(self.bn(self.conv_project(x)).relu(), scale_factor=self.stride)


class ConvTransBlock(nn.Module):
    """Both branches once: convolutions, their features added to the tokens, a transformer block, and the way back."""

    def __init__(self, inner: int, outer: int, dim: int, heads: int, stride: int, cell: int, drop: float, last: bool):
        super().__init__()
        # A stage's first block changes the width, and so its shortcut; in the first stage neither changes.
        self.cnn_block = ConvBlock(inner, outer, stride, project=inner != outer, whole=not last)
        self.squeeze_block = ToTokens(outer // 4, dim, cell)
        self.trans_block = Block(dim, heads, qkv_bias=True, drop_path=drop, norm_layer=_norm)
        self.last = last
        if not last:
            self.expand_block = ToFeatures(dim, outer // 4, cell)
            self.fusion_block = ConvBlock(outer, outer)

    def forward(self, x: Tensor, tokens: Tensor, run: RunBlock) -> tuple[Tensor, Tensor, Tensor]:
        """Return features, tokens (B, 1 + N, dim) and the class token's attention row."""
        inside = self.cnn_block.inside(x)
        patches = self.squeeze_block(inside)
        # The class token is added to itself, as published: the pooled features have none to add.
        tokens, row = run(self.trans_block, torch.cat([tokens[:, :1], patches], dim=1) + tokens)
        if not self.last:
            grid = tuple(side // self.squeeze_block.stride for side in inside.shape[2:])
            x = self.fusion_block(self.cnn_block.outside(x, inside), self.expand_block(tokens, grid))
        return x, tokens, row


class Conformer(nn.Module):
    """The transformer branch's tokens, with the convolutional branch that feeds it.

    width: channels of the first stage. dim, heads: of the transformer. depth: blocks, a multiple of 3. Patches of 16.
    UNUSED: tensors of the published files that begin so are not needed here.
    """

    UNUSED = (
        "trans_cls_head",
        "conv_cls_head",
        *(f"conv_trans_12.{name}" for name in ("expand_block", "fusion_block", "cnn_block.conv3", "cnn_block.bn3")),
    )
    has_class_token, num_prefix_tokens = True, 1

    def __init__(self, width: int = 256, dim: int = 384, depth: int = 12, heads: int = 6, drop_path: float = 0.0):
        super().__init__()
        self.embed_dim = dim
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.conv_1 = ConvBlock(64, width, project=True)
        self.trans_patch_conv = nn.Conv2d(64, dim, 4, 4)
        self.trans_1 = Block(dim, heads, qkv_bias=True, drop_path=rates[0], norm_layer=_norm)
        self.names, inner = [], width
        for number in range(2, depth + 1):
            stage = 3 * (number - 1) // depth
            outer = width * 2**stage
            stride = 2 if outer != inner else 1
            block = ConvTransBlock(inner, outer, dim, heads, stride, 4 >> stage, rates[number - 1], number == depth)
            self.names.append(f"conv_trans_{number}")
            self.add_module(self.names[-1], block)
            inner = outer
        self.trans_norm = nn.LayerNorm(dim)
        self.apply(_start)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    @property
    def blocks(self) -> list[Block]:
        """The transformer's blocks, in their order."""
        return [self.trans_1, *(getattr(self, name).trans_block for name in self.names)]

    def forward(self, images: Tensor, run: RunBlock) -> tuple[Tensor, list[Tensor]]:
        """Return normalised tokens (B, 1 + N, dim) of (B, 3, H, W) images, and each block's attention row.

        run: runs a transformer block on tokens, and returns tokens and the class token's attention row.
        """
        stem = F.max_pool2d(self.bn1(self.conv1(images)).relu(), 3, 2, 1)
        x = self.conv_1(stem)
        patches = self.trans_patch_conv(stem).flatten(2).transpose(1, 2)
        tokens, row = run(self.trans_1, torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1))
        rows = [row]
        for name in self.names:
            x, tokens, row = getattr(self, name)(x, tokens, run)
            rows.append(row)
        return self.trans_norm(tokens), rows


class ConformerBackbone(TransformerBackbone):
    """Conformer: patch and class tokens of its transformer branch. Attributes as of `TransformerBackbone`."""

    def __init__(self, conformer: Conformer, name: str, image_size: int):
        super().__init__(conformer, name, image_size, 16)

    def _tokens(self, images: Tensor) -> Tokens:
        x, rows = self.vit(images, run_block)
        return Tokens(x[:, 1:], x[:, 0], torch.stack(rows, dim=1)[..., 1:])


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
