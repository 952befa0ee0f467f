"""Class and map of 32 images at 224 px: LocLoc's one pass of the frozen transformer beside PPD's two (listing B.3).

ViT-S/16 with random weights, 200 classes, sizes as published. Data loading is part of both: the images lie as JPEG
files of 320 x 240 in memory; LocLoc decodes and transforms each once, PPD once for the class (resize, centre crop) and
once for the map (resize). Time is the median of repeated batches; memory is what one batch adds to the process at its
peak (on a GPU: to the allocator). FLOPs are counted by torch's counter, which explain the ratio: LocLoc's two passes of
12 blocks are as long as PPD's, and its generator and classifier compute more than PPD's decoder and probe. On the CPU
time is that of the processor.
"""

from __future__ import annotations

import io
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from wsolnb.backbones import create_backbone
from wsolnb.data.loading import to_tensor
from wsolnb.data.sample import Sample
from wsolnb.data.transforms import Resize, ResizeCenterCrop
from wsolnb.methods.base import LocalizationModel
from wsolnb.methods.locloc import GrabCutEnhancedGenerator, LocalFeatureDigging, LocLoc
from wsolnb.methods.ppd import PPD, LinearProbe, ProxyProbingDecoder
from wsolnb.papers import locloc

BATCH, CLASSES = 32, 200


def files() -> list[bytes]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(BATCH):
        small = rng.integers(0, 256, (15, 20, 3)).astype(np.uint8)
        target = io.BytesIO()
        Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC).save(target, "jpeg", quality=90)
        found.append(target.getvalue())
    return found


def decode(encoded: list[bytes], transform, device) -> torch.Tensor:
    samples = [transform(Sample(np.asarray(Image.open(io.BytesIO(data))), "", (0,)), None) for data in encoded]
    return to_tensor(np.stack([sample.image for sample in samples])).to(device)


def models(device) -> dict[str, LocalizationModel]:
    torch.manual_seed(0)
    backbone = create_backbone("dino_small")
    classifier = LocalFeatureDigging(backbone, CLASSES)
    whole = LocLoc(backbone, CLASSES, GrabCutEnhancedGenerator(384, CLASSES), classifier)
    ppd = PPD(backbone, CLASSES, ProxyProbingDecoder(384), LinearProbe(384, CLASSES))
    return {"LocLoc": whole.to(device).eval(), "PPD": ppd.to(device).eval()}


def tasks(both: dict[str, LocalizationModel], device) -> dict[str, Callable[[], object]]:
    """What is timed, by name; each loads its images itself."""
    encoded = files()
    once, crop = Resize(224), ResizeCenterCrop(256, 224, keep_aspect=True)

    def load() -> torch.Tensor:
        return decode(encoded, once, device)

    named = locloc.computations(both, load, lambda: decode(encoded, crop, device))
    flat = {f"{name}, {part}": task for name, parts in named.items() for part, task in parts.items()}
    return {**flat, "loading once": load}


def seconds(task: Callable[[], object], device, repeats: int) -> float:
    """Return the median time of a task, after one that is not counted; on the CPU that of the processor."""
    if device.type == "cuda":
        return locloc.seconds(task, device, repeats)
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            started = time.process_time()
            task()
            times.append(time.process_time() - started)
    return statistics.median(times[1:])


def flops(module_call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module_call()
    return counter.get_total_flops()


def peak_megabytes(name: str, device) -> float:
    """What one batch adds to the peak of memory; on the CPU in a process of its own, and on Linux only (else NaN)."""
    if device.type == "cuda":
        both = models(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds(tasks(both, device)[name], device, 1)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (name, torch.get_num_threads()))


def _peak_here(name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    task = tasks(models(device), device)[name]
    try:
        # Forgets the peak so far, which building the models, or the process that started this one, has set.
        Path("/proc/self/clear_refs").write_text("5")
        before = _kilobytes("VmRSS")
    except OSError:
        return float("nan")
    with torch.inference_mode():
        task()
    return (_kilobytes("VmHWM") - before) * 1024 / 1e6


def _kilobytes(entry: str) -> int:
    found = re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1])


def main(repeats: int = 3) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    both = models(device)
    result, all_threads = {"device": device.type, "seconds": {}, "ratio": {}}, torch.get_num_threads()
    for threads in sorted({1, all_threads}):
        torch.set_num_threads(threads)
        measured = {name: seconds(task, device, repeats) for name, task in tasks(both, device).items()}
        for name, value in measured.items():
            print(f"{device.type}, {threads} thread(s), batch {BATCH}, {name}: {value:.2f} s")
        result["seconds"][str(threads)] = measured
        result["ratio"][str(threads)] = ratio = measured["LocLoc, total"] / measured["PPD, total"]
        print(f"{threads} thread(s): LocLoc takes {ratio:.2f} times PPD's time (the paper: 13 s / 19 s = 0.68)")
    torch.set_num_threads(all_threads)
    result["peak_megabytes"] = {name: peak_megabytes(name, device) for name in ("LocLoc, total", "PPD, total")}
    for name, value in result["peak_megabytes"].items():
        print(f"{name}: {value:.0f} MB beside the weights at the peak")
    features = torch.randn(1, 384, 14, 14, device=device)
    tokens = torch.randn(1, 197, 384, device=device)
    image = torch.randn(1, 3, 224, 224, device=device)
    parts = {
        "LocLoc": lambda: both["LocLoc"](image),
        "PPD": lambda: both["PPD"](image),
        "frozen transformer": lambda: both["LocLoc"].frozen(image),
        "generator": lambda: both["LocLoc"].generator(features),
        "PPD decoder": lambda: both["PPD"].decoder(features),
        "classifier": lambda: both["LocLoc"].classifier(tokens),
    }
    result["gflops"] = {name: flops(call) / 1e9 for name, call in parts.items()}
    for name, value in result["gflops"].items():
        print(f"{name}: {value:.2f} GFLOPs an image (a multiplication and an addition are two)")
    return result


if __name__ == "__main__":
    main()
