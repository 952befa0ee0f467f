"""The keys of the cache: what a result depends on, read off the code that makes it.

    key = key_of(build)        # of a function that is about to be run, or of any value
    changed = differences(old, key)

A builder is a function that makes a result. Its key holds everything that can change the result: the values that the
builder captures (arguments, globals of a notebook, closures), with a fingerprint of the files of every data set among
them; the trained artefacts that it reads; the code that it can run; and the versions of the numeric libraries. Nothing
has to be listed by hand, so nothing can be forgotten. Comments and docstrings do not count.

The code that can run is found in two ways. For modules, the syntax tree tells it: the key takes the module of the
builder, every module that this module imports, and so on, as far as these modules belong to this package or lie in a
file that is not installed. A name that a package re-exports leads to the module that defines the name. So a change in
one data reader does not reach results that use another reader. For functions and classes of a notebook, the key takes
their byte code and the globals that they read. A method or a reader that is found by name at run time is not imported.
Its class is among the captured values, and leads to its module.

A key cannot see the following: names that are made at run time (`getattr(module, text)`, `eval`), a module's global
that another module has replaced, text that names a file, the device, and images of large data sets that were replaced
by others of the same size. Lists and tuples of equal items are equal, and so are dictionaries in another order. A
modified program needs a fresh process: code that was changed on disk since this process started is an error.
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
import inspect
import json
import math
import os
import sys
import sysconfig
import time
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from wsolnb import files
from wsolnb.errors import DataError, ParameterError, RunError

PACKAGE = __name__.partition(".")[0]
LIBRARIES = (
    "torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "opencv-python", "pillow", "numba", "pandas",
    "segmentation-models-pytorch",
)  # fmt: skip
"""The libraries whose versions are part of every key: those that compute numbers."""

SMALL = 512 * 2**20
"""Bytes up to which every file of a data set is read for its fingerprint. Of larger sets only lists and labels are
read."""

LISTS = {".txt", ".csv", ".json", ".xml", ".mat", ".yaml"}
"""Endings of files that hold lists and labels, not images."""

LONG = 16
"""Sequences longer than this stand in a key by their hash, because ten thousand image names help no reader."""


def digest(content: bytes | str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed `LIBRARIES`."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for library in LIBRARIES:
        for name in (f"{library}-headless", library):  # OpenCV without windows is the same module
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[library] = metadata.version(name)
    return found


# Files


_HASHES: dict[str, tuple[tuple[int, ...], str]] = {}
RECENT = 100_000_000
"""Nanoseconds within which a file can change twice without a change of its times."""


def file_hash(path: str | os.PathLike[str], status: os.stat_result | None = None) -> str:
    """Return the SHA-256 of a file; in one process it is read again only when its size or one of its times changed."""
    path, status = os.fspath(path), status or os.stat(path)
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

    In folders of more than `SMALL` bytes only the contents of `LISTS` are read. There an image that was replaced by
    another one of the same size is not noticed. Hidden files do not count. A missing file or folder has the fingerprint
    "missing".
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
        lines.append([name, status.st_size, file_hash(root / name, status) if read else ""])
    return digest(json.dumps(lines))


def _walk(folder: str, before: str = "") -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if not Path(folder).resolve().is_relative_to(os.path.realpath(entry.path)):  # no link to a folder above
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


class _Module(ast.NodeVisitor):
    """What the syntax tree of a module tells; blocks that only a type checker reads do not count.

    digest: of the code. names: what each imported name can stand for. defined: names that are bound in another way.
    read: what is read of each name, of `a.b.c` it is `.b.c` of `a`. imports: what of other modules is read. bare:
    whether it does nothing but import. package: what relative imports start from.
    """

    def __init__(self, source: str | bytes, package: list[str]):
        self.package = package
        self.names: dict[str, set[str]] = defaultdict(set)
        self.read: dict[str, set[str]] = defaultdict(set)
        self.defined: set[str] = set()
        parsed = _plain_tree(source)
        self.digest = digest(ast.dump(parsed))
        self.visit(parsed)
        # `data.open_dataset` needs what defines `open_dataset`, not all that the package `data` imports.
        imports: set[str] = set()
        for name, origins in self.names.items():
            for origin in origins:  # what is not read is passed on, but for the first word of `import a.b`
                imports |= {f"{origin}{rest}" for rest in self.read.get(name, () if name == origin else ("",))}
        self.imports = {name for name in imports if path_of(name.partition(".")[0])}
        others = (s for s in parsed.body if not isinstance(s, (ast.Import, ast.ImportFrom, ast.Pass)))
        self.bare = all(isinstance(s, ast.Assign) and ast.unparse(s).startswith("__") for s in others)

    def visit_If(self, node: ast.If) -> None:
        only_checked = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for child in node.orelse if only_checked else ast.iter_child_nodes(node):
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            top = alias.name.partition(".")[0]
            self.names[alias.asname or top].add(alias.name if alias.asname else top)
            self.names[""].add(alias.name)  # it runs, whatever is read of it

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        above = self.package[: len(self.package) + 1 - node.level] if node.level else []
        for alias in node.names:
            self.names[alias.asname or alias.name].add(".".join(filter(None, [*above, node.module, alias.name])))

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self.defined.add(node.name)
        self.generic_visit(node)

    visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef

    def visit_Name(self, node: ast.Name) -> None:
        self.read[node.id].add("")
        if isinstance(node.ctx, ast.Store):
            self.defined.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        attributes = f".{node.attr}"
        while isinstance(node.value, ast.Attribute):
            node = node.value
            attributes = f".{node.attr}{attributes}"
        if isinstance(node.value, ast.Name):
            self.read[node.value.id].add(attributes)
        else:
            self.visit(node.value)


@functools.lru_cache(maxsize=1000)
def _module(path: str, module: str, *_status: int) -> _Module:
    source = Path(path).read_bytes()
    parts = module.split(".")
    try:
        found = _Module(source, parts if Path(path).name == "__init__.py" else parts[:-1])
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


def _look_at(module: str) -> _Module:
    path = path_of(module)
    status = path.stat()
    return _module(str(path), module, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.cache
def package_root() -> Path:
    """Return the folder that the package is imported from."""
    return Path(__file__).resolve().parent


_AT_START = {str(path): path.read_bytes() for path in package_root().rglob("*.py")}


def path_of(module: str) -> Path | None:
    """Return the source file of a module of the package, or of one that is not installed; None of all others."""
    if module.partition(".")[0] != PACKAGE:
        return _path_outside(module, module in sys.modules)
    base = package_root().joinpath(*module.split(".")[1:])
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)


@functools.cache
def _path_outside(module: str, loaded: bool) -> Path | None:
    parent = module.rpartition(".")[0]
    if module in ("", "__main__") or (parent and not path_of(parent)):
        return None
    spec = getattr(sys.modules.get(module), "__spec__", None)
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        spec = spec or importlib.util.find_spec(module)
    path = Path(spec.origin) if spec and spec.has_location and spec.origin else Path()
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return (
        path
        if path.suffix == ".py" and not installed and not path.is_relative_to(sysconfig.get_path("stdlib"))
        else None
    )


def _below(package: str) -> set[str]:
    """Return the names of a module and, of a package, of all modules below it."""
    path = path_of(package)
    if not path or path.name != "__init__.py":
        return {package}
    found = (file.relative_to(path.parent).with_suffix("").parts for file in path.parent.rglob("*.py"))
    return {".".join([package, *parts]).removesuffix(".__init__") for parts in found}


def _defined_in(name: str, module: str = "", seen: frozenset[str] = frozenset()) -> set[str]:
    """Return the modules that define what `module.name` reads, through any number of re-exports.

    A dotted name without a module starts at the top. If it ends at a module, all that can be reached through this
    module is returned.
    """
    if not module:
        module, _, name = name.partition(".")
    if not path_of(module):
        return set()
    if not name:
        return _below(module)
    first, _, rest = name.partition(".")
    looked, read = _look_at(module), f"{module}.{first}"
    found = _defined_in(rest, read, seen)
    if read in seen:
        return found
    for origin in looked.names.get(first, ()):
        found |= _defined_in(f"{origin}.{rest}".strip("."), seen=seen | {read})
    if not found or first in looked.defined or "*" in looked.names or "__getattr__" in looked.defined:
        found.add(module)
    return found


HARNESS = (f"{PACKAGE}.notebook", f"{PACKAGE}.keys", f"{PACKAGE}.locks")
"""What says where and when a builder runs; it makes no number."""


def code_of(modules: Iterable[str], without: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the digests of the modules of the package that can run when these do: their import closure, by name.

    without: modules and packages that are left out, with what only they import.
    """
    found: dict[str, str] = {}
    followed: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        left_out = any(f"{module}.".startswith(f"{name}.") for name in without)
        if left_out or module in found or not path_of(module):
            continue
        looked = _look_at(module)
        found[module] = looked.digest
        for imported in looked.imports - followed:
            waiting += _defined_in(imported)
        followed |= looked.imports
        # The packages around it run first; one that only imports changes nothing.
        parts = module.split(".")
        around = (".".join(parts[:count]) for count in range(1, len(parts)))
        waiting += [package for package in around if path_of(package) and not _look_at(package).bare]
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
    own = _Module("".join(sources), [])
    return {"cells": own.digest, **code_of(module for name in own.imports for module in _defined_in(name))}


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
        self._seen: dict[int, tuple[Any, Any]] = {}

    def describe(self, value: Any, where: str) -> Any:
        """Return what JSON can hold of a value; equal descriptions mean equal values and equal code."""
        if value is None or type(value) in (bool, int, str):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"<float>": repr(float(value))}
        if id(value) not in self._seen:
            self._seen[id(value)] = value, {"<the same as>": where}  # what holds itself meets this
            found = self._describe(value, where)
            if isinstance(found, (list, dict)) and len(found) > LONG:
                found = {"length": len(found), "sha256": _digest(found)}
            self._seen[id(value)] = value, found  # with the value, so that its id is not given to another
        return self._seen[id(value)][1]

    def _all(self, values: Iterable[Any], where: str) -> list[Any]:
        return [self.describe(item, f"{where}[{index}]") for index, item in enumerate(values)]

    def _named(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {n: self.describe(v, f"{where}.{n}".lstrip(".")) for n, v in values.items() if n not in self.ignore}

    def _sorted(self, values: Iterable[Any], where: str) -> list[str]:
        return sorted(json.dumps(self.describe(item, where), sort_keys=True) for item in values)

    def _of(self, value: Any, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
        """A value by its class and fields, without what a `functools.cached_property` has kept."""
        kind = type(value)
        fields = {n: v for n, v in fields.items() if not isinstance(getattr(kind, n, None), functools.cached_property)}
        return {"<class>": self.describe(kind, kind.__qualname__), **self._named(fields, where)}

    def _describe(self, value: Any, where: str) -> Any:
        kind = type(value)
        library = _home(kind).partition(".")[0]
        torch = sys.modules.get("torch")
        if library in ("IPython", "ipykernel"):
            return kind.__qualname__  # the notebook itself makes no number
        if isinstance(value, type):
            return self._class(value, where)
        if hasattr(kind, "__cache_key__"):
            return self._of(value, {"<key>": value.__cache_key__(self)}, where)
        if isinstance(value, types.ModuleType):
            self.modules |= _below(value.__name__)
            return {"<module>": value.__name__}
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, functools.partial):
            return {"<partial>": [*self._all([value.func, value.args], where), self._named(value.keywords, where)]}
        if isinstance(value, types.MethodType):
            return {"<method>": self._all([value.__func__, value.__self__], where)}
        if hasattr(value, "__wrapped__"):  # such as `functools.cache` and numba leave
            return self._of(value, {"<wrapped>": value.__wrapped__}, where)
        if isinstance(value, (property, functools.cached_property)):
            return self._all([getattr(value, name, None) for name in ("fget", "fset", "fdel", "func")], where)
        if isinstance(value, os.PathLike):
            return self._path(Path(value))
        if isinstance(value, (bytes, bytearray)):
            return {"<bytes>": digest(value)}
        if isinstance(value, (set, frozenset)):
            return self._of(value, {"<set>": self._sorted(value, where)}, where)
        if kind in (list, tuple):
            return self._all(value, where)
        if kind is dict and all(isinstance(key, str) and not key.startswith("<") for key in value):
            return {key: self.describe(item, f"{where}[{key!r}]") for key, item in value.items()}
        if kind is dict:
            return {"<items>": self._sorted(value.items(), where)}
        if hasattr(value, "_asdict"):
            return self._of(value, value._asdict(), where)
        if torch and isinstance(value, torch.Tensor):
            plain = value.detach().to_dense().cpu().resolve_conj().resolve_neg().contiguous()
            raw = plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""
            shape = [*plain.shape, value.requires_grad]
            return {"<tensor>": str(plain.dtype), "shape": str(shape), "sha256": digest(raw)}
        if torch and isinstance(value, torch.nn.Module):
            return self._network(value, where)
        if library == "numpy" and hasattr(value, "tobytes"):
            found = {"<array>": f"{kind.__name__} {value.dtype}", "shape": str(value.shape)}
            found |= self._named({"mask": value.mask} if hasattr(value, "mask") else {}, where)
            if value.dtype.hasobject:
                return {**found, "items": self.describe(value.ravel().tolist(), where)}
            return {**found, "sha256": digest(value.tobytes())}
        if library == "pandas" and hasattr(value, "to_csv"):
            table = value if value.ndim == 2 else value.to_frame()
            columns = [table.iloc[:, index].array for index in range(table.shape[1])]
            return self._of(value, {"<axes>": table.axes, "<columns>": columns}, where)
        if hasattr(kind, "model_dump"):
            fields = vars(value) | (value.__pydantic_private__ or {}) | (value.model_extra or {})
            return self._of(value, fields, where)
        return self._object(value, where)

    def _path(self, path: Path) -> Any:
        """A path stands for what lies there: an intact artefact by its key, everything else by its contents."""
        for folder in (path, *path.parents):
            if record := read_record(folder / RECORD):
                inside = {n: h for n, h in record["files"].items() if (folder / n).is_relative_to(path)}
                if "hash" in record and (inside or path == folder) and not faults(folder, inside):
                    return {"<artefact>": record["hash"], "path": path.relative_to(folder).as_posix()}
                break
        return {"<files>": self.files(path)}

    def files(self, path: Path) -> str:
        """Return the fingerprint of a file or a folder of data, and note that it was read."""
        if str(path) not in self.data:
            self.data[str(path)] = tree(path)
        return self.data[str(path)]

    def _class(self, kind: type, where: str) -> Any:
        """A class by its module; a class of a notebook by what it holds."""
        found = {"<type>": f"{_home(kind)}.{kind.__qualname__}"}
        for base in kind.__mro__:
            if not _is_local(_home(base)):
                self.modules.add(_home(base))
            elif base is not kind:
                found[f"<base {base.__qualname__}>"] = self.describe(base, where)
        if _is_local(_home(kind)):
            # What pydantic takes out of the class's own names, and those without what Python makes by itself.
            members = {**getattr(kind, "model_fields", {}), **getattr(kind, "__private_attributes__", {})}
            for name, item in vars(kind).items():
                if isinstance(inspect.unwrap(item), types.FunctionType) or not name.startswith(("__", "_abc_")):
                    members.setdefault(name, item)
            found |= self._named(members, kind.__qualname__)
        return found

    def _function(self, function: types.FunctionType) -> Any:
        code, names = function.__code__, function.__globals__
        module = names.get("__name__", "__main__")  # not `__module__`: a decorator gives that of what it wraps
        label, captured = f"{module}.{function.__qualname__}", {}
        if function.__defaults__ or function.__kwdefaults__:
            captured["<defaults>"] = [function.__defaults__, function.__kwdefaults__]
        if _is_local(module):
            read: set[str] = set()
            label, runs = function.__qualname__, digest(json.dumps(self._code(code, read)))
            while self.cells.setdefault(label, runs) != runs:
                label += "'"
            captured |= {name: names[name] for name in sorted(read & names.keys())}
            if own := {name: value for name, value in vars(function).items() if name != "__wrapped__"}:
                captured["<attributes>"] = own
        else:
            self.modules.add(module)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a variable that has no value yet
                captured[name] = cell.cell_contents
        return {"<function>": label, **self._named(captured, "")}

    def _code(self, code: types.CodeType, read: set[str]) -> list[Any]:
        """What the interpreter runs, without comments, docstrings and layout; notes the globals that it reads."""
        found: list[Any] = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & 0x3FF]
        found += [code.co_varnames, digest(code.co_exceptiontable)]
        steps = list(dis.get_instructions(code))
        for before, step in zip([None, *steps], steps, strict=False):
            value = step.argval
            inner = isinstance(value, types.CodeType)
            found.append([step.opname, self._code(value, read) if inner else self.describe(value, "a constant")])
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
                read.add(value)
            elif step.opname == "IMPORT_NAME":  # from a.b import names, or import a.b, by which all of a can be reached
                names = [f"{value}.{name}" for name in before.argval or ()] or [value.partition(".")[0]]
                self.modules.update(*map(_defined_in, names))
        return found

    def _network(self, value: Any, where: str) -> Any:
        """A network by its weights and buffers, which of them are trained, and the settings of all of its parts."""
        usual = vars(sys.modules["torch"].nn.Module()).keys()
        parts = {}
        for name, part in value.named_modules():
            settings = {key: item for key, item in vars(part).items() if key not in usual}
            hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
            parts[name] = self._of(part, {**settings, "<hooks>": hooks}, f"{where}.{name}")
        tensors = [*value.named_parameters(remove_duplicate=False), *value.named_buffers(remove_duplicate=False)]
        found = {"weights": _digest(self._named(dict(tensors), where)), "settings": _digest(parts)}
        return {"<class>": self.describe(type(value), where), **found}

    def _object(self, value: Any, where: str) -> Any:
        """Describe an object as `pickle` takes it apart; raise where it could not be told from another one."""
        kind = type(value)
        try:
            reduce = copyreg.dispatch_table.get(kind)
            reduced = reduce(value) if reduce else value.__reduce_ex__(2)
        except Exception:  # libraries refuse in many ways
            raise ParameterError(
                f"the builder uses {where!r}, a {_home(kind)}.{kind.__qualname__}, of which no key can be made",
                "let it use plain values, arrays, data sets, models or functions",
            ) from None
        if isinstance(reduced, str):
            return self._of(value, {"<name>": [getattr(value, "__module__", None), reduced]}, where)
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        state = {} if state is None else state
        if isinstance(state, tuple) and len(state) == 2 and not hasattr(value, "__setstate__"):
            state = {**(state[0] or {}), **state[1]}  # fields and slots
        plain = isinstance(state, dict) and all(isinstance(name, str) for name in state)
        made = arguments[1:] if make is copyreg.__newobj__ else [make, *arguments]
        parts = {"<made of>": list(made), "<items>": list(items or ()), "<pairs>": dict(pairs or ())}
        parts = {name: part for name, part in parts.items() if part}
        return self._of(value, parts | (state if plain else {"<state>": state}), where)


