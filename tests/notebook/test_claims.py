"""The rules against slow plain ones and on made-up tables; the file of claims; the README's results."""

import itertools
import math
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

from wsolnb.errors import ParameterError
from wsolnb.notebook import claims, params, pipeline, reports

ROOT = Path(__file__).parents[2]
T4 = 2.7764451051977987
"""Student's t, 0.975, four degrees of freedom."""


@pytest.fixture(autouse=True)
def _root(monkeypatch):
    monkeypatch.setenv("WSOLNB_ROOT", str(ROOT))


def table(differences, methods=("old", "new"), **columns):
    """Two methods over seeds that differ by the given numbers; the first one has a score of its own for each seed."""
    rows = [
        {"method": method, "seed": seed, "score": 0.1 * seed + (difference if method == methods[1] else 0.0), **columns}
        for seed, difference in enumerate(differences)
        for method in methods
    ]
    return pd.DataFrame(rows)


PAIR = {
    "rule": "difference",
    "table": "made_up",
    "measure": "score",
    "of": {"method": "new"},
    "less": {"method": "old"},
}


def claim(command="", given=None, **test):
    return claims.Claim.model_validate(
        {"id": "one", "paper": "SCM", "where": "table 1", "claim": "New is better.", "data": "made up",
         "notebook": "12", "section": "Results", "test": PAIR | test if test is not None else None, "given": given,
         "command": command, "given_says": "it is so" if given else ""}
    )  # fmt: skip


def judge(made_up, **test):
    return claims.judge(claim(**test), lambda name: made_up)


# The rule of one row


def plain_interval(differences):
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    return mean, T4 * math.sqrt(variance / len(differences))


def plain_verdict(differences, sign, size):
    mean, half = plain_interval(differences)
    low, high = sorted((sign * (mean - half), sign * (mean + half)))
    if low > 0:
        return "reproduced" if sign * mean >= size / 2 else "partly"
    return "contradicted" if high < 0 else "undecided"


@pytest.mark.parametrize(("sign", "expect"), [(1, "higher"), (-1, "lower")])
def test_a_difference_is_judged_as_by_hand(sign, expect):
    seen = set()
    for number in range(60):
        rng = np.random.default_rng(number)
        differences = (rng.choice([-0.1, -0.03, 0.0, 0.03, 0.1]) + 0.02 * rng.standard_normal(5)).tolist()
        found = judge(table(differences), expect=expect, size=0.1)
        assert found.verdict == plain_verdict(differences, sign, 0.1)
        mean, half = plain_interval(differences)
        assert found.estimates[0][1:4] == (pytest.approx(mean), pytest.approx(half), 5)
        seen.add(found.verdict)
    assert seen == {"reproduced", "partly", "contradicted", "undecided"}


def test_fewer_than_five_seeds_decide_nothing():
    for n in (1, 2, 3, 4):
        found = judge(table([0.1 + 0.001 * seed for seed in range(n)]))
        assert found.verdict == "undecided"
        assert reports.explained(found) == f"undecided: not decided by {n} seed{'s' * (n > 1)}"
    assert reports.ours(judge(table([0.1, 0.1]))) == "+0.100 (2 seeds)"
    assert judge(table([0.1 + 0.001 * seed for seed in range(5)])).verdict == "reproduced"


def test_only_seeds_that_both_groups_have_are_pairs():
    made_up = table([0.1] * 6)
    found = judge(made_up[(made_up.method == "old") | (made_up.seed < 3)])
    assert (found.verdict, found.estimates[0].n) == ("undecided", 3)


def test_rows_of_one_seed_are_averaged():
    made_up = pd.concat([table([0.1] * 5).assign(start=0), table([0.3] * 5).assign(start=1)])
    assert judge(made_up).estimates[0].mean == pytest.approx(0.2)
    assert judge(made_up, pair_by=["seed", "start"]).estimates[0].n == 10


def test_rows_that_agree_with_all_of_without_do_not_count():
    cells = [(start, epochs) for start in (0, 1) for epochs in (2, 8)]
    made_up = pd.concat([table([0.1 * (1 + i)] * 5).assign(start=s, epochs=e) for i, (s, e) in enumerate(cells)])
    made_up.index = [0] * len(made_up)  # as after a concatenation
    found = judge(made_up, rows=["start", "epochs"], without={"start": [1], "epochs": [2]})
    assert [one.mean for one in found.estimates] == pytest.approx([0.1, 0.2, 0.4])
    with pytest.raises(ParameterError, match=r"no row has \[5\] in 'epochs'"):
        judge(made_up, without={"epochs": [5]})


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [([0.001, -0.001, 0.002, 0.0, 0.001], "reproduced"), ([0.1, 0.11, 0.09, 0.1, 0.1], "contradicted"),
     ([0.01, 0.03, -0.02, 0.0, 0.02], "undecided")],
)  # fmt: skip
def test_equality_wants_the_whole_interval_inside_of_its_room(differences, verdict):
    assert judge(table(differences), expect="same", room=0.01).verdict == verdict


