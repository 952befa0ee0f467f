import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from wsolnb.errors import ParameterError, RunError
from wsolnb.notebook import pipeline, sweeps
from wsolnb.notebook.cli import app

sys.path.append(str(Path(__file__).parents[1] / "notebooks"))
from sample import Repository

ROOT = Path(__file__).parents[2]

SCORE = """
import random

def score(method, lr, seed):
    return round(random.Random(f"{method} {lr} {seed}").random(), 4)
"""
PARTS = """
    import contextlib, time

    with open(run.folder / "started", "a") as file:
        print(seed, file=file)
    with contextlib.suppress(OSError):  # one run takes this file, and waits until it is killed
        (run.folder.parents[5] / "hold").rename(run.folder / "held")
        time.sleep(600)
    rows = [
        {"method": m, "map": k, "gt_known": score(m + k, lr, seed), "pxap": lr * seed}
        for m in ("old", "new") for k in ("a", "b")
    ]
    run.save_metrics({"table": rows})
    """
PARAMETERS = """\
seed: int = 0  # of the scores
lr: float = 1e-3  # step size
run_folder: str = "outputs/mini"  # where results go"""

PICTURE = sweeps.picture

exec(SCORE)  # the same scores here as in the notebook: `score`

SWEEP = {
    "title": "new against old",
    "profile": "mini",
    "notebooks": ["03_cam"],
    "grid": {"lr": [0.1, 0.2]},
    "seeds": {"seed": [0, 1, 2]},
    "table": {"notebook": "03_cam", "rows": {"method": ["old", "new"], "map": ["a"]}, "measures": ["gt_known", "pxap"]},
    "pairs": {"method": "old"},
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    repository = Repository(tmp_path)
    monkeypatch.setenv("WSOLNB_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    repository.notebook("03_cam", SCORE, PARTS, parameters=PARAMETERS)
    repository.pipeline({"notebook": "03_cam"})
    repository.yaml("sweeps/pairs", SWEEP)
    sweeps._code.cache_clear()
    return repository


@pytest.fixture
def reproduced(monkeypatch):
    """Stands in for the notebook: writes its metrics at once, and counts the runs. `broken` fails or interrupts."""
    calls, broken = [], {}

    def reproduce(profile, overrides, only, outputs):
        values = pipeline.plan(profile, overrides, only, outputs)[0].parameters
        point = values["lr"], values["seed"]
        calls.append(point)
        error = broken.get(point)
        if error is KeyboardInterrupt:
            return {"interrupted": True}
        rows = [
            {"method": m, "map": k, "gt_known": score(m + k, *point), "pxap": point[0] * point[1]}  # noqa: F821
            for m in ("old", "new")
            for k in ("a", "b")
        ]
        made = dict.fromkeys(("started", "seconds", "commit", "dirty", "processor"), 1.0)
        step = {"notebook": "03_cam", "status": "done"} | ({"error": error} if error else {})
        return made | {"interrupted": False, "steps": [step], "tables": {"03_cam": rows}}

    monkeypatch.setattr(pipeline, "reproduce", reproduce)
    monkeypatch.setattr(sweeps, "picture", lambda *_: plt.figure(figsize=(1, 1)))
    return calls, broken


def edited(**changes):
    """Return the sweep with changes; `table__rows` is the entry `rows` of `table`."""
    sweep = json.loads(json.dumps(SWEEP))
    for name, value in changes.items():
        first, _, second = name.partition("__")
        if second:
            sweep[first][second] = value
        else:
            sweep[first] = value
    return sweep


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"lrr": [0.1]}}, r"no notebook of this run has a parameter 'lrr' \(did you mean 'lr'\?\)"),
        ({"grid": {"lr": ["much"]}}, "'lr' must be float"),
        ({"grid": {"lr": []}}, "lr has no values"),
        ({"grid": {}, "seeds": {}}, "neither `grid` nor `seeds`"),
        ({"seeds": {"seed": [0, 1, 0]}}, "seed has a value twice"),
        ({"grid": {"lr": [1, 1.0]}}, "two runs have equal parameters"),
        ({"parameters": {"lr": 0.3}}, "'lr' is named twice"),
        ({"parameters": {"run_folder": "x"}}, "run_folder"),
        ({"profile": "mimi"}, "no profile 'mimi'"),
        ({"notebooks": ["03_kam"]}, "'03_kam' is no step"),
        ({"table__notebook": "04_table"}, "reads a notebook that is not run, '04_table'"),
        ({"table__measures": []}, "table.measures has no values"),
        ({"table__measures": ["gt_knwon"]}, r"no column 'gt_knwon' \(did you mean 'gt_known'\?\)"),
        ({"table__rows": {"methd": ["old"]}, "pairs": {}}, r"no column 'methd' \(did you mean 'method'\?\)"),
        ({"pairs": {"methd": "old"}}, r"compares values of 'methd' \(did you mean 'method'\?\)"),
        ({"pairs": {"method": "odl"}}, "compares with method 'odl', which is not among its values"),
        ({"pairs": {"method": "old", "lr": 0.1}}, "names several columns"),
        ({"tabel": {}}, "tabel: Extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_starts(repository, reproduced, changes, message):
    (repository.root / "outputs/reference").mkdir(parents=True)
    (repository.root / "outputs/reference/03_cam.csv").write_text("method,map,gt_known,pxap\n")
    repository.yaml("sweeps/pairs", edited(**changes))
    with pytest.raises(ParameterError, match=message):
        sweeps.run("pairs")
    assert reproduced[0] == []
    assert not (repository.root / "outputs/sweeps").exists()


def test_an_unknown_sweep_is_named_with_the_nearest(repository):
    with pytest.raises(ParameterError, match=r"no sweep 'pears' \(did you mean 'pairs'\?\)"):
        sweeps.run("pears")


def test_a_column_that_nobody_recorded_is_refused_at_the_first_result(repository, reproduced):
    repository.yaml("sweeps/pairs", edited(table__measures=["gt_knwon"]))
    with pytest.raises(ParameterError, match=r"no column 'gt_knwon' \(did you mean 'gt_known'\?\)"):
        sweeps.run("pairs")
    repository.yaml("sweeps/pairs", edited(table__rows={"method": ["old", "mew"]}))
    with pytest.raises(ParameterError, match="no row with method 'mew'"):
        sweeps.run("pairs")
    repository.yaml("sweeps/pairs", edited(table__rows={"map": ["a"]}, pairs={}))
    with pytest.raises(ParameterError, match="2 rows that `rows` does not tell apart") as error:
        sweeps.run("pairs")
    assert error.value.remedy == "name values in `rows` of one of: method"
    assert len(reproduced[0]) == 1  # the run itself was good, and is not made again


def test_means_and_paired_intervals_are_those_of_an_obvious_computation(repository, reproduced, monkeypatch):
    monkeypatch.setattr(sweeps, "picture", PICTURE)
    summary = sweeps.run("pairs")
    folder = repository.root / "outputs/sweeps/pairs"
    assert (summary["complete"], summary["runs"], summary["failed"]) == (True, 6, {})
    assert reproduced[0] == list(itertools.product([0.1, 0.2], [0, 1, 2]))
    means, pairs = pd.read_csv(folder / "means.csv"), pd.read_csv(folder / "pairs.csv")
    assert list(zip(means["lr"], means["method"], means["n"], strict=True)) == [
        (0.1, "old", 3), (0.1, "new", 3), (0.2, "old", 3), (0.2, "new", 3)
    ]  # fmt: skip
    for row in means.to_dict("records"):
        values = [score(row["method"] + "a", row["lr"], seed) for seed in range(3)]  # noqa: F821
        low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        assert row["gt_known"] == pytest.approx(np.mean(values))
        assert row["gt_known ±"] == pytest.approx((high - low) / 2)
    assert len(pairs) == 2
    for row in pairs.to_dict("records"):
        values = [score("newa", row["lr"], s) - score("olda", row["lr"], s) for s in range(3)]  # noqa: F821
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (row["method"], row["less"], row["pairs"]) == ("new", "old", 3)
        assert row["gt_known"] == pytest.approx(np.mean(values))
        assert row["gt_known ±"] == pytest.approx((interval.high - interval.low) / 2)
        assert (row["pxap"], row["pxap ±"]) == (0, 0)
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len(pd.read_csv(folder / "runs.csv")) == 12


def test_values_of_the_grid_are_compared_too(repository, reproduced):
    repository.yaml("sweeps/pairs", edited(pairs={"lr": 0.2}))
    sweeps.run("pairs")
    pairs = pd.read_csv(repository.root / "outputs/sweeps/pairs/pairs.csv")
    assert pairs[["method", "lr", "less", "pairs"]].values.tolist() == [["old", 0.1, 0.2, 3], ["new", 0.1, 0.2, 3]]
    d = [score("newa", 0.1, seed) - score("newa", 0.2, seed) for seed in range(3)]  # noqa: F821
    assert pairs["gt_known"][1] == pytest.approx(np.mean(d))


def test_a_failed_run_is_reported_and_stops_no_other(repository, reproduced, capsys):
    calls, broken = reproduced
    broken[0.1, 1] = "03_cam, cell In [3]: it broke"
    done = CliRunner().invoke(app, ["sweep", "pairs"])
    assert done.exit_code == 1
    assert done.output.count("failed: lr=0.1  seed=1: 03_cam, cell In [3]: it broke") == 2  # at once, and at the end
    assert "5 of 6 runs are in the table" in done.output
    assert pd.read_csv(repository.root / "outputs/sweeps/pairs/means.csv")["n"].tolist() == [2, 2, 3, 3]
    broken.clear()
    del calls[:]
    assert CliRunner().invoke(app, ["sweep", "pairs"]).exit_code == 0
    assert calls == [(0.1, 1)]


def test_an_interrupted_sweep_goes_on(repository, reproduced):
    calls, broken = reproduced
    broken[0.2, 0] = KeyboardInterrupt
    assert CliRunner().invoke(app, ["sweep", "pairs"]).exit_code == 130
    plan = sweeps.plan("pairs")
    assert [line.split()[1] for line in plan[:6]] == ["made"] * 3 + ["to"] * 3
    assert plan[6].startswith("estimate for 3 runs")
    broken.clear()
    assert sweeps.run("pairs")["complete"]
    assert calls[3:] == [(0.2, 0), (0.2, 0), (0.2, 1), (0.2, 2)]


def test_changed_code_data_and_damaged_results_are_made_again(repository, reproduced):
    calls, _ = reproduced
    sweeps.run("pairs")
    results = sorted((repository.root / "outputs/sweeps/pairs/results").iterdir())
    results[0].write_text(results[0].read_text()[:-20])
    (repository.root / "data.txt").write_text("new")
    read = json.loads(results[1].read_text())
    results[1].write_text(json.dumps(read | {"data": {"data.txt": "the old fingerprint"}}))
    absent = json.loads(results[2].read_text())
    results[2].write_text(json.dumps(absent | {"data": {"absent.txt": "on another machine"}}))
    sweeps.run("pairs")
    assert len(calls) == 6 + 2
    repository.notebook("03_cam", SCORE, PARTS, "changed = True", parameters=PARAMETERS)
    sweeps._code.cache_clear()
    sweeps.run("pairs")
    assert len(calls) == 6 + 2 + 6
    assert pd.read_csv(repository.root / "outputs/sweeps/pairs/means.csv")["n"].tolist() == [3] * 4


def test_parts_of_several_machines_merge_to_the_whole(repository, reproduced):
    sweeps.run("pairs")
    for part in ("1/2", "2/2"):
        sweeps.run("pairs", outputs=f"machine{part[0]}", part=part)
    assert len(reproduced[0]) == 12
    done = CliRunner().invoke(app, ["merge", "machine1/sweeps/pairs", "machine2/sweeps/pairs", "--out", "both"])
    assert (done.exit_code, "All 6 runs" in done.output) == (0, True)
    for name in ("means.csv", "pairs.csv"):
        assert Path("both", name).read_text() == Path("outputs/sweeps/pairs", name).read_text()
    with pytest.raises(ParameterError, match="`--part 3/2` is no part"):
        sweeps.run("pairs", part="3/2")


def test_a_run_that_is_there_twice_counts_once_and_keeps_both_provenances(repository, reproduced):
    sweeps.run("pairs")
    shutil.copytree("outputs/sweeps/pairs", "copy")
    for path in Path("copy/results").iterdir():
        result = json.loads(path.read_text())
        result["provenance"][0]["processor"] = "another"
        path.write_text(json.dumps(result))
    for _ in range(2):  # merged again into the same folder, it stays the same
        assert sweeps.merge(["outputs/sweeps/pairs", "copy"], "both")["done"] == 6
        assert pd.read_csv("both/means.csv")["n"].tolist() == [3] * 4
        for path in Path("both/results").iterdir():
            assert [one["processor"] for one in json.loads(path.read_text())["provenance"]] == [1.0, "another"]


def test_other_numbers_are_an_error_unless_versions_explain_them(repository, reproduced):
    sweeps.run("pairs")
    shutil.copytree("outputs/sweeps/pairs", "copy")
    path = sorted(Path("copy/results").iterdir())[0]
    result = json.loads(path.read_text())
    result["tables"]["03_cam"][0]["gt_known"] += 0.001
    path.write_text(json.dumps(result))
    values = result["values"]
    with pytest.raises(RunError, match=f"the run lr={values['lr']}, seed={values['seed']} has other numbers") as error:
        sweeps.merge(["outputs/sweeps/pairs", "copy"], "both")
    assert str(path.name) in error.value.problem
    assert not Path("both").exists()

    result["made_of"]["versions"]["numpy"] = "0.1"
    path.unlink()
    path = path.with_name(f"{sweeps.fingerprint(result['made_of'])[:16]}.json")
    path.write_text(json.dumps(result))
    assert sweeps.merge(["outputs/sweeps/pairs", "copy"], "both") == {
        "complete": True, "interrupted": False, "failed": {}, "runs": 6, "done": 6
    }  # fmt: skip
    means = pd.read_csv("both/means.csv")  # a mean of its own, as the versions would be mixed
    assert sorted(means["n"]) == [1, 1, 3, 3, 3, 3]
    assert means["version"].nunique() == 2


def test_sweeps_that_differ_do_not_merge(repository, reproduced):
    sweeps.run("pairs")
    repository.yaml("sweeps/other", edited(table__measures=["gt_known"]))
    repository.yaml("sweeps/more", edited(seeds={"seed": [2, 3]}))
    for name in ("other", "more"):
        sweeps.run(name)
    with pytest.raises(ParameterError, match="is of another sweep: its `table` differs"):
        sweeps.merge(["outputs/sweeps/pairs", "outputs/sweeps/other"], "both")
    assert sweeps.merge(["outputs/sweeps/pairs", "outputs/sweeps/more"], "both")["runs"] == 8
    assert pd.read_csv("both/means.csv")["n"].tolist() == [4] * 4  # seed 2 of both once
    repository.yaml("sweeps/more", edited(seeds={"seed": [3]}))
    sweeps.run("more")  # the result with seed 2 is still there
    assert sweeps.merge(["outputs/sweeps/more"], "more")["done"] == 2
    with pytest.raises(ParameterError, match="holds no results of a sweep"):
        sweeps.merge(["outputs"], "both")


def test_a_worker_with_other_code_refuses(repository, reproduced, monkeypatch):
    point = sweeps.points(sweeps.read("pairs")[1])[0]
    monkeypatch.setattr(sweeps.keys, "versions", lambda: {"numpy": "0.1"})
    with pytest.raises(RunError, match=r"would make another run: .*numpy"):
        sweeps.execute(point, str(repository.root / "folder"))
    assert reproduced[0] == []


def test_the_sweeps_of_the_repository_are_in_order(monkeypatch):
    monkeypatch.setenv("WSOLNB_ROOT", str(ROOT))
    for path in (ROOT / "params/sweeps").iterdir():
        name, sweep = sweeps.read(path.stem)
        planned = sweeps.points(sweep)
        assert len(planned) == np.prod([len(v) for v in (*sweep.grid.values(), *sweep.seeds.values())]), name
        recorded = pd.read_csv(ROOT / f"outputs/reference/{sweep.table.notebook}.csv")
        made_of = {"parameters": {}, "code": {}, "versions": {}}
        result = {"values": planned[0].values, "made_of": made_of}
        texts = recorded.astype(dict.fromkeys(sweep.table.rows, str))  # as a table can hold them
        for table in (recorded, texts):
            rows = sweeps._rows(sweep, result | {"tables": {sweep.table.notebook: table}})
            assert len(rows) == np.prod([len(v) for v in sweep.table.rows.values()])
            assert np.isfinite(rows[sweep.table.measures].to_numpy()).all()


def test_the_job_script_asks_slurm_for_what_the_sweep_says(tmp_path, monkeypatch):
    monkeypatch.setenv("WSOLNB_ROOT", str(tmp_path))
    slurm = sweeps.Slurm(jobs=3, cpus=4, memory="16GB", walltime="02:00:00", queue="gpu", directives=["--gres=gpu:1"])
    with sweeps.slurm_cluster(slurm, tmp_path / "sweep") as cluster:
        script = cluster.job_script()
    lines = script.splitlines()
    assert lines[0].startswith("#!")
    for line in (
        "#SBATCH -p gpu", "#SBATCH -n 1", "#SBATCH --cpus-per-task=4", "#SBATCH --mem=15G", "#SBATCH -t 02:00:00",
        "#SBATCH --gres=gpu:1", f"cd '{tmp_path}'", "export OMP_NUM_THREADS=4 MKL_NUM_THREADS=4",
    ):  # fmt: skip
        assert line in lines, script
    assert not any(line.startswith("#SBATCH -A") for line in lines)
    [worker] = [line for line in lines if "distributed.cli.dask_worker" in line]
    assert worker.startswith(sys.executable)
    assert "--nthreads 1" in worker
    assert "tcp://" in worker
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


# A cluster


def killed_in_the_middle(thread, cluster, folder: Path, after: int):
    """Kill with SIGKILL the worker that makes a run, once `after` results are there; returns the key of the run.

    thread: of the sweep; nothing is killed where it has ended before.
    """
    from distributed import Client

    def wait_for(pattern: str, count: int) -> list[Path]:
        while thread.is_alive() and len(list(folder.glob(pattern))) < count:
            time.sleep(0.5)
        return list(folder.glob(pattern))

    with Client(cluster) as client:
        (folder.parents[2] / "hold").touch()
        [held] = wait_for("runs/*/mini/held", 1)
        key = held.parents[1].name
        wait_for("results/*.json", after)
        [address] = [worker for worker, busy in client.processing().items() if any(key in name for name in busy)]
        os.kill(client.run(os.getpid)[address], signal.SIGKILL)
    return key


def on_a_cluster_that_loses_a_worker(folder: Path, workers: int, after: int):
    """Make the sweep `pairs` on a local cluster, one worker of which is killed; returns its run, and the output."""
    from distributed import LocalCluster

    done = []
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    with LocalCluster(n_workers=0, dashboard_address=":0") as cluster, contextlib.ExitStack() as stack:
        for _ in range(workers):
            process = subprocess.Popen([*worker, cluster.scheduler_address], stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
        arguments = ["sweep", "pairs", "--scheduler", cluster.scheduler_address]
        thread = threading.Thread(target=lambda: done.append(CliRunner().invoke(app, arguments)))
        thread.start()
        killed = killed_in_the_middle(thread, cluster, folder, after)
        thread.join()
    assert done[0].exit_code == 0, done[0].output
    return killed, done[0].output


def check_starts_and_table(folder: Path, sweep: dict, killed: str):
    """The run that was killed was started twice, the others once; each is in the table once, with its true numbers."""
    starts = {path.parents[1].name: len(path.read_text().split()) for path in folder.glob("runs/*/mini/started")}
    assert starts == {path.stem: 1 + (path.stem == killed) for path in folder.glob("results/*.json")}
    assert len(starts) == len(sweep["grid"]["lr"]) * len(sweep["seeds"]["seed"])
    table = pd.read_csv(folder / "runs.csv")
    expected = [
        (lr, seed, method, score(f"{method}a", lr, seed))  # noqa: F821
        for lr, seed, method in itertools.product(sweep["grid"]["lr"], sweep["seeds"]["seed"], ("old", "new"))
    ]
    found = table[["lr", "seed", "method", "gt_known"]].itertuples(index=False, name=None)
    assert sorted(found) == sorted(expected)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_the_runs_of_a_lost_worker_are_made_again_and_nothing_counts_twice(repository):
    sweep = edited(grid={"lr": [0.1]}, seeds={"seed": [0, 1, 2]})
    repository.yaml("sweeps/pairs", sweep)
    folder = repository.root / "outputs/sweeps/pairs"
    killed, output = on_a_cluster_that_loses_a_worker(folder, workers=2, after=1)
    assert "All 3 runs are in the table" in output
    check_starts_and_table(folder, sweep, killed)


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_24_runs_on_three_workers_one_of_which_is_killed_equal_those_of_one_process(repository):
    sweep = edited(grid={"lr": [0.1, 0.2, 0.3, 0.4]}, seeds={"seed": [0, 1, 2, 3, 4, 5]})
    repository.yaml("sweeps/pairs", sweep)
    folder = repository.root / "outputs/sweeps/pairs"
    killed, output = on_a_cluster_that_loses_a_worker(folder, workers=3, after=8)
    assert "All 24 runs are in the table" in output
    check_starts_and_table(folder, sweep, killed)
    serial = sweeps.run("pairs", outputs="serial")
    assert serial["complete"]
    for name in ("runs", "means", "pairs"):
        assert (folder / f"{name}.csv").read_text() == Path(f"serial/sweeps/pairs/{name}.csv").read_text()
    assert sweeps.merge([folder, "serial/sweeps/pairs"], "both")["done"] == 24
