import importlib.util
from collections import namedtuple
from pathlib import Path

import pytest

from wsolnb import weights
from wsolnb.data import aviary
from wsolnb.notebook import pipeline, preflight
from wsolnb.notebook.preflight import Finding, Missing, look

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """A few scenes in VOC's layout."""
    config = aviary.AviaryConfig(variant="scenes", classes=3, size=48, train=3, val=2, test=2)
    return aviary.load(config, "train", tmp_path_factory.mktemp("cache")).root


def texts(findings):
    return [one.text for one in findings]


def test_nothing_is_missing_for_what_comes_with_the_repository(tmp_path):
    steps = {"03": {"dataset": "aviary", "data_root": "", "cnn": "efficientnet_lite0", "transformer": "vit_photo"}}
    assert set(weights.embedded()) >= {"vit_photo"}
    assert look(steps, tmp_path / "not" / "there") == []


def test_each_thing_that_is_missing_is_told_once_with_its_remedy(tmp_path, voc):
    steps = {
        "20": {"dataset": "voc", "data_root": str(tmp_path / "none"), "train_list": "no.txt"},
        "22": {"dataset": "voc", "data_root": str(tmp_path / "none"), "checkpoint": "none.pth", "backbone": "resnet50"},
        "30": {"dataset": "voc", "data_root": str(voc)},
    }
    found = look(steps, tmp_path)
    assert [(one.notebook, one.fatal) for one in found] == [("20", True), ("20", True), ("22", True)]
    assert f"the data set 'voc' at {tmp_path / 'none'}: no such folder" in found[0].text
    assert "VOCtrainval" in found[0].remedy
    assert texts(found)[1:] == ["train_list: there is no no.txt", "checkpoint: there is no none.pth"]
    said = []
    with pytest.raises(Missing, match="nothing was started: 3 things are missing") as error:
        preflight.report([*found, Finding("30", "a note", fatal=False)], said.append)
    assert str(error.value).count("Remedy: ") == 3
    assert said == ["note: a note"]


def test_a_list_beside_the_data_is_found(tmp_path, voc):
    (voc / "some.txt").write_text("x\n")
    values = {"dataset": "voc", "data_root": str(voc), "train_list": "some.txt"}
    assert look({"20": values}, tmp_path) == []
    assert texts(look({"20": values | {"data_root": ""}}, tmp_path))[-1] == "train_list: there is no some.txt"


def test_images_that_cannot_be_read_are_told_before_a_training(tmp_path, voc):
    values = {"dataset": "voc", "data_root": str(voc)}
    path = next(iter(sorted((voc / "JPEGImages").glob("*"))))
    content = path.read_bytes()
    try:
        for other in (voc / "JPEGImages").glob("*"):
            other.rename(other.with_suffix(".gone"))
        assert "missing" in look({"20": values}, tmp_path)[0].text
    finally:
        for other in (voc / "JPEGImages").glob("*.gone"):
            other.rename(other.with_suffix(path.suffix))
    assert path.read_bytes() == content
    assert look({"20": values}, tmp_path) == []


def test_weights_are_cached_downloaded_or_nowhere(tmp_path, monkeypatch):
    def found(name, **more):
        return look({"03": {"backbone": name, "pretrained": True, **more}}, tmp_path)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (note,) = found("dino_small")
    assert not note.fatal
    assert note.text.endswith("downloaded from https://huggingface.co/timm/vit_small_patch16_224.dino")
    assert found("dino_small", checkpoint=__file__) == found("dino_small", pretrained=False) == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "downloads are off" in found("dino_small")[0].text
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: f"/cache/{file}")
    assert found("dino_small") == []
    assert "no library holds the weights of 'conformer_small'" in found("conformer_small")[0].text
    assert "did you mean 'resnet50'" in found("resnett50")[0].text
    assert texts(found("vit_mini_plain")) == ["nobody has published weights of 'vit_mini_plain'"]


def test_packages_device_disk_and_memory(tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pydensecrf" else there(name, *a))
    (one,) = look({"23": {"crf_backend": "pydensecrf"}}, tmp_path)
    assert (one.text, one.fatal) == ("the package 'pydensecrf' is not installed", True)
    assert look({"23": {"crf_backend": "mean_field", "segmenter": "upernet"}}, tmp_path) == []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert texts(look({"03": {"device": "cuda"}}, tmp_path)) == ["PyTorch finds no cuda device"]
    assert [one.fatal for one in look({}, tmp_path, gpu=True)] == [False]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(9e9, 8.6e9, 0.4e9))
    (one,) = look({}, tmp_path / "a" / "b")
    assert one.fatal
    assert one.text == f"0.4 GB are free in {tmp_path}"
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: namedtuple("memory", "available")(0.5e9))
    assert texts(look({}, tmp_path))[-1].startswith("0.5 GB of memory are free")


@pytest.mark.parametrize(("pretrained", "expected"), [("true", {"resnet50", "swin"}), ("false", set())])
def test_networks_start_as_the_notebook_says_that_a_step_goes_on_from(tmp_path, monkeypatch, pretrained, expected):
    monkeypatch.setenv("WSOLNB_ROOT", str(ROOT))
    monkeypatch.setattr(preflight, "_weights", lambda network: preflight.Finding("", f"weights {network}"))
    steps = pipeline.plan("voc_swin", [f"data_root={tmp_path}", f"pretrained={pretrained}"])
    found = {
        one.text.split()[1].partition("_")[0] for one in pipeline.missing(steps, "voc_swin") if "weights" in one.text
    }
    assert found == expected


def test_the_profiles_of_the_papers_say_what_they_lack(tmp_path, monkeypatch):
    monkeypatch.setenv("WSOLNB_ROOT", str(ROOT))
    for profile in ("cub", "ilsvrc", "voc", "coco"):
        steps = pipeline.plan(profile, [f"data_root={tmp_path}"])
        found = pipeline.missing(steps, profile)
        assert any(one.fatal and one.text.startswith("the data set") and str(tmp_path) in one.text for one in found)
