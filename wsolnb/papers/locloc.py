"""The experiments of LocLoc (ACM MM 2023) and of its baseline PPD (Xu et al., ACM MM 2022).

    masks = locloc.Masks(**parameters)                 # notebook 30: masks by GrabCut
    experiment = locloc.Experiment(                    # notebooks 31 to 33: what is trained with them
        masks=run.used("30_locloc_grabcut"), decoders=run.used("31_locloc_generator"), classifiers=parameters
    )
    taught = experiment.masks.taught(run, splits.train)
    model, folder = experiment.fit(run, "generator", seed, taught)

Everything expensive is made once per run folder.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from pydantic import BaseModel, ConfigDict

from wsolnb.backbones import TransformerBackbone, create_backbone
from wsolnb.data import IGNORE, LocalizationDataset, Sample, open_dataset
from wsolnb.data.loading import make_loader
from wsolnb.data.splits import DataSettings, Splits
from wsolnb.data.store import Store, WithMasks
from wsolnb.data.transforms import Compose, Resize, Transform, resize
from wsolnb.errors import ParameterError
from wsolnb.files import resolve
from wsolnb.maps import upsample
from wsolnb.methods import grabcut
from wsolnb.methods.base import LocalizationModel
from wsolnb.methods.grabcut import Attend, GrabCutConfig
from wsolnb.methods.locloc import Enhance, LocLoc, LocLocConfig
from wsolnb.methods.ppd import PPD, probe_maker, read_probe
from wsolnb.metrics import ERRORS
from wsolnb.notebook import studies
from wsolnb.notebook.runs import Run
from wsolnb.train.evaluation import Prediction, beside, evaluate, predict, score
from wsolnb.train.loop import pick_device
from wsolnb.train.recipe import Recipe, TrainingSettings, evenly, fit

Part = Literal["generator", "decoder", "classifier", "probe"]
"""What is trained alone: LocLoc's generator and classifier, PPD's decoder and probe."""
USED = {"generator": {"third_level", "base", "channels", "momentum"}, "classifier": {"enhance_training", "rectangle"}}
"""What the training of each part of LocLoc depends on in its configuration."""

Models = Mapping[str, LocalizationModel]
Task = Callable[[], Any]

# Settings


class Masks(DataSettings):
    """Notebook 30: the data, the frozen backbone, and GrabCut's masks. The fields are the notebook's parameters.

    images: training images that are cut, and that notebooks 31 to 33 train on, evenly spaced; 0 = all.
    """

    images: int
    image_size: int
    protocol: Literal["resize", "crop_resize", "crop"]
    backbone: str
    pretrained: bool
    checkpoint: str
    layers: Literal["last", "mean"]
    heads: int
    fg_threshold: float
    bg_threshold: float
    iterations: int
    uncertain: Literal["none", "background"]
    size: int
    search_images: int
    jobs: int
    device: str

    def splits(self, variant: Literal["single", "scenes"] = "single") -> Splits:
        """Open the data set, of whose training images `images` are used; otherwise as `DataSettings.splits`."""
        train, val, test = super().splits(variant)
        return Splits(evenly(train, self.images) if self.images else train, val, test)

    def grabcut(self, **changes: Any) -> GrabCutConfig:
        """Return the configuration of the masks. changes: of its fields."""
        return GrabCutConfig(**self.model_dump(include=set(GrabCutConfig.model_fields)) | changes)

    def transformer(self, device: str | None = None) -> TransformerBackbone:
        """Return the transformer as it will be frozen, in evaluation mode on the device."""
        checkpoint = resolve(self.checkpoint) if self.checkpoint else None
        options = {"pretrained": self.pretrained, "checkpoint": checkpoint, "image_size": self.image_size}
        return create_backbone(self.backbone, **options).eval().to(pick_device(device or self.device))

    def attend(self, config: GrabCutConfig | None = None) -> Attend:
        """Return the guide of GrabCut: the transformer's attention, by layers and heads of a configuration."""
        config = config or self.grabcut()
        return Attend(self.transformer(), config.layers, config.heads)

    def store(
        self, run: Run, dataset: LocalizationDataset, config: GrabCutConfig | None = None, progress: bool = True
    ) -> Store:
        """Return the masks of a data set, made once per run folder. config: default `grabcut()`."""
        config = config or self.grabcut()
        make = grabcut.maker(dataset, self.attend(config), config, self.jobs, progress)
        return Store(run.cached(f"masks-{dataset.split}", make))

    def taught(self, run: Run, dataset: LocalizationDataset, config: GrabCutConfig | None = None) -> WithMasks:
        """Return a data set with its masks in place of its truth."""
        return WithMasks(dataset, self.store(run, dataset, config))


