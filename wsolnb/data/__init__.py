"""Data sets: one module each, one sample type, transforms that move image and truth together."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from wsolnb.data.base import FolderDataset, LocalizationDataset, Subset, hold_out
from wsolnb.data.coco import COCO
from wsolnb.data.cub import CUB
from wsolnb.data.metadata_folder import MetadataFolder
from wsolnb.data.pets import OxfordPets
from wsolnb.data.sample import CONTEXT, DISCRIMINATIVE, IGNORE, REST, Sample, tight_box
from wsolnb.data.tiny_imagenet import TinyImageNet
from wsolnb.data.voc import VOC
from wsolnb.errors import DataError, ParameterError, nearest

__all__ = [
    "COCO",
    "CONTEXT",
    "CUB",
    "DATASETS",
    "DISCRIMINATIVE",
    "IGNORE",
    "REST",
    "VOC",
    "FolderDataset",
    "LocalizationDataset",
    "MetadataFolder",
    "OxfordPets",
    "Sample",
    "Subset",
    "TinyImageNet",
    "hold_out",
    "open_dataset",
    "tight_box",
]

DATASETS: dict[str, type[FolderDataset]] = {
    reader.name: reader for reader in (CUB, VOC, COCO, OxfordPets, TinyImageNet, MetadataFolder)
}
"""Readers by name. The rendered benchmark has no root to be read from: see `wsolnb.data.aviary.load`."""


def open_dataset(name: str, root: str | Path | None, split: str, **options: Any) -> LocalizationDataset:
    """Open a split of a data set on disk.

    name: one of `DATASETS`; root: its folder; options: further parameters of the reader (such as `val_fraction`).

    Raises ParameterError for an unknown name, split or option, DataError when the folder, or a file in it, is missing
    or damaged; the error says where to get the data set.
    """
    if name not in DATASETS:
        raise ParameterError(f"no data set {name!r}{nearest(name, DATASETS)}", f"choose one of {', '.join(DATASETS)}")
    reader = DATASETS[name]
    if not root:
        raise DataError(f"no folder given for the data set {name!r}", reader.remedy)
    parameters = inspect.signature(reader).parameters
    further = [parameter for parameter in parameters if parameter not in ("root", "split")]
    for option in options:
        if option not in further:
            problem = f"{name} has no option {option!r}{nearest(option, further)}"
            raise ParameterError(problem, f"choose among {', '.join(further)}")
    for option in further:
        if parameters[option].default is inspect.Parameter.empty and option not in options:
            raise ParameterError(f"{name} needs the option {option!r}", inspect.getdoc(reader) or "")
    return reader(root=root, split=split, **options)
