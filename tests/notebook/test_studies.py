import math

import pandas as pd
import pytest

from wsolnb.notebook import runs, studies


def rows(backbone, scores):
    return [
        {"backbone": backbone, "seed": seed, "method": method, "gt_known": score, "top1": 1 - score}
        for seed, pair in enumerate(scores)
        for method, score in zip(("old", "new"), pair, strict=True)
    ]


def test_pairs_are_compared_within_seeds():
    table = pd.DataFrame(rows("a", [(0.1, 0.2), (0.5, 0.7), (0.3, 0.6)]) + rows("b", [(0.4, 0.3)]))
    found = studies.compare(table, ["backbone"], ["gt_known", "top1"], {"old": "Old", "new": "New"})
    assert found.to_dict("list") == {
        "backbone": ["a", "b"],
        "pairs": [3, 1],
        "Old": [0.3, 0.4],
        "New": [0.5, 0.3],
        "d gt_known": ["+0.200 ± 0.248", "-0.100 ± nan"],  # t(0.975, 2) = 4.303, times 0.1 / sqrt(3)
        "d top1": ["-0.200 ± 0.248", "+0.100 ± nan"],
    }
    assert 4.3027 * 0.1 / math.sqrt(3) == pytest.approx(0.248, abs=5e-4)
    assert studies.compare(table[:0], ["backbone"], ["top1"], {"old": "Old", "new": "New"}).empty


def test_variants_are_compared_with_a_reference_of_the_same_seeds():
    scores = {"old": (0.1, 0.5, 0.3), "new": (0.2, 0.7, 0.6)}
    table = pd.DataFrame(
        [{"variant": v, "seed": n, "gt_known": x} for v, values in scores.items() for n, x in enumerate(values)]
        + [{"variant": "fewer", "seed": 1, "gt_known": 0.25}, {"variant": "none", "seed": 1, "gt_known": math.nan}]
    )
    found = studies.against(table, "variant", "old", ["gt_known"])
    assert found.to_dict("index") == {
        "new": {"pairs": 3, "d gt_known": "+0.200 ± 0.248"},
        "fewer": {"pairs": 1, "d gt_known": "-0.250 ± nan"},
        "none": {"pairs": 0, "d gt_known": ""},
    }
    assert studies.against(table, "variant", "not recorded", ["gt_known"]).empty


def test_means_stand_with_their_intervals():
    table = pd.DataFrame({"variant": ["a"] * 3 + ["b", "c"], "score": [0.2, 0.1, 0.3, 0.45, math.nan]})
    found = studies.mean_and_interval(table, "variant", ["score", "unknown"]).score
    assert found.to_dict() == {"a": "0.2 ± 0.248", "b": "0.45", "c": ""}


def test_new_rows_take_the_place_of_recorded_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("WSOLNB_ROOT", str(tmp_path))
    folder = tmp_path / "outputs" / "reference"
    folder.mkdir(parents=True)
    old = pd.DataFrame({"variant": ["a", "a", "b"], "seed": [0, 1, 0], "top1": [0.1, 0.2, 0.3]})
    old.to_csv(folder / "32_studies.csv", index=False)
    run = runs.start("x", {"seed": 0})
    made = [{"variant": "a", "seed": 1, "top1": 0.9}, {"variant": "a", "seed": 2, "top1": 0.8}]

    def found(by, rows=made):
        table = studies.with_recorded(run, "32_studies", rows, by, ["top1"])
        return list(table.itertuples(index=False, name=None))

    assert found(["variant", "seed"]) == [("a", 0, 0.1), ("b", 0, 0.3), ("a", 1, 0.9), ("a", 2, 0.8)]
    assert found("variant") == [("b", 0, 0.3), ("a", 1, 0.9), ("a", 2, 0.8)]
    assert found("variant", []) == list(old.itertuples(index=False, name=None))
    (folder / "32_studies.csv").unlink()
    assert found(["variant", "seed"]) == [("a", 1, 0.9), ("a", 2, 0.8)]
    assert list(studies.with_recorded(run, "32_studies", [], ["variant", "seed"], ["top1"])) == [
        "variant",
        "seed",
        "top1",
    ]
