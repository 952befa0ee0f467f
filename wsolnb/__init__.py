"""Weakly supervised localization, reproduced in notebooks: data, metrics, backbones, methods and runs."""

from importlib import import_module

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Imported by name, and only when it is asked for: `import wsolnb` stays cheap, and no result's key holds this
    # import.
    if name in ("localize", "Localized"):
        return getattr(import_module("wsolnb.localization"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
