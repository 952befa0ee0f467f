import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from wsolnb.data import IGNORE, Sample, aviary
from wsolnb.data.base import LocalizationDataset
from wsolnb.data.store import Store, WithMasks
from wsolnb.errors import DataError
from wsolnb.keys import key_of
from wsolnb.metrics import SegmentationScores
from wsolnb.notebook import runs
from wsolnb.train.loop import TrainingConfig
from wsolnb.train.recipe import Recipe, fit
from wsolnb.train.segmentation import (
    Inference,
    class_mask,
    predict,
    probabilities,
    score_masks,
    score_model,
    write_true_masks,
)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    config = aviary.AviaryConfig(variant="scenes", classes=3, size=64, train=6, val=2, test=4, seed=1)
    return aviary.load(config, "train", tmp_path_factory.mktemp("cache"))


def test_masks_of_files_take_the_place_of_the_truth(train, tmp_path):
    write_true_masks(train, tmp_path)
    with_masks = WithMasks(train, Store(tmp_path))
    before = key_of(with_masks).hash
    for i in range(len(train)):
        assert (with_masks[i].mask == train[i].mask).all()
        assert with_masks[i].parts is None
        assert with_masks.read(i, truth=False).mask is None
    other = np.full((64, 64), IGNORE, np.uint8)
    other[3, 4] = 3
    Image.fromarray(other).save(tmp_path / f"{train.image_ids[2]}.png")
    assert (with_masks[2].mask == other).all()
    assert key_of(with_masks).hash != before
    other[0, 0] = 4  # class 3 of 0..2
    Image.fromarray(other).save(tmp_path / f"{train.image_ids[2]}.png")
    with pytest.raises(DataError, match="holds the value 4"):
        with_masks[2]
    (tmp_path / f"{train.image_ids[2]}.png").unlink()
    with pytest.raises(DataError, match=rf"{train.image_ids[2]}\.png cannot be read"):
        with_masks[2]


def test_masks_that_say_object_become_classes():
    mask = np.array([[0, 1, IGNORE]], np.uint8)
    sample = Sample(np.zeros((1, 3, 3), np.uint8), "", (4,), mask=mask)
    assert class_mask(sample, multi_label=False).tolist() == [[0, 5, IGNORE]]
    assert class_mask(sample, multi_label=True) is mask


@pytest.mark.parametrize("method", ["irn", "deeplabv2"])
def test_training_on_masks_is_kept_and_repeats(train, tmp_path, method):
    write_true_masks(train, tmp_path / "masks")
    run = runs.start("23_lpcam_segmentation", {"seed": 0}, tmp_path / "run")
    recipe = Recipe(
        method=method, backbone="resnet_mini", pretrained=True, image_size=64, batch_size=3,
        output_stride=16 if method == "irn" else 8,
        options={"width": 8, "label_radius": 3} if method == "irn" else {"dilations": (1, 2)},
        training=TrainingConfig(epochs=3, lr=3e-3, schedule="poly", device="cpu", precision="fp32"),
    )  # fmt: skip
    dataset = WithMasks(train, Store(tmp_path / "masks"))
    model, folder = fit(run, "net", recipe, dataset, progress=False)
    losses = np.loadtxt(folder / "history.csv", delimiter=",", skiprows=1, usecols=1)
    assert losses[-1] < losses[0]
    again, same = fit(run, "net", recipe, dataset, progress=False)
    assert same == folder
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        outputs = [net(images) for net in (model, again)]
    first, second = (output.boundary if method == "irn" else output for output in outputs)
    assert torch.equal(first, second)
    changed = np.zeros((64, 64), np.uint8)
    Image.fromarray(changed).save(tmp_path / "masks" / f"{train.image_ids[0]}.png")
    _, other = fit(run, "net", recipe, dataset, progress=False)
    assert other != folder


class Colour(torch.nn.Module):
    """Logits that are the channels themselves, so that what inference does to images is seen."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, images):
        return images * self.scale


def test_probabilities_over_scales_and_flips():
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    alone = images.softmax(dim=1)
    torch.testing.assert_close(probabilities(Colour(), images, Inference()), alone)
    both = probabilities(Colour(), images, Inference(scales=(1.0, 0.5)))
    half = F.interpolate(images, size=(8, 12), mode="bilinear", antialias=True)
    half = F.interpolate(half, size=(16, 24), mode="bilinear").softmax(dim=1)
    torch.testing.assert_close(both, (alone + half) / 2)


class Sized(LocalizationDataset):
    """Two images of different sizes whose mask is the strongest channel."""

    name, split, multi_label = "sized", "test", True
    class_names, image_ids, labels = ("a", "b"), ("x", "y"), ((0,), (1,))

    def read(self, index, truth=True):
        image = np.random.default_rng(index).integers(0, 256, (20 + 4 * index, 24, 3), dtype=np.uint8)
        scaled = (image / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        mask = scaled.argmax(axis=2).astype(np.uint8)
        return Sample(image, self.image_ids[index], self.labels[index], mask=mask if truth else None)


def test_evaluation_takes_images_of_any_size():
    found = list(predict(Colour(), Sized(), Inference()))
    assert [mask.shape for _, mask in found] == [(20, 24), (24, 24)]
    assert score_model(Colour(), Sized(), Inference())[0]["miou"] == 1
    by_hand = SegmentationScores(3)
    resized = Inference(image_size=32)
    for sample, mask in predict(Colour(), Sized(), resized):
        assert mask.shape == sample.size
        by_hand.update(mask, sample.mask)
    assert score_model(Colour(), Sized(), resized) == [pytest.approx(by_hand.compute().means())]


def test_scores_of_masks_leave_unknown_pixels_out(train, tmp_path):
    write_true_masks(train, tmp_path)
    store = Store(tmp_path)
    assert score_masks(WithMasks(train, store))[0]["miou"] == 1
    by_hand = SegmentationScores(4)
    for index, name in enumerate(train.image_ids):
        truth = train[index].mask
        given = np.where(truth == 1, 2, truth).astype(np.uint8)
        given[:20] = IGNORE
        store.write_mask(name, given)
        by_hand.update(given[20:], truth[20:])
    assert score_masks(WithMasks(train, store)) == [by_hand.compute().means()]
