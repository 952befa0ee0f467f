"""SCM's diffusion without matrices: the Laplacian as a stencil of five numbers a patch, and products with it.

`wsolnb.methods.scm` has the equations as the paper writes them. These functions give the same up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dct
from torch import Tensor
from torch.autograd.function import once_differentiable

from wsolnb.errors import ParameterError

PLAIN_UP_TO = 8
"""Most Newton-Schulz steps p that take one pair of stencil products for each of the 2**p terms."""


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


class _Band:
    """The Laplacians of a batch as one banded matrix over the row of all its P = B h w patches.

    Nothing couples an image to the next one. A vector (..., P + 2 w) has a margin of w zeros on either side, so that
    neighbours are windows (..., P) into it: the patches themselves, what is right, left, below and above of them.
    """

    def __init__(self, diagonal: Tensor, right: Tensor, down: Tensor):
        self.size, self.margin = diagonal.numel(), diagonal.shape[2]
        self.diagonal = diagonal.flatten()
        # A coupling stands at its left or upper patch: that of the other patch is one window back.
        self.right, _, self.left, _, _ = self.windows(self.padded(F.pad(right, (0, 1))))
        self.below, _, _, _, self.above = self.windows(self.padded(F.pad(down, (0, 0, 0, 1))))

    def padded(self, x: Tensor) -> Tensor:
        """Return maps (B, h, w) as a vector."""
        return F.pad(x.flatten(), (self.margin, self.margin))

    def windows(self, x: Tensor) -> list[Tensor]:
        """Return the five windows of vectors."""
        return [x[..., self.margin + by : self.margin + by + self.size] for by in (0, 1, -1, self.margin, -self.margin)]

    def rows(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        """Return the windows of each of the vectors (K, P + 2 w)."""
        return list(zip(*(window.unbind() for window in self.windows(x)), strict=True))

    def times(self, x: Sequence[Tensor], out: Tensor) -> None:
        """Write L x into `out` (P,); x: five windows."""
        torch.mul(self.diagonal, x[0], out=out)
        for coupling, neighbour in zip((self.right, self.left, self.below, self.above), x[1:], strict=True):
            out.addcmul_(coupling, neighbour)


class Terms(NamedTuple):
    """A polynomial of L^2 times F as a sum of terms y_k, of which y_0 is F.

    count: of terms. scale: of L^2. weights: of the terms; without, each weighs 1.
    Without weights, y_{k+1} = y_k - scale L (L y_k). With weights the terms are Chebyshev polynomials of I - scale L^2:
    y_1 is as before, then y_{k+1} = 2 (y_k - scale L (L y_k)) - y_{k-1}.
    """

    count: int
    scale: float
    weights: tuple[float, ...] = ()


class _Stencil(torch.autograd.Function):
    """X_p F by products of the stencil with maps: alpha L times the sum of `Terms`.

    From X_{p+1} = X_p (2I - L X_p) follows I - L X_p = (I - L X_0)^(2^p), hence X_p = X_0 sum_{k < 2^p} (I - L X_0)^k.
    With X_0 = alpha L these are 2^p terms of weight 1 and scale alpha. `chebyshev` has fewer terms with the same sum.
    """

    @staticmethod
    def forward(
        ctx: Any, diagonal: Tensor, right: Tensor, down: Tensor, x: Tensor, terms: Terms, alpha: float, constant: bool
    ) -> Tensor:
        band = _Band(diagonal, right, down)
        values = x.new_zeros(terms.count, band.size + 2 * band.margin)
        y, moved, twice = band.rows(values), band.windows(torch.zeros_like(values[0])), x.new_empty(band.size)
        y[0][0].copy_(x.flatten())
        for k in range(terms.count - 1):
            band.times(y[k], out=moved[0])
            band.times(moved, out=twice)
            torch.sub(y[k][0], twice, alpha=terms.scale, out=y[k + 1][0])
            if terms.weights and k:
                y[k + 1][0].mul_(2).sub_(y[k - 1][0])
        total = x.new_tensor(terms.weights) @ values if terms.weights else values.sum(dim=0)
        band.times(band.windows(total), out=twice)
        ctx.save_for_backward(diagonal, right, down, total, values)
        ctx.terms, ctx.alpha, ctx.constant = terms, alpha, constant
        return (alpha * twice).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        diagonal, right, down, total, values = ctx.saved_tensors
        (count, scale, weights), alpha, band = ctx.terms, ctx.alpha, _Band(diagonal, right, down)
        y, given = band.rows(values), band.windows(band.padded(grad))
        # Derivatives by terms, from the last term to the first: by y_{k+1}, by y_{k+2}, by y_k. Then
        # L times the first of them, and L y_k.
        last, before, free, applied, moved = band.rows(grad.new_zeros(5, values.shape[1]))
        first, twice = torch.empty_like(band.diagonal), torch.empty_like(band.diagonal)
        band.times(given, out=first)  # by the sum
        first *= alpha
        by = [torch.zeros_like(first) for _ in range(3)]
        if not ctx.constant:
            _add_pairs(by, given, band.windows(total), alpha)
        torch.mul(first, weights[-1] if weights else 1, out=last[0])
        # Pairs (u, v) whose outer products u v^T sum to the derivative by L; held at X_0 = alpha L, one of each step's
        # two factors L, and the one in front, do not count.
        for k in range(count - 2, -1, -1):
            factor = 2 if weights and k else 1
            band.times(last, out=applied[0])
            band.times(y[k], out=moved[0])
            _add_pairs(by, last, moved, -factor * scale)
            if not ctx.constant:
                _add_pairs(by, applied, y[k], -factor * scale)
            band.times(applied, out=twice)
            torch.sub(last[0], twice, alpha=scale, out=free[0])
            if weights:
                free[0].mul_(factor).sub_(before[0])
            free[0].add_(first, alpha=weights[k] if weights else 1)
            last, before, free = free, last, before
        by = [part.view_as(diagonal) for part in by]
        return by[0], by[1][..., :-1], by[2][..., :-1, :], last[0].view_as(grad), None, None, None


def _add_pairs(by: list[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], factor: float) -> None:
    """Add factor times the derivatives of u^T L v by the diagonal, by `right` and by `down`; u, v: five windows."""
    by[0].addcmul_(u[0], v[0], value=factor)
    for part, neighbour in ((by[1], 1), (by[2], 3)):
        part.addcmul_(u[0], v[neighbour], value=factor).addcmul_(u[neighbour], v[0], value=factor)


def chebyshev(matrix: Laplacian, steps: int, alpha: float) -> Terms | None:
    """Return terms whose sum is that of the 2^p terms in `_Stencil`, to the rounding of float64; None: it may diverge.

    With q = alpha mu^2 of an eigenvalue mu of L the sum is s(q) = (1 - (1 - q)^n) / q, n = 2^p. Gershgorin's circles
    bound q by Q. Expanded in Chebyshev polynomials on [0, Q], s needs about 6 (n Q)^(1/2) terms instead of n, because
    these polynomials change fastest at the ends, as s does. Above Q = 2 the iteration may diverge.
    """
    diagonal, right, down = (part.detach().abs() for part in matrix)
    radius = diagonal + F.pad(right, (0, 1)) + F.pad(right, (1, 0)) + F.pad(down, (0, 0, 0, 1))
    radius += F.pad(down, (0, 0, 1, 0))
    n, bound = 2.0**steps, alpha * float(radius.max()) ** 2
    if not bound <= 2:
        return None
    bound = max(bound, 1 / n)
    count = 32 + math.ceil(6.2 * math.sqrt(n * bound))
    angle = (np.arange(2 * count) + 0.5) * (math.pi / (2 * count))
    q = bound * np.sin(angle / 2) ** 2
    logarithm = np.where(q < 1, np.log1p(-np.minimum(q, 1 - 1e-16)), np.log(np.maximum(q - 1, 1e-16)))
    weights = dct(-np.expm1(n * logarithm) / q, type=2) / (2 * count)
    weights[0] /= 2
    count = 1 + int(np.flatnonzero(np.abs(weights) > 1e-15 * np.abs(weights).max())[-1])
    return Terms(count, 2 * alpha / bound, tuple(weights[:count].tolist()))


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
    the semantics; a smaller one diffuses wider. steps: p; up to `PLAIN_UP_TO` the p-step iterate is applied as 2^p - 1
    pairs of stencil products, above by the fewer terms of `chebyshev` (on a CPU) or by squares of matrices (on CUDA,
    and where the iteration may diverge), both in float64.
    alpha: of X_0 = alpha L^T. constant_start: hold X_0 constant when differentiating, as the released code does.

    Returned in float32 or better. Linear in F, so zero attention stays zero. Raises ParameterError for shapes that do
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
        if steps <= PLAIN_UP_TO:
            terms, place, exact = Terms(2**steps, alpha), attention.device, kind
        else:
            terms, place, exact = None, attention.device if attention.is_cuda else "cpu", torch.float64
        values, tokens = attention.to(place, exact), tokens.to(place, exact)
        matrix = laplacian(tokens, torch.as_tensor(lam).to(values))
        if terms is None and not attention.is_cuda:
            terms = chebyshev(matrix, steps, alpha)
        if terms is None:
            found = _squares(matrix.dense(), values.flatten(1)[..., None], steps, alpha, constant_start)
        else:
            found = _Stencil.apply(*matrix, values, terms, alpha, constant_start)
        return found.view_as(attention).to(attention.device, kind)


def _squares(matrix: Tensor, x: Tensor, steps: int, alpha: float, constant_start: bool) -> Tensor:
    """Return X_p x for (B, N, N) matrices and (B, N, 1) values, by p - 1 products of matrices: where those are cheap.

    With R = I - L X_0 the sum in `_Stencil` is the product of I + R^(2^i) over i < p. Each square doubles the relative
    rounding error of R, so that the matrices must be float64.
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