class Decoders(TrainingSettings):
    """Notebook 31: the generator, and PPD's decoder. The fields are the notebook's parameters.

    preset: of `LocLocConfig`. generator_images: what both decoders see, evenly spaced; 0 = all. ppd_threshold: 0 = soft
    targets. batch_size, shift, weight_decay, num_workers: of the classifiers' training, too.
    """

    preset: Literal["paper", "released"]
    channels: int
    momentum: float
    generator_images: int
    generator_epochs: int
    generator_lr: float
    ppd_hidden: int
    ppd_channels: int
    ppd_threshold: float
    decoder_epochs: int
    decoder_lr: float


class Classifiers(BaseModel):
    """Notebook 32: LocLoc's classifier, and PPD's probe. The fields are the notebook's parameters.

    probe: `logistic` is the minimum of its loss on features that are computed once; `sgd` trains it as all else is
        trained, with `probe_epochs` and `probe_lr`, where the images are too many for that.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    drop_path: float
    classifier_augment: Literal["none", "rand-m9-mstd0.5-inc1"]
    classifier_epochs: int
    classifier_lr: float
    classifier_head_lr: float
    probe: Literal["logistic", "sgd"]
    probe_epochs: int
    probe_lr: float
    seeds: tuple[int, ...]
    precision: Literal["auto", "bf16", "fp32"]
    device: str


class Experiment(BaseModel):
    """All settings of what notebooks 31 to 33 train. classifiers: None where only decoders are trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    masks: Masks
    decoders: Decoders
    classifiers: Classifiers | None = None

    def config(self, **changes: Any) -> LocLocConfig:
        """Return LocLoc's configuration. changes: of the preset's fields, or another `preset`."""
        preset = getattr(LocLocConfig, changes.pop("preset", self.decoders.preset))
        return preset(**{"channels": self.decoders.channels, "momentum": self.decoders.momentum, **changes})

    def recipe(self, part: Part, seed: int, **changes: Any) -> Recipe:
        """Return the recipe of a part and a seed. changes: as of `config`, `threshold` of PPD's target, or
        `longer`, a factor on the epochs.

        A recipe holds nothing that its part does not depend on, so a change of other parameters does not train the part
        again.
        Raises ParameterError for the classifier or the probe without the settings of notebook 32.
        """
        decoders, own, images = self.decoders, self.classifiers, 0
        if part in ("generator", "decoder"):
            own, images = decoders, decoders.generator_images
        if own is None:
            raise ParameterError(f"the {part} has no settings", "give those of notebook 32 as `classifiers`")
        epochs = getattr(own, f"{part}_epochs") * changes.pop("longer", 1)
        loop = {"epochs": epochs, "lr": getattr(own, f"{part}_lr"), "seed": seed}
        loop |= {"precision": own.precision, "device": own.device}
        options: dict[str, Any] = {"part": part}
        if part == "decoder":
            options |= {"hidden": decoders.ppd_hidden, "channels": decoders.ppd_channels}
            options["threshold"] = decoders.ppd_threshold or None
        elif part == "classifier":
            options["drop_path"], loop["head_lr"] = own.drop_path, own.classifier_head_lr
        options |= {"config": self.config(**changes).model_dump(include=USED[part])} if part in USED else changes
        fields = self.masks.model_dump(include={"backbone", "pretrained", "image_size", "protocol"})
        fields |= {"checkpoint": self.masks.checkpoint or None, "images": images, "options": options}
        if part == "classifier":
            fields["augment"] = own.classifier_augment
        return decoders.recipe_of(loop, method="locloc" if part in USED else "ppd", **fields)

    def test_transform(self) -> Transform:
        """The deterministic transform of the protocol."""
        return self.recipe("generator", 0).test_transform()

    def fit(
        self, run: Run, part: Part, seed: int, train: LocalizationDataset, progress: bool = True, **changes: Any
    ) -> tuple[LocalizationModel, Path]:
        """Return the model with the trained part at its last epoch, and its folder; trained once per run folder.

        train: the training images, with the masks where the part learns from them (`Masks.taught`); a part that does
        not learn from masks is given the images alone. changes: as of `recipe`.
        A logistic probe has no seed: it is the same for every one.
        Raises ParameterError when a part that learns from masks is given none.
        """
        recipe = self.recipe(part, seed, **changes)
        learns = part == "generator" or (part == "classifier" and recipe.options["config"]["enhance_training"])
        if learns and not isinstance(train, WithMasks):
            raise ParameterError(f"the {part} learns from masks, and none were given", "give it `masks.taught(...)`")
        if not learns and isinstance(train, WithMasks):
            train = train.dataset
        if part == "probe" and self.classifiers.probe == "logistic":
            return self._logistic_probe(run, train)
        return fit(run, f"{part}-{seed}", recipe, train, None, progress)

    def _logistic_probe(self, run: Run, train: LocalizationDataset) -> tuple[PPD, Path]:
        backbone, val = self.masks.transformer(self.classifiers.device), self.masks.splits().val
        folder = run.cached("probe", probe_maker(backbone, train, val, self.test_transform()))
        model = read_probe(backbone, len(train.class_names), folder)
        return model.to(pick_device(self.classifiers.device)), folder

    def assemble(
        self, run: Run, seed: int, train: LocalizationDataset, progress: bool = True
    ) -> dict[str, LocalizationModel]:
        """Return LocLoc and PPD of one seed, each from its two trained parts; `train` as of `fit`."""
        found = {part: self.fit(run, part, seed, train, progress)[0] for part in get_args(Part)}
        decoder, probe = found["decoder"], found["probe"]
        whole = PPD(decoder.frozen.backbone, decoder.num_classes, decoder.decoder, probe.probe)
        return {"LocLoc": joined(found["generator"], found["classifier"], self.config()), "PPD": whole.eval()}


