"""The typed parameters of a notebook, read from the notebook itself and checked before it runs.

A numbered notebook has one code cell with the tag `parameters`, and in it one annotated and commented name per line:

    epochs: int = 30  # passes over the training images

That cell is all there is to declare: YAML files, the command line and `papermill -p` are checked against it.

`papermill.inspect_notebook` is no help here. It silently drops what its pattern does not know: a `Literal["a", "b"]`, a
`|`, and everything that is no parameter. Its import takes seconds, which every kernel would pay.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import inf, isfinite, ulp
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Strict, TypeAdapter, ValidationError

from wsolnb.errors import ParameterError, nearest
from wsolnb.files import read_yaml, repository_root

_SCALARS = {"int": int, "float": float, "str": str, "bool": bool}
_VOCABULARY = "int, float, str, bool, list[...], tuple[...], dict[str, ...], Literal[...] and unions of them with |"
_EXAMPLE = "write one per line, as `epochs: int = 30  # passes over the training images`"

# Ranges, which a type cannot say, by the names that have them; the first line with a name counts. Rules go by name, so
# that a cell stays plain Python and a name means the same in every notebook. Parameters that may be 0 or empty on
# purpose are allowed to be.
_RULES = {
    "0 or more": (0, inf, "literal_epochs *seed* shift num_workers heads *weight_decay steps *_per_class images "
                          "generator_images tuning_images workers"),
    "1 or more": (1, inf, "*epochs *batch_size batch repeats *_images clusters iterations dilations *channels "
                          "ppd_hidden irn_width"),
    "above 0": (ulp(0.0), inf, "*lr rates *scale *scales segmenter_power crf_colour crf_distance"),
    "0 to 1": (0, 1, "body_cue cues context_correlation tau mu_? grid_mu* floors dampings *_threshold momentum "
                     "label_smoothing"),
    "0 or more and below 1": (0, 1 - ulp(0.5), "betas"),
    "2 to 42": (2, 42, "classes"),
    "2 or more": (2, inf, "label_radius walk_radius"),
    "32 or more": (32, inf, "image_size irn_size segmenter_size"),
    "8 to 160": (8, 160, "crf_side"),
}  # fmt: skip
_RANGES = "long_side irn_scale segmenter_scale"
_FILLED = "seeds c*_seeds pair_seeds study_seeds grid_mu_? floors steps dampings dilations scales test_scales"


@dataclass(frozen=True)
class Parameter:
    """A parameter as its notebook declares it: `type` is the annotation, `help` the comment behind it."""

    name: str
    type: str
    default: Any
    help: str

    def check(self, value: Any, source: str = "") -> Any:
        """Return `value` as the declared type. An int becomes a float and a list becomes a tuple; nothing else is
        converted.

        Args:
            value: what was given.
            source: where it was given, for the message.

        Raises:
            ParameterError: the value has another type, or breaks the rule of its name.
        """
        try:
            checked = _adapter(self.type).validate_python(value)
        except ValidationError as error:
            problem = f"parameter {self.name!r} must be {self.type}, not {value!r} ({type(value).__name__})"
            first = error.errors()[0]
            raise ParameterError(_in(source, problem), _remedy(first, self)) from None
        if allowed := self._broken(checked):
            problem = f"parameter {self.name!r} must be {allowed}, not {value!r}"
            raise ParameterError(_in(source, problem), f"change it; the default is {self.default!r} ({self.help})")
        return checked

    def _broken(self, value: Any) -> str:
        """Return what the name's rule allows, if the value breaks it."""
        items = list(value) if isinstance(value, list | tuple) else [value]
        if not items and _named(self.name, _FILLED):
            return "a list of at least one value"
        if items and _named(self.name, _RANGES) and (len(items) != 2 or items[0] > items[1]):
            return "empty, or a range: two numbers, the smaller one first"
        if _named(self.name, "*seeds") and len(set(items)) < len(items):  # an interval would be too narrow
            return "different from each other"
        rules = ((rule, ends) for rule, (*ends, names) in _RULES.items() if _named(self.name, names))
        rule, (low, high) = next(rules, ("", (-inf, inf)))
        numbers = [item for item in items if isinstance(item, int | float)]
        if not all(low <= item <= high for item in numbers):
            return rule
        return "" if all(map(isfinite, numbers)) else "finite"

    def parse(self, text: str) -> Any:
        """Return the value that `text`, as typed on the command line, has for the declared type.

        Raises:
            ParameterError: the text is no such value.
        """
        try:
            value = yaml.load(text, _Numbers)
        except yaml.YAMLError:
            value = text
        problem = ""
        # A text as it was typed, as YAML would drop what looks like a comment; and `name=12` is a fine text.
        for given in (text if isinstance(value, str) else value, text):
            try:
                return self.check(given)
            except ParameterError as error:
                problem = problem or error.problem
        raise ParameterError(problem, f"write `-p {self.name}=...` with a value of that type")


