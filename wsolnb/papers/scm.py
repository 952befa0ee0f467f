"""The experiments of SCM (Bai et al., ECCV 2022, https://arxiv.org/abs/2207.10447) and of its baselines.

    baselines = scm.Baselines(**parameters)            # notebook 03: CAM, TS-CAM and other methods
    pair = scm.Pair(**parameters)                      # notebook 11: TS-CAM and SCM from one start
    studies = scm.Studies(pair=pair, **parameters)     # notebook 12: pairs over seeds, one change at a time
    trained = pair.fit_all(run, scm.PAIR, [0, 1], splits)
    table, found = scm.score_all(trained, splits)

Everything that is trained is trained once per run folder.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_type_hints

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from wsolnb.backbones import ConvBackbone, TransformerBackbone
from wsolnb.data.base import LocalizationDataset
from wsolnb.data.loading import make_loader
from wsolnb.data.splits import DataSettings, Splits
from wsolnb.data.transforms import Transform
from wsolnb.methods import get_method
from wsolnb.methods.base import LocalizationModel, pick
from wsolnb.methods.scm import SCM, SCMConfig
from wsolnb.methods.tscam import TSCAM
from wsolnb.notebook.runs import Run
from wsolnb.pretraining import taught
from wsolnb.pretraining.recipes import start_of
from wsolnb.train.evaluation import Evaluation, Reader, evaluate, validator
from wsolnb.train.loop import history, load_checkpoint
from wsolnb.train.recipe import Recipe, TrainingSettings, fit

Epoch = Literal["best", "last"]
PAIR = {"tscam": "TS-CAM", "scm": "SCM"}
"""The two methods of a pair, in the order of their trainings, and what a table calls them."""


class Trained(NamedTuple):
    """A trained model. model: at its last epoch. folder: of its checkpoints. transform: of its test images."""

    model: LocalizationModel
    folder: Path
    transform: Transform

    @property
    def history(self) -> pd.DataFrame:
        """One row per epoch: loss, seconds and scores on validation images."""
        return history(self.folder)

    def at(self, epoch: Epoch) -> LocalizationModel:
        """Load the weights of the last or of the best epoch into the model, and return it."""
        return load_checkpoint(self.model, self.folder, epoch)


class _Experiment(TrainingSettings, DataSettings):
    """What both experiments share: how a single-label model is trained and kept.

    images: training images that are seen, evenly spaced; 0 = all.
    """

    prefix: ClassVar[str] = ""
    images: int
    image_size: int
    protocol: Literal["resize", "crop_resize", "crop"]
    pretrained: bool
    padding: Literal["zeros", "replicate"]

    def fit(self, run: Run, method: str, seed: int, splits: Splits, progress: bool = True, **changes: Any) -> Trained:
        """Return the trained model of a method at its last epoch; trained once per run folder.

        The best epoch is chosen on the validation images. changes: as of `recipe`.
        """
        recipe = self.recipe(method, seed, **changes)
        transform = recipe.test_transform()
        name, validate = f"{self.prefix}{method}-{seed}", validator(splits.val, transform)
        return Trained(*fit(run, name, recipe, splits.train, validate, progress), transform)

    def fit_all(
        self, run: Run, methods: Iterable[str], seeds: Sequence[int], splits: Splits
    ) -> dict[tuple[str, int], Trained]:
        """Return the trained models of several methods by method and seed, seed after seed."""
        pairs = [(method, seed) for seed in seeds for method in methods]
        for pair in pairs:
            self.recipe(*pair)  # an unknown method is an error before the first training
        return {pair: self.fit(run, *pair, splits) for pair in pairs}


class Baselines(_Experiment):
    """Notebook 03: a convolutional network for CAM and the methods built on it, a transformer for TS-CAM.

    The fields are the notebook's parameters. method_options: by method, what its class takes besides the backbone.
    """

    cnn: str
    output_stride: int
    transformer: str
    cam_epochs: int
    cam_lr: float
    tscam_epochs: int
    tscam_lr: float
    tscam_head_lr: float
    method_options: dict[str, dict[str, Any]]

    @model_validator(mode="after")
    def _known(self) -> Self:
        for method in self.method_options:
            get_method(method)  # options of a method that there is not would change nothing
        return self

    def recipe(self, method: str, seed: int, **changes: Any) -> Recipe:
        """Return the recipe of a method: as TS-CAM's if its class takes a transformer, else as CAM's.

        The annotation of the class's argument `backbone` says what it takes. changes: of the method's options.
        Raises ParameterError for an unknown method.
        """
        changes = self.method_options.get(method, {}) | changes
        takes = get_type_hints(get_method(method).__init__).get("backbone", ConvBackbone)
        loop: dict[str, Any] = {"seed": seed, "select": "top1_loc"}
        if not (isinstance(takes, type) and issubclass(takes, TransformerBackbone)):
            loop |= {"epochs": self.cam_epochs, "lr": self.cam_lr}
            return self.recipe_of(loop, method=method, backbone=self.cnn, options=changes, images=self.images)
        if issubclass(get_method(method), TSCAM):
            changes = {"padding": self.padding} | changes
        loop |= {"epochs": self.tscam_epochs, "lr": self.tscam_lr, "head_lr": self.tscam_head_lr}
        return self.recipe_of(loop, method=method, backbone=self.transformer, options=changes, images=self.images)


class Pair(_Experiment):
    """Notebook 11: TS-CAM and SCM from one start and in one order of images, without and with the calibration module.

    The fields are the notebook's parameters. preset: of `SCMConfig`.
    """

    prefix: ClassVar[str] = "pair-"
    backbone: str
    checkpoint: str
    head_init: Literal["kaiming", "zeros"]
    preset: Literal["paper", "released"]
    epochs: int
    lr: float
    head_lr: float
    schedule: Literal["cosine", "constant"]
    betas: tuple[float, float]

    def changed(self, **changes: Any) -> Self:
        """Return the settings with other values of some fields; another backbone does not start from the checkpoint."""
        if changes.get("backbone", self.backbone) != self.backbone:
            changes = {"checkpoint": "", **changes}
        return super().changed(**changes)

    def recipe(self, method: str, seed: int, **changes: Any) -> Recipe:
        """Return the recipe of `tscam` or `scm`. changes: of the preset's `SCMConfig`."""
        options = self.model_dump(include={"padding", "head_init"})
        if method == "scm":
            options["config"] = getattr(SCMConfig, self.preset)(**changes).model_dump()
        return self.recipe_of({"seed": seed, "select": "gt_known"}, method=method, options=options, images=self.images)

    def fit_literal(self, run: Run, seed: int, splits: Splits, epochs: int) -> Trained:
        """Return SCM trained as the text alone reads: the paper's preset, without the residual of fig. 2."""
        return self.changed(preset="paper", epochs=epochs).fit(run, "scm", seed, splits, residual=False)

    def start(self, seed: int, like: TSCAM) -> TSCAM:
        """Return TS-CAM as it is before any training, on the device of a trained model and with its classes."""
        start = self.recipe("tscam", seed).build(like.semantic.out_channels)
        return start.eval().to(next(like.parameters()).device)


