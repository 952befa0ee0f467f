"""The book: every notebook as a page, with a landing page, search, glossary and the provenance of each run.

    site.build(resolve("outputs/site"))                                   # from the stored notebooks
    site.build(resolve("outputs/mini/site"), resolve("outputs/mini"))     # from an executed run folder
    site.problems(resolve("outputs/site"))                                # links, alternative texts, foreign addresses

nbconvert renders the cells with the template in `theme/`. Formulas become MathML, which browsers draw themselves, so a
page needs neither a network nor a server.
"""

from __future__ import annotations

import dataclasses
import html
import io
import json
import posixpath
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import nbformat
import pandas as pd
from bs4 import BeautifulSoup, Tag
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from PIL import Image

from wsolnb.errors import DataError, ParameterError, RunError
from wsolnb.files import inside, repository_root, write_atomically
from wsolnb.notebook import reports, runs

THEME = Path(__file__).with_name("theme")
FONT = Path(find_spec("ziamath").origin).with_name("fonts") / "STIXTwoMath-Regular.ttf"
"""For formulas: what many systems lack, and what one wheel holds."""
GROUPS = {"0": "Start", "1": "SCM", "2": "LPCAM", "3": "LocLoc", "9": "Results"}
"""By the first digit of a notebook: the part of the book that it belongs to, in reading order."""
SOLUTIONS = "Solutions"
"""The part with the solutions of the exercises, behind all lessons."""
FOLDED = {
    "start": re.compile(r"\bruns\.start\("),
    "imports": re.compile(r"\A(?:(?:(?:import|from) |[ )]|viz\.set_style).*(?:\n|\Z)|\n)+\Z"),
    "code of the figure": re.compile(r"\bsave_figure\(|\bplt\.|\bviz\.(?!set_style)"),
}
"""Code that is folded at first, by what a line of it says: it sets up or draws, and is not what the lesson is about."""


NOISE = re.compile(r"\s*\d+%\||\w+\(children=\(")
"""Output that says nothing here: how far a finished cell was, or a widget without its kernel."""


@dataclasses.dataclass
class Page:
    """A page of the book. source: its file by its place in the repository, which relative links start from.

    group, place: part of the book, and place in reading order. notes: what it was run with, as HTML. file: the notebook
    itself, which can be downloaded; none of a page that is text.
    """

    name: str
    source: str
    notebook: NotebookNode
    group: str
    place: int = 0
    notes: str = ""
    file: Path | None = None

    @property
    def title(self) -> str:
        """The first heading, as plain text."""
        found = re.search(r"^# (.+)$", _text(self.notebook), re.MULTILINE)
        return _plain(found[1]) if found else self.name

    @property
    def short(self) -> str:
        """The title up to its colon, for lists of pages; what follows it where the part of the book says the rest."""
        before, _, after = self.title.removeprefix(f"{self.group}: ").partition(": ")
        part = GROUPS.get(before[:1], "") if self.group == SOLUTIONS else self.group
        return f"{before.removesuffix(part)}{after}" if part and before.endswith(part) and after else before

    @property
    def question(self) -> str:
        """What a lesson asks, from its first cell; empty where it does not say."""
        found = re.search(r"\*\*Which question[^*]*\*\*\s*(.+?)(?:\n\n|\Z)", _text(self.notebook), re.DOTALL)
        return _plain(found[1]) if found else ""


