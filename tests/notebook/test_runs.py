import json
import math
import os
import platform
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from wsolnb import files, locks
from wsolnb.notebook import runs


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.delenv("WSOLNB_ROOT", raising=False)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


@pytest.fixture
def run(root):
    return runs.start("03_cam", {"seed": 7, "run_folder": "outputs/test", "lr": 0.1})


def test_the_root_is_found_from_any_place(root, tmp_path_factory, monkeypatch):
    assert files.repository_root() == root
    monkeypatch.chdir(root / "notebooks")
    assert files.resolve("../data") == root.parent / "data"
    assert files.resolve("/data") == Path("/data")
    assert files.resolve("~/data") == Path.home() / "data"

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    assert files.repository_root() == Path(files.__file__).parents[1]  # the checkout that is imported
    monkeypatch.setattr(files, "__file__", str(elsewhere / "site-packages" / "wsolnb" / "files.py"))
    assert files.repository_root() == elsewhere
    monkeypatch.setenv("WSOLNB_ROOT", str(root))
    assert files.repository_root() == root
    monkeypatch.setenv("WSOLNB_ROOT", str(root / "none"))
    with pytest.raises(runs.RunError, match="WSOLNB_ROOT"):
        files.repository_root()


def test_start_makes_the_folders(run, root):
    assert run.folder == root / "outputs" / "test"
    assert sorted(path.name for path in run.folder.iterdir()) == ["checkpoints", "figures", "metrics", "notebooks"]
    assert run.provenance()["seed"] == 7
    assert runs.start("a", {}).folder == root / "outputs" / "mini"
    assert runs.start("a", {"run_folder": "x"}, folder=root / "y").folder == root / "y"


def test_a_folder_that_cannot_be_made_is_a_clear_error(root):
    (root / "file").touch()
    with pytest.raises(runs.RunError, match=r"run folder .*file cannot be made") as error:
        runs.start("a", {"run_folder": "file"})
    assert "run_folder" in error.value.remedy
    with pytest.raises(runs.RunError, match="cannot be written"):
        files.write_atomically(root / "file" / "a.json", "x")


def test_a_folder_without_permission_is_a_clear_error(run, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "metrics")
    with pytest.raises(runs.RunError, match="metrics cannot be written"):
        runs.start("03_cam", run.parameters)


def test_metrics_keep_rows_and_provenance(run):
    table = pd.DataFrame({"method": ["cam", "tscam"], "gt_known": [np.float32(0.5), np.nan]})
    values = {"f": np.float64(0.25), "n": np.int64(3), "nan": math.nan, "inf": -math.inf, "a": np.arange(3), "b": True}
    run.save_metrics({"table": table, "values": values})
    content = json.loads((run.folder / "metrics" / "03_cam.json").read_text())
    assert content["table"] == [{"method": "cam", "gt_known": 0.5}, {"method": "tscam", "gt_known": None}]
    assert content["values"] == {"f": 0.25, "n": 3, "nan": None, "inf": None, "a": [0, 1, 2], "b": True}
    provenance = content["provenance"]
    assert provenance["parameters"] == run.parameters
    assert provenance["seed"] == 7
    assert {"python", "torch", "timm", "numpy", "opencv-python"} <= set(provenance["versions"])
    assert {"commit", "dirty", "device", "processor", "seconds"} <= set(provenance)
    assert provenance["started"] <= provenance["finished"]
    assert provenance["peak_memory_mb"] > 20  # of a process that holds torch


def test_the_peak_of_memory_stays_when_memory_is_given_back():
    before = runs.peak_memory()
    block = bytearray(300 * 2**20)
    block[::4096] = b"1" * len(block[::4096])
    held = runs.peak_memory()
    del block
    assert before <= held <= runs.peak_memory()
    assert held >= 300


def test_torch_values_are_stored(run):
    torch = pytest.importorskip("torch")
    assert files.plain({"s": torch.tensor(0.5, requires_grad=True), "v": torch.tensor([1, 2])}) == {
        "s": 0.5,
        "v": [1, 2],
    }


