"""What a result depends on, read off the code that makes it: the keys of the cache.

    key = key_of(build)        # of a function that is about to be run, or of any value
    changed = differences(old, key)

The key of a builder holds everything that can change what it makes: the values that it captures (arguments, globals of
a notebook, closures), the data sets among them with a fingerprint of their files, the trained artefacts that it reads,
the code that it can run, and the versions of the numeric libraries. Nothing has to be listed by hand, so that nothing
can be forgotten. Comments and docstrings do not count.

The code that can run is found in two ways. Of modules it is found in the syntax tree: the module of a builder, and
every module that it imports, and so on, as far as they belong to this package or lie in a file that is not installed. A
name that a package re-exports leads to the module that defines it, so that a change in one data reader does not reach
those who use another. Of functions and classes of a notebook it is their byte code, and the globals that they read.
What is found by name at run time (a method, a reader) is no import; its class is among the captured values, and leads
to its module.

What a key cannot see: names that are made at run time (`getattr(module, text)`, `eval`), a module's global that another
one has replaced, text that names a file, the device, and images of large data sets that were replaced by others of the
same size. Lists and tuples of equal items are equal, and so are dictionaries in another order. A modified program needs
a fresh process: code that was changed on disk since this one started is an error.
"""

from __future__ import annotations

import ast
import contextlib
import copyreg
import dataclasses
import dis
import functools
import hashlib
import importlib.util
import json
import math
import os
import sys
import sysconfig
import time
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
        raw = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        found.update(b"%d:" % len(raw) + raw)
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


_HASHES: dict[str, tuple[tuple[int, ...], str]] = {}
RECENT = 100_000_000
"""Nanoseconds within which a file can change twice without a change of its times."""


