"""MS COCO in its native layout: multi-label images with boxes, and semantic masks painted from the instances."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from wsolnb.data.base import FolderDataset, Stated, number
from wsolnb.data.sample import IGNORE, Sample
from wsolnb.errors import check_choice

REMEDY = (
    "train2014.zip, val2014.zip and annotations_trainval2014.zip are at https://cocodataset.org/#download; unpack them "
    "into one folder and give it: it holds annotations/instances_train2014.json and train2014/COCO_train2014_*.jpg; "
    "`wsolnb data download coco` does all this"
)


class COCO(FolderDataset):
    """MS COCO: 80 classes, several an image.

    root: the folder that holds `annotations/`; images lie in `<part><year>/` beside it, or in `images/<part><year>/`.
    split: `train`, `val`, `trainval` or `test`. Only the published train and val images have annotations: `test` is the
        published *val*, which papers report on; `val` is held out from the published train images, `val_fraction` of
        them, drawn by `seed`; `trainval` are all of these.
    year: of the file names, 2014 or 2017. crowd: what regions marked `iscrowd` are in masks, `ignore` (255) or their
        `class`. empty: keep images without any object (with `labels` ()); weakly supervised training leaves them out.

    Classes are the categories of the annotation file by ascending id (which has gaps). Boxes are the published
    `x, y, x + w, y + h`. Masks: 0 background, class index + 1; larger instances are painted first, so that what is
    small, and mostly in front, stays visible; a pixel belongs to a polygon if its centre does. If an object has a box
    alone (`segmentation` empty), the pixels of the box are 255. The id of an image is its file name without the ending;
    folders in front of it are kept.

    The annotations of 2014's train part take about 2 GB of memory while they are read.
    Raises DataError for missing, damaged or inconsistent files, ParameterError for an unknown split or option.
    """

    name = "coco"
    multi_label = True
    remedy = REMEDY

    def __init__(
        self,
        root: str | Path,
        split: str,
        year: int = 2014,
        val_fraction: float = 0.05,
        seed: int = 0,
        crowd: Literal["ignore", "class"] = "ignore",
        empty: bool = False,
    ):
        check_choice("no treatment of crowds", crowd, ("ignore", "class"))
        self.open(root, split, "annotations", "coco", f"coco{year}")
        self._crowd = crowd
        folder = f"{'val' if split == 'test' else 'train'}{year}"
        self._file = self.require(self.root / "annotations" / f"instances_{folder}.json")
        beside = self.root / folder
        self._images = beside if beside.is_dir() else self.require(self.root / "images" / folder)

        content = self._read()
        names = {self._get(c, "id", int): str(self._get(c, "name", str)) for c in content["categories"]}
        self._check_distinct("categories", content["categories"], "id", "name")
        order = {key: index for index, key in enumerate(sorted(names))}
        self.class_names = tuple(names[key] for key in order)
        images = {self._get(image, "id", int): image for image in content["images"]}
        self._check_distinct("images", content["images"], "id", "file_name")
        objects: dict[int, list[dict]] = {key: [] for key in images}
        for annotation in content["annotations"]:
            for name, key, known in (("image", "image_id", images), ("category", "category_id", order)):
                if self._get(annotation, key, int) not in known:
                    value = annotation[key]
                    raise self.problem(f"{self._file} has an object of {name} {value}, which it does not list")
            objects[annotation["image_id"]].append(annotation)
        keys = [key for key in sorted(images) if empty or objects[key]]
        labels = [tuple(sorted({order[a["category_id"]] for a in objects[key]})) for key in keys]
        chosen = self.choose(labels, val_fraction, seed)
        if not chosen:
            raise self.problem(f"the split {split!r} of {self._file} has no image")
        keys, self.labels = [keys[i] for i in chosen], tuple(labels[i] for i in chosen)
        self._names = tuple(str(self._get(images[key], "file_name", str)) for key in keys)
        self.image_ids = tuple(PurePosixPath(name).with_suffix("").as_posix() for name in self._names)
        self._sizes = [tuple(images[key].get(side) for side in ("height", "width")) for key in keys]
        fields = ("bbox", "segmentation", "iscrowd", "area")
        self._objects = [
            [(order[a["category_id"]], *(a.get(name) for name in fields)) for a in objects[key]] for key in keys
        ]

    def _read(self) -> dict[str, list[dict]]:
        try:
            content = json.loads(self._file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise self.problem(f"cannot read {self._file}: {error}") from error
        for name in ("images", "annotations", "categories"):
            if not isinstance(content, dict) or not isinstance(content.get(name), list):
                raise self.problem(f"{self._file} has no list {name!r}")
        return content

    def _get(self, entry: Any, name: str, kind: type) -> Any:
        if not isinstance(entry, dict) or name not in entry:
            raise self.problem(f"{self._file} has an entry without {name!r}: {str(entry)[:80]}")
        if not isinstance(entry[name], kind):
            wanted = "a whole number" if kind is int else "text"
            raise self.problem(f"{self._file} has an entry whose {name!r} is {entry[name]!r}, not {wanted}")
        return entry[name]

    def _check_distinct(self, what: str, entries: Sequence[dict], *names: str) -> None:
        """Raise DataError for a value that two entries of a list share, where it has to tell them apart."""
        for name in names:
            counts = Counter(self._get(entry, name, int if name == "id" else str) for entry in entries)
            for value, count in counts.most_common(1):
                if count > 1:
                    raise self.problem(f"{self._file} has {count} {what} with the {name} {value!r}")

    def image_path(self, index: int) -> Path:
        """Return the file of image `index`."""
        return self.listed(self._images, self._names[index])

    def stated(self, index: int) -> Stated | None:
        """Return the size that the annotations give for image `index`."""
        return Stated(self._sizes[index], self._file) if all(self._sizes[index]) else None

    def annotate(self, index: int, sample: Sample) -> None:
        """Add boxes and the semantic mask."""
        boxes, labels, painted = [], [], []
        for label, box, shape, crowd, area in self._objects[index]:
            where = f"{self._file}: image {self.image_ids[index]}"
            try:
                x, y, width, height = (number(value) for value in box)
                area = number(area)
            except (TypeError, ValueError) as error:
                raise self.problem(f"{where} has an object without a proper bbox and area") from error
            if width < 0 or height < 0:
                raise self.problem(f"{where} has the bbox {box}, of a negative side; it is x, y, width, height")
            if crowd not in (0, 1, None):  # the text "0" would count as true
                raise self.problem(f"{where} has an object whose iscrowd is {crowd!r}, neither 0 nor 1")
            if not crowd:  # the box of a crowd is of no object
                boxes.append((x, y, x + width, y + height))
                labels.append(label)
            value = IGNORE if crowd and self._crowd == "ignore" else label + 1
            try:
                region = decode_segmentation(shape, sample.size)
            except ValueError as error:
                raise self.problem(f"{where} has a segmentation that {error}") from error
            if shape == []:  # a box alone: which of its pixels are the object's nobody knows
                value = IGNORE
                rows, columns = (slice(max(0, int(a)), math.ceil(a + n)) for a, n in ((y, height), (x, width)))
                region[rows, columns] = True
            # Boxes alone and crowds first: single objects in front of them are known.
            painted.append((not crowd and shape != [], -area, value, region))
        sample.boxes = np.array(boxes, np.float64).reshape(-1, 4)
        sample.box_labels = np.array(labels, np.int64)
        sample.mask = np.zeros(sample.size, np.uint8)
        for *_, value, region in sorted(painted, key=lambda entry: entry[:2]):
            sample.mask[region] = value


# ------------------------------------------------------------------------------------------------------ segmentations


def decode_segmentation(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Return the pixels (H, W) bool of a COCO segmentation: polygons, or run lengths as a list or as text.

    Raises ValueError that says what it is not, for anything else.
    """
    if isinstance(segmentation, list):
        region = np.zeros(size, bool)
        for points in segmentation:
            region |= polygon_mask(points, size)
            x, y = np.array(points[0::2]), np.array(points[1::2])
            if min(x.max(), y.max()) < -1 or x.min() > size[1] + 1 or y.min() > size[0] + 1:
                problem = f"has a polygon from {x.min():g}, {y.min():g} on, outside of {size[1]}x{size[0]} pixels"
                raise ValueError(problem)
        return region
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise ValueError("is neither a list of polygons nor run lengths")
    if list(segmentation.get("size", ())) != list(size):
        raise ValueError(f"is of size {segmentation.get('size')}, its image {list(size)}")
    counts = segmentation["counts"]
    if isinstance(counts, str):
        counts = run_lengths(counts)
    if not all(isinstance(count, int) and count >= 0 for count in counts) or sum(counts) != size[0] * size[1]:
        raise ValueError(f"has run lengths of {sum(counts)} pixels instead of {size[0] * size[1]}")
    # Runs of 0, 1, 0, ... down the columns, one column after the other.
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return values.reshape(size[1], size[0]).T


