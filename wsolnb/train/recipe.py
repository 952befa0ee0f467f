"""One recipe for every training, and one function that follows it.

    recipe = Recipe(method="tscam", backbone="vit_mini", pretrained=True, training=TrainingConfig(epochs=3, lr=1e-4))
    model, folder = fit(run, "tscam-0", recipe, splits.train, validate)

A recipe says how a model is built, what it sees of its images and how it is trained. `fit` trains it once per run
folder and reads it back. Classifiers, map decoders, IRN and segmentation networks are all trained this way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from accelerate import PartialState
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from wsolnb import weights
from wsolnb.data import transforms
from wsolnb.data.base import LocalizationDataset
from wsolnb.data.loading import IMAGENET_MEAN, Kept, check_batches, make_loader
from wsolnb.data.transforms import Transform
from wsolnb.errors import ParameterError, WeightsError
from wsolnb.files import resolve, to_json, write_atomically
from wsolnb.methods import create_method, get_method
from wsolnb.methods.base import Trainable
from wsolnb.notebook.runs import Run
from wsolnb.train.loop import Scorer, TrainingConfig, load_checkpoint, pick_device, processes, set_seed, train


class Recipe(BaseModel):
    """How one model is built and trained, apart from its data.

    method: a name of `wsolnb.methods`. options: of the method. backbone: a name that `create_backbone` knows.
    pretrained, checkpoint, output_stride, dilate: as there; a relative checkpoint starts at the root of the repository.
    image_size: side of the input in pixels.
    protocol: `resize` takes the whole image. `crop_resize` takes in training a random crop of the image resized to 8/7
        of the side, and at test the whole image (SCM and TS-CAM). `crop` has the same training; at test the shorter
        side is resized to 8/7 and the centre cropped (LocLoc, PPD).
    long_side: range of the longer side in pixels before a random crop, as LPCAM's release trains on photographs.
    scale: range of the random factor on the image before a random crop. At most one of long_side, scale, and a protocol
        other than `resize` may be given.
    shift: largest random shift in pixels. brightness, contrast: half-widths of the random factors on the light and on
        the spread around the mean. All three in training only. augment: what stands in place of the last two:
        `RandAugment` by this policy.
    images: training images that are seen, evenly spaced; 0 = all.
    tuned_layers: how many of a transformer's layers are trained, counted from the first. Patch embedding, final
        normalisation and head are trained as well; the other layers stay as they start. None = all.
    training: the loop's hyperparameters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    backbone: str
    options: dict[str, Any] = {}
    pretrained: bool = False
    checkpoint: str | None = None
    output_stride: Literal[8, 16, 32] = 16
    dilate: bool = True
    image_size: int = Field(112, ge=32)
    protocol: Literal["resize", "crop_resize", "crop"] = "resize"
    long_side: tuple[int, int] | None = None
    scale: tuple[float, float] | None = None
    batch_size: int = Field(32, ge=1)
    shift: int = Field(8, ge=0)
    brightness: float = Field(0.2, ge=0, lt=1)
    contrast: float = Field(0.0, ge=0, lt=1)
    augment: Literal["none", "rand-m9-mstd0.5-inc1"] = "none"
    images: int = Field(0, ge=0)
    num_workers: int = Field(0, ge=0)
    tuned_layers: int | None = Field(None, ge=0)
    training: TrainingConfig

    @field_validator("checkpoint")
    @classmethod
    def _none_is_empty(cls, checkpoint: str | None) -> str | None:
        return checkpoint or None  # papermill's parameters are empty where nothing is meant

    @model_validator(mode="after")
    def _one_crop(self) -> Self:
        if (self.protocol != "resize") + bool(self.long_side) + bool(self.scale) > 1:
            asked = {"protocol": self.protocol, "long_side": self.long_side, "scale": self.scale}
            raise ParameterError(f"several crops of one image: {asked}", "give one of protocol, long_side and scale")
        return self

    def test_transform(self) -> Transform:
        """The deterministic transform of the protocol."""
        if self.protocol != "crop":
            return transforms.Resize(self.image_size)
        return transforms.ResizeCenterCrop(self._uncropped(), self.image_size, keep_aspect=True)

    def train_transform(self, mean: tuple[float, ...] = IMAGENET_MEAN) -> Transform:
        """The random transform: crop or shift, flip, light. mean: the colour of what lies outside of an image."""
        if self.long_side:
            first = [transforms.RandomLongSideCrop(self.long_side, self.image_size, mean)]
        elif self.scale:
            first = [transforms.RandomScaleCrop(self.scale, self.image_size, mean)]
        elif self.protocol != "resize":
            first = [transforms.ResizeRandomCrop(self._uncropped(), self.image_size)]
        else:
            first = [transforms.Resize(self.image_size), transforms.RandomShift(self.shift)]
        light: Transform = transforms.RandomBrightnessContrast(self.brightness, self.contrast)
        if self.augment != "none":
            light = transforms.RandAugment(self.augment, mean)
        return transforms.Compose([*first, transforms.RandomHorizontalFlip(), light])

    @property
    def first_side(self) -> int | None:
        """Side of the square that training images are resized to before anything is drawn; None where that is drawn."""
        if self.long_side or self.scale:
            return None
        return self.image_size if self.protocol == "resize" else self._uncropped()

    @property
    def map_size(self) -> int | None:
        """Side of the square that images are resized to for their maps; None = their own, after training on crops."""
        return None if self.long_side or self.scale else self.image_size

    def _uncropped(self) -> int:
        return round(self.image_size * 8 / 7)  # 256 for 224

    def start(self) -> str:
        """Return the hash of the file that the weights start from; empty for random and for published weights."""
        if self.checkpoint:
            path = resolve(self.checkpoint)
            return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        embedded = self.pretrained and self.backbone in weights.embedded()
        return weights.read_card(self.backbone)["sha256"] if embedded else ""

    def build(self, num_classes: int) -> Trainable:
        """Return the model with fresh (seeded) or pretrained weights.

        Raises ParameterError for an unknown method or backbone, WeightsError for missing weights.
        """
        method = get_method(self.method)  # an unknown one is an error before any weights are looked for
        set_seed(self.training.seed)
        options = self.model_dump(include={"pretrained", "image_size", "output_stride", "dilate"})
        options["checkpoint"] = resolve(self.checkpoint) if self.checkpoint else None
        backbone = method.make_backbone(self.backbone, **options)
        if self.tuned_layers is not None:
            blocks = getattr(getattr(backbone, "vit", None), "blocks", [])
            if self.tuned_layers > len(blocks):
                raise ParameterError(
                    f"tuned_layers={self.tuned_layers} was asked of {self.backbone!r}, which has {len(blocks)}",
                    "give the number of layers of a vision transformer that are to be trained, or None for all",
                )
            blocks[self.tuned_layers :].requires_grad_(False)
        return create_method(self.method, backbone, num_classes, **self.options)

    def empty(self, num_classes: int) -> Trainable:
        """Return the untrained model without its starting weights, for loading trained ones."""
        return self.model_copy(update={"pretrained": False, "checkpoint": None}).build(num_classes)


