"""Kill trainings with SIGKILL at random moments and start them again, until so many kills were survived.

    python tests/train/killed.py 30

A training: Hide-and-Seek on rendered birds, which draws from the random states in every step, with batch normalisation,
augmentation, a mean of the weights, and validation after each of three epochs. Prints one line of JSON: how many kills
fell before the first step, inside an epoch or between two; how many trainings came to their end; and whether all of
these have the weights and the history of the training that nobody disturbed, bit for bit.
"""

import contextlib
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from wsolnb.data import aviary
from wsolnb.notebook import runs
from wsolnb.train import loop
from wsolnb.train.evaluation import validator
from wsolnb.train.loop import TrainingConfig
from wsolnb.train.recipe import Recipe, fit

FILES = ("last.safetensors", "best.safetensors", "history.csv")


def train(root: Path, name: str) -> None:
    """Train in a run folder, as a notebook does, and keep the state at every step."""
    torch.set_num_threads(1)
    loop.SAVE_EVERY, loop.LOOK = 0.0, 1
    birds = aviary.AviaryConfig(classes=3, size=48, train=48, val=9, test=3)
    data, held = (aviary.load(birds, split, root / "cache") for split in ("train", "val"))
    training = TrainingConfig(epochs=3, lr=1e-3, ema=0.8, precision="fp32", device="cpu")
    recipe = Recipe(
        method="has", backbone="resnet_mini", output_stride=8, image_size=48, batch_size=4, training=training
    )
    run = runs.start("killed", {"run_folder": str(root / name)})
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):
        fit(run, "has", recipe, data, validator(held, recipe.test_transform()), progress=False)


def result(root: Path, name: str) -> list[str]:
    """Return what a training has left: the bytes of its weights, and its table without the seconds."""
    (folder,) = (root / name / "checkpoints").iterdir()
    table = loop.history(folder).drop(columns="seconds").to_csv()
    return [*((folder / file).read_bytes().hex() for file in FILES[:2]), table]


def state_of(root: Path, name: str) -> str:
    """Return in words how far a killed training had come."""
    for path in (root / name).glob("checkpoints/*/state.pt"):
        return "inside an epoch" if torch.load(path)["step"] else "between epochs"
    return "before the first step"


def main(kills: int, seed: int = 0) -> dict:
    root, processes, draw = Path(tempfile.mkdtemp()), multiprocessing.get_context("fork"), random.Random(seed)
    train(root, "first")  # renders the birds
    whole = processes.Process(target=train, args=(root, "whole"))
    started = time.perf_counter()
    whole.start()
    whole.join()
    seconds, expected = time.perf_counter() - started, result(root, "whole")
    found = {"kills": 0, "finished": 0, "equal": 0, "resumed from": {}, "seconds of a training": round(seconds, 1)}
    killed = False
    while killed or found["kills"] < kills:
        name = str(found["finished"])
        one = processes.Process(target=train, args=(root, name))
        one.start()
        one.join(draw.uniform(0, seconds) if found["kills"] < kills else None)
        killed = one.is_alive()
        if killed:
            os.kill(one.pid, signal.SIGKILL)
            one.join()
            found["kills"] += 1
            where = state_of(root, name)
            found["resumed from"][where] = found["resumed from"].get(where, 0) + 1
        elif one.exitcode:
            raise SystemExit(f"a training ended with {one.exitcode} after {found['kills']} kills")
        else:
            found["finished"] += 1
            found["equal"] += result(root, name) == expected
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