def test_a_target_moves_what_the_interval_must_be_beside():
    assert judge(table([-0.005, -0.004, -0.006, -0.005, -0.005])).verdict == "contradicted"
    assert judge(table([-0.005, -0.004, -0.006, -0.005, -0.005]), target=-0.01).verdict == "reproduced"


def test_a_relative_difference():
    made_up = pd.DataFrame({"method": ["new", "old"] * 5, "seed": np.repeat(range(5), 2), "score": [3.0, 2.0] * 5})
    assert judge(made_up, relative=True).estimates[0].mean == pytest.approx(0.5)


def test_what_is_counted_needs_no_seeds():
    sizes = pd.DataFrame({"part": ["a", "b"], "parameters": [300, 100]})
    size = {"rule": "value", "measure": "parameters / 100", "where": {"part": "a"}, "pair_by": [], "of": {}, "less": {}}
    assert judge(sizes, **size, expect="same", target=3).verdict == "reproduced"
    assert judge(sizes, **size, expect="same", target=4, room=0.5).verdict == "contradicted"
    assert judge(sizes, **size, target=3).verdict == "contradicted"  # not above it
    assert reports.ours(judge(sizes, **size, target=1)) == "3.000 (one number); claimed: above +1"


def test_images_may_be_the_sample():
    gains = pd.DataFrame({"gain": [0.1], "gain_se": [0.02], "images": [300]})
    test = {"rule": "value", "measure": "gain", "error": "gain_se", "pair_by": [], "of": {}, "less": {}}
    found = judge(gains, **test)
    assert (found.verdict, reports.ours(found)) == ("reproduced", "+0.100 ± 0.039 (300 images)")
    assert judge(gains.assign(gain_se=0.06), **test).verdict == "undecided"


# Trend and best

TREND = {"rule": "trend", "over": "variant", "of": {}, "less": {}}


def plain_spearman(x, y):
    ranks = [[sum(a < b for a in v) + (sum(a == b for a in v) - 1) / 2 for b in v] for v in (x, y)]
    centred = [[r - sum(rank) / len(rank) for r in rank] for rank in ranks]
    product = sum(a * b for a, b in zip(*centred, strict=True))
    return product / math.sqrt(math.prod(sum(a * a for a in v) for v in centred))


def blocks(scores):
    """Rows of a study over blocks: scores by seed, of 1, 2, 4 and 10 blocks."""
    return pd.DataFrame(
        [{"variant": f"{n} blocks", "seed": seed, "score": score}
         for seed, own in enumerate(scores) for n, score in zip((10, 1, 2, 4), own, strict=True)]
    )  # fmt: skip


def test_a_trend_is_spearmans_correlation_of_each_seed():
    scores = np.random.default_rng(0).random((5, 4)).round(1)
    found = judge(blocks(scores), **TREND)
    plain = [plain_spearman((10, 1, 2, 4), own) for own in scores.tolist()]
    assert found.estimates[0].mean == pytest.approx(np.mean(plain))
    falling = [(0.1, 0.4, 0.3, 0.2)] * 4 + [(0.1, 0.4, 0.2, 0.3)]
    assert judge(blocks(falling), **TREND, expect="lower").verdict == "reproduced"
    assert judge(blocks(falling), **TREND).verdict == "contradicted"
    one = judge(blocks(falling[:1]), **TREND, pair_by=[], expect="lower")
    assert (one.verdict, one.estimates[0].mean) == ("reproduced", pytest.approx(-1))


def test_the_best_is_compared_with_its_strongest_rival():
    scores = np.random.default_rng(1).normal((0.5, 0.3, 0.6, 0.8), 0.02, (5, 4))
    best = {"rule": "best", "less": {}}
    found = judge(blocks(scores), **best, of={"variant": "4 blocks"}, size=0.3)
    rival = min(range(3), key=lambda other: np.mean(scores[:, 3] - scores[:, other]))
    assert found.estimates[0].mean == pytest.approx(np.mean(scores[:, 3] - scores[:, rival]))
    assert found.verdict == "reproduced"
    assert judge(blocks(scores), **best, of={"variant": "4 blocks"}, size=0.5).verdict == "partly"
    assert judge(blocks(scores), **best, of={"variant": "2 blocks"}).verdict == "contradicted"
    assert judge(blocks(scores), **best, of={"variant": "1 blocks"}, expect="lower").verdict == "reproduced"


# Rows, preconditions


