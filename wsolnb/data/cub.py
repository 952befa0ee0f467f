"""CUB-200-2011 in its native layout, with two optional extensions: a validation split and part maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wsolnb.data.base import FolderDataset, number, read_mask
from wsolnb.data.sample import Sample
from wsolnb.errors import DataError

REMEDY = (
    "CUB_200_2011.tgz is at https://www.vision.caltech.edu/datasets/cub_200_2011/; unpack it and give the folder that "
    "holds images.txt, classes.txt, image_class_labels.txt, train_test_split.txt, bounding_boxes.txt and "
    "images/<class>/<file>.jpg (masks, a second archive, go to segmentations/<class>/<file>.png in the same folder); "
    "`wsolnb data download cub` does all this"
)


class CUB(FolderDataset):
    """CUB-200-2011: single-label images with one box each, masks where `segmentations/` is there.

    root: the folder that holds images.txt, or its parent.
    split: `train`, `val`, `test`, or `trainval` (all that is not test). The published data set has train and test
        only: there `val` is held out from the published train images, `val_fraction` of every class, drawn by `seed`.
        A file `train_val_test_split.txt` (`<image_id> <train|val|test>`) replaces both the published and the held-out
        split.

    Boxes are the published floats, `x, y, x + w, y + h`, neither rounded nor clipped to the image.
    Masks: published segmentations are soft (the share of annotators, 0..255); more than 127 is object.
    Parts: read from `part_maps/<class>/<file>.png` (values of `wsolnb.data.sample`) where that folder exists.

    Raises DataError for missing, damaged or inconsistent files, ParameterError for an unknown split.
    """

    name = "cub"
    remedy = REMEDY

    def __init__(self, root: str | Path, split: str, val_fraction: float = 0.1, seed: int = 0):
        self.open(root, split, "images.txt", "CUB_200_2011")
        self.require(self.root / "images")
        self._has_masks, self._has_parts = ((self.root / name).is_dir() for name in ("segmentations", "part_maps"))

        files = self._records("images.txt", {"image_id": int, "file": str})
        classes = self._records("image_class_labels.txt", {"image_id": int, "class_id": int}, files)
        sides = dict.fromkeys(("x", "y", "width", "height"), number)
        boxes = self._records("bounding_boxes.txt", {"image_id": int, **sides}, files)
        names = self._records("classes.txt", {"class_id": int, "name": str})
        if sorted(names) != list(range(1, len(names) + 1)):
            raise self.problem(f"{self.root / 'classes.txt'}: class ids are not 1..{len(names)}")
        for key, (label,) in classes.items():
            if label not in names:
                path = self.root / "image_class_labels.txt"
                raise self.problem(f"{path} gives image {key} the class {label}; classes.txt has 1..{len(names)}")
        for key, (_, _, width, height) in boxes.items():
            if width <= 0 or height <= 0:
                path = self.root / "bounding_boxes.txt"
                raise self.problem(f"{path}: the box of image {key} has no area ({width:g} x {height:g})")

        keys = self._keys(files, classes, val_fraction, seed)
        if not keys:
            raise self.problem(f"the split {split!r} of {self.root} has no image")
        # `001.Black_footed_Albatross`: the number is the class id, which the index already tells.
        self.class_names = tuple(names[i + 1][0].split(".", 1)[-1] for i in range(len(names)))
        self.image_ids = tuple(files[key][0] for key in keys)
        self.labels = tuple((classes[key][0] - 1,) for key in keys)
        self._boxes = np.array([boxes[key] for key in keys])
        self._boxes[:, 2:] += self._boxes[:, :2]

    def _records(self, name: str, columns: dict, reference: dict | None = None) -> dict:
        """Read one of the tables; `reference` holds the image ids it must be about."""
        path, listed = self.root / name, self.root / "images.txt"
        records = self.records(path, columns)
        if reference is not None:
            self.check_covers(path, records, listed, reference)
            self.check_covers(listed, reference, path, records)
        return records

    def _keys(self, files: dict, classes: dict, val_fraction: float, seed: int) -> list[int]:
        """Return the ids of the split's images, in the order of images.txt."""
        path = self.root / "train_val_test_split.txt"
        if path.exists():
            splits = self._records(path.name, {"image_id": int, "split": str}, files)
            for key, (split,) in splits.items():
                if split not in ("train", "val", "test"):
                    raise DataError(f"{path} puts image {key} into {split!r}", "use train, val or test")
            wanted = ("train", "val") if self.split == "trainval" else (self.split,)
            return [key for key in files if splits[key][0] in wanted]
        is_train = self._records("train_test_split.txt", {"image_id": int, "is_training_image": int}, files)
        published = [key for key in files if is_train[key][0] == (self.split != "test")]
        return [published[i] for i in self.choose([classes[key] for key in published], val_fraction, seed)]

    def image_path(self, index: int) -> Path:
        """Return the file of image `index`."""
        return self.listed(self.root / "images", self.image_ids[index])

    def annotate(self, index: int, sample: Sample) -> None:
        """Add the box, and the mask and parts where their folders exist."""
        sample.boxes = self._boxes[index : index + 1].copy()
        sample.box_labels = np.array(self.labels[index])
        picture = Path(sample.image_id).with_suffix(".png").as_posix()
        if self._has_masks:
            soft = read_mask(self.listed(self.root / "segmentations", picture), self.remedy, sample.size)
            sample.mask = (soft > 127).astype(np.uint8)
        if self._has_parts:
            sample.parts = self.label_map(self.listed(self.root / "part_maps", picture), sample.size)
