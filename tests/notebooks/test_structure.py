"""The form of the stored notebooks, and the parameters that the profiles give them. Nothing is executed."""

import fnmatch
import re
from pathlib import Path

import nbformat
import pytest
from checks import plumbing, problems
from papermill import inspect_notebook
from sample import Repository

from wsolnb.errors import ParameterError
from wsolnb.notebook import params, pipeline

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
PROFILES = sorted(path.parent.name for path in (ROOT / "params").glob("*/pipeline.yaml"))
FILES = sorted(path for path in (ROOT / "params").glob("*/*.yaml") if (ROOT / f"notebooks/{path.stem}.ipynb").exists())


@pytest.fixture
def root(monkeypatch):
    monkeypatch.setenv("WSOLNB_ROOT", str(ROOT))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_form_of_a_notebook(path, root):
    found = problems(path)
    assert not found, "\n".join([f"{path.name}:", *found])


def test_at_most_a_tenth_of_the_notebooks_is_plumbing():
    """Imports do not count: they say what a lesson uses, and are six hundredths more."""
    counts = {path.stem: plumbing(path) for path in NOTEBOOKS}
    apart = ("all", "imports")
    counted = {name: sum(n for kind, n in one.items() if kind not in apart) for name, one in counts.items()}
    lines = {name: one["all"] for name, one in counts.items()}
    report = [f"{name:22s} {counted[name]:3d} of {lines[name]:3d} lines: {counts[name]}" for name in counts]
    share = sum(counted.values()) / sum(lines.values())
    assert share <= 0.1, "\n".join([f"{share:.1%}", *report])


def test_plumbing_is_counted_line_by_line(tmp_path):
    cells = [
        "import os\nfrom a import (\n    b,\n    c,\n)\n\n# a comment",
        "trained = {}\nfor number in seeds:\n    trained[number] = pair.fit(run, number)\nprint(1)",
        "for number in seeds:\n    print(number)\nrun.save_table(table, 'x')",
    ]
    counts = plumbing(Repository(tmp_path).notebook("03_cam", *cells))
    # Besides, `sample.START` has an import, `params.collect` and `runs.start`.
    expected = {"imports": 1 + 5, "start": 2, "trained": 1, "loops": 1, "stored": 1}
    assert {kind: counts[kind] for kind in expected} == expected
    assert counts["all"] == 12 + 3


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_is_in_order(profile, root):
    assert pipeline.plan(profile)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_parameter_file_fits_its_notebook(path, root):
    params.check_parameters(path.stem, params.load_parameter_file(path), str(path))


@pytest.mark.parametrize(
    ("name", "value"),
    [("seeds", []), ("protocol", "croped"), ("cam_epochs", 0), ("precision", "fp16"), ("output_stride", 4)],
)
def test_a_wrong_choice_or_range_is_refused_before_the_run(name, value, root):
    with pytest.raises(ParameterError, match=f"{name!r} must be .*\n.*the default is"):
        params.check_parameters("03_cam_and_tscam", {name: value})
    values = {name: parameter.default for name, parameter in params.notebook_parameters("03_cam_and_tscam").items()}
    with pytest.raises(ParameterError, match=f"{name!r} must be"):
        params.collect("03_cam_and_tscam", values | {name: value})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_reads_the_same_of_what_it_can_read(path, root):
    declared = params.notebook_parameters(path)
    for name, found in inspect_notebook(path).items():
        assert (found["help"], found["inferred_type_name"]) == (declared[name].help, declared[name].type), name
    # It knows no Literal and no union; all else it has to see, so that its warnings of unknown names stay few.
    assert {name for name, p in declared.items() if not re.search(r"Literal|\|", p.type)} <= set(inspect_notebook(path))


def test_every_rule_is_of_some_parameter(root):
    names = {name for path in NOTEBOOKS for name in params.notebook_parameters(path)}
    for patterns in (params._FILLED, *(names_ for *_, names_ in params._RULES.values())):
        for pattern in patterns.split():
            assert fnmatch.filter(names, pattern), pattern


def test_every_notebook_is_a_step_of_the_default_profile(root):
    if NOTEBOOKS:
        assert {step.notebook for step in pipeline.plan("mini")} == {path.stem for path in NOTEBOOKS}


def test_the_launcher_begins_with_links_to_everything():
    """`make lab` opens notebook 00, whose second cell is the way to all others."""
    assert "/lab/tree/00_overview.ipynb" in (ROOT / "Makefile").read_text("utf-8")
    cells = nbformat.read(ROOT / "notebooks/00_overview.ipynb", as_version=4).cells
    others = {path.name for path in NOTEBOOKS} - {"00_overview.ipynb"}
    linked = set(re.findall(r"\]\(([^)#]+)\)", cells[1].source))
    assert linked == others | {"glossary.md", "lecturer.md"}


