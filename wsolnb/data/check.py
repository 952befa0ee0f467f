"""What is missing, damaged or inconsistent in a copy of a data set, and which part of the data set the copy is."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from wsolnb.data.base import FolderDataset, read_size
from wsolnb.data.downloads import Record, get_record
from wsolnb.data.sample import Sample
from wsolnb.errors import DataError

EXAMPLES = 3
"""Problems of one kind that a report shows."""


@dataclass
class Report:
    """What was found in a folder.

    splits: one line each. notes: what is good to know. problems: by kind. remedy: where a split cannot be opened.
    """

    record: Record
    folder: Path
    splits: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: dict[str, dict[str, None]] = field(default_factory=dict)
    remedy: str = ""

    def add(self, problem: str) -> None:
        """Note a problem, once. Problems are of one kind if they differ in names and numbers only."""
        problem = problem.replace(f"{self.folder}/", "")
        kind = re.sub(r"'[^']*'|\S*/\S*|\S*\.\w+|-?\d+", "*", problem)
        self.problems.setdefault(kind, {})[problem] = None

    def __str__(self) -> str:
        lines = [f"{self.record.title} in {self.folder}", *(f"  {line}" for line in self.splits), *self.notes]
        for found in self.problems.values():
            more = [f"... and {len(found) - EXAMPLES:,} more"] if len(found) > EXAMPLES else []
            lines += [f"{len(found):,} x", *(f"  {line}" for line in [*found][:EXAMPLES] + more)]
        lines.append("something is wrong" if self.problems else "nothing is wrong")
        return "\n".join([*lines, *([f"  Remedy: {self.remedy}"] if self.remedy else [])])


def check(name: str, root: Path, deep: bool = False) -> Report:
    """Open a copy of a data set with its reader, and look at all of its files.

    root: its folder, or the one that `download` was given. deep: decode every image; else their heads are read.
    A copy of some classes or images is no problem. Problems of tables, which stop the reader, come one at a time.
    Raises ParameterError for an unknown name, DataError when there is no such folder.
    """
    record = get_record(name)
    report = Report(record, record.locate(root))
    if not report.folder.is_dir():
        raise DataError(f"no such folder: {report.folder}", f"`wsolnb data download {name} --root {root}` makes it")
    partial, home = False, {}
    for split, published in record.splits.items():
        try:
            dataset = record.open(report.folder, split)
        except DataError as error:
            report.splits.append(f"{split:10} cannot be opened")
            report.add(error.problem)
            report.remedy = error.remedy
            continue
        classes = len({label for labels in dataset.labels for label in labels})
        report.splits.append(
            f"{split:10} {len(dataset):,} of {published.images:,} images, {classes:,} of {record.classes:,} classes"
        )
        partial |= len(dataset) < published.images
        if len(dataset) > published.images:
            report.add(f"{split} has {len(dataset)} images, {published.images} were published")
        for image in dataset.image_ids:
            if published.split is None and home.setdefault(image, split) != split:
                report.add(f"{image!r} is in {home[image]} and in {split}")
        _look(dataset, report, split, deep)
    if partial:
        report.notes.append("a part of the data set: nothing is wrong with that")
    if home and not deep:
        report.notes.append("images were opened, not decoded: --deep decodes them")
    return report


def _look(dataset: FolderDataset, report: Report, split: str, deep: bool) -> None:
    """Look at every image of a split, and at the boxes and masks of all or, where they take long, of some."""
    limit = len(dataset) if deep else report.record.truths or len(dataset)
    every = max(1, -(-len(dataset) // limit))
    if every > 1:
        report.notes.append(f"{split}: boxes and masks of one image in {every} were looked at: --deep looks at all")
    for index in tqdm(range(len(dataset)), desc=split, unit="image", leave=False, disable=None):
        try:
            if deep:
                dataset[index]
                continue
            stated = dataset.stated(index)
            size = read_size(dataset.image_path(index), dataset.remedy, stated.size if stated else None)
            if index % every == 0:
                blank = np.broadcast_to(np.uint8(0), (*size, 3))  # as large as the image, in one byte
                dataset.add_truth(index, Sample(blank, dataset.image_ids[index], dataset.labels[index]))
        except DataError as error:
            report.add(error.problem)
