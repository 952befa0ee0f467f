"""Any folder of images described in the metadata format of the WSOL evaluation of Choe et al. (CVPR 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from wsolnb.data.base import FolderDataset, number, read_mask
from wsolnb.data.sample import IGNORE, Sample
from wsolnb.data.transforms import resize, resize_map
from wsolnb.errors import DataError, check_choice

REMEDY = (
    "metadata of CUB, ILSVRC and OpenImages30k are in the folder metadata/ of "
    "https://github.com/clovaai/wsolevaluation, and where to get the images is in its README; metadata_root must hold "
    "<split>/image_ids.txt (a path relative to root per line), class_labels.txt (id,label), and for splits with boxes "
    "or masks localization.txt (id,x0,y0,x1,y1 or id,mask,ignore) and image_sizes.txt (id,width,height); "
    "`wsolnb data list` names the data sets in this form that `wsolnb data download` can get"
)

_CORNERS = dict.fromkeys(("x0", "y0", "x1", "y1"), number)


class MetadataFolder(FolderDataset):
    """Single-label images with boxes or masks, in the metadata format of `wsolevaluation`.

    root: folder that image ids, and mask files, are relative to.
    metadata_root: folder with one subfolder per split.
    split: name of that subfolder: `train`, `val`, `test` (or `train-weaksup`, `train-fullsup`, `test`).
    class_names: names of the classes; default their numbers, up to the largest label of any split.
    proxy: take image_ids_proxy.txt, the small stand-in for a training list.
    square: side in pixels that images with mask files are resized to, as the published evaluation does (224). A mask is
        resized straight from its file by OpenCV's nearest neighbour: pixel floor(i old / new).

    Boxes are the published numbers as they stand: the published evaluation scales x1 and y1 as it scales x0 and y0,
    without adding the last pixel, although most annotations include it (a box to the right edge of a 500-pixel image
    ends at 499). Adding it here would make scores differ from the published ones.
    Masks: 1 where any of an image's mask files is not zero, else 255 where its ignore file is not zero, as in the
    published evaluation: object overrides ignore. The masks of OpenImages have another resolution than the images.
    Without `square` they are sampled at the size of the image, by the nearest pixel centre. A split without
    localization.txt, or with an empty one, has labels only.

    Raises DataError for missing, damaged or inconsistent files, ParameterError for an unknown split.
    """

    name = "metadata"
    remedy = REMEDY

    def __init__(
        self,
        root: str | Path,
        metadata_root: str | Path,
        split: str,
        class_names: Sequence[str] | None = None,
        proxy: bool = False,
        square: int | None = None,
    ):
        self.square = square
        self.root, self.split = self.require(Path(root)), split
        metadata_root = self.require(Path(metadata_root))
        splits = sorted(path.parent.name for path in metadata_root.glob("*/class_labels.txt"))
        if not splits:
            raise self.problem(f"no <split>/class_labels.txt in {metadata_root}")
        check_choice(f"{self.name} {metadata_root} has no split", split, splits)
        self._folder = metadata_root / split

        self._ids_path = self._folder / ("image_ids_proxy.txt" if proxy else "image_ids.txt")
        self.image_ids = tuple(self.records(self._ids_path, {"image_id": str}))
        self.require(self.image_path(0))  # tells a wrong root at once
        columns = {"image_id": str, "label": int}
        labels = self._records("class_labels.txt", columns)
        if class_names is None:
            # A split may lack the last classes, so all of them are looked at for the number of classes.
            lists = [metadata_root / name / "class_labels.txt" for name in splits]
            used = {label for path in lists for _, label in self.table(path, columns, ",")}
            last = max(used)
            if min(used) == 1:
                raise self.problem(
                    f"no image of {metadata_root} has the class 0", "count classes from 0 in class_labels.txt"
                )
            class_names = [str(label) for label in range(last + 1)]
        self.class_names = tuple(class_names)
        for image in self.image_ids:
            if not 0 <= labels[image][0] < len(self.class_names):
                problem = f"{self._folder / 'class_labels.txt'} gives {image!r} the class {labels[image][0]}"
                raise DataError(problem, f"classes must be 0..{len(self.class_names) - 1}")
        self.labels = tuple(labels[image] for image in self.image_ids)

        self._sizes: dict[str, tuple[int, int]] = {}
        if self._has("image_sizes.txt"):
            self._sizes = self._records("image_sizes.txt", {"image_id": str, "width": int, "height": int})
        self._boxes: dict[str, list[tuple]] = {}
        self._masks: dict[str, list[tuple[str, str]]] = {}
        if self._has("localization.txt"):
            self._read_localization(self._folder / "localization.txt")

    def _has(self, name: str) -> bool:
        """Return whether the split has a table; published splits without one have an empty file."""
        path = self._folder / name
        return path.exists() and path.stat().st_size > 0

    def _records(self, name: str, columns: dict) -> dict[str, tuple]:
        """Read a table that has one line for every image of the split; it may have more."""
        records = self.records(self._folder / name, columns, ",")
        self.check_covers(self._folder / name, records, self._ids_path, self.image_ids)
        return records

    def _read_localization(self, path: Path) -> None:
        """Fill the boxes, or else the mask and ignore files ('' for none), of each image."""
        with_boxes = next(iter(self.lines(path).values())).count(",") >= 4
        columns = {"image_id": str, **(_CORNERS if with_boxes else {"mask": str, "ignore": str})}
        found = self._boxes if with_boxes else self._masks
        for image, *row in self.table(path, columns, ","):
            if with_boxes and (row[2] < row[0] or row[3] < row[1]):
                raise self.problem(f"{path}: a box of {image!r} ends before it begins")
            found.setdefault(image, []).append(tuple(row))
        if with_boxes and len(found) > 1 and max(max(row) for rows in found.values() for row in rows) <= 1.5:
            problem = f"all boxes of {path} are in shares of the image's sides, from 0 to 1"
            raise self.problem(problem, "multiply x by the image's width and y by its height in pixels")
        self.check_covers(path, found, self._ids_path, self.image_ids)

    def sources(self) -> list[Path]:
        """The images, and the split's lists."""
        return [self.root, self._folder]

    def image_path(self, index: int) -> Path:
        """Return the file of image `index`."""
        return self.listed(self.root, self.image_ids[index])

    def read(self, index: int, truth: bool = True) -> Sample:
        """Read sample `index`; where it has mask files, at the size `square`."""
        sample = super().read(index, truth)
        if not (self.square and sample.image_id in self._masks):
            return sample
        return replace(resize(replace(sample, mask=None), (self.square, self.square)), mask=sample.mask)

    def annotate(self, index: int, sample: Sample) -> None:
        """Add the boxes or the mask, and check the size of the image against image_sizes.txt."""
        image = sample.image_id
        height, width = sample.size
        if self._sizes and self._sizes[image] != (width, height):
            path, stated = self._folder / "image_sizes.txt", "x".join(map(str, self._sizes[image]))
            raise self.problem(f"{self.image_path(index)} is {width}x{height}, {path} says {stated}")
        if image in self._boxes:
            sample.boxes = np.array(self._boxes[image])
            sample.box_labels = np.full(len(sample.boxes), sample.label)
        if image in self._masks:
            masks, ignores = zip(*self._masks[image], strict=True)
            inside = self._read_union(masks, sample.size)
            ignored = self._read_union(ignores, sample.size)
            sample.mask = np.where(inside, 1, np.where(ignored, IGNORE, 0)).astype(np.uint8)

    def _read_union(self, files: Sequence[str], size: tuple[int, int]) -> np.ndarray:
        """Return where any of the mask files is not zero, (H, W) bool at the size of the image, or at `square`."""
        union = np.zeros((self.square, self.square) if self.square else size, bool)
        for name in filter(None, files):
            path = self.listed(self.root, name)
            values = read_mask(path, self.remedy)
            stretch = (values.shape[1] / size[1]) / (values.shape[0] / size[0])
            if abs(stretch - 1) > 0.02:
                shapes = f"{values.shape[1]}x{values.shape[0]}, its image {size[1]}x{size[0]}"
                raise DataError(f"{path} has another aspect ratio than its image: {shapes}", REMEDY)
            if self.square:
                square, inside = (self.square, self.square), (values > 0).astype(np.uint8)
                union |= cv2.resize(inside, square, interpolation=cv2.INTER_NEAREST) > 0
            else:
                union |= resize_map(values, size) > 0
        return union
