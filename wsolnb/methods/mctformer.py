"""MCTformer (Xu et al., CVPR 2022): a vision transformer with one class token per category.

Every category has a token of its own, whose attention to the patches is a map of the category. A convolution over the
patch tokens gives a second map (the patch CAM). The product of the two maps localizes, and patch-to-patch attention
refines this product. For LPCAM the patch tokens are the local features and the convolution is the classifier.

    model = MCTformer(create_backbone("vit_mini", pretrained=True), num_classes=6)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from wsolnb.backbones import (
    ConformerBackbone,
    TransformerBackbone,
    normalisation,
    positioned_prefix,
    run_block,
    run_blocks,
)
from wsolnb.errors import ParameterError
from wsolnb.methods import register
from wsolnb.methods.base import LocalizationModel, pick


class MCTformerOutput(NamedTuple):
    """What one forward pass holds.

    logits: (B, C), mean of the two below. token_logits: (B, C), each class token averaged over its channels.
    patch_logits: (B, C), the semantic map averaged over the patches.
    semantic_map: (B, C, h, w), one map per class, before its ReLU. features: (B, D, h, w), the patch tokens.
    attention: (B, L, C, h, w) float32, class tokens to patches, mean over heads; L layers, the last ones.
    affinity: (B, N, N) float32, patches to patches, mean over heads and all layers; from a softmax over all tokens.
    Of version 1 `logits` are those of the class tokens; it has neither `patch_logits` nor `semantic_map`.
    """

    logits: Tensor
    token_logits: Tensor
    patch_logits: Tensor | None
    semantic_map: Tensor | None
    features: Tensor
    attention: Tensor
    affinity: Tensor


@register("mctformer")
class MCTformer(LocalizationModel):
    """A vision transformer of `wsolnb.backbones` whose class token is replaced by one per category.

    The tokens and their position start from the pretrained class token. Registers stay between the class tokens and the
    patches; no map counts them. Images may have any size: the position embedding is resampled to their grid.
    layers: number of last layers whose class attention is averaged.
    padding: of the 3 x 3 convolution over the patches, `zeros` as published, or `replicate`.
    final_norm: whether the last block's tokens are normalised; the released program does not.
    version: 2 (MCTformer-V2), or 1, which does not classify the patches: its one map is the attention.
    """

    maps = ("mctformer", "semantic", "attention")

    def __init__(
        self, backbone: TransformerBackbone, num_classes: int, layers: int = 3, padding: str = "zeros",
        final_norm: bool = True, version: Literal[1, 2] = 2,
    ):  # fmt: skip
        super().__init__()
        if not isinstance(backbone, TransformerBackbone) or isinstance(backbone, ConformerBackbone):
            problem = f"MCTformer needs a plain vision transformer, got {type(backbone).__name__}"
            raise ParameterError(problem, "use vit_mini, deit_small or another transformer of wsolnb.backbones")
        if version not in (1, 2):
            raise ParameterError(f"MCTformer of version {version!r}", "choose 1 or 2")
        self.backbone = backbone
        self.layers, self.final_norm = min(layers, backbone.depth), final_norm
        vit = backbone.vit
        start = vit.cls_token.detach()
        if positioned_prefix(vit):
            start = start + vit.pos_embed.detach()[:, :1]
        self.class_tokens = nn.Parameter(start.repeat(1, num_classes, 1))
        noise = torch.empty_like(self.class_tokens)
        # Equal tokens would differ by the loss of their own class only; noise as timm starts a class token with.
        self.class_tokens.data += nn.init.trunc_normal_(noise, std=0.02)
        if version == 1:
            self.semantic, self.maps = None, ("attention",)
            return
        self.semantic = nn.Conv2d(backbone.dim, num_classes, 3, padding=1, padding_mode=padding)
        nn.init.kaiming_normal_(self.semantic.weight, nonlinearity="relu")
        nn.init.zeros_(self.semantic.bias)

    @property
    def head(self) -> nn.Module:
        """The convolution over the patch tokens; version 1 has no new layer."""
        return self.semantic or nn.ModuleList()

    def forward(self, images: Tensor) -> MCTformerOutput:
        """Classify (B, 3, H, W) normalised images; H and W multiples of the patch size."""
        vit, size = self.backbone.vit, self.backbone.patch_size
        rows, columns = images.shape[2] // size, images.shape[3] // size
        if images.shape[2] % size or images.shape[3] % size:
            raise ParameterError(f"images of {tuple(images.shape[2:])} pixels", f"use multiples of {size}")
        patches = vit.patch_embed(images)
        positioned = positioned_prefix(vit)
        position = vit.pos_embed[:, positioned:]
        if (rows, columns) != self.backbone.grid:
            position = resample_abs_pos_embed(position, (rows, columns), self.backbone.grid, num_prefix_tokens=0)
        count = self.class_tokens.shape[1]
        prefix = [self.class_tokens]
        if vit.reg_token is not None:
            prefix.append(vit.reg_token + vit.pos_embed[:, 1:positioned] if positioned else vit.reg_token)
        prefix = torch.cat(prefix, dim=1)
        x = torch.cat([prefix.expand(len(images), -1, -1), patches + position], dim=1)
        x = vit.norm_pre(vit.pos_drop(x))
        masks, first = self._masks(rows, columns, count, x.device), prefix.shape[1]
        attention, affinity = [], 0.0
        for tokens, weights in run_blocks(vit.blocks, x, masks, partial(run_block, attend=_attend)):  # noqa: B007
            attention.append(weights[:, :count, first:])
            affinity = affinity + weights[:, first:, first:] / len(masks)
        x = vit.norm(tokens) if self.final_norm else tokens
        features = x[:, first:].mT.unflatten(2, (rows, columns))
        attention = torch.stack(attention[-self.layers :], dim=1).unflatten(3, (rows, columns))
        token_logits = x[:, :count].mean(dim=2)
        if self.semantic is None:
            return MCTformerOutput(token_logits, token_logits, None, None, features, attention, affinity)
        semantic_map = self.semantic(features)
        patch_logits = semantic_map.mean(dim=(2, 3))
        logits = (token_logits + patch_logits) / 2
        return MCTformerOutput(logits, token_logits, patch_logits, semantic_map, features, attention, affinity)

    def _masks(self, rows: int, columns: int, count: int, device: torch.device) -> list[Tensor | None]:
        """The backbone's masks (`Mixing`) with `count` class tokens in the place of one."""
        mixing, depth = self.backbone.mixing, self.backbone.depth
        if mixing is None:
            return [None] * depth
        repeats = torch.cat([torch.zeros(count, dtype=torch.long), torch.arange(1, rows * columns + 1)])
        one = mixing.masks(rows, columns, depth)
        return [mask if mask is None else mask[repeats][:, repeats].to(device) for mask in one]

    def loss(self, forward: Callable[[Tensor], Any], batch: dict[str, Any], label_smoothing: float = 0.0) -> Tensor:
        """Return the sum of the multi-label losses of class tokens and of patches.

        Labels are (B, C) of 0 and 1, or (B,) class indices of a single-label data set.
        """
        output, labels = forward(batch["image"]), batch["label"]
        if labels.ndim == 1:
            labels = F.one_hot(labels, output.token_logits.shape[1])
        logits = (z for z in (output.token_logits, output.patch_logits) if z is not None)
        return sum(F.multilabel_soft_margin_loss(z.float(), labels.float()) for z in logits)

    def localize(self, output: MCTformerOutput, classes: Tensor) -> dict[str, Tensor]:
        """Class attention (mean over the last layers), rectified semantic map, and their product; each (B, h, w)."""
        attention = pick(output.attention.mean(dim=1), classes)
        if output.semantic_map is None:
            return {"attention": attention}
        semantic = pick(output.semantic_map.float().relu(), classes)
        return {"mctformer": attention * semantic, "semantic": semantic, "attention": attention}


