"""One LPCAM of one class beside prototype-by-prototype cosine similarity; and the streaming evaluation of seed maps.

Map: K = 12 class and 12 context prototypes, 2,048 channels, 32 x 32 positions, float32, on the CPU. The plain form is
what the equations say: a cosine similarity map for each prototype, their means, the difference, ReLU, the maximum.

Evaluation: 1,000 images of 128 x 128 with two class maps each, at 100 thresholds, one after the other; the peak memory
must not grow with the number of images, and the scores equal those of masks made threshold by threshold.
"""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import torch
import torch.nn.functional as F

from wsolnb.methods.lpcam import direction, lpcam, similarity
from wsolnb.metrics import SeedScores, SegmentationScores, seed_mask
from wsolnb.train.seeds import THRESHOLDS

PROTOTYPES, CHANNELS, SIDE = 12, 2048, 32


def one_by_one(features: torch.Tensor, class_prototypes: torch.Tensor, context_prototypes: torch.Tensor):
    """FG - BG of eq. 5 and 6, prototype by prototype."""
    terms = []
    for prototypes in (class_prototypes, context_prototypes):
        maps = [F.cosine_similarity(features, prototype[None, :, None, None], dim=1) for prototype in prototypes]
        terms.append(sum(maps) / len(maps))
    return terms[0] - terms[1]


def plain(*given: torch.Tensor) -> torch.Tensor:
    """LPCAM of eq. 6."""
    found = one_by_one(*given).relu()
    return found / found.amax(dim=(1, 2), keepdim=True)


def fastest(function, repeats: int) -> float:
    """Least of several times, seconds: what else the machine does can only add."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def maps() -> dict[str, float]:
    torch.manual_seed(0)
    # Features around the prototypes, as those of a network are around their cluster centres.
    both = [torch.randn(PROTOTYPES, CHANNELS).relu() ** 3 for _ in range(2)]
    near = torch.cat(both)[torch.randint(2 * PROTOTYPES, (SIDE, SIDE))]
    features = (near + torch.randn_like(near)).relu().permute(2, 0, 1)[None].contiguous()
    double = [features.double(), *(prototypes.double() for prototypes in both)]
    cosines = float((similarity(features, direction(*both)[None])[:, 0] - one_by_one(features, *both)).abs().max())
    exact = float((lpcam(*double) - plain(*double)).abs().max())
    fast, slow = fastest(lambda: lpcam(features, *both), 20), fastest(lambda: plain(features, *both), 6)
    print(f"one class map, K = {PROTOTYPES} + {PROTOTYPES}, {CHANNELS} channels, {SIDE} x {SIDE}: one by one "
          f"{1e3 * slow:.1f} ms, one product {1e3 * fast:.2f} ms, ratio {slow / fast:.0f} (claim >= 30); largest "
          f"difference of FG - BG {cosines:.1e} (claim <= 1e-6), of maps in float64 {exact:.1e}")  # fmt: skip
    return {"ratio": slow / fast, "difference": cosines, "difference_float64": exact, "milliseconds": 1e3 * fast}


def images(count: int, side: int = 128):
    """Maps, classes and masks, made when they are asked for."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        mask = rng.integers(0, 21, (side // 16, side // 16)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
        classes = rng.choice(20, 2, replace=False)
        yield rng.random((2, side, side), dtype=np.float32), classes, mask


def stream(count: int) -> tuple[SeedScores, float, float]:
    """Scores of `count` images, their seconds (without making the images), and the accumulator's peak memory in MB."""
    scores, seconds = SeedScores(21, THRESHOLDS), 0.0
    tracemalloc.start()
    for maps_, classes, mask in images(count):
        started = time.perf_counter()
        scores.update(maps_, classes, mask)
        seconds += time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return scores, seconds, peak


def evaluation() -> dict[str, float]:
    stream(2)  # compiles
    few, _, small = stream(100)
    _, seconds, large = stream(1000)
    error = 0.0
    for threshold in THRESHOLDS[::11]:
        masks = SegmentationScores(21)
        for maps_, classes, mask in images(100):
            masks.update(seed_mask(maps_, classes, threshold), mask)
        error = max(error, abs(masks.compute().miou - few.compute().curve.at(threshold)["miou"]))
    # fmt: off
    print(f"1,000 seed maps (128 x 128, two classes) at 100 thresholds: {seconds:.1f} s; peak memory {large:.2f} MB, "
          f"of 100 images {small:.2f} MB (claim: no growth); mIoU differs from that of masks by {error:.1e}")
    # fmt: on
    return {"seconds": seconds, "memory_growth": large / small, "miou_difference": error}


def main() -> dict:
    return {"map": maps(), "evaluation": evaluation()}


if __name__ == "__main__":
    main()