def joined(generator: LocLoc, classifier: LocLoc, config: LocLocConfig) -> LocLoc:
    """Return the generator of one model and the classifier of another over one frozen transformer."""
    backbone, classes = generator.frozen.backbone, generator.num_classes
    return LocLoc(backbone, classes, generator.generator, classifier.classifier, config).eval()


# Notebook 30: thresholds, and what they do to the masks

FG, BG = (0.1, 0.2, 0.3, 0.4, 0.5), (0.003, 0.005, 0.01, 0.03)
"""The thresholds that are searched: of sure foreground, and of sure background."""


def mask_iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return the IoU of a mask (H, W) bool with a true one (H, W) of 0, 1 and unknown (255, left out)."""
    known = truth != IGNORE
    both, either = (mask & (truth == 1) & known).sum(), ((mask | (truth == 1)) & known).sum()
    return both / max(1, either)


class Guided(NamedTuple):
    """An image, its mask and its attention at the masks' size: a sample, (h, w) as it was, (H, W)."""

    square: Sample
    guide: np.ndarray
    attention: np.ndarray


def guided(dataset: LocalizationDataset, attend: Attend, size: int, chunk: int = 50) -> Iterator[Guided]:
    """Yield the images of a data set as GrabCut sees them, squares of `size` pixels; `chunk` are looked at at once.

    Memory: `chunk` samples at their own sizes.
    """
    for first in range(0, len(dataset), chunk):
        samples = [dataset[index] for index in range(first, min(first + chunk, len(dataset)))]
        for sample, guide in zip(samples, attend(samples), strict=True):
            yield Guided(resize(sample, (size, size)), guide, grabcut.enlarge(guide, (size, size)))


