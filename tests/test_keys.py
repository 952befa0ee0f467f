import ast
import dataclasses
import enum
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import BaseModel, Field
from torch import nn

from wsolnb import keys
from wsolnb.backbones import create_backbone
from wsolnb.data import aviary
from wsolnb.data.metadata_folder import MetadataFolder
from wsolnb.data.store import Store, WithMasks
from wsolnb.errors import ParameterError, RunError
from wsolnb.methods import create_method, grabcut
from wsolnb.methods.features import ConvExtractor, LiveFeatures
from wsolnb.methods.grabcut import GrabCutConfig
from wsolnb.methods.lpcam import LPCAMConfig
from wsolnb.methods.prototypes import fit_prototypes
from wsolnb.notebook import runs
from wsolnb.train.evaluation import validator
from wsolnb.train.loop import TrainingConfig
from wsolnb.train.recipe import Recipe, fit

PACKAGE = Path(keys.__file__).parent


def key(value, ignore=()):
    return keys.key_of(value, ignore).hash


# Notebooks


class Notebook:
    """Cells run one after the other in one namespace, as a kernel runs them."""

    def __init__(self, *cells):
        self.names = {"__name__": "__main__"}
        self.run(*cells)

    def run(self, *cells):
        for cell in cells:
            exec(compile(textwrap.dedent(cell), "<cell>", "exec"), self.names)
        return self

    def key(self, expression="build", ignore=()):
        return key(eval(expression, self.names), ignore)


HELPERS = """
    import dataclasses, enum, functools
    import numpy as np
    from typing import NamedTuple
    import torch
    from pydantic import BaseModel, Field, PrivateAttr, field_validator

    def twice(f):
        @functools.wraps(f)
        def wrapper(*a):
            return f(f(*a))
        return wrapper
"""