def _digest(described: Any) -> str:
    return digest(json.dumps(described, sort_keys=True))


def _home(kind: type) -> str:
    """Return the name of the module of a class."""
    found = kind.__module__
    return found if isinstance(found, str) else "builtins"  # classes in C can have none


def _is_local(module: str) -> bool:
    """Return whether code has no module that could be read: that of a notebook, and what was made by `exec`."""
    return module == "__main__" or module not in sys.modules


# Keys and records

RECORD = "done.json"
"""The file of an artefact's folder that says what it was made of, and what it holds."""


@dataclasses.dataclass(frozen=True)
class Key:
    """What a result depends on.

    inputs: the captured values. code: digests by module, and of the notebook's statements by name. versions: of the
    libraries. data: fingerprints of the files and folders that are read, by path. They are in `inputs` as well, without
    paths, so a data set that moved is the same one.
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

    ignore: names of captured values that cannot change the result, such as a progress bar's switch. Raises
    ParameterError for a captured value of which no key can be made.
    """
    reading = _Reading(ignore)
    try:
        inputs = reading.describe(value, "the builder")
    except RecursionError:
        raise ParameterError("what the builder uses is nested too deeply", "let it use less") from None
    code = code_of(reading.modules, without=HARNESS)
    return Key(inputs, {**code, **reading.cells}, versions(), reading.data)


