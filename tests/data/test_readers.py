"""Readers on tiny trees of the true layouts, whole and broken."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import save_values as write_mask
from trees import write

from wsolnb.data import DATASETS, open_dataset, tight_box
from wsolnb.data.base import read_image
from wsolnb.data.cub import CUB
from wsolnb.data.metadata_folder import MetadataFolder
from wsolnb.data.pets import OxfordPets
from wsolnb.data.tiny_imagenet import TinyImageNet, alternate
from wsolnb.data.transforms import resize
from wsolnb.data.voc import CLASS_NAMES, VOC
from wsolnb.errors import DataError, ParameterError

HEIGHT, WIDTH = 12, 20


def write_image(path: Path, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Save random pixels; JPEG where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="JPEG")
    return pixels


def block(y0: int, y1: int, x0: int, x1: int, value: int = 1) -> np.ndarray:
    """A map (HEIGHT, WIDTH) that is zero but for a rectangle."""
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[y0:y1, x0:x1] = value
    return values


# ---------------------------------------------------------------------------------------------------------------- CUB


@pytest.fixture
def cub(tmp_path) -> Path:
    """12 images of 2 classes; 4 of each class train, 2 test; with soft segmentations and part maps."""
    root = tmp_path / "CUB_200_2011"
    files = [f"{c:03d}.{name}/{name}_{i:04d}.jpg" for c, name in ((1, "Gull"), (2, "Black_Tern")) for i in range(6)]
    for i, file in enumerate(files):
        write_image(root / "images" / file, seed=i)
        soft = block(2, 8, 3, 11, 255)
        soft[2, 3:11] = 102  # two of five annotators: not object
        soft[3, 3:11] = 153  # three of five: object
        write_mask(root / "segmentations" / file.replace(".jpg", ".png"), soft)
        parts = block(3, 8, 3, 11, 2)
        parts[3:5, 3:5] = 1
        write_mask(root / "part_maps" / file.replace(".jpg", ".png"), parts, palette=True)
    ids = range(1, 13)
    write(root / "images.txt", *(f"{i} {file}" for i, file in zip(ids, files, strict=True)))
    write(root / "image_class_labels.txt", *(f"{i} {1 + i // 7}" for i in ids))
    write(root / "train_test_split.txt", *(f"{i} {int((i - 1) % 6 < 4)}" for i in ids))
    write(root / "classes.txt", "1 001.Gull", "2 002.Black_Tern")
    write(root / "bounding_boxes.txt", *(f"{i} 3.5 3.0 8.0 {4 + i}.25" for i in ids))
    return root


class TestCUB:
    def test_reads_boxes_masks_and_parts(self, cub):
        dataset = CUB(cub, "test")
        assert len(dataset) == 4
        assert dataset.class_names == ("Gull", "Black_Tern")
        assert dataset.labels == ((0,), (0,), (1,), (1,))
        assert dataset.image_ids[0] == "001.Gull/Gull_0004.jpg"
        sample = dataset[0]
        assert sample.image.shape == (HEIGHT, WIDTH, 3)
        assert sample.image.dtype == np.uint8
        assert sample.label == 0
        np.testing.assert_array_equal(sample.boxes, [[3.5, 3.0, 11.5, 12.25]])  # exact, not clipped
        np.testing.assert_array_equal(sample.box_labels, [0])
        np.testing.assert_array_equal(sample.mask, block(3, 8, 3, 11))
        assert set(np.unique(sample.parts)) == {0, 1, 2}
        np.testing.assert_array_equal(sample.parts > 0, sample.mask == 1)

    def test_without_truth_nothing_but_the_image_is_read(self, cub):
        (cub / "segmentations" / "001.Gull" / "Gull_0004.png").unlink()
        sample = CUB(cub, "test").read(0, truth=False)
        assert sample.mask is None
        assert sample.parts is None
        assert sample.boxes.shape == (0, 4)
        with pytest.raises(DataError, match=r"missing: .*Gull_0004\.png"):
            CUB(cub, "test")[0]

    def test_parent_folder_is_accepted(self, cub):
        assert CUB(cub.parent, "test").root == cub

    def test_held_out_split(self, cub):
        train, val, whole = (set(CUB(cub, split, val_fraction=0.3).image_ids) for split in ("train", "val", "trainval"))
        assert train | val == whole
        assert not train & val
        assert len(whole) == 8
        assert len(val) == 2  # one of each class
        assert set(CUB(cub, "test").image_ids).isdisjoint(whole)
        vals = {CUB(cub, "val", val_fraction=0.3, seed=seed).image_ids for seed in range(5)}
        assert len(vals) > 1

    def test_split_file_replaces_both(self, cub):
        splits = ["train", "val", "test"] * 4
        write(cub / "train_val_test_split.txt", *(f"{i} {split}" for i, split in enumerate(splits, start=1)))
        assert [len(CUB(cub, split)) for split in ("train", "val", "test", "trainval")] == [4, 4, 4, 8]
        assert CUB(cub, "val").image_ids[0].endswith("Gull_0001.jpg")

    def test_masks_and_parts_are_optional(self, cub):
        (cub / "segmentations").rename(cub / "elsewhere")
        (cub / "part_maps").rename(cub / "elsewhere2")
        sample = CUB(cub, "test")[1]
        assert sample.mask is None
        assert sample.parts is None

    @pytest.mark.parametrize(
        ("file", "lines", "message"),
        [
            ("images.txt", None, r"missing: .*images\.txt"),
            ("images.txt", [], r"empty: .*images\.txt"),
            ("images.txt", ["1 a.jpg", "1 b.jpg"], r"images\.txt lists 1 more than once"),
            ("images.txt", ["one a.jpg"], r"images\.txt, line 1: 'one a\.jpg' is not <image_id> <file>"),
            ("bounding_boxes.txt", ["", "1 1 1 5"], r"bounding_boxes\.txt, line 2: '1 1 1 5' is not <image_id> <x>"),
            ("bounding_boxes.txt", ["1 1 1 5 nan"], r"bounding_boxes\.txt, line 1"),
            ("bounding_boxes.txt", ["1 1 1 5 5 5"], r"bounding_boxes\.txt, line 1"),
            ("bounding_boxes.txt", ["1 1 1 5 5"], r"bounding_boxes\.txt lacks 2, which .*images\.txt has \(11 in all"),
            ("bounding_boxes.txt", [f"{i} 1 1 {i - 1} 5" for i in range(1, 13)], "the box of image 1 has no area"),
            ("image_class_labels.txt", [f"{i} 1" for i in range(1, 14)], r"images\.txt lacks 13, which .*labels\.txt"),
            ("image_class_labels.txt", [f"{i} 3" for i in range(1, 13)], r"gives image 1 the class 3; classes\.txt"),
            ("classes.txt", ["1 001.Gull", "3 003.Tern"], r"classes\.txt: class ids are not 1\.\.2"),
            ("train_test_split.txt", [f"{i} 1" for i in range(1, 13)], "the split 'test' of .* has no image"),
            ("train_val_test_split.txt", [f"{i} tset" for i in range(1, 13)], "puts image 1 into 'tset'"),
        ],
    )
    def test_broken_tables(self, cub, file, lines, message):
        (cub / file).unlink(missing_ok=True)
        if lines is not None:
            write(cub / file, *lines)
        with pytest.raises(DataError, match=message) as caught:
            CUB(cub, "test")
        assert "Remedy" in str(caught.value)

    def test_table_that_is_no_text(self, cub):
        (cub / "images.txt").write_bytes(b"\xff\xfe\x00\x80")
        with pytest.raises(DataError, match=r"cannot read .*images\.txt"):
            CUB(cub, "test")

    def test_missing_images_folder_is_told_at_once(self, cub):
        (cub / "images").rename(cub / "pictures")
        with pytest.raises(DataError, match=r"missing: .*images"):
            CUB(cub, "test")

    def test_missing_image(self, cub):
        dataset = CUB(cub, "test")
        dataset.image_path(2).unlink()
        with pytest.raises(DataError, match=r"missing: .*Black_Tern_0004\.jpg"):
            dataset[2]

    @pytest.mark.parametrize("keep", [0, 1, 100, 300])
    def test_truncated_image(self, cub, keep):
        path = CUB(cub, "test").image_path(0)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(DataError, match=r"cannot decode .*Gull_0004\.jpg"):
            CUB(cub, "test")[0]

    def test_truncated_mask(self, cub):
        path = cub / "segmentations" / "001.Gull" / "Gull_0004.png"
        whole = path.read_bytes()
        for keep in (0, 10, 40, len(whole) // 2, len(whole) - 30):
            path.write_bytes(whole[:keep])
            with pytest.raises(DataError, match=r"cannot decode .*Gull_0004\.png"):
                CUB(cub, "test")[0]

    def test_mask_of_another_size(self, cub):
        write_mask(cub / "segmentations" / "001.Gull" / "Gull_0004.png", np.zeros((5, 6)))
        with pytest.raises(DataError, match=r"Gull_0004\.png is 6x5, its image 20x12"):
            CUB(cub, "test")[0]

    def test_part_value_without_meaning(self, cub):
        write_mask(cub / "part_maps" / "001.Gull" / "Gull_0004.png", block(0, 1, 0, 1, 7))
        with pytest.raises(DataError, match="holds the value 7"):
            CUB(cub, "test")[0]

    def test_box_outside_of_the_image(self, cub):
        write(cub / "bounding_boxes.txt", *(f"{i} 30 3 5 5" for i in range(1, 13)))
        with pytest.raises(DataError, match=r"the box 30, 3, 35, 8 lies outside of .*Gull_0004\.jpg \(20x12\)"):
            CUB(cub, "test")[0]

    def test_a_box_that_leaves_the_image_is_cut_off_and_told_once(self, cub):
        from wsolnb.data import base

        base._TOLD.clear()
        boxes = {1: "-9 3 12 4", 2: "3 3 5 5", 3: "-0.5 3 5 5"}  # x, y, width, height
        write(cub / "bounding_boxes.txt", *(f"{i} {boxes.get(i, '15 2 30 40')}" for i in range(1, 13)))
        dataset = CUB(cub, "trainval")
        with pytest.warns(
            UserWarning, match="cub: the box .* leaves .*it is cut off, as are all others that do"
        ) as told:
            found = [dataset[i].boxes[0].tolist() for i in range(len(dataset))]
        assert len([one for one in told if "is cut off" in str(one.message)]) == 1
        by_id = dict(zip(dataset.image_ids, found, strict=True))
        raw = {1: [0, 3, 3, 7], 2: [3, 3, 8, 8], 3: [-0.5, 3, 4.5, 8]}  # within a pixel: rounding, left as it is
        order = [line.split() for line in (cub / "images.txt").read_text().splitlines()]
        for number, name in order:
            image_id = name.removesuffix(".jpg")
            if image_id in by_id:
                assert by_id[image_id] == raw.get(int(number), [15, 2, WIDTH, HEIGHT])
        assert len(by_id) == 8

    def test_an_image_that_is_listed_twice(self, cub):
        path = cub / "images.txt"
        lines = path.read_text().splitlines()
        first, second = (line.split()[1] for line in lines[:2])
        path.write_text("\n".join(lines).replace(second, first) + "\n")
        with pytest.raises(DataError, match=r"cub trainval has two images of the id '.*' \(1 such ids\)"):
            open_dataset("cub", cub, "trainval")

    def test_unknown_split_names_the_nearest(self, cub):
        with pytest.raises(ParameterError, match="did you mean 'train'"):
            CUB(cub, "trian")

    @pytest.mark.parametrize("index", [4, -5])
    def test_index_past_the_end(self, cub, index):
        with pytest.raises(IndexError, match="has 4 images"):
            CUB(cub, "test")[index]

    def test_subset(self, cub):
        dataset = CUB(cub, "test")
        subset = dataset.subset([3, 1])
        assert subset.image_ids == (dataset.image_ids[3], dataset.image_ids[1])
        assert subset.labels == ((1,), (0,))
        np.testing.assert_array_equal(subset[0].image, dataset[-1].image)
        assert subset.read(1, truth=False).mask is None
        assert subset.class_names == dataset.class_names


# ---------------------------------------------------------------------------------------------------------------- VOC


def voc_xml(*objects: tuple, extra: str = "") -> str:
    def one(name, x0, y0, x1, y1, difficult=0):
        box = f"<bndbox><xmax>{x1}</xmax><xmin>{x0}</xmin><ymax>{y1}</ymax><ymin>{y0}</ymin></bndbox>"
        part = "<part><name>head</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
        return f"<object><name>{name}</name>{part}<difficult>{difficult}</difficult>{box}</object>"

    return f"<annotation>{''.join(one(*entry) for entry in objects)}{extra}</annotation>"


@pytest.fixture
def voc(tmp_path) -> Path:
    """Four images: a, b train; c val; d in Main only. SegmentationClassAug and its lists for a and d."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    objects = {
        "a": [("person", 1, 1, 20, 12), ("bird", 4, 3, 8, 6), ("person", 2, 2, 3, 3)],
        "b": [("dog", "3.5", "2.25", 9, 9), ("cat", 1, 1, 5, 5, 1)],
        "c": [("tvmonitor", 5, 5, 5, 5)],
        "d": [("cat", 1, 1, 5, 5, 1)],
    }
    for i, (name, entries) in enumerate(objects.items()):
        write_image(root / "JPEGImages" / f"{name}.jpg", seed=i)
        write(root / "Annotations" / f"{name}.xml", voc_xml(*entries))
    for name, value in {"a": 3, "b": 12, "c": 20}.items():
        mask = block(2, 6, 3, 8, value)
        mask[6, 3:8] = 255
        mask[8, 8] = 20
        write_mask(root / "SegmentationClass" / f"{name}.png", mask, palette=True)
    write(root / "ImageSets" / "Segmentation" / "train.txt", "a", "b")
    write(root / "ImageSets" / "Segmentation" / "val.txt", "c")
    write(root / "ImageSets" / "Main" / "train.txt", "a", "b", "d")
    return root