# What is edited in a notebook, from one text to another, in a cell whose last name is `build`.
STALE = {
    "the builder": ("def build(f): return 1", "1", "2"),
    "a helper in another cell": ("def h(): return 1\ndef build(f): return h()", "1", "2"),
    "the helper of a helper": ("def g(): return 1\ndef h(): return g()\ndef build(f): return h()", "1", "2"),
    "a global": ("RATE = 1\ndef build(f): return RATE", "1", "2"),
    "the type of a global": ("RATE = 1\ndef build(f): return RATE", "1", "1.0"),
    "a truth value": ("RATE = 1\ndef build(f): return RATE", "1", "True"),
    "nan and its name": ("RATE = float('nan')\ndef build(f): return RATE", "float('nan')", "'nan'"),
    "the sign of zero": ("RATE = 0.0\ndef build(f): return RATE", "0.0", "-0.0"),
    "a key's type": ("D = {1: 2}\ndef build(f): return D", "{1", "{'1'"),
    "a set and a list": ("D = {1}\ndef build(f): return D", "{1}", "['1']"),
    "bytes": ("D = b'a'\ndef build(f): return D", "b'a'", "b'b'"),
    "a default": ("def build(f, n=1): return n", "1", "2"),
    "a named default": ("def build(f, *, n=1): return n", "1", "2"),
    "a global named like a mark": ("defaults = 1\ndef build(f, n=defaults): return n, defaults", "n=defaults", "n=2"),
    "a lambda": ("build = lambda f: 1", "1", "2"),
    "the other lambda of a line": ("one, two = lambda: 1, lambda: 2\nbuild = one", "= one", "= two"),
    "a nested function": ("def build(f):\n    def g(): return 1\n    return g()", "1", "2"),
    "a closure": ("def make(n):\n    return lambda f: n\nbuild = make(1)", "make(1)", "make(2)"),
    "a loop's variable": ("made = [lambda f, i=i: i for i in range(2)]\nbuild = made[0]", "made[0]", "made[1]"),
    "a partial": ("def g(n, f): return n\nbuild = functools.partial(g, 1)", "g, 1", "g, 2"),
    "a decorator": ("def d(f):\n    @functools.wraps(f)\n    def w(*a): return 1, f(*a)\n    return w\n"
                    "@d\ndef build(f): return 0", "1, f", "2, f"),
    "what is decorated": ("@twice\ndef build(f): return 1", "1", "2"),
    "a cached function": ("@functools.cache\ndef build(f): return 1", "1", "2"),
    "without gradients": ("@torch.no_grad()\ndef build(f): return 1", "1", "2"),
    "a generator": ("def g():\n    yield 1\ndef build(f): return list(g())", "1", "2"),
    "a registry": ("R = {}\ndef g(): return 1\nR['g'] = g\ndef build(f): return R['g']()", "1", "2"),
    "mutual recursion": ("def g(n): return build(n - 1)\ndef build(n): return g(n) if n else 1", "else 1", "else 2"),
    "a method": ("class A:\n    def m(self, f): return 1\nbuild = A().m", "1", "2"),
    "a method's global": ("RATE = 1\nclass A:\n    def m(self, f): return RATE\nbuild = A().m", "1", "2"),
    "another object's method": ("class A:\n    def __init__(self, n): self.n = n\n    def m(self, f): return self.n\n"
                                "build = A(1).m", "A(1)", "A(2)"),
    "a property": ("class A:\n    @property\n    def p(self): return 1\ndef build(f): return A().p", "1", "2"),
    "a static method": ("class A:\n    @staticmethod\n    def p(): return 1\ndef build(f): return A.p()", "1", "2"),
    "a class attribute": ("class A:\n    n = 1\ndef build(f): return A.n", "1", "2"),
    "a class attribute set later": ("class A: pass\nA.n = 1\ndef build(f): return A.n", "1", "2"),
    "a base class": ("class B:\n    n = 1\nclass A(B): pass\ndef build(f): return A.n", "1", "2"),
    "a class without methods": ("class A(BaseModel):\n    n: int = Field(3, ge=1)\ndef build(f): return A()",
                                "=1", "=2"),
    "a field's default": ("class A(BaseModel):\n    n: int = 1\ndef build(f): return A()", "1", "2"),
    "a field left out of dumps": ("class A(BaseModel):\n    n: int = Field(exclude=True)\na = A(n=1)\n"
                                  "def build(f): return a", "n=1", "n=2"),
    "a private field": ("class A(BaseModel):\n    _n: int = PrivateAttr(0)\na = A()\na._n = 1\ndef build(f): return a",
                        "= 1", "= 2"),
    "a validator": ("class A(BaseModel):\n    n: int\n    @field_validator('n')\n    @classmethod\n"
                    "    def v(cls, x): return x + 1\ndef build(f): return A(n=1)", "x + 1", "x + 2"),
    "a dataclass with slots": ("@dataclasses.dataclass(slots=True)\nclass A:\n    n: int = 1\ndef build(f): return A()",
                               "= 1", "= 2"),
    "a named tuple": ("class A(NamedTuple):\n    n: int\na = A(1)\ndef build(f): return a", "A(1)", "A(2)"),
    "an enum's member": ("class A(enum.Enum):\n    X = 1\n    Y = 2\ndef build(f): return A.X.value", "X = 1", "X = 3"),
    "which member": ("class A(enum.IntEnum):\n    X = 1\n    Y = 2\na = A.X\ndef build(f): return a", "A.X", "A.Y"),
    "a generator's state": ("r = np.random.default_rng(0)\ndef build(f): return r.normal()", "rng(0)", "rng(1)"),
    "a bound method of C": ("g = np.random.default_rng(0).normal\ndef build(f): return g()", "rng(0)", "rng(1)"),
    "a ufunc": ("g = np.add\ndef build(f): return g(1, 2)", "np.add", "np.multiply"),
    "an import inside": ("def build(f):\n    from wsolnb.metrics import spill", "", ""),
    "a list that is longer than a key shows": ("L = list(range(99))\ndef build(f): return L", "99", "98"),
}  # fmt: skip


@pytest.mark.parametrize("name", STALE)
def test_an_edit_of_a_notebook_makes_its_builder_stale(name):
    cell, old, new = STALE[name]
    assert old in cell
    if name == "an import inside":  # the module is among those that can run, and an edit of it is found there
        code = keys.key_of(Notebook(cell).names["build"]).code
        assert "wsolnb.metrics.spill" in code
        return
    before = Notebook(HELPERS, cell).key()
    assert before == Notebook(HELPERS, cell).key()
    position = cell.rindex(old)
    assert Notebook(HELPERS, cell[:position] + new + cell[position + len(old) :]).key() != before


