"""SCM (Bai et al., ECCV 2022): a module that diffuses a transformer's attention over the graph of its patches.

It is there in training only: the classification loss is taken behind it, and so calibrates the attention map and the
semantic map in front of it, whose product localizes (sec. 3.3).

    model = SCM(create_backbone("vit_mini", pretrained=True), num_classes=12, config=SCMConfig.released())
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from wsolnb.backbones import TransformerBackbone
from wsolnb.errors import ParameterError
from wsolnb.methods import register
from wsolnb.methods.tscam import TSCAM, TSCAMOutput

DENSE_ABOVE = 8
"""Most Newton-Schulz steps that are done as stencil products; 2**p of them take longer than p squares of matrices."""

EPS = 1e-6


class Laplacian(NamedTuple):
    """The semantic-aware Laplacian of a grid of patches (eq. 4): symmetric, five numbers a row.

    diagonal: (B, h, w). right: (B, h, w - 1), between a patch and its right neighbour. down: (B, h - 1, w).
    """

    diagonal: Tensor
    right: Tensor
    down: Tensor

    def __matmul__(self, x: Tensor) -> Tensor:
        """Return L x for (..., B, h, w) values x."""
        y = self.diagonal * x
        y[..., :, :-1] += self.right * x[..., :, 1:]
        y[..., :, 1:] += self.right * x[..., :, :-1]
        y[..., :-1, :] += self.down * x[..., 1:, :]
        y[..., 1:, :] += self.down * x[..., :-1, :]
        return y

    def dense(self) -> Tensor:
        """Return the matrices (B, N, N), N = h * w in row-major order."""
        batch, rows, columns = self.diagonal.shape
        index = torch.arange(rows * columns, device=self.diagonal.device).view(rows, columns)
        matrix = torch.diag_embed(self.diagonal.flatten(1))
        for i, j, value in (
            (index[:, :-1], index[:, 1:], self.right),
            (index[:-1], index[1:], self.down),
        ):
            i, j, value = i.flatten(), j.flatten(), value.flatten(1)
            matrix = matrix.index_put((torch.arange(batch, device=i.device)[:, None], i[None], j[None]), value)
            matrix = matrix.index_put((torch.arange(batch, device=i.device)[:, None], j[None], i[None]), value)
        return matrix


def laplacian(tokens: Tensor, lam: Tensor | float) -> Laplacian:
    """Return L = (D - A) * (lam E - 1) of (B, Q, h, w) tokens (eq. 3 and 4), element by element.

    D, A: degrees and adjacency of the grid's four-neighbourhood. E: cosine similarity of two patches' tokens; that of a
    zero token (no element above 1e-30) is 0, to itself too, and so is its derivative. At lam = 1 the diagonal of
    nonzero tokens is 0.
    """
    rows, columns = tokens.shape[2:]
    degree = tokens.new_zeros(rows, columns)
    degree[1:] += 1
    degree[:-1] += 1
    degree[:, 1:] += 1
    degree[:, :-1] += 1
    itself, right, down = _Similarity.apply(tokens)
    # Off the diagonal D - A is -1.
    return Laplacian(degree * (lam * itself - 1), 1 - lam * right, 1 - lam * down)


class _Similarity(torch.autograd.Function):
    """Cosine similarity (eq. 3) of each token to itself, to its right and to its lower neighbour.

    With unit vectors u and similarities E_ij = u_i u_j, whose derivatives come in as g_ij, that of a token t_i is
    sum_j g_ij (u_j - E_ij u_i) / |t_i|: one pass over the tokens per neighbour.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # To magnitude 1 first: behind a few blocks tokens are so small that their squares vanish.
        largest = torch.maximum(tokens.amax(dim=1, keepdim=True), -tokens.amin(dim=1, keepdim=True))
        nonzero = largest > 1e-30
        unit = tokens / torch.where(nonzero, largest, 1)
        length = (unit * unit).sum(dim=1, keepdim=True).sqrt()
        unit = unit.mul_(nonzero / torch.where(nonzero, length, 1))
        right = (unit[..., :, :-1] * unit[..., :, 1:]).sum(dim=1)
        down = (unit[..., :-1, :] * unit[..., 1:, :]).sum(dim=1)
        ctx.save_for_backward(unit, nonzero / torch.where(nonzero, largest * length, 1), right, down)
        itself = nonzero[:, 0].to(tokens.dtype)  # its derivative is 0
        ctx.mark_non_differentiable(itself)
        return itself, right, down

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _itself: Tensor, by_right: Tensor, by_down: Tensor) -> Tensor:
        unit, inverse_length, right, down = ctx.saved_tensors
        own = torch.zeros_like(inverse_length[:, 0])
        for ahead, behind, weighted in (
            (own[..., :, :-1], own[..., :, 1:], by_right * right),
            (own[..., :-1, :], own[..., 1:, :], by_down * down),
        ):
            ahead -= weighted
            behind -= weighted
        by = unit * own[:, None]
        by_right, by_down = by_right[:, None], by_down[:, None]
        by[..., :, :-1].addcmul_(by_right, unit[..., :, 1:])
        by[..., :, 1:].addcmul_(by_right, unit[..., :, :-1])
        by[..., :-1, :].addcmul_(by_down, unit[..., 1:, :])
        by[..., 1:, :].addcmul_(by_down, unit[..., :-1, :])
        return by.mul_(inverse_length)


