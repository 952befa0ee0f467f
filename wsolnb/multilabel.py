"""Multi-label classifiers: the networks whose features and weights seeds are made of, their recipe and their training.

    splits, recipe = multilabel.described(settings)      # the parameters of notebook 20
    model, folder = multilabel.fit(run, "classifier-0", recipe, splits)

The loop is that of all classifiers (`wsolnb.train.loop`); validation is by mean average precision.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from wsolnb import backbones, data, errors, experiment
from wsolnb.data import CONTEXT, IGNORE, LocalizationDataset, Sample, aviary, transforms
from wsolnb.data.loading import IMAGENET_MEAN, make_loader
from wsolnb.errors import MapError, ParameterError, nearest
from wsolnb.experiment import Splits
from wsolnb.files import resolve
from wsolnb.methods import base, cam, mctformer
from wsolnb.methods.base import LocalizationModel
from wsolnb.notebook.runs import Run
from wsolnb.train import loop
from wsolnb.train.loop import TrainingConfig

CODE = (backbones, data, errors, experiment, loop, base, sys.modules[__name__])
"""What every trained classifier depends on, next to the module of its method."""

Objective = Callable[[nn.Module, dict, TrainingConfig], Tensor]

METHODS: dict[str, tuple[Callable[..., LocalizationModel], tuple[ModuleType, ...], Objective]] = {
    "cam": (cam.CAMClassifier, (cam,), loop.classify),
    "mctformer": (mctformer.MCTformer, (mctformer,), mctformer.objective),
}
"""What builds a classifier, the modules that its trained artefacts depend on, and its loss."""


@dataclass(frozen=True)
class RandomLongSideCrop:
    """Resize so that the longer side is drawn from `long_side`, then crop, or pad, to a random window of `crop` pixels:
    how the LPCAM lineage trains on photographs.

    Padding has the mean colour of the normalisation, so that the network sees zeros; the mask is `IGNORE` there.
    mean: that colour, per channel in [0, 1].
    """

    long_side: tuple[int, int] = (320, 640)
    crop: int = 512
    mean: tuple[float, float, float] = IMAGENET_MEAN

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the crop x crop sample."""
        factor = int(rng.integers(*self.long_side, endpoint=True)) / max(sample.size)
        height, width = (max(1, round(side * factor)) for side in sample.size)
        sample = transforms.resize(sample, (height, width))
        window = (min(self.crop, height), min(self.crop, width))
        top, left = (int(rng.integers(0, side - kept, endpoint=True)) for side, kept in zip((height, width), window))  # noqa: B905
        sample = transforms.crop(sample, top, left, window)
        down, right = (int(rng.integers(0, self.crop - kept, endpoint=True)) for kept in window)
        border = (down, self.crop - window[0] - down, right, self.crop - window[1] - right)

        def pad(values: np.ndarray | None, value: Any) -> np.ndarray | None:
            return None if values is None else cv2.copyMakeBorder(values, *border, cv2.BORDER_CONSTANT, value=value)

        return replace(
            sample,
            image=pad(sample.image, [round(255 * channel) for channel in self.mean]),
            boxes=sample.boxes + np.array([right, down, right, down]),
            mask=pad(sample.mask, IGNORE),
            parts=pad(sample.parts, CONTEXT),
        )


class ClassifierRecipe(BaseModel):
    """How a classifier is built and trained, apart from its data.

    method: a name of `METHODS`. backbone, pretrained, checkpoint, output_stride: as in `create_backbone`; a relative
    checkpoint starts at the root of the repository.
    image_size: side of the square input in pixels; with `long_side`, of the random crop.
    long_side: range of the longer side before the crop (`RandomLongSideCrop`); None resizes the whole image and moves
    it by up to `shift` pixels.
    brightness: half-width of the random factor on the light. options: of the method's model.
    training: the loop's hyperparameters; its `select` is `map`, the mean average precision on validation images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "cam"
    backbone: str = "resnet_mini"
    pretrained: bool = True
    checkpoint: str | None = None
    image_size: int = Field(112, ge=32)
    output_stride: int = 8
    long_side: tuple[int, int] | None = None
    batch_size: int = Field(16, ge=1)
    shift: int = Field(8, ge=0)
    brightness: float = Field(0.2, ge=0, lt=1)
    num_workers: int = Field(0, ge=0)
    options: dict[str, Any] = {}
    training: TrainingConfig

    def train_transform(self) -> transforms.Transform:
        """The random transform: crop or shift, flip, light."""
        if self.long_side:
            first = [RandomLongSideCrop(self.long_side, self.image_size, backbones.normalisation(self.backbone)[0])]
        else:
            first = [transforms.Resize(self.image_size), transforms.RandomShift(self.shift)]
        light = transforms.RandomBrightnessContrast(self.brightness, 0.0)
        return transforms.Compose([*first, transforms.RandomHorizontalFlip(), light])

    @property
    def map_size(self) -> int | None:
        """Side of the square input that maps are made from; None = the image's own size, after training on crops."""
        return None if self.long_side else self.image_size

    def weights_hash(self) -> str:
        """Hash of the file that the weights start from; empty for random and for published weights."""
        return experiment.hash_of_start(self.backbone, self.pretrained, self.checkpoint)

    def build(self, num_classes: int) -> LocalizationModel:
        """Return the model with fresh (seeded) or pretrained weights.

        Raises ParameterError for an unknown method or backbone, WeightsError for missing weights.
        """
        if self.method not in METHODS:
            hint = nearest(self.method, METHODS)
            raise ParameterError(f"unknown classifier {self.method!r}{hint}", f"one of {', '.join(METHODS)}")
        loop.set_seed(self.training.seed)
        backbone = backbones.create_backbone(
            self.backbone,
            pretrained=self.pretrained,
            checkpoint=resolve(self.checkpoint) if self.checkpoint else None,
            image_size=self.image_size,
            output_stride=self.output_stride,
        )
        return METHODS[self.method][0](backbone, num_classes, **self.options)