FRESH = {
    "a comment": ("def build(f): return 1", "def build(f):  # one\n    return 1"),
    "a docstring": ("def build(f): return f + 1", "def build(f):\n    '''Doc.'''\n    return f + 1"),
    "another docstring": ("def build(f):\n    '''Doc.'''\n    return 1",
                          "def build(f):\n    '''Word.'''\n    return 1"),
    "a class's docstring": ("class A:\n    n = 1\ndef build(f): return A", "class A:\n    'A.'\n    n = 1\n"
                            "def build(f): return A"),
    "layout": ("x = [1, 2]\ndef build(f): return x", "x = [\n  1,\n  2]\n\n\ndef build(f):\n\n    return (x)"),
    "another global": ("a = 1\ndef build(f): return 0", "a = 2\ndef build(f): return 0"),
    "a result that is kept": ("a = 1\ndef build(f): return 0", "a = 1\ndef build(f): return 0\nb = build(0)"),
    "a dictionary's order": ("D = {'a': 1, 'b': 2}\ndef build(f): return D", "D = {'b': 2, 'a': 1}\n"
                             "def build(f): return D"),
    "a cached property that was read": (
        "class A:\n    @functools.cached_property\n    def p(self): return 1\na = A()\ndef build(f): return a.p",
        "class A:\n    @functools.cached_property\n    def p(self): return 1\na = A()\ndef build(f): return a.p\na.p"),
    "a type that only checkers read": ("def build(f): return 1", "def build(f: 'int') -> 'int': return 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", FRESH)
def test_what_changes_no_result_changes_no_key(name):
    one, other = (Notebook(HELPERS, cell).key() for cell in FRESH[name])
    assert one == other


def test_a_cell_that_is_run_again_counts_as_it_is_now():
    notebook = Notebook("def h(): return 1", "def build(f): return h()")
    before = notebook.key()
    assert notebook.run("def h(): return 2").key() != before
    assert notebook.run("# the old one\ndef h(): return 1").key() == before


def test_ignored_names_do_not_count():
    cell = "progress = True\nclass A:\n    pass\na = A()\na.jobs = 1\ndef build(f): return progress, a"
    one, other = Notebook(cell), Notebook(cell.replace("True", "False").replace("1", "2"))
    assert one.key(ignore=runs.HARMLESS) == other.key(ignore=runs.HARMLESS)
    assert one.key() != other.key()
    few, many = (functools.partial(json.dumps, indent=1, workers=number) for number in (1, 8))
    assert key(few, runs.HARMLESS) == key(many, runs.HARMLESS) != key(functools.partial(json.dumps), runs.HARMLESS)
    assert key(few) != key(many)


def test_cells_of_ipython():
    from IPython.core.interactiveshell import InteractiveShell

    main = sys.modules["__main__"]
    try:
        shell = InteractiveShell.instance()
        found = []
        for number in (1, 1, 2):
            for cell in (f"class A:\n    n = {number}", "def build(f):\n    %time A().n\n    return A().n"):
                shell.run_cell(cell).raise_error()
            found.append(key(shell.user_ns["build"]))
        assert found[0] == found[1] != found[2]
    finally:
        InteractiveShell.clear_instance()
        sys.modules["__main__"] = main


def test_the_same_in_another_process():
    program = (
        "def g(x): return x in {'a', 'b', 'c'}\n"
        "def build(f, s=frozenset({'x', 'y', 'z'})): return g('a'), {'p', 'q', 'r'}\n"
        "from wsolnb import keys; print(keys.key_of(build).hash)"
    )
    found = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        found.add(subprocess.check_output([sys.executable, "-c", program], env=environment, text=True))
    assert len(found) == 1


# Values


class Settings(BaseModel):
    n: int = 1
    inner: dict = Field(default={})


class Colour(enum.Enum):
    RED = 1


DIFFERENT = {
    "bf16": lambda: [torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([1.0, 2.0])],
    "shapes": lambda: [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(0), torch.tensor(0.0)],
    "0-d": lambda: [np.array(1), np.array([1]), np.int64(1), 1],
    "signs": lambda: [np.array([0.0]), np.array([-0.0])],
    "objects": lambda: [np.array(["a" * 2000 + "b", None], object), np.array(["a" * 2000 + "c", None], object)],
    "structured": lambda: [np.zeros(2, [("a", "i4")]), np.zeros(2, [("b", "i4")])],
    "masked": lambda: [np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 2], mask=[0, 0])],
    "tables": lambda: [
        pd.DataFrame({"a": [1, 2]}),
        pd.DataFrame({"a": ["1", "2"]}),
        pd.DataFrame({"a": [1.0, 2.0]}),
        pd.DataFrame({"a": pd.Categorical([1, 2])}),
        pd.DataFrame({"a": pd.Categorical([1, 2], [2, 1])}),
        pd.DataFrame({"a": [1, 2]}, index=["x", "y"]),
        pd.DataFrame({"b": [1, 2]}),
        pd.Series([1, 2], name="a"),
    ],
    "missing": lambda: [pd.DataFrame({"a": [x, "b"]}, dtype=object) for x in (None, "", np.nan)],
    "indices": lambda: [pd.Index([*range(200), n]) for n in (1, 2)],
    "long patterns": lambda: [re.compile("a" * 300 + end) for end in "bc"],
    "models": lambda: [Settings(), Settings(inner={"a": Settings()}), Settings(inner={"a": Settings(n=2)})],
    "kinds": lambda: [1, 1.0, True, "1", None, "None", Colour.RED, [1], {"1": 1}, {1: 1}, {1}, b"1", (lambda: 1)],
    "floats": lambda: [float("nan"), "nan", float("inf"), -float("inf"), 0.0, -0.0],
    "classes": lambda: [Settings, Settings(), Colour, np.float32, torch.float32, torch.nn.Linear],
    "mappings": lambda: [{"a": 1}, functools.reduce(lambda c, x: c, [], __import__("collections").Counter(a=1))],
    "dates": lambda: [pd.Timestamp(0), pd.Timestamp(1), np.datetime64(0, "s"), np.datetime64(0, "ms")],
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_values_have_different_keys(name):
    values = DIFFERENT[name]()
    assert len({key(value) for value in values}) == len(values)
    assert [key(value) for value in values] == [key(value) for value in DIFFERENT[name]()]


