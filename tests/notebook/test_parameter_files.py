"""What stands above and behind the values of the profiles for real data: how they are run, where values are from."""

import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
import typer

from wsolnb.notebook import costs, pipeline
from wsolnb.notebook.cli import app

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "outputs/reference"
PROFILES = ("cub", "cub_conformer", "ilsvrc", "voc", "coco", "voc_swin", "coco_swin", "tiny", "pets")
FILES = sorted(path for profile in PROFILES for path in (ROOT / "params" / profile).glob("*.yaml"))
SOURCES = ("paper", "supplement", "released code", "recalled", "ours", "the data set")
PAPERS = pd.read_csv(REFERENCE / "papers.csv")


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.setenv("WSOLNB_ROOT", str(ROOT))


def header(path):
    """The fields of a file's first comments, by name."""
    lines = path.read_text("utf-8").splitlines()
    first = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return dict(line.removeprefix("# ").split(": ", 1) for line in lines[1:first] if ": " in line)


def numbers(text):
    return [float(number) for number in re.findall(r"\d\.\d+", text)]


def test_there_are_files():
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_file_says_how_it_is_run_what_it_takes_and_what_to_expect(path):
    said = header(path)
    assert said.keys() >= {"command", "runtime", "memory", "expected"}
    assert re.match(r"estimated [\d.]+ (h|min) of (an A100|one core with bfloat16)", said["runtime"])
    assert re.match(r"estimated [\d.]+ GB of the (GPU|process), [\d.]+ GB of disk", said["memory"])
    first, command, *arguments = shlex.split(said["command"])
    assert (first, command) == ("wsolnb", "reproduce")
    # `plan` takes what `reproduce` takes here, and starts nothing.
    parsed = typer.main.get_command(app).commands["plan"].make_context("plan", arguments).params
    steps = pipeline.plan(parsed["profile"], only=parsed["only"] or ())
    assert parsed["profile"] == path.parent.name
    assert path.stem == "pipeline" or steps[-1].notebook == path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_expected_score_is_a_recorded_one(path):
    said = header(path)["expected"]
    paper, here = said, ""
    if "ours" in said:
        paper, here = said.split("ours", 1)
    names = [name for name in ("SCM", "LPCAM", "LocLoc") if name in paper]
    known = PAPERS[PAPERS.paper.isin(names)].value.tolist()
    assert set(numbers(paper)) <= set(known)
    if found := numbers(here):
        table, where = re.search(r"\((\w+\.csv), (?:study )?(\w+)\)", here).groups()
        rows = pd.read_csv(REFERENCE / table)
        rows = rows[(rows == where).any(axis=1)]
        by = [name for name in ("backbone", "method", "epoch", "map", "hyper") if name in rows]
        means = rows.groupby(by, dropna=False).mean(numeric_only=True).round(3)
        assert all((means == number).any(axis=None) for number in found), found
    assert numbers(said) or re.search("no score|not recorded|prints no score", said)


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem != "pipeline"], ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_each_value_says_where_it_is_from(path):
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    comments = [line.partition("  # ")[2] for line in lines]
    assert [line for line, comment in zip(lines, comments, strict=True) if not comment.startswith(SOURCES)] == []


@pytest.mark.parametrize("profile", ["cub", "voc_swin"])
def test_runtime_and_memory_are_those_of_plan(profile):
    found = costs.estimate(pipeline.resolved(pipeline.plan(profile)), costs.DEVICES["a100"])
    for cost in found:
        path = ROOT / f"params/{profile}/{cost.notebook}.yaml"
        if path.is_file():
            said = header(path)
            number, unit = re.match(r"estimated ([\d.]+) (h|min)", said["runtime"]).groups()
            assert float(number) / (60 if unit == "min" else 1) == pytest.approx(cost.hours, rel=0.2, abs=0.01)
            memory, disk = re.match(r"estimated ([\d.]+) GB of the GPU, ([\d.]+) GB", said["memory"]).groups()
            assert (float(memory), float(disk)) == pytest.approx((cost.memory, cost.disk), rel=0.1, abs=0.05)


def test_what_a_notebook_goes_on_from_is_a_need_of_its_step():
    """Else `reproduce --jobs` could start it too early, and `--from` would leave it out."""
    used = {}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        used[path.stem] = set(re.findall(r"\.used\(\s*\"([^\"]+)\"", code))
    shown = used.pop("00_overview")  # the methods of the profile
    assert shown >= {"11_scm_training", "21_lpcam_prototypes", "31_locloc_generator"}
    assert used["33_locloc_results"] >= {"31_locloc_generator", "32_locloc_classifier"}
    for file in (ROOT / "params").glob("*/pipeline.yaml"):
        needs: dict[str, set[str]] = {}
        for step in pipeline.plan(file.parent.name):
            needs[step.notebook] = set(step.needs).union(*(needs[need] for need in step.needs))
            assert used.get(step.notebook, set()) <= needs[step.notebook], f"{file}: {step.notebook}"
        if "00_overview" in needs:
            assert shown & needs.keys() <= needs["00_overview"], file
