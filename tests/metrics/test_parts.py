import numpy as np
import pytest
from random_maps import random_map

from wsolnb.data.sample import CONTEXT, DISCRIMINATIVE, IGNORE, REST
from wsolnb.errors import MapError
from wsolnb.metrics import PartCoverage

THRESHOLDS = np.round(np.arange(0, 1.01, 0.1), 2)
VALUES = {"discriminative": [DISCRIMINATIVE], "rest": [REST], "object": [DISCRIMINATIVE, REST], "context": [CONTEXT]}


def test_coverage_equals_loops():
    rng = np.random.default_rng(0)
    metric = PartCoverage(THRESHOLDS)
    images = []
    for i in range(24):
        height, width = rng.integers(2, 12, 2)
        some = [[CONTEXT, DISCRIMINATIVE, REST, IGNORE], [CONTEXT, REST], [DISCRIMINATIVE], [CONTEXT, IGNORE]][i % 4]
        images.append((random_map(rng, height, width, i % 8), rng.choice(some, (height, width)).astype(np.uint8)))
        metric.update(*images[-1])
    result = metric.compute()
    for name, values in VALUES.items():
        covered, mass = [], []
        for score_map, parts in images:
            pixels = [p for p in np.ndindex(parts.shape) if parts[p] in values]
            if not pixels:
                continue
            peak = max(int(255 * v) for v in score_map.ravel())
            grey = [int(255 * score_map[p]) for p in pixels]
            covered.append([sum(g > int(t * peak) for g in grey) / len(pixels) for t in THRESHOLDS])
            mass.append(sum(float(score_map[p]) for p in pixels) / len(pixels))
        np.testing.assert_allclose(result.curve[name], np.mean(covered, axis=0), atol=1e-12, err_msg=name)
        assert result.mass[name] == pytest.approx(np.mean(mass))
        assert result.images[name] == len(covered)
    assert 0 < result.images["contrast"] < result.images["context"]


def test_coverage_by_hand():
    metric = PartCoverage([0.0, 0.5, 1.0])
    score_map = np.array([[1.0, 0.6, 0.2, 0.0, 0.4]], np.float32)
    parts = np.array([[DISCRIMINATIVE, REST, REST, CONTEXT, CONTEXT]])
    metric.update(score_map, parts)
    result = metric.compute()
    assert result.curve["discriminative"].tolist() == [1, 1, 0]
    assert result.curve["rest"].tolist() == [1, 0.5, 0]
    assert result.curve["object"].tolist() == pytest.approx([1, 2 / 3, 0])
    assert result.curve["context"].tolist() == [0.5, 0, 0]
    assert result.mass == pytest.approx({"discriminative": 1, "rest": 0.4, "object": 0.6, "context": 0.2})
    assert result.best() == (0.5, pytest.approx(2 / 3))
    assert result.at(0.0)["contrast"] == 0.5


def test_images_that_lack_a_part_do_not_count_for_it():
    metric = PartCoverage([0.5])
    metric.update(np.ones((1, 2), np.float32), np.array([[REST, CONTEXT]]))
    result = metric.compute()
    assert "discriminative" not in result.curve.scores
    metric.update(np.array([[1, 0]], np.float32), np.array([[DISCRIMINATIVE, CONTEXT]]))
    result = metric.compute()
    assert result.at(0.5) == {"discriminative": 1, "rest": 1, "object": 1, "context": 0.5, "contrast": 0.5}
    assert result.images == {"discriminative": 1, "rest": 1, "object": 2, "context": 2, "contrast": 2}


def test_coverage_refuses():
    metric = PartCoverage()
    with pytest.raises(MapError, match="no pixel"):
        metric.compute()
    with pytest.raises(MapError, match=r"holds \[7\]"):
        metric.update(np.ones((1, 2), np.float32), np.array([[0, 7]]))
    with pytest.raises(MapError, match="part map has shape"):
        metric.update(np.ones((1, 2), np.float32), np.array([[0]]))
    with pytest.raises(MapError, match="NaN"):
        metric.update(np.full((1, 1), np.nan, np.float32), np.array([[0]]))
    metric.update(np.ones((1, 2), np.float32), np.full((1, 2), IGNORE))
    with pytest.raises(MapError, match="no pixel"):
        metric.compute()
