"""The training loop of every classifier: Accelerate underneath, resumable, with a history that can be plotted.

One device today; `accelerate launch` on a script, or `notebook_launcher` in a notebook, runs the same loop on several.
"""

from __future__ import annotations

import math
import os
import random
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from wsolnb.errors import ParameterError, TrainingError
from wsolnb.methods.base import LocalizationModel, classification_loss


class TrainingConfig(BaseModel):
    """Hyperparameters of the loop.

    epochs: passes over the training images. lr: peak rate of the backbone. head_lr: of the head; None = lr.
    warmup: share of all steps with a linearly rising rate; after it the rate follows half a cosine to zero
        (`schedule="cosine"`), (1 - progress) ** power (`"poly"`), or stays (`"constant"`).
    optimizer: `adamw`, or `sgd` with momentum. weight_decay: on matrices and kernels only. betas, eps: of AdamW.
    clip: largest gradient norm, 0 = none.
    label_smoothing: of the cross-entropy. precision: `auto` = bf16 where the device computes it natively, else fp32.
    device: `auto` = CUDA, then MPS, then CPU. select: the column of the evaluation whose maximum picks the best epoch.
    seed: of the weights' further life: dropout, stochastic depth. Data order and augmentation have their own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(ge=1)
    lr: float = Field(gt=0)
    head_lr: float | None = Field(None, gt=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    schedule: Literal["cosine", "constant", "poly"] = "cosine"
    power: float = Field(0.9, gt=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-8, gt=0)
    clip: float = Field(1.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "auto"
    select: str = "top1"
    seed: int = 0


def pick_device(name: str = "auto") -> torch.device:
    """Return the named device; `auto` picks CUDA, then MPS, then CPU.

    Raises ParameterError when the device is unknown or not present.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ParameterError(f"device {name!r} is not available: {first}", "use auto, cpu, cuda or mps") from error
    return device


def pick_precision(precision: str, device: torch.device) -> str:
    """Return `bf16` or `fp32`: `auto` takes bfloat16 where the hardware has it, since emulation is slower than fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and torch, so that weights made next are reproducible on the same machine."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries that draw from the global state
    torch.manual_seed(seed)


def parameter_groups(model: LocalizationModel, config: TrainingConfig) -> list[dict]:
    """Split the trainable parameters by rate (backbone, head) and by decay (matrices and kernels; the rest)."""
    in_head = {id(p) for p in model.head.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))
            groups.setdefault((id(parameter) in in_head, decays), []).append(parameter)
    head_lr = config.head_lr or config.lr
    return [
        {"params": params, "lr": head_lr if head else config.lr, "weight_decay": config.weight_decay if decays else 0.0}
        for (head, decays), params in groups.items()
    ]


def rate_factor(step: int, steps: int, config: TrainingConfig) -> float:
    """Share of the peak learning rate at optimiser step `step` of `steps`: linear warm-up, then the schedule."""
    warm = round(config.warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - warm) / max(1, steps - warm)
    if config.schedule == "poly":
        return max(0.0, 1 - progress) ** config.power
    return 0.5 * (1 + math.cos(math.pi * progress))


def classify(model: nn.Module, batch: dict, config: TrainingConfig) -> Tensor:
    """Return the classification loss of a batch: the objective of every classifier."""
    logits = model(batch["image"]).logits
    return classification_loss(logits.float(), batch["label"], config.label_smoothing)


def train(
    model: LocalizationModel,
    loader: Iterable[dict],
    config: TrainingConfig,
    folder: str | Path,
    evaluate: Callable[[LocalizationModel], dict[str, float]] | None = None,
    progress: bool = True,
    objective: Callable[[nn.Module, dict, TrainingConfig], Tensor] = classify,
) -> pd.DataFrame:
    """Train `model` in place and return the history, one row per epoch.

    loader: batches `{"image": (B, 3, H, W), "label": (B,) or (B, C)}`; `set_epoch(epoch)` is called if it has one.
    folder: gets `last.safetensors` and, with `evaluate`, `best.safetensors` (weights), `history.csv`, and while the
        training runs `state.pt`, from which a second call with the same arguments goes on after an interruption.
    evaluate: called after every epoch with the model in evaluation mode; its numbers become columns of the history.
    objective: the loss of a batch; it calls `model` once, under autocast.

    Raises TrainingError when the loss is not finite (the last good epoch stays on disk) or memory runs out,
    ParameterError when the evaluation lacks the column `config.select`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    device = pick_device(config.device)
    # Autocast is ours, not Accelerate's: that would stay on the model's forward and lower the precision of evaluation.
    accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")
    bf16 = pick_precision(config.precision, device) == "bf16"
    set_seed(config.seed)
    groups = parameter_groups(model, config)
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)
    steps = config.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps, config))
    plain = model
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader)

    history: list[dict[str, float]] = []
    state_file = folder / "state.pt"
    if state_file.exists():
        history = _resume(state_file, plain, optimizer, schedule)
    # Once a second: every refresh is a message of the kernel, and a client that reads none while a cell runs (nbval)
    # loses what its queue cannot hold, the word that the cell is done among it.
    done = len(history) * len(loader)
    bar = tqdm(total=steps, initial=done, disable=not progress, unit="step", leave=False, mininterval=1.0)
    for epoch in range(len(history), config.epochs):
        # Accelerate's copy of a loader counts epochs by itself, from zero also when a training is resumed.
        for order in (loader, batches):
            if hasattr(order, "set_epoch"):
                order.set_epoch(epoch)
        started = time.perf_counter()
        model.train()
        total = torch.zeros((), device=device)
        seen = 0
        for step, batch in enumerate(batches):
            loss = _step(accelerator, model, optimizer, schedule, batch, config, bf16, objective)
            total += loss.detach() * len(batch["image"])
            seen += len(batch["image"])
            # Reading the loss waits for the device, so it is read rarely; a NaN is still found within a few steps.
            if step % 10 == 0 or step + 1 == len(loader):
                value = float(total) / seen
                if not math.isfinite(value):
                    bar.close()
                    raise TrainingError(
                        f"the loss is {value} in epoch {epoch + 1}, step {step + 1}",
                        f"lower lr ({config.lr}) or head_lr, raise warmup, or set precision='fp32'; the epochs before "
                        f"are kept in {folder}",
                    )
                bar.set_postfix(epoch=epoch + 1, loss=f"{value:.3f}", refresh=False)
            bar.update()
        row = {"epoch": epoch + 1, "loss": float(total) / seen, "seconds": time.perf_counter() - started}
        if evaluate is not None:
            plain.eval()
            with torch.inference_mode():
                row |= evaluate(plain)
            if config.select not in row:
                raise ParameterError(f"no column {config.select!r} in {sorted(row)}", "set select to one of them")
        history.append(row)
        if accelerator.is_main_process:
            _save_epoch(folder, plain, optimizer, schedule, history, config, evaluate is not None)
        accelerator.wait_for_everyone()
    bar.close()
    plain.eval()
    state_file.unlink(missing_ok=True)
    return pd.DataFrame(history)