def read_record(path: Path) -> dict[str, Any]:
    """Return the record in a file; an empty one if it is missing or cannot be read."""
    kinds = {"key": dict, "files": dict, "seconds": (int, float), "finished": str}
    try:
        record = json.loads(path.read_text("utf-8"))
        whole = all(isinstance(record[name], kind) for name, kind in kinds.items())
        whole = whole and all(isinstance(record["key"][name], dict) for name in ("code", "versions", "data"))
        for name in record["files"]:  # what is damaged is removed: a record of a stranger must not name other files
            files.inside(path.parent, name, links=True)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, DataError):
        return {}
    return record if whole else {}


def hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of all files of an artefact's folder, by relative path."""
    return {name: file_hash(folder / name) for name, _ in sorted(_walk(str(folder))) if name != RECORD}


def faults(folder: Path, recorded: Mapping[str, str]) -> dict[str, str]:
    """Return the files below a folder that are missing or differ from the record, and what is wrong with each."""
    found = {}
    for name, expected in recorded.items():
        path = folder / name
        try:
            if file_hash(path) != expected:
                found[name] = "was changed since" if path.stat().st_size else "is empty"
        except OSError:
            found[name] = "is missing"
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any], most: int = 3) -> str:
    """Return in words what differs between two keys (as dictionaries); empty text if nothing differs."""
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
    part, *rest = place
    named = ".".join(rest) or part
    match part:
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
        case _:
            short = all(not isinstance(value, (list, dict)) and len(str(value)) < 40 for value in (old, new))
            yield f"{named} was {old!r}, is {new!r}" if short else f"{named} changed"