def build(out: Path, run: Path | None = None) -> list[str]:
    """Write the book into a folder; returns the addresses of its pages.

    Args:
        out: folder, emptied before; made if it is missing. It is a book's, or empty.
        run: run folder whose executed notebooks and metrics are shown; None: the stored notebooks.

    Raises:
        RunError: the run folder holds no executed notebook; `out` holds something else or cannot be written.
        ParameterError: a notebook or one of its formulas cannot be read.
    """
    pages = _pages(run)
    empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not empty and not (out / "book.css").is_file():
        raise RunError(f"{out} holds something else than a book", "name a new or an empty folder")
    shutil.rmtree(out, ignore_errors=True)
    for file in (THEME / "book.css", THEME / "book.js", FONT):
        write_atomically(out / file.name, file.read_bytes())
    commit = runs.commit()
    built = f"Built from commit {commit['commit'][:9]}{' with changes' * commit['dirty']}." if commit["commit"] else ""
    exporter = HTMLExporter(
        template_name=THEME.name,
        extra_template_basedirs=[str(THEME.parent)],
        preprocessors=["nbconvert.preprocessors.ExtractOutputPreprocessor"],
        filters={"markdown2html": _markdown},
    )
    index: list[tuple[str, str, str, str]] = []
    for place, page in enumerate(pages):
        told = {"page": page, "pages": pages, "built": built, "unique_key": page.name, "output_files_dir": "files"}
        told |= {"before": pages[place - 1] if place else None, "after": [*pages, None][place + 1]}
        try:
            body, made = exporter.from_notebook_node(page.notebook, told)
        except ParameterError as error:
            raise ParameterError(f"{page.source}: {error.problem}", error.remedy) from None
        for name, content in made["outputs"].items():
            write_atomically(out / name, content)
        if page.file:
            write_atomically(out / page.source, page.file.read_bytes())
        soup = BeautifulSoup(body, "html.parser")
        _link(soup, page, pages, out)
        index += _finish(soup, page, out)
        write_atomically(out / f"{page.name}.html", str(soup))
    write_atomically(out / "search.js", f"window.BOOK = {json.dumps(index, ensure_ascii=False)};\n")
    return [f"{page.name}.html" for page in pages]


# What the pages are


def _pages(run: Path | None) -> list[Page]:
    root = repository_root()
    folder = (run or root) / "notebooks"
    paths = sorted(folder.glob("*.ipynb"))
    if not paths:
        raise RunError(f"{folder} holds no notebooks", "run `wsolnb reproduce` first, or name another run folder")
    lessons = [_page(path, path.name, run) for path in paths]
    solved = sorted((root / "notebooks/solutions").glob("*.ipynb"))  # no run has them: they run alone
    lessons += [_page(path, f"solutions/{path.name}", None) for path in solved]
    texts = [*sorted((root / "notebooks").glob("*.md")), root / "outputs/reference/README.md"]
    others = [_written(path.read_text("utf-8"), path.relative_to(root).as_posix()) for path in texts if path.is_file()]
    others.append(_written(_provenance(run), "provenance.md"))
    if run:
        others.append(_written(_metrics(run), "metrics.md"))
    pages = [_written(_landing(run, lessons), "README.md"), *lessons, *others]
    for place, page in enumerate(pages):
        page.place = place
    pages[0].name, pages[0].group = "index", ""
    return pages


def _page(path: Path, place: str, run: Path | None) -> Page:
    """Return the page of a notebook. place: below `notebooks/`."""
    try:
        notebook = _prepare(nbformat.read(path, as_version=4))
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise ParameterError(f"{path} is no notebook: {error}", "run it again, or restore it") from None
    name = posixpath.splitext(place)[0].replace("/", "_")
    page = Page(name=name, source=f"notebooks/{place}", notebook=notebook, group=SOLUTIONS, file=path)
    if "/" in place:
        return page
    page.group = GROUPS.get(path.stem[0], "More")
    if run and (made := runs.read_provenance(run / "metrics" / f"{path.stem}.json")):
        day, seconds, device = (str(made.get(name, "?")) for name in ("started", "seconds", "device"))
        what = f"Run {day[:10]}, {seconds} s, commit {_commit(made) or '?'}, {device}."
        page.notes = f'{html.escape(what)} <a href="/provenance.md#{page.name}">Provenance</a>'
    elif studies := [name for name, _ in _recorded() if not run and name.startswith(path.stem[:3])]:
        links = ", ".join(f'<a href="/provenance.md#{study}">{study}</a>' for study in studies)
        page.notes = f"Recorded studies: {links}"
    return page


