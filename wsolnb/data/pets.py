"""Oxford-IIIT Pet in its native layout: breeds of cats and dogs with a trimap of every animal."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wsolnb.data.base import (
    FolderDataset,
    check_split,
    find_root,
    hold_out,
    read_label_map,
    read_records,
    require,
)
from wsolnb.data.sample import IGNORE, Sample, tight_box
from wsolnb.errors import DataError

REMEDY = (
    "images.tar.gz and annotations.tar.gz are at https://www.robots.ox.ac.uk/~vgg/data/pets/; unpack both into one "
    "folder and give that folder: it holds images/*.jpg and annotations/ with list.txt, trainval.txt, test.txt and "
    "trimaps/*.png"
)
FOREGROUND, BACKGROUND, BORDER = 1, 2, 3
"""Values of a trimap."""

_COLUMNS = {"image": str, "class_id": int, "species": int, "breed_id": int}


class OxfordPets(FolderDataset):
    """Oxford-IIIT Pet: single-label images with the mask of the animal and the box around it.

    root: the folder that holds images/ and annotations/.
    split: `train`, `val`, `test`, or `trainval` (all that is not test). The published data set has trainval and test:
        `val` is held out from trainval, `val_fraction` of every breed, drawn by `seed`.

    Classes are the breeds that list.txt names, renumbered 0..n-1 in the order of their published ids, so that a folder
    with some of the 37 breeds is a data set too; a breed is called what its files are called.
    Mask: 1 animal, 0 background, 255 the border that the trimap leaves open.
    Box: the tight box of animal and border; none where a trimap is background only.

    Raises DataError for missing, damaged or inconsistent files, ParameterError for an unknown split.
    """

    name = "pets"
    remedy = REMEDY

    def __init__(self, root: str | Path, split: str, val_fraction: float = 0.2, seed: int = 0):
        check_split(split, ("train", "val", "trainval", "test"), self.name)
        self.root = find_root(root, "annotations/list.txt", [], REMEDY)
        self.split = split
        for folder in ("images", "annotations/trimaps"):
            require(self.root / folder, REMEDY)
        listed = read_records(self.root / "annotations" / "list.txt", _COLUMNS, REMEDY)
        breeds: dict[int, str] = {}
        for image, (class_id, *_) in listed.items():
            breed = image.rpartition("_")[0]
            if breeds.setdefault(class_id, breed) != breed:
                path = self.root / "annotations" / "list.txt"
                raise DataError(f"{path} calls class {class_id} both {breeds[class_id]!r} and {breed!r}", REMEDY)
        index = {class_id: position for position, class_id in enumerate(sorted(breeds))}
        self.class_names = tuple(breeds[class_id] for class_id in index)

        list_path = self.root / "annotations" / ("test.txt" if split == "test" else "trainval.txt")
        rows = read_records(list_path, _COLUMNS, REMEDY)
        for image, row in rows.items():
            if listed.get(image) != row:
                raise DataError(f"{list_path} and list.txt disagree about {image!r}", REMEDY)
        images = list(rows)
        labels = [(index[row[0]],) for row in rows.values()]
        if split in ("train", "val"):
            kept, held = hold_out(labels, val_fraction, seed)
            chosen = kept if split == "train" else held
            images, labels = [images[i] for i in chosen], [labels[i] for i in chosen]
        self.image_ids, self.labels = tuple(images), tuple(labels)

    def image_path(self, index: int) -> Path:
        """Return the file of image `index`."""
        return self.root / "images" / f"{self.image_ids[index]}.jpg"

    def annotate(self, index: int, sample: Sample) -> None:
        """Add mask and box from the trimap."""
        path = self.root / "annotations" / "trimaps" / f"{sample.image_id}.png"
        trimap = read_label_map(path, REMEDY, sample.size, (FOREGROUND, BACKGROUND, BORDER))
        mask_value = np.zeros(BORDER + 1, np.uint8)
        mask_value[[FOREGROUND, BORDER]] = 1, IGNORE
        sample.mask = mask_value[trimap]
        animal = trimap != BACKGROUND
        if animal.any():
            sample.boxes, sample.box_labels = tight_box(animal)[None], np.array(self.labels[index])
