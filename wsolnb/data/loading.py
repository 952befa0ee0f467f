"""From samples to batches of tensors.

    loader = make_loader(train, Compose([RandomHorizontalFlip(), RandomShift(4)]), 48, shuffle=True, seed=0)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            loss = criterion(model(batch["image"]), batch["label"])

Order and augmentation of an epoch depend only on the seed, the epoch and the image. They depend neither on the number
of workers nor on what was drawn before. `accelerator.prepare(loader)` keeps this. Set the epoch of the loader that it
returns; otherwise this loader counts epochs by itself, from 0.
"""

from __future__ import annotations

import itertools
import mmap
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from wsolnb.data.base import Derived, LocalizationDataset
from wsolnb.data.sample import Sample
from wsolnb.data.transforms import Transform, resize
from wsolnb.errors import DataError, ParameterError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_tensor(
    image: np.ndarray, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> torch.Tensor:
    """Return (..., H, W, 3) uint8 RGB as (..., 3, H, W) float32, (value / 255 - mean) / std per channel."""
    scale = 255 * torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
    offset = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1) * 255 / scale
    pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, -3)))
    return pixels.float().div_(scale).sub_(offset)


KEPT, KEPT_BYTES = 0.25, 16 * 2**30
"""Share of the free memory that `Kept` may take, all processes of a launch together, and the most that it ever takes:
a container may allow less than the machine has."""


class Kept(Derived):
    """A data set whose images are decoded and resized to side x side once, and then kept as they are, in uint8.

    That is of images without truth (`read(index, truth=False)`); with truth they are read as ever. All workers share
    the memory, which is taken page by page as images come. A transform that begins with a resize to the same side has
    the same result as without.
    """

    def __init__(self, dataset: LocalizationDataset, side: int):
        super().__init__(dataset)
        self.side = side
        shape = (len(dataset), side, side, 3)
        self.pixels = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)
        self.there = np.frombuffer(mmap.mmap(-1, len(dataset)), bool)

    @staticmethod
    def fits(images: int, side: int, num_workers: int) -> bool:
        """Return whether so many images fit into what `KEPT` allows, and workers would share it."""
        shared = not num_workers or multiprocessing.get_start_method() == "fork"
        allowed = min(KEPT * psutil.virtual_memory().available, KEPT_BYTES) / int(os.environ.get("WORLD_SIZE", 1))
        return shared and images * side * side * 3 <= allowed

    def read(self, index: int, truth: bool = True) -> Sample:
        """Read the sample at `index`; without truth its image is side x side."""
        if truth:
            return self.dataset.read(index)
        if not self.there[index]:
            self.pixels[index] = resize(self.dataset.read(index, truth=False), (self.side, self.side)).image
            self.there[index] = True
        return Sample(self.pixels[index].copy(), self.image_ids[index], self.labels[index])


class EpochSampler(Sampler):
    """Order of an epoch: yields (epoch, index) so that workers know the epoch whenever they were started.

    Shuffled by (seed, epoch), or ascending.
    """

    def __init__(self, length: int, shuffle: bool, seed: int):
        self.length, self.shuffle, self.seed, self.epoch = length, shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        return zip(itertools.repeat(self.epoch), order.tolist(), strict=False)


@dataclass(eq=False)
class TransformedDataset(Dataset):
    """Transformed samples of a data set, by (epoch, index), and how they become a batch."""

    dataset: LocalizationDataset
    transform: Transform | None
    truth: bool
    seed: int
    mean: Sequence[float]
    std: Sequence[float]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Any]:
        epoch, index = key
        sample = self.dataset.read(index, self.truth)
        if self.transform is not None:
            sample = self.transform(sample, np.random.default_rng((self.seed, epoch, index)))
        return index, sample

    def collate(self, items: list[tuple[int, Any]]) -> dict[str, Any]:
        """Stack samples into the batch that `make_loader` describes."""
        indices, samples = zip(*items, strict=True)
        sizes = {sample.size for sample in samples}
        if len(sizes) > 1:
            shown = ", ".join(f"{width}x{height}" for height, width in sorted(sizes)[:3])
            raise ParameterError(f"images of one batch differ in size: {shown}", "end the transform with a fixed size")
        batch: dict[str, Any] = {
            "image": to_tensor(np.stack([sample.image for sample in samples]), self.mean, self.std),
            "index": torch.tensor(indices),
        }
        if self.dataset.multi_label:
            batch["label"] = torch.zeros(len(samples), len(self.dataset.class_names))
            for row, sample in zip(batch["label"], samples, strict=True):
                row[list(sample.labels)] = 1
        else:
            batch["label"] = torch.tensor([sample.label for sample in samples])
        if self.truth:
            batch["samples"] = list(samples)
        return batch


class EpochLoader(DataLoader):
    """A DataLoader that knows which epoch it is in."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, 0 or more, that the next iteration goes through."""
        self.sampler.set_epoch(epoch)


def check_batches(images: int, batch_size: int) -> None:
    """Raise ParameterError where training images make no full batch."""
    if images < batch_size:
        raise ParameterError(f"{images} training images make no batch of {batch_size}", "lower batch_size")


def make_loader(
    dataset: LocalizationDataset,
    transform: Transform | None,
    batch_size: int,
    *,
    shuffle: bool = False,
    truth: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    drop_last: bool = False,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> EpochLoader:
    """Return batches of a data set, as dicts:

    image: (B, 3, H, W) float32, normalised.
    label: (B,) int64 class indices, or (B, classes) float32 of 0 and 1 where the data set is multi-label.
    index: (B,) int64 positions in the data set.
    samples: with `truth`, the B transformed samples (`image` is made of theirs; boxes, mask and parts fit it).

    Without `truth`, boxes and masks are not read. Training then cannot peek at them, and it is faster.

    transform: applied to every sample; None takes images as they are. A batch needs images of one size.
    seed: of order and augmentation, 0 or more; `set_epoch` before an epoch gives each epoch its own.
    num_workers: processes that read ahead; results do not depend on it.
    drop_last: leave out a last batch that is not full, as in training.

    Raises ParameterError for a negative seed or where `drop_last` leaves no batch, DataError for an empty data set.
    An image that cannot be read raises its DataError while iterating, from a worker as well.
    """
    if seed < 0:
        raise ParameterError(f"the seed is {seed}", "choose 0 or more")
    if len(dataset) == 0:
        raise DataError(f"{dataset} is empty", "choose another split or subset")
    if drop_last:
        check_batches(len(dataset), batch_size)
    items = TransformedDataset(dataset, transform, truth, seed, mean, std)
    return EpochLoader(
        items,
        batch_size=batch_size,
        sampler=EpochSampler(len(dataset), shuffle, seed),
        num_workers=num_workers,
        collate_fn=items.collate,
        drop_last=drop_last,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
