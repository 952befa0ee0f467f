"""Studies over seeds: paired intervals, and tables that are recorded because they take hours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from wsolnb.notebook.runs import Run


def interval(differences: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % interval (Student's t) of paired differences, (n,).

    NaNs are left out. The half width of fewer than two differences is NaN.
    """
    d = np.asarray(differences, float)
    d = d[np.isfinite(d)]
    if len(d) < 2:
        return float(d.mean()) if len(d) else float("nan"), float("nan")
    return float(d.mean()), float(stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d)))


def plus_minus(differences: Sequence[float] | np.ndarray) -> str:
    """Return `interval` as text, such as `+0.021 ± 0.008`; empty where there is no difference."""
    mean, half = interval(differences)
    return f"{mean:+.3f} ± {half:.3f}" if np.isfinite(mean) else ""


def compare(
    table: pd.DataFrame, by: Sequence[str], measures: Sequence[str], methods: Mapping[str, str], level: str = "gt_known"
) -> pd.DataFrame:
    """Return the paired comparison of two methods, a row for each group of a study's rows.

    table: with the columns `method`, `seed`, `by` and the measures. by: what a group agrees in. methods: the two values
    of `method`, in the order of subtraction (second less first), and what the table calls them.
    A row has the number of pairs, the mean of `level` of each method, and `d <measure>`: `plus_minus` over the seeds.
    """
    first, second = methods
    rows = []
    for key, group in table.groupby(list(by), sort=False):
        wide = group.pivot(index="seed", columns="method")
        row = dict(zip(by, key, strict=True)) | {"pairs": len(wide)}
        row |= {title: wide[level, method].mean() for method, title in methods.items()}
        rows.append(row | {f"d {name}": plus_minus(wide[name, second] - wide[name, first]) for name in measures})
    return pd.DataFrame(rows).round(3)


def against(table: pd.DataFrame, by: str, reference: str, measures: Sequence[str]) -> pd.DataFrame:
    """Return the difference of each variant to a reference variant, paired by seed: `plus_minus` for each measure.

    table: with the columns `seed`, `by` and the measures; one row per seed and variant. A row of the result is a
    variant, in the order of the table; its column `pairs` counts the seeds that both have. Nothing where the reference
    was not recorded.
    """
    wide = table.pivot(index="seed", columns=by, values=list(measures))
    rows = {}
    for variant in table[by].unique() if reference in set(table[by]) else ():
        if variant != reference:
            d = pd.DataFrame({name: wide[name, variant] - wide[name, reference] for name in measures}).dropna(how="all")
            rows[variant] = {"pairs": len(d)} | {f"d {name}": plus_minus(d[name]) for name in measures}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(by)


def mean_and_interval(table: pd.DataFrame, by: str | Sequence[str], measures: Sequence[str]) -> pd.DataFrame:
    """Return means of columns by group with half of their 95 % interval as text, `0.812 ± 0.010`.

    A group of one row has its number alone.
    """

    def text(values: pd.Series) -> str:
        known = [str(round(value, 3)) for value in interval(values) if np.isfinite(value)]
        return " ± ".join(known)

    return table.groupby(by, sort=False)[[name for name in measures if name in table]].agg(text)


def with_recorded(
    run: Run, name: str, made: Iterable[dict[str, Any]], by: str | Sequence[str], columns: Sequence[str] = ()
) -> pd.DataFrame:
    """Return and save the recorded table of a study; rows that were made here replace recorded ones.

    name: of the table in `outputs/reference`; without the notebook's number it is the name in the run folder.
    by: the columns that tell which rows were made anew. columns: of the table where nothing is recorded.
    """
    by = [by] if isinstance(by, str) else list(by)
    new, table = pd.DataFrame(list(made)), run.recorded(name, [*by, *columns])
    if len(new):
        stays = ~table.set_index(by).index.isin(new.set_index(by).index)
        table = pd.concat([table[stays], new], ignore_index=True) if len(table) else new
    run.save_table(table, name.partition("_")[2])
    return table
