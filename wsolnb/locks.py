"""Locks: what only one process at a time may make, in one folder."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import psutil

from wsolnb.errors import RunError
from wsolnb.files import cannot_write

try:
    import fcntl
except ImportError:  # Windows: two processes that make the same thing at once are not kept apart there
    fcntl = None


@contextlib.contextmanager
def locked(path: Path, work: str, token: str = "") -> Iterator[TextIO]:
    """Hold the lock file `path`, which names its process and machine; wait while another process does.

    The lock belongs to the open file, which is given: the system frees it when the last process that has this file
    open ends, in whatever way.

    Args:
        path: the file, left behind when the lock is free again.
        work: what the lock is for, as `building tscam`; shown to those who wait.
        token: written into the file, for `check_current`.

    Raises:
        RunError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 - closed below, which also frees the lock
    except OSError as error:
        problem = f"{path.parent} cannot be written: {error.strerror or error}"
        raise RunError(problem, "choose a writable run folder, or free space there") from error
    with file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for {_holder(file)} {work}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # a file system without locks: go on as if alone
                pass
        file.seek(0)
        file.truncate()
        try:
            os.write(file.fileno(), f"{os.getpid()} {platform.node()}\n{token}".strip().encode())
        except OSError as error:
            raise cannot_write(path, error) from error
        yield file


def _holder(file: TextIO) -> str:
    file.seek(0)
    number, _, machine = next(iter(file.read().splitlines()), "?").partition(" ")
    if machine and machine != platform.node():  # the folder is shared, and its processes cannot be seen from here
        return f"process {number} on {machine}, which is"
    if number.isdigit() and not psutil.pid_exists(int(number)):
        return f"what process {number}, ended since, has left behind: it was"
    return f"process {number}, which is"
