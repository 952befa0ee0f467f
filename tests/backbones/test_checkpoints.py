"""Files of weights as other programs write them."""

import argparse

import pytest
import timm
import torch
from safetensors.torch import save_file

from wsolnb.backbones import create_backbone, load_classifier
from wsolnb.backbones.checkpoints import load_weights
from wsolnb.errors import WeightsError
from wsolnb.methods.cam import CAMClassifier
from wsolnb.methods.locloc import LocalFeatureDigging, LocLoc
from wsolnb.methods.mctformer import MCTformer
from wsolnb.methods.tscam import TSCAM


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(3)
    return create_backbone("vit_mini", image_size=32).vit.state_dict()


def loads(path, state, name="vit_mini"):
    backbone = create_backbone(name, image_size=32, checkpoint=path)
    found = (backbone.vit if hasattr(backbone, "vit") else backbone.cnn).state_dict()
    return all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "backbone.",
        "model.",
        "encoder.",
        "backbone.vit.",
        "module.backbone.",
        "teacher.backbone.",
        "x.y.",
    ],
)
@pytest.mark.parametrize("wrapper", [None, "state_dict", "teacher"])
def test_prefixes_and_wrappers(prefix, wrapper, state, tmp_path):
    named = under(prefix, state) | {f"{prefix}head.weight": torch.zeros(3, 96)}
    torch.save({wrapper: named, "epoch": 3} if wrapper else named, tmp_path / "file.pth")
    assert loads(tmp_path / "file.pth", state)


@pytest.mark.parametrize("order", [("student", "teacher"), ("teacher", "student")])
def test_of_teacher_and_student_the_teacher_is_taken(order, state, tmp_path):
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    parts = {"teacher": under("backbone.", state), "student": under("module.backbone.", other)}
    parts["teacher"]["dino_head.mlp.weight"] = torch.zeros(3)
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"params": [0]}]}
    torch.save({**{name: parts[name] for name in order}, "optimizer": optimizer}, tmp_path / "file.pth")
    assert loads(tmp_path / "file.pth", state)
    flat = {**under("student.", parts["student"]), **under("teacher.", parts["teacher"])}
    save_file(flat, tmp_path / "flat.safetensors")
    assert loads(tmp_path / "flat.safetensors", state)


def test_our_own_trained_models_load(tmp_path):
    for build in (
        lambda backbone: TSCAM(backbone, 2),
        lambda backbone: MCTformer(backbone, 2),
        lambda backbone: LocLoc(backbone, 2, classifier=LocalFeatureDigging(backbone, 2)),
    ):
        backbone = create_backbone("vit_mini", image_size=32)
        save_file(build(backbone).state_dict(), tmp_path / "last.safetensors")
        assert loads(tmp_path / "last.safetensors", backbone.vit.state_dict())
    backbone = create_backbone("resnet_mini")
    save_file(
        {k: v.contiguous() for k, v in CAMClassifier(backbone, 2).state_dict().items()}, tmp_path / "last.safetensors"
    )
    assert loads(tmp_path / "last.safetensors", backbone.cnn.state_dict(), "resnet_mini")


def test_old_formats_load(state, tmp_path):
    torch.save({"model": state}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    assert loads(tmp_path / "legacy.pth", state)
    resnet = create_backbone("resnet_mini").cnn.state_dict()
    old = {name: value for name, value in resnet.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    assert loads(tmp_path / "old.pth", old, "resnet_mini")


@pytest.mark.parametrize(
    "content", [[1, 2], torch.zeros(3), {}, {"model": []}, {"epoch": 3}, None, "text", {1: {2: 3}}]
)
def test_files_without_named_tensors(content, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(WeightsError, match=r"(?s)(no tensors by name|does not fit).*"):
        create_backbone("vit_mini", checkpoint=tmp_path / "file.pth")


def test_the_refused_object_is_named_and_how_to_save_without_it(state, tmp_path):
    for legacy in (False, True):
        content = {"model": state, "args": argparse.Namespace(lr=1)}
        torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(WeightsError, match=r"argparse\.Namespace") as caught:
            create_backbone("vit_mini", checkpoint=tmp_path / "file.pth")
        assert "argparse.Namespace" in caught.value.remedy
        assert "torch.save" in caught.value.remedy


def test_a_prefix_is_named_where_the_file_does_not_fit(state, tmp_path):
    short = {name: value for name, value in state.items() if name != "norm.bias"}
    for changed, told in (
        (short, "'norm.bias' .misses it.*begins with 'module.'.*behind the prefix 'module.'"),
        ({**state, "norm.bias": torch.zeros(5)}, r"'norm.bias' .has shape \(5,\).*begins with 'module.'"),
        ({"odd": torch.zeros(1)}, "every tensor begins with 'module.'"),
    ):
        torch.save({"state_dict": changed} if changed is short else under("module.", changed), tmp_path / "file.pth")
        if changed is short:
            torch.save(under("module.", short), tmp_path / "file.pth")
        with pytest.raises(WeightsError, match=told):
            create_backbone("vit_mini", image_size=32, checkpoint=tmp_path / "file.pth")
    save_file(under("module.", {**state, "extra.weight": torch.zeros(1)}), tmp_path / "file.safetensors")
    with pytest.raises(WeightsError, match=r"'extra\.weight'"):
        create_backbone("vit_mini", image_size=32, checkpoint=tmp_path / "file.safetensors")


def test_only_a_file_that_is_there_and_whole(tmp_path):
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    (tmp_path / "folder.pth").mkdir()
    for name, told in (
        ("empty", "cannot read"),
        ("text", "cannot read"),
        ("folder", "no checkpoint"),
        ("x", "no checkpoint"),
    ):
        with pytest.raises(WeightsError, match=told):
            create_backbone("vit_mini", checkpoint=tmp_path / f"{name}.pth")


def test_a_classifier_is_loaded_with_as_many_classes_as_the_file_has(tmp_path):
    network = timm.create_model("resnet18", num_classes=5).eval()
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state, "ema": {"decay": torch.tensor(0.9)}}, tmp_path / "mine.pth")
    loaded, left_out = load_classifier("resnet18", tmp_path / "mine.pth")
    assert left_out == ["ema.decay"]
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(images), network(images))

    del state["module.fc.bias"]
    torch.save(state, tmp_path / "mine.pth")
    loaded, left_out = load_classifier("resnet18", tmp_path / "mine.pth")
    assert left_out == []
    assert loaded.fc.bias is None
    assert torch.equal(loaded.fc.weight, network.fc.weight)

    del state["module.fc.weight"]
    torch.save(state, tmp_path / "mine.pth")
    with pytest.raises(WeightsError, match=r"holds no classifier 'fc\.weight' of 'resnet18'"):
        load_classifier("resnet18", tmp_path / "mine.pth")


def test_what_a_backbone_leaves_out_is_returned(tmp_path):
    network = timm.create_model("resnet18", num_classes=5)
    torch.save(network.state_dict(), tmp_path / "mine.pth")
    backbone = create_backbone("resnet18")
    assert load_weights(backbone.cnn, tmp_path / "mine.pth") == ["fc.weight", "fc.bias"]
