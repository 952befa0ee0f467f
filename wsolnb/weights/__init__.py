"""The embedded backbones: each has a safetensors file in half precision and a model card.

`wsolnb.pretraining` made them: `recipes` the mini ones, `taught` the one for photographs.

A card is a Markdown file whose YAML front matter is what programs read: the recipe, the hash of the file, the scores.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from wsolnb.errors import WeightsError, nearest

FOLDER = Path(__file__).parent
RESTORE = "restore wsolnb/weights from the repository (git checkout -- wsolnb/weights), or install the package again"


def embedded() -> list[str]:
    """Return the names of the backbones whose weights are in this folder."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def read_card(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Return the front matter of a backbone's model card.

    Raises WeightsError when there is none, or it cannot be read.
    """
    path = folder / f"{name}.md"
    try:
        opening, facts, _ = path.read_text("utf-8").split("---\n", 2)
        card = yaml.safe_load(facts)
        if opening or not isinstance(card, dict) or "sha256" not in card:
            raise ValueError("no front matter with a hash")
    except FileNotFoundError as error:
        hint = nearest(name, embedded())
        raise WeightsError(f"no embedded weights of {name!r}{hint}", f"there are {', '.join(embedded())}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise WeightsError(f"the model card {path.name} cannot be read: {error}", RESTORE) from error
    return card


def verified(name: str, folder: Path = FOLDER) -> Path:
    """Return the path of a backbone's weights after comparing their SHA-256 with the card's.

    Raises WeightsError when the file is missing or is not the one that the card describes.
    """
    expected = read_card(name, folder)["sha256"]
    path = folder / f"{name}.safetensors"
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise WeightsError(f"the embedded weights {path.name} cannot be read: {error}", RESTORE) from error
    if found != expected:
        raise WeightsError(f"{path.name} has SHA-256 {found[:12]}..., its model card says {expected[:12]}...", RESTORE)
    return path
