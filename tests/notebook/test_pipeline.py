import contextlib
import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from wsolnb import files, keys, locks
from wsolnb.errors import ParameterError
from wsolnb.notebook import pipeline, runs

sys.path.append(str(Path(__file__).parents[1] / "notebooks"))
import faulted_runs
from sample import PARAMETERS, Repository

SAVE = 'run.save_metrics({"table": [{"method": "cam", "gt_known": 0.5, "epochs": epochs}]})'


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.delenv("WSOLNB_ROOT", raising=False)
    repository = Repository(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("01_data", "02_metrics", "03_cam", "04_table"):
        repository.notebook(name)
    repository.notebook("90_leaderboard", parameters='run_folder: str = "outputs/mini"  # where results are')
    repository.pipeline(
        {"notebook": "90_leaderboard", "needs": ["03_cam", "04_table"]},
        {"notebook": "04_table", "needs": ["03_cam"]},
        {"notebook": "03_cam", "needs": ["01_data"], "parameters": {"epochs": 3}},
        {"notebook": "02_metrics"},
        {"notebook": "01_data"},
    )
    return repository


# What to run


def test_steps_come_after_their_needs_and_keep_the_order_of_the_file(repository):
    names = [step.notebook for step in pipeline.plan("mini")]
    assert names == ["02_metrics", "01_data", "03_cam", "04_table", "90_leaderboard"]


def test_values_come_from_the_file_the_pipeline_and_the_command_line(repository):
    repository.yaml("mini/03_cam", "epochs: 9\nlr: 1.0e-2\nseed: 5\nrun_folder: outputs/other")
    steps = {step.notebook: step.parameters for step in pipeline.plan("mini", ["lr=1e-4"])}
    assert steps["03_cam"] == {"epochs": 3, "lr": 1e-4, "seed": 5, "run_folder": "outputs/mini"}
    assert steps["01_data"] == {"lr": 1e-4, "run_folder": "outputs/mini"}
    assert steps["90_leaderboard"] == {"run_folder": "outputs/mini"}


def test_outputs_go_where_they_are_wanted(repository, tmp_path):
    assert pipeline.plan("mini", outputs="elsewhere")[0].parameters == {"run_folder": "elsewhere/mini"}
    outside = tmp_path.parent / "outside"
    assert pipeline.plan("mini", outputs=outside)[0].parameters == {"run_folder": str(outside / "mini")}


def test_only_selects_a_step_with_its_needs(repository):
    assert [step.notebook for step in pipeline.plan("mini", only=["04_table"])] == ["01_data", "03_cam", "04_table"]
    assert [step.notebook for step in pipeline.plan("mini", only=["notebooks/01_data.ipynb"])] == ["01_data"]


def test_a_profile_that_extends_another_has_its_files_where_it_has_none(repository):
    repository.yaml("mini/01_data", "lr: 1.0e-2")
    repository.yaml("mini/03_cam", "lr: 1.0e-2\nepochs: 9")
    repository.yaml("swin/03_cam", "epochs: 4")
    repository.yaml("swin/pipeline", {"extends": "mino", "steps": [step("01_data"), step("03_cam", "01_data")]})
    with pytest.raises(ParameterError, match=r"extends 'mino', which is no profile \(did you mean 'mini'\?\)"):
        pipeline.plan("swin")
    repository.yaml("swin/pipeline", {"extends": "mini", "steps": [step("01_data"), step("03_cam", "01_data")]})
    steps = {one.notebook: one.parameters for one in pipeline.plan("swin")}
    assert steps["01_data"] == {"lr": 0.01, "run_folder": "outputs/swin"}
    assert steps["03_cam"] == {"epochs": 4, "run_folder": "outputs/swin"}  # its own file, and nothing of the other


def step(notebook, *needs, **parameters):
    return {"notebook": notebook, "needs": list(needs), "parameters": parameters}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([step("01_dat")], "no notebook '01_dat'"),
        ([step("01_data", "02_metric"), step("02_metrics")], "which is no step (did you mean '02_metrics'?)"),
        ([step("01_data", "01_data")], "01_data -> 01_data"),
        (
            [step("01_data", "03_cam"), step("02_metrics", "01_data"), step("03_cam", "02_metrics")],
            "these steps need each other",
        ),
        ([step("01_data"), step("01_data")], "'01_data' is listed twice"),
        ([step("01_data", epoch=3)], "no parameter 'epoch' (did you mean 'epochs'?)"),
        ([step("01_data", epochs="3")], "'epochs' must be int, not '3' (str)"),
        ([step("01_data") | {"need": []}], "need: Extra inputs are not permitted"),
        ([{"needs": []}], "steps.0.notebook: Field required"),
    ],
)
def test_wrong_pipelines(repository, steps, message):
    path = repository.pipeline(*steps)
    with pytest.raises(ParameterError) as error:
        pipeline.plan("mini")
    assert message in str(error.value)
    assert str(path) in str(error.value) or "no notebook" in message


