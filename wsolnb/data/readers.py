"""The readers of data sets on disk, by name."""

from __future__ import annotations

import inspect
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

from wsolnb.data.base import FolderDataset, LocalizationDataset
from wsolnb.errors import DataError, ParameterError, check_choice, nearest

DATASETS = {
    "cub": "cub.CUB",
    "voc": "voc.VOC",
    "coco": "coco.COCO",
    "pets": "pets.OxfordPets",
    "tiny_imagenet": "tiny_imagenet.TinyImageNet",
    "metadata": "metadata_folder.MetadataFolder",
    "folder": "own.ImageFolder",
    "csv": "own.LabelTable",
}
"""Module and class of each reader. The rendered benchmark has no root: see `wsolnb.data.aviary.load`."""


def get_reader(name: str) -> type[FolderDataset]:
    """Return the reader of a data set; ParameterError for an unknown name, with the nearest one."""
    check_choice("no data set", name, DATASETS)
    # Only the reader that is asked for is imported: a change in another one must not count as a change of this one.
    module, _, reader = DATASETS[name].partition(".")
    return getattr(import_module(f"wsolnb.data.{module}"), reader)


def open_dataset(name: str, root: str | Path | None, split: str, **options: Any) -> LocalizationDataset:
    """Open a split of a data set on disk.

    name: one of `DATASETS`; root: its folder; options: further parameters of the reader (such as `val_fraction`).

    Raises ParameterError for an unknown name, split or option, DataError when the folder, or a file in it, is missing
    or damaged; the error says where to get the data set.
    """
    reader = get_reader(name)
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
    found = reader(root=root, split=split, **options)
    if twice := [image for image, count in Counter(found.image_ids).items() if count > 1]:
        raise DataError(f"{name} {split} has two images of the id {twice[0]!r} ({len(twice)} such ids)", reader.remedy)
    return found