def test_what_json_cannot_hold_is_named(run):
    with pytest.raises(runs.RunError, match=r"table\[1\]\.score is a set"):
        run.save_metrics({"table": [{}, {"score": {1}}]})
    assert not (run.folder / "metrics" / "03_cam.json").exists()


def test_plain_knows_models_and_dataclasses():
    from pydantic import BaseModel

    class Model(BaseModel):
        a: int = 1

    @dataclass
    class Config:
        path: Path = Path("a/b")
        model: Model = field(default_factory=Model)

    assert files.plain(Config()) == {"path": "a/b", "model": {"a": 1}}


def test_tables_and_figures(run):
    from matplotlib.figure import Figure

    run.save_table(pd.DataFrame({"a": [1, 2]}), "curve")
    assert (run.folder / "metrics" / "03_cam" / "curve.csv").read_text() == "a\n1\n2\n"
    images = []
    for _ in range(2):
        figure = Figure()
        figure.subplots().plot([0, 1])
        run.save_figure(figure, "maps")
        images.append((run.folder / "figures" / "03_cam" / "maps.png").read_bytes())
    assert images[0].startswith(b"\x89PNG")
    assert images[0] == images[1]


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = files.write_atomically(tmp_path / "deep" / "a.txt", "öld")
    assert path.read_text("utf-8") == "öld"

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(runs.RunError, match="No space left"):
        files.write_atomically(path, "new")
    assert path.read_text("utf-8") == "öld"
    assert [item.name for item in path.parent.iterdir()] == ["a.txt"]


def test_fingerprints_depend_on_values_not_on_order():
    assert files.fingerprint({"a": 1, "b": (1, 2)}) == files.fingerprint({"b": [1, 2], "a": np.int64(1)})
    assert files.fingerprint({"a": 1}) != files.fingerprint({"a": 2})


class Builder:
    """Writes two files, and counts how often."""

    def __init__(self, text="w"):
        self.text, self.calls = text, []

    def __cache_key__(self, _reading):
        return self.text

    def __call__(self, folder):
        self.calls.append(sorted(path.name for path in folder.iterdir() if path.name[0] != "."))
        for name in ("weights", "history"):
            (folder / name).write_text(self.text * 100)


def test_an_artefact_is_built_once(run, capsys):
    build = Builder()
    first = run.cached("tscam", build)
    assert first.parent == run.checkpoints
    assert re.fullmatch(r"tscam-[0-9a-f]{12}", first.name)
    assert capsys.readouterr().out == "built tscam in 0 s\n"
    record = json.loads((first / "done.json").read_text())
    assert record["files"].keys() == {"weights", "history"}
    assert record["key"].keys() == {"inputs", "code", "versions", "data"}
    assert record["hash"].startswith(first.name.removeprefix("tscam-"))
    assert run.seconds_of(first) == record["seconds"]

    assert run.cached("tscam", build) == first
    assert capsys.readouterr().out == "reusing tscam (built in 0 s; all that it depends on is unchanged)\n"
    assert len(build.calls) == 1
    assert run.artefacts == {first.name: record["hash"]}

    assert run.cached("tscam", Builder("v")) != first
    assert capsys.readouterr().out.startswith("built tscam in 0 s; unlike the one before: ")
    assert run.cached("tscam", build, uses=["more"]) != first
    assert run.cached("cam[1]", build) != first
    assert "unlike" not in capsys.readouterr().out.splitlines()[-1]


def test_what_made_it_stale_is_said(run, capsys):
    for rate in (0.1, 0.2):
        run.cached("a", lambda folder, rate=rate: None)
    assert capsys.readouterr().out.splitlines()[1].startswith("built a in 0 s; unlike the one before: ")
    path = run.folder / "list.txt"
    for text in "ab":
        path.write_text(text)
        run.cached("b", lambda folder: path)
    assert "unlike the one before: " in capsys.readouterr().out.splitlines()[1]
    assert str(path) in run.data


