import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from wsolnb import keys
from wsolnb.data.base import LocalizationDataset
from wsolnb.data.sample import Sample
from wsolnb.data.store import ClassMaps, Store, WithMasks
from wsolnb.data.transforms import Compose, Resize, shift
from wsolnb.errors import DataError, ParameterError


def drawn(seed=0, shape=(5, 9)):
    return np.random.default_rng(seed).random(shape) > 0.5


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


# Masks


@pytest.mark.parametrize("image_id", ["0001", "birds/0001", "a b/ü.jpg", "n01/n01.x.JPEG"])
@pytest.mark.parametrize("shape", [(5, 9), (1, 1), (16, 8)])
def test_a_mask_of_bool_comes_back_with_its_facts(store, image_id, shape):
    mask = drawn(shape=shape)
    store.write_mask(image_id, mask, outcome="enhanced", note="größer")
    found, facts = store.read_mask(image_id)
    assert found.dtype == bool
    assert np.array_equal(found, mask)
    assert facts == {"outcome": "enhanced", "note": "größer"}


def test_a_mask_of_classes_comes_back(store):
    mask = np.random.default_rng(0).integers(0, 256, (7, 5)).astype(np.uint8)
    store.write_mask("a", mask)
    found, facts = store.read_mask("a")
    assert found.dtype == np.uint8
    assert np.array_equal(found, mask)
    assert facts == {}


def test_a_written_mask_takes_the_place_of_the_one_before(store):
    for seed in (0, 1):
        store.write_mask("a", drawn(seed))
    assert np.array_equal(store.read_mask("a")[0], drawn(1))
    assert [path.name for path in store.folder.iterdir()] == ["a.png"], "half-written files are left"


def test_the_files_are_pictures_that_any_viewer_shows(store):
    store.write_mask("a/b.jpg", drawn(), outcome="unchanged")
    store.write_mask("classes", drawn().astype(np.uint8))
    with Image.open(store.folder / "a" / "b.jpg.png") as image:
        assert (image.mode, image.size) == ("1", (9, 5))
        assert image.text["outcome"] == "unchanged"
        assert np.array_equal(np.array(image.convert("L")), drawn() * 255)
    with Image.open(store.folder / "classes.png") as image:
        assert image.mode == "L"
        assert np.array_equal(np.array(image), drawn())


@pytest.mark.parametrize("mask", [np.zeros((2, 2)), np.zeros((2, 2), int), np.zeros((2, 2, 3), np.uint8),
                                  np.zeros(4, bool), np.zeros((0, 4), bool)])  # fmt: skip
def test_what_is_no_mask_is_not_written(store, mask):
    with pytest.raises(ParameterError, match="bool or uint8"):
        store.write_mask("a", mask)
    assert not store.folder.exists()


@pytest.mark.parametrize("image_id", ["../a", "a/../../b", "/etc/a", ".."])
def test_a_name_that_leads_out_of_the_folder_is_refused(store, image_id):
    for use in (
        lambda: store.write_mask(image_id, drawn()),
        lambda: store.read_mask(image_id),
        lambda: store.write_maps(ClassMaps(image_id, (), np.zeros((0, 2, 2)))),
        lambda: store.read_maps(image_id),
    ):
        with pytest.raises(DataError, match="leads out"):
            use()


def change_pixel(path):
    """Leave a valid picture whose pixels are not those that were stored."""
    with Image.open(path) as image:
        values, text = np.array(image), image.text
    values[0, 0] = ~values[0, 0]
    rewrite(path, values, text)


def change_fact(path):
    with Image.open(path) as image:
        values, text = np.array(image), {**image.text, "outcome": "empty"}
    rewrite(path, values, text)


def rewrite(path, values, text):
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    Image.fromarray(values.astype(np.uint8) * 255).convert("1").save(path, pnginfo=info)


