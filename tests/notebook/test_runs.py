import json
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import wsolnb.errors
from wsolnb import files
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
    assert runs.resolve("../data") == root.parent / "data"
    assert runs.resolve("/data") == Path("/data")
    assert runs.resolve("~/data") == Path.home() / "data"

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
    assert run.seed == 7
    assert runs.start("a", {}).folder == root / "outputs" / "mini"
    assert runs.start("a", {"run_folder": "x"}, folder=root / "y").folder == root / "y"


def test_a_folder_that_cannot_be_made_is_a_clear_error(root):
    (root / "file").touch()
    with pytest.raises(runs.RunError, match=r"run folder .*file cannot be made") as error:
        runs.start("a", {"run_folder": "file"})
    assert "run_folder" in error.value.remedy
    with pytest.raises(runs.RunError, match="cannot be written"):
        runs.write_atomically(root / "file" / "a.json", "x")


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


def test_torch_values_are_stored(run):
    torch = pytest.importorskip("torch")
    assert runs.plain({"s": torch.tensor(0.5, requires_grad=True), "v": torch.tensor([1, 2])}) == {
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

    assert runs.plain(Config()) == {"path": "a/b", "model": {"a": 1}}


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
    path = runs.write_atomically(tmp_path / "deep" / "a.txt", "öld")
    assert path.read_text("utf-8") == "öld"

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(runs.RunError, match="No space left"):
        runs.write_atomically(path, "new")
    assert path.read_text("utf-8") == "öld"
    assert [item.name for item in path.parent.iterdir()] == ["a.txt"]


def test_fingerprints_depend_on_values_not_on_order():
    assert runs.fingerprint({"a": 1, "b": (1, 2)}) == runs.fingerprint({"b": [1, 2], "a": np.int64(1)})
    assert runs.fingerprint({"a": 1}) != runs.fingerprint({"a": 2})


def test_source_fingerprints_follow_files_modules_and_packages(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("a = 1")
    before = runs.source_fingerprint([package, wsolnb.errors])
    assert before == runs.source_fingerprint([package / "__init__.py", Path(wsolnb.errors.__file__)])
    (package / "a.py").write_text("a = 2")
    assert before != runs.source_fingerprint([package, wsolnb.errors])
    for nothing in (sys, tmp_path / "none.py", tmp_path.parent / "none"):
        with pytest.raises(runs.RunError, match="has no source file"):
            runs.source_fingerprint([nothing])


class Builder:
    def __init__(self):
        self.calls = 0

    def __call__(self, folder):
        self.calls += 1
        (folder / "weights").write_text("w")


def test_a_checkpoint_is_built_once(run, tmp_path, capsys):
    code, build = tmp_path / "code.py", Builder()
    code.write_text("1")
    first = run.cached("tscam", {"lr": 0.1}, [code], build)
    assert first.parent == run.checkpoints
    assert first.name.startswith("tscam-")
    assert len(first.name) == len("tscam-") + 12
    assert capsys.readouterr().out == "built tscam in 0 s\n"
    done = json.loads((first / "done.json").read_text())
    assert done["inputs"] == {"lr": 0.1}
    assert {"seconds", "versions", "code"} <= set(done)

    assert run.cached("tscam", {"lr": 0.1}, [code], build) == first
    assert capsys.readouterr().out == "reusing tscam (built in 0 s, parameters and code unchanged)\n"
    assert build.calls == 1

    assert run.cached("tscam", {"lr": 0.2}, [code], build) != first
    code.write_text("2")
    assert run.cached("tscam", {"lr": 0.1}, [code], build) != first
    assert build.calls == 3


def test_an_interrupted_build_goes_on_in_its_folder(run):
    def fail(folder):
        (folder / "last.pt").write_text("epoch 3")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.cached("tscam", {}, [wsolnb.errors], fail)

    def resume(folder):
        assert (folder / "last.pt").read_text() == "epoch 3"

    assert (run.cached("tscam", {}, [wsolnb.errors], resume) / "done.json").exists()


def test_a_damaged_marker_counts_as_none(run):
    build = Builder()
    folder = run.cached("tscam", {}, [wsolnb.errors], build)
    (folder / "done.json").write_text("{")
    run.cached("tscam", {}, [wsolnb.errors], build)
    assert build.calls == 2


def test_the_second_builder_waits_for_the_first(run, capsys):
    calls, go_on = [], threading.Event()

    def build(folder):
        calls.append(folder)
        go_on.wait(30)

    def ask():
        run.cached("tscam", {}, [wsolnb.errors], build)

    def until(condition):
        end = time.monotonic() + 30
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)

    out = []
    first, second = threading.Thread(target=ask), threading.Thread(target=ask)
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


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    path = tmp_path / "lock"
    hold = (
        "from pathlib import Path; from wsolnb.notebook import runs; import os\n"
        f"with runs.locked(Path({str(path)!r}), 'x'):\n"
    )
    subprocess.run([sys.executable, "-c", f"{hold}    os._exit(0)"], check=True)
    assert path.read_text().strip().isdigit()
    with runs.locked(path, "x"):
        assert path.read_text().strip() == str(os.getpid())


def test_a_lock_is_held_by_the_children_that_have_its_file(tmp_path, capsys):
    path = tmp_path / "lock"
    code = (
        "import subprocess, sys; from pathlib import Path; from wsolnb.notebook import runs\n"
        f"with runs.locked(Path({str(path)!r}), 'x', 'token') as file:\n"
        "    wait = [sys.executable, '-c', 'input()']\n"
        "    subprocess.Popen(wait, pass_fds=[file.fileno()], stdout=subprocess.DEVNULL)\n"
    )
    read, write = os.pipe()
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=read)
    os.close(read)
    parent.wait(60)
    assert path.read_text() == f"{parent.pid}\ntoken\n"
    threading.Timer(0.5, os.close, [write]).start()
    with runs.locked(path, "running in x"):
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
    with runs.locked(run.folder / ".lock", "x", "mine"):
        save(run)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    with runs.locked(run.folder / ".lock", "x", "other"):
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
    assert json.loads(runs.to_json(report)) == report