def refine(maps: Tensor, affinity: Tensor) -> Tensor:
    """Return maps (B, K, h, w) in which each patch is the affinity-weighted sum over all patches.

    affinity: (B, N, N), rows = the patch that attends.
    """
    return torch.einsum("bnm,bkm->bkn", affinity, maps.flatten(2)).view_as(maps)


class PatchTokens:
    """MCTformer-V2 as an `Extractor`: patch tokens, and the convolution summed over its positions.

    Raises ParameterError for version 1, which has no convolution.
    """

    def __init__(self, model: MCTformer):
        if model.semantic is None:
            raise ParameterError("MCTformer-V1 does not classify its patches", "use version 2")
        self.model = model.eval()
        self.mean, self.std = normalisation(model)
        self.weight = model.semantic.weight.detach().float().sum(dim=(2, 3))

    def __call__(self, images: Tensor) -> Tensor:
        """Return the patch tokens (B, D, h, w)."""
        size = self.model.backbone.patch_size
        fitting = [max(size, round(side / size) * size) for side in images.shape[2:]]
        if fitting != list(images.shape[2:]):
            images = F.interpolate(images, size=fitting, mode="bilinear", align_corners=False)
        return self.model(images).features


def _attend(attention: nn.Module, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Self-attention of (B, T, D) tokens, and its weights (B, T, T), mean over heads, float32."""
    batch, tokens, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    with torch.autocast(x.device.type, enabled=False):
        scores = (q.float() * attention.scale) @ k.float().transpose(-2, -1)
        weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1)
    mixed = attention.attn_drop(weights.to(v.dtype)) @ v
    mixed = mixed.transpose(1, 2).reshape(batch, tokens, -1)
    return attention.proj_drop(attention.proj(attention.norm(mixed))), weights.mean(dim=1)
