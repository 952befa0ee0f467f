"""The numbers of the default run, compared with the recorded ones. Needs the notebook to have been run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "outputs" / "reference"
# Rendered images and hand-made maps give the same numbers everywhere, up to JPEG decoders and the last float digit.
ROOM = {"01_data": 0.01, "02_metrics": 0.02, "03_cam_and_tscam": 0.05, "04_pretraining": 0.06,
        "10_scm_diffusion": 0.02, "11_scm_training": 0.08, "12_scm_results": 0.08,
        "20_lpcam_classifier": 0.08, "21_lpcam_prototypes": 0.15, "22_lpcam_results": 0.15,
        "23_lpcam_segmentation": 0.12, "30_locloc_grabcut": 0.03, "31_locloc_generator": 0.08,
        "32_locloc_classifier": 0.12, "33_locloc_results": 0.12}  # fmt: skip
NOT_COMPARED = {"threshold", "seed"}
# A few steps on few images leave networks near chance. On another processor validation may choose quite another
# threshold, and what is measured at it moves, too. Compared are the form of the table, and that nothing is far off.
ROOM_IN_SMALL = 0.3
NOT_COMPARED_IN_SMALL = r"threshold|covers_|spill|drift"


def spread_over_seeds(notebook: str, recorded: pd.DataFrame, column: str) -> np.ndarray | float:
    """Three standard deviations over training seeds, per row of notebooks 03 and 04: another processor, or another
    number of threads, rounds differently, which is to a training what another seed is."""
    if notebook == "03_cam_and_tscam":
        seeds, row = pd.read_csv(REFERENCE / "03_seeds.csv"), ["method", "map"]
        seeds = seeds[seeds.epoch == "last"]
    elif notebook == "04_pretraining":
        seeds, row = pd.read_csv(REFERENCE / "04_seeds.csv"), ["backbone", "map", "split"]
    else:
        return 0.0
    if column not in seeds:
        return 0.0
    spread = seeds.groupby(row)[column].std()
    return np.array([3 * spread.get(tuple(values), 0.0) for values in recorded[row].itertuples(index=False)])


def compare(notebook: str) -> None:
    """Assert that the table of the default run is the recorded one."""
    recorded = pd.read_csv(REFERENCE / f"{notebook}.csv")
    table = made(notebook, ROOT / "outputs" / "mini")
    _compare(table, recorded, lambda column: ROOM[notebook] + spread_over_seeds(notebook, recorded, column))


def compare_small(notebook: str, folder: Path) -> None:
    """Assert that the table of a run of the profile `smoke` is much like the recorded one."""
    recorded = pd.read_csv(REFERENCE / "smoke" / f"{notebook}.csv")
    apart = re.compile(NOT_COMPARED_IN_SMALL)
    _compare(made(notebook, folder), recorded, lambda column: np.inf if apart.search(column) else ROOM_IN_SMALL)


def made(notebook: str, folder: Path) -> pd.DataFrame:
    """Return the table that a notebook left in a run folder."""
    return pd.DataFrame(json.loads((folder / "metrics" / f"{notebook}.json").read_text())["table"])


def _compare(table: pd.DataFrame, recorded: pd.DataFrame, room: Callable[[str], Any]) -> None:
    assert list(table.columns) == list(recorded.columns)
    assert len(table) == len(recorded)
    for column in recorded.columns:
        if pd.api.types.is_numeric_dtype(recorded[column]) and column not in NOT_COMPARED:
            beyond = (table[column].astype(float) - recorded[column]).abs() - room(column)
            assert not beyond.max() > 0, f"{column} differs:\n{table[column]}\nrecorded:\n{recorded[column]}"
            assert (table[column].isna() == recorded[column].isna()).all(), column
        elif column not in NOT_COMPARED:
            assert table[column].tolist() == recorded[column].tolist(), column
