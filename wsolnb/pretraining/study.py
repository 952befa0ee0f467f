"""What notebooks 04 and 06 measure: where the maps of pretrained backbones lie, and what each ingredient of a recipe
contributes.

    tuning = FineTuning(**parameters)
    model = tuning.recipe("vit_mini", seed=0).build(classes)
    rows = score_rows(LastLayers(model), splits, transform, choose=True)

Thresholds are chosen on validation images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from wsolnb.backbones import ConvBackbone, TransformerBackbone
from wsolnb.data import transforms
from wsolnb.data.base import LocalizationDataset
from wsolnb.data.loading import make_loader, to_tensor
from wsolnb.data.sample import Sample
from wsolnb.data.splits import Splits
from wsolnb.data.transforms import Transform
from wsolnb.maps import upsample
from wsolnb.methods import create_method
from wsolnb.methods.base import LocalizationModel
from wsolnb.methods.cam import cam
from wsolnb.methods.ppd import fit_probe
from wsolnb.methods.tscam import TSCAM, TSCAMOutput
from wsolnb.metrics import LocalizationAccuracy, pixel_auc, spill
from wsolnb.metrics.localization import Localization
from wsolnb.notebook.runs import Run
from wsolnb.pretraining import taught
from wsolnb.pretraining.recipes import RECIPES, PretrainingConfig, ablation, export, on_photographs, pretrain
from wsolnb.train.evaluation import THRESHOLDS, Reader, box_hits, centre_box, evaluate, map_hits, predict, validator
from wsolnb.train.loop import TrainingConfig, history, load_checkpoint, pick_device, train
from wsolnb.train.recipe import Recipe, evenly, fit

Config = TypeVar("Config", PretrainingConfig, taught.TaughtConfig, taught.SelfTaughtConfig)

TESTED = transforms.Resize(112)
"""What every image of the study is transformed by."""


class FineTuning(BaseModel):
    """Notebook 04: how TS-CAM is trained from a start. The fields are the notebook's parameters.

    tuned_layers, label_smoothing: of `vit_mini` only; every other start is trained whole, with hard labels.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    epochs: int
    lr: float
    head_lr: float
    tuned_layers: int
    label_smoothing: float
    batch_size: int
    precision: Literal["auto", "bf16", "fp32"]
    device: str

    def recipe(self, start: str, seed: int) -> Recipe:
        """Return how a start is fine-tuned.

        start: the name of a backbone with weights, as TS-CAM is trained from it, or `resnet_mini` for CAM; `random` is
        `vit_mini` without its weights.
        """
        shared = {"seed": seed, "precision": self.precision, "device": self.device, "select": "top1_loc"}
        shared |= {"label_smoothing": self.label_smoothing} if start == "vit_mini" else {}
        training = TrainingConfig(epochs=self.epochs, lr=self.lr, head_lr=self.head_lr, **shared)
        options: dict[str, Any] = {"batch_size": self.batch_size, "training": training}
        options |= {"backbone": "vit_mini"} if start == "random" else {"backbone": start, "pretrained": True}
        if start == "resnet_mini":
            return Recipe(method="cam", output_stride=8, **options)
        options |= {"tuned_layers": self.tuned_layers} if start == "vit_mini" else {}
        return Recipe(method="tscam", options={"padding": "replicate", "head_init": "zeros"}, **options)

    def fit(self, run: Run, start: str, seed: int, splits: Splits) -> tuple[LocalizationModel, Path]:
        """Return the model that is fine-tuned from a start, and its folder; trained once per run folder."""
        recipe = self.recipe(start, seed)
        return fit(run, f"tuned-{start}-{seed}", recipe, splits.train, validator(splits.val, recipe.test_transform()))

    def on_device(self, config: Config) -> Config:
        """Return a recipe of pretraining for the device and the precision of this study."""
        training = config.training.model_copy(update={"precision": self.precision, "device": self.device})
        return config.model_copy(update={"training": training})

    def pretrained(self, run: Run, name: str, dataset: str = "", data_root: str = "") -> tuple[nn.Module, Path]:
        """Pretrain an embedded backbone anew; return it and the model card beside its exported weights.

        dataset, data_root: of photographs that are used instead of rendered scenes, and that `vit_photo` and
        `vit_photo_dino` need.
        """
        if name in taught.RECIPES:
            config = self.on_device(taught.RECIPES[name](**{"dataset": dataset} if dataset else {}))
            backbone, folder = taught.taught(run, config, data_root)
        else:
            config = self.on_device(on_photographs(name, dataset) if dataset else RECIPES[name])
            backbone, folder = pretrain(run, name, config, data_root)
        return backbone, export(backbone, name, config, folder, history(folder).seconds.sum() / 60)


