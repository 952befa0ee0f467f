"""What a result depends on, read off the code that makes it: the keys of the cache.

    key = key_of(build)        # of a function that is about to be run, or of any value
    changed = differences(old, key)

The key of a builder holds everything that can change what it makes: the values that it captures (arguments, globals of
a notebook, closures), the data sets among them with a fingerprint of their files, the trained artefacts that it reads,
the code that it can run, and the versions of the numeric libraries. Nothing has to be listed by hand, so that nothing
can be forgotten. Comments and docstrings do not count.

The code that can run is found in the syntax tree: the module of a builder, and every module of this package that it
imports, and so on. A name that a package re-exports leads to the module that defines it, so that a change in one data
reader does not reach those who use another. What is found by name at run time (a method, a reader) is no import; its
class is among the captured values, and leads to its module.
"""

from __future__ import annotations

import ast
import dataclasses
import dis
import functools
import hashlib
import inspect
import json
import math
import os
import sys
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from wsolnb import files
from wsolnb.errors import ParameterError, RunError

PACKAGE = __name__.partition(".")[0]
LIBRARIES = (
    "torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "opencv-python", "pillow", "numba", "pandas",
    "segmentation-models-pytorch",
)  # fmt: skip
"""The libraries whose versions are part of every key: those that compute numbers."""

SMALL = 512 * 2**20
"""Bytes up to which every file of a data set is read for its fingerprint; of larger sets, lists and labels are."""

LISTS = {".txt", ".csv", ".json", ".xml", ".mat", ".yaml"}
"""Endings of files that hold lists and labels, not images."""

LONG = 16
"""Sequences beyond this length stand in a key by their hash: ten thousand image names help no reader."""


def digest(*parts: bytes | str) -> str:
    """Return the SHA-256 of some texts."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed `LIBRARIES`."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for library in LIBRARIES:
        for name in (library, f"{library}-headless"):  # OpenCV without windows is the same module
            try:
                found[library] = metadata.version(name)
                break
            except metadata.PackageNotFoundError:
                continue
    return found


# Files


@functools.lru_cache(maxsize=500_000)
def _hash_of(path: str, _size: int, _time: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file; in one process it is read again only when its size or time have changed."""
    found = os.stat(path)
    return _hash_of(os.fspath(path), found.st_size, found.st_mtime_ns)


def tree(root: str | os.PathLike[str]) -> str:
    """Return the fingerprint of a file, or of all files below a folder: names, sizes and contents.

    Of folders beyond `SMALL` bytes only the contents of `LISTS` are read: an image that was replaced by another one of
    the same size is not noticed there. Hidden files do not count. What is missing has the fingerprint "missing".
    """
    root = Path(root)
    if root.is_file():
        return file_hash(root)
    if not root.is_dir():
        return "missing"
    found = sorted(_walk(str(root)))
    small = sum(size for _, size, _ in found) <= SMALL
    lines = []
    for name, size, time in found:
        read = small or os.path.splitext(name)[1].lower() in LISTS
        lines.append(f"{name} {size} {_hash_of(os.path.join(root, name), size, time) if read else ''}")
    return digest("\n".join(lines))


