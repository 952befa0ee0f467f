"""The recipe that the notebooks share: splits of a data set, a method on a backbone, its training, cached in the run.

Notebooks that name the same recipe share one trained artefact; `Run.cached` says when it reuses it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from wsolnb import backbones, data, errors, maps, metrics, weights
from wsolnb.data import LocalizationDataset, aviary, open_dataset, transforms
from wsolnb.data.loading import make_loader
from wsolnb.errors import ParameterError, nearest
from wsolnb.files import fingerprint, resolve
from wsolnb.methods import base, cam, scm, tscam
from wsolnb.methods.base import LocalizationModel
from wsolnb.notebook.params import notebook_parameters
from wsolnb.notebook.runs import Run
from wsolnb.train import evaluation, loop
from wsolnb.train.loop import TrainingConfig
from wsolnb.train.loop import history as history  # also found here

CODE = (backbones, data, errors, evaluation, maps, metrics, loop, base, sys.modules[__name__])
"""What every trained artefact depends on, next to the module of its method."""

METHODS: dict[str, tuple[Callable[..., LocalizationModel], tuple[ModuleType, ...]]] = {
    "cam": (cam.CAMClassifier, (cam,)),
    "tscam": (tscam.TSCAM, (tscam,)),
    "scm": (scm.SCM, (tscam, scm)),
}
"""What builds a method's model, and the modules that its artefacts depend on."""


class Splits(NamedTuple):
    """Train, validation and test images of one data set."""

    train: LocalizationDataset
    val: LocalizationDataset
    test: LocalizationDataset


class Recipe(BaseModel):
    """How one model is built and trained, apart from its data.

    method: `cam`, `tscam` or `scm`. backbone: a name of `wsolnb.backbones`. pretrained, checkpoint: as in
    `create_backbone`; a relative checkpoint starts at the root of the repository.
    image_size: side of the input in pixels. protocol: `resize` (the whole image), `crop_resize` (in training a random
    crop of the image resized to 8/7 of the side, at test the whole image: SCM and TS-CAM) or `crop` (the same training;
    at test the shorter side is resized to 8/7 and the centre cropped: LocLoc, PPD).
    shift: largest random shift in pixels, brightness: half-width of the random factor on the light; both in training.
    tuned_layers: how many of a transformer's layers are trained, from the first, next to its patch embedding, final
        normalisation and head; the others stay as they start. None = all. What is new in a data set's pixels is learnt
        by the first layers, and the last ones keep mixing patches as pretraining taught them.
    options: of the method's model.
    training: the loop's hyperparameters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    backbone: str
    pretrained: bool = False
    checkpoint: str | None = None
    image_size: int = Field(112, ge=32)
    output_stride: int = 16
    protocol: Literal["resize", "crop_resize", "crop"] = "resize"
    batch_size: int = Field(48, ge=1)
    shift: int = Field(8, ge=0)
    brightness: float = Field(0.2, ge=0, lt=1)
    num_workers: int = Field(0, ge=0)
    tuned_layers: int | None = Field(None, ge=0)
    options: dict[str, Any] = {}
    training: TrainingConfig

    def test_transform(self) -> transforms.Transform:
        """The deterministic transform of the protocol."""
        if self.protocol != "crop":
            return transforms.Resize(self.image_size)
        return transforms.ResizeCenterCrop(self._uncropped(), self.image_size, keep_aspect=True)

    def train_transform(self) -> transforms.Transform:
        """The random transform of the protocol: crop or shift, flip, light."""
        if self.protocol != "resize":
            first = [transforms.ResizeRandomCrop(self._uncropped(), self.image_size)]
        else:
            first = [transforms.Resize(self.image_size), transforms.RandomShift(self.shift)]
        light = transforms.RandomBrightnessContrast(self.brightness, 0.0)
        return transforms.Compose([*first, transforms.RandomHorizontalFlip(), light])

    def weights_hash(self) -> str:
        """Hash of the file that the weights start from; empty for random and for published weights."""
        return hash_of_start(self.backbone, self.pretrained, self.checkpoint)

    def _uncropped(self) -> int:
        return round(self.image_size * 8 / 7)  # 256 for 224

    def build(self, num_classes: int) -> LocalizationModel:
        """Return the model with fresh (seeded) or pretrained weights.

        Raises ParameterError for an unknown method or backbone, WeightsError for missing weights.
        """
        if self.method not in METHODS:
            hint = nearest(self.method, METHODS)
            raise ParameterError(f"unknown method {self.method!r}{hint}", f"one of {', '.join(METHODS)}")
        loop.set_seed(self.training.seed)
        backbone = backbones.create_backbone(
            self.backbone,
            pretrained=self.pretrained,
            checkpoint=resolve(self.checkpoint) if self.checkpoint else None,
            image_size=self.image_size,
            output_stride=self.output_stride,
        )
        if self.tuned_layers is not None:
            if type(backbone) is not backbones.TransformerBackbone or self.tuned_layers > backbone.depth:
                raise ParameterError(
                    f"tuned_layers={self.tuned_layers} was asked of {self.backbone!r}",
                    "give the number of layers of a plain vision transformer that are to be trained, or None for all",
                )
            backbone.vit.blocks[self.tuned_layers :].requires_grad_(False)
        return METHODS[self.method][0](backbone, num_classes, **self.options)


def hash_of_start(backbone: str, pretrained: bool, checkpoint: str | None) -> str:
    """Return the hash of the file that a backbone's weights start from; empty for random and for published weights."""
    if checkpoint:
        path = resolve(checkpoint)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return weights.read_card(backbone)["sha256"] if pretrained and backbone in weights.embedded() else ""


