"""Feature extractors through timm, and a tap that reads the class token's attention from fused attention.

A transformer here returns its patch tokens and, for every layer and head, the row of the attention matrix that belongs
to the class token: all that TS-CAM, SCM and LocLoc need of it. The N x N matrices are never built: the row is one query
against all keys, next to the fused attention that the forward pass runs anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import Attention, resample_abs_pos_embed
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from wsolnb import weights
from wsolnb.conformer import UNUSED, Conformer
from wsolnb.data.loading import IMAGENET_MEAN, IMAGENET_STD
from wsolnb.errors import ParameterError, WeightsError, nearest

TRANSFORMERS = {
    "deit_tiny": "deit_tiny_patch16_224.fb_in1k",
    "deit_small": "deit_small_patch16_224.fb_in1k",
    "deit_base": "deit_base_patch16_224.fb_in1k",
    "vit_small": "vit_small_patch16_224.augreg_in1k",
    "dino_small": "vit_small_patch16_224.dino",
}
RESNETS = {"resnet18": "resnet18.tv_in1k", "resnet50": "resnet50.tv_in1k", "resnet101": "resnet101.tv_in1k"}
MINI = ("vit_mini", "vit_mini_dino", "vit_mini_dino_co", "vit_mini_plain", "resnet_mini")
"""Backbones small enough for two CPU cores. All but `vit_mini_plain` have embedded pretrained weights
(`wsolnb.weights`). `vit_mini_dino` and `vit_mini_dino_co` have self-distilled weights, the latter with attention that
was told what two frames have in common; `vit_mini_plain` is an ordinary small vision transformer, in which every token
attends to every other, to be trained from scratch."""

CONFORMERS = {"conformer_tiny": (64, 384, 12, 6), "conformer_small": (256, 384, 12, 6)}
"""First stage's channels, token width, depth and heads."""

BACKBONES = (*TRANSFORMERS, *CONFORMERS, *RESNETS, *MINI)


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
    """Which tokens of `vit_mini` exchange what: it keeps patch tokens local, so that they tell what is *there*.

    local_layers: in that many first layers a patch attends only to patches at most `radius` rows and columns away.
    sees_class: whether patches attend to the class token, which would hand the whole image's content to each of them.
    bound: largest magnitude of an attention score; None = unbounded. A bound keeps a softmax from choosing one token.
    """

    local_layers: int = 2
    radius: int = 2
    sees_class: bool = False
    bound: float | None = 3.0

    def masks(self, rows: int, columns: int, depth: int) -> list[Tensor | None]:
        """Return per layer which token (row) may attend to which (column): (1 + N, 1 + N) booleans, None = all."""
        tokens = 1 + rows * columns
        row, column = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
        far = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs()) > self.radius
        masks: list[Tensor | None] = []
        for layer in range(depth):
            allowed = torch.ones(tokens, tokens, dtype=torch.bool)
            allowed[1:, 0] = self.sees_class
            if layer < self.local_layers:
                allowed[1:, 1:] = ~far
            masks.append(None if allowed.all() else allowed)
        return masks


PLAIN = Mixing(local_layers=0, sees_class=True, bound=None)
"""Every token attends to every other, with unbounded scores: an ordinary transformer."""

MIXING = {
    "vit_mini": Mixing(local_layers=4),
    "vit_mini_dino": Mixing(),
    "vit_mini_dino_co": Mixing(),
    "vit_mini_plain": PLAIN,
}
"""How the mini transformers exchange tokens unless told otherwise: as their embedded weights were made."""


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
        if patch_size != 8 or img_size % 8:
            raise ParameterError(
                f"ConvStem was given patch {patch_size}, image {img_size}", "use patch 8 and a multiple of 8"
            )
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


class TransformerBackbone(nn.Module):
    """A timm vision transformer with a class token.

    dim: token width D. depth: layers L. heads: attention heads. grid: (rows, columns) of patches.
    image_size: side of the input in pixels.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD  # PLACEHOLDER

    def __init__(
        self, vit: VisionTransformer, name: str, image_size: int, patch_size: int, mixing: Mixing | None = None
    ):
        super().__init__()
        _check_tappable(vit, name)
        self.vit, self.mixing = vit, mixing
        self.name, self.image_size, self.patch_size = name, image_size, patch_size
        self.dim, self.depth = vit.embed_dim, len(vit.blocks)
        self.heads = vit.blocks[0].attn.num_heads
        self.grid = (image_size // patch_size, image_size // patch_size)
        masks = mixing.masks(*self.grid, self.depth) if mixing else []
        # Buffers, so that they follow the model to its device; equal ones are kept once.
        self._mask_names: list[str | None] = []
        for layer, mask in enumerate(masks):
            same = next((name for name in self._mask_names if name and torch.equal(getattr(self, name), mask)), None)
            if mask is not None and same is None:
                same = f"mask_{layer}"
                self.register_buffer(same, mask, persistent=False)
            self._mask_names.append(same if mask is not None else None)

    @property
    def masks(self) -> list[Tensor | None]:
        """Which token may attend to which in each layer (see `Mixing.masks`); empty = everywhere."""
        return [name and getattr(self, name) for name in self._mask_names]

    def forward(self, images: Tensor) -> Tokens:
        """Run the transformer on (B, 3, H, W) normalised images.

        Raises ParameterError when the images are not of the size that the position embedding was made for.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2:] != (self.image_size, self.image_size):
            raise ParameterError(
                f"{self.name} was built for (B, 3, {self.image_size}, {self.image_size}) images, got "
                f"{tuple(images.shape)}",
                f"resize the images or build the backbone with image_size={images.shape[-1]}",
            )
        return self._tokens(images)

    def _tokens(self, images: Tensor) -> Tokens:
        return forward_tapped(self.vit, images, self.masks)


