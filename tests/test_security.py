"""Files of strangers: none of them runs code, leaves its folder, or takes all memory. See SECURITY.md."""

import ast
import json
import os
import pickle
import re
import struct
import subprocess
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from wsolnb.backbones.checkpoints import load_weights, read_tensors
from wsolnb.data import open_dataset, store
from wsolnb.data.pictures import read_picture
from wsolnb.data.store import Store, read_arrays
from wsolnb.errors import DataError, ParameterError, WsolnbError
from wsolnb.methods.features import FeatureDump
from wsolnb.notebook import claims, params, reports, runs, site, sweeps
from wsolnb.train import loop

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "wsolnb").rglob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]

# ----------------------------------------------------------------------------------------------------- what is called

FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads",
    "shelve.open", "joblib.load", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "pd.read_pickle",
    "os.system", "os.popen", "shutil.unpack_archive", "torch.hub.load", "torch.package", "yaml.unsafe_load",
    "yaml.full_load", "yaml.load_all", "yaml.full_load_all", "yaml.unsafe_load_all", "tempfile.mktemp",
}  # fmt: skip
METHODS = (".extractall", ".extract", ".load_state")
"""Methods that unpack wherever an archive says, or unpickle."""
KNOWN = {("workers.py", "pickle.loads"), ("files.py", "yaml.load")}
"""A worker process gets its task as a pickle from the process that has started it, by a pipe of its own. `read_yaml`
is given a loader, a safe one."""


def dotted(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def faults(tree: ast.AST, name: str) -> list[str]:
    """Return the calls of a program that could run what a file says, and writes that `wsolnb.files` does not make."""
    found, safe = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and "yaml.SafeLoader" in map(dotted, node.bases):
            safe.add(node.name)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called, options = dotted(node.func), {word.arg: word.value for word in node.keywords}
        given = [dotted(argument) for argument in node.args]
        if called == "partial" and given:
            called, given = given[0], given[1:]
        on = {arg: isinstance(value, ast.Constant) and value.value is True for arg, value in options.items()}
        off = {arg: isinstance(value, ast.Constant) and value.value is False for arg, value in options.items()}
        bad = called in FORBIDDEN and (name, called) not in KNOWN
        bad |= called == "torch.load" and not on.get("weights_only")
        silent = "allow_pickle" not in options and name.endswith(".ipynb")  # a lesson relies on NumPy's default
        bad |= called in ("np.load", "numpy.load") and not silent and not off.get("allow_pickle")
        bad |= (
            called == "yaml.load"
            and (name, called) not in KNOWN
            and not {*given[1:], dotted(options.get("Loader"))} & safe
        )
        bad |= "shell" in options and not off.get("shell")
        written = bool(node.args) and isinstance(node.args[0], ast.Constant)  # an expression in the program itself
        bad |= called.endswith((".eval", ".query")) and bool(node.args) and not written  # a network's has no argument
        bad |= called.endswith(METHODS) and not called.endswith(".str.extract")
        bad |= called == "Image.open" and name in ("base.py", "store.py") and "formats" not in options
        if bad:
            found.append(f"{name}, line {node.lineno}: {ast.unparse(node)[:80]}")
    return found


def test_the_package_calls_nothing_that_runs_a_file():
    found = [fault for path in SOURCES for fault in faults(ast.parse(path.read_text("utf-8")), path.name)]
    for path in sorted((ROOT / "notebooks").rglob("*.ipynb")):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            if cell["cell_type"] == "code" and not "".join(cell["source"]).startswith("%%"):
                lines = [line for line in "".join(cell["source"]).split("\n") if not line.lstrip().startswith("%")]
                found += faults(ast.parse("\n".join(lines)), path.name)
    assert len(SOURCES) > 90
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "np.load(path)", "np.load(path, allow_pickle=True)", "torch.load(path)", "torch.load(path, weights_only=False)",
        "yaml.load(text, yaml.Loader)", "yaml.load(text, Loader=yaml.FullLoader)", "yaml.unsafe_load(text)",
        "pickle.loads(content)", "eval(text)", "exec(text)", "table.eval(text)", "table.query(text)",
        "archive.extractall(folder)", "subprocess.run(text, shell=True)", "partial(np.load, mmap_mode='r')",
        "os.system(text)", "accelerator.load_state(folder)",
    ],
)  # fmt: skip
def test_the_search_finds(line):
    assert faults(ast.parse(f"def f():\n    return {line}"), "some.py")


