import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wsolnb.backbones import create_backbone
from wsolnb.data.loading import IMAGENET_MEAN, IMAGENET_STD, to_tensor
from wsolnb.data.sample import IGNORE, Sample
from wsolnb.errors import ParameterError
from wsolnb.maps import upsample
from wsolnb.methods import create_method, get_method
from wsolnb.methods.frozen import FrozenBackbone, half_squared_error, map_targets
from wsolnb.methods.locloc import (
    Enhance,
    GrabCutEnhancedGenerator,
    LocalFeatureDigging,
    LocLoc,
    LocLocConfig,
    blacken,
)
from wsolnb.train.loop import TrainingConfig, load_checkpoint, parameter_groups, train


def count(module):
    return sum(p.numel() for p in module.parameters())


def mini(seed=0, **options):
    torch.manual_seed(seed)
    backbone = create_backbone("vit_mini_dino", image_size=64, **options)
    for module in backbone.modules():  # statistics that differ from those of a batch, so that mixing them up shows
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    return backbone


SMALL = LocLocConfig(channels=8, momentum=0.1)


def joint(**changes):
    torch.manual_seed(1)
    config = SMALL.model_copy(update=changes)
    backbone = mini()
    generator = GrabCutEnhancedGenerator(96, 5, config)
    return LocLoc(backbone, 5, generator, LocalFeatureDigging(backbone, 5), config)


# Generator


@pytest.mark.parametrize("side", [14, 16, 28])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_the_generator_enlarges_a_grid_eightfold(side, preset):
    generator = GrabCutEnhancedGenerator(12, 5, getattr(LocLocConfig, preset)(channels=8)).eval()
    found = generator(torch.randn(2, 12, side, side)).detach()
    assert found.shape == (2, 8 * side, 8 * side)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_a_small_grid_is_an_error():
    with pytest.raises(ParameterError, match="8 x 8"):
        GrabCutEnhancedGenerator(12, 5, SMALL)(torch.randn(1, 12, 7, 7))


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_parameters_of_the_published_sizes(preset):
    """Written out layer by layer; the paper's 3.86 M are these 4,052,738 divided by 2^20."""
    generator = GrabCutEnhancedGenerator(384, 200, getattr(LocLocConfig, preset)())
    unet = [(384, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32), (48, 16), (16, 16), (24, 12), (12, 12), (396, 200),
            (200, 200)]  # fmt: skip
    plain = sum(9 * a * b + 2 * b for a, b in unet)
    plain += sum(16 * a * 256 + 2 * 256 for a in (200, 256, 256)) + 9 * 256 + 2
    assert count(generator) == plain == 4_052_738
    assert plain / 2**20 == pytest.approx(3.865, abs=5e-4)
    unused = sum(count(part) for part in generator.unused())
    assert unused == (0 if preset == "paper" else 23_232)


def test_the_third_level_is_alive_in_the_paper_preset_only():
    for preset, alive in (("paper", True), ("released", False)):
        generator = GrabCutEnhancedGenerator(12, 5, getattr(LocLocConfig, preset)(channels=8))
        generator(torch.randn(2, 12, 14, 14)).square().sum().backward()
        for part in (generator.down_3, generator.up_1):
            assert all((p.grad is not None) == alive for p in part.parameters())
        rest = [p for name, p in generator.named_parameters() if not name.startswith(("down_3", "up_1"))]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in rest)