def _named(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


@functools.cache
def _adapter(annotation: str) -> TypeAdapter:
    return TypeAdapter(_type(ast.parse(annotation, mode="eval").body), config=ConfigDict(strict=True))


def _type(node: ast.expr) -> Any:
    """Return the type that an annotation names. Nothing is evaluated: only the words of the vocabulary are known."""
    match node:
        case ast.Name(id=name) if name in _SCALARS:
            return _SCALARS[name]
        case ast.Constant(value=None):
            return None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _type(left) | _type(right)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            return Literal[ast.literal_eval(choices)]
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return list[_type(item)]
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[ast.Name(id="str"), item])):
            return dict[str, _type(item)]
        case ast.Subscript(value=ast.Name(id="tuple"), slice=items):
            items = items.elts if isinstance(items, ast.Tuple) else [items]
            types = tuple(... if isinstance(i, ast.Constant) and i.value is ... else _type(i) for i in items)
            return Annotated[tuple[types], Strict(False)]  # YAML and papermill know lists only
    raise ValueError(ast.unparse(node))


def _remedy(error: Mapping[str, Any], parameter: Parameter) -> str:
    """Return what to do about the first thing that pydantic found wrong."""
    value = error["input"]
    number = re.fullmatch(r"([-+]?\d+)(\.\d*)?[eE]([-+]?)(\d+)", value.strip()) if isinstance(value, str) else None
    if number and error["type"] in ("float_type", "literal_error", "int_type"):
        whole, fraction, sign, exponent = number.groups()
        fraction = fraction if fraction and fraction != "." else ".0"
        return f"write {whole}{fraction}e{sign or '+'}{exponent} in YAML, which reads {value} as text"
    return f"give a value of that type; the default is {parameter.default!r} ({parameter.help})"


class _Numbers(yaml.SafeLoader):
    """YAML that also reads `1e-4` as a number, for the command line."""


_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Numbers.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*"-+0123456789"])


# Notebooks


def notebook_path(notebook: str | os.PathLike[str]) -> Path:
    """Return the path of a notebook, given as its name (`03_cam_and_tscam`) or as a path.

    Raises:
        ParameterError: there is no such notebook; the nearest name is given.
    """
    path = Path(notebook)
    if path.suffix == ".ipynb" and path.is_file():
        return path.resolve()
    folder = repository_root() / "notebooks"
    path = folder / f"{path.name.removesuffix('.ipynb')}.ipynb"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.ipynb"))
        remedy = f"name one of: {', '.join(known)}" if known else "start in the repository, or set WSOLNB_ROOT to it"
        raise ParameterError(f"there is no notebook {str(notebook)!r} in {folder}{nearest(path.stem, known)}", remedy)
    return path


def notebook_parameters(notebook: str | os.PathLike[str]) -> dict[str, Parameter]:
    """Return the parameters that a notebook declares, in its order. Nothing of the notebook is executed.

    Args:
        notebook: its name or path.

    Raises:
        ParameterError: there is no such notebook, it has no cell or several cells with the tag `parameters`, or a line
            of that cell is no annotated, commented assignment of a plain value of its type.
    """
    path = notebook_path(notebook)
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, TypeError):
        raise ParameterError(f"{path} is no notebook", "restore it, or save it again from JupyterLab") from None
    tagged = [c for c in cells if c["cell_type"] == "code" and "parameters" in c["metadata"].get("tags", [])]
    if len(tagged) != 1:
        problem = f"{path.name} has {len(tagged)} code cells with the tag `parameters`"
        raise ParameterError(problem, "give exactly one cell this tag (JupyterLab: Property Inspector)")
    return _parse("".join(tagged[0]["source"]), path.name)