class TestVOC:
    def test_reads_labels_boxes_and_masks(self, voc):
        dataset = VOC(voc, "train")
        assert dataset.multi_label
        assert dataset.class_names == CLASS_NAMES
        person, bird, dog, cat = (CLASS_NAMES.index(name) for name in ("person", "bird", "dog", "cat"))
        assert dataset.labels == ((bird, person), (cat, dog))
        sample = dataset[0]
        # 1..20 and 1..12, both inside, cover the whole image.
        np.testing.assert_array_equal(sample.boxes, [[0, 0, 20, 12], [3, 2, 8, 6], [1, 1, 3, 3]])
        np.testing.assert_array_equal(sample.box_labels, [person, bird, person])
        np.testing.assert_array_equal(tight_box(sample.mask == bird + 1), sample.boxes[1])
        assert set(np.unique(sample.mask)) == {0, 3, 20, 255}
        assert sample.parts is None
        np.testing.assert_array_equal(dataset[1].boxes[0], [2.5, 1.25, 9, 9])
        np.testing.assert_array_equal(VOC(voc, "val")[0].boxes, [[4, 4, 5, 5]])

    @pytest.mark.parametrize("parents", [0, 1, 2])
    def test_root_and_its_parents(self, voc, parents):
        root = [voc, *voc.parents][parents]
        assert VOC(root, "val").root == voc

    def test_difficult_objects_can_be_left_out(self, voc):
        dataset = VOC(voc, "train", difficult=False, image_set="Main")
        assert dataset.labels[1:] == ((CLASS_NAMES.index("dog"),), ())
        assert dataset[2].boxes.shape == (0, 4)

    def test_main_list_has_masks_where_there_are(self, voc):
        dataset = VOC(voc, "train", image_set="Main")
        assert [dataset[i].mask is None for i in range(3)] == [False, False, True]

    @pytest.mark.parametrize("mode", ["RGB", "1", "RGBA"])
    def test_masks_in_colour_or_of_one_bit_name_no_class(self, voc, mode):
        path = voc / "SegmentationClass" / "a.png"
        Image.fromarray(block(2, 6, 3, 8, 3)).convert(mode).save(path)
        with pytest.raises(
            DataError, match=f"a.png is no picture of palette indices or grey values .its mode is {mode}"
        ):
            VOC(voc, "train")[0]
        assert VOC(voc, "train").read(0, truth=False).mask is None

    def test_masks_of_objects_are_told_from_masks_of_classes(self, voc):
        path = voc / "SegmentationClass" / "a.png"
        write_mask(path, block(2, 6, 3, 8, 1), palette=True)  # the first object, or an aeroplane
        with pytest.raises(DataError, match=r"a.png shows aeroplane, .*a.xml names bird, person") as error:
            VOC(voc, "train")[0]
        assert "SegmentationObject" in error.value.remedy
        write_mask(path, np.maximum(block(2, 6, 3, 8, 1), block(8, 9, 8, 9, 15)), palette=True)
        assert set(np.unique(VOC(voc, "train")[0].mask)) == {0, 1, 15}  # one of them is named: a slip of an annotator

    def test_the_size_that_the_annotations_state(self, voc):
        path = voc / "Annotations" / "a.xml"
        whole = path.read_text()

        def state(width, height):
            size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
            path.write_text(whole.replace("</annotation>", f"{size}</annotation>"))
            return VOC(voc, "train")

        assert state(WIDTH, HEIGHT)[0].size == (HEIGHT, WIDTH)
        resized = state(2 * WIDTH, 2 * HEIGHT)
        with pytest.raises(DataError, match=r"a.jpg is 20x12, .*a.xml says 40x24"):
            resized[0]
        assert resized.read(0, truth=False).size == (HEIGHT, WIDTH)  # training needs no truth
        with pytest.raises(DataError, match=r"a\.xml states the size x x 3"):
            state("x", 3)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_a_photograph_is_turned_only_where_the_annotations_are_of_the_turned_one(self, voc, orientation):
        path = voc / "JPEGImages" / "a.jpg"
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = write_image(path)
        Image.fromarray(pixels).save(path, "PNG", exif=exif)
        xml = (voc / "Annotations" / "a.xml").read_text()
        assert np.array_equal(VOC(voc, "train").read(0, truth=False).image, pixels)
        size = f"<size><width>{HEIGHT}</width><height>{WIDTH}</height></size>"
        (voc / "Annotations" / "a.xml").write_text(xml.replace("</annotation>", f"{size}</annotation>"))
        turned = {
            5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).transpose(1, 0, 2),
            8: np.rot90(pixels),
        }  # fmt: skip
        found = VOC(voc, "train").read(0, truth=False).image
        assert np.array_equal(found, turned.get(orientation, pixels))

    def test_extensions(self, voc):
        write(voc / "class_names.txt", "bird", "person", "dog", "cat")
        for name, value in {"a": 2, "b": 4}.items():
            write_mask(voc / "SegmentationClass" / f"{name}.png", block(2, 6, 3, 8, value))
            write_mask(voc / "PartMaps" / f"{name}.png", block(2, 6, 3, 8, 2))
        dataset = VOC(voc, "train")
        assert dataset.class_names == ("bird", "person", "dog", "cat")
        assert dataset.labels == ((0, 1), (2, 3))
        assert dataset[0].parts.max() == 2

    def test_sbd_list(self, voc, tmp_path):
        listed = tmp_path / "train_aug.txt"
        write(listed, "d", "a")
        dataset = VOC(voc, "train", sbd_list=listed)
        assert dataset.image_ids == ("d", "a")
        assert dataset[0].mask is None
        for name in "ad":
            write_mask(voc / "SegmentationClassAug" / f"{name}.png", block(0, 1, 0, 1, 8))
        assert VOC(voc, "train", sbd_list=listed)[0].mask.sum() == 8
        write(listed, "/JPEGImages/d.jpg /SegmentationClassAug/d.png", "/JPEGImages/a.jpg /SegmentationClass/a.png")
        dataset = VOC(voc, "train", sbd_list=listed)
        assert dataset.image_ids == ("d", "a")
        assert dataset[0].mask.max() == 8
        assert dataset[1].mask.max() == 255
        assert VOC(voc, "val", sbd_list=listed).image_ids == ("c",)
        write(listed, "a b c")
        with pytest.raises(DataError, match=r"train_aug\.txt: cannot take 'a b c'"):
            VOC(voc, "train", sbd_list=listed)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, r"missing: .*a\.xml"),
            ("<annotation><object>", r"not well-formed XML: .*a\.xml"),
            (voc_xml(("griffin", 1, 1, 2, 2)), r"a\.xml has an object of the unknown class 'griffin'"),
            (voc_xml(("bird", 1, "many", 2, 2)), r"a\.xml has an object without a proper bndbox"),
            (voc_xml(extra="<object><name>bird</name></object>"), "without a proper bndbox"),
            (voc_xml(("bird", 9, 1, 2, 2)), "the box 9, 1, 2, 2, which ends before it begins"),
        ],
    )
    def test_broken_annotations(self, voc, text, message):
        path = voc / "Annotations" / "a.xml"
        path.unlink()
        if text is not None:
            path.write_text(text)
        with pytest.raises(DataError, match=message):
            VOC(voc, "train")

    def test_missing_list_image_and_mask(self, voc):
        with pytest.raises(DataError, match=r"missing: .*Segmentation.test\.txt"):
            VOC(voc, "test")
        (voc / "SegmentationClass" / "a.png").unlink()
        with pytest.raises(DataError, match=r"missing: .*a\.png"):
            VOC(voc, "train")[0]
        (voc / "JPEGImages" / "b.jpg").unlink()
        with pytest.raises(DataError, match=r"missing: .*b\.jpg"):
            VOC(voc, "train")[1]
        with pytest.raises(ParameterError, match="did you mean 'Main'"):
            VOC(voc, "train", image_set="main")

    def test_labels_alone(self, voc):
        """Neither masks nor annotations: labels by the lists of Main; a class is in those of some splits only."""
        for name in ("SegmentationClass", "Annotations", "ImageSets/Segmentation"):
            (voc / name).rename(voc.parent / Path(name).name)
        lists = voc / "ImageSets" / "Main"
        with pytest.raises(DataError, match=r"missing: .*Annotations, and for labels alone .*aeroplane_train\.txt"):
            VOC(voc, "train")
        for name in CLASS_NAMES:
            write(lists / f"{name}_trainval.txt", "a -1", "b  1" if name == "dog" else "b -1", "c -1", "d  0")
        write(lists / "bird_train.txt", "a  1", "b -1", "d -1")
        dataset, bird, dog = VOC(voc, "train", difficult=False), CLASS_NAMES.index("bird"), CLASS_NAMES.index("dog")
        assert dataset.image_ids == ("a", "b", "d")
        assert dataset.labels == ((bird,), (dog,), ())
        assert VOC(voc, "train").labels[2] == tuple(range(20))  # difficult objects count
        sample = dataset[0]
        assert (sample.mask, sample.boxes.shape) == (None, (0, 4))
        write(lists / "train.txt", "a", "e")
        with pytest.raises(DataError, match=r"Main lacks 'e', which .*train\.txt has"):
            VOC(voc, "train")
        write(lists / "cat_train.txt", "a yes")
        with pytest.raises(DataError, match=r"cat_train\.txt, line 1: 'a yes' is not <image> <present>"):
            VOC(voc, "train")

    def test_annotations_without_masks(self, voc):
        (voc / "SegmentationClass").rename(voc / "elsewhere")
        dataset = VOC(voc, "train")
        assert [sample.mask for sample in (dataset[0], dataset[1])] == [None, None]
        assert len(dataset[0].boxes) == 3

    def test_mask_value_without_class(self, voc):
        write_mask(voc / "SegmentationClass" / "a.png", block(0, 1, 0, 1, 21))
        with pytest.raises(DataError, match="holds the value 21"):
            VOC(voc, "train")[0]


