"""Numbers in prose: each must be measured where the reader can see it, or have a source."""

import csv
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "outputs" / "reference"
# What states no result: code, formulas, links, numbers of equations, figures and years, and what a run takes
# (minutes, memory, pixels), which no stored output holds.
NOT_PROSE = re.compile(
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\[\d\d(?: \w+)?\]\([^)]*\)|\]\([^)]*\)|https?://\S+"
    r"|\b(?:eqs?|figs?|figures?|tables?|sec|sections?|notebooks?|exercises?|listing)\.? *"
    r"[\dSB][\w.]*(?:(?:, *(?:and +)?| +(?:and|or|to) +)\d[\w.]*)*"
    r"|95 % (?:confidence )?intervals?|Solutions: \d\d"
    r"|\b(?:CVPR|ECCV|ICCV|ACM MM|TIP|NeurIPS) \d+|\b(?:19|20)\d\d\b"
    r"|\b[\d.,]+(?:(?: to | x )[\d.,]+)? *(?:minutes?|seconds?|hours?|s|ms|GB|GiB|MB|px|pixels?|cells|bytes)\b",
    re.S | re.I,
)
NUMBER = re.compile(
    r"(?<![\w.,/^_-])[+-]?(?P<digits>\d{1,3}(?:,\d{3})+|\d*\.?\d+)(?![\w/]|\.\d|,\d{3})(?P<percent> ?%)?"
)
FIGURE = re.compile(r"<Figure size \d+x\d+ with \d+ Axes>")  # how an output names a picture: no result
IN_OUTPUT = re.compile(r"\d+\.?\d*(?:e[+-]?\d+)?|\.\d+")


class Number(NamedTuple):
    """A number as prose writes it. decimals: how many places it is given to."""

    text: str
    value: float
    decimals: int
    percent: bool


def in_prose(text: str) -> Iterator[Number]:
    """Yield the numbers of two or more significant digits in Markdown."""
    for match in NUMBER.finditer(NOT_PROSE.sub(" ", text)):
        digits = match["digits"].replace(",", "")
        whole = digits.replace(".", "").lstrip("0")
        if len(whole if "." in digits else whole.rstrip("0")) >= 2:
            yield Number(match[0], float(digits), len(digits.partition(".")[2]), match["percent"] is not None)


def measured(text: str) -> set[float]:
    """Return the magnitudes of all numbers in an output or a table."""
    return {float(found) for found in IN_OUTPUT.findall(re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))}


def is_among(number: Number, known: set[float]) -> bool:
    """Whether a known number rounds to it, as it is or as a percentage."""
    room = 0.5 * 10.0**-number.decimals + 1e-9
    return any(abs(value * scale - number.value) <= room for value in known for scale in (1, 100))


@cache
def recorded(prefix: str) -> frozenset[float]:
    """Return the numbers in the tables of `outputs/reference` whose names begin with `prefix`."""
    cells = (cell for path in REFERENCE.glob(f"{prefix}*.csv") for row in csv.reader(path.open()) for cell in row)
    return frozenset(value for cell in cells for value in measured(cell))


def shown(cells: list[dict]) -> set[float]:
    """Return the numbers that a notebook's code and its stored outputs show."""
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for output in (output for cell in cells for output in cell.get("outputs", ())):
        texts += ["".join(output.get("text", ""))]
        texts += [
            "".join(output.get("data", {}).get(kind, "")) for kind in ("text/plain", "text/html", "text/markdown")
        ]
    return {value for text in texts for value in measured(FIGURE.sub("", text))}


def unsourced(path: Path) -> list[str]:
    """Return, with the cell, the numbers in a notebook's prose that nothing in sight says.

    A number may come from the notebook's code and outputs, from a recorded table that the cell names, from those of
    another notebook that it names, or from `papers.csv`.
    """
    cells = json.loads(path.read_text("utf-8"))["cells"]
    known = shown(cells) | recorded("papers")
    problems = []
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            others = re.findall(
                r"(?i)notebooks? (\d\d)(?:(?:,| and| to) (\d\d))*|\((\d\d)_\w+\.ipynb|\b(\d\d_\w+)\.csv", text
            )
            near = known.union(*(recorded(prefix) for found in others for prefix in found if prefix))
            problems += [f"{cell['id']}: {number.text}" for number in in_prose(text) if not is_among(number, near)]
    return problems
