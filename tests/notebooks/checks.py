"""What every numbered notebook keeps to, so that all of them read alike and nbval has something to compare."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from wsolnb.errors import ParameterError
from wsolnb.notebook import params

MAX_BYTES = 900_000
MAX_LINES = 20
MAX_LINES_OF_A_FIGURE = 30
DRAWING = re.compile(r"\bsave_figure\(|\bplt\.|\bviz\.(?!set_style)")
OPENING = {
    "the question it answers": r"\?",
    "what to read first": r"(?i)\bread\b.*\bfirst\b|\bfirst read\b|\bbefore this\b",
    "measured minutes": r"(?i)\b(minutes?|min|seconds?)\b",
    "what it downloads": r"(?i)\bdownload",
}
MACHINE_PATH = re.compile(r"(?:/(?:home|Users|root|tmp|mnt)/|\b[A-Z]:\\\\?Users\\)[\w.-]+")


def problems(path: Path) -> list[str]:
    """Return what is wrong with a stored notebook, in words; nothing if it is in order."""
    try:
        cells = json.loads(path.read_text("utf-8"))["cells"]
    except (ValueError, KeyError):
        return ["it is no notebook"]
    return [*_file(path), *_whole(path, cells), *_text(cells), *_code(cells), *_paths(cells), *_figures(cells)]


def solution_problems(path: Path, lesson: Path) -> list[str]:
    """Return what is wrong with the solutions of a lesson's exercises, in words; nothing if they are in order."""
    try:
        cells, taught = (json.loads(file.read_text("utf-8"))["cells"] for file in (path, lesson))
    except (ValueError, KeyError):
        return ["it or its lesson is no notebook"]
    return [*_file(path), *_solutions(path, cells, taught), *_code(cells), *_paths(cells), *_figures(cells)]


def exercises(cells: list[dict]) -> list[str]:
    """Return the texts of a lesson's exercises, in their order."""
    parts = re.split(r"(?im)^#+ .*exercises.*$", _source(cells[-1])) if cells else [""]
    return re.findall(r"(?ms)^\d+\. (.+?)(?=^\d+\. |^\s*$|\Z)", parts[1]) if len(parts) > 1 else []


def _solutions(path: Path, cells: list[dict], taught: list[dict]) -> Iterator[str]:
    first = _source(cells[0]) if cells and cells[0]["cell_type"] == "markdown" else ""
    number = path.name.partition("_")[0]
    if not first.startswith(f"# Solutions: {number} · "):
        yield f"its first cell does not start with `# Solutions: {number} · ` and the title of the lesson"
    if f"(../{path.name}" not in first:
        yield f"its first cell has no link to the lesson, ../{path.name}"
    if not re.search(OPENING["measured minutes"], first):
        yield "its first cell does not say the measured seconds"
    if f"(solutions/{path.name})" not in _source(taught[-1]):
        yield f"the exercises of the lesson have no link to solutions/{path.name}"
    if any("parameters" in cell["metadata"].get("tags", ()) for cell in cells):
        yield "it has a cell tagged `parameters`, which is for lessons only"
    titles, sections = [], []
    for cell in cells:
        if cell["cell_type"] == "markdown" and (found := re.match(r"## Exercise (\d+): \S", _source(cell))):
            titles.append(int(found[1]))
            sections.append([])
        if sections:
            sections[-1].append(cell)
    if titles != list(range(1, len(exercises(taught)) + 1)):
        yield f"it has `## Exercise N: title` for {titles}, and the lesson has {len(exercises(taught))} exercises"
    for title, section in zip(titles, sections, strict=True):
        if not any(cell.get("outputs") for cell in section):
            yield f"exercise {title} shows no output"
        if section[-1]["cell_type"] != "markdown" or len(section) < 3:
            yield f"exercise {title} does not end with what its outputs show"


def _file(path: Path) -> Iterator[str]:
    if path.stat().st_size >= MAX_BYTES:
        yield f"it has {path.stat().st_size} bytes; keep stored outputs below {MAX_BYTES}"
    kernel = json.loads(path.read_text("utf-8"))["metadata"].get("kernelspec", {}).get("name")
    if kernel != "python3":
        yield f"its kernel is {kernel!r} instead of 'python3': run `wsolnb refresh {path.stem}`"


def _whole(path: Path, cells: list[dict]) -> Iterator[str]:
    try:
        declared = params.notebook_parameters(path)
        if "run_folder" not in declared:
            yield "it has no parameter `run_folder`"
        for parameter in declared.values():
            if "=" in parameter.help:
                yield f"the comment of {parameter.name!r} holds a `=`, which papermill cannot read and warns of"
    except ParameterError as error:
        yield str(error)
    for name in re.findall(r"\b(?:collect|start)\(\s*['\"](\w+)['\"]", "\n".join(map(_source, cells))):
        if name != path.stem:
            yield f"it calls itself {name!r} in `params.collect` or `runs.start`"


def _text(cells: list[dict]) -> Iterator[str]:
    first = _source(cells[0]) if cells and cells[0]["cell_type"] == "markdown" else ""
    for what, pattern in OPENING.items():
        if not re.search(pattern, first):
            yield f"its first cell does not say {what}"
    prose = [_source(cell) for cell in cells if cell["cell_type"] == "markdown"]
    if not prose or not re.search(r"(?im)^#+ .*exercises", prose[-1]) or cells[-1]["cell_type"] != "markdown":
        yield "it does not end with a section of exercises"