def _flip(path):
    raw = bytearray(path.read_bytes())
    raw[50] ^= 1
    path.write_bytes(raw)


DAMAGE = {
    "a flipped bit": _flip,
    "a cut": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "an empty file": lambda path: path.write_bytes(b""),
    "a lost file": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_made_again_and_said(run, capsys, name):
    build = Builder()
    folder = run.cached("tscam", build)
    DAMAGE[name](folder / "weights")
    assert run.cached("tscam", build) == folder
    assert capsys.readouterr().out.splitlines()[1] == "built tscam in 0 s, again: weights missing or damaged"
    assert build.calls == [[], ["history"]]  # what is damaged is gone before the builder looks
    assert (folder / "weights").read_text() == "w" * 100
    run.cached("tscam", build)
    assert len(build.calls) == 2


RECORDS = {
    "cut": lambda record: json.dumps(record)[:50],
    "empty": lambda record: "",
    "a list": lambda record: "[]",
    "files are a list": lambda record: json.dumps({**record, "files": []}),
    "no seconds": lambda record: json.dumps({k: v for k, v in record.items() if k != "seconds"}),
    "no key": lambda record: json.dumps({k: v for k, v in record.items() if k != "key"}),
    "another hash": lambda record: json.dumps({**record, "hash": "0" * 64}),
    "no text": lambda record: "\0\xff",
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_made_again_and_said(run, capsys, name):
    build = Builder()
    folder = run.cached("tscam", build)
    path = folder / "done.json"
    path.write_text(RECORDS[name](json.loads(path.read_text())), encoding="latin-1")
    run.cached("tscam", Builder("other"))  # another artefact of the name is not disturbed
    run.cached("tscam", build)
    assert len(build.calls) == 2
    assert capsys.readouterr().out.splitlines()[-1] == "built tscam in 0 s, again: done.json damaged"
    run.cached("tscam", build)
    assert len(build.calls) == 2


def test_further_files_do_no_harm(run):
    build = Builder()
    folder = run.cached("tscam", build)
    (folder / "notes.txt").touch()
    run.cached("tscam", build)
    assert len(build.calls) == 1


def test_an_artefact_that_may_only_be_read_is_reused(run, monkeypatch):
    folder = run.cached("tscam", Builder())

    def refuse(*_):
        raise runs.RunError("read only", "")

    monkeypatch.setattr(runs, "locked", refuse)
    assert run.cached("tscam", Builder()) == folder


def test_a_failed_build_leaves_no_record_and_the_next_one_goes_on(run):
    def build(folder):
        if not (folder / "last.pt").exists():
            (folder / "last.pt").write_text("epoch 3")
            raise KeyboardInterrupt
        (folder / "resumed").touch()

    with pytest.raises(KeyboardInterrupt):
        run.cached("tscam", build)
    assert not run.artefacts
    folder = run.cached("tscam", build)
    assert {"last.pt", "resumed", "done.json"} <= {path.name for path in folder.iterdir()}


def test_force_makes_again_once_and_from_nothing(run, monkeypatch, capsys):
    build = Builder()
    run.cached("tscam", build)
    monkeypatch.setenv(runs.REMAKE, "today")
    run.cached("tscam", build)
    assert capsys.readouterr().out.splitlines()[1] == "built tscam in 0 s, again: as was asked for"
    run.cached("tscam", build)
    assert build.calls == [[], []]  # a builder that goes on from what is there must not find it
    monkeypatch.setenv(runs.REMAKE, "tomorrow")
    run.cached("tscam", build)
    monkeypatch.delenv(runs.REMAKE)
    run.cached("tscam", build)
    assert len(build.calls) == 3


def test_rows_are_kept(run):
    calls = []

    def measure():
        return [{"a": np.float32(0.5), "b": math.nan, "n": len([1])}]

    def count():
        calls.append(1)
        return measure()

    assert run.cached_rows("rows", measure) == [{"a": 0.5, "b": None, "n": 1}]
    assert run.cached_rows("rows", measure) == run.cached_rows("rows", measure)
    run.cached_rows("counted", count)
    assert len(calls) == 1


def test_what_another_notebook_was_run_with(run):
    with pytest.raises(runs.RunError, match="04_next goes on from 03_cam, which has no result"):
        runs.start("04_next", run.parameters).used("03_cam")
    run.save_metrics({"table": []})
    after = runs.start("04_next", run.parameters)
    assert after.used("03_cam", lr=0.1) == run.parameters
    with pytest.raises(runs.RunError, match=r"03_cam was run with lr=0.1, 04_next with 0.2"):
        after.used("03_cam", lr=0.2)
    for text in ("{", "[]", "{}", '{"provenance": 1}'):
        (run.folder / "metrics" / "03_cam.json").write_text(text)
        with pytest.raises(runs.RunError, match="damaged"):
            after.used("03_cam")


def test_a_result_of_an_older_version_is_told(tmp_path):
    older = runs.start("11_scm_training", {"run_folder": str(tmp_path), "seed": 0, "epochs": 2})
    older.save_metrics({"table": []})
    with pytest.raises(runs.RunError, match=r"11_scm_training in .* is of an older version, without dataset, "):
        runs.start("12_scm_results", {"run_folder": str(tmp_path), "seed": 0}).used("11_scm_training")


def test_recorded_studies_count_as_data(run, root):
    assert list(run.recorded("long", ["a", "b"]).columns) == ["a", "b"]
    path = root / "outputs" / "reference" / "long.csv"
    assert run.data == {str(path): "missing"}
    path.parent.mkdir()
    path.write_text("a,b\n1,2\n")
    assert run.recorded("long").to_dict("records") == [{"a": 1, "b": 2}]
    assert run.data[str(path)] != "missing"


def test_the_second_builder_waits_for_the_first(run, capsys):
    go_on, calls = threading.Event(), []

    class Slow(Builder):
        def __call__(self, folder):
            calls.append(folder)
            go_on.wait(30)

    def until(condition):
        end = time.monotonic() + 30
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)

    out = []
    first, second = (threading.Thread(target=lambda: run.cached("tscam", Slow())) for _ in range(2))
    first.start()
    until(lambda: calls)
    second.start()
    until(lambda: out.append(capsys.readouterr().out) or "waiting" in "".join(out))
    go_on.set()
    first.join()
    second.join()
    out = "".join(out) + capsys.readouterr().out
    assert len(calls) == 1
    assert f"waiting for process {os.getpid()}, which is building tscam" in out
    assert "reusing tscam" in out


def test_of_two_processes_one_builds(root):
    program = (
        "import sys, time\n"
        "from wsolnb.notebook import runs\n"
        "run = runs.start('a', {'run_folder': sys.argv[1]})\n"
        "def build(folder):\n"
        "    time.sleep(2)\n"
        "    (folder / 'a').touch()\n"
        "run.cached('a', build)\n"
    )
    command = [sys.executable, "-c", program, str(root / "run")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(process.communicate(timeout=120)[0] for process in started)
    assert said.count("built a") == 1
    assert said.count("reusing a") == 1


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    path = tmp_path / "lock"
    hold = (
        f"from pathlib import Path; from wsolnb import locks; import os\nwith locks.locked(Path({str(path)!r}), 'x'):\n"
    )
    subprocess.run([sys.executable, "-c", f"{hold}    os._exit(0)"], check=True)
    assert path.read_text().split()[0].isdigit()
    with locks.locked(path, "x"):
        assert path.read_text() == f"{os.getpid()} {platform.node()}"


def test_a_lock_of_another_machine_names_it(tmp_path, capsys, monkeypatch):
    path, held, real = tmp_path / "lock", threading.Event(), platform.node()

    def hold():
        with locks.locked(path, "x"):
            held.set()
            time.sleep(0.5)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)
    monkeypatch.setattr(platform, "node", lambda: "another")
    with locks.locked(path, "running in x"):
        holder.join()
    assert capsys.readouterr().out == f"waiting for process {os.getpid()} on {real}, which is running in x\n"


def test_a_lock_is_held_by_the_children_that_have_its_file(tmp_path, capsys):
    path = tmp_path / "lock"
    code = (
        "import subprocess, sys; from pathlib import Path; from wsolnb import locks\n"
        f"with locks.locked(Path({str(path)!r}), 'x', 'token') as file:\n"
        "    wait = [sys.executable, '-c', 'input()']\n"
        "    subprocess.Popen(wait, pass_fds=[file.fileno()], stdout=subprocess.DEVNULL)\n"
    )
    read, write = os.pipe()
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=read)
    os.close(read)
    parent.wait(60)
    assert path.read_text() == f"{parent.pid} {platform.node()}\ntoken"
    threading.Timer(0.5, os.close, [write]).start()
    with locks.locked(path, "running in x"):
        told = capsys.readouterr().out
    assert told == f"waiting for what process {parent.pid}, ended since, has left behind: it was running in x\n"


