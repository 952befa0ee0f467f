"""Break the storage below short trainings and cached runs, at random moments and places, and start them again.

    python tests/train/faulted_storage.py 10             # only some: ... 10 "masks and maps" "training, disk full"

Prints a table: the fault; how often it was tried; how often it gave a clear message (an error of this package, or the
line that says what is made again, with the file's name); how often nothing was lost (what was whole before is as it
was, and no temporary file is left); and how often the same call, once the fault was gone, gave the bytes of the result
that nobody disturbed. A fault that hits nothing (the result was complete before) is drawn again.
"""

import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1]))
from disks import full_disk
from test_loop import Batches, Small, config

from wsolnb import files
from wsolnb.data import aviary, rendered
from wsolnb.data.store import ClassMaps, Store
from wsolnb.errors import WsolnbError
from wsolnb.methods.features import FeatureSource, ImageFeatures, write_dump
from wsolnb.notebook import runs
from wsolnb.train import loop

BIRDS = aviary.AviaryConfig(classes=2, size=32, train=8, val=2, test=2)
IDS = tuple(f"birds/{number}" for number in range(12))


def accuracy(model: Small) -> dict[str, float]:
    batches = Batches()
    return {"top1": float((model(batches.images).logits.argmax(1) == batches.labels).float().mean())}


def train(folder: Path) -> None:
    """Train for two epochs of twelve steps, with the state kept at every step."""
    loop.SAVE_EVERY, loop.LOOK = 0.0, 1
    loop.set_seed(0)
    loop.train(Small(), Batches(), config(epochs=2), folder, accuracy, progress=False)


class Source(FeatureSource):
    """Features that a network could have computed."""

    weight, class_names, image_ids, labels = torch.ones(2, 3), ("a", "b"), IDS, ((0,),) * len(IDS)

    def images(self, *_arguments):
        for number, image_id in enumerate(IDS):
            values = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(number))
            yield ImageFeatures(image_id, (0,), (80, 80), [values])


def masks(folder: Path) -> None:
    """Write masks and maps, and go on from those that are whole."""
    store, rng = Store(folder), np.random.default_rng(0)
    drawn = rng.random((len(IDS), 60, 60))
    for index in store.to_do(IDS):
        store.write_mask(IDS[index], drawn[index] > 0.5, outcome="drawn")
    for index in store.to_do(IDS, "maps"):
        store.write_maps(ClassMaps(IDS[index], (1,), drawn[index : index + 1]))


def figure(run: runs.Run) -> None:
    import matplotlib.pyplot as plt

    drawn = plt.figure(figsize=(2, 2))
    drawn.text(0.1, 0.5, "figure")
    run.save_figure(drawn, "f")
    plt.close(drawn)