CHUNK = 64
"""Images that thresholds are tried on at once: what is held of a data set, each with its sample and its attention."""


class Tried(NamedTuple):
    """What thresholds do to the masks of n images.

    attention: IoU with the truth of the attention from each threshold on, (T, n). cut: of each cut, (C, n).
    enhanced: whether GrabCut decided, (C, n), and not its fallback.
    """

    attention: np.ndarray
    cut: np.ndarray
    enhanced: np.ndarray


def try_out(
    images: Iterable[Guided], thresholds: Sequence[float], cuts: Sequence[Mapping[str, Any]], jobs: int
) -> Tried:
    """Return what thresholds of the attention, and cuts (arguments of `enhance`), do to images, in one pass.

    Of each image numbers are kept, of the images themselves `CHUNK`. jobs: images that are cut at once, in threads.
    """
    images, rows, pool = iter(images), [], Parallel(n_jobs=jobs, prefer="threads")
    while held := list(itertools.islice(images, CHUNK)):
        rows += pool(delayed(_tried)(one, thresholds, cuts) for one in held)
    return Tried(*(np.array(values).T.copy() for values in zip(*rows, strict=True)))


def _tried(
    one: Guided, thresholds: Sequence[float], cuts: Sequence[Mapping[str, Any]]
) -> tuple[list[float], list[float], list[bool]]:
    made = [grabcut.enhance(one.square.image, one.guide, **options) for options in cuts]
    attention = [mask_iou(one.attention >= threshold, one.square.mask) for threshold in thresholds]
    return attention, [mask_iou(cut.mask, one.square.mask) for cut in made], [cut.outcome == "enhanced" for cut in made]


def _cuts(pairs: Iterable[tuple[float, float]], **options: Any) -> list[dict[str, Any]]:
    return [{"fg_threshold": fg, "bg_threshold": bg, **options} for fg, bg in pairs]


def search(run: Run, masks: Masks, dataset: LocalizationDataset) -> pd.DataFrame:
    """Return the mean IoU of `search_images` images by thresholds: of the attention alone, and of GrabCut's cuts.

    If a data set has no masks (ILSVRC), nothing is searched: the given thresholds are returned, with an IoU of NaN.
    """
    some, attend, size, jobs = evenly(dataset, masks.search_images), masks.attend(), masks.size, masks.jobs
    options = masks.model_dump(include={"iterations", "seed"})

    def measure() -> Iterator[dict[str, Any]]:
        if some[0].mask is None:
            return
        thresholds = np.round([*np.arange(0.01, 0.1, 0.01), *np.arange(0.1, 0.7, 0.05)], 2)
        cuts = [cut for side in ("none", "background")
                for cut in _cuts(itertools.product(FG, BG), uncertain=side, **options)]  # fmt: skip
        found = try_out(guided(some, attend, size, CHUNK), thresholds, cuts, jobs)
        for threshold, iou in zip(thresholds, found.attention, strict=True):
            yield {"by": "attention", "fg": threshold, "bg": np.nan, "iou": iou.mean()}
        for cut, iou, enhanced in zip(cuts, found.cut, found.enhanced, strict=True):
            row = {"by": f"GrabCut, {cut['uncertain']}", "fg": cut["fg_threshold"], "bg": cut["bg_threshold"]}
            yield {**row, "iou": iou.mean(), "fell_back": 1 - np.mean(enhanced)}

    given = {"fg": masks.fg_threshold, "bg": masks.bg_threshold, "iou": np.nan}
    found = run.cached_rows("grabcut-search", measure)
    return pd.DataFrame(found or [{"by": "attention", **given}, {"by": "GrabCut", **given}]).astype({"bg": float})


