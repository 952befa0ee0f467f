"""What `wsolnb reproduce` tells while notebooks run: a live last line on a terminal, whole lines in a log."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from wsolnb import keys

EVERY = 300.0
"""Seconds between the lines of a log that say what runs."""


def say(text: str, end: str = "\n") -> None:
    """Print; where nobody reads any more, as after the end of the terminal, the run still ends in order."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def duration(seconds: float) -> str:
    """Return a duration in words: `83.7 s`, `2.1 min`, `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Display:
    """Tells of each step when it starts and when it is over, and what runs: the cell, epochs of a training, the end.

    On a terminal the last line shows what runs. In a log a line says it every `EVERY` seconds. Any thread may call.
    """

    def __init__(
        self,
        names: Sequence[str],
        jobs: int,
        epochs: Callable[[], str],
        expected: Mapping[str, float],
        estimate: Callable[[], Mapping[str, float]],
    ):
        """names: of all steps, in their order. jobs: at once. epochs: says in words how far trainings are.

        expected: seconds of the steps of which something is known. estimate: returns those of all steps. It may take
        seconds, and is called only where its answer will be shown.
        """
        self._heads = {name: f"[{number}/{len(names)}] {name}" for number, name in enumerate(names, 1)}
        self._width = max(map(len, self._heads.values()), default=0)
        self._jobs, self._epochs = jobs, epochs
        self._live = sys.stdout.isatty()
        self._lock = threading.RLock()
        self._running: dict[str, float] = {}
        self._cells: dict[str, str] = {}
        self._open = set(names)
        self._took: dict[str, float] = {}
        self._told = time.monotonic()
        self._expected, self._estimate = dict(expected), estimate

    def start(self, name: str) -> None:
        """Tell that a notebook is executed from now on."""
        with self._lock:
            self._running[name] = time.monotonic()
            if not self._live:
                say(f"{self._head(name)}started")
            self._draw()

    def cell(self, name: str, number: int, count: int) -> None:
        """Tell which cell of a notebook runs."""
        with self._lock:
            self._cells[name] = f"cell {number}/{count}"
            self._draw()

    def end(self, name: str, text: str) -> None:
        """Tell how a step has ended, whether it ran or not."""
        with self._lock:
            self._open.discard(name)
            if (started := self._running.pop(name, None)) is not None:
                self._took[name] = time.monotonic() - started
            self.say(f"{self._head(name)}{text}")

    def say(self, text: str) -> None:
        """Print a text above the line that shows what runs."""
        with self._lock:
            say(f"\r\x1b[K{text}" if self._live else text)
            self._draw()

    def tick(self) -> None:
        """Draw what runs again, or write a line of the log if it is time for one; called every second or so."""
        due = self._live or time.monotonic() - self._told > EVERY
        if due and self._running and not self._expected.keys() >= self._open:
            self._expected = {**self._estimate(), **self._expected}
        with self._lock:
            if self._live:
                self._draw()
            elif self._running and due:
                self._told = time.monotonic()
                say(self._line())

    def close(self) -> None:
        """Take the line away that shows what runs."""
        with self._lock:
            if self._live:
                say("\r\x1b[K", end="")
            self._running.clear()

    def _head(self, name: str) -> str:
        return f"{self._heads[name]:<{self._width}}  "

    def _draw(self) -> None:
        if self._live and self._running:
            say(f"\r\x1b[K{self._line()[: shutil.get_terminal_size().columns - 1]}", end="")

    def _line(self) -> str:
        clock = time.monotonic()
        parts = ((name, self._cells.get(name), duration(clock - began)) for name, began in self._running.items())
        runs = (" ".join(filter(None, part)) for part in parts)
        over = f"{len(self._heads) - len(self._open)} of {len(self._heads)} over"
        return "; ".join(filter(None, [f"running {', '.join(runs)}", self._epochs(), over, self._left(clock)]))

    def _left(self, clock: float) -> str:
        """Return the estimated time to the end in words; empty where nothing is known of a step that is to run."""
        if not self._expected.keys() >= self._open:
            return ""
        # What has run by now says how fast this machine is.
        known = [name for name in self._took if self._expected.get(name)]
        pace = sum(self._took[n] for n in known) / sum(self._expected[n] for n in known) if known else 1.0
        passed = {name: clock - began for name, began in self._running.items()}
        left = [max(0.0, pace * self._expected[name] - passed.get(name, 0.0)) for name in self._open]
        return f"about {duration(max([*left, sum(left) / self._jobs]))} left" if left else ""


class Epochs:
    """How far the trainings of a run folder are: each writes a row of its `history.csv` after every epoch."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._before = self._found()

    def _found(self) -> dict[Path, tuple[int, int]]:
        found = {}
        for path in self._folder.glob("checkpoints/*/history.csv"):
            try:
                if not (path.parent / keys.RECORD).exists():
                    found[path] = (path.stat().st_mtime_ns, path.stat().st_size)
            except OSError:
                continue  # it was moved or removed meanwhile
        return found

    def __call__(self) -> str:
        """Return, for the trainings that went on since this object was made, their names and epochs."""
        told = []
        for path, state in self._found().items():
            if self._before.get(path) != state:
                try:
                    rows = len(path.read_text("utf-8", "replace").splitlines()) - 1
                except OSError:
                    continue
                told.append(f"{path.parent.name.rpartition('-')[0]} has {rows} epoch{'s' * (rows != 1)}")
        return ", ".join(told)
