"""Solutions of the exercises: their form, and each one run alone, its outputs equal to the stored ones.

They are run one after the other in one process, which spares each of them the start and the imports of a kernel. What
nbval compares is compared, and in the same way; `make test-full` runs nbval, too.
"""

import contextlib
import json
import re
from pathlib import Path

import inprocess
import nbformat
import pytest
from checks import exercises, solution_problems
from prose import ROOT, unsourced
from sample import Repository
from test_notebooks import nbval

from wsolnb.notebook import params, pipeline

LESSONS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))}
SOLUTIONS = {path.stem: path for path in sorted((ROOT / "notebooks/solutions").glob("*.ipynb"))}
NOT_COMPARED = {"image/png", "image/jpeg", "application/vnd.jupyter.widget-view+json"}
SANITIZE = re.findall(r"(?m)^regex: (.*)\n^replace: ?(.*)$", Path(__file__).with_name("sanitize.cfg").read_text())


each = pytest.mark.parametrize("path", SOLUTIONS.values(), ids=SOLUTIONS)


def test_every_exercise_has_a_solution():
    taught = {name for name, path in LESSONS.items() if exercises(json.loads(path.read_text("utf-8"))["cells"])}
    assert taught == set(LESSONS)
    assert set(SOLUTIONS) == taught


@each
def test_the_form_of_solutions(path):
    found = solution_problems(path, LESSONS[path.stem])
    assert not found, "\n".join([f"solutions/{path.name}:", *found])


@each
def test_every_number_in_solutions_has_a_source(path):
    assert unsourced(path) == []


@pytest.mark.slow
@each
def test_solutions_give_their_stored_outputs(path, monkeypatch):
    monkeypatch.setenv("WSOLNB_ROOT", str(ROOT))
    differences = list(differing(nbformat.read(path, as_version=4).cells, path.parent))
    assert not differences, "\n".join(differences)


@pytest.mark.slow
@pytest.mark.long
def test_solutions_pass_nbval():
    done = nbval(*SOLUTIONS.values(), root=ROOT)
    assert done.returncode == 0, "\n".join((done.stdout + done.stderr).splitlines()[-80:])


def test_solutions_are_no_lessons(monkeypatch):
    """No run, no profile and no parameter file takes them for a step of its own."""
    monkeypatch.setenv("WSOLNB_ROOT", str(ROOT))
    assert {step.notebook for step in pipeline.plan("mini")} == set(LESSONS)
    for name in SOLUTIONS:
        assert params.notebook_path(name).parent.name == "notebooks"


def differing(cells, folder):
    """Run the cells of a notebook in a folder; yield each difference from the stored outputs that nbval would find."""
    with contextlib.chdir(folder), inprocess.started() as shell:
        codes = (cell for cell in cells if cell.cell_type == "code")
        for number, cell in enumerate(codes, 1):
            outputs, raised = inprocess.run_cell(shell, cell.source)
            if raised:
                yield f"cell {number} raised {outputs[-1].ename}: {outputs[-1].evalue}"
                return
            if "nbval-ignore-output" in cell.metadata.get("tags", ()):
                continue
            stored, new = compared(cell.outputs), compared(outputs)
            if stored != new:
                yield f"cell {number} has\n{new}\nand stored is\n{stored}"


def compared(outputs):
    """Return what nbval compares of a cell's outputs: the text of each kind, in its order."""
    found = {}
    for output in outputs:
        texts = {output.name: output.text} if output.output_type == "stream" else output.get("data", {})
        for kind, text in texts.items():
            if kind not in NOT_COMPARED:
                found[kind] = found.get(kind, "") + sanitized("".join(text))
    return found


def sanitized(text):
    for pattern, replacement in SANITIZE:
        text = re.sub(pattern, replacement, text)
    return text.rstrip()


# The checks themselves


def code(source, count, text, tags=()):
    output = nbformat.v4.new_output("stream", name="stdout", text=text)
    metadata = {"tags": [*tags]} if tags else {}
    return nbformat.v4.new_code_cell(source, execution_count=count, outputs=[output], metadata=metadata)


def text(source):
    return nbformat.v4.new_markdown_cell(source)


LESSON = "## Exercises\n\n[Solutions](solutions/03_cam.ipynb)\n\n1. Add one\n   and one.\n2. Take one away."


@pytest.fixture
def lesson(tmp_path):
    return Repository(tmp_path).write("03_cam", [text("# 03 · CAM: maps"), text(LESSON)])


def good():
    return [
        text("# Solutions: 03 · CAM\n\n[The lesson](../03_cam.ipynb). Takes 3 seconds."),
        text("## Exercise 1: a sum\n\nAdd one and one."),
        code("print(1 + 1)", 1, "2\n"),
        text("The sum is two."),
        text("## Exercise 2: a difference\n\nTake one away."),
        code("print(1 - 1)", 2, "0\n"),
        text("Nothing is left."),
    ]


def check(lesson, cells):
    (lesson.parent / "solutions").mkdir(exist_ok=True)
    written = Repository(lesson.parent / "other").write("03_cam", cells)
    return solution_problems(written.rename(lesson.parent / "solutions/03_cam.ipynb"), lesson)


def test_good_solutions_have_no_problem(lesson):
    assert check(lesson, good()) == []


@pytest.mark.parametrize(
    ("position", "cell", "problem"),
    [
        (0, text("# Solutions: 04 · X\n\n[The lesson](../03_cam.ipynb). Takes 3 seconds."), "`# Solutions: 03 · `"),
        (0, text("# Solutions: 03 · CAM\n\n[The lesson](../04_cam.ipynb). Takes 3 seconds."), "no link to the lesson"),
        (0, text("# Solutions: 03 · CAM\n\n[The lesson](../03_cam.ipynb)."), "the measured seconds"),
        (1, text("## Exercise 3: a sum"), "for [3, 2], and the lesson has 2 exercises"),
        (2, code("print(1 + 1)", 1, "2\n", ["parameters"]), "tagged `parameters`"),
        (2, nbformat.v4.new_code_cell("2", execution_count=1), "exercise 1 shows no output"),
        (3, code("print(2)", 2, "2\n"), "exercise 1 does not end with what its outputs show"),
        (5, code("print(2)", 3, "2\n"), "not run once each from top to bottom"),
        (5, code("1\n" * 21, 2, "2\n"), "has 21 lines of at most 20"),
        (5, code("open('/tmp/x')", 2, "2\n"), "path of one machine"),
    ],
)
def test_each_problem_is_found(lesson, position, cell, problem):
    cells = good()
    cells[position] = cell
    assert any(problem in found for found in check(lesson, cells)), check(lesson, cells)


def test_a_lesson_without_a_link_to_its_solutions_is_found(tmp_path):
    lesson = Repository(tmp_path).write(
        "03_cam", [text("# 03"), text(LESSON.replace("[Solutions]", "").replace("(", ""))]
    )
    assert check(lesson, good()) == ["the exercises of the lesson have no link to solutions/03_cam.ipynb"]


def test_a_difference_is_found_and_what_may_differ_is_not(tmp_path):
    cells = [
        code("import time; print(f'{time.time():.1f} s')", 1, "1.5 s\n"),
        code("print(time.time())", 2, "2\n", ["nbval-ignore-output"]),
        code("print(3)", 3, "4\n"),
        code("1 / 0", 4, "0\n"),
    ]
    first, second = differing(cells, tmp_path)
    assert first.startswith("cell 3 has\n{'stdout': '3'}")
    assert second == "cell 4 raised ZeroDivisionError: division by zero"
