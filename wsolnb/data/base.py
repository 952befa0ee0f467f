"""What all readers share: the interface that notebooks and loaders use, checked file access, hold-out splits."""

from __future__ import annotations

import functools
import glob
import io
import math
import struct
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from wsolnb.data.sample import CONTEXT, DISCRIMINATIVE, REST, Sample
from wsolnb.errors import DataError, ParameterError, check_choice
from wsolnb.files import inside

Columns = Mapping[str, Callable[[str], Any]]
"""Name and converter of each column of a table."""

PARTS = (CONTEXT, DISCRIMINATIVE, REST)
"""Values of a part map."""


class Stated(NamedTuple):
    """The size (height, width) that annotations give for an image, and the file that says so."""

    size: tuple[int, int]
    source: Path


class LocalizationDataset(ABC):
    """A split of a data set: `len(ds)`, `ds[i] -> Sample`, and labels known without reading an image.

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
        """Read one sample with its truth.

        Raises IndexError past the end, DataError for a missing or damaged file.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} {self.split} has {len(self)} images; index {index} does not exist")
        return self.read(index % len(self))

    @abstractmethod
    def read(self, index: int, truth: bool = True) -> Sample:
        """Read sample `index`, 0 <= index < len(self).

        truth: False reads the image only and leaves boxes, mask and parts empty. This is all that weakly supervised
            training may look at, and it is faster.
        """

    def subset(self, indices: Sequence[int]) -> Subset:
        """Return the images at `indices`, in that order, as a data set."""
        return Subset(self, indices)

    def __repr__(self) -> str:
        return f"{self.name}({self.split}: {len(self)} images, {len(self.class_names)} classes)"


class Derived(LocalizationDataset):
    """A data set that is made from another one and shares its attributes."""

    def __init__(self, dataset: LocalizationDataset):
        self.dataset = dataset
        for name in ("name", "root", "split", "class_names", "multi_label", "image_ids", "labels"):
            setattr(self, name, getattr(dataset, name))


class Subset(Derived):
    """Some images of another data set."""

    def __init__(self, dataset: LocalizationDataset, indices: Sequence[int]):
        super().__init__(dataset)
        self.indices = [int(i) for i in indices]
        self.image_ids = tuple(dataset.image_ids[i] for i in self.indices)
        self.labels = tuple(dataset.labels[i] for i in self.indices)

    def __cache_key__(self, reading: Any) -> dict[str, Any]:
        """The data set's key, and which images."""
        return {"subset": self.indices, "dataset": reading.describe(self.dataset, "dataset")}

    def read(self, index: int, truth: bool = True) -> Sample:
        """Read the sample at position `index` of the subset."""
        return self.dataset.read(self.indices[index] % len(self.dataset), truth)


