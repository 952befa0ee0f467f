"""One activation diffusion block, forward and backward: stencil products beside the dense Newton-Schulz iteration.

B = 32, C = 200, p = 4, float32, on the CPU; grids of 14 x 14 and 28 x 28. Memory is what autograd keeps between forward
and backward, counted by its own hooks, for growing grids: linear in the number of patches N for the stencil, quadratic
for the dense form. A first block of the released code, p = 16, stands beside one of p = 4.

Time is that of the processor, and what is compared runs in turn: wall-clock time says little on a busy machine.

Then the share of the whole module, four blocks, in a training step of DeiT-S at 224 px (200 classes, batches of 8), and
what it leaves behind at inference: parameters and time.
"""

from __future__ import annotations

import statistics
import time

import torch

from wsolnb.backbones import create_backbone
from wsolnb.methods import scm
from wsolnb.methods.tscam import TSCAM

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


def step(diffuse, leaves, by: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Diffuse, filter, update the semantic map; return the gradients of a loss whose derivative by the map is `by`."""
    attention, semantic, lam = leaves
    kept = scm.min_max(scm.tanh_shrink(diffuse(attention, semantic, lam) / 0.5))
    return torch.autograd.grad(semantic + semantic * kept[:, None], leaves, by)


def seconds(diffuse, leaves, by, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.process_time()
        step(diffuse, leaves, by)
        times.append(time.process_time() - started)
    return statistics.median(times)


def first_block(repeats: int = 9) -> dict[str, float]:
    """Time of a block of p = 16 by that of p = 4 (one thread), on semantic maps of unlike and of alike patches.

    The more the patches are alike, the smaller are the eigenvalues of L, and the fewer terms p = 16 takes.
    """
    result, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    for name, common in (("unlike", 0.0), ("alike", 2.0)):
        attention, semantic, _ = inputs(14)
        semantic = (semantic.detach() + common).requires_grad_()
        by = torch.randn_like(semantic)
        blocks = [scm.ActivationDiffusionBlock(scm.SCMConfig.released(), first) for first in (False, True)]
        times: list[list[float]] = [[], []]
        for _ in range(repeats + 1):
            for block, spent in zip(blocks, times, strict=True):
                started = time.process_time()
                found = block(attention, semantic).semantic
                torch.autograd.grad(found, (attention, semantic, *block.parameters()), by)
                spent.append(time.process_time() - started)
        few, many = (statistics.median(spent[1:]) for spent in times)
        result[f"p = 16 by p = 4, {name} patches"] = many / few
        print(f"a block of p = 4 takes {1e3 * few:.1f} ms, of p = 16 {1e3 * many:.1f} ms, {name} patches: ratio "
              f"{many / few:.1f} (claim <= 5)")  # fmt: skip
    torch.set_num_threads(threads)
    return result


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


def median_of(function, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return statistics.median(times[1:])


def share_of_step(images) -> dict[str, float]:
    """Time of the module's forward and backward pass by that of a whole training step, per preset; and inference."""
    torch.manual_seed(0)
    plain = TSCAM(create_backbone("deit_small", image_size=224), CLASSES)
    labels = torch.arange(len(images))

    def step_of(model):
        def run():
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(images).logits, labels).backward()

        return run

    base = median_of(step_of(plain.train()), 3)
    with torch.no_grad():
        output = plain(images)
    attention, semantic = output.attention.requires_grad_(), output.semantic_map.requires_grad_()
    result = {}
    for preset in ("paper", "released"):
        module = scm.SpatialCalibration(getattr(scm.SCMConfig, preset)())

        def alone(module=module):
            module(attention, semantic)[-1].semantic.mean().backward()

        own = median_of(alone)
        result[f"share_{preset}"] = own / (base + own)
        print(f"DeiT-S, 224 px, batch {len(images)}: step {base:.2f} s, the module ({preset}) {own:.3f} s, "
              f"share {own / (base + own):.1%} (claim <= 5 %)")  # fmt: skip
    model = scm.SCM(plain.backbone, CLASSES, config=scm.SCMConfig.released()).eval()
    with torch.inference_mode():  # in turn, so that both meet the same other work on the machine
        pairs = [[median_of(lambda m=m: m(images), 1) for m in (model, plain.eval())] for _ in range(7)]
    result["inference_ratio"] = ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    result["inference_parameters"] = sum(p.numel() for p in model.calibration.parameters())
    print(f"inference: {ratio:.2f} times TS-CAM's time; {result['inference_parameters']} scalars are "
          "kept for further training and not used")  # fmt: skip
    return result


def main() -> dict:
    result = first_block()
    all_threads = torch.get_num_threads()
    for side, claim, repeats in ((14, 10, 5), (28, 100, 1)):
        leaves, by = inputs(side), torch.randn(BATCH, CLASSES, side, side)
        pairs = zip(step(stencil, leaves, by), step(dense, leaves, by), strict=True)
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        result[f"{side}x{side}"] = {"gradient_error": error}
        for threads in sorted({1, all_threads}):
            torch.set_num_threads(threads)
            fast, slow = seconds(stencil, leaves, by, 9), seconds(dense, leaves, by, repeats)
            result[f"{side}x{side}"][f"ratio, {threads} thread(s)"] = slow / fast
            print(f"{side} x {side}, {threads} thread(s): dense {slow:.3f} s, stencil {fast:.4f} s, ratio "
                  f"{slow / fast:.0f} (claim >= {claim}); relative difference of gradients {error:.1e}")  # fmt: skip
        torch.set_num_threads(all_threads)
    for name, diffuse in (("stencil", stencil), ("dense", dense)):
        small, large = kept_megabytes(diffuse, 14), kept_megabytes(diffuse, 28)
        result[f"kept_growth_{name}"] = large / small
        print(f"kept for the backward pass, {name}: {small:.1f} MB at 14 x 14, {large:.1f} MB at 28 x 28 "
              f"({large / small:.1f} times, for 4 times as many patches)")  # fmt: skip
    return result | share_of_step(torch.randn(8, 3, 224, 224))


if __name__ == "__main__":
    main()
