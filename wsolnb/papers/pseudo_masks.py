"""From LPCAM's seeds to pseudo masks to segmentation (Chen and Sun, CVPR 2023, section 4.2), with IRN (CVPR 2019).

    settings = pseudo_masks.Segmentation(**parameters)     # notebook 23
    stages = pseudo_masks.Pipeline(run, host, base, settings).stages["lpcam"]
    stages.seeds, stages.irn, stages.pseudo_masks, stages.segmenter

`host` and `base` are the classifier and LPCAM's configuration of `wsolnb.papers.lpcam`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import nn

from wsolnb.data import LocalizationDataset
from wsolnb.data.store import Store, WithMasks
from wsolnb.methods.crf import CRFConfig
from wsolnb.methods.irn import IRN, IRNConfig, walk_steps, write_irn_labels, write_pseudo_masks
from wsolnb.methods.lpcam import LPCAMConfig
from wsolnb.methods.prototypes import ClassPrototypes, directions_by_kind, write_maps
from wsolnb.notebook.runs import Run
from wsolnb.papers.lpcam import INSIDE, Claim, Classifier, Draw, Host, cached_prototypes, choose, file_name, grid
from wsolnb.train.recipe import Recipe, fit
from wsolnb.train.seeds import best_threshold, evaluate, score_stored
from wsolnb.train.segmentation import Inference, score_masks, score_model, write_true_masks


class Segmentation(BaseModel):
    """Notebook 23: IRN, its walk and a segmentation network. The fields are the notebook's parameters.

    workers: processes that refine and walk, as of `wsolnb.workers.results`; no result depends on it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    images: int
    tuning_images: int
    grid_mu: tuple[float, ...]
    floors: tuple[float, ...]
    margin_foreground: float
    margin_background: float
    crf_backend: Literal["mean_field", "pydensecrf", "none"]
    crf_colour: float
    crf_distance: float
    crf_side: int
    label_radius: int
    walk_radius: int
    steps: tuple[int, ...]
    dampings: tuple[float, ...]
    irn_backbone: str
    irn_width: int
    irn_size: int
    irn_scale: tuple[float, ...]
    irn_epochs: int
    irn_batch_size: int
    irn_optimizer: Literal["adamw", "sgd"]
    irn_boundary_lr: float
    irn_displacement_lr: float
    segmenter: Literal["deeplabv2", "upernet"]
    segmenter_backbone: str
    dilations: tuple[int, ...]
    segmenter_size: int
    segmenter_scale: tuple[float, ...]
    segmenter_epochs: int
    segmenter_batch_size: int
    segmenter_optimizer: Literal["adamw", "sgd"]
    segmenter_lr: float
    segmenter_head_lr: float
    segmenter_power: float
    segmenter_weight_decay: float
    test_scales: tuple[float, ...]
    resize: bool
    workers: int

    @property
    def refinement(self) -> CRFConfig:
        """The CRF that refines seed masks."""
        kernel = {"colour": self.crf_colour, "wide": self.crf_distance, "max_side": self.crf_side}
        return CRFConfig(backend=self.crf_backend, **kernel)

    @property
    def walk_size(self) -> int | None:
        """Side of the square that images are resized to before IRN; None keeps their own size."""
        return self.irn_size if self.resize else None

    def margins(self, threshold: float, foreground: float | None = None, background: float | None = None) -> IRNConfig:
        """Return IRN's configuration around a threshold of seeds; the margins' defaults are those of the settings."""
        high = threshold + (self.margin_foreground if foreground is None else foreground)
        low = threshold - (self.margin_background if background is None else background)
        around = {"foreground": float(min(high, 0.95)), "background": float(max(low, 0.02))}
        return IRNConfig(**around, label_radius=self.label_radius, radius=self.walk_radius)

    def recipe(self, part: Literal["irn", "segmenter"], classifier: Classifier) -> Recipe:
        """Return how IRN or the segmentation network is trained.

        What is not of either (device, seed, published weights) is the classifier's.
        """
        loop = {name: getattr(self, f"{part}_{name}") for name in ("epochs", "optimizer")}
        loop |= {"schedule": "poly", "warmup": 0.0, "seed": classifier.train_seed}
        own = {name: getattr(self, f"{part}_{name}") for name in ("backbone", "batch_size")} | {"shift": 8}
        own |= {"image_size": getattr(self, f"{part}_size"), "scale": getattr(self, f"{part}_scale") or None}
        if part == "irn":
            loop |= {"lr": self.irn_boundary_lr, "head_lr": self.irn_displacement_lr, "weight_decay": 1e-4}
            options: dict[str, Any] = {"width": self.irn_width, "label_radius": self.label_radius}
            return classifier.recipe_of(loop, method="irn", options=options, output_stride=16, **own)
        loop |= {name: getattr(self, f"segmenter_{name}") for name in ("lr", "head_lr", "power", "weight_decay")}
        options = {"dilations": self.dilations} if self.segmenter == "deeplabv2" else {}
        own |= {"output_stride": 8, "dilate": True}
        return classifier.recipe_of(loop, method=self.segmenter, options=options, **own)


