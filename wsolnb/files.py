"""Paths, atomic writes and values as JSON: every part of the package writes its files with these.

Relative paths mean the same wherever a notebook or a command is started: they start at the root of the repository.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsolnb.errors import RunError

# Paths


def repository_root() -> Path:
    """Return the root of the repository, the folder with `pyproject.toml` and `notebooks/`.

    It is looked for in this order: the environment variable WSOLNB_ROOT, the working folder and the folders above it,
    the checkout that this package is imported from. If none of them fits, it is the working folder.

    Raises:
        RunError: WSOLNB_ROOT is set and is no folder.
    """
    if named := os.environ.get("WSOLNB_ROOT"):
        if not Path(named).is_dir():
            raise RunError(f"WSOLNB_ROOT is {named!r}, which is no folder", "set it to the repository, or unset it")
        return Path(named).resolve()
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir():
            return folder
    return here


def resolve(path: str | os.PathLike[str]) -> Path:
    """Return `path` as an absolute path: a relative one starts at the root of the repository, `~` is home."""
    return Path(os.path.normpath(repository_root() / Path(path).expanduser()))


def within(root: str | os.PathLike[str], path: str) -> Path:
    """Return a relative path within a data set's folder if a file lies there, else what `resolve` returns.

    So a list of images is found beside the data, wherever the data lie.
    """
    inside = resolve(root) / path
    return inside if root and inside.is_file() else resolve(path)


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part of it.

    Folders that are missing are made. Text is written as UTF-8. A process that is killed while it writes leaves a
    temporary file, which `sweep` removes.

    Raises:
        RunError: the folder cannot be made or written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror or error}", "choose a writable run folder, or free space there"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def sweep(folder: str | os.PathLike[str]) -> int:
    """Remove the temporary files of `write_atomically` under `folder` whose process has ended; returns how many."""
    import psutil

    removed = 0
    for path in Path(folder).rglob(".*-*-*"):
        named = re.fullmatch(r"\..+-(\d+)-[0-9a-f]{32}", path.name)
        if named and not psutil.pid_exists(int(named[1])):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


# Values


def plain(value: Any, where: str = "") -> Any:
    """Return `value` in a form that JSON can hold.

    Scalars and arrays of NumPy and torch become numbers and lists. Tables become a list of rows, dataclasses and
    pydantic models become dictionaries, and paths become text. NaN and infinities become None, because JSON has no word
    for them.

    Raises:
        RunError: the value is of another kind, or holds such a value; the error names it.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return Path(value).as_posix()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, where)
    # A table of pandas; arrays, series, tensors and their scalars; models of pydantic; dates.
    for name, options in (("to_dict", {"orient": "records"}), ("tolist", {}), ("model_dump", {}), ("isoformat", {})):
        with contextlib.suppress(AttributeError, TypeError):
            return plain(getattr(value, name)(**options), where)
    raise RunError(
        f"{where or 'the value'} is a {type(value).__name__}, which JSON cannot hold",
        "store numbers, text, lists, dictionaries, arrays or tables",
    )


def to_json(value: Any) -> str:
    """Return `value` as readable JSON text, converted by `plain`."""
    return json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of `value` in canonical JSON: equal values have equal fingerprints, whatever their order."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