def plain_double(x, block):
    """Convolution by loops over the nine taps, batch normalisation by its running numbers, LeakyReLU."""
    for position in (0, 3):
        convolution, norm = block[position], block[position + 1]
        padded = F.pad(x, (1, 1, 1, 1))
        y = 0
        for i in range(3):
            for j in range(3):
                window = padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
                y = y + torch.einsum("bchw,oc->bohw", window, convolution.weight[:, :, i, j])
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        y = (y - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
        x = torch.where(y > 0, y, 0.01 * y)
    return x


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize(("side", "sides"), [(14, (7, 3, 1)), (16, (8, 4, 2))])
def test_the_u_net_is_the_written_out_one(preset, side, sides):
    """Of released: level 1 and the *third* map go into the second up block, as released/facts have it."""
    torch.manual_seed(0)
    generator = GrabCutEnhancedGenerator(6, 3, getattr(LocLocConfig, preset)(channels=4)).double().eval()
    for module in generator.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    x1 = torch.randn(2, 6, side, side, dtype=torch.float64)
    x2 = plain_double(F.max_pool2d(x1, 2), generator.down_1)
    x3 = plain_double(F.max_pool2d(x2, 2), generator.down_2)
    x4 = plain_double(F.max_pool2d(x3, 2), generator.down_3)
    assert tuple(x.shape[2] for x in (x2, x3, x4)) == sides

    def join(deep, skip, block):
        return plain_double(torch.cat([skip, F.interpolate(deep, size=skip.shape[2:], mode="bilinear")], 1), block)

    up = join(x4, x3, generator.up_1) if preset == "paper" else x3
    up = join(join(up, x2, generator.up_2), x1, generator.up_3)
    expected = generator.to_map(generator.enlarge(up))[:, 0].sigmoid()
    assert torch.allclose(generator(x1), expected, atol=1e-10)


def test_the_loss_is_half_the_mean_square_of_what_is_known():
    rng = np.random.default_rng(0)
    maps, targets, known = (rng.random((2, 3, 4)) for _ in range(3))
    tensors = [torch.from_numpy(v).requires_grad_(v is maps) for v in (maps, targets, known)]
    plain = weight = 0.0
    for index in np.ndindex(2, 3, 4):
        plain += 0.5 * known[index] * (maps[index] - targets[index]) ** 2
        weight += known[index]
    assert float(half_squared_error(*tensors).detach()) == pytest.approx(plain / weight, rel=1e-6)
    everywhere = 0.5 * np.mean((maps - targets) ** 2)
    assert float(half_squared_error(*tensors[:2]).detach()) == pytest.approx(everywhere, rel=1e-6)
    # float32 inside, so the step is coarse
    assert torch.autograd.gradcheck(half_squared_error, tensors, eps=1e-2, atol=1e-4)


def test_targets_are_shares_of_what_is_known():
    mask = np.zeros((4, 6), np.uint8)
    mask[:2, :3] = 1
    mask[0, 0] = mask[2:, 3:] = IGNORE
    sample = Sample(np.zeros((4, 6, 3), np.uint8), "a", (0,), mask=mask)
    target, known = map_targets([sample], (2, 2))
    assert torch.allclose(target[0], torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert torch.allclose(known[0], torch.tensor([[5 / 6, 1.0], [1.0, 0.0]]))
    with pytest.raises(ParameterError, match="no mask"):
        map_targets([Sample(sample.image, "b", (0,))], (2, 2))


# Classifier


def test_parameters_of_the_classifier():
    """At 200 classes as measured before; the paper's 24.87 M are 1,000 classes, divided by 2^20."""
    backbone = create_backbone("dino_small")
    block = 2 * 2 * 384 + 384 * 3 * 385 + 384 * 385 + 384 * 4 * 385 + (4 * 384 + 1) * 384
    for classes, expected in ((200, 23_313_424), (1000, 26_079_824)):
        plain = 12 * block + 2 * 384 + 384 * (9 * 384 + 1) + 9 * 384 * classes + 2 * classes
        assert count(LocalFeatureDigging(backbone, classes)) == expected
        assert plain == expected
    assert expected / 2**20 == pytest.approx(24.872, abs=5e-4)
    assert count(backbone) / 2**20 == pytest.approx(20.662, abs=5e-4)


def test_blocks_start_as_copies_and_are_trained_alone():
    backbone = mini()
    frozen = FrozenBackbone(backbone)
    classifier = LocalFeatureDigging(backbone, 5)
    assert all(p.requires_grad for p in classifier.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())
    images = torch.randn(2, 3, 64, 64)
    tokens = frozen(images)
    x = tokens.embedded
    for block, mask in zip(classifier.blocks, backbone.masks, strict=True):
        x = block(x, attn_mask=mask)
    assert torch.equal(x, tokens.last[-1])
    before = copy.deepcopy(backbone.state_dict())
    classifier(tokens.embedded).sum().backward()
    with torch.no_grad():
        for p in classifier.parameters():
            p -= 0.1 * p.grad
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_class_maps_follow_the_written_out_layers():
    backbone = mini()
    classifier = LocalFeatureDigging(backbone, 5).eval()
    embedded = FrozenBackbone(backbone).embed(torch.randn(2, 3, 64, 64))
    x = embedded
    for block, mask in zip(classifier.blocks, backbone.masks, strict=True):
        x = block(x, attn_mask=mask)
    x = F.layer_norm(x, (96,), classifier.norm.weight, classifier.norm.bias, classifier.norm.eps)
    x = x[:, 1:].reshape(2, 8, 8, 96).permute(0, 3, 1, 2)
    first, _, second, norm, _, _ = classifier.classifier
    x = F.conv2d(x, first.weight, first.bias, padding=1).clamp(min=0)
    x = F.conv2d(x, second.weight, padding=1)
    x = (x / (1 + norm.eps) ** 0.5).clamp(min=0)
    expected = torch.zeros_like(x)
    for row in range(8):
        for column in range(8):
            window = F.pad(x, (1, 1, 1, 1))[:, :, row : row + 3, column : column + 3]
            expected[:, :, row, column] = window.sum(dim=(2, 3)) / 9
    assert torch.allclose(classifier(embedded), expected, atol=1e-5)


def test_drop_path_rises_to_the_last_block():
    classifier = LocalFeatureDigging(mini(), 5, drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in classifier.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


# Joint


class Passes:
    """Counts how often each block of a frozen transformer runs."""

    def __init__(self, model):
        self.runs = [0] * len(model.frozen.backbone.vit.blocks)
        for layer, block in enumerate(model.frozen.backbone.vit.blocks):
            block.register_forward_hook(lambda *_, layer=layer: self.count(layer))

    def count(self, layer):
        self.runs[layer] += 1


@pytest.mark.parametrize("enhance_test", [False, True])
def test_inference_is_one_pass_of_the_frozen_transformer(enhance_test):
    model = joint(enhance_test=enhance_test).eval()
    passes = Passes(model)
    with torch.inference_mode():
        output = model(torch.randn(3, 3, 64, 64))
    assert passes.runs == [1, 1, 1, 1]
    assert output.logits.shape == (3, 5)
    assert output.generated.shape == (3, 64, 64)
    assert torch.allclose(output.logits, output.class_maps.mean(dim=(2, 3)))


def test_the_frozen_pass_is_the_backbones():
    backbone = mini()
    frozen = FrozenBackbone(backbone)
    images = torch.randn(2, 3, 64, 64)
    tokens = frozen(images, last=4)
    with torch.no_grad():
        whole = backbone(images)
    assert len(tokens.last) == 4
    assert torch.allclose(frozen.normalise(tokens.last[-1])[:, 1:], whole.patches, atol=1e-5)
    grid = frozen.to_grid(tokens.last[-1])
    assert torch.equal(grid[1, :, 2, 3], tokens.last[-1][1, 1 + 2 * 8 + 3])


def test_the_frozen_part_never_trains():
    model = joint().train()
    assert not model.frozen.training
    assert not model.frozen.backbone.training
    assert model.generator.training
    before = copy.deepcopy(model.frozen.state_dict())
    model(torch.randn(2, 3, 64, 64)).logits.sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.frozen.state_dict().items()), "batch statistics moved"
    assert all(p.grad is None for p in model.frozen.parameters())


def test_enhanced_at_test_is_the_masked_image_embedded_anew():
    model = joint(enhance_test=True, mask_threshold=0.5).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        output = model(images)
        mask = upsample(output.generated, (64, 64)) >= 0.5
        expected = model.classifier(model.frozen.embed(blacken(images, mask)))
        plain = model.classifier(model.frozen.embed(images))
    assert 0 < mask.float().mean() < 1
    assert torch.equal(output.class_maps, expected)
    assert not torch.allclose(plain, expected)


def test_parts_can_be_missing_and_are_named():
    backbone = mini()
    generator, classifier = GrabCutEnhancedGenerator(96, 5, SMALL), LocalFeatureDigging(backbone, 5)
    images, classes = torch.randn(2, 3, 64, 64), torch.tensor([0, 4])
    only = LocLoc(backbone, 5, generator=generator).eval()
    output = only(images)
    assert only.maps == ("generated",)
    assert output.logits.abs().sum() == 0
    assert set(only.localize(output, classes)) == {"generated"}
    assert only.head is generator
    only = LocLoc(backbone, 5, classifier=classifier).eval()
    found = only.localize(only(images), classes)
    assert set(found) == {"classifier"}
    assert torch.equal(found["classifier"][1], only(images).class_maps[1, 4])
    assert only.head is classifier.classifier
    with pytest.raises(ParameterError, match="neither"):
        LocLoc(backbone, 5)
    with pytest.raises(ParameterError, match="without a generator"):
        LocLoc(backbone, 5, classifier=classifier, config=LocLocConfig.paper()).eval()(images)
    with pytest.raises(ParameterError, match="plain vision transformer"):
        FrozenBackbone(create_backbone("resnet_mini"))


# Training


def batches(masks=True):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2):
        samples = []
        for i in range(8):
            image = rng.integers(0, 60, (64, 64, 3)).astype(np.uint8)
            mask = np.zeros((64, 64), np.uint8)
            top, left = rng.integers(8, 30, 2)
            mask[top : top + 24, left : left + 24] = 1
            image[mask == 1, i % 2] += 180
            samples.append(Sample(image, str(i), (i % 2,), mask=mask))
        batch = {"image": to_tensor(np.stack([s.image for s in samples])), "label": torch.tensor([0, 1] * 4)}
        found.append(batch | ({"samples": samples} if masks else {}))
    return found


def test_both_parts_learn_through_the_shared_loop(tmp_path):
    config = TrainingConfig(epochs=12, lr=0.002, head_lr=0.03, device="cpu", precision="fp32")
    backbone = mini()
    model = LocLoc(backbone, 2, generator=GrabCutEnhancedGenerator(96, 2, SMALL))
    history = train(model, batches(), config, tmp_path / "geg", progress=False)
    assert history.loss.iloc[-1] < 0.5 * history.loss.iloc[0]
    again = LocLoc(mini(5), 2, generator=GrabCutEnhancedGenerator(96, 2, SMALL))
    load_checkpoint(again, tmp_path / "geg", "last")
    images = batches()[0]["image"]
    assert torch.equal(again(images).generated, model(images).generated)
    model = LocLoc(backbone, 2, classifier=LocalFeatureDigging(backbone, 2))
    history = train(model, batches(masks=False), config, tmp_path / "lfdm", progress=False)
    assert history.loss.iloc[-1] < 0.5 * history.loss.iloc[0]


def test_blocks_train_at_the_backbones_rate_and_convolutions_at_the_heads():
    backbone = mini()
    model = LocLoc(backbone, 5, classifier=LocalFeatureDigging(backbone, 5))
    groups = parameter_groups(model, TrainingConfig(epochs=1, lr=0.001, head_lr=0.1))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {rates[id(p)] for p in model.classifier.blocks.parameters()} == {0.001}
    assert {rates[id(p)] for p in model.classifier.classifier.parameters()} == {0.1}
    assert not any(id(p) in rates for p in model.frozen.parameters())


def test_each_part_has_its_loss():
    generator = create_method("locloc", mini(), 2, part="generator", config=SMALL).eval()
    batch = batches()[0]
    with torch.no_grad():
        drawn = generator(batch["image"]).generated
    targets = map_targets(batch["samples"], drawn.shape[1:])
    assert torch.equal(generator.loss(generator, batch), half_squared_error(drawn, *targets))
    classifier = create_method("locloc", mini(), 2, part="classifier").eval()
    expected = F.cross_entropy(classifier(batch["image"]).logits, batch["label"])
    assert torch.allclose(classifier.loss(classifier, batch), expected)
    with pytest.raises(ParameterError, match="each of them alone"):
        joint().loss(None, batch)


@pytest.mark.parametrize("part", ["generator", "classifier"])
def test_the_loss_goes_through_the_forward_that_it_is_given(part):
    """Several processes wrap the model: a pass beside the wrapper would join no gradients."""
    model, calls = create_method("locloc", mini(), 2, part=part, config=SMALL), []

    def wrapper(images):
        calls.append(images)
        return model(images)

    model.loss(wrapper, batches()[0]).backward()
    assert len(calls) == 1


def test_a_part_is_made_by_its_name():
    generator = create_method("locloc", mini(), 5, part="generator", config={"channels": 8, "third_level": True})
    assert generator.maps == ("generated",)
    assert generator.generator.config == LocLocConfig(channels=8, third_level=True)
    assert generator.learns_from_masks
    assert generator.first_transforms() == []
    classifier = create_method("locloc", mini(), 5, part="classifier", config=LocLocConfig.paper(), drop_path=0.3)
    assert classifier.maps == ("classifier",)
    assert classifier.classifier.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert classifier.learns_from_masks
    assert classifier.first_transforms() == [Enhance(rectangle=False)]
    assert classifier.eval()(torch.randn(1, 3, 64, 64)).logits.shape == (1, 5), "alone it masks no test image"
    plain = create_method("locloc", mini(), 5, part="classifier", config={"enhance_training": False})
    assert not plain.learns_from_masks
    assert plain.first_transforms() == []
    for options, problem in (({"part": "decoder"}, "no part 'decoder'"), ({"drop": 1}, "drop")):
        with pytest.raises(ParameterError, match=problem):
            create_method("locloc", mini(), 5, **options)


def test_making_a_backbone_leaves_the_random_numbers_as_they_were():
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    get_method("locloc").make_backbone("vit_mini_dino", image_size=64)
    assert torch.equal(torch.rand(3), expected)


# Enhanced images


def test_enhanced_images_are_black_outside_of_the_mask():
    rng = np.random.default_rng(3)
    image = rng.integers(1, 256, (20, 30, 3)).astype(np.uint8)
    mask = rng.integers(0, 2, (20, 30)).astype(np.uint8)
    mask[0, :5] = IGNORE
    sample = Sample(image, "a", (0,), mask=mask)
    found = Enhance()(sample).image
    for row, column in np.ndindex(20, 30):
        expected = image[row, column] if mask[row, column] else np.zeros(3)
        assert np.array_equal(found[row, column], expected)
    assert np.array_equal(sample.image, image), "the sample itself was changed"
    as_tensor = blacken(to_tensor(image)[None], torch.from_numpy(mask != 0)[None])[0]
    assert torch.allclose(as_tensor, to_tensor(found), atol=1e-5)
    assert torch.allclose(
        to_tensor(np.zeros((1, 1, 3), np.uint8)).flatten(), -torch.tensor(IMAGENET_MEAN) / torch.tensor(IMAGENET_STD)
    )
    with pytest.raises(ParameterError, match="no mask"):
        Enhance()(Sample(image, "b", (0,)))


def test_the_rectangle_of_the_released_code():
    """What is left visible beside the mask is a rectangle; the mean of its full area is that of 1 - l: one half."""
    image = np.full((40, 60, 3), 9, np.uint8)
    sample = Sample(image, "a", (0,), mask=np.zeros((40, 60), np.uint8))
    areas = []
    for seed in range(400):
        shown = Enhance(rectangle=True)(sample, np.random.default_rng(seed)).image.any(axis=2)
        rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
        if len(rows):
            assert shown[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        areas.append(shown.mean())
    # Clipping at the border takes some of the half away.
    assert 0.2 < np.mean(areas) < 0.5
    assert max(areas) > 0.8
    assert min(areas) < 0.05
    again = [Enhance(rectangle=True)(sample, np.random.default_rng(7)).image for _ in range(2)]
    assert np.array_equal(*again)
