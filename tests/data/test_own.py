"""A user's own images: both readers on whole and on broken trees, and what is said of each fault."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsolnb.data import open_dataset
from wsolnb.data.own import ImageFolder, LabelTable
from wsolnb.data.splits import DataSettings, load_splits
from wsolnb.data.store import ClassMaps
from wsolnb.errors import DataError, MapError, ParameterError
from wsolnb.train.seeds import evaluate, has_masks
from wsolnb.train.segmentation import class_mask

HEIGHT, WIDTH = 12, 20


def picture(path: Path, height: int = HEIGHT, width: int = WIDTH, **options) -> np.ndarray:
    """Save a picture of two colours that JPEG keeps apart: left half red, right half blue."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0], pixels[:, width // 2 :, 2] = 200, 200
    save(Image.fromarray(pixels), path, **options)
    return pixels


def save(image: Image.Image, path: Path, **options) -> None:
    """Save an image as a file like no other: its own path stands behind the image's end."""
    image.save(path, **options)
    with path.open("ab") as file:
        file.write(str(path).encode())


def mask(path: Path, values: np.ndarray, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).convert(mode).save(path)


def block(value: int, y0: int = 2, y1: int = 8, x0: int = 3, x1: int = 11) -> np.ndarray:
    """A map (HEIGHT, WIDTH) that is zero but for a rectangle."""
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[y0:y1, x0:x1] = value
    return values


def write(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding=encoding)
    return path


@pytest.fixture
def pets(tmp_path) -> Path:
    """Two classes, five images each."""
    for name in ("cat", "dog"):
        for i in range(5):
            picture(tmp_path / "pets" / name / f"{i}.jpg")
    return tmp_path / "pets"


