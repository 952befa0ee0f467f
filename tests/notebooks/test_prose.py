"""Numbers in prose are measured, recorded or quoted with a source. Nothing is executed."""

from pathlib import Path

import nbformat
import pytest
from prose import ROOT, in_prose, is_among, measured, recorded, unsourced

from wsolnb.notebook import reports

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_number_in_a_notebook_has_a_source(path):
    assert unsourced(path) == []


def test_every_number_in_the_readme_has_a_source():
    text = Path(ROOT / "README.md").read_text("utf-8")
    before, rest = text.split(reports.MARKS[0])  # between the marks it is written from the tables, which has a test
    text = before + rest.split(reports.MARKS[1])[1]
    known = recorded("") | measured(Path(ROOT / "outputs/reference/benchmarks.json").read_text("utf-8"))
    assert [number.text for number in in_prose(text) if not is_among(number, known)] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("it finds 0.766 ± 0.029 of them", ["0.766", "0.029"]),
        ("84.4 % and 12%, 4,052,738 weights, -0.017, +.102", ["84.4 %", "12%", "4,052,738", "-0.017", "+.102"]),
        ("see notebook 12 and fig. 10, eq. 3 to 12, tables 11 and 12, ECCV 2022", []),
        ("`steps = 16`, $p = 16$, [a link](12_scm_results.ipynb), 5 or 300 birds", []),
        ("takes 24 minutes and 1.85 GB at 112 px", []),
        ("at $\\lambda = 0.8$ the 0.8 of it, 0.80 of it", ["0.80"]),
    ],
)
def test_what_is_a_number_in_prose(text, expected):
    assert [number.text for number in in_prose(text)] == expected


def test_a_number_that_nothing_shows_is_found(tmp_path):
    code = nbformat.v4.new_code_cell("epochs = 12")
    code.outputs = [nbformat.v4.new_output("stream", text="top-1 0.7664, 2,400 images, loss 1.5e-05")]
    prose = nbformat.v4.new_markdown_cell("12 epochs, 0.77 or 77 % or 76.6 % of 2,400 birds; not 0.78, 57 or 78 %.")
    book = nbformat.v4.new_notebook(cells=[code, prose])
    path = tmp_path / "zz_made_up.ipynb"
    nbformat.write(book, path)
    assert [found.partition(": ")[2] for found in unsourced(path)] == ["0.78", "57", "78 %"]
