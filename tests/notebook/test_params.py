import subprocess
import sys
from pathlib import Path

import pytest

from wsolnb.data import aviary
from wsolnb.errors import ParameterError
from wsolnb.notebook import params

sys.path.append(str(Path(__file__).parents[1] / "notebooks"))
from sample import PARAMETERS, Repository

TYPED = """\
from typing import Literal
count: int = 3  # a number
rate: float = 1  # an int is a float too
flag: bool = False  # yes or no
name: str = "cam"  # a text
root: str | None = None  # a text or nothing
levels: list[float] = [0.3, 0.5]  # numbers
size: tuple[int, int] = (224, 224)  # height and width
shares: tuple[float, ...] = (0.5,)  # any number of them
weights: dict[str, float] = {"a": 1.0}  # by name
device: Literal["auto", "cpu"] = "auto"  # one of these  # and this
mixed: int | float | str = -1  # several types"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.delenv("WSOLNB_ROOT", raising=False)
    repository = Repository(tmp_path)
    monkeypatch.chdir(repository.root / "notebooks")
    repository.notebook("03_cam", parameters=TYPED)
    return repository


def test_parameters_are_read_in_order_with_type_default_and_help(repository):
    declared = params.notebook_parameters("03_cam")
    assert list(declared)[:3] == ["count", "rate", "flag"]
    assert declared["size"] == params.Parameter("size", "tuple[int, int]", (224, 224), "height and width")
    assert declared["mixed"].default == -1
    assert declared["device"].help == "one of these  # and this"
    assert params.notebook_parameters(repository.root / "notebooks" / "03_cam.ipynb") == declared
    assert params.notebook_parameters("notebooks/03_cam.ipynb") == declared  # as completed by a shell elsewhere


def test_a_long_list_of_choices_may_span_lines(repository):
    text = 'studies: list[\n    Literal["pairs", "a >= b #1"]\n] = []  # to train here, größer\nseed: int = 0  # of all'
    declared = params.notebook_parameters(repository.notebook("01_data", parameters=text))
    assert declared["studies"].help == "to train here, größer"
    assert declared["studies"].check(["a >= b #1"]) == ["a >= b #1"]
    assert list(declared) == ["studies", "seed"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epochs = 3  # no type", "declares no parameter"),
        ("epochs: int = 3", "has no comment"),
        ("epochs: int = 3  #", "has no comment"),
        ('name: str = "a # b"', "has no comment"),
        ("epochs: int = 0  # of a training", "must be 1 or more, not 0"),
        ('name: Literal["a", "b"] = "c"  # no choice', "not 'c'"),
        ("name: \"__import__('os')\" = 1  # executed", "not known"),
        ("name: list[\"__import__('os')\"] = []  # executed", "not known"),
        ("epochs: int = 2 + 1  # computed", "no plain value"),
        ("epochs: int = os.getpid()  # executed", "no plain value"),
        ("epochs: Path = 3  # not in the vocabulary", "type Path is not known"),
        ("epochs: list[Path] = 3  # not in the vocabulary", "type list[Path] is not known"),
        ("epochs: dict[int, str] = {}  # JSON knows no such keys", "not known"),
        ("epochs: int = 3.5  # wrong default", "must be int, not 3.5"),
        ("epochs: int = True  # wrong default", "must be int, not True"),
        ("epochs: int  # no value", "declares no parameter"),
        ("epochs: int = 3; lr: float = 1.0  # two in a line", "shares its line"),
        ("epochs: int = 3  # one\nepochs: int = 4  # two", "declared twice"),
        ("size: list[int] = [  # over\n  1]", "declares no parameter"),
        ("import os", "declares no parameter"),
        ("%matplotlib inline", "is no Python"),
    ],
)
def test_a_parameters_cell_out_of_order_is_an_error(repository, line, message):
    path = repository.notebook("01_data", parameters=line)
    with pytest.raises(ParameterError, match="01_data") as error:
        params.notebook_parameters(path)
    assert message in str(error.value)


def test_nothing_of_the_notebook_is_executed(repository, tmp_path):
    text = f"x: int = open({str(tmp_path / 'made')!r}, 'w')  # code\ny: __import__('os') = 1  # code"
    with pytest.raises(ParameterError):
        params.notebook_parameters(repository.notebook("01_data", parameters=text))
    assert not (tmp_path / "made").exists()


def test_exactly_one_cell_has_the_tag(repository):
    import nbformat

    def cell(*tags):
        return nbformat.v4.new_code_cell("a: int = 1  # a", metadata={"tags": [*tags]})

    for cells, count in (([cell()], 0), ([cell("parameters"), cell("parameters")], 2)):
        with pytest.raises(ParameterError, match=f"01_data.ipynb has {count} code cells"):
            params.notebook_parameters(repository.write("01_data", cells))
    (repository.root / "notebooks/01_data.ipynb").write_text("{")
    with pytest.raises(ParameterError, match="is no notebook"):
        params.notebook_parameters("01_data")


def test_an_unknown_notebook_names_the_nearest(repository):
    with pytest.raises(ParameterError, match=r"no notebook '03_can'.*did you mean '03_cam'"):
        params.notebook_parameters("03_can")


def test_an_unknown_parameter_names_the_nearest(repository):
    with pytest.raises(ParameterError, match=r"p.yaml: 03_cam has no parameter 'cuont' \(did you mean 'count'\?\)"):
        params.check_parameters("03_cam", {"cuont": 1}, "p.yaml")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("count", 5, 5),
        ("rate", 2, 2.0),
        ("root", None, None),
        ("levels", [1, 0.5], [1.0, 0.5]),
        ("size", [3, 4], (3, 4)),
        ("size", (3, 4), (3, 4)),
        ("shares", [], ()),
        ("weights", {"b": 2}, {"b": 2.0}),
        ("device", "cpu", "cpu"),
        ("mixed", "x", "x"),
    ],
)
def test_values_of_the_declared_type_pass(repository, name, value, expected):
    checked = params.check_parameters("03_cam", {name: value})[name]
    assert (checked, type(checked)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", True),
        ("count", 1.0),
        ("count", "1"),
        ("rate", True),
        ("rate", "0.1"),
        ("rate", None),
        ("flag", 1),
        ("flag", "true"),
        ("name", 3),
        ("levels", 0.3),
        ("levels", [True]),
        ("levels", (0.1,)),
        ("size", [1, 2, 3]),
        ("size", [1.5, 2]),
        ("weights", {1: 2.0}),
        ("device", "cuda"),
        ("root", False),
    ],
)
def test_values_of_another_type_are_errors_that_show_both(repository, name, value):
    with pytest.raises(ParameterError) as error:
        params.check_parameters("03_cam", {name: value})
    declared = params.notebook_parameters("03_cam")[name].type
    assert f"{name!r} must be {declared}, not {value!r} ({type(value).__name__})" in str(error.value)


@pytest.mark.parametrize(
    ("declaration", "good", "wrong", "allowed"),
    [
        ("seeds: list[int] = [0]", [[3, 4]], [[]], "a list of at least one value"),
        ("seeds: list[int] = [0]", [[0]], [[0, -1]], "0 or more"),
        ("scored_seeds: list[int] = []", [[], [1]], [[-1]], "0 or more"),
        ("cam_epochs: int = 7", [1], [0, -3], "1 or more"),
        ("literal_epochs: int = 1", [0, 2], [-1], "0 or more"),
        ("generator_images: int = 0", [0, 5], [-1], "0 or more"),
        ("val_images: int = 300", [1], [0], "1 or more"),
        ("batch_size: int = 16", [1], [0], "1 or more"),
        ("irn_batch_size: int = 16", [1], [0], "1 or more"),
        ("image_size: int = 112", [32], [31], "32 or more"),
        ("classes: int = 12", [2, aviary.MAX_CLASSES], [1, aviary.MAX_CLASSES + 1], "2 to 42"),
        ("head_lr: float | None = None", [None, 1e-9], [0.0, float("nan")], "above 0"),
        ("rates: list[float] = [0.1]", [[0.2]], [[0.2, 0.0]], "above 0"),
        ("body_cue: float = 0.2", [0.0, 1.0], [-0.1, 1.1], "0 to 1"),
        (
            "long_side: list[int] = []",
            [[], [300, 400], [300, 300]],
            [[300], [400, 300], [1, 2, 3]],
            "empty, or a range: two numbers, the smaller one first",
        ),
        (
            "irn_scale: list[float] = []",
            [[], [0.5, 1.5]],
            [[1.5, 0.5]],
            "empty, or a range: two numbers, the smaller one first",
        ),
        (
            "betas: tuple[float, float] = (0.9, 0.98)",
            [(0.9, 0.999), (0.0, 0.5)],
            [(0.9, 1.5), (-0.1, 0.9), (0.9, 1.0)],
            "0 or more and below 1",
        ),
    ],
)
def test_a_value_out_of_the_range_of_its_name_is_an_error(repository, declaration, good, wrong, allowed):
    name = declaration.partition(":")[0]
    notebook = repository.notebook("01_data", parameters=f"{declaration}  # so far")
    for value in good:
        assert params.check_parameters(notebook, {name: value}) == {name: value}
    for value in wrong:
        for refuse in (params.check_parameters, params.collect):
            with pytest.raises(ParameterError, match=rf"'{name}' must be {allowed}, not .*\n.*default is .*\(so far\)"):
                refuse(notebook, {name: value})


@pytest.mark.parametrize(
    ("text", "remedy"), [("1e-4", "1.0e-4"), ("2.5E4", "2.5e+4"), ("-3e+2", "-3.0e+2"), ("[1e-4]", "1.0e-4")]
)
def test_numbers_that_yaml_reads_as_text_come_with_their_spelling(repository, text, remedy):
    name = "levels" if text.startswith("[") else "rate"
    values = params.load_parameter_file(repository.yaml("mini/03_cam", f"{name}: {text}\n"))
    with pytest.raises(ParameterError, match="in YAML") as error:
        params.check_parameters("03_cam", values)
    assert f"write {remedy} in YAML" in error.value.remedy
    values = params.load_parameter_file(repository.yaml("mini/03_cam", f"rate: {remedy}\n"))
    assert isinstance(params.check_parameters("03_cam", values)["rate"], float)


def test_parameter_files(repository):
    assert params.load_parameter_file(repository.yaml("mini/a", "")) == {}
    assert params.load_parameter_file(repository.yaml("mini/a", "count: 3\nsize: [1, 2]")) == {
        "count": 3,
        "size": [1, 2],
    }
    for text, message in (
        ("- 1", "no names"),
        ("1: 2", "no names"),
        ("a: [", "is no YAML"),
        ("a: 1\na: 2", "'a' is written twice"),
    ):
        with pytest.raises(ParameterError, match=message):
            params.load_parameter_file(repository.yaml("mini/a", text))
    with pytest.raises(ParameterError, match="cannot be read"):
        params.load_parameter_file(repository.root / "params/none.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("count=3", 3),
        ("rate=1e-4", 1e-4),
        ("rate=3", 3.0),
        ("flag=true", True),
        ("name=12", "12"),
        ("name=null", "null"),
        ("name=a #b", "a #b"),
        ("name=", ""),
        ("name=a=b", "a=b"),
        ("root=../data/pets", "../data/pets"),
        ("root=null", None),
        ("levels=[1e-4, 2]", [1e-4, 2.0]),
        ("size=[1, 2]", (1, 2)),
        ("weights={a: 1e3}", {"a": 1000.0}),
        ("device=cpu", "cpu"),
    ],
)
def test_overrides_become_the_declared_type(repository, override, expected):
    [(name, text)] = params.parse_overrides([override]).items()
    value = params.notebook_parameters("03_cam")[name].parse(text)
    assert (value, type(value)) == (expected, type(expected))


def test_wrong_overrides(repository):
    for override in ("count=x", "count=1.5", "flag=1", "size=1", "device=tpu"):
        [(name, text)] = params.parse_overrides([override]).items()
        with pytest.raises(ParameterError, match=f"'{name}' must be"):
            params.notebook_parameters("03_cam")[name].parse(text)
    for overrides in (["epochs"], ["=3"], ["a b=3"], ["a=1", "a=2"]):
        with pytest.raises(ParameterError):
            params.parse_overrides(overrides)


def test_collect_returns_the_current_values_checked(repository):
    namespace = {name: p.default for name, p in params.notebook_parameters("03_cam").items()} | {"other": 1}
    assert params.collect("03_cam", namespace | {"count": 7, "size": [1, 2]}) == {
        **{name: namespace[name] for name in namespace if name != "other"},
        "count": 7,
        "size": (1, 2),
        "rate": 1.0,
    }
    with pytest.raises(ParameterError, match="'rate' must be float, not '1e-4'"):
        params.collect("03_cam", namespace | {"rate": "1e-4"})
    with pytest.raises(ParameterError, match="'count' has no value"):
        params.collect("03_cam", {})


def test_collect_sees_unknown_names_that_papermill_passed(repository):
    namespace = {name: p.default for name, p in params.notebook_parameters("03_cam").items()}
    history = ["", "import os", "# Parameters\ncount = 3\nlevel = 1\n"]
    with pytest.raises(ParameterError, match=r"no parameter 'level'.*did you mean 'levels'"):
        params.collect("03_cam", {**namespace, "In": history})
    params.collect("03_cam", {**namespace, "In": [*history[:2], "# Parameters\ncount = 3\n"]})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["-r", "lr", "1e-4"], "write 1.0e-4 in YAML"),
        (["-p", "epochs", "0"], "'epochs' must be 1 or more, not 0"),
        (["-p", "mode", "croped"], "'mode' must be Literal['resize', 'crop'], not 'croped'"),
        (["-p", "mode", "crop"], None),
    ],
)
def test_papermill_alone_gets_the_same_errors(repository, arguments, error):
    choice = 'from typing import Literal\n\nmode: Literal["resize", "crop"] = "resize"  # of images\n'
    repository.notebook("01_data", "print('mode is', mode)", parameters=choice + PARAMETERS)
    command = [sys.executable, "-m", "papermill", "01_data.ipynb", "out.ipynb", "-k", "python3", *arguments]
    done = subprocess.run(command, cwd=repository.root / "notebooks", capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) == (error is None)
    assert (error or "") in done.stderr
    assert error or "mode is crop" in (repository.root / "notebooks/out.ipynb").read_text()
