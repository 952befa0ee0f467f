import json

import numpy as np
import pytest
import torch

from wsolnb import experiment
from wsolnb import experiment_locloc as shared
from wsolnb.errors import ParameterError
from wsolnb.methods.locloc import LocLoc
from wsolnb.notebook import runs
from wsolnb.notebook.params import notebook_parameters
from wsolnb.train import evaluation

NOTEBOOKS = ("30_locloc_grabcut", "31_locloc_generator", "32_locloc_classifier")
SETTINGS = {
    name: parameter.default for notebook in NOTEBOOKS for name, parameter in notebook_parameters(notebook).items()
}
SETTINGS |= {"classes": 4, "train_images": 16, "val_images": 4, "test_images": 4, "batch_size": 4, "channels": 4}
SETTINGS |= {"ppd_hidden": 8, "ppd_channels": 4, "generator_images": 8, "device": "cpu", "precision": "fp32", "jobs": 1}
SETTINGS |= {f"{part}_epochs": 1 for part in ("generator", "decoder", "classifier", "probe")}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("WSOLNB_ROOT", str(tmp_path))
    return runs.start("x", {"seed": 0})


@pytest.fixture
def splits(run):
    return shared.open_splits(SETTINGS)


def test_every_part_trains_once_and_is_found_again(run, splits, capsys):
    stored = shared.masks(run, SETTINGS, splits.train, shared.grabcut_config(SETTINGS), progress=False)
    assert stored.report(splits.train.image_ids)["images"] == 16
    for part in ("generator", "decoder", "classifier", "probe"):
        planned = shared.plan(SETTINGS, part, 0)
        model, folder = shared.fit(run, f"{part}-0", planned, splits, stored, progress=False)
        again, same = shared.fit(run, f"{part}-0", planned, splits, stored, progress=False)
        assert same == folder
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        fresh = planned.build(shared.open_backbone(planned.recipe, "cpu"), 4)
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, fresh.state_dict()[n])]
        assert changed
        assert not any(name.startswith("frozen") for name in changed)
        assert shared.fit(run, f"{part}-0", shared.plan(SETTINGS, part, 1), splits, stored, False)[1] != folder
    out = capsys.readouterr().out
    assert out.count("built generator-0") == 2
    assert out.count("reusing generator-0") == 1


def test_a_decoder_sees_some_of_the_images_and_a_classifier_all(run, splits):
    stored = shared.masks(run, SETTINGS, splits.train, shared.grabcut_config(SETTINGS), progress=False)
    steps = {}
    for part in ("generator", "classifier"):
        model, folder = shared.fit(run, part, shared.plan(SETTINGS, part, 0), splits, stored, progress=False)
        norm = next(m for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d) and "frozen" not in n)
        steps[part] = int(norm.num_batches_tracked)
        assert len(experiment.history(folder)) == 1
    assert steps == {"generator": 2, "classifier": 4}


def test_what_needs_masks_says_so(run, splits):
    with pytest.raises(ParameterError, match="generator learns from masks"):
        shared.fit(run, "a", shared.plan(SETTINGS, "generator", 0), splits)
    with pytest.raises(ParameterError, match="classifier learns from masks"):
        shared.fit(run, "a", shared.plan(SETTINGS, "classifier", 0), splits)
    plain = shared.plan(SETTINGS, "classifier", 0, enhance_training=False)
    assert shared.fit(run, "a", plain, splits, progress=False)[1].exists()
    with pytest.raises(ParameterError, match="preset"):
        shared.plan({**SETTINGS, "preset": "papper"}, "generator", 0)


def test_masks_that_were_damaged_since_are_made_anew(run, splits):
    config = shared.grabcut_config(SETTINGS)
    stored = shared.masks(run, SETTINGS, splits.val, config, progress=False)
    whole = stored.path(1).read_bytes()
    stored.path(1).write_bytes(whole[:50])
    again = shared.masks(run, SETTINGS, splits.val, config, progress=False)
    assert again.folder == stored.folder
    assert stored.path(1).read_bytes() == whole
    other = shared.masks(run, SETTINGS, splits.val, shared.grabcut_config(SETTINGS, iterations=2), progress=False)
    assert other.folder != stored.folder


