"""The class-token tap beside a plain forward pass and beside stacking the full attention: memory, time, equality.

DeiT-S, batch 64, 224 px, float32, on the CPU. Memory is the peak resident size of a process of its own per variant,
since the peak of a process never falls again.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from wsolnb.backbones import create_backbone, forward_tapped

BATCH = 64


def plain(vit, images):
    return vit.forward_features(images)


def tapped(vit, images):
    return forward_tapped(vit, images)


def stacked(vit, images):
    """Keep the whole (B, heads, T, T) softmax of every layer, as code that reads attention usually does."""
    x = vit._pos_embed(vit.patch_embed(images))
    matrices = []
    for block in vit.blocks:
        attention, y = block.attn, block.norm1(x)
        batch, tokens, _ = y.shape
        q, k, v = attention.qkv(y).reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * attention.scale).softmax(dim=-1)
        matrices.append(weights)
        x = x + attention.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, -1))
        x = x + block.mlp(block.norm2(x))
    return vit.norm(x), torch.stack([m[:, :, 0] for m in matrices], dim=1)[..., 1:]


VARIANTS = {"plain": plain, "tapped": tapped, "stacked": stacked}


def setting(batch: int = BATCH):
    torch.manual_seed(0)
    vit = create_backbone("deit_small").vit.eval()
    return vit, torch.randn(batch, 3, 224, 224)


def peak_megabytes(variant: str) -> float:
    """Run one variant in a process of its own and return its peak resident size in MB."""
    command = [sys.executable, "-m", "benchmarks.attention_tap", "--peak", variant]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> dict:
    vit, images = setting()
    seconds = {"plain": [], "tapped": []}
    with torch.inference_mode():
        small = images[:8]
        expected = stacked(vit, small)
        got = tapped(vit, small)
        row_error = float((got.attention - expected[1]).abs().max())
        token_error = float((got.patches - plain(vit, small)[:, 1:]).abs().max())
        for _ in range(5):
            for name in seconds:
                started = time.perf_counter()
                VARIANTS[name](vit, images)
                seconds[name].append(time.perf_counter() - started)
    times = {name: statistics.median(values) for name, values in seconds.items()}
    peaks = {name: peak_megabytes(name) for name in VARIANTS}
    added = {name: peaks[name] - peaks["plain"] for name in ("tapped", "stacked")}
    result = {
        "added_memory_share": max(0.0, added["tapped"]) / added["stacked"],
        "added_mb_tapped": added["tapped"],
        "added_mb_stacked": added["stacked"],
        "time_ratio": times["tapped"] / times["plain"],
        "row_error": row_error,
        "token_error": token_error,
    }
    print(f"memory added to a plain forward pass: tap {added['tapped']:.0f} MB, stacking {added['stacked']:.0f} MB "
          f"({100 * result['added_memory_share']:.1f} %, claim <= 5 %)")  # fmt: skip
    print(f"time: plain {times['plain']:.2f} s, tapped {times['tapped']:.2f} s "
          f"(ratio {result['time_ratio']:.3f}, claim <= 1.10)")  # fmt: skip
    print(f"largest difference of the rows {row_error:.1e} (claim <= 1e-5), of the tokens {token_error:.1e}")
    return result


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        model, batch = setting()
        with torch.inference_mode():
            VARIANTS[sys.argv[2]](model, batch)
        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    else:
        main()
