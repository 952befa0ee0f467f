"""Boxes and masks as other programs read them: COCO's JSON, Pascal VOC's XML, and PNG with VOC's palette.

Boxes come in the package's convention, half-open `x0, y0, x1, y1` in pixels. This module converts them to each format.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def voc_palette() -> np.ndarray:
    """Return VOC's colours (256, 3) uint8: bit `3 j + c` of an index is bit `7 - j` of channel c."""
    index, place = np.arange(256)[:, None, None], np.arange(8)
    bits = index >> (3 * place + np.arange(3)[:, None]) & 1  # (256, channel, place); from the ninth bit on all are 0
    return (bits << (7 - place)).sum(axis=2).astype(np.uint8)


def palette_png(mask: np.ndarray) -> bytes:
    """Return a mask of class indices (H, W) uint8 as a PNG file of these values, shown in VOC's colours."""
    image = Image.fromarray(mask).convert("P")
    image.putdata(mask.reshape(-1))
    image.putpalette(voc_palette().tobytes())
    file = io.BytesIO()
    image.save(file, "png", optimize=True)
    return file.getvalue()


def voc_xml(path: Path, size: tuple[int, int], objects: Iterable[tuple[str, Sequence[int]]]) -> str:
    """Return an annotation file of Pascal VOC for the image `path` of size (height, width).

    objects: (class name, half-open box). In the file corners are counted from 1, and both corner pixels are inside.
    """
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, **texts: object) -> None:
        for tag, text in texts.items():
            ElementTree.SubElement(parent, tag).text = str(text)

    add(root, folder=path.parent.name, filename=path.name)
    add(ElementTree.SubElement(root, "source"), database="wsolnb localize")
    add(ElementTree.SubElement(root, "size"), width=size[1], height=size[0], depth=3)
    add(root, segmented=1)
    for name, (x0, y0, x1, y1) in objects:
        found = ElementTree.SubElement(root, "object")
        add(found, name=name, pose="Unspecified", truncated=0, difficult=0)
        add(ElementTree.SubElement(found, "bndbox"), xmin=x0 + 1, ymin=y0 + 1, xmax=x1, ymax=y1)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Return a mask (H, W) as COCO's uncompressed run lengths: column by column, beginning with the zeros."""
    flat = np.concatenate([[False], mask.astype(bool).ravel(order="F")])
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]), mask.size)
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}


class CocoFiles:
    """What COCO's files hold, collected image by image: `instances` as of the truth, `results` as of a detector.

    pycocotools reads both: `truth = COCO("instances.json"); truth.loadRes("results.json")`.
    """

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []

    def add(self, file_name: str, size: tuple[int, int]) -> int:
        """Add an image of size (height, width); returns its id."""
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": file_name, "width": size[1], "height": size[0]})
        return number

    def add_object(self, image: int, category: int, box: Sequence[int], mask: np.ndarray, score: float) -> None:
        """Add an object of an image by its id: category id, half-open box, mask (H, W) bool, probability."""
        x0, y0, x1, y1 = map(int, box)
        found = {"image_id": image, "category_id": category, "bbox": [x0, y0, x1 - x0, y1 - y0]}
        more = {"id": len(self.annotations) + 1, "area": int(mask.sum()), "iscrowd": 0}
        self.annotations.append({**found, **more, "segmentation": run_lengths(mask)})
        self.results.append({**found, "score": score})

    def instances(self, categories: dict[int, str]) -> dict[str, Any]:
        """Return the file of the instances; categories: name by id."""
        named = [{"id": number, "name": name, "supercategory": ""} for number, name in categories.items()]
        info = {"description": "boxes and masks of wsolnb localize: predictions, no truth"}
        known = {"images": self.images, "annotations": self.annotations, "categories": named}
        return {"info": info, "licenses": [], **known}
