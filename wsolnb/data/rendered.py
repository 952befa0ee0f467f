"""Folders of rendered images: made again when the renderer's code, or a file in them, has changed."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

from wsolnb import keys

SEAL = ".tree"
"""The hidden file that holds the fingerprint of a folder as it was rendered."""


def rendering_key(config_key: str, renderer: str) -> str:
    """Return the name of a rendering: hash of its configuration's key and of the code of the module `renderer`."""
    return keys.digest(json.dumps([config_key, keys.code_of([renderer], keys.HARNESS)]))[:12]


def seal(folder: Path) -> None:
    """Write down what a folder that is complete holds."""
    (folder / SEAL).write_text(keys.tree(folder))


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
    warnings.warn(f"files in {folder} were changed or lost since they were rendered; rendering again", stacklevel=3)
    shutil.rmtree(folder, ignore_errors=True)
    return False
