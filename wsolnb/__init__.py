"""Weakly supervised localization, reproduced in notebooks: data, metrics, backbones, methods and runs."""

__version__ = "0.1.0"