def _written(text: str, source: str) -> Page:
    """Return a page of Markdown: a notebook of one cell."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    name = posixpath.splitext(source)[0].removeprefix("notebooks/").replace("/", "_").lower()
    return Page(name=name, source=source, notebook=notebook, group="More")


def _landing(run: Path | None, lessons: Iterable[Page]) -> str:
    readme = (repository_root() / "README.md").read_text("utf-8")
    parts = [readme.partition("\n```")[0]]
    if run:
        parts.append(f"## The run `{run.name}`\n\n{_steps(run)}\n\nThe [tables](metrics.md) of all notebooks, and the "
                     "[provenance](provenance.md) of each run: parameters, versions, commit, seconds.")  # fmt: skip
    parts.append("## What the papers claim, and what holds here\n\n" + reports.results())
    parts.append("## Lessons, in reading order")
    groups: dict[str, list[str]] = {}
    for page in lessons:
        if page.group != SOLUTIONS:
            groups.setdefault(page.group, []).append(_card(page))
    parts += [f'### {group}\n\n<div class="cards">{"".join(cards)}</div>' for group, cards in groups.items()]
    if solved := [f"- [{page.short}](/{page.source})" for page in lessons if page.group == SOLUTIONS]:
        parts.append(f"### {SOLUTIONS} of the exercises\n\n" + "\n".join(solved))
    return "\n\n".join(parts)


def _card(page: Page) -> str:
    """Return a link to a lesson: its first picture, as nbconvert will name it, title and question."""
    picture = ""
    for number, cell in reversed(list(enumerate(page.notebook.cells))):
        for index, output in enumerate(cell.get("outputs", ())):
            for kind, suffix in (("image/jpeg", "jpg"), ("image/png", "png")):
                if kind in output.get("data", {}):
                    file, alt = f"{page.name}_{number}_{index}.{suffix}", html.escape(cell.metadata.caption)
                    picture = f'<img src="/files/{file}" alt="{alt}">'
    title, question = html.escape(page.title), html.escape(page.question.partition("?")[0] + "?" * bool(page.question))
    return f'<a class="card" href="/{page.source}">{picture}<b>{title}</b><span>{question}</span></a>'


def _steps(run: Path) -> str:
    try:
        steps = pd.DataFrame(json.loads((run / "summary.json").read_text("utf-8"))["steps"])
        steps = steps[["notebook", "status", "seconds"]]
    except (OSError, ValueError, KeyError, TypeError):
        return "The run has written no summary."
    return reports.markdown(steps.astype(object).fillna("-"))


def _metrics(run: Path) -> str:
    from wsolnb.notebook import pipeline

    parts = ["# Tables of the run"]
    for name, table in pipeline.tables(run).items():
        shown = table.round(3).astype(object).fillna("")
        shown = shown.map(lambda value: html.escape(value) if isinstance(value, str) else value)  # names of classes
        parts.append(f"## {name}\n\n{reports.markdown(shown)}")
    return "\n\n".join(parts)


def _recorded() -> list[tuple[str, dict[str, Any]]]:
    """Return the provenance of each recorded study, by the name of its table."""
    paths = sorted((repository_root() / "outputs/reference").glob("*.json"))
    found = [(path.stem, json.loads(path.read_text("utf-8"))) for path in paths]
    return [(name, made) for name, made in found if "notebook" in made]


def _provenance(run: Path | None) -> str:
    if run:
        found = [(path.stem, runs.read_provenance(path)) for path in sorted((run / "metrics").glob("*.json"))]
        text = "Each notebook of this run folder: what its numbers were made with."
    else:
        found = _recorded()
        text = "Each recorded study: what its numbers were made with. The tables are files of `outputs/reference/`."
    lines = []
    for name, made in found:
        seconds = made.get("seconds", "")
        line = {"run": f"[{name}](#{name})", "notebook": made.get("notebook", ""), "commit": _commit(made)}
        line |= {"device": made.get("device", ""), "processor": made.get("processor", "")}
        line |= {
            "finished": str(made.get("finished", ""))[:10].replace("-", "\u2011"),
            "seconds": seconds if isinstance(seconds, float) else "",
        }
        lines.append(line)
    whole = []
    for name, made in found:
        inside = f"<summary>{name}</summary><pre>{html.escape(json.dumps(made, indent=1))}</pre>"
        whole.append(f'<details class="code" id="{name}">{inside}</details>')
    table = reports.markdown(pd.DataFrame(lines)) if lines else "There is none."
    return f"# Provenance\n\n{text}\n\n{table}\n\n## In full\n\n" + "\n\n".join(whole)


def _commit(made: Mapping[str, Any]) -> str:
    """Return the start of each commit that a provenance names."""
    found = re.findall(r"\b([0-9a-f]{9})[0-9a-f]{31}\b", json.dumps(made.get("commit")))
    return ", ".join(dict.fromkeys(found)) + " with changes" * bool(made.get("dirty"))


# Cells


class _Renderer(IPythonRenderer):
    """Markdown as nbconvert renders it, with formulas as MathML, and the forge's anchors of headings."""

    def heading(self, text: str, level: int, **attributes: Any) -> str:
        name = html.escape(anchor(BeautifulSoup(text, "html.parser").get_text()))
        link = f'<a class="anchor-link" href="#{name}" aria-label="Link to this section">¶</a>'
        return f'<h{level} id="{name}">{text}{link}</h{level}>\n'

    def block_math(self, body: str) -> str:
        return f'<div class="formula" tabindex="0">{_mathml(body, "block")}</div>'

    def inline_math(self, body: str) -> str:
        return _mathml(body, "inline")