def file_hash(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file; in one process it is read again only when its size or one of its times changed."""
    return _hash_of(os.fspath(path), os.stat(path))


def _hash_of(path: str, status: os.stat_result) -> str:
    state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    known = _HASHES.get(path)
    if known and known[0] == state:
        return known[1]
    now = time.time_ns()
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if now - max(status.st_mtime_ns, status.st_ctime_ns) > RECENT:
        _HASHES[path] = state, found
    return found


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
    small = sum(status.st_size for _, status in found) <= SMALL
    lines = []
    for name, status in found:
        read = small or os.path.splitext(name)[1].lower() in LISTS
        lines.append([name, status.st_size, _hash_of(os.path.join(root, name), status) if read else ""])
    return digest(json.dumps(lines))


def _walk(folder: str, before: str = "") -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if entry.is_symlink() and Path(folder).resolve().is_relative_to(os.path.realpath(entry.path)):
                    continue  # a link to a folder above
                yield from _walk(entry.path, f"{before}{entry.name}/")
            elif entry.is_file():  # no broken link
                yield before + entry.name, entry.stat()


# Code


def _plain_tree(source: str | bytes) -> ast.Module:
    """Return the syntax tree without docstrings; comments are not in it anyway."""
    parsed = ast.parse(source)
    for node in ast.walk(parsed):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            # Texts below an assignment document it; no text that stands alone does anything.
            body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            node.body = body or [ast.Pass()]
    return parsed


def source_digest(source: str | bytes) -> str:
    """Return the hash of Python code without its comments, docstrings and layout."""
    return digest(ast.dump(_plain_tree(source)))


@dataclasses.dataclass(frozen=True)
class _Module:
    """What the syntax tree of a module tells.

    digest: of the code. names: what each imported name can stand for, (module, name or None). defined: names that are
    bound in another way. imports: what of other modules it reads. bare: whether it does nothing but import.
    """

    digest: str
    names: dict[str, set[tuple[str, str | None]]]
    defined: frozenset[str]
    imports: frozenset[tuple[str, str | None]]
    bare: bool


@functools.lru_cache(maxsize=1000)
def _module(path: str, module: str, _size: int, _time: int, _changed: int) -> _Module:
    source = Path(path).read_bytes()
    try:
        found = _read_module(source, module, Path(path).name == "__init__.py")
    except SyntaxError as error:
        raise RunError(f"{path} is no Python: {error}", "correct it") from None
    loaded = getattr(sys.modules.get(module), "__file__", None)
    before = _AT_START.get(path)
    if loaded == path and before not in (None, source) and source_digest(before) != found.digest:
        raise RunError(
            f"{path} was changed since this process started, and what runs may be the old code",
            "start the process (in a notebook the kernel) again",
        )
    return found


def _read_module(source: str | bytes, module: str, is_package: bool) -> _Module:
    parsed = _plain_tree(source)
    names: dict[str, set[tuple[str, str | None]]] = {}
    imports: set[tuple[str, str | None]] = set()
    for node in _runnable(parsed):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imports.add(_split(alias.name))
                top = alias.name if alias.asname else alias.name.partition(".")[0]
                names.setdefault(alias.asname or top, set()).add((top, None))
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                origin = ".".join([*parents[: len(parents) + 1 - node.level], *filter(None, [node.module])])
            for alias in node.names:
                names.setdefault(alias.asname or alias.name, set()).add((origin, alias.name))
    chains = list(_chains(parsed))
    for local, origins in names.items():
        for origin, name in origins:
            whole = f"{origin}.{name}" if name else origin
            if not path_of(whole) or not _is_package(whole):
                imports.add((origin, name))
                continue
            # `data.open_dataset` needs what defines `open_dataset`, not all that the package `data` imports.
            used = [rest for first, *rest in chains if first == local]
            if not used:
                imports.add(_split(whole))
            for rest in used:
                reached = whole
                while rest and path_of(f"{reached}.{rest[0]}"):
                    reached = f"{reached}.{rest.pop(0)}"
                imports.add((reached, rest[0] if rest else None) if _is_package(reached) else _split(reached))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    defined = {node.name for node in ast.walk(parsed) if isinstance(node, kinds)}
    defined |= {node.id for node in ast.walk(parsed) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bare = all(map(_does_nothing, parsed.body))
    return _Module(digest(ast.dump(parsed)), names, frozenset(defined), frozenset(imports), bare)


def _split(module: str) -> tuple[str, str | None]:
    """Return (package, module): the module alone, where (module, None) stands for all that lies below it too."""
    package, _, last = module.rpartition(".")
    return (package, last) if package else (module, "")


def _does_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assign):
        return all(isinstance(target, ast.Name) and target.id.startswith("__") for target in statement.targets)
    return isinstance(statement, (ast.Import, ast.ImportFrom, ast.Pass)) or _is_for_checkers(statement)


def _chains(parsed: ast.Module) -> Iterator[list[str]]:
    """Yield every name that is read, with the attributes that are read of it: `a.b.c` as [a, b, c]."""
    inner = {id(node.value) for node in ast.walk(parsed) if isinstance(node, ast.Attribute)}
    for node in ast.walk(parsed):
        if not isinstance(node, (ast.Attribute, ast.Name)) or id(node) in inner:
            continue
        attributes: list[str] = []
        while isinstance(node, ast.Attribute):
            attributes.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            yield [node.id, *attributes]


def _is_for_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in (getattr(node.test, n, None) for n in ("id", "attr"))


def _runnable(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a tree, without blocks that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if _is_for_checkers(child):
            child = ast.Module(child.orelse, [])
        yield child
        yield from _runnable(child)


def package_root() -> Path:
    """Return the folder that the package is imported from."""
    return _ROOT


_ROOT = Path(__file__).resolve().parent
_AT_START = {str(path): path.read_bytes() for path in package_root().rglob("*.py")}


def path_of(module: str) -> Path | None:
    """Return the source file of a module of the package, or of one that is not installed; None of all others."""
    if module.partition(".")[0] != PACKAGE:
        return _path_outside(module)
    base = package_root().joinpath(*module.split(".")[1:])
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


_OUTSIDE: dict[str, Path | None] = {}


def _path_outside(module: str) -> Path | None:
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    top = module.partition(".")[0]
    if module in ("", "__main__") or (top != module and not _path_outside(top)):
        return None
    spec = getattr(sys.modules.get(module), "__spec__", None)
    if spec is None:
        with contextlib.suppress(ImportError, ValueError, AttributeError):
            spec = importlib.util.find_spec(module)
    if spec is None:
        return None  # not kept: it may be found later
    path = Path(spec.origin) if spec.has_location and spec.origin else Path()
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    installed = any(path.is_relative_to(sysconfig.get_path(kind)) for kind in kinds)
    outside = path.suffix == ".py" and not installed and not {"site-packages", "dist-packages"} & set(path.parts)
    _OUTSIDE[module] = path if outside else None
    return _OUTSIDE[module]


def _is_package(module: str) -> bool:
    return path_of(module).name == "__init__.py"


def _look_at(module: str) -> _Module:
    path = path_of(module)
    found = path.stat()
    return _module(str(path), module, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def module_digest(module: str) -> str | None:
    """Return the digest of one module's code, without what it imports; None where there is no such module."""
    return _look_at(module).digest if path_of(module) else None


def _below(package: str) -> set[str]:
    """Return the names of a module and, of a package, of all modules below it."""
    path = path_of(package)
    if not path or path.name != "__init__.py":
        return {package}
    found = (file.relative_to(path.parent).with_suffix("").parts for file in path.parent.rglob("*.py"))
    return {".".join([package, *parts]).removesuffix(".__init__") for parts in found}


def _defined_in(module: str, name: str | None, seen: frozenset[tuple[str, str]] = frozenset()) -> set[str]:
    """Return the modules that can define `name` of `module`, through any number of re-exports.

    name: None for all that can be reached through the module, an empty text for the module alone.
    """
    if name is None:
        return _below(module)
    if not path_of(module):
        return {module}
    if (module, name) in seen:
        return set()
    looked = _look_at(module)
    inner = f"{module}.{name}" if _is_package(module) else ""
    found: set[str] = set()
    if name and inner and path_of(inner):
        found = _below(inner) if seen else {inner}
    for origin, further in looked.names.get(name, ()):
        found |= _defined_in(origin, further, seen | {(module, name)})
    if not found or name in looked.defined or "*" in looked.names or "__getattr__" in looked.defined:
        found.add(module)
    return found


HARNESS = (f"{PACKAGE}.notebook", f"{PACKAGE}.keys")
"""What says where and when a builder runs; it makes no number."""


def code_of(modules: Iterable[str], without: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the digests of the modules of the package that can run when these do: their import closure, by name.

    without: modules and packages that are left out, with what only they import.
    """
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        left_out = any(f"{module}.".startswith(f"{name}.") for name in without)
        if left_out or module in found or not path_of(module):
            continue
        looked = _look_at(module)
        found[module] = looked.digest
        for imported in looked.imports:
            waiting += _defined_in(*imported)
        # The packages around it run first; one that only imports changes nothing.
        package = module.rpartition(".")[0]
        while package:
            if path_of(package) and not _look_at(package).bare:
                waiting.append(package)
            package = package.rpartition(".")[0]
    return dict(sorted(found.items()))


def code_of_cells(cells: Iterable[str]) -> dict[str, str]:
    """Return the code that a notebook's cells can run: `code_of` what they import, and the cells under `cells`."""
    from IPython.core.inputtransformer2 import TransformerManager

    sources = []
    for cell in cells:
        source = TransformerManager().transform_cell(cell)  # lines for IPython and for the shell as Python
        try:
            ast.parse(source)
        except SyntaxError:
            source = f"_ = {cell!r}\n"
        sources.append(source)
    own = _read_module("".join(sources), "__main__", False)
    return {"cells": own.digest, **code_of(module for imported in own.imports for module in _defined_in(*imported))}


# Values


class _Reading:
    """One pass over a value: its description as JSON, and the modules and data sets that were met on the way.

    Names in pointed brackets mark what JSON has no word for, so that a text is never taken for something else.
    """

    def __init__(self, ignore: Iterable[str] = ()):
        self.ignore = set(ignore)
        self.modules: set[str] = set()
        self.cells: dict[str, str] = {}
        self.data: dict[str, str] = {}
        self._open: dict[int, str] = {}
        self._kept: dict[int, tuple[Any, Any]] = {}

    def describe(self, value: Any, where: str) -> Any:
        """Return what JSON can hold of a value; equal descriptions mean equal values and equal code."""
        if value is None or type(value) in _PLAIN:
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"<float>": repr(float(value))}
        if type(value) in (list, tuple) and all(type(item) in _PLAIN for item in value):
            return self._compact(list(value))
        if id(value) in self._kept:
            return self._kept[id(value)][1]
        if id(value) in self._open:
            return {"<the same as>": self._open[id(value)]}
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

    def _all(self, values: Iterable[Any], where: str) -> list[Any]:
        return [self.describe(item, f"{where}[{index}]") for index, item in enumerate(values)]

    def _named(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {n: self.describe(item, f"{where}.{n}") for n, item in values.items() if n not in self.ignore}

    def _sorted(self, values: Iterable[Any], where: str) -> list[str]:
        return sorted(json.dumps(self.describe(item, where), sort_keys=True) for item in values)

    def _describe(self, value: Any, where: str) -> Any:
        kind = type(value)
        if _home(kind).partition(".")[0] in ("IPython", "ipykernel"):
            return kind.__qualname__  # the notebook itself makes no number
        if isinstance(value, type):
            return self._class(value, where)
        if hasattr(kind, "__cache_key__"):
            return self._of(value, {"<key>": self.describe(value.__cache_key__(self), where)})
        if isinstance(value, Enum):
            return self._of(value, {"<member>": value.name})
        if isinstance(value, (bytes, bytearray)):
            return {"<bytes>": digest(bytes(value))}
        if isinstance(value, os.PathLike):
            return self._path(Path(value))
        if isinstance(value, types.ModuleType):
            self.modules |= _below(value.__name__)
            return {"<module>": value.__name__}
        if isinstance(value, functools.partial):
            return {"<partial>": self._all([value.func, value.args, value.keywords], where)}
        if isinstance(value, (types.MethodType, types.BuiltinMethodType)):
            owner = value.__self__
            if isinstance(value, types.MethodType):
                return {"<method>": self._all([value.__func__, owner], where)}
            if owner is not None and not isinstance(owner, types.ModuleType):
                return {"<method>": [value.__name__, self.describe(owner, where)]}
            return {"<function>": f"{value.__module__}.{value.__qualname__}"}
        if isinstance(value, types.FunctionType):
            return self._function(value, where)
        if hasattr(value, "__wrapped__"):  # such as `functools.cache` and numba leave
            return {"<wrapped>": self.describe(value.__wrapped__, where), "<class>": self.describe(kind, where)}
        if isinstance(value, (property, staticmethod, classmethod, functools.cached_property)):
            return self._all([getattr(value, n, None) for n in ("fget", "fset", "fdel", "__func__", "func")], where)
        return self._object(value, where)

    def _path(self, path: Path) -> Any:
        """A path stands for what lies there: an intact artefact by its key, everything else by its contents."""
        for folder in (path, *path.parents):
            record = read_record(folder)
            if record:
                inside = {n: h for n, h in record["files"].items() if (folder / n).is_relative_to(path)}
                if path != folder and not inside:
                    break
                if damaged(folder, inside):
                    break
                return {"<artefact>": record["hash"], "path": path.relative_to(folder).as_posix()}
        return {"<files>": self.files(path)}

    def files(self, path: Path) -> str:
        """Return the fingerprint of a file or a folder of data, and note that it was read."""
        if str(path) not in self.data:
            self.data[str(path)] = tree(path)
        return self.data[str(path)]

    def _of(self, value: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"<class>": self.describe(type(value), type(value).__qualname__), **fields}

    def _class(self, kind: type, where: str) -> Any:
        """A class by its module; a class of a notebook by what it holds."""
        name = f"{_home(kind)}.{kind.__qualname__}"
        bases = {}
        for base in kind.__mro__:
            if not _is_local(_home(base)):
                self.modules.add(_home(base))
            elif base is kind:
                bases |= self._members(kind)
            else:
                bases[f"<base {base.__qualname__}>"] = self.describe(base, where)
        return {"<type>": name, **bases}

    def _members(self, kind: type) -> dict[str, Any]:
        if issubclass(kind, Enum):
            members = {name: member.value for name, member in kind.__members__.items()}
        elif hasattr(kind, "model_fields"):
            fields = kind.model_fields.items()
            members = {n: [f.annotation, f.default, f.default_factory, f.metadata] for n, f in fields}
        else:
            members = {}
        for name, item in vars(kind).items():
            function = getattr(item, "__func__", getattr(item, "func", item))
            internal = name.startswith(("__", "_abc_")) or issubclass(kind, Enum) or _is_slot(item)
            if isinstance(function, types.FunctionType) or not internal:
                members.setdefault(name, item)
        return self._named(members, kind.__qualname__)

    def _function(self, function: types.FunctionType, where: str) -> Any:
        # Not `__module__`: a decorator gives that of what it wraps.
        module = function.__globals__.get("__name__", "__main__")
        local = _is_local(module)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        captured = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
        if local:
            names = sorted(_globals_of(function.__code__) & function.__globals__.keys())
            captured = {name: function.__globals__[name] for name in names} | captured
            for origin, name in _imports_of(function.__code__):
                self.modules |= _defined_in(origin, name)
            label = self._note(function.__qualname__, self._code(function.__code__, where))
        else:
            self.modules.add(module)
            label = f"{module}.{function.__qualname__}"
        found: dict[str, Any] = {"<function>": label}
        if function.__defaults__ or function.__kwdefaults__:
            found["<defaults>"] = self.describe([function.__defaults__, function.__kwdefaults__], where)
        further = {name: value for name, value in vars(function).items() if name != "__wrapped__"}
        if further and local:
            found["<attributes>"] = self._named(further, where)
        return found | {n: self.describe(value, n) for n, value in captured.items() if n not in self.ignore}

    def _note(self, name: str, code: Any) -> str:
        """Note the code of a function of the notebook; return its name, made unique."""
        found = digest(json.dumps(code))
        while self.cells.setdefault(name, found) != found:
            name += "'"
        return name

    def _code(self, code: types.CodeType, where: str) -> list[Any]:
        """What the interpreter runs; comments, docstrings and layout are not among it."""
        arguments = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
        found: list[Any] = [code.co_argcount, code.co_posonlyargcount, code.co_flags & 0x3FF]
        found += [list(code.co_varnames[:arguments]), digest(code.co_exceptiontable)]
        for step in dis.get_instructions(code):
            value = step.argval
            inner = isinstance(value, types.CodeType)
            found.append([step.opname, self._code(value, where) if inner else self.describe(value, where)])
        return found

    def _object(self, value: Any, where: str) -> Any:
        """An object by its class and its fields; what cannot be told from another one is an error, not a guess."""
        kind = type(value)
        if found := self._array(value, where):
            return found
        torch = sys.modules.get("torch")
        if torch and isinstance(value, torch.nn.Module):
            return self._network(value, where)
        if isinstance(value, (set, frozenset)):
            return {"<set>": self._sorted(value, where), **self._more(value, where)}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) and not key.startswith("<") for key in value):
                described = {key: self.describe(item, f"{where}[{key!r}]") for key, item in value.items()}
            else:
                described = {"<items>": self._sorted(value.items(), where)}
            return described if kind is dict else {"<mapping>": described, **self._more(value, where)}
        if isinstance(value, (list, tuple)):
            items = self._named(value._asdict(), where) if hasattr(value, "_asdict") else self._all(value, where)
            return items if kind in (list, tuple) else {"<items>": items, **self._more(value, where)}
        if isinstance(value, (bool, int, str)):
            plain = next(plain for plain in _PLAIN if isinstance(value, plain))
            return {"<value>": plain(value), **self._more(value, where)}
        if hasattr(kind, "model_dump"):
            fields = dict(vars(value)) | (value.__pydantic_private__ or {}) | (value.model_extra or {})
            return self._of(value, self._named(fields, where))
        own = _home(kind).partition(".")[0] == PACKAGE or _is_local(_home(kind))
        if own or dataclasses.is_dataclass(value):
            return self._of(value, self._named(_fields(value), where))
        return self._of(value, self._as_pickled(value, where))

    def _more(self, value: Any, where: str) -> dict[str, Any]:
        """The class of a value that is more than a plain one, and its further fields."""
        return self._of(value, self._named(_fields(value), where))

    def _as_pickled(self, value: Any, where: str) -> dict[str, Any]:
        try:
            reduce = copyreg.dispatch_table.get(type(value))  # as `pickle` does
            reduced = reduce(value) if reduce else value.__reduce_ex__(2)
        except Exception:  # libraries refuse in many ways
            kind = type(value)
            raise ParameterError(
                f"the builder uses {where!r}, a {_home(kind)}.{kind.__qualname__}, of which no key can be made",
                "let it use plain values, arrays, data sets, models or functions",
            ) from None
        if isinstance(reduced, str):
            return {"<name>": reduced}
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        if isinstance(state, dict):
            state = {name: item for name, item in state.items() if not _is_memo(type(value), name)}
        parts = [make, arguments, state, list(items or ()), list(pairs or ())]
        return {"<made of>": self._all(parts, where)}

    def _array(self, value: Any, where: str) -> dict[str, Any]:
        """Type, shape and hash of an array, a tensor or a table; nothing of anything else."""
        library = _home(type(value)).partition(".")[0]
        torch = sys.modules.get("torch")
        if torch and isinstance(value, torch.Tensor):
            plain = value.detach().to_dense().cpu().resolve_conj().resolve_neg().contiguous()
            raw = plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""
            return {"<tensor>": str(plain.dtype), "shape": str(tuple(plain.shape)), "sha256": digest(raw)}
        if library == "numpy" and hasattr(value, "tobytes") and hasattr(value, "dtype"):
            raw = b"" if value.dtype.hasobject else value.tobytes()
            found = {
                "<array>": f"{type(value).__name__} {value.dtype}",
                "shape": str(value.shape),
                "sha256": digest(raw),
            }
            if value.dtype.hasobject:
                found["items"] = self._compact(self._all(value.ravel().tolist(), where))
            if hasattr(value, "mask"):
                found["mask"] = self.describe(value.mask, where)
            return found
        if library == "pandas" and hasattr(value, "to_csv"):
            table = value if value.ndim == 2 else value.to_frame()
            columns = [self._column(table.iloc[:, index], where) for index in range(table.shape[1])]
            return {"<table>": type(value).__name__, "axes": self._all(table.axes, where), "columns": columns}
        return {}

    def _column(self, column: Any, where: str) -> Any:
        categories = getattr(column, "cat", None) if str(column.dtype) == "category" else None
        kinds = [str(column.dtype), *([categories.categories, categories.ordered] if categories is not None else [])]
        return self._all([*kinds, column.to_numpy()], where)

    def _network(self, value: Any, where: str) -> Any:
        """A network by its weights and buffers, which of them are trained, and the settings of all of its parts."""
        torch = sys.modules["torch"]
        usual = vars(torch.nn.Module()).keys()
        parts = {}
        for name, part in value.named_modules():
            settings = {key: item for key, item in _fields(part).items() if key not in usual}
            hooks = self._all([*part._forward_hooks.values(), *part._forward_pre_hooks.values()], where)
            parts[name] = [self.describe(type(part), where), self._named(settings, f"{where}.{name}"), hooks]
        tensors = dict(value.named_parameters(remove_duplicate=False))
        tensors |= dict(value.named_buffers(remove_duplicate=False))
        weights = {name: [self._array(tensor, where), tensor.requires_grad] for name, tensor in tensors.items()}
        return {"<class>": self.describe(type(value), where), "weights": digest(json.dumps(weights, sort_keys=True)),
                "settings": digest(json.dumps(parts, sort_keys=True))}  # fmt: skip


