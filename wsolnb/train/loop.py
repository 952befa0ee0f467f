"""The training loop of every classifier: Accelerate underneath, resumable at any step, with a history to be plotted.

Accelerate takes care of the device, of several processes (`accelerate launch` on a script, or `notebook_launcher` in a
notebook) and of what these must exchange: gradients, losses, random states. The loop has its own autocast, because
Accelerate's would stay on the model's forward after the training. Every later evaluation would then run in low
precision, and one process could not train in two precisions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import math
import os
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, PartialState, skip_first_batches
from accelerate.utils import DistributedDataParallelKwargs, broadcast, gather_object, set_seed
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from wsolnb.backbones.checkpoints import load_archive
from wsolnb.errors import ParameterError, TrainingError
from wsolnb.files import sweep, write_atomically
from wsolnb.methods.base import Trainable

Scorer = Callable[[Trainable], dict[str, float]]
"""A function that is called after every epoch. It returns columns of the history for a model, from validation
images."""

LOOK = 10
"""Steps between looks at the loss and at the clock: reading the loss waits for the device."""
SAVE_EVERY = 120.0
"""Seconds after which the state is kept inside an epoch, too."""
PARTS = "parts.txt"
"""The file beside the state that says in how many parts a batch went through the network since memory ran out."""


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
    accumulate: parts that a batch goes through the network in, one after the other; their gradients are added up.
        Normalisation layers, and losses that compare the images of a batch, then see the images of a part only.
    ema: share of the old in the running mean of the weights over the steps. That mean is then what is scored and kept;
        0 = the weights themselves.
    compile: whether `torch.compile` translates the forward pass: minutes at the start, for faster steps on CUDA.
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
    accumulate: int = Field(1, ge=1)
    ema: float = Field(0.0, ge=0, lt=1)
    compile: bool = False


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


def processes(device: torch.device) -> int:
    """Return how many processes of one launch (`accelerate launch`, torchrun) train together; 1 where none did."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # Accelerate's state is left to who trains
        return 1
    return PartialState(cpu=device.type == "cpu").num_processes


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
        Several processes divide the batches of a DataLoader; of anything else each goes through all. The batches of an
        epoch depend on the epoch alone.
    folder: gets `last.safetensors` and, with `evaluate`, `best.safetensors` (weights), `history.csv`, and while the
        training runs `state.pt`, from which a second call with the same arguments goes on after an interruption. It is
        kept after every epoch, and inside of one every `SAVE_EVERY` seconds.
    evaluate: called after every epoch with the model in evaluation mode; its numbers become columns of the history.
        Every process calls it, so that none waits for another longer than its communication allows.

    The best epoch is the first with the largest finite `config.select`; if none is finite, it is the last one.

    Where memory runs out, batches go through the network in twice as many parts from then on: the same batches, rates
    and steps. A warning says so. Several processes end instead, and do it when they are started again.

    Raises TrainingError when the loss is not finite (the last good epoch stays on disk), when memory runs out for
    single images, or when the interrupted training had another configuration or its state is damaged. Raises
    ParameterError when the loader has no batch, or the evaluation lacks the column `config.select`.
    """
    folder = Path(folder)
    device = pick_device(config.device)
    # Networks may have parts without a gradient, as LocLoc's generator as it was released.
    unused = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu", kwargs_handlers=unused)
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
    mean = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True) if config.ema else None
    kept = mean.module if mean else plain
    forward = torch.compile(model) if config.compile else model
    # A resumed training must have all of these unchanged. Device and precision count as what `auto` picks: both change
    # rounding, and the device also dropout. How they were asked for, and the index of a GPU, change nothing.
    settings = config.model_dump() | {"device": device.type, "precision": precision}
    settings |= {"steps of an epoch": len(batches), "processes": accelerator.num_processes}
    state_file, parts_file = folder / "state.pt", folder / PARTS
    noted = parts_file.read_text("utf-8", "replace").strip() if parts_file.exists() else ""
    parts = max(config.accumulate, int(noted) if noted.isdecimal() else 1)
    stateful = {"model": plain, "optimizer": optimizer, "schedule": schedule} | ({"mean": mean} if mean else {})
    at = _resume(state_file, settings, stateful, accelerator) if state_file.exists() else _Progress([])
    rows, hidden = at.rows, not (progress and accelerator.is_main_process)
    # Once a second: every refresh is a message of the kernel, and a client that reads none while a cell runs (nbval)
    # loses what its queue cannot hold, the word that the cell is done among it.
    done = len(rows) * len(batches) + at.step
    bar = tqdm(total=steps, initial=done, disable=hidden, unit="step", leave=False, mininterval=1.0)
    saved = time.perf_counter()
    for epoch in range(len(rows), config.epochs):
        # Accelerate's copy of a loader counts epochs by itself, from zero also when a training is resumed.
        for order in (loader, batches):
            if hasattr(order, "set_epoch"):
                order.set_epoch(epoch)
        started = time.perf_counter() - at.seconds
        model.train()
        total, seen = torch.tensor(at.total, device=accelerator.device), at.seen
        for step, batch in enumerate(_from(batches, at.step), start=at.step):
            if step and step == at.step and at.random:  # not before: to begin, a loader draws from these states
                _set_random(at.random, accelerator.device)
            before = _random(accelerator.device)
            while (loss := gradients(accelerator, plain, forward, batch, parts, config, precision)) is None:
                parts = _more_parts(parts, len(batch["image"]), parts_file, accelerator)
                _set_random(before, accelerator.device)
            update(accelerator, model, optimizer, schedule, config)
            if mean:
                mean.update_parameters(plain)
            total += loss * len(batch["image"])
            seen += len(batch["image"])
            # A NaN is still found within a few steps.
            if step % LOOK == 0 or step + 1 == len(batches):
                value, due = _look(accelerator, total, seen, time.perf_counter() - saved > SAVE_EVERY)
                if not math.isfinite(value):
                    bar.close()
                    remedy = f"lower lr ({config.lr}) or head_lr, raise warmup, or set precision='fp32'; "
                    remedy += f"the epochs before are kept in {folder}"
                    raise TrainingError(f"the loss is {value} in epoch {epoch + 1}, step {step + 1}", remedy)
                bar.set_postfix(epoch=epoch + 1, loss=f"{value:.3f}", refresh=False)
                if due and step + 1 < len(batches):
                    at = _Progress(rows, step + 1, time.perf_counter() - started, total.item(), seen)
                    _save_state(state_file, at, settings, stateful, accelerator)
                    saved = time.perf_counter()
            bar.update()
        value, _ = _look(accelerator, total, seen)
        row = {"epoch": epoch + 1, "loss": value, "seconds": time.perf_counter() - started}
        if accelerator.num_processes > 1:  # each has its own running means of normalisation layers
            for buffer in itertools.chain(plain.buffers(), mean.buffers() if mean else ()):
                buffer.copy_(broadcast(buffer))
        if evaluate is not None:
            kept.eval()
            with torch.inference_mode():
                row |= evaluate(kept)
            if config.select not in row:
                raise ParameterError(f"no column {config.select!r} in {sorted(row)}", "set select to one of them")
        rows.append(row)
        if accelerator.is_main_process:
            scores = None if evaluate is None else [row[config.select] for row in rows]
            _save_weights(folder, kept, rows, scores)
        at = _Progress(rows)
        _save_state(state_file, at, settings, stateful, accelerator)
        saved = time.perf_counter()
    bar.close()
    if mean:
        plain.load_state_dict(kept.state_dict())
    plain.eval()
    if accelerator.is_main_process:
        for file in (state_file, parts_file):
            file.unlink(missing_ok=True)
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


# Steps


def _from(batches: Iterable[dict], first: int) -> Iterator[dict]:
    """Return an epoch's batches from the first one that is to be trained on; no image of those before is read."""
    if first and isinstance(batches, DataLoader):
        return iter(skip_first_batches(batches, first))
    return itertools.islice(batches, first, None)