def load_checkpoint(model: nn.Module, folder: str | Path, which: Literal["best", "last"]) -> nn.Module:
    """Load `best` or `last` weights of a trained folder into `model`, in evaluation mode.

    Raises TrainingError when they are missing or do not fit.
    """
    path = Path(folder) / f"{which}.safetensors"
    try:
        model.load_state_dict(load_file(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise TrainingError(
            f"cannot load {path}: {str(error).splitlines()[0]}", "delete the folder and train again"
        ) from error
    return model.eval()


def _step(accelerator, model, optimizer, schedule, batch, config, bf16: bool, objective) -> Tensor:
    try:
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
            loss = objective(model, batch, config)
        optimizer.zero_grad()
        accelerator.backward(loss)
        if config.clip:
            accelerator.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        schedule.step()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory on {accelerator.device} with batches of {len(batch['image'])}",
            "lower batch_size or image_size; run again to go on from the last finished epoch",
        ) from error
    return loss


def _save_epoch(folder, model, optimizer, schedule, history, config, evaluated: bool) -> None:
    """Write the epoch's weights, table and state, each by rename, so an interruption leaves the epoch before."""
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    values = [row.get(config.select) for row in history]
    names = ["last.safetensors"]
    # Strictly better than every epoch before: of equal epochs the earliest is kept.
    if evaluated and values[-1] == max(values) and values.count(values[-1]) == 1:
        names.append("best.safetensors")
    for name in names:
        save_file(weights, folder / f".{name}")
        os.replace(folder / f".{name}", folder / name)
    pd.DataFrame(history).to_csv(folder / ".history.csv", index=False)
    os.replace(folder / ".history.csv", folder / "history.csv")
    state = {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "history": history,
        "rng": torch.get_rng_state(),
    }
    torch.save(state, folder / ".state.pt")
    os.replace(folder / ".state.pt", folder / "state.pt")


def _resume(path: Path, model, optimizer, schedule) -> list[dict[str, float]]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
    except Exception as error:
        raise TrainingError(
            f"the interrupted training in {path} cannot be resumed: {type(error).__name__}: {error}",
            f"delete {path} to start again",
        ) from error
    warnings.warn(f"resuming after epoch {len(state['history'])} of an interrupted training in {path}", stacklevel=3)
    return state["history"]
