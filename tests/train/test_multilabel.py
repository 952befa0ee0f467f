import math

import numpy as np
import pandas as pd
import pytest
import torch

from wsolnb.backbones import create_backbone
from wsolnb.data import aviary
from wsolnb.data.aviary import AviaryConfig
from wsolnb.data.loading import make_loader
from wsolnb.data.splits import Splits
from wsolnb.errors import MapError, ParameterError
from wsolnb.notebook import runs
from wsolnb.train import loop, multilabel
from wsolnb.train.loop import TrainingConfig, load_checkpoint
from wsolnb.train.recipe import Recipe, fit


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    config = AviaryConfig(variant="scenes", classes=3, size=48, train=12, val=6, test=4)
    cache = tmp_path_factory.mktemp("cache")
    return Splits(*(aviary.load(config, split, cache) for split in aviary.SPLITS))


def small(**changes):
    loop = {"epochs": 2, "lr": 1e-3, "precision": "fp32", "device": "cpu", "select": "map"}
    plain = {"method": "cam", "backbone": "resnet_mini", "output_stride": 8, "image_size": 48, "batch_size": 4}
    return Recipe(**plain | changes, training=TrainingConfig(**loop))


def test_average_precision_by_ranks():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(20, 3)), rng.integers(0, 2, (20, 3))
    labels[:, 2] = 0
    expected = []
    for c in range(2):
        order = sorted(range(20), key=lambda i: -scores[i, c])
        hits = np.cumsum([labels[i, c] for i in order])
        expected.append(np.mean([hits[r] / (r + 1) for r, i in enumerate(order) if labels[i, c]]))
    found = multilabel.average_precision(scores, labels)
    np.testing.assert_allclose(found[:2], expected)
    assert np.isnan(found[2])
    with pytest.raises(MapError, match="NaN or infinity"):
        multilabel.average_precision(np.full((2, 1), np.nan), np.ones((2, 1)))


@pytest.mark.parametrize("change", [{}, {"method": "mctformer", "backbone": "vit_mini"}])
def test_a_classifier_is_trained_once_and_read_back(change, splits, tmp_path, capsys):
    run = runs.start("x", {"run_folder": str(tmp_path)})
    recipe = small(**change)
    validate = multilabel.validator(splits.val, 48)
    model, folder = fit(run, "c", recipe, splits.train, validate, progress=False)
    again, same = fit(run, "c", recipe, splits.train, multilabel.validator(splits.val, 48), progress=False)
    assert folder == same
    assert "reusing c" in capsys.readouterr().out
    logits, labels = multilabel.predict(model, splits.val, 48)
    np.testing.assert_array_equal(logits, multilabel.predict(again, splits.val, 48)[0])
    for row, present in zip(labels, splits.val.labels, strict=True):
        assert tuple(np.flatnonzero(row)) == present
    history = pd.read_csv(folder / "history.csv")
    assert len(history) == 2
    assert history["map"].iloc[-1] == pytest.approx(np.nanmean(multilabel.average_precision(logits, labels)))
    assert history["map"].iloc[-1] == pytest.approx(multilabel.mean_average_precision(again, splits.val, 48))
    assert not torch.equal(model.head.weight, recipe.build(3).head.weight)
    load_checkpoint(recipe.build(3), folder, "last")


def test_sgd_follows_the_polynomial(splits, tmp_path):
    recipe = small()
    loader = make_loader(splits.train, recipe.train_transform(), 4, shuffle=True, drop_last=True)
    model, twin = recipe.build(3), recipe.build(3)
    config = TrainingConfig(
        epochs=1, lr=0.05, head_lr=0.5, weight_decay=1e-2, precision="fp32", device="cpu",
        optimizer="sgd", momentum=0.0, schedule="poly", warmup=0.0, clip=0.0,
    )  # fmt: skip
    loop.train(model, loader, config, tmp_path, progress=False)
    loader.set_epoch(0)
    twin.train()
    for step, batch in enumerate(loader):
        factor = (1 - step / len(loader)) ** 0.9
        loss = torch.nn.functional.multilabel_soft_margin_loss(twin(batch["image"]).logits, batch["label"])
        twin.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                rate = (0.5 if name.startswith("classifier") else 0.05) * factor
                decay = 1e-2 if parameter.ndim > 1 else 0.0
                parameter -= rate * (parameter.grad + decay * parameter)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


