"""PASCAL VOC 2012 in its native layout, with the SBD list that segmentation papers train on."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from wsolnb.data.base import FolderDataset, Stated, number
from wsolnb.data.sample import IGNORE, Sample
from wsolnb.errors import DataError, check_choice

CLASS_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

REMEDY = (
    "VOCtrainval_11-May-2012.tar is at http://host.robots.ox.ac.uk/pascal/VOC/voc2012/; unpack it and give the folder "
    "VOCdevkit/VOC2012, which holds JPEGImages, Annotations, ImageSets and SegmentationClass (the masks of the SBD "
    "list, a second archive, go to SegmentationClassAug in the same folder); `wsolnb data download voc` does all this; "
    "images of your own are read with less around them by `folder` and `csv`"
)


class VOC(FolderDataset):
    """VOC2012: multi-label images with boxes, and masks for the images of the segmentation lists.

    root: VOCdevkit/VOC2012 or one of its two parents.
    split: `train`, `val`, `trainval` or `test`, a list in ImageSets/<image_set>.
    image_set: `Segmentation` (every image has a mask) or `Main` (masks where there is one).
    sbd_list: file that replaces the list of `train` (the 10,582 images known as train_aug); other splits pass over it.
        Each line is an image id, or an image and its mask: `/JPEGImages/x.jpg /SegmentationClassAug/x.png`. With ids
        alone, masks come from SegmentationClassAug, and there are none where that folder is absent.
    difficult: False leaves objects that are marked difficult out of labels and boxes.

    Labels and boxes come from Annotations (there corner pixels are counted from 1 and both are inside; here boxes are
    half-open). If the root lacks that folder, the labels are those of ImageSets/Main/<class>_<split>.txt (1 present, -1
    absent, 0 difficult), and there are no boxes. Without the folder SegmentationClass there are no masks. Without
    ImageSets/Segmentation the lists are those of Main. Classes are the 20 of VOC, or the lines of `class_names.txt`
    where the root has that file.
    Masks: 0 background, class index + 1, 255 not to be counted.
    Parts: read from `PartMaps/<id>.png` (values of `wsolnb.data.sample`) where that folder exists.

    Raises DataError for missing, damaged or inconsistent files, ParameterError for an unknown split or image set.
    """

    name = "voc"
    multi_label = True
    remedy = REMEDY

    def __init__(
        self,
        root: str | Path,
        split: str,
        image_set: str = "Segmentation",
        sbd_list: str | Path | None = None,
        difficult: bool = True,
    ):
        check_choice("no image set", image_set, ("Segmentation", "Main"))
        self.open(root, split, "JPEGImages", "VOC2012", "VOCdevkit/VOC2012")
        own_names = self.root / "class_names.txt"
        self.class_names = tuple(self.lines(own_names).values()) if own_names.exists() else CLASS_NAMES
        self._has_parts = (self.root / "PartMaps").is_dir()
        self._difficult, self._list = difficult, Path(sbd_list) if sbd_list else None

        listed = self._list
        if self._list and split == "train":
            masks = self._read_sbd_list(self._list)
        else:
            lists, folder = self.root / "ImageSets", self.root / "SegmentationClass"
            if not (lists / "Segmentation").is_dir():
                image_set = "Main"
            listed = lists / image_set / f"{split}.txt"
            ids = self.records(listed, {"image_id": str})
            self._check_ids(listed, ids)
            masks = {name: self.listed(folder, name, ".png") for name in ids}
            if image_set == "Main" or not folder.is_dir():
                masks = {name: path if path.exists() else None for name, path in masks.items()}
        self.image_ids, self._masks = tuple(masks), tuple(masks.values())
        self._sizes: list[tuple[int, int] | None] = []
        self._named: list[set[int]] = []
        if (self.root / "Annotations").is_dir():
            self._objects = [self._read_objects(self._annotations(name)) for name in self.image_ids]
            self.labels = tuple(tuple(sorted({label for label, *_ in objects})) for objects in self._objects)
        else:
            self._objects, self.labels = [[] for _ in self.image_ids], self._read_labels(listed)
            self._sizes, self._named = [None] * len(self.labels), [set(own) for own in self.labels]

    def _check_ids(self, listed: Path, ids: Iterable[str]) -> None:
        """Raise DataError for lines of a list that are no ids: with the file's ending, or with a label behind."""
        for name in ids:
            if len(name.split()) > 1:
                problem = f"{listed} has the line {name!r}, where an image id stands alone"
                raise self.problem(problem, "give the list of a split, not that of a class (dog_train.txt)")
            if name.lower().endswith((".jpg", ".jpeg", ".png")):
                raise self.problem(f"{listed} names the file {name!r}", "list image ids, without the ending")

    def _read_labels(self, listed: Path) -> tuple[tuple[int, ...], ...]:
        """Return the classes of every image by the lists of ImageSets/Main, of all splits that exist.

        listed: where the images are from, for messages.
        """
        folder = self.root / "ImageSets" / "Main"
        present: dict[str, set[int]] = {}
        for label, name in enumerate(self.class_names):
            paths = [self.listed(folder, name, f"_{split}.txt") for split in ("train", "val", "trainval", "test")]
            paths = [path for path in paths if path.exists()]
            if not paths:
                alone = f"for labels alone {folder / f'{name}_{self.split}.txt'}"
                raise self.problem(f"missing: {self.root / 'Annotations'}, and {alone}")
            for path in paths:
                for image, value in self.table(path, {"image": str, "present": int}):
                    classes = present.setdefault(image, set())
                    if value == 1 or (value == 0 and self._difficult):
                        classes.add(label)
        self.check_covers(folder, present, listed, self.image_ids)
        return tuple(tuple(sorted(present[image])) for image in self.image_ids)

    def _read_sbd_list(self, path: Path) -> dict[str, Path | None]:
        """Return image id -> mask file of the list."""
        remedy = "give a list of image ids, or of lines '/JPEGImages/x.jpg /SegmentationClassAug/x.png'"
        folder = self.root / "SegmentationClassAug"
        masks: dict[str, Path | None] = {}
        for line in self.lines(path, remedy).values():
            image, *mask = line.split()
            if len(mask) > 1:
                raise DataError(f"{path}: cannot take {line!r} for an image and a mask", remedy)
            name = PurePosixPath(image).stem
            if mask:
                masks[name] = self.listed(self.root, mask[0].lstrip("/"))
            else:
                masks[name] = self.listed(folder, name, ".png") if folder.is_dir() else None
        return masks

    def _annotations(self, name: str) -> Path:
        return self.listed(self.root / "Annotations", name, ".xml")

    def _read_objects(self, path: Path) -> list[tuple[int, float, float, float, float]]:
        """Return (class index, x0, y0, x1, y1) of every object of an image; some published corners are fractions.

        Also keeps the size that the file states, and the classes that it names, those of difficult objects among them.
        """
        try:
            root = ElementTree.parse(self.require(path)).getroot()
        except ElementTree.ParseError as error:
            raise self.problem(f"not well-formed XML: {path}: {error}") from error
        sides = [root.findtext(f"size/{side}") for side in ("height", "width")]
        try:
            self._sizes.append((int(sides[0]), int(sides[1])) if all(sides) else None)
        except ValueError as error:
            raise self.problem(f"{path} states the size {sides[1]} x {sides[0]}") from error
        self._named.append(set())
        objects = []
        for element in root.findall("object"):
            label = element.findtext("name", "").strip()
            if label not in self.class_names:
                raise self.problem(f"{path} has an object of the unknown class {label!r}")
            self._named[-1].add(self.class_names.index(label))
            if not self._difficult and element.findtext("difficult", "0").strip() == "1":
                continue
            # `bndbox` is sought among the children only: the `part` elements of a person carry boxes of their own.
            box = element.find("bndbox")
            try:
                x0, y0, x1, y1 = (number(box.findtext(tag)) for tag in ("xmin", "ymin", "xmax", "ymax"))
            except (AttributeError, TypeError, ValueError) as error:
                raise self.problem(f"{path} has an object without a proper bndbox") from error
            if x1 < x0 or y1 < y0:
                raise self.problem(f"{path} has the box {x0:g}, {y0:g}, {x1:g}, {y1:g}, which ends before it begins")
            if x0 < 0.5 or y0 < 0.5:
                told = f"{path} has the box {x0:g}, {y0:g}, {x1:g}, {y1:g}; VOC counts corners from 1"
                self.tell(
                    "counted from 0", f"{told}: if all are counted from 0, they are read one pixel too far up and left"
                )
            objects.append((self.class_names.index(label), x0 - 1, y0 - 1, x1, y1))
        return objects

    def sources(self) -> list[Path]:
        """The folder, and the list of the enlarged training set where one was given."""
        return [self.root, *([self._list] if self._list else [])]

    def image_path(self, index: int) -> Path:
        """Return the file of image `index`."""
        return self.listed(self.root / "JPEGImages", self.image_ids[index], ".jpg")

    def stated(self, index: int) -> Stated | None:
        """Return the size that the annotations give for image `index`."""
        size = self._sizes[index]
        return Stated(size, self._annotations(self.image_ids[index])) if size else None

    def annotate(self, index: int, sample: Sample) -> None:
        """Add the boxes, and the mask and parts where there are files of them."""
        objects = np.array(self._objects[index], dtype=np.float64).reshape(-1, 5)
        sample.boxes, sample.box_labels = objects[:, 1:], objects[:, 0].astype(np.int64)
        mask = self._masks[index]
        if mask is not None:
            sample.mask = self.label_map(mask, sample.size, (*range(len(self.class_names) + 1), IGNORE))
            if mask.parent.name == "SegmentationClass":  # the enlarged set's masks have other annotators
                self._check_classes(mask, sample.mask, index)
        if self._has_parts:
            sample.parts = self.label_map(self.listed(self.root / "PartMaps", sample.image_id, ".png"), sample.size)

    def _check_classes(self, path: Path, mask: np.ndarray, index: int) -> None:
        """Raise DataError when no class of a mask is named by the image's annotations: they are of something else."""
        found = {int(value) - 1 for value in np.unique(mask) if value not in (0, IGNORE)}
        if found and not found & self._named[index]:
            classes, there = (", ".join(self.class_names[c] for c in sorted(s)) for s in (found, self._named[index]))
            problem = f"{path} shows {classes}, {self._annotations(self.image_ids[index])} names {there or 'nothing'}"
            raise self.problem(
                problem, "give masks of classes (SegmentationClass), not of objects (SegmentationObject)"
            )
