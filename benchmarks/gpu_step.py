"""Training steps at 224 px, DeiT-S, 200 classes: how many images a second, and how long the papers' runs would take.

TS-CAM and SCM, LocLoc's classifier and generator, PPD's decoder and probe, as `wsolnb.train` steps them: forward,
backward, clipping, AdamW, in bf16 where the device has it. On CUDA a step has the papers' 256 images. On the CPU it has
4, which shows that it runs and how the parts compare, no more. `python -m benchmarks.gpu_step 128 compile` takes other
images a step, and compiles the forward pass.

A step of SCM is split into the backbone with its head (a step of TS-CAM) and SCM's blocks (the rest). Beside them
stands the data: JPEG files of 500 x 375, decoded, resized, cropped and augmented by one process. The share of the peak
is that of the rate which the device reaches in one large matrix product of the same precision; FLOPs are torch's count.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from wsolnb.data.sample import Sample
from wsolnb.data.transforms import Compose
from wsolnb.methods.scm import SCMConfig
from wsolnb.papers import locloc
from wsolnb.train.loop import TrainingConfig, gradients, parameter_groups, pick_device, pick_precision, update
from wsolnb.train.recipe import Recipe

CLASSES, SIDE = 200, 224
CUB, EPOCHS = 5994, {"TS-CAM": 30, "SCM": 30, "LFDM": 100, "GEG": 20, "PPD's decoder": 20, "PPD's probe": 100}
"""CUB's training images, and the passes over them of the profile `cub`."""
MODELS = {
    "TS-CAM": ("tscam", {"padding": "zeros"}),
    "SCM": ("scm", {"padding": "zeros", "config": SCMConfig.released().model_dump()}),
    "LFDM": ("locloc", {"part": "classifier"}),
    "GEG": ("locloc", {"part": "generator"}),
    "PPD's decoder": ("ppd", {"part": "decoder"}),
    "PPD's probe": ("ppd", {"part": "probe"}),
}


def recipe_of(name: str) -> Recipe:
    method, options = MODELS[name]
    training = TrainingConfig(epochs=EPOCHS[name], lr=5e-5)
    sizes = {"image_size": SIDE, "protocol": "crop_resize"}
    return Recipe(method=method, backbone="deit_small", options=options, training=training, **sizes)


def batch_of(images: int, device: torch.device) -> dict:
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 2, (images, SIDE, SIDE), np.uint8)
    samples = [Sample(np.zeros((SIDE, SIDE, 3), np.uint8), "", (0,), mask=mask) for mask in masks]
    labels = torch.from_numpy(rng.integers(0, CLASSES, images)).to(device)
    return {"image": torch.randn(images, 3, SIDE, SIDE, device=device), "label": labels, "samples": samples}


def step_of(name: str, images: int, device: torch.device, precision: str, compiled: bool) -> Callable[[], object]:
    recipe = recipe_of(name)
    config, accelerator = recipe.training, Accelerator(mixed_precision="no", cpu=device.type == "cpu")
    model = recipe.build(CLASSES).to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=config.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    forward, batch = torch.compile(model) if compiled else model, batch_of(images, device)

    def step() -> None:
        if gradients(accelerator, model, forward, batch, 1, config, precision) is None:
            raise SystemExit(f"{name}: out of memory with {images} images: set images to fewer")
        update(accelerator, model, optimizer, schedule, config)

    return step


def loaded(images: int = 32) -> float:
    """Return how many training images a second one process decodes and augments."""
    small = np.random.default_rng(0).integers(0, 256, (15, 20, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
    transform: Compose = recipe_of("SCM").train_transform()

    def load() -> None:
        for index in range(images):
            sample = Sample(np.asarray(Image.open(file)), "", (0,))
            transform(sample, np.random.default_rng(index))

    return images / locloc.seconds(load, torch.device("cpu"), 3)


def reached(device: torch.device, precision: str) -> float:
    """Return the FLOPs a second of one large matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * side**3 / locloc.seconds(lambda: left @ left, device, 10)


def main(images: int = 0, compiled: bool = False) -> dict:
    device = pick_device()
    precision, images = pick_precision("auto", device), images or (256 if device.type == "cuda" else 4)
    rates = {"device": device.type, "precision": precision, "images": images, "peak": reached(device, precision)}
    rates["loaded by one process"] = loaded()
    print(f"{device.type}, {precision}, {images} images a step; one process loads {rates['loaded by one process']:.0f} "
          f"images/s; a matrix product reaches {rates['peak'] / 1e12:.2f} TFLOP/s")  # fmt: skip
    repeats = 20 if device.type == "cuda" else 2
    for name in MODELS:
        step = step_of(name, images, device, precision, compiled)
        seconds = locloc.seconds(step, device, repeats, learns=True)
        with FlopCounterMode(display=False) as counter:
            step()
        hours = CUB * EPOCHS[name] / images * seconds / 3600
        rates[name] = {"seconds": seconds, "hours": hours, "share of the peak":
                       counter.get_total_flops() / seconds / rates["peak"]}  # fmt: skip
        print(f"{name}: {images / seconds:.1f} images/s, {rates[name]['share of the peak']:.0%} of the peak; "
              f"{EPOCHS[name]} epochs of CUB would take {hours:.1f} h of steps")  # fmt: skip
    blocks = 1 - rates["TS-CAM"]["seconds"] / rates["SCM"]["seconds"]
    rates["share of SCM's blocks"] = blocks
    rates["processes that load as fast"] = images / rates["SCM"]["seconds"] / rates["loaded by one process"]
    print(f"a step of SCM: {1 - blocks:.0%} backbone and head, {blocks:.0%} SCM's blocks; "
          f"{rates['processes that load as fast']:.2f} processes load as fast as it trains")  # fmt: skip
    return rates


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    main(*numbers, compiled="compile" in sys.argv)