def gradients(
    accelerator: Accelerator, plain: Trainable, forward: nn.Module, batch: dict, parts: int, config: TrainingConfig,
    precision: str,
) -> Tensor | None:  # fmt: skip
    """Add up the gradients of a batch's parts; returns its mean loss, a scalar, or None where memory ran out.

    forward: `plain`, wrapped for several processes, or compiled. precision: `bf16` or `fp32`.
    """
    losses, images = [], len(batch["image"])
    size = -(-images // parts)
    plain.zero_grad()
    try:
        for first in range(0, images, size):
            part = batch if parts == 1 else {name: values[first : first + size] for name, values in batch.items()}
            last, share = first + size >= images, len(part["image"]) / images
            with contextlib.nullcontext() if last else accelerator.no_sync(forward):
                with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=precision == "bf16"):
                    # The forward of several processes is the wrapper that joins their gradients.
                    loss = plain.loss(forward, part, config.label_smoothing) * share
                accelerator.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        # What the error still holds is free only behind this block.
    plain.zero_grad()
    torch.cuda.empty_cache()
    return None


def ran_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out; of the main memory torch says so in words only."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)


def _more_parts(parts: int, images: int, file: Path, accelerator: Accelerator) -> int:
    """Return twice as many parts, and note them for a training that is started again."""
    size = -(-images // parts)
    problem = f"out of memory on {accelerator.device} with {size} image{'s' * (size > 1)} at once"
    if size == 1:
        problem = f"{problem}, whatever the batch_size"
        raise TrainingError(problem, "lower image_size, or choose a smaller network or device='cpu'")
    write_atomically(file, f"{2 * parts}\n")
    if accelerator.num_processes > 1:  # the others wait for gradients that do not come
        raise TrainingError(problem, "run the same again: it goes on with half as many, and batches of the same images")
    warnings.warn(f"{problem}: batches of {images} go on in {2 * parts} parts, their gradients added up", stacklevel=3)
    return 2 * parts


def update(accelerator: Accelerator, model: nn.Module, optimizer: Any, schedule: Any, config: TrainingConfig) -> None:
    """Clip the gradients and take a step with them, and one of the schedule.

    Raises TrainingError when memory runs out.
    """
    try:
        if config.clip:
            accelerator.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        problem = f"out of memory on {accelerator.device} in the optimizer, whatever the size of a batch"
        raise TrainingError(problem, "choose a smaller network, or device='cpu'") from error
    schedule.step()


def _look(accelerator: Accelerator, total: Tensor, seen: int, due: bool = False) -> tuple[float, bool]:
    """Return the mean loss over the images of all processes, and whether the state is due in any of them."""
    numbers = torch.stack([total, total.new_tensor(seen), total.new_tensor(due)])
    total, seen, due = accelerator.reduce(numbers, "sum").tolist()
    return total / seen, bool(due)


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


# What is kept


@dataclasses.dataclass
class _Progress:
    """How far a training is: rows of finished epochs; of the running one steps, seconds, sum of losses, images seen.

    total, seen and the random states are those of one process.
    """

    rows: list[dict[str, float]]
    step: int = 0
    seconds: float = 0.0
    total: float = 0.0
    seen: int = 0
    random: dict[str, Any] = dataclasses.field(default_factory=dict)


def _random(device: torch.device) -> dict[str, Any]:
    """Return every random state that a training can draw from, as plain values and tensors."""
    kind, words, *rest = np.random.get_state()  # noqa: NPY002  what a method may draw from
    found = {"python": random.getstate(), "numpy": (kind, words.tolist(), *rest), "cpu": torch.get_rng_state()}
    return found | ({} if device.type == "cpu" else {device.type: torch.get_device_module(device).get_rng_state()})


def _set_random(states: dict[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type])


def _save_weights(folder: Path, model: nn.Module, rows: list[dict], scores: list[float] | None) -> None:
    """Write the epoch's weights and the table, each by rename, so an interruption leaves the epoch before."""
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    content = save(weights, {"sha256": _checksum(weights)})
    for name in ("last", "best") if scores and _is_best(scores) else ("last",):
        write_atomically(folder / f"{name}.safetensors", content)
    write_atomically(folder / "history.csv", pd.DataFrame(rows).to_csv(index=False))


def _save_state(path: Path, at: _Progress, settings, stateful: dict[str, Any], accelerator: Accelerator) -> None:
    """Write all that the training goes on from, by rename; every process gives what is its own."""
    own = gather_object([{"total": at.total, "seen": at.seen, "random": _random(accelerator.device)}])
    if accelerator.is_main_process:
        state = {"settings": settings, "history": at.rows, "step": at.step, "seconds": at.seconds, "processes": own}
        file = io.BytesIO()
        torch.save(state | {name: one.state_dict() for name, one in stateful.items()}, file)
        write_atomically(path, file.getvalue())
    accelerator.wait_for_everyone()


def _resume(path: Path, settings, stateful: dict[str, Any], accelerator: Accelerator) -> _Progress:
    try:
        state = load_archive(path)
        before = state["settings"]
        names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if not names:
            for name, one in stateful.items():
                one.load_state_dict(state[name])
            own = state["processes"][accelerator.process_index]
            _set_random(own["random"], accelerator.device)
            found = _Progress(state["history"], state["step"], state["seconds"], **own)
    except Exception as error:
        problem = f"the interrupted training in {path} cannot be resumed: {type(error).__name__}: {error}"
        raise TrainingError(problem, f"delete {path} to start again") from error
    if names:
        changes = "; ".join(f"{name} {before.get(name)}, now {settings.get(name)}" for name in names)
        remedy = f"delete {path} to start again, or go on with the settings that it was interrupted with"
        raise TrainingError(f"the training in {path} was interrupted with {changes}", remedy)
    if accelerator.is_main_process:
        done = f"epoch {len(found.rows)}" + (f" and {found.step} steps" if found.step else "")
        warnings.warn(f"resuming after {done} of an interrupted training in {path}", stacklevel=3)
    return found
