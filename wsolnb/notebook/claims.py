"""Claims of the papers as data: where a claim stands, which recorded table measures it, and a verdict that is computed.

    found = claims.judge_all(claims.load())
    reports.claims_table(found)

`outputs/reference/claims.yaml` holds the claims. No verdict is written there: it follows from the recorded tables.
A row of a claim is one combination of the columns `rows` (a backbone, a condition). Its estimate is a mean over seeds
with a 95 % interval, and is judged by `row_verdict`. `combined` makes one verdict of all rows.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import pandas as pd
from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from scipy import stats

from wsolnb.errors import ParameterError, nearest
from wsolnb.files import read_yaml, resolve
from wsolnb.notebook.studies import interval

VERDICTS = {"reproduced": "R", "partly": "P", "contradicted": "C", "undecided": "U", "not in this regime": "N",
            "needs real data": "D"}  # fmt: skip
"""Every verdict, and the letter that pictures show."""
SEEDS_WANTED = 5
"""Number of pairs that a decision needs; with fewer pairs the verdict is `undecided`."""
Values = Annotated[list[Any], BeforeValidator(lambda value: value if isinstance(value, list) else [value])]
Filter = dict[str, Values]
"""A filter of a table's rows: the values, one or several, that a column may have."""


class Test(BaseModel):
    """How a recorded table measures a claim.

    rule: `difference` of two groups; `value` of the rows; `trend`, Spearman's correlation with the number in `over`;
    `best`, the lead of one variant over the strongest of the others.
    where: the rows that count. without: rows that agree with all of its values do not count.
    measure: a column, or an expression of columns (`measured`). rows: columns; each combination is a row.
    pair_by: the columns that pair two numbers; empty for a count, which has no spread.
    of, less: the two groups of a difference; for `best`, `of` is the variant that is said to be best. relative: take
    `of / less - 1` instead.
    expect: the claimed side of `target`; `same`: within `room` of it. size: the paper's distance from `target`.
    error: column of the standard error over `images`, where these are the sample.
    """

    __test__ = False  # pytest: no test of its own
    model_config = ConfigDict(frozen=True, extra="forbid")
    rule: Literal["difference", "value", "trend", "best"]
    table: str
    measure: str
    where: Filter = {}
    without: Filter = {}
    rows: list[str] = []
    pair_by: list[str] = ["seed"]
    of: Filter = {}
    less: Filter = {}
    relative: bool = False
    over: str = ""
    expect: Literal["higher", "lower", "same"] = "higher"
    target: float = 0.0
    size: float | None = None
    room: float = 0.0
    error: str = ""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        wanted = {"difference": ("of", "less"), "value": (), "trend": ("over",), "best": ("of",)}[self.rule]
        if lacking := [name for name in wanted if not getattr(self, name)]:
            raise ValueError(f"the rule `{self.rule}` needs {' and '.join(lacking)}")
        return self


