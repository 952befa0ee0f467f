"""Every profile of a data set runs to its end, on a small tree of the true layout and with small sizes.

`make test` runs all notebooks of all of them by `pipeline.reproduce`, so with plan, preflight, parameter files and
papermill, but in this process (`inprocess`): the start and the imports of a kernel take longer than such a notebook.
The stored outputs, which nbval compares, are of other data. So the executed notebook is looked at instead (`faults`):
every cell ran and none warns of its numbers, every figure that is saved is shown and is no blank, the facts in `checks`
hold, and shares are numbers from 0 to 1.

`make test-full` also runs each profile by `wsolnb reproduce`, with a kernel to each notebook, and then the executed
notebooks in nbval, in the same run folder: what a first run prints and what a reuse of its results prints must agree.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inprocess
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import trees
from PIL import Image
from test_notebooks import nbval

from wsolnb.data.check import check
from wsolnb.notebook import params, pipeline

ROOT = Path(__file__).parents[2]
EVERYWHERE = {"device": "cpu", "precision": "fp32", "num_workers": 0, "batch_size": 4, "image_size": 64, "images": 8}
SEEDS_TO_SEGMENTATION = {
    "clusters": 2, "images_per_class": 3, "features_per_class": 50, "scales": [1.0, 0.5], "crf_backend": "mean_field",
    "crf_side": 24, "irn_width": 4, "irn_size": 64, "irn_epochs": 2, "irn_batch_size": 4, "label_radius": 3,
    "walk_radius": 3, "steps": [2], "dilations": [1, 2], "segmenter_size": 64, "segmenter_epochs": 1,
    "segmenter_batch_size": 4, "test_scales": [1.0, 0.5], "workers": 1,
}  # fmt: skip
LPCAM = EVERYWHERE | SEEDS_TO_SEGMENTATION | {
    "backbone": "resnet_mini", "irn_backbone": "resnet_mini", "segmenter_backbone": "resnet_mini",
    "long_side": [48, 80], "epochs": 2, "lr": 0.01, "head_lr": 0.1,
}  # fmt: skip
SINGLE = EVERYWHERE | {
    "epochs": 2, "search_images": 4, "size": 64, "jobs": 1, "seeds": [0], "generator_epochs": 1, "decoder_epochs": 1,
    "channels": 8, "ppd_hidden": 16, "ppd_channels": 8, "classifier_epochs": 1, "probe_epochs": 1, "batch": 4,
    "repeats": 1, "cam_epochs": 1, "tscam_epochs": 1,
}  # fmt: skip
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "voc": ("voc", LPCAM),
    "coco": ("coco", LPCAM),
    "voc_swin": ("voc", LPCAM | {"pretrained": False, "segmenter_backbone": "swin_tiny_patch4_window7_224"}),
    "coco_swin": ("coco", LPCAM | {"pretrained": False, "segmenter_backbone": "swin_tiny_patch4_window7_224"}),
    "cub": ("cub", SINGLE | {"backbone": "vit_mini_dino"}),
    "cub_conformer": ("cub", SINGLE | {"backbone": "conformer_tiny", "checkpoint": ""}),
    "ilsvrc": ("ilsvrc", SINGLE | {"backbone": "vit_mini_dino"}),
    "tiny": ("tiny_imagenet", SINGLE | {"image_size": 128}),
    "pets": ("pets", SINGLE | SEEDS_TO_SEGMENTATION | {"image_size": 128, "test_scales": [1.0]}),
}
"""By profile: its data set (`trees.WRITERS`), and what makes it small, in place of weights to be downloaded too."""
LEARNT = {"the loss fell", "IRN's loss falls", "true masks teach better than pseudo masks"}
"""Checks that a training of a few steps need not pass."""
SHARES = ("top1", "gt_known", "top1_loc", "maxboxacc_v2", "miou", "precision", "recall", "mAP", "mask_iou")
"""Columns that hold shares, from 0 to 1."""


def overrides(profile: str, root: Path) -> list[str]:
    """Return the `-p` texts for a profile: those of `SMALL` that its notebooks declare, and the folder of the data."""
    steps = pipeline.plan(profile)
    declared = set().union(*(params.notebook_parameters(step.notebook) for step in steps))
    values = {"data_root": str(root), **SMALL[profile][1]}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return [f"{name}={text}" for name, text in texts.items() if name in declared]


def blank(picture: str) -> bool:
    """Return whether a PNG file in base64 has one colour throughout."""
    pixels = np.asarray(Image.open(io.BytesIO(b64decode(picture))).convert("L"))
    return bool(pixels.min() == pixels.max())


def faults(notebook: Path, folder: Path) -> Iterator[str]:
    """Yield in words what is wrong with an executed notebook and with what it left in its run folder."""
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells, start=1):
        pictures = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
        if "\nrun.save_figure(" in cell.source and not pictures:
            yield f"cell {number} saves a figure and shows none"
        if any(blank(picture) for picture in pictures):
            yield f"cell {number} shows a blank picture"
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell {number}: {output.ename}: {output.evalue}"
            if output.get("name") == "stderr" and "RuntimeWarning" in output.text:  # NaN, mostly
                yield f"cell {number} warns: {output.text}"
    metrics = folder / "metrics" / f"{notebook.stem}.json"
    made = json.loads(metrics.read_text()) if metrics.exists() else {}  # notebook 00 leaves none
    yield from (
        f"{name!r} does not hold" for name, holds in made.get("checks", {}).items() if not holds and name not in LEARNT
    )
    for row in made.get("table", []):
        for name in SHARES:
            if (value := row.get(name)) is not None and not 0 <= value <= 1:
                yield f"{name} is {value} in {row}"


def test_a_notebook_in_this_process_shows_its_own_figures_only():
    plt.subplots()
    with inprocess.started() as shell:
        outputs, _ = inprocess.run_cell(shell, "import matplotlib.pyplot as plt\n_ = plt.subplots()")
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


@pytest.mark.parametrize("name", trees.WRITERS)
def test_a_tree_is_what_the_data_set_s_check_takes_for_a_part_of_it(name, tmp_path):
    report = check(name, trees.WRITERS[name](tmp_path), deep=True)
    assert report.problems == {}
    assert any("a part of the data set" in note for note in report.notes)
    kinds = {Image.open(path).mode for path in tmp_path.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")}
    assert {"RGB", "L", "CMYK"} <= kinds


def test_every_profile_of_a_data_set_on_disk_is_small_here():
    """Profiles of rendered images have tests of their own."""
    profiles = {path.parent.name for path in ROOT.glob("params/*/pipeline.yaml")}
    assert profiles - set(SMALL) == {"mini", "smoke", "seeds", "studies"}


def marked(profile: str):
    """Mark `coco_swin` as long: it is `coco` and `voc_swin` over again."""
    return pytest.param(profile, marks=pytest.mark.long if profile == "coco_swin" else ())


@pytest.mark.slow
@pytest.mark.parametrize("profile", [marked(profile) for profile in SMALL])
def test_a_profile_runs_to_its_end(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline._Workers, "execute", inprocess.execute)
    summary = pipeline.reproduce(
        profile, overrides(profile, trees.WRITERS[SMALL[profile][0]](tmp_path)), outputs=tmp_path
    )
    assert summary["complete"], [step for step in summary["steps"] if step["status"] != "done"]
    folder = tmp_path / profile
    found = {path.stem: list(faults(path, folder)) for path in (folder / "notebooks").glob("*.ipynb")}
    assert not any(found.values()), found
    assert set(found) == {step["notebook"] for step in summary["steps"]}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("profile", SMALL)
def test_a_profile_runs_by_the_command_and_prints_the_same_again(profile, tmp_path):
    texts = overrides(profile, trees.WRITERS[SMALL[profile][0]](tmp_path))
    command = [str(Path(sys.executable).with_name("wsolnb")), "reproduce", "--profile", profile]
    command += ["--outputs", str(tmp_path), *(word for text in texts for word in ("-p", text))]
    environment = {**os.environ, "WSOLNB_ROOT": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, "\n".join((done.stdout + done.stderr).splitlines()[-60:])
    executed = sorted((tmp_path / profile / "notebooks").glob("*.ipynb"))
    again = nbval(*executed, root=ROOT)
    assert again.returncode == 0, "\n".join((again.stdout + again.stderr).splitlines()[-80:])
