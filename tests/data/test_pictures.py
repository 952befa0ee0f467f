"""Images of one's own: every kind that a camera, a scanner or a program leaves, and what is wrong with the others."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsolnb.data.pictures import Pictures, find_images, read_picture, unique_names
from wsolnb.errors import DataError

RED, BLUE = (250, 10, 20), (10, 20, 250)


def halves(mode="RGB", size=(8, 4)):
    """Red on the left, blue on the right."""
    values = np.zeros((size[1], size[0], 3), np.uint8)
    values[:, : size[0] // 2], values[:, size[0] // 2 :] = RED, BLUE
    return Image.fromarray(values).convert(mode)


def close(found, expected, room=2):
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - np.array(expected)).max() <= room


@pytest.mark.parametrize(("orientation", "turned"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_a_turned_photograph_is_put_upright(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = halves()
    stored.save(tmp_path / "a.png", exif=exif)
    # 6: what is stored has to be turned by 90 degrees clockwise, that is three times to the left.
    assert np.array_equal(read_picture(tmp_path / "a.png", ""), np.rot90(np.array(stored), turned))


def test_a_damaged_exif_block_does_not_hide_the_image(tmp_path):
    halves().save(tmp_path / "a.png", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff\x00\x01")
    assert read_picture(tmp_path / "a.png", "").shape == (4, 8, 3)


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", "tif"), ("CMYK", "jpg"), ("P", "gif"), ("RGBA", "webp")])
def test_colours_survive_every_mode(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    halves(mode, (32, 16)).save(path, **({"lossless": True} if suffix == "webp" else {}))
    found = read_picture(path, "")
    close(found[0, 0], RED, 24)
    close(found[0, -1], BLUE, 24)


def test_grey_becomes_three_equal_channels(tmp_path):
    Image.fromarray(np.full((3, 5), 77, np.uint8)).save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png", "") == 77).all()
    Image.fromarray(np.array([[0, 1], [1, 0]], bool)).save(tmp_path / "b.png")
    assert read_picture(tmp_path / "b.png", "")[..., 0].tolist() == [[0, 255], [255, 0]]


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    values = np.array([[0, 257, 25700], [51400, 65535, 128 * 257]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "a.tif")
    for name in ("a.png", "a.tif"):
        assert read_picture(tmp_path / name, "")[..., 1].tolist() == [[0, 1, 100], [200, 255, 128]]
    assert read_picture(values, "x")[..., 1].tolist() == [[0, 1, 100], [200, 255, 128]]


def test_what_is_transparent_is_white(tmp_path):
    image = halves("RGBA")
    alpha = np.full((4, 8), 255, np.uint8)
    alpha[:, :4] = 0
    image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / "a.png")
    image.convert("P").save(tmp_path / "b.gif", transparency=image.convert("P").getpixel((0, 0)))
    for name in ("a.png", "b.gif"):
        found = read_picture(tmp_path / name, "")
        assert (found[:, :4] == 255).all()
        close(found[0, -1], BLUE, 24)


def test_arrays_and_images_of_pillow():
    grey = np.array([[0.0, 1.0, 0.5]], np.float32)
    assert read_picture(grey, "x")[0, :, 2].tolist() == [0, 255, 128]
    assert np.array_equal(read_picture(np.array(halves()), "x"), np.array(halves()))
    assert np.array_equal(read_picture(halves(), "x"), np.array(halves()))
    assert read_picture(np.zeros((2, 3, 1), np.uint8), "x").shape == (2, 3, 3)
    assert (read_picture(np.zeros((2, 3, 4), np.uint8), "x") == 255).all()


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.array([[0.0, 2.0]]), r"image 1: its values are float64 from 0 to 2"),
        (np.array([[0.0, np.nan]]), r"image 1: its values are float64 from nan to nan"),
        (np.array([[-1, 2]]), r"image 1: its values are int64 from -1 to 2"),
        (np.array([[0, 70000]]), r"image 1: its values are int64 from 0 to 70000"),
        (np.zeros((2, 2, 2), np.uint8), r"image 1: an array of shape \(2, 2, 2\)"),
        (np.zeros((0, 3), np.uint8), r"image 1: an array of shape \(0, 3\)"),
        (3, "image 1 is a int, no image"),
    ],
)
def test_what_has_no_one_reading_is_an_error_that_names_the_image(picture, message):
    with pytest.raises(DataError, match=message):
        Pictures([picture]).read(0)


def png_of(width, height):
    """A PNG file that says it has this size, and holds a single row."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * (width + 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_broken_files_are_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    broken = {
        "cut.jpg": (content[: len(content) // 2], "truncated"),
        "text.jpg": (b"no image", "cannot identify"),
        "empty.png": (b"", "cannot identify"),
        "bomb.png": (png_of(40_000, 40_000), "could be decompression bomb"),
    }
    for name, (data, message) in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"cannot decode .*{name}: .*{message}"):
            read_picture(tmp_path / name, "")
    with pytest.raises(DataError, match=r"missing: .*gone.jpg"):
        read_picture(tmp_path / "gone.jpg", "")


def test_folders_are_searched_for_images_and_each_file_counts_once(tmp_path):
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    for name in ("b.JPG", "a.png", "deep/c.webp", "deep/.hidden/d.png", ".e.png", "notes.txt", "f.heic", "out/g.png"):
        (tmp_path / name).touch()
    found = find_images([tmp_path / "b.JPG", tmp_path, tmp_path / "notes.txt"], without=tmp_path / "out")
    assert [path.name for path in found.files] == ["b.JPG", "a.png", "c.webp", "notes.txt"]
    assert [path.name for path in found.passed] == ["f.heic", "notes.txt"]
    (tmp_path / "none").mkdir()
    assert find_images([tmp_path / "none", tmp_path / "a.png"]).empty == [tmp_path / "none"]
    with pytest.raises(DataError, match=r"no image in the folder .*none"):
        find_images([tmp_path / "none"])
    with pytest.raises(DataError, match="no image was given"):
        find_images([])


def test_names_of_files_of_one_name_are_told_apart():
    paths = [Path(p) for p in ("x/a/cat.jpg", "x/b/cat.jpg", "x/b/cat.png", "dog.jpg", "y/Dog.jpg", "bird.jpg")]
    assert unique_names(paths) == ["a_cat", "x_b_cat.jpg", "x_b_cat.png", "dog", "y_Dog", "bird"]
    odd = unique_names([Path("../cat.jpg"), Path("/cat.jpg"), Path("cat.jpg"), Path("./a_b/c.jpg"), Path("a/b_c.jpg")])
    assert len({name.lower() for name in odd}) == 5
    assert not any("/" in name or ".." in name for name in odd)
