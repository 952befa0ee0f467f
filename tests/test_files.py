"""Names and writes of files: what a name may be, what a full disk leaves, which modes files have."""

import ast
import os
import re
import resource
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from disks import Disk, full_disk

from wsolnb import files, keys
from wsolnb.backbones.checkpoints import read_tensors
from wsolnb.data import aviary, rendered
from wsolnb.data.store import ClassMaps, Store
from wsolnb.errors import DataError, RunError, TrainingError, WsolnbError
from wsolnb.methods.features import FeatureDump, FeatureSource, ImageFeatures, write_dump
from wsolnb.notebook import runs
from wsolnb.train import loop

BIG = bytes(range(256)) * 100
OUTSIDE = [
    "",
    "..",
    "../x",
    "a/../../x",
    "/etc/x",
    "a//x",
    "./x",
    "a/.",
    "a\0b",
    "a\nb",
    "x" * 300,
    "a/" + "ü" * 130,
    "\ud800",
]


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(params=["tmpfs", "limit"])
def disk(request, tmp_path):
    """A disk that can be filled: a small file system where this process may mount one, else a limit of file sizes."""
    with full_disk(tmp_path / "disk", request.param) as found:
        if found is None:
            pytest.skip("this process may not mount a file system")
        yield found


@contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


# Names


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_is_no_plain_path_below_the_folder_is_refused(tmp_path, name):
    with pytest.raises(DataError, match="the name ") as caught:
        files.inside(tmp_path, name, ".png")
    assert str(tmp_path) in caught.value.problem
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["0001", "birds/0001", "a b/ü.jpg", "..a", "a..b", "~x", "C:x", "x" * 251, "con"])
def test_other_names_are_taken_as_they_are(tmp_path, name):
    path = files.write_atomically(files.inside(tmp_path, name, ".png"), "here")
    assert path == tmp_path / f"{name}.png"
    assert list(content(tmp_path)) == [f"{name}.png"]


def test_links_lead_out_only_where_that_is_allowed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "out")
    (tmp_path / "in/near").symlink_to(tmp_path / "in")
    (tmp_path / "linked").symlink_to(tmp_path / "in")
    with pytest.raises(DataError, match="by a link"):
        files.inside(tmp_path / "in", "link/x")
    assert files.inside(tmp_path / "in", "link/x", links=True) == tmp_path / "in/link/x"
    assert files.inside(tmp_path / "in", "near/x") == tmp_path / "in/near/x"
    assert files.inside(tmp_path / "linked", "x") == tmp_path / "linked/x"  # the folder itself may be linked


# Writes


def test_modes_follow_the_umask(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        with umask(mask):
            path = files.write_atomically(tmp_path / f"{mask}" / "file", BIG)
            files.open_array(tmp_path / f"{mask}" / "array.npy", np.uint8, (3,))
            folder = rendered.ensure_rendered(tmp_path / f"{mask}" / "set", lambda root: None, "a set")
        assert path.stat().st_mode & 0o777 == mode
        assert (tmp_path / f"{mask}" / "array.npy").stat().st_mode & 0o777 == mode
        assert folder.stat().st_mode & 0o666 == mode


def test_content_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, real=real: (done.append((name, given)), real(*given)))
    files.write_atomically(tmp_path / "a", BIG)
    assert [name for name, _ in done] == ["fsync", "replace", "fsync"]
    files.write_atomically(tmp_path / "b", BIG, lasting=False)
    assert [name for name, _ in done[3:]] == ["replace"]


def test_a_disk_that_reports_its_failure_late_is_told(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("before")

    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match="Input/output error"):
        files.write_atomically(tmp_path / "a", BIG)
    assert content(tmp_path) == {"a": b"before"}


def dump(folder: Path) -> None:
    class Source(FeatureSource):
        weight, class_names, image_ids, labels = torch.zeros(2, 3), ("a", "b"), ("x/1",), ((0,),)

        def images(self, *_):
            yield ImageFeatures("x/1", (0,), (9, 9), [torch.arange(7500).reshape(1, 3, 50, 50).float()])

    write_dump(Source(), folder)


def save_figure(folder: Path) -> None:
    import matplotlib.pyplot as plt

    figure = plt.figure()
    figure.text(0.5, 0.5, "a figure")
    runs.start("n", {}, folder).save_figure(figure, "f")
    plt.close(figure)


