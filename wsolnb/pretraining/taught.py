"""`vit_photo` and `vit_photo_dino`: transformers that learn from photographs.

    backbone, folder = taught(run, TaughtConfig(), data_root)
    backbone, folder = taught(run, SelfTaughtConfig(), data_root)

`vit_photo` learns from the photographs' labels, and from a network trained on labels only.

The teacher is the network whose first stages are the transformer's stem. Its logits of ImageNet's classes are a linear
function of the mean of its final map over positions, so the map says what the teacher sees at every place. No box, no
mask and no rendered image enters. The teacher's maps are stored once for a few views of every image, beside the map of
the stem (`write_lessons`). So an epoch costs no more than the transformer alone.

`vit_photo_dino` sees the maps of the stem alone. It learns to predict from one view what a moving average of itself
says of another, as DINO does (Caron et al., ICCV 2021, https://arxiv.org/abs/2104.14294). No label of the photographs
enters; the stem has seen those of ImageNet.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from wsolnb.backbones import TransformerBackbone, create_backbone, forward_tapped, published_classifier
from wsolnb.backbones.photo import NETWORK, STAGES, load_stages
from wsolnb.data import LocalizationDataset, open_dataset
from wsolnb.data.loading import make_loader
from wsolnb.data.transforms import Resize
from wsolnb.errors import ParameterError
from wsolnb.files import open_array, resolve, write_atomically
from wsolnb.methods.cam import CAMClassifier
from wsolnb.notebook.runs import Run
from wsolnb.pretraining.recipes import Pretext, SelfDistillation, SelfDistilled, exported_start, look, random_crops
from wsolnb.train import loop
from wsolnb.train.loop import TrainingConfig, set_seed

TERMS = ("label", "looked", "image", "token")
"""The terms of the loss; see `TaughtPretext`."""


class _Photographs(BaseModel):
    """Which photographs are seen, and in which views.

    dataset: of single labels; its training images are seen. views: of each image; the first is the whole image, the
    others are random crops, of the area shares `scale`. Views do not depend on the training's seed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = "tiny_imagenet"
    views: int = Field(2, ge=1)
    scale: tuple[float, float] = (0.4, 1.0)
    batch_size: int = Field(64, ge=2)
    training: TrainingConfig

    def backbone_on_stem(self) -> TransformerBackbone:
        """Return the backbone with the published stages and a transformer of random weights."""
        set_seed(self.training.seed)
        backbone = create_backbone(self.backbone)
        load_stages(backbone.vit.patch_embed)
        return backbone


class TaughtConfig(_Photographs):
    """How `vit_photo` is made; dataset, views and scale say of what.

    components: principal components of the teacher's map that are kept. weights: of `TERMS`.
    """

    recipe: Literal["taught"] = "taught"
    backbone: Literal["vit_photo"] = "vit_photo"
    components: int = Field(128, ge=2, le=1280)
    weights: dict[str, float] = {"label": 1.0, "looked": 1.0, "image": 1.0, "token": 1.0}
    training: TrainingConfig = TrainingConfig(epochs=16, lr=1e-3)

    @property
    def lessons(self) -> TaughtConfig:
        """What `write_lessons` depends on: loss, batches and length of the training do not change what is written."""
        return TaughtConfig(**self.model_dump(include={"dataset", "views", "scale", "components"}))

    @field_validator("weights")
    @classmethod
    def _of_the_terms(cls, weights: dict[str, float]) -> dict[str, float]:
        if set(weights) != set(TERMS):
            raise ValueError(f"weights of {sorted(weights)}; give one for each of {', '.join(TERMS)}")
        return weights

    def build(self, num_classes: int, steps: int, lessons: Path | None = None) -> TaughtPretext:
        """Return the backbone, whose transformer has random weights, inside of what trains it.

        lessons: the folder of `write_lessons`, with what turns components into the teacher's logits. steps: of the
        training; they change nothing here.
        """
        backbone, logits = self.backbone_on_stem(), published_logits(self.components, lessons)
        return TaughtPretext(backbone, num_classes, logits, self.components, self.weights)

    def loader(self, lessons: Path, labels: np.ndarray) -> Lessons:
        """Return the batches of a training."""
        return Lessons(lessons, labels, self.batch_size, self.training.seed)


class SelfTaughtConfig(_Photographs):
    """How `vit_photo_dino` is made; dataset, views and scale say of what. It sees neither labels nor a teacher's maps.

    distillation: how student and teacher learn; their views are cut out of the stem's maps, in cells.
    """

    recipe: Literal["self-taught"] = "self-taught"
    backbone: Literal["vit_photo_dino"] = "vit_photo_dino"
    distillation: SelfDistillation = SelfDistillation(
        global_size=10, global_scale=(0.5, 1.0), local_size=6, local_scale=(0.15, 0.4), jitter=0.0
    )
    training: TrainingConfig = TrainingConfig(epochs=10, lr=1e-3)

    @property
    def lessons(self) -> TaughtConfig:
        """What `write_lessons` depends on; the teacher's maps beside the stem's are not read."""
        return TaughtConfig(**self.model_dump(include={"dataset", "views", "scale"}))

    def build(self, num_classes: int, steps: int, lessons: Path | None = None) -> SelfDistilled:
        """Return student and teacher, whose transformers have random weights, for a training of so many steps."""
        return SelfDistilled(self.backbone_on_stem(), self.distillation, steps, self.training.seed)

    def loader(self, lessons: Path, labels: np.ndarray) -> Views:
        """Return the batches of a training; of the labels only their number is used."""
        return Views(lessons, labels, self.batch_size, self.training.seed)


