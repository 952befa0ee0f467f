"""Batches: what is in them, determinism with and without workers, errors."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from wsolnb.data import loading
from wsolnb.data.base import LocalizationDataset, hold_out, read_image
from wsolnb.data.loading import Kept, make_loader, to_tensor
from wsolnb.data.sample import Sample
from wsolnb.data.transforms import (
    Compose,
    RandomBrightnessContrast,
    RandomHorizontalFlip,
    RandomShift,
    Resize,
    ResizeRandomCrop,
)
from wsolnb.errors import DataError, ParameterError

AUGMENT = Compose([RandomHorizontalFlip(), RandomShift(3), RandomBrightnessContrast()])


class Folder(LocalizationDataset):
    """Images of a folder, three classes in turn, a box each."""

    name, split, class_names = "folder", "all", ("a", "b", "c")

    def __init__(self, root: Path, multi_label: bool = False):
        self.root, self.multi_label = root, multi_label
        self.image_ids = tuple(sorted(path.name for path in root.iterdir()))
        classes = [(i % 3,) for i in range(len(self.image_ids))]
        self.labels = tuple((c, 2) if multi_label and c < 2 else (c,) for (c,) in classes)

    def read(self, index: int, truth: bool = True) -> Sample:
        image = read_image(self.root / self.image_ids[index], "put it back")
        sample = Sample(image, self.image_ids[index], self.labels[index])
        if truth:
            sample.boxes, sample.box_labels = np.array([[1.0, 2, 9, 8]]), np.array([0])
            sample.mask = (image[..., 0] > 128).astype(np.uint8)
        return sample


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(11):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    return tmp_path


def test_batches_for_training(folder):
    loader = make_loader(Folder(folder), None, 4)
    batches = list(loader)
    assert [len(batch["label"]) for batch in batches] == [4, 4, 3]
    assert len(loader) == 3
    batch = batches[1]
    assert set(batch) == {"image", "label", "index"}
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].dtype == torch.int64
    assert batch["index"].tolist() == [4, 5, 6, 7]
    assert batch["label"].tolist() == [1, 2, 0, 1]
    assert len(list(make_loader(Folder(folder), None, 4, drop_last=True))) == 2


@pytest.mark.parametrize("batch_size", [12, 32])
def test_fewer_images_than_a_batch_are_named(folder, batch_size):
    dataset = Folder(folder)
    with pytest.raises(ParameterError, match=f"{len(dataset)} training images make no batch of {batch_size}") as caught:
        make_loader(dataset, None, batch_size, drop_last=True)
    assert "lower batch_size" in str(caught.value)
    assert len(make_loader(dataset, None, batch_size)) == len(make_loader(dataset, None, len(dataset), drop_last=True))


def test_multi_label_batches_are_multi_hot(folder):
    batch = next(iter(make_loader(Folder(folder, multi_label=True), None, 3)))
    assert batch["label"].dtype == torch.float32
    assert batch["label"].tolist() == [[1, 0, 1], [0, 1, 1], [0, 0, 1]]


def test_normalisation(folder):
    image = Folder(folder)[0].image
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((image / 255 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(to_tensor(image).numpy(), expected, rtol=0, atol=1e-6)
    plain = make_loader(Folder(folder), None, 2, mean=(0, 0, 0), std=(1, 1, 1))
    np.testing.assert_allclose(next(iter(plain))["image"][0].permute(1, 2, 0), image / 255, rtol=0, atol=1e-6)


def test_truth_comes_with_the_image_it_fits(folder):
    batch = next(iter(make_loader(Folder(folder), Resize(32), 5, truth=True)))
    for image, label, index, sample in zip(
        *(batch[key] for key in ("image", "label", "index", "samples")), strict=True
    ):
        assert torch.equal(image, to_tensor(sample.image))
        assert sample.size == sample.mask.shape == (32, 32)
        np.testing.assert_array_equal(sample.boxes, [[2, 4, 18, 16]])
        assert sample.image_id == f"{index:02d}.png"
        assert sample.label == label


def epochs(loader, count: int = 3) -> list[list[dict]]:
    result = []
    for epoch in range(count):
        loader.set_epoch(epoch)
        result.append(list(loader))
    return result


def test_bit_for_bit_whatever_the_workers(folder):
    dataset = Folder(folder)
    runs = [
        epochs(make_loader(dataset, AUGMENT, 4, shuffle=True, truth=True, seed=3, num_workers=workers))
        for workers in (0, 0, 2)
    ]
    for run in runs[1:]:
        for left, right in zip(chain.from_iterable(runs[0]), chain.from_iterable(run), strict=True):
            for key in ("image", "label", "index"):
                assert torch.equal(left[key], right[key])
            for a, b in zip(left["samples"], right["samples"], strict=True):
                np.testing.assert_array_equal(a.boxes, b.boxes)
                np.testing.assert_array_equal(a.mask, b.mask)


def test_epochs_and_seeds_differ_and_each_sees_every_image(folder):
    dataset = Folder(folder)
    runs = epochs(make_loader(dataset, AUGMENT, 4, shuffle=True, seed=0), 2)
    runs += epochs(make_loader(dataset, AUGMENT, 4, shuffle=True, seed=1), 1)
    orders = [torch.cat([batch["index"] for batch in run]).tolist() for run in runs]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    still = epochs(make_loader(dataset, AUGMENT, 11), 2)
    assert torch.equal(still[0][0]["index"], still[1][0]["index"])
    assert not torch.equal(still[0][0]["image"], still[1][0]["image"])


def test_an_epoch_does_not_depend_on_those_before(folder):
    loader = make_loader(Folder(folder), AUGMENT, 4, shuffle=True)
    whole = epochs(loader)
    resumed = make_loader(Folder(folder), AUGMENT, 4, shuffle=True)
    resumed.set_epoch(2)
    for left, right in zip(whole[2], resumed, strict=True):
        assert torch.equal(left["image"], right["image"])


def test_accelerate_keeps_order_and_augmentation(folder):
    accelerate = pytest.importorskip("accelerate")
    plain = epochs(make_loader(Folder(folder), AUGMENT, 4, shuffle=True, truth=True))
    prepared = accelerate.Accelerator(cpu=True).prepare(
        make_loader(Folder(folder), AUGMENT, 4, shuffle=True, truth=True)
    )
    for epoch in plain:
        for left, right in zip(epoch, prepared, strict=True):
            assert torch.equal(left["image"], right["image"])
            assert left["samples"][0].image_id == right["samples"][0].image_id


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(folder, workers):
    (folder / "05.png").write_bytes(b"\x89PNG nothing more")
    loader = make_loader(Folder(folder), None, 4, num_workers=workers)
    with pytest.raises(DataError, match=r"cannot decode .*05\.png"):
        list(loader)


def test_images_of_several_sizes(folder):
    Image.new("RGB", (20, 18)).save(folder / "02.png")
    with pytest.raises(ParameterError, match="differ in size: 16x16, 20x18"):
        list(make_loader(Folder(folder), None, 4))
    assert len(list(make_loader(Folder(folder), Resize(16), 4))) == 3


def test_bad_parameters(folder):
    with pytest.raises(ParameterError, match="the seed is -1"):
        make_loader(Folder(folder), None, 4, seed=-1)
    with pytest.raises(DataError, match="is empty"):
        make_loader(Folder(folder).subset([]), None, 4)


# ------------------------------------------------------------------------------------------------------------ hold-out


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("seed", [0, 1])
def test_hold_out(fraction, seed):
    rng = np.random.default_rng(seed)
    sizes = {0: 1, 1: 2, 2: 10, 3: 100}
    labels = [(c,) for c, n in sizes.items() for _ in range(n)]
    labels = [labels[i] for i in rng.permutation(len(labels))] + [(), ()]
    kept, held = hold_out(labels, fraction, seed)
    assert sorted(kept + held) == list(range(len(labels)))
    assert kept == sorted(kept)
    assert held == sorted(held)
    for label, size in sizes.items():
        count = sum(labels[i] == (label,) for i in held)
        assert count < size
        assert count >= min(1, size - 1)
        if size == 100:
            assert count == round(fraction * 100)
    assert hold_out(labels, fraction, seed) == (kept, held)
    if fraction == 0.5:
        assert hold_out(labels, fraction, seed + 1)[1] != held


@pytest.mark.parametrize("fraction", [-0.1, 0, 1, 2])
def test_hold_out_fraction_out_of_range(fraction):
    with pytest.raises(ParameterError, match="held-out fraction"):
        hold_out([(0,), (0,)], fraction)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("side", "first"), [(12, [Resize(12), RandomShift(3)]), (20, [ResizeRandomCrop(20, 16)])])
def test_kept_images_make_the_same_batches_and_are_decoded_once(folder, side, first, workers):
    data = Folder(folder)
    kept = Kept(data, side)
    transform = Compose([*first, RandomHorizontalFlip(), RandomBrightnessContrast()])
    plain, fast = (make_loader(d, transform, 4, shuffle=True, num_workers=workers) for d in (data, kept))
    for epoch in range(2):
        for loader in (plain, fast):
            loader.set_epoch(epoch)
        for one, other in zip(plain, fast, strict=True):
            assert torch.equal(one["image"], other["image"])
            assert torch.equal(one["label"], other["label"])
    for path in folder.iterdir():
        path.unlink()  # what workers have decoded is there for all
    assert len(list(fast)) == 3
    kept.read(0, truth=False).image[:] = 0
    assert kept.read(0, truth=False).image.any()
    with pytest.raises(DataError):
        list(plain)


def test_kept_images_leave_the_truth_where_it_is(folder):
    sample = Kept(Folder(folder), 8).read(3)
    assert sample.size == (16, 16)
    assert len(sample.boxes) == 1


def test_images_are_kept_where_a_share_of_the_free_memory_holds_them(monkeypatch):
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * 300 * 10 * 10 * 3))
    assert Kept.fits(300, 10, 0)
    assert not Kept.fits(301, 10, 0)
    monkeypatch.setattr(loading, "KEPT_BYTES", 299 * 10 * 10 * 3)
    assert not Kept.fits(300, 10, 0)
    assert Kept.fits(299, 10, 0)
    monkeypatch.setattr(loading, "KEPT_BYTES", 10**9)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Kept.fits(150, 10, 0)
    assert not Kept.fits(151, 10, 0)
    monkeypatch.setattr(loading.multiprocessing, "get_start_method", lambda: "spawn")
    assert not Kept.fits(150, 10, 1)