class Lies(NamedTuple):
    """Where a map lies on the image, as means over images.

    localization: its boxes. auc: how often a pixel of the object scores above one of the background. object,
    background, frame: `wsolnb.metrics.spill`; far_frame: of what is at least sixteen pixels away from the object.
    """

    localization: Localization
    auc: float
    object: float
    background: float
    frame: float
    far_frame: float

    def means(self) -> dict[str, float]:
        """Return everything but the boxes by name."""
        return {name: value for name, value in self._asdict().items() if name != "localization"}


def score(
    model: LocalizationModel, dataset: LocalizationDataset, transform: Transform, names: Sequence[str]
) -> dict[str, Lies]:
    """Score the named maps of a model in one pass over images with masks; returns `Lies` by map."""
    localization = {name: LocalizationAccuracy(THRESHOLDS) for name in names}
    pixels: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for found in predict(model, dataset, transform):
        sample = found.sample
        for name in names:
            score_map, mask = found.maps[name], sample.mask
            localization[name].update(score_map, sample.boxes, sample.label, found.logits)
            far = spill(score_map, mask, away=16).frame
            pixels[name].append((pixel_auc(score_map, mask), *spill(score_map, mask), far))
    return {name: Lies(localization[name].compute(), *np.nanmean(rows, axis=0)) for name, rows in pixels.items()}


