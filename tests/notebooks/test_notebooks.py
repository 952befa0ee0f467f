"""Every numbered notebook is run with its defaults: its outputs equal the stored, its numbers the recorded ones."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import reference
from sample import Repository

from wsolnb.notebook import pipeline

ROOT = Path(__file__).parents[2]


def by_depth(steps):
    """Return the notebooks in the order of their needs, those far from each other's side by side: two workers that run
    neighbours of one chain would wait for each other's training."""
    depth = {}
    for step in steps:
        depth[step.notebook] = 1 + max((depth[need] for need in step.needs), default=0)
    return [ROOT / "notebooks" / f"{name}.ipynb" for name in sorted(depth, key=depth.get)]


STEPS = {step.notebook: step for step in pipeline.plan("mini")}
NOTEBOOKS = by_depth(STEPS.values())
SMALL = (
    "03_cam_and_tscam", "04_pretraining", "06_pretraining_appendix", "11_scm_training", "12_scm_results", "00_overview",
    "23_lpcam_segmentation", "31_locloc_generator", "32_locloc_classifier", "33_locloc_results",
)  # fmt: skip
"""`make test` runs them in small, `make test-full` as they are. No other notebook needs one of them."""


def nbval(*paths: Path, root: Path) -> subprocess.CompletedProcess:
    """Run nbval in a process of its own, so that its options and its kernel are not those of this test run."""
    sanitize = Path(__file__).with_name("sanitize.cfg")
    options = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with", sanitize, "--nbval-cell-timeout", "7200"]
    command = [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", "--color=no", *paths]
    environment = {**os.environ, "WSOLNB_ROOT": str(root)}
    if "PYTEST_XDIST_WORKER" in os.environ:
        environment["OMP_NUM_THREADS"] = "1"  # the other core belongs to the other worker
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture
def shared(tmp_path_factory) -> Path:
    """A folder that all workers of this test run see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def await_needs(name: str, selected: set[str], shared: Path) -> None:
    """Wait until what a notebook goes on from has been run: by the test of another worker, or else by the command.

    The notebooks are handed out in the order of their needs, so a need has always been started before.
    """
    for need in STEPS[name].needs:
        if need not in selected:
            command = [str(Path(sys.executable).with_name("wsolnb")), "reproduce", "--only", need]
            subprocess.run(command, cwd=ROOT, env={**os.environ, "WSOLNB_ROOT": str(ROOT)}, check=True)
            continue
        until = time.monotonic() + 7200
        while not (shared / need).exists():
            assert time.monotonic() < until, f"{need} has not ended in two hours"
            time.sleep(1)
        assert (shared / need).read_text() == "passed", f"{name} goes on from {need}, whose test failed"


def marked(path: Path):
    return pytest.param(path, marks=pytest.mark.long if path.stem in SMALL else (), id=path.stem)


@pytest.mark.slow
@pytest.mark.parametrize("path", [marked(path) for path in NOTEBOOKS])
def test_a_notebook_gives_its_stored_outputs_and_the_recorded_numbers(path, request, shared):
    outcome = "failed"
    try:
        calls = (getattr(item, "callspec", None) for item in request.session.items)
        await_needs(path.stem, {call.params["path"].stem for call in calls if call and "path" in call.params}, shared)
        done = nbval(path, root=ROOT)
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-80:])
        assert done.returncode == 0, f"{tail}\nIf the new outputs are right: wsolnb refresh {path.stem}"
        # One test, so that the comparison comes after the run also where workers share the tests out.
        if path.stem in reference.ROOM:
            reference.compare(path.stem)
        outcome = "passed"
    finally:
        (shared / path.stem).write_text(outcome)


@pytest.mark.slow
def test_the_long_notebooks_give_the_recorded_tables_in_small(tmp_path):
    # One run of all: most of them go on from the same notebooks. It stands behind the tests above, which wait for each
    # other: one of them in the queue behind this one would keep the other worker idle.
    command = [str(Path(sys.executable).with_name("wsolnb")), "reproduce", "--profile", "smoke"]
    command += ["--outputs", str(tmp_path)]
    environment = {**os.environ, "WSOLNB_ROOT": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += [word for name in SMALL for word in ("--only", name)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, "\n".join((done.stdout + done.stderr).splitlines()[-60:])
    summary = json.loads((tmp_path / "smoke" / "summary.json").read_text())
    assert set(SMALL) <= {step["notebook"] for step in summary["steps"] if step["status"] == "done"}
    for name in set(SMALL) & set(reference.ROOM):
        reference.compare_small(name, tmp_path / "smoke")


def test_every_notebook_is_a_step_of_the_default_run_and_every_table_is_recorded():
    assert {path.stem for path in NOTEBOOKS} == {path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    steps = {path.stem for path in NOTEBOOKS}
    assert {path.stem for path in reference.REFERENCE.glob("*.csv") if path.stem in steps} == set(reference.ROOM)


@pytest.mark.slow
def test_nbval_takes_what_may_differ_and_finds_what_may_not(tmp_path, monkeypatch):
    monkeypatch.setenv("WSOLNB_ROOT", str(tmp_path))
    cells = [
        "import time, os, sys\nfrom tqdm import tqdm",
        'folder = run.cached("model", lambda folder: None); folder',
        'print(f"{time.perf_counter():.3f} s, {time.time():.0f} images/s, {object()}, {run.started}")',
        'for i in tqdm(range(3), file=sys.stdout, desc=f"{os.getpid()}"): pass',
        "epochs",
    ]
    repository = Repository(tmp_path)
    good = repository.notebook("01_data", *cells)
    pipeline.refresh(good)  # builds the checkpoint, which nbval then reuses
    stored = nbformat.read(good, as_version=4)
    assert stored.cells[-1].outputs[0].data["text/plain"] == "2"
    stored.cells[-1].outputs[0].data["text/plain"] = "3"
    bad = repository.write("02_metrics", stored.cells)
    bad.write_text(bad.read_text().replace("01_data", "02_metrics"))

    done = nbval(good, bad, root=tmp_path)
    assert done.returncode == 1
    assert "1 failed, 13 passed" in done.stdout, done.stdout
    assert re.search(r"FAILED .*02_metrics.ipynb::Cell 6|Cell 6: Cell outputs differ", done.stdout), done.stdout
