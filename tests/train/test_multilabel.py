import numpy as np
import pandas as pd
import pytest
import torch

from wsolnb.data import aviary
from wsolnb.data.aviary import AviaryConfig
from wsolnb.data.loading import make_loader
from wsolnb.data.splits import Splits
from wsolnb.errors import MapError
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
