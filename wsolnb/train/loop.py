"""The training loop of every classifier: Accelerate underneath, resumable, with a history that can be plotted.

Accelerate takes care of the device, of several processes (`accelerate launch` on a script, or `notebook_launcher` in a
notebook) and of what these must exchange: gradients, losses, random states. The loop has its own autocast, because
Accelerate's would stay on the model's forward after the training. Every later evaluation would then run in low
precision, and one process could not train in two precisions.
"""

from __future__ import annotations

import hashlib
import io
import math
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, set_seed
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from wsolnb.errors import ParameterError, TrainingError
from wsolnb.files import sweep, write_atomically
from wsolnb.methods.base import Trainable

Scorer = Callable[[Trainable], dict[str, float]]
"""A function that is called after every epoch. It returns columns of the history for a model, from validation
images."""


class TrainingConfig(BaseModel):
    """Hyperparameters of the loop.

    epochs: passes over the training images. lr: peak rate of the backbone. head_lr: of the head; None = lr.
    warmup: share of all steps with a linearly rising rate; after it the rate follows half a cosine to zero
        (`schedule="cosine"`), (1 - progress) ** power (`"poly"`), or stays (`"constant"`).
    optimizer: `adamw`, or `sgd` with momentum. weight_decay: on matrices and kernels only. betas, eps: of AdamW.
    clip: largest gradient norm, 0 = none.
    label_smoothing: of the cross-entropy. precision: `auto` = bf16 where the device computes it natively, else fp32.
    device: `auto` = CUDA, then MPS, then CPU. select: the column of the evaluation whose maximum picks the best epoch.
    seed: of dropout and stochastic depth. Data order and augmentation have a seed of their own.
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
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
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


def parameter_groups(model: Trainable, config: TrainingConfig) -> list[dict]:
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


def train(
    model: Trainable,
    loader: Iterable[dict],
    config: TrainingConfig,
    folder: str | Path,
    evaluate: Scorer | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train `model` in place by its own `loss` and return the history, one row per epoch.

    loader: batches `{"image": (B, 3, H, W), "label": (B,) or (B, C)}`; `set_epoch(epoch)` is called if it has one.
        Several processes divide the batches of a DataLoader; of anything else each goes through all.
    folder: gets `last.safetensors` and, with `evaluate`, `best.safetensors` (weights), `history.csv`, and while the
        training runs `state.pt`, from which a second call with the same arguments goes on after an interruption.
    evaluate: called after every epoch with the model in evaluation mode; its numbers become columns of the history.
        Every process calls it, so that none waits for another longer than its communication allows.

    The best epoch is the first with the largest finite `config.select`; if none is finite, it is the last one.

    Raises TrainingError when the loss is not finite (the last good epoch stays on disk), when memory runs out, or when
    the interrupted training had another configuration or its state is damaged. Raises ParameterError when the loader
    has no batch, or the evaluation lacks the column `config.select`.
    """
    folder = Path(folder)
    device = pick_device(config.device)
    accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")
    batches = accelerator.prepare(loader)
    _require_batches(loader, batches, accelerator.num_processes)
    if accelerator.is_main_process:
        sweep(folder)  # what a killed run was writing
    precision = pick_precision(config.precision, device)
    # Dropout differs between processes, as it does between the images of a batch.
    set_seed(config.seed + accelerator.process_index)
    groups = parameter_groups(model, config)
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)
    steps = config.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps, config))
    plain = model
    model, optimizer = accelerator.prepare(model, optimizer)
    # A resumed training must have all of these unchanged. Device and precision count as what `auto` picks: both change
    # rounding, and the device also dropout. How they were asked for, and the index of a GPU, change nothing.
    settings = config.model_dump() | {"device": device.type, "precision": precision}
    settings |= {"steps of an epoch": len(batches), "processes": accelerator.num_processes}
    state_file = folder / "state.pt"
    rows = _resume(state_file, settings, plain, optimizer, schedule, accelerator) if state_file.exists() else []
    hidden, done = not (progress and accelerator.is_main_process), len(rows) * len(batches)
    # Once a second: every refresh is a message of the kernel, and a client that reads none while a cell runs (nbval)
    # loses what its queue cannot hold, the word that the cell is done among it.
    bar = tqdm(total=steps, initial=done, disable=hidden, unit="step", leave=False, mininterval=1.0)
    for epoch in range(len(rows), config.epochs):
        # Accelerate's copy of a loader counts epochs by itself, from zero also when a training is resumed.
        for order in (loader, batches):
            if hasattr(order, "set_epoch"):
                order.set_epoch(epoch)
        started = time.perf_counter()
        model.train()
        total, seen = torch.zeros((), device=accelerator.device), 0
        for step, batch in enumerate(batches):
            loss = _step(accelerator, plain, model, optimizer, schedule, batch, config, precision)
            total += loss.detach() * len(batch["image"])
            seen += len(batch["image"])
            # Reading the loss waits for the device, so it is read rarely; a NaN is still found within a few steps.
            if step % 10 == 0 or step + 1 == len(batches):
                value = _mean(accelerator, total, seen)
                if not math.isfinite(value):
                    bar.close()
                    remedy = f"lower lr ({config.lr}) or head_lr, raise warmup, or set precision='fp32'; "
                    remedy += f"the epochs before are kept in {folder}"
                    raise TrainingError(f"the loss is {value} in epoch {epoch + 1}, step {step + 1}", remedy)
                bar.set_postfix(epoch=epoch + 1, loss=f"{value:.3f}", refresh=False)
            bar.update()
        row = {"epoch": epoch + 1, "loss": _mean(accelerator, total, seen), "seconds": time.perf_counter() - started}
        if accelerator.num_processes > 1:  # each has its own running means of normalisation layers
            for buffer in plain.buffers():
                buffer.copy_(broadcast(buffer))
        if evaluate is not None:
            plain.eval()
            with torch.inference_mode():
                row |= evaluate(plain)
            if config.select not in row:
                raise ParameterError(f"no column {config.select!r} in {sorted(row)}", "set select to one of them")
        rows.append(row)
        random_states = gather_object([[module.get_rng_state() for module in _generators(accelerator.device)]])
        if accelerator.is_main_process:
            scores = None if evaluate is None else [row[config.select] for row in rows]
            _save_epoch(folder, plain, optimizer, schedule, rows, scores, settings, random_states)
        accelerator.wait_for_everyone()
    bar.close()
    plain.eval()
    if accelerator.is_main_process:
        state_file.unlink(missing_ok=True)
        if evaluate is not None and not any(math.isfinite(row[config.select]) for row in rows):
            warnings.warn(f"{config.select} is finite in no epoch: the best is taken to be the last one", stacklevel=2)
    accelerator.wait_for_everyone()
    return pd.DataFrame(rows)


