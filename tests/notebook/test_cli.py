import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from wsolnb.notebook import pipeline, runs
from wsolnb.notebook.cli import app

sys.path.append(str(Path(__file__).parents[1] / "notebooks"))
from sample import Repository


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.delenv("WSOLNB_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    repository = Repository(tmp_path)
    repository.notebook("01_data")
    repository.pipeline({"notebook": "01_data"})
    return repository


def wsolnb(*arguments):
    return CliRunner().invoke(app, arguments)


def test_help_needs_no_heavy_module():
    code = """
import sys
from wsolnb.notebook.cli import app
app(["--help"], standalone_mode=False)
print(*sorted({"torch", "papermill", "pandas", "numpy", "pydantic", "rich", "matplotlib", "numba"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *help_, modules = done.stdout.splitlines()
    assert any("reproduce" in line for line in help_)
    assert modules == ""


def test_parameters_are_listed(repository):
    done = wsolnb("parameters", "01_data")
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[0].split() == ["name", "type", "default", "meaning"]
    assert lines[4].split("  ")[0] == "data_root"
    assert "str | None  None" in lines[4]
    assert lines[4].endswith("folder of photographs")


def test_a_plan_says_what_is_missing_and_nothing_runs(repository, monkeypatch):
    monkeypatch.setattr(pipeline, "_execute", lambda *args: 1 / 0)
    done = wsolnb("plan", "-p", "lr=0.5")
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "nothing is missing")
    assert "    lr: 0.5" in done.output
    lacks = pipeline.preflight.Finding("01_data", "there is no x", "give another")
    monkeypatch.setattr(pipeline.preflight, "look", lambda *_: [lacks, lacks._replace(fatal=False, remedy="")])
    done = wsolnb("plan")
    assert done.exit_code == 1
    assert done.output.splitlines()[-3:] == [
        "missing: 01_data: there is no x", "    give another", "note: 01_data: there is no x",
    ]  # fmt: skip
    refused = wsolnb("reproduce")
    assert refused.exit_code == 2
    assert "nothing was started: 1 thing is missing" in refused.output
    assert not (repository.root / "outputs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "-p", "epoch=3"], "did you mean 'epochs'?"),
        (["reproduce", "--profile", "mino"], "did you mean 'mini'?"),
        (["parameters", "01_dat"], "did you mean '01_data'?"),
        (["metrics"], "holds no metrics"),
        (["refresh", "01_dat"], "did you mean '01_data'?"),
    ],
)
def test_errors_are_messages_with_a_remedy(repository, arguments, message):
    done = wsolnb(*arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Remedy: " in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(("complete", "interrupted", "code"), [(True, False, 0), (False, False, 1), (False, True, 130)])
def test_the_exit_code_tells_how_it_ended(repository, monkeypatch, complete, interrupted, code):
    calls = []

    def reproduce(*arguments):
        calls.append(arguments)
        return {"complete": complete, "interrupted": interrupted}

    monkeypatch.setattr(pipeline, "reproduce", reproduce)
    arguments = ["reproduce", "-p", "a=1", "-p", "b=2", "--only", "01_data", "--force", "--outputs", "x", "-j", "2"]
    arguments += ["--from", "02_metrics", "--stop-at-failure"]
    assert wsolnb(*arguments).exit_code == code
    assert calls == [("mini", ["a=1", "b=2"], ["01_data"], True, "x", 2, ["02_metrics"], False)]


def test_metrics_are_printed_again(repository):
    runs.start("01_data", {}).save_metrics({"table": [{"method": "cam"}]})
    assert wsolnb("metrics").output == "\n01_data\nmethod\n   cam\n"