def test_the_lecturers_page_has_a_path_to_every_lesson():
    text = (ROOT / "notebooks/lecturer.md").read_text("utf-8")
    assert {path.name for path in NOTEBOOKS} <= set(re.findall(r"\]\(([^)#]+)\)", text))
    assert "](notebooks/lecturer.md)" in (ROOT / "README.md").read_text("utf-8")


# The checks themselves

OPENING = "# Title\nWhich map is best? Read 02_metrics first. 3 minutes on a CPU. Downloads nothing."
START = 'from wsolnb.notebook import params, runs\nparameters = params.collect("03_cam", globals())'


def code(source, count, *outputs, tags=()):
    metadata = {"tags": [*tags]} if tags else {}
    return nbformat.v4.new_code_cell(source, execution_count=count, outputs=[*outputs], metadata=metadata)


def text(source):
    return nbformat.v4.new_markdown_cell(source)


def stream(text, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


def shown(**data):
    data = {kind.replace("_", "/").replace("svg", "svg+xml"): content for kind, content in data.items()}
    return nbformat.v4.new_output("display_data", data=data)


IMAGE = shown(image_png="aGVsbG8=", text_plain="<Figure size 640x480 with 1 Axes>")


@pytest.fixture
def good():
    parameters = 'run_folder: str = "outputs/mini"  # where results go'
    return [
        text(OPENING),
        code(parameters, 1, tags=["parameters"]),
        code(START, 2),
        code("print(1)", 3, stream("1\n")),
        code("plot()", 4, IMAGE),
        text("*Figure: what is seen.*\n\n![a bird](bird.png)"),
        text("## Three exercises\n1. ..."),
    ]


def check(tmp_path, cells, name="03_cam"):
    return problems(Repository(tmp_path).write(name, cells))


def test_a_good_notebook_has_no_problem(tmp_path, good):
    assert check(tmp_path, good) == []


@pytest.mark.parametrize(
    ("position", "cell", "problem"),
    [
        (0, text(OPENING.replace("?", ".")), "the question it answers"),
        (0, text(OPENING.replace("Read 02_metrics first.", "")), "what to read first"),
        (0, text(OPENING.replace("3 minutes on a CPU.", "")), "measured minutes"),
        (0, text(OPENING.replace("Downloads nothing.", "")), "what it downloads"),
        (0, code("1", 0), "does not say the question"),
        (1, code("a: int = 1  # a", 1), "0 code cells with the tag `parameters`"),
        (1, code("a: int = 1  # a", 1, tags=["parameters"]), "no parameter `run_folder`"),
        (1, code("a: int = 1  # 0 = all", 1, tags=["parameters"]), "the comment of 'a' holds a `=`"),
        (2, code(START.replace("03_cam", "02_cam"), 2), "calls itself '02_cam'"),
        (3, code("print(1)", 5), "not run once each from top to bottom"),
        (3, code("print(1)", None), "not run once each from top to bottom"),
        (3, code("a\n" * 21, 3), "code cell 3 has 21 lines of at most 20"),
        (3, code("viz.set_style()\n" + "a\n" * 20, 3), "code cell 3 has 21 lines of at most 20"),
        (3, code("figure, axis = plt.subplots()\n" + "a\n" * 30, 3), "code cell 3 has 31 lines of at most 30"),
        (3, code(" ", 3), "code cell 3 is empty"),
        (3, code("x", 3, nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])), "stores an error"),
        (3, code("x", 3, stream("warning", "stderr")), "stores stderr"),
        (3, code("x", 3, shown(image_svg="<svg/>")), "stores an SVG"),
        (3, code("x", 3, shown(text_plain="PosixPath('/home/me/x.json')")), "path of one machine: /home/me"),
        (3, code("open('/tmp/x')", 3), "path of one machine: /tmp/x"),
        (3, code("x", 3, stream("x" * 900_000)), "keep stored outputs below"),
        (5, text("What is seen."), "figure of code cell 4 has no caption"),
        (5, text("*Figure: a bird.* ![](bird.png)"), "no alternative text"),
        (5, text('*Figure: a bird.* <img src="bird.png">'), "no alternative text"),
        (6, text("## Summary"), "does not end with a section of exercises"),
        (6, code("x", 5), "does not end with a section of exercises"),
    ],
)
def test_each_problem_is_found(tmp_path, good, position, cell, problem):
    good[position] = cell
    assert any(problem in found for found in check(tmp_path, good)), check(tmp_path / "again", good)


def test_a_parameters_cell_may_be_long(tmp_path, good):
    good[1].source += "".join(f"\nseed_{n}: int = 0  # one more" for n in range(31))
    assert check(tmp_path, good) == []


def test_outputs_that_nbval_ignores_may_differ(tmp_path, good):
    good[3] = code("train()", 3, stream("10%|", "stderr"), tags=["nbval-ignore-output"])
    assert check(tmp_path, good) == []