def load_checkpoint(model: nn.Module, folder: str | Path, which: Literal["best", "last"]) -> nn.Module:
    """Load `best` or `last` weights of a trained folder into `model`, in evaluation mode.

    Raises TrainingError when they are missing, damaged or do not fit.
    """
    path = Path(folder) / f"{which}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
            kept = (file.metadata() or {}).get("sha256")
        # Safetensors itself does not notice a changed weight. Files of other origin carry no checksum.
        if kept is not None and kept != _checksum(weights):
            raise ValueError("its checksum differs, the file is damaged")
        model.load_state_dict(weights)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise _damaged("load", path, error) from error
    return model.eval()


def history(folder: str | Path) -> pd.DataFrame:
    """Return the training history kept in a checkpoint folder, one row per epoch.

    Raises TrainingError when it is missing or damaged.
    """
    path = Path(folder) / "history.csv"
    try:
        text = path.read_text("utf-8")
        table = pd.read_csv(io.StringIO(text))
        if not text.endswith("\n") or not len(table) or not {"epoch", "loss", "seconds"} <= set(table.columns):
            raise ValueError("a part of it is missing")
        numbers = all(pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes)
        if not numbers or list(table["epoch"]) != list(range(1, len(table) + 1)):
            raise ValueError("its rows are not the numbers of one epoch each")
    except (OSError, ValueError) as error:
        raise _damaged("read", path, error) from error
    return table


