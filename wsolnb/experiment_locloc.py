"""The recipe that notebooks 30 to 33 share: masks of a data set, parts trained on a frozen backbone, their scores.

Three groups of parameters, those of notebook 30 (data, backbone, masks), 31 (map decoders) and 32 (classifiers), decide
everything; the functions take them as one dictionary. What is expensive is kept by `Run.cached`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wsolnb import experiment
from wsolnb.backbones import TransformerBackbone, create_backbone, normalisation
from wsolnb.data import LocalizationDataset, Sample, aviary, transforms
from wsolnb.data.loading import make_loader, to_tensor
from wsolnb.errors import ParameterError
from wsolnb.experiment import Recipe, Splits
from wsolnb.files import fingerprint, resolve, to_json, write_atomically
from wsolnb.maps import upsample
from wsolnb.methods import frozen, grabcut, locloc, ppd
from wsolnb.methods.base import LocalizationModel
from wsolnb.methods.grabcut import GrabCutConfig, Masked, MaskFolder
from wsolnb.methods.locloc import Enhance, GrabCutEnhancedGenerator, LocalFeatureDigging, LocLoc, LocLocConfig
from wsolnb.methods.ppd import PPD, LinearProbe, ProxyProbingDecoder
from wsolnb.metrics import LocalizationAccuracy, MaxBoxAcc, PartCoverage, PxAP
from wsolnb.notebook.runs import Run
from wsolnb.train import loop
from wsolnb.train.evaluation import THRESHOLDS, Evaluation
from wsolnb.train.loop import TrainingConfig, pick_device

CODE = (*experiment.CODE, frozen, grabcut, locloc, ppd, sys.modules[__name__])
"""What every artefact of these notebooks depends on."""

Part = Literal["generator", "decoder", "classifier", "probe"]
"""What is trained alone: LocLoc's generator and classifier, PPD's decoder and probe."""


def settings_of(run: Run, own: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of notebooks 30 to 32 together, up to the notebook `own`.

    Its own are as given, the others as they were used in this run folder, or their defaults.
    """
    together: dict[str, Any] = {}
    for notebook in ("30_locloc_grabcut", "31_locloc_generator", "32_locloc_classifier"):
        together |= dict(parameters) if notebook == own else experiment.used_settings(run, notebook)
        if notebook == own:
            break
    return together


def open_splits(settings: Mapping[str, Any]) -> Splits:
    """Open the data set of notebook 30's parameters."""
    dials = {}
    if settings["dataset"] == "aviary":
        dials = {name: settings[name] for name in ("classes", "body_cue", "context_correlation")}
        dials |= {split: settings[f"{split}_images"] for split in aviary.SPLITS}
    return experiment.load_splits(settings["dataset"], settings["data_root"], settings["seed"], **dials)


def recipe_of(settings: Mapping[str, Any], training_config: TrainingConfig | None = None) -> Recipe:
    """Return the recipe whose transforms and backbone the notebooks use."""
    names = ("backbone", "pretrained", "checkpoint", "image_size", "protocol", "batch_size", "shift", "num_workers")
    shared = {name: settings[name] for name in names if name in settings}
    shared["checkpoint"] = shared.get("checkpoint") or None
    return Recipe(method="locloc", training=training_config or TrainingConfig(epochs=1, lr=1.0), **shared)


def open_backbone(recipe: Recipe, device: str = "auto") -> TransformerBackbone:
    """Return the recipe's transformer, as it will be frozen, in evaluation mode on the device."""
    backbone = create_backbone(
        recipe.backbone,
        pretrained=recipe.pretrained,
        checkpoint=resolve(recipe.checkpoint) if recipe.checkpoint else None,
        image_size=recipe.image_size,
    )
    return backbone.eval().to(pick_device(device))


def grabcut_config(settings: Mapping[str, Any], **changes: Any) -> GrabCutConfig:
    """Return the configuration of the masks that notebook 30's parameters describe."""
    return GrabCutConfig(**{name: settings[name] for name in GrabCutConfig.model_fields if name in settings} | changes)