# --------------------------------------------------------------------------------------------------------------- Pets


@pytest.fixture
def pets(tmp_path) -> Path:
    """Breeds 2 and 34 of the 37: 5 + 5 trainval, 1 + 1 test, with the odd files of the published archive."""
    lines = []
    for breed, class_id in (("Siamese_x", 34), ("american_bulldog", 2)):
        for i in range(6):
            write_image(tmp_path / "images" / f"{breed}_{i}.jpg", seed=i)
            trimap = np.full((HEIGHT, WIDTH), 2)
            trimap[3:9, 4:12], trimap[4:8, 5:11] = 3, 1
            write_mask(tmp_path / "annotations" / "trimaps" / f"{breed}_{i}.png", trimap)
            lines.append(f"{breed}_{i} {class_id} 1 {class_id}")
    (tmp_path / "annotations" / "trimaps" / "._Siamese_x_0.png").write_bytes(b"Mac OS X")
    header = ["#Image CLASS-ID SPECIES BREED ID", "#ID: 1:37 Class ids"]
    write(tmp_path / "annotations" / "list.txt", *header, *lines)
    write(tmp_path / "annotations" / "trainval.txt", *(line for line in lines if "_5 " not in line))
    write(tmp_path / "annotations" / "test.txt", *(line for line in lines if "_5 " in line))
    return tmp_path