def _damaged(verb: str, path: Path, error: Exception) -> TrainingError:
    return TrainingError(f"cannot {verb} {path}: {str(error).splitlines()[0]}", "delete the folder and train again")


def _require_batches(loader: Iterable[dict], batches: Iterable[dict], processes: int) -> None:
    if not len(batches):
        problem = "the loader has no batch"
        if isinstance(loader, DataLoader) and loader.batch_size:
            problem = f"{len(loader.dataset)} training images make no batch of {loader.batch_size}"
        share = f" for each of {processes} processes" if processes > 1 else ""
        raise ParameterError(problem + share, "lower batch_size")


def _step(accelerator, plain, model, optimizer, schedule, batch, config, precision: str) -> Tensor:
    try:
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=precision == "bf16"):
            # The forward goes through `model`: around several processes' it has the wrapper that joins gradients.
            loss = plain.loss(model, batch, config.label_smoothing)
        optimizer.zero_grad()
        accelerator.backward(loss)
        if config.clip:
            accelerator.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        schedule.step()
    except torch.OutOfMemoryError as error:
        problem = f"out of memory on {accelerator.device} with batches of {len(batch['image'])}"
        remedy = "lower batch_size or image_size; run again to go on from the last finished epoch"
        raise TrainingError(problem, remedy) from error
    return loss


def _mean(accelerator: Accelerator, total: Tensor, seen: int) -> float:
    """Mean loss over the images of all processes."""
    total, seen = accelerator.reduce(torch.stack([total, total.new_tensor(seen)]), "sum").tolist()
    return total / seen


def _generators(device: torch.device) -> list[Any]:
    """The modules that hold the random states which a training draws from."""
    return [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]


def _is_best(scores: list[float]) -> bool:
    """Whether the last epoch is better than all before: of equal epochs the earliest is kept.

    Only a finite score counts. While there is none, the last epoch is the best, so that there always is one.
    """
    *before, last = (score if math.isfinite(score) else -math.inf for score in scores)
    best = max(before, default=-math.inf)
    return last > best or best == -math.inf


def _checksum(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _save_epoch(folder, model, optimizer, schedule, rows, scores, settings, random_states) -> None:
    """Write the epoch's weights, table and state, each by rename, so an interruption leaves the epoch before."""
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    content = save(weights, {"sha256": _checksum(weights)})
    for name in ("last", "best") if scores and _is_best(scores) else ("last",):
        write_atomically(folder / f"{name}.safetensors", content)
    write_atomically(folder / "history.csv", pd.DataFrame(rows).to_csv(index=False))
    state = {"settings": settings, "model": weights, "history": rows, "random": random_states}
    state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    file = io.BytesIO()
    torch.save(state, file)
    write_atomically(folder / "state.pt", file.getvalue())


def _resume(path: Path, settings, model, optimizer, schedule, accelerator) -> list[dict[str, float]]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["settings"]
        names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if not names:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            states = state["random"][accelerator.process_index]
            for module, random_state in zip(_generators(accelerator.device), states, strict=True):
                module.set_rng_state(random_state)
    except Exception as error:
        problem = f"the interrupted training in {path} cannot be resumed: {type(error).__name__}: {error}"
        raise TrainingError(problem, f"delete {path} to start again") from error
    if names:
        changes = "; ".join(f"{name} {before.get(name)}, now {settings.get(name)}" for name in names)
        remedy = f"delete {path} to start again, or go on with the settings that it was interrupted with"
        raise TrainingError(f"the training in {path} was interrupted with {changes}", remedy)
    if accelerator.is_main_process:
        done = len(state["history"])
        warnings.warn(f"resuming after epoch {done} of an interrupted training in {path}", stacklevel=3)
    return state["history"]
