import math

import pytest
import torch
from over_cam import Tiny, assert_cam_in_evaluation, assert_learns_and_repeats
from torch import nn

from wsolnb.backbones import create_backbone
from wsolnb.errors import ParameterError
from wsolnb.methods import create_method
from wsolnb.methods.adl import ADL, drop_mask


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.8, 1.0])
def test_the_drop_mask_equals_loops(gamma):
    attention = torch.rand(3, 1, 4, 5, dtype=torch.float64)
    found = drop_mask(attention, gamma)
    for image in range(3):
        largest = max(float(value) for value in attention[image].flatten())
        for y in range(4):
            for x in range(5):
                assert found[image, 0, y, x] == (1.0 if float(attention[image, 0, y, x]) < gamma * largest else 0.0)
    # The maximum itself always goes, and the mask does not change with the features' scale.
    assert torch.equal(found.amin(dim=(1, 2, 3)), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(drop_mask(8 * attention, gamma), found)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_features_in_training_equal_loops(rate):
    model = ADL(Tiny(), 3, gamma=0.7, drop_rate=rate).double().train()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    features, found = model.backbone(images).detach(), model(images).features.detach()
    for image in range(2):
        attention = [[sum(float(v) for v in features[image, :, y, x]) / 6 for x in range(4)] for y in range(4)]
        largest = max(max(row) for row in attention)
        for y in range(4):
            for x in range(4):
                kept = 1.0 if attention[y][x] < 0.7 * largest else 0.0
                factor = kept if rate else 1 / (1 + math.exp(-attention[y][x]))
                torch.testing.assert_close(found[image, :, y, x], factor * features[image, :, y, x], atol=1e-12, rtol=0)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_gradients(rate):
    model = ADL(Tiny(), 3, drop_rate=rate).double().train()
    features = torch.rand(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    model._done = 0
    assert torch.autograd.gradcheck(lambda value: model._drop(model.backbone, (), value), features)


def test_the_choice_falls_once_per_layer_and_step_with_the_drop_rate():
    model = ADL(Tiny(), 3, drop_rate=0.75, layers=["inner", ""]).train()
    features = torch.rand(5, 6, 4, 4) + 0.1
    model._done = dropped = 0
    for _ in range(200):
        found = model._drop(model.backbone, (), features)
        lost = (found == 0).flatten(1).any(dim=1)
        assert lost.all() or not lost.any()  # one choice for the batch
        dropped += bool(lost.all())
    assert 125 <= dropped <= 175
    torch.manual_seed(4)
    first = model(torch.ones(1, 3, 8, 8)).logits
    after = torch.rand(())
    torch.manual_seed(4)
    assert torch.equal(model(torch.ones(1, 3, 8, 8)).logits, first)
    torch.manual_seed(4)
    torch.rand(()), torch.rand(())  # two layers, two draws
    assert torch.rand(()) == after


def test_inner_layers_of_a_resnet_change_the_features_of_training_only():
    backbone = create_backbone("resnet_mini", output_stride=8)
    images = torch.randn(2, 3, 48, 48)
    model = ADL(backbone, 3, drop_rate=1.0, layers=["resnet.layer3", "resnet.layer4"]).train()
    # Batch statistics move in training, so that of frozen ones only the dropout layers are left to differ.
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    layer3 = []
    handle = backbone.get_submodule("resnet.layer4").register_forward_pre_hook(
        lambda _m, inputs: layer3.append(inputs[0])
    )
    model(images)
    backbone(images)
    handle.remove()
    dropped, plain = layer3
    mask = drop_mask(plain.mean(dim=1, keepdim=True), 0.8)
    assert torch.equal(dropped, plain * mask)
    assert 0 < mask.mean() < 1
    assert not any(module._forward_hooks for module in backbone.modules())


def test_in_evaluation_it_is_cam():
    assert_cam_in_evaluation(ADL)


@pytest.mark.parametrize("multi", [False, True])
def test_training_reduces_the_loss_and_is_reproducible(multi):
    assert_learns_and_repeats("adl", multi)


@pytest.mark.parametrize(
    "options",
    [{"gamma": -0.1}, {"gamma": 1.1}, {"drop_rate": 2}, {"layers": []}, {"layers": "inner"}, {"layers": ["conb"]}],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ParameterError):
        create_method("adl", Tiny(), 3, **options)


def test_a_layer_that_is_not_run_is_refused():
    model = ADL(Tiny(), 3, layers=["unused", ""])
    model.eval()(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ParameterError, match="unused"):
        model.train()(torch.zeros(1, 3, 8, 8))
    assert not model.backbone._forward_hooks