def test_the_verdict_of_several_rows():
    for rows in itertools.product(("reproduced", "partly", "contradicted", "undecided"), repeat=3):
        supports, against = sum(v in ("reproduced", "partly") for v in rows), rows.count("contradicted")
        if len(set(rows)) == 1:
            expected = rows[0]
        elif supports:
            expected = "partly"
        else:
            expected = "contradicted" if against >= 1.5 else "undecided"
        assert claims.combined(rows) == expected, rows


def test_rows_are_told_apart_and_told_of():
    spread = np.array([0.001, -0.001, 0.0, 0.002, -0.002])
    made_up = pd.concat(
        [table(0.1 + spread, data="birds"), table(-0.1 + spread, data="pets"), table(0.2 + spread, data=None)]
    )
    assert [one.row for one in judge(made_up.assign(of="-"), rows=["of", "data"]).estimates] == ["birds", "pets", ""]
    found = judge(made_up, rows=["data"])
    assert [one.row for one in found.estimates] == ["birds", "pets", ""]
    assert [one.verdict for one in found.estimates] == ["reproduced", "contradicted", "reproduced"]
    assert reports.explained(found) == "partly (of 3 rows 2 reproduced, 1 contradicted)"
    assert reports.ours(found) == "-0.100 ± 0.002 (5 seeds) to +0.200 ± 0.002 (5 seeds), 3 rows"


@pytest.mark.parametrize(
    ("before", "verdict", "says"),
    [([0.1] * 5, "reproduced", "reproduced"),
     ([-0.1] * 5, "not in this regime", "not in this regime: it does not hold that it is so"),
     ([0.1] * 3, "undecided", "undecided, as it is not decided whether it is so")],
)  # fmt: skip
def test_a_precondition_is_computed_too(before, verdict, says):
    tables = {"made_up": table([0.1] * 5), "before": table(before)}
    found = claims.judge(claim(given=PAIR | {"table": "before"}), tables.__getitem__)
    assert (found.verdict, reports.explained(found)) == (verdict, says)


def test_without_a_test_it_needs_real_data():
    entry = claim().model_dump() | {"test": None}
    with pytest.raises(ValueError, match="neither a `test` nor a `command`"):
        claims.Claim.model_validate(entry)
    found = claims.judge(claims.Claim.model_validate(entry | {"command": "wsolnb reproduce --profile cub"}))
    assert (found.verdict, found.estimates, reports.ours(found)) == ("needs real data", [], "")


# Errors


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"where": {"metod": "new"}}, r"no column 'metod' \(did you mean 'method'\?\)"),
        (
            {"where": {"method": "newer"}},
            r"no row has \['newer'\] in 'method'\n  Remedy: choose among what is there: old, new",
        ),
        ({"of": {"method": "newer"}}, r"no row has \['newer'\] in 'method'"),
        ({"rows": ["backbone"]}, "no column 'backbone'"),
        ({"pair_by": ["sed"]}, r"no column 'sed' \(did you mean 'seed'\?\)"),
        ({"measure": "scor"}, "the measure 'scor' fails"),
        ({"measure": "score +"}, "the measure .* fails"),
    ],
)
def test_an_error_names_the_claim_and_the_remedy(changes, problem):
    with pytest.raises(ParameterError, match=f"claim one: {problem}"):
        judge(table([0.1] * 5), **changes)


def test_an_unknown_table_is_an_error():
    with pytest.raises(ParameterError, match=r"claim one: there is no table '12_studie'.*did you mean '12_studies'"):
        claims.judge(claim(table="12_studie"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c[0].update(verdict="reproduced"), "verdict"),
        (lambda c: c.append(c[0]), "claims are there twice: scm-gt-known"),
        (lambda c: c[0]["test"].update(rule="guess"), "rule"),
        (lambda c: c[0]["test"].pop("less"), "needs less"),
        (lambda c: c[0].update(given_says="so"), "go together"),
        (lambda c: c[0].pop("where"), "where"),
    ],
)
def test_a_file_that_is_not_in_order_is_refused(tmp_path, change, problem):
    content = yaml.safe_load((ROOT / "outputs/reference/claims.yaml").read_text())
    content = yaml.safe_load(yaml.safe_dump(content, default_flow_style=None, sort_keys=False))
    content["claims"] = [dict(c) for c in content["claims"]]
    content["claims"][0]["test"] = dict(content["claims"][0]["test"])
    change(content["claims"])
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ParameterError, match=problem):
        claims.load(str(tmp_path / "claims.yaml"))


# The claims of this repository


@pytest.fixture(scope="module")
def judged():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WSOLNB_ROOT", str(ROOT))
        return claims.judge_all(claims.load())