def test_wrong_files_profiles_and_overrides(repository):
    file = repository.yaml("mini/03_cam", "lr: 1e-4")
    with pytest.raises(ParameterError, match=r"03_cam.yaml: .*must be float") as error:
        pipeline.plan("mini")
    assert "1.0e-4" in error.value.remedy
    file.rename(file.with_name("03_kam.yaml"))
    with pytest.raises(ParameterError, match=r"03_kam.yaml belongs to no notebook \(did you mean '03_cam'\?\)"):
        pipeline.plan("mini")
    file.with_name("03_kam.yaml").unlink()
    with pytest.raises(ParameterError, match=r"no profile 'mimi' \(did you mean 'mini'\?\)"):
        pipeline.plan("mimi")
    with pytest.raises(ParameterError, match=r"has a parameter 'epoch' \(did you mean 'epochs'\?\)"):
        pipeline.plan("mini", ["epoch=3"])
    pipeline.plan("mini", ["lr=0.1"], only=["01_data"])
    with pytest.raises(ParameterError, match="--outputs"):
        pipeline.plan("mini", ["run_folder=x"])
    with pytest.raises(ParameterError, match="'05_x' is no step"):
        pipeline.plan("mini", only=["05_x"])


def test_an_override_has_to_reach_a_notebook_that_runs(repository):
    repository.notebook("02_metrics", parameters='run_folder: str = "outputs/mini"  # where results are')
    with pytest.raises(ParameterError, match="no notebook of this run has a parameter 'lr'"):
        pipeline.plan("mini", ["lr=0.1"], only=["02_metrics"])


def test_every_notebook_has_a_run_folder(repository):
    repository.notebook("01_data", parameters="epochs: int = 1  # passes")
    with pytest.raises(ParameterError, match="01_data has no parameter 'run_folder'"):
        pipeline.plan("mini")


def test_nothing_is_executed_before_all_is_checked(repository, executed):
    repository.yaml("mini/90_leaderboard", "epochs: 3")
    with pytest.raises(ParameterError):
        pipeline.reproduce("mini")
    assert executed == []
    assert not (repository.root / "outputs").exists()


# Resuming, with notebooks that only pretend to run


@pytest.fixture
def executed(monkeypatch):
    """Names of the notebooks that were executed, in order. Those in `executed.failing` fail."""

    class Executed(list):
        failing = ()

        def take(self):
            names, self[:] = list(self), []
            return names

    executed = Executed()
    executed.data = {}

    def execute(_, source, output, parameters, progress):
        executed.append(source.stem)
        progress(1, 2)
        output.write_text("{}")
        if source.stem in executed.failing:
            raise pipeline.NotebookError(f"{source.stem}: broken")
        run = runs.start(source.stem, parameters)
        run.data |= executed.data.get(source.stem, {})
        run.save_metrics({"table": [{"epochs": parameters.get("epochs", 2)}]})

    monkeypatch.setattr(pipeline._Workers, "execute", execute)
    return executed


ALL = ["02_metrics", "01_data", "03_cam", "04_table", "90_leaderboard"]


def status(summary):
    return {entry["notebook"]: entry["status"] for entry in summary["steps"]}


def test_what_is_up_to_date_is_not_run_again(repository, executed, capsys):
    summary = pipeline.reproduce("mini")
    assert executed.take() == ALL
    assert summary["complete"]
    assert summary["tables"]["03_cam"] == [{"epochs": 3}]
    assert json.loads((repository.root / "outputs/mini/summary.json").read_text()) == summary
    capsys.readouterr()

    summary = pipeline.reproduce("mini")
    assert executed.take() == []
    assert set(status(summary).values()) == {"up to date"}
    assert all(entry["seconds"] is not None for entry in summary["steps"])
    out = capsys.readouterr().out
    assert "[3/5] 03_cam          up to date" in out
    assert "epochs\n      3" in out