class _Stencil(torch.autograd.Function):
    """X_p F by products of the stencil with maps.

    From X_{p+1} = X_p (2I - L X_p) follows I - L X_p = (I - L X_0)^(2^p), hence X_p = X_0 sum_{k < 2^p} (I - L X_0)^k.
    With X_0 = alpha L the k-th term is y_{k+1} = y_k - alpha L (L y_k).
    """

    @staticmethod
    def forward(
        ctx: Any, diagonal: Tensor, right: Tensor, down: Tensor, x: Tensor, steps: int, alpha: float, constant: bool
    ) -> Tensor:
        matrix = Laplacian(diagonal, right, down)
        terms, products = [x], []
        for _ in range(2**steps - 1):
            products.append(matrix @ terms[-1])
            terms.append(torch.sub(terms[-1], matrix @ products[-1], alpha=alpha))
        total = torch.stack(terms).sum(dim=0)
        ctx.save_for_backward(diagonal, right, down, total, *terms, *products)
        ctx.alpha, ctx.constant = alpha, constant
        return alpha * (matrix @ total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        diagonal, right, down, total, *saved = ctx.saved_tensors
        count = (len(saved) + 1) // 2
        terms, products = saved[:count], saved[count:]
        matrix, alpha = Laplacian(diagonal, right, down), ctx.alpha
        first = alpha * (matrix @ grad)  # the derivative by every term of the sum
        adjoint, adjoints, moved = first, [], []
        for _ in range(count - 1):
            adjoints.append(adjoint)
            moved.append(matrix @ adjoint)
            adjoint = torch.sub(first + adjoint, matrix @ moved[-1], alpha=alpha)
        # Pairs (u, v) whose outer products u v^T sum to the derivative by L; held at X_0 = alpha L, one of each step's
        # two factors L, and the one in front, do not count.
        left, other, scale = [], [], []
        if count > 1:
            back = adjoints[::-1]
            left.append(torch.stack(back)), other.append(torch.stack(products)), scale.append(-alpha)
            if not ctx.constant:
                left.append(torch.stack(moved[::-1])), other.append(torch.stack(terms[:-1])), scale.append(-alpha)
        if not ctx.constant:
            left.append(grad[None]), other.append(total[None]), scale.append(alpha)
        by = [torch.zeros_like(part) for part in matrix]
        for u, v, factor in zip(left, other, scale, strict=True):
            by[0] += factor * (u * v).sum(dim=0)
            by[1] += factor * (u[..., :-1] * v[..., 1:] + u[..., 1:] * v[..., :-1]).sum(dim=0)
            by[2] += factor * (u[..., :-1, :] * v[..., 1:, :] + u[..., 1:, :] * v[..., :-1, :]).sum(dim=0)
        return (*by, adjoint, None, None, None)


def newton_schulz(matrix: Tensor, steps: int, alpha: float, constant_start: bool = False) -> Tensor:
    """Return X_p of eq. 6 for (B, N, N) matrices, as the paper writes it: what `diffuse` is compared with.

    steps: p. constant_start: hold X_0 = alpha L^T constant when differentiating, as the released code does.
    """
    x = alpha * matrix.mT
    if constant_start:
        x = x.detach()
    for _ in range(steps):
        x = 2 * x - x @ (matrix @ x)
    return x


def diffuse(
    attention: Tensor,
    tokens: Tensor,
    lam: Tensor | float,
    steps: int,
    alpha: float = 0.002,
    constant_start: bool = False,
) -> Tensor:
    """Return the diffused attention X_p F (B, h, w), eq. 3 to 6, without the matrix X_p.

    attention: F (B, h, w). tokens: what the similarity is taken of, the semantic map S (B, C, h, w). lam: intensity of
    the semantics; less diffuses wider. steps: p; up to `DENSE_ABOVE` the p-step iterate is applied as 2^p - 1 pairs of
    stencil products, above by squares of matrices. alpha: of X_0 = alpha L^T. constant_start: as in `newton_schulz`.

    Computed in float32 or better. Linear in F, so zero attention stays zero. Raises ParameterError for shapes that do
    not fit.
    """
    if attention.ndim != 3 or tokens.ndim != 4 or attention.shape != tokens[:, 0].shape:
        raise ParameterError(
            f"attention {tuple(attention.shape)} and tokens {tuple(tokens.shape)} do not fit",
            "give (B, h, w) and (B, Q, h, w)",
        )
    if steps < 0:
        raise ParameterError(f"{steps} Newton-Schulz steps", "give 0 or more")
    with torch.autocast(attention.device.type, enabled=False):
        kind = torch.promote_types(attention.dtype, torch.float32)
        attention, tokens = attention.to(kind), tokens.to(kind)
        matrix = laplacian(tokens, lam)
        if steps > DENSE_ABOVE:
            values = attention.flatten(1)[..., None]
            return _squares(matrix.dense(), values, steps, alpha, constant_start).view_as(attention)
        return _Stencil.apply(*matrix, attention, steps, alpha, constant_start)


def tanh_shrink(x: Tensor) -> Tensor:
    """Return x - tanh(x): about x^3 / 3 near 0, so that what is small vanishes.

    The difference cancels near 0, so below 0.08 its series is used.
    """
    square = x * x
    series = x * square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * 62 / 2835)))
    return torch.where(x.abs() < 0.08, series, x - x.tanh())


