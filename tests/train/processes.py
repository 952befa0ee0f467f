"""Trainings that test_loop.py runs in one process (`main`) and in two, as a script under torchrun."""

import os
import sys
import warnings
from pathlib import Path

import torch
from test_loop import Batches, Small, config
from torch import nn

from wsolnb.data.loading import EpochLoader, EpochSampler
from wsolnb.errors import WsolnbError
from wsolnb.train import loop

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
IMAGES = 80
"""Ten batches of 8: five steps of two processes."""


class Images(torch.utils.data.Dataset):
    """The images of `Batches`, by (epoch, index); one may be poisoned with NaN."""

    def __init__(self, poison=None):
        self.batches, self.poison = Batches(), poison

    def __len__(self):
        return IMAGES

    def __getitem__(self, key):
        epoch, index = key
        image = self.batches.images[index]
        return {
            "image": image * float("nan") if (epoch, index) == self.poison else image,
            "label": self.batches.labels[index],
        }


def loader(batch_size, poison=None, shuffle=True):
    """As many images a step with any number of processes."""
    dataset = Images(poison)
    sampler = EpochSampler(len(dataset), shuffle, 0)
    return EpochLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=True)


def build(dropout, norm=False):
    # Other weights in each process: those of the main one are to win.
    loop.set_seed(RANK)
    model = Small()
    model.body[-1].p = dropout
    if norm:
        model.body.append(nn.BatchNorm1d(16))
    return model


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def error_of(function):
    try:
        function()
    except WsolnbError as error:
        return type(error).__name__, str(error)
    return None


def main(folder):
    """Return what this process saw; of several, write it to `folder/rank<n>.pt`."""
    calls, rates = [], []

    def evaluate(model):
        calls.append(weights(model))
        return {"top1": float(len(calls))}

    plain_step = torch.optim.AdamW.step

    def step(self, *arguments, **options):
        rates.append(self.param_groups[0]["lr"])
        return plain_step(self, *arguments, **options)

    each = 16 // PROCESSES
    model = build(dropout=0.0)
    torch.optim.AdamW.step = step
    history = loop.train(model, loader(each), config(), folder / "plain", evaluate, progress=False)
    torch.optim.AdamW.step = plain_step
    found = {
        "rates": rates,
        "loss": list(history["loss"]),
        "top1": list(history["top1"]),
        "weights": weights(model),
    }
    # The rest has no counterpart with one process.
    if PROCESSES > 1:
        norm = build(dropout=0.2, norm=True)
        loop.train(norm, loader(each), config(), folder / "norm", progress=False)
        found["norm"] = weights(norm)

        masks = []
        seen = build(dropout=0.5)
        seen.body[-1].register_forward_hook(lambda _module, _inputs, output: masks.append(output.detach() == 0))
        same = [{"image": torch.ones(8, 3, 8, 8), "label": torch.zeros(8, dtype=torch.long)}]
        loop.train(seen, same, config(epochs=1), folder / "dropout", progress=False)
        found["mask"] = masks[0]

        def stop(_model):
            if len(calls) == 1:
                raise KeyboardInterrupt
            calls.append(None)
            return {"top1": 0.0}

        calls.clear()
        loop.SAVE_EVERY = 0.0  # so that the last state lies inside an epoch
        try:
            loop.train(build(dropout=0.2), loader(each), config(), folder / "resumed", stop, progress=False)
        except KeyboardInterrupt:
            calls.append(None)
        for name in ("resumed", "whole"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model = build(dropout=0.2)
                loop.train(model, loader(each), config(), folder / name, lambda _: {"top1": 0.0}, progress=False)
            found[name] = weights(model)
            found[f"{name} warnings"] = [str(w.message) for w in caught if "resuming" in str(w.message)]

        # Image 0 in order is one of the main process: the other sees no NaN of its own in the first step.
        poisoned = loader(each, poison=(0, 0), shuffle=False)
        found["nan"] = error_of(lambda: loop.train(build(0.0), poisoned, config(), folder / "nan", progress=False))
        few = loader(48)
        found["few"] = error_of(lambda: loop.train(build(0.0), few, config(), folder / "few", progress=False))
        torch.save(found, folder / f"rank{RANK}.pt")
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
