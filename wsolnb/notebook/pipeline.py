"""The notebooks as batch jobs: papermill runs them in the order of their needs, and only those that are out of date.

`params/<profile>/pipeline.yaml` lists the steps, `params/<profile>/<notebook>.yaml` holds what differs from the
defaults of a notebook:

    steps:
      - notebook: 01_data
      - notebook: 03_cam_and_tscam
        needs: [01_data]
        parameters: {epochs: 3}  # optional, and stronger than the file
    extends: cub  # optional: a notebook without a file here takes that of this profile

Everything is checked before the first notebook starts. Results go to `outputs/<profile>/`, the run folder.
"""

from __future__ import annotations

import contextlib
import functools
import graphlib
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import psutil
from pydantic import BaseModel, ValidationError

from wsolnb import files, keys, locks
from wsolnb.errors import ParameterError, RunError, WsolnbError, nearest
from wsolnb.files import repository_root, resolve, to_json, write_atomically
from wsolnb.notebook import costs, params, preflight, runs
from wsolnb.notebook.progress import Display, Epochs, duration, say

if TYPE_CHECKING:
    import pandas as pd
    import papermill
    from nbformat import NotebookNode


_START = 300  # seconds that a kernel has to start, where a machine is busy
_GRACE = 10.0  # seconds that the workers have to end by themselves after an interruption
_AGAIN = 0.5  # seconds after which a second Ctrl-C is one: a terminal and `timeout` may send the first one twice
_THREADS = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENCV_FOR_THREADS_NUM",
    "LOKY_MAX_CPU_COUNT",
)  # fmt: skip
_GOOD = ("done", "up to date")


class NotebookError(WsolnbError):
    """A notebook did not run to its end."""


class Step(BaseModel, extra="forbid", strict=True):
    """A notebook to run, with values that differ from its defaults (from the pipeline's file; from `plan`, all)."""

    notebook: str
    needs: list[str] = []
    parameters: dict[str, Any] = {}


class _File(BaseModel, extra="forbid", strict=True):
    steps: list[Step]
    gpu: bool = False  # the profile is made for one
    extends: str = ""  # a profile whose files hold for the notebooks that have none here


# What to run


def run_folder(profile: str, outputs: str | os.PathLike[str] = "outputs") -> Path:
    """Return the run folder of a profile: `<outputs>/<profile>`."""
    return resolve(outputs) / profile


def plan(
    profile: str,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    outputs: str | os.PathLike[str] = "outputs",
    start: Sequence[str] = (),
) -> list[Step]:
    """Return the steps of a profile in the order to run them, all of them checked. Nothing is executed.

    Args:
        profile: name of a folder in `params/`.
        overrides: `name=value` texts. Each goes to every notebook that declares the name.
        only: notebooks to run, with the steps that they need; all of them where it is empty.
        outputs: the folder that holds the run folders; a relative path starts at the root of the repository.
        start: like `only`, and all that depends on these notebooks as well.

    Raises:
        ParameterError: the profile, a notebook, a need or a parameter is unknown, a value has another type than the
            notebook declares, needs run in a circle, or an override belongs to no notebook.
    """
    known = sorted(path.parent.name for path in (repository_root() / "params").glob("*/pipeline.yaml"))
    if profile not in known:
        problem = f"there is no profile {profile!r}{nearest(profile, known)}"
        raise ParameterError(problem, f"use one of: {', '.join(known) or '(params/ holds no pipeline.yaml)'}")
    folder = repository_root() / "params" / profile
    if (base := _read(folder).extends) and base not in known:
        problem = f"{folder / 'pipeline.yaml'} extends {base!r}, which is no profile{nearest(base, known)}"
        raise ParameterError(problem, f"use one of: {', '.join(known)}")
    steps = _ordered(folder)
    selected = _select(steps, [*only, *_with_dependents(steps, start)])

    place, root = run_folder(profile, outputs), repository_root()
    # Relative where it can be, so that a run folder that moves with its repository stays up to date.
    injected = (place.relative_to(root) if place.is_relative_to(root) else place).as_posix()

    texts = params.parse_overrides(overrides)
    if "run_folder" in texts:
        raise ParameterError("`-p run_folder=...` would part the notebooks from their outputs", "use `--outputs DIR`")
    declared = {step.notebook: params.notebook_parameters(step.notebook) for step in selected}
    names = set().union(*declared.values())
    for name in texts:
        if name not in names:
            problem = f"no notebook of this run has a parameter {name!r}{nearest(name, names)}"
            raise ParameterError(problem, "`wsolnb parameters NOTEBOOK` lists those of a notebook")

    steps = []
    for step in selected:
        name, file = step.notebook, folder / f"{step.notebook}.yaml"
        if base and not file.exists():
            file = folder.parent / base / file.name
        values = params.check_parameters(name, params.load_parameter_file(file), str(file)) if file.exists() else {}
        values |= params.check_parameters(name, step.parameters, str(folder / "pipeline.yaml"))
        values |= {key: declared[name][key].parse(text) for key, text in texts.items() if key in declared[name]}
        values |= params.check_parameters(name, {"run_folder": injected}, "every notebook of a pipeline needs it")
        steps.append(Step(notebook=name, needs=step.needs, parameters=values))
    return steps