def anchor(heading: str) -> str:
    """Return the anchor that the forge and this book give a heading, without `#`."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def _markdown(source: str) -> str:
    return MarkdownWithMath(renderer=_Renderer(escape=False)).render(source)


def _mathml(formula: str, display: str) -> str:
    # latex2mathml puts a tag right behind its formula, and asks browsers for a style of letters that they lack.
    spaced = re.sub(r"\\tag\{(.*?)\}", r"\\qquad\\text{(\1)}", formula)
    try:
        found = convert(spaced, display=display)
    except Exception as error:  # its parser raises what it meets
        raise ParameterError(f"the formula {formula!r} cannot be shown: {error!r}", "write it in plain LaTeX") from None
    if unknown := re.search(r"\\\w+", re.sub(r"<annotation.*?</annotation>", "", found)):
        raise ParameterError(f"the formula {formula!r} has {unknown[0]}, which is not known", "write it otherwise")
    return found.replace('<mn mathvariant="double-struck">1</mn>', "<mi>&#x1D7D9;</mi>")


def _prepare(notebook: NotebookNode) -> NotebookNode:
    """Let each code cell say whether it is folded, under what words, and the caption of its figure."""
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        tagged = "parameters" if {"parameters", "injected-parameters"} & {*cell.metadata.get("tags", ())} else ""
        label = tagged or next((name for name, pattern in FOLDED.items() if pattern.search(cell.source)), "")
        cell.metadata.update(label=label or "code", folded=bool(label), caption=_caption(notebook.cells, number))
        shown = (output.get("data", {}).get("text/plain", "") for output in cell.outputs)
        cell.outputs = [output for output, text in zip(cell.outputs, shown, strict=True) if not NOISE.match(text)]
    return notebook


def _caption(cells: list[NotebookNode], number: int) -> str:
    """Return the caption of a cell's figure, from the text below it, as plain text: its alternative text."""
    below = cells[number + 1].source if number + 1 < len(cells) and cells[number + 1].cell_type == "markdown" else ""
    found = re.search(r"(?<!\*)\*(Figure: .+?[^*])\*(?!\*)", below, re.DOTALL)
    above = "\n".join(cell.source for cell in cells[:number] if cell.cell_type == "markdown")
    headings = re.findall(r"(?m)^#+ (.+)$", above)
    return _plain(found[1] if found else f"Figure of the section {headings[-1]}" if headings else "Figure")


def _plain(markdown: str) -> str:
    return " ".join(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown).translate(str.maketrans("", "", "*`$\\")).split())


def _text(notebook: NotebookNode) -> str:
    return notebook.cells[0].source if notebook.cells and notebook.cells[0].cell_type == "markdown" else ""


# The page as a whole


def _link(soup: BeautifulSoup, page: Page, pages: list[Page], out: Path) -> None:
    """Point links between files of the repository to pages of the book; copy the other files that are linked to.

    A link to a notebook that a run folder lacks becomes plain text.
    """
    names = {other.source: f"{other.name}.html" for other in pages}
    for tag in soup.select("main > :not(footer) [href], main > :not(footer) [src]"):
        attribute = "href" if tag.has_attr("href") else "src"
        address = urlsplit(tag[attribute])
        if address.scheme or address.netloc or not address.path or (out / address.path.lstrip("/")).is_file():
            tag[attribute] = tag[attribute].lstrip("/")
            continue
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.source), unquote(address.path))).lstrip("/")
        try:
            file = inside(repository_root(), target, links=True)
        except DataError:  # what lies outside is no part of the book
            continue
        if target in names:
            target, address = names[target], address._replace(fragment=address.fragment.lower())
        elif file.suffix == ".ipynb" and file.is_file():
            tag.name, tag.attrs = "span", {"title": "not run in this folder"}
            continue
        elif file.is_file():
            write_atomically(out / "files" / target, file.read_bytes())
            target = f"files/{target}"
        tag[attribute] = address._replace(path=target).geturl()


