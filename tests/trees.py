"""Small trees of the data sets in their true layouts, with what the full ones hold now and then.

    root = trees.WRITERS["voc"](folder)  # what `-p data_root=` takes

Each tree has grey and CMYK images, images of different sizes, upright ones among them, and a class that no image of one
split shows. Names have spaces or letters beyond ASCII where the format allows them. Objects are ellipses in their
class's colour on a noisy ground, so that a network can learn something, and true boxes and masks are known.
"""

from __future__ import annotations

import colorsys
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from wsolnb.data.voc import CLASS_NAMES

SIZES = ((52, 72), (72, 52), (48, 64), (64, 64))
"""Heights and widths of the images, in turns."""
MODES = {1: "L", 2: "CMYK"}
"""Modes of an image file by its number modulo 7; the others are RGB."""


@dataclass(frozen=True)
class Drawn:
    """An image with several objects. classes, boxes: of each object, half-open x0, y0, x1, y1. objects: their numbers
    from 1, those that are drawn later in front, 0 background."""

    pixels: np.ndarray
    classes: tuple[int, ...]
    boxes: tuple[tuple[int, int, int, int], ...]
    objects: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        return self.objects.shape

    def labels(self, border: bool = True) -> np.ndarray:
        """Return class + 1 of every pixel, and 255 around the objects."""
        values = np.array([0, *(label + 1 for label in self.classes)], np.uint8)[self.objects]
        if border:
            values[outline(self.objects)] = 255
        return values


def outline(objects: np.ndarray) -> np.ndarray:
    """Return the pixels (H, W) bool of which a neighbour to the right or below is of another object."""
    edge = np.zeros(objects.shape, bool)
    edge[:-1] |= objects[:-1] != objects[1:]
    edge[:, :-1] |= objects[:, :-1] != objects[:, 1:]
    return edge


def draw(number: int, classes: Sequence[int], size: tuple[int, int] | None = None) -> Drawn:
    """Return the image of a number: an ellipse for each of the classes, in their order."""
    rng = np.random.default_rng(number)
    height, width = size or SIZES[number % len(SIZES)]
    pixels = rng.normal(110, 25, (height, width, 3))
    y, x = np.mgrid[:height, :width]
    objects, boxes = np.zeros((height, width), np.uint8), []
    for count, label in enumerate(classes, start=1):
        radii = rng.uniform(0.14, 0.28, 2) * (height, width)
        centre = rng.uniform(radii + 1, np.array([height, width]) - radii - 1)
        inside = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1
        colour = np.array(colorsys.hsv_to_rgb(0.618 * label % 1, 0.9, 0.9)) * 255
        pixels[inside] = colour + rng.normal(0, 12, (int(inside.sum()), 3))
        objects[inside] = count
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        boxes.append((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    return Drawn(pixels.clip(0, 255).astype(np.uint8), tuple(classes), tuple(boxes), objects)


def save(path: Path, drawn: Drawn, number: int, file_format: str = "JPEG") -> None:
    """Write an image; some of them are grey, some CMYK."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(drawn.pixels)
    mode = MODES.get(number % 7, "RGB") if file_format == "JPEG" else "RGB"
    picture.convert(mode).save(path, file_format, **({"quality": 92} if file_format == "JPEG" else {}))


def save_values(path: Path, values: np.ndarray, palette: bool = False) -> None:
    """Write a map of values as PNG, with a palette where the data set has one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values.astype(np.uint8))
    if palette:
        picture.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes())
    picture.save(path)


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


class Single(NamedTuple):
    """An image of one class for a split, with its number."""

    number: int
    split: str
    label: int


def single(counts: dict[str, Sequence[int]]) -> Iterator[Single]:
    """Yield images by split and class. counts: of each class, by split."""
    number = 0
    for split, of_class in counts.items():
        for label, count in enumerate(of_class):
            for _ in range(count):
                yield Single(number, split, label)
                number += 1


def cub(folder: Path) -> Path:
    """CUB-200-2011 with its segmentations, four classes. The last one has no test image."""
    root = folder / "CUB_200_2011"
    names = ("001.Black_footed_Albatross", "002.Grèbe à cou noir", "003.Sooty_Albatross", "004.Groove_billed_Ani")
    tables: dict[str, list[str]] = {}
    for number, split, label in single({"train": (6, 6, 5, 5), "test": (4, 4, 4, 0)}):
        drawn, image, key = draw(number, [label]), f"{names[label]}/{names[label][4:]}_{number:04d}.jpg", number + 1
        x0, y0, x1, y1 = drawn.boxes[0]
        save(root / "images" / image, drawn, number)
        soft = np.where(drawn.objects, 255, 0)
        soft[outline(drawn.objects)] = 102  # two of five annotators
        save_values(root / "segmentations" / Path(image).with_suffix(".png"), soft)
        for name, row in (
            ("images", image),
            ("image_class_labels", label + 1),
            ("train_test_split", int(split == "train")),
            ("bounding_boxes", f"{x0}.0 {y0}.0 {x1 - x0}.0 {y1 - y0}.0"),
        ):
            tables.setdefault(name, []).append(f"{key} {row}")
    tables["classes"] = [f"{index} {name}" for index, name in enumerate(names, start=1)]
    for name, lines in tables.items():
        write(root / f"{name}.txt", *lines)
    return root