def missing(
    steps: Sequence[Step], profile: str, outputs: str | os.PathLike[str] = "outputs"
) -> list[preflight.Finding]:
    """Return, as `preflight.look`, what the steps of a profile (`plan`) need and do not find."""
    return preflight.look(resolved(steps), run_folder(profile, outputs), made_for_gpu(profile))


def resolved(steps: Sequence[Step]) -> dict[str, dict[str, Any]]:
    """Return all parameters of each step, behind those of the steps that it needs: what it goes on from."""
    found: dict[str, dict[str, Any]] = {}
    for step in steps:  # needs come first
        found[step.notebook] = dict(ChainMap(_all_parameters(step), *(found[need] for need in step.needs)))
    return found


def made_for_gpu(profile: str) -> bool:
    """Return whether a profile says that it is made for a GPU."""
    return _read(repository_root() / "params" / profile).gpu


def _all_parameters(step: Step) -> dict[str, Any]:
    declared = params.notebook_parameters(step.notebook)
    return {name: one.default for name, one in declared.items()} | step.parameters


def _read(folder: Path) -> _File:
    path = folder / "pipeline.yaml"
    try:
        return _File.model_validate(params.load_parameter_file(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        remedy = "write a list `steps:` of `{notebook: ..., needs: [...], parameters: {...}}`"
        raise ParameterError(f"{path}, {where}: {first['msg']}", remedy) from None


def _ordered(folder: Path) -> list[Step]:
    """Return the steps of a profile so that each comes after those it needs, and otherwise in the order of the file."""
    path = folder / "pipeline.yaml"
    steps = _read(folder).steps
    names = [step.notebook for step in steps]
    for step in steps:
        if names.count(step.notebook) > 1:
            raise ParameterError(f"{path}: {step.notebook!r} is listed twice", "keep one of them")
        for need in step.needs:
            if need not in names:
                problem = f"{path}: {step.notebook} needs {need!r}, which is no step{nearest(need, names)}"
                raise ParameterError(problem, "list it as a step, or drop the need")
    try:
        graphlib.TopologicalSorter({step.notebook: step.needs for step in steps}).prepare()
    except graphlib.CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise ParameterError(f"{path}: these steps need each other: {circle}", "drop one of these needs") from None
    notebooks = [file.stem for file in (repository_root() / "notebooks").glob("*.ipynb")]
    for file in sorted(folder.glob("*.yaml")):
        if file != path and file.stem not in notebooks:  # it would silently change nothing
            raise ParameterError(f"{file} belongs to no notebook{nearest(file.stem, notebooks)}", "rename or delete it")

    ordered: dict[str, Step] = {}
    while len(ordered) < len(steps):
        following = next(s for s in steps if s.notebook not in ordered and ordered.keys() >= set(s.needs))
        ordered[following.notebook] = following
    return list(ordered.values())


def _select(steps: list[Step], only: Sequence[str]) -> list[Step]:
    names = [step.notebook for step in steps]
    wanted = _stems(only) or set(names)
    for name in sorted(wanted - set(names)):
        problem = f"{name!r} is no step of this profile{nearest(name, names)}"
        raise ParameterError(problem, f"use one of: {', '.join(names)}")
    for step in reversed(steps):  # needs come before the steps that need them
        if step.notebook in wanted:
            wanted.update(step.needs)
    return [step for step in steps if step.notebook in wanted]


def _with_dependents(steps: Sequence[Step], start: Sequence[str]) -> set[str]:
    """Return these notebooks and those that need them, directly or not."""
    found = _stems(start)
    for step in steps:  # needs come first
        if found.intersection(step.needs):
            found.add(step.notebook)
    return found


def _stems(notebooks: Sequence[str]) -> set[str]:
    return {Path(notebook).name.removesuffix(".ipynb") for notebook in notebooks}


# Running


def reproduce(
    profile: str,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    force: bool = False,
    outputs: str | os.PathLike[str] = "outputs",
    jobs: int = 1,
    start: Sequence[str] = (),
    keep_going: bool = True,
) -> dict[str, Any]:
    """Run the notebooks of a profile that are out of date, print the metrics, write and return `summary.json`.

    A step is up to date while all that it depends on is as it was: its parameters, its cells, the modules they import
    (comments and docstrings do not count), the versions of the numeric libraries, the files that it read, the runs
    of its needs, and its own files. Where the run folder lies does not count: it can be moved. A step that fails stops
    only the steps that need it. After an interruption the same command goes on with what is missing. A second Ctrl-C
    ends this process and its notebooks at once.

    Each notebook runs in a process of its own, which ends with this one, whatever ends it. While one is left, a second
    `reproduce` in the same folder waits.

    Args:
        profile: name of a folder in `params/`.
        overrides: `name=value` texts. Each goes to every notebook that declares the name.
        only: notebooks to run, with the steps that they need; all of them where it is empty.
        force: run the notebooks (those of `start`, else of `only`) even if they are up to date, and train anew what
            they use.
        outputs: the folder that holds the run folders; a relative path starts at the root of the repository.
        jobs: notebooks that run at once, each with its share of the cores; at most one a core. A GPU has at most one
            of them that trains, or passes many images through a network.
        start: notebooks to run even if they are up to date, with all that depend on them; nothing is trained anew.
            What they need runs where it is out of date.
        keep_going: False: after a failure no other notebook starts.

    Returns:
        The summary: `complete`, `interrupted`, `seconds`, `steps` (notebook, status, seconds, error or the needs that
        it lacks), `tables`.

    Raises:
        ParameterError: as `plan`, or for fewer jobs than one, before anything is executed.
        preflight.Missing: data, files, weights, packages or a device that a step needs are not there, or the run folder
            cannot be made; likewise.
        RunError: the run folder cannot be written; likewise.
    """
    steps = plan(profile, overrides, only, outputs, start)
    if jobs < 1:
        raise ParameterError(f"{jobs} notebooks at once", "give `--jobs` 1 or more")
    forced = _with_dependents(steps, start)
    if force and not start:
        forced = _stems(only) or {step.notebook for step in steps}
    folder = run_folder(profile, outputs)
    preflight.report(missing(steps, profile, outputs), say)
    try:
        runs.start("pipeline", {}, folder)
    except RunError as error:
        raise RunError(error.problem, f"{error.remedy}; or give another folder with `--outputs DIR`") from error
    if jobs > (most := runs.cores()):
        say(f"note: {jobs} notebooks at once would share {most} cores; {most} run at once")
        jobs = most
    token = uuid.uuid4().hex
    with locks.locked(folder / ".lock", f"running in {folder}", token) as lock:
        if removed := files.sweep(folder):
            say(f"removed {removed} temporary files, left behind by processes that were killed")
        workers = _Workers(jobs, lock, f"{token} {folder}", {runs.REMAKE: token} if force else {})
        with _interrupts_go_to(workers.stop):
            summary = {"profile": profile, "overrides": list(overrides)}
            summary |= _run_steps(steps, forced, folder, workers, keep_going)
            found = tables(folder)
            summary["tables"] = {name: table.to_dict(orient="records") for name, table in found.items()}
            try:
                write_atomically(folder / "summary.json", to_json(summary))
            finally:  # what is known is told, wherever it could be written
                show_tables(found)
                _show_steps(summary, folder)
    return summary


@contextlib.contextmanager
def _interrupts_go_to(stop: Callable[[int], None]) -> Iterator[None]:
    """Call `stop` on Ctrl-C, on a request to end and at the end of the terminal; what is ignored stays ignored.

    A KeyboardInterrupt could end up between any two statements.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if hasattr(signal, "SIGHUP"):  # not on Windows
        usual[signal.SIGHUP] = signal.SIG_DFL
    taken = {one: handler for one, handler in usual.items() if signal.getsignal(one) == handler}
    if threading.current_thread() is not threading.main_thread():  # no other thread gets signals, or may set them
        taken = {}
    for one in taken:
        signal.signal(one, lambda number, _: stop(number))
    try:
        yield
    finally:
        for one, handler in taken.items():
            signal.signal(one, handler)


def _run_steps(
    steps: Sequence[Step], forced: set[str], folder: Path, workers: _Workers, keep_going: bool
) -> dict[str, Any]:
    """Run the steps, each as soon as its needs are over, tell of each, and return the summary."""
    started, clock, jobs = runs.now(), time.perf_counter(), workers.jobs
    results: dict[str, dict[str, Any]] = {
        step.notebook: {"notebook": step.notebook, "status": "not run", "seconds": None} for step in steps
    }
    at_once = f", {jobs} at once" if jobs > 1 else ""
    say(f"{len(steps)} notebooks{at_once}, run folder {folder}")
    estimate = functools.partial(_estimated, steps, folder.name)
    display = Display(list(results), jobs, Epochs(folder), _expected(steps, forced, folder), estimate)
    workers.say = display.say
    heavy = {name for name, values in resolved(steps).items() if costs.is_heavy(name) and values.get("device") != "cpu"}
    waiting, over, stop = list(steps), set[str](), False
    running: dict[Future[dict[str, Any]], str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            ready = (s for s in waiting if over.issuperset(s.needs) and workers.has_room(s.notebook in heavy))
            if len(running) < jobs and not (workers.stopped or stop) and (step := next(ready, None)):
                waiting.remove(step)
                name = step.notebook
                if lacking := [need for need in step.needs if results[need]["status"] not in _GOOD]:
                    results[name]["lacks"] = lacking
                    display.end(name, f"not run: it needs {', '.join(lacking)}")
                    over.add(name)
                else:
                    execute = workers.assigned(name, name in heavy)
                    running[pool.submit(_run_step, step, folder, name in forced, display, execute)] = name
                continue
            if not running:
                break
            # Every second, as a signal that another thread has taken wakes this one only when it runs.
            for future in wait(running, 1, FIRST_COMPLETED).done:
                name = running.pop(future)
                over.add(name)
                workers.release(name)
                results[name] |= future.result()
                stop = stop or (not keep_going and results[name]["status"] == "failed")
            display.tick()
    display.close()
    return {
        "complete": all(result["status"] in _GOOD for result in results.values()),
        "interrupted": workers.stopped,
        "started": started,
        "seconds": round(time.perf_counter() - clock, 1),
        "steps": list(results.values()),
        "versions": keys.versions(),
        **runs.commit(),
        "processor": runs.cpu_model(),
    }


def _expected(steps: Sequence[Step], forced: set[str], folder: Path) -> dict[str, float]:
    """Return the seconds that each step will take: none if it is up to date, else as many as the last time.

    What has never run to its end here takes `costs.START`, and is left out if it is heavy.
    """
    found, stale = {}, set[str]()
    for step in steps:
        name, (why, _, record) = step.notebook, _judge(step, folder)
        if name in forced or why or stale.intersection(step.needs):
            stale.add(name)
            if record or not costs.is_heavy(name):
                found[name] = record.get("seconds", costs.START)
        else:
            found[name] = 0.0
    return found


def _estimated(steps: Sequence[Step], profile: str) -> dict[str, float]:
    """Return the seconds that steps are estimated to take, as `wsolnb plan` estimates them."""
    device = costs.DEVICES["a100" if made_for_gpu(profile) else "cpu"]
    found = {cost.notebook: 3600 * cost.hours for cost in costs.estimate(resolved(steps), device)}
    return {name: costs.START if math.isnan(seconds) else seconds for name, seconds in found.items()}


class _Workers:
    """Executes notebooks in processes of their own, each with its share of the cores, and of the GPUs.

    The processes stand apart from the terminal, whose Ctrl-C reaches this one only: `stop` hands it on, once. They hold
    the lock of the run, and their standard input, which tells them when this process is gone.
    """

    def __init__(self, jobs: int, lock: TextIO, token: str, environment: Mapping[str, str]):
        self.jobs = jobs
        self.stopped = False
        self.say: Callable[[str], None] = say
        self._environment = {**os.environ, **environment, runs.TOKEN: token, **_shares(jobs)}
        self._files = (lock.fileno(),) if locks.fcntl else ()  # Windows has neither the lock nor a way to pass it
        self._processes: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._asked = 0.0
        self._on: dict[str, str] = {}

    @functools.cached_property
    def _gpus(self) -> list[str]:
        """The GPUs, by what CUDA_VISIBLE_DEVICES names them; one without a name where there is no more than one."""
        return preflight.gpus() if self.jobs > 1 else []

    def has_room(self, heavy: bool) -> bool:
        """Return whether a step can start that is heavy, or is not: no GPU takes two heavy ones."""
        return not (heavy and self._gpus) or len(self._on) < len(self._gpus)

    def assigned(self, name: str, heavy: bool) -> Callable[..., None]:
        """Return `execute` for a step; one that is heavy has a GPU of its own until `release`."""
        if not (heavy and self._gpus):
            return self.execute
        self._on[name] = next(gpu for gpu in self._gpus if gpu not in self._on.values())
        if len(self._gpus) == 1:
            return self.execute
        return functools.partial(self.execute, environment={"CUDA_VISIBLE_DEVICES": self._on[name]})

    def release(self, name: str) -> None:
        """Give the GPU of a step back, if it has one."""
        self._on.pop(name, None)

    def stop(self, number: int) -> None:
        """Let the notebooks that run end, and no other start; on a second Ctrl-C end all at once, this process, too.

        Returns at once: it is called by signals.
        """
        clock = time.monotonic()
        if not self.stopped:
            self.stopped, self._asked = True, clock
            threading.Thread(target=self._end).start()
        elif number == signal.SIGINT and clock - self._asked > _AGAIN:
            _kill_children(os.getpid())
            with contextlib.suppress(OSError):  # not by `print`, which a signal may have interrupted
                os.write(1, b"\nStopped at once. What is finished is kept; the same command goes on from here.\n")
            os._exit(130)

    def _end(self) -> None:
        self.say("stopping: the notebooks that run end first; a second Ctrl-C stops at once")
        with self._lock:
            processes = list(self._processes)
        for process in processes:
            process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + _GRACE
        for process in processes:
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _kill_children(process.pid)
                process.kill()

    def execute(
        self,
        source: Path,
        output: Path,
        parameters: Mapping[str, Any],
        progress: Callable[[int, int], None],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Execute a notebook as `_execute` does, with the same errors. environment: variables of this one only."""
        job = json.dumps([str(source), str(output), dict(parameters)])
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        code += "from wsolnb.notebook import pipeline; pipeline._work()"
        answer: dict[str, Any] = {}
        with tempfile.TemporaryFile() as told:
            with self._lock:
                if self.stopped:
                    raise KeyboardInterrupt
                process = subprocess.Popen(
                    [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=told, text=True,
                    env={**self._environment, **(environment or {})}, pass_fds=self._files, start_new_session=True,
                )  # fmt: skip
                self._processes.add(process)
            with process:  # closes its standard input only when it has ended
                try:
                    with contextlib.suppress(BrokenPipeError):  # it ended before it could read
                        os.write(process.stdin.fileno(), f"{job}\n".encode())
                    for line in process.stdout:
                        answer = json.loads(line)
                        if "cell" in answer:
                            progress(*answer["cell"])
                    process.wait()
                finally:
                    with self._lock:
                        self._processes.discard(process)
            told.seek(0)
            noise = told.read().decode(errors="replace").strip()
        ended = process.returncode or "error" not in answer
        if self.stopped and (ended or answer["error"]):
            raise KeyboardInterrupt
        if ended:
            problem = f"{source.stem}: its process ended with {process.returncode}: {noise[-300:]}"
            killed = "it has most often run out of memory; use fewer `--jobs`"
            raise NotebookError(problem, killed if process.returncode == -signal.SIGKILL else "mend what it says")
        if answer["error"]:
            raise NotebookError(*answer["error"])


def _shares(jobs: int) -> dict[str, str]:
    """Return the variables that give each of several notebooks its share of the cores, or less where less is set."""
    if jobs == 1:
        return {}
    share = max(1, runs.cores() // jobs)
    asked = {name: os.environ.get(name, "") for name in _THREADS}
    less = {name: min(share, int(text)) for name, text in asked.items() if text.isdecimal() and int(text)}
    return {name: str(less.get(name, share)) for name in _THREADS}


def _work() -> None:
    """Execute the notebook named on the standard input, and tell the cells as they start, then the error or null.

    Ends with the process that holds the other end of the standard input, and takes its kernel along.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries and kernels print is no answer, and a process that a notebook leaves keeps no pipe

    def tell(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    def end_with_parent() -> None:
        os.read(0, 1)  # returns when nobody can write any more
        _kill_children(os.getpid())
        os._exit(1)

    def interrupt(*_: Any) -> None:
        _kill_children(os.getpid())  # before the kernel is shut down, which would part its children from it
        raise KeyboardInterrupt

    job = sys.stdin.readline()
    signal.signal(signal.SIGINT, interrupt)
    threading.Thread(target=end_with_parent, daemon=True).start()
    # Left out, jsonschema checks no addresses, for which it would compile a grammar: half of what a worker starts with.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    source, output, parameters = json.loads(job)
    error = None
    try:
        _execute(Path(source), Path(output), parameters, lambda *cell: tell(cell=cell))
    except NotebookError as failed:
        error = (failed.problem, failed.remedy)
    finally:
        _kill_children(os.getpid())
    tell(error=error)


def _kill_children(pid: int) -> None:
    """Kill the children of a process, and theirs, and wait until they are gone."""
    found: set[psutil.Process] = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        while new := set(psutil.Process(pid).children(recursive=True)) - found:
            found |= new
            for process in new:
                with contextlib.suppress(psutil.Error):
                    process.suspend()  # all of them first: one that still ran could start another unseen
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(found, timeout=10)


def _record_file(folder: Path, notebook: str) -> Path:
    return folder / "notebooks" / f"{notebook}.json"


def _judge(step: Step, folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return in words why a step has to run, empty where it would give the result that is there; its key; its record.

    The key is that of now. It holds the files and folders that the last run has read, and no others: this one's are
    known when it is over. The record is that of the last run, empty where there is none that can be read.
    """
    record = keys.read_record(_record_file(folder, step.notebook))
    cells = json.loads(params.notebook_path(step.notebook).read_text("utf-8"))["cells"]
    key = {
        "parameters": _lasting(step.parameters),
        "code": keys.code_of_cells("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"),
        "versions": keys.versions(),
        "needs": {need: keys.read_record(_record_file(folder, need)).get("run") for need in step.needs},
        "data": {},
    }
    if not record:
        there = _record_file(folder, step.notebook).exists()
        return _DAMAGED if there else "it has not run to its end here", key, {}
    try:
        old = {**record["key"], "parameters": _lasting(record["key"]["parameters"])}
        key["data"] = {path: keys.tree(resolve(path)) for path in old["data"]}
        faults = keys.faults(folder, record["files"])
        why = keys.differences(old, key) or next((f"{name} {fault}" for name, fault in faults.items()), "")
    except (LookupError, TypeError, ValueError, AttributeError):  # it was edited, or damaged, and is still JSON
        return _DAMAGED, key | {"data": {}}, {}
    return why, key, record


_DAMAGED = "the record of its last run is damaged, or of another version"


def _lasting(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that a result depends on: not the place of the run folder, which can be moved."""
    return {name: value for name, value in parameters.items() if name != "run_folder"}


def _run_step(step: Step, folder: Path, force: bool, display: Display, execute: Callable[..., Any]) -> dict[str, Any]:
    """Run one step by `execute` unless it is up to date. Returns its status, seconds and error."""
    name = step.notebook
    output, metrics = folder / "notebooks" / f"{name}.ipynb", folder / "metrics" / f"{name}.json"
    record_file, clock = _record_file(folder, name), time.perf_counter()
    try:
        why, key, record = _judge(step, folder)  # before it runs: what is edited meanwhile is not what ran
        if not why and not force:
            display.end(name, f"up to date ({duration(record['seconds'])} when it ran)")
            return {"status": "up to date", "seconds": record["seconds"]}
        again = f"; again: {why or 'as was asked for'}" if record_file.exists() else ""
        # From here on neither the record nor the numbers of the last run hold.
        record_file.unlink(missing_ok=True)
        metrics.unlink(missing_ok=True)
        clock = time.perf_counter()
        display.start(name)
        execute(params.notebook_path(name), output, step.parameters, functools.partial(display.cell, name))
        seconds = round(time.perf_counter() - clock, 1)
        key["data"] = runs.read_provenance(metrics).get("data", {})
        record = {"key": key, "run": uuid.uuid4().hex, "files": _products(folder, name)}
        write_atomically(record_file, to_json({**record, "seconds": seconds, "finished": runs.now()}))
    except NotebookError as error:
        seconds = round(time.perf_counter() - clock, 1)
        told = f"{error}\nThe notebook up to there: {output}"
        display.end(name, f"failed after {duration(seconds)}{again}\n{textwrap.indent(told, '    ')}")
        return {"status": "failed", "seconds": seconds, "error": error.problem}
    except KeyboardInterrupt:
        display.end(name, "interrupted")
        return {"status": "interrupted"}
    except Exception as error:  # a disk that is full, a file that is gone: the other steps can still run
        problem = f"{type(error).__name__}: {error}"
        display.end(name, f"failed\n{textwrap.indent(problem, '    ')}")
        return {"status": "failed", "error": problem}
    display.end(name, f"{duration(seconds)}{again}")
    return {"status": "done", "seconds": seconds}


def status(
    profile: str, overrides: Sequence[str] = (), outputs: str | os.PathLike[str] = "outputs"
) -> tuple[dict[str, str], dict[str, str]]:
    """Return why each step of a profile, and each artefact in its run folder, has to be made again; empty = fresh.

    An artefact that no notebook has used in its last run is among them. Arguments and errors as of `reproduce`.
    """
    folder = run_folder(profile, outputs)
    steps = {step.notebook: _judge(step, folder)[0] for step in plan(profile, overrides, (), outputs)}
    metrics = map(runs.read_provenance, (folder / "metrics").glob("*.json"))
    used = {name for provenance in metrics for name in provenance.get("artefacts", ())}
    artefacts = {}
    for path in sorted(folder.glob("checkpoints/*/")):
        artefacts[path.name] = runs.stale(path) or ("" if path.name in used else "no notebook uses it any more")
    return steps, artefacts


def _products(folder: Path, notebook: str) -> dict[str, str]:
    """Return the SHA-256 of each file that a notebook has left in the run folder, under its path in there."""
    found = [folder / "notebooks" / f"{notebook}.ipynb", folder / "metrics" / f"{notebook}.json"]
    for kind in ("figures", "metrics"):
        found += sorted((folder / kind / notebook).rglob("[!.]*"))  # hidden files are not results
    return {path.relative_to(folder).as_posix(): keys.file_hash(path) for path in found if path.is_file()}


def _execute(
    source: Path,
    output: Path | None,
    parameters: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda *_: None,
    **options: Any,
) -> NotebookNode:
    """Execute a notebook with papermill in its own folder, and return it.

    Raises:
        NotebookError: a cell raised, or the kernel died. The output notebook holds what ran.
    """
    import nbformat
    import papermill

    # It warns that a `Literal[...]` is unknown, which its pattern cannot read. All names are checked before.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    # The kernel has to be this interpreter, also where a user has installed a kernel `python3` of another one.
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    count = len(nbformat.read(source, as_version=4).cells) + bool(parameters)
    position, text = 0, ""

    def on_cell(cell: Mapping[str, Any], cell_index: int, **_: Any) -> None:
        nonlocal position, text
        position, text = cell_index + 1, cell["source"]
        progress(position, count)

    run = functools.partial(
        papermill.execute_notebook,
        source,
        output,
        parameters=parameters,
        kernel_name="python3",
        language="python",
        progress_bar=False,
        cwd=source.parent,
        on_cell_start=on_cell,
        start_timeout=_START,
        extra_arguments=["--IPKernelApp.log_level=50"],  # what a kernel logs about its sockets and its end is noise
        **options,
    )
    try:
        try:
            return run()
        except RuntimeError:
            # The ports of a kernel are chosen before it takes them: another process may be faster, and it dies.
            if position:
                raise
            return run()
    except papermill.PapermillExecutionError as error:
        problem = f"{source.stem}, cell In [{error.exec_count}]{_failing_line(error)}: {error.ename}: {error.evalue}"
        raise NotebookError(problem, f"open the notebook, run it up to cell In [{error.exec_count}]") from None
    except Exception as error:  # a dead kernel, a full disk: whatever it is, the other notebooks can still run
        at = f"cell {position} of {count} `{text.strip().partition(chr(10))[0]}`"
        problem = f"{source.stem}, {at}: {type(error).__name__}: {error}"
        raise NotebookError(problem, _remedy_of(error)) from error


def _remedy_of(error: Exception) -> str:
    from nbclient.exceptions import DeadKernelError

    if isinstance(error, DeadKernelError):
        return "a kernel that dies has most often run out of memory"
    if isinstance(error, OSError) and error.errno in files.FULL:
        return "free space there, and run again"
    return "open the notebook, and run it up to that cell"


def _failing_line(error: papermill.PapermillExecutionError) -> str:
    """Return the number and the text of the cell's line that raised; its first line where the traceback names none."""
    lines = error.source.splitlines() or [""]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    found = [int(n) for n in re.findall(rf"Cell In\s?\[{error.exec_count}\], line (\d+)", plain)]
    if found and 0 < found[-1] <= len(lines):
        return f", line {found[-1]} `{lines[found[-1] - 1].strip()}`"
    return f" `{next((line.strip() for line in lines if line.strip()), '')}`"


# Results


def tables(folder: str | os.PathLike[str]) -> dict[str, pd.DataFrame]:
    """Return the metrics table of each notebook in a run folder, rebuilt from `metrics/*.json`.

    A file that is damaged is named on the standard error, and left out: the others are worth no less.
    """
    import pandas as pd

    found = {}
    for path in sorted((resolve(folder) / "metrics").glob("*.json")):
        try:
            if rows := json.loads(path.read_text("utf-8"))["table"]:  # none where a truth is missing that scores them
                to_json(rows).encode()  # half of a character is no text that can be written or shown
                found[path.stem] = pd.DataFrame(rows)
        except KeyError:
            continue  # a notebook without numbers to compare
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            with contextlib.suppress(OSError):
                warning = f"warning: {path} is damaged and left out ({error}); delete it, or run its notebook again"
                print(warning, file=sys.stderr, flush=True)
    return found


def show_tables(found: Mapping[str, pd.DataFrame]) -> None:
    """Print metrics tables, those of `tables`."""
    for name, table in found.items():
        say(f"\n{name}\n{table.to_string(index=False, na_rep='-', float_format='{:.3f}'.format)}")


def _show_steps(summary: Mapping[str, Any], folder: Path) -> None:
    steps = summary["steps"]
    width = max((len(step["notebook"]) for step in steps), default=0)
    say(f"\n{'notebook':<{width}}  {'seconds':>8}  status")
    for step in steps:
        seconds = "-" if step["seconds"] is None else f"{step['seconds']:.1f}"
        why = f": it needs {', '.join(step['lacks'])}" if "lacks" in step else ""
        say(f"{step['notebook']:<{width}}  {seconds:>8}  {step['status']}{why}")
    counts = Counter(step["status"] for step in steps)
    say(f"\n{', '.join(f'{count} {status}' for status, count in counts.items())}.")
    if failed := [step for step in steps if step["status"] == "failed"]:
        for step in failed:
            say(f"  {step['error']}\n    {folder / 'notebooks' / step['notebook']}.ipynb")
        say(f"Failed: {', '.join(step['notebook'] for step in failed)}. The same command runs what is missing.")
    if summary["interrupted"]:
        say("Interrupted. What is finished is kept; the same command goes on from here.")


def refresh(notebook: str | os.PathLike[str]) -> float:
    """Execute a notebook with its defaults and store the outputs in it; returns the seconds.

    What differs from run to run without being a result (times, ids of widgets, the patch version of Python) is left
    out, so that a stored notebook changes only where its content does. A notebook that fails is left as it was.

    Raises:
        ParameterError: there is no such notebook, or its parameters cell is not in order.
        NotebookError: a cell raised, or the kernel died.
    """
    import nbformat

    path = params.notebook_path(notebook)
    if path.parent.name != "solutions":  # which have none, and run alone
        params.notebook_parameters(path)
    clock = time.perf_counter()
    executed = _execute(path, None, {}, record_timing=False, store_widget_state=False, coalesce_streams=True)
    write_atomically(path, nbformat.writes(_tidy(executed)) + "\n")
    return time.perf_counter() - clock


def _tidy(notebook: NotebookNode) -> NotebookNode:
    notebook.metadata = type(notebook.metadata)(
        kernelspec={"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    for cell in notebook.cells:
        for name in ("papermill", "execution", "collapsed", "scrolled", "ExecuteTime"):
            cell.metadata.pop(name, None)
        if not cell.metadata.get("tags"):
            cell.metadata.pop("tags", None)
        for output in cell.get("outputs", ()):
            if "data" in output and len(output.data) > 1:  # a widget without its kernel shows only an error
                output.data.pop("application/vnd.jupyter.widget-view+json", None)
    return notebook
