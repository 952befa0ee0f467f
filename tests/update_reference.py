"""Record the tables of a run in outputs/reference: after `make reproduce`, or with PROFILE=smoke in its folder."""

import sys
from pathlib import Path

from wsolnb.notebook import pipeline

READERS = ("90_leaderboard", "91_claims")
"""Notebooks that show what is recorded, and so record nothing."""

if __name__ == "__main__":
    profile = sys.argv[1] if len(sys.argv) > 1 else "mini"
    root = Path(__file__).parents[1] / "outputs"
    folder = root / "reference" / ("" if profile == "mini" else profile)
    folder.mkdir(exist_ok=True)
    for name, table in pipeline.tables(root / profile).items():
        if name in READERS or (profile != "mini" and not (folder / f"{name}.csv").exists()):
            continue  # of a small run only the tables that a test compares are kept
        table.round(4).to_csv(folder / f"{name}.csv", index=False)
        print(folder / f"{name}.csv")