def ilsvrc(folder: Path) -> Path:
    """ILSVRC-2012 and ImageNetV2 with the lists of wsolevaluation, three classes; several boxes to an image.

    The last class has no validation image. One file is a PNG under the name of a JPEG, as one of the published is.
    """
    root, wnids = folder / "ilsvrc", ("n01440764", "n02105855", "n13133613")
    lists: dict[tuple[str, str], list[str]] = {}
    places = {"train": "train/{0}/{0}_{1}.JPEG", "val": "val2/{2}/{1}.jpeg", "test": "val/ILSVRC2012_val_{1:08d}.JPEG"}
    for number, split, label in single({"train": (6, 6, 6), "val": (4, 4, 0), "test": (4, 4, 4)}):
        drawn = draw(number, [label] * (1 + (split == "test" and number % 3 == 0)))
        image = places[split].format(wnids[label], number, label)
        save(root / image, drawn, number, "PNG" if (split, label, number % 6) == ("train", 1, 5) else "JPEG")
        lists.setdefault((split, "image_ids"), []).append(image)
        lists.setdefault((split, "class_labels"), []).append(f"{image},{label}")
        lists.setdefault((split, "image_sizes"), []).append(f"{image},{drawn.size[1]},{drawn.size[0]}")
        boxes = [f"{image},{x0},{y0},{x1},{y1}" for x0, y0, x1, y1 in drawn.boxes]
        lists.setdefault((split, "localization"), []).extend(boxes if split != "train" else [])
    for (split, name), lines in lists.items():
        write(root / "metadata" / split / f"{name}.txt", *lines)
    return root


def several(count: int, classes: Sequence[int]) -> list[list[int]]:
    """Return the classes of `count` images, one to three objects to an image; the classes take turns."""
    turns = itertools.cycle(classes)
    return [[next(turns) for _ in range(1 + i % 3)] for i in range(count)]