def _finish(soup: BeautifulSoup, page: Page, out: Path) -> Iterator[tuple[str, str, str, str]]:
    """Let wide tables scroll, give pictures their size, list the headings; yields what the search looks through."""
    for table in soup.select("main table"):
        table.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
        for text in table.find_all(string=re.compile(" ± ")):
            text.replace_with(text.replace(" ± ", "\u00a0±\u00a0"))
        for cell in table.select("td"):
            if len(cell.get_text()) > 40:
                cell["class"] = [*cell.get("class", ()), "long"]
    for picture in soup.select("main img"):
        picture["loading"] = "lazy"
        if (file := out / picture["src"]).is_file() and file.suffix != ".svg":
            width, height = Image.open(io.BytesIO(file.read_bytes())).size
            # A picture for dense screens says at which width it is shown.
            asked = picture.attrs.pop("data-width", "")
            shown = int(asked) if asked.isdecimal() and int(asked) else width
            picture["width"], picture["height"] = str(shown), str(round(height * shown / width))
            if width > 1.8 * height and not picture.find_parent("a"):
                picture.wrap(soup.new_tag("div", attrs={"class": "scroll wide", "tabindex": "0"}))
    for text in soup.select("main em"):
        if text.get_text().startswith("Figure:"):
            text["class"] = "caption"
    anchors: list[str] = []
    for heading in soup.select("main :is(h1, h2, h3, h4)[id]"):
        anchors.append(heading["id"])
        if again := anchors.count(heading["id"]) - 1:  # as the forge numbers headings of the same words
            heading["id"] += f"-{again}"
            heading.select_one(".anchor-link")["href"] = f"#{heading['id']}"
    here, contents = soup.select_one("nav .here"), soup.new_tag("ul")
    for heading in soup.select("main h2[id]"):
        link = soup.new_tag("a", attrs={"href": f"#{heading['id']}"}, string=_heading(heading))
        contents.append(soup.new_tag("li"))
        contents.contents[-1].append(link)
    here.append(contents)

    address, title, texts = f"{page.name}.html", "", []
    for block in soup.select("main section > *, main details.code pre"):
        if block.name in ("h1", "h2", "h3"):
            yield address, page.title, title, " ".join(" ".join(texts).split())
            address, texts = f"{page.name}.html#{block['id']}", []
            title = _heading(block) if block.name != "h1" else ""
        else:
            texts.append(block.get_text())
    yield address, page.title, title, " ".join(" ".join(texts).split())


def _heading(tag: Tag) -> str:
    return tag.get_text().removesuffix("¶").strip()


# Checks


def problems(folder: Path) -> list[str]:
    """Return what is wrong with a book, in words.

    That is: a link or an anchor that leads nowhere, a picture without alternative text, and anything that a page would
    load from elsewhere. Links to elsewhere are allowed, but not followed.
    """
    soups = {path.name: BeautifulSoup(path.read_text("utf-8"), "html.parser") for path in sorted(folder.glob("*.html"))}
    anchors = {name: {tag["id"] for tag in soup.select("[id]")} for name, soup in soups.items()}
    found = []
    for name, soup in soups.items():
        found += [f"{name}: {tag['src']} has no alternative text" for tag in soup.select("img") if not tag.get("alt")]
        for tag in soup.select("[href], [src]"):
            address = urlsplit(told := tag.get("href") or tag.get("src"))
            if address.scheme or address.netloc:
                if tag.name != "a" and address.scheme != "data":
                    found.append(f"{name}: {told} would be loaded from elsewhere")
                continue
            page = unquote(address.path) or name
            if not (folder / page).is_file():
                found.append(f"{name}: {told} leads nowhere")
            elif address.fragment and page in anchors and unquote(address.fragment) not in anchors[page]:
                found.append(f"{name}: {told} has no such place")
        styles = [tag.get_text() for tag in soup.select("style")] + [tag["style"] for tag in soup.select("[style]")]
        foreign = re.findall(r"url\(\W*(?:https?:|//)[^)]*\)|@import[^;]*", " ".join(styles))
        found += [f"{name}: {told} would be loaded from elsewhere" for told in foreign]
    return list(dict.fromkeys(found))
