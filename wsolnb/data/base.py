"""What all readers share: the interface that notebooks and loaders use, checked file access, hold-out splits."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from wsolnb.data.sample import Sample
from wsolnb.errors import DataError, nearest


class LocalizationDataset(ABC):
    """A split of a data set on disk: `len(ds)`, `ds[i] -> Sample`, and labels known without reading an image.

    name: short name of the data set, such as `cub`.
    root: its folder.
    split: the split that was asked for.
    class_names: names of the classes, index = class index.
    image_ids: the images of the split, in order.
    labels: for each image the sorted tuple of its class indices.
    multi_label: whether an image can have several classes.
    """

    name: str
    multi_label: bool = False
    root: Path
    split: str
    class_names: tuple[str, ...]
    image_ids: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample.

        Raises IndexError past the end, DataError for a missing or damaged file.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} {self.split} has {len(self)} images; index {index} does not exist")
        return self.read(index % len(self))

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Read sample `index`, 0 <= index < len(self), from disk."""

    def subset(self, indices: Sequence[int]) -> Subset:
        """Return the images at `indices`, in that order, as a data set."""
        return Subset(self, indices)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.split}: {len(self)} images, {len(self.class_names)} classes)"


class Subset(LocalizationDataset):
    """Some images of another data set."""

    def __init__(self, dataset: LocalizationDataset, indices: Sequence[int]):
        self.dataset = dataset
        self.indices = [int(i) for i in indices]
        self.name, self.root, self.split = dataset.name, dataset.root, dataset.split
        self.class_names, self.multi_label = dataset.class_names, dataset.multi_label
        self.image_ids = tuple(dataset.image_ids[i] for i in self.indices)
        self.labels = tuple(dataset.labels[i] for i in self.indices)

    def read(self, index: int) -> Sample:
        """Read the sample at position `index` of the subset."""
        return self.dataset[self.indices[index]]


def hold_out(labels: Sequence[tuple[int, ...]], fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split image positions into (kept, held out), the same share of every class (by an image's first class).

    The validation split of data sets that come without one. Positions come back in ascending order; every class keeps
    at least one image and, when it has at least two, gives at least one.

    labels: class indices of each image; fraction: share to hold out, 0 < fraction < 1.
    """
    if not 0 < fraction < 1:
        raise DataError(f"the held-out fraction is {fraction}", "choose one between 0 and 1, such as 0.2")
    by_class: dict[int, list[int]] = {}
    for position, classes in enumerate(labels):
        by_class.setdefault(classes[0] if classes else -1, []).append(position)
    rng = np.random.default_rng(seed)
    held: list[int] = []
    for key in sorted(by_class):
        members = by_class[key]
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        held += rng.permutation(members)[:count].tolist()
    held_set = set(held)
    return [i for i in range(len(labels)) if i not in held_set], sorted(held)


def check_split(split: str, known: Sequence[str], name: str) -> None:
    """Raise DataError when `split` is not one of `known`."""
    if split not in known:
        raise DataError(f"{name} has no split {split!r}{nearest(split, known)}", f"choose one of {', '.join(known)}")


def require(path: Path, remedy: str) -> Path:
    """Return `path` if it exists, else raise DataError naming it."""
    if not path.exists():
        raise DataError(f"missing: {path}", remedy)
    return path


def read_lines(path: Path, remedy: str) -> list[str]:
    """Return the non-empty lines of a text file, stripped; DataError when it is missing, empty or not text."""
    require(path, remedy)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"cannot read {path}: {error}", remedy) from error
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"empty: {path}", remedy)
    return lines


def read_image(path: Path, remedy: str) -> np.ndarray:
    """Return an image file as (H, W, 3) uint8 RGB; DataError when it is missing, truncated or no image."""
    require(path, remedy)
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot decode {path}: {error}", remedy) from error


def read_mask(path: Path, remedy: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Return a palette or grey mask file as (H, W) uint8 of its stored values.

    size: (height, width) that the mask must have. Raises DataError when it is missing, damaged or of another size.
    """
    require(path, remedy)
    try:
        with Image.open(path) as image:
            mask = np.asarray(image if image.mode in ("P", "L") else image.convert("L"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot decode {path}: {error}", remedy) from error
    if size is not None and mask.shape != tuple(size):
        raise DataError(f"{path} is {mask.shape[1]}x{mask.shape[0]}, its image {size[1]}x{size[0]}", remedy)
    return mask


def read_xml(path: Path, remedy: str) -> ElementTree.Element:
    """Return the root element of an XML file; DataError when it is missing or not well formed."""
    require(path, remedy)
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise DataError(f"not well-formed XML: {path}: {error}", remedy) from error