def test_a_superseded_run_saves_nothing(run, root, monkeypatch):
    from matplotlib.figure import Figure

    def save(run):
        run.save_metrics({"table": []})
        run.save_table(pd.DataFrame({"a": [1]}), "curve")
        run.save_figure(Figure(), "maps")

    monkeypatch.setenv(runs.TOKEN, f"mine {run.folder}")
    save(run)  # without a lock file
    with locks.locked(run.folder / ".lock", "x", "mine"):
        save(run)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    with locks.locked(run.folder / ".lock", "x", "other"):
        for call in (
            lambda: run.save_metrics({}),
            lambda: run.save_table(pd.DataFrame({"a": [1]}), "curve"),
            lambda: run.save_figure(Figure(), "maps"),
            lambda: runs.check_current(run.folder),
        ):
            with pytest.raises(runs.RunError, match="this run was superseded"):
                call()
        lock = run.folder / ".lock"
        assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path != lock} == {
            path: stamp for path, stamp in before.items() if path != lock
        }
        save(runs.start("03_cam", {}, root / "elsewhere"))  # another folder is no matter of this run
        monkeypatch.delenv(runs.TOKEN)
        save(run)  # as a notebook in Jupyter


def test_commit_is_that_of_this_checkout_only(root):
    assert runs.commit() == {"commit": None, "dirty": None}

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True)

    git("init")
    assert runs.commit()["commit"] is None  # no history yet
    git("add", "pyproject.toml")
    git("commit", "-m", "one")
    assert len(runs.commit()["commit"]) == 40
    assert runs.commit()["dirty"] is False
    (root / "pyproject.toml").write_text("changed")
    assert runs.commit()["dirty"] is True