class Attend:
    """The guide of GrabCut: attention maps (B, h, w) in [0, 1] of samples. The backbone is built when first needed."""

    def __init__(self, recipe: Recipe, config: GrabCutConfig, device: str = "auto"):
        self.recipe, self.config, self.device = recipe, config, device
        self._backbone: TransformerBackbone | None = None

    def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return the maps of whole samples, each resized to the backbone's input."""
        if self._backbone is None:
            self._backbone = open_backbone(self.recipe, self.device)
        side = self.recipe.image_size
        images = np.stack([transforms.resize(sample, (side, side)).image for sample in samples])
        pixels = to_tensor(images, self._backbone.mean, self._backbone.std)
        with torch.inference_mode():
            attention = self._backbone(pixels.to(next(self._backbone.parameters()).device)).attention
        found = grabcut.class_token_map(attention, self._backbone.grid, self.config.layers, self.config.heads)
        return found.cpu().numpy()


def masks(
    run: Run, settings: Mapping[str, Any], dataset: LocalizationDataset, config: GrabCutConfig, progress: bool = True
) -> MaskFolder:
    """Return the masks of a data set, made once per run folder; what is missing or damaged is made anew."""
    recipe = recipe_of(settings)
    attend = Attend(recipe, config, settings["device"])
    inputs = {
        "config": config.model_dump(),
        "backbone": [recipe.backbone, recipe.pretrained, recipe.image_size, recipe.weights_hash()],
        "data": [dataset.name, dataset.root.name, dataset.split, fingerprint(dataset.image_ids)],
    }

    def build(folder: Path) -> MaskFolder:
        return grabcut.generate(dataset, attend, config, folder / "masks", settings["jobs"], progress=progress)

    code = [*experiment.CODE[:-1], grabcut]
    return build(run.cached(f"masks-{dataset.split}", inputs, code, build))  # again: finds what was damaged since


# ----------------------------------------------------------------------------------------------------------- training


class Plan(NamedTuple):
    """One part to be trained: what it is, how it is built and from what it learns.

    part: see `Part`. recipe: backbone, transforms, loop. config: of LocLoc. hidden, channels: of PPD's decoder.
    threshold: of PPD's target, None = soft. images: training images that it sees, evenly spaced; 0 = all.
    """

    part: Part
    recipe: Recipe
    config: LocLocConfig
    hidden: int = 2048
    channels: int = 256
    threshold: float | None = None
    images: int = 0

    def build(self, backbone: TransformerBackbone, num_classes: int) -> LocalizationModel:
        """Return the model with the part alone, its new weights seeded."""
        loop.set_seed(self.recipe.training.seed)
        if self.part == "generator":
            return LocLoc(backbone, num_classes, GrabCutEnhancedGenerator(backbone.dim, num_classes, self.config))
        if self.part == "classifier":
            part = LocalFeatureDigging(backbone, num_classes, self.config.drop_path)
            return LocLoc(backbone, num_classes, classifier=part)
        if self.part == "decoder":
            return PPD(backbone, num_classes, ProxyProbingDecoder(backbone.dim, self.hidden, self.channels))
        return PPD(backbone, num_classes, probe=LinearProbe(backbone.dim, num_classes))

    def objective(self) -> Callable:
        """The loss of a batch."""
        if self.part == "generator":
            return locloc.learn_masks
        return ppd.attention_objective(self.threshold) if self.part == "decoder" else loop.classify


def plan(settings: Mapping[str, Any], part: Part, seed: int, **changes: Any) -> Plan:
    """Return the plan of a part by the notebooks' parameters.

    changes: of the preset's `LocLocConfig`, or `threshold` of PPD's target.
    Raises ParameterError for an unknown preset.
    """
    if settings["preset"] not in ("paper", "released"):
        raise ParameterError(f"unknown preset {settings['preset']!r}", "use paper or released")
    changes = dict(changes)
    threshold = changes.pop("threshold", settings["ppd_threshold"] or None)
    sizes = {name: settings[name] for name in ("channels", "momentum")}
    if part == "classifier":  # of no other part: what does not change it must not make it train again
        sizes["drop_path"] = settings["drop_path"]
    preset = changes.pop("preset", settings["preset"])
    config = getattr(LocLocConfig, preset)(**sizes, **changes)
    loop = {name: settings[name] for name in ("precision", "device", "weight_decay")} | {"seed": seed}
    loop |= {"epochs": settings[f"{part}_epochs"], "lr": settings[f"{part}_lr"]}
    if part == "classifier":
        loop["head_lr"] = settings["classifier_head_lr"]
    recipe = recipe_of(settings, TrainingConfig(**loop))
    images = settings["generator_images"] if part in ("generator", "decoder") else 0
    return Plan(part, recipe, config, settings["ppd_hidden"], settings["ppd_channels"], threshold, images)


