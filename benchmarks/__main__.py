"""Run the benchmarks and keep their numbers: `make bench`, or `python -m benchmarks grabcut ...` for some of them."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import platform
import sys
from pathlib import Path

import torch

import benchmarks

TARGET = Path("outputs/reference/benchmarks.json")


def run(chosen: list[str]) -> None:
    """Run the chosen modules (none: all); what is on record of the others stays."""
    known = [module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name != "__main__"]
    if unknown := set(chosen) - set(known):
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    machine["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    for name in chosen or known:
        print(f"\n== {name}", flush=True)
        results[name] = importlib.import_module(f"benchmarks.{name}").main()
        TARGET.write_text(json.dumps({**results, "machine": machine}, indent=1, sort_keys=True) + "\n")
    print(f"\nwritten to {TARGET}")


if __name__ == "__main__":
    run(sys.argv[1:])
