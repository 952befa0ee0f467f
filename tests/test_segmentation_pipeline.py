import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from wsolnb import seeds
from wsolnb import segmentation as module
from wsolnb.backbones import create_backbone
from wsolnb.data import IGNORE, Sample, aviary
from wsolnb.data.base import LocalizationDataset
from wsolnb.errors import DataError, ParameterError, WeightsError
from wsolnb.methods import irn
from wsolnb.methods.crf import CRFConfig
from wsolnb.methods.irn import IRN, IRNConfig
from wsolnb.metrics import SegmentationScores
from wsolnb.notebook import runs
from wsolnb.seeds import SeedMaps, seed_mask
from wsolnb.segmentation import (
    DeepLabV2,
    Inference,
    MaskRecipe,
    RandomScaleCrop,
    UPerNet,
    WithMasks,
    class_mask,
    evaluate,
    fit,
    predict,
    probabilities,
    walk,
    write_irn_labels,
    write_true_masks,
)
from wsolnb.train.loop import TrainingConfig

NO_CRF = CRFConfig(backend="none")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    config = aviary.AviaryConfig(variant="scenes", classes=3, size=64, train=6, val=2, test=4, seed=1)
    cache = tmp_path_factory.mktemp("cache")
    return {split: aviary.load(config, split, cache) for split in ("train", "test")}


def true_maps(dataset):
    """Maps that are 0.9 on the class and 0.1 elsewhere."""
    for i, name in enumerate(dataset.image_ids):
        mask, labels = dataset[i].mask, dataset.labels[i]
        maps = np.stack([np.where(mask == label + 1, 0.9, 0.1) for label in labels]).astype(np.float32)
        yield SeedMaps(name, labels, maps)


# ------------------------------------------------------------------------------------------------------------ networks


def test_aspp_is_the_sum_of_dilated_convolutions():
    torch.manual_seed(0)
    model = DeepLabV2(create_backbone("resnet_mini", output_stride=8), 5, dilations=(1, 3)).eval()
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        features = model.backbone(images)
        assert features.shape[2:] == (6, 8)
        expected = torch.zeros(2, 5, 6, 8)
        for branch, dilation in zip(model.aspp, (1, 3), strict=True):
            padded = F.pad(features, (dilation,) * 4)
            for row in range(3):
                for column in range(3):
                    y, x = row * dilation, column * dilation
                    moved = padded[:, :, y : y + 6, x : x + 8]
                    expected += torch.einsum("bdhw,cd->bchw", moved, branch.weight[:, :, row, column])
            expected += branch.bias[:, None, None]
        got = model(images)
    assert got.shape == (2, 5, 48, 64)
    resized = F.interpolate(expected, size=(48, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(got, resized, atol=1e-4, rtol=1e-4)


def test_the_published_deeplab():
    model = DeepLabV2(create_backbone("resnet101", output_stride=8), 21)
    assert [(b.dilation, b.in_channels, b.out_channels) for b in model.aspp] == [
        ((d, d), 2048, 21) for d in (6, 12, 18, 24)
    ]
    assert len(model.backbone.resnet.layer3) == 23
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 65, 81)).shape == (1, 21, 65, 81)
        assert model.backbone(torch.randn(1, 3, 64, 80)).shape[2:] == (8, 10)


def test_a_transformer_can_be_the_backbone():
    model = DeepLabV2(create_backbone("vit_mini", image_size=64), 4, dilations=(1, 2)).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4, 64, 64)


def test_upernet_takes_any_size():
    model = UPerNet("swin_tiny_patch4_window7_224", 4).eval()
    with torch.no_grad():
        for size in ((64, 64), (70, 100)):
            assert model(torch.randn(1, 3, *size)).shape == (1, 4, *size)
    names = {name for name, p in model.named_parameters() if any(p is q for q in model.head.parameters())}
    assert names
    assert not any(name.startswith("net.encoder") for name in names)
    with pytest.raises(ParameterError, match="resnet50"):
        UPerNet("resnet50", 4)
    with pytest.raises(WeightsError, match="swin_of_the_moon"):
        UPerNet("swin_of_the_moon", 4)


# ---------------------------------------------------------------------------------------------------------- objectives


def batch_of(masks):
    samples = [Sample(np.zeros((*mask.shape, 3), np.uint8), "", (0,), mask=mask) for mask in masks]
    return {"image": torch.zeros(len(masks), 3, *masks[0].shape), "samples": samples}


def test_cross_entropy_leaves_unknown_pixels_out():
    rng = np.random.default_rng(0)
    masks = [rng.choice([0, 1, 2, IGNORE], (4, 5)).astype(np.uint8) for _ in range(2)]
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    losses = []
    for image in range(2):
        for y in range(4):
            for x in range(5):
                if masks[image][y, x] != IGNORE:
                    scores = logits[image, :, y, x].double()
                    losses.append(float(torch.logsumexp(scores, 0) - scores[masks[image][y, x]]))
    objective = MaskRecipe(training=TrainingConfig(epochs=1, lr=1e-3)).objective()
    config = TrainingConfig(epochs=1, lr=1e-3)
    assert float(objective(lambda images: logits, batch_of(masks), config)) == pytest.approx(np.mean(losses), abs=1e-5)
    unknown = [np.full((4, 5), IGNORE, np.uint8)] * 2
    assert float(objective(lambda images: logits, batch_of(unknown), config)) == 0