class FolderDataset(LocalizationDataset):
    """A data set of image files. Its reader says where an image lies and what is known about it.

    remedy: where to get the data set and how its folder must look; part of every error about its files.
    image_remedy: what to do about an image that cannot be read; empty: the remedy.
    upright: whether images are read as they are shown (`upright_rgb`). Published boxes and masks are of stored pixels.
    """

    remedy: str
    image_remedy: str = ""
    upright: bool = False

    def read(self, index: int, truth: bool = True) -> Sample:
        """Read sample `index`, 0 <= index < len(self), from disk, with its truth (`add_truth`) if asked for."""
        stated, convert = self.stated(index), upright_rgb if self.upright else plain_rgb
        remedy = self.image_remedy or self.remedy
        image = read_image(self.image_path(index), remedy, stated.size if stated else None, convert)
        sample = Sample(image, self.image_ids[index], self.labels[index])
        if truth:
            self.add_truth(index, sample)
        return sample

    def stated(self, index: int) -> Stated | None:
        """Return the size that the annotations give for image `index`; None where they give none."""
        return None

    def add_truth(self, index: int, sample: Sample) -> None:
        """Add what is known of image `index` to the sample that holds it, and check it against the image's size.

        A box that leaves the image by more than a pixel is cut off at its border; the first one of a data set gives a
        warning.
        Raises DataError for an image of another size than the annotations state, and for a box wholly outside.
        """
        (height, width), stated, path = sample.size, self.stated(index), self.image_path(index)
        if stated and stated.size != sample.size:
            problem = f"{path} is {width}x{height}, {stated.source} says {stated.size[1]}x{stated.size[0]}"
            raise self.problem(problem, "give the images that the annotations were made for, not resized copies")
        self.annotate(index, sample)
        sample.boxes = self._cut_off(path, sample)

    def _cut_off(self, path: Path, sample: Sample) -> np.ndarray:
        """Return the boxes of a sample, those that leave it by more than a pixel cut off at its border."""
        (height, width), boxes = sample.size, np.asarray(sample.boxes, np.float64).reshape(-1, 4)
        for x0, y0, x1, y1 in boxes:
            if x0 >= width or y0 >= height or x1 < 0 or y1 < 0:
                box = f"{x0:g}, {y0:g}, {x1:g}, {y1:g}"
                raise self.problem(f"the box {box} lies outside of {path} ({width}x{height})")
        leaves = (boxes < -1).any(axis=1) | (boxes > np.array([width, height] * 2) + 1).any(axis=1)
        if not leaves.any():
            return sample.boxes
        box = ", ".join(f"{value:g}" for value in boxes[leaves][0])
        self.tell(
            "cut off", f"the box {box} leaves {path} ({width}x{height}); it is cut off, as are all others that do"
        )
        return np.where(leaves[:, None], np.clip(boxes, 0, [width, height] * 2), boxes)

    def tell(self, kind: str, text: str) -> None:
        """Warn of something that is read all the same, once for a data set and a kind of thing."""
        if (place := (self.name, str(self.root), kind)) not in _TOLD:
            _TOLD.add(place)
            warnings.warn(f"{self.name}: {text}", stacklevel=5)

    def __cache_key__(self, reading: Any) -> dict[str, Any]:
        """What a result that reads this data set depends on: images, labels, options, and the files (`wsolnb.keys`).

        Among private attributes only numbers and text count. All others are assumed to be read from the files.
        """
        plain = (bool, int, float, str)
        named = {
            n: v for n, v in vars(self).items() if n not in ("root", "remedy") and (n[0] != "_" or isinstance(v, plain))
        }
        described = {name: reading.describe(value, f"{self.name}.{name}") for name, value in named.items()}
        return {**described, "files": [reading.files(path) for path in self.sources()]}

    def sources(self) -> list[Path]:
        """Return the files and folders that the data set reads."""
        return [self.root]

    def problem(self, text: str, remedy: str = "") -> DataError:
        """Return the error about one of the files, with the remedy."""
        return DataError(text, remedy or self.remedy)

    def open(self, root: str | Path, split: str, marker: str, *nested: str) -> None:
        """Check the split, and find the folder that holds `marker` (a relative path).

        The folder is `root` itself or one of its `nested` subfolders. Archives unpack into a folder of their own, so
        both this folder and its parent are accepted.
        """
        check_choice(f"{self.name} has no split", split, ("train", "val", "trainval", "test"))
        self.split, root = split, Path(root)
        if not root.is_dir():
            raise self.problem(f"{'a file, no folder' if root.exists() else 'no such folder'}: {root}")
        found = [folder for folder in (root, *(root / name for name in nested)) if (folder / marker).exists()]
        if not found:
            raise self.problem(f"missing: {root / marker}")
        self.root = found[0]

    def choose(self, labels: Sequence[tuple[int, ...]], fraction: float, seed: int) -> Sequence[int]:
        """Return the positions of the split's images among the published ones: `train` and `val` by `hold_out`."""
        if self.split in ("train", "val"):
            return hold_out(labels, fraction, seed)[self.split == "val"]
        return range(len(labels))

    def listed(self, folder: Path, name: str, suffix: str = "") -> Path:
        """Return the file below `folder` that a list of the data set names; DataError for a name that leads out of it.

        Folders may be linked from elsewhere.
        """
        return inside(folder, name, suffix, links=True)

    def require(self, path: Path) -> Path:
        """Return `path` if it exists, else raise DataError naming it."""
        if not path.exists():
            raise self.problem(f"missing: {path}")
        return path

    def lines(self, path: Path, remedy: str = "") -> dict[int, str]:
        """Return the non-empty lines of a text file, stripped, by number from 1.

        Raises DataError, with the `remedy` if one is given, when it is missing, empty or not text.
        """
        try:
            text = path.read_text(encoding="utf-8-sig")  # some editors write a mark before the first line
        except FileNotFoundError as error:
            raise self.problem(f"missing: {path}", remedy) from error
        except (UnicodeDecodeError, OSError) as error:
            raise self.problem(f"cannot read {path}: {error}", remedy) from error
        lines = {i: line.strip() for i, line in enumerate(text.splitlines(), start=1) if line.strip()}
        if not lines:
            raise self.problem(f"empty: {path}", remedy)
        return lines

    def table(self, path: Path, columns: Columns, separator: str | None = None) -> list[tuple]:
        """Read a text table: one converted tuple per line; empty lines and lines that start with `#` are skipped.

        columns: name -> converter (`str`, `int`, `number`) of each column; the last one takes the rest of the line.
        separator: None for blanks. Raises DataError naming file and line of what does not convert.
        """
        converters, rows = tuple(columns.values()), []
        for position, line in self.lines(path).items():
            if line.startswith("#"):
                continue
            fields = line.split(separator, len(converters) - 1)
            try:
                rows.append(tuple([convert(field.strip()) for convert, field in zip(converters, fields, strict=True)]))
            except ValueError as error:
                pattern = (separator or " ").join(f"<{name}>" for name in columns)
                raise self.problem(f"{path}, line {position}: {line!r} is not {pattern}") from error
        if not rows:
            raise self.problem(f"empty: {path}")
        return rows

    def records(self, path: Path, columns: Columns, separator: str | None = None) -> dict[Any, tuple]:
        """Read a table as `table` does, keyed by its first column; DataError when a key comes twice."""
        records: dict[Any, tuple] = {}
        for row in self.table(path, columns, separator):
            if row[0] in records:
                raise self.problem(f"{path} lists {row[0]!r} more than once")
            records[row[0]] = row[1:]
        return records

    def check_covers(self, path: Path, keys: Iterable, other: Path, needed: Iterable) -> None:
        """Raise DataError when the table `path` with these keys lacks one that the table `other` needs."""
        lacking = set(needed).difference(keys)
        if lacking:
            raise self.problem(f"{path} lacks {min(lacking)!r}, which {other} has ({len(lacking)} in all)")

    def label_map(self, path: Path, size: tuple[int, int], allowed: Iterable[int] = PARTS) -> np.ndarray:
        """Return a mask file (by default of parts) as `read_mask` does.

        Raises DataError for values that are not allowed, and for pictures in colour or of one bit, because these name
        no class.
        """
        values = read_mask(path, self.remedy, size, ("P", "L"))
        known = np.zeros(256, bool)
        known[list(allowed)] = True
        odd = ~known[values]
        if odd.any():
            raise self.problem(f"{path} holds the value {values[odd][0]}, which stands for nothing")
        return values

    @abstractmethod
    def image_path(self, index: int) -> Path:
        """Return the file of image `index`."""

    @abstractmethod
    def annotate(self, index: int, sample: Sample) -> None:
        """Add boxes, mask and parts, as far as they are known, to the sample that holds image `index`."""