@pytest.fixture
def parted(tmp_path) -> Path:
    """Two classes in three parts: 3, 2 and 2 images of each."""
    for part, count in (("train", 3), ("val", 2), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                picture(tmp_path / "parted" / part / name / f"{i}.jpg")
    return tmp_path / "parted"


@pytest.fixture
def listed(tmp_path) -> Path:
    """Four images with one label or two; a and b train, c val, d test."""
    for name in "abcd":
        picture(tmp_path / "listed" / f"{name}.png")
    lines = ("a.png,cat;dog,train", "b.png,dog,train", "c.png,cat,val", "d.png,dog,test")
    write(tmp_path / "listed" / "labels.csv", "image,label,split", *lines)
    return tmp_path / "listed"


class TestFolder:
    def test_splits_are_held_out_of_each_class(self, pets):
        parts = {split: ImageFolder(pets, split) for split in ("train", "val", "test", "trainval")}
        assert {name: len(part) for name, part in parts.items()} == {"train": 6, "val": 2, "test": 2, "trainval": 8}
        for part in parts.values():
            assert part.class_names == ("cat", "dog")
            assert sorted(label for (label,) in part.labels) == sorted([0, 1] * (len(part) // 2))
        three = [set(parts[name].image_ids) for name in ("train", "val", "test")]
        assert len(set.union(*three)) == 10  # no image is in two of them
        assert set(parts["trainval"].image_ids) == three[0] | three[1]
        assert len({ImageFolder(pets, "val", seed=seed).image_ids for seed in range(6)}) > 1
        assert ImageFolder(pets, "val", seed=3).image_ids == ImageFolder(pets, "val", seed=3).image_ids

    def test_parts_that_are_there_are_taken_and_others_held_out(self, parted):
        assert [len(ImageFolder(parted, split)) for split in ("train", "val", "test")] == [6, 4, 4]
        assert ImageFolder(parted, "val").image_ids == (
            "val/cat/0.jpg",
            "val/cat/1.jpg",
            "val/dog/0.jpg",
            "val/dog/1.jpg",
        )
        (parted / "val").rename(parted.parent / "elsewhere")
        assert [len(ImageFolder(parted, split)) for split in ("train", "val", "test")] == [4, 2, 4]
        (parted / "train").rename(parted / "Train")
        assert ImageFolder(parted, "val").image_ids[0].startswith("Train/")

    def test_images_of_one_name_have_ids_of_their_own(self, pets):
        picture(pets / "cat" / "more" / "0.jpg")
        found = load_splits("folder", str(pets))
        ids = [name for part in found for name in part.image_ids]
        assert len(ids) == len(set(ids)) == 11
        assert {"cat/0.jpg", "dog/0.jpg", "cat/more/0.jpg"} <= set(ids)

    def test_without_truth_there_is_none(self, pets):
        sample = ImageFolder(pets, "test")[0]
        assert sample.mask is None
        assert sample.boxes.shape == (0, 4)
        assert np.abs(sample.image[:, :8].mean((0, 1)) - (200, 0, 0)).max() < 12

    def test_what_is_no_image_is_passed_over(self, pets):
        for name in (".DS_Store", "._0.jpg", "Thumbs.db", "notes.txt", "video.mp4"):
            (pets / "cat" / name).write_bytes(b"\0")
        (pets / ".cache" / "x").mkdir(parents=True)
        (pets / "__MACOSX" / "cat").mkdir(parents=True)
        picture(pets / "cat" / "UPPER.JPG", format="JPEG")
        picture(pets / "dog" / "ein Hündchen 犬.jpeg")
        ids = {name for part in load_splits("folder", str(pets)) for name in part.image_ids}
        assert len(ids) == 12
        assert {"cat/UPPER.JPG", "dog/ein Hündchen 犬.jpeg"} <= ids

    def test_names_count_in_one_coding_and_without_blanks(self, pets):
        old = pets / unicodedata.normalize("NFD", "käse ")
        picture(old / "0.jpg")
        assert ImageFolder(pets, "train").class_names == ("cat", "dog", "käse")
        picture(pets / "käse" / "0.jpg")
        with pytest.raises(DataError, match="differ by blanks or by the coding of letters only"):
            ImageFolder(pets, "train")

    @pytest.mark.parametrize(("copy", "more"), [("dog/copy.jpg", " with other labels"), ("cat/z.jpg", "")])
    def test_a_copy_of_an_image_is_told(self, pets, copy, more):
        """Its class is not clear, or one of both could be trained on and the other be scored."""
        (pets / copy).write_bytes((pets / "cat" / "0.jpg").read_bytes())
        with pytest.raises(DataError, match=rf"'{copy}' is the same file as 'cat/0.jpg', byte for byte{more}"):
            ImageFolder(pets, "train")
        (pets / copy).write_bytes((pets / "cat" / "0.jpg").read_bytes()[:-1] + b"?")  # of its size, but another file
        assert len(ImageFolder(pets, "train"))

    def test_links_are_followed(self, pets, tmp_path):
        for i in range(3):
            picture(tmp_path / "far" / f"{i}.jpg")
        (pets / "bird").symlink_to(tmp_path / "far", target_is_directory=True)
        (tmp_path / "far" / "round").symlink_to(pets / "bird", target_is_directory=True)  # without end
        assert ImageFolder(pets, "train").class_names == ("bird", "cat", "dog")
        (pets / "dog" / "link.jpg").symlink_to(pets / "cat" / "0.jpg")
        with pytest.raises(DataError, match=r"link\.jpg: 'dog/link\.jpg' is listed a second time with other labels"):
            ImageFolder(pets, "train")
        (pets / "dog" / "link.jpg").unlink()
        (pets / "eel").symlink_to(tmp_path / "nowhere", target_is_directory=True)
        with pytest.raises(DataError, match=r"eel is a link to .*nowhere, which does not exist"):
            ImageFolder(pets, "train")
        (pets / "eel").unlink()
        (pets / "dog" / "link.jpg").symlink_to(pets / "cat" / "0.jpg")
        (pets / "cat" / "0.jpg").unlink()
        with pytest.raises(DataError, match=r"link\.jpg is a link to .*0\.jpg, which does not exist"):
            ImageFolder(pets, "train")

    def test_a_class_called_train(self, pets):
        (pets / "dog").rename(pets / "train")
        assert ImageFolder(pets, "val").class_names == ("cat", "train")

    @pytest.mark.parametrize("split", ["trian", "all"])
    def test_unknown_split(self, pets, split):
        with pytest.raises(ParameterError, match=f"folder has no split '{split}'"):
            ImageFolder(pets, split)


class TestFaultsOfFolders:
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda root: root.rename(root.parent / "x"), "no such folder: .*pets"),
            (
                lambda root: [p.unlink() for p in root.glob("*/*.jpg")],
                "no image of the class 'cat' in .*cat: it is empty",
            ),
            (lambda root: picture(root / "0.jpg"), r"0\.jpg lies in the folder of no class"),
            (lambda root: (root / "dog").rename(root.parent / "d"), "has one class only: 'cat'"),
            (lambda root: (root / "eel").mkdir(), "no image of the class 'eel' in .*eel: it is empty"),
            (lambda root: write(root / "eel" / "a.txt"), r"no image of the class 'eel' in .*eel: it holds a\.txt"),
            (lambda root: write(root / "cat" / "IMG_1.HEIC"), r"IMG_1\.HEIC is of a format that is not read"),
        ],
    )
    def test_of_classes(self, pets, spoil, message):
        spoil(pets)
        with pytest.raises(DataError, match=message) as caught:
            ImageFolder(pets, "train")
        assert "Remedy" in str(caught.value)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda root: (root / "val").rename(root / "valid"), r"valid.cat.0\.jpg is in no class .*mean 'val'"),
            (lambda root: picture(root / "extra" / "0.jpg"), r"extra.0\.jpg is in no class of train, val or test"),
            (lambda root: picture(root / "val" / "0.jpg"), r"val.0\.jpg lies in the folder of no class"),
            (lambda root: (root / "train").rename(root.parent / "t"), "has test, val but no train"),
            (
                lambda root: (root / "val" / "dog").rename(root / "val" / "dogs"),
                r"0\.jpg: the class 'dogs' is in val, but train has no image of it \(did you mean 'dog'\?\)",
            ),
            (
                lambda root: [(root / n).rename(root / f"{n}ing") for n in ("train", "val", "test")],
                "the folders of .*parted hold folders: testing, training, valing",
            ),
        ],
    )
    def test_of_parts(self, parted, spoil, message):
        spoil(parted)
        with pytest.raises(DataError, match=message):
            ImageFolder(parted, "train")

    def test_unlabelled_test_images(self, parted):
        for path in (parted / "test").glob("*/*"):
            path.rename(parted / "test" / f"{path.parent.name}{path.name}")
        for folder in (parted / "test").iterdir():
            if folder.is_dir():
                folder.rmdir()
        with pytest.raises(DataError, match=r"test.cat0\.jpg is in no class of train, val or test"):
            ImageFolder(parted, "train")

    def test_a_class_may_lack_validation_images(self, parted):
        for path in (parted / "val" / "dog").iterdir():
            path.unlink()
        assert ImageFolder(parted, "val").labels == ((0,), (0,))

    def test_too_few_to_hold_out(self, pets):
        for path in [*pets.glob("*/[1-4].jpg")]:
            path.unlink()
        assert len(ImageFolder(pets, "train")) == 2
        with pytest.raises(DataError, match=r"no image of .* is left for the split 'val'"):
            ImageFolder(pets, "val")

    def test_no_image_behind_the_name(self, pets):
        for path in (pets / "cat").iterdir():
            path.write_bytes(b"<html>404</html>")
        with pytest.raises(DataError, match=r"cannot decode .*cat.\d\.jpg") as caught:
            ImageFolder(pets, "test")[0]
        assert caught.value.remedy.startswith("replace the file")


