"""SCM's diffusion without matrices: the Laplacian as a stencil of five numbers a patch, and products with it.

`wsolnb.methods.scm` has the equations as the paper writes them. These functions give the same up to rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wsolnb.errors import ParameterError

DENSE_ABOVE = 8
"""Most Newton-Schulz steps p for stencil products; above it, 2**p products take longer than p squares of matrices."""


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
    the semantics; a smaller one diffuses wider. steps: p; up to `DENSE_ABOVE` the p-step iterate is applied as 2^p - 1
    pairs of stencil products, above by the eigenvalues of L (on a CPU) or by squares of matrices (on CUDA), both in
    float64.
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
        if steps <= DENSE_ABOVE:
            attention, tokens = attention.to(kind), tokens.to(kind)
            return _Stencil.apply(*laplacian(tokens, lam), attention, steps, alpha, constant_start)
        many = _squares if attention.is_cuda else _Spectrum.apply
        values, tokens = (x.to(x.device if x.is_cuda else "cpu", torch.float64) for x in (attention, tokens))
        lam = torch.as_tensor(lam).to(values)
        found = many(laplacian(tokens, lam).dense(), values.flatten(1)[..., None], steps, alpha, constant_start)
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


class _Spectrum(torch.autograd.Function):
    """X_p x by the eigenvalues mu of L, float64: the sum in `_Stencil` is s(q) = (1 - (1 - q)^n) / q, q = alpha mu^2.

    n = 2^p. Between eigenvectors i and j the derivative of s is its divided difference, so that no derivative of an
    eigenvector is needed, which would not exist for equal eigenvalues.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, x: Tensor, steps: int, alpha: float, constant: bool) -> Tensor:
        mu, vectors = torch.linalg.eigh(matrix)
        n, q = 2.0**steps, alpha * mu * mu
        logarithm = torch.where(q < 0.5, torch.log1p(-q.clamp(max=0.5)), torch.log((1 - q).abs()))
        sums = torch.where(q > 0, -torch.expm1(n * logarithm) / q, n)
        inside = vectors.mT @ x
        ctx.save_for_backward(mu, vectors, sums, inside)
        ctx.n, ctx.alpha, ctx.constant = n, alpha, constant
        return vectors @ ((alpha * mu * sums)[..., None] * inside)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mu, vectors, sums, inside = ctx.saved_tensors
        alpha = ctx.alpha
        grad = vectors.mT @ grad
        by_row, by_column = mu[..., :, None], mu[..., None, :]
        # L X_0 moves with L, and so does X_0 = alpha L unless it is held constant.
        slope = _difference(alpha * mu * mu, sums, ctx.n)
        if ctx.constant:
            weight = alpha**2 * by_row * by_column * slope
        else:
            weight = alpha * sums[..., None, :] + alpha**2 * by_row * (by_row + by_column) * slope
        by_matrix = vectors @ (weight * (grad @ inside.mT)) @ vectors.mT
        return by_matrix, vectors @ ((alpha * mu * sums)[..., None] * grad), None, None, None


def _difference(q: Tensor, sums: Tensor, n: float) -> Tensor:
    """Return (s(q_i) - s(q_j)) / (q_i - q_j) (B, N, N); where both nearly agree, the derivative in their middle."""
    apart, middle = q[..., :, None] - q[..., None, :], (q[..., :, None] + q[..., None, :]) / 2
    near = apart.abs() < 1e-5 * middle.clamp(min=1 / n)
    r = 1 - middle
    left = torch.exp((n - 1) * torch.log(r.abs())) * r.sign()
    exact = (n * left - (1 - left * r) / middle) / middle
    # Near 0 the two terms cancel: there the first terms of the sum over binomial coefficients.
    ratio = middle * n
    series = -(n * (n - 1) / 2) * (1 - (n - 2) / n * ratio * (2 / 3 - (n - 3) / n * ratio * (1 / 4 - ratio / 15)))
    derivative = torch.where(ratio < 1e-3, series, exact)
    return torch.where(near, derivative, (sums[..., :, None] - sums[..., None, :]) / torch.where(near, 1, apart))