MASK = np.random.default_rng(0).random((300, 300)) > 0.5
MAPS = np.random.default_rng(0).random((1, 90, 90))
BIRDS = aviary.AviaryConfig(classes=2, size=64, train=2, val=1, test=1)
WRITERS = {
    "file": lambda folder: files.write_atomically(folder / "file", BIG),
    "mask": lambda folder: Store(folder).write_mask("x/1", MASK),
    "maps": lambda folder: Store(folder).write_maps(ClassMaps("x/1", (0,), MAPS)),
    "features": dump,
    "array": lambda folder: files.open_array(folder / "array", np.float32, (10**6,)),
    "figure": save_figure,
    "metrics": lambda folder: runs.start("n", {}, folder).save_metrics({"table": [{"a": "b" * 2000}]}),
    "rows": lambda folder: runs.start("n", {}, folder).cached_rows("r", lambda: [{"a": "b" * 2000}]),
    "rendered images": lambda folder: aviary.ensure(BIRDS, folder, workers=1),
    "another library": lambda folder: runs.start("n", {}, folder).cached(
        "l", lambda root: (root / "x").write_bytes(BIG)
    ),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_is_told_and_leaves_what_was_there(disk: Disk, what):
    folder = disk.folder / "results"
    for name in ("file", "x/1.png", "x/1.npz", "array", "metrics/n.json", "figures/n/f.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("before")
    (folder / "checkpoints").mkdir()
    (folder / "notebooks").mkdir()
    if what == "array":  # a new file always
        (folder / "array").unlink()
    before = content(folder)
    disk.fill(8192 if what == "array" else 0)  # an array would fit as a file of zeros without blocks
    with pytest.raises(WsolnbError) as caught:
        WRITERS[what](folder)
    disk.free()
    assert str(folder) in caught.value.problem
    assert "free space" in caught.value.remedy
    new = {name for name, found in content(folder).items() if found and before.get(name) != found}
    if what != "another library":
        assert not {name for name in new if not name.endswith(".lock")}, "something is left that keeps the disk full"
    WRITERS[what](folder)  # what has failed goes well where there is room


def test_an_array_takes_its_space_at_once(tmp_path):
    array = files.open_array(tmp_path / "a.npy", np.float16, (1000, 300))
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 600_000
    assert array.shape == (1000, 300)
    assert not array.any()


# Trainings


@pytest.mark.parametrize("when", ["between epochs", "inside an epoch"])
def test_a_training_goes_on_after_the_disk_was_full(disk: Disk, when, tmp_path, monkeypatch):
    sys.path.insert(0, str(Path(__file__).parent / "train"))
    from test_loop import accuracy, equal, fit

    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0 if when == "inside an epoch" else 1000.0)
    expected, table = fit(tmp_path / "undisturbed")
    folder, seen, steps = disk.folder / "training", [], []

    def evaluate(model):
        seen.append(content(folder))
        if len(seen) == 2 and when == "between epochs":
            disk.fill()
        return accuracy(model)

    def look(*given, look=loop._look):
        steps.append(given)
        if len(steps) == 5 and when == "inside an epoch":
            seen.append(content(folder))
            disk.fill()
        return look(*given)

    monkeypatch.setattr(loop, "_look", look)
    with pytest.raises(RunError, match=r"(last\.safetensors|state\.pt) cannot be written(.|\n)*free space"):
        fit(folder, evaluate=evaluate)
    disk.free()
    assert content(folder) == seen[-1], "the epoch before is lost, or a part of a file is left"
    with pytest.warns(UserWarning, match="resuming after"):
        model, again = fit(folder)
    assert equal(model.state_dict(), expected.state_dict())
    assert again.drop(columns="seconds").equals(table.drop(columns="seconds"))


def test_no_damage_of_a_state_goes_unseen(tmp_path, monkeypatch):
    """Cut anywhere or with any bit changed, it is named, or gives the training that nobody disturbed."""
    sys.path.insert(0, str(Path(__file__).parent / "train"))
    from test_loop import accuracy, equal, fit

    def stop(model):
        if (tmp_path / "a" / "state.pt").exists():
            raise KeyboardInterrupt
        return accuracy(model)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "a", evaluate=stop, epochs=2)
    whole = (tmp_path / "a" / "state.pt").read_bytes()
    expected = fit(tmp_path / "b", epochs=2)[0].state_dict()
    places = np.random.default_rng(0).integers(0, len(whole), 30)
    damaged = [whole[:length] for length in (0, 10, len(whole) // 2, len(whole) - 1)]
    damaged += [whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] for place in places]
    told = 0
    for piece in damaged:
        (tmp_path / "a" / "state.pt").write_bytes(piece)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that it is resumed
                found = fit(tmp_path / "a", epochs=2)[0].state_dict()
        except TrainingError as error:
            told += "state.pt" in error.problem and "delete" in error.remedy
        else:
            assert equal(found, expected)
    assert told > 20


# What is left, and what is damaged


def test_what_killed_processes_of_this_machine_left_is_removed(tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = []
    for machine in (files.MACHINE, "0" * 12):
        for number in (ended.stdout.strip(), str(psutil.Process().pid)):
            left += [tmp_path / f".{name}-{number}-{machine}{'0' * 20}" for name in ("set", "file")]
            left[-2].mkdir()
            (left[-2] / "image.png").write_bytes(BIG)
            left[-1].write_bytes(BIG)
    assert files.sweep(tmp_path) == 2
    assert sorted(tmp_path.iterdir()) == sorted(left[2:])


def test_a_record_that_names_files_elsewhere_removes_none(tmp_path):
    run = runs.start("n", {}, tmp_path / "run")
    folder = run.cached("a", lambda root: (root / "x").write_bytes(BIG))
    (tmp_path / "mine").write_text("precious")
    record = (folder / keys.RECORD).read_text()
    for name in ("../../../mine", str(tmp_path / "mine")):
        (folder / keys.RECORD).write_text(record.replace('"x"', f'"{name}"'))
        assert keys.read_record(folder / keys.RECORD) == {}
        run.cached("a", lambda root: (root / "x").write_bytes(BIG))
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_damaged_rendered_image_is_rendered_anew(tmp_path):
    birds = aviary.load(BIRDS, "train", tmp_path)
    path, expected = birds.image_path(0), birds[0].image
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"run again(.|\n)*rendered anew") as caught:
        birds[0]
    assert str(path) in caught.value.problem
    assert "CUB" not in str(caught.value)
    with pytest.warns(UserWarning, match="rendering again"):
        birds = aviary.load(BIRDS, "train", tmp_path)
    assert np.array_equal(birds[0].image, expected)


def test_the_remedy_is_no_part_of_the_key(tmp_path):
    one, other = (aviary.load(BIRDS, "train", tmp_path / name) for name in ("one", "other"))
    assert keys.key_of(one).hash == keys.key_of(other).hash


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "a pickle", "missing", "too few channels"])
def test_a_damaged_feature_is_named_and_can_be_left_out(tmp_path, damage):
    dump(tmp_path)
    path, source = tmp_path / "x" / "1.npz", FeatureDump(tmp_path)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "a pickle":
        np.savez(path, scale_0=np.array([None]))
    elif damage == "too few channels":
        np.savez(path, scale_0=np.zeros((1, 2, 5, 5)))
    else:
        half = len(whole) // 2
        flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
        path.write_bytes({"truncated": whole[:half], "empty": b"", "one bit": flipped}[damage])
    with pytest.raises(DataError, match=r"x/1\.npz"):
        list(source.images())
    with pytest.warns(UserWarning, match="left out x/1"):
        assert list(source.images(unreadable="skip")) == []