def test_irn_learns_from_the_masks_at_stride_4():
    rng = np.random.default_rng(1)
    cells = rng.choice([0, 2, IGNORE], (2, 4, 5)).astype(np.uint8)
    masks = [np.repeat(np.repeat(mask, 4, axis=0), 4, axis=1) for mask in cells]
    generator = torch.Generator().manual_seed(2)
    output = irn.IRNOutput(torch.randn(2, 4, 5, generator=generator), torch.randn(2, 2, 4, 5, generator=generator))
    recipe = MaskRecipe(method="irn", label_radius=3, training=TrainingConfig(epochs=1, lr=1e-3))
    labels = irn.pair_labels(torch.from_numpy(cells), 3)
    expected = irn.pair_loss(output.boundary.sigmoid(), output.displacement, labels, 3).total
    got = recipe.objective()(lambda images: output, batch_of(masks), recipe.training)
    torch.testing.assert_close(got, expected)


# -------------------------------------------------------------------------------------------------------- masks, crops


def test_masks_of_files_take_the_place_of_the_truth(scenes, tmp_path):
    train = scenes["train"]
    assert write_true_masks(train, tmp_path) == len(train)
    with_masks = WithMasks(train, tmp_path)
    before = with_masks.masks_hash()
    for i in range(len(train)):
        assert (with_masks[i].mask == train[i].mask).all()
        assert with_masks[i].parts is None
        assert with_masks.read(i, truth=False).mask is None
    other = np.full((64, 64), IGNORE, np.uint8)
    other[3, 4] = 3
    Image.fromarray(other).save(tmp_path / f"{train.image_ids[2]}.png")
    assert (with_masks[2].mask == other).all()
    assert with_masks.masks_hash() != before
    other[0, 0] = 4  # class 3 of 0..2
    Image.fromarray(other).save(tmp_path / f"{train.image_ids[2]}.png")
    with pytest.raises(DataError, match="holds the value 4"):
        with_masks[2]
    (tmp_path / f"{train.image_ids[2]}.png").unlink()
    with pytest.raises(DataError, match=rf"missing: .*{train.image_ids[2]}\.png"):
        with_masks[2]


def test_masks_that_say_object_become_classes():
    mask = np.array([[0, 1, IGNORE]], np.uint8)
    sample = Sample(np.zeros((1, 3, 3), np.uint8), "", (4,), mask=mask)
    assert class_mask(sample, multi_label=False).tolist() == [[0, 5, IGNORE]]
    assert class_mask(sample, multi_label=True) is mask


def test_a_scaled_crop_keeps_image_and_mask_together():
    rows, columns = np.mgrid[:40, :60].astype(np.uint8)
    image = np.stack([rows * 4, columns * 4, 0 * rows], axis=2)
    sample = Sample(image, "", (0,), mask=(columns >= 30).astype(np.uint8))
    rng = np.random.default_rng(0)
    padded = 0
    for _ in range(20):
        cropped = RandomScaleCrop((0.5, 1.5), 32)(sample, rng)
        assert cropped.image.shape == (32, 32, 3)
        known = cropped.mask != IGNORE
        padded += not known.all()
        right = cropped.image[..., 1].astype(int) >= 30 * 4 - 2
        assert (right == (cropped.mask == 1))[known].mean() > 0.95
    assert 0 < padded < 20


# --------------------------------------------------------------------------------------------------------------- stages


def test_irn_labels_are_confident_on_both_sides(scenes, tmp_path):
    train = scenes["train"]

    def maps():
        for found in true_maps(train):
            found.maps[:, :8] = 0.3  # between both thresholds
            yield found

    config = IRNConfig(foreground=0.45, background=0.25)
    assert write_irn_labels(maps(), train, tmp_path, config, NO_CRF) == len(train)
    for i, found in enumerate(maps()):
        label, mask = WithMasks(train, tmp_path)[i].mask, train[i].mask
        assert (label[:8] == IGNORE).all()
        assert (label[8:] == mask[8:]).all()
        high, low = (seed_mask(found.maps, found.classes, t) for t in (0.45, 0.25))
        assert (label == np.where(high > 0, high, np.where(low == 0, 0, IGNORE))).all()