def cached(work: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return the work as a cached result of a run folder."""

    def in_a_run(folder: Path) -> None:
        runs.start("faulted", {"seed": 0}, folder).cached("work", work)

    return in_a_run


def results(folder: Path) -> None:
    run = runs.start("faulted", {"seed": 0}, folder)
    rows = run.cached_rows("rows", lambda: [{"image": name, "value": index / 7} for index, name in enumerate(IDS * 20)])
    run.save_metrics({"table": rows})
    figure(run)


WORK: dict[str, Callable[[Path], None]] = {
    "training": train,
    "cached training": cached(train),
    "masks and maps": cached(masks),
    "feature dump": cached(lambda folder: write_dump(Source(), folder) and None),
    "rendered images": lambda folder: aviary.ensure(BIRDS, folder, workers=1) and None,
    "rows, metrics, figure": results,
}

CHANGING = ("seconds", "started", "finished", "done.json", ".lock", ".filler", "metrics")


def result(folder: Path) -> dict[str, bytes]:
    """Return the files of a result, without seconds and dates."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    found = {name: content for name, content in found.items() if not any(word in name for word in CHANGING)}
    for name in found:
        if name.endswith("history.csv"):
            found[name] = loop.history((folder / name).parent).drop(columns="seconds").to_csv().encode()
    return found


def attempt(work: Callable[[Path], None], folder: Path) -> str:
    """Do it; returns what it said, the error included; `raw` before an error that is none of the package's."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            work(folder)
        except WsolnbError as error:
            print(f"ended: {error}")
        except Exception as error:
            print(f"raw {type(error).__name__}: {error}")
    return said.getvalue() + "\n".join(str(one.message) for one in told)


@contextlib.contextmanager
def at_a_write(number: int, do: Callable[[Path], None]):
    """Do something right before the write of this number (counted from 0), and before every later one."""
    plain, count = files.temporary_of, 0

    def counted(path: Path) -> Path:
        nonlocal count
        if count >= number:
            do(path)
        count += 1
        return plain(path)

    files.temporary_of = rendered.temporary_of = counted
    try:
        yield lambda: count
    finally:
        files.temporary_of = rendered.temporary_of = plain


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob(".*") if p.is_file() and p.name not in (".lock", ".tree", ".filler")]


def full(work, root: Path, draw: random.Random, writes: int) -> tuple[bool, bool, dict] | None:
    """Fill the disk at one of the writes."""
    filled, before = [], {}
    with full_disk(root / "disk", DISK, "8m") as disk:
        folder = disk.folder / "work"

        def fill(_: Path) -> None:
            if not filled:
                filled.append(disk.fill(draw.choice((0, 0, 4096, 20_000))))
            if folder.exists():
                before.update(result(folder))

        with at_a_write(draw.randrange(writes), fill):
            said = attempt(work, folder)
        disk.free()
        if not said.strip() or ("ended" not in said and "raw" not in said):
            return None  # what was left to write had room
        after = result(folder) if folder.exists() else {}
        clear = "ended: " in said and "free space" in said and "raw" not in said
        whole = all(after.get(one) == content for one, content in before.items())
        attempt(work, folder)
        return clear, whole and not leftovers(folder), result(folder)


def damaged(kind: str, work, root: Path, draw: random.Random, expected: dict) -> tuple[bool, bool, dict]:
    """Damage one file of a result that is complete, and ask for it again."""
    folder = root / "work"
    attempt(work, folder)
    path = folder / draw.choice([one for one in expected if not one.startswith("figures")])
    others = {one: content for one, content in result(folder).items() if folder / one != path}
    content = path.read_bytes()
    place = draw.randrange(len(content))
    flipped = content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
    path.write_bytes({"cut off": content[:place], "one bit": flipped, "emptied": b""}[kind])
    said = attempt(work, folder)
    clear = ("again" in said or "delete" in said) and "raw" not in said
    if "ended: " in said:  # the remedy is in the message: what it names is removed
        shutil.rmtree(path.parent)
        attempt(work, folder)
    after = result(folder)
    return clear, all(after.get(one) == content for one, content in others.items()), after


def state(kind: str, root: Path, draw: random.Random) -> tuple[bool, bool, dict]:
    """Damage the state of a training that was interrupted, and go on."""
    folder = root / "work"

    def stop(_: Path) -> None:
        raise KeyboardInterrupt

    with at_a_write(draw.randrange(4, 24), stop), contextlib.suppress(KeyboardInterrupt):
        train(folder)
    others = {one: content for one, content in result(folder).items() if one != "state.pt"}
    path = folder / "state.pt"
    content = path.read_bytes()
    place = draw.randrange(len(content))
    flipped = content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
    path.write_bytes({"cut off": content[:place], "one bit": flipped, "emptied": b""}[kind])
    said = attempt(train, folder)
    clear = "raw" not in said and ("state.pt" in said or "resuming" in said)
    kept = result(folder) if "ended: " in said else None
    if "ended: " in said:
        path.unlink()
        attempt(train, folder)
    whole = kept is None or all(kept.get(one) == content for one, content in others.items())
    return clear, whole, result(folder)


def main(tries: int, names: list[str]) -> list[tuple[str, str, int, int, int, int]]:
    draw, table = random.Random(0), []
    root = Path(tempfile.mkdtemp())
    for name, work in WORK.items():
        if names and not any(one.startswith(name) for one in names):
            continue
        with at_a_write(-1, lambda _: None) as count:
            attempt(work, root / "undisturbed" / name)
        writes, expected = count(), result(root / "undisturbed" / name)
        faults: dict[str, Callable[[Path], tuple[bool, bool, dict]]] = {
            "disk full": lambda at, w=work, k=writes: full(w, at, draw, k),
        }
        if name != "training":  # without a record of its own nobody asks for it again
            for kind in ("cut off", "one bit", "emptied"):
                faults[f"a file {kind}"] = lambda at, kind=kind, w=work, e=expected: damaged(kind, w, at, draw, e)
        else:
            for kind in ("cut off", "one bit", "emptied"):
                faults[f"the state {kind}"] = lambda at, kind=kind: state(kind, at, draw)
        for fault, inject in faults.items():
            if names and not {name, f"{name}, {fault}"} & set(names):
                continue
            counts = [0, 0, 0]
            for number in range(tries):
                at, found = root / name / fault / str(number), None
                while found is None:
                    shutil.rmtree(at, ignore_errors=True)
                    at.mkdir(parents=True)
                    found = inject(at)
                clear, whole, after = found
                for place, right in enumerate((clear, whole, after == expected)):
                    counts[place] += right
                shutil.rmtree(at, ignore_errors=True)
            table.append((name, fault, tries, *counts))
            print(f"{name:22} {fault:18} {tries:5} {counts[0]:7} {counts[1]:8} {counts[2]:6}", flush=True)
    shutil.rmtree(root)
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs.commit = lambda: {"commit": None, "dirty": None}  # of a result it says nothing, and takes most of the time
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder, full_disk(Path(folder) / "d", "tmpfs") as mounted:
        DISK = "tmpfs" if mounted else "limit"
    print(
        f"disk full: {DISK}\n{'what':22} {'fault':18} {'tries':>5} {'message':>7} {'kept':>8} {'same':>6}", flush=True
    )
    whole = [row[2:] for row in main(int(sys.argv[1]) if len(sys.argv) > 1 else 10, sys.argv[2:])]
    sys.exit(any(len(set(row)) > 1 for row in whole))
