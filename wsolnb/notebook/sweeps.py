"""Sweeps: notebooks over a grid of parameters and seeds, on one machine or on many, and one table of all runs.

`params/sweeps/<name>.yaml` is a sweep:

    title: SCM against TS-CAM over the rate of the backbone
    profile: studies               # the notebooks have the parameter files of this profile
    notebooks: [11_scm_training]   # run in every run, with the steps that they need
    parameters: {epochs: 2}        # optional: equal in all runs
    grid: {lr: [5.0e-5, 1.0e-4]}   # every combination is run
    seeds: {seeds: [[0], [1]]}     # optional: with each of these. Means and intervals are taken over them
    table:
      notebook: 11_scm_training    # whose metrics table is read
      rows: {epoch: [last], map: [tscam], method: [tscam, scm]}  # optional: which of its rows
      measures: [gt_known, pxap]   # which of its columns
    pairs: {method: tscam}         # optional: what the others are compared with, seed by seed

A run is `wsolnb reproduce` in a run folder of its own. Its result is one file, named by a key of all parameters, the
code and the versions of the numeric libraries, so that a run counts once however often it was started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from wsolnb import keys
from wsolnb.errors import ParameterError, RunError, WsolnbError, check_choice, nearest
from wsolnb.files import fingerprint, repository_root, resolve, to_json, write_atomically
from wsolnb.notebook import params, pipeline, preflight, runs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


# What to run


class _Table(BaseModel, extra="forbid", strict=True):
    notebook: str
    rows: dict[str, list[int | float | str | bool]] = {}
    measures: list[str]


class Slurm(BaseModel, extra="forbid", strict=True):
    """What a sweep asks Slurm for: `jobs` at once, each with `cpus` and `memory` for one run after another.

    directives: further lines of the job script, such as `--gres=gpu:1`.
    """

    jobs: int
    cpus: int = 1
    memory: str = "8GB"
    walltime: str = "04:00:00"
    queue: str = ""
    account: str = ""
    directives: list[str] = []


class Sweep(BaseModel, extra="forbid", strict=True):
    """A file of `params/sweeps/`. The docstring of this module says what each entry means."""

    title: str
    profile: str
    notebooks: list[str]
    parameters: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    seeds: dict[str, list[Any]] = {}
    table: _Table
    pairs: dict[str, int | float | str | bool] = {}
    slurm: Slurm | None = None

    @property
    def by(self) -> list[str]:
        """The columns that tell the groups over whose seeds means are taken: the grid's, and rows of several values."""
        return [*self.grid, *(name for name, values in self.table.rows.items() if len(values) > 1)]


@dataclasses.dataclass(frozen=True)
class Point:
    """A run: a point of the grid with a seed.

    values: of the parameters that vary. overrides: these and those that do not, as `pipeline.plan` takes them. key: of
    all that the numbers depend on but the data. made_of: what the key was made of: `parameters` by notebook, `code`,
    `versions`.
    """

    profile: str
    notebooks: tuple[str, ...]
    values: dict[str, Any]
    overrides: tuple[str, ...]
    made_of: dict[str, Any] = dataclasses.field(repr=False)

    @property
    def key(self) -> str:
        """Name of the file of the result."""
        return fingerprint(self.made_of)[:16]

    def __str__(self) -> str:
        return "  ".join(f"{name}={_cell(value)}" for name, value in self.values.items())