RECORD = "recipe.json"
"""The file beside trained weights that says how to build their model: recipe, and names of the classes."""


class TrainingSettings(BaseModel):
    """How all models of an experiment are trained; the fields are parameters of several notebooks."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    batch_size: int
    weight_decay: float
    shift: int
    precision: Literal["auto", "bf16", "fp32"]
    device: str
    num_workers: int

    def changed(self, **changes: Any) -> Self:
        """Return the settings with other values of some fields; pydantic's ValidationError for a wrong one."""
        return type(self)(**self.model_dump() | changes)

    def recipe_of(self, loop: Mapping[str, Any], **fields: Any) -> Recipe:
        """Return a recipe of these settings, and of those that a subclass has under a recipe's names.

        loop: fields of the training. fields: of the recipe. Both go before the settings.
        """
        training = self.model_dump(include=OF_THE_LOOP) | dict(loop)
        return Recipe(**self.model_dump(include=OF_THE_RECIPE) | {"training": TrainingConfig(**training)} | fields)


OF_THE_LOOP = {"epochs", "lr", "head_lr", "schedule", "betas", "optimizer", "weight_decay", "precision", "device"}
OF_THE_RECIPE = {
    "method", "backbone", "pretrained", "checkpoint", "output_stride", "dilate", "image_size", "protocol", "batch_size",
    "shift",
    "num_workers",
}  # fmt: skip
"""What settings and recipes call by the same name."""