def _walk(folder: str, before: str = "") -> Iterator[tuple[str, int, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, f"{before}{entry.name}/")
            else:
                found = entry.stat()
                yield before + entry.name, found.st_size, found.st_mtime_ns


# Code


def _plain_tree(source: str) -> ast.Module:
    """Return the syntax tree without docstrings; comments are not in it anyway."""
    parsed = ast.parse(source)
    for node in ast.walk(parsed):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            # Texts below an assignment document it; no text that stands alone does anything.
            body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            node.body = body or [ast.Pass()]
    return parsed


def source_digest(source: str) -> str:
    """Return the hash of Python code without its comments, docstrings and layout."""
    return digest(ast.dump(_plain_tree(source)))


@dataclasses.dataclass(frozen=True)
class _Module:
    """digest: of the code. names: what each imported name stands for. imports: (module, name or None) that it reads."""

    digest: str
    names: dict[str, tuple[str, str | None]]
    imports: frozenset[tuple[str, str | None]]


@functools.lru_cache(maxsize=1000)
def _module(path: str, _size: int, _time: int) -> _Module:
    return _read_module(Path(path).read_text(encoding="utf-8"))


def _read_module(source: str) -> _Module:
    parsed = _plain_tree(source)
    names: dict[str, tuple[str, str | None]] = {}
    imports: set[tuple[str, str | None]] = set()
    for node in _runnable(parsed):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == PACKAGE:
                    imports.add((alias.name, None))
                    if alias.asname:
                        names[alias.asname] = (alias.name, None)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
            for alias in node.names:
                names[alias.asname or alias.name] = (node.module, alias.name)
    # `data.open_dataset` needs what defines `open_dataset`, not all that the package `data` imports.
    attributes: dict[str, set[str | None]] = {name: set() for name in names}
    owners = {id(node.value) for node in ast.walk(parsed) if isinstance(node, ast.Attribute)}
    for node in ast.walk(parsed):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            attributes[node.value.id].add(node.attr)
        elif isinstance(node, ast.Name) and node.id in names and id(node) not in owners:
            attributes[node.id].add(None)
    for local, (module, name) in names.items():
        whole = f"{module}.{name}" if name else module
        if path_of(whole) and _is_package(whole):
            imports |= {(whole, attribute) for attribute in attributes[local]}
        else:
            imports.add((module, name))
    return _Module(digest(ast.dump(parsed)), names, frozenset(imports))


def _runnable(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a tree, without blocks that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield child
        yield from _runnable(child)


def package_root() -> Path:
    """Return the folder that the package is imported from."""
    return Path(__file__).resolve().parent


def path_of(module: str) -> Path | None:
    """Return the source file of a module of the package, None where there is no such module."""
    base = package_root().joinpath(*module.split(".")[1:])
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def _is_package(module: str) -> bool:
    return path_of(module).name == "__init__.py"


def _look_at(module: str) -> _Module:
    path = path_of(module)
    found = path.stat()
    return _module(str(path), found.st_size, found.st_mtime_ns)


def module_digest(module: str) -> str | None:
    """Return the digest of one module's code, without what it imports; None where there is no such module."""
    return _look_at(module).digest if path_of(module) else None


def _defined_in(module: str, name: str | None) -> str:
    """Return the module that defines `name` of `module`, through any number of re-exports."""
    if name is None:
        return module
    if path_of(f"{module}.{name}"):
        return f"{module}.{name}"
    further = _look_at(module).names.get(name) if path_of(module) else None
    return _defined_in(*further) if further else module


HARNESS = (f"{PACKAGE}.notebook", f"{PACKAGE}.keys")
"""What says where and when a builder runs; it makes no number."""


def code_of(modules: Iterable[str], without: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the digests of the modules of the package that can run when these do: their import closure, by name.

    without: modules and packages that are left out, with what only they import.
    """
    found: dict[str, str] = {}
    waiting = [module for module in modules if module.partition(".")[0] == PACKAGE]
    while waiting:
        module = waiting.pop()
        left_out = any(f"{module}.".startswith(f"{name}.") for name in without)
        if left_out or module in found or not path_of(module):
            continue
        looked = _look_at(module)
        found[module] = looked.digest
        waiting += [_defined_in(*imported) for imported in looked.imports]
    return dict(sorted(found.items()))


def code_of_cells(cells: Iterable[str]) -> dict[str, str]:
    """Return the code that a notebook's cells can run: `code_of` what they import, and the cells under `cells`."""
    # Lines for the shell or for IPython are no Python; they stand in the hash as they are.
    sources = ["\n".join(f"# {line}" if line.lstrip()[:1] in "%!" else line for line in c.splitlines()) for c in cells]
    own = _read_module("\n".join(sources))
    return {"cells": own.digest, **code_of(_defined_in(*imported) for imported in own.imports)}


# Values


class _Reading:
    """One pass over a value: its description as JSON, and the modules and data sets that were met on the way."""

    def __init__(self, ignore: Iterable[str] = ()):
        self.ignore = set(ignore)
        self.modules: set[str] = set()
        self.cells: dict[str, str] = {}
        self.data: dict[str, str] = {}
        self._open: dict[int, str] = {}
        self._kept: dict[int, tuple[Any, Any]] = {}

    def describe(self, value: Any, where: str) -> Any:
        """Return what JSON can hold of a value; equal descriptions mean equal values and equal code."""
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else repr(value)
        if id(value) in self._kept:
            return self._kept[id(value)][1]
        if id(value) in self._open:
            return f"the same as {self._open[id(value)]}"
        self._open[id(value)] = where
        try:
            found = self._compact(self._describe(value, where))
        finally:
            del self._open[id(value)]
        self._kept[id(value)] = (value, found)  # with the value, so that its id is not given to another
        return found

    @staticmethod
    def _compact(found: Any) -> Any:
        if isinstance(found, (list, dict)) and len(found) > LONG:
            return {"length": len(found), "sha256": digest(json.dumps(found, sort_keys=True))}
        return found

    def _describe(self, value: Any, where: str) -> Any:
        if isinstance(value, bytes):
            return digest(value)
        if hasattr(type(value), "__cache_key__"):
            self._class(type(value))
            return self.describe(value.__cache_key__(self), where)
        if isinstance(value, os.PathLike):
            return self._path(Path(value))
        if isinstance(value, Mapping):
            described = {str(key): self.describe(item, f"{where}[{key!r}]") for key, item in value.items()}
            return (
                described
                if type(value) in (dict, types.MappingProxyType)
                else {"of": self._class(type(value)), **described}
            )
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return [self.describe(item, f"{where}[{index}]") for index, item in enumerate(value)]
        if isinstance(value, (set, frozenset)):
            return sorted(json.dumps(self.describe(item, where), sort_keys=True) for item in value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.ModuleType):
            self.modules.add(value.__name__)
            return value.__name__
        if isinstance(value, functools.partial):
            return self.describe([value.func, value.args, value.keywords], where)
        if isinstance(value, types.MethodType):
            return self.describe([value.__func__, value.__self__], where)
        if isinstance(value, types.FunctionType):
            return self._function(value, where)
        if isinstance(value, (types.BuiltinFunctionType, Enum)):
            return repr(value).partition(" at 0x")[0]
        return self._object(value, where)

    def _path(self, path: Path) -> Any:
        """A path stands for what lies there: an artefact by its key, everything else by its contents."""
        for folder in (path, *path.parents):
            record = read_record(folder)
            if record:
                return {"artefact": record["hash"], "path": path.relative_to(folder).as_posix()}
        return self.files(path)

    def files(self, path: Path) -> str:
        """Return the fingerprint of a file or a folder of data, and note that it was read."""
        self.data[str(path)] = found = tree(path)
        return found

    def _class(self, kind: type) -> str:
        for base in kind.__mro__:
            if base.__module__.partition(".")[0] == PACKAGE:
                self.modules.add(base.__module__)
            elif base.__module__ == "__main__":
                self._cell(base)
        return f"{kind.__module__}.{kind.__qualname__}"

    def _cell(self, thing: Any) -> str:
        """Note the statement of the notebook that defines a function or class."""
        try:
            source = textwrap.dedent(inspect.getsource(thing))
        except (OSError, TypeError) as error:
            raise RunError(
                f"the source of {thing.__qualname__} cannot be found: {error}", "define it in a cell, or in a module"
            ) from None
        try:
            found = source_digest(source)
        except SyntaxError:  # a lambda within a longer statement, of which only some lines are given
            found = digest(source)
        self.cells[thing.__qualname__] = found
        return found

    def _function(self, function: types.FunctionType, where: str) -> Any:
        local = function.__module__ == "__main__"
        found: dict[str, Any] = {"function": function.__qualname__}
        if local:
            found["source"] = self._cell(function)
        else:
            self.modules.add(function.__module__)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        captured = {name: cell.cell_contents for name, cell in cells if name not in self.ignore and _is_filled(cell)}
        if local:
            names = sorted(_globals_of(function.__code__) & function.__globals__.keys() - self.ignore)
            captured = {name: function.__globals__[name] for name in names} | captured
        if function.__defaults__ or function.__kwdefaults__:
            found["defaults"] = self.describe([function.__defaults__, function.__kwdefaults__], where)
        found |= {name: self.describe(value, name) for name, value in captured.items()}
        return found

    def _object(self, value: Any, where: str) -> Any:
        """An object by its class and its fields; what cannot be told from another one is an error, not a guess."""
        kind = type(value)
        if found := _array(value):
            return found
        torch = sys.modules.get("torch")
        if torch and isinstance(value, torch.nn.Module):
            return self._network(value, where)
        if hasattr(kind, "model_dump"):
            named = {name: getattr(value, name) for name in kind.model_fields if name not in self.ignore}
            return {"of": self._class(kind), **{n: self.describe(v, f"{where}.{n}") for n, v in named.items()}}
        if hasattr(value, "_asdict"):
            return {"of": self._class(kind), **self.describe(value._asdict(), where)}
        own = kind.__module__.partition(".")[0] == PACKAGE or kind.__module__ == "__main__"
        if own or dataclasses.is_dataclass(value):
            fields = {name: item for name, item in _fields(value).items() if name not in self.ignore}
            return {"of": self._class(kind), **{n: self.describe(v, f"{where}.{n}") for n, v in fields.items()}}
        text = repr(value)
        if " at 0x" in text or text.startswith("<"):
            raise ParameterError(
                f"the builder uses {where!r}, a {kind.__module__}.{kind.__qualname__}, of which no key can be made",
                "let it use plain values, arrays, data sets, models or functions",
            )
        return {"of": f"{kind.__module__}.{kind.__qualname__}", "value": text}

    def _network(self, value: Any, where: str) -> Any:
        """A network by its weights, its layers as torch prints them, and the plain settings of its parts."""
        settings = {}
        for name, part in value.named_modules():
            self._class(type(part))
            for key, item in vars(part).items():
                plain = isinstance(item, (bool, int, float, str, tuple)) or hasattr(type(item), "model_dump")
                if plain and key != "training" and not key.startswith("_"):
                    settings[f"{name}.{key}"] = self.describe(item, f"{where}.{name}.{key}")
        state = value.state_dict()
        weights = digest(*(part for name in sorted(state) for part in (name, *_array(state[name]).values())))
        return {"of": self._class(type(value)), "weights": weights, "layers": digest(repr(value)),
                "settings": digest(json.dumps(settings, sort_keys=True))}  # fmt: skip


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  the only way to ask
    except ValueError:
        return False
    return True


def _fields(value: Any) -> dict[str, Any]:
    slots = {name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())}
    return {**{name: getattr(value, name) for name in slots if hasattr(value, name)}, **getattr(value, "__dict__", {})}


def _array(value: Any) -> dict[str, str]:
    """Return type, shape and hash of an array, a tensor or a table; nothing of anything else."""
    kind = f"{type(value).__module__.partition('.')[0]}"
    if kind == "torch" and hasattr(value, "detach"):
        plain = value.detach().cpu().contiguous()
        raw = plain.flatten().view(sys.modules["torch"].uint8).numpy().tobytes() if plain.numel() else b""
        return {"dtype": str(plain.dtype), "shape": str(tuple(plain.shape)), "sha256": digest(raw)}
    if kind == "numpy" and hasattr(value, "tobytes"):
        shape = str(getattr(value, "shape", ()))
        raw = repr(value.tolist()) if value.dtype.hasobject else value.tobytes()
        return {"dtype": str(value.dtype), "shape": shape, "sha256": digest(raw)}
    if kind == "pandas" and hasattr(value, "to_csv"):
        return {"dtype": type(value).__name__, "shape": str(value.shape), "sha256": digest(value.to_csv())}
    return {}


def _globals_of(code: types.CodeType) -> set[str]:
    """Return the global names that a function, or one inside it, reads."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return names.union(*map(_globals_of, inner))


# Keys and records

RECORD = "done.json"
"""The file of an artefact's folder that says what it was made of, and what it holds."""


@dataclasses.dataclass(frozen=True)
class Key:
    """What a result depends on.

    inputs: the captured values. code: digests by module, and of the notebook's statements by name. versions: of the
    libraries. data: fingerprints of the files and folders that are read, by path; they are in `inputs` too, where a
    data set that moved is the same one.
    """

    inputs: Any
    code: dict[str, str]
    versions: dict[str, str]
    data: dict[str, str]

    @property
    def hash(self) -> str:
        """SHA-256 of everything but the paths."""
        return files.fingerprint([self.inputs, self.code, self.versions])


def key_of(value: Any, ignore: Iterable[str] = ()) -> Key:
    """Return the key of a builder, or of any value that a result depends on.

    ignore: names of captured values that cannot change the result, such as a progress bar's switch.
    Raises ParameterError for a captured value that cannot be told from another one.
    """
    reading = _Reading(ignore)
    inputs = reading.describe(value, "the builder")
    code = code_of(reading.modules, without=HARNESS)
    return Key(inputs, {**code, **reading.cells}, versions(), reading.data)


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of an artefact's folder; nothing where there is none, or none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if {"hash", "key", "files"} <= record.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of all files of an artefact's folder, by relative path."""
    return {name: file_hash(folder / name) for name, _, _ in sorted(_walk(str(folder))) if name != RECORD}


def damaged(folder: Path, recorded: Mapping[str, str]) -> list[str]:
    """Return the files below a folder that are missing or not what the record says."""
    found = []
    for name, expected in recorded.items():
        try:
            intact = file_hash(folder / name) == expected
        except OSError:
            intact = False
        if not intact:
            found.append(name)
    return found


def differences(old: Any, new: Any, most: int = 3) -> str:
    """Return in words what differs between two keys (as dictionaries); empty where nothing does."""
    found = list(_differences(old, new, ()))
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def _differences(old: Any, new: Any, place: tuple[str, ...]) -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict) and "sha256" not in new:
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), (*place, name))
        return
    top, *rest = place or ("it",)
    named = ".".join(rest)
    match top:
        case "code" if named == "cells":
            yield "the notebook's cells changed"
        case "code":
            yield f"the code of {named} {'changed' if old and new else 'is new' if new else 'is no longer run'}"
        case "versions":
            yield f"{named} was {old}, is {new}"
        case "data":
            yield f"the files of {named} changed"
        case "needs":
            yield f"{named} ran again"
        case _ if _is_short(old) and _is_short(new):
            yield f"{named or top} was {old!r}, is {new!r}"
        case _:
            yield f"{named or top} changed"


def _is_short(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) < 40)
