import numpy as np
import pandas as pd
import pytest
import torch

from wsolnb import multilabel
from wsolnb.data import IGNORE, Sample, aviary
from wsolnb.data.aviary import AviaryConfig
from wsolnb.errors import MapError, ParameterError
from wsolnb.experiment import Splits
from wsolnb.multilabel import ClassifierRecipe, RandomLongSideCrop
from wsolnb.notebook import runs
from wsolnb.train import loop
from wsolnb.train.loop import TrainingConfig, load_checkpoint


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    config = AviaryConfig(variant="scenes", classes=3, size=48, train=12, val=6, test=4)
    cache = tmp_path_factory.mktemp("cache")
    return Splits(*(aviary.load(config, split, cache) for split in aviary.SPLITS))


def small(**changes):
    loop = {"epochs": 2, "lr": 1e-3, "precision": "fp32", "device": "cpu", "select": "map"}
    return ClassifierRecipe(image_size=48, batch_size=4, pretrained=False, training=TrainingConfig(**loop), **changes)


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


@pytest.mark.parametrize("size", [(60, 100), (100, 60), (20, 30)])
def test_the_long_side_crop_moves_truth_with_the_image(size):
    height, width = size
    mask = np.zeros(size, np.uint8)
    mask[height // 4 : height // 2, width // 4 : width // 2] = 1
    image = np.repeat((mask * 255)[..., None], 3, axis=2)
    sample = Sample(image, "a", (0,), mask=mask, parts=mask)
    seen = set()
    for seed in range(20):
        found = RandomLongSideCrop((64, 128), 80)(sample, np.random.default_rng(seed))
        assert found.image.shape == (80, 80, 3)
        known = found.mask != IGNORE
        bright = found.image[..., 0] > 127
        assert (bright[known] == (found.mask[known] == 1)).mean() > 0.97  # the border of the square is interpolated
        assert (np.abs(found.image[~known].astype(int) - [124, 116, 104]) <= 0).all()
        rows, columns = np.where(known)
        extent = (np.ptp(rows) + 1, np.ptp(columns) + 1)
        assert known.sum() == extent[0] * extent[1]
        seen.add(extent)
    assert len(seen) > 5


@pytest.mark.parametrize("change", [{}, {"method": "mctformer", "backbone": "vit_mini"}])
def test_a_classifier_is_trained_once_and_read_back(change, splits, tmp_path, capsys):
    run = runs.start("x", {"run_folder": str(tmp_path)})
    recipe = small(**change)
    model, folder = multilabel.fit(run, "c", recipe, splits, progress=False)
    again, same = multilabel.fit(run, "c", recipe, splits, progress=False)
    assert folder == same
    assert "reusing c" in capsys.readouterr().out
    logits, labels = multilabel.predict(model, splits.val, 48)
    np.testing.assert_array_equal(logits, multilabel.predict(again, splits.val, 48)[0])
    for row, present in zip(labels, splits.val.labels, strict=True):
        assert tuple(np.flatnonzero(row)) == present
    history = pd.read_csv(folder / "history.csv")
    assert len(history) == 2
    assert history["map"].iloc[-1] == pytest.approx(np.nanmean(multilabel.average_precision(logits, labels)))
    assert not torch.equal(model.head.weight, recipe.build(3).head.weight)
    load_checkpoint(recipe.build(3), folder, "last")


def test_sgd_follows_the_polynomial(splits, tmp_path):
    recipe = small()
    loader = multilabel.make_loader(splits.train, recipe.train_transform(), 4, shuffle=True, drop_last=True)
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


def test_unknown_classifier():
    with pytest.raises(ParameterError, match=r"'mctforme' \(did you mean 'mctformer'\?\)"):
        small(method="mctforme").build(3)


def test_voc_is_judged_on_its_training_images(splits):
    root = splits.train.root  # the scenes are written in VOC's layout
    settings = {"dataset": "voc", "data_root": str(root), "train_list": "", "seed": 0, "train_seed": 1, "epochs": 5}
    settings |= {"lr": 0.1, "head_lr": 1.0, "weight_decay": 1e-4, "precision": "fp32", "device": "cpu", "method": "cam"}
    settings |= {"backbone": "resnet50", "pretrained": True, "image_size": 512, "output_stride": 16, "batch_size": 16}
    settings |= {"shift": 8, "optimizer": "sgd", "num_workers": 0, "long_side": [320, 640]}
    found, recipe = multilabel.described(settings)
    assert (len(found.train), len(found.val), len(found.test)) == (12, 6, 12)
    assert found.test[0].mask is not None
    assert recipe.map_size is None
    assert recipe.train_transform()(found.train[0], np.random.default_rng(0)).size == (512, 512)
    listed = root / "some.txt"
    listed.write_text(f"/JPEGImages/{found.train.image_ids[3]}.jpg /SegmentationClass/{found.train.image_ids[3]}.png\n")
    assert multilabel.described({**settings, "train_list": str(listed)})[0].train.image_ids == (
        found.train.image_ids[3],
    )
