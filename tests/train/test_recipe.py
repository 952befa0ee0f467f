import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wsolnb.backbones import create_backbone
from wsolnb.data import transforms
from wsolnb.data.splits import load_splits
from wsolnb.errors import DataError, ParameterError, WeightsError
from wsolnb.methods.scm import SCMConfig
from wsolnb.notebook import runs
from wsolnb.train import recipe as recipes
from wsolnb.train.evaluation import validator
from wsolnb.train.loop import TrainingConfig, history, load_checkpoint
from wsolnb.train.recipe import Recipe


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("WSOLNB_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def splits(root):
    return load_splits("aviary", classes=4, train=16, val=4, test=4)


def small(method="cam", **changes):
    training = TrainingConfig(epochs=1, lr=1e-3, device="cpu", precision="fp32", select="top1_loc")
    backbone = "resnet_mini" if method == "cam" else "vit_mini"
    return Recipe(**{"method": method, "backbone": backbone, "batch_size": 8, "training": training, **changes})


def fit(name, recipe, splits, run_folder="outputs/mini"):
    run = runs.start("x", {"seed": 0, "run_folder": run_folder})
    validate = validator(splits.val, recipe.test_transform())
    return recipes.fit(run, name, recipe, splits.train, validate, progress=False)


def test_fit_trains_once_and_finds_its_artefact_again(splits, capsys):
    model, folder = fit("cam-0", small(), splits)
    assert "built cam-0" in capsys.readouterr().out
    again, same = fit("cam-0", small(), splits)
    assert "reusing cam-0" in capsys.readouterr().out
    assert folder == same
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert {"top1", "gt_known", "top1_loc", "gt_known_layercam"} <= set(history(folder).columns)
    load_checkpoint(small().build(4), folder, "best")

    read, recipe = recipes.load_trained(folder / "last.safetensors")
    assert recipe == small()
    assert read.class_names == splits.train.class_names
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), read.parameters(), strict=True))
    (folder / "recipe.json").unlink()
    with pytest.raises(WeightsError, match=r"no checkpoint with a recipe\.json beside it"):
        recipes.load_trained(folder / "last.safetensors")
    with pytest.raises(WeightsError, match="no checkpoint at"):
        recipes.load_trained(folder / "first.safetensors")

    _, other = fit("cam-0", small(batch_size=4), splits)
    assert other != folder


def test_fewer_images_than_a_batch_are_told_before_weights_are_looked_for(splits, monkeypatch):
    monkeypatch.setattr(Recipe, "build", lambda *_: 1 / 0)
    for recipe in (small(batch_size=17), small(images=7)):
        with pytest.raises(ParameterError, match=r"training images make no batch of (17|8)"):
            fit("cam-0", recipe, splits)


def test_other_weights_to_start_from_make_another_artefact(root, splits):
    torch.manual_seed(0)
    backbone = create_backbone("resnet_mini", output_stride=16).resnet
    state = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    save_file(state, root / "start.safetensors")
    first = small(checkpoint="start.safetensors")
    model = first.build(4)
    assert torch.equal(model.backbone.resnet.conv1.weight, backbone.conv1.weight)
    hash_before = first.start()
    _, folder = fit("cam-0", first, splits)
    save_file({**state, "bn1.weight": torch.zeros(64)}, root / "start.safetensors")
    assert first.start() not in (hash_before, "")
    assert small().start() == ""
    assert fit("cam-0", first, splits)[1] != folder


def test_training_is_the_same_bit_for_bit(splits):
    models = [fit("tscam", small("tscam"), splits, folder)[0] for folder in ("a", "b")]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_protocols():
    resize, crop = small(image_size=224), small(image_size=224, protocol="crop")
    assert resize.test_transform() == transforms.Resize(224)
    assert crop.test_transform() == transforms.ResizeCenterCrop(256, 224, keep_aspect=True)
    assert crop.train_transform().transforms[0] == transforms.ResizeRandomCrop(256, 224)
    both = small(image_size=224, protocol="crop_resize")
    assert (both.test_transform(), both.train_transform()) == (resize.test_transform(), crop.train_transform())


@pytest.mark.parametrize(
    "crops", [{"long_side": (64, 96), "scale": (0.5, 1.5)}, {"protocol": "crop", "scale": (0.5, 1.5)}]
)
def test_two_crops_at_once_are_refused(crops):
    with pytest.raises(ValueError, match="several crops of one image"):
        small(**crops)


def test_history_keeps_lambda_and_beta(splits):
    recipe = small("scm", options={"config": SCMConfig.released(blocks=2, first_steps=4).model_dump()})
    model, folder = fit("scm", recipe, splits)
    last = history(folder).iloc[-1]
    assert {name: pytest.approx(last[name]) for name in model.scalars()} == model.scalars()
    assert last.lambda_1 != 1.0


def test_unknown_method_and_missing_data_are_named(root):
    with pytest.raises(ParameterError, match="did you mean 'tscam'"):
        small(method="tscan").build(4)
    with pytest.raises(DataError, match="pets"):
        load_splits("pets")
    with pytest.raises(ParameterError, match="did you mean 'body_cue'"):
        load_splits("aviary", body_que=1.0)


def test_splits_of_the_published_lists(tmp_path):
    for split in ("train-weaksup", "train-fullsup", "test"):
        folder = tmp_path / "metadata" / split
        folder.mkdir(parents=True)
        cv2.imwrite(str(tmp_path / f"{split}.png"), np.zeros((8, 8, 3), np.uint8))
        (folder / "image_ids.txt").write_text(f"{split}.png\n")
        (folder / "class_labels.txt").write_text(f"{split}.png,0\n")
    splits = load_splits("metadata", str(tmp_path))
    assert [part.image_ids[0] for part in splits] == ["train-weaksup.png", "train-fullsup.png", "test.png"]
    sides = [part.square for part in load_splits("metadata", str(tmp_path), square=224)]
    assert sides == [None, 224, 224], "training images are cropped from their own size"
    with pytest.raises(DataError, match="no folder given for the data set 'metadata'"):
        load_splits("metadata")
    with pytest.raises(ParameterError, match="did you mean 'metadata'"):
        load_splits("metadat", str(tmp_path))


def test_only_the_first_layers_are_tuned_when_asked(splits):
    recipe = small("tscam", tuned_layers=2)
    start = {name: value.clone() for name, value in recipe.build(4).state_dict().items()}
    model, _ = fit("tscam", recipe, splits)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, start[name])}
    assert any(name.startswith("backbone.vit.blocks.1.") for name in moved)
    assert any(name.startswith("backbone.vit.patch_embed.") for name in moved)
    assert not any(name.startswith(("backbone.vit.blocks.2.", "backbone.vit.blocks.3.")) for name in moved)
    for wrong in (small("tscam", tuned_layers=5), small("cam", tuned_layers=2)):
        with pytest.raises(ParameterError, match="tuned_layers"):
            wrong.build(4)
