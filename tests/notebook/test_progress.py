import io
import sys

import pytest

from wsolnb.files import write_atomically
from wsolnb.notebook import progress

NAMES = ["01_data", "02_metrics", "03_cam"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    monkeypatch.setenv("COLUMNS", "200")
    return Clock


def display(expected, jobs=1, epochs="", estimate=None):
    return progress.Display(NAMES, jobs, lambda: epochs, expected, lambda: estimate or {})


def test_a_terminal_shows_what_runs_in_its_last_line(clock, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    shown = display({"01_data": 10, "02_metrics": 0, "03_cam": 100}, epochs="tscam has 3 epochs")
    shown.end("02_metrics", "up to date")
    shown.start("01_data")
    shown.cell("01_data", 3, 7)
    clock.now += 4
    shown.tick()
    lines = sys.stdout.getvalue().split("\r\x1b[K")
    assert lines[1] == "[2/3] 02_metrics  up to date\n"
    assert lines[-1] == "running 01_data cell 3/7 4.0 s; tscam has 3 epochs; 1 of 3 over; about 1.8 min left"
    clock.now += 16  # it took twice as long as the last time, and so will the other
    shown.end("01_data", "20.0 s")
    shown.start("03_cam")
    assert sys.stdout.getvalue().endswith("; 2 of 3 over; about 3.3 min left")
    monkeypatch.setenv("COLUMNS", "20")
    shown.tick()
    assert sys.stdout.getvalue().endswith("\r\x1b[Krunning 03_cam 0.0 ")
    shown.close()
    assert sys.stdout.getvalue().endswith("\r\x1b[K")


def test_a_log_has_whole_lines_and_says_from_time_to_time_what_runs(clock, capsys):
    asked = []
    shown = progress.Display(
        NAMES, 2, lambda: "", {"01_data": 10, "02_metrics": 0}, lambda: asked.append(1) or {"01_data": 7, "03_cam": 600}
    )
    shown.start("01_data")
    shown.cell("01_data", 1, 2)
    shown.tick()
    assert asked == [], "an estimate costs seconds, and nobody would see it"
    shown.end("02_metrics", "up to date")
    shown.start("03_cam")
    clock.now += 10
    shown.end("01_data", "10.0 s")
    clock.now += progress.EVERY + 1
    shown.tick()
    shown.tick()
    shown.close()
    told = capsys.readouterr().out
    assert told.splitlines() == [
        "[1/3] 01_data     started",
        "[2/3] 02_metrics  up to date",
        "[3/3] 03_cam      started",
        "[1/3] 01_data     10.0 s",
        "running 03_cam 5.2 min; 2 of 3 over; about 4.8 min left",
    ]
    assert asked == [1]
    assert "\r" not in told


def test_where_nothing_is_known_no_end_is_told(clock, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    shown = display({"01_data": 10})
    shown.start("01_data")
    shown.tick()
    assert sys.stdout.getvalue().endswith("0 of 3 over")


@pytest.mark.parametrize(
    ("seconds", "words"), [(99.94, "99.9 s"), (120, "2.0 min"), (5999, "100.0 min"), (9000, "2.5 h")]
)
def test_durations_in_words(seconds, words):
    assert progress.duration(seconds) == words


def test_epochs_are_those_of_trainings_that_go_on(tmp_path):
    head, row = "epoch,loss,seconds\n", "1,2,3\n"
    write_atomically(tmp_path / "checkpoints/cam-0-1a/history.csv", head + row)
    write_atomically(tmp_path / "checkpoints/left-2b/history.csv", head + row)
    epochs = progress.Epochs(tmp_path)
    assert epochs() == "", "these were trained before"
    write_atomically(tmp_path / "checkpoints/cam-0-1a/history.csv", head + 2 * row)
    write_atomically(tmp_path / "checkpoints/has-3c/history.csv", head + row)
    assert set(epochs().split(", ")) == {"cam-0 has 2 epochs", "has has 1 epoch"}
    write_atomically(tmp_path / "checkpoints/cam-0-1a/done.json", "{}")
    assert epochs() == "has has 1 epoch"
