"""Folders of rendered images: made again when the renderer's code, or a file in them, has changed."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from wsolnb import keys
from wsolnb.errors import DataError, RunError
from wsolnb.files import sweep, temporary_of
from wsolnb.locks import locked

SEAL = ".tree"
"""The hidden file that holds the fingerprint of a folder as it was rendered."""


def rendering_key(config_key: str, renderer: str) -> str:
    """Return the name of a rendering: hash of its configuration's key and of the code of the module `renderer`."""
    return keys.digest(json.dumps([config_key, keys.code_of([renderer], keys.HARNESS)]))[:12]


def is_whole(folder: Path) -> bool:
    """Return whether a sealed folder is there as it was sealed; one that has changed is removed, with a warning."""
    if not folder.is_dir():
        return False
    try:
        sealed = (folder / SEAL).read_text()
    except OSError:
        sealed = ""
    if keys.tree(folder) == sealed:
        return True
    warnings.warn(f"files in {folder} were changed or lost since they were rendered; rendering again", stacklevel=4)
    shutil.rmtree(folder, ignore_errors=True)
    return False


def ensure_rendered(target: Path, write: Callable[[Path], None], what: str) -> Path:
    """Return the folder `target`, written first if it is not there whole.

    It appears only when it is complete: an interrupted rendering leaves nothing that could be mistaken for it. Where
    several processes want it at once, one writes it and the others wait.
    write: fills the empty folder it is given. what: the name of what it writes. Raises DataError when it cannot.
    """
    if is_whole(target):
        return target
    remedy = "free space there and run again, or choose another cache folder"
    try:
        with locked(target.parent / f".{target.name}.lock", f"rendering {what}"):
            if target.is_dir():  # made while this process waited
                return target
            sweep(target.parent)  # what a killed rendering has left
            temporary = temporary_of(target)
            temporary.mkdir()
            try:
                write(temporary)
                (temporary / SEAL).write_text(keys.tree(temporary))
                os.replace(temporary, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except RunError as error:
        raise DataError(f"cannot write {what}: {error.problem}", remedy) from error
    except OSError as error:
        if not target.is_dir():  # else: another process has finished the same one first
            raise DataError(f"cannot write {what} to {target.parent}: {error}", remedy) from error
    return target
