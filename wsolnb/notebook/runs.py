"""Run folders: where a notebook's numbers, figures and checkpoints go, and what they were made with.

A run folder holds `notebooks/`, `metrics/`, `figures/` and `checkpoints/`. A notebook opens its own part of the run
folder with

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
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from wsolnb import keys
from wsolnb.errors import RunError
from wsolnb.files import FULL, cannot_write, repository_root, resolve, to_json, write_atomically
from wsolnb.locks import locked
from wsolnb.notebook import params

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_RUN_FOLDER = "outputs/mini"
HARMLESS = ("progress", "num_workers", "jobs", "workers")
"""Names of values that change how long a result takes, and not the result."""
REMAKE = "WSOLNB_REMAKE"
"""Environment variable: artefacts are reused only if they were made for this word (`reproduce --force` sets one)."""
TOKEN = "WSOLNB_RUN_TOKEN"
"""Environment variable: token and folder of the `wsolnb reproduce` that a notebook belongs to."""


# Provenance


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def commit() -> dict[str, Any]:
    """Return `{"commit": hash, "dirty": bool}` of the checkout, both None where there is no git or no history."""
    root = repository_root()
    git = ("git", "--no-optional-locks", "-C", str(root))
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        top, head = _said(*git, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        # A copy without history inside somebody else's checkout must not be given their commit.
        if Path(top).resolve() == root.resolve():
            return {"commit": head, "dirty": bool(_said(*git, "status", "--porcelain", "--untracked-files=no"))}
    return {"commit": None, "dirty": None}


def cpu_model() -> str:
    """Return the name of the processor as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return _said("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or platform.machine()


def device_name() -> str:
    """Return the name of the accelerator that torch sees, else `cpu`. torch is not imported for it."""
    torch = sys.modules.get("torch")
    if torch is None:
        return "cpu"
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "mps" if torch.backends.mps.is_available() else "cpu"


def peak_memory() -> int | None:
    """Return the most memory (MB of 2^20 bytes) that this process has held so far; None where the system cannot say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


def _made_on() -> dict[str, Any]:
    return {**commit(), "device": device_name(), "processor": cpu_model()}


def environment_report() -> dict[str, Any]:
    """Return what a reader needs to compare numbers and times: versions, devices, memory."""
    import torch

    system = f"{platform.system()} {platform.machine()}"
    report: dict[str, Any] = {**keys.versions(), "system": system, "device": device_name()}
    if torch.cuda.is_available():
        report["device memory (GiB)"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    report |= {"processor": cpu_model(), "cores": cores(), "torch threads": torch.get_num_threads()}
    return {**report, "memory (GiB)": round(psutil.virtual_memory().total / 2**30, 1)}


def cores() -> int:
    """Return how many cores this process may use, which in a container are often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    for folder in (run.folder / name for name in ("notebooks", "metrics", "figures", "checkpoints")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"the run folder {run.folder} cannot be made: {error.strerror or error}"
            raise RunError(problem, "name a writable folder in the parameter `run_folder`") from error
        if not os.access(folder, os.W_OK):
            raise RunError(f"{folder} cannot be written", "change its permissions, or the `run_folder`")
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
    def checkpoints(self) -> Path:
        """The folder for checkpoints, shared by the notebooks of the run."""
        return self.folder / "checkpoints"

    def provenance(self) -> dict[str, Any]:
        """Return what the numbers were made with: parameters, seed, versions, commit, device, time and memory."""
        return {
            "notebook": self.notebook,
            "parameters": self.parameters,
            "seed": self.parameters.get("seed"),
            "versions": keys.versions(),
            **_made_on(),
            "artefacts": self.artefacts,
            "data": _relative(self.data),
            "started": self.started,
            "finished": now(),
            "seconds": round(time.perf_counter() - self._clock, 1),
            "peak_memory_mb": peak_memory(),
        }

    def save_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write `metrics/<notebook>.json`: the metrics as they are, and under `provenance` what they were made with.

        `metrics["table"]`, a list of rows or a pandas table, is what `wsolnb reproduce` prints and what the leaderboard
        is built from. NaN is written as null.

        Raises:
            RunError: a value cannot be stored as JSON, the folder cannot be written, or the run was superseded.
        """
        self._save(f"metrics/{self.notebook}.json", to_json({**metrics, "provenance": self.provenance()}))

    def save_table(self, table: Any, name: str) -> None:
        """Write a pandas table to `metrics/<notebook>/<name>.csv`, without its index."""
        self._save(f"metrics/{self.notebook}/{name}.csv", table.to_csv(index=False))

    def save_figure(self, figure: Any, name: str) -> None:
        """Write a Matplotlib figure to `figures/<notebook>/<name>.png`; equal figures give equal files."""
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
        self._save(f"figures/{self.notebook}/{name}.png", image.getvalue())

    def _save(self, name: str, content: bytes | str) -> None:
        check_current(self.folder)
        write_atomically(self.folder / name, content)

    def cached(self, name: str, build: Callable[[Path], Any], uses: Sequence[Any] = (), together: bool = False) -> Path:
        """Return the folder `checkpoints/<name>-<hash>`, filled by `build(folder)` unless it is complete already.

        The hash is that of `keys.key_of(build)`: of all that the builder captures (values, data sets, trained models,
        other artefacts), of the code that it can run, and of the libraries' versions. The record `done.json` holds the
        key, and the hash of every file in the folder. A folder is reused only where all of them fit; what is missing or
        damaged is made again. A build that was interrupted leaves its folder without a record, and the next one can go
        on inside it. If two processes want the same folder, one builds it and the other waits.

        Prints one line: reused, or built and why.

        Args:
            name: start of the folder's name.
            build: called with the folder; fills it.
            uses: what the builder needs besides what it captures: classes that it finds by name.
            together: of several processes of one launch all run the builder at once. The main one decides whether, and
                writes the record.

        Raises:
            ParameterError: the builder captures a value of which no key can be made.
            RunError: the folder cannot be written, or processes of one launch have different keys.
        """
        key = keys.key_of([build, *uses], HARMLESS)
        folder = self.checkpoints / f"{name}-{key.hash[:12]}"
        self.data |= key.data
        launched = together and int(os.environ.get("WORLD_SIZE", 1)) > 1
        tell = _told_by_the_main_process if launched else str
        if launched and os.environ["RANK"] != "0":
            if wanted := tell():
                if wanted != key.hash:
                    problem = f"the processes of this launch want {name} of different things"
                    raise RunError(problem, "start from pretrained weights: random ones that are frozen differ in each")
                build(folder)
                tell()  # the record is written
            self.artefacts[folder.name] = key.hash
            return folder
        if self._reuse(name, folder, key):  # before the lock, which a run folder that is only read could not give
            tell("")
            return folder
        with locked(folder / ".lock", f"building {name}"):
            if self._reuse(name, folder, key):  # another process has built it meanwhile
                tell("")
                return folder
            why = self._clear(name, folder, key)
            clock = time.perf_counter()
            tell(key.hash)
            try:
                build(folder)
            except OSError as error:  # of a library that writes by itself
                if error.errno in FULL:
                    raise cannot_write(error.filename or folder, error) from error
                raise
            seconds = round(time.perf_counter() - clock, 1)
            done = {"name": name, "hash": key.hash, "key": _stored(key), "files": keys.hashes(folder)}
            done |= {"seconds": seconds, "finished": now(), "made_for": os.environ.get(REMAKE, ""), **_made_on()}
            self._save(folder / keys.RECORD, to_json(done))
            tell(key.hash)
        self.artefacts[folder.name] = key.hash
        print(f"built {name} in {seconds:.0f} s{why}", flush=True)
        return folder

    def _reuse(self, name: str, folder: Path, key: keys.Key) -> bool:
        record = keys.read_record(folder / keys.RECORD)
        if record.get("hash") != key.hash or _is_to_remake(record) or keys.faults(folder, record["files"]):
            return False
        self.artefacts[folder.name] = key.hash
        print(f"reusing {name} (built in {record['seconds']:.0f} s; all that it depends on is unchanged)", flush=True)
        return True

    def _clear(self, name: str, folder: Path, key: keys.Key) -> str:
        """Remove what a builder must not go on from: damaged files, or everything if the artefact is to be made again.

        Returns in words why the artefact cannot be reused; empty if there is no artefact of this name yet.
        """
        record = keys.read_record(folder / keys.RECORD)
        faults = keys.faults(folder, record.get("files", {}))
        for file in keys.hashes(folder) if record and _is_to_remake(record) else faults:
            (folder / file).unlink(missing_ok=True)
        if (folder / keys.RECORD).exists():
            (folder / keys.RECORD).unlink()
            if record.get("hash") != key.hash:
                return f", again: {keys.RECORD} damaged"
            return f", again: {_named(faults)}" if faults else ", again: as was asked for"
        others = (keys.read_record(path) for path in self.checkpoints.glob(f"{glob.escape(name)}-*/{keys.RECORD}"))
        others = [record for record in others if record.get("name") == name]
        if not others:
            return ""
        last = max(others, key=lambda record: record["finished"])["key"]
        return f"; unlike the one before: {keys.differences(last, json.loads(to_json(_stored(key))))}"

    def cached_rows(self, name: str, measure: Callable[[], Any]) -> list[dict[str, Any]]:
        """Return `measure()`, rows of plain numbers and text, kept as `cached` keeps what a builder makes."""

        def build(folder: Path) -> None:
            write_atomically(folder / "rows.json", to_json(list(measure())))

        return json.loads((self.cached(name, build) / "rows.json").read_text("utf-8"))

    def seconds_of(self, folder: Path) -> float:
        """Return how long a folder of `cached` took to build."""
        return keys.read_record(folder / keys.RECORD)["seconds"]

    def used(self, notebook: str, **expected: Any) -> dict[str, Any]:
        """Return the parameters that another notebook was run with in this run folder.

        expected: values of some of them that this notebook relies on.

        Raises:
            RunError: the notebook has no result here, or one of an older version that lacks a parameter; or it was run
                with other values than expected.
        """
        command = f"`wsolnb reproduce --only {notebook}`, or open {notebook} and run it"
        path = self.folder / "metrics" / f"{notebook}.json"
        used = read_provenance(path).get("parameters")
        if used is None and path.exists():
            raise RunError(f"the result of {notebook} in {self.folder} is damaged", f"make it again: {command}")
        if used is None:
            problem = f"{self.notebook} goes on from {notebook}, which has no result in {self.folder}"
            raise RunError(problem, f"make it first: {command}")
        there = (repository_root() / "notebooks" / f"{notebook}.ipynb").is_file()
        if lacks := [name for name in (params.notebook_parameters(notebook) if there else ()) if name not in used]:
            problem = f"the result of {notebook} in {self.folder} is of an older version, without {', '.join(lacks)}"
            raise RunError(problem, f"make it again: {command}")
        for name, value in expected.items():
            if used.get(name) != value:
                problem = f"{notebook} was run with {name}={used.get(name)!r}, {self.notebook} with {value!r}"
                raise RunError(problem, f"give both the same value; to run the first again: {command}")
        return used

    def recorded(self, name: str, columns: Sequence[str] = ()) -> pd.DataFrame:
        """Return a table of `outputs/reference`, where long studies are recorded; an empty table if there is none.

        columns: of the empty table.
        """
        import pandas as pd

        path = resolve(f"outputs/reference/{name}.csv")
        self.data[str(path)] = keys.tree(path)
        return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=list(columns))

    def __cache_key__(self, _reading: Any) -> None:
        """Nothing: a run says where results lie, and not what they are."""


def _told_by_the_main_process(word: str = "") -> str:
    """Return in every process of a launch what the main one says; each waits for it."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([word])[0]


def read_provenance(path: Path) -> dict[str, Any]:
    """Return the provenance in a file of metrics; nothing if the file is missing or cannot be read."""
    try:
        found = json.loads(path.read_text("utf-8"))["provenance"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _stored(key: keys.Key) -> dict[str, Any]:
    return {**vars(key), "data": _relative(key.data)}


def _relative(data: Mapping[str, str]) -> dict[str, str]:
    """Return fingerprints by paths that start at the repository where they can, for somebody who has moved it."""
    root = repository_root()
    return {os.path.relpath(p, root) if Path(p).is_relative_to(root) else p: found for p, found in data.items()}


def _is_to_remake(record: Mapping[str, Any]) -> bool:
    return REMAKE in os.environ and record.get("made_for") != os.environ[REMAKE]


def _named(faults: Mapping[str, str]) -> str:
    return f"{', '.join(list(faults)[:3])} missing or damaged"


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
        current = (Path(folder) / ".lock").read_text().splitlines()[1:2]
        if current and current != [own]:
            problem = f"this run was superseded: another `wsolnb reproduce` has started in {folder} since"
            raise RunError(problem, "use the results of that one, or start `wsolnb reproduce` again")


def stale(folder: Path) -> str:
    """Return in words why an artefact of a run folder would be made again; empty where it would not.

    What can be told from outside of its notebook counts: its files, the package's code, the libraries, the data.
    """
    record = keys.read_record(folder / keys.RECORD)
    if not record:
        return "it was not finished"
    if faults := keys.faults(folder, record["files"]):
        return _named(faults)
    own = {n: found for n, found in record["key"]["code"].items() if n.partition(".")[0] == keys.PACKAGE}
    code, old = keys.code_of(own), {**record["key"], "code": own, "inputs": None}
    new = {"code": {name: code.get(name) for name in own}, "versions": keys.versions(), "inputs": None}
    return keys.differences(old, {**new, "data": {path: keys.tree(resolve(path)) for path in old["data"]}})