def test_equal_arrays_are_equal_in_any_layout():
    array = np.arange(12).reshape(3, 4)
    assert key(array.T) == key(np.ascontiguousarray(array.T))
    assert key(torch.arange(12).reshape(3, 4).T) == key(torch.from_numpy(array.T.copy()))
    assert key(array[::2]) != key(array)


def test_what_cannot_be_told_apart_is_an_error():
    for value in (threading.Lock(), (i for i in [1]), sys.stdout):
        with pytest.raises(ParameterError, match="of which no key can be made"):
            key({"a": value})
    ring = []
    ring.append(ring)
    assert key(ring) == key(ring)
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ParameterError, match="nested too deeply"):
        key(deep)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.scale, self.parts = nn.Linear(2, 2), nn.BatchNorm1d(2), 1.0, [1, 2]
        self.register_buffer("hidden", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.norm(self.layer(x)) * self.scale


class OtherNet(Net):
    pass


def _statistics(net):
    net.train()(torch.randn(8, 2))


NETWORKS = {
    "weight": lambda net: net.layer.weight.data[0, 0].add_(1),
    "buffer": lambda net: net.hidden.add_(1),
    "statistics": _statistics,
    "attribute": lambda net: setattr(net, "scale", 2.0),
    "list": lambda net: net.parts.append(3),
    "private attribute": lambda net: setattr(net, "_rate", 2.0),
    "frozen layer": lambda net: net.layer.requires_grad_(False),
    "hook": lambda net: net.register_forward_hook(lambda *_: None),
    "class": lambda net: setattr(net, "__class__", OtherNet),
    "part's class": lambda net: setattr(net.norm, "__class__", nn.SyncBatchNorm),
    "method": lambda net: setattr(net, "forward", lambda x: x),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_its_weights_and_settings(name):
    torch.manual_seed(0)
    net = Net()
    before = key(net)
    torch.manual_seed(0)
    assert key(Net()) == before
    NETWORKS[name](net)
    assert key(net) != before


# Data


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """A tiny rendered benchmark, and its folder."""
    config = aviary.AviaryConfig(classes=2, train=8, val=4, test=4)
    cache = tmp_path_factory.mktemp("cache")
    return SimpleNamespace(
        train=aviary.load(config, "train", cache), val=aviary.load(config, "val", cache), config=config, cache=cache
    )


@pytest.fixture
def data(birds, tmp_path):
    root = shutil.copytree(birds.train.root, tmp_path / "data")
    return lambda **options: type(birds.train)(root, "train", **options)


def _flip(path, keep_time=False):
    status, raw = path.stat(), bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES = {
    "labels": lambda root: (root / "image_class_labels.txt").write_text(
        (root / "image_class_labels.txt").read_text().replace("1 1", "1 2", 1)
    ),
    "boxes": lambda root: _flip(root / "bounding_boxes.txt"),
    "an image": lambda root: _flip(next(root.glob("images/*/*.jpg"))),
    "an image with its old time": lambda root: _flip(next(root.glob("images/*/*.jpg")), keep_time=True),
    "a new file": lambda root: (root / "new.txt").touch(),
    "a lost mask": lambda root: next(root.glob("segmentations/*/*.png")).unlink(),
    "a new name": lambda root: next(root.glob("segmentations/*/*.png")).rename(root / "segmentations" / "other.png"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_data_on_disk_is_seen_in_the_same_process(data, name):
    opened = data()
    before = keys.key_of(opened)
    assert keys.key_of(data()) == before
    CHANGES[name](opened.root)
    assert key(opened) != before.hash
    assert str(opened.root) in before.data


def test_data_elsewhere_is_the_same_and_other_images_are_not(data, birds):
    opened = data()
    opened.name = birds.train.name  # what it calls itself in messages
    assert key(opened) == key(birds.train)
    found = [opened, opened.subset([0, 1]), opened.subset([1, 0]), opened.subset([0]), type(opened)(opened.root, "val")]
    assert len({key(value) for value in found}) == len(found)


def test_odd_folders(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    before = keys.tree(folder)
    (folder / "loop").symlink_to(folder)
    (folder / "broken").symlink_to(folder / "none")
    (folder / ".hidden").touch()
    assert keys.tree(folder) == before
    Path(os.fsdecode(os.fsencode(folder / "n") + b"\xff")).write_text("a")
    assert keys.tree(folder) != before
    assert keys.tree(tmp_path / "none") == "missing"


def test_of_large_folders_lists_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "SMALL", 1)
    for name in ("a.txt", "a.jpg"):
        (tmp_path / name).write_text("1")
    before = keys.tree(tmp_path)
    (tmp_path / "a.jpg").write_text("2")
    assert keys.tree(tmp_path) == before  # the limit that the docstring names
    (tmp_path / "a.txt").write_text("2")
    assert keys.tree(tmp_path) != before


def test_lists_that_lie_elsewhere_and_stored_masks(tmp_path):
    from PIL import Image

    for folder in ("images", "lists/train", "masks"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "images/a.png")
    (tmp_path / "lists/train/image_ids.txt").write_text("a.png\n")
    (tmp_path / "lists/train/class_labels.txt").write_text("a.png,0\n")
    opened = MetadataFolder(tmp_path / "images", tmp_path / "lists", "train")
    store = Store(tmp_path / "masks")
    masked = WithMasks(opened, store)
    found = [key(opened), key(masked)]
    store.write_mask("a.png", np.ones((4, 4), bool))
    found.append(key(masked))
    assert key(opened) == found[0]
    store.write_mask("a.png", np.zeros((4, 4), bool))
    found.append(key(masked))
    (tmp_path / "lists/train/image_sizes.txt").write_text("a.png,4,4\n")
    found += [key(opened), key(masked)]
    assert len(set(found)) == len(found)


def test_a_data_set_in_memory_counts_with_all_it_holds():
    cell = """
        from wsolnb.data.base import LocalizationDataset
        class Noise(LocalizationDataset):
            def __init__(self, images):
                self._images, self.class_names, self.labels = images, ("a",), ((0,),) * len(images)
                self.image_ids = tuple(map(str, range(len(images))))
            def read(self, index, truth=True): return self._images[index]
    """
    kind = Notebook(cell).names["Noise"]
    assert key(kind(np.zeros((2, 3)))) == key(kind(np.zeros((2, 3)))) != key(kind(np.ones((2, 3))))


def test_a_path_stands_for_an_artefact_or_for_what_lies_there(tmp_path):
    run = runs.start("test", {"run_folder": tmp_path})
    folder = run.cached("a", lambda folder: (folder / "w.txt").write_text("1"))
    inside, elsewhere = folder / "w.txt", tmp_path / "b.txt"
    elsewhere.write_text("1")
    assert len({key(path) for path in (folder, inside, elsewhere, tmp_path / "none")}) == 4
    assert not keys.key_of(folder).data
    before = key(folder), key(inside)
    os.utime(inside)
    assert (key(folder), key(inside)) == before
    inside.write_text("2")  # no longer what the record says
    assert key(folder) != before[0]
    assert key(inside) != before[1]


# Code


def _package(folder, **sources):
    for name, source in {"__init__": "", **sources}.items():
        path = folder / f"{name.replace('__of__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))


# Source of the module `start`, with modules a, b, the package p (which re-exports `f` of p.x), and who is reached.
IMPORTS = {
    "from wsolnb.a import f": {"a"},
    "import wsolnb.a": {"a"},
    "import wsolnb.a as c": {"a"},
    "from wsolnb import a": {"a"},
    "from .a import f": {"a"},
    "from . import a": {"a"},
    "from wsolnb.a import *": {"a"},
    "def g():\n    from wsolnb.a import f": {"a"},
    "def g():\n    from wsolnb.a import f\ndef h():\n    from wsolnb.b import f": {"a", "b"},
    "try:\n    from wsolnb.a import f\nexcept ImportError:\n    from wsolnb.b import f": {"a", "b"},
    "if TYPE_CHECKING:\n    from wsolnb.a import f\nelse:\n    from wsolnb.b import f": {"b"},
    "if not TYPE_CHECKING:\n    from wsolnb.a import f": {"a"},
    "from wsolnb.p import f": {"p.x"},
    "from wsolnb.p import x": {"p.x"},
    "from wsolnb import p\np.f()": {"p.x"},
    "from wsolnb import p\np.y.f()": {"p.y"},
    "from wsolnb import p\ng(p)": {"p", "p.x", "p.y"},
    "import wsolnb.p\nwsolnb.p.y.f()": {"p", "p.x", "p.y"},
    "import wsolnb.a\nwsolnb.b.f()": {"a", "b"},
    "from wsolnb.q import f": {"q", "q.x", "a"},  # a package that does more than import
    "from wsolnb.c import f": {"c", "d"},  # a cycle
    "from wsolnb.e import f": {"a", "e"},  # imported or defined
}


@pytest.mark.parametrize("source", IMPORTS)
def test_imports_are_followed(tmp_path, monkeypatch, source):
    _package(
        tmp_path, start=source, a="f = 1", b="f = 1", c="from wsolnb.d import g\nf = 1",
        d="from wsolnb.c import f\ng = 1",
        e="try:\n    from wsolnb.a import f\nexcept ImportError:\n    f = 1",
        p__of____init__="from wsolnb.p.x import f\n__all__ = ['f']", p__of__x="f = 1", p__of__y="f = 1",
        q__of____init__="from wsolnb.a import f as g\nfrom wsolnb.q.x import f\ng()", q__of__x="f = 1",
    )  # fmt: skip
    monkeypatch.setattr(keys, "package_root", lambda: tmp_path)
    found = {name.removeprefix("wsolnb.") for name in keys.code_of(["wsolnb.start"])}
    expected = IMPORTS[source] | {"start"}
    # Below the whole package, what only imports may be named too.
    assert found - {"p", "wsolnb"} == expected - {"p"}


def test_a_file_that_is_not_installed_counts_as_the_package_does(tmp_path, monkeypatch):
    (tmp_path / "beside_a.py").write_text("import beside_b\ndef build(f): return beside_b.g()")
    (tmp_path / "beside_b.py").write_text("def g(): return 1")
    monkeypatch.syspath_prepend(tmp_path)
    import beside_a

    before = keys.key_of(beside_a.build)
    assert {"beside_a", "beside_b"} <= before.code.keys()
    (tmp_path / "beside_b.py").write_text("def g(): return 2 + 2")
    assert key(beside_a.build) != before.hash


def test_code_that_changed_under_a_running_process_is_an_error(monkeypatch, tmp_path):
    path = str(PACKAGE / "errors.py")
    for old, fits in ((b"X = 1", False), (b"# a comment\n" + Path(path).read_bytes(), True)):
        keys._module.cache_clear()
        monkeypatch.setitem(keys._AT_START, path, old)
        if fits:
            assert keys.code_of(["wsolnb.errors"])
        else:
            with pytest.raises(RunError, match=r"errors.py was changed since"):
                keys.code_of(["wsolnb.errors"])
    keys._module.cache_clear()


def test_versions_count(monkeypatch):
    before = keys.key_of(1)
    monkeypatch.setattr(keys, "versions", lambda: {**before.versions, "torch": "0"})
    after = keys.key_of(1)
    assert after.hash != before.hash
    old, new = dataclasses.asdict(before), dataclasses.asdict(after)
    assert keys.differences(old, new) == f"torch was {before.versions['torch']}, is 0"


def test_cells_of_a_whole_notebook():
    cells = [
        "%matplotlib inline\nfrom wsolnb.data import CUB",
        "%%bash\nls (",
        "x = (8\n   % 3)  # rest",
        "?CUB",
        "a = (",
    ]
    found = keys.code_of_cells(cells)
    assert {"cells", "wsolnb.data.cub"} <= found.keys()
    assert "wsolnb.data.coco" not in found
    assert found == keys.code_of_cells([cell.replace("# rest", "# no") for cell in cells])
    for old, new in (("inline", "agg"), ("ls (", "ls"), ("3)", "4)"), ("a = (", "b = (")):
        assert found != keys.code_of_cells([cell.replace(old, new) for cell in cells])


# Every module of the package in turn


def _recipe(method, backbone, **options):
    training = TrainingConfig(epochs=1, lr=1e-4, device="cpu", precision="fp32", select="top1_loc")
    return Recipe(
        method=method, backbone=backbone, options=options, image_size=64, batch_size=4, training=training,
        protocol="crop_resize",
    )  # fmt: skip


def _fit(method, backbone, **options):
    def make(run, birds):
        recipe = _recipe(method, backbone, **options)
        fit(run, method, recipe, birds.train, validator(birds.val, recipe.test_transform()), progress=False)

    return make


@functools.cache
def _guide():
    return grabcut.Attend(create_backbone("vit_mini", image_size=64).eval())


def _masks(run, birds):
    # Nothing of this file is among what the builder captures: this file imports too much to tell anything.
    run.cached("masks", grabcut.maker(birds.val, _guide(), GrabCutConfig(size=32), 1, False))


def _segmenter(run, birds):
    store = Store(run.folder / "truth")
    for index, name in enumerate(birds.train.image_ids):
        store.write_mask(name, birds.train[index].mask)
    recipe = _recipe("deeplabv2", "resnet_mini").model_copy(update={"output_stride": 8})
    fit(run, "segmenter", recipe, WithMasks(birds.train, store), progress=False)


def _prototypes(run, birds):
    extractor = ConvExtractor(create_method("cam", create_backbone("resnet_mini"), 2))
    config = LPCAMConfig.paper(scales=(1.0,), clusters=2)
    run.cached("prototypes", functools.partial(fit_prototypes, LiveFeatures(extractor, birds.val, 64), config))


ARTEFACTS = {
    "cam": _fit("cam", "resnet_mini"),
    "tscam": _fit("tscam", "vit_mini"),
    "scm": _fit("scm", "vit_mini"),
    "masks": _masks,
    "segmenter": _segmenter,
    "prototypes": _prototypes,
}
"""Each makes one artefact of that name: (run, tiny data sets) -> None."""

NEVER = {
    "cam": ["data/coco.py", "data/voc.py", "data/store.py", "methods/tscam.py", "methods/lpcam.py", "methods/irn.py",
            "methods/scm.py", "methods/grabcut.py", "papers/", "pretraining/", "notebook/", "metrics/segmentation.py",
            "keys.py", "seeds.py", "train/seeds.py", "train/segmentation.py", "train/multilabel.py"],
    "tscam": ["methods/scm.py", "methods/cam.py", "methods/irn.py", "data/coco.py", "papers/", "pretraining/",
              "notebook/", "keys.py"],
    "scm": ["methods/cam.py", "methods/irn.py", "methods/crf.py", "data/coco.py", "papers/", "pretraining/",
            "notebook/", "keys.py"],
    "masks": ["methods/locloc.py", "methods/ppd.py", "methods/cam.py", "papers/", "pretraining/", "train/"],
    "segmenter": ["methods/cam.py", "methods/irn.py", "methods/lpcam.py", "papers/", "metrics/", "notebook/"],
    "prototypes": ["methods/irn.py", "methods/scm.py", "papers/", "train/", "pretraining/", "data/coco.py"],
}  # fmt: skip
"""Modules and folders whose changes must not make an artefact stale."""

ALWAYS = {
    "cam": ["methods/cam.py", "data/cub.py", "train/loop.py", "train/recipe.py", "backbones/cnn.py",
            "data/transforms.py", "metrics/localization.py"],
    "tscam": ["methods/tscam.py", "methods/base.py", "train/evaluation.py", "data/loading.py"],
    "scm": ["methods/scm.py", "methods/stencil.py", "methods/tscam.py", "maps.py"],
    "masks": ["methods/grabcut.py", "data/store.py", "data/cub.py"],
    "segmenter": ["methods/deeplabv2.py", "data/store.py", "train/loop.py"],
    "prototypes": ["methods/prototypes.py", "methods/lpcam.py", "methods/features.py", "methods/cam.py"],
}  # fmt: skip
"""Modules whose changes must make an artefact stale."""

MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def _name(module):
    return ".".join(["wsolnb", *Path(module).with_suffix("").parts]).removesuffix(".__init__")


@pytest.fixture(scope="module")
def made(birds, tmp_path_factory):
    """The artefacts: of each where its code starts, its key, and the modules of which a function ran meanwhile."""
    found = {}
    _guide()  # before anybody watches: it is made by others than the artefact's builder
    run = runs.start("test", {"run_folder": tmp_path_factory.mktemp("run")})
    root, code_of = str(PACKAGE), keys.code_of
    for name, make in ARTEFACTS.items():
        starts, ran = [], set()

        def spy(modules, without=(), starts=starts):
            starts.append(sorted(modules))
            return code_of(starts[-1], without)

        def watch(frame, event, _, ran=ran):
            code = frame.f_code
            if event == "call" and code.co_name != "<module>":
                ran.add(code.co_filename)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(keys, "code_of", spy)
            threading.setprofile(watch)
            sys.setprofile(watch)
            try:
                make(run, birds)
            finally:
                sys.setprofile(None)
                threading.setprofile(None)
        executed = {Path(file).relative_to(root).as_posix() for file in ran if file.startswith(root)}
        (record,) = [r for r in map(keys.read_record, run.checkpoints.glob("*/done.json")) if r.get("name") == name]
        found[name] = SimpleNamespace(starts=starts[0], code=record["key"]["code"], executed=executed)
    return found


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the package, which keys are computed from."""
    root = shutil.copytree(PACKAGE, tmp_path / "wsolnb", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    monkeypatch.setattr(keys, "package_root", lambda: root)
    return root


def _code(made):
    return {name: keys.code_of(artefact.starts, keys.HARNESS) for name, artefact in made.items()}


def _with_another_number(source):
    """Return the source with one number changed, or with one more if it has none."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            lines = source.encode().splitlines(keepends=True)
            line = lines[node.lineno - 1]
            text = line[node.col_offset : node.end_col_offset]
            if node.lineno == node.end_lineno and re.fullmatch(rb"\d+(\.\d+)?", text):
                lines[node.lineno - 1] = line[: node.col_offset] + b"1" + text + line[node.end_col_offset :]
                return b"".join(lines).decode()
    return f"{source}\n_MORE = 1\n"


@pytest.mark.parametrize("name", ARTEFACTS)
def test_all_code_that_ran_is_part_of_the_key(made, name):
    harness = {m for m in MODULES if f"{_name(m)}.".startswith(tuple(f"{h}." for h in keys.HARNESS))}
    executed = made[name].executed - harness
    assert len(executed) > 5
    assert {_name(module) for module in executed} <= made[name].code.keys()


@pytest.mark.slow
def test_a_changed_number_makes_exactly_those_stale_that_depend_on_it(made, copy):
    before = _code(made)
    assert before == {name: artefact.code for name, artefact in made.items()}
    staled = {}
    for module in MODULES:
        path = copy / module
        source = path.read_text()
        path.write_text(_with_another_number(source))
        assert keys.source_digest(path.read_text()) != keys.source_digest(source), module
        after = _code(made)
        staled[module] = {name for name in made if after[name] != before[name]}
        path.write_text(source)
        expected = {name for name in made if _name(module) in before[name]}
        if path.name == "__init__.py":  # one that does more than import counts with all that lies below it
            below = f"{_name(module)}."
            expected |= {name for name in made if any(other.startswith(below) for other in before[name])}
        assert staled[module] == expected, module
    for name in made:
        for listed in NEVER[name]:
            assert not [m for m in MODULES if m.startswith(listed) and "__init__" not in m and name in staled[m]], (
                listed
            )
        for listed in ALWAYS[name]:
            assert name in staled[listed], (name, listed)


def test_comments_and_docstrings_make_nothing_stale(made, copy):
    before = _code(made)
    for module in MODULES:
        path = copy / module
        source = path.read_text()
        tree = ast.parse(source)
        lines = source.splitlines()
        bodies = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))]
        for node in sorted(bodies, key=lambda node: -node.body[0].lineno):
            first = node.body[0]
            if first.lineno > node.lineno and not getattr(first, "decorator_list", None):
                # Into a function that has a docstring a second one, which is no more than a text; else a first one.
                lines.insert(first.lineno - 1, " " * first.col_offset + '"""Another word."""')
        future = next((i for i, line in enumerate(lines) if line.startswith("from __future__")), -1)
        lines.insert(future + 1, "# A comment.")
        text = "\n".join(lines).replace('"""\n', '""" # and one more\n', 1)
        path.write_text(text)
        assert text != source
        ast.parse(text)
    assert _code(made) == before


def test_what_only_looks_at_the_clock(made):
    """The search in the syntax trees is fast enough to be done for every artefact."""
    keys._module.cache_clear()
    started = time.perf_counter()
    _code(made)
    assert time.perf_counter() - started < 20


def test_a_record_tells_what_changed():
    old = {"inputs": {"a": 1, "b": "x" * 99}, "code": {"m": "1", "n": "1"}, "versions": {}, "data": {"p": "1"}}
    new = {"inputs": {"a": 2, "b": "y" * 99}, "code": {"m": "2", "o": "1"}, "versions": {}, "data": {"p": "2"}}
    assert keys.differences(old, new, most=9) == (
        "the code of m changed, the code of n is no longer run, the code of o is new, the files of p changed, "
        "a was 1, is 2, b changed"
    )
    assert keys.differences(old, json.loads(json.dumps(old))) == ""
