"""One activation diffusion block, forward and backward: stencil products beside the dense Newton-Schulz iteration.

B = 32, C = 200, p = 4, float32, on the CPU; grids of 14 x 14 and 28 x 28. Memory is what autograd keeps between forward
and backward, counted by its own hooks, for growing grids: linear in the number of patches N for the stencil, quadratic
for the dense form.
"""

from __future__ import annotations

import statistics
import time

import torch

from wsolnb.methods import scm

BATCH, CLASSES, STEPS, ALPHA = 32, 200, 4, 0.002


def stencil(attention, semantic, lam):
    return scm.diffuse(attention, semantic, lam, STEPS, ALPHA)


def dense(attention, semantic, lam):
    """Eq. 3 to 6 as matrices, as the released code has them."""
    rows, columns = attention.shape[1:]
    index = torch.arange(rows * columns).view(rows, columns)
    adjacency = torch.zeros(rows * columns, rows * columns)
    for i, j in ((index[:, :-1], index[:, 1:]), (index[:-1], index[1:])):
        adjacency[i.flatten(), j.flatten()] = adjacency[j.flatten(), i.flatten()] = 1
    unit = torch.nn.functional.normalize(semantic.flatten(2), dim=1)
    matrix = (adjacency.sum(dim=1).diag() - adjacency) * (lam * (unit.mT @ unit) - 1)
    inverse = scm.newton_schulz(matrix, STEPS, ALPHA)
    return (inverse @ attention.flatten(1)[..., None]).view_as(attention)


def inputs(side: int):
    torch.manual_seed(0)
    attention = torch.rand(BATCH, side, side, requires_grad=True)
    semantic = torch.randn(BATCH, CLASSES, side, side, requires_grad=True)
    return attention, semantic, torch.tensor(1.0, requires_grad=True)


def step(diffuse, leaves) -> tuple[torch.Tensor, ...]:
    """Diffuse, filter, update the semantic map; return the gradients of its squares."""
    attention, semantic, lam = leaves
    kept = scm.min_max(scm.tanh_shrink(diffuse(attention, semantic, lam) / 0.5))
    return torch.autograd.grad((semantic + semantic * kept[:, None]).square().mean(), leaves)


def seconds(diffuse, leaves, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        step(diffuse, leaves)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def kept_megabytes(diffuse, side: int) -> float:
    """Bytes that autograd keeps for the backward pass of the diffusion, each storage once."""
    sizes: dict[int, int] = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = diffuse(*inputs(side))
    del result
    return sum(sizes.values()) / 1e6


def main() -> dict:
    result = {}
    for side, claim, repeats in ((14, 10, 5), (28, 100, 1)):
        leaves = inputs(side)
        pairs = zip(step(stencil, leaves), step(dense, leaves), strict=True)
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        fast, slow = seconds(stencil, leaves, 5), seconds(dense, leaves, repeats)
        result[f"{side}x{side}"] = {"ratio": slow / fast, "gradient_error": error}
        print(f"{side} x {side}: dense {slow:.3f} s, stencil {fast:.4f} s, ratio {slow / fast:.0f} "
              f"(claim >= {claim}); largest relative difference of gradients {error:.1e}")  # fmt: skip
    for name, diffuse in (("stencil", stencil), ("dense", dense)):
        small, large = kept_megabytes(diffuse, 14), kept_megabytes(diffuse, 28)
        result[f"kept_growth_{name}"] = large / small
        print(f"kept for the backward pass, {name}: {small:.1f} MB at 14 x 14, {large:.1f} MB at 28 x 28 "
              f"({large / small:.1f} times, for 4 times as many patches)")  # fmt: skip
    return result


if __name__ == "__main__":
    main()
