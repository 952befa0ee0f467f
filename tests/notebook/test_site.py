"""The book of two small notebooks, of a run folder, and of this repository: links, pictures, formulas, search."""

import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat import v4
from PIL import Image
from typer.testing import CliRunner

from wsolnb.errors import ParameterError, RunError
from wsolnb.notebook import reports, site
from wsolnb.notebook.cli import app

sys.path.append(str(Path(__file__).parents[1] / "notebooks"))
from sample import Repository

ROOT = Path(__file__).parents[2]
README = """\
# A book of birds

Where is the *bird*?

![one bird](outputs/reference/overview.png)

```
make reproduce
```
"""
FIRST = """\
# 01 · Data: birds in boxes

**Which question does this notebook answer?** Birds have boxes. What is in
[the box](10_scm.ipynb)? More follows.

**Read first:** the [glossary](GLOSSARY.md#Box)."""
FORMULAS = r"""## Boxes

A score $s_k$ and

$$y = \tfrac{1}{2} \sum_k s_k \mathbb{1}, \tag{7}$$

## Boxes

cost `$5`: a kestrel."""
CAPTION = "*Figure: a bird, its `box`, and\n$s$ of it.* It is **there**."
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "png")
    return file.getvalue()


def output(shown: int = 0, **data: str) -> nbformat.NotebookNode:
    metadata = {"image/png": {"width": shown}} if shown else {}
    return v4.new_output(
        "display_data", {kind.replace("_", "/"): value for kind, value in data.items()}, metadata=metadata
    )


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("WSOLNB_ROOT", str(tmp_path))
    monkeypatch.setattr(reports, "results", lambda: "One claim: [shown](notebooks/10_scm.ipynb#end-of-it).")
    repository = Repository(tmp_path)
    picture, bar = base64.b64encode(png(300, 100)).decode(), "  0%|          | 0/525"
    table = "<table><tr><td>0.5 ± 0.1</td></tr></table>"
    cells = [
        v4.new_markdown_cell(FIRST),
        v4.new_code_cell("seed: int = 0  # seed", metadata={"tags": ["parameters"]}),
        v4.new_markdown_cell(FORMULAS),
        v4.new_code_cell("half = 1 / 2", outputs=[output(text_plain=bar), output(text_html=table)]),
        v4.new_code_cell("run.save_figure(figure, 'one')", outputs=[output(image_png=picture, shown=150)]),
        v4.new_markdown_cell(CAPTION),
        v4.new_code_cell("Image.open(file)", outputs=[output(image_png=picture)]),
        v4.new_markdown_cell("*Figure: as it is.*"),
    ]
    repository.write("01_data", cells)
    repository.write(
        "10_scm", [v4.new_markdown_cell("# 10 · SCM: diffusion\n\n[back](01_data.ipynb#boxes)\n\n## End of it")]
    )
    (tmp_path / "notebooks/GLOSSARY.md").write_text("# Glossary\n\n## Box\n\nSee [01](01_data.ipynb).\n")
    (tmp_path / "README.md").write_text(README)
    reference = tmp_path / "outputs/reference"
    reference.mkdir(parents=True)
    (reference / "overview.png").write_bytes(png(60, 20))
    study = {"notebook": "01_data", "commit": {"a": COMMIT}, "dirty": True, "parameters": {"epochs": 7}, "seconds": 4.5}
    (reference / "01_studies.json").write_text(json.dumps(study))
    return repository


@pytest.fixture
def book(repository):
    pages = site.build(repository.root / "outputs/site")
    assert pages == ["index.html", "01_data.html", "10_scm.html", "glossary.html", "provenance.html"]
    return repository.root / "outputs/site"


def read(book: Path, page: str) -> BeautifulSoup:
    return BeautifulSoup((book / page).read_text("utf-8"), "html.parser")


def test_a_book_is_whole_and_loads_nothing_from_elsewhere(book):
    assert site.problems(book) == []
    for path in book.glob("*.html"):
        assert not re.search(r"<(?!a )[^>]*(?:src|href)=.(?:https?:|//)", path.read_text("utf-8"))
    assert (book / "notebooks/01_data.ipynb").read_bytes() == (book.parents[1] / "notebooks/01_data.ipynb").read_bytes()