# ------------------------------------------------------------------------------------------------------- pickled code


class Exploit:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def trained(read):
    """What `state.pt` is read with."""

    def load(path: Path) -> None:
        read(path, {}, {}, None)

    return load


READERS = {
    "weights": lambda path: read_tensors(path),
    "weights of a network": lambda path: load_weights(torch.nn.Linear(2, 2), path),
    "state": trained(loop._resume),
    "last": lambda path: loop.load_checkpoint(torch.nn.Linear(2, 2), path.parent, "last"),
    "arrays": lambda path: read_arrays(path, ("maps",), "remedy"),
    "maps": lambda path: Store(path.parent).read_maps(path.stem),
    "mask": lambda path: Store(path.parent).read_mask(path.stem),
    "features": lambda path: FeatureDump(path.parent),
    "picture": lambda path: read_picture(path, "it"),
    "names": lambda path: pd.DataFrame(runs.read_provenance(path)),
}
ENDING = {"state": "state.pt", "last": "last.safetensors", "arrays": "a.npz", "maps": "a.npz", "mask": "a.png"}
ENDING |= {"features": "weight.npy", "picture": "a.jpg", "names": "a.json"}


def malicious(kind: str, path: Path, made: Path) -> None:
    """Write a file that would make `made` if anybody unpickled it."""
    if kind == "a pickle":
        path.write_bytes(pickle.dumps({"weight": Exploit(made)}))
    elif kind == "torch's archive":
        torch.save({"weight": torch.zeros(2, 2), "bias": Exploit(made)}, path)
    elif kind == "torch's old format":
        torch.save({"state_dict": Exploit(made)}, path, _use_new_zipfile_serialization=False)
    else:
        save = np.savez if kind == "npz" else np.save
        values = np.array([Exploit(made)], dtype=object)
        with path.open("wb") as file:
            save(file, **{"maps": values, "classes": values}) if kind == "npz" else save(file, values)


LOADERS = {
    "a pickle": lambda path: pickle.loads(path.read_bytes()),
    "torch's archive": lambda path: torch.load(path, weights_only=False),
    "torch's old format": lambda path: torch.load(path, weights_only=False),
    "npz": lambda path: np.load(path, allow_pickle=True)["maps"],
    "npy": lambda path: np.load(path, allow_pickle=True),
}
"""How each kind of file would be read without care."""


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_a_pickle(tmp_path, reader, kind):
    path = tmp_path / ENDING.get(reader, "a.pth")
    if reader == "features":
        image = {"id": "a", "labels": [0], "size": [9, 9]}
        index = {"class_names": ["one"], "scales": [1.0], "flip": False, "images": [image]}
        (tmp_path / "index.json").write_text(json.dumps(index))
    malicious(kind, path, tmp_path / "made")
    if reader == "names":
        assert READERS[reader](path).empty
    else:
        with pytest.raises(WsolnbError) as caught:
            READERS[reader](path)
        assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "made").exists(), "the file was run"


@pytest.mark.parametrize("kind", LOADERS)
def test_the_malicious_files_would_do_it(tmp_path, kind):
    """Without the guard each of them makes its folder."""
    malicious(kind, tmp_path / "file", tmp_path / "made")
    LOADERS[kind](tmp_path / "file")
    assert (tmp_path / "made").is_dir()


# --------------------------------------------------------------------------------------------------- parameters, YAML

TAGS = [
    "!!python/object/apply:os.mkdir [{made}]",
    "!!python/object/new:os.mkdir [{made}]",
    "!!python/name:os.system",
    "!!python/module:os",
    '!!python/object/apply:builtins.exec ["import os; os.mkdir({made!r})"]',
]