def pairs(
    run: Run, masks: Masks, dataset: LocalizationDataset, threshold: float, config: GrabCutConfig | None = None
) -> pd.DataFrame:
    """Return, per image that has a true mask, its IoU before and after GrabCut, and the outcome of the cut.

    threshold: of the attention before. config: of the masks after; default `masks.grabcut()`.
    """
    attend, size, store = masks.attend(), masks.size, masks.store(run, dataset, config, progress=False)

    def measure() -> Iterator[dict[str, Any]]:
        for index, one in enumerate(guided(dataset, attend, size)):
            if one.square.mask is not None:
                after, facts = store.read_mask(one.square.image_id)
                before = mask_iou(one.attention >= threshold, one.square.mask)
                iou = {"before": before, "after": mask_iou(after, one.square.mask)}
                yield {"image": index, **iou, "outcome": facts["outcome"]}

    return pd.DataFrame(run.cached_rows(f"grabcut-pairs-{dataset.split}", measure))


def photographs(masks: Masks, root: str) -> pd.DataFrame:
    """Return the IoU of attention and of GrabCut on photographs, with the birds' thresholds and with their own.

    root: a folder in the Oxford-IIIT Pet layout. Own thresholds are those of `search_images` training photographs.
    """
    attend, options = masks.attend(), masks.model_dump(include={"uncertain", "iterations", "seed"})
    train, held = (open_dataset("pets", resolve(root), split, seed=masks.seed) for split in ("train", "test"))
    grid, pairs = np.round(np.arange(0.01, 0.7, 0.01), 2), list(itertools.product(FG, BG))
    some = guided(evenly(train, masks.search_images), attend, masks.size)
    found = try_out(some, grid, _cuts(pairs, **options), masks.jobs)
    threshold, own = (
        values[int(np.argmax([iou.mean() for iou in rows]))]
        for values, rows in ((grid, found.attention), (pairs, found.cut))
    )
    tried = {"of the birds": (masks.fg_threshold, masks.bg_threshold), "of training photographs": own}
    tried["published"] = (0.1, 0.03)
    found = try_out(guided(held, attend, masks.size), (0.0, threshold), _cuts(tried.values(), **options), masks.jobs)
    everything, before = found.attention
    rows = [{"map": "everything", "fg": 0, "bg": np.nan, "iou": everything.mean()}]
    rows += [{"map": "attention", "fg": threshold, "bg": np.nan, "iou": before.mean()}]
    for (name, (fg, bg)), after in zip(tried.items(), found.cut, strict=True):
        gain = {"gain": (after - before).mean(), "gain_se": (after - before).std() / np.sqrt(len(after))}
        shares = {"better": (after > before + 0.05).mean(), "worse": (after < before - 0.05).mean()}
        rows.append({"map": f"GrabCut, thresholds {name}", "fg": fg, "bg": bg, "iou": after.mean(), **gain, **shares})
    table = pd.DataFrame(rows).assign(images=len(before))
    table.insert(0, "backbone", masks.backbone)
    return table


# Notebook 31: maps of decoders, of attention and of masks


def attention_maps(attend: Attend, dataset: LocalizationDataset, transform: Transform) -> Iterator[Prediction]:
    """Yield the frozen transformer's attention of each transformed image as the map `attention`."""
    mean, std = attend.backbone.mean, attend.backbone.std
    for batch in make_loader(dataset, transform, 50, truth=True, mean=mean, std=std):
        found = upsample(attend.maps(batch["image"]), batch["image"].shape[2:]).cpu().numpy()
        for sample, score_map in zip(batch["samples"], found, strict=True):
            yield Prediction(sample, None, None, {"attention": score_map})


def mask_maps(store: Store, dataset: LocalizationDataset, transform: Transform) -> Iterator[Prediction]:
    """Yield the stored mask of each image as the map `GrabCut mask` of 0 and 1, moved as its image is."""
    masked = WithMasks(dataset, store)
    for index in range(len(dataset)):
        score_map = (transform(masked[index], None).mask == 1).astype(np.float32)
        yield Prediction(transform(dataset[index], None), None, None, {"GrabCut mask": score_map})