RECIPES: dict[str, type[TaughtConfig] | type[SelfTaughtConfig]] = {
    "vit_photo": TaughtConfig,
    "vit_photo_dino": SelfTaughtConfig,
}
"""How each embedded backbone for photographs was made: the configuration, with its defaults."""


def published_logits(components: int, lessons: Path | None) -> nn.Linear:
    """Return the layer from mean components (B, K) to the teacher's logits: of random weights without lessons."""
    layer = nn.Linear(components, published_classifier(NETWORK).out_features)
    if lessons is not None:
        layer.load_state_dict(safetensors.torch.load_file(lessons / "logits.safetensors"))
    return layer.requires_grad_(False)


def write_lessons(dataset: LocalizationDataset, config: TaughtConfig, folder: Path, sampled: int = 600) -> None:
    """Write what stem and teacher say of the views of every image, in half precision.

    `stem.npy` (views, images, 112, h, w); `teacher.npy` (views, images, h * w, K), the principal components of the
    final map, each divided by the deviation of the first; `logits.safetensors`, the layer from the components' mean to
    the logits. The components are those of `sampled` evenly spaced images.
    Raises ParameterError for a multi-label data set.
    """
    if dataset.multi_label:
        raise ParameterError(f"{dataset.name} has several labels an image", "use a data set with one")
    backbone = create_backbone(config.backbone)
    stem = backbone.vit.patch_embed
    load_stages(stem)
    teacher = CAMClassifier.published(NETWORK, output_stride=backbone.patch_size)
    network = teacher.backbone.cnn
    later = nn.Sequential(*network.blocks[STAGES:], network.conv_head, network.bn2)  # behind the stem's stages

    def loader(data: LocalizationDataset) -> Any:
        size = backbone.image_size
        return make_loader(data, Resize(size), 50, mean=backbone.mean, std=backbone.std, truth=False)

    @torch.inference_mode()
    def see(images: Tensor) -> tuple[Tensor, Tensor]:
        features = stem.features(images)
        return features, later(features).flatten(2).transpose(1, 2)

    some = dataset.subset(np.linspace(0, len(dataset) - 1, min(sampled, len(dataset))).astype(int))
    seen = torch.cat([see(batch["image"])[1] for batch in loader(some)]).flatten(0, 1).double()
    mean, axes, unit = principal(seen, config.components)
    weight, bias = teacher.classifier.weight.detach().double(), teacher.classifier.bias.detach().double()
    layer = {"weight": weight @ axes * unit, "bias": bias + weight @ mean}
    content = safetensors.torch.save({n: v.float().contiguous() for n, v in layer.items()})
    write_atomically(folder / "logits.safetensors", content)

    shape, count = (config.views, len(dataset)), backbone.grid[0] * backbone.grid[1]
    stems = open_array(folder / "stem.npy", np.float16, (*shape, stem.proj.in_channels, *backbone.grid))
    told = open_array(folder / "teacher.npy", np.float16, (*shape, count, config.components))
    offset, axes = mean.float(), (axes / unit).float()
    for view in range(config.views):
        generator, first = torch.Generator().manual_seed((config.training.seed << 32) + view), 0
        for batch in loader(dataset):
            images = batch["image"]
            if view:
                images = random_crops(images, backbone.image_size, config.scale, generator)
            rows = slice(first, first + len(images))
            features, map_ = see(images)
            stems[view, rows] = features.half().numpy()
            told[view, rows] = ((map_ - offset) @ axes).half().numpy()
            first += len(images)
    stems.flush()
    told.flush()