def _first(dataset: LocalizationDataset, count: int) -> LocalizationDataset:
    return dataset.subset(range(min(count, len(dataset)))) if count else dataset


BOUND = "pseudo masks, IRN of true masks"
"""The stage `pseudo masks` of `Stages.bound`."""

COMPARED = ("cam", "lpcam")
"""The kinds of maps that go through the whole pipeline."""


@dataclass(frozen=True)
class Pipeline:
    """From the maps of one classifier to segmentation; `pipeline.stages["lpcam"]` are those of one kind of map.

    base: LPCAM's configuration; mu_f, mu_b and the floor of it are chosen here.
    """

    run: Run
    host: Host
    base: LPCAMConfig
    settings: Segmentation

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of maps that go through it."""
        return COMPARED

    @cached_property
    def train(self) -> LocalizationDataset:
        """The images that IRN and the segmenters learn from."""
        return _first(self.host.splits.train, self.settings.images)

    @cached_property
    def tune(self) -> LocalizationDataset:
        """The validation images that everything is chosen on."""
        return _first(self.host.splits.val, self.settings.tuning_images)

    @cached_property
    def config(self) -> LPCAMConfig:
        """LPCAM with mu_f, mu_b and the floor of the highest mIoU on validation images."""
        settings = self.settings
        values = {"mu_f": settings.grid_mu or [self.base.mu_f], "mu_b": settings.grid_mu or [self.base.mu_b]}
        grids = {"lpcam": grid(self.base, **values, mu_b_least=settings.floors)}
        return choose(self.run, self.host, self.host.source(self.tune), self.prototypes, grids, self.base)["lpcam"]

    @cached_property
    def prototypes(self) -> list[ClassPrototypes]:
        """The prototypes of notebook 21, of all training images."""
        return cached_prototypes(self.run, self.host, self.base)[0]

    @cached_property
    def maps(self) -> tuple[Path, ...]:
        """Folders with the maps of training and of validation images, a store for each kind."""
        by_name = directions_by_kind(self.prototypes, self.host.weight, self.config, COMPARED, "zero")
        folders = []
        for part, dataset in (("train", self.train), ("val", self.tune)):
            write = partial(write_maps, self.host.source(dataset), by_name, self.base)
            folders.append(self.run.cached(f"maps-{part}-{self.host.number}", write))
        return tuple(folders)

    def masks(self, name: str, write: Callable[..., None], *arguments: Any) -> WithMasks:
        """Return the training images with masks that `write(*arguments, folder)` makes, once per run folder."""
        folder = self.run.cached(f"{name}-{self.host.number}", partial(write, *arguments))
        return WithMasks(self.train, Store(folder))

    def measured(self, name: str, measure: Callable[..., Any], *arguments: Any) -> list[dict[str, Any]]:
        """Return the rows that `measure(*arguments)` gives, once per run folder."""
        return self.run.cached_rows(f"{name}-{self.host.number}", partial(measure, *arguments))

    @cached_property
    def stages(self) -> dict[str, Stages]:
        """The stages of every kind of map."""
        return {kind: Stages(self, kind) for kind in self.kinds}

    def segmenter(self, kind: str, masks: WithMasks) -> Segmenter:
        """Return the segmentation network trained on masks, and what it scores on the images of `evaluation`."""
        name, settings = kind.replace(" ", "-"), self.settings
        recipe = settings.recipe("segmenter", self.host.classifier)
        model, _ = fit(self.run, f"segmenter-{name}-{self.host.number}", recipe, masks, progress=False)
        size = settings.segmenter_size if settings.resize else None
        inference = Inference(image_size=size, scales=settings.test_scales)
        scores = self.measured(f"segmentation-{name}", score_model, model, self.host.evaluation, inference)[0]
        return Segmenter(model, inference, scores)

    @cached_property
    def true_masks(self) -> WithMasks:
        """The training images with their true masks: full supervision."""
        return self.masks("truth", write_true_masks, self.train)

    @cached_property
    def fully_supervised(self) -> Segmenter:
        """The segmenter that learns from true masks."""
        return self.segmenter("true masks", self.true_masks)

    def mask_rows(self, *more: str) -> Iterator[dict[str, Any]]:
        """Yield the scores of the masks of training images, for every kind of map. more: further stages."""
        for stage in ("seeds", "seeds, CRF", "pseudo masks", *more):
            yield from (own.row(stage) for own in self.stages.values())

    def rows(self, bound: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the scores of every stage, for CAM and for LPCAM, and of the segmenter that learns from true masks.

        bound: also those of the stage `BOUND`, for which another IRN is trained.
        """
        yield from self.mask_rows(*([BOUND] if bound else []), "segmentation")
        yield _row("segmentation", "true masks", "test", np.nan, self.fully_supervised.scores)


