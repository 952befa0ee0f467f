"""Weights from files, also of other programs: wrapped, with prefixes, or for another grid of patches."""

from __future__ import annotations

import math
import re
import zipfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from wsolnb.errors import WeightsError

COPIES = {"student", "ema", "model_ema", "state_dict_ema"}
"""If a file holds several networks, the ones under these names are not taken."""

HEADS = ("head", "fc.", "classifier", "mask_token")
"""A backbone does not need tensors whose names begin like this; `mask_token` serves DINOv2's training alone."""


def load_weights(model: nn.Module, path: str | Path, kept: str | None = None) -> list[str]:
    """Load a local file of weights into `model`; returns the names of the file's tensors that were left out.

    The file is read by `read_tensors`. A prefix of all of the model's names (`module.`, `backbone.vit.`) is taken off,
    and tensors without this prefix are left out. If the file holds a teacher and a student, the teacher is taken.
    Classifier heads that the model does not have are left out. A position embedding of another square grid is resampled
    to the model's grid. kept: where the file lacks tensors whose names begin like this, the model keeps its own.

    Raises WeightsError as `read_tensors` does, and when the file misses a tensor, changes the shape of one, or holds
    one that the model lacks.
    """
    state, own = read_tensors(path), model.state_dict()
    held, prefix = list(state), prefix_of(state, own)
    begins = {name.partition(".")[0] for name in state}
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if "register_tokens" in state and "reg_token" in own:  # as published with DINOv2; the other name is timm's
        state["reg_token"] = state.pop("register_tokens")
    state = _fit_positions(state, own, model)
    # Files older than PyTorch 0.4.1 do not count the batches of a normalisation.
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    missing = [name for name in missing if kept is None or not name.startswith(kept)]
    reshaped = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or reshaped:
        name = (missing or reshaped)[0]
        told = "misses it" if missing else f"has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        prefixed = f"; every tensor begins with '{begins.pop()}.'" if len(begins) == 1 else ""
        prefixed += f"; names are compared behind the prefix {prefix!r}" if prefix else ""
        raise WeightsError(
            f"{path} does not fit the model: {len(missing)} tensors missing, {len(reshaped)} of another shape; "
            f"first: {name!r} ({told}){prefixed}",
            "build the backbone with the name and image size that the weights were made for",
        )
    for name, value in own.items():
        if value.is_floating_point() and name in state and not state[name].is_floating_point():
            problem = (
                f"{path} holds {str(state[name].dtype).removeprefix('torch.')} in {name!r}, where weights are floats"
            )
            raise WeightsError(problem, "give the weights before they were quantised")
    unused = (*HEADS, *getattr(model, "UNUSED", ()))
    extra = [name for name in state if name not in own and not name.startswith(unused)]
    if extra:
        raise WeightsError(
            f"{path} holds {len(extra)} tensors that the model lacks; first: {extra[0]!r}",
            "build the backbone that the weights were made for",
        )
    model.load_state_dict({name: state.get(name, value) for name, value in own.items()})
    taken = {prefix + name for name in own} | {f"{prefix}register_tokens"}
    return [name for name in held if name not in taken]


def positioned_prefix(vit: nn.Module) -> int:
    """Return how many first rows of a vision transformer's position embedding belong to prefix tokens.

    None do in DeiT-3 and in DINOv2 with registers, whose embedding is of the patches alone.
    """
    return 0 if vit.no_embed_class else vit.num_prefix_tokens


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a file without running code; names in nested dictionaries are joined by dots.

    Raises WeightsError when the file is missing, damaged, holds something that would run code, or no tensors by name.
    """
    state = dict(_tensors(_read(Path(path))))
    if not state:
        raise WeightsError(
            f"{path} holds no tensors by name",
            "save a dictionary of tensors (a state_dict); prefixes of the names such as 'module.' are taken off",
        )
    for name, value in state.items():
        if value.is_floating_point() and value.isnan().any():
            raise WeightsError(f"{path} holds NaN in {name!r}", "take the weights of an epoch before training diverged")
    return state


def prefix_of(state: Iterable[str], known: Container[str]) -> str:
    """Return what stands before the known names in a file: that behind which most of them are found, of no copy."""
    found: Counter[str] = Counter()
    for name in state:
        for cut in (0, *(match.end() for match in re.finditer(r"\.", name))):
            found[name[:cut]] += name[cut:] in known
    return max(found, key=lambda prefix: (found[prefix], COPIES.isdisjoint(prefix.split(".")))) if found.total() else ""


def _read(path: Path) -> Any:
    if not path.is_file():
        raise WeightsError(f"no checkpoint at {path}", "check the path; .safetensors, .pth and .pt files are read")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return load_archive(path)
    except Exception as error:
        refused = re.search(r"[Uu]nsupported (?:global|class|operand|GLOBAL)\W+(?:GLOBAL )?([\w.]+)", str(error))
        told = f"{type(error).__name__} {str(error).partition(chr(10))[0]}"
        remedy = "download it again; pickled objects other than tensors are refused"
        if refused:
            told = f"beside its tensors it holds {refused[1]}, which would run code"
            remedy = (
                f"where you trust the file, save its tensors without {refused[1]}: "
                "content = torch.load(path, weights_only=False); torch.save(content[KEY], new_path), where KEY is that "
                "of the tensors, such as 'model', 'state_dict' or 'teacher'"
            )
            if "." not in refused[1] or "is blocked" in str(error):  # such as eval, os.system
                remedy = "do not load this file in any way: no checkpoint needs such an object"
        raise WeightsError(f"cannot read weights from {path}: {told}", remedy) from error


def load_archive(path: Path) -> Any:
    """Return what `torch.save` has written, tensors and plain values, on the CPU, without running code.

    An archive's checksums are compared, which torch leaves out: a changed bit would be a changed weight. Raises what
    zip and torch raise, ValueError for a checksum that differs.
    """
    if zipfile.is_zipfile(path):  # torch's format since version 1.6
        with zipfile.ZipFile(path) as archive:
            summed = any(info.CRC for info in archive.infolist())  # who writes the file may leave them out
            if summed and (damaged := archive.testzip()):
                raise ValueError(f"{damaged} in it differs from its checksum, the file is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def _tensors(content: Any, before: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of dictionaries in dictionaries, their names joined by dots."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from _tensors(value, f"{before}.{name}" if before else str(name))
    elif isinstance(content, Tensor) and before:
        yield before, content


def _fit_positions(state: dict[str, Tensor], own: dict[str, Tensor], vit: nn.Module) -> dict[str, Tensor]:
    """Resample the position embedding (1, prefix + n * n, D) of a file to the model's grid, if it is of a square grid.

    If the model's embedding is of the patches alone and the file's begins with a row for the class token, this row is
    added to the token.
    """
    given, wanted = state.get("pos_embed"), own.get("pos_embed")
    if given is None or wanted is None or given.shape == wanted.shape:
        return state
    if given.ndim != 3 or given.shape[2] != wanted.shape[2]:
        return state  # reported as a tensor of another shape
    prefix = positioned_prefix(vit)
    if not prefix and not _square(given.shape[1]) and _square(given.shape[1] - 1) and "cls_token" in state:
        state |= {"cls_token": state["cls_token"] + given[:, :1]}
        given = given[:, 1:]
    if _square(given.shape[1] - prefix):
        side = math.isqrt(wanted.shape[1] - prefix)
        given = resample_abs_pos_embed(given.float(), (side, side), num_prefix_tokens=prefix)
    return state | {"pos_embed": given}


def _square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count