class ConformerBackbone(TransformerBackbone):
    """Conformer: patch and class tokens of its transformer branch. Attributes as of `TransformerBackbone`."""

    def __init__(self, conformer: Conformer, name: str, image_size: int):
        nn.Module.__init__(self)
        self.vit, self.mixing = conformer, None
        self.name, self.image_size, self.patch_size = name, image_size, 16
        self.dim, self.depth, self.heads = conformer.embed_dim, conformer.depth, conformer.heads
        self.grid = (image_size // 16, image_size // 16)
        self._mask_names = []

    def _tokens(self, images: Tensor) -> Tokens:
        x, rows = self.vit(images, _run_block)
        return Tokens(x[:, 1:], x[:, 0], torch.stack(rows, dim=1)[..., 1:])


def forward_tapped(vit: VisionTransformer, images: Tensor, masks: Sequence[Tensor | None] = ()) -> Tokens:
    """Run a timm vision transformer and return its tokens with the class token's attention rows.

    The same computation as `vit.forward_features`, block by block. The tokens are equal to timm's.
    masks: one per layer, (T, T) booleans, true where the token of the row may attend to the token of the column; the
    class token's row must be all true. None, or no masks: everything may.
    """
    x = vit._pos_embed(vit.patch_embed(images))
    x = vit.norm_pre(vit.patch_drop(x))
    rows = []
    for block, mask in zip(vit.blocks, masks or [None] * len(vit.blocks), strict=True):
        x, row = _run_block(block, x, mask)
        rows.append(row)
    x = vit.norm(x)
    first_patch = vit.num_prefix_tokens
    attention = torch.stack(rows, dim=1)[..., first_patch:]
    return Tokens(x[:, first_patch:], x[:, 0], attention)


def _run_block(block: Block, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    mixed, row = _attend(block.attn, block.norm1(x), mask)
    x = x + block.drop_path1(block.ls1(mixed))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), row


def _attend(attention: Attention, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fused self-attention of (B, T, D) tokens, and the class token's row (B, heads, T) in float32."""
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


def _check_tappable(vit: nn.Module, name: str) -> None:
    if not getattr(vit, "has_class_token", False):
        raise ParameterError(
            f"backbone {name!r} has no class token, so there is no class-token attention to read",
            f"use one of {', '.join([*TRANSFORMERS, *CONFORMERS, 'vit_mini'])}",
        )
    for block in vit.blocks:
        attention = getattr(block, "attn", None)
        if type(attention) is not Attention or attention.gate is not None or not hasattr(block, "ls1"):
            raise ParameterError(
                f"backbone {name!r} has blocks that the attention tap does not know ({type(attention).__name__})",
                f"use one of {', '.join([*TRANSFORMERS, *CONFORMERS, 'vit_mini'])}",
            )


class ConvBackbone(nn.Module):
    """A timm ResNet without its classifier, with a final map of stride 8 or 16.

    dim: channels of the final map. stride: pixels per cell of the final map.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD  # PLACEHOLDER

    def __init__(self, resnet: ResNet, name: str, stride: int):
        super().__init__()
        resnet.reset_classifier(0, "")
        # Channels last: a training step on the CPU takes two thirds of the time, and a GPU's tensor cores want it so.
        self.resnet = resnet.to(memory_format=torch.channels_last)
        self.name, self.stride, self.dim = name, stride, resnet.num_features

    def forward(self, images: Tensor) -> Tensor:
        """Return the final feature map (B, dim, H / stride, W / stride) of (B, 3, H, W) normalised images."""
        return self.resnet.forward_features(images)


def create_backbone(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    image_size: int | None = None,
    output_stride: int = 16,
    drop_path: float = 0.0,
    mixing: Mixing | None = None,
) -> TransformerBackbone | ConvBackbone:
    """Build a backbone by its short name (`BACKBONES`).

    pretrained: load the published weights through timm (from its cache, else from the network); of the mini ones, the
        embedded weights, after checking their hash.
    checkpoint: a local `.safetensors`, `.pth` or `.pt` file of weights instead; loaded without executing any code.
    image_size: side of the input; default 224, for the mini ones 112. Position embeddings are resized to it.
    output_stride: stride of a ResNet's final map, 8, 16 or 32. drop_path: stochastic depth of transformers.
    mixing: of the mini transformers; default that of `MIXING`.

    Raises ParameterError for unknown names, WeightsError when weights are missing or do not fit.
    """
    if name not in BACKBONES:
        raise ParameterError(f"unknown backbone {name!r}{nearest(name, BACKBONES)}", f"one of {', '.join(BACKBONES)}")
    if pretrained and checkpoint:
        raise ParameterError("both pretrained=True and a checkpoint were given", "choose one")
    if pretrained and name in MINI:
        checkpoint = weights.verified(name)
    if name in RESNETS or name == "resnet_mini":
        if name == "resnet_mini":
            widths = (32, 64, 128, 256)
            model = ResNet(BasicBlock, (1, 1, 1, 1), channels=widths, stem_width=32, output_stride=output_stride)
        else:
            model = _timm_model(RESNETS[name], pretrained, output_stride=output_stride)
        backbone = ConvBackbone(model, name, output_stride)
    elif name in MINI:
        size = image_size or 112
        mixing = mixing or MIXING[name]
        model = VisionTransformer(
            img_size=size, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=0, global_pool="token",
            embed_layer=ConvStem, drop_path_rate=drop_path,
        )  # fmt: skip
        if mixing.bound is not None:
            for block in model.blocks:
                block.attn.q_norm = block.attn.k_norm = BoundedNorm(mixing.bound, block.attn.head_dim)
        backbone = TransformerBackbone(model, name, size, 8, mixing)
    elif name in CONFORMERS:
        if pretrained:
            raise WeightsError(
                f"no library holds the weights of {name!r}",
                "download Conformer_small_patch16.pth or _tiny_ from the links of https://github.com/pengzhiliang/"
                "Conformer and give its path as the checkpoint",
            )
        size = image_size or 224
        if size % 16:
            raise ParameterError(f"{name} cannot take images of side {size}", "use a multiple of 16")
        model = Conformer(*CONFORMERS[name], drop_path=drop_path)
        backbone = ConformerBackbone(model, name, size)
    else:
        size = image_size or 224
        model = _timm_model(TRANSFORMERS[name], pretrained, num_classes=0, img_size=size, drop_path_rate=drop_path)
        backbone = TransformerBackbone(model, name, size, 16)
    if checkpoint:
        load_weights(model, checkpoint)
    return backbone


def _timm_model(timm_name: str, pretrained: bool, **options) -> nn.Module:
    try:
        return timm.create_model(timm_name, pretrained=pretrained, **options)
    except (OSError, RuntimeError, ValueError) as error:
        if not pretrained:
            raise
        # timm reports an unreachable hub, a missing file and a full disk through many exception types.
        raise WeightsError(
            f"the pretrained weights {timm_name!r} could not be loaded: {str(error).splitlines()[0]}",
            f"on a machine with network run: python -c \"import timm; timm.create_model('{timm_name}', "
            f'pretrained=True)" and copy its Hugging Face cache (HF_HOME) here; or download model.safetensors of '
            f"https://huggingface.co/timm/{timm_name} and give its path as the checkpoint",
        ) from error


def _resized(pos_embed: Tensor, vit: VisionTransformer) -> Tensor:
    """Resample a position embedding (1, prefix + n * n, D) to the grid of `vit`, if it is of a square grid."""
    cells = pos_embed.shape[1] - vit.num_prefix_tokens
    if pos_embed.ndim != 3 or math.isqrt(cells) ** 2 != cells or pos_embed.shape[2] != vit.embed_dim:
        return pos_embed  # reported as a tensor of another shape
    side = math.isqrt(vit.patch_embed.num_patches)
    return resample_abs_pos_embed(pos_embed.float(), (side, side), num_prefix_tokens=vit.num_prefix_tokens)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a local state dict into `model`; classifier heads that it does not have are left out.

    A position embedding of another square grid is resampled to the model's.

    Raises WeightsError when the file is missing, damaged, or misses or changes the shape of a tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no checkpoint at {path}", "check the path; .safetensors, .pth and .pt files are read")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"cannot read weights from {path}: {type(error).__name__}: {error}",
            "download it again; pickled objects other than tensors are refused",
        ) from error
    for wrapper in ("model", "state_dict", "teacher"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    own = model.state_dict()
    if "pos_embed" in own and "pos_embed" in state and own["pos_embed"].shape != state["pos_embed"].shape:
        state["pos_embed"] = _resized(state["pos_embed"], model)
    missing = [name for name in own if name not in state]
    reshaped = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or reshaped:
        name = (missing or reshaped)[0]
        told = "misses it" if missing else f"has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        raise WeightsError(
            f"{path} does not fit the model: {len(missing)} tensors missing, {len(reshaped)} of another shape; "
            f"first: {name!r} ({told})",
            "build the backbone with the name and image size that the weights were made for",
        )
    extra = [name for name in state if name not in own and not name.startswith(("head", "fc.", "classifier", *UNUSED))]
    if extra:
        raise WeightsError(
            f"{path} holds {len(extra)} tensors that the model lacks; first: {extra[0]!r}",
            "build the backbone that the weights were made for",
        )
    model.load_state_dict({name: state[name] for name in own})