def titled(predictions: Iterable[Prediction], title: str) -> Iterator[Prediction]:
    """Yield predictions with their first map alone, under a title."""
    for found in predictions:
        yield found._replace(maps={title: next(iter(found.maps.values()))})


def four_maps(
    attend: Attend, store: Store, models: Models, dataset: LocalizationDataset, transform: Transform
) -> Iterator[Prediction]:
    """Yield each image with its attention, its stored mask and each model's own map, by the names of the models.

    Classes play no part: the predictions have no logits.
    """
    drawn = [titled(predict(model, dataset, transform), name) for name, model in models.items()]
    yield from beside(attention_maps(attend, dataset, transform), mask_maps(store, dataset, transform), *drawn)


def map_scores(run: Run, experiment: Experiment, splits: Splits, models: Models) -> pd.DataFrame:
    """Return what `four_maps` score on test images at thresholds of the validation images; no class is asked for.

    The columns of the errors (`wsolnb.metrics.ERRORS`) and `right`, of boxes with an IoU above 0.5, add up to one.
    """
    attend, transform = experiment.masks.attend(), experiment.test_transform()
    held = [(part, experiment.masks.store(run, part)) for part in (splits.val, splits.test)]

    def measure() -> list[dict[str, Any]]:
        val, test = (score(four_maps(attend, store, models, part, transform)) for part, store in held)
        at = {name: test.localization[name].at(threshold) for name, threshold in val.thresholds().items()}
        return [row | {error: at[row["map"]][error] for error in ERRORS[1:]} for row in test.table(val)]

    table = pd.DataFrame(run.cached_rows("generator-scores", measure))
    return table.drop(columns=["top1", "top5_loc"]).rename(columns={"top1_loc": "right"})


def paired(table: pd.DataFrame, by: str, measure: str, one: str, other: str) -> str:
    """Return the difference of two rows of a study with its 95 % interval over seeds, and its sign, in words.

    table: columns `seed`, `by` and the measure. one, other: values of `by`.
    """
    wide = table.pivot(index="seed", columns=by, values=measure)
    gain = (wide[one] - wide[other]).dropna()
    return f"{studies.plus_minus(gain)} (above 0 for {(gain > 0).sum()} of {len(gain)} seeds)"


# Notebook 32: classifiers


def top1(model: LocalizationModel, dataset: LocalizationDataset, transform: Transform) -> float:
    """Return the share of images whose class has the largest logit."""
    return float(np.mean([np.argmax(one.logits) == one.sample.label for one in predict(model, dataset, transform)]))


def enhanced_at_test(
    generator: LocLoc, classifier: LocLoc, config: LocLocConfig, splits: Splits, transform: Transform
) -> dict[str, float]:
    """Return `top1` on test images masked by a generator's map, and the map's `threshold`, chosen on validation."""

    def masked(threshold: float, dataset: LocalizationDataset) -> float:
        changed = config.model_copy(update={"enhance_test": True, "mask_threshold": threshold})
        return top1(joined(generator, classifier, changed), dataset, transform)

    best = max((0.02, 0.05, 0.1, 0.2, 0.3), key=lambda threshold: masked(threshold, splits.val))
    return {"threshold": best, "top1": masked(best, splits.test)}


def class_scores(
    run: Run, experiment: Experiment, splits: Splits, generator: LocLoc, classifier: LocLoc, probe: PPD
) -> pd.DataFrame:
    """Return what LocLoc's classifier and the linear probe score on test images, and the maps of the first."""
    config, transform = experiment.config(), experiment.test_transform()

    def measure() -> Iterator[dict[str, Any]]:
        whole = joined(generator, classifier, config)
        val, test = (evaluate(whole, part, transform) for part in (splits.val, splits.test))
        yield from ({"classifier": "LFDM", **row} for row in test.table(val))
        yield {"classifier": "linear probe", "map": "none", "top1": top1(probe, splits.test, transform)}
        masked = enhanced_at_test(generator, classifier, config, splits, transform)
        yield {"classifier": "LFDM, enhanced at test", "map": "none", **masked}

    return pd.DataFrame(run.cached_rows("classifier-scores", measure))


