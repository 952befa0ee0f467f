"""Notebooks run by papermill in this process: what a kernel costs, a start and all imports, is paid once for many.

    monkeypatch.setattr(pipeline._Workers, "execute", inprocess.execute)  # then: pipeline.reproduce(...)

Everything else of `wsolnb reproduce` stays: plan, preflight, parameters, order, records.
"""

from __future__ import annotations

import contextlib
import json
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib_inline.backend_inline import configure_inline_support
from nbformat.v4 import new_output
from papermill.engines import Engine, papermill_engines
from traitlets.config import Config

from wsolnb.notebook import pipeline

ENGINE = "in this process"


class InProcess(Engine):
    """papermill's engine on an IPython shell in this process, a new one for every notebook."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **_options: Any) -> None:
        """Run the cells in their order, up to the first that raises."""
        with started() as shell:
            for index, cell in enumerate(nb_man.nb.cells):
                if cell.cell_type == "code":
                    nb_man.cell_start(cell, index)
                    cell.outputs, raised = run_cell(shell, cell.source)
                    cell.execution_count = shell.execution_count - 1
                    if raised:
                        nb_man.cell_exception(cell, index)
                        return
                    nb_man.cell_complete(cell, index)


@contextlib.contextmanager
def started() -> Iterator[InteractiveShell]:
    """Give a shell that shows figures as a kernel does; afterwards the process is as it was."""
    backend = mpl.get_backend()
    plt.close("all")  # figures that others left open would be shown behind the first cell
    shell = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}), colors="nocolor")
    plt.switch_backend("module://matplotlib_inline.backend_inline")
    configure_inline_support(shell, "inline")
    try:
        # Else no figure is shown behind its cell, and pandas leaves out columns, as in a narrow terminal.
        with mpl.rc_context({"interactive": True}), pd.option_context("display.max_columns", 20):
            yield shell
    finally:
        plt.close("all")
        configure_inline_support(shell, backend)
        plt.switch_backend(backend)
        shell.restore_sys_module_state()
        InteractiveShell.clear_instance()


papermill_engines.register(ENGINE, InProcess)


def run_cell(shell: InteractiveShell, source: str) -> tuple[list[Any], bool]:
    """Run a cell; return what it shows, in nbformat's form, and whether it raised."""
    with capture_output() as told:
        shell.display_trap.hook = sys.displayhook  # the one that keeps a cell's last value
        result = shell.run_cell(source, store_history=True)
    streams = (("stdout", told.stdout), ("stderr", told.stderr))
    outputs = [new_output("stream", name=name, text=text) for name, text in streams if text]
    for shown in told.outputs:
        data = {kind: b64encode(v).decode() if isinstance(v, bytes) else v for kind, v in shown.data.items()}
        outputs.append(new_output("display_data", data=data, metadata=shown.metadata or {}))
    error = result.error_before_exec or result.error_in_exec
    if error is not None:
        outputs.append(new_output("error", ename=type(error).__name__, evalue=str(error), traceback=[told.stdout]))
    return outputs, error is not None


def execute(
    _: Any, source: Path, output: Path, parameters: Mapping[str, Any], progress: Callable[[int, int], None]
) -> None:
    """Execute a notebook as a worker of `wsolnb reproduce` does, in this process."""
    as_sent = json.loads(json.dumps(dict(parameters)))  # a tuple comes to a worker as a list
    with contextlib.chdir(source.parent):
        pipeline._execute(source, output, as_sent, progress, engine_name=ENGINE)