@dataclass(frozen=True)
class OwnPipeline(Pipeline):
    """The same for a host's own maps, with CAM and with LPCAM inside (`Claim.own_maps`), up to the pseudo masks.

    study: names what is made. draw: makes the maps `INSIDE`, by their names.
    """

    study: str
    draw: Draw

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the maps, as in file names."""
        return tuple(map(file_name, INSIDE))

    @cached_property
    def maps(self) -> tuple[Path, ...]:
        """Folders with the maps of training and of validation images, a store for each kind."""
        study = file_name(self.study)
        return tuple(
            self.run.cached(f"maps-{study}-{part}-{self.host.number}", partial(write_own, self.draw, dataset))
            for part, dataset in (("train", self.train), ("val", self.tune))
        )


def write_own(draw: Draw, dataset: LocalizationDataset, folder: Path) -> None:
    """Write the maps that `draw` makes of a data set, a `Store` below the folder for each name, as of `file_name`."""
    for found in draw(dataset):
        for name, image in found.items():
            Store(folder / file_name(name)).write_maps(image)


def of_host(
    claim: Claim, run: Run, classifier: Classifier, base: LPCAMConfig, settings: Segmentation, where: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield rows of seeds and pseudo masks of the maps `INSIDE` of a host, for each of the studies of its `own_maps`.

    classifier: of one of `HOSTS`. settings: of IRN. where: columns that name the case.
    """
    base = base.model_copy(update={"seed": classifier.seed})
    host = classifier.host(run)
    _, _, by_name = claim.variants(run, host, base)
    names = {file_name(name): name.partition(", ") for name in INSIDE}
    for study, draw in claim.own_maps(run, host, by_name, base).items():
        for row in OwnPipeline(run, host, base, settings, study, draw).mask_rows():
            kind, _, hyper = names[row["map"]]
            yield {**where, "study": study, "seed": host.number, **row, "map": kind, "hyper": hyper}


class Segmenter(NamedTuple):
    """A trained segmentation network, how it predicts, and its scores on test images."""

    model: nn.Module
    inference: Inference
    scores: dict[str, float]


def _row(stage: str, kind: str, images: str, threshold: float, scores: Mapping[str, float]) -> dict[str, Any]:
    names = ("miou", "fp", "fn", "precision", "recall")
    place = {"stage": stage, "map": kind, "images": images, "threshold": threshold}
    return place | {name: scores[name] for name in names}