def test_damaged_maps_are_made_again_where_a_writer_goes_on(tmp_path):
    store = Store(tmp_path)
    for name in "ab":
        store.write_maps(ClassMaps(name, (0,), MAPS))
    assert store.to_do("abc", "maps") == [2]
    path = store.path("a", ".npz")
    path.write_bytes(path.read_bytes()[:-9])
    assert store.to_do("abc", "maps") == [0, 2]


def test_memory_is_blamed_where_it_ran_out_only():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert loop.ran_out_of_memory(caught.value)
    assert loop.ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not loop.ran_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_weights_are_readable_by_whom_the_umask_lets(tmp_path):
    from safetensors.torch import save

    files.write_atomically(tmp_path / "w.safetensors", save({"a": torch.zeros(3)}))
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o022))
    assert list(read_tensors(tmp_path / "w.safetensors")) == ["a"]


def test_the_limit_of_the_fixture_ends_with_it(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with full_disk(tmp_path, "limit") as found:
        found.fill()
        with pytest.raises(OSError, match="File too large"):
            (tmp_path / "a").write_bytes(BIG)
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before


HIDDEN = {"aviary.py", "base.py", "scenes.py", "rendered.py", "downloads.py", "files.py"}
"""They write into a hidden folder, or a part of a download, which takes its name when it is whole."""
LOGS = {"sweeps.py"}
"""They write the lines of a run as it prints them."""


def test_everything_else_is_written_by_one_function():
    package = Path(files.__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if path.name in HIDDEN or not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).rpartition(".")[2]
            writes = name in ("write_text", "write_bytes", "save_file", "savetxt", "imsave", "imwrite", "tofile")
            writes |= name == "to_csv" and bool(node.args)
            modes = [word.value for word in node.keywords if word.arg == "mode"] + node.args[1:]
            if name == "open" and path.name not in LOGS:
                writes |= any(isinstance(m, ast.Constant) and re.fullmatch("[wx][bt+]*", str(m.value)) for m in modes)
            if writes:
                found.append(f"{path.relative_to(package)}, line {node.lineno}: {ast.unparse(node)[:80]}")
    assert not found, "\n".join(found)


def test_the_script_of_storage_faults(monkeypatch):
    """One try of some rows; `python tests/train/faulted_storage.py 10` is the long form."""
    sys.path.insert(0, str(Path(__file__).parent / "train"))
    import faulted_storage

    monkeypatch.setattr(faulted_storage, "DISK", "limit", raising=False)
    rows = faulted_storage.main(1, ["masks and maps", "rendered images, a file cut off"])
    assert [row[1] for row in rows] == [
        "disk full",
        "a file cut off",
        "a file one bit",
        "a file emptied",
        "a file cut off",
    ]
    assert {row[2:] for row in rows} == {(1, 1, 1, 1)}