DAMAGE = {
    "pixel": change_pixel,
    "fact": change_fact,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "empty": lambda path: path.write_bytes(b""),
    "no picture": lambda path: path.write_bytes(b"no png"),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "of another image": lambda path: path.write_bytes(path.with_name("3.png").read_bytes()),
    "in colour": lambda path: Image.new("RGB", (9, 5)).save(path),
    "of 16 bits": lambda path: Image.fromarray(np.full((5, 9), 300, np.uint16)).save(path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_each_kind_is_found(store, damage):
    ids = [str(i) for i in range(5)]
    for i, image_id in enumerate(ids):
        store.write_mask(image_id, drawn(i), outcome="enhanced")
    assert store.to_do(ids) == []
    DAMAGE[damage](store.path("2", ".png"))
    with pytest.raises(DataError, match=r"2\.png"):
        store.read_mask("2")
    with pytest.raises(DataError, match=r"2\.png"):
        store.count(ids, "outcome")
    assert store.to_do(ids) == [2]


def test_no_flipped_bit_changes_a_mask_unseen(store):
    store.write_mask("a", drawn(), outcome="enhanced")
    path = store.path("a", ".png")
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            mask, facts = store.read_mask("a")
        except DataError:
            continue
        assert np.array_equal(mask, drawn())
        assert facts == {"outcome": "enhanced"}


def test_a_mask_of_another_program_has_no_digest_and_is_read(store):
    store.folder.mkdir()
    Image.fromarray(np.array([[0, 3], [255, 1]], np.uint8)).save(store.folder / "a.png")
    mask, facts = store.read_mask("a")
    assert mask.tolist() == [[0, 3], [255, 1]]
    assert facts == {}
    assert store.count(["a"], "outcome") == {"": 1}


def test_facts_are_counted(store):
    for i, outcome in enumerate(("full", "empty", "full")):
        store.write_mask(str(i), drawn(), outcome=outcome)
    assert store.count(["0", "1", "2"], "outcome") == {"full": 2, "empty": 1}
    assert store.count(["1"], "outcome") == {"empty": 1}


def test_thousands_of_masks_take_seconds(store):
    ids = [f"{i // 1000}/{i:05d}" for i in range(3300)]
    mask = np.zeros((112, 112), bool)
    mask[30:80, 20:90] = True
    started = time.process_time()
    for image_id in ids:
        store.write_mask(image_id, mask, outcome="enhanced")
    assert store.to_do(ids) == []
    assert store.count(ids, "outcome") == {"enhanced": 3300}
    assert time.process_time() - started < 20, "of the processor; five where nothing else runs"


# Maps


def test_maps_come_back_in_half_precision(store):
    maps = np.random.default_rng(0).random((2, 4, 6)).astype(np.float32)
    store.write_maps(ClassMaps("birds/1", (3, 7), maps))
    found = store.read_maps("birds/1")
    assert (found.image_id, found.classes, found.maps.dtype) == ("birds/1", (3, 7), np.float32)
    assert np.array_equal(found.maps, maps.astype(np.float16))
    assert np.abs(found.maps - maps).max() < 2**-11


def test_an_image_without_classes_has_no_maps(store):
    store.write_maps(ClassMaps("a", (), np.zeros((0, 4, 6), np.float32)))
    found = store.read_maps("a")
    assert (found.classes, found.maps.shape) == ((), (0, 4, 6))


def test_maps_are_read_one_at_a_time(store):
    for i in range(3):
        store.write_maps(ClassMaps(str(i), (i,), np.full((1, 2, 2), i / 4, np.float32)))
    stream = store.all_maps(["2", "0", "missing"])
    assert [next(stream).classes for _ in range(2)] == [(2,), (0,)]
    with pytest.raises(DataError, match="missing"):
        next(stream)


@pytest.mark.parametrize("damage", ["truncated", "empty", "no archive", "missing", "a pickle", "other classes"])
def test_damaged_maps_are_found(store, damage):
    store.write_maps(ClassMaps("a", (1, 2), np.random.default_rng(0).random((2, 9, 9))))
    path = store.path("a", ".npz")
    if damage == "missing":
        path.unlink()
    elif damage == "a pickle":
        np.savez(path, maps=np.array([None]), classes=np.array([1]))
    elif damage == "other classes":
        np.savez(path, maps=np.zeros((2, 9, 9), np.float16), classes=np.array([1]))
    else:
        path.write_bytes({"truncated": path.read_bytes()[:-30], "empty": b"", "no archive": b"no zip"}[damage])
    with pytest.raises(DataError, match=r"a\.npz"):
        store.read_maps("a")


def test_no_flipped_bit_changes_maps_unseen(store):
    maps = np.random.default_rng(0).random((1, 3, 3)).astype(np.float16).astype(np.float32)
    store.write_maps(ClassMaps("a", (5,), maps))
    path = store.path("a", ".npz")
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = store.read_maps("a")
        except DataError:
            continue
        assert found.classes == (5,)
        assert np.array_equal(found.maps, maps)


# A data set with stored masks


class Squares(LocalizationDataset):
    """Three images of one colour each, with every kind of truth."""

    name, root, split, class_names = "squares", Path("."), "train", ("one", "two")

    def __init__(self):
        self.image_ids, self.labels = ("s/0", "s/1", "s/2"), ((0,), (1,), (0,))

    def read(self, index, truth=True):
        sample = Sample(np.full((8, 12, 3), index, np.uint8), self.image_ids[index], self.labels[index])
        if not truth:
            return sample
        mask = np.ones((8, 12), np.uint8)
        return replace(sample, mask=mask, parts=mask, boxes=np.array([[0, 0, 12, 8]]))


def test_samples_have_the_stored_mask_and_no_other_truth(store):
    squares, mask = Squares(), drawn(shape=(4, 6))
    store.write_mask("s/1", mask)
    masked = WithMasks(squares, store)
    sample = masked[1]
    assert np.array_equal(sample.image, squares[1].image)
    assert sample.mask.dtype == np.uint8
    assert np.array_equal(sample.mask, np.kron(mask, np.ones((2, 2)))), "by nearest pixel centre"
    assert len(sample.boxes) == 0
    assert sample.parts is None
    assert masked.read(1, truth=False).mask is None
    for name in ("name", "root", "split", "class_names", "multi_label", "image_ids", "labels"):
        assert getattr(masked, name) == getattr(squares, name)


def test_transforms_move_the_mask_with_its_image(store):
    store.write_mask("s/0", drawn(shape=(8, 12)))
    sample = WithMasks(Squares(), store)[0]
    moved = shift(sample, 5, -3)
    assert np.array_equal(moved.mask[5:, :-3], sample.mask[:-5, 3:])
    assert Compose([Resize(24)])(sample).mask.shape == (24, 24)


def test_values_are_background_classes_and_unknown(store):
    mask = np.zeros((8, 12), np.uint8)
    mask[0, :3] = 1, 2, 255
    store.write_mask("s/0", mask)
    assert np.array_equal(WithMasks(Squares(), store)[0].mask, mask)
    mask[0, 0] = 3
    store.write_mask("s/0", mask)
    with pytest.raises(DataError, match=r"0\.png holds the value 3"):
        WithMasks(Squares(), store)[0]


def test_a_missing_mask_is_an_error_while_reading(store):
    with pytest.raises(DataError, match=r"1\.png"):
        WithMasks(Squares(), store)[1]


def test_the_key_is_that_of_the_masks(store):
    squares = Squares()

    def key(dataset):
        return keys.key_of(dataset).hash

    for image_id in squares.image_ids:
        store.write_mask(image_id, drawn(), outcome="full")
    masked = WithMasks(squares, store)
    first = key(masked)
    assert key(WithMasks(Squares(), Store(store.folder))) == first
    assert first not in (key(squares), key(masked.subset([0, 1])))
    store.write_mask("s/2", drawn(1), outcome="full")
    assert key(masked) != first
    store.write_mask("s/2", drawn(), outcome="full")
    assert key(masked) == first
