"""The three splits of a data set, as the parameters of a notebook name them."""

from __future__ import annotations

import inspect
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from wsolnb.data import aviary
from wsolnb.data.base import LocalizationDataset
from wsolnb.data.readers import get_reader, open_dataset
from wsolnb.errors import DataError
from wsolnb.files import resolve


class Splits(NamedTuple):
    """Train, validation and test images of one data set."""

    train: LocalizationDataset
    val: LocalizationDataset
    test: LocalizationDataset


class Published(NamedTuple):
    """What a reader calls the published train images and the published val images."""

    train: str
    val: str


PUBLISHED = {"voc": Published("train", "val"), "coco": Published("trainval", "test")}
"""Data sets whose val images papers report on. COCO's reader calls `val` what it holds out from the train images."""


class DataSettings(BaseModel):
    """Which data set, by the names of the notebooks' parameters; their other parameters are passed over.

    dataset: `aviary` (rendered) or a reader's name. data_root: its folder, relative to the repository.
    classes, body_cue, context_correlation, train_images, val_images, test_images: of the rendered benchmark.
    seed: of the rendering, or of the held-out validation images.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    dataset: str
    data_root: str
    classes: int
    body_cue: float
    context_correlation: float
    train_images: int
    val_images: int
    test_images: int
    seed: int

    def splits(self, variant: Literal["single", "scenes"] = "single") -> Splits:
        """Open the data set; variant: of the rendered benchmark. Raises as `load_splits`."""
        dials: dict[str, Any] = {}
        if self.dataset == "aviary":
            dials = self.model_dump(include={"classes", "body_cue", "context_correlation"})
            dials |= {split: getattr(self, f"{split}_images") for split in aviary.SPLITS} | {"variant": variant}
            if hasattr(self, "render_size"):
                dials["size"] = self.render_size
        if self.dataset == "metadata" and getattr(self, "protocol", "crop") != "crop":  # the test resizes whole images
            dials["square"] = self.image_size
        opened = load_splits(self.dataset, self.data_root, self.seed, **dials)
        if variant == "single" and opened.train.multi_label:
            problem = f"images of {opened.train} have several labels, and this notebook takes one an image"
            raise DataError(problem, "train on them in notebooks 20 to 23, or give images of one label")
        return opened


def load_splits(dataset: str, data_root: str = "", seed: int = 0, **dials: Any) -> Splits:
    """Open train, validation and test images of a data set.

    dataset: `aviary` (rendered into the cache when it is not there; `dials` are its parameters) or a reader's name. Of
    `metadata` the dial `square` is that of `MetadataFolder`, for validation and test.
    data_root: folder of a data set on disk, relative to the repository; of `metadata` (ILSVRC, OpenImages) it holds the
    images and, in `metadata/`, the lists, whose splits may be called `train-weaksup` and `train-fullsup`.
    seed: of the rendering or of the held-out validation images.

    Raises DataError and ParameterError as the readers do.
    """
    names = ("train", "val", "test")
    if dataset == "aviary":
        config = aviary.AviaryConfig(seed=seed, **dials)
        return Splits(*(aviary.load(config, name, resolve("outputs/cache")) for name in names))
    root = resolve(data_root) if data_root else None
    if dataset == "metadata" and root:
        lists = root / "metadata"
        published = {"train": "train-weaksup", "val": "train-fullsup"}
        folders = [n if (lists / n).is_dir() else published.get(n, n) for n in names]
        squares = ({}, dials, dials)
        opened = zip(folders, squares, strict=True)
        return Splits(*(open_dataset(dataset, root, name, metadata_root=lists, **square) for name, square in opened))
    options = {"seed": seed} if "seed" in inspect.signature(get_reader(dataset)).parameters else {}
    return Splits(*(open_dataset(dataset, root, name, **options) for name in names))
