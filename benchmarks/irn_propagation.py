"""IRN's random walk of 2^8 steps on 2 maps at 96 x 128, radius 5, one core: sparse steps beside dense powers.

The dense form squares the N x N transition 8 times; it is timed at 24 x 32 (at 96 x 128 it takes minutes and gigabytes:
its time grows with N^3), where both are compared. Cost per pixel on growing grids shows that ours is linear.
Memory is the growth of the process's peak, of each grid in a process of its own.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from wsolnb.methods.irn import propagate, transition

RADIUS, BETA, EXP_TIMES, MAPS = 5, 10.0, 8, 2
GRIDS = ((48, 64), (96, 128), (192, 256))


def inputs(size: tuple[int, int], dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    boundary = torch.rand(size, generator=generator, dtype=dtype) ** 3
    return torch.rand(MAPS, *size, generator=generator, dtype=dtype), boundary


def dense(cam: torch.Tensor, boundary: torch.Tensor) -> torch.Tensor:
    """The released form: the transition as a dense matrix in float64, squared, then applied."""
    matrix = transition(boundary, RADIUS, BETA).to_dense()
    for _ in range(EXP_TIMES):
        matrix = matrix @ matrix
    start = (cam.double() * (1 - boundary.double())).flatten(1)
    return (start @ matrix.T).reshape(cam.shape)


def seconds(function, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(height: int, width: int) -> dict[str, float]:
    """Time and peak memory of one grid; the peak grows only, so this runs in a fresh process."""
    cam, boundary = inputs((height, width))
    propagate(cam[:, :8, :8], boundary[:8, :8])  # loads what is loaded once
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took = seconds(lambda: propagate(cam, boundary, RADIUS, BETA, EXP_TIMES), 3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": took, "megabytes": (peak - before) * unit / 1e6, "process_megabytes": peak * unit / 1e6}


def main() -> dict:
    result: dict = {}
    small = inputs((24, 32))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        error = float((propagate(*small, RADIUS, BETA, EXP_TIMES) - dense(*small)).abs().max())
        slow, fast = seconds(lambda: dense(*small), 1), seconds(lambda: propagate(*small), 3)
    finally:
        torch.set_num_threads(threads)
    result["24x32"] = {"ratio": slow / fast, "error": error}
    print(f"24 x 32: dense {slow:.2f} s, sparse {fast:.3f} s, ratio {slow / fast:.0f}; largest difference {error:.1e}")
    for height, width in GRIDS:
        code = f"import torch, json; torch.set_num_threads(1); from benchmarks import irn_propagation as b; \
print(json.dumps(b.measure({height}, {width})))"
        found = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
        result[f"{height}x{width}"] = found | {"microseconds_per_pixel": 1e6 * found["seconds"] / (height * width)}
        claim = " (claim <= 3 s, <= 500 MB)" if (height, width) == (96, 128) else ""
        print(f"{height} x {width}: {found['seconds']:.2f} s, {found['megabytes']:.0f} MB above the process before "
              f"({found['process_megabytes']:.0f} MB in all){claim}; "
              f"{result[f'{height}x{width}']['microseconds_per_pixel']:.1f} microseconds a pixel")  # fmt: skip
    return result


if __name__ == "__main__":
    main()