# The studies of notebooks 31 and 32


MaskKind = Literal["GrabCut", "attention", "generator", "true"]
BEST_PLAIN = 0.07
"""The attention's best threshold (notebook 30), for the attention without GrabCut."""


class Variant(NamedTuple):
    """One variant of a study: the part, changes of its recipe, and the masks that it learns from.

    same_at_test: a classifier's test images are black outside of masks of the same kind, as its training images are.
    """

    part: Part
    changes: dict[str, Any]
    masks: MaskKind = "GrabCut"
    same_at_test: bool = False


PAPER = {"enhance_training": True, "rectangle": False}
"""How the supplement trains LFDM: on images that are black outside of their mask. No rectangle stays as it was."""

VARIANTS = {
    "GEG": Variant("generator", {}),
    "GEG, third level alive": Variant("generator", {"third_level": True}),
    "GEG, attention >= 0.07": Variant("generator", {}, "attention"),
    "GEG, four times as long": Variant("generator", {"longer": 4}),
    "PPD": Variant("decoder", {}),
    "PPD, attention >= 0.07": Variant("decoder", {"threshold": BEST_PLAIN}),
    "PPD, four times as long": Variant("decoder", {"longer": 4}),
    "LFDM": Variant("classifier", {}),
    "LFDM, four times as long": Variant("classifier", {"longer": 4}),
    "LFDM, plain images": Variant("classifier", {"enhance_training": False}),
    "LFDM, plain images, four times as long": Variant("classifier", {"enhance_training": False, "longer": 4}),
    "LFDM, GrabCut": Variant("classifier", PAPER, same_at_test=True),
    "LFDM, GrabCut, four times as long": Variant("classifier", PAPER | {"longer": 4}, same_at_test=True),
    "LFDM, generator": Variant("classifier", PAPER, "generator", same_at_test=True),
    "LFDM, generator, four times as long": Variant("classifier", PAPER | {"longer": 4}, "generator", same_at_test=True),
    "LFDM, truth": Variant("classifier", PAPER, "true", same_at_test=True),
    "LFDM, truth, four times as long": Variant("classifier", PAPER | {"longer": 4}, "true", same_at_test=True),
    "linear probe": Variant("probe", {}),
}


def masked_by(
    run: Run, experiment: Experiment, splits: Splits, kind: MaskKind, generator: LocLoc | None = None
) -> Callable[[LocalizationDataset], WithMasks]:
    """Return a function that gives a data set masks of a kind in place of its truth; made once per run folder.

    kind: `attention` is the attention from `BEST_PLAIN` on; `generator` is the given generator's map from that
    threshold on which is best for boxes on validation images; `true` is the truth, as an upper bound.
    """
    masks = experiment.masks
    if kind == "GrabCut":
        return lambda dataset: masks.taught(run, dataset)
    if kind == "attention":  # no uncertain pixel: the mask is the thresholded attention
        plain = masks.grabcut(fg_threshold=BEST_PLAIN, bg_threshold=BEST_PLAIN)
        return lambda dataset: masks.taught(run, dataset, plain)
    square, threshold = Resize(masks.image_size), 0.0
    if kind == "generator":
        threshold = evaluate(generator, splits.val, experiment.test_transform()).thresholds()["generated"]

    def drawn(dataset: LocalizationDataset) -> Iterator[tuple[str, np.ndarray]]:
        if kind == "true":
            yield from ((sample.image_id, sample.mask) for sample in map(dataset.__getitem__, range(len(dataset))))
        else:
            for found in predict(generator, dataset, square):
                yield found.sample.image_id, found.maps["generated"] >= threshold

    def masked(dataset: LocalizationDataset) -> WithMasks:
        def build(folder: Path) -> None:
            for image_id, mask in drawn(dataset):
                Store(folder).write_mask(image_id, mask)

        return WithMasks(dataset, Store(run.cached(f"masks-{kind}-{dataset.split}", build)))

    return masked


