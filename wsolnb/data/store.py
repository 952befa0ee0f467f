"""One store for masks and maps on disk: a file for each image, written by rename, checked when it is read.

    store = Store(folder)
    store.write_mask("birds/0001", mask, outcome="enhanced")
    mask, facts = store.read_mask("birds/0001")
    taught = WithMasks(dataset, store)          # the data set, with these masks in place of its own

Memory does not grow with the number of images. An interrupted writer leaves whole files only. Files of another program
can replace any stage of a pipeline.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from wsolnb.data.base import Derived, LocalizationDataset
from wsolnb.data.sample import IGNORE, Sample
from wsolnb.data.transforms import resize_map
from wsolnb.errors import DataError, ParameterError
from wsolnb.files import inside, write_atomically

REMEDY = "make it again: the stage that wrote it keeps what is whole in the folder"
MOST = 2**31
"""Bytes that an image's arrays may unpack to: a few kilobytes of a file could fill the memory otherwise."""


class ClassMaps(NamedTuple):
    """Maps of one image: image_id; classes (K,) 0-based, its labels; maps (K, H, W) float32 in [0, 1]; K may be 0."""

    image_id: str
    classes: tuple[int, ...]
    maps: np.ndarray


class Store:
    """Masks (`<image id>.png`) and maps (`<image id>.npz`) below a folder.

    A mask is (H, W) bool, stored with one bit per pixel, or uint8. Its file carries facts as text, and a digest of the
    image id, the facts and the pixels. The digest reveals any damage; a file of another program has no digest. Maps are
    stored in half precision.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def __cache_key__(self, reading: Any) -> Any:
        """The key of the artefact that the files belong to, or what they hold."""
        return reading.describe(self.folder, "store")

    def path(self, image_id: str, suffix: str) -> Path:
        """Return the file of an image; DataError for a name that leads out of the folder (`files.inside`)."""
        return inside(self.folder, image_id, suffix)

    def write_mask(self, image_id: str, mask: np.ndarray, **facts: str) -> None:
        """Store the mask of an image, with facts about it.

        Raises ParameterError for a mask that is not (H, W) of bool or uint8.
        """
        if mask.ndim != 2 or not mask.size or mask.dtype not in (bool, np.uint8):
            raise ParameterError(f"a mask of shape {mask.shape} and type {mask.dtype}", "give (H, W) bool or uint8")
        text = PngInfo()
        for key, value in {**facts, "sha256": _digest(image_id, mask, facts)}.items():
            text.add_text(key, value)
        picture = Image.fromarray(mask.astype(np.uint8) * (255 if mask.dtype == bool else 1))
        file = io.BytesIO()
        (picture.convert("1") if mask.dtype == bool else picture).save(file, "png", pnginfo=text)
        write_atomically(self.path(image_id, ".png"), file.getvalue(), lasting=False)

    def read_mask(self, image_id: str) -> tuple[np.ndarray, dict[str, str]]:
        """Return the mask of an image and the facts about it.

        Raises DataError when the file is missing, damaged or of another image.
        """
        path = self.path(image_id, ".png")
        try:
            with Image.open(path, formats=("PNG",)) as image:
                image.load()
                facts, mask = dict(getattr(image, "text", {})), np.array(image)
        except Exception as error:  # Pillow reports damage through many types
            raise DataError(f"the mask {path} cannot be read: {type(error).__name__}: {error}", REMEDY) from error
        if mask.ndim != 2 or mask.dtype not in (bool, np.uint8):
            problem = f"the mask {path} has the shape {mask.shape} and the type {mask.dtype}"
            raise DataError(problem, "save it as 8-bit grey or palette indices")
        if facts.pop("sha256", None) not in (None, _digest(image_id, mask, facts)):
            raise DataError(f"the mask {path} is damaged, or of another image: its digest does not fit", REMEDY)
        return mask, facts

    def write_maps(self, found: ClassMaps) -> None:
        """Store the maps of an image."""
        file = io.BytesIO()
        np.savez_compressed(file, maps=found.maps.astype(np.float16), classes=np.array(found.classes, np.int64))
        write_atomically(self.path(found.image_id, ".npz"), file.getvalue(), lasting=False)

    def read_maps(self, image_id: str) -> ClassMaps:
        """Return the maps of an image; DataError when they are missing or damaged."""
        path = self.path(image_id, ".npz")
        classes, maps = read_arrays(path, ("classes", "maps"), REMEDY)
        try:
            found = ClassMaps(image_id, tuple(classes.tolist()), maps.astype(np.float32))
            if found.maps.ndim != 3 or len(found.maps) != len(found.classes):
                raise ValueError(f"maps of shape {found.maps.shape} for {len(found.classes)} classes")
            if len(set(found.classes)) < len(found.classes):
                raise ValueError(f"the classes {found.classes}, one of them twice")
            if found.maps.size and not 0 <= found.maps.min() <= found.maps.max() <= 1:  # false for NaN
                raise ValueError(f"values from {found.maps.min():g} to {found.maps.max():g}, not in [0, 1]")
            return found
        except (TypeError, ValueError) as error:
            raise DataError(f"the maps {path} cannot be read: {error}", REMEDY) from error

    def all_maps(self, image_ids: Iterable[str]) -> Iterator[ClassMaps]:
        """Yield the maps of some images, one at a time."""
        return map(self.read_maps, image_ids)

    def to_do(self, image_ids: Sequence[str], kind: Literal["mask", "maps"] = "mask") -> list[int]:
        """Return the positions of images whose mask is missing or damaged, or whose maps are; every file is read."""
        read, left = self.read_mask if kind == "mask" else self.read_maps, []
        for index, image_id in enumerate(image_ids):
            try:
                read(image_id)
            except DataError:
                left.append(index)
        return left

    def count(self, image_ids: Iterable[str], fact: str) -> Counter[str]:
        """Count the masks of some images by a fact; masks without it count under an empty text."""
        return Counter(self.read_mask(image_id)[1].get(fact, "") for image_id in image_ids)


def read_arrays(path: Path, names: Sequence[str], remedy: str) -> list[np.ndarray]:
    """Return arrays of an `.npz` file by name; nothing in it can run code.

    Raises DataError, with the remedy, when the file is missing or damaged, lacks an array, or unpacks to more than
    `MOST` bytes.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            size = sum(info.file_size for info in stored.zip.infolist())
            if size > MOST:
                raise ValueError(f"it unpacks to {size / 2**30:.1f} GiB, where {MOST / 2**30:.0f} are the most")
            return [stored[name] for name in names]
    except Exception as error:  # zip and NumPy report damage through many types
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}", remedy) from error


