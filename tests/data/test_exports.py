"""What is written is read back by a reader of the formats' own rules."""

import io
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from PIL import Image

from wsolnb.data.exports import CocoFiles, palette_png, run_lengths, voc_palette, voc_xml

VOC_COLOURS = {
    0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0), 12: (64, 0, 128),
    15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192),
}  # fmt: skip
"""As VOC's development kit lists them."""


def decoded(rle):
    """A mask from COCO's run lengths, pixel by pixel."""
    height, width = rle["size"]
    values = [place % 2 for place, count in enumerate(rle["counts"]) for _ in range(count)]
    assert len(values) == height * width
    return np.array([[values[column * height + row] for column in range(width)] for row in range(height)], bool)


def test_the_palette_is_vocs():
    assert {index: tuple(voc_palette()[index].tolist()) for index in VOC_COLOURS} == VOC_COLOURS


def test_a_mask_keeps_its_indices_and_shows_vocs_colours():
    mask = np.array([[0, 1, 2], [20, 12, 254]], np.uint8)
    image = Image.open(io.BytesIO(palette_png(mask)))
    assert image.mode == "P"
    assert np.array_equal(np.array(image), mask)
    colours = np.array(image.convert("RGB"))
    assert tuple(colours[0, 1].tolist()) == VOC_COLOURS[1]
    assert tuple(colours[1, 0].tolist()) == VOC_COLOURS[20]
    one = Image.open(io.BytesIO(palette_png(np.full((5, 7), 3, np.uint8))))
    assert (np.array(one) == 3).all()


def test_run_lengths_begin_with_zeros_and_go_down_the_columns():
    assert run_lengths(np.array([[1, 0], [1, 1]])) == {"size": [2, 2], "counts": [0, 2, 1, 1]}
    rng = np.random.default_rng(0)
    for mask in (rng.random((5, 7)) > 0.5, np.zeros((2, 3), bool), np.ones((3, 1), bool)):
        assert np.array_equal(decoded(run_lengths(mask)), mask)


def test_voc_counts_corners_from_one_and_both_inside():
    text = voc_xml(Path("holidays/a & b.jpg"), (30, 40), [("<cat>", (0, 5, 40, 30)), ("dog", (3, 4, 4, 5))])
    root = ElementTree.fromstring(text)
    assert root.findtext("filename") == "a & b.jpg"
    assert root.findtext("folder") == "holidays"
    assert [root.findtext(f"size/{tag}") for tag in ("width", "height", "depth")] == ["40", "30", "3"]
    boxes = {
        found.findtext("name"): [int(found.findtext(f"bndbox/{tag}")) for tag in ("xmin", "ymin", "xmax", "ymax")]
        for found in root.findall("object")
    }
    assert boxes == {"<cat>": [1, 6, 40, 30], "dog": [4, 5, 4, 5]}


def test_coco_files_refer_to_what_they_hold():
    files, mask = CocoFiles(), np.zeros((30, 40), bool)
    mask[5:9, 3:6] = True
    first, second = files.add("a.jpg", (30, 40)), files.add("b.jpg", (8, 9))
    files.add_object(first, 2, np.array([3, 5, 6, 9], np.int32), mask, 0.75)
    known = files.instances({1: "cat", 2: "dog"})
    assert [image["id"] for image in known["images"]] == [first, second]
    assert known["images"][0] == {"id": first, "file_name": "a.jpg", "width": 40, "height": 30}
    (found,) = known["annotations"]
    assert (found["image_id"], found["category_id"], found["iscrowd"]) == (first, 2, 0)
    assert found["bbox"] == [3, 5, 3, 4]
    assert found["area"] == 12
    assert np.array_equal(decoded(found["segmentation"]), mask)
    assert files.results == [{"image_id": first, "category_id": 2, "bbox": [3, 5, 3, 4], "score": 0.75}]
