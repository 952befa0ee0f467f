"""Record the tables of the default run in outputs/reference; to be run after `make reproduce`."""

from pathlib import Path

from wsolnb.notebook import pipeline

READERS = ("90_leaderboard", "91_claims")
"""Notebooks that show what is recorded, and so record nothing."""

if __name__ == "__main__":
    root = Path(__file__).parents[1] / "outputs"
    for name, table in pipeline.tables(root / "mini").items():
        if name in READERS:
            continue
        table.round(4).to_csv(root / "reference" / f"{name}.csv", index=False)
        print(root / "reference" / f"{name}.csv")