def fit(
    run: Run,
    name: str,
    planned: Plan,
    splits: Splits,
    masks: MaskFolder | None = None,
    progress: bool = True,
) -> tuple[LocalizationModel, Path]:
    """Return the model trained by a plan, at its last epoch, and the folder of its checkpoints; once per run folder.

    masks: of the training images: what the generator learns, and what the classifier's images are enhanced by.
    Raises ParameterError when a part that needs masks has none.
    """
    recipe, classes = planned.recipe, len(splits.train.class_names)
    enhanced = planned.part == "classifier" and planned.config.enhance_training
    if masks is None and (enhanced or planned.part == "generator"):
        raise ParameterError(f"the {planned.part} learns from masks, and none were given", "make them: notebook 30")
    used = masks if enhanced or planned.part == "generator" else None
    inputs = {
        **planned._replace(recipe=recipe.model_dump(), config=planned.config.model_dump())._asdict(),
        "weights": recipe.weights_hash(),
        "masks": used and used.config.model_dump(),
        "data": [splits.train.name, splits.train.root.name, fingerprint(splits.train.image_ids)],
    }

    def build(folder: Path) -> None:
        dataset = splits.train if used is None else Masked(splits.train, used)
        if 0 < planned.images < len(dataset):
            dataset = dataset.subset(np.linspace(0, len(dataset) - 1, planned.images).astype(int))
        transform = recipe.train_transform()
        if enhanced:
            transform = transforms.Compose([Enhance(planned.config.rectangle), transform])
        model = planned.build(open_backbone(recipe, recipe.training.device), classes)
        mean, std = normalisation(model)
        loader = make_loader(
            dataset,
            transform,
            recipe.batch_size,
            shuffle=True,
            truth=used is not None,
            seed=recipe.training.seed,
            num_workers=recipe.num_workers,
            drop_last=True,
            mean=mean,
            std=std,
        )
        loop.train(model, loader, recipe.training, folder, None, progress, planned.objective())

    folder = run.cached(name, inputs, CODE, build)
    empty = planned.build(open_backbone(recipe, recipe.training.device), classes)
    model = loop.load_checkpoint(empty, folder, "last")
    return model.to(pick_device(recipe.training.device)), folder


# ------------------------------------------------------------------------------------------------------------- scores


IN_MEMORY = 2**31
"""Bytes up to which the maps of a split are kept in memory; larger ones lie in a temporary file of the system."""


class Predictions(NamedTuple):
    """What a model makes of a split: maps by name (n, H, W) in [0, 1], of the true class, and logits (n, C)."""

    maps: dict[str, np.ndarray]
    logits: np.ndarray


class Transformed(Sequence[Sample]):
    """The samples of a split, transformed, with their truth; each is read when asked for."""

    def __init__(self, dataset: LocalizationDataset, transform: transforms.Transform):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.transform(self.dataset[index], None)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


def _room(count: int, like: np.ndarray) -> np.ndarray:
    """Return an array (count, ...) for parts like (b, ...), beyond `IN_MEMORY` on disk: ILSVRC's maps are 10 GB."""
    shape = (count, *like.shape[1:])
    if like[0].nbytes * count <= IN_MEMORY:
        return np.empty(shape, like.dtype)
    with tempfile.TemporaryFile() as file:  # the mapping keeps it alive
        return np.memmap(file, like.dtype, "w+", shape=shape)