class TestPixels:
    @pytest.mark.parametrize(
        ("mode", "suffix", "left"),
        [
            ("L", "png", (60, 60, 60)),  # 0.299 * 200, the luma of red
            ("1", "png", None),
            ("P", "gif", (200, 0, 0)),
            ("CMYK", "jpg", (200, 0, 0)),
            ("RGBA", "png", (200, 0, 0)),
            ("LA", "png", (60, 60, 60)),
        ],
    )
    def test_modes(self, pets, mode, suffix, left):
        for path in (pets / "cat").iterdir():
            save(Image.open(path).convert(mode), path.with_suffix(f".{suffix}"))
            if suffix != "jpg":
                path.unlink()
        image = ImageFolder(pets, "test")[0].image
        assert (image.shape, image.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
        if left:
            assert np.abs(image[:, :8].mean((0, 1)) - left).max() < 16

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_sixteen_bits(self, pets, suffix):
        """Pillow's own conversion clips at 255: nearly all would be white."""
        for path in (pets / "cat").iterdir():
            values = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
            save(Image.fromarray(values), path.with_suffix(f".{suffix}"))
            path.unlink()
        image = ImageFolder(pets, "test")[0].image
        np.testing.assert_array_equal(image[..., 1], np.rint(values / 257))

    @pytest.mark.parametrize(("kind", "value"), [(np.int32, 70000), (np.float32, 2), (np.uint16, 4095)])
    def test_values_of_no_known_range_are_refused(self, pets, kind, value):
        for path in (pets / "cat").iterdir():
            save(Image.fromarray(np.full((4, 4), value, kind)), path.with_suffix(".tif"))
            path.unlink()
        with pytest.raises(DataError, match=rf"cat.\d\.tif: its values are {np.dtype(kind)} from {value} to {value}"):
            ImageFolder(pets, "test")[0]

    @pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
    def test_exif(self, pets, orientation, turns):
        """Boxes and masks are those of the image as it is shown; `turns` are of 90 degrees, counter-clockwise."""
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = [picture(pets / "cat" / f"{i}.jpg", exif=exif, quality=95) for i in range(5)]
        shown = np.rot90(stored[0], turns)
        height, width = shown.shape[:2]
        values = np.zeros((height, width), np.uint8)
        values[1:4, 2:9] = 255
        for i in range(5):
            mask(pets / "masks" / "cat" / f"{i}.png", values)
        sample = ImageFolder(pets, "test")[0]
        assert np.abs(sample.image.astype(int) - shown).mean() < 12
        np.testing.assert_array_equal(sample.boxes, [[2, 1, 9, 4]])
        if turns % 2:
            for i in range(5):
                mask(pets / "masks" / "cat" / f"{i}.png", np.rot90(values))
            problem = r"is 20x12, its image 12x20 as it is shown; the image may be turned by its EXIF"
            with pytest.raises(DataError, match=problem):
                ImageFolder(pets, "test")[0]

    def test_published_data_are_not_turned(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        picture(tmp_path / "JPEGImages" / "a.jpg", exif=exif)
        write(tmp_path / "ImageSets" / "Main" / "train.txt", "a")
        write(tmp_path / "ImageSets" / "Main" / "bird_train.txt", "a 1")
        write(tmp_path / "class_names.txt", "bird")
        assert open_dataset("voc", tmp_path, "train")[0].size == (HEIGHT, WIDTH)


class TestMasks:
    def give(self, root: Path, values: np.ndarray, mode: str = "L") -> ImageFolder:
        for i in range(5):
            mask(root / "masks" / "cat" / f"{i}.png", values, mode)
        return ImageFolder(root, "test")

    @pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "LA"])
    def test_zero_and_255(self, pets, mode):
        cat, dog = self.give(pets, block(255), mode)
        np.testing.assert_array_equal(cat.mask, block(1))
        np.testing.assert_array_equal(cat.boxes, [[3, 2, 11, 8]])
        np.testing.assert_array_equal(cat.box_labels, [0])
        assert dog.mask is None

    def test_zero_and_one_and_unknown(self, pets):
        values = block(1)
        values[0] = 128
        found = self.give(pets, values)[0].mask
        np.testing.assert_array_equal(found[1:], block(1)[1:])
        assert (found[0] == 255).all()

    @pytest.mark.parametrize("white", [0, 1])
    def test_palettes(self, pets, white):
        """Indices count, but for a palette of black and white, which is as it looks."""
        for i in range(5):
            image = Image.fromarray(block(1))
            image.putpalette([255 * (white == 0)] * 3 + [255 * (white == 1)] * 3)
            (pets / "masks" / "cat").mkdir(parents=True, exist_ok=True)
            image.save(pets / "masks" / "cat" / f"{i}.png")
        np.testing.assert_array_equal(ImageFolder(pets, "test")[0].mask, block(1) if white else 1 - block(1))
        image.putpalette([0, 0, 0, 128, 0, 0])
        for i in range(5):
            image.save(pets / "masks" / "cat" / f"{i}.png")
        np.testing.assert_array_equal(ImageFolder(pets, "test")[0].mask, block(1))

    def test_sixteen_bits(self, pets):
        for i in range(5):
            (pets / "masks" / "cat").mkdir(parents=True, exist_ok=True)
            Image.fromarray(block(1).astype(np.uint16) * 65535).save(pets / "masks" / "cat" / f"{i}.png")
        np.testing.assert_array_equal(ImageFolder(pets, "test")[0].mask, block(1))

    def test_an_empty_mask_has_no_box(self, pets):
        cat = self.give(pets, block(0))[0]
        assert cat.boxes.shape == (0, 4)
        assert not cat.mask.any()

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (block(7), r"cat.\d\.png holds the value 7, which stands for nothing"),
            (block(255) | block(1, 0, 1), r"cat.\d\.png holds 1 and 255: which of them is the object"),
            (np.arange(240).reshape(HEIGHT, WIDTH), r"cat.\d\.png has 240 levels of grey: its edges were smoothed"),
            (np.zeros((6, 10)), r"cat.\d\.png is 10x6, its image 20x12 as it is shown$"),
            (np.stack([block(255), block(0), block(0)], axis=2), r"cat.\d\.png is in colour"),
        ],
    )
    def test_faults(self, pets, values, message):
        values = np.asarray(values, np.uint8)
        with pytest.raises(DataError) as caught:
            self.give(pets, values, "L" if values.ndim == 2 else "RGB")[0]
        assert re.search(message, caught.value.problem)
        assert "0 background, 255 (or 1) object" in caught.value.remedy

    def test_truncated(self, pets):
        self.give(pets, block(255))
        for path in (pets / "masks" / "cat").iterdir():
            path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(DataError, match=r"cannot decode .*masks.cat.\d\.png"):
            ImageFolder(pets, "test")[0]

    def test_masks_of_no_image(self, pets):
        mask(pets / "masks" / "0.png", block(255))
        with pytest.raises(DataError, match=r"no mask in .*masks belongs to an image: .*0\.png for one") as caught:
            ImageFolder(pets, "test")
        assert "masks/cat/0.png" in caught.value.remedy

    def test_masks_that_are_no_png(self, pets):
        picture(pets / "masks" / "cat" / "0.jpg")
        with pytest.raises(DataError, match=r"masks.cat.0\.jpg is no PNG file"):
            ImageFolder(pets, "test")

    def test_images_that_differ_by_extension_only(self, pets):
        picture(pets / "cat" / "0.png")
        mask(pets / "masks" / "cat" / "0.png", block(255))
        with pytest.raises(DataError, match="could belong to 2 images that are called cat/0") as caught:
            ImageFolder(pets, "train")
        assert "masks/cat/0.jpg.png" in caught.value.remedy
        (pets / "masks" / "cat" / "0.png").rename(pets / "masks" / "cat" / "0.jpg.png")
        parts = load_splits("folder", str(pets))
        masks = {s.image_id: s.mask for part in parts for s in map(part.__getitem__, range(len(part)))}
        assert [name for name, found in masks.items() if found is not None] == ["cat/0.jpg"]


