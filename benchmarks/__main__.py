"""Run every benchmark and keep the numbers: `make bench`."""

from __future__ import annotations

import importlib
import json
import pkgutil
import platform
from pathlib import Path

import torch

import benchmarks


def run() -> None:
    results = {"machine": {"python": platform.python_version(), "torch": torch.__version__}}
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name != "__main__":
            print(f"\n== {module.name}", flush=True)
            results[module.name] = importlib.import_module(f"benchmarks.{module.name}").main()
    target = Path("outputs/reference/benchmarks.json")
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {target}")


if __name__ == "__main__":
    run()
