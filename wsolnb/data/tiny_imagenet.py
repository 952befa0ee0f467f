"""Tiny-ImageNet-200 in its native layout: 64 x 64 pixels, one box an image."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wsolnb.data.base import (
    FolderDataset,
    check_split,
    find_root,
    hold_out,
    number,
    read_lines,
    read_records,
    require,
)
from wsolnb.data.sample import Sample
from wsolnb.errors import DataError

REMEDY = (
    "tiny-imagenet-200.zip is at http://cs231n.stanford.edu/tiny-imagenet-200.zip (research use only); unpack it and "
    "give the folder that holds wnids.txt, words.txt, train/<wnid>/<wnid>_boxes.txt with train/<wnid>/images/*.JPEG, "
    "and val/val_annotations.txt with val/images/*.JPEG"
)

_CORNERS = dict.fromkeys(("x0", "y0", "x1", "y1"), number)


class TinyImageNet(FolderDataset):
    """Tiny-ImageNet: single-label images with one box each.

    root: the folder that holds wnids.txt.
    split: `train`, `val`, `test`, or `trainval` (all of the published train images). The labels of the published test
        images are not public, so `test` is the published *val*, and `val` is held out from the published train
        images, `val_fraction` of every class, drawn by `seed`.

    Classes are numbered in the order of wnids.txt, which may name some of the 200 only, and called by the first word
    that words.txt has for them (by their wnid where it has none). Published boxes contain both of their corner pixels;
    half-open here.

    Raises DataError for missing, damaged or inconsistent files, ParameterError for an unknown split.
    """

    name = "tiny_imagenet"
    remedy = REMEDY

    def __init__(self, root: str | Path, split: str, val_fraction: float = 0.1, seed: int = 0):
        check_split(split, ("train", "val", "trainval", "test"), self.name)
        self.root = find_root(root, "wnids.txt", ["tiny-imagenet-200"], REMEDY)
        self.split = split
        wnids = read_lines(self.root / "wnids.txt", REMEDY)
        words = read_records(self.root / "words.txt", {"wnid": str, "words": str}, REMEDY, separator="\t")
        self.class_names = tuple(words.get(wnid, (wnid,))[0].split(",")[0] for wnid in wnids)
        self._folders = tuple(self.root / "train" / wnid / "images" for wnid in wnids)

        if split == "test":
            images, labels, boxes = self._read_val(wnids)
        else:
            images, labels, boxes = self._read_train(wnids)
        if split in ("train", "val"):
            kept, held = hold_out(labels, val_fraction, seed)
            chosen = kept if split == "train" else held
            images, labels, boxes = ([column[i] for i in chosen] for column in (images, labels, boxes))
        self.image_ids, self.labels = tuple(images), tuple(labels)
        self._boxes = np.array(boxes, dtype=np.float64)
        self._boxes[:, 2:] += 1

    def _read_train(self, wnids: list[str]) -> tuple[list[str], list[tuple[int]], list[tuple]]:
        images, labels, boxes = [], [], []
        for label, wnid in enumerate(wnids):
            require(self._folders[label], REMEDY)
            path = self.root / "train" / wnid / f"{wnid}_boxes.txt"
            rows = read_records(path, {"image": str, **_CORNERS}, REMEDY)
            for image, box in rows.items():
                _check_corners(path, image, box)
            images += rows
            labels += [(label,)] * len(rows)
            boxes += rows.values()
        return images, labels, boxes

    def _read_val(self, wnids: list[str]) -> tuple[list[str], list[tuple[int]], list[tuple]]:
        require(self.root / "val" / "images", REMEDY)
        path = self.root / "val" / "val_annotations.txt"
        rows = read_records(path, {"image": str, "wnid": str, **_CORNERS}, REMEDY)
        index = {wnid: label for label, wnid in enumerate(wnids)}
        for image, (wnid, *box) in rows.items():
            if wnid not in index:
                raise DataError(f"{path} gives {image!r} the class {wnid!r}, which is not in wnids.txt", REMEDY)
            _check_corners(path, image, box)
        return list(rows), [(index[row[0]],) for row in rows.values()], [row[1:] for row in rows.values()]

    def image_path(self, index: int) -> Path:
        """Return the file of image `index`."""
        folder = self.root / "val" / "images" if self.split == "test" else self._folders[self.labels[index][0]]
        return folder / self.image_ids[index]

    def annotate(self, index: int, sample: Sample) -> None:
        """Add the box."""
        sample.boxes, sample.box_labels = self._boxes[index : index + 1].copy(), np.array(self.labels[index])


def _check_corners(path: Path, image: str, box: tuple) -> None:
    x0, y0, x1, y1 = box
    if x1 < x0 or y1 < y0:
        raise DataError(f"{path}: the box of {image!r} ends before it begins", REMEDY)