def score_all(
    trained: Mapping[tuple[str, int], Trained], splits: Splits, epochs: Sequence[Epoch] = ("last", "best")
) -> tuple[pd.DataFrame, dict[tuple[str, int, str], tuple[Evaluation, Evaluation]]]:
    """Score every trained model at its last and at its best epoch; the models are left at the last one.

    Returns a table with a row per method, seed, epoch and map: test images, at thresholds chosen on validation images;
    and by method, seed and epoch the scores of validation and test images.
    """
    rows, found = [], {}
    for (method, seed), one in trained.items():
        for epoch in epochs:
            val, test = (evaluate(one.at(epoch), part, one.transform) for part in (splits.val, splits.test))
            found[method, seed, epoch] = val, test
            rows += [{"method": method, "seed": seed, "epoch": epoch, **row} for row in test.table(val)]
        one.at("last")
    return pd.DataFrame(rows), found


# How far training moves the attention, and which factor of the product a difference lies in


def drift(model: TSCAM, start: TSCAM, dataset: LocalizationDataset, transform: Transform) -> float:
    """Return how far training has moved the attention of a model from its start: 0 = not at all, 1 = disjoint.

    The mean over the images of half the sum of differences between both maps, each scaled to sum to one.
    """
    moved = []
    device = next(model.parameters()).device
    for batch in make_loader(dataset, transform, 50, mean=model.mean, std=model.std):
        with torch.inference_mode():
            images = batch["image"].to(device)
            maps = [one.backbone(images).attention.mean(dim=(1, 2)).cpu() for one in (start, model)]
        first, last = (found / found.sum(dim=1, keepdim=True) for found in maps)
        moved.append((first - last).abs().sum(dim=1))
    return float(torch.cat(moved).mean() / 2)


