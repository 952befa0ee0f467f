"""Tiny-ImageNet-200 in its native layout: 64 x 64 pixels, one box an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wsolnb.data.base import FolderDataset, number
from wsolnb.data.sample import Sample

REMEDY = (
    "tiny-imagenet-200.zip is at http://cs231n.stanford.edu/tiny-imagenet-200.zip (research use only); unpack it and "
    "give the folder that holds wnids.txt, words.txt, train/<wnid>/<wnid>_boxes.txt with train/<wnid>/images/*.JPEG, "
    "and val/val_annotations.txt with val/images/*.JPEG; `wsolnb data download tiny_imagenet` does all this"
)

_CORNERS = dict.fromkeys(("x0", "y0", "x1", "y1"), number)


class TinyImageNet(FolderDataset):
    """Tiny-ImageNet: single-label images with one box each.

    root: the folder that holds wnids.txt.
    split: `train` (all published train images), `val`, `test`, or `trainval` (train and val). The labels of the
        published test images are not public, so the published val images serve as both. In each class the images at
        even places of `val_annotations.txt` are `val`, on which choices are made, and the others are `test`.

    Classes are numbered in the order of wnids.txt, which may name some of the 200 only, and called by the first word
    that words.txt has for them (by their wnid where it has none). Published boxes contain both of their corner pixels;
    half-open here.

    Raises DataError for missing, damaged or inconsistent files, ParameterError for an unknown split.
    """

    name = "tiny_imagenet"
    remedy = REMEDY

    def __init__(self, root: str | Path, split: str):
        self.open(root, split, "wnids.txt", "tiny-imagenet-200")
        wnids = list(self.records(self.root / "wnids.txt", {"wnid": str}))
        words = self.records(self.root / "words.txt", {"wnid": str, "words": str}, separator="\t")
        self.class_names = tuple(words.get(wnid, (wnid,))[0].split(",")[0] for wnid in wnids)
        self._folders = tuple(self.listed(self.root / "train", wnid) / "images" for wnid in wnids)

        index = {wnid: label for label, wnid in enumerate(wnids)}
        rows = self._read_train(wnids) if split.startswith("train") else []
        held = self._read_val() if split != "train" else []
        for path, image, wnid, x0, y0, x1, y1 in rows + held:
            if wnid not in index:
                raise self.problem(f"{path} gives {image!r} the class {wnid!r}, which is not in wnids.txt")
            if x1 < x0 or y1 < y0:
                raise self.problem(f"{path}: the box of {image!r} ends before it begins")
        self._published = len(rows)  # as train images; those that follow, as val images
        rows += [held[i] for i in alternate([row[2] for row in held])[split == "test"]]
        if not rows:
            raise self.problem(f"{self.root} has no image for the split {split!r}")
        self.image_ids, self.labels = tuple(row[1] for row in rows), tuple((index[row[2]],) for row in rows)
        self._boxes = np.array([row[3:] for row in rows], dtype=np.float64)
        self._boxes[:, 2:] += 1

    def _read_train(self, wnids: list[str]) -> list[tuple]:
        """Return (list, image, wnid, *corners) of every published train image."""
        rows = []
        for wnid, folder in zip(wnids, self._folders, strict=True):
            path = self.require(folder).parent / f"{wnid}_boxes.txt"
            rows += [(path, image, wnid, *box) for image, box in self.records(path, {"image": str, **_CORNERS}).items()]
        return rows

    def _read_val(self) -> list[tuple]:
        """The same of every published val image."""
        self.require(self.root / "val" / "images")
        path = self.root / "val" / "val_annotations.txt"
        columns = {"image": str, "wnid": str, **_CORNERS}
        return [(path, image, *row) for image, row in self.records(path, columns).items()]

    def image_path(self, index: int) -> Path:
        """Return the file of image `index`."""
        train = index < self._published
        folder = self._folders[self.labels[index][0]] if train else self.root / "val" / "images"
        return self.listed(folder, self.image_ids[index])

    def annotate(self, index: int, sample: Sample) -> None:
        """Add the box."""
        sample.boxes, sample.box_labels = self._boxes[index : index + 1].copy(), np.array(self.labels[index])


def alternate(labels: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the positions at even and at odd places among the images of their label, each in ascending order."""
    seen: Counter[str] = Counter()
    halves: tuple[list[int], list[int]] = [], []
    for position, label in enumerate(labels):
        halves[seen[label] % 2].append(position)
        seen[label] += 1
    return halves