class TestOxfordPets:
    def test_reads_classes_masks_and_boxes(self, pets):
        dataset = OxfordPets(pets, "test")
        assert dataset.class_names == ("american_bulldog", "Siamese_x")  # by published class id
        assert dataset.labels == ((1,), (0,))
        sample = dataset[0]
        np.testing.assert_array_equal(sample.boxes, [[4, 3, 12, 9]])
        np.testing.assert_array_equal(sample.mask == 1, block(4, 8, 5, 11))
        np.testing.assert_array_equal(sample.mask == 255, block(3, 9, 4, 12) - block(4, 8, 5, 11))

    def test_held_out_split(self, pets):
        train, val, whole = (OxfordPets(pets, split).image_ids for split in ("train", "val", "trainval"))
        assert (len(train), len(val), len(whole)) == (8, 2, 10)
        assert set(train) | set(val) == set(whole)
        assert sorted(whole, key=whole.index) == list(whole)

    def test_trimap_of_background_only_has_no_box(self, pets):
        write_mask(pets / "annotations" / "trimaps" / "Siamese_x_5.png", np.full((HEIGHT, WIDTH), 2))
        sample = OxfordPets(pets, "test")[0]
        assert sample.boxes.shape == (0, 4)
        assert sample.box_labels.shape == (0,)
        assert not sample.mask.any()

    @pytest.mark.parametrize("mode", ["L", "P", "CMYK", "LA", "RGBA", "1"])
    def test_images_that_are_not_rgb(self, pets, mode):
        path = pets / "images" / "Siamese_x_5.jpg"
        picture = Image.open(path).convert(mode)
        kind = {"CMYK": "JPEG", "P": "GIF"}.get(mode, "PNG")  # the content tells the format, not the name
        picture.save(path, format=kind)
        sample = OxfordPets(pets, "test")[0]
        assert sample.image.shape == (HEIGHT, WIDTH, 3)

    @pytest.mark.parametrize(
        ("file", "line", "message"),
        [
            ("test.txt", "Nobody_1 2 1 2", r"test\.txt and list\.txt disagree about 'Nobody_1'"),
            ("test.txt", "Siamese_x_5 2 1 2", "disagree about 'Siamese_x_5'"),
            ("test.txt", "Siamese_x_5 34 1", r"test\.txt, line 1: .* is not <image> <class_id> <species> <breed_id>"),
            ("test.txt", "# nothing else", r"empty: .*test\.txt"),
            ("list.txt", "A_1 34 1 1\nB_1 34 1 1", r"list\.txt calls class 34 both 'A' and 'B'"),
        ],
    )
    def test_broken_lists(self, pets, file, line, message):
        write(pets / "annotations" / file, line)
        with pytest.raises(DataError, match=message):
            OxfordPets(pets, "test")

    def test_trimap_value_without_meaning(self, pets):
        write_mask(pets / "annotations" / "trimaps" / "Siamese_x_5.png", np.full((HEIGHT, WIDTH), 0))
        with pytest.raises(DataError, match=r"Siamese_x_5\.png holds the value 0"):
            OxfordPets(pets, "test")[0]

    def test_missing_folders(self, pets):
        (pets / "annotations" / "trimaps").rename(pets / "trimaps")
        with pytest.raises(DataError, match=r"missing: .*trimaps"):
            OxfordPets(pets, "test")