def test_links_between_files_lead_to_pages(book):
    assert [tag["href"] for tag in read(book, "10_scm.html").select("main section p a")] == ["01_data.html#boxes"]
    assert [tag["href"] for tag in read(book, "01_data.html").select("main section p a")] == [
        "10_scm.html",
        "glossary.html#box",
    ]
    index = read(book, "index.html")
    assert index.select_one("main p > a")["href"] == "10_scm.html#end-of-it"
    assert [tag["href"] for tag in index.select(".card")] == ["01_data.html", "10_scm.html"]
    assert index.select_one(".card span").text == "Birds have boxes. What is in the box?"
    assert (book / index.select_one("main img")["src"]).read_bytes() == png(60, 20)


def test_pages_follow_each_other_and_name_their_parts(book):
    page = read(book, "10_scm.html")
    assert [(tag["rel"], tag["href"]) for tag in page.select(".turn a")] == [
        (["prev"], "01_data.html"),
        (["next"], "glossary.html"),
    ]
    assert [tag.text for tag in page.select("nav > ul > li > a")] == [
        "A book of birds",
        "01 · Data",
        "10 · diffusion",
        "Glossary",
        "Provenance",
    ]
    assert [tag.text for tag in page.select("nav h2")] == ["Start", "SCM", "More"]
    assert page.select_one("nav [aria-current]").text == "10 · diffusion"
    assert [tag["href"] for tag in read(book, "01_data.html").select("nav .here li a")] == ["#boxes", "#boxes-1"]


def test_a_picture_has_its_caption_as_alternative_text_and_its_size(book):
    picture, plain = read(book, "01_data.html").select("main img")
    assert (plain["width"], plain["height"]) == ("300", "100")
    assert picture["alt"] == "Figure: a bird, its box, and s of it."
    assert (picture["width"], picture["height"]) == ("150", "50")  # at which a notebook shows it, too
    assert (book / picture["src"]).read_bytes() == png(300, 100)
    [card] = read(book, "index.html").select(".card img")
    assert (card["src"], card["alt"]) == (picture["src"], picture["alt"])


def test_formulas_are_mathml(book):
    inline, block, in_caption = read(book, "01_data.html").select("main section math")
    assert (inline["display"], inline.find("msub").get_text("|")) == ("inline", "s|k")
    assert (block["display"], block.find("mfrac").get_text("|")) == ("block", "1|2")
    assert block.get_text().endswith("(7)")
    assert "𝟙" in block.get_text()
    assert in_caption.get_text() == "s"
    assert "$5" in read(book, "01_data.html").get_text()
    assert (book / "STIXTwoMath-Regular.ttf").stat().st_size > 100_000


def test_code_is_folded_where_it_is_not_the_lesson(book):
    page = read(book, "01_data.html")
    found = {tag.summary.contents[0].strip(): tag.has_attr("open") for tag in page.select("details.code")}
    assert found == {"parameters": False, "code": True, "code of the figure": False}
    assert "0/525" not in page.get_text()
    assert page.select_one(".scroll table td").text == "0.5\u00a0±\u00a00.1"


def test_the_search_knows_sections(book):
    index = json.loads((book / "search.js").read_text("utf-8").removeprefix("window.BOOK = ").removesuffix(";\n"))
    assert {name for name, *_ in index} >= {"01_data.html#boxes", "01_data.html#boxes-1", "glossary.html#box"}
    [(address, page, heading, _)] = [entry for entry in index if "kestrel" in entry[3]]
    assert (address, page, heading) == ("01_data.html#boxes-1", "01 · Data: birds in boxes", "Boxes")
    assert [entry[0] for entry in index if "half = 1 / 2" in entry[3]] == ["01_data.html#boxes-1"]


