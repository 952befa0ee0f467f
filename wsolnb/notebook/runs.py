"""Run folders: where a notebook's numbers, figures and checkpoints go, and what they were made with.

A run folder holds `notebooks/`, `metrics/`, `figures/` and `checkpoints/`. A notebook opens its own part of it with

    run = runs.start("03_cam_and_tscam", parameters)

and keeps what is expensive under the hash of everything that it depends on, which `wsolnb.keys` finds:

    folder = run.cached("tscam", train)

Relative paths mean the same wherever a notebook or a command is started: they start at the root of the repository.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from wsolnb import keys
from wsolnb.errors import RunError
from wsolnb.files import repository_root, resolve, to_json, write_atomically

if TYPE_CHECKING:
    import pandas as pd

try:
    import fcntl
except ImportError:  # Windows: two processes that build the same checkpoint at once are not kept apart there
    fcntl = None

DEFAULT_RUN_FOLDER = "outputs/mini"
HARMLESS = ("progress", "num_workers", "jobs")
"""Names of values that change how long a result takes, and not the result."""
REMAKE = "WSOLNB_REMAKE"
"""Environment variable: artefacts are reused only if they were made for this word (`reproduce --force` sets one)."""
TOKEN = "WSOLNB_RUN_TOKEN"
"""Environment variable: token and folder of the `wsolnb reproduce` that a notebook belongs to."""


# Provenance


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
    report: dict[str, Any] = {**keys.versions(), "system": system, "device": device_name()}
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
    """One notebook's part of a run folder. Made by `start`.

    artefacts: folder names and keys of what `cached` has returned. data: fingerprints of the files that were read.
    """

    notebook: str
    parameters: dict[str, Any]
    folder: Path
    started: str = dataclasses.field(default_factory=now)
    artefacts: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)
    data: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)
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
            "versions": keys.versions(),
            **commit(),
            "device": device_name(),
            "processor": cpu_model(),
            "artefacts": self.artefacts,
            "data": _relative(self.data),
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
        self, name: str, build: Callable[[Path], Any], uses: Sequence[Any] = (), ignore: Sequence[str] = HARMLESS
    ) -> Path:
        """Return the folder `checkpoints/<name>-<hash>`, filled by `build(folder)` unless it is complete already.

        The hash is that of `keys.key_of(build)`: of all that the builder captures (values, data sets, trained models,
        other artefacts), of the code that it can run, and of the libraries' versions. The record `done.json` holds the
        key, and the hash of every file in the folder. A folder is reused only where all of them fit; what is missing or
        damaged is made again. A build that was interrupted leaves its folder without a record, and the next one can go
        on inside it. Of two processes that want the same folder, one builds and the other waits.

        Prints one line: reused, or built and why.

        Args:
            name: start of the folder's name.
            build: called with the folder; fills it.
            uses: what the builder needs besides what it captures: classes that it finds by name.
            ignore: names of captured values that cannot change the result.

        Raises:
            ParameterError: the builder captures a value of which no key can be made.
            RunError: the folder cannot be written.
        """
        key = keys.key_of([build, *uses], ignore)
        folder = self.checkpoints / f"{name}-{key.hash[:12]}"
        self.data |= key.data
        if self._reuse(name, folder, key):  # before the lock, which a run folder that is only read could not give
            return folder
        with locked(folder / ".lock", f"building {name}"):
            if self._reuse(name, folder, key):  # another process has built it meanwhile
                return folder
            why = _reason(self.checkpoints, name, folder, key)
            self._clear(folder)
            clock = time.perf_counter()
            build(folder)
            seconds = round(time.perf_counter() - clock, 1)
            done = {"name": name, "hash": key.hash, "key": _for_record(key), "files": keys.hashes(folder)}
            done |= {"seconds": seconds, "finished": now(), "made_for": os.environ.get(REMAKE, ""), **commit()}
            done |= {"device": device_name(), "processor": cpu_model()}
            check_current(self.folder)
            write_atomically(folder / keys.RECORD, to_json(done))
        self.artefacts[folder.name] = key.hash
        print(f"built {name} in {seconds:.0f} s{why}", flush=True)
        return folder

    def _reuse(self, name: str, folder: Path, key: keys.Key) -> bool:
        record = keys.read_record(folder)
        if record.get("hash") != key.hash or _is_to_remake(record) or keys.damaged(folder, record["files"]):
            return False
        self.artefacts[folder.name] = key.hash
        print(f"reusing {name} (built in {record['seconds']:.0f} s; all that it depends on is unchanged)", flush=True)
        return True

    @staticmethod
    def _clear(folder: Path) -> None:
        """Take away what a builder must not go on from: what is damaged, and all of it if it is to be made again."""
        record = keys.read_record(folder)
        all_of_it = record and _is_to_remake(record)
        for file in keys.hashes(folder) if all_of_it else keys.damaged(folder, record.get("files", {})):
            (folder / file).unlink(missing_ok=True)
        (folder / keys.RECORD).unlink(missing_ok=True)

    def cached_rows(
        self, name: str, measure: Callable[[], Any], uses: Sequence[Any] = (), ignore: Sequence[str] = HARMLESS
    ) -> list[dict[str, Any]]:
        """Return `measure()`, rows of plain numbers and text, kept as `cached` keeps what a builder makes."""

        def build(folder: Path) -> None:
            write_atomically(folder / "rows.json", to_json(list(measure())))

        return json.loads((self.cached(name, build, uses, ignore) / "rows.json").read_text(encoding="utf-8"))

    def seconds_of(self, folder: Path) -> float:
        """Return how long a folder of `cached` took to build."""
        return keys.read_record(folder)["seconds"]

    def used(self, notebook: str, **expected: Any) -> dict[str, Any]:
        """Return the parameters that another notebook was run with in this run folder: what its models are named by.

        expected: values of some of them that this notebook relies on.

        Raises:
            RunError: the notebook has no result here, or was run with other values than expected.
        """
        command = f"`wsolnb reproduce --only {notebook}`, or open {notebook} and run it"
        try:
            text = (self.folder / "metrics" / f"{notebook}.json").read_text(encoding="utf-8")
            used = json.loads(text)["provenance"]["parameters"]
        except FileNotFoundError:
            problem = f"{self.notebook} goes on from {notebook}, which has no result in {self.folder}"
            raise RunError(problem, f"make it first: {command}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"the result of {notebook} in {self.folder} is damaged: {type(error).__name__}"
            raise RunError(problem, f"make it again: {command}") from None
        for name, value in expected.items():
            if used.get(name) != value:
                problem = f"{notebook} was run with {name}={used.get(name)!r}, {self.notebook} with {value!r}"
                raise RunError(problem, f"give both the same value; to run the first again: {command}")
        return used

    def recorded(self, name: str, columns: Sequence[str] = ()) -> pd.DataFrame:
        """Return a table of `outputs/reference`, which long studies are recorded in; without one, an empty table.

        columns: of the empty table.
        """
        import pandas as pd

        path = resolve(f"outputs/reference/{name}.csv")
        self.data[str(path)] = keys.tree(path)
        return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=list(columns))

    def __cache_key__(self, _reading: Any) -> None:
        """Nothing: a run says where results lie, not what they are."""


def _for_record(key: keys.Key) -> dict[str, Any]:
    return {"inputs": key.inputs, "code": key.code, "versions": key.versions, "data": _relative(key.data)}


def _relative(data: Mapping[str, str]) -> dict[str, str]:
    """Return fingerprints by paths that start at the repository where they can, for somebody who has moved it."""
    root = repository_root()
    return {os.path.relpath(p, root) if Path(p).is_relative_to(root) else p: found for p, found in data.items()}


def _is_to_remake(record: Mapping[str, Any]) -> bool:
    return REMAKE in os.environ and record.get("made_for") != os.environ[REMAKE]


def _reason(checkpoints: Path, name: str, folder: Path, key: keys.Key) -> str:
    """Return in words why an artefact of that name cannot be reused; empty where there is none yet."""
    record = keys.read_record(folder)
    if record.get("hash") == key.hash:
        bad = keys.damaged(folder, record["files"])
        return f", again: {', '.join(bad[:3])} missing or damaged" if bad else ", again: as was asked for"
    if (folder / keys.RECORD).exists():
        return f", again: {keys.RECORD} damaged"
    others = [keys.read_record(path) for path in checkpoints.glob(f"{glob.escape(name)}-{'?' * 12}")]
    others = sorted((record for record in others if record.get("name") == name), key=lambda record: record["finished"])
    if not others:
        return ""
    parts = ("inputs", "code", "versions")
    old = {part: others[-1]["key"].get(part) for part in parts}
    new = json.loads(to_json({part: getattr(key, part) for part in parts}))
    return f"; unlike the one before: {keys.differences(old, new)}"


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


def stale(folder: Path) -> str:
    """Return in words why an artefact of a run folder would be made again; empty where it would not.

    What can be told from outside of its notebook counts: its files, the package's code, the libraries, the data.
    """
    record = keys.read_record(folder)
    if not record:
        return "it was not finished"
    if bad := keys.damaged(folder, record["files"]):
        return f"{', '.join(bad[:3])} missing or damaged"
    modules = [name for name in record["key"]["code"] if name.partition(".")[0] == keys.PACKAGE]
    old = {"code": {name: record["key"]["code"][name] for name in modules}}
    new = {"code": {name: keys.module_digest(name) for name in modules}}
    old |= {part: record["key"][part] for part in ("versions", "data")}
    new |= {"versions": keys.versions(), "data": {path: keys.tree(resolve(path)) for path in old["data"]}}
    return keys.differences(old, new)


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