def min_max(x: Tensor) -> Tensor:
    """Scale each map (B, h, w) to [0, 1]; a constant one becomes 0."""
    low, high = x.amin(dim=(1, 2), keepdim=True), x.amax(dim=(1, 2), keepdim=True)
    return (x - low) / (high - low).clamp(min=EPS)


def _squares(matrix: Tensor, x: Tensor, steps: int, alpha: float, constant_start: bool) -> Tensor:
    """Return X_p x for (B, N, N) matrices and (B, N, 1) values, by p - 1 products of matrices.

    With R = I - L X_0 the sum in `_Stencil` is the product of I + R^(2^i) over i < p.
    """
    start = alpha * matrix.mT
    if constant_start:
        start = start.detach()
    power = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device) - matrix @ start
    for step in range(steps):
        x = x + power @ x
        if step + 1 < steps:
            power = power @ power
    return start @ x


class SCMConfig(BaseModel):
    """Everything that paper and released code do differently, and the hyperparameters.

    blocks: number of activation diffusion blocks. steps, first_steps: Newton-Schulz steps p, of the first block p of
    its own. alpha: of X_0. lam, beta: starts of the learnable parameters of each block.
    attention: F^0 is the mean over layers and heads (eq. 1), or scaled by min and max to [0, 1].
    filter: `absolute` is eq. 7; `relative` = tanhShrink(F / t), t = beta times the maximum of the block's incoming F,
    then min-max.
    residual: S + S * T and F + T go on, instead of S * T and T.
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
    residual: bool = False
    constant_start: bool = False

    @classmethod
    def paper(cls, **changes: Any) -> SCMConfig:
        """As the paper writes it."""
        return cls(**changes)

    @classmethod
    def released(cls, **changes: Any) -> SCMConfig:
        """As the released code computes it."""
        preset = {"first_steps": 16, "attention": "min_max", "filter": "relative"}
        return cls(**preset | {"residual": True, "constant_start": True} | changes)


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
        beta = self.beta.clamp(min=EPS)
        if self.config.filter == "absolute":
            return beta * tanh_shrink(diffused / beta)
        threshold = (beta * incoming.amax(dim=(1, 2), keepdim=True)).clamp(min=EPS)
        return min_max(tanh_shrink(diffused / threshold))

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

    def forward(self, attention: Tensor, semantic: Tensor) -> list[Maps]:
        """Return the maps in front of the first block, between the blocks, and behind the last one.

        attention: the class token's rows (B, L, heads, h * w). semantic: S^0 (B, C, h, w).
        """
        kind = torch.promote_types(attention.dtype, torch.float32)
        first = attention.to(kind).mean(dim=(1, 2)).unflatten(1, semantic.shape[2:])
        maps = [Maps(min_max(first) if self.config.attention == "min_max" else first, semantic.to(kind))]
        for block in self.blocks:
            maps.append(block(*maps[-1]))
        return maps


@register("scm")
class SCM(TSCAM):
    """TS-CAM that is trained behind the spatial calibration module.

    In training the logits are the mean of S^L; in evaluation those of TS-CAM, and so are the maps: the module costs
    nothing there. config: default `SCMConfig.paper()`. options: of TS-CAM.
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