def test_every_claim_has_a_verdict(judged):
    verdicts = [one.verdict for one in judged]
    assert len(verdicts) >= 40
    assert set(verdicts) <= set(claims.VERDICTS)
    assert 3 * verdicts.count("needs real data") <= len(verdicts)
    assert {one.claim.paper for one in judged} == {"SCM", "LPCAM", "LocLoc"}
    for one in judged:
        cells = nbformat.read(ROOT / f"notebooks/{one.claim.notebook}.ipynb", 4).cells
        lines = [line for cell in cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
        assert sum(bool(re.match("#+ ", x)) and x.lstrip("# ") == one.claim.section for x in lines) == 1, one.claim.id
        if one.verdict in ("reproduced", "contradicted"):
            rows = [e for e in one.estimates if e.verdict == one.verdict]
            assert all(e.n >= 5 or e.unit == "one number" for e in rows), one.claim.id


def test_every_command_can_be_given(judged):
    for one in judged:
        for profile in re.findall(r"--profile (\S+)", one.claim.command):
            steps = {step.notebook for step in pipeline.plan(profile)}
            only = set(re.findall(r"--only (\S+)", one.claim.command))
            names = {name for step in only or steps for name in params.notebook_parameters(step)}
            assert only <= steps, one.claim.id
            if "--outputs" not in one.claim.command:
                assert set(re.findall(r"-p (\w+)=", one.claim.command)) <= names, one.claim.id


def test_the_counted_sizes_are_those_of_the_networks():
    import torch

    from wsolnb.methods.locloc import GrabCutEnhancedGenerator
    from wsolnb.methods.ppd import ProxyProbingDecoder

    counted = claims.read("33_counts").set_index(["part", "classes"]).parameters
    with torch.device("meta"):
        networks = {"LocLoc generator": GrabCutEnhancedGenerator(384, 200), "PPD generator": ProxyProbingDecoder(384)}
    for part, network in networks.items():
        assert counted[part, 200] == sum(p.numel() for p in network.parameters())
    for method in ("LocLoc", "PPD"):
        parts = counted["backbone", 200] + counted[f"{method} classifier", 200] + counted[f"{method} generator", 200]
        assert counted[method, 200] == parts


# Leaderboards, README


def test_a_board_has_means_and_intervals_over_seeds():
    made_up = table([0.1, 0.2, 0.3])
    row = {
        "method": "",
        "network": "n",
        "start": "s",
        "training": "t",
        "table": "made_up",
        "where": {"seed": [0, 1, 2]},
    }
    both = [row | {"method": name, "where": row["where"] | {"method": name}} for name in ("old", "new")]
    board = {"name": "b", "title": "B", "note": "", "sort": "score", "measures": {"score": "Score", "other": "Other"}}
    board |= {
        "rows": both,
        "reported": [{"method": "m", "network": "n", "data": "CUB", "protocol": "a e", "score": 0.9}],
    }
    made = reports.Board.model_validate(board)
    ours = made.ours(lambda name: made_up)
    assert ours.method.tolist() == ["new", "old"]
    assert ours.score.tolist() == [pytest.approx(0.3), pytest.approx(0.1)]
    assert ours["score ±"][0] == pytest.approx(4.302652729911275 * 0.2 / math.sqrt(3))
    shown = made.shown(lambda name: made_up)
    assert shown.Score.tolist() == ["0.300 ± 0.497", "0.100 ± 0.248", "0.900"]
    assert shown.Other.tolist() == ["", "", ""]
    assert "0.300 $\\pm$ 0.497" in reports.latex(shown, "100 %")
    assert reports.markdown(shown).splitlines()[2].startswith("| new | n | s | t | 3 | 0.300 ± 0.497 |")
    with pytest.raises(ParameterError, match=r"leaderboard b, .*no row has"):
        reports.Board.model_validate(board | {"rows": [row | {"where": {"seed": 9}}]}).ours(lambda name: made_up)
    with pytest.raises(ParameterError, match=r"leaderboard b, : 2 rows of the seed 0(?s:.*)they differ in method"):
        reports.Board.model_validate(board | {"rows": [row]}).ours(lambda name: made_up)


def test_every_letter_of_a_reported_row_is_explained():
    boards, protocols = reports.boards()
    used = {letter for board in boards for row in board.reported for letter in row["protocol"].split()}
    assert used <= set(protocols)
    for board in boards:
        names = {name for row in board.reported for name in row} - {"method", "network", "data", "protocol"}
        assert names <= set(board.measures)
        assert not board.ours().empty


def test_the_readme_says_what_the_script_writes():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert reports.with_results(readme, reports.results()) == readme, "run `python tools/update_readme.py`"
    with pytest.raises(ParameterError, match="no marks"):
        reports.with_results("# Title", "results")