def read(sweep: str | os.PathLike[str]) -> tuple[str, Sweep]:
    """Return the name of a sweep, and the sweep, checked as far as nothing has to be known of its notebooks.

    sweep: name of a file in `params/sweeps/` without its suffix, or the path of a YAML file.

    Raises:
        ParameterError: there is no such sweep, an entry is unknown, missing or of a wrong type, a list is empty or has
            a value twice, or a name is used twice.
    """
    path = Path(sweep)
    if path.suffix != ".yaml":
        folder = repository_root() / "params" / "sweeps"
        check_choice("there is no sweep", str(sweep), sorted(file.stem for file in folder.glob("*.yaml")))
        path = folder / f"{sweep}.yaml"
    try:
        return path.stem, _checked(Sweep.model_validate(params.load_parameter_file(path)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ParameterError(f"{path}, {where}: {first['msg']}", "params/README.md describes a sweep") from None
    except ParameterError as error:
        raise ParameterError(f"{path}: {error.problem}", error.remedy) from None


def _checked(sweep: Sweep) -> Sweep:
    lists = {**sweep.grid, **sweep.seeds, "table.measures": sweep.table.measures, "notebooks": sweep.notebooks}
    lists |= {f"table.rows.{name}": values for name, values in sweep.table.rows.items()}
    if not sweep.grid and not sweep.seeds:
        raise ParameterError("neither `grid` nor `seeds` names a parameter", "name one that varies")
    for name, values in lists.items():
        if not values:
            raise ParameterError(f"{name} has no values, so that there is nothing to run", "name at least one")
        if len(set(map(json.dumps, values))) < len(values):
            raise ParameterError(f"{name} has a value twice, which would count twice", "drop one of them")
    names = [*sweep.parameters, *sweep.grid, *sweep.seeds, *sweep.table.rows, *sweep.table.measures]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ParameterError(f"{twice[0]!r} is named twice", "name it in one of parameters, grid, seeds and table")
    if len(sweep.pairs) > 1:
        raise ParameterError("`pairs` names several columns", "name the one whose values are compared")
    for column, reference in sweep.pairs.items():
        values = {**sweep.grid, **sweep.table.rows}
        check_choice("`pairs` compares values of", column, list(values))
        if reference not in values[column]:
            problem = f"`pairs` compares with {column} {reference!r}, which is not among its values"
            raise ParameterError(problem, f"use one of {', '.join(map(str, values[column]))}")
    return sweep


def points(sweep: Sweep) -> list[Point]:
    """Return the runs of a sweep, seeds innermost, all of them checked. Nothing is executed.

    Raises:
        ParameterError: as `pipeline.plan` for a profile, a notebook, a parameter or a value; or a column of the table
            is not in the notebook's recorded table (where one is recorded).
    """
    found = []
    varied = {**sweep.grid, **sweep.seeds}
    for combination in itertools.product(*varied.values()):
        values = dict(zip(varied, combination, strict=True))
        overrides = tuple(f"{name}={_text(value)}" for name, value in {**sweep.parameters, **values}.items())
        made_of = _made_of(sweep.profile, tuple(sweep.notebooks), overrides)
        found.append(Point(sweep.profile, tuple(sweep.notebooks), values, overrides, made_of))
    check_choice("`table` reads a notebook that is not run,", sweep.table.notebook, list(made_of["parameters"]))
    if known := _recorded_columns(sweep.table.notebook):
        for name in (*sweep.table.rows, *sweep.table.measures):
            check_choice(f"the table of {sweep.table.notebook} has no column", name, known)
    if len({point.key for point in found}) < len(found):
        raise ParameterError("two runs have equal parameters", "name each value once, as the notebook's type has it")
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _made_of(profile: str, notebooks: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """Return what the numbers of a run depend on, but for the data: nothing that says where or how fast it runs."""
    steps = pipeline.resolved(pipeline.plan(profile, overrides, notebooks))
    ignored = {"run_folder", *runs.HARMLESS}
    return {
        "parameters": {n: {k: v for k, v in values.items() if k not in ignored} for n, values in steps.items()},
        "code": {notebook: _code(notebook) for notebook in steps},
        "versions": keys.versions(),
    }


@functools.cache
def _code(notebook: str) -> str:
    cells = json.loads(params.notebook_path(notebook).read_text("utf-8"))["cells"]
    return fingerprint(keys.code_of_cells("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))


def _recorded_columns(notebook: str) -> list[str]:
    """Return the columns of a notebook's table, as far as `outputs/reference` tells."""
    folder = resolve("outputs/reference")
    files = [path for path in (folder / f"{notebook}.csv", folder / "smoke" / f"{notebook}.csv") if path.is_file()]
    return list(dict.fromkeys(name for path in files for name in path.read_text("utf-8").split("\n", 1)[0].split(",")))


def plan(
    sweep: str | os.PathLike[str], outputs: str | os.PathLike[str] = "outputs", part: str = "1/1", device: str = "cpu"
) -> list[str]:
    """Return lines that tell the runs of a sweep, which of them are made, and the hours that the others will take.

    Arguments and errors as of `run`. device: a name of `costs.DEVICES`, for which hours are estimated.
    """
    from wsolnb.notebook import costs

    check_choice("no rates are known of the device", device, costs.DEVICES)
    name, found = read(sweep)
    folder = _folder(name, outputs)
    lines, todo = [], []
    for point in _part(points(found), part):
        made = bool(_fresh(_file(folder, point)))
        lines.append(f"{point.key}  {'made   ' if made else 'to make'}  {point}")
        todo += [] if made else [point]
    each = [cost for one in todo for cost in costs.estimate(one.made_of["parameters"], costs.DEVICES[device])]
    hours = sum(cost.hours for cost in each if not math.isnan(cost.hours))
    lines.append(
        f"estimate for {len(todo)} runs, one after another, on {costs.DEVICES[device].title}: {hours:.2f} hours"
    )
    return lines + list(dict.fromkeys(f"  {cost.notebook}: {cost.note}" for cost in each if cost.note))


def _folder(name: str, outputs: str | os.PathLike[str]) -> Path:
    return resolve(outputs) / "sweeps" / name


# Running

_ALONE = threading.Lock()
"""A run takes the standard output of its process, so a worker with several threads makes one run at a time."""


def execute(point: Point, folder: str) -> dict[str, Any]:
    """Make a run, write its result to `<folder>/results/<key>.json`, and return it; nothing is run that is there.

    Raises:
        RunError: a notebook failed, or this process has other code or other libraries than who planned the run.
        KeyboardInterrupt: it was interrupted.
    """
    with _ALONE:
        path = _file(folder, point)
        if result := _fresh(path):
            return result
        here = _made_of(point.profile, point.notebooks, point.overrides)
        if why := keys.differences(point.made_of, here):
            raise RunError(f"{platform.node()} would make another run: {why}", "give all machines the same checkout")
        place = Path(folder) / "runs" / point.key
        place.mkdir(parents=True, exist_ok=True)
        with open(place / "log.txt", "w") as log, contextlib.redirect_stdout(log):
            summary = pipeline.reproduce(point.profile, point.overrides, point.notebooks, outputs=place)
        if summary["interrupted"]:
            raise KeyboardInterrupt
        for step in summary["steps"]:
            if "error" in step:
                raise RunError(step["error"], f"its log and its notebooks are in {place}")
        tables = {name: rows for name, rows in summary["tables"].items() if name in point.made_of["parameters"]}
        metrics = (place / point.profile / "metrics").glob("*.json")
        provenances = [runs.read_provenance(file) for file in metrics]
        made = {name: summary[name] for name in ("started", "seconds", "commit", "dirty", "processor")}
        made |= {"host": platform.node(), "devices": sorted({one["device"] for one in provenances if one})}
        result = {"values": point.values, "made_of": point.made_of, "tables": tables}
        result["data"] = {path: found for one in provenances for path, found in one.get("data", {}).items()}
        write_atomically(path, to_json(result | {"provenance": [made]}))
        return _result(path)


def _file(folder: str | os.PathLike[str], point: Point) -> Path:
    return Path(folder) / "results" / f"{point.key}.json"


def _result(path: Path) -> dict[str, Any]:
    """Return the result in a file; nothing if it is missing or damaged."""
    try:
        result = json.loads(path.read_text("utf-8"))
        whole = fingerprint(result["made_of"])[:16] == path.stem
        return result if whole and result["tables"] and result["provenance"] and "data" in result else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _fresh(path: Path) -> dict[str, Any]:
    """Return the result in a file; nothing also if data that it was made from have changed since.

    Data that are not here have not changed: a machine that only plans need not have them.
    """
    result = _result(path)
    changed = (keys.tree(resolve(name)) not in (found, "missing") for name, found in result.get("data", {}).items())
    return {} if any(changed) else result


def run(
    sweep: str | os.PathLike[str],
    outputs: str | os.PathLike[str] = "outputs",
    scheduler: str = "",
    workers: int = 1,
    slurm: bool = False,
    part: str = "1/1",
) -> dict[str, Any]:
    """Make the runs of a sweep that are missing, write tables and pictures, and return the summary.

    Everything goes to `<outputs>/sweeps/<name>/`: `results/` (a file for each run), `runs/` (their run folders),
    `runs.csv`, `means.csv`, `pairs.csv`, `sweep.png`, `sweep.json` (the sweep and the summary). A run that fails is
    reported and stops no other. After an interruption the same call goes on.

    Args:
        sweep: as of `read`.
        outputs: the folder that holds `sweeps/`; a relative path starts at the root of the repository.
        scheduler: address of a Dask scheduler, whose workers make the runs.
        workers: processes on this machine that make runs, if there is no scheduler.
        slurm: start the workers with Slurm, as the sweep's `slurm` says.
        part: `2/3` makes every third run, from the second on.

    Raises:
        ParameterError: as `read` and `points`, before anything is executed; or a table lacks a column or a row.
        preflight.Missing: data, files, weights or packages are not there; of runs on this machine.
        RunError: the scheduler or Slurm cannot be reached.
    """
    name, found = read(sweep)
    planned = points(found)
    part_of = _part(planned, part)
    folder = _folder(name, outputs)
    done = {point.key: result for point in planned if (result := _fresh(_file(folder, point)))}
    todo = [point for point in part_of if point.key not in done]
    for result in done.values():
        _rows(found, result)
    if todo and not scheduler and not slurm:
        wanted: dict[str, preflight.Finding] = {}
        for point in todo:
            steps = pipeline.plan(point.profile, point.overrides, point.notebooks)
            wanted |= {one.text: one for one in pipeline.missing(steps, point.profile, outputs) if one.fatal}
        preflight.report(list(wanted.values()), print)
    print(f"{name}: {len(planned)} runs, {len(todo)} to make here, folder {folder}", flush=True)
    summary = {"complete": False, "interrupted": False, "failed": {}}
    clock = time.perf_counter()
    try:
        with _executed(todo, folder, scheduler, workers, found.slurm if slurm else None) as ended:
            for number, (point, answer) in enumerate(ended, 1):
                seconds = ""
                if isinstance(answer, Exception):
                    problem = getattr(answer, "problem", f"{type(answer).__name__}: {answer}")
                    summary["failed"][point.key] = f"{point}: {problem}"
                else:
                    done[point.key] = answer
                    if not _fresh(_file(folder, point)):  # of a worker with a disk of its own
                        write_atomically(_file(folder, point), to_json(answer))
                    seconds = f"{answer['provenance'][0]['seconds']:.1f} s"
                    _rows(found, answer)  # now, and not when all runs have been made for a column that is not there
                told = f"failed: {summary['failed'][point.key]}" if point.key in summary["failed"] else seconds
                print(f"[{number}/{len(todo)}] {point}  {told}", flush=True)
    except KeyboardInterrupt:
        summary["interrupted"] = True
    summary["complete"] = all(point.key in done for point in planned)
    summary |= {"runs": len(planned), "done": len(done), "seconds": round(time.perf_counter() - clock, 1)}
    report(folder, found, list(done.values()), summary)
    return summary


def _part(planned: list[Point], part: str) -> list[Point]:
    number, _, count = part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ParameterError(f"`--part {part}` is no part", "write the second of three parts as 2/3")
    return planned[int(number) - 1 :: int(count)]


Ended = Iterator[tuple[Point, "dict[str, Any] | Exception"]]


@contextlib.contextmanager
def _executed(todo: list[Point], folder: Path, scheduler: str, workers: int, slurm: Slurm | None) -> Iterator[Ended]:
    """Give the runs as they end, each with its result or the error that it ended with."""
    with contextlib.ExitStack() as stack:
        if not todo or not (scheduler or slurm or workers > 1):
            yield ((point, _attempt(point, folder)) for point in todo)
            return
        from distributed import Client, LocalCluster

        place: Any = scheduler
        if slurm:
            place = stack.enter_context(slurm_cluster(slurm, folder))
            place.scale(jobs=min(slurm.jobs, len(todo)))
        elif not scheduler:
            count = min(workers, len(todo))
            # Without a limit of memory: the notebooks' kernels, which use it, are no part of what Dask would measure.
            options = {"threads_per_worker": 1, "memory_limit": None, "dashboard_address": ":0"}
            place = stack.enter_context(LocalCluster(n_workers=count, **options))
        try:
            client = stack.enter_context(Client(place, timeout=30))
        except (OSError, ValueError) as error:
            problem = f"the scheduler {scheduler or place.scheduler_address} cannot be reached: {error}"
            raise RunError(problem, "start one with `dask scheduler`, and give the address that it prints") from None
        print(f"{len(client.nthreads())} workers at {client.scheduler.address}; later ones take part, too", flush=True)
        yield _as_completed(client, todo, folder)


def _attempt(point: Point, folder: Path) -> dict[str, Any] | Exception:
    try:
        return execute(point, str(folder))
    except Exception as error:  # whatever it is, the other runs can still be made
        return error


def _as_completed(client: Any, todo: list[Point], folder: Path) -> Ended:
    from distributed import as_completed

    # The scheduler gives the run of a worker that is lost to another one, and makes what two clients ask for once.
    suffix = fingerprint(str(folder))[:8]
    futures = {client.submit(execute, point, str(folder), key=f"run-{point.key}-{suffix}"): point for point in todo}
    for future in as_completed(futures):
        point = futures.pop(future)
        try:
            answer = future.result()
        except Exception as error:  # whatever it is, the other runs can still be made
            answer = error
        future.release()  # or it would be made again where the worker that holds it is lost later
        yield point, answer


def slurm_cluster(slurm: Slurm, folder: Path) -> Any:
    """Return a `dask_jobqueue.SLURMCluster` whose jobs are workers of one thread; logs go to `<folder>/slurm/`.

    Raises:
        RunError: dask-jobqueue is not installed.
    """
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise RunError("the package dask-jobqueue is not installed", "pip install -e '.[cluster]'") from None
    prologue = [f"cd '{repository_root()}'", f"export OMP_NUM_THREADS={slurm.cpus} MKL_NUM_THREADS={slurm.cpus}"]
    return SLURMCluster(
        cores=1,
        processes=1,
        job_cpu=slurm.cpus,
        memory=slurm.memory,
        walltime=slurm.walltime,
        queue=slurm.queue or None,
        account=slurm.account or None,
        job_extra_directives=slurm.directives,
        job_script_prologue=prologue,
        log_directory=str(folder / "slurm"),
        python=sys.executable,
        scheduler_options={"dashboard_address": ":0"},
    )


# Tables


def _cell(value: Any) -> Any:
    """Return a parameter's value for a table: of a list of one its item, of other lists and dictionaries their text."""
    if isinstance(value, list) and len(value) == 1:
        return value[0]
    return json.dumps(value) if isinstance(value, list | dict) else value


def _version(result: Mapping[str, Any]) -> str:
    return fingerprint([result["made_of"]["code"], result["made_of"]["versions"]])[:8]


def _rows(sweep: Sweep, result: Mapping[str, Any]) -> pd.DataFrame:
    """Return the rows of the table that a run adds, with the values of the run."""
    import pandas as pd

    notebook, values = sweep.table.notebook, result["values"]
    where = f"the table of {notebook} at {', '.join(f'{name}={_cell(value)}' for name, value in values.items())}"
    table = pd.DataFrame(result["tables"].get(notebook, []))
    for name in (*sweep.table.rows, *sweep.table.measures):
        if name not in table:
            problem = f"{where} has no column {name!r}{nearest(name, table.columns)}"
            raise ParameterError(problem, f"use one of: {', '.join(table.columns)}")
    for name, wanted in sweep.table.rows.items():
        # Where a table holds numbers as texts, as names of columns become, they are the numbers of the sweep.
        named = table[name].map({**{str(value): value for value in wanted}, **{value: value for value in wanted}})
        if lacking := [value for value in wanted if value not in set(named)]:
            known = ", ".join(map(str, table[name].unique()))
            raise ParameterError(f"{where} has no row with {name} {lacking[0]!r}", f"use some of: {known}")
        table = table.assign(**{name: named})
    table = table.dropna(subset=list(sweep.table.rows))
    own = table["seed"] if "seed" in table and not sweep.seeds else 0
    seed = ", ".join(str(_cell(values[name])) for name in sweep.seeds) if sweep.seeds else own
    found = pd.DataFrame(index=table.index).assign(version=_version(result))
    found = found.assign(**{name: _cell(values[name]) for name in sweep.grid}, seed=seed)
    found = found.join(table[[*(name for name in sweep.by if name not in sweep.grid), *sweep.table.measures]])
    if len(found) == 0:
        raise ParameterError(f"{where} has no row with all of {sweep.table.rows}", "ask for values that go together")
    if found.duplicated([*sweep.by, "seed"]).any():
        differ = [n for n in table if n not in sweep.table.measures and len(set(map(str, table[n]))) > 1]
        problem = f"{where} has {len(found)} rows that `rows` does not tell apart"
        raise ParameterError(problem, f"name values in `rows` of one of: {', '.join(differ)}")
    numbers = found[sweep.table.measures].apply(pd.to_numeric, errors="coerce")
    return found.assign(**numbers, run=fingerprint(result["made_of"])[:16])


def tables(sweep: Sweep, results: Sequence[Mapping[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return three tables: all rows of all runs, means over seeds, and paired differences over seeds.

    In the second and the third each measure has its mean, and in the column `<measure> ±` half of the 95 % interval
    (`studies.interval`). `n` and `pairs` count seeds. Results of several versions are never in one mean: then the
    column `version` parts them.
    """
    import pandas as pd

    from wsolnb.notebook import studies

    def of(group: pd.DataFrame) -> dict[str, float]:
        found = {}
        for name in sweep.table.measures:
            found[name], found[f"{name} ±"] = studies.interval(group[name])
        return found

    varied = {**sweep.grid, **sweep.seeds}

    def place(result: Mapping[str, Any]) -> list[int]:
        return [values.index(result["values"][name]) for name, values in varied.items()]

    # In the order of the sweep, whoever was first: sums in another order differ in their last digit.
    everything = pd.concat([_rows(sweep, result) for result in sorted(results, key=place)], ignore_index=True)
    by = [*(["version"] if everything["version"].nunique() > 1 else []), *sweep.by]
    means, pairs = [], []
    for key, group in everything.groupby(by, sort=False) if by else [((), everything)]:
        means.append(dict(zip(by, key, strict=True)) | {"n": len(group)} | of(group))
    for column, reference in sweep.pairs.items():
        rest = [name for name in by if name != column]
        for key, group in everything.groupby(rest, sort=False) if rest else [((), everything)]:
            wide = group.pivot(index="seed", columns=column, values=sweep.table.measures)
            for value in group[column].unique():
                if value != reference and reference in set(group[column]):
                    d = {name: wide[name, value] - wide[name, reference] for name in sweep.table.measures}
                    d = pd.DataFrame(d).dropna(how="all")
                    row = dict(zip(rest, key, strict=True)) | {column: value, "less": reference, "pairs": len(d)}
                    pairs.append(row | of(d))
    return everything, pd.DataFrame(means), pd.DataFrame(pairs)


def picture(sweep: Sweep, means: pd.DataFrame, pairs: pd.DataFrame) -> Figure:
    """Draw the tables of `tables`: means in the first row, differences in the second, a column for each measure.

    Along the first column of the grid that varies; a line for each group of the other columns. Bars are 95 % intervals.
    """
    import matplotlib.pyplot as plt

    kinds = [(means, "n"), *([(pairs, "pairs")] if len(pairs) else [])]
    size = (max(4.5, 3.6 * len(sweep.table.measures)), 3.0 * len(kinds) + 0.4)
    figure, axes = plt.subplots(len(kinds), len(sweep.table.measures), figsize=size, squeeze=False)
    figure.suptitle(sweep.title, fontsize=10)
    for row, (table, count) in zip(axes, kinds, strict=True):
        groups = [name for name in table.columns[: list(table.columns).index(count)] if table[name].nunique() > 1]
        along = next((name for name in groups if name in sweep.grid), groups[0] if groups else "")
        ticks = list(table[along].unique()) if along else [""]
        lines = [name for name in groups if name != along]
        for axis, measure in zip(row, sweep.table.measures, strict=True):
            parted = table.groupby(lines, sort=False) if lines else [((), table)]
            for place, (key, part) in enumerate(parted):
                shift = 0.06 * (place - (len(parted) - 1) / 2)  # bars that would lie on each other
                x = [ticks.index(value) + shift for value in part[along]] if along else [0]
                label = ", ".join(f"{name} {value}" for name, value in zip(lines, key, strict=True))
                axis.errorbar(x, part[measure], part[f"{measure} ±"], marker="o", ms=4, capsize=2, label=label or None)
            axis.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
            axis.set_xlabel(along)
            less = f", difference to {next(iter(sweep.pairs.values()))}" if count == "pairs" else ""
            axis.set_ylabel(f"{measure}{less}")
            if less:
                axis.axhline(0, color="grey", lw=0.8)
        if lines:
            row[-1].legend(fontsize=8)
    return figure


def report(folder: Path, sweep: Sweep, results: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Write tables, picture and `sweep.json` of results to a folder, and print the tables and what is missing."""
    write_atomically(folder / "sweep.json", to_json({"sweep": sweep, "summary": summary}))
    if results:
        import matplotlib.pyplot as plt

        from wsolnb.notebook import viz

        everything, means, pairs = tables(sweep, results)
        for name, table in {"runs": everything, "means": means, "pairs": pairs}.items():
            write_atomically(folder / f"{name}.csv", table.to_csv(index=False) if len(table.columns) else "")
            if name != "runs" and len(table):
                print(f"\n{name}\n{table.to_string(index=False, na_rep='-', float_format='{:.4g}'.format)}")
        viz.set_style()
        figure = picture(sweep, means, pairs)
        write_atomically(folder / "sweep.png", viz.png(figure))
        plt.close(figure)
    for text in summary["failed"].values():
        print(f"\nfailed: {text}")
    if summary["complete"]:
        print(f"\nAll {summary['runs']} runs are in the table: {folder}", flush=True)
    else:
        print(f"\n{summary['done']} of {summary['runs']} runs are in the table: {folder}", flush=True)


# Merging


def merge(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> dict[str, Any]:
    """Bring the results of one sweep from several folders into another one, and write its tables.

    A run that is there twice with equal numbers counts once; the provenance of both is kept. The folders' grids and
    seeds may differ: the merged sweep has the values of all. What is in `out` already takes part.

    Raises:
        ParameterError: a folder holds no results, or those of another sweep.
        RunError: the same run has other numbers in two folders, and both have the same code and versions.
    """
    target = resolve(out)
    places = [resolve(folder) for folder in folders]
    places += [target] if (target / "sweep.json").is_file() and target not in places else []
    merged = _sweep_in(places[0])
    for place in places[1:]:
        merged = _united(merged, _sweep_in(place), place)
    varied = {**merged.grid, **merged.seeds}
    seen: dict[str, tuple[Path, dict[str, Any]]] = {}
    found: dict[str, dict[str, Any]] = {}
    for place in places:
        for path in sorted((place / "results").glob("*.json")):
            if not (result := _result(path)):
                raise RunError(f"{path} is damaged", "delete it, and run its sweep again")
            if any(result["values"].get(name) not in values for name, values in varied.items()):
                continue  # of an earlier grid
            first = seen.setdefault(path.stem, (path, result))
            if first[1]["tables"] != result["tables"]:
                raise _conflict(*first, path, result)
            for other in found.values():
                if _numbers(other) == _numbers(result):  # where versions differ, too
                    known = other["provenance"]
                    other["provenance"] = known + [one for one in result["provenance"] if one not in known]
                    break
            else:
                found[path.stem] = result
    if not found:
        raise ParameterError("there are no results in these folders", "give folders that `wsolnb sweep` has written")
    for key, result in found.items():
        write_atomically(target / "results" / f"{key}.json", to_json(result))
    results = list(found.values())
    count = math.prod(map(len, varied.values()))
    distinct = len({fingerprint(result["made_of"]["parameters"]) for result in results})
    summary = {"complete": distinct >= count, "interrupted": False, "failed": {}, "runs": count, "done": distinct}
    report(target, merged, results, summary | {"merged": [place.as_posix() for place in places]})
    return summary


def _numbers(result: Mapping[str, Any]) -> list[Any]:
    return [result["made_of"]["parameters"], result["tables"]]


def _sweep_in(folder: Path) -> Sweep:
    try:
        return Sweep.model_validate(json.loads((folder / "sweep.json").read_text("utf-8"))["sweep"])
    except (OSError, ValueError, LookupError, TypeError):
        problem = f"{folder} holds no results of a sweep"
        raise ParameterError(problem, "give a folder that `wsolnb sweep` has written, as outputs/sweeps/NAME") from None


def _united(one: Sweep, other: Sweep, place: Path) -> Sweep:
    """Return a sweep with the values of both; all but the values of grid and seeds has to agree."""
    varied = ("grid", "seeds")
    for name in Sweep.model_fields:
        mine, theirs = getattr(one, name), getattr(other, name)
        if list(mine) != list(theirs) if name in varied else mine != theirs and name not in ("title", "slurm"):
            raise ParameterError(f"{place} is of another sweep: its `{name}` differs", "merge folders of one sweep")
    united = {}
    for name in varied:
        mine, theirs = getattr(one, name), getattr(other, name)
        united[name] = {n: [*mine[n], *(v for v in theirs[n] if v not in mine[n])] for n in mine}
    return one.model_copy(update=united)


def _conflict(path: Path, one: Mapping[str, Any], other_path: Path, other: Mapping[str, Any]) -> WsolnbError:
    values = ", ".join(f"{name}={_cell(value)}" for name, value in one["values"].items())
    made_by = [result["provenance"][0].get("processor") for result in (one, other)]
    where = keys.differences({"tables": one["tables"]}, {"tables": other["tables"]}, most=1)
    problem = f"the run {values} has other numbers in {other_path} than in {path} ({where})"
    remedy = f"its code and its versions are equal; it was made on {made_by[0]} and on {made_by[1]}: leave one out"
    return RunError(problem, remedy)