def _paths(cells: list[dict]) -> Iterator[str]:
    for cell in cells:
        texts = [_source(cell), *(text for output in cell.get("outputs", ()) for text in _shown(output))]
        for found in MACHINE_PATH.findall("\n".join(texts)):
            yield f"it shows a path of one machine: {found}"


def _code(cells: list[dict]) -> Iterator[str]:
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in codes]
    if counts != list(range(1, len(counts) + 1)):
        yield f"its cells were not run once each from top to bottom: {counts}"
    for number, cell in enumerate(codes, 1):
        where = f"code cell {number}"
        parameters = "parameters" in cell["metadata"].get("tags", ())  # one line each, which no package can take
        most = MAX_LINES_OF_A_FIGURE if DRAWING.search(_source(cell)) else MAX_LINES
        if (lines := len(_source(cell).splitlines())) > most and not parameters:
            yield f"{where} has {lines} lines of at most {most}; move code into the package"
        if not _source(cell).strip():
            yield f"{where} is empty"
        kinds = {output["output_type"] for output in cell["outputs"]}
        if "error" in kinds:
            yield f"{where} stores an error"
        if "nbval-ignore-output" in cell["metadata"].get("tags", ()):
            continue
        if any(output.get("name") == "stderr" for output in cell["outputs"]):
            yield f"{where} stores stderr, which nbval compares: a warning, or a progress bar"
        if any("image/svg+xml" in output.get("data", {}) for output in cell["outputs"]):
            yield f"{where} stores an SVG, which nbval compares and which differs in every run; use PNG"


def _figures(cells: list[dict]) -> Iterator[str]:
    number = 0
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        if cell["cell_type"] == "markdown":
            if re.search(r"!\[\s*\]\(|<img(?![^>]*\balt=['\"][^'\"])", _source(cell)):
                yield "an image in its text has no alternative text"
            continue
        number += cell["cell_type"] == "code"
        outputs = cell.get("outputs", ())
        if not any(kind.startswith("image/") for output in outputs for kind in output.get("data", {})):
            continue
        near = [text for output in outputs for text in _shown(output)]
        near += [_source(following)] if following and following["cell_type"] == "markdown" else []
        # `<Figure size ...>` is what Matplotlib prints, not a caption.
        if not re.search(r"(?i)(?<!<)\bfigure\b", "\n".join(near)):
            yield f"the figure of code cell {number} has no caption: start the next text with `*Figure: ...*`"


PLUMBING = {
    "imports": re.compile(r"\s*(?:import |from \S+ import )"),
    "start": re.compile(r".*\b(?:params\.collect|runs\.start|viz\.set_style)\("),
    "trained": re.compile(r".*(?:\.(?:fit|fit_all|used|cached|cached_rows)|\bcached_\w+)\("),
    "stored": re.compile(r".*\b(?:save_\w+|recorded|with_recorded|read_csv|load_\w+|open\w*|splits)\("),
}
"""Lines of a notebook that fetch or put away, by kind: the first that a line matches counts."""
SEEDS = re.compile(r"\s*for .*\bseeds?\b.*:$")


def plumbing(path: Path) -> dict[str, int]:
    """Count the code lines of a notebook by kind: those of `PLUMBING`, `loops`, and `all` of them.

    Blank lines, comments that stand alone and the cell of the parameters do not count. An import that is wrapped counts
    with all its lines. `loops`: a loop over seeds of which nothing but plumbing is inside.
    """
    counts = dict.fromkeys([*PLUMBING, "loops", "all"], 0)
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        if cell["cell_type"] != "code" or "parameters" in cell["metadata"].get("tags", ()):
            continue
        lines = [line for line in _source(cell).splitlines() if line.strip() and not line.lstrip().startswith("#")]
        kinds = _kinds(lines)
        depths = [len(line) - len(line.lstrip()) for line in lines]
        for number in [n for n, line in enumerate(lines) if SEEDS.match(line)]:
            deeper = (depth > depths[number] for depth in depths[number + 1 :])
            inside = range(number + 1, number + 1 + sum(itertools.takewhile(bool, deeper)))
            if all(kinds[n] or SEEDS.match(lines[n]) for n in inside):
                kinds[number] = "loops"
        for kind in ("all" if kind is None else kind for kind in kinds):
            counts[kind] += 1
    counts["all"] = sum(counts.values())
    return counts


def _kinds(lines: list[str]) -> list[str | None]:
    kinds: list[str | None] = []
    wrapped = False
    for line in lines:
        found = next((kind for kind, pattern in PLUMBING.items() if pattern.match(line)), None)
        kinds.append("imports" if wrapped else found)
        wrapped = (wrapped or (found == "imports" and "(" in line)) and ")" not in line
    return kinds


def _source(cell: dict) -> str:
    return "".join(cell["source"])


def _shown(output: dict) -> list[str]:
    """Return the texts of an output; images are left out, whose letters mean nothing."""
    texts = {kind: text for kind, text in output.get("data", {}).items() if kind.startswith("text/")}
    return ["".join(text) for text in [output.get("text", ""), *texts.values()]]