class _Factors(NamedTuple):
    """logits: (B, C). attention, semantic: by name, (B, h, w) and (B, C, h, w)."""

    logits: Tensor
    attention: dict[str, Tensor]
    semantic: dict[str, Tensor]


class _Products(Reader):
    """Products of attention and semantic maps. pairs: names of both factors, by the name of their product."""

    def __init__(self, pairs: Mapping[str, tuple[str, str]]):
        super().__init__()
        self.pairs, self.maps = pairs, tuple(pairs)

    def localize(self, output: _Factors, classes: Tensor) -> dict[str, Tensor]:
        """Return every product for one class per image, each (B, h, w)."""
        semantic = {name: pick(found, classes).float() for name, found in output.semantic.items()}
        return {name: output.attention[a] * semantic[s] for name, (a, s) in self.pairs.items()}


class Products(_Products):
    """Products of one model's attention with another's semantic map; the map `a x s` takes them from models a and s.

    trained: TS-CAM or SCM by name. start: the model before training; only its attention is taken.
    """

    def __init__(self, trained: Mapping[str, TSCAM], start: TSCAM):
        super().__init__({f"{a} x {s}": (a, s) for a in ("start", *trained) for s in trained})
        self.trained, self.start = nn.ModuleDict(trained), start

    def forward(self, images: Tensor) -> _Factors:
        """Run all models on (B, 3, H, W) normalised images; the logits are those of the first trained one."""
        outputs = {name: model(images) for name, model in self.trained.items()}
        rows = {"start": self.start.backbone(images).attention} | {n: out.attention for n, out in outputs.items()}
        grid = self.start.backbone.grid
        attention = {name: found.float().mean(dim=(1, 2)).unflatten(1, grid) for name, found in rows.items()}
        logits = next(iter(outputs.values())).logits
        return _Factors(logits, attention, {name: out.semantic_map for name, out in outputs.items()})


def swapped(
    trained: Mapping[str, TSCAM], start: TSCAM, splits: Splits, transform: Transform
) -> list[dict[str, str | float]]:
    """Return GT-known of each model's attention times each model's semantic map, at validation thresholds."""
    products = Products(trained, start)
    val, test = (evaluate(products, part, transform, quick=True) for part in (splits.val, splits.test))
    at = val.thresholds()
    return [
        {"attention of": a, "semantic map of": s, "gt_known": test.localization[name].at(at[name])["gt_known"]}
        for name, (a, s) in products.pairs.items()
    ]


class Couplings(_Products):
    """SCM's products of the semantic map of one level with the attention of another: `S0 F0`, `S0 F1`, ... (fig. 9).

    Levels lie in front of the first block, between the blocks, and behind the last one.
    """

    def __init__(self, model: SCM):
        levels = range(1 + len(model.calibration.blocks))
        super().__init__({f"S{i} F{j}": (f"F{j}", f"S{i}") for i in levels for j in levels})
        self.model, self.levels = model, len(levels)

    def forward(self, images: Tensor) -> _Factors:
        """Run the model and its blocks on (B, 3, H, W) normalised images."""
        output = self.model(images)
        levels = list(enumerate(self.model.calibration(output.attention, output.semantic_map)))
        attention = {f"F{level}": maps.attention for level, maps in levels}
        return _Factors(output.logits, attention, {f"S{level}": maps.semantic for level, maps in levels})


# The studies of notebook 12


REGIMES: dict[str, dict[str, Any]] = {
    "as studied": {},
    "head padded with zeros": {"padding": "zeros"},
    "head rate 0.001": {"head_lr": 0.001},
    "five epochs": {"epochs": 5},
}
"""Changes of both trainings of a pair."""

LONGEST = "five epochs"
"""The regime of `Studies.epochs`."""

SWITCHES: dict[str, dict[str, Any]] = {
    "released": {},
    "p = 4 in the first block": {"first_steps": 4},
    "filter of eq. 7": {"filter": "absolute"},
    "attention unscaled (eq. 1)": {"attention": "mean"},
    "no residual": {"residual": False},
    "X_0 differentiated": {"constant_start": False},
}
"""What paper and released code set differently, one at a time."""