def evenly(dataset: LocalizationDataset, count: int) -> LocalizationDataset:
    """Return `count` evenly spaced images of a data set, or all where there are fewer."""
    if count >= len(dataset):
        return dataset
    return dataset.subset(np.linspace(0, len(dataset) - 1, count).astype(int))


def fit(
    run: Run,
    name: str,
    recipe: Recipe,
    data: LocalizationDataset,
    validate: Scorer | None = None,
    progress: bool = True,
) -> tuple[Trainable, Path]:
    """Return the model trained by `recipe` on `data`, at its last epoch, and the folder of its checkpoints.

    It is trained once per run folder; `Run.cached` says when a training is found again. Several processes of one launch
    divide the images of each batch among them. Their number changes only rounding, dropout, and what layers of batch
    normalisation see: the images of their own process.
    name: the artefact's name in the run folder.
    validate: gives the columns of the history after each epoch, from validation images; `recipe.training.select` names
        the one whose maximum is the best epoch. None: nothing is measured, and nothing selected.
    Raises ParameterError for fewer images than a batch, and for a batch that cannot be divided among the processes.
    """
    classes, seen = len(data.class_names), evenly(data, recipe.images or len(data))
    check_batches(len(seen), recipe.batch_size)  # before any weights are looked for
    if recipe.batch_size % processes(pick_device(recipe.training.device)):
        problem = f"a batch_size of {recipe.batch_size} cannot be divided among the processes of this launch"
        raise ParameterError(problem, "launch another number of processes, or change batch_size")

    def build(folder: Path) -> None:
        model = recipe.build(classes)
        transform = transforms.Compose([*model.first_transforms(), recipe.train_transform(model.mean)])
        options = {"shuffle": True, "drop_last": True, "seed": recipe.training.seed, "num_workers": recipe.num_workers}
        options |= {"truth": model.learns_from_masks, "mean": model.mean, "std": model.std}
        images, side = seen, None if model.first_transforms() else recipe.first_side
        if side and recipe.training.epochs > 1 and Kept.fits(len(seen), side, recipe.num_workers):
            images = Kept(seen, side)
        share = recipe.batch_size // processes(pick_device(recipe.training.device))  # not in the key
        train(model, make_loader(images, transform, share, **options), recipe.training, folder, validate, progress)
        if PartialState().is_main_process:
            known = {"recipe": recipe, "class_names": data.class_names, "multi_label": data.multi_label}
            write_atomically(folder / RECORD, to_json(known))

    folder = run.cached(name, build, uses=(get_method(recipe.method), recipe.start()), together=True)
    # The trained model is always read back, so that a first run and a reuse give the same numbers.
    return load_checkpoint(recipe.empty(classes), folder, "last").to(pick_device(recipe.training.device)), folder


def load_trained(path: str | Path) -> tuple[Trainable, Recipe]:
    """Return a model that `fit` has trained, in evaluation mode on the CPU, and its recipe, from the file alone.

    path: `last.safetensors` or `best.safetensors` in a folder of checkpoints.
    Raises WeightsError if `recipe.json`, which says how to build the model, is not beside the file; TrainingError for
    weights that are missing, damaged or do not fit.
    """
    path = Path(path)
    record = path.parent / RECORD
    if not path.is_file():
        raise WeightsError(f"no checkpoint at {path}", "give last.safetensors of a folder in outputs/*/checkpoints")
    if path.stem not in ("best", "last") or not record.is_file():
        problem = f"{path} is no checkpoint with a {RECORD} beside it, which says what model the weights are of"
        remedy = "give last.safetensors of a folder that a notebook trained (an older one: run the notebook again); "
        raise WeightsError(problem, remedy + "in Python: `load_checkpoint(recipe.build(classes), folder, 'last')`")
    try:
        known = json.loads(record.read_text("utf-8"))
        recipe, names = Recipe.model_validate(known["recipe"]), tuple(known["class_names"])
        multi_label = bool(known["multi_label"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{record} cannot be read: {str(error).splitlines()[0]}", "train the model again") from error
    model = load_checkpoint(recipe.empty(len(names)), path.parent, path.stem)
    model.class_names, model.multi_label = names, multi_label
    return model, recipe
