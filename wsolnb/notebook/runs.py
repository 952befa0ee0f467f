"""Run folders: where a notebook's numbers, figures and checkpoints go, and what they were made with.

A run folder holds `notebooks/`, `metrics/`, `figures/` and `checkpoints/`. A notebook opens its own part of it with

    run = runs.start("03_cam_and_tscam", parameters)

and keeps what is expensive under the hash of everything that it depends on:

    folder = run.cached("tscam", inputs=config, code=[tscam, training], build=train)

Relative paths mean the same wherever a notebook or a command is started: they start at the root of the repository.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from wsolnb.errors import RunError
from wsolnb.files import fingerprint, plain, repository_root, resolve, to_json, write_atomically

try:
    import fcntl
except ImportError:  # Windows: two processes that build the same checkpoint at once are not kept apart there
    fcntl = None

DEFAULT_RUN_FOLDER = "outputs/mini"
TOKEN = "WSOLNB_RUN_TOKEN"  # holds the token and the folder of the `wsolnb reproduce` that a notebook belongs to
PACKAGES = ("wsolnb", "torch", "torchvision", "timm", "numpy", "opencv-python", "scikit-learn")


def source_fingerprint(code: Sequence[ModuleType | str | os.PathLike[str]]) -> str:
    """Return the SHA-256 of the source of modules, packages (every `.py` in them), files or folders, in this order.

    Raises:
        RunError: one of them has no source file.
    """
    digest = hashlib.sha256()
    for item in code:
        path = resolve(getattr(item, "__file__", None) or "no file") if isinstance(item, ModuleType) else resolve(item)
        if path.name == "__init__.py":
            path = path.parent
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise RunError(f"{item} has no source file", "name modules, packages or .py files in `code`")
        for file in files:
            name = file.relative_to(path.parent).as_posix()
            digest.update(f"{name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


# Provenance


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        for name in (package, f"{package}-headless"):  # OpenCV without windows is the same module
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[package] = metadata.version(name)
                break
    return found


def commit() -> dict[str, Any]:
    """Return `{"commit": hash, "dirty": bool}` of the checkout, both None where there is no git or no history."""
    root = repository_root()

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        # A copy without history inside somebody else's checkout must not be given their commit.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return {"commit": None, "dirty": None}
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def cpu_model() -> str:
    """Return the name of the processor as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return platform.processor() or platform.machine()


def device_name() -> str:
    """Return the name of the accelerator that torch sees, else `cpu`. torch is not imported for it."""
    torch = sys.modules.get("torch")
    if torch is None:
        return "cpu"
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "mps" if torch.backends.mps.is_available() else "cpu"