RENDERED = dict.fromkeys(("classes", "train_images", "val_images", "test_images"), 2)
RENDERED |= {"body_cue": 0, "context_correlation": 0, "seed": 0}
"""What notebooks say besides of the rendered benchmark."""


class TestNotebooks:
    """How notebooks open them."""

    def test_one_label_an_image(self, pets, listed):
        settings = DataSettings(dataset="folder", data_root=str(pets), **RENDERED)
        assert [len(part) for part in settings.splits()] == [6, 2, 2]
        settings = DataSettings(dataset="csv", data_root=str(listed), **RENDERED)
        with pytest.raises(DataError, match=r"images of csv\(train: .*\) have several labels.*\n.*notebooks 20 to 23"):
            settings.splits()
        assert settings.splits("scenes").train.multi_label

    def test_seeds_of_images_without_masks(self, pets, listed):
        bare = ImageFolder(pets, "test")
        assert not has_masks(bare)
        assert (class_mask(bare[0], bare.multi_label) == 255).all()
        mask(listed / "masks" / "b.png", block(2))
        assert has_masks(LabelTable(listed, "train"))  # of the second image only
        with pytest.raises(MapError, match=r"no image has a mask to be judged by\n.*in masks/"):
            evaluate([{"cam": ClassMaps(bare.image_ids[0], (0,), np.zeros((1, HEIGHT, WIDTH), np.float32))}], bare)


