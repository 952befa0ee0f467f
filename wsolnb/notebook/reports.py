"""What claims and recorded tables say, as tables of text: the claim map, the leaderboards, the README's results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict

from wsolnb.errors import ParameterError
from wsolnb.files import read_yaml, resolve
from wsolnb.notebook.claims import VERDICTS, Estimate, Filter, Judged, judge_all, load, read, select
from wsolnb.notebook.studies import interval

MARKS = ("<!-- results: written by tools/update_readme.py -->", "<!-- end of results -->")
"""What the README's results stand between."""


# Claims


def estimate_text(one: Estimate, signed: bool = True) -> str:
    """Return an estimate as text: `+0.013 ± 0.006 (5 seeds)`; without an interval where there are fewer than three."""
    number = f"{one.mean:+.3f}" if signed else f"{one.mean:.3f}"
    if not one.n:
        return f"{number} ({one.unit})"
    return f"{number} ± {one.half:.3f} ({one.n} {one.unit})" if one.n > 2 else f"{number} ({one.n} {one.unit})"


def ours(found: Judged) -> str:
    """Return what is measured here as text: the estimate, or the lowest and the highest of several rows."""
    if not found.estimates:
        return ""
    signed = found.claim.test.rule != "value" or not found.claim.test.target
    ordered = sorted(found.estimates, key=lambda one: one.mean)
    texts = [estimate_text(one, signed) for one in ordered]
    text = texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}, {len(texts)} rows"
    test = found.claim.test
    side = {"higher": "above", "lower": "below"}.get(test.expect) if test.target else None
    return f"{text}; claimed: {side} {test.target:+g}" if side else text


def explained(found: Judged) -> str:
    """Return the verdict in words: why nothing is decided, and what the rows say where they disagree."""
    rows, verdict = [one.verdict for one in found.estimates], found.verdict
    counted = ", ".join(f"{rows.count(name)} {name}" for name in VERDICTS if name in rows)
    rows_say = f" (of {len(rows)} rows {counted})" if len(set(rows)) > 1 else ""
    if verdict == "undecided" and "undecided" not in rows:
        return f"undecided, as it is not decided whether {found.claim.given_says}"
    if verdict == "undecided":
        few = min(one.n for one in found.estimates if one.verdict == "undecided")
        return f"undecided: not decided by {few} seed{'s' * (few != 1)}{rows_say}"
    if verdict == "not in this regime":
        return f"not in this regime: it does not hold that {found.claim.given_says}"
    return "partly: less than half of the paper's effect" if set(rows) == {"partly"} else verdict + rows_say


def claims_table(found: Iterable[Judged]) -> pd.DataFrame:
    """Return one line per claim: what it says, where, the paper's number, ours, the verdict, and what shows it."""
    return pd.DataFrame(
        {"id": one.claim.id, "paper": one.claim.paper, "where": one.claim.where, "claim": one.claim.claim,
         "paper's number": one.claim.paper_says, "ours": ours(one), "verdict": explained(one),
         "measured on": one.claim.data, "notebook": one.claim.notebook, "section": one.claim.section,
         "with the paper's data": one.claim.command}
        for one in found
    )  # fmt: skip


def verdict_counts(found: Iterable[Judged]) -> pd.DataFrame:
    """Return how many claims of each paper have each verdict."""
    pairs = pd.DataFrame([(one.claim.paper, one.verdict) for one in found], columns=["paper", "verdict"])
    counted = pd.crosstab(pairs.paper, pairs.verdict).reindex(columns=list(VERDICTS), fill_value=0)
    return counted.reindex(["SCM", "LPCAM", "LocLoc"]).rename_axis(None, axis=1)


# Leaderboards


class Row(BaseModel):
    """Recorded rows that make one line of a board."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    method: str
    network: str
    start: str
    training: str
    table: str
    where: Filter


class Board(BaseModel):
    """A leaderboard. measures: columns and what they are called. sort: by which, the best first; empty: as listed.

    reported: what papers report: method, network, data, letters of protocols, and measures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    title: str
    note: str
    sort: str
    measures: dict[str, str]
    rows: list[Row]
    reported: list[dict[str, Any]]

    def ours(self, table_of: Callable[[str], pd.DataFrame] = read) -> pd.DataFrame:
        """Return the lines: by measure the mean over seeds, and `<measure> ±`, the half width of its 95 % interval.

        Raises ParameterError where a line has no row, or two of one seed.
        """
        table = pd.DataFrame([self._line(row, table_of) for row in self.rows])
        return table.sort_values(self.sort, ascending=False, kind="stable", ignore_index=True) if self.sort else table

    def _line(self, row: Row, table_of: Callable[[str], pd.DataFrame]) -> dict[str, Any]:
        try:
            data = select(table_of(row.table), row.where)
        except ParameterError as error:
            raise ParameterError(f"leaderboard {self.name}, {row.method}: {error.problem}", error.remedy) from None
        self._check_one_condition(row, data)
        line = row.model_dump(include={"method", "network", "start", "training"}) | {"seeds": len(data)}
        for measure in self.measures:
            values = data.get(measure, [])
            line[measure], line[f"{measure} ±"] = interval(values)
        return line

    def _check_one_condition(self, row: Row, group: pd.DataFrame) -> None:
        """Raise ParameterError where two rows of one seed would be averaged as if they were two seeds."""
        if "seed" in group and (twice := group[group.seed.duplicated(keep=False)]).size:
            one = twice[twice.seed == twice.seed.iloc[0]]
            apart = [name for name in one if name not in self.measures and one[name].nunique(dropna=False) > 1]
            problem = f"leaderboard {self.name}, {row.method}: {len(one)} rows of the seed {one.seed.iloc[0]}"
            raise ParameterError(
                problem, f"choose one with `where`; they differ in {', '.join(apart) or 'scores only'}"
            )

    def shown(self, table_of: Callable[[str], pd.DataFrame] = read) -> pd.DataFrame:
        """Return the lines as text, with an interval where there are three seeds or more; reported ones below."""
        lines = []
        for line in self.ours(table_of).to_dict("records"):
            scores = {name: _number(line[m], line[f"{m} ±"], line["seeds"]) for m, name in self.measures.items()}
            names = ("method", "network", "start", "training", "seeds")
            lines.append({name: str(line[name]) for name in names} | scores | {"protocol": "ours"})
        for row in self.reported:
            head = {"method": row["method"], "network": row["network"], "start": "ImageNet", "training": row["data"]}
            scores = {name: _number(row.get(m, float("nan"))) for m, name in self.measures.items()}
            lines.append(head | {"seeds": ""} | scores | {"protocol": f"reported: {row['protocol']}"})
        return pd.DataFrame(lines)


