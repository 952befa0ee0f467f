"""Disks that can be filled: for tests, and for train/faulted_storage.py."""

import contextlib
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path


class Disk:
    """A folder whose disk can be filled, and freed again; see `full_disk`."""

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, free: int = 0) -> None:
        """Leave so many bytes; as a limit, of a kilobyte at least for each file."""
        if self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000 + free, self.limits[1]))
            return
        with open(self.folder / ".filler", "ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
        if free:
            path = self.folder / ".filler"
            with path.open("rb+") as file:
                file.truncate(max(0, path.stat().st_size - free))

    def free(self) -> None:
        """Give the space back."""
        if self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        else:
            (self.folder / ".filler").unlink(missing_ok=True)


@contextlib.contextmanager
def full_disk(folder: Path, kind: str, size: str = "4m") -> Iterator[Disk | None]:
    """Give a disk in an empty folder; None where a file system cannot be mounted.

    kind: `tmpfs`, a file system of this size in memory, or `limit`, the system's limit of a file's size.
    """
    folder.mkdir(exist_ok=True)
    if kind == "tmpfs":
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False
        )
        if mounted.returncode:
            yield None
            return
    disk = Disk(folder, kind)
    try:
        yield disk
    finally:
        disk.free()
        if kind == "tmpfs":
            subprocess.run(["umount", "--lazy", folder], check=True)