# ---------------------------------------------------------------------------------------------------------- splits


def hold_out(labels: Sequence[tuple[int, ...]], fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split image positions into (kept, held out), with the same share of every class (by an image's first class).

    The validation split of data sets that come without one. Positions come back in ascending order; every class keeps
    at least one image and, when it has at least two, gives at least one.

    labels: class indices of each image; fraction: share to hold out, 0 < fraction < 1.
    """
    if not 0 < fraction < 1:
        raise ParameterError(f"the held-out fraction is {fraction}", "choose one between 0 and 1, such as 0.2")
    by_class: dict[int, list[int]] = {}
    for position, classes in enumerate(labels):
        by_class.setdefault(classes[0] if classes else -1, []).append(position)
    rng = np.random.default_rng(seed)
    held: list[int] = []
    for key in sorted(by_class):
        members = by_class[key]
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        held += rng.permutation(members)[:count].tolist()
    return sorted(set(range(len(labels))).difference(held)), sorted(held)


# ----------------------------------------------------------------------------------------------------------- files


def number(text: str) -> float:
    """Convert a column of a table to a finite float; ValueError for anything else (`nan` included)."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"not finite: {text}")
    return value


# What Pillow raises on damaged files of the formats that data sets use (UnidentifiedImageError is an OSError).
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


ORIENTATION = 0x0112
"""EXIF's tag of how an image is turned; from 5 on its sides are exchanged."""

_TOLD: set[tuple[str, str, str]] = set()
"""Data sets (name, folder) and kinds of things that this process has warned of."""


def decode(path: Path, remedy: str, convert: Callable[[Image.Image], Any]) -> np.ndarray:
    """Return what `convert` makes of an image file, as an array; DataError when it is missing or damaged."""
    if not path.exists():
        raise DataError(f"missing: {path}{_other_ending(path)}", remedy)
    try:
        with Image.open(path, formats=_formats()) as image:
            return np.array(convert(image))
    except Image.DecompressionBombError as error:
        raise DataError(f"cannot decode {path}: {error}", "give a smaller copy of it") from error
    except _DECODING_ERRORS as error:
        raise DataError(f"cannot decode {path}: {error}", remedy) from error


@functools.cache
def _formats() -> list[str]:
    """Return the formats that Pillow reads by itself: PostScript it hands to another program, which runs it."""
    Image.init()
    return sorted(set(Image.OPEN) - {"EPS"})


def _other_ending(path: Path) -> str:
    """Return a hint at a file that differs from a missing one in its ending only, such as `x.JPG` for `x.jpg`."""
    beside = sorted(other.name for other in path.parent.glob(f"{glob.escape(path.stem)}.*")) if path.name else []
    return f"; there is {beside[0]}: give it the ending {path.suffix!r}" if beside else ""


def save_picture(image: Image.Image, path: Path, **options: Any) -> None:
    """Write a picture in the format of the path's ending; OSError where it does not fit on the disk.

    Pillow itself does not notice that the disk took a part only.
    """
    image.save(file := io.BytesIO(), Image.registered_extensions()[path.suffix], **options)
    path.write_bytes(file.getvalue())


def plain_rgb(image: Image.Image) -> Image.Image:
    """Return an image as published data are read: as RGB of 8 bits; transparency is dropped.

    Raises DataError for grey values that `eight_bits` does not take.
    """
    if image.mode.startswith(("I", "F")):  # Pillow itself would clip at 255
        return Image.fromarray(eight_bits(np.asarray(image))).convert("RGB")
    return image.convert("RGB")


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as 8-bit RGB, turned as its EXIF orientation says.

    What is transparent becomes white. Grey values of 16 bits are divided by 257, floats in [0, 1] multiplied by 255
    (`eight_bits`). Of several frames or pages the first is taken. Raises DataError for grey values of another range.
    """
    try:
        turned = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, ZeroDivisionError):
        image.load()  # what is damaged beyond its EXIF block raises here
        turned = image
    if turned.has_transparency_data and not turned.mode.startswith(("I", "F")):
        coloured = turned.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")
    return plain_rgb(turned)


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Return grey or colour values as uint8: bool, uint8, integers of 16 bits, or floats in [0, 1].

    Raises DataError for any other type or range, for NaN, and for integers that use 12 or fewer of their 16 bits:
    whether they are dark or are of a camera with 12 bits cannot be told.
    """
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint8:
        return values
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if values.dtype.kind in "iu" and (values.dtype == np.uint16 or values.dtype.itemsize >= 4) and low >= 0:
        if 0 < high < 4096:
            problem = f"its values are {values.dtype} from {low:g} to {high:g}, a small part of 16 bits"
            raise DataError(problem, "scale them to the full range, 0 to 65535, or bring them to uint8")
        if high <= 65535:
            return np.rint(values / 257).astype(np.uint8)
    elif values.dtype.kind == "f" and low >= 0 and high <= 1:  # false for NaN, which min and max pass on
        return np.rint(values * 255).astype(np.uint8)
    raise DataError(f"its values are {values.dtype} from {low:g} to {high:g}", "bring them to uint8")


def read_image(
    path: Path, remedy: str, stated: tuple[int, int] | None = None,
    convert: Callable[[Image.Image], Image.Image] = plain_rgb,
) -> np.ndarray:  # fmt: skip
    """Return an image file as (H, W, 3) uint8 RGB; DataError when it is missing, truncated or no image.

    The format is told by the content, not by the name (some `.jpg` of Oxford-IIIT Pet are GIF or PNG files). Pixels are
    taken as they are stored, whatever orientation the file asks for (EXIF), because published annotations refer to
    stored pixels. The image is turned only if the annotations state a size (height, width) that the turned image has
    and the stored one does not have.
    convert: brings what Pillow has opened to RGB; `upright_rgb` turns it always, as images of one's own are shown.
    """

    def as_stated(image: Image.Image) -> Image.Image:
        if stated and image.size[::-1] != stated and (turned := ImageOps.exif_transpose(image)).size[::-1] == stated:
            image = turned
        return convert(image)

    try:
        return decode(path, remedy, as_stated)
    except DataError as error:
        if str(path) in error.problem:
            raise
        raise DataError(f"{path}: {error.problem}", remedy) from error


def read_size(path: Path, remedy: str, stated: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return (height, width) of an image file from its head, as `read_image` does; DataError when it has none."""

    def sides(image: Image.Image) -> tuple[int, int]:
        turned = image.getexif().get(ORIENTATION, 1) >= 5 and image.size == stated
        return image.size if turned else image.size[::-1]

    height, width = decode(path, remedy, sides)
    return int(height), int(width)


def read_mask(
    path: Path, remedy: str, size: tuple[int, int] | None = None, modes: Sequence[str] | None = None
) -> np.ndarray:
    """Return a palette or grey mask file as (H, W) uint8 of its stored values.

    size: (height, width) that the mask must have. modes: of Pillow that it may have; None: others become grey.
    Raises DataError when it is missing, damaged, of another size or of another mode.
    """

    def convert(image: Image.Image) -> Image.Image:
        if modes and image.mode not in modes:
            problem = f"{path} is no picture of palette indices or grey values (its mode is {image.mode})"
            raise DataError(problem, "save the class of each pixel as a palette index: a PNG of mode P or L")
        return image if image.mode in ("P", "L") else image.convert("L")

    mask = decode(path, remedy, convert)
    if size is not None and mask.shape != tuple(size):
        raise DataError(f"{path} is {mask.shape[1]}x{mask.shape[0]}, its image {size[1]}x{size[0]}", remedy)
    return mask