def principal(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (D,), first principal axes (D, count), and the deviation along the first, of rows x (n, D)."""
    mean = x.mean(dim=0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    return mean, vectors.flip(1)[:, :count], values[-1].sqrt()


class Lessons:
    """Batches of a folder of `write_lessons`: `image` (B, 112, h, w), the stem's map, `told` (B, h * w, K), `label`.

    Each image is shown in one of its views, mirrored or not, drawn by (seed, epoch).
    """

    def __init__(self, folder: Path, labels: np.ndarray, batch_size: int, seed: int):
        self.stem, self.told = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("stem", "teacher")
        )
        self.labels, self.batch_size, self.seed, self.epoch = labels, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng, grid = np.random.default_rng((self.seed, self.epoch)), self.stem.shape[-2:]
        for chosen in self.chosen(rng):
            view = rng.integers(len(self.stem), size=len(chosen))
            mirrored = torch.from_numpy(rng.random(len(chosen)) < 0.5)[:, None, None, None]
            stem = torch.from_numpy(self.stem[view, chosen].astype(np.float32))
            told = torch.from_numpy(self.told[view, chosen].astype(np.float32)).unflatten(1, grid)
            stem, told = torch.where(mirrored, stem.flip(3), stem), torch.where(mirrored, told.flip(2), told)
            yield {"image": stem, "told": told.flatten(1, 2), "label": torch.from_numpy(self.labels[chosen])}

    def chosen(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the indices of the images of each batch, in rising order, as it is fast to read them."""
        order = rng.permutation(len(self.labels))
        yield from (np.sort(order[step * self.batch_size :][: self.batch_size]) for step in range(len(self)))


class Views(Lessons):
    """Batches of the stem's maps alone, in all views of an image: `image` (B, views, 112, h, w)."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for chosen in self.chosen(np.random.default_rng((self.seed, self.epoch))):
            yield {"image": torch.from_numpy(self.stem[:, chosen].astype(np.float32)).transpose(0, 1)}


class TaughtPretext(Pretext):
    """A transformer that learns labels, and what a teacher says of an image and of its places.

    Called with a batch of `Lessons`, returns the sum of `TERMS` times their weights: `label`, the cross-entropy of the
    class token's logits; `looked`, the same of the mean of what the class token attends to; `image`, the cross-entropy
    of the class token's other logits to the teacher's probabilities of ImageNet's classes; `token`, the squared error
    of every patch token's components, relative to their mean square.
    """

    def __init__(
        self, backbone: TransformerBackbone, num_classes: int, logits: nn.Linear, components: int,
        weights: dict[str, float],
    ):  # fmt: skip
        sizes = {"label": num_classes, "looked": num_classes, "image": logits.out_features, "token": components}
        super().__init__(backbone, nn.ModuleDict({n: nn.Linear(backbone.dim, k) for n, k in sizes.items()}), vary=True)
        self.logits, self.weights = logits, weights

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch."""
        return sum(self.weights[name] * value for name, value in self.losses(batch).items())

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the terms of the loss by name."""
        patches, looked, class_token = self.see(batch["image"])
        told = batch["told"]
        of = {"label": class_token, "looked": looked, "image": class_token, "token": patches}
        say = {name: self.projection[name](tokens).float() for name, tokens in of.items()}
        expected = self.logits(told.mean(dim=1)).softmax(dim=-1)
        return {
            "label": F.cross_entropy(say["label"], batch["label"]),
            "looked": F.cross_entropy(say["looked"], batch["label"]),
            "image": F.cross_entropy(say["image"], expected),
            "token": (say["token"] - told).square().mean() / told.square().mean(),
        }

    def see(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return patches (B, N, D), what is looked at of them (B, D), and the class token (B, D)."""
        tokens = forward_tapped(self.backbone.vit, images, self.backbone.masks)
        weights = look(tokens, self.vary and self.training)
        return tokens.patches, (weights[:, None] @ tokens.patches.float()).squeeze(1), tokens.class_token


def taught(
    run: Run, config: TaughtConfig | SelfTaughtConfig, data_root: str, progress: bool = True, name: str = ""
) -> tuple[TransformerBackbone, Path]:
    """Return the backbone that a recipe gives, and the folder of its training (`history.csv`).

    Lessons and training are made once per run folder; the training is resumable, epoch by epoch. The lessons of 25,000
    images in two views take 2.4 GB; they are written on the CPU. A self-taught recipe returns the moving average.
    data_root: folder of the photographs. name: of the folder; the backbone's by default. Raises DataError,
    TrainingError and ParameterError as readers and loop do.
    """
    dataset = open_dataset(config.dataset, resolve(data_root), "train")
    classes, labels = len(dataset.class_names), np.array([label for label, *_ in dataset.labels])
    lessons = run.cached("lessons", partial(write_lessons, dataset, config.lessons))
    loader = config.loader(lessons, labels)
    steps = config.training.epochs * len(loader)

    def build(folder: Path) -> None:
        loop.train(config.build(classes, steps, lessons), loader, config.training, folder, progress=progress)

    folder = run.cached(name or config.backbone, build)
    model = loop.load_checkpoint(config.build(classes, steps, lessons), folder, "last")
    return (model.backbone if isinstance(model, TaughtPretext) else model.teacher[0]).eval(), folder


def taught_start(run: Run, backbone: str, seed: int, data_root: str) -> dict[str, Any]:
    """Return `pretrained` and `checkpoint`, as `create_backbone` takes them, of a backbone of `RECIPES` made anew.

    seed: of its first weights, and of the order of the images. The views and the frozen stages are the same for all
    seeds. 0: the embedded weights. Any other: weights made by the same recipe, once per run folder, in one to two hours
    of a core. data_root: folder of Tiny-ImageNet. Raises as `taught` does.
    """
    if seed == 0:
        return {"pretrained": True, "checkpoint": ""}
    own = RECIPES[backbone]()
    config = own.model_copy(update={"training": own.training.model_copy(update={"seed": seed})})
    found, folder = taught(run, config, data_root, progress=False, name=f"pretraining-{backbone}-{seed}")
    return exported_start(run, found, backbone, config, folder)