def test_the_provenance_of_recorded_studies(book):
    assert read(book, "01_data.html").select_one(".notes a")["href"] == "provenance.html#01_studies"
    page = read(book, "provenance.html")
    assert [tag.text for tag in page.select("tbody td")][:3] == ["01_studies", "01_data", "012345678 with changes"]
    assert page.select_one("main section > p").text.startswith("Each recorded study")
    assert json.loads(page.find(id="01_studies").pre.text)["parameters"] == {"epochs": 7}


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('href="10_scm.html"', 'href="11_scm.html"', "01_data.html: 11_scm.html leads nowhere"),
        ('href="glossary.html#box"', 'href="glossary.html#map"', "01_data.html: glossary.html#map has no such place"),
        (
            '<link href="book.css"',
            '<link href="https://a.org/b.css"',
            "01_data.html: https://a.org/b.css would be loaded",
        ),
        ("<script src=", "<style>@import url(b.css);</style><script src=", "01_data.html: @import url(b.css) would be"),
        (
            'alt="Figure: a bird',
            'alt="" title="Figure: a bird',
            "01_data.html: files/01_data_4_0.png has no alternative text",
        ),
    ],
)
def test_what_is_wrong_with_a_book_is_found(book, old, new, problem):
    text = (book / "01_data.html").read_text("utf-8")
    assert old in text
    (book / "01_data.html").write_text(text.replace(old, new), encoding="utf-8")
    found = site.problems(book)
    assert len(found) == 1
    assert found[0].startswith(problem)


# Run folders


@pytest.fixture
def run(repository):
    run = repository.root / "outputs/mini"
    (run / "notebooks").mkdir(parents=True)
    shutil.copy(repository.root / "notebooks/01_data.ipynb", run / "notebooks")
    shutil.copy(repository.root / "notebooks/10_scm.ipynb", run / "notebooks")
    made = {"notebook": "01_data", "parameters": {"epochs": 7}, "commit": COMMIT, "dirty": False, "device": "cpu"}
    made |= {"versions": {"torch": "2.9"}, "started": "2026-01-02T03:04:05+00:00", "seconds": 61.4}
    (run / "metrics").mkdir()
    (run / "metrics/01_data.json").write_text(
        json.dumps({"table": [{"map": "cam", "top1": 0.12345}], "provenance": made})
    )
    (run / "summary.json").write_text(
        json.dumps({"steps": [{"notebook": "01_data", "status": "done", "seconds": 64.0}]})
    )
    return run


def test_the_book_of_a_run_says_what_it_was_run_with(run):
    assert site.build(run / "site", run)[-2:] == ["provenance.html", "metrics.html"]
    assert site.problems(run / "site") == []
    notes = read(run / "site", "01_data.html").select_one(".notes")
    assert notes.text == "Run 2026-01-02, 61.4 s, commit 012345678, cpu. Provenance"
    assert notes.a["href"] == "provenance.html#01_data"
    whole = read(run / "site", "provenance.html").find(id="01_data").pre.text
    assert json.loads(whole)["parameters"] == {"epochs": 7}
    assert [tag.text for tag in read(run / "site", "metrics.html").select("tbody td")] == ["cam", "0.123"]
    assert [tag.text for tag in read(run / "site", "index.html").select("main table tbody td")] == [
        "01_data",
        "done",
        "64.0",
    ]


def test_a_run_without_a_summary_and_without_metrics_still_makes_a_book(run):
    (run / "summary.json").write_text('{"steps": [{}]}')
    shutil.rmtree(run / "metrics")
    site.build(run / "site", run)
    assert site.problems(run / "site") == []
    assert "has written no summary" in read(run / "site", "index.html").text
    assert not read(run / "site", "01_data.html").select(".notes")


def test_a_link_to_what_was_not_run_is_text(run):
    (run / "notebooks/10_scm.ipynb").unlink()
    site.build(run / "site", run)
    assert site.problems(run / "site") == []
    told = read(run / "site", "01_data.html").select_one("main section p span")
    assert (told.text, told["title"]) == ("the box", "not run in this folder")