@pytest.mark.parametrize("tag", TAGS)
def test_no_yaml_of_a_stranger_runs_a_tag(tmp_path, tag):
    made = tmp_path / "made"
    path = tmp_path / "file.yaml"
    path.write_text(f"claims: {tag.format(made=str(made))}\nboards: []\nprotocols: {{}}\n")
    for load in (params.load_parameter_file, sweeps.read, claims.load, reports.boards):
        with pytest.raises(ParameterError, match=r"file\.yaml"):
            load(str(path))
    declared = params.notebook_parameters("01_data")
    for parameter in declared.values():  # typed on the command line
        try:
            value = parameter.parse(tag.format(made=str(made)))
        except ParameterError:
            continue
        assert isinstance(value, str), "a text stays a text"
    assert not made.exists()


def test_a_small_yaml_cannot_become_a_large_one(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    texts = ["\n".join(lines), "[" * 5000, f"a: {'9' * 5000}", "a: 2001-99-99", "a: {<<: *b}"]
    for text in texts:
        (tmp_path / "p.yaml").write_text(text)
        started = time.process_time()
        for load in (params.load_parameter_file, claims.load, reports.boards):
            with pytest.raises(ParameterError, match=r"p\.yaml"):
                load(str(tmp_path / "p.yaml"))
        assert time.process_time() - started < 10


EVIL = [
    "'; import os; os.mkdir('made') #", '"""\nimport os\nos.mkdir("made")\n"""', "x\nimport os; os.mkdir('made')",
    "\\", '\\"; import os; os.mkdir("made") #', "{__import__('os').mkdir('made')}", "\u2028import os",
    "\r\n!mkdir made",
    "%run made", "!mkdir made", "\0", "x'\"\\\n" * 3, "../../x", "$(mkdir made)", "`mkdir made`",
]  # fmt: skip


@pytest.mark.parametrize("text", EVIL)
def test_what_papermill_writes_into_a_notebook_is_the_text_and_nothing_else(text):
    from papermill.translators import PythonTranslator

    values = {"text": text, "texts": [text], "by_name": {text: text}}
    source = PythonTranslator.codify(values)
    tree = ast.parse(source)
    assert all(isinstance(node, ast.Assign) for node in tree.body)
    assert {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body} == values


@pytest.mark.parametrize(
    "name", ["x; import os", "x\nimport os", "__import__('os')", "run_folder; x", "os.system", "ipython", "é", ""]
)
def test_a_name_that_is_no_parameter_never_reaches_a_notebook(tmp_path, name):
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({name: 1}))
    with pytest.raises(ParameterError, match="has no parameter"):
        params.check_parameters("01_data", params.load_parameter_file(tmp_path / "p.yaml"))
    with pytest.raises(ParameterError):
        params.check_parameters("01_data", params.parse_overrides([f"{name}=1"]))


MEASURES = [
    "a",
    "`b/c`",
    "a - `b/c` / 2 ** 3",
    "-a * (a + 1.5)",
    "`b/c` != 'cpu'",
    "a == 2",
    "a / 91.6e6",
    "(a + 1) / 3",
]


def test_a_claims_measure_is_arithmetic(tmp_path):
    table = pd.DataFrame({"a": [1.0, 2.0], "b/c": [3.0, 5.0]})
    for text in MEASURES:
        expected = table[text] if text in table else table.eval(text)
        assert np.array_equal(claims.measured(text, table).astype(float), expected.astype(float)), text
    made = tmp_path / "made"
    for text in (
        f"@pd.io.common.os.mkdir({str(made)!r})", f"a.to_pickle({str(made)!r})", f"a.values.tofile({str(made)!r})",
        "a.__class__", "a.map(print)", "print(a)", "[x for x in a]", "lambda: a", "a if a else a", "a[0]", "a; a",
        "(a := 1)", "9 ** 9 ** 9 ** 9", "'x' * 9 ** 9", "missing", "",
    ):  # fmt: skip
        with pytest.raises((SyntaxError, ValueError, ArithmeticError, TypeError)):
            claims.measured(text, table)
    assert not made.exists()