def run_lengths(text: str) -> list[int]:
    """Return the run lengths that COCO's compressed text stands for.

    A number is written in groups of five bits, lowest first, each as one character from '0' on; the sixth bit says that
    more follow, and the fifth of the last group is the sign. From the fourth number on, what is written is the
    difference to the number two before it.
    Raises ValueError for a character out of range and for text that ends inside of a number.
    """
    counts: list[int] = []
    value, shift = 0, 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64:
            raise ValueError(f"holds {character!r}, which is no run length")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise ValueError("ends inside of a run length")
    return counts


def polygon_mask(points: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """Return the pixels (H, W) bool whose centres are inside of a polygon `x0, y0, x1, y1, ...` (even-odd rule).

    Raises ValueError for fewer than three points, an odd number of coordinates, or what is no number.
    """
    try:
        corners = np.asarray(points, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("has coordinates that are no numbers") from error
    if corners.ndim != 1 or corners.size < 6 or corners.size % 2 or not np.isfinite(corners).all():
        raise ValueError(f"has a polygon of {corners.size} coordinates")
    x0, y0 = corners[0::2], corners[1::2]
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    height, width = size
    centres = np.arange(height)[:, None] + 0.5
    # An edge crosses the rows whose centres lie between its ends, the upper end included: corners count once.
    row, edge = np.nonzero((np.minimum(y0, y1) <= centres) & (centres < np.maximum(y0, y1)))
    share = (row + 0.5 - y0[edge]) / (y1[edge] - y0[edge])
    crossing = x0[edge] + share * (x1[edge] - x0[edge])
    column = np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)
    turns = np.zeros((height, width + 1), np.int64)
    np.add.at(turns, (row, column), 1)
    return turns[:, :width].cumsum(axis=1) % 2 == 1