def voc(folder: Path) -> Path:
    """VOC2012 with the SBD list. No training image shows the last class, and no validation image the first ones.

    Masks have a palette and borders of 255; of the SBD list they have no border. One object is marked difficult.
    """
    root, last = folder / "VOCdevkit" / "VOC2012", len(CLASS_NAMES) - 1
    lists = {"train": several(20, range(last)), "aug": several(4, range(last)), "val": several(8, range(9, last + 1))}
    lists["val"][1] = [last, 14]
    ids: dict[str, list[str]] = {split: [] for split in lists}
    for number, (split, classes) in enumerate((split, classes) for split, rows in lists.items() for classes in rows):
        drawn, name = draw(number, classes), f"{2007 + number % 5}_{number:06d}"
        ids[split].append(name)
        save(root / "JPEGImages" / f"{name}.jpg", drawn, number)
        height, width = drawn.size
        objects = [
            f"<object><name>{CLASS_NAMES[label]}</name><pose>Unspecified</pose><truncated>0</truncated>"
            f"<difficult>{int(number == 3)}</difficult><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for label, (x0, y0, x1, y1) in zip(drawn.classes, drawn.boxes, strict=True)
        ]
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        write(root / "Annotations" / f"{name}.xml", f"<annotation>{size}{''.join(objects)}</annotation>")
        save_values(root / "SegmentationClassAug" / f"{name}.png", drawn.labels(border=False))
        if split != "aug":
            save_values(root / "SegmentationClass" / f"{name}.png", drawn.labels(), palette=True)
    lines = [f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png" for n in ids["train"] + ids["aug"]]
    for split, names in {"train": ids["train"], "val": ids["val"], "train_aug": lines}.items():
        write(root / "ImageSets" / "Segmentation" / f"{split}.txt", *names)
    return root


COCO_CLASSES = {1: "person", 2: "bicycle", 16: "bird", 18: "dog", 44: "bottle", 67: "dining table", 90: "toothbrush"}


def polygon(drawn: Drawn, index: int) -> list[list[float]]:
    """Return an object's ellipse as a polygon in COCO's form."""
    x0, y0, x1, y1 = drawn.boxes[index]
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    x = (x0 + x1) / 2 + (x1 - x0) / 2 * np.cos(angles)
    y = (y0 + y1) / 2 + (y1 - y0) / 2 * np.sin(angles)
    return [np.stack([x, y], axis=1).round(2).ravel().tolist()]


def coco(folder: Path) -> Path:
    """COCO 2014, seven categories whose ids have gaps. No training image shows the last one.

    Of each part one image has no object at all, and one has a crowd, as run lengths.
    """
    root, last = folder / "coco2014", len(COCO_CLASSES) - 1
    parts = {"train": [*several(24, range(last)), []], "val": [*several(8, range(last + 1)), []]}
    ids, number = list(COCO_CLASSES), 0
    for part, rows in parts.items():
        images, annotations = [], []
        for position, classes in enumerate(rows):
            number += 1
            drawn, file = draw(number, classes), f"COCO_{part}2014_{number:012d}.jpg"
            height, width = drawn.size
            save(root / f"{part}2014" / file, drawn, number)
            images.append({"id": number, "file_name": file, "height": height, "width": width})
            for index, (label, (x0, y0, x1, y1)) in enumerate(zip(drawn.classes, drawn.boxes, strict=True)):
                box, crowd = [x0, y0, x1 - x0, y1 - y0], position == 4 and index == 0
                entry = {"id": 1000 * number + index, "image_id": number, "category_id": ids[label], "bbox": box}
                entry |= {"area": float(0.785 * box[2] * box[3]), "iscrowd": int(crowd)}
                entry["segmentation"] = polygon(drawn, index)
                if crowd:  # the columns of the box, from the first row to the last
                    columns = [x0 * height, (x1 - x0) * height, (width - x1) * height]
                    entry["segmentation"] = {"counts": columns, "size": [height, width]}
                annotations.append(entry)
        categories = [{"id": key, "name": name, "supercategory": "thing"} for key, name in COCO_CLASSES.items()]
        content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        write(root / "annotations" / f"instances_{part}2014.json", json.dumps(content))
    return root


def tiny(folder: Path) -> Path:
    """Tiny-ImageNet, three classes, all images 64 pixels wide; no image of the last one is among the val images."""
    root, wnids = folder / "tiny-imagenet-200", ("n02124075", "n01443537", "n04067472")
    held, boxes = [], {wnid: [] for wnid in wnids}
    for number, split, label in single({"train": (7, 7, 7), "val": (6, 6, 0)}):
        drawn, wnid = draw(number, [label], (64, 64)), wnids[label]
        x0, y0, x1, y1 = drawn.boxes[0]
        corners = "\t".join(map(str, (x0, y0, x1 - 1, y1 - 1)))
        if split == "train":
            save(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", drawn, number)
            boxes[wnid].append(f"{wnid}_{number}.JPEG\t{corners}")
        else:
            save(root / "val" / "images" / f"val_{number}.JPEG", drawn, number)
            held.append(f"val_{number}.JPEG\t{wnid}\t{corners}")
    for wnid, lines in boxes.items():
        write(root / "train" / wnid / f"{wnid}_boxes.txt", *lines)
    write(root / "val" / "val_annotations.txt", *held)
    write(root / "wnids.txt", *wnids)
    write(root / "words.txt", f"{wnids[0]}\tEgyptian cat", f"{wnids[1]}\tgoldfish, Carassius auratus")
    return root


def pets(folder: Path) -> Path:
    """Oxford-IIIT Pet, three breeds with gaps between their ids. The last breed has no test image."""
    root, breeds = folder / "oxford-iiit-pet", {1: "Abyssinian", 12: "english_setter", 33: "Sphynx"}
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for number, split, label in single({"train": (8, 8, 8), "test": (5, 5, 0)}):
        key = list(breeds)[label]
        drawn, name = draw(number, [label]), f"{breeds[key]}_{number}"
        save(root / "images" / f"{name}.jpg", drawn, number)
        trimap = np.where(drawn.objects, 1, 2)
        trimap[outline(drawn.objects)] = 3
        save_values(root / "annotations" / "trimaps" / f"{name}.png", trimap)
        lines[split].append(f"{name} {key} {1 + (key == 12)} 1")
    header = ["#Image CLASS-ID SPECIES BREED ID", "#ID: 1:37 Class ids"]
    write(root / "annotations" / "list.txt", *header, *lines["train"], *lines["test"])
    write(root / "annotations" / "trainval.txt", *lines["train"])
    write(root / "annotations" / "test.txt", *lines["test"])
    return root


WRITERS: dict[str, Callable[[Path], Path]] = {
    "cub": cub, "ilsvrc": ilsvrc, "voc": voc, "coco": coco, "tiny_imagenet": tiny, "pets": pets,
}  # fmt: skip
"""By the name of the data set in `wsolnb data`: what writes its tree into a folder and returns its root."""
