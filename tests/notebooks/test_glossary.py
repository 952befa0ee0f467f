"""The glossary's entries are sorted and unique, and each names a notebook whose text has the term."""

import re

import nbformat
import pytest
from prose import ROOT

GLOSSARY = ROOT / "notebooks" / "glossary.md"
ENTRY = re.compile(r"\| (?P<term>[^|]+) \| (?P<meaning>[^|]+) \| \[(?P<number>\d\d)\]\((?P<file>[^)]+)\) \|")
LINES = [line for line in GLOSSARY.read_text("utf-8").splitlines() if line.startswith("| ")][2:]
ENTRIES = [match for match in map(ENTRY.fullmatch, LINES) if match]


def test_every_line_is_an_entry():
    assert 50 <= len(ENTRIES) == len(LINES)


def test_terms_are_sorted_and_unique():
    terms = [entry["term"].strip("`").casefold() for entry in ENTRIES]
    assert terms == sorted(set(terms))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["term"])
def test_an_entry_is_taught_where_it_says(entry):
    path = GLOSSARY.parent / entry["file"]
    assert path.name.startswith(entry["number"])
    cells = nbformat.read(path, as_version=4).cells
    text = " ".join(" ".join(cell.source for cell in cells if cell.cell_type == "markdown").split()).casefold()
    name, _, short = entry["term"].strip("`").casefold().partition(" (")
    assert name in text or (short and short.strip(")") in text), f"{path.name} does not have {entry['term']!r}"


def test_the_glossary_can_be_found():
    assert "](notebooks/glossary.md)" in (ROOT / "README.md").read_text("utf-8")
    assert "](glossary.md)" in (GLOSSARY.parent / "00_overview.ipynb").read_text("utf-8")