_PLAIN = (bool, int, str)


def _home(kind: type) -> str:
    """Return the name of the module of a class."""
    found = kind.__module__
    return found if isinstance(found, str) else "builtins"  # classes in C can have none


def _is_local(module: str) -> bool:
    """Return whether code has no module that could be read: that of a notebook, and what was made by `exec`."""
    return module == "__main__" or module not in sys.modules


def _is_slot(item: Any) -> bool:
    return isinstance(item, (types.MemberDescriptorType, types.GetSetDescriptorType))


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  the only way to ask
    except ValueError:
        return False
    return True


def _is_memo(kind: type, name: str) -> bool:
    """Return whether a field is what a `functools.cached_property` has kept."""
    return any(isinstance(vars(base).get(name), functools.cached_property) for base in kind.__mro__)


def _fields(value: Any) -> dict[str, Any]:
    slots = {name: getattr(value, name) for name in copyreg._slotnames(type(value)) if hasattr(value, name)}
    fields = {**slots, **getattr(value, "__dict__", {})}
    return {name: item for name, item in fields.items() if not _is_memo(type(value), name)}


def _globals_of(code: types.CodeType) -> set[str]:
    """Return the global names that a function, or one inside it, reads."""
    reading = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
    names = {i.argval for i in dis.get_instructions(code) if i.opname in reading}
    return names.union(*map(_globals_of, _inner(code)))


