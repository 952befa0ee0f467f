"""A small repository with notebooks, for the tests of everything that reads or runs notebooks."""

from pathlib import Path
from textwrap import dedent

import nbformat
import yaml

PARAMETERS = """\
seed: int = 0  # of every random choice
epochs: int = 2  # passes over the training images
lr: float = 1e-3  # step size
data_root: str | None = None  # folder of photographs
run_folder: str = "outputs/mini"  # where results go"""

START = """\
from wsolnb.notebook import params, runs
parameters = params.collect("{name}", globals())
run = runs.start("{name}", parameters)"""


class Repository:
    """A repository in an empty folder. The process has to be in it, or WSOLNB_ROOT has to name it."""

    def __init__(self, root: Path):
        self.root = root
        for name in ("notebooks", "params/mini"):
            (root / name).mkdir(parents=True)
        (root / "pyproject.toml").touch()

    def notebook(self, name: str, *cells: str, parameters: str = PARAMETERS, start: bool = True) -> Path:
        """Write a notebook: title, parameters cell, start of the run, and the given code cells."""
        sources = [parameters, *([START.format(name=name)] if start else []), *(dedent(cell).strip() for cell in cells)]
        codes = [nbformat.v4.new_code_cell(source) for source in sources]
        codes[0].metadata.tags = ["parameters"]
        return self.write(name, [nbformat.v4.new_markdown_cell(f"# {name}"), *codes])

    def write(self, name: str, cells: list) -> Path:
        """Write a notebook of these cells."""
        kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        path = self.root / "notebooks" / f"{name}.ipynb"
        nbformat.write(notebook, path)
        return path

    def pipeline(self, *steps: dict, profile: str = "mini") -> Path:
        """Write the pipeline of a profile."""
        return self.yaml(f"{profile}/pipeline", {"steps": list(steps)})

    def yaml(self, name: str, content: object) -> Path:
        """Write `params/<name>.yaml`."""
        path = self.root / "params" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path