# ------------------------------------------------------------------------------------------------ out of their folder


@pytest.fixture
def secret(tmp_path):
    """A folder beside the one that is looked at, with files that nobody may read or change."""
    folder = tmp_path / "secret"
    folder.mkdir()
    np.savez(folder / "x.npz", scale_0=np.zeros((1, 2, 3, 3)), maps=np.zeros((1, 2, 2)), classes=np.zeros(1))
    from PIL import Image

    for ending in ("png", "jpg"):
        Image.new("L", (8, 8)).save(folder / f"x.{ending}")
    return folder


@pytest.mark.parametrize("image", ["../secret/x", "{secret}/x", "a/../../secret/x", "linked/x", "x\0", "y" * 300, ""])
def test_a_feature_dump_reads_and_writes_in_its_folder(tmp_path, secret, image):
    image = image.format(secret=secret)
    folder = tmp_path / "dump"
    folder.mkdir()
    (folder / "linked").symlink_to(secret)
    np.save(folder / "weight.npy", np.zeros((1, 2)))
    index = {"class_names": ["one"], "scales": [1.0], "flip": False}
    index["images"] = [{"id": image, "labels": [0], "size": [9, 9]}]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="the name "):
        FeatureDump(folder)


@pytest.mark.parametrize("image", ["../secret/x", "{secret}/x", "linked/x"])
def test_a_store_reads_and_writes_in_its_folder(tmp_path, secret, image):
    image = image.format(secret=secret)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "linked").symlink_to(secret)
    found = Store(tmp_path / "store")
    for use in (found.read_mask, found.read_maps, lambda name: found.write_mask(name, np.ones((2, 2), bool))):
        with pytest.raises(DataError, match="leads out of the folder"):
            use(image)


def test_the_lists_of_a_data_set_name_files_of_its_folder(tmp_path, secret):
    """The list of a stranger's data set names a picture elsewhere; without the check it would be shown as an image."""
    root, path = tmp_path / "voc", "../../secret/x"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text(f"{path}\n")
    box = "".join(f"<{tag}>2</{tag}>" for tag in ("xmin", "ymin", "xmax", "ymax"))
    (secret / "x.xml").write_text(f"<a><object><name>dog</name><bndbox>{box}</bndbox></object></a>")
    with pytest.raises(DataError, match="leads out of the folder"):
        open_dataset("voc", root, "train")[0]

    cub, rows = tmp_path / "cub", {"images": f"1 {path}.jpg", "image_class_labels": "1 1", "classes": "1 001.bird"}
    rows |= {"bounding_boxes": "1 1 1 3 3", "train_test_split": "1 1", "train_val_test_split": "1 train"}
    (cub / "images").mkdir(parents=True)
    for name, text in rows.items():
        (cub / f"{name}.txt").write_text(f"{text}\n")
    with pytest.raises(DataError, match="leads out of the folder"):
        open_dataset("cub", cub, "train")[0]

    lists = tmp_path / "meta" / "train"
    lists.mkdir(parents=True)
    listed = {"image_ids": f"{path}.jpg", "class_labels": f"{path}.jpg,0", "localization": f"{path}.jpg,1,1,5,5"}
    for name, text in listed.items():
        (lists / f"{name}.txt").write_text(f"{text}\n")
    (tmp_path / "images" / "deep").mkdir(parents=True)
    with pytest.raises(DataError, match="leads out of the folder"):
        open_dataset("metadata", tmp_path / "images" / "deep", "train", metadata_root=tmp_path / "meta")

    coco = tmp_path / "coco"
    (coco / "train2014").mkdir(parents=True)
    (coco / "annotations").mkdir()
    found = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "area": 4, "iscrowd": 0}
    content = {"images": [{"id": 1, "file_name": f"{path}.jpg"}], "categories": [{"id": 1, "name": "cat"}]}
    content["annotations"] = [found | {"segmentation": [[1, 1, 3, 1, 3, 3]]}]
    (coco / "annotations/instances_train2014.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="leads out of the folder"):
        open_dataset("coco", coco, "trainval")[0]


def test_a_book_holds_files_of_the_repository_only(tmp_path, monkeypatch):
    from bs4 import BeautifulSoup

    (tmp_path / "root").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    monkeypatch.setattr(site, "repository_root", lambda: tmp_path / "root")
    soup = BeautifulSoup('<main><p><a href="../../secret.txt">a</a></p></main>', "html.parser")
    site._link(soup, site.Page(name="a", source="notebooks/a.ipynb", notebook=None, group=""), [], tmp_path / "out")
    assert not list(tmp_path.rglob("out/**/secret.txt"))
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "secret.txt"]


