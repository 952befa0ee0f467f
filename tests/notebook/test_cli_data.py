"""The commands `wsolnb data`."""

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from wsolnb.data import downloads
from wsolnb.notebook.cli import app


def wsolnb(*arguments):
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


@pytest.fixture
def tiny(tmp_path):
    """One class of Tiny-ImageNet, two images a split."""
    root = tmp_path / "tiny-imagenet-200"
    names = {"train": ["n01_0.JPEG", "n01_1.JPEG"], "val": [f"val_{i}.JPEG" for i in range(4)]}
    folders = {"train": root / "train" / "n01" / "images", "val": root / "val" / "images"}
    for split, folder in folders.items():
        folder.mkdir(parents=True)
        for i, name in enumerate(names[split]):
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / name)
    (root / "train" / "n01" / "n01_boxes.txt").write_text("".join(f"{n}\t8\t8\t55\t55\n" for n in names["train"]))
    (root / "val" / "val_annotations.txt").write_text("".join(f"{n}\tn01\t8\t8\t55\t55\n" for n in names["val"]))
    (root / "wnids.txt").write_text("n01\n")
    (root / "words.txt").write_text("n01\tgoldfish\n")
    return root


def test_the_list_says_what_is_there(tiny):
    done = wsolnb("list", "--root", tiny.parent)
    assert done.exit_code == 0
    lines = {line.split()[0]: line for line in done.output.splitlines()}
    assert lines["tiny_imagenet"].endswith(" tiny     yes")
    assert lines["pets"].endswith(" pets     no")
    assert "CC BY-SA 4.0" in lines["pets"]
    assert "not published" in lines["openimages"]


def test_check_ends_with_one_when_something_is_wrong(tiny):
    assert wsolnb("check", "tiny_imagenet", tiny).exit_code == 0
    (tiny / "val" / "images" / "val_3.JPEG").unlink()
    done = wsolnb("check", "tiny_imagenet", tiny)
    assert done.exit_code == 1
    assert "missing: val/images/val_3.JPEG" in done.output


def test_a_contact_sheet(tiny, tmp_path):
    out = tmp_path / "sheets" / "sheet.png"
    done = wsolnb("sample", "tiny_imagenet", tiny, "--out", out, "-n", 5, "--split", "val")
    assert (done.exit_code, done.output.strip()) == (0, str(out))
    picture = np.asarray(Image.open(out).convert("RGB")).astype(int)
    assert picture.shape[1] > 1.5 * picture.shape[0], "two images side by side: the split has no more"
    orange = np.abs(picture - (0xE6, 0x9F, 0x00)).max(axis=2) < 30
    assert orange.sum() > 500, "boxes"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["download", "pet"], "did you mean 'pets'?"),
        (["download", "ilsvrc", "--root", "ROOT"], "cannot be fetched freely"),
        (["check", "pets", "ROOT/nowhere"], "no such folder"),
        (["sample", "pets", "ROOT/nowhere", "--out", "x.png"], "no such folder"),
        (["sample", "tiny_imagenet", "ROOT", "--out", "x.png", "--split", "tset"], "did you mean 'test'?"),
    ],
)
def test_errors_are_messages_with_a_remedy(tiny, arguments, message):
    done = wsolnb(*(argument.replace("ROOT", str(tiny.parent)) for argument in arguments))
    assert done.exit_code == 2
    assert message in done.output
    assert "Remedy: " in done.output


def test_an_interrupted_download_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(downloads, "fetch", interrupted)
    monkeypatch.setattr(downloads, "require_space", lambda *_: None)
    done = wsolnb("download", "pets", "--root", tmp_path)
    assert done.exit_code == 130
    assert "interrupted: the same command goes on" in done.output
    assert "CC BY-SA 4.0" in done.output