def _parse(source: str, name: str) -> dict[str, Parameter]:
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ParameterError(f"the parameters cell of {name} is no Python: {error}", _EXAMPLE) from None
    lines = source.encode().split(b"\n")  # the columns of `ast` count bytes
    found: dict[str, Parameter] = {}
    for statement in statements:
        if isinstance(statement, ast.ImportFrom) and statement.module in ("typing", "__future__"):
            continue  # Literal has to come from somewhere
        where = f"the parameters cell of {name}, line {statement.lineno}"
        value = getattr(statement, "value", None)
        named = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if not named or not value or value.lineno != statement.end_lineno:  # only a long list of choices may span lines
            raise ParameterError(f"{where}: `{ast.unparse(statement)}` declares no parameter", _EXAMPLE)
        parameter = statement.target.id
        code, _, comment = lines[statement.end_lineno - 1][statement.end_col_offset :].decode().partition("#")
        if code.strip() or not comment.strip("# "):
            raise ParameterError(f"{where}: {parameter!r} has no comment, or shares its line", _EXAMPLE)
        if parameter in found:
            raise ParameterError(f"{where}: {parameter!r} is declared twice", _EXAMPLE)
        annotation = ast.unparse(statement.annotation)
        try:
            _type(statement.annotation)
        except (ValueError, TypeError):
            raise ParameterError(f"{where}: the type {annotation} is not known", f"use {_VOCABULARY}") from None
        try:
            default = ast.literal_eval(value)
        except ValueError:
            problem = f"{where}: the default `{ast.unparse(value)}` is no plain value"
            raise ParameterError(problem, "write a number, text, list or dictionary, and compute below") from None
        found[parameter] = Parameter(parameter, annotation, default, comment.lstrip("# ").strip())
        found[parameter].check(default, where)
    return found


# Values


def check_parameters(notebook: str | os.PathLike[str], values: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """Return `values` as the types that the notebook declares.

    papermill itself only warns about a name that the notebook does not know, so this comes before execution.

    Args:
        notebook: its name or path.
        values: some of its parameters.
        source: where they were written, for the message.

    Raises:
        ParameterError: a name is unknown (the nearest one is given), or a value has another type.
    """
    declared = notebook_parameters(notebook)
    for name in values:
        if name not in declared:
            problem = f"{notebook_path(notebook).stem} has no parameter {name!r}{nearest(str(name), declared)}"
            raise ParameterError(_in(source, problem), f"use one of: {', '.join(declared)}")
    return {name: declared[name].check(value, source) for name, value in values.items()}


def load_parameter_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the names and values of a YAML file of parameters; an empty file has none.

    Raises:
        ParameterError: the file is missing, is no YAML, names a parameter twice or holds no names with values.
    """
    path = Path(path)
    try:
        values = read_yaml(path, _Unique)
    except OSError as error:
        raise ParameterError(f"{path} cannot be read: {error.strerror}", "check the name of the file") from None
    except UnicodeDecodeError:
        raise ParameterError(f"{path} is no UTF-8 text", "save it as UTF-8") from None
    except ValueError as error:
        raise ParameterError(f"{path} is no YAML: {error}", "write one `name: value` per line") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ParameterError(f"{path} holds no names with values", "write one `name: value` per line")
    return values


class _Unique(yaml.SafeLoader):
    """YAML in which a name that is written twice is an error, not a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is written twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_overrides(overrides: Sequence[str]) -> dict[str, str]:
    """Return the names and texts of `name=value` arguments. `Parameter.parse` converts a text to the declared type.

    Raises:
        ParameterError: an argument is no `name=value`, or a name is given twice.
    """
    found: dict[str, str] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ParameterError(f"`-p {override}` is no name=value", "write it as `-p epochs=3`")
        if name.strip() in found:
            raise ParameterError(f"`-p {name.strip()}=...` is given twice", "give it once")
        found[name.strip()] = text.strip()
    return found


def collect(notebook: str, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the declared parameters have in a running notebook.

    To be called right after the parameters cell: `parameters = params.collect("03_cam_and_tscam", globals())`. This
    gives somebody who runs `papermill` without `wsolnb` the same clear errors.

    Raises:
        ParameterError: a value has another type than declared, a declared name is missing, or papermill has passed a
            name that is not declared.
    """
    declared = notebook_parameters(notebook)
    check_parameters(notebook, dict.fromkeys(_injected(namespace.get("In", ())) - set(declared)))
    for name in declared:
        if name not in namespace:
            raise ParameterError(f"{name!r} has no value", "run the cell with the parameters first")
    return {name: parameter.check(namespace[name]) for name, parameter in declared.items()}


def _injected(history: Sequence[str]) -> set[str]:
    """Return the names that papermill has passed: it puts a cell that starts with this comment into the notebook."""
    cells = [ast.parse(cell) for cell in history if cell.startswith("# Parameters\n")]
    targets = (s.targets[0] for cell in cells for s in cell.body if isinstance(s, ast.Assign))
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _in(source: str, problem: str) -> str:
    return f"{source}: {problem}" if source else problem
