"""Readers and protocols on real photographs, where a folder of them is named.

WSOLNB_PETS: a folder in the layout of Oxford-IIIT Pet; WSOLNB_TINY_IMAGENET: one in that of Tiny-ImageNet.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from wsolnb.data import open_dataset, tight_box
from wsolnb.data.transforms import Resize, ResizeCenterCrop

FOLDERS = {"pets": os.environ.get("WSOLNB_PETS"), "tiny_imagenet": os.environ.get("WSOLNB_TINY_IMAGENET")}


@pytest.fixture(params=FOLDERS)
def photographs(request):
    root = FOLDERS[request.param]
    if not root:
        pytest.skip(f"WSOLNB_{request.param.upper()} names no folder")
    return {split: open_dataset(request.param, root, split) for split in ("train", "val", "trainval", "test")}


def test_splits_are_disjoint_and_balanced_alike(photographs):
    ids = {split: set(dataset.image_ids) for split, dataset in photographs.items()}
    assert all(len(ids[split]) == len(photographs[split]) for split in ids)
    assert ids["train"] | ids["val"] == ids["trainval"]
    assert not ids["train"] & ids["val"]
    assert not ids["trainval"] & ids["test"]
    classes = [{labels for labels in dataset.labels} for dataset in photographs.values()]
    assert all(found == classes[0] for found in classes)


def test_samples_and_protocols(photographs):
    dataset = photographs["test"]
    for index in np.linspace(0, len(dataset) - 1, 60).astype(int):
        sample = dataset[index]
        height, width = sample.size
        assert sample.boxes.shape == (1, 4)
        assert (sample.boxes[0] >= 0).all()
        assert (sample.boxes[0] <= [width, height, width, height]).all()
        for transform in (Resize(224), ResizeCenterCrop(256, 224), ResizeCenterCrop(256, 224, keep_aspect=True)):
            moved = transform(sample)
            assert moved.size == (224, 224)
            if moved.mask is None or not len(moved.boxes):
                continue
            # A crop may cut off what made the box wide: the mask lies inside of it. A resize cuts off nothing.
            gap = (tight_box(moved.mask) - moved.boxes[0]) * (1, 1, -1, -1)
            tolerance = max(1, 224 / min(height, width))
            assert (gap >= -tolerance).all()
            if isinstance(transform, Resize):
                assert (gap <= tolerance).all()