def _digest(image_id: str, mask: np.ndarray, facts: dict[str, str]) -> str:
    head = json.dumps([image_id, *mask.shape, sorted(facts.items())]).encode()
    pixels = np.packbits(mask) if mask.dtype == bool else mask
    return hashlib.sha256(head + pixels.tobytes()).hexdigest()


class WithMasks(Derived):
    """A data set with the masks of a store in place of its own, and without any other truth.

    A network that is trained on it cannot see a box or a true mask. Masks of another size than the image are brought to
    it by nearest pixel centre. Values of a stored mask: 0 background, class index + 1 (or true: object), 255 unknown.
    Raises DataError, while reading, for a mask that is missing, damaged or has other values.
    """

    def __init__(self, dataset: LocalizationDataset, store: Store):
        super().__init__(dataset)
        self.store = store

    def __cache_key__(self, reading: Any) -> Any:
        """The data set's key and the store's."""
        return reading.describe([self.dataset, self.store], "masks")

    def read(self, index: int, truth: bool = True) -> Sample:
        """Read the image at `index`, and with `truth` its stored mask (H, W) uint8."""
        sample = self.dataset.read(index, truth=False)
        if not truth:
            return sample
        mask = self.store.read_mask(sample.image_id)[0].astype(np.uint8)
        unknown = mask[(mask > len(self.class_names)) & (mask != IGNORE)]
        if len(unknown):
            path = self.store.path(sample.image_id, ".png")
            raise DataError(f"{path} holds the value {unknown[0]}, which stands for nothing", REMEDY)
        return replace(sample, mask=resize_map(mask, sample.size))
