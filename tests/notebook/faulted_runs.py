"""Inject every fault of a run at random moments into a tiny pipeline, and see whether the same command goes on.

    python tests/notebook/faulted_runs.py 10             # 10 tries of each fault
    python tests/notebook/faulted_runs.py 10 kernel twice

Two notebooks: the first one is done, the second one trains (20 epochs of a hash, kept after each, no PyTorch) when the
fault comes. Prints a line for each fault: tries, in how many the message was right; in how many nothing was lost (the
first notebook did not run again, and no more than the epoch under way was trained again); in how many the same command
went on to the result of the run that nobody disturbed. A fault that came after the end is tried again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

sys.path.append(str(Path(__file__).parents[1] / "notebooks"))
from sample import Repository

EPOCHS = 20
TRAIN = f"""
def train(folder):
    state = folder / "state.txt"
    numbers = state.read_text().split() if state.exists() else ["1"]
    while len(numbers) <= {EPOCHS}:
        time.sleep(0.05)
        numbers.append(str(int(numbers[-1]) * 7919 % 1000003))
        with open(run.folder / "log", "a") as log:
            log.write(f"{{len(numbers)}}\\n")
        files.write_atomically(state, " ".join(numbers))
"""
HOOK = "assert not (run.folder / 'broken-{}').exists(), 'on purpose'"


class World:
    """A repository with two notebooks, of which the first one is done."""

    def __init__(self, root: Path, outputs: str = "outputs"):
        self.root, self.outputs = root, outputs

    @property
    def folder(self) -> Path:
        return self.root / self.outputs / "mini"

    def start(self, *arguments: str, before: str = "", through: Sequence[str] = (), **options) -> subprocess.Popen:
        """Start `wsolnb reproduce`, as a shell that listens to signals would.

        before: code that is run first. through: a command that starts it.
        """
        code = f"import sys\n{before}\nsys.argv[0] = 'wsolnb'\nfrom wsolnb.notebook.cli import app\napp()"
        command = [*through, sys.executable, "-c", code, "reproduce", "--outputs", self.outputs, *arguments]
        environment = {**os.environ, "WSOLNB_ROOT": str(self.root), **options.pop("env", {})}
        return subprocess.Popen(
            command, cwd=self.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
        )  # fmt: skip

    def run(self, *arguments: str, **options) -> tuple[int, str]:
        process = self.start(*arguments, **options)
        told, _ = process.communicate(timeout=1200)
        return process.returncode, told

    def result(self) -> list:
        """Return the tables of the metrics, and the trained numbers."""
        tables = [json.loads(path.read_text())["table"] for path in sorted(self.folder.glob("metrics/*.json"))]
        return [*tables, *(path.read_text() for path in sorted(self.folder.glob("checkpoints/*/state.txt")))]

    def epochs(self) -> int:
        return len((self.folder / "log").read_text().split()) if (self.folder / "log").exists() else 0


def build(root: Path) -> World:
    """Write the notebooks, and run the first one."""
    repository, world = Repository(root), World(root)
    repository.notebook("01_data", 'run.save_metrics({"table": [{"images": 7}]})')
    save = 'run.save_metrics({"table": [{"last": int((place / "state.txt").read_text().split()[-1])}]})'
    cells = ["import time\nfrom wsolnb import files", HOOK.format(0), TRAIN, 'place = run.cached("net", train)']
    repository.notebook("02_train", *cells, HOOK.format(1), 'run.used("01_data")', save)
    repository.pipeline({"notebook": "01_data"}, {"notebook": "02_train", "needs": ["01_data"]})
    code, told = world.run("--only", "01_data")
    assert code == 0, told
    return world


class Missed(Exception):
    """The fault came too late."""


class Faults:
    """Each method injects a fault into a world, at a moment of `draw`, and returns whether the message is right.

    seconds: what a run of the second notebook takes.
    """

    def __init__(self, draw: random.Random, seconds: float):
        self.draw, self.seconds = draw, seconds

    def _wait(self, process: subprocess.Popen) -> None:
        try:
            process.wait(self.draw.uniform(0, self.seconds))
        except subprocess.TimeoutExpired:
            return
        raise Missed

    def _child(self, world: World, word: str) -> bool:
        """Kill the kernel or the worker at a random moment of the run."""
        process = world.start()
        while process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                try:
                    if any(word in part for part in child.cmdline()):
                        time.sleep(self.draw.uniform(0, self.seconds / 2))
                        child.kill()
                        told, _ = process.communicate(timeout=600)
                        if process.returncode == 0:
                            raise Missed
                        self.told = told
                        return process.returncode == 1
                except psutil.Error:
                    pass
            time.sleep(0.05)
        raise Missed

    def kernel(self, world: World) -> bool:
        """The kernel is killed."""
        named = self._child(world, "ipykernel_launcher")
        return named and "02_train, cell " in self.told and "Failed: 02_train" in self.told

    def worker(self, world: World) -> bool:
        """The process that runs the notebook is killed."""
        return self._child(world, "pipeline._work()") and "its process ended with -9" in self.told

    def command(self, world: World) -> bool:
        """The command is killed: it can say nothing, and nothing of it is left."""
        process = world.start(env={"TEST_MARK": world.root.name})
        self._wait(process)
        process.kill()
        process.communicate()
        deadline = time.monotonic() + 60
        while left := _of_run(world.root.name):
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        return not left

    def once(self, world: World) -> bool:
        """Ctrl-C."""
        process = world.start()
        self._wait(process)
        process.send_signal(signal.SIGINT)
        return self._interrupted(process)

    def twice(self, world: World) -> bool:
        """Ctrl-C, and again."""
        process = world.start()
        self._wait(process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.6)
        process.send_signal(signal.SIGINT)
        return self._interrupted(process)

    def _interrupted(self, process: subprocess.Popen) -> bool:
        self.told, _ = process.communicate(timeout=600)
        if process.returncode == 0 or re.search(r"(?m)^1 up to date, 1 done\.$", self.told):
            raise Missed
        early = not self.told and process.returncode == -signal.SIGINT  # Python itself was not ready
        said = re.search(r"(?m)^(Interrupted|Stopped at once)", self.told) and "Traceback" not in self.told
        return early or (bool(said) and process.returncode == 130)

    def raises(self, world: World) -> bool:
        """A cell raises."""
        flag = world.folder / f"broken-{self.draw.randrange(2)}"
        flag.touch()
        code, self.told = world.run()
        flag.unlink()
        line = "`" + HOOK.format(flag.name[-1]) + "`: AssertionError: on purpose"
        return code == 1 and line in self.told and str(world.folder / "notebooks/02_train.ipynb") in self.told

    def two(self, world: World) -> bool:
        """A second command in the same folder."""
        first = world.start()
        self._wait(first)
        second = world.start()
        outputs = [process.communicate(timeout=1200)[0] for process in (first, second)]
        self.told = "\n".join(outputs)
        if first.returncode or second.returncode:
            return False
        if "02_train  up to date" in outputs[0]:  # the second one was faster to the lock
            outputs, first = outputs[::-1], second
        waited = f"waiting for process {first.pid}, which is running in" in outputs[1]
        if not waited and "up to date" in outputs[1] and "waiting" not in outputs[1]:
            raise Missed
        return waited and "02_train  up to date" in outputs[1]

    def lock(self, world: World) -> bool:
        """The lock of a dead process, whose number now is that of another."""
        (world.folder / ".lock").write_text(f"{self.draw.choice([os.getpid(), 1, 4194303])}\nsome token\n")
        code, self.told = world.run()
        return code == 0 and "waiting" not in self.told

    def moved(self, world: World) -> bool:
        """The command is killed, and the run folder moved."""
        self.command(world)
        shutil.move(world.root / "outputs", world.root / "elsewhere")
        world.outputs = "elsewhere"
        return True

    def readonly(self, world: World) -> bool:
        """The run folder cannot be written."""
        # Root may write wherever it likes, unless it gives that up.
        humble = ["setpriv", "--bounding-set=-dac_override"] if os.getuid() == 0 else []
        for path in (place := self.draw.choice([world.folder, world.folder / "metrics"])), place.parent:
            path.chmod(0o555)
        code, self.told = world.run(through=humble)
        for path in (place, place.parent):
            path.chmod(0o755)
        return code == 2 and "cannot be" in self.told and "--outputs" in self.told and "02_train" not in self.told

    def clock(self, world: World) -> bool:
        """The clock jumps years back or forth, and so do the times of files."""
        years = self.draw.uniform(-10, 10) * 3e7
        shift = "import datetime, time; real = time.time; started = real()\n"
        shift += f"time.time = lambda: real() + {years} * (real() > started + {self.draw.uniform(0, self.seconds)})\n"
        shift += "time.time_ns = lambda: int(1e9 * time.time())\nfrom wsolnb.notebook import runs\n"
        shift += "runs.now = lambda: datetime.datetime.fromtimestamp(time.time(), datetime.UTC).isoformat()\n"
        for path in world.folder.rglob("*"):
            os.utime(path, (real := time.time() + years, real))
        code, self.told = world.run(before=shift)
        return code == 0 and "again" not in self.told

    def damaged(self, world: World) -> bool:
        """A file of the finished run is damaged: its metrics, its record, or the executed notebook."""
        assert world.run()[0] == 0
        names = ["metrics/02_train.json", "notebooks/02_train.json", "notebooks/02_train.ipynb"]
        path = world.folder / self.draw.choice(names)
        content = bytearray(path.read_bytes())
        where = self.draw.randrange(len(content))
        if self.draw.random() < 0.5:
            content = content[:where]
        else:
            content[where] ^= 1 << self.draw.randrange(8)
        path.write_bytes(content)
        code, self.told = world.run()
        return code == 0 and ("; again: " in self.told or path.name == "02_train.json")

    def older(self, world: World) -> bool:
        """The record of the finished run is of another version, with other fields."""
        assert world.run()[0] == 0
        path = world.folder / "notebooks/02_train.json"
        record = json.loads(path.read_text())
        place = self.draw.choice([record, record["key"]])
        name = self.draw.choice([name for name in place if name != "run"])
        place[self.draw.choice(["renamed", name])] = place.pop(name) if self.draw.random() < 0.5 else None
        path.write_text(json.dumps(record))
        code, self.told = world.run()
        return code == 0


def _of_run(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


NAMES = [name for name, one in vars(Faults).items() if not name.startswith("_") and callable(one)]


def attempt(name: str, template: World, faults: Faults, expected: list, root: Path) -> tuple[bool, bool, bool]:
    """Inject a fault into a copy of a world; returns whether the message is right, nothing is lost, it goes on."""
    shutil.copytree(template.root, root)
    world = World(root)
    faults.told = ""
    right = getattr(faults, name)(world)
    trained = world.epochs()
    code, told = world.run()
    kept = bool(re.search(r"(?m)^\[1/2\] 01_data +up to date", told)) and world.epochs() <= EPOCHS + 1
    kept = kept and world.epochs() - trained <= EPOCHS
    on = code == 0 and world.result() == expected
    if not (right and kept and on):
        print(f"--- {name}: {right, kept, on}\n{faults.told}\n--- and then\n{told}", file=sys.stderr, flush=True)
    return right, kept, on


def main(tries: int, names: list[str]) -> None:
    draw = random.Random(0)
    place = Path(tempfile.mkdtemp())
    template = build(place / "template")
    shutil.copytree(template.root, place / "whole")
    started = time.perf_counter()
    whole = World(place / "whole")
    assert whole.run()[0] == 0
    faults = Faults(draw, time.perf_counter() - started)
    found = {name: [] for name in names or NAMES}
    late = Counter()
    with contextlib.suppress(KeyboardInterrupt):  # the table then shows what was tried so far
        for number in range(tries):
            for name, outcomes in found.items():
                while len(outcomes) == number and late[name] < 3 * tries:
                    root = place / f"{name}-{number}-{late[name]}"
                    try:
                        outcomes.append(attempt(name, template, faults, whole.result(), root))
                    except Missed:
                        late[name] += 1
                    shutil.rmtree(root)
    print(f"{'fault':<10}{'tries':>6}{'message':>9}{'kept':>6}{'goes on':>9}{'too late':>10}")
    for name, outcomes in found.items():
        right, kept, on = (sum(one[index] for one in outcomes) for index in range(3))
        print(f"{name:<10}{len(outcomes):>6}{right:>9}{kept:>6}{on:>9}{late[name]:>10}", flush=True)
    shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