# ------------------------------------------------------------------------------------------------------ Tiny-ImageNet


@pytest.fixture
def tiny(tmp_path) -> Path:
    """Two classes, 5 train images and 2 val images each."""
    root = tmp_path / "tiny-imagenet-200"
    val = []
    for c, wnid in enumerate(("n02", "n01")):
        lines = []
        for i in range(5):
            write_image(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", seed=i)
            lines.append(f"{wnid}_{i}.JPEG\t{i}\t0\t19\t{5 + c}")
        write(root / "train" / wnid / f"{wnid}_boxes.txt", *lines)
        for i in range(2):
            write_image(root / "val" / "images" / f"val_{2 * i + c}.JPEG", seed=i)
            val.append(f"val_{2 * i + c}.JPEG\t{wnid}\t1\t2\t3\t4")
    write(root / "val" / "val_annotations.txt", *val)
    write(root / "wnids.txt", "n02", "n01")
    write(root / "words.txt", "n02\tgoldfish, Carassius auratus", "n09\tanother")
    return root


class TestTinyImageNet:
    def test_reads_train_and_val(self, tiny):
        dataset = TinyImageNet(tiny.parent, "train")
        assert dataset.class_names == ("goldfish", "n01")
        assert dataset.labels == ((0,),) * 5 + ((1,),) * 5
        np.testing.assert_array_equal(dataset[8].boxes, [[3, 0, 20, 7]])  # corner pixels inside
        val, test = TinyImageNet(tiny, "val"), TinyImageNet(tiny, "test")
        assert (val.image_ids, test.image_ids) == (("val_0.JPEG", "val_1.JPEG"), ("val_2.JPEG", "val_3.JPEG"))
        assert val.labels == test.labels == ((0,), (1,))
        np.testing.assert_array_equal(test[1].boxes, [[1, 2, 4, 5]])
        both = TinyImageNet(tiny, "trainval")
        assert both.image_ids == dataset.image_ids + val.image_ids
        np.testing.assert_array_equal(both[10].image, val[0].image)
        np.testing.assert_array_equal(both[9].image, dataset[9].image)

    def test_the_published_val_images_are_shared_out_within_each_class(self, tiny):
        order = ["n01", "n02", "n02", "n02", "n01", "n02"]
        lines = [f"val_{i % 4}.JPEG{'' if i < 4 else i}\t{wnid}\t1\t2\t3\t4" for i, wnid in enumerate(order)]
        write(tiny / "val" / "val_annotations.txt", *lines)
        assert alternate(order) == ([0, 1, 3], [2, 4, 5])
        assert TinyImageNet(tiny, "val").labels == ((1,), (0,), (0,))
        assert TinyImageNet(tiny, "test").labels == ((0,), (1,), (0,))

    def test_broken(self, tiny):
        write(tiny / "val" / "val_annotations.txt", "val_0.JPEG n77 1 2 3 4")
        with pytest.raises(DataError, match=r"gives 'val_0\.JPEG' the class 'n77', which is not in wnids\.txt"):
            TinyImageNet(tiny, "test")
        write(tiny / "val" / "val_annotations.txt", "val_0.JPEG n01 9 2 3 4")
        with pytest.raises(DataError, match="ends before it begins"):
            TinyImageNet(tiny, "test")
        write(tiny / "train" / "n01" / "n01_boxes.txt", "n01_0.JPEG 1 2 x 4")
        with pytest.raises(DataError, match=r"n01_boxes\.txt, line 1"):
            TinyImageNet(tiny, "train")
        write(tiny / "wnids.txt", "n02", "n05")
        with pytest.raises(DataError, match=r"missing: .*n05"):
            TinyImageNet(tiny, "train")


# ------------------------------------------------------------------------------------------------------------ metadata


@pytest.fixture
def boxed(tmp_path) -> dict:
    """Two splits with boxes: train has classes 0..2, test has 0 and 1."""
    root, meta = tmp_path / "images", tmp_path / "metadata"
    for split, labels in (("train", (0, 1, 2)), ("test", (1, 0))):
        names = [f"{split}/{i}.jpg" for i in range(len(labels))]
        for i, name in enumerate(names):
            write_image(root / name, seed=i)
        write(meta / split / "image_ids.txt", *names)
        write(meta / split / "class_labels.txt", *(f"{n},{c}" for n, c in zip(names, labels, strict=True)))
        write(meta / split / "image_sizes.txt", *(f"{name},{WIDTH},{HEIGHT}" for name in names))
        boxes = [f"{name},1,2,19,11" for name in names] + [f"{names[0]},5,5,7,8"]
        write(meta / split / "localization.txt", *boxes)
    return {"root": root, "metadata_root": meta}


@pytest.fixture
def masked(boxed) -> dict:
    """The same with masks in the test split, one of them with an ignore file, in twice the resolution."""
    root, folder = boxed["root"], boxed["metadata_root"] / "test"
    write_mask(root / "test/0a.png", block(2, 6, 3, 8, 255))
    write_mask(root / "test/0b.png", block(8, 9, 3, 8, 255))
    write_mask(root / "test/0i.png", np.kron(block(5, 10, 3, 8, 255), np.ones((2, 2))))
    write_mask(root / "test/1a.png", np.kron(block(2, 6, 3, 8), np.ones((2, 2))))
    lines = ["test/0.jpg,test/0a.png,test/0i.png", "test/0.jpg,test/0b.png,", "test/1.jpg,test/1a.png,"]
    write(folder / "localization.txt", *lines)
    (folder / "image_sizes.txt").unlink()
    return boxed


class TestMetadataFolder:
    def test_reads_boxes_as_published(self, boxed):
        dataset = MetadataFolder(**boxed, split="test")
        assert dataset.image_ids == ("test/0.jpg", "test/1.jpg")
        assert dataset.class_names == ("0", "1", "2")  # the train split has a class more
        assert dataset.labels == ((1,), (0,))
        np.testing.assert_array_equal(dataset[0].boxes, [[1, 2, 19, 11], [5, 5, 7, 8]])
        np.testing.assert_array_equal(dataset[0].box_labels, [1, 1])
        np.testing.assert_array_equal(dataset[1].boxes, [[1, 2, 19, 11]])

    def test_reads_masks(self, masked):
        dataset = MetadataFolder(**masked, split="test")
        mask = dataset[0].mask
        inside = block(2, 6, 3, 8) | block(8, 9, 3, 8)
        np.testing.assert_array_equal(mask == 1, inside)
        np.testing.assert_array_equal(mask == 255, block(5, 10, 3, 8) & ~inside & 1)  # object overrides ignore
        np.testing.assert_array_equal(dataset[1].mask, block(2, 6, 3, 8))
        assert dataset[1].boxes.shape == (0, 4)

    @pytest.mark.parametrize("empty", [False, True])  # the published train splits have empty files
    def test_labels_alone_are_enough(self, boxed, empty):
        for name in ("image_sizes.txt", "localization.txt"):
            path = boxed["metadata_root"] / "train" / name
            path.write_text("") if empty else path.unlink()
        sample = MetadataFolder(**boxed, split="train", class_names=["a", "b", "c"])[2]
        assert sample.mask is None
        assert sample.boxes.shape == (0, 4)

    def test_proxy_list(self, boxed):
        write(boxed["metadata_root"] / "train" / "image_ids_proxy.txt", "train/2.jpg")
        dataset = MetadataFolder(**boxed, split="train", proxy=True)
        assert dataset.labels == ((2,),)
        assert dataset[0].image_id == "train/2.jpg"

    @pytest.mark.parametrize(
        ("file", "lines", "message"),
        [
            ("image_ids.txt", None, r"missing: .*image_ids\.txt"),
            ("image_ids.txt", [], r"empty: .*image_ids\.txt"),
            ("image_ids.txt", ["test/0.jpg", "test/0.jpg"], "lists 'test/0.jpg' more than once"),
            ("image_ids.txt", ["test/0.jpg", "test/9.jpg"], r"class_labels\.txt lacks 'test/9\.jpg'"),
            ("image_ids.txt", ["elsewhere/0.jpg"], r"missing: .*elsewhere"),
            (
                "class_labels.txt",
                ["test/0.jpg,one", "test/1.jpg,0"],
                r"class_labels\.txt, line 1: .* <image_id>,<label>",
            ),
            ("class_labels.txt", ["test/0.jpg,-1", "test/1.jpg,0"], r"gives 'test/0\.jpg' the class -1"),
            ("image_sizes.txt", ["test/0.jpg,20,12"], r"image_sizes\.txt lacks 'test/1\.jpg'"),
            ("localization.txt", ["test/0.jpg,1,2,3,4"], r"localization\.txt lacks 'test/1\.jpg'"),
            ("localization.txt", ["test/0.jpg,1,2,3,4", "test/1.jpg,1,2,3"], r"localization\.txt, line 2"),
            ("localization.txt", ["test/0.jpg,1,2,0,4"], "ends before it begins"),
        ],
    )
    def test_broken_tables(self, boxed, file, lines, message):
        path = boxed["metadata_root"] / "test" / file
        path.unlink()
        if lines is not None:
            write(path, *lines)
        with pytest.raises(DataError, match=message):
            MetadataFolder(**boxed, split="test")

    def test_stated_size_must_be_the_image_s(self, boxed):
        path = boxed["metadata_root"] / "test" / "image_sizes.txt"
        write(path, "test/0.jpg,12,20", "test/1.jpg,20,12")
        dataset = MetadataFolder(**boxed, split="test")
        with pytest.raises(DataError, match=r"0\.jpg is 20x12, .*image_sizes\.txt says 12x20"):
            dataset[0]
        assert dataset[1].size == (HEIGHT, WIDTH)

    @pytest.mark.parametrize("square", [7, 16, 33])
    def test_squares_are_those_of_the_published_evaluation(self, masked, square):
        """Each mask file goes straight to the square, pixel by pixel; images as they always do."""

        def resized(name):
            file = np.array(Image.open(masked["root"] / f"test/{name}.png")) > 0
            found = np.zeros((square, square), bool)
            for row, column in np.ndindex(square, square):
                # OpenCV's own order of operations: a quotient of integers would round differently at some sizes
                found[row, column] = file[
                    tuple(int(i * (1 / (square / n))) for i, n in zip((row, column), file.shape, strict=True))
                ]
            return found

        dataset = MetadataFolder(**masked, split="test", square=square)
        plain = MetadataFolder(**masked, split="test")
        inside, ignored = resized("0a") | resized("0b"), resized("0i")
        truth = np.where(inside, 1, np.where(ignored, 255, 0)), resized("1a").astype(int)
        for index, expected in enumerate(truth):
            sample = dataset[index]
            np.testing.assert_array_equal(sample.mask, expected)
            np.testing.assert_array_equal(sample.image, resize(plain[index], (square, square)).image)
            assert np.array_equal(dataset.read(index, truth=False).image, sample.image)
            assert resize(sample, (square, square)) is sample, "the test's own resizing leaves it as it is"

    def test_mask_of_another_aspect_ratio(self, masked):
        write_mask(masked["root"] / "test/1a.png", np.ones((20, 20)))
        with pytest.raises(DataError, match=r"1a\.png has another aspect ratio than its image: 20x20, its image 20x12"):
            MetadataFolder(**masked, split="test")[1]

    def test_unknown_split_and_too_few_names(self, boxed):
        with pytest.raises(ParameterError, match="did you mean 'train'"):
            MetadataFolder(**boxed, split="trian")
        with pytest.raises(DataError, match=r"gives 'train/2\.jpg' the class 2"):
            MetadataFolder(**boxed, split="train", class_names=["a", "b"])


# ------------------------------------------------------------------------------------------------------------ registry


class TestOpenDataset:
    def test_opens_by_name_with_options(self, cub, pets, boxed):
        assert open_dataset("cub", cub, "val", val_fraction=0.5).name == "cub"
        assert len(open_dataset("pets", pets, "val", seed=3)) == 2
        metadata = open_dataset("metadata", boxed["root"], "test", metadata_root=boxed["metadata_root"])
        assert repr(metadata) == "metadata(test: 2 images, 3 classes)"

    def test_unknown_names_and_options(self, cub):
        with pytest.raises(ParameterError, match=r"no data set 'cup' .*did you mean 'cub'"):
            open_dataset("cup", cub, "train")
        with pytest.raises(ParameterError, match=r"no option 'val_fractoin' .*did you mean 'val_fraction'"):
            open_dataset("cub", cub, "train", val_fractoin=0.1)
        with pytest.raises(ParameterError, match="metadata needs the option 'metadata_root'"):
            open_dataset("metadata", cub, "train")
        with pytest.raises(ParameterError, match=r"held-out fraction is 1\.5"):
            open_dataset("cub", cub, "train", val_fraction=1.5)

    @pytest.mark.parametrize("name", DATASETS)
    @pytest.mark.parametrize("root", ["nowhere", "", None])
    def test_missing_root_tells_where_to_get_the_data(self, tmp_path, name, root):
        root = root and tmp_path / root
        options = {"metadata_root": tmp_path} if name == "metadata" else {}
        with pytest.raises(DataError, match="nowhere" if root else "no folder given") as caught:
            open_dataset(name, root, "train", **options)
        own = name in ("folder", "csv")  # nobody else has them
        assert re.search(r"Remedy: give a" if own else r"Remedy: .*https?://", str(caught.value))

    @pytest.mark.parametrize("name", [name for name in DATASETS if name != "metadata"])
    def test_empty_root_names_what_is_missing(self, tmp_path, name):
        with pytest.raises(DataError, match=f"missing: {re.escape(str(tmp_path))}"):
            open_dataset(name, tmp_path, "train")


def test_read_image_takes_any_damage(tmp_path):
    """Whatever is cut off or flipped in a file, the outcome is an image or a DataError."""
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF"):
        path = tmp_path / f"x.{kind.lower()}"
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path, format=kind)
        whole = path.read_bytes()
        for _ in range(150):
            damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            for position in rng.integers(0, len(damaged), rng.integers(0, 4)):
                damaged[position] = rng.integers(256)
            path.write_bytes(damaged)
            with contextlib.suppress(DataError):
                assert read_image(path, "").shape[2] == 3
