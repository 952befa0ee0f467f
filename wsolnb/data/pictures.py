"""Images of your own: files, folders, arrays or images of Pillow, without any truth.

    pictures = Pictures(find_images(["cat.jpg", "holidays/"]).files)
    pictures[0].image  # (H, W, 3) uint8, upright

Files of a camera, a scanner or another program become upright 8-bit RGB here. Nothing is guessed: an image that could
be read in more than one way is an error that names the image.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from wsolnb.data.base import LocalizationDataset, eight_bits, read_image, upright_rgb
from wsolnb.data.sample import Sample
from wsolnb.errors import DataError

Picture = str | os.PathLike[str] | np.ndarray | Image.Image
"""What an image can be given as."""

REMEDY = "give a whole image file that Pillow reads, such as JPEG, PNG, TIFF or WebP"
TYPES = (
    "give a path, an image of Pillow, or an array (H, W), (H, W, 3) or (H, W, 4): uint8, uint16, or floats in [0, 1]"
)


def _array(values: np.ndarray) -> np.ndarray:
    grey = values.ndim == 2
    if not values.size or not (grey or (values.ndim == 3 and values.shape[2] in (1, 3, 4))):
        raise DataError(f"an array of shape {values.shape}", TYPES)
    found = eight_bits(values)
    found = found if grey or found.shape[2] > 1 else found[:, :, 0]
    return np.array(upright_rgb(Image.fromarray(np.ascontiguousarray(found))))


def read_picture(picture: Picture, name: str) -> np.ndarray:
    """Return a picture as (H, W, 3) uint8 RGB, upright; see `upright_rgb`.

    name: what errors call an image that is not a file. Raises DataError, which names it, for an image that cannot be
    read.
    """
    if not isinstance(picture, (str, os.PathLike, np.ndarray, Image.Image)):
        raise DataError(f"{name} is a {type(picture).__name__}, no image", TYPES)
    try:
        with warnings.catch_warnings():
            # What Pillow says of large images (much larger ones it refuses), and of a damaged EXIF block.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if isinstance(picture, np.ndarray):
                return _array(picture)
            if isinstance(picture, Image.Image):
                return np.array(upright_rgb(picture))
            return read_image(Path(picture), REMEDY, convert=upright_rgb)
    except DataError as error:
        if isinstance(picture, (str, os.PathLike)) and str(picture) in error.problem:
            raise
        raise DataError(f"{name}: {error.problem}", error.remedy) from error
    except MemoryError as error:
        raise DataError(f"{name} does not fit into memory", "give a smaller copy of it") from error
    except (OSError, SyntaxError, ValueError) as error:  # of a lazily opened image of Pillow
        raise DataError(f"{name} cannot be decoded: {error}", REMEDY) from error


class Found(NamedTuple):
    """What lies at some paths.

    files: to be read as images. passed: files in folders that are no images by their names. empty: folders without one.
    """

    files: list[Path]
    passed: list[Path]
    empty: list[Path]


def find_images(paths: Iterable[str | os.PathLike[str]], without: Path | None = None) -> Found:
    """Return the files of paths, and of folders all images in and below them, in alphabetical order; each once.

    A file that is named itself is taken whatever it is. In folders the ending of the name decides; hidden files, and
    what lies in the folder `without`, do not count.
    Raises DataError where there is no image at all.
    """
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    endings -= {".pdf", ".eps", ".ps"}
    files: dict[Path, Path] = {}
    passed: list[Path] = []
    empty: list[Path] = []
    excluded = without.resolve() if without else None
    for path in map(Path, paths):
        if not path.is_dir():
            files.setdefault(path.resolve(), path)
            continue
        found = 0
        for inside in sorted(path.rglob("*")):
            hidden = any(part.startswith(".") for part in inside.relative_to(path).parts)
            if hidden or not inside.is_file() or (excluded and inside.resolve().is_relative_to(excluded)):
                continue
            if inside.suffix.lower() in endings:
                files.setdefault(inside.resolve(), inside)
                found += 1
            else:
                passed.append(inside)
        if not found:
            empty.append(path)
    if not files:
        problem = f"no image in the folder {empty[0]}" if empty else "no image was given"
        raise DataError(problem, "name image files, or folders of them")
    return Found(list(files.values()), passed, empty)


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each path, good for a file of its own: the stem, behind as many folders as make it unique.

    Names that differ only in case count as equal. Files of one folder that differ in their ending keep the ending in
    the name, or get a number.
    """
    parts = [[*path.parent.parts, path.stem] for path in paths]
    parts = [[part.strip("/\\:").replace("..", "") for part in own] for own in parts]
    names = [own[-1] for own in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        counts = Counter(name.lower() for name in names)
        if max(counts.values()) == 1:
            break
        for place, name in enumerate(names):
            if counts[name.lower()] > 1:
                names[place] = "_".join(part for part in parts[place][-depth:] if part)
    counts = Counter(name.lower() for name in names)
    names = [f"{n}{path.suffix}" if counts[n.lower()] > 1 else n for n, path in zip(names, paths, strict=True)]
    taken: set[str] = set()
    for place, name in enumerate(names):
        number, unique = 2, name
        while unique.lower() in taken:
            unique, number = f"{name}_{number}", number + 1
        taken.add(unique.lower())
        names[place] = unique
    return names


class Pictures(LocalizationDataset):
    """Images of your own as a data set: no truth, and no class until `labels` are set.

    images: paths, arrays or images of Pillow. A file is called by its path, others `image 1`, `image 2`, ...
    class_names: of the network that looks at them.
    """

    name, split, multi_label, root = "pictures", "test", True, Path()

    def __init__(self, images: Sequence[Picture], class_names: Sequence[str] = ()):
        self.images, self.class_names = list(images), tuple(class_names)
        named = ((os.fspath(p) if isinstance(p, (str, os.PathLike)) else None) for p in self.images)
        self.image_ids = tuple(name or f"image {number}" for number, name in enumerate(named, start=1))
        self.labels: tuple[tuple[int, ...], ...] = ((),) * len(self.images)

    def read(self, index: int, truth: bool = True) -> Sample:
        """Read image `index`; DataError, which names it, where that cannot be done."""
        picture: Any = self.images[index]
        name = self.image_ids[index]
        return Sample(read_picture(picture, name), name, self.labels[index])