def predict(model: LocalizationModel, dataset: LocalizationDataset, transform: transforms.Transform) -> Predictions:
    """Run a model over a data set; maps are upsampled to the image and min-max normalised."""
    device, logits, done = next(model.parameters()).device, [], 0
    maps: dict[str, np.ndarray] = {}
    model.eval()
    mean, std = normalisation(model)
    for batch in make_loader(dataset, transform, 50, mean=mean, std=std):
        with torch.inference_mode():
            output = model(batch["image"].to(device))
            named = model.localize(output, batch["label"].to(device))
            for name, found in named.items():
                whole = upsample(found, batch["image"].shape[2:]).cpu().numpy()
                if name not in maps:
                    maps[name] = _room(len(dataset), whole)
                maps[name][done : done + len(whole)] = whole
            logits.append(output.logits.float().cpu().numpy())
        done += len(logits[-1])
    return Predictions(maps, np.concatenate(logits))


def score(maps: Mapping[str, np.ndarray], samples: Sequence[Sample], logits: np.ndarray | None = None) -> Evaluation:
    """Score named maps (n, H, W) of transformed samples with all of their truth; each sample is read once.

    logits: (n, C); None sets classification aside: every image counts as rightly classified.
    """
    boxed = {
        name: (LocalizationAccuracy(THRESHOLDS), MaxBoxAcc(THRESHOLDS), MaxBoxAcc(THRESHOLDS, multi_contour=True))
        for name in maps
    }
    pixels, parts = {name: PxAP() for name in maps}, {name: PartCoverage(THRESHOLDS) for name in maps}
    masked = parted = False
    for index, sample in enumerate(samples):
        masked, parted = masked or sample.mask is not None, parted or sample.parts is not None
        for name, values in maps.items():
            if len(sample.boxes):
                own = np.eye(sample.label + 1)[sample.label] if logits is None else logits[index]
                accuracy, *others = boxed[name]
                accuracy.update(values[index], sample.boxes, sample.label, own)
                for metric in others:
                    metric.update(values[index], sample.boxes)
            if sample.mask is not None:
                pixels[name].update(values[index], sample.mask)
            if sample.parts is not None:
                parts[name].update(values[index], sample.parts)
    groups = [{name: boxed[name][place].compute() for name in maps} for place in range(3)]
    groups.append({name: pixels[name].compute() for name in maps} if masked else {})
    return Evaluation(*groups, {name: parts[name].compute() for name in maps} if parted else {})


def mask_maps(dataset: LocalizationDataset, stored: MaskFolder, transform: transforms.Transform) -> np.ndarray:
    """Return the stored masks of a split as maps (n, H, W) of 0 and 1, moved as the transform moves the images."""
    whole = None
    for index, sample in enumerate(Masked(dataset, stored)):
        found = (transform(sample, None).mask == 1).astype(np.float32)
        whole = _room(len(dataset), found[None]) if whole is None else whole
        whole[index] = found
    return whole


def attention_maps(
    recipe: Recipe, config: GrabCutConfig, dataset: LocalizationDataset, device: str = "auto"
) -> np.ndarray:
    """Return the class token's attention of a split's transformed images, as maps (n, H, W) in [0, 1]."""
    backbone, whole, done = open_backbone(recipe, device), None, 0
    for batch in make_loader(dataset, recipe.test_transform(), 50, mean=backbone.mean, std=backbone.std):
        with torch.inference_mode():
            rows = backbone(batch["image"].to(next(backbone.parameters()).device)).attention
            maps: Tensor = grabcut.class_token_map(rows, backbone.grid, config.layers, config.heads)
            found = upsample(maps, batch["image"].shape[2:]).cpu().numpy()
        whole = _room(len(dataset), found) if whole is None else whole
        whole[done : done + len(found)] = found
        done += len(found)
    return whole


def cached_rows(run: Run, name: str, inputs: Any, measure: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return `measure()`, rows of plain numbers and text, kept in the run folder under all that it depends on."""

    def build(folder: Path) -> None:
        write_atomically(folder / "rows.json", to_json(measure()))

    return json.loads((run.cached(name, inputs, CODE, build) / "rows.json").read_text())