# ------------------------------------------------------------------------------------------------------------ bombs


def png(width: int, height: int) -> bytes:
    """Return a PNG file of a few bytes that says it is of this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


def test_pictures_that_would_fill_the_memory_are_refused(tmp_path):
    path = tmp_path / "a.png"
    for width, height in ((60_000, 60_000), (2**31 - 1, 2**31 - 1), (10**9, 1)):
        path.write_bytes(png(width, height))
        for read in (lambda: read_picture(path, "it"), lambda: Store(tmp_path).read_mask("a")):
            started = time.process_time()
            with pytest.raises(DataError, match=r"a\.png"):
                read()
            assert time.process_time() - started < 2
    path.write_bytes(png(60_000, 60_000))
    with pytest.raises(DataError, match="decompression bomb"):
        read_picture(path, "it")


def test_postscript_is_not_run(tmp_path):
    """Pillow would hand it to Ghostscript, whatever the file is called."""
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    for name in ("a.eps", "a.jpg"):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match="cannot identify"):
            read_picture(tmp_path / name, "it")


def test_archives_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    head = b"\x93NUMPY\x01\x00"
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({3 * 2**30},)}}".ljust(117).encode() + b"\n"
    head += struct.pack("<H", len(text)) + text
    for name, content in (("a", head + bytes(3 * 2**20)), ("b", head)):
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("maps.npy", content)
    assert (tmp_path / "a.npz").stat().st_size < 2**13
    monkeypatch.setattr(store, "MOST", 2**20)
    with pytest.raises(DataError, match=r"unpacks to 0.0 GiB, where 0 are the most"):
        read_arrays(tmp_path / "a.npz", ("maps",), "make it again")
    # One that lies about its size: the array says so, the archive holds little.
    with pytest.raises(DataError, match=r"b\.npz"):
        read_arrays(tmp_path / "b.npz", ("maps",), "make it again")


def test_an_annotation_that_grows_without_end_is_refused(tmp_path):
    lines = ['<!DOCTYPE a [<!ENTITY x0 "xxxxxxxxxx">']
    lines += [f'<!ENTITY x{i} "{f"&x{i - 1};" * 10}">' for i in range(1, 12)]
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a\n")
    (tmp_path / "Annotations/a.xml").write_text("\n".join(lines) + "]><a>&x11;</a>")
    with pytest.raises(DataError, match="not well-formed XML"):
        open_dataset("voc", tmp_path, "train")


# ----------------------------------------------------------------------------------------------------- what is served


def test_the_lab_asks_for_a_token():
    told = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "jupyter lab" in told
    weakened = r"token|password|ip=|--ip|allow_origin|allow_remote|disable_check_xsrf|allow.root|--no-auth"
    assert not re.search(weakened, told)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in tracked if re.search(r"jupyter\w*_config|jupyter_\w*\.json", name)]


def test_a_server_has_a_token_of_its_own(monkeypatch):
    from jupyter_server.auth.identity import PasswordIdentityProvider

    monkeypatch.delenv("JUPYTER_TOKEN", raising=False)
    tokens = {PasswordIdentityProvider().token for _ in range(2)}
    assert len(tokens) == 2
    assert min(map(len, tokens)) >= 32


def test_the_security_page_is_linked_and_names_no_person():
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text("utf-8")
    assert not re.search(r"@\w|https?://", text)
