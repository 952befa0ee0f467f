"""Paths, atomic writes and values as JSON: every part of the package names and writes its files with these.

Relative paths mean the same wherever a notebook or a command is started: they start at the root of the repository.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from wsolnb.errors import DataError, RunError

LONGEST = 255
"""Bytes of a file's name: the limit of Linux and macOS."""
VALUES = 1_000_000
"""Most values that a YAML file may hold."""
MACHINE = f"{uuid.getnode():012x}"
"""What tells this machine (or container) from others that share its disk."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a disk or a quota is full, or a file as large as it may be."""

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


def inside(folder: str | os.PathLike[str], name: str, suffix: str = "", links: bool = False) -> Path:
    """Return the file `<name><suffix>` below `folder` that belongs to an image, or to whatever else has this name.

    Names come from lists, archives and records that somebody else has written. This is the one place that decides which
    of them may become a path: a relative path of plain parts, which can lie in folders of its own (`birds/0001`).
    links: whether the path may lead out of the folder by a symbolic link, as in data sets that are spread over disks.

    Raises:
        DataError: the name is empty, absolute or too long, holds `.`, `..`, empty parts or control characters, or a
            link on its way leads out of the folder.
    """
    path, parts = Path(folder) / f"{name}{suffix}", name.split("/")
    if not name or name.startswith("/"):
        wrong = "leads out of the folder" if name else "is empty"
    elif any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xDC80 for letter in name):  # NUL; halves of a character
        wrong = "holds a control character"
    elif not {"", ".", ".."}.isdisjoint(parts):
        wrong = "leads out of the folder" if ".." in parts else "has a part '' or '.'"
    elif max(len(os.fsencode(part)) for part in f"{name}{suffix}".split("/")) > LONGEST:
        wrong = f"is longer than the {LONGEST} bytes that a file's name can have"
    elif not links and not os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), "")):
        wrong = "leads out of the folder by a link"
    else:
        return path
    shown = name if len(name) < 80 else f"{name[:60]}..."
    raise DataError(f"the name {shown!r} {wrong} ({folder})", "rename it where it is listed, or remove it from there")


def temporary_of(path: Path) -> Path:
    """Return a name beside `path` that only this process uses; `sweep` knows what is left under such names."""
    return path.with_name(f".{path.name[:40]}-{os.getpid()}-{MACHINE}{uuid.uuid4().hex[:20]}")


def write_atomically(path: str | os.PathLike[str], content: bytes | str, lasting: bool = True) -> Path:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part of it.

    Folders that are missing are made. Text is written as UTF-8. The file's mode is what the umask says. A process that
    is killed while it writes leaves a temporary file, which `sweep` removes.
    lasting: whether the content is on the disk before it takes the old one's place, so that a power cut leaves one of
        the two as well. It costs 0.6 ms of the processor and two waits for the disk (20 ms on a busy one), whatever the
        size. Files of single images, which are many and tell whether they are whole, go without.

    Raises:
        RunError: the folder cannot be made or written. The old file is as it was, and no temporary file is left.
    """
    path = Path(path)
    temporary = temporary_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if lasting:
            _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the file system can; what they name is whole either way."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def cannot_write(path: str | os.PathLike[str], error: OSError) -> RunError:
    """Return the error about a file that cannot be written, with the remedy for what the system says."""
    remedy = "choose a folder that you may write to, or change its permissions"
    if error.errno in FULL:
        remedy = f"free space on the disk of {Path(path).parent} and run again: what was there before is unchanged"
    return RunError(f"{path} cannot be written: {error.strerror or error}", remedy)


def open_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    """Return a new array of zeros in the file `path`, memory-mapped, for writing.

    The file has its whole space on the disk from the beginning. Without it a full disk would kill the process by a
    signal, at some later value.

    Raises:
        RunError: the disk has no room for it; no file is left.
    """
    from numpy.lib.format import open_memmap

    try:
        array = open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with open(path, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise cannot_write(path, error) from error
    return array


def read_yaml(path: str | os.PathLike[str], loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Return the plain values of a YAML file; no tag of Python is followed.

    Raises OSError, and ValueError for what is no YAML, or makes more than `VALUES` values of itself by its aliases
    (`*name`): a few of them in each other would fill the memory.
    """
    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error
    count, left = 0, [found]
    while left:
        one = left.pop()
        count += 1
        if count > VALUES:
            raise ValueError(f"its aliases make more than {VALUES} values of it")
        left += one.values() if isinstance(one, dict) else one if isinstance(one, (list, tuple, set)) else ()
    return found


def sweep(folder: str | os.PathLike[str]) -> int:
    """Remove what processes of this machine that have ended left under names of `temporary_of`; returns how many.

    Other machines, which may share the disk, have processes of their own.
    """
    import psutil

    removed = 0
    for path in list(Path(folder).rglob(".*-*-*")):
        named = re.fullmatch(rf"\..+-(\d+)-{MACHINE}[0-9a-f]{{20}}", path.name)
        if named and not psutil.pid_exists(int(named[1])):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
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
