"""`wsolnb localize`: what it writes, and what it says of everything that can be wrong."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from wsolnb.data.store import Store
from wsolnb.files import to_json
from wsolnb.metrics import boxes_from_score_map
from wsolnb.notebook.cli import app
from wsolnb.train.loop import TrainingConfig
from wsolnb.train.recipe import RECORD, Recipe

NAMES = ("red-winged bird", "dog & cat", "mug")


def trained(folder, method="cam", backbone="resnet_mini", **options):
    """A folder of checkpoints as `fit` leaves it, of a network that nobody has trained."""
    training = TrainingConfig(epochs=1, lr=1e-3)
    recipe = Recipe(method=method, backbone=backbone, image_size=112, options=options, training=training)
    torch.manual_seed(3)
    model = recipe.empty(len(NAMES))
    folder.mkdir()
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "last.safetensors")
    (folder / RECORD).write_text(to_json({"recipe": recipe, "class_names": NAMES, "multi_label": False}))
    return str(folder / "last.safetensors")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run") / "cam-0")


@pytest.fixture
def photos(tmp_path):
    """Two photographs of one name in different folders, one of them turned, and what is no photograph."""
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for name, size in {"a/pic.png": (90, 60), "b/pic.jpg": (70, 110)}.items():
        (folder / name).parent.mkdir(parents=True)
        blobs = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if name.startswith("b") else 1
        blobs.save(folder / name, exif=exif)
    (folder / "notes.txt").write_text("x")
    return folder


def run(*arguments):
    done = CliRunner().invoke(app, ["localize", *map(str, arguments), "--device", "cpu"])
    assert "Traceback" not in done.output, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done


def mask_of(segmentation):
    """A mask from COCO's uncompressed run lengths: zeros first, down the columns."""
    values, value = [], 0
    for count in segmentation["counts"]:
        values += [value] * count
        value = 1 - value
    return np.array(values, bool).reshape(segmentation["size"][::-1]).T


def test_everything_that_is_written_is_read_back_and_agrees(photos, checkpoint, tmp_path):
    out = tmp_path / "out"
    done = run(photos, "--out", out, "--checkpoint", checkpoint, "--class", "mug", "--class", "1", "--threshold", "0.4")
    assert done.exit_code == 0, done.output
    assert "passed over 1 files in folders, no images by their names: notes.txt" in done.output

    lines = [line.split("\t") for line in (out / "classes.txt").read_text().splitlines()]
    assert lines == [["index", "class", "name"], ["0", "", "background"], ["1", "2", "mug"], ["2", "1", "dog & cat"]]

    known = json.loads((out / "coco" / "instances.json").read_text())
    results = json.loads((out / "coco" / "results.json").read_text())
    assert {c["id"]: c["name"] for c in known["categories"]} == {1: "mug", 2: "dog & cat"}
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in known["images"]}
    # The second was stored lying, so that upright it is wider than high.
    assert sizes == {f"{photos}/a/pic.png": (90, 60), f"{photos}/b/pic.jpg": (110, 70)}
    assert len({a["id"] for a in known["annotations"]}) == len(known["annotations"]) == len(results) == 4

    for image, name in zip(known["images"], ("a_pic", "b_pic"), strict=True):
        maps = Store(out / "maps").read_maps(name)
        assert maps.classes == (2, 1)
        assert maps.maps.shape == (2, image["height"], image["width"])
        picture = Image.open(out / "masks" / f"{name}.png")
        assert picture.mode == "P"
        assert picture.getpalette()[3:9] == [128, 0, 0, 0, 128, 0]
        mask = np.array(picture)
        assert set(np.unique(mask)) <= {0, 1, 2}
        tree = ElementTree.parse(out / "voc" / f"{name}.xml").getroot()
        objects = {o.findtext("name"): o.find("bndbox") for o in tree.findall("object")}
        for category, score_map in enumerate(maps.maps, start=1):
            (found,) = [a for a in known["annotations"] if (a["image_id"], a["category_id"]) == (image["id"], category)]
            (result,) = [r for r in results if (r["image_id"], r["category_id"]) == (image["id"], category)]
            assert result["bbox"] == found["bbox"]
            assert 0 < result["score"] < 1
            x, y, width, height = found["bbox"]
            box = np.array([x, y, x + width, y + height])
            # The maps are kept in half precision, which may move a border by a pixel.
            again = boxes_from_score_map(score_map, [0.4], protocol="tscam")[0][0]
            assert np.abs(again - box).max() <= 1
            corners = objects[lines[category + 1][2]]
            corners = [int(corners.findtext(tag)) for tag in ("xmin", "ymin", "xmax", "ymax")]
            assert corners == [x + 1, y + 1, x + width, y + height]
            inside = np.zeros_like(mask, bool)
            inside[y : y + height, x : x + width] = True
            assert np.array_equal(mask_of(found["segmentation"]), inside & (mask == category))
            assert found["area"] == (inside & (mask == category)).sum()
    sheet = Image.open(out / "contact_sheet.png")
    assert sheet.width > 900
    assert np.array(sheet.convert("L")).std() > 20


