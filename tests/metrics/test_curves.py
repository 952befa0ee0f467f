import json
from pathlib import Path

import numpy as np
import pytest

from wsolnb.errors import ParameterError
from wsolnb.metrics import LocalizationAccuracy, MaxBoxAcc, PartCoverage, PxAP, SeedScores, ThresholdCurve, pixel_auc

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics.json"


def test_best_is_the_lowest_threshold_of_equally_good_ones():
    curve = ThresholdCurve(np.array([0.1, 0.2, 0.3]), {"a": np.array([0.5, 0.7, 0.7]), "b": np.array([3.0, 2.0, 1.0])})
    assert curve.best("a") == (0.2, 0.7)
    assert curve.best("b") == (0.1, 3.0)
    assert curve.at(0.3) == {"a": 0.7, "b": 1.0}
    assert curve["a"].tolist() == [0.5, 0.7, 0.7]


def test_a_threshold_is_found_despite_rounding():
    curve = ThresholdCurve(np.arange(0, 1, 0.1), {"a": np.arange(10.0)})
    assert curve.at(0.3)["a"] == 3  # arange has 0.30000000000000004
    with pytest.raises(ParameterError, match=r"nearest one is 0\.3"):
        curve.at(0.301)


def test_unknown_score():
    curve = ThresholdCurve(np.array([0.1]), {"gt_known": np.array([1.0])})
    with pytest.raises(ParameterError, match="did you mean 'gt_known'"):
        curve.best("gt_know")


def golden_numbers():
    """Every metric on eight small images of integer arithmetic, so that no platform rounds them differently."""
    thresholds = [0.1, 0.3, 0.5, 0.7, 0.9]
    v1, v2 = MaxBoxAcc(thresholds), MaxBoxAcc(thresholds, multi_contour=True)
    localization, pixels = LocalizationAccuracy(thresholds), PxAP(thresholds)
    parts, seeds, auc = PartCoverage(thresholds), SeedScores(4, thresholds), []
    y, x = np.mgrid[:24, :32]
    for i in range(8):
        cx, cy, r = 6 + 3 * i, 4 + 2 * i, 3 + i % 4
        ox, oy = 27 - 2 * i, 20 - i
        height = np.maximum(48 - 4 * (abs(x - cx) + abs(y - cy)), 46 - 6 * (abs(x - ox) + abs(y - oy)))
        mask = ((abs(x - cx) <= r) & (abs(y - cy) <= r)).astype(np.uint8)
        texture = (x * 7 + y * 13 + x * y * (i + 3)) % 16
        score_map = (np.clip(height + texture, 0, 60) / 64).astype(np.float32)
        boxes = [[max(cx - r, 0), max(cy - r, 0), min(cx + r + 1, 32), min(cy + r + 1, 24)]]
        boxes += [[ox - 2, oy - 2, ox + 3, oy + 3]] * (i % 2)
        v1.update(score_map, boxes)
        v2.update(score_map, boxes)
        localization.update(score_map, boxes, i % 4, ranked=[(i * i) % 4, 3, 1][: 1 + i % 2])
        pixels.update(score_map, mask)
        parts.update(score_map, mask + (mask * (y > cy)).astype(np.uint8))
        seeds.update(np.stack([score_map, texture.astype(np.float32) / 32]), [i % 3, (i + 1) % 3], mask * (1 + i % 3))
        auc.append(pixel_auc(score_map, mask))
    seed = seeds.compute()
    curves = {
        "v1": v1.compute().curve,
        "v2": v2.compute().curve,
        "localization": localization.compute().curve,
        "pixels": pixels.compute().curve,
        "parts": parts.compute().curve,
        "seeds": seed.curve,
    }
    numbers = {f"{name}.{key}": row.tolist() for name, curve in curves.items() for key, row in curve.scores.items()}
    numbers["pxap"] = [pixels.compute().average_precision]
    numbers["auc"] = auc
    numbers["mass"] = list(parts.compute().mass.values())
    return numbers


def test_numbers_stay_what_they_were():
    recorded = json.loads(GOLDEN.read_text())
    numbers = golden_numbers()
    assert numbers.keys() == recorded.keys()
    for name, values in recorded.items():
        assert numbers[name] == pytest.approx(values, abs=1e-9), name