SCALES = (("alpha", 0.001), ("alpha", 0.004), ("beta", 0.25), ("beta", 1.0), ("lam", 0.8))

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "switches": SWITCHES,
    "steps": {f"p = {p}": {"steps": p, "first_steps": p} for p in (1, 2, 4, 6, 8)},
    "scales": {"released": {}, **{f"{name} = {v}": {name: v} for name, v in SCALES}},
    "blocks": {f"{n} blocks": {"blocks": n} for n in (1, 2, 4, 6)},
}
"""Studies of SCM alone: by study and variant, changes of its `SCMConfig`."""

BASELINE = "TS-CAM"
"""The first variant of each of these studies, which the others are compared with."""

PHOTO = {"image_size": 160, "shift": 12}
"""Photographs at the size that `vit_photo` was made for, as in the profiles `tiny` and `pets`."""

STUDIES = ("pairs", "pretrainings", "photographs", "tiny", "rates", "regimes", *VARIANTS)
"""Every study that trains models; `factors` reads those of `pairs`."""


class Trial(NamedTuple):
    """One training of a study. pair: the settings that it is trained with. module: changes of its `SCMConfig`."""

    study: str
    variant: str
    method: str
    seed: int
    pair: Pair
    module: dict[str, Any]


class Studies(BaseModel):
    """Notebook 12: the trainings of its studies. The fields are the notebook's parameters.

    pair: the settings of notebook 11; every training changes some of them.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    pair: Pair
    pair_seeds: list[int]
    pretraining_seeds: list[int]
    study_seeds: list[int]
    study_start: str
    study_epochs: int
    cues: list[float]
    starts: list[str]
    rates: list[float]
    photos_root: str
    photo_epochs: int
    photo_starts: list[str]
    tiny_root: str
    tiny_starts: list[str]
    tiny_images: int
    tiny_epochs: int

    def trials(self, study: str, run: Run | None = None) -> Iterator[Trial]:
        """Yield the trainings of a study, one of `STUDIES`, in their order.

        run: where `pretrainings` makes the starts that are not embedded, each before its pairs; else not needed.
        """
        seeds = self.study_seeds if study in ("rates", "regimes", *VARIANTS) else self.pair_seeds
        variants = self._pretrainings(run) if study == "pretrainings" else self._variants(study)
        for variant, changes, module in variants:
            pair = self.pair.changed(**{"epochs": self.study_epochs, **changes})
            methods = list(PAIR) if study not in VARIANTS else ["tscam" if variant == BASELINE else "scm"]
            yield from (Trial(study, variant, method, seed, pair, module) for seed in seeds for method in methods)

    def _pretrainings(self, run: Run) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        for backbone, seed in itertools.product(self.starts, self.pretraining_seeds):
            yield f"pretraining {seed}", {"backbone": backbone, **start_of(run, backbone, seed)}, {}
        # The recipes of photographs need Tiny-ImageNet.
        photographs = [changes for _, changes, _ in self._variants("tiny") if changes["backbone"] in taught.RECIPES]
        for changes, seed in itertools.product(photographs if self.tiny_root else (), self.pretraining_seeds):
            start = taught.taught_start(run, changes["backbone"], seed, self.tiny_root)
            yield f"pretraining {seed}", {**changes, **start}, {}

    def _variants(self, study: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Return name, changes of the pair, and changes of the module."""
        own = {"backbone": self.study_start}
        photographs = {"dataset": "pets", "data_root": self.photos_root, "epochs": self.photo_epochs}
        tiny = {"dataset": "tiny_imagenet", "data_root": self.tiny_root, "body_cue": 0.0, **PHOTO}
        tiny |= {"epochs": self.tiny_epochs, "images": self.tiny_images}
        sized = dict.fromkeys(taught.RECIPES, PHOTO)
        changes = {
            "tiny": [("-", {"backbone": b, **tiny}) for b in self.tiny_starts],
            "pairs": [("-", {"backbone": b, "body_cue": cue}) for cue in self.cues for b in self.starts],
            "photographs": [("-", {"backbone": b, **photographs, **sized.get(b, {})}) for b in self.photo_starts],
            "rates": [("-", {"backbone": b, "lr": rate}) for b in self.starts for rate in self.rates],
            "regimes": [(name, {**own, **regime}) for name, regime in REGIMES.items()],
        }
        if study in changes:
            return [(name, changed, {}) for name, changed in changes[study]]
        found = [(BASELINE, own, {}), *((name, own, module) for name, module in VARIANTS[study].items())]
        if study == "switches":
            paper = {**own, "preset": "paper"}
            # Without fig. 2's residual it does not learn: one epoch shows that.
            found += [("paper", paper, {}), ("paper, no residual", {**paper, "epochs": 1}, {"residual": False})]
        return found

    def rows(self, run: Run, studies: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Train the models of some studies, or find them; yield the rows of `measured`."""
        for study in studies:
            for trial in self.trials(study, run) if study in STUDIES else ():
                yield from measured(run, trial)

    def epochs(self, run: Run) -> Iterator[dict[str, Any]]:
        """Yield the validation scores of every epoch of the regime `LONGEST`, of every seed (fig. 5b and c)."""
        for trial in self.trials("regimes"):
            if trial.variant == LONGEST:
                one = trial.pair.fit(run, trial.method, trial.seed, trial.pair.splits(), progress=False)
                seen = one.history[["epoch", "top1", "gt_known", "gt_known_attention"]]
                where = {"method": trial.method, "seed": trial.seed}
                yield from ({**where, **row, "epoch": int(row["epoch"])} for row in seen.to_dict("records"))

    def factors(self, run: Run) -> Iterator[dict[str, Any]]:
        """Yield the rows of `swapped` for the pairs of every start and seed."""
        for backbone in self.starts:
            pair = self.pair.changed(epochs=self.study_epochs, backbone=backbone)
            splits = pair.splits()
            for seed in self.pair_seeds:
                found = {method: pair.fit(run, method, seed, splits, progress=False) for method in PAIR}
                models = {method: one.model for method, one in found.items()}
                rows = swapped(models, pair.start(seed, models["scm"]), splits, found["scm"].transform)
                yield from ({"backbone": backbone, "seed": seed, **row} for row in rows)

    def couplings(self, run: Run) -> Iterator[dict[str, Any]]:
        """Yield GT-known of every coupling of levels on validation images (fig. 9), of SCM as in the other studies."""
        pair = self.pair.changed(epochs=self.study_epochs, backbone=self.study_start)
        splits = pair.splits()
        for seed in self.study_seeds:
            one = pair.fit(run, "scm", seed, splits, progress=False)
            yield from ({"seed": seed, **row} for row in coupled(one.model, splits.val, one.transform))


def coupled(model: SCM, dataset: LocalizationDataset, transform: Transform) -> list[dict[str, Any]]:
    """Return GT-known of every coupling of a model's levels, at the best threshold of these images."""
    found = evaluate(cascade := Couplings(model), dataset, transform, quick=True).localization
    return [
        {
            "semantic_level": int(s[1:]),
            "attention_level": int(a[1:]),
            "coupling": name,
            "gt_known": found[name].best("gt_known")[1],
        }
        for name, (a, s) in cascade.pairs.items()
    ]


def measured(run: Run, trial: Trial) -> Iterator[dict[str, Any]]:
    """Train one model of a study, or find it; yield a row for its best and one for its last epoch.

    Where the last epoch is the best, both rows hold the same scores. Scores are those of test images, at thresholds
    chosen on validation images; the drift is that of validation images. Rows of SCM also have lambda and beta of every
    block.
    """
    pair, splits = trial.pair, trial.pair.splits()
    one = pair.fit(run, trial.method, trial.seed, splits, progress=False, **trial.module)
    start = pair.start(trial.seed, one.model)
    where = {"study": trial.study, "variant": trial.variant, "method": trial.method, "backbone": pair.backbone}
    where |= {"seed": trial.seed, **{name: getattr(pair, name) for name in ("body_cue", "lr", "epochs")}}
    chosen = {"best": one.history["gt_known"].idxmax(), "last": pair.epochs - 1}
    for epoch, index in chosen.items():
        if epoch == "best" or index != chosen["best"]:
            model = one.at(epoch)
            val, test = (evaluate(model, part, one.transform) for part in (splits.val, splits.test))
            found, _, attention = test.table(val)
            names = ("threshold", "top1", "gt_known", "top1_loc", "maxboxacc_v1", "maxboxacc_v2")
            row = {name: found[name] for name in (*names, *(c for c in found if c.startswith("covers")))}
            row["gt_known_attention"] = attention["gt_known"]
            row["drift"] = drift(model, start, splits.val, one.transform)
            row |= one.history.filter(regex="^(lambda|beta)_").iloc[index].to_dict()
        yield {**where, "epoch": epoch, **row}