def average_precision(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the average precision of each class, (C,); NaN for a class without a positive image.

    scores, labels: (images, C), labels of 0 and 1. Raises MapError for scores that are not finite.
    """
    if not np.isfinite(scores).all():
        raise MapError("the scores hold NaN or infinity", "look at the classifier's training")
    return np.array(
        [average_precision_score(t, s) if t.any() else np.nan for t, s in zip(labels.T, scores.T, strict=True)]
    )


def predict(
    model: LocalizationModel, dataset: LocalizationDataset, image_size: int, batch_size: int = 50
) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits and the labels (0 and 1) of all images, each (images, C); the model runs where it is."""
    device = next(model.parameters()).device
    found = []
    model.eval()
    mean, std = backbones.normalisation(model)
    for batch in make_loader(dataset, transforms.Resize(image_size), batch_size, mean=mean, std=std):
        with torch.inference_mode():
            found.append(model(batch["image"].to(device)).logits.float().cpu().numpy())
    labels = np.zeros((len(dataset), len(dataset.class_names)), np.int64)
    for row, present in zip(labels, dataset.labels, strict=True):
        row[list(present)] = 1
    return np.concatenate(found), labels


def fit(
    run: Run, name: str, recipe: ClassifierRecipe, splits: Splits, progress: bool = True
) -> tuple[LocalizationModel, Path]:
    """Return the classifier trained by `recipe` on `splits.train`, at its last epoch, and its checkpoint folder.

    Trains once per run folder, as `experiment.fit`: the hash covers recipe, start, data and code. The folder's
    `history.csv` has the loss and the mean average precision (`map`) on `splits.val` of each epoch.
    """

    def validate(trained: LocalizationModel) -> dict[str, float]:
        return {"map": float(np.nanmean(average_precision(*predict(trained, splits.val, recipe.image_size))))}

    _, modules, objective = METHODS[recipe.method]
    return experiment.train_once(run, name, recipe, splits, [*CODE, *modules], validate, objective, progress)


def _photographs(dataset: str, root: Path, train_list: str) -> Splits:
    """Return VOC's or COCO's images for training, `val` to choose on, and `train`, where seed masks are judged."""
    options = {"sbd_list": resolve(train_list)} if train_list else {}
    open_split = partial(data.open_dataset, dataset, root)
    return Splits(open_split("train", **options), open_split("val"), open_split("train"))


def described(settings: dict[str, Any], seed: int | None = None, **override: Any) -> tuple[Splits, ClassifierRecipe]:
    """Return the splits and the recipe that the parameters of notebook 20 describe.

    seed: of the training; default the notebook's `train_seed`. override: of the settings.
    Of VOC and COCO the classifier is trained on `train` (or on `train_list`, VOC's enlarged set), choices are made on
    `val`, and the third split is `train` again: that is where the lineage judges seed masks.
    """
    p = {**settings, **override}
    dials: dict[str, Any] = {}
    if p["dataset"] == "aviary":
        dials = {name: p[name] for name in ("classes", "body_cue", "context_correlation")}
        dials |= {split: p[f"{split}_images"] for split in aviary.SPLITS} | {"variant": "scenes"}
    if p["dataset"] in ("voc", "coco"):
        splits = _photographs(p["dataset"], resolve(p["data_root"]), p["train_list"])
    else:
        splits = experiment.load_splits(p["dataset"], p["data_root"], p["seed"], **dials)
    loop = {name: p[name] for name in ("epochs", "lr", "head_lr", "weight_decay", "precision", "device", "optimizer")}
    loop |= {"seed": p["train_seed"] if seed is None else seed, "select": "map"}
    if p["optimizer"] == "sgd":  # as the lineage trains: plain steps whose rate falls as (1 - progress) ** 0.9
        loop |= {"momentum": 0.0, "schedule": "poly", "warmup": 0.0, "clip": 0.0}
    names = ("method", "backbone", "pretrained", "image_size", "output_stride", "batch_size", "shift")
    names = (*names, "num_workers")
    recipe = {name: p[name] for name in names} | {"long_side": tuple(p["long_side"]) or None}
    return splits, ClassifierRecipe(**recipe, training=TrainingConfig(**loop))