def _imports_of(code: types.CodeType) -> set[tuple[str, str | None]]:
    """Return what a function, or one inside it, imports."""
    found: set[tuple[str, str | None]] = set()
    steps = list(dis.get_instructions(code))
    for before, step, after in zip(steps, steps[1:], steps[2:], strict=False):
        if step.opname == "IMPORT_NAME" and before.argval:  # from a.b import names
            found |= {(step.argval, name) for name in before.argval}
        elif step.opname == "IMPORT_NAME":  # import a.b, which binds a, or import a.b as c
            bound = step.argval if after.opname == "IMPORT_FROM" else step.argval.partition(".")[0]
            found |= {_split(step.argval), (bound, None)}
    return found.union(*map(_imports_of, _inner(code)))


def _inner(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


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
    try:
        inputs = reading.describe(value, "the builder")
    except RecursionError:
        raise ParameterError("what the builder uses is nested too deeply", "let it use less") from None
    code = code_of(reading.modules, without=HARNESS)
    return Key(inputs, {**code, **reading.cells}, versions(), reading.data)


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of an artefact's folder; nothing where there is none, or none that can be read."""
    kinds = {"name": str, "hash": str, "key": dict, "files": dict, "seconds": (int, float), "finished": str}
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if all(isinstance(record[name], kind) for name, kind in kinds.items()) else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of all files of an artefact's folder, by relative path."""
    return {name: file_hash(folder / name) for name, _ in sorted(_walk(str(folder))) if name != RECORD}


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
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for one, other in zip(old, new, strict=True):
            yield from _differences(one, other, place)
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