@dataclass(frozen=True)
class Stages:
    """The stages of one kind of map, each made of those before it, once per run folder.

    taught_by: what IRN learns from, the kind's own seeds or the true masks, which no user has.
    """

    pipeline: Pipeline
    kind: str
    taught_by: Literal["seeds", "truth"] = "seeds"

    @property
    def bound(self) -> Stages:
        """The same maps, walking within the boundaries of an IRN that learns from true masks, for reference."""
        return replace(self, taught_by="truth")

    @property
    def _name(self) -> str:
        return self.kind if self.taught_by == "seeds" else f"{self.kind}-{self.taught_by}"

    @cached_property
    def maps(self) -> tuple[Store, ...]:
        """The maps of training and of validation images."""
        return tuple(Store(folder / self.kind) for folder in self.pipeline.maps)

    @cached_property
    def seeds(self) -> dict[str, float]:
        """The `threshold` that validation chose, the `val_miou` there, and the scores of the training images."""
        own = self.pipeline
        return own.measured(f"seeds-{self.kind}", score_stored, self.maps[0], own.train, self.maps[1], own.tune)[0]

    @property
    def around(self) -> IRNConfig:
        """IRN's configuration around the seeds' threshold."""
        return self.pipeline.settings.margins(self.seeds["threshold"])

    def labels(self, name: str, config: IRNConfig) -> WithMasks:
        """Return the training images with IRN's labels: confident classes and background, 255 elsewhere."""
        own = self.pipeline
        write = partial(write_irn_labels, workers=own.settings.workers)
        arguments = (self.maps[0], own.train, config, own.settings.refinement)
        return own.masks(f"{name}-{self.kind}", write, *arguments)

    @cached_property
    def irn(self) -> tuple[IRN, Path]:
        """IRN trained on the labels `around` the seeds' threshold (or on true masks), and its folder."""
        own = self.pipeline
        recipe = own.settings.recipe("irn", own.host.classifier)
        if self.taught_by == "truth":  # the same for every kind of map
            return fit(own.run, f"irn-truth-{own.host.number}", recipe, own.true_masks, progress=False)
        labels = self.labels("labels", self.around)
        return fit(own.run, f"irn-{self.kind}-{own.host.number}", recipe, labels, progress=False)

    @cached_property
    def walks(self) -> list[dict[str, float]]:
        """Threshold and mIoU of the walked maps on validation images, a row for each damping and length."""
        own, settings = self.pipeline, self.pipeline.settings
        measure = partial(score_walks, workers=settings.workers)
        grid = (settings.dampings, settings.steps)
        arguments = (self.irn[0], self.maps[1], own.tune, self.around, *grid, settings.walk_size)
        return own.measured(f"walks-{self._name}", measure, *arguments)

    @cached_property
    def walk(self) -> IRNConfig:
        """IRN's configuration with the damping, the length and the background score that validation chose."""
        best = max(self.walks, key=lambda row: row["miou"])
        changes = {"exp_times": best["steps"], "damping": best["damping"], "mask_background": best["threshold"]}
        return self.around.model_copy(update=changes)

    @cached_property
    def pseudo_masks(self) -> WithMasks:
        """The training images with the masks of the maps that walked; `store` holds these maps, too."""
        own = self.pipeline
        write = partial(write_pseudo_masks, workers=own.settings.workers)
        arguments = (self.irn[0], self.maps[0], own.train, self.walk, own.settings.walk_size)
        return own.masks(f"pseudo-{self._name}", write, *arguments)

    @cached_property
    def segmenter(self) -> Segmenter:
        """The segmenter that learns from the pseudo masks."""
        return self.pipeline.segmenter(self.kind, self.pseudo_masks)

    def row(self, stage: str) -> dict[str, Any]:
        """Return the scores of a stage, with the threshold of its masks and the images that it is scored on.

        stage: `seeds`, `seeds, CRF` (IRN's labels without a margin), `pseudo masks`, `BOUND` or `segmentation`.
        """
        if stage == BOUND:
            return {**self.bound.row("pseudo masks"), "stage": stage}
        if stage == "segmentation":
            return _row(stage, self.kind, "test", np.nan, self.segmenter.scores)
        threshold, scores = self.seeds["threshold"], self.seeds
        if stage == "seeds, CRF":
            masks = self.labels("crf", IRNConfig(foreground=threshold, background=threshold))
            scores = self.pipeline.measured(f"scores-crf-{self.kind}", score_masks, masks)[0]
        elif stage == "pseudo masks":
            threshold = self.walk.mask_background
            scores = self.pipeline.measured(f"scores-pseudo-{self._name}", score_masks, self.pseudo_masks)[0]
        return _row(stage, self.kind, "train", threshold, scores)


def score_walks(
    model: IRN, maps: Store, dataset: LocalizationDataset, config: IRNConfig, dampings: Sequence[float],
    steps: Sequence[int], size: int | None, workers: int = 1,
) -> list[dict[str, float]]:  # fmt: skip
    """Return the best threshold and its mIoU of the maps that walked, a row for each damping and log2 of the `steps`.

    One pass over the images; arguments and memory as of `walk_steps`.
    """
    walked = walk_steps(model, maps.all_maps(dataset.image_ids), dataset, config, steps, size, dampings, workers)
    found = evaluate(walked, dataset, parts=False)
    cases = itertools.product(dampings, steps)
    return [{"damping": d, "steps": e, **best_threshold(found[d, e].segmentation)} for d, e in cases]
