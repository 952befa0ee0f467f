"""Train what a notebook trains, without the notebook: on one device, or on those of `accelerate launch`.

    python -m wsolnb.train -f params/cub/11_scm_training.yaml -p epochs=10
    accelerate launch --multi_gpu --num_processes 4 -m wsolnb.train -f params/cub/11_scm_training.yaml

The notebook that the file is named after finds the trained networks in the run folder, and goes on from them. Killed in
any way, the same command goes on from the last state; with another number of processes it says that it cannot.

Nothing imports this file. Like a notebook it stands above `papers`, whatever its folder.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer

from wsolnb.errors import TrainingError, WsolnbError, check_choice
from wsolnb.notebook import params, runs
from wsolnb.papers.trainings import TRAININGS

AGAIN = "the same command goes on from the last state"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    file: Annotated[Path, typer.Option("--file", "-f", help="parameters of a notebook: params/PROFILE/NOTEBOOK.yaml")],
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="goes before the file")
    ] = None,
) -> None:
    """Train what the notebook that FILE is named after trains, into the run folder that its parameters name."""
    notebook = file.stem
    check_choice("nothing is trained apart from its notebook in", notebook, TRAININGS)
    declared = params.notebook_parameters(notebook)
    given = params.parse_overrides(parameter or ())
    params.check_parameters(notebook, dict.fromkeys(given.keys() - declared.keys()))  # names that there are not
    values = {name: one.default for name, one in declared.items()}
    values |= params.check_parameters(notebook, params.load_parameter_file(file), str(file))
    values |= {name: declared[name].parse(text) for name, text in given.items()}
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before anything is put on the first one
    signal.signal(signal.SIGTERM, _ended)
    TRAININGS[notebook](runs.start(notebook, values), values)


def _ended(*_: Any) -> NoReturn:
    raise TrainingError("the training was told to end: by you, or because another of its processes did", AGAIN)


def _lost(error: RuntimeError) -> bool:
    """Whether an error is that of the connection to another process."""
    return isinstance(error, torch.distributed.DistError) or any(name in str(error) for name in ("gloo", "NCCL"))


if __name__ == "__main__":
    try:
        app()
    except WsolnbError as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not _lost(error):
            raise
        first = str(error).splitlines()[0]
        sys.exit(f"error: process {os.environ.get('RANK')} has lost another one: {first}\n  Remedy: {AGAIN}")