class TestBoxes:
    def boxed(self, root: Path, *lines: str, header: str = "image,x0,y0,x1,y1") -> ImageFolder:
        write(root / "boxes.csv", header, *lines)
        return ImageFolder(root, "test")

    def test_floats_several_and_none(self, pets):
        lines = [f"cat/{i}.jpg,1.5,2,19.25,{12}" for i in range(5)] + [f"cat/{i}.jpg, 0, 0, 20, 12" for i in range(5)]
        cat, dog = self.boxed(pets, *lines)
        np.testing.assert_array_equal(cat.boxes, [[1.5, 2, 19.25, 12], [0, 0, 20, 12]])
        np.testing.assert_array_equal(cat.box_labels, [0, 0])
        assert dog.boxes.shape == (0, 4)

    def test_boxes_go_before_those_of_the_mask(self, pets):
        for i in range(5):
            mask(pets / "masks" / "cat" / f"{i}.png", block(255))
        np.testing.assert_array_equal(
            self.boxed(pets, *(f"cat/{i}.jpg,1,1,5,5" for i in range(5)))[0].boxes, [[1, 1, 5, 5]]
        )

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("cat/0.jpg,9,2,3,4", r"boxes\.csv, line 2: the box 9, 2, 3, 4 of 'cat/0\.jpg' ends before it begins"),
            ("cat/0.jpg,3,2,3,4", "ends before it begins"),
            (
                "cat/0.jpg,0.1,0.2,0.8,0.9",
                r"line 2: the box .* is in shares of the image's sides, from 0 to 1, not in pix",
            ),
            ("cat/0.jpg,-0.01,0,1.02,1", "is in shares of the image's sides"),
            ("cat/0.jpg,nan,2,3,4", "line 2: not finite: nan"),
            ("cat/0.jpg,1,2,x,4", "line 2: could not convert string to float: 'x'"),
            ("cat/0.jpg,1,2,3", r"line 2: 4 fields, the header has 5: cat/0\.jpg,1,2,3"),
            ("cat/9.jpg,1,2,3,4", r"line 2: there is no image 'cat/9\.jpg' \(did you mean 'cat/\d\.jpg'\?\)"),
            ("../x.jpg,1,2,3,4", r"line 2: '\.\./x\.jpg' leads out of"),
            ("/tmp/x.jpg,1,2,3,4", "line 2: '/tmp/x.jpg' is an absolute path"),
        ],
    )
    def test_faults_of_lines(self, pets, line, message):
        with pytest.raises(DataError, match=message):
            self.boxed(pets, line)

    @pytest.mark.parametrize("box", ["1,1,40,9", "1,1,9,24", "-5,0,9,9", "50,50,60,60"])
    def test_boxes_that_reach_out(self, pets, box):
        dataset = self.boxed(pets, *(f"cat/{i}.jpg,{box}" for i in range(5)))
        with pytest.raises(DataError, match=r"reaches out of .*cat.\d\.jpg \(20x12 as it is shown\)"):
            dataset[0]

    def test_one_pixel_over_is_rounding(self, pets):
        assert self.boxed(pets, *(f"cat/{i}.jpg,-1,0,21,12.6" for i in range(5)))[0].boxes[0, 2] == 21

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ("cat/0.jpg,1,2,3,4", "the header has no column 'image', only 'cat/0.jpg'"),
            ("image,x0,y0,w,h", "the header has no column 'x1'"),
            ("image,x0,y0,x1,x1,y1", "the header has the column 'x1' twice"),
            ("image,x0,y0,x1,y1,labels", r"an unknown column 'labels' \(did you mean 'label'\?\)"),
        ],
    )
    def test_faults_of_the_header(self, pets, header, message):
        with pytest.raises(DataError, match=message):
            self.boxed(pets, "cat/1.jpg,1,2,3,4", header=header)

    def test_empty(self, pets):
        with pytest.raises(DataError, match=r"empty: .*boxes\.csv"):
            self.boxed(pets)

    def test_labels_of_boxes(self, listed):
        header, table = "image,x0,y0,x1,y1,label", listed / "boxes.csv"
        write(table, header, "a.png,1,1,5,5,dog", "a.png,6,6,9,9,cat", "b.png,1,1,5,5,")
        train = LabelTable(listed, "train")
        np.testing.assert_array_equal(train[0].box_labels, [1, 0])
        np.testing.assert_array_equal(train[1].box_labels, [1])
        for label, message in (
            ("", "no label, its image 'a.png' has 'cat', 'dog'"),
            ("cow", "the label 'cow', its image"),
        ):
            write(table, header, f"a.png,1,1,5,5,{label}")
            with pytest.raises(DataError, match=message):
                LabelTable(listed, "train")


