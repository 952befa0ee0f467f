"""SCM (Bai et al., ECCV 2022): a module that diffuses a transformer's attention over the graph of its patches.

The module is there in training only. The classification loss is taken behind the module, and so calibrates the
attention map and the semantic map in front of it. The product of these two maps localizes (sec. 3.3).

    model = SCM(create_backbone("vit_mini", pretrained=True), num_classes=12, config=SCMConfig.released())

The equations stand first, as https://arxiv.org/abs/2207.10447 writes them: matrices over all pairs of patches. The
module runs `diffuse` of `wsolnb.methods.stencil`, which gives the same without a matrix.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from wsolnb.backbones import TransformerBackbone
from wsolnb.methods import register
from wsolnb.methods.base import pick
from wsolnb.methods.stencil import diffuse, laplacian
from wsolnb.methods.tscam import TSCAM, TSCAMOutput

__all__ = [
    "SCM",
    "ActivationDiffusionBlock",
    "Maps",
    "SCMConfig",
    "SpatialCalibration",
    "diffuse",
    "laplacian",
    "min_max",
    "newton_schulz",
    "plain_diffuse",
    "plain_laplacian",
    "tanh_shrink",
]

TINY = 1e-30
"""Values up to this count as zero. Ranges behind tanhShrink are 1e-9 and less; a floor near them would switch the
filter off."""

# Equations 3 to 7, as the paper writes them


def plain_laplacian(tokens: Tensor, lam: Tensor | float) -> Tensor:
    """Return L = (D - A) * (lam E - 1), (B, N, N), of (B, Q, h, w) tokens (eq. 3 and 4); N = h w, row by row.

    E: cosine similarity of the tokens of two patches (eq. 3). A: adjacency of patches that share an edge; D: degrees.
    """
    rows, columns = tokens.shape[2:]
    unit = F.normalize(tokens.flatten(2), dim=1)
    similarity = unit.mT @ unit
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(tokens.device)
    adjacency = ((place[:, None] - place[None]).abs().sum(dim=2) == 1).to(tokens)
    return (adjacency.sum(dim=1).diag() - adjacency) * (lam * similarity - 1)


def newton_schulz(matrix: Tensor, steps: int, alpha: float, constant_start: bool = False) -> Tensor:
    """Return X_p of eq. 6 for (B, N, N) matrices, the inverse of a matrix by p steps of Newton and Schulz.

    steps: p. constant_start: hold X_0 = alpha L^T constant when differentiating, as the released code does.
    """
    x = alpha * matrix.mT
    if constant_start:
        x = x.detach()
    for _ in range(steps):
        x = 2 * x - x @ (matrix @ x)
    return x


def plain_diffuse(attention: Tensor, tokens: Tensor, lam: Tensor | float, steps: int, alpha: float = 0.002) -> Tensor:
    """Return X_p F (B, h, w) of the attention F (B, h, w), eq. 5 and 6; the arguments are those of `diffuse`."""
    inverse = newton_schulz(plain_laplacian(tokens, lam), steps, alpha)
    return (inverse @ attention.flatten(1)[..., None]).view_as(attention)


SERIES = (1 / 3, -2 / 15, 17 / 315, -62 / 2835, 1382 / 155925, -21844 / 6081075, 929569 / 638512875)
SERIES += (-6404582 / 10854718875,)
"""Coefficients of x^3, x^5, ..., x^17 in x - tanh(x)."""


def tanh_shrink(x: Tensor) -> Tensor:
    """Return x - tanh(x). It is about x^3 / 3 near 0, so small values vanish.

    The difference cancels near 0, so below 0.15 its series is used.
    """
    small = x.clamp(-0.15, 0.15)  # elsewhere the series would overflow, and 0 times its derivative be NaN
    square, series = small * small, torch.zeros_like(x)
    for coefficient in reversed(SERIES):
        series = series * square + coefficient
    return torch.where(x.abs() < 0.15, small * square * series, x - x.tanh())


def min_max(x: Tensor) -> Tensor:
    """Scale each map (B, h, w) to [0, 1], whatever its magnitude.

    A constant map becomes 0, and so does one whose range is below 1e-30, where float32 has no digits left.
    """
    low, high = x.amin(dim=(1, 2), keepdim=True), x.amax(dim=(1, 2), keepdim=True)
    return (x - low) / _or_one(high - low) * (high - low > TINY)


def _or_one(x: Tensor) -> Tensor:
    """Return x with 1 in place of what is at most `TINY`: a divisor for numerators that vanish there."""
    return torch.where(x > TINY, x, torch.ones_like(x))


class SCMConfig(BaseModel):
    """Everything that paper and released code do differently, and the hyperparameters.

    blocks: number of activation diffusion blocks. steps: Newton-Schulz steps p of each block but the first, which has
    `first_steps`. alpha: of X_0. lam, beta: starting values of the learnable parameters of each block.
    attention: F^0 is the mean over layers and heads (eq. 1), or that mean scaled by min and max to [0, 1]. The map at
    test time couples the same F^0 with the semantic map.
    filter: `absolute` is eq. 7; `relative` = tanhShrink(F / t), t = beta times the maximum of the block's incoming F,
    then min-max.
    residual: a block passes on S + S * T and F + T (fig. 2's caption says that the drawing omits these connections "for
    simplicity"). Without it a block passes on S * T and T, as the text of sec. 3.2 reads without the caption.
    constant_start: hold X_0 constant when differentiating.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    blocks: int = Field(4, ge=1)
    steps: int = Field(4, ge=0, le=32)
    first_steps: int = Field(4, ge=0, le=32)
    alpha: float = Field(0.002, gt=0)
    lam: float = 1.0
    beta: float = Field(0.5, gt=0)
    attention: Literal["mean", "min_max"] = "mean"
    filter: Literal["absolute", "relative"] = "absolute"
    residual: bool = True
    constant_start: bool = False

    @classmethod
    def paper(cls, **changes: Any) -> SCMConfig:
        """The paper's settings."""
        return cls(**changes)

    @classmethod
    def released(cls, **changes: Any) -> SCMConfig:
        """The released code's settings."""
        preset = {"first_steps": 16, "attention": "min_max", "filter": "relative"}
        return cls(**preset | {"constant_start": True} | changes)


class Maps(NamedTuple):
    """Attention F (B, h, w) and semantic map S (B, C, h, w) at one place between the blocks."""

    attention: Tensor
    semantic: Tensor


class ActivationDiffusionBlock(nn.Module):
    """One block (sec. 3.2): similarity, diffusion, filter, and the update of both maps.

    lam, beta: its learnable parameters. beta counts as at least 1e-6.
    """

    def __init__(self, config: SCMConfig, first: bool = False):
        super().__init__()
        self.config, self.steps = config, config.first_steps if first else config.steps
        self.lam, self.beta = nn.Parameter(torch.tensor(config.lam)), nn.Parameter(torch.tensor(config.beta))

    def diffuse(self, attention: Tensor, semantic: Tensor) -> Tensor:
        """Return the diffused F (B, h, w)."""
        c = self.config
        return diffuse(attention, semantic, self.lam, self.steps, c.alpha, c.constant_start)

    def filter(self, diffused: Tensor, incoming: Tensor) -> Tensor:
        """Return T (B, h, w): eq. 7, or relative to the maximum of the block's incoming attention."""
        beta = self.beta.clamp(min=1e-6)
        if self.config.filter == "absolute":
            return beta * tanh_shrink(diffused / beta)
        threshold = beta * incoming.to(diffused.dtype).amax(dim=(1, 2), keepdim=True)
        return min_max(tanh_shrink(diffused / _or_one(threshold)))

    def forward(self, attention: Tensor, semantic: Tensor) -> Maps:
        """Return F^{l+1} and S^{l+1} of F^l (B, h, w) and S^l (B, C, h, w)."""
        kept = self.filter(self.diffuse(attention, semantic), attention)
        if self.config.residual:
            return Maps(attention + kept, semantic + semantic * kept[:, None])
        return Maps(kept, semantic * kept[:, None])


class SpatialCalibration(nn.Module):
    """The cascade of activation diffusion blocks (sec. 3.1)."""

    def __init__(self, config: SCMConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(ActivationDiffusionBlock(config, first=i == 0) for i in range(config.blocks))

    def start(self, attention: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return F^0 (B, h, w), float32 or better, of the class token's rows (B, L, heads, h * w); grid: (h, w)."""
        kind = torch.promote_types(attention.dtype, torch.float32)
        mean = attention.to(kind).mean(dim=(1, 2)).unflatten(1, grid)
        return min_max(mean) if self.config.attention == "min_max" else mean

    def forward(self, attention: Tensor, semantic: Tensor) -> list[Maps]:
        """Return the maps in front of the first block, between the blocks, and behind the last one.

        attention: the class token's rows (B, L, heads, h * w). semantic: S^0 (B, C, h, w).
        """
        first = self.start(attention, semantic.shape[2:])
        maps = [Maps(first, semantic.to(first.dtype))]
        for block in self.blocks:
            maps.append(block(*maps[-1]))
        return maps


@register("scm")
class SCM(TSCAM):
    """TS-CAM that is trained behind the spatial calibration module.

    In training the logits are the mean of S^L. In evaluation they are those of TS-CAM, so the module costs nothing. The
    map is S^0 * F^0 (sec. 3.3). It differs from that of TS-CAM if `config.attention` scales F^0. config: default
    `SCMConfig.paper()`. options: of TS-CAM.
    """

    def __init__(
        self,
        backbone: TransformerBackbone,
        num_classes: int,
        config: SCMConfig | dict[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__(backbone, num_classes, **options)
        self.calibration = SpatialCalibration(SCMConfig.model_validate(config or SCMConfig.paper()))

    @property
    def head(self) -> nn.Module:
        """The convolution that makes the semantic map, and the blocks' lambda and beta."""
        return nn.ModuleList([self.semantic, self.calibration])

    def scalars(self) -> dict[str, float]:
        """Return lambda and beta of each block, counted from 1."""
        blocks = list(enumerate(self.calibration.blocks, 1))
        return {
            f"{name}_{i}": float(value.detach())
            for i, b in blocks
            for name, value in (("lambda", b.lam), ("beta", b.beta))
        }

    def forward(self, images: Tensor) -> TSCAMOutput:
        """Classify (B, 3, H, W) normalised images."""
        output = super().forward(images)
        if not self.training:
            return output
        last = self.calibration(output.attention, output.semantic_map)[-1]
        return output._replace(logits=last.semantic.mean(dim=(2, 3)))

    def localize(self, output: TSCAMOutput, classes: Tensor) -> dict[str, Tensor]:
        """Attention map F^0, semantic map S^0 of one class per image, and their product; each (B, h, w)."""
        semantic = pick(output.semantic_map, classes).float()
        attention = self.calibration.start(output.attention, semantic.shape[1:]).float()
        return {"tscam": attention * semantic, "semantic": semantic, "attention": attention}