def environment_report() -> dict[str, Any]:
    """Return what a reader needs to compare numbers and times: versions, devices, memory."""
    import torch

    system = f"{platform.system()} {platform.machine()}"
    report: dict[str, Any] = {**versions(), "system": system, "device": device_name()}
    if torch.cuda.is_available():
        report["device memory (GiB)"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    report |= {"processor": cpu_model(), "cores": len(cores()), "torch threads": torch.get_num_threads()}
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        report["memory (GiB)"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return report


def cores() -> Sequence[int]:
    """Return the cores that this process may use, which in a container are often fewer than the machine has."""
    return list(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# Runs


def start(notebook: str, parameters: Mapping[str, Any], folder: str | os.PathLike[str] | None = None) -> Run:
    """Open the run folder for `notebook`, and start its clock.

    Args:
        notebook: name of the notebook without suffix, as `03_cam_and_tscam`.
        parameters: its parameters. `run_folder` says where the run folder is, `seed` goes into the provenance.
        folder: run folder that is used instead of the parameter.

    Raises:
        RunError: the folder cannot be made or written.
    """
    run = Run(notebook, dict(parameters), resolve(folder or parameters.get("run_folder") or DEFAULT_RUN_FOLDER))
    for name in ("notebooks", "metrics", "figures", "checkpoints"):
        try:
            (run.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"the run folder {run.folder} cannot be made: {error.strerror or error}"
            raise RunError(problem, "name a writable folder in the parameter `run_folder`") from error
        if not os.access(run.folder / name, os.W_OK):
            raise RunError(f"{run.folder / name} cannot be written", "change its permissions, or the `run_folder`")
    return run


@dataclasses.dataclass
class Run:
    """One notebook's part of a run folder. Made by `start`."""

    notebook: str
    parameters: dict[str, Any]
    folder: Path
    started: str = dataclasses.field(default_factory=now)
    _clock: float = dataclasses.field(default_factory=time.perf_counter, repr=False)

    @property
    def seed(self) -> int | None:
        """The parameter `seed`."""
        return self.parameters.get("seed")

    @property
    def checkpoints(self) -> Path:
        """The folder for checkpoints, shared by the notebooks of the run."""
        return self.folder / "checkpoints"

    def provenance(self) -> dict[str, Any]:
        """Return what the numbers were made with: parameters, seed, versions, commit, device and time."""
        return {
            "notebook": self.notebook,
            "parameters": self.parameters,
            "seed": self.seed,
            "versions": versions(),
            **commit(),
            "device": device_name(),
            "processor": cpu_model(),
            "started": self.started,
            "finished": now(),
            "seconds": round(time.perf_counter() - self._clock, 1),
        }

    def save_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write `metrics/<notebook>.json`: the metrics as they are, and under `provenance` what they were made with.

        `metrics["table"]`, a list of rows or a pandas table, is what `wsolnb reproduce` prints and what the leaderboard
        is built from. NaN is written as null.

        Raises:
            RunError: a value cannot be stored as JSON, the folder cannot be written, or the run was superseded.
        """
        content = {**metrics, "provenance": self.provenance()}
        check_current(self.folder)
        write_atomically(self.folder / "metrics" / f"{self.notebook}.json", to_json(content))

    def save_table(self, table: Any, name: str) -> None:
        """Write a pandas table to `metrics/<notebook>/<name>.csv`, without its index."""
        check_current(self.folder)
        write_atomically(self.folder / "metrics" / self.notebook / f"{name}.csv", table.to_csv(index=False))

    def save_figure(self, figure: Any, name: str) -> None:
        """Write a Matplotlib figure to `figures/<notebook>/<name>.png`; equal figures give equal files."""
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
        check_current(self.folder)
        write_atomically(self.folder / "figures" / self.notebook / f"{name}.png", image.getvalue())

    def cached(
        self,
        name: str,
        inputs: Any,
        code: Sequence[ModuleType | str | os.PathLike[str]],
        build: Callable[[Path], Any],
    ) -> Path:
        """Return the folder `checkpoints/<name>-<hash>`, filled by `build(folder)` unless it is complete already.

        The hash covers `inputs` and the source of `code`; what these do not name does not count. A build that was
        interrupted leaves its folder, without the marker `done.json`, so that the next one can go on inside it. Of two
        processes that want the same folder, one builds and the other waits. Prints one line: built, or reused.

        Args:
            name: start of the folder's name.
            inputs: everything that the result depends on, in what `plain` can convert.
            code: modules, packages or files whose source the result depends on.
            build: called with the folder; fills it.

        Raises:
            RunError: the inputs cannot be stored as JSON, `code` has no source, or the folder cannot be written.
        """
        key = {"inputs": plain(inputs, "inputs"), "code": source_fingerprint(code)}
        folder = self.checkpoints / f"{name}-{fingerprint(key)[:12]}"
        marker = folder / "done.json"

        def reuse() -> bool:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                seconds = json.loads(marker.read_text())["seconds"]
                print(f"reusing {name} (built in {seconds:.0f} s, parameters and code unchanged)", flush=True)
                return True
            return False

        if reuse():  # before the lock, which a run folder that is only read could not give
            return folder
        with locked(folder / ".lock", f"building {name}"):
            if reuse():
                return folder
            clock = time.perf_counter()
            build(folder)
            seconds = round(time.perf_counter() - clock, 1)
            done = {"name": name, **key, "seconds": seconds, "finished": now(), "versions": versions(), **commit()}
            write_atomically(marker, to_json(done))
        print(f"built {name} in {seconds:.0f} s", flush=True)
        return folder


def check_current(folder: str | os.PathLike[str]) -> None:
    """Make sure that a notebook of `wsolnb reproduce` may still write to its run folder. Others always may.

    The last defence where neither the lock nor the end of their parent has stopped the notebooks of an earlier run.

    Raises:
        RunError: another `wsolnb reproduce` has taken the folder over since.
    """
    own, _, place = os.environ.get(TOKEN, "").partition(" ")
    if not own or os.path.realpath(place) != os.path.realpath(folder):
        return
    with contextlib.suppress(OSError):  # without a lock file nobody has taken over
        current = (Path(folder) / ".lock").read_text().split()[1:2]
        if current and current != [own]:
            problem = f"this run was superseded: another `wsolnb reproduce` has started in {folder} since"
            raise RunError(problem, "use the results of that one, or start `wsolnb reproduce` again")


@contextlib.contextmanager
def locked(path: Path, work: str, token: str = "") -> Iterator[TextIO]:
    """Hold the lock file `path`, which names the process that holds it; wait while another process does.

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
        file.write(f"{os.getpid()}\n{token}\n" if token else f"{os.getpid()}\n")
        file.flush()
        yield file


def _holder(file: TextIO) -> str:
    import psutil

    file.seek(0)
    number = next(iter(file.read().split()), "?")
    if number.isdigit() and not psutil.pid_exists(int(number)):
        return f"what process {number}, ended since, has left behind: it was"
    return f"process {number}, which is"