class TestTable:
    def test_labels_and_splits(self, listed):
        train, val, test = load_splits("csv", str(listed))
        assert train.multi_label
        assert train.class_names == test.class_names == ("cat", "dog")
        assert train.image_ids == ("a.png", "b.png")
        assert (train.labels, val.labels, test.labels) == (((0, 1), (1,)), ((0,),), ((1,),))
        assert LabelTable(listed, "trainval").image_ids == ("a.png", "b.png", "c.png")
        assert LabelTable(listed / "labels.csv", "val")[0].image.shape == (HEIGHT, WIDTH, 3)

    def test_without_splits_they_are_held_out(self, pets):
        write(pets / "labels.csv", "image,label", *(f"{c}/{i}.jpg,{c}" for c in ("cat", "dog") for i in range(5)))
        train, val, test = load_splits("csv", str(pets))
        assert [len(part) for part in (train, val, test)] == [6, 2, 2]
        assert not train.multi_label
        assert load_splits("folder", str(pets)).val.image_ids == val.image_ids  # one rule, one seed

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    @pytest.mark.parametrize("separator", [",", ";", "\t"])
    def test_separators_blanks_and_marks(self, listed, encoding, separator):
        lines = [
            "Image,LABEL , Split",
            "a.png,käse ,train",
            "./b.png, dog,Train",
            "",
            "images\\e.png,dog,val",
            "d.png,dog,test,",
        ]
        lines[-1] = "d.png,dog,test"
        picture(listed / "images" / "e.png")
        write(listed / "labels.csv", *(line.replace(",", separator) for line in lines), encoding=encoding)
        train = LabelTable(listed, "train")
        assert train.class_names == ("dog", "käse")
        assert train.image_ids == ("a.png", "b.png")
        assert LabelTable(listed, "val").image_ids == ("images/e.png",)

    def test_several_labels_in_quotes_where_semicolons_separate(self, listed):
        write(listed / "labels.csv", "image;label;split", 'a.png;"cat;dog";train', "b.png;cat;val", "c.png;dog;test")
        assert LabelTable(listed, "train").labels == ((0, 1),)
        write(listed / "labels.csv", "image;label;split", "a.png;cat;dog;train", "b.png;cat;val", "c.png;dog;test")
        with pytest.raises(DataError, match="line 2: 4 fields, the header has 3") as caught:
            LabelTable(listed, "train")
        assert '"cat;dog"' in caught.value.remedy

    def test_images_beside_the_table_or_in_images(self, listed):
        (listed / "images").mkdir()
        for name in "abcd":
            (listed / f"{name}.png").rename(listed / "images" / f"{name}.png")
        assert LabelTable(listed, "val").image_path(0) == listed / "images" / "c.png"

    def test_names_in_another_coding(self, listed):
        picture(listed / unicodedata.normalize("NFD", "é é.png"))
        write(
            listed / "labels.csv",
            "image,label,split",
            "é é.png,x,train",
            "a.png,y,train",
            "b.png,y,val",
            "c.png,x,test",
        )
        assert LabelTable(listed, "train")[0].image_id == unicodedata.normalize("NFC", "é é.png")

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (["a.png,cat,train"], "line 1: the header has no column 'image', only 'a.png', 'cat', 'train'"),
            (["file,label"], "the header has no column 'image'"),
            (["image,label,splits", "a.png,cat,train"], r"unknown column 'splits' \(did you mean 'split'\?\)"),
            (["image,label,label", "a.png,cat,train"], "the header has the column 'label' twice"),
            ([], r"empty: .*labels\.csv"),
            (["image,label"], r"empty: .*labels\.csv"),
            (["image,label", "a.png,cat", "a.png,cat"], "line 3: 'a.png' is listed a second time, first at .*line 2"),
            (["image,label", "a.png,cat", "./a.png,dog"], "line 3: 'a.png' is listed a second time with other labels"),
            (["image,label", "a.png,"], "line 2: no label"),
            (["image,label", "a.png,cat;"], "line 2: no label"),
            (["image,label", ",cat"], "line 2: no image"),
            (["image,label", "z.png,cat"], r"line 2: missing: .*z\.png"),
            (["image,label", "..,cat"], r"line 2: '\.\.' leads out of"),
            (["image,label", "x/../../a.png,cat"], "line 2: 'x/../../a.png' leads out of"),
            (["image,label", "..\\a.png,cat"], "leads out of"),
            (["image,label", "/data/a.png,cat"], "line 2: '/data/a.png' is an absolute path"),
            (["image,label", "C:\\data\\a.png,cat"], "is an absolute path"),
            (["image,label", "sub,cat"], r"line 2: no file but a folder: .*sub"),
            (["image,label,split", "a.png,cat,valid"], "line 2: the image is in no split, but in 'valid'.*mean 'val'"),
            (["image,label,split", "a.png,cat,"], "line 2: the image is in no split, but in ''"),
            (["image,label,split", "a.png,cat,test"], "has no image for training"),
            (
                ["image,label,split", "a.png,cat,train", "b.png,dog,val"],
                "line 3: the class 'dog' is in val, but train has",
            ),
            (["image,label", "a.png,cat", "b.png,cat"], "has one class only: 'cat'"),
            (["image,label", 'a.png,"cat'], "line 2: unexpected end of data"),
            (["image,label", "a.png,cat,1,2"], "line 2: 4 fields, the header has 2"),
        ],
    )
    def test_faults(self, listed, lines, message):
        (listed / "sub").mkdir()
        write(listed / "labels.csv", *lines)
        with pytest.raises(DataError, match=message) as caught:
            LabelTable(listed, "train")
        assert "Remedy" in str(caught.value)

    def test_a_file_for_a_folder(self, listed):
        with pytest.raises(DataError, match=r"a file, no folder: .*a\.png"):
            ImageFolder(listed / "a.png", "train")
        (listed / "labels.csv").write_bytes(b"image,label\na.png,c\0t\n")
        with pytest.raises(DataError, match=r"labels\.csv is no text: it holds zero bytes"):
            LabelTable(listed, "train")

    def test_another_coding_of_text(self, listed):
        (listed / "labels.csv").write_text("image,label\na.png,kat\n", encoding="utf-16")
        with pytest.raises(DataError, match=r"labels\.csv is no UTF-8 text"):
            LabelTable(listed, "train")

    def test_table_of_another_name(self, listed):
        (listed / "labels.csv").rename(listed / "all.csv")
        with pytest.raises(DataError, match=r"missing: .*labels\.csv; there is all\.csv, which can be given itself"):
            LabelTable(listed, "train")
        assert len(LabelTable(listed / "all.csv", "train")) == 2
        with pytest.raises(DataError, match=r"no such folder: .*none\.csv"):
            LabelTable(listed / "none.csv", "train")

    def test_masks_of_classes(self, listed):
        values = block(1) + block(2, 9, 11)
        values[0] = 255
        mask(listed / "masks" / "a.png", values)
        sample = LabelTable(listed, "train")[0]
        np.testing.assert_array_equal(sample.mask, values)
        np.testing.assert_array_equal(sample.boxes, [[3, 2, 11, 8], [3, 9, 11, 11]])
        np.testing.assert_array_equal(sample.box_labels, [0, 1])

    @pytest.mark.parametrize(
        ("name", "values", "message"),
        [
            ("a", block(255), r"a\.png says object or not \(0 and 255\), in a data set of several labels"),
            ("b", block(1), r"b\.png holds 1, which is the class 'cat'; the image is labelled 2 dog"),
            ("b", block(3), r"b\.png holds 3, which is nothing; the image is labelled 2 dog"),
        ],
    )
    def test_faults_of_masks_of_classes(self, listed, name, values, message):
        mask(listed / "masks" / f"{name}.png", values)
        dataset = LabelTable(listed, "train")
        with pytest.raises(DataError, match=message):
            dataset[dataset.image_ids.index(f"{name}.png")]