def test_what_cannot_be_read_is_left_out_and_the_others_are_written(photos, checkpoint, tmp_path):
    whole = (photos / "a" / "pic.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none").mkdir()
    paths = [photos, photos / "notes.txt", tmp_path / "gone.jpg", tmp_path / "none"]
    done = run(*paths, "--out", tmp_path / "out", "--checkpoint", checkpoint)
    assert done.exit_code == 1
    for message in (
        f"left out: cannot decode {photos}/cut.png: ",
        f"left out: cannot decode {photos}/notes.txt: cannot identify",
        f"left out: missing: {tmp_path}/gone.jpg",
        f"left out: no image in the folder {tmp_path}/none",
        "4 left out, see above",
    ):
        assert message in done.output
    written = sorted(path.name for path in (tmp_path / "out" / "masks").iterdir())
    assert written == ["a_pic.png", "b_pic.png"]
    assert len(json.loads((tmp_path / "out" / "coco" / "results.json").read_text())) == 2


def test_a_file_that_cannot_be_written_loses_no_other(photos, checkpoint, tmp_path):
    out = tmp_path / "out"
    (out / "voc" / "a_pic.xml").mkdir(parents=True)  # in the way of a file
    done = run(photos, "--out", out, "--checkpoint", checkpoint, "--overwrite")
    assert done.exit_code == 1
    assert "a_pic.xml cannot be written" in done.output
    assert (out / "masks" / "b_pic.png").is_file()
    assert (out / "contact_sheet.png").is_file()


def test_an_end_in_between_keeps_what_was_done(photos, checkpoint, tmp_path, monkeypatch):
    from wsolnb.notebook import localize as command

    add, calls = command.Writer.add, []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(command.Writer, "add", interrupted)
    done = CliRunner().invoke(
        app, ["localize", str(photos), "--out", str(tmp_path / "out"), "--checkpoint", checkpoint]
    )
    assert done.exit_code != 0
    assert len(json.loads((tmp_path / "out" / "coco" / "instances.json").read_text())["images"]) == 1
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def test_lpcam_and_grad_cam_of_a_checkpoint(photos, checkpoint, tmp_path):
    for options in (["lpcam"], ["layercam"], ["grad_cam", "--layer", "cnn.layer3"]):
        done = run(photos, "--out", tmp_path / options[0], "--checkpoint", checkpoint, "--method", *options)
        assert done.exit_code == 0, done.output
        assert (tmp_path / options[0] / "maps" / "a_pic.npz").is_file()


@pytest.mark.parametrize(
    ("method", "backbone", "options", "named"),
    [
        ("tscam", "vit_mini", {}, True),
        ("scm", "vit_mini", {}, True),
        ("locloc", "vit_mini_dino", {"part": "generator"}, False),
        ("locloc", "vit_mini_dino", {"part": "classifier"}, True),
        ("ppd", "vit_mini_dino", {"part": "decoder", "hidden": 8, "channels": 8}, False),
    ],
)
def test_trained_methods_are_built_from_the_record_beside_their_weights(
    photos, tmp_path, method, backbone, options, named
):
    checkpoint = trained(tmp_path / "checkpoint", method, backbone, **options)
    done = run(photos, "--out", tmp_path / "out", "--checkpoint", checkpoint, "--method", method)
    assert done.exit_code == 0, done.output
    names = (tmp_path / "out" / "classes.txt").read_text()
    assert ("object" in names) != named
    assert (tmp_path / "out" / "masks" / "b_pic.png").is_file()