def test_the_environment_report_can_be_stored():
    report = runs.environment_report()
    assert {"python", "torch", "device", "processor", "cores"} <= set(report)
    assert json.loads(files.to_json(report)) == report


def test_of_several_processes_the_main_one_decides_and_writes(tmp_path, monkeypatch):
    """What another one does: it builds what it is told to, and nothing else."""
    run = runs.start("x", {"run_folder": str(tmp_path)})

    def build(folder):
        with open(folder / "log", "a") as log:
            log.write("x")

    folder = run.cached("one", build)
    key, log = run.artefacts[folder.name], folder / "log"
    words: list[str] = []
    monkeypatch.setattr(runs, "_told_by_the_main_process", lambda *_: words.pop(0))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    (folder / "done.json").unlink()
    words[:] = [key, key]  # to build; the record is written
    assert run.cached("one", build, together=True) == folder
    assert (log.read_text(), words) == ("xx", [])
    words[:] = [""]  # it is there
    assert run.cached("one", build, together=True) == folder
    assert (log.read_text(), words) == ("xx", [])
    words[:] = ["another"]
    with pytest.raises(runs.RunError, match="different things"):
        run.cached("one", build, together=True)
    assert not (folder / "done.json").exists()
    run.cached("one", build)  # what is no training one process makes, whichever
    assert (log.read_text(), (folder / "done.json").exists()) == ("xxx", True)
