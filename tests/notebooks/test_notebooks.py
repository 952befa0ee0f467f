"""Every numbered notebook is run with its defaults: its outputs equal the stored, its numbers the recorded ones."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import inprocess
import nbformat
import pytest
import reference
from sample import Repository

from wsolnb.notebook import pipeline

ROOT = Path(__file__).parents[2]


STEPS = {step.notebook: step for step in pipeline.plan("mini")}
SMALL = (
    "03_cam_and_tscam", "04_pretraining", "06_pretraining_appendix", "11_scm_training", "12_scm_results", "00_overview",
    "23_lpcam_segmentation", "31_locloc_generator", "32_locloc_classifier", "33_locloc_results",
)  # fmt: skip
"""`make test` runs them in small, `make test-full` as they are. No other notebook needs one of them."""


def by_depth(steps):
    """Return the length of the chain of needs that each notebook stands at the end of, in the order of the tests.

    Two workers that run neighbours of one chain wait for each other. So notebooks of one length follow each other, at
    first those that another one of `make test` goes on from.
    """
    depth, needed = {}, {need for step in steps if step.notebook not in SMALL for need in step.needs}
    for step in steps:
        depth[step.notebook] = 1 + max((depth[need] for need in step.needs), default=0)
    return dict(sorted(depth.items(), key=lambda item: (item[1], item[0] not in needed)))


DEPTH = by_depth(STEPS.values())
NOTEBOOKS = [ROOT / "notebooks" / f"{name}.ipynb" for name in DEPTH]


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


def each(deep: bool):
    """Parametrise by the notebooks whose needs have needs themselves, or by the others."""
    paths = [path for path in NOTEBOOKS if (DEPTH[path.stem] > 2) == deep]
    marks = [pytest.mark.long if path.stem in SMALL else () for path in paths]
    return pytest.mark.parametrize(
        "path", [pytest.param(path, marks=mark, id=path.stem) for path, mark in zip(paths, marks, strict=True)]
    )


def check_notebook(path: Path, request: pytest.FixtureRequest, shared: Path) -> None:
    """Assert that a notebook gives its stored outputs, and the recorded numbers."""
    outcome = "failed"
    try:
        calls = (getattr(item, "callspec", None) for item in request.session.items)
        paths = [call.params["path"] for call in calls if call and "path" in call.params]
        await_needs(path.stem, {other.stem for other in paths if other.parent == path.parent}, shared)
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
@each(deep=False)
def test_a_notebook_gives_its_stored_outputs_and_the_recorded_numbers(path, request, shared):
    check_notebook(path, request, shared)


@pytest.mark.slow
def test_the_long_notebooks_give_the_recorded_tables_in_small(tmp_path, monkeypatch):
    # One run of all, as most of them go on from the same notebooks, and in this process, which spares each of them the
    # start and the imports of a kernel.
    monkeypatch.setenv("WSOLNB_ROOT", str(ROOT))
    monkeypatch.setattr(pipeline._Workers, "execute", inprocess.execute)
    summary = pipeline.reproduce("smoke", only=SMALL, outputs=tmp_path)
    assert summary["complete"], [step for step in summary["steps"] if step["status"] != "done"]
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


# They stand behind other tests. A worker takes a test before the one it runs has ended: one of these in the queue
# behind the long run above would keep the worker idle that waits for it.
@pytest.mark.slow
@each(deep=True)
def test_a_notebook_at_the_end_of_a_chain_gives_its_stored_outputs_and_the_recorded_numbers(path, request, shared):
    check_notebook(path, request, shared)