def _number(mean: float, half: float = float("nan"), seeds: int = 1) -> str:
    if pd.isna(mean):
        return ""
    return f"{mean:.3f} ± {half:.3f}" if seeds > 2 and pd.notna(half) else f"{mean:.3f}"


def boards(path: str = "outputs/reference/leaderboard.yaml") -> tuple[list[Board], dict[str, str]]:
    """Return the boards of a file, and what its letters mean. Raises ParameterError where it is not in order."""
    try:
        content = read_yaml(resolve(path))
        return [Board.model_validate(board) for board in content["boards"]], content["protocols"]
    except (OSError, LookupError, ValueError, TypeError) as error:
        raise ParameterError(f"{path} is not in order: {error}", "mend the entry that is named") from error


def markdown(table: pd.DataFrame) -> str:
    """Return a table of text in Markdown."""
    lines = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def latex(table: pd.DataFrame, caption: str) -> str:
    """Return a table of text in LaTeX (`booktabs`)."""
    text = table.to_latex(index=False, escape=True, caption=caption.replace("%", r"\%"))
    return text.replace(" ± ", r" $\pm$ ")


# README


def _mostly_against(found: Iterable[Judged]) -> int:
    """Count the claims that hold partly although more rows contradict them than support them."""
    rows = ([row.verdict for row in one.estimates] for one in found if one.verdict == "partly")
    return sum(one.count("contradicted") > one.count("reproduced") + one.count("partly") for one in rows)


def results(table_of: Callable[[str], pd.DataFrame] = read) -> str:
    """Return the README's results section, without its marks: verdicts counted, some claims, the first leaderboard."""
    found = judge_all(load(), table_of)
    table = claims_table([one for one in found if one.claim.headline])
    table["claim"] = table.claim + " (" + table["where"] + ")"
    implied = sum("implied" in one.claim.where for one in found)
    board = boards()[0][0].shown(table_of).query("protocol == 'ours' and `top-1 loc` != '' and start != 'random'")
    paragraphs = [
        f"This repository lists {len(found)} claims of the three papers, {implied} of them implied, not stated. It\n"
        "computes each verdict from recorded tables. To decide a claim about trainings takes five seeds, and a 95 %\n"
        "interval that lies wholly on one side of zero, or of the number that the claim names; `±` is half of its\n"
        "width. Where nothing is trained the interval is over images, or there is one number.\n"
        "[91_claims](notebooks/91_claims.ipynb) shows all claims and the rule.",
        markdown(verdict_counts(found).reset_index().rename(columns={"paper": "claims of"})),
        "Some claims are measured on several starts and images, each in a row. *Partly* says that at least one row\n"
        f"supports the claim. In {_mostly_against(found)} of the claims that hold partly more rows contradict it.",
        "Here are some of the claims. `ours` is measured on rendered birds, on pets and on Tiny-ImageNet. Where\n"
        "a claim has several rows, `ours` has the lowest and the highest:",
        markdown(table[["paper", "claim", "paper's number", "ours", "verdict"]]),
        "The next table has the methods that localize and classify from a pretrained start, on the same rendered test\n"
        "images. Compare rows that agree in network, start and training. Each start is one pretrained file: from a\n"
        "second file of `vit_mini_dino` no lead of SCM's boxes is shown\n"
        "([12_scm_results](notebooks/12_scm_results.ipynb)).\n"
        "[90_leaderboard](notebooks/90_leaderboard.ipynb) has the methods from random weights (HaS, CutMix, ADL, ACoL\n"
        "and Grad-CAM among them), the other boards, and the papers' numbers with their protocols.",
        markdown(board.drop(columns=["mask IoU", "protocol"])),
    ]
    return "\n\n".join(text.strip() for text in paragraphs) + "\n"


def with_results(readme: str, section: str) -> str:
    """Return the text of a README with this section between its marks. Raises ParameterError where it has no marks."""
    before, opening, rest = readme.partition(MARKS[0])
    _, closing, after = rest.partition(MARKS[1])
    if not (opening and closing):
        raise ParameterError("the README has no marks for its results", f"write {MARKS[0]} and {MARKS[1]} into it")
    return f"{before}{opening}\n\n{section}\n{closing}{after}"