def test_scores_are_those_of_the_shared_evaluation(run, splits):
    """The same model through `evaluation.evaluate` and through `predict` and `score`."""
    stored = shared.masks(run, SETTINGS, splits.train, shared.grabcut_config(SETTINGS), progress=False)
    generator, _ = shared.fit(run, "g", shared.plan(SETTINGS, "generator", 0), splits, stored, progress=False)
    classifier, _ = shared.fit(run, "c", shared.plan(SETTINGS, "classifier", 0), splits, stored, progress=False)
    whole = LocLoc(generator.frozen.backbone, 4, generator.generator, classifier.classifier)
    transform = shared.recipe_of(SETTINGS).test_transform()
    expected = evaluation.evaluate(whole, splits.val, transform)
    found = shared.predict(whole, splits.val, transform)
    scored = shared.score(found.maps, shared.Transformed(splits.val, transform), found.logits)
    assert scored.table(scored) == expected.table(expected)
    aside = shared.score(found.maps, shared.Transformed(splits.val, transform))
    row = aside.table(aside)[0]
    assert row["top1"] == 1
    assert row["gt_known"] == row["top1_loc"] == expected.table(expected)[0]["gt_known"]


def test_maps_beyond_the_memory_are_the_same(run, splits, monkeypatch):
    planned, transform = shared.plan(SETTINGS, "decoder", 0), shared.recipe_of(SETTINGS).test_transform()
    model = planned.build(shared.open_backbone(planned.recipe, "cpu"), 4).eval()
    config = shared.grabcut_config(SETTINGS)
    within = shared.predict(model, splits.val, transform), shared.attention_maps(planned.recipe, config, splits.val)
    monkeypatch.setattr(shared, "IN_MEMORY", 0)
    beyond = shared.predict(model, splits.val, transform), shared.attention_maps(planned.recipe, config, splits.val)
    assert isinstance(beyond[1], np.memmap)
    assert np.array_equal(within[1], beyond[1])
    for name, maps in within[0].maps.items():
        assert isinstance(beyond[0].maps[name], np.memmap)
        assert np.array_equal(maps, beyond[0].maps[name])


def test_maps_of_masks_and_of_attention(run, splits):
    config, recipe = shared.grabcut_config(SETTINGS), shared.recipe_of(SETTINGS)
    stored = shared.masks(run, SETTINGS, splits.val, config, progress=False)
    maps = shared.mask_maps(splits.val, stored, recipe.test_transform())
    assert np.array_equal(maps[2] == 1, stored.read(2, splits.val.image_ids[2]).mask)
    attention = shared.attention_maps(recipe, config, splits.val, "cpu")
    assert attention.shape == maps.shape == (4, 112, 112)
    assert attention.min() == 0
    assert attention.max() == 1
    guide = shared.Attend(recipe, config, "cpu")([splits.val[2]])[0]
    assert guide.shape == (14, 14)
    row, column = np.unravel_index(guide.argmax(), guide.shape)
    peak = np.unravel_index(attention[2].argmax(), (112, 112))
    assert (peak[0] // 8, peak[1] // 8) == (row, column)


def test_settings_are_those_used_in_the_run(tmp_path):
    run = runs.start("x", {"seed": 0}, tmp_path)
    for notebook in NOTEBOOKS[:2]:
        used = {name: p.default for name, p in notebook_parameters(notebook).items()}
        used |= {"fg_threshold": 0.9} if notebook.startswith("30") else {"channels": 7}
        file = run.folder / "metrics" / f"{notebook}.json"
        file.write_text(json.dumps({"provenance": {"parameters": used}}))
    own = {name: p.default for name, p in notebook_parameters(NOTEBOOKS[1]).items()}
    found = shared.settings_of(run, NOTEBOOKS[1], own)
    assert (found["fg_threshold"], found["channels"]) == (0.9, own["channels"])
    assert "classifier_epochs" not in found
    found = shared.settings_of(run, "33_locloc_results", {})
    assert (found["fg_threshold"], found["channels"]) == (0.9, 7)
    assert found["classifier_epochs"] == notebook_parameters(NOTEBOOKS[2])["classifier_epochs"].default


def test_rows_are_measured_once(run):
    calls = []

    def measure():
        calls.append(1)
        return [{"a": np.float32(0.5), "b": "x"}]

    assert [shared.cached_rows(run, "rows", {"x": 1}, measure) for _ in range(2)] == [[{"a": 0.5, "b": "x"}]] * 2
    shared.cached_rows(run, "rows", {"x": 2}, measure)
    assert len(calls) == 2


def test_parameters_of_the_classifier_do_not_change_the_generator():
    without = {name: value for name, value in SETTINGS.items() if name != "drop_path"}
    for part in ("generator", "decoder"):
        assert shared.plan(SETTINGS, part, 0) == shared.plan({**SETTINGS, "drop_path": 0.3}, part, 0)
        assert shared.plan(without, part, 0) == shared.plan(SETTINGS, part, 0)
    assert shared.plan({**SETTINGS, "drop_path": 0.3}, "classifier", 0).config.drop_path == 0.3
