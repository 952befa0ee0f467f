"""`python -m wsolnb.train`: alone, under `accelerate launch`, and what the notebook then finds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from wsolnb.errors import ParameterError
from wsolnb.notebook import runs
from wsolnb.notebook.params import notebook_parameters
from wsolnb.papers import scm
from wsolnb.papers.trainings import TRAININGS
from wsolnb.train import recipe
from wsolnb.train.__main__ import main
from wsolnb.train.evaluation import validator
from wsolnb.train.loop import history

ROOT = Path(__file__).parents[2]
# A network without batch normalisation, which would see the images of its own process only.
FEW = {"train_images": 24, "val_images": 7, "test_images": 4, "classes": 3, "batch_size": 8, "epochs": 3, "lr": 1e-3}
FEW |= {"backbone": "test_vit", "pretrained": False, "image_size": 64, "head_init": "kaiming", "literal_epochs": 0}
FEW |= {"device": "cpu", "precision": "fp32"}


def command(file, *arguments, processes=1):
    """Return how the module is started, alone or by as many processes on the CPU."""
    launcher = [sys.executable, "-m", "wsolnb.train"]
    if processes > 1:
        # Accelerate starts several processes without MPI under this option only; its variable then names the device.
        launcher = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            str(processes),
        ]
        launcher += ["--main_process_port", "0", "-m", "wsolnb.train"]
    return [*launcher, "-f", str(file), *arguments]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "WSOLNB_ROOT": str(ROOT)}


def start(line, **options):
    return subprocess.Popen(
        line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def launched(folder):
    """Launch two processes, kill one after an epoch, launch them again; return their run folder and both outputs."""
    folder.mkdir()
    file = folder / "11_scm_training.yaml"
    file.write_text(yaml.safe_dump({**FEW, "run_folder": str(folder / "run")}))
    line = command(file, processes=2)
    first = start(line)
    deadline = time.monotonic() + 300
    while not (states := list(folder.glob("run/checkpoints/pair-tscam-0-*/state.pt"))) and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = [child for child in psutil.Process(first.pid).children(recursive=True) if "-f" in child.cmdline()]
    workers = [child for child in workers if child.environ().get("RANK") == "1"]
    os.kill(workers[-1].pid, signal.SIGKILL)
    said = first.communicate(timeout=300)[0]
    assert first.returncode != 0, said
    assert states[0].exists()
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "run", said, done.stdout + done.stderr


def parameters(folder, **changes):
    defaults = {name: one.default for name, one in notebook_parameters("11_scm_training").items()}
    return defaults | FEW | {"run_folder": str(folder)} | changes


@pytest.mark.slow
def test_two_processes_go_on_after_a_kill_and_give_the_numbers_of_one(tmp_path, capsys):
    # One test, as a launch takes longer than all that is then looked at.
    folder, said, again = launched(tmp_path / "together")
    assert "error: " in said
    assert "the same command goes on from the last state" in said
    assert "resuming after epoch" in again
    assert again.count("built pair-") == 2  # one process says so
    check_numbers(folder, tmp_path / "alone", capsys)
    check_scores(folder)


def check_numbers(folder, other, capsys):
    """Of equal batches: losses to 1e-3, weights to 1e-2 of the largest of their layer, equal shares of right images."""
    alone = runs.start("11_scm_training", parameters(other))
    TRAININGS["11_scm_training"](alone, alone.parameters)
    together = runs.start("11_scm_training", parameters(folder))
    capsys.readouterr()
    TRAININGS["11_scm_training"](together, together.parameters)
    assert capsys.readouterr().out.count("reusing pair-") == 2  # the notebook's key is the launch's
    pair, splits = scm.Pair(**alone.parameters), scm.Pair(**alone.parameters).splits()
    for method in scm.PAIR:
        one, two = (pair.fit(run, method, 0, splits, progress=False) for run in (alone, together))
        assert one.folder.name == two.folder.name
        apart = (one.history - two.history).abs().max()
        assert apart["loss"] < 1e-3
        assert apart[["top1", "gt_known", "top1_loc"]].max() == 0
        for name, value in one.model.state_dict().items():
            # A key's bias changes no attention: its gradient is rounding, which AdamW makes as large as any other.
            if not name.endswith("qkv.bias"):
                torch.testing.assert_close(two.model.state_dict()[name], value, rtol=0, atol=1e-2 * value.abs().max())


def check_scores(folder):
    """The last row of the history is what one process measures with the weights that were kept; 7 images are odd."""
    run = runs.start("11_scm_training", parameters(folder))
    pair = scm.Pair(**run.parameters)
    splits = pair.splits()
    found = pair.fit(run, "scm", 0, splits, progress=False)
    expected = validator(splits.val, found.transform)(found.model)
    row = history(found.folder).iloc[-1]
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("12_scm_results", [], "nothing is trained apart from its notebook in '12_scm_results'"),
        ("11_scm_training", ["-p", "epoch=1"], "no parameter 'epoch'"),
        ("11_scm_training", ["-p", "epochs=0"], "'epochs' must be 1 or more"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(tmp_path, monkeypatch, name, arguments, words):
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(FEW if name.startswith("11") else {}))
    monkeypatch.setattr(runs, "start", lambda *_: 1 / 0)
    with pytest.raises(ParameterError, match=words):
        main(file, arguments[1:])


def test_a_batch_that_cannot_be_divided_is_told(tmp_path, monkeypatch):
    run = runs.start("11_scm_training", parameters(tmp_path))
    pair = scm.Pair(**run.parameters)
    monkeypatch.setattr(recipe, "processes", lambda _device: 3)
    with pytest.raises(ParameterError, match="batch_size of 8 cannot be divided"):
        pair.fit(run, "tscam", 0, pair.splits())


@pytest.mark.slow
def test_killed_at_random_moments_a_training_ends_as_if_nobody_had_disturbed_it():
    """Two kills here; `python tests/train/killed.py 30` is the long form."""
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run([sys.executable, script, "2"], env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["kills"] == 2
    assert 1 <= found["finished"] == found["equal"]
