"""Inputs that somebody could really have, and the message that each gets: what it is, and where."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from wsolnb.backbones.checkpoints import load_weights
from wsolnb.data import open_dataset
from wsolnb.data.store import ClassMaps, Store
from wsolnb.errors import WsolnbError
from wsolnb.notebook import params
from wsolnb.notebook.localize import read_names

IDS = ("a", "b", "c")
BOM = b"\xef\xbb\xbf"


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (90, 120, 60)).save(path)
    with path.open("ab") as file:  # behind the picture's end, so that no two files are equal
        file.write(str(path).encode())


def voc(root, listed=b"a\nb\nc\n", box=(6, 6, 15, 15)):
    """Three images in VOC's layout, without masks."""
    for name in IDS:
        picture(root / f"JPEGImages/{name}.jpg")
    (root / "Annotations").mkdir()
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    corners = "".join(f"<{tag}>{v}</{tag}>" for tag, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    for name in IDS:
        text = f"<annotation><object><name>dog</name><bndbox>{corners}</bndbox></object></annotation>"
        (root / f"Annotations/{name}.xml").write_text(text)
    (root / "ImageSets/Segmentation/train.txt").write_bytes(listed)
    return root


def opened_voc(root, **changes):
    found = open_dataset("voc", voc(root, **changes), "train")
    return [found[index] for index in range(len(found))]


def upper_case_ending(root):
    voc(root)
    (root / "JPEGImages/b.jpg").rename(root / "JPEGImages/b.JPG")
    return open_dataset("voc", root, "train")[1]


def coco(change):
    """A function that opens four images in COCO's layout after `change(content)`."""

    def open_it(root):
        objects = {"bbox": [5, 5, 10, 10], "area": 100, "iscrowd": 0, "segmentation": [[5, 5, 15, 5, 15, 15, 5, 15]]}
        content = {
            "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(1, 5)],
            "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
            "annotations": [{"id": i, "image_id": i, "category_id": 3 + i % 2 * 4, **objects} for i in range(1, 5)],
        }
        change(content)
        for number in range(1, 5):
            picture(root / f"train2014/{number}.jpg")
        (root / "annotations").mkdir()
        (root / "annotations/instances_train2014.json").write_text(json.dumps(content))
        found = open_dataset("coco", root, "trainval")
        return [found[index] for index in range(len(found))]

    return open_it


def objects_with(**changes):
    return coco(lambda content: [one.update(changes) for one in content["annotations"]])


def folder(root, *more, boxes=""):
    """A folder of two classes, and images at the paths `more`."""
    for name in (*(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(4)), *more):
        picture(root / name)
    if boxes:
        (root / "boxes.csv").write_text(f"image,x0,y0,x1,y1\n{boxes}")
    return open_dataset("folder", root, "train")


def table(root, last):
    """A CSV of two classes whose last line is `last`."""
    lines = [f"{label}{i}.png,{label}" for label in ("cat", "dog") for i in range(4)]
    for line in lines:
        picture(root / line.partition(",")[0])
    picture(root / "last.png")
    (root / "labels.csv").write_text("\n".join(["image,label", *lines, f"last.png,{last}", ""]))
    return open_dataset("csv", root, "train")


def metadata(root, labels=(0, 1, 2), box="5,5,15,15", before=b""):
    """Three images of each split in wsolevaluation's format."""
    for split in ("train", "val", "test"):
        names = [f"{split}{i}.jpg" for i in range(len(labels))]
        lists = root / "metadata" / split
        lists.mkdir(parents=True)
        for name in names:
            picture(root / name)
        (lists / "image_ids.txt").write_bytes(before + "\n".join(names).encode())
        labelled = [f"{name},{label}" for name, label in zip(names, labels, strict=True)]
        (lists / "class_labels.txt").write_text("\n".join(labelled))
        (lists / "localization.txt").write_text("\n".join(f"{name},{box}" for name in names))
    return open_dataset("metadata", root, "train", metadata_root=root / "metadata")


def stored(values, classes=(0,)):
    def read(root):
        store = Store(root)
        np.savez(store.path("a", ".npz"), maps=np.array(values, np.float16), classes=np.array(classes))
        return store.read_maps("a")

    return read


def weights(value):
    def load(root):
        torch.save({"weight": value, "bias": torch.zeros(2)}, root / "w.pth")
        return load_weights(nn.Linear(2, 2), root / "w.pth")

    return load


def parameter_file(content):
    def read(root):
        (root / "p.yaml").write_bytes(content)
        return params.load_parameter_file(root / "p.yaml")

    return read


def parameter(name, annotation, value):
    return lambda _root: params.Parameter(name, annotation, 1, "of a test").check(value)


BROKEN = {
    "VOC: a list of files": (lambda root: opened_voc(root, listed=b"a.jpg\nb.jpg\n"), "names the file 'a.jpg'"),
    "VOC: the list of a class": (
        lambda root: opened_voc(root, listed=b"a -1\nb  1\n"), "the line 'a -1', where an image id stands alone",
    ),
    "VOC: an ending in capitals": (upper_case_ending, "missing: .*b.jpg; there is b.JPG: give it the ending '.jpg'"),
    "COCO: an image id twice": (
        coco(lambda content: content["images"].append({"id": 1, "file_name": "5.jpg"})), "has 2 images with the id 1",
    ),
    "COCO: a file under two ids": (
        coco(lambda content: content["images"][1].update(file_name="1.jpg")), "has 2 images with the file_name '1.jpg'",
    ),
    "COCO: a category id twice": (
        coco(lambda content: content["categories"].append({"id": 3, "name": "cow"})), "has 2 categories with the id 3",
    ),
    "COCO: a category under two ids": (
        coco(lambda content: content["categories"].append({"id": 9, "name": "cat"})), "categories with the name 'cat'",
    ),
    "COCO: ids as text": (
        coco(lambda content: content["images"][0].update(id="1")), "an entry whose 'id' is '1', not a whole number",
    ),
    "COCO: a box of negative width": (objects_with(bbox=[15, 5, -10, 10]), r"image 1 has the bbox \[15, 5, -10, 10\]"),
    "COCO: iscrowd as text": (objects_with(iscrowd="0"), "image 1 has an object whose iscrowd is '0', neither 0 nor 1"),
    "COCO: a polygon of another image": (
        objects_with(segmentation=[[500, 5, 515, 5, 515, 15]]), "polygon from 500, 5 on, outside of 40x30 pixels",
    ),
    "folder: a class in two writings": (
        lambda root: folder(root, "Cat/x.png", "Cat/y.png", "Cat/z.png"), "'Cat' and 'cat' differ in capital letters",
    ),
    "folder: a box twice": (
        lambda root: folder(root, boxes="cat/0.png,5,5,15,15\ncat/0.png,5,5,15,15\n"),
        "boxes.csv, line 3: the box 5, 5, 15, 15 of 'cat/0.png' is listed a second time",
    ),
    "CSV: labels separated by a comma": (
        lambda root: table(root, '"cat,dog"'), "the class 'cat,dog' is made of the classes 'cat', 'dog'",
    ),
    "CSV: labels separated by a bar": (lambda root: table(root, "dog|cat"), "the class 'dog.cat' is made of"),
    "metadata: classes counted from 1": (lambda root: metadata(root, (1, 2, 3)), "metadata has the class 0"),
    "metadata: boxes as shares": (
        lambda root: metadata(root, box="0.1,0.1,0.5,0.6"), "all boxes of .*localization.txt are in shares",
    ),
    "maps: NaN": (stored([[[np.nan, 0.5]]]), "the maps .*a.npz cannot be read: .*values from nan to nan, not in"),
    "maps: grey levels": (stored([[[0, 200]]]), "the maps .*a.npz cannot be read: .*values from 0 to 200, not in"),
    "maps: a class twice": (stored([[[0.5]], [[0.5]]], (1, 1)), r"the classes \(1, 1\), one of them twice"),
    "weights: NaN": (weights(torch.full((2, 2), torch.nan)), "w.pth holds NaN in 'weight'"),
    "weights: quantised": (weights(torch.ones(2, 2, dtype=torch.int8)), "w.pth holds int8 in 'weight'"),
    "parameters: Latin-1": (parameter_file("lr: 0.1  # größer".encode("latin-1")), "p.yaml is no UTF-8 text"),
    "parameters: an infinite rate": (parameter("lr", "float", float("inf")), "'lr' must be finite, not inf"),
    "parameters: an infinite scale": (
        parameter("scales", "list[float]", [1.0, float("inf")]), r"'scales' must be finite, not \[1.0, inf\]",
    ),
    "parameters: a seed twice": (parameter("seeds", "list[int]", [0, 1, 0]), "'seeds' must be different from"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_input_is_an_error_that_names_it(kind, tmp_path):
    build, message = BROKEN[kind]
    with pytest.raises(WsolnbError, match=message) as error:
        build(tmp_path)
    assert error.value.remedy


def test_what_is_whole_is_read(tmp_path):
    """The builders alone break nothing: what the cases above find is what they changed."""
    samples = opened_voc(tmp_path / "voc")
    assert [one.boxes.tolist() for one in samples] == [[[5, 5, 15, 15]]] * 3
    assert [one.boxes.tolist() for one in coco(lambda _: None)(tmp_path / "coco")] == [[[5, 5, 15, 15]]] * 4
    assert folder(tmp_path / "folder", boxes="cat/0.png,5,5,15,15\n").class_names == ("cat", "dog")
    assert folder(tmp_path / "letters", "a/0.png", "A/0.png").class_names == ("A", "a", "cat", "dog")  # no two writings
    assert table(tmp_path / "table", "cat").class_names == ("cat", "dog")
    assert table(tmp_path / "several", "cat;dog").multi_label
    assert metadata(tmp_path / "metadata").class_names == ("0", "1", "2")
    assert stored([[[0, 0.5]]])(tmp_path) == ClassMaps("a", (0,), pytest.approx(np.array([[[0, 0.5]]])))
    assert weights(torch.ones(2, 2))(tmp_path) == []
    assert parameter_file(b"lr: 0.1")(tmp_path) == {"lr": 0.1}
    assert parameter("seeds", "list[int]", [0, 1])(tmp_path) == [0, 1]


def test_a_mark_before_the_first_line_of_a_list_is_no_part_of_it(tmp_path):
    assert [one.image_id for one in opened_voc(tmp_path / "voc", listed=BOM + b"a \r\nb\t\r\n\r\n")] == ["a", "b"]
    assert metadata(tmp_path / "metadata", before=BOM).image_ids[0] == "train0.jpg"
    (tmp_path / "names.txt").write_bytes(BOM + b"cat\r\ndog\r\n")
    assert read_names(str(tmp_path / "names.txt")) == ["cat", "dog"]
    assert parameter_file(BOM + b"lr: 0.1")(tmp_path) == {"lr": 0.1}


def test_boxes_of_voc_that_are_counted_from_0_are_told(tmp_path):
    with pytest.warns(UserWarning, match=r"a.xml has the box 0, 0, 39, 29; VOC counts corners from 1"):
        opened_voc(tmp_path, box=(0, 0, 39, 29))
