"""Oxford-IIIT Pet in its native layout: breeds of cats and dogs with a trimap of every animal."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wsolnb.data.base import FolderDataset
from wsolnb.data.sample import IGNORE, Sample, tight_box

REMEDY = (
    "images.tar.gz and annotations.tar.gz are at https://www.robots.ox.ac.uk/~vgg/data/pets/; unpack both into one "
    "folder and give that folder: it holds images/*.jpg and annotations/ with list.txt, trainval.txt, test.txt and "
    "trimaps/*.png; `wsolnb data download pets` does all this"
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
        self.open(root, split, "annotations/list.txt")
        annotations = self.root / "annotations"
        for folder in (self.root / "images", annotations / "trimaps"):
            self.require(folder)
        listed = self.records(annotations / "list.txt", _COLUMNS)
        breeds: dict[int, str] = {}
        for image, (class_id, *_) in listed.items():
            breed = image.rpartition("_")[0]
            if breeds.setdefault(class_id, breed) != breed:
                path = annotations / "list.txt"
                raise self.problem(f"{path} calls class {class_id} both {breeds[class_id]!r} and {breed!r}")
        index = {class_id: position for position, class_id in enumerate(sorted(breeds))}
        self.class_names = tuple(breeds[class_id] for class_id in index)

        path = annotations / ("test.txt" if split == "test" else "trainval.txt")
        rows = self.records(path, _COLUMNS)
        for image, row in rows.items():
            if listed.get(image) != row:
                raise self.problem(f"{path} and list.txt disagree about {image!r}")
        images, labels = list(rows), [(index[row[0]],) for row in rows.values()]
        chosen = self.choose(labels, val_fraction, seed)
        self.image_ids, self.labels = tuple(images[i] for i in chosen), tuple(labels[i] for i in chosen)

    def image_path(self, index: int) -> Path:
        """Return the file of image `index`."""
        return self.listed(self.root / "images", self.image_ids[index], ".jpg")

    def annotate(self, index: int, sample: Sample) -> None:
        """Add mask and box from the trimap."""
        path = self.listed(self.root / "annotations" / "trimaps", sample.image_id, ".png")
        trimap = self.label_map(path, sample.size, (FOREGROUND, BACKGROUND, BORDER))
        mask_value = np.zeros(BORDER + 1, np.uint8)
        mask_value[[FOREGROUND, BORDER]] = 1, IGNORE
        sample.mask = mask_value[trimap]
        animal = trimap != BACKGROUND
        if animal.any():
            sample.boxes, sample.box_labels = tight_box(animal)[None], np.array(self.labels[index])