def score_rows(
    model: LocalizationModel, splits: Splits, transform: Transform, names: Sequence[str] = (), choose: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield one row per split and map, at the threshold chosen on validation images.

    names: of the maps, default all. choose: test the first map, and the one that is best on validation images.
    """
    names = names or model.maps
    val = score(model, splits.val, transform, names)
    best = max(names, key=lambda name: (val[name].localization.best("gt_known")[1], val[name].auc))
    tested = [name for name in names if not choose or name in (names[0], best)]
    for split, scores in (("val", val), ("test", score(model, splits.test, transform, tested))):
        for name, found in scores.items():
            threshold, _ = val[name].localization.best("gt_known")
            at = found.localization.at(threshold)
            row = {"map": name, "split": split, "threshold": threshold, "top1": at["top1_cls"]}
            yield row | {"gt_known": at["gt_known"], **found.means()}


class LastLayers(Reader):
    """A TS-CAM whose maps are the attention of all layers, and of the last ones: all but the first, down to one."""

    def __init__(self, model: TSCAM):
        super().__init__()
        depth = model.backbone.depth
        fewer = (f"layers {first} to {depth}" for first in range(2, depth))
        self.model, self.maps = model, ("attention", *fewer, f"layer {depth}")

    def forward(self, images: Tensor) -> TSCAMOutput:
        """Run the model on (B, 3, H, W) normalised images."""
        return self.model(images)

    def localize(self, output: TSCAMOutput, classes: Tensor) -> dict[str, Tensor]:
        """Return the mean over heads and over all layers from a first one on, each (B, h, w)."""
        rows, grid = output.attention.float(), self.model.backbone.grid
        return {name: rows[:, n:].mean(dim=(1, 2)).unflatten(1, grid) for n, name in enumerate(self.maps)}


@torch.inference_mode()
def attention_map(model: LocalizationModel, image: np.ndarray) -> np.ndarray:
    """Return where a model's backbone looks in an image (H, W, 3) uint8, scaled to [0, 1], (H, W).

    Of a transformer the class token's attention, over all layers and heads; of a ResNet the sum of its features.
    """
    seen = model.backbone(_batch(model, image))
    if isinstance(seen, Tensor):  # a ResNet's features (1, D, h, w)
        found = seen.sum(dim=1)
    else:
        found = seen.attention.mean(dim=(1, 2)).unflatten(1, model.backbone.grid)
    return upsample(found, image.shape[:2])[0].cpu().numpy()


@torch.inference_mode()
def semantic_map(model: TSCAM, image: np.ndarray) -> np.ndarray:
    """Return the semantic map of the class that a model takes an image (H, W, 3) uint8 for, scaled to [0, 1]."""
    output = model(_batch(model, image))
    return upsample(model.localize(output, output.logits.argmax(dim=1))["semantic"], image.shape[:2])[0].cpu().numpy()


def _batch(model: LocalizationModel, image: np.ndarray) -> Tensor:
    return to_tensor(image, model.mean, model.std)[None].to(next(model.parameters()).device)


# Photographs


def photographs(dataset: LocalizationDataset, off_centre: bool, size: int = 112) -> Iterator[Sample]:
    """Yield the images of a data set with masks at `size` pixels, those that hold both an object and a background.

    off_centre: cut a corner of seven tenths of the shorter side out of each, so that the middle tells less.
    """
    generator = np.random.default_rng(0)
    for index in range(len(dataset)):
        sample = dataset[index]
        if off_centre:
            height, width = sample.size
            side = round(0.7 * min(height, width))
            top, left = (int(generator.integers(2)) * (length - side) for length in (height, width))
            sample = transforms.crop(sample, top, left, (side, side))
        sample = transforms.resize(sample, (size, size))
        if (sample.mask == 0).any() and (sample.mask == 1).any():
            yield sample


def photograph_rows(
    models: Mapping[str, LocalizationModel], dataset: LocalizationDataset, size: int = 112, cells: int = 14
) -> Iterator[dict[str, Any]]:
    """Yield the pixel AUC of every model's attention on photographs, whole and off-centre, a row for each.

    Further rows have a centre prior, which falls off from the middle, and the best possible map of `cells` x `cells`.
    size: side in pixels that the images are resized to, as the models take them.
    """
    prior = -np.hypot(*(np.mgrid[:size, :size] - (size - 1) / 2)).astype(np.float32)
    prior = (prior - prior.min()) / np.ptp(prior)
    for off_centre in (False, True):
        names = [*models, "centre prior", f"best possible at {cells} x {cells}"]
        found: dict[str, list[float]] = {name: [] for name in names}
        for sample in photographs(dataset, off_centre, size):
            blocks = (sample.mask > 0).reshape(cells, size // cells, cells, size // cells)
            share = blocks.mean(axis=(1, 3), dtype=np.float32)
            ideal = upsample(torch.from_numpy(share)[None], (size, size))[0].numpy()
            maps = [*(attention_map(model, sample.image) for model in models.values()), prior, ideal]
            for values, score_map in zip(found.values(), maps, strict=True):
                values.append(pixel_auc(score_map, sample.mask))
        for name, values in found.items():
            row = {"map": name, "off-centre": off_centre, "images": len(values)}
            yield row | {"auc": float(np.mean(values)), "sd": float(np.std(values))}


class ProbedOutput(NamedTuple):
    """logits: (B, C). places: (B, D, h, w), whose mean is classified. attention: (B, h, w); zero of a ConvBackbone."""

    logits: Tensor
    places: Tensor
    attention: Tensor


class Probed(Reader):
    """A backbone as it is, and a linear classifier of the mean of its places: patch tokens, or cells of a feature map.

    Maps: `cam`, the classifier at every place, and of a transformer `attention`, over all layers and heads.
    Made by `probed`.
    """

    def __init__(self, backbone: TransformerBackbone | ConvBackbone, num_classes: int):
        super().__init__()
        self.backbone, self.linear = backbone, nn.Linear(backbone.dim, num_classes)
        self.maps = ("cam", "attention") if isinstance(backbone, TransformerBackbone) else ("cam",)

    def forward(self, images: Tensor) -> ProbedOutput:
        """Classify (B, 3, H, W) normalised images."""
        found = self.backbone(images)
        if isinstance(found, Tensor):
            places, attention = found, found.new_zeros(len(found), *found.shape[2:])
        else:
            places = found.patches.transpose(1, 2).unflatten(2, self.backbone.grid)
            attention = found.attention.mean(dim=(1, 2)).unflatten(1, self.backbone.grid)
        return ProbedOutput(self.linear(places.mean(dim=(2, 3))), places, attention)

    def describe(self, images: Tensor) -> Tensor:
        """Return what is classified, (B, D)."""
        return self.forward(images).places.mean(dim=(2, 3))

    def localize(self, output: ProbedOutput, classes: Tensor) -> dict[str, Tensor]:
        """Return the maps for one class per image, each (B, h, w)."""
        maps = {"cam": cam(output.places.float(), self.linear.weight, classes), "attention": output.attention}
        return {name: maps[name] for name in self.maps}


def probed(
    backbone: TransformerBackbone | ConvBackbone, train: LocalizationDataset, val: LocalizationDataset,
    transform: Transform,
) -> Probed:  # fmt: skip
    """Return a backbone with a classifier fitted to it by `ppd.fit_probe`, which raises the errors."""
    model = Probed(backbone, len(train.class_names)).to(next(backbone.parameters()).device).eval()
    model.linear.load_state_dict(fit_probe(model, train, val, transform)[0])
    return model


def start_rows(
    backbones: Mapping[str, TransformerBackbone | ConvBackbone], splits: Splits, protocols: Mapping[str, Transform],
    images: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield what untouched backbones know of photographs with boxes: a row per protocol, backbone and map.

    The last row of a protocol is that of the centred box. protocols: what is done to images, by name. images: training
    images of `probed`, evenly spaced; its `top1` is of test images. Boxes are those of test images, at thresholds that
    validation images choose. `lead`: GT-known less that of the centred box, paired by image, and its standard error.
    """
    train = evenly(splits.train, images)
    for protocol, transform in protocols.items():
        where = {"protocol": protocol, "test images": len(splits.test)}
        box, _ = centre_box(map(transform, splits.val))
        centred = box_hits(box, map(transform, splits.test))
        for name, backbone in backbones.items():
            model = probed(backbone, train, splits.val, transform)
            val, test = (evaluate(model, part, transform) for part in (splits.val, splits.test))
            hits = map_hits(predict(model, splits.test, transform), val.thresholds())
            for row in test.table(val):
                lead = hits[row["map"]].astype(float) - centred
                known = {"lead": lead.mean(), "lead_se": lead.std(ddof=1) / np.sqrt(len(lead))}
                yield {"backbone": name, **where, **row, **known}
        yield {"backbone": "-", **where, "map": "box in the middle", "gt_known": centred.mean()}


def two_photographs() -> list[Sample]:
    """Return the photographs of a person and of a flower that come with Matplotlib and scikit-learn."""
    import matplotlib.pyplot as plt
    from matplotlib.cbook import get_sample_data
    from sklearn.datasets import load_sample_image

    with get_sample_data("grace_hopper.jpg") as file:
        photos = [plt.imread(file)[:512], load_sample_image("flower.jpg")[:, 100:527]]
    return [Sample(photo, "photograph", (0,)) for photo in photos]


# Ablations


def tuned_from(run: Run, name: str, backbone: nn.Module, recipe: Recipe, data: LocalizationDataset) -> TSCAM:
    """Return TS-CAM fine-tuned by a recipe from a backbone that is given, instead of from one that has a name."""
    model = create_method("tscam", backbone, len(data.class_names), **recipe.options)
    backbone.vit.blocks[recipe.tuned_layers :].requires_grad_(False)

    def build(folder: Path) -> None:
        seed, transform = recipe.training.seed, recipe.train_transform()
        options = {"shuffle": True, "seed": seed, "drop_last": True, "mean": model.mean, "std": model.std}
        loader = make_loader(data, transform, recipe.batch_size, **options)
        train(model, loader, recipe.training, folder, progress=False)

    return load_checkpoint(model, run.cached(name, build), "last").to(pick_device(recipe.training.device))


def ablation_rows(
    run: Run, tuning: FineTuning, left_out: Iterable[str], seeds: Sequence[int], splits: Splits, epochs: int
) -> Iterator[dict[str, Any]]:
    """Pretrain without one ingredient after the other; yield a row for each and each seed.

    A row has what the untouched attention finds in validation images, and of supervised recipes the tokens' map after
    fine-tuning. left_out: names of `ABLATIONS`. epochs: of each pretraining.
    """
    classes = len(splits.val.class_names)
    for name in left_out:
        for seed in seeds:
            config = tuning.on_device(ablation(name, epochs, seed))
            artefact = f"ablation-{config.backbone}-{seed}"
            backbone, _ = pretrain(run, artefact, config)
            model = create_method("tscam", backbone, classes).eval()
            found = score(model, splits.val, TESTED, ["attention"])["attention"]
            row = {"left out": name, "seed": seed, "epochs": epochs}
            row |= {"gt_known": found.localization.best("gt_known")[1], "auc": found.auc}
            if config.recipe == "supervised":
                model = tuned_from(run, f"tuned-{artefact}", backbone, tuning.recipe("vit_mini", seed), splits.train)
                found = score(model, splits.val, TESTED, ["semantic"])["semantic"]
                row |= {"tuned top1": found.localization.top1_cls, "semantic auc": found.auc}
                row["spill"] = found.background / found.object
            yield row