def study(
    run: Run,
    experiment: Experiment,
    splits: Splits,
    variants: Sequence[str],
    seeds: Sequence[int],
    generator: LocLoc | None = None,
) -> Iterator[dict[str, Any]]:
    """Train some of `VARIANTS` with each seed; yields the scores of each on test images, of a probe top-1 alone.

    Rows of a classifier have its `epochs`, because a comparison of variants is one of trainings of the same length.

    `top1` is that of the test images the variant is made for, `top1_plain` or `top1_enhanced` that of the other kind.
    generator: its maps enhance the test images that a classifier is also scored on.
    """
    transform = experiment.test_transform()
    asked = {VARIANTS[name].masks for name in variants}
    masked = {kind: masked_by(run, experiment, splits, kind, generator) for kind in asked}
    taught = {kind: masked[kind](splits.train) for kind in asked}
    for seed, name in itertools.product(seeds, variants):
        part, changes, kind, same_at_test = VARIANTS[name]
        model, _ = experiment.fit(run, part, seed, taught[kind], False, **changes)
        row: dict[str, Any] = {"variant": name, "seed": seed}
        if part in ("classifier", "probe"):
            row["top1"] = top1(model, splits.test, transform)
        if part != "probe":
            val, test = (evaluate(model, held, transform) for held in (splits.val, splits.test))
            own = test.table(val)[0]
        if same_at_test:
            row["top1_plain"] = row["top1"]
            row["top1"] = top1(model, masked[kind](splits.test), Compose([Enhance(), transform]))
        elif part == "classifier":
            found = enhanced_at_test(generator, model, experiment.config(), splits, transform)
            row |= {"top1_enhanced": found["top1"], "mask_threshold": found["threshold"]}
        if part == "classifier":
            row |= {"gt_known_class_map": own["gt_known"]} | {c: own[c] for c in own if c.startswith("covers")}
            row["epochs"] = experiment.recipe(part, seed, **changes).training.epochs
        elif part != "probe":
            row |= {c: own[c] for c in own if not c.startswith("top") and c != "map"}
        print(row, flush=True)
        yield row


# Notebook 33: the whole


def whole_scores(run: Run, experiment: Experiment, splits: Splits, models: Models, seed: int) -> list[dict[str, Any]]:
    """Return what whole models (`Experiment.assemble`) score on test images, class and box; a row for each."""
    transform = experiment.test_transform()

    def measure() -> Iterator[dict[str, Any]]:
        for name, model in models.items():
            own = model.maps[0]
            val, test = (score(titled(predict(model, part, transform), own)) for part in (splits.val, splits.test))
            top5 = test.localization[own].top5_cls
            yield {"method": name, "seed": seed, **test.table(val)[0], "top5": top5}

    return run.cached_rows("whole-scores", measure)


def computations(models: Models, load: Task, load_for_class: Task | None = None) -> dict[str, dict[str, Task]]:
    """Return what LocLoc and PPD compute for a batch, by model: `classifier`, `generator` and the `total`.

    models: as of `Experiment.assemble`. load: gives the images (B, 3, H, W), anew for each call: loading counts.
    load_for_class: those of PPD's class, which has another transform as published; default `load`.
    """
    whole, ppd, for_class = models["LocLoc"], models["PPD"], load_for_class or load
    frozen = whole.frozen
    return {
        "LocLoc": {
            "classifier": lambda: whole.classifier(frozen.embed(load())),
            "generator": lambda: whole.generator(frozen.to_grid(frozen(load()).last[-1])),
            "total": lambda: whole(load()),
        },
        "PPD": {
            "classifier": lambda: ppd.classify(for_class()),
            "generator": lambda: ppd.draw(load()),
            "total": lambda: ppd(load(), for_class()),
        },
    }


def seconds(task: Task, device: torch.device, repeats: int, learns: bool = False) -> float:
    """Return the median time of a computation over `repeats` runs, after one that is not counted.

    learns: whether it takes gradients, as a step of a training does.
    """
    times = []
    with torch.inference_mode(not learns):
        for _ in range(repeats + 1):
            started = time.perf_counter()
            task()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