def test_a_checkpoint_of_another_program(photos, tmp_path):
    network = timm.create_model("resnet18", num_classes=3)
    state = {f"module.{name}": value for name, value in network.state_dict().items() if name != "fc.bias"}
    torch.save({"model": state, "optimizer": {"momentum": torch.zeros(3)}}, tmp_path / "mine.pth")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    options = ["--checkpoint", tmp_path / "mine.pth", "--names", tmp_path / "names.txt", "--class", "mug"]
    done = run(photos, "--out", tmp_path / "out", "--backbone", "resnet18", *options)
    assert done.exit_code == 0, done.output
    assert "1 tensors that resnet18 has no place for: optimizer.momentum" in done.output
    assert "has no bias of the classifier" in done.output
    assert "1\t2\tmug" in (tmp_path / "out" / "classes.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "mog"], "no class is called 'mog' (did you mean 'mug'?)"),
        (["--threshold", "nan"], "a threshold is outside of [0, 1]"),
        (["--threshold", "1.5"], "a threshold is outside of [0, 1]"),
        (["--method", "lpcma"], "has no map 'lpcma' (did you mean 'lpcam'?)"),
        (["--backbone", "resnet18"], "is of 'resnet_mini', not 'resnet18'"),
        (["--layer", "cnn.layer3"], "for the method 'cam'"),
        (["--names", "names.txt"], "cannot read names.txt"),
    ],
)
def test_wrong_options_are_messages_with_a_remedy(photos, checkpoint, tmp_path, arguments, message):
    done = run(photos, "--out", tmp_path / "out", "--checkpoint", checkpoint, *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Remedy: " in done.output


def test_methods_without_a_model_name_the_remedy(photos, checkpoint, tmp_path):
    out = ["--out", tmp_path / "out"]
    for method in ("tscam", "scm", "locloc", "ppd"):
        done = run(photos, *out, "--method", method)
        assert done.exit_code == 2
        assert f"{method} has to be trained, and no checkpoint was given" in done.output
        assert "--checkpoint FOLDER/last.safetensors" in done.output
    assert "no method 'lpcan' (did you mean 'lpcam'?)" in run(photos, *out, "--method", "lpcan").output
    bare = tmp_path / "last.safetensors"
    save_file({"x": torch.zeros(1)}, bare)
    assert (
        f"no checkpoint with a {RECORD} beside it" in run(photos, *out, "--method", "scm", "--checkpoint", bare).output
    )
    assert "does not say what network it is of" in run(photos, *out, "--checkpoint", bare).output
    done = run(photos, *out, "--checkpoint", bare, "--backbone", "resnet18")
    assert "holds no classifier 'fc.weight' of 'resnet18'" in done.output
    segmenter = trained(tmp_path / "segmenter", "deeplabv2")
    assert "'deeplabv2', which draws no map of a class" in run(photos, *out, "--checkpoint", segmenter).output
    (tmp_path / "segmenter" / RECORD).write_text("{")
    assert f"{RECORD} cannot be read" in run(photos, *out, "--checkpoint", segmenter).output


def test_the_output_folder_is_not_written_over_unasked(photos, checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    done = run(photos, "--out", tmp_path / "out", "--checkpoint", checkpoint)
    assert done.exit_code == 2
    assert "is not empty: it holds mine.txt" in done.output
    assert "--overwrite" in done.output
    assert run(photos, "--out", tmp_path / "out", "--checkpoint", checkpoint, "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "mine.txt").read_text() == "x"
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        done = run(photos, "--out", out, "--checkpoint", checkpoint)
        assert done.exit_code == 2
        assert f"the folder {out} cannot be made" in done.output
    done = run(tmp_path / "out" / "voc", "--out", tmp_path / "new", "--checkpoint", checkpoint)
    assert done.exit_code == 2
    assert "no image in the folder" in done.output


def test_an_output_folder_among_the_images_is_not_searched_and_sheets_have_pages(photos, checkpoint, monkeypatch):
    monkeypatch.setattr("wsolnb.notebook.localize.ROWS", 1)
    for options in ([], ["--overwrite"]):
        done = run(photos, "--out", photos / "out", "--checkpoint", checkpoint, *options)
        assert done.exit_code == 0
        assert done.output.count("  box ") == 2
    sheets = sorted(path.name for path in (photos / "out").glob("*.png"))
    assert sheets == ["contact_sheet.png", "contact_sheet_2.png"]
