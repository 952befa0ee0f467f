from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from wsolnb import weights
from wsolnb.backbones import create_backbone
from wsolnb.backbones.photo import load_stages
from wsolnb.data import aviary
from wsolnb.data.loading import to_tensor
from wsolnb.data.transforms import resize
from wsolnb.errors import WeightsError
from wsolnb.methods.cam import CAMClassifier
from wsolnb.notebook import runs
from wsolnb.pretraining import recipes, taught
from wsolnb.pretraining.recipes import export
from wsolnb.train.loop import TrainingConfig

EVERY = 1280  # components: as many as the teacher has channels


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images that refuse to tell their boxes and masks."""
    config = aviary.AviaryConfig(classes=3, size=48, train=10, val=3, test=3)
    dataset = aviary.load(config, "train", tmp_path_factory.mktemp("cache"))

    def annotate(*_):
        raise AssertionError("the truth was read")

    dataset.annotate = annotate
    return dataset


@pytest.fixture(scope="module")
def lessons(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lessons")
    taught.write_lessons(images, taught.TaughtConfig(components=EVERY), folder)
    return folder


def test_the_lessons_are_what_stem_and_teacher_say_of_the_whole_image(images, lessons):
    stem, told = np.load(lessons / "stem.npy"), np.load(lessons / "teacher.npy")
    assert stem.shape == (2, 10, 112, 10, 10)
    assert told.shape == (2, 10, 100, EVERY)
    backbone, teacher = create_backbone("vit_photo"), CAMClassifier.published("efficientnet_lite0", output_stride=16)
    load_stages(backbone.vit.patch_embed)
    logits = taught.published_logits(EVERY, lessons)
    for index in (0, 7):
        image = resize(images.read(index, truth=False), (160, 160)).image
        batch = to_tensor(image, backbone.mean, backbone.std)[None]
        with torch.no_grad():
            expected = teacher(batch).logits[0]
            own = logits(torch.from_numpy(told[0, index]).float().mean(dim=0))
            map_ = backbone.vit.patch_embed.features(batch)[0]
        np.testing.assert_allclose(stem[0, index], map_.numpy(), atol=0.02)
        np.testing.assert_allclose(own.numpy(), expected.numpy(), atol=0.05 * float(expected.std()))
        assert own.argmax() == expected.argmax()
        assert np.abs(stem[1, index] - stem[0, index]).mean() > 0.3  # another view


def test_lessons_are_written_the_same_again(images, lessons, tmp_path):
    taught.write_lessons(images, taught.TaughtConfig(components=EVERY), tmp_path)
    for name in ("stem.npy", "teacher.npy"):
        np.testing.assert_array_equal(np.load(tmp_path / name), np.load(lessons / name))


def test_principal_axes_are_those_of_the_covariance():
    x = torch.randn(500, 6, dtype=torch.float64) @ torch.diag(torch.tensor([5.0, 1, 3, 0.1, 2, 0.5]).double()) + 7
    mean, axes, unit = taught.principal(x, 3)
    _, singular, rows = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    torch.testing.assert_close(mean, x.mean(dim=0))
    torch.testing.assert_close((axes.T @ rows[:3].T).abs(), torch.eye(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(unit, singular[0] / 500**0.5)


def test_an_epoch_shows_every_image_once_with_what_belongs_to_it(lessons):
    stem, told = np.load(lessons / "stem.npy"), np.load(lessons / "teacher.npy")
    labels = np.arange(10)
    loader = taught.Lessons(lessons, labels, 5, seed=3)
    shown = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        batches = list(loader)
        shown.append(torch.cat([batch["image"] for batch in batches]))
        assert sorted(torch.cat([batch["label"] for batch in batches]).tolist()) == labels.tolist()
        for batch in batches:
            for image, said, label in zip(batch["image"], batch["told"], batch["label"], strict=True):
                views = [(view, mirrored) for view in (0, 1) for mirrored in (False, True)
                         if np.array_equal(image, stem[view, label][..., :: -1 if mirrored else 1])]  # fmt: skip
                assert len(views) == 1
                view, mirrored = views[0]
                grid = told[view, label].reshape(10, 10, -1)[:, :: -1 if mirrored else 1]
                np.testing.assert_array_equal(said, grid.reshape(100, -1))
    assert torch.equal(shown[0], shown[2])
    assert not torch.equal(shown[0], shown[1])


def test_the_losses_term_by_term_and_what_they_train(lessons):
    config = taught.TaughtConfig(components=EVERY, weights={"label": 1, "looked": 2, "image": 3, "token": 4})
    model = config.build(10, 1, lessons).eval()
    batch = next(iter(taught.Lessons(lessons, np.arange(10), 4, seed=0)))
    terms = model.losses(batch)
    tokens = nn.Module.__call__(model.backbone.vit, batch["image"]), model.backbone.vit.forward_features(batch["image"])
    class_token, patches = tokens[1][:, 0], tokens[1][:, 1:]
    say = model.projection
    torch.testing.assert_close(terms["label"], F.cross_entropy(say["label"](class_token), batch["label"]))
    probabilities = model.logits(batch["told"].mean(dim=1)).softmax(dim=1)
    by_hand = -(probabilities * say["image"](class_token).log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(terms["image"], by_hand)
    error = (say["token"](patches) - batch["told"]).pow(2).sum() / batch["told"].pow(2).sum()
    torch.testing.assert_close(terms["token"], error)
    total = model.loss(model, batch)
    torch.testing.assert_close(total, terms["label"] + 2 * terms["looked"] + 3 * terms["image"] + 4 * terms["token"])
    total.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {n for n, _ in model.named_parameters() if ".stages." in n or n.startswith("logits.")}


@pytest.mark.parametrize("name", taught.RECIPES)
def test_file_card_and_code_agree(name):
    card, state = weights.read_card(name), load_file(weights.verified(name))
    recipe = taught.RECIPES[name]
    assert recipe.model_validate(card["recipe"]) == recipe(), "the card tells of another recipe than the code"
    own = create_backbone(name, pretrained=True).vit
    assert card["parameters"] == sum(p.numel() for p in own.parameters())
    for key, value in state.items():
        torch.testing.assert_close(own.state_dict()[key], value.to(own.state_dict()[key].dtype), atol=0, rtol=0)
    published = create_backbone(name).vit.patch_embed
    load_stages(published)
    for key, value in published.stages.state_dict().items():  # the stem is the installed network's, in half precision
        torch.testing.assert_close(own.patch_embed.stages.state_dict()[key], value, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("name", taught.RECIPES)
def test_the_cards_scores_are_the_recorded_ones(name):
    reference = Path(__file__).parents[2] / "outputs" / "reference"
    start = pd.read_csv(reference / "04_photo.csv").query("protocol == 'resize'")
    start = start.set_index(["backbone", "map"]).loc[name]
    photographs = pd.read_csv(reference / "04_photographs.csv").set_index(["map", "off-centre"]).auc
    expected = {"top1_test": start.top1["cam"]}
    expected |= {f"{map_}_gt_known_test": start.gt_known[map_] for map_ in ("cam", "attention")}
    expected |= {
        "attention_auc_photographs": photographs[name, False],
        "attention_auc_photographs_off_centre": photographs[name, True],
    }
    assert weights.read_card(name)["scores"] == pytest.approx(expected, abs=2e-3)


def test_the_whole_is_made_once_and_read_back(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(taught, "open_dataset", lambda *_: images)
    run = runs.start("04_pretraining", {"seed": 0}, tmp_path)
    config = taught.TaughtConfig(components=8, batch_size=5, training=TrainingConfig(epochs=1, lr=1e-3))
    backbone, folder = taught.taught(run, config, "somewhere", progress=False)
    again, same = taught.taught(run, config, "somewhere", progress=False)
    assert folder == same
    assert "reusing vit_photo" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), again.parameters(), strict=True))
    changed = config.model_copy(update={"training": TrainingConfig(epochs=1, lr=2e-3)})
    assert taught.taught(run, changed, "somewhere", progress=False)[1] != folder
    assert "reusing lessons" in capsys.readouterr().out


def test_another_seed_makes_another_file_of_the_same_lessons(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(taught, "open_dataset", lambda *_: images)
    quick = {"components": 8, "batch_size": 5, "training": TrainingConfig(epochs=1, lr=1e-3)}
    monkeypatch.setattr(taught, "TaughtConfig", partial(taught.TaughtConfig, **quick))
    monkeypatch.setitem(taught.RECIPES, "vit_photo", taught.TaughtConfig)
    run = runs.start("12_scm_results", {"seed": 0}, tmp_path)
    assert taught.taught_start(run, "vit_photo", 0, "somewhere") == {"pretrained": True, "checkpoint": ""}
    starts = [taught.taught_start(run, "vit_photo", seed, "somewhere") for seed in (1, 2, 1)]
    assert starts[0] == starts[2] != starts[1]
    said = capsys.readouterr().out
    assert (said.count("reusing lessons"), said.count("reusing pretraining-vit_photo-1")) == (2, 1)
    first, second = (create_backbone("vit_photo", **start).vit for start in starts[:2])
    embedded = create_backbone("vit_photo", pretrained=True).vit
    assert not torch.equal(first.pos_embed, second.pos_embed)
    for own, same in zip(first.patch_embed.stages.parameters(), embedded.patch_embed.stages.parameters(), strict=True):
        torch.testing.assert_close(own, same, atol=0, rtol=0)


def test_a_view_of_a_photograph_and_of_its_stems_map_give_the_same_tokens():
    backbone = create_backbone("vit_photo", pretrained=True).eval()
    for side in (160, 96):  # the size of the position embedding, and one that it is resampled for
        images = torch.randn(2, 3, side, side)
        with torch.no_grad():
            own, of_map = (
                recipes.forward_view(backbone, x) for x in (images, backbone.vit.patch_embed.features(images))
            )
        assert own.patches.shape == (2, (side // 16) ** 2, 192)
        for one, other in zip(own, of_map, strict=True):
            torch.testing.assert_close(one, other)


def test_the_self_taught_see_every_image_once_in_all_views_and_nothing_else(lessons):
    stem = np.load(lessons / "stem.npy")
    loader = taught.SelfTaughtConfig(batch_size=5).loader(lessons, np.arange(10))
    shown = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert all(set(batch) == {"image"} for batch in batches)
        shown.append(torch.cat([batch["image"] for batch in batches]).numpy())
    assert np.array_equal(shown[0], shown[2])
    assert not np.array_equal(shown[0], shown[1])
    whole = stem[0].reshape(10, -1)
    order = [int(np.flatnonzero((whole == image[0].reshape(-1)).all(axis=1))[0]) for image in shown[0]]
    assert sorted(order) == list(range(10))
    np.testing.assert_array_equal(shown[0], stem[:, order].swapaxes(0, 1))


def test_what_the_self_taught_learn_from_and_what_moves(lessons):
    config = taught.SelfTaughtConfig(batch_size=5)
    model = config.build(10, steps=4)
    published = create_backbone("vit_photo").vit.patch_embed
    load_stages(published)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for batch in config.loader(lessons, np.arange(10)):
        loss = model.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    still = {n for n, v in model.state_dict().items() if torch.equal(v, before[n])}
    stages = {n for n in before if ".stages." in n}
    assert stages <= still, "the stages were trained"
    for key, value in published.stages.state_dict().items():
        assert torch.equal(model.state_dict()[f"backbone.vit.patch_embed.stages.{key}"], value)
    assert "backbone.vit.patch_embed.proj.weight" not in still
    assert "teacher.0.vit.patch_embed.proj.weight" not in still  # it follows the student
    views, narrow = model.views(torch.randn(5, 2, 112, 10, 10))
    assert [tuple(v.shape) for v in (*views, *narrow)] == 2 * [(5, 112, 10, 10)] + 2 * [(5, 112, 6, 6)]


def test_the_self_taught_are_made_once_of_the_same_lessons_and_without_labels(images, tmp_path, monkeypatch, capsys):
    run = runs.start("04_pretraining", {"seed": 0}, tmp_path)
    monkeypatch.setattr(taught, "open_dataset", lambda *_: images)
    once = TrainingConfig(epochs=1, lr=1e-3)
    taught.taught(run, taught.TaughtConfig(batch_size=5, training=once), "somewhere", progress=False)
    config = taught.SelfTaughtConfig(batch_size=5, training=once)
    backbone, _ = taught.taught(run, config, "somewhere", progress=False)
    assert "reusing lessons" in capsys.readouterr().out
    labels = np.array([label for label, *_ in images.labels])
    own, other = (config.loader(next(tmp_path.glob("**/stem.npy")).parent, y) for y in (labels, labels[::-1]))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(own, other, strict=True))
    path = export(backbone, "vit_photo_dino", config, tmp_path, minutes=1).with_suffix(".safetensors")
    assert not any(name.startswith("patch_embed.stages.") for name in load_file(path))
    read = create_backbone(
        "vit_photo_dino", checkpoint=path
    ).vit.state_dict()  # the stages are those of vit_photo's file
    for name, value in backbone.vit.state_dict().items():
        torch.testing.assert_close(read[name], value, atol=1e-2, rtol=1e-3)
    with pytest.raises(WeightsError, match="tensors missing"):
        create_backbone("vit_photo", checkpoint=path)
