"""The estimates of `wsolnb plan`: counted against loops and published numbers, and against measured seconds."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from wsolnb.backbones import create_backbone
from wsolnb.data import aviary
from wsolnb.errors import ParameterError
from wsolnb.methods import create_method
from wsolnb.notebook import costs, pipeline
from wsolnb.notebook.cli import app
from wsolnb.notebook.costs import DEVICES, count, estimate

ROOT = Path(__file__).parents[2]
A100 = DEVICES["a100"]
# Seconds of one core each of `wsolnb reproduce --profile mini --jobs 2` in a fresh clone, on two cores with bfloat16.
MEASURED = {
    "01_data": 41.6, "02_metrics": 32.4, "03_cam_and_tscam": 382.3, "10_scm_diffusion": 28.6, "11_scm_training": 232.8,
    "04_pretraining": 149.1, "30_locloc_grabcut": 97.3, "31_locloc_generator": 78.2, "32_locloc_classifier": 172.4,
    "20_lpcam_classifier": 70.2, "21_lpcam_prototypes": 32.7, "23_lpcam_segmentation": 151.0,
    "22_lpcam_results": 37.0, "33_locloc_results": 51.8, "12_scm_results": 60.1, "00_overview": 36.2,
    "05_your_images": 46.5, "90_leaderboard": 14.4, "91_claims": 14.5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.setenv("WSOLNB_ROOT", str(ROOT))


def values(profile, notebook, *overrides):
    """All parameters of a step of a profile."""
    return {notebook: pipeline.resolved(pipeline.plan(profile, overrides, [notebook]))[notebook]}


def hours(profile, notebook, *overrides, device=A100):
    (cost,) = estimate(values(profile, notebook, *overrides), device)
    return cost.hours


def test_multiply_adds_are_those_of_a_loop_over_convolutions():
    model = create_method("cam", create_backbone("resnet_mini", output_stride=8), 12).eval()
    found = []

    def add(layer, inputs, output):
        if isinstance(layer, nn.Conv2d):
            found.append(output[0].numel() * layer.weight[0].numel())
        elif isinstance(layer, nn.Linear):
            found.append(inputs[0][0].numel() * layer.out_features)

    for layer in model.modules():
        layer.register_forward_hook(add)
    model(torch.zeros(1, 3, 112, 112))
    net = count("cam", "resnet_mini", 112, 12, stride=8)
    assert len(found) > 10
    # The classifier is the one layer that is also applied to each position, as einsum or matmul: some thousandths.
    assert net.forward == pytest.approx(sum(found), rel=0.01)
    assert net.step == 3 * net.forward
    assert net.weights == net.trained == sum(weight.numel() for weight in model.parameters())


def test_multiply_adds_are_those_that_publishers_state():
    assert count("cam", "resnet50", 224, 1000, stride=32).forward == pytest.approx(4.09e9, rel=0.01)  # torchvision
    tokens, dim, layers = 197, 384, 12  # DeiT-S: projections, two products of attention, the MLP; patches
    block = tokens * dim * 12 * dim + 2 * tokens**2 * dim
    patches = 196 * dim * 16 * 16 * 3
    probe = count("ppd", "dino_small", 224, 200, (("part", "probe"),))
    assert probe.forward == pytest.approx(layers * block + patches, rel=0.01)
    assert probe.step == pytest.approx(probe.forward, rel=0.001)  # all but the probe is frozen
    assert probe.trained < probe.weights / 50


@pytest.mark.parametrize("device", ["cpu", "a100"])
def test_twice_the_epochs_take_twice_the_hours(device, monkeypatch):
    monkeypatch.setattr(costs, "START", 0.0)
    one, two, four = (
        hours("cub", "32_locloc_classifier", f"classifier_epochs={n}", f"probe_epochs={n}", device=DEVICES[device])
        for n in (100, 200, 400)
    )
    assert four - two == pytest.approx(2 * (two - one))
    assert two / one == pytest.approx(2, rel=0.1)  # what is scored stays


def test_more_images_and_larger_ones_cost_more():
    by_images = [hours("mini", "11_scm_training", f"train_images={n}") for n in (600, 1200, 2400)]
    assert by_images == sorted(set(by_images))
    # Of the catalogue: 5,000 images of Tiny-ImageNet, or all of its 100,000.
    few, many = (hours("tiny", "11_scm_training", f"images={n}", device=DEVICES["t4"]) for n in (5000, 0))
    assert many > 5 * few
    small, large = (estimate(values("cub", "11_scm_training", f"image_size={n}"), A100)[0] for n in (112, 224))
    assert small.memory < large.memory
    assert hours("cub", "11_scm_training") < hours("cub", "11_scm_training", device=DEVICES["v100"])


def test_what_does_not_fit_into_the_device_is_told():
    (cost,) = estimate(values("cub", "11_scm_training", "batch_size=512"), DEVICES["rtx3090"])
    assert "more than the 24 GB of the device: give a smaller batch" in cost.note
    (cost,) = estimate(values("cub", "11_scm_training", "batch_size=64"), DEVICES["rtx3090"])
    assert cost.note == ""


def test_the_default_profile_takes_what_was_measured_within_a_factor_of_two(monkeypatch):
    steps = pipeline.resolved(pipeline.plan("mini"))
    monkeypatch.setattr(costs, "_has_bf16", lambda: True)
    found = {one.notebook: one.hours * 3600 for one in estimate(steps, DEVICES["cpu"])}
    found["04_pretraining"] += found.pop("06_pretraining_appendix")  # one notebook when the seconds were measured
    assert found.keys() == MEASURED.keys()
    assert sum(found.values()) == pytest.approx(sum(MEASURED.values()), rel=0.3)
    far = {name: (took, MEASURED[name]) for name, took in found.items() if not 0.5 < took / MEASURED[name] < 2.1}
    assert far == {}
    monkeypatch.setattr(costs, "_has_bf16", lambda: False)
    took = sum(one.hours * 3600 for one in estimate(steps, DEVICES["cpu"]))
    assert took == pytest.approx(2 * 17 * 60, rel=0.5)  # 17 minutes of two cores with AVX2


@pytest.mark.parametrize("profile", ["cub", "voc_swin"])
def test_every_step_of_a_profile_is_estimated(profile):
    steps = pipeline.resolved(pipeline.plan(profile))
    rows, remarks = costs.report(steps, "a100")
    assert [row[0] for row in rows] == ["estimate", *steps, "total"]
    assert not [row for row in rows if "nan" in row]
    trained = [row for row in rows[1:-1] if row[0] in costs._WORKS]
    assert trained
    assert all(float(row[1]) > 0 for row in trained)
    assert float(rows[-1][1]) == pytest.approx(sum(float(row[1]) for row in rows[1:-1]), abs=0.1)
    assert any("downloads: " in line for line in remarks)


def test_images_are_those_of_the_folder_where_it_is_there(tmp_path):
    config = aviary.AviaryConfig(variant="scenes", classes=3, size=48, train=20, val=4, test=2)
    folder = aviary.load(config, "train", tmp_path).root
    assert costs._images({"dataset": "voc", "data_root": str(folder)}) == (18, 2, 4, 3)
    assert costs._images({"dataset": "voc", "data_root": str(tmp_path / "none")}) == (1318, 146, 1449, 20)
    longer = {"dataset": "voc", "data_root": "none", "train_list": "ImageSets/Segmentation/train_aug.txt"}
    assert costs._images(longer).train == 10582 - 1058
    (tmp_path / "list.txt").write_text("a\nb\n\n")
    assert costs._images(longer | {"train_list": str(tmp_path / "list.txt")}).train == 2
    assert costs._images({"dataset": "tiny_imagenet", "images": 5000}).train == 5000
    assert costs._images({"dataset": "pets", "data_root": "none"}) == (2944, 736, 3669, 37)  # a fifth is held out


def test_what_cannot_be_estimated_says_why(tmp_path):
    (cost,) = estimate(values("mini", "03_cam_and_tscam", "dataset=folder", "data_root=none"), A100)
    assert math.isnan(cost.hours)
    assert cost.note == "not estimated: the data set 'folder' is not in none"
    (cost,) = estimate({"03_cam_and_tscam": {"dataset": "aviary"}}, A100)
    assert cost.note == "not estimated: it has no parameter 'seeds'"
    with pytest.raises(ParameterError, match=r"no rates are known of the device 'a10' \(did you mean 'a100'"):
        costs.report({}, "a10")


def test_a_plan_starts_nothing_and_fetches_nothing(tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise AssertionError("something was fetched or started")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("subprocess.Popen", refuse)
    monkeypatch.setattr("wsolnb.train.loop.train", refuse)
    arguments = ["plan", "--profile", "voc", "--outputs", str(tmp_path / "out"), "-p", f"data_root={tmp_path}/none"]
    done = CliRunner().invoke(app, [*arguments, "--device", "rtx4090"])
    assert done.exit_code == 1  # no data
    assert "NVIDIA RTX 4090, 165 (bf16) and 82.6 (fp32) x 10^12 operations a second" in done.output
    assert "downloads: PASCAL VOC2012 with SBD's train_aug (over 2.0 GB), resnet50 (0.1 GB)" in done.output
    assert [line.split()[0] for line in done.output.splitlines() if line.startswith(("estimate", "total"))] == [
        "estimate", "total",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []
