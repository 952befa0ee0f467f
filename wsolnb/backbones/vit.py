"""Vision transformers of timm, and a tap that reads the class token's attention from fused attention.

A transformer here returns its patch tokens and, for every layer and head, the row of the attention matrix that belongs
to the class token. TS-CAM, SCM and LocLoc need no more of the attention. The N x N matrices are never built: the row is
one query against all keys, next to the fused attention that the forward pass runs anyway.

The first tokens are not patches: they are the class token and, if the model has any, registers (`prefix_tokens`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from wsolnb.backbones.base import Backbone
from wsolnb.errors import ParameterError


class Tokens(NamedTuple):
    """What a transformer backbone returns.

    patches: (B, N, D) patch tokens after the final normalisation, N = rows * columns in row-major order.
    class_token: (B, D) after the final normalisation.
    attention: (B, L, heads, N) float32, the class token's softmax row of each layer without its entry for itself, so a
        row sums to less than one.
    """

    patches: Tensor
    class_token: Tensor
    attention: Tensor


class Mixing(NamedTuple):
    """Which tokens of `vit_mini` may attend to which. It keeps patch tokens local, so that they tell what is *there*.

    local_layers: in this many first layers a patch attends only to patches at most `radius` rows and columns away.
    sees_class: whether patches attend to the class token, which would hand the whole image's content to each of them.
    bound: largest magnitude of an attention score; None = unbounded. A bound keeps a softmax over many tokens from
        choosing one.
    """

    local_layers: int = 2
    radius: int = 2
    sees_class: bool = False
    bound: float | None = 3.0

    def masks(self, rows: int, columns: int, depth: int) -> list[Tensor | None]:
        """Return for each layer which token (row) may attend to which (column): (1 + N, 1 + N) booleans, None = all."""
        row, column = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
        far = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs()) > self.radius
        masks: list[Tensor | None] = []
        for layer in range(depth):
            allowed = torch.ones(1 + len(row), 1 + len(row), dtype=torch.bool)
            allowed[1:, 0] = self.sees_class
            if layer < self.local_layers:
                allowed[1:, 1:] = ~far
            masks.append(None if allowed.all() else allowed)
        return masks


PLAIN = Mixing(local_layers=0, sees_class=True, bound=None)
"""Every token attends to every other, with unbounded scores: an ordinary transformer."""


class BoundedNorm(nn.Module):
    """Scale queries or keys (..., d) to one length, so that |q . k| / sqrt(d) <= bound."""

    def __init__(self, bound: float, dim: int):
        super().__init__()
        self.length = (bound * dim**0.5) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """Return x with vectors of length `self.length`."""
        lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).clamp(min=1e-6)
        return x * (self.length / lengths).to(x.dtype)


class ConvStem(nn.Module):
    """Patch embedding by three stride-2 convolutions (patch 8): overlapping, and trainable on few images.

    Takes (B, 3, H, W), returns (B, N, D); plugs into timm's VisionTransformer in place of the linear patch embedding.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_ignored):
        super().__init__()
        if patch_size != 8:
            raise ParameterError(f"ConvStem was given patches of {patch_size}", "use patches of 8")
        check_size("ConvStem", img_size, patch_size)
        self.img_size = img_size
        self.num_patches = (img_size // 8) ** 2
        layers, channels = [], in_chans
        for width in (embed_dim // 4, embed_dim // 2, embed_dim):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU()]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, embed_dim, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Embed the patches of (B, 3, H, W) images."""
        return self.layers(images).flatten(2).transpose(1, 2)


def check_size(name: str, image_size: int, patch_size: int) -> None:
    """Raise ParameterError, with the nearest usable sizes, if whole patches do not fill a side in pixels."""
    if image_size < patch_size or image_size % patch_size:
        below = max(1, image_size // patch_size) * patch_size
        raise ParameterError(
            f"{name} cannot take images of side {image_size}",
            f"use {below} or {below + patch_size}: multiples of {patch_size}, the side of its patches",
        )


class TransformerBackbone(Backbone):
    """A timm vision transformer with a class token.

    dim: token width D. depth: layers L. heads: attention heads. grid: (rows, columns) of patches.
    image_size, patch_size: sides of the input and of a patch in pixels.
    prefix_tokens: number of first tokens that are no patches, the class token and then registers.
    mean, std: see `Backbone`. vit: timm's model.
    patch_size: read from the model unless given.

    Raises ParameterError for a model without a class token, with a distillation token or with blocks of another kind,
    and for an image size that its patches do not divide.
    """

    def __init__(
        self, vit: VisionTransformer, name: str, image_size: int, patch_size: int | None = None,
        mixing: Mixing | None = None,
    ):  # fmt: skip
        _check_tappable(vit, name)
        super().__init__(vit, name, vit.embed_dim)
        self.vit, self.mixing = vit, mixing
        self.image_size, self.patch_size = image_size, patch_size or vit.patch_embed.feat_ratio()
        check_size(name, self.image_size, self.patch_size)
        if hasattr(vit, "patch_embed"):
            vit.patch_embed.strict_img_size = False  # `forward` checks the size; MCTformer takes others
        self.depth, self.heads = len(vit.blocks), vit.blocks[0].attn.num_heads
        self.prefix_tokens = vit.num_prefix_tokens
        self.grid = (image_size // self.patch_size, image_size // self.patch_size)
        # Buffers, so that they follow the model to its device; equal ones are kept once.
        self._mask_names: list[str | None] = []
        for layer, mask in enumerate(mixing.masks(*self.grid, self.depth) if mixing else ()):
            same = f"mask_{layer}" if mask is not None else None
            if same:
                equal = [known for known in self._mask_names if known and torch.equal(getattr(self, known), mask)]
                same = equal[0] if equal else same
                self.register_buffer(same, mask, persistent=False)
            self._mask_names.append(same)

    @property
    def masks(self) -> list[Tensor | None]:
        """Which token may attend to which in each layer (see `Mixing.masks`); empty = everywhere."""
        return [name and getattr(self, name) for name in self._mask_names]

    def forward(self, images: Tensor) -> Tokens:
        """Run the transformer on (B, 3, H, W) normalised images.

        Raises ParameterError when the images are not of the size that the position embedding was made for.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2:] != (self.image_size, self.image_size):
            size = self.image_size
            raise ParameterError(
                f"{self.name} was built for (B, 3, {size}, {size}) images, got {tuple(images.shape)}",
                f"resize the images or build the backbone with image_size={images.shape[-1]}",
            )
        return self._tokens(images)

    def _tokens(self, images: Tensor) -> Tokens:
        return forward_tapped(self.vit, images, self.masks)


def forward_tapped(vit: VisionTransformer, images: Tensor, masks: Sequence[Tensor | None] = ()) -> Tokens:
    """Run a timm vision transformer and return its tokens with the class token's attention rows.

    The same computation as `vit.forward_features`, block by block. The tokens are equal to timm's.
    masks: as of `run_blocks`; the class token's row must be all true.
    """
    rows = []
    for x, row in run_blocks(vit.blocks, embed(vit, images), masks):  # noqa: B007
        rows.append(row)
    x, first_patch = vit.norm(x), vit.num_prefix_tokens
    return Tokens(x[:, first_patch:], x[:, 0], torch.stack(rows, dim=1)[..., first_patch:])


def embed(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Return the tokens (B, T, D) of (B, 3, H, W) images before the first block: prefix tokens, then patches."""
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))


Attend = Callable[[Attention, Tensor, Tensor | None], tuple[Tensor, Any]]
"""Self-attention of (B, T, D) tokens under a mask; returns what it mixes, (B, T, D), and what it saw."""

RunBlock = Callable[[Block, Tensor, Tensor | None], tuple[Tensor, Any]]
"""Runs a block on (B, T, D) tokens under a mask; returns the block's output and what was seen in it."""


def run_block(block: Block, x: Tensor, mask: Tensor | None = None, attend: Attend | None = None) -> tuple[Tensor, Any]:
    """Run one block, and return its output with what `attend` saw: by default the class token's attention row."""
    mixed, seen = (attend or class_row)(block.attn, block.norm1(x), mask)
    x = x + block.drop_path1(block.ls1(mixed))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), seen


def plain_block(block: Block, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
    """Run one block as timm does, and return nothing that was seen."""
    return block(x, attn_mask=mask), None


def run_blocks(
    blocks: Iterable[Block], x: Tensor, masks: Sequence[Tensor | None] = (), run: RunBlock = run_block
) -> Iterator[tuple[Tensor, Any]]:
    """Run blocks one behind the other on tokens (B, T, D); yields after each its output and what `run` saw in it.

    masks: one per block, (T, T) booleans, true where the token of the row may attend to the token of the column. None,
    or no masks: everything may.
    """
    blocks = list(blocks)
    for block, mask in zip(blocks, masks or [None] * len(blocks), strict=True):
        x, seen = run(block, x, mask)
        yield x, seen


def class_row(attention: Attention, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return fused self-attention of (B, T, D) tokens, and the class token's row (B, heads, T) in float32."""
    batch, tokens, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    dropout = attention.attn_drop.p if attention.training else 0.0
    if x.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        # The one exception to fused attention: its backward pass on the CPU in bfloat16 takes 2.7 times as long as the
        # plain products (197 tokens, 3 heads of 32), which would be a third of a training step.
        # The mask is added within the product: a pass over the scores less.
        allowed = q.new_zeros(tokens, tokens)
        if mask is not None:
            allowed.masked_fill_(~mask, -torch.inf)
        scores = torch.baddbmm(allowed, (q * attention.scale).flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
        weights = scores.unflatten(0, q.shape[:2]).softmax(dim=-1)
        mixed = F.dropout(weights, dropout) @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    # Outside of autocast: a softmax over hundreds of nearly equal scores loses its differences in bfloat16.
    with torch.autocast(x.device.type, enabled=False):
        scores = (q[:, :, :1].float() * attention.scale) @ k.float().transpose(-2, -1)
        row = scores.softmax(dim=-1).squeeze(2)
    mixed = mixed.transpose(1, 2).reshape(batch, tokens, -1)
    return attention.proj_drop(attention.proj(attention.norm(mixed))), row


def _is_known(block: nn.Module) -> bool:
    attention = getattr(block, "attn", None)
    return type(attention) is Attention and not getattr(attention, "gate", None) and hasattr(block, "ls1")


def _check_tappable(vit: nn.Module, name: str) -> None:
    if not getattr(vit, "has_class_token", False):
        odd = "no class token, so there is no class-token attention to read"
    elif hasattr(vit, "dist_token"):
        odd = (
            "a distillation token, which classifies next to the class token: its attention would be left out, and it "
            "is no register"
        )
    else:
        unknown = [type(block).__name__ for block in vit.blocks if not _is_known(block)]
        odd = unknown and f"blocks that the attention tap does not know ({unknown[0]})"
    if odd:
        transformers = "a plain ViT, DeiT or DINOv2 with a class token, such as vit_mini, deit_small or dino_small"
        raise ParameterError(f"backbone {name!r} has {odd}", f"use {transformers}")