def test_what_a_change_reaches_is_run_again(repository, executed):
    pipeline.reproduce("mini")
    executed.take()
    # parameters
    pipeline.reproduce("mini", ["epochs=4"], only=["01_data"])
    assert executed.take() == ["01_data"]
    # the run of a need, also if it happened in an earlier command
    pipeline.reproduce("mini", ["epochs=4"], only=["03_cam"])
    assert executed.take() == ["03_cam"]
    pipeline.reproduce("mini", ["epochs=4"])
    assert executed.take() == ["02_metrics", "04_table", "90_leaderboard"]
    # the code of a notebook, but neither its prose nor its outputs
    path = repository.root / "notebooks" / "04_table.ipynb"
    content = json.loads(path.read_text())
    content["cells"][0]["source"] = "# Another title"
    content["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "x"}]
    path.write_text(json.dumps(content))
    pipeline.reproduce("mini", ["epochs=4"])
    assert executed.take() == []
    content["cells"][2]["source"] += "\nprint(1)"
    path.write_text(json.dumps(content))
    pipeline.reproduce("mini", ["epochs=4"])
    assert executed.take() == ["04_table", "90_leaderboard"]
    # results that were deleted
    (repository.root / "outputs/mini/notebooks/90_leaderboard.ipynb").unlink()
    (repository.root / "outputs/mini/metrics/02_metrics.json").unlink()
    pipeline.reproduce("mini", ["epochs=4"])
    assert executed.take() == ["02_metrics", "90_leaderboard"]


def test_a_change_of_the_package_reaches_those_who_import_it(repository, executed, monkeypatch, capsys):
    repository.notebook("02_metrics", "from wsolnb.metrics import MaxBoxAcc")
    pipeline.reproduce("mini")
    executed.take()
    digest_of = keys._look_at
    changed = {"wsolnb.metrics.localization"}

    def look_at(module):
        looked = copy.copy(digest_of(module))
        looked.digest = "another" if module in changed else looked.digest
        return looked

    monkeypatch.setattr(keys, "_look_at", look_at)
    capsys.readouterr()
    pipeline.reproduce("mini")
    assert executed.take() == ["02_metrics"]
    assert "again: the code of wsolnb.metrics.localization changed" in capsys.readouterr().out
    changed.add("wsolnb.notebook.runs")  # which every notebook imports
    pipeline.reproduce("mini")
    assert executed.take() == ALL


def test_what_a_notebook_has_read_counts(repository, executed, tmp_path, capsys):
    labels = tmp_path / "labels.txt"
    labels.write_text("1 2")
    executed.data["01_data"] = {"labels.txt": keys.tree(labels)}
    pipeline.reproduce("mini")
    executed.take()
    pipeline.reproduce("mini")
    assert executed.take() == []
    labels.write_text("2 1")
    steps, _ = pipeline.status("mini")
    assert steps["01_data"] == "the files of labels.txt changed"
    pipeline.reproduce("mini", only=["01_data"])
    assert executed.take() == ["01_data"]


def test_status_tells_why(repository, executed):
    steps, artefacts = pipeline.status("mini")
    assert set(steps.values()) == {"it has not run to its end here"}
    assert artefacts == {}
    pipeline.reproduce("mini")
    assert not any(pipeline.status("mini")[0].values())
    steps, _ = pipeline.status("mini", ["lr=0.5"])
    assert steps["03_cam"] == "lr was None, is 0.5"
    run = runs.start("03_cam", {}, "outputs/mini")
    folder = run.cached("model", lambda folder: (folder / "weights").write_text("1"))
    (run.checkpoints / "half-0").mkdir()
    assert pipeline.status("mini")[1] == {"half-0": "it was not finished", folder.name: "no notebook uses it any more"}
    (folder / "weights").write_text("2")
    assert pipeline.status("mini")[1][folder.name] == "weights missing or damaged"


def test_force_runs_again_what_is_named(repository, executed):
    pipeline.reproduce("mini")
    executed.take()
    pipeline.reproduce("mini", only=["03_cam"], force=True)
    assert executed.take() == ["03_cam"]
    pipeline.reproduce("mini", force=True)
    assert executed.take() == ALL


def test_a_failure_stops_only_what_needs_it(repository, executed, capsys):
    pipeline.reproduce("mini", only=["03_cam"])
    executed.take()
    executed.failing = ("03_cam",)
    summary = pipeline.reproduce("mini", ["seed=1"])
    assert executed.take() == ["02_metrics", "01_data", "03_cam"]
    assert not summary["complete"]
    assert status(summary) == {
        "02_metrics": "done",
        "01_data": "done",
        "03_cam": "failed",
        "04_table": "not run",
        "90_leaderboard": "not run",
    }
    assert "03_cam" not in summary["tables"], "the numbers of an earlier run are not those of this one"
    out = capsys.readouterr().out
    assert "not run: it needs 03_cam, 04_table" in out
    assert "Failed: 03_cam." in out

    executed.failing = ()
    assert pipeline.reproduce("mini", ["seed=1"])["complete"]
    assert executed.take() == ["03_cam", "04_table", "90_leaderboard"]


FAULTS = [
    ("notebooks/03_cam.ipynb", "", "is empty"),
    ("notebooks/03_cam.ipynb", None, "is missing"),
    ("notebooks/03_cam.json", "{", None),
    ("metrics/03_cam.json", "flip", "was changed since"),
    ("metrics/03_cam.json", "{", "was changed since"),
    ("metrics/03_cam/curve.csv", "x", "was changed since"),
    ("figures/03_cam/maps.png", None, "is missing"),
]


@pytest.mark.parametrize(("name", "content", "reason"), FAULTS)
def test_files_that_are_not_as_they_were_left_are_made_again(repository, executed, capsys, name, content, reason):
    folder = repository.root / "outputs" / "mini"
    for product in ("metrics/03_cam/curve.csv", "figures/03_cam/maps.png"):
        runs.write_atomically(folder / product, "content")
    (folder / "figures/03_cam/.hidden").touch()
    pipeline.reproduce("mini", only=["03_cam"])
    executed.take()
    path = folder / name
    if content is None:
        path.unlink()
    elif content == "flip":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.write_text(content)
    capsys.readouterr()
    # What the fake notebook does not write again is no longer vouched for, or as it is now.
    assert pipeline.reproduce("mini", only=["03_cam"])["complete"]
    assert executed.take() == ["03_cam"]
    told = capsys.readouterr().out
    assert f"; again: {f'{name} {reason}' if reason else 'the record of its last run is damaged'}" in told
    assert json.loads((folder / "summary.json").read_text())["tables"]["03_cam"] == [{"epochs": 3}]
    pipeline.reproduce("mini", only=["03_cam"])
    assert executed.take() == []


def test_a_summary_is_written_whatever_is_damaged(repository, executed, capsys, monkeypatch):
    damaged = files.write_atomically(repository.root / "outputs/mini/metrics/07_other.json", b"\xff{")
    summary = pipeline.reproduce("mini")
    assert summary["complete"]
    assert set(summary["tables"]) == set(ALL)
    assert f"warning: {damaged} is damaged" in capsys.readouterr().err

    def full(path, content):
        if Path(path).parent.name == "notebooks":
            raise runs.RunError(f"{path} cannot be written: No space left on device")
        return files.write_atomically(path, content)

    monkeypatch.setattr(pipeline, "write_atomically", full)
    summary = pipeline.reproduce("mini", ["seed=4"], only=["03_cam"])
    assert status(summary) == {"01_data": "failed", "03_cam": "not run"}
    assert "No space left" in summary["steps"][0]["error"]
    assert json.loads((repository.root / "outputs/mini/summary.json").read_text()) == summary


def test_what_killed_processes_left_behind_is_swept(repository, executed, capsys):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folder = repository.root / "outputs" / "mini"
    here, elsewhere = f"{files.MACHINE}{'0a' * 10}", "0a" * 16
    left = [f".03_cam.json-{ended.pid}-{here}", f".03_cam.json-{os.getpid()}-{here}"]
    names = [*left, f".03_cam.json-{ended.pid}-{elsewhere}", ".a-b-c", ".hidden"]
    for name in names:
        runs.write_atomically(folder / "metrics" / "deep" / name, "part")
    pipeline.reproduce("mini", only=["01_data"])
    assert sorted(path.name for path in (folder / "metrics/deep").iterdir()) == sorted(names[1:])
    assert "removed 1 temporary files" in capsys.readouterr().out
    pipeline.reproduce("mini", only=["01_data"])
    assert "removed" not in capsys.readouterr().out


def test_each_run_has_a_token_of_its_own(repository, executed):
    lock = repository.root / "outputs/mini/.lock"
    seen = []
    for _ in range(2):
        pipeline.reproduce("mini", only=["01_data"])
        holder, token = lock.read_text().splitlines()
        assert int(holder.split()[0]) == os.getpid()
        seen.append(token)
    assert seen[0] != seen[1]


def test_the_table_shows_gaps_and_damage_is_named(repository, capsys):
    run = runs.start("03_cam", {})
    run.save_metrics({"table": [{"method": "cam", "top1": 0.12345}, {"method": "grabcut", "top1": None}]})
    runs.start("01_data", {}).save_metrics({"images": 3})
    runs.start("02_metrics", {}).save_metrics({"table": []})
    pipeline.show_tables(pipeline.tables(run.folder))
    assert capsys.readouterr().out == "\n03_cam\n method  top1\n    cam 0.123\ngrabcut     -\n"
    (run.folder / "metrics" / "01_data.json").write_text("{")
    pipeline.show_tables(pipeline.tables(run.folder))
    told = capsys.readouterr()
    assert told.out == "\n03_cam\n method  top1\n    cam 0.123\ngrabcut     -\n"
    assert "01_data.json is damaged" in told.err


def test_from_a_step_on_all_that_depends_on_it_runs_again(repository, executed):
    pipeline.reproduce("mini")
    executed.take()
    summary = pipeline.reproduce("mini", start=["04_table"])
    assert executed.take() == ["04_table", "90_leaderboard"]
    assert status(summary)["03_cam"] == "up to date"
    assert "02_metrics" not in status(summary)
    (repository.root / "outputs/mini/metrics/01_data.json").unlink()
    pipeline.reproduce("mini", start=["notebooks/03_cam.ipynb"])
    assert executed.take() == ["01_data", "03_cam", "04_table", "90_leaderboard"]
    pipeline.reproduce("mini", start=["90_leaderboard"], force=True)
    assert executed.take() == ["90_leaderboard"]
    with pytest.raises(ParameterError, match=r"'04_tabel' is no step .*did you mean '04_table'"):
        pipeline.reproduce("mini", start=["04_tabel"])


def test_after_a_failure_the_rest_goes_on_or_does_not(repository, executed, capsys):
    executed.failing = ("02_metrics",)  # nothing needs it
    summary = pipeline.reproduce("mini", keep_going=False)
    assert executed.take() == ["02_metrics"]
    assert set(status(summary).values()) == {"failed", "not run"}
    assert not summary["complete"]
    told = capsys.readouterr().out
    assert "1 failed, 4 not run." in told
    executed.failing = ("02_metrics", "03_cam")
    summary = pipeline.reproduce("mini")
    assert executed.take() == ["02_metrics", "01_data", "03_cam"]
    assert [step.get("lacks") for step in summary["steps"]] == [None, None, None, ["03_cam"], ["03_cam", "04_table"]]
    told = capsys.readouterr().out
    end = told[told.index("\nnotebook ") :]
    assert "2 failed, 1 done, 2 not run." in end
    assert "not run: it needs 03_cam, 04_table" in end
    place = repository.root / "outputs/mini/notebooks/03_cam.ipynb"
    assert f"  03_cam: broken\n    {place}\nFailed: 02_metrics, 03_cam. The same command" in end


# What goes wrong around a run


def test_a_run_folder_can_be_moved(repository, executed):
    pipeline.reproduce("mini")
    executed.take()
    before = json.loads((repository.root / "outputs/mini/summary.json").read_text())["tables"]
    (repository.root / "outputs").rename(repository.root / "elsewhere")
    summary = pipeline.reproduce("mini", outputs="elsewhere")
    assert executed.take() == []
    assert summary["tables"] == before
    assert not any(pipeline.status("mini", outputs="elsewhere")[0].values())
    assert not (repository.root / "outputs").exists()


@pytest.mark.parametrize("place", ["outputs", "outputs/mini", "outputs/mini/metrics"])
def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(repository, executed, place, monkeypatch):
    path = repository.root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # a file: permissions would not keep root out
    with pytest.raises((pipeline.preflight.Missing, runs.RunError), match="--outputs DIR"):
        pipeline.reproduce("mini")
    path.unlink()
    path.mkdir()
    refused = os.access
    monkeypatch.setattr(os, "access", lambda name, mode: Path(name) != path and refused(name, mode))
    with pytest.raises((pipeline.preflight.Missing, runs.RunError), match=r"cannot be written\n[^\0]*--outputs DIR"):
        pipeline.reproduce("mini")
    assert executed == []


def of_another_version(record, case):
    match case:
        case "fields":
            return {"version": 2, **{name: value for name, value in record.items() if name != "files"}}
        case "key":
            return record | {"key": {name: value for name, value in record["key"].items() if name != "parameters"}}
        case "types":
            return record | {"key": record["key"] | {"parameters": None, "needs": [1]}}
        case "list":
            return [record]


@pytest.mark.parametrize("case", ["fields", "key", "types", "list"])
def test_a_record_of_another_version_makes_a_step_run_again(repository, executed, capsys, case):
    pipeline.reproduce("mini", only=["03_cam"])
    executed.take()
    path = repository.root / "outputs/mini/notebooks/01_data.json"
    path.write_text(json.dumps(of_another_version(json.loads(path.read_text()), case)))
    assert pipeline.status("mini")[0]["01_data"].startswith("the record of its last run is damaged, or of another")
    assert pipeline.reproduce("mini", only=["03_cam"])["complete"]
    assert executed.take() == ["01_data", "03_cam"]
    assert "; again: the record of its last run is damaged, or of another version" in capsys.readouterr().out


def test_a_damaged_file_costs_no_more_than_its_step(repository, executed):
    draw = random.Random(0)
    whole = pipeline.reproduce("mini", only=["03_cam"])
    folder = repository.root / "outputs/mini"
    for _ in range(12):
        path = folder / draw.choice(["metrics/03_cam.json", "notebooks/03_cam.json", "notebooks/03_cam.ipynb"])
        content = bytearray(path.read_bytes())
        where = draw.randrange(len(content))
        content[where] ^= 1 << draw.randrange(8)
        path.write_bytes(content if draw.random() < 0.5 else content[:where])
        executed.take()
        summary = pipeline.reproduce("mini", only=["03_cam"])
        assert summary["complete"]
        assert summary["tables"] == whole["tables"]
        assert executed in ([], ["03_cam"])


WEIRD = [
    "5", "[]", "null", '"a"', '{"table": 5}', '{"table": "a"}', '{"table": [1, {"a": 2}]}', '{"table": {"a": 1}}',
    "[" * 200_000,
    '{"table": [{"a": "\\ud83d"}]}', '{"table": [[[1], 2]]}', '{"table": true}', '{"table": [{"a": {"b": [null]}}]}',
]  # fmt: skip


def test_no_content_of_a_metrics_file_stops_the_summary(repository, executed, capsys):
    folder = repository.root / "outputs/mini/metrics"
    (folder / "60_folder.json").mkdir(parents=True)
    for number, text in enumerate(WEIRD):
        (folder / f"{70 + number}_other.json").write_text(text)
    summary = pipeline.reproduce("mini", only=["01_data"])
    assert summary["complete"]
    assert summary["tables"]["01_data"] == [{"epochs": 2}]
    assert json.loads((folder.parent / "summary.json").read_text()) == json.loads(files.to_json(summary))
    assert capsys.readouterr().err.count("is damaged and left out") >= 9


@pytest.mark.parametrize("years", [-10, 10])
def test_no_clock_decides_what_is_up_to_date(repository, executed, monkeypatch, years):
    pipeline.reproduce("mini")
    executed.take()
    real, shift = time.time, years * 3.2e7
    monkeypatch.setattr(time, "time", lambda: real() + shift)
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * (real() + shift)))
    monkeypatch.setattr(runs, "now", lambda: f"{2026 + years}-01-01T00:00:00+00:00")
    for path in (repository.root / "outputs").rglob("*"):
        os.utime(path, (real() - shift, real() - shift))
    assert pipeline.reproduce("mini")["complete"]
    assert executed == []
    path = repository.root / "outputs/mini/metrics/03_cam.json"
    before = path.stat()
    path.write_text(path.read_text().replace("3", "4", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size and time as before
    summary = pipeline.reproduce("mini", only=["03_cam"])
    assert executed == ["03_cam"]
    assert all(step["seconds"] >= 0 for step in summary["steps"])


def test_what_cannot_be_written_at_the_end_is_still_told(repository, executed, capsys, monkeypatch):
    def full(path, content):
        if Path(path).name == "summary.json":
            raise runs.RunError(f"{path} cannot be written: No space left on device")
        return files.write_atomically(path, content)

    monkeypatch.setattr(pipeline, "write_atomically", full)
    with pytest.raises(runs.RunError, match="No space left"):
        pipeline.reproduce("mini", only=["01_data"])
    told = capsys.readouterr().out
    assert "\n epochs\n      2\n" in told
    assert "1 done." in told


# Notebooks at once


@pytest.fixture
def crowded(repository, monkeypatch):
    """Three notebooks that train and two that do not; returns what ran together, and on which GPU, for some GPUs."""
    names = ["03_cam_and_tscam", "11_scm_training", "20_lpcam_classifier", "01_data", "02_metrics"]
    for name in names:
        repository.notebook(name, parameters=f"{PARAMETERS}\ndevice: str = 'auto'  # where")
    repository.pipeline(*map(step, names))
    monkeypatch.setattr(runs, "cores", lambda: 8)

    def run(gpus, device="auto", jobs=5):
        together, found, lock = set(), [], threading.Lock()

        def execute(_, source, output, parameters, progress, environment=None):
            with lock:
                together.add(source.stem)
                found.append((frozenset(together), source.stem, (environment or {}).get("CUDA_VISIBLE_DEVICES")))
            time.sleep(0.15)
            with lock:
                found.append((frozenset(together), source.stem, (environment or {}).get("CUDA_VISIBLE_DEVICES")))
                together.discard(source.stem)
            output.write_text("{}")
            runs.start(source.stem, parameters).save_metrics({})

        monkeypatch.setattr(pipeline._Workers, "execute", execute)
        monkeypatch.setattr(pipeline.preflight, "gpus", lambda: gpus)
        assert pipeline.reproduce("mini", [f"device={device}"], force=True, jobs=jobs)["complete"]
        heavy = max(sum(name in names[:3] for name in group) for group, *_ in found)
        return heavy, max(len(group) for group, *_ in found), {name: gpu for _, name, gpu in found}

    return run


def test_a_gpu_has_one_notebook_that_trains_at_a_time(crowded):
    heavy, most, on = crowded(["0"])
    assert heavy == 1
    assert most > 1, "others run beside it"
    assert set(on.values()) == {None}
    heavy, most, on = crowded(["3", "GPU-5"])
    assert heavy == 2
    assert {on["03_cam_and_tscam"], on["11_scm_training"]} == {"3", "GPU-5"}
    assert on["20_lpcam_classifier"] in ("3", "GPU-5")
    assert on["01_data"] is None
    for gpus, device in (([], "auto"), (["0"], "cpu")):
        assert crowded(gpus, device)[0] > 1, "cores are shared out, and enough of them"


def test_gpus_are_those_that_can_be_seen(monkeypatch):
    import torch

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert pipeline.preflight.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-a")
    assert pipeline.preflight.gpus() == ["4", "GPU-a"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pipeline.preflight.gpus() == []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pipeline.preflight.gpus() == ["mps"]


def test_cores_are_shared_out(repository, executed, monkeypatch, capsys):
    for name in pipeline._THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(runs, "cores", lambda: 8)
    assert pipeline._shares(1) == {}
    assert set(pipeline._shares(3).values()) == {"2"}
    assert set(pipeline._shares(9).values()) == {"1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("NUMBA_NUM_THREADS", "16")
    shares = pipeline._shares(2)
    assert (shares["OMP_NUM_THREADS"], shares["NUMBA_NUM_THREADS"], shares["LOKY_MAX_CPU_COUNT"]) == ("1", "4", "4")
    code = "import cv2, joblib, os; print(cv2.getNumThreads(), joblib.cpu_count())"
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **pipeline._shares(8)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["1", "1"]
    monkeypatch.setattr(runs, "cores", lambda: 2)
    pipeline.reproduce("mini", jobs=7)
    told = capsys.readouterr().out
    assert "note: 7 notebooks at once would share 2 cores; 2 run at once" in told
    assert "5 notebooks, 2 at once" in told


# Ctrl-C, wherever it comes


def send_interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@contextlib.contextmanager
def listening():
    """Handle SIGINT as Python does, also in a test run that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interruption_before_or_behind_the_notebooks(repository, executed, monkeypatch, capsys):
    from typer.testing import CliRunner

    from wsolnb.notebook.cli import app

    with listening():
        for name in ("plan", "missing"):
            with monkeypatch.context() as patch:
                patch.setattr(pipeline, name, lambda *_: send_interrupt())
                done = CliRunner().invoke(app, ["reproduce"])
                assert (done.exit_code, executed) == (130, [])
                assert "Interrupted; no notebook was running. The same command goes on from here." in done.output
                assert not (repository.root / "outputs").exists()
        lock = repository.root / "outputs/mini/.lock"
        usual = locks._holder

        def holder(file):
            threading.Timer(0.5, send_interrupt).start()
            return usual(file)

        with locks.locked(lock, "x"), monkeypatch.context() as patch:
            patch.setattr(locks, "_holder", holder)
            done = CliRunner().invoke(app, ["reproduce"])
        assert (done.exit_code, executed) == (130, [])
        assert f"waiting for process {os.getpid()}, which is running in {lock.parent}" in done.output
        for name in ("tables", "show_tables", "_show_steps"):
            usual = getattr(pipeline, name)
            with monkeypatch.context() as patch:
                patch.setattr(pipeline, name, lambda *a, usual=usual: (send_interrupt(), usual(*a))[1])
                summary = pipeline.reproduce("mini")
                assert summary["complete"], "it came when nothing was left to be stopped"
                assert json.loads((repository.root / "outputs/mini/summary.json").read_text()) == summary


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_second_interruption_ends_what_hangs_while_the_tables_are_written(repository):
    code = """
    import signal, time
    from wsolnb.notebook import pipeline, runs

    def execute(_, source, output, parameters, progress):
        output.write_text("{}")
        runs.start(source.stem, parameters).save_metrics({})

    def hang(folder):
        print("hanging", flush=True)
        time.sleep(100)
        time.sleep(100)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    pipeline._Workers.execute, pipeline.tables = execute, hang
    from wsolnb.notebook.cli import app
    app(["reproduce"])
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    while "hanging" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    time.sleep(pipeline._AGAIN + 0.2)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped at once. What is finished is kept; the same command goes on" in told
    assert not any(pipeline.status("mini")[0].values())


# Notebooks that do run


@pytest.mark.slow
def test_notebooks_run_in_this_interpreter_with_their_parameters(repository, capsys, monkeypatch):
    # A kernel `python3` of another Python in the user's folder must not be taken.
    kernel = repository.root / "jupyter/kernels/python3/kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "other", "language": "python"}))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(repository.root / "jupyter"))
    typed = 'size: tuple[int, int] = (1, 2)  # a size\nrun_folder: str = "outputs/mini"  # where results go'
    repository.notebook(
        "01_data",
        "import os, sys",
        'row = {"python": sys.executable, "cwd": os.getcwd(), "folder": str(run.folder), "size": parameters["size"]}',
        'run.save_metrics({"table": [row]})',
        parameters=typed,
    )
    repository.notebook("02_metrics", "import os", "os._exit(9)")
    repository.notebook("03_cam", "values = [1, 2]", "# reads one too many\nvalues[seed]")
    repository.pipeline(step("01_data", size=[3, 4]), step("02_metrics"), step("03_cam", seed=2))
    summary = pipeline.reproduce("mini", outputs="elsewhere")

    folder = repository.root / "elsewhere" / "mini"
    [row] = summary["tables"]["01_data"]
    assert row["python"] == sys.executable
    assert Path(row["cwd"]) == repository.root / "notebooks"
    assert Path(row["folder"]) == folder
    assert row["size"] == [3, 4]

    assert status(summary) == {"01_data": "done", "02_metrics": "failed", "03_cam": "failed"}
    out = capsys.readouterr().out
    assert "02_metrics, cell 6 of 6 `os._exit(9)`: DeadKernelError" in out
    assert "03_cam, cell In [5], line 2 `values[seed]`: IndexError: list index out of range" in out
    assert out.count(str(folder / "notebooks" / "03_cam.ipynb")) == 2, "where it failed, and at the end"
    partial = json.loads((folder / "notebooks" / "03_cam.ipynb").read_text())
    assert any("IndexError" in str(cell.get("outputs")) for cell in partial["cells"])
    assert Path.cwd() == repository.root


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_notebooks_run_side_by_side_in_the_order_of_their_needs(repository, capsys, monkeypatch):
    monkeypatch.setattr(runs, "cores", lambda: 2)

    def meets(own, other):
        return f"""
        place = runs.resolve(run_folder)
        (place / "{own}").touch()
        for _ in range(600):
            if (place / "{other}").exists(): break
            time.sleep(0.1)
        assert (place / "{other}").exists(), "alone"
        print(os.environ["OMP_NUM_THREADS"])
        run.save_metrics({{"table": [{{"place": "{own}"}}]}})
        """

    imports = "import os, time\nfrom wsolnb.notebook import runs"
    repository.notebook("01_data", imports, textwrap.dedent(meets("one", "two")))
    repository.notebook("02_metrics", imports, textwrap.dedent(meets("two", "one")))
    repository.notebook("03_cam", imports, "assert (runs.resolve(run_folder) / 'metrics/01_data.json').exists()\n1 / 0")
    repository.notebook("04_table")
    repository.pipeline(step("04_table", "03_cam"), step("03_cam", "01_data"), step("01_data"), step("02_metrics"))
    summary = pipeline.reproduce("mini", jobs=2)
    told = capsys.readouterr().out
    expected = {"01_data": "done", "02_metrics": "done", "03_cam": "failed", "04_table": "not run"}
    assert status(summary) == expected, (summary, told)
    assert "04_table    not run: it needs 03_cam" in told
    assert re.search(r"03_cam .*failed after .*\n    03_cam, cell In \[\d\].*ZeroDivisionError", told)
    assert set(summary["tables"]) == {"01_data", "02_metrics"}
    assert status(pipeline.reproduce("mini", only=["02_metrics"], jobs=2)) == {"02_metrics": "up to date"}
    with pytest.raises(ParameterError, match="0 notebooks"):
        pipeline.reproduce("mini", jobs=0)


def start(repository, *arguments, **options):
    """Start `wsolnb reproduce`, as a shell that listens to signals would."""

    def listen() -> None:
        # A shell starts background jobs with SIGINT ignored, and children inherit that: these tests may run in one.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    command = [str(Path(sys.executable).with_name("wsolnb")), "reproduce", *arguments]
    options = {"stdout": subprocess.PIPE, "text": True, "preexec_fn": listen, **options}
    return subprocess.Popen(command, cwd=repository.root / "params", **options)


def until(condition, process=None):
    """Wait for a condition, as long as the process (of `start`) that is to bring it about runs."""
    deadline = time.monotonic() + 180  # a few seconds where the machine has nothing else to do
    while not condition() and time.monotonic() < deadline and (process is None or process.poll() is None):
        time.sleep(0.05)
    assert condition(), process and (process.kill(), process.communicate()[0])[1]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("jobs", "number"), [("1", "SIGINT"), ("2", "SIGINT"), ("1", "SIGTERM")])
def test_an_interruption_keeps_what_is_done(repository, jobs, number):
    waits = "open(os.path.join(run.folder, 'started'), 'w').close(); time.sleep(60)"
    repository.notebook("03_cam", "import os, time", waits)
    repository.pipeline(step("01_data"), step("03_cam", "01_data"))
    folder = repository.root / "outputs" / "mini"
    process = start(repository, "--jobs", jobs)
    until((folder / "started").exists, process)
    process.send_signal(getattr(signal, number))
    process.send_signal(signal.SIGINT)  # one that follows at once is no second one
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "Interrupted. What is finished is kept" in out
    assert "Traceback" not in out
    assert (folder / "notebooks/01_data.json").exists()
    assert (folder / "notebooks/03_cam.ipynb").exists()
    assert not (folder / "notebooks/03_cam.json").exists()
    assert json.loads((folder / "summary.json").read_text())["interrupted"]


def of_run(mark):
    """Return the processes with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.skipif(runs.cores() < 2, reason="on one core one notebook runs at once")
@pytest.mark.parametrize(("number", "count"), [("SIGHUP", 1), ("SIGTERM", 1), ("SIGKILL", 2)])
def test_a_killed_run_leaves_nothing_that_could_write_later(repository, number, count):
    names = ["01_data", "02_metrics"][:count]
    work = """
    if seed == 7:
        subprocess.Popen(["sleep", "50"])
        (run.folder / f"started-{run.notebook}").touch()
        time.sleep(6)
    """
    for name in names:
        save = 'run.save_metrics({"table": [{"seed": seed}]})'
        repository.notebook(name, "import subprocess, time", work, save)
    repository.pipeline(*map(step, names))
    folder = repository.root / "outputs" / "mini"
    mark = str(repository.root)
    first = start(repository, "--jobs", "2", "-p", "seed=7", env={**os.environ, "TEST_MARK": mark})
    until(lambda: len(list(folder.glob("started-*"))) == count, first)
    assert len(of_run(mark)) == 1 + 3 * count, "the command, and for each notebook a worker, a kernel, a child of it"
    first.stdout.close()  # as with a terminal that is closed: what is printed from here on fails
    first.send_signal(getattr(signal, number))
    summary = pipeline.reproduce("mini", ["seed=1"], jobs=2)
    assert of_run(mark) == [] or [process.pid for process in of_run(mark)] == [first.pid]
    assert first.wait(180) == (-signal.SIGKILL if number == "SIGKILL" else 130)
    assert of_run(mark) == []
    assert status(summary) == {name: "done" for name in names}
    assert summary["tables"] == {name: [{"seed": 1}] for name in names}
    again = pipeline.reproduce("mini", ["seed=1"], jobs=2)
    assert status(again) == {name: "up to date" for name in names}
    assert again["tables"] == summary["tables"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["kernel", "twice"])
def test_after_a_fault_the_same_command_goes_on(tmp_path, name):
    template = faulted_runs.build(tmp_path / "template")
    faults = faulted_runs.Faults(random.Random(1), seconds=1.0, early=False)
    expected = [[{"images": 7}], [{"last": 0}], ""]
    numbers = [1]
    while len(numbers) <= faulted_runs.EPOCHS:
        numbers.append(numbers[-1] * 7919 % 1000003)
    expected[1][0]["last"], expected[2] = numbers[-1], " ".join(map(str, numbers))
    for number in range(3):
        with contextlib.suppress(faulted_runs.Missed):  # on a machine that is busy
            assert all(faulted_runs.attempt(name, template, faults, expected, tmp_path / str(number)))
            return
    pytest.fail("the fault came too late")


@pytest.mark.parametrize(("deaths", "cells", "runs"), [(1, 0, 2), (2, 0, 2), (1, 1, 1)])
def test_a_kernel_that_dies_before_the_first_cell_is_started_once_more(repository, monkeypatch, deaths, cells, runs):
    import papermill

    calls = []

    def execute(*args, on_cell_start, **options):
        calls.append(options["start_timeout"])
        for index in range(cells):
            on_cell_start({"source": "1"}, cell_index=index)
        if len(calls) <= deaths:
            raise RuntimeError("Kernel died before replying to kernel_info")
        return "executed"

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    source = repository.root / "notebooks/01_data.ipynb"
    if deaths < runs:
        assert pipeline._execute(source, None, {}) == "executed"
    else:
        with pytest.raises(pipeline.NotebookError, match=r"01_data, .* Kernel died before replying"):
            pipeline._execute(source, None, {})
    assert len(calls) == runs


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_worker_that_hangs_is_killed(repository, monkeypatch):
    repository.notebook("01_data", "import time", "(run.folder / 'started').touch(); time.sleep(50)")
    repository.pipeline(step("01_data"))
    monkeypatch.setattr(pipeline, "_GRACE", 0.2)
    monkeypatch.setenv("TEST_MARK", "hangs")

    def interrupt():
        until((repository.root / "outputs/mini/started").exists)
        [worker] = [one for one in psutil.Process().children() if one in of_run("hangs")]
        worker.suspend()
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        summary = pipeline.reproduce("mini")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert summary["interrupted"]
    assert status(summary) == {"01_data": "interrupted"}
    assert of_run("hangs") == []


def test_refresh_stores_outputs_without_what_changes_by_itself(repository):
    path = repository.notebook(
        "01_data",
        'print("a"); print("b")\nepochs * 2',
        "from ipywidgets import IntSlider",
        "IntSlider()",
    )
    pipeline.refresh("01_data")
    first = path.read_text()
    content = json.loads(first)
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [1, 2, 3, 4, 5]
    assert [cell["metadata"] for cell in cells] == [{"tags": ["parameters"]}, {}, {}, {}, {}]
    assert cells[2]["outputs"][0]["text"] == ["a\n", "b\n"]
    assert list(cells[4]["outputs"][0]["data"]) == ["text/plain"]
    assert sorted(content["metadata"]) == ["kernelspec", "language_info"]
    assert first.endswith("}\n")
    assert not first.endswith("\n\n")

    path.write_text(first.replace("epochs * 2", "epochs / 0"))
    broken = path.read_text()
    with pytest.raises(pipeline.NotebookError, match=r"cell In \[3\].*ZeroDivisionError"):
        pipeline.refresh(path)
    assert path.read_text() == broken