class Claim(BaseModel):
    """A testable claim of a paper, in our words. Without a `test` it needs the data that `command` asks for.

    notebook, section: what shows it; the section by its heading. given: a precondition; if it does not hold, the claim
    is not in this regime. given_says: the precondition in words. headline: whether the README shows the claim.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str
    paper: Literal["SCM", "LPCAM", "LocLoc"]
    where: str
    claim: str
    paper_says: str = ""
    data: str
    notebook: str
    section: str
    test: Test | None = None
    given: Test | None = None
    given_says: str = ""
    command: str = ""
    headline: bool = False

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not (self.test or self.command):
            raise ValueError("it has neither a `test` nor a `command` that would test it")
        if bool(self.given) != bool(self.given_says):
            raise ValueError("`given` and `given_says` go together")
        return self


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    templates: dict[str, Any] = {}
    claims: list[Claim]


class Estimate(NamedTuple):
    """One row of a claim. The interval is `mean` ± `half`; `n` counts `unit`: 0 for one number without a spread."""

    row: str
    mean: float
    half: float
    n: int
    unit: str
    verdict: str


class Judged(NamedTuple):
    """A claim, its verdict, and the estimates that it rests on."""

    claim: Claim
    verdict: str
    estimates: list[Estimate]


def load(path: str = "outputs/reference/claims.yaml") -> list[Claim]:
    """Read and check a file of claims. Raises ParameterError for what is missing, unknown, or there twice."""
    try:
        found = _File.model_validate(read_yaml(resolve(path))).claims
    except (OSError, ValueError) as error:
        raise ParameterError(f"{path} is not in order: {error}", "mend the entry that is named") from error
    names = [claim.id for claim in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ParameterError(f"claims are there twice: {', '.join(twice)}", "give each claim an id of its own")
    return found


def read(name: str) -> pd.DataFrame:
    """Return a recorded table; of a JSON file one row, with columns such as `locloc_inference/device`."""
    path = resolve(f"outputs/reference/{name}.csv")
    if path.is_file():
        return pd.read_csv(path)
    if (path := path.with_suffix(".json")).is_file():
        return pd.json_normalize(json.loads(path.read_text(encoding="utf-8")), sep="/")
    hint = nearest(name, (other.stem for other in path.parent.glob("*.csv")))
    raise ParameterError(f"there is no table {name!r} in outputs/reference{hint}", "name one that is, or record it")


def select(table: pd.DataFrame, by: Filter) -> pd.DataFrame:
    """Return the rows with one of the given values in each column. Raises ParameterError where there is none."""
    for column, values in by.items():
        if column not in table:
            raise ParameterError(f"no column {column!r}{nearest(column, table)}", "name a column of the table")
        if (chosen := table[table[column].isin(values)]).empty:
            there = ", ".join(map(str, table[column].unique()[:12]))
            raise ParameterError(f"no row has {values} in {column!r}", f"choose among what is there: {there}")
        table = chosen
    return table


_ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.USub: operator.neg,
}  # fmt: skip


def measured(expression: str, data: pd.DataFrame) -> Any:
    """Return a column of a table, or what an expression of columns, numbers and texts says: + - * / ** == !=.

    A column whose name is no word stands in backticks. Nothing else of Python is known, because pandas' own `eval` lets
    an expression call functions of the whole program. Raises SyntaxError or ValueError for anything else.
    """
    if expression in data:
        return data[expression]
    quoted = re.findall("`([^`]+)`", expression)
    places = iter(range(len(quoted)))
    tree = ast.parse(re.sub("`[^`]+`", lambda _: f"_column_{next(places)}", expression), mode="eval")

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=float() | int() as number):
                return float(number)  # a power of whole numbers could grow without end
            case ast.Constant(value=str() as text):
                return text
            case ast.Name(id=name):
                name = quoted[int(name.removeprefix("_column_"))] if name.startswith("_column_") else name
                if name not in data:
                    raise ValueError(f"there is no column {name!r}{nearest(name, data)}")
                return data[name]
            case ast.UnaryOp(op=sign, operand=one) if type(sign) in _ARITHMETIC:
                return _ARITHMETIC[type(sign)](value(one))
            case ast.BinOp(left=one, op=sign, right=other) | ast.Compare(left=one, ops=[sign], comparators=[other]):
                if type(sign) in _ARITHMETIC:
                    return _ARITHMETIC[type(sign)](value(one), value(other))
        raise ValueError(f"`{ast.unparse(node)}` is no arithmetic of columns")

    return value(tree.body)


def _together(_: Any) -> str:
    return ""


def _scores(test: Test, group: pd.DataFrame, by: Filter) -> pd.Series:
    return select(group, by).groupby(test.pair_by or _together)["_"].mean()


def _difference(test: Test, group: pd.DataFrame) -> pd.Series:
    of, less = _scores(test, group, test.of), _scores(test, group, test.less)
    return of / less - 1 if test.relative else of - less


def _best(test: Test, group: pd.DataFrame) -> pd.Series:
    (column, claimed), sign = next(iter(test.of.items())), -1 if test.expect == "lower" else 1
    others = [value for value in group[column].unique() if value not in claimed]
    leads = (_difference(test.model_copy(update={"less": {column: [value]}}), group) for value in others)
    return min(leads, key=lambda lead: sign * lead.mean())


def _trend(test: Test, group: pd.DataFrame) -> pd.Series:
    number = group[test.over].astype(str).str.extract(r"(-?[\d.]+)", expand=False).astype(float)
    by_pair = group.assign(number=number).groupby(test.pair_by or _together)
    return pd.Series({key: stats.spearmanr(one.number, one["_"]).statistic for key, one in by_pair})


RULES = {
    "difference": _difference,
    "value": lambda test, group: _scores(test, group, {}),
    "best": _best,
    "trend": _trend,
}
"""By rule: the numbers of one row of a claim, one per pair."""


def row_verdict(test: Test, mean: float, half: float, enough: bool) -> str:
    """Judge one row by its interval (on the claimed side of the target?) and its mean (half of the paper's size?)."""
    if not enough or not np.isfinite(half):
        return "undecided"
    if test.expect == "same":
        distance = abs(mean - test.target)
        inside, outside = distance + half <= test.room, distance - half > test.room
        return "reproduced" if inside else "contradicted" if outside else "undecided"
    gain = (mean - test.target) * (1 if test.expect == "higher" else -1)
    if gain - half > 0:
        return "reproduced" if gain >= (test.size or 0) / 2 else "partly"
    return "contradicted" if gain + half < 0 or half == 0 else "undecided"


def combined(verdicts: Sequence[str]) -> str:
    """Return one verdict of all rows: the rows' own if they agree, and `partly` if some support the claim.

    Otherwise `contradicted` if at least half of the rows are, else `undecided`.
    """
    if len(set(verdicts)) == 1:
        return verdicts[0]
    if {"reproduced", "partly"} & set(verdicts):
        return "partly"
    return "contradicted" if 2 * verdicts.count("contradicted") >= len(verdicts) else "undecided"


def estimate(test: Test, table: pd.DataFrame) -> list[Estimate]:
    """Return the estimate of each row of a claim. Raises ParameterError for what the table does not hold."""
    data = select(table, test.where)
    if test.without:
        data = data.reset_index(drop=True)
        data = data.drop(select(data, test.without).index)
    columns = [*test.rows, *test.pair_by, *(name for name in (test.over, test.error) if name), *test.of, *test.less]
    if missing := [name for name in columns if name not in data]:
        raise ParameterError(f"no column {missing[0]!r}{nearest(missing[0], data)}", "name a column of the table")
    try:
        data = data.assign(_=measured(test.measure, data)).astype({"_": float})
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise ParameterError(f"the measure {test.measure!r} fails: {error}", "write an expression of columns") from None
    found = []
    for key, group in data.groupby(test.rows or _together, sort=False, dropna=False):
        values = RULES[test.rule](test, group).dropna()
        mean, half, n, unit = *interval(values), len(values), "seed" if len(values) == 1 else "seeds"
        if test.error:
            half, n, unit = 1.96 * float(group[test.error].mean()), int(group.images.sum()), "images"
        elif not test.pair_by:
            half, n, unit = 0.0, 0, "one number"
        verdict = row_verdict(test, mean, half, unit in ("images", "one number") or n >= SEEDS_WANTED)
        name = ", ".join(str(v) for v in key if pd.notna(v) and v != "-")
        found.append(Estimate(name, mean, half, n, unit, verdict))
    return found


def judge(claim: Claim, table_of: Callable[[str], pd.DataFrame] = read) -> Judged:
    """Compute the verdict of a claim. Raises ParameterError, which names the claim and the remedy."""
    if claim.test is None:
        return Judged(claim, "needs real data", [])
    try:
        found = estimate(claim.test, table_of(claim.test.table))
        given = estimate(claim.given, table_of(claim.given.table)) if claim.given else []
    except ParameterError as error:
        raise ParameterError(f"claim {claim.id}: {error.problem}", error.remedy) from None
    verdict = combined([one.verdict for one in found])
    holds = combined([one.verdict for one in given]) if given else "reproduced"
    return Judged(claim, {"contradicted": "not in this regime", "undecided": "undecided"}.get(holds, verdict), found)


def judge_all(all_claims: Iterable[Claim], table_of: Callable[[str], pd.DataFrame] = read) -> list[Judged]:
    """Compute the verdict of every claim."""
    return [judge(claim, table_of) for claim in all_claims]