def load_splits(dataset: str, data_root: str = "", seed: int = 0, **dials: Any) -> Splits:
    """Open train, validation and test images of a data set.

    dataset: `aviary` (rendered into the cache when it is not there; `dials` are its parameters) or a reader's name.
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
        return Splits(*(open_dataset(dataset, root, name, metadata_root=lists) for name in folders))
    known = data.DATASETS.get(dataset)  # what is unknown, `open_dataset` names
    options = {"seed": seed} if known and "seed" in inspect.signature(known).parameters else {}
    return Splits(*(open_dataset(dataset, root, name, **options) for name in names))


def fit(run: Run, name: str, recipe: Recipe, splits: Splits, progress: bool = True) -> tuple[LocalizationModel, Path]:
    """Return the model trained by `recipe` on `splits.train`, at its last epoch, and the folder of its checkpoints.

    Trains once per run folder, as `train_once`. Selection (`best`) uses validation images only.
    """

    def validate(trained: LocalizationModel) -> dict[str, float]:
        found = evaluation.evaluate(trained, splits.val, recipe.test_transform(), quick=True)
        return found.summary() | trained.scalars()

    code = [*CODE, *METHODS[recipe.method][1]]
    return train_once(run, name, recipe, splits, code, validate, progress=progress)


def train_once(
    run: Run,
    name: str,
    recipe: Any,
    splits: Splits,
    code: Sequence[ModuleType],
    validate: Callable[[LocalizationModel], dict[str, float]],
    objective: Callable[..., Any] = loop.classify,
    progress: bool = True,
) -> tuple[LocalizationModel, Path]:
    """Return the model that a recipe trains on `splits.train`, at its last epoch, and the folder of its checkpoints.

    Trains once per run folder: the artefact is found again by the hash of the recipe, the data, the code and
    the weights that it starts from.
    name: how the artefact is called in the run folder. recipe: a `Recipe`, or one with the same methods and fields.
    code: modules that the artefact depends on. validate: gives the columns of the history after each epoch.
    """
    classes = len(splits.train.class_names)
    inputs = {
        "recipe": recipe.model_dump(),
        "weights": recipe.weights_hash(),
        "data": [splits.train.name, splits.train.root.name, *(fingerprint(part.image_ids) for part in splits)],
    }

    def build(folder: Path) -> None:
        model = recipe.build(classes)
        mean, std = backbones.normalisation(model)
        loader = make_loader(
            splits.train,
            recipe.train_transform(),
            recipe.batch_size,
            shuffle=True,
            seed=recipe.training.seed,
            num_workers=recipe.num_workers,
            drop_last=True,
            mean=mean,
            std=std,
        )
        loop.train(model, loader, recipe.training, folder, validate, progress, objective)

    folder = run.cached(name, inputs, list(code), build)
    # The trained model is always read back, so that a first run and a reuse give the same numbers.
    empty = recipe.model_copy(update={"pretrained": False, "checkpoint": None}).build(classes)
    model = loop.load_checkpoint(empty, folder, "last")
    return model.to(loop.pick_device(recipe.training.device)), folder


def used_settings(run: Run, notebook: str, **overrides: Any) -> dict[str, Any]:
    """Return the parameters of a notebook that its run in this run folder used, or else its defaults.

    So that a notebook which shows another one's trained models names the same recipe, and finds the same artefacts. The
    overrides (data set, folder, seed) must agree with what was run; if they do not, the defaults with them are used.
    """
    defaults = {name: parameter.default for name, parameter in notebook_parameters(notebook).items()} | overrides
    try:
        used = json.loads((run.folder / "metrics" / f"{notebook}.json").read_text())["provenance"]["parameters"]
    except (OSError, ValueError, KeyError):
        return defaults
    return used if all(used.get(name) == value for name, value in overrides.items()) else defaults


def _splits(p: dict[str, Any]) -> Splits:
    dials = {}
    if p["dataset"] == "aviary":
        dials = {name: p[name] for name in ("classes", "body_cue", "context_correlation")}
        dials |= {split: p[f"{split}_images"] for split in aviary.SPLITS}
    return load_splits(p["dataset"], p["data_root"], p["seed"], **dials)


def baselines(settings: dict[str, Any], seed: int | None = None) -> tuple[Splits, dict[str, Recipe]]:
    """Return the splits and the recipes (`cam`, `tscam`) that the parameters of notebook 03 describe.

    seed: of the training; default the first of `settings["seeds"]`.
    """
    p = settings
    names = ("pretrained", "image_size", "output_stride", "protocol", "batch_size", "shift", "num_workers")
    shared = {name: p[name] for name in names}
    loop = {name: p[name] for name in ("weight_decay", "precision", "device")}
    loop |= {"seed": p["seeds"][0] if seed is None else seed, "select": "top1_loc"}
    cam_loop = TrainingConfig(epochs=p["cam_epochs"], lr=p["cam_lr"], **loop)
    tscam_loop = TrainingConfig(epochs=p["tscam_epochs"], lr=p["tscam_lr"], head_lr=p["tscam_head_lr"], **loop)
    options = {"padding": p["padding"]}
    return _splits(p), {
        "cam": Recipe(method="cam", backbone=p["cnn"], training=cam_loop, **shared),
        "tscam": Recipe(method="tscam", backbone=p["transformer"], training=tscam_loop, options=options, **shared),
    }


def calibrated(settings: dict[str, Any], seed: int | None = None, **changes: Any) -> tuple[Splits, dict[str, Recipe]]:
    """Return the splits and the recipes (`tscam`, `scm`) that the parameters of notebook 11 describe: one start, one
    order of images, with and without the calibration module.

    seed: of the training; default the first of `settings["seeds"]`. changes: of the preset's `SCMConfig`.
    Raises ParameterError for an unknown preset.
    """
    p = settings
    if p["preset"] not in ("paper", "released"):
        raise ParameterError(f"unknown preset {p['preset']!r}", "use paper or released")
    config = getattr(scm.SCMConfig, p["preset"])(**changes)
    names = ("backbone", "pretrained", "image_size", "protocol", "batch_size", "shift", "num_workers")
    shared = {name: p[name] for name in names}
    loop = {name: p[name] for name in ("epochs", "lr", "head_lr", "schedule", "weight_decay", "precision", "device")}
    loop |= {"seed": p["seeds"][0] if seed is None else seed, "betas": tuple(p["betas"]), "select": "gt_known"}
    shared |= {"training": TrainingConfig(**loop)}
    options = {"padding": p["padding"], "head_init": p["head_init"]}
    return _splits(p), {
        "tscam": Recipe(method="tscam", options=options, **shared),
        "scm": Recipe(method="scm", options={**options, "config": config.model_dump()}, **shared),
    }