def test_the_walk_is_propagation_on_the_boundary_grid(scenes):
    train = scenes["train"].subset([0, 1])
    torch.manual_seed(0)
    model = IRN(create_backbone("resnet_mini", pretrained=True), width=8)
    config = IRNConfig(radius=3, exp_times=3)
    walked = list(walk(model, true_maps(train), train, config, image_size=64))
    assert [found.image_id for found in walked] == list(train.image_ids)
    for i, (found, seed) in enumerate(zip(walked, true_maps(train), strict=True)):
        assert found.maps.shape == seed.maps.shape
        assert found.maps.max() == 1
        boundary = module.boundary_of(model, train[i].image)
        small = F.interpolate(torch.from_numpy(seed.maps)[None], (16, 16), mode="bilinear", antialias=True)[0]
        small = small / small.amax(dim=(1, 2), keepdim=True)
        by_hand = irn.unit_scores(irn.propagate(small, boundary, 3, 10, 3), (64, 64))
        np.testing.assert_allclose(found.maps, by_hand, atol=1e-5)
    nothing = SeedMaps(train.image_ids[0], (), np.zeros((0, 64, 64), np.float32))
    assert next(walk(model, [nothing], train, config)).maps.shape == (0, 64, 64)


@pytest.mark.parametrize("method", ["irn", "deeplabv2"])
def test_training_on_masks_is_kept_and_repeats(scenes, tmp_path, method):
    train = scenes["train"]
    write_true_masks(train, tmp_path / "masks")
    run = runs.start("23_lpcam_segmentation", {"seed": 0}, tmp_path / "run")
    recipe = MaskRecipe(
        method=method, image_size=64, output_stride=16 if method == "irn" else 8, batch_size=3, label_radius=3,
        options={"width": 8} if method == "irn" else {"dilations": (1, 2)},
        training=TrainingConfig(epochs=3, lr=3e-3, schedule="poly", device="cpu", precision="fp32"),
    )  # fmt: skip
    dataset = WithMasks(train, tmp_path / "masks")
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


def test_recipes_that_cannot_be():
    loop = TrainingConfig(epochs=1, lr=1e-3)
    with pytest.raises(ParameterError, match="did you mean 'resnet_mini'"):
        MaskRecipe(backbone="resnet_mino", training=loop).build(3)
    with pytest.raises(ParameterError, match="takes no checkpoint"):
        MaskRecipe(method="upernet", backbone="swin_tiny_patch4_window7_224", checkpoint="x", training=loop).build(3)
    with pytest.raises(ValueError, match="deeplabv2"):
        MaskRecipe(method="deeplab", training=loop)


# ----------------------------------------------------------------------------------------------------------- inference


class Colour(torch.nn.Module):
    """Logits that are the channels themselves, so that what inference does to images is seen."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, images):
        return images * self.scale


def test_probabilities_over_scales_and_flips():
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    alone = probabilities(Colour(), images, Inference(flip=False))
    torch.testing.assert_close(alone, images.softmax(dim=1))
    torch.testing.assert_close(probabilities(Colour(), images, Inference(flip=True)), alone)
    both = probabilities(Colour(), images, Inference(scales=(1.0, 0.5), flip=True))
    half = F.interpolate(images, size=(8, 12), mode="bilinear", antialias=True)
    half = F.interpolate(half, size=(16, 24), mode="bilinear").softmax(dim=1)
    torch.testing.assert_close(both, (alone + half) / 2)
    largest = probabilities(Colour(), images, Inference(scales=(1.0, 0.5), fuse="max"))
    expected = torch.maximum(alone, half)
    torch.testing.assert_close(largest, expected / expected.sum(dim=1, keepdim=True))


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
    assert evaluate(Colour(), Sized(), Inference()).miou == 1
    by_hand = SegmentationScores(3)
    resized = Inference(image_size=32)
    for sample, mask in predict(Colour(), Sized(), resized):
        assert mask.shape == sample.size
        by_hand.update(mask, sample.mask)
    assert evaluate(Colour(), Sized(), resized).miou == pytest.approx(by_hand.compute().miou)


def test_seeds_to_segmentation_end_to_end(scenes, tmp_path):
    """Every stage after the other on six scenes, with perfect seeds: the network learns what the masks say."""
    train = scenes["train"]
    run = runs.start("23_lpcam_segmentation", {"seed": 0}, tmp_path / "run")
    loop = TrainingConfig(epochs=2, lr=1e-3, device="cpu", precision="fp32")
    shared = {"image_size": 64, "batch_size": 3, "training": loop}
    config = IRNConfig(radius=3, exp_times=1)
    write_irn_labels(true_maps(train), train, tmp_path / "labels", config, CRFConfig(max_side=16))
    recipe = MaskRecipe(method="irn", output_stride=16, label_radius=3, options={"width": 8}, **shared)
    model, _ = fit(run, "irn", recipe, WithMasks(train, tmp_path / "labels"), progress=False)
    seeds.write_seeds(walk(model, true_maps(train), train, config, 64), tmp_path / "pseudo", 0.5)
    pseudo = seeds.evaluate(({"x": seeds.read_seeds(tmp_path / "pseudo", i)} for i in train.image_ids), train)
    assert pseudo["x"].segmentation.best()[1] > 0.6
    recipe = MaskRecipe(options={"dilations": (1, 2)}, **shared)
    segmenter, _ = fit(run, "net", recipe, WithMasks(train, tmp_path / "pseudo"), progress=False)
    assert 0 < evaluate(segmenter, train, Inference(image_size=64)).miou <= 1