def clouds(count, seed=0):
    """Features (n, F) of widely different scales, and labels (n, 3) of which an image has any number."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (count, 3))
    centres = np.random.default_rng(9).normal(size=(3, 10))
    features = (labels @ centres + rng.normal(size=(count, 10))) * 10.0 ** np.linspace(-2, 2, 10)
    return features, labels


def margin(weight, features, labels, c):
    """The objective, term by term, with the features divided by their standard deviations."""
    spread = features.std(axis=0)
    total = 0.0
    for own, target in zip(weight * spread, labels.T, strict=True):
        logits = (features / spread) @ own
        total += (own**2).sum() / 2 - c * sum(
            math.log(1 / (1 + math.exp(-z))) if y else math.log(1 / (1 + math.exp(z)))
            for z, y in zip(logits, target, strict=True)
        )
    return total


@pytest.mark.parametrize("c", [1e-3, 1.0])
def test_the_logistic_classifier_is_at_the_minimum_of_the_multi_label_loss(c):
    features, labels = clouds(60)
    weight = multilabel.logistic(features, labels, c)
    assert weight.shape == (3, 10)
    least = margin(weight, features, labels, c)
    rng = np.random.default_rng(1)
    for size in (0.1, 0.01):
        step = size * rng.normal(size=weight.shape) / features.std(axis=0)
        assert least < min(margin(weight + step, features, labels, c), margin(weight - step, features, labels, c))
    held, truth = clouds(300, 1)
    if c == 1:
        assert ((held @ weight.T > 0) == truth).mean() > 0.7
        shuffled = multilabel.logistic(features, np.random.default_rng(0).permutation(labels), c)
        assert abs(((held @ shuffled.T > 0) == truth).mean() - 0.5) < 0.1


def test_the_unit_of_a_feature_does_not_matter_and_a_constant_one_weighs_nothing():
    features, labels = clouds(60)
    weight = multilabel.logistic(features, labels, 1.0)
    units = 10.0 ** np.arange(-5, 5)
    scaled = multilabel.logistic(features * units, labels, 1.0)
    np.testing.assert_allclose(scaled * units, weight, rtol=1e-3, atol=1e-6)
    dead = np.column_stack([features, np.zeros(60)])
    expected = np.column_stack([weight, np.zeros(3)])
    np.testing.assert_allclose(multilabel.logistic(dead, labels, 1.0), expected, rtol=1e-6)


def test_the_soft_margin_is_torchs():
    features, labels = clouds(20)
    logits = features[:, 3:6]
    expected = torch.nn.functional.multilabel_soft_margin_loss(torch.from_numpy(logits), torch.from_numpy(labels))
    assert multilabel.soft_margin(logits, labels) == pytest.approx(float(expected))
    assert multilabel.soft_margin(np.array([[1e4]]), np.array([[0]])) == 1e4


def test_a_class_of_all_images_or_none_and_a_fit_without_end_are_errors(monkeypatch):
    features, labels = clouds(60)
    labels[:, 0], labels[:, 2] = 0, 1
    with pytest.raises(ParameterError, match=r"\[0, 2\] are in all of the images, or in none"):
        multilabel.logistic(features, labels, 1.0)
    one_step = multilabel.LogisticRegression
    monkeypatch.setattr(multilabel, "LogisticRegression", lambda **options: one_step(**{**options, "max_iter": 1}))
    with pytest.warns(match="converge"), pytest.raises(ParameterError, match="not converged"):
        multilabel.logistic(*clouds(60), 1.0)


def test_a_frozen_classifier_weighs_the_features_of_the_untouched_backbone(splits, tmp_path):
    torch.manual_seed(0)
    backbone = create_backbone("resnet_mini", pretrained=True, output_stride=8)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    multilabel.frozen_maker(backbone, splits.train, splits.val, 48)(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    model, choice = multilabel.read_frozen(backbone, 3, tmp_path), pd.read_csv(tmp_path / "choice.csv")
    assert tuple(choice.C) == multilabel.C_GRID
    logits, labels = multilabel.predict(model, splits.val, 48)
    assert multilabel.soft_margin(logits, labels) == pytest.approx(choice["validation loss"].min(), rel=1e-4)
    features, truth = [], []
    for sample in splits.train:
        image = torch.from_numpy(sample.image).permute(2, 0, 1)[None] / 255
        image = (image - torch.tensor(backbone.mean).view(3, 1, 1)) / torch.tensor(backbone.std).view(3, 1, 1)
        with torch.no_grad():
            features.append(backbone.eval()(image)[0].mean(dim=(1, 2)).numpy())
        truth.append([c in sample.labels for c in range(3)])
    c = choice.C[choice["validation loss"].idxmin()]
    expected = multilabel.logistic(np.stack(features), np.array(truth, int), c)
    np.testing.assert_allclose(model.classifier.weight.detach().numpy(), expected, rtol=1e-2, atol=1e-4)