def test_solutions_are_pages_behind_the_lessons_and_in_the_book_of_a_run(run):
    first = "# Solutions: 10 · SCM: diffusion\n\n[The lesson](../10_scm.ipynb#end-of-it)"
    solved = v4.new_notebook(cells=[v4.new_markdown_cell(first)])
    (folder := run.parents[1] / "notebooks/solutions").mkdir()
    nbformat.write(solved, folder / "10_scm.ipynb")
    pages = site.build(run / "site", run)
    assert pages[:4] == ["index.html", "01_data.html", "10_scm.html", "solutions_10_scm.html"]
    assert site.problems(run / "site") == []
    page = read(run / "site", "solutions_10_scm.html")
    assert page.select_one("nav .here a").text == "10 · diffusion"
    assert page.select_one("main section p a")["href"] == "10_scm.html#end-of-it"
    assert not page.select(".notes")
    assert (run / "site" / page.select_one("footer a[download]")["href"]).is_file()
    index = read(run / "site", "index.html")
    assert len(index.select(".card")) == 2
    assert index.select_one("main ul a[href='solutions_10_scm.html']").text == "10 · diffusion"


# What cannot be built


def test_nothing_is_built_from_a_folder_without_notebooks(repository):
    with pytest.raises(RunError, match="holds no notebooks"):
        site.build(repository.root / "out", repository.root / "outputs")


def test_a_folder_of_something_else_is_left_alone(repository):
    kept = repository.root / "out/thesis.txt"
    kept.parent.mkdir()
    kept.write_text("years of work")
    with pytest.raises(RunError, match="something else than a book"):
        site.build(kept.parent)
    with pytest.raises(RunError, match="something else than a book"):
        site.build(kept)
    assert kept.read_text() == "years of work"
    (empty := repository.root / "empty").mkdir()
    assert site.build(empty) == site.build(empty)  # an empty folder, and then a book


@pytest.mark.parametrize("formula", [r"\unheard{x}", r"\left( x"])
def test_a_formula_that_is_not_known_is_named(repository, formula):
    repository.write("01_data", [v4.new_markdown_cell(f"# One\n\nso ${formula}$")])
    with pytest.raises(ParameterError, match=r"notebooks/01_data.ipynb: the formula") as error:
        site.build(repository.root / "out")
    assert repr(formula) in str(error.value)


def test_a_damaged_notebook_is_named(repository):
    (repository.root / "notebooks/01_data.ipynb").write_text("{")
    with pytest.raises(ParameterError, match=r"01_data\.ipynb is no notebook"):
        site.build(repository.root / "out")


def test_the_command_tells_what_is_wrong_and_where_the_book_is(repository):
    done = CliRunner().invoke(app, ["report"])
    assert (done.exit_code, done.output) == (0, f"5 pages: open {repository.root / 'outputs/site/index.html'}\n")
    (repository.root / "notebooks/GLOSSARY.md").write_text("# Glossary\n\n[gone](02_gone.ipynb)")
    done = CliRunner().invoke(app, ["report", "--out", "other"])
    assert done.exit_code == 1
    assert "warning: glossary.html: notebooks/02_gone.ipynb leads nowhere" in done.output
    assert (repository.root / "other/index.html").is_file()
    done = CliRunner().invoke(app, ["report", "outputs/nothing"])
    assert done.exit_code == 2
    assert "Remedy: run `wsolnb reproduce` first" in done.output


# This repository


@pytest.mark.slow
def test_the_book_of_this_repository_is_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("WSOLNB_ROOT", str(ROOT))
    pages = site.build(tmp_path / "site")
    assert site.problems(tmp_path / "site") == []
    for path in [*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "notebooks/solutions").glob("*.ipynb")]:
        page = "_".join(path.relative_to(ROOT / "notebooks").with_suffix(".html").parts)
        assert page in pages
        cells = nbformat.read(path, as_version=4).cells
        kinds = [kind for cell in cells for output in cell.get("outputs", ()) for kind in output.get("data", {})]
        pictures = read(tmp_path / "site", page).select(".cell img")
        assert len(pictures) == sum(kind.startswith("image/") for kind in kinds), path.name
        assert all(picture["alt"].startswith("Figure:") for picture in pictures), path.name
