import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import joblib
import psutil
import pytest

from wsolnb import workers
from wsolnb.errors import DataError, ParameterError, RunError

ROOT = Path(__file__).parents[1]


def square(folder, number):
    """The square of a number, left behind in a file; 13 is refused, 17 kills its process, 19 is no number."""
    if number == 13:
        raise DataError("thirteen", "leave it out")
    if number == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 19:
        number = "nineteen"
    result = number**2
    (Path(folder) / str(number)).write_text(str(os.getpid()))
    return result


def named(*numbers):
    return [(f"image {number}", number) for number in numbers]


def children():
    return {one.pid for one in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(one.cmdline())}


@pytest.mark.parametrize("several", [1, 2])
def test_results_come_in_order_and_leave_no_process(several, tmp_path):
    found = workers.results(partial(square, tmp_path), named(*range(12)), several)
    assert list(found) == [number**2 for number in range(12)]
    pids = {path.read_text() for path in tmp_path.iterdir()}
    assert (pids == {str(os.getpid())}) == (several == 1)
    assert len(pids) <= several
    assert not children()


def test_no_more_is_under_way_than_stated(tmp_path):
    taken = []

    def source():
        for number in range(40):
            taken.append(number)
            yield f"image {number}", number

    found = workers.results(partial(square, tmp_path), source(), 2)
    assert next(found) == 0
    assert len(taken) == 2 * workers.AHEAD
    found.close()  # left early
    assert not children()


@pytest.mark.parametrize("several", [1, 2])
def test_a_failure_names_the_image_and_keeps_what_is_done(several, tmp_path):
    with pytest.raises(DataError, match=r"image 13: thirteen\n  Remedy: leave it out"):
        list(workers.results(partial(square, tmp_path), named(1, 2, 13, 4, 5, 6, 7, 8, 9), several))
    assert {"1", "2"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "9").exists()
    assert not children()


def test_an_error_of_any_kind_names_the_image(tmp_path):
    with pytest.raises(RunError, match="image 19: TypeError: unsupported operand"):
        list(workers.results(partial(square, tmp_path), named(1, 19, 3)))


def test_a_killed_worker_is_told(tmp_path):
    with pytest.raises(RunError, match=r"killed by SIGKILL; it worked on one of .*image 17(.|\n)*fewer workers"):
        list(workers.results(partial(square, tmp_path), named(1, 2, 3, 17), 2))
    assert not children()


def test_what_cannot_be_sent_is_told():
    with pytest.raises(RunError, match=r"cannot be sent to worker processes(.|\n)*workers=1"):
        list(workers.results(lambda number: number, named(1, 2), 2))


def test_workers_end_with_the_process_that_started_them(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from functools import partial
from test_workers import wait_long
from wsolnb import workers
list(workers.results(partial(wait_long, {str(tmp_path)!r}), [(str(n), n) for n in range(4)], 2))
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    try:
        own = until(lambda: [int(path.name) for path in tmp_path.iterdir()], 2)
        started = [psutil.Process(pid) for pid in own]
        everything = psutil.Process(parent.pid).children(recursive=True)
    finally:
        parent.kill()
        parent.wait()
    assert len(started) == 2
    _, alive = psutil.wait_procs(everything, timeout=20)
    assert not alive


def wait_long(folder, _):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(120)


def until(found, count, seconds=60):
    deadline = time.monotonic() + seconds
    while len(found()) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    return found()


def test_the_number_of_workers(monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [workers.count(asked) for asked in (0, 1, 3, 20)] == [8, 1, 3, 20]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # this process's share of the cores
    assert [workers.count(asked) for asked in (0, 3)] == [2, 3]
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert workers.count(0) == 8
    with pytest.raises(ParameterError, match="-1 workers"):
        workers.count(-1)
