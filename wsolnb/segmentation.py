"""From seeds to a segmentation model: labels for IRN, its walk over seed maps, and networks trained on pseudo masks.

    write_irn_labels(seed_maps, dataset, folder, config)                       # masks of 0, class + 1 and 255
    model, _ = fit(run, "irn", recipe, WithMasks(dataset, folder))             # recipe.method = "irn"
    pseudo = walk(model, seed_maps, dataset, config, image_size)               # SeedMaps, like seeds
    segmenter, _ = fit(run, "deeplab", recipe, WithMasks(dataset, folder))     # "deeplabv2" or "upernet"
    scores = evaluate(segmenter, test, inference)

Each stage reads and writes one PNG file an image, so memory does not grow with the number of images, and any stage can
be replaced by files of another program.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from wsolnb import backbones, data, errors, multilabel, seeds
from wsolnb.backbones import ConvBackbone, TransformerBackbone, create_backbone, normalisation
from wsolnb.data import IGNORE, LocalizationDataset, Sample, transforms
from wsolnb.data.base import read_label_map
from wsolnb.data.loading import IMAGENET_MEAN, make_loader, to_tensor
from wsolnb.errors import ParameterError, WeightsError
from wsolnb.files import fingerprint, resolve
from wsolnb.methods import crf, irn
from wsolnb.methods.crf import CRFConfig
from wsolnb.methods.irn import IRN, IRNConfig
from wsolnb.metrics import SegmentationScores
from wsolnb.metrics.segmentation import Segmentation
from wsolnb.multilabel import ClassifierRecipe, RandomLongSideCrop
from wsolnb.notebook.runs import Run
from wsolnb.seeds import SeedMaps, seed_mask
from wsolnb.train import loop
from wsolnb.train.loop import TrainingConfig

CODE = (backbones, crf, data, errors, irn, multilabel, seeds, loop, sys.modules[__name__])
"""What every artefact of this pipeline depends on."""

# ------------------------------------------------------------------------------------------------------------ networks


class DeepLabV2(nn.Module):
    """DeepLabV2 (Chen et al., 2018): a dilated backbone and ASPP, four 3x3 convolutions whose results are *summed*.

    backbone: a ResNet of stride 8, or a transformer, whose patch tokens are the map. classes: with the background.
    dilations: of the convolutions, in cells.
    """

    def __init__(
        self, backbone: ConvBackbone | TransformerBackbone, classes: int, dilations: tuple[int, ...] = (6, 12, 18, 24)
    ):
        super().__init__()
        self.backbone = backbone
        self.aspp = nn.ModuleList(nn.Conv2d(backbone.dim, classes, 3, padding=d, dilation=d) for d in dilations)
        for branch in self.aspp:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    @property
    def head(self) -> nn.Module:
        """The ASPP, which the published training gives ten times the rate."""
        return self.aspp

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes, H, W) of (B, 3, H, W) normalised images, resized bilinearly from the grid."""
        features = self.backbone(images)
        if isinstance(self.backbone, TransformerBackbone):
            features = features.patches.transpose(1, 2).unflatten(2, self.backbone.grid)
        logits = torch.stack([branch(features) for branch in self.aspp]).sum(dim=0)
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


class UPerNet(nn.Module):
    """UPerNet (Xiao et al., 2018) on a Swin transformer of timm, both from segmentation-models-pytorch.

    encoder: timm's name of a Swin. Images of any size: padded to what the encoder takes, and cut back.
    Raises WeightsError when published weights are asked for and cannot be had, ParameterError for another encoder.
    """

    def __init__(self, encoder: str, classes: int, pretrained: bool = False):
        super().__init__()
        if not encoder.startswith("swin"):
            raise ParameterError(f"UPerNet was given the encoder {encoder!r}", "use a Swin of timm: swin_tiny_...")
        try:
            self.net = smp.UPerNet(
                f"tu-{encoder}", encoder_weights="imagenet" if pretrained else None, classes=classes,
                strict_img_size=False,
            )  # fmt: skip
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise WeightsError(
                f"UPerNet with {encoder!r} could not be built: {str(error).splitlines()[0]}",
                "check the name (timm.list_models('swin*')); published weights need a network or timm's filled cache",
            ) from error

    @property
    def head(self) -> nn.Module:
        """The decoder, trained at the encoder's rate unless `head_lr` says otherwise."""
        return nn.ModuleList([self.net.decoder, self.net.segmentation_head])

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes, H, W) of (B, 3, H, W) normalised images."""
        height, width = images.shape[-2:]
        down, right = -height % self.STEP, -width % self.STEP
        return self.net(F.pad(images, (0, right, 0, down)))[..., :height, :width]

    STEP = 32
    """Multiple that the encoder's sides must be."""


# -------------------------------------------------------------------------------------------------------------- recipe


@dataclass(frozen=True)
class RandomScaleCrop:
    """Resize by a factor drawn from `scale`, then crop, or pad, to a random window of `crop` pixels.

    mean: colour of the padding, per channel in [0, 1].
    """

    scale: tuple[float, float]
    crop: int
    mean: tuple[float, float, float] = IMAGENET_MEAN

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the crop x crop sample; the mask is `IGNORE` where the image was padded."""
        side = max(1, round(max(sample.size) * rng.uniform(*self.scale)))
        return RandomLongSideCrop((side, side), self.crop, self.mean)(sample, rng)


class MaskRecipe(BaseModel):
    """How a network is trained on masks.

    method: `irn`, `deeplabv2` or `upernet`. backbone: of `wsolnb.backbones`, for `upernet` a Swin of timm. pretrained,
    checkpoint: as in `create_backbone`. output_stride: 16 for `irn`, 8 for `deeplabv2`.
    image_size: side of the input in pixels. scale: range of the random factor on the image before the crop of that
    size; None resizes the whole image and moves it by up to `shift` pixels.
    brightness, contrast: half-widths of the random factors on the light and on the spread around the mean.
    label_radius: of IRN's pairs, in cells of stride 4.
    options: further arguments of the network: `width` of `irn`, `dilations` of `deeplabv2`.
    training: the loop's hyperparameters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["irn", "deeplabv2", "upernet"] = "deeplabv2"
    backbone: str = "resnet_mini"
    pretrained: bool = True
    checkpoint: str | None = None
    output_stride: int = 8
    image_size: int = Field(112, ge=32)
    scale: tuple[float, float] | None = None
    shift: int = Field(8, ge=0)
    brightness: float = Field(0.2, ge=0, lt=1)
    contrast: float = Field(0.0, ge=0, lt=1)
    batch_size: int = Field(16, ge=1)
    num_workers: int = Field(0, ge=0)
    label_radius: int = Field(10, ge=2)
    options: dict[str, Any] = {}
    training: TrainingConfig

    weights_hash = ClassifierRecipe.weights_hash

    def train_transform(self) -> transforms.Transform:
        """The random transform: scaled crop or shift, flip, light."""
        if self.scale:
            first = [RandomScaleCrop(self.scale, self.image_size, normalisation(self.backbone)[0])]
        else:
            first = [transforms.Resize(self.image_size), transforms.RandomShift(self.shift)]
        light = transforms.RandomBrightnessContrast(self.brightness, self.contrast)
        return transforms.Compose([*first, transforms.RandomHorizontalFlip(), light])

    def build(self, num_classes: int) -> nn.Module:
        """Return the network for `num_classes` classes without the background.

        Raises ParameterError and WeightsError as `create_backbone` and the networks do.
        """
        loop.set_seed(self.training.seed)
        if self.method == "upernet":
            if self.checkpoint:
                raise ParameterError("UPerNet takes no checkpoint", "set pretrained, or load weights into the network")
            return UPerNet(self.backbone, num_classes + 1, self.pretrained, **self.options)
        backbone = create_backbone(
            self.backbone,
            pretrained=self.pretrained,
            checkpoint=resolve(self.checkpoint) if self.checkpoint else None,
            image_size=self.image_size,
            output_stride=self.output_stride,
        )
        if self.method == "irn":
            return IRN(backbone, **self.options)
        return DeepLabV2(backbone, num_classes + 1, **self.options)

    def objective(self) -> Callable[[nn.Module, dict, TrainingConfig], Tensor]:
        """Return the loss of a batch: IRN's, or cross-entropy over the pixels that are not 255."""
        return _irn_objective(self.label_radius) if self.method == "irn" else _pixel_objective


def _masks(batch: dict) -> np.ndarray:
    return np.stack([sample.mask for sample in batch["samples"]])


def _irn_objective(radius: int):
    def objective(model: nn.Module, batch: dict, config: TrainingConfig) -> Tensor:
        output = model(batch["image"])
        size = tuple(output.boundary.shape[-2:])
        labels = np.stack([transforms.resize_map(mask, size) for mask in _masks(batch)])
        labels = irn.pair_labels(torch.from_numpy(labels).to(output.boundary.device), radius)
        # Logarithms of affinities near 0 and 1: outside of autocast.
        with torch.autocast(output.boundary.device.type, enabled=False):
            boundary, displacement = output.boundary.float().sigmoid(), output.displacement.float()
            return irn.pair_loss(boundary, displacement, labels, radius).total

    return objective


def _pixel_objective(model: nn.Module, batch: dict, config: TrainingConfig) -> Tensor:
    logits = model(batch["image"]).float()
    masks = torch.from_numpy(_masks(batch)).to(logits.device).long()
    loss = F.cross_entropy(
        logits, masks, ignore_index=IGNORE, label_smoothing=config.label_smoothing, reduction="sum"
    )  # fmt: skip
    return loss / (masks != IGNORE).sum().clamp(min=1)  # a batch of unknown pixels alone gives 0, not NaN


# ---------------------------------------------------------------------------------------------------- masks from files


class WithMasks(LocalizationDataset):
    """A data set whose masks are files of a folder, `<image id>.png`, in place of its own: what a network learns from.

    Values: 0 background, class index + 1, 255 unknown. Nothing else of the truth is read.
    Raises DataError, while reading, for a mask that is missing, damaged, of another size or with other values.
    """

    REMEDY = "write one PNG mask an image into the folder: the stage before it does"

    def __init__(self, dataset: LocalizationDataset, folder: str | Path):
        self.dataset, self.folder = dataset, Path(folder)
        self.name, self.root, self.split = dataset.name, dataset.root, dataset.split
        self.class_names, self.multi_label = dataset.class_names, dataset.multi_label
        self.image_ids, self.labels = dataset.image_ids, dataset.labels

    def read(self, index: int, truth: bool = True) -> Sample:
        """Read the image at `index`, and with `truth` the mask of its file."""
        sample = self.dataset.read(index, truth=False)
        if not truth:
            return sample
        allowed = (*range(len(self.class_names) + 1), IGNORE)
        path = self.folder / f"{self.image_ids[index]}.png"
        return replace(sample, mask=read_label_map(path, self.REMEDY, sample.size, allowed))

    def masks_hash(self) -> str:
        """Return the SHA-256 over all mask files."""
        digest = hashlib.sha256()
        for name in self.image_ids:
            path = self.folder / f"{name}.png"
            digest.update(path.read_bytes() if path.is_file() else b"missing")
        return digest.hexdigest()


def class_mask(sample: Sample, multi_label: bool) -> np.ndarray:
    """Return the true mask with class index + 1, also of data sets whose masks say object or not."""
    if multi_label:
        return sample.mask
    return np.where((sample.mask > 0) & (sample.mask != IGNORE), sample.label + 1, sample.mask).astype(np.uint8)


def write_true_masks(dataset: LocalizationDataset, folder: str | Path) -> int:
    """Write the true masks of a data set as files: full supervision, which pseudo masks are measured against."""
    return _write(
        ((name, class_mask(dataset[i], dataset.multi_label)) for i, name in enumerate(dataset.image_ids)), folder
    )


def _write(masks: Iterable[tuple[str, np.ndarray]], folder: str | Path) -> int:
    count = 0
    for name, mask in masks:
        path = Path(folder) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask.astype(np.uint8)).save(path)
        count += 1
    return count


# --------------------------------------------------------------------------------------------------------------- stages


def irn_labels(found: SeedMaps, image: np.ndarray, config: IRNConfig, refinement: CRFConfig) -> np.ndarray:
    """Return the mask (H, W) that IRN learns from: confident classes and background, 255 elsewhere.

    The seed mask is made at a high and at a low background score, and each is refined by the CRF.
    """
    masks = [
        crf.refine_labels(image, seed_mask(found.maps, found.classes, threshold), refinement)
        for threshold in (config.foreground, config.background)
    ]
    return irn.confident_labels(*masks)


def write_irn_labels(
    found: Iterable[SeedMaps], dataset: LocalizationDataset, folder: str | Path, config: IRNConfig,
    refinement: CRFConfig | None = None,
) -> int:  # fmt: skip
    """Write `irn_labels` of every image; return their number."""
    position = {name: index for index, name in enumerate(dataset.image_ids)}

    def masks() -> Iterator[tuple[str, np.ndarray]]:
        for seed in found:
            image = dataset.read(position[seed.image_id], truth=False).image
            yield seed.image_id, irn_labels(seed, image, config, refinement or CRFConfig())

    return _write(masks(), folder)


def boundary_of(model: IRN, image: np.ndarray, image_size: int | None = None) -> Tensor:
    """Return the boundary map (h, w) of an image (H, W, 3), resized to a square of `image_size` unless that is None."""
    if image_size:
        blank = Sample(image, "", ())
        image = transforms.resize(blank, (image_size, image_size)).image
    device = next(model.parameters()).device
    return irn.boundaries(model, to_tensor(image, *normalisation(model))[None].to(device))[0]


def walk_steps(
    model: IRN, found: Iterable[SeedMaps], dataset: LocalizationDataset, config: IRNConfig, exp_times: Sequence[int],
    image_size: int | None = None,
) -> Iterator[dict[int, SeedMaps]]:  # fmt: skip
    """Yield each image's maps after 2 ** e steps of the random walk, by e of the ascending `exp_times`.

    The maps have the image's size and values in [0, 1]; the rule of seeds makes masks of them.
    image_size: side of the square that images are resized to before the network; None keeps their size.
    """
    position = {name: index for index, name in enumerate(dataset.image_ids)}
    for seed in found:
        image = dataset.read(position[seed.image_id], truth=False).image
        boundary = boundary_of(model, image, image_size)
        maps = on_grid(seed.maps, boundary)
        walked = irn.walks(maps, boundary, config.radius, config.beta, exp_times, config.damping)
        size = seed.maps.shape[1:]
        yield {e: seed._replace(maps=irn.unit_scores(w, size).cpu().numpy()) for e, w in zip(exp_times, walked)}  # noqa: B905


def on_grid(maps: np.ndarray, boundary: Tensor) -> Tensor:
    """Return seed maps (K, H, W) on the grid of a boundary map, each by its own maximum, as released."""
    if not len(maps):
        return boundary.new_zeros((0, *boundary.shape))
    small = torch.from_numpy(maps).to(boundary.device)[None]
    small = F.interpolate(small, size=boundary.shape, mode="bilinear", align_corners=False, antialias=True)[0]
    return small / small.amax(dim=(1, 2), keepdim=True).clamp(min=1e-5)


def walk(
    model: IRN, found: Iterable[SeedMaps], dataset: LocalizationDataset, config: IRNConfig,
    image_size: int | None = None,
) -> Iterator[SeedMaps]:  # fmt: skip
    """Yield each image's maps after `config.exp_times`; see `walk_steps`."""
    for by_steps in walk_steps(model, found, dataset, config, (config.exp_times,), image_size):
        yield by_steps[config.exp_times]


# -------------------------------------------------------------------------------------------------- stages, kept by run


def kept_seeds(
    run: Run, name: str, made_of: Any, found: Callable[[], Iterable[dict[str, SeedMaps]]], threshold: float = 0.3
) -> Path:
    """Return a folder with seeds, `<kind>/<image id>.npz` (and masks at `threshold`), made once per run folder.

    made_of: what the maps depend on, such as the folders' names of a classifier and of prototypes.
    """

    def build(folder: Path) -> None:
        for by_kind in found():
            for kind, seed in by_kind.items():
                seeds.write_seeds([seed], folder / kind, threshold)

    return run.cached(name, made_of, CODE, build)


def stored(folder: Path, dataset: LocalizationDataset) -> Iterator[SeedMaps]:
    """Yield the seeds of a data set's images from a folder of files."""
    return (seeds.read_seeds(folder, name) for name in dataset.image_ids)


def kept_labels(
    run: Run, name: str, folder: Path, dataset: LocalizationDataset, config: IRNConfig, refinement: CRFConfig
) -> WithMasks:
    """Return a data set with IRN's labels, made once per run folder of the seeds in `folder`."""
    asked = [config.foreground, config.background, refinement.model_dump()]
    made_of = [folder.parent.name, folder.name, fingerprint(dataset.image_ids), asked]
    made = run.cached(
        name, made_of, CODE, lambda to: write_irn_labels(stored(folder, dataset), dataset, to, config, refinement)
    )
    return WithMasks(dataset, made)


def kept_pseudo(
    run: Run, name: str, trained: tuple[IRN, Path], folder: Path, dataset: LocalizationDataset, config: IRNConfig,
    image_size: int | None,
) -> WithMasks:  # fmt: skip
    """Return a data set with pseudo masks at `config.mask_background`, made once per run folder of a folder's seeds.

    trained: what `fit` returns.
    """
    model, weights = trained
    made_of = [weights.name, folder.parent.name, folder.name, fingerprint(dataset.image_ids), config.model_dump()]

    def build(to: Path) -> None:
        seeds.write_seeds(walk(model, stored(folder, dataset), dataset, config, image_size), to, config.mask_background)

    return WithMasks(dataset, run.cached(name, [*made_of, image_size], CODE, build))


def masks_score(dataset: WithMasks) -> Segmentation:
    """Score the mask files of a data set against its own true masks; 255 in a file is not counted."""
    scores = SegmentationScores(len(dataset.class_names) + 1)
    for index in range(len(dataset)):
        sample = dataset.dataset[index]
        truth, given = class_mask(sample, dataset.multi_label), dataset[index].mask
        scores.update(np.where(given == IGNORE, 0, given), np.where(given == IGNORE, IGNORE, truth))
    return scores.compute()


def fit(run: Run, name: str, recipe: MaskRecipe, dataset: WithMasks, progress: bool = True) -> tuple[nn.Module, Path]:
    """Return the network trained by `recipe` on a data set with mask files, at its last epoch, and its folder.

    Trains once per run folder: the hash covers recipe, start, images, mask files and code. Nothing is selected.
    """
    classes = len(dataset.class_names)
    inputs = {
        "recipe": recipe.model_dump(),
        "weights": recipe.weights_hash(),
        "data": [dataset.name, dataset.root.name, fingerprint(dataset.image_ids), dataset.masks_hash()],
    }

    def build(folder: Path) -> None:
        model = recipe.build(classes)
        mean, std = normalisation(model)
        loader = make_loader(
            dataset,
            recipe.train_transform(),
            recipe.batch_size,
            shuffle=True,
            truth=True,
            seed=recipe.training.seed,
            num_workers=recipe.num_workers,
            drop_last=len(dataset) >= recipe.batch_size,
            mean=mean,
            std=std,
        )
        objective = recipe.objective()
        loop.train(model, loader, recipe.training, folder, None, progress, objective)

    folder = run.cached(name, inputs, CODE, build)
    empty = recipe.model_copy(update={"pretrained": False, "checkpoint": None}).build(classes)
    model = loop.load_checkpoint(empty, folder, "last")
    return model.to(loop.pick_device(recipe.training.device)), folder


# ----------------------------------------------------------------------------------------------------------- inference


class Inference(BaseModel):
    """How a segmentation network is asked.

    image_size: side of the square that images are resized to; None keeps their size. scales: of the input.
    flip: add the mirror image. fuse: the `mean` of the probabilities over scales and flips, or their `max`, as
    DeepLabV2 was published. crf: refinement of the result; its default here is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = True
    fuse: Literal["mean", "max"] = "mean"
    crf: CRFConfig = CRFConfig(backend="none")


def probabilities(model: nn.Module, images: Tensor, inference: Inference) -> Tensor:
    """Return class probabilities (B, C, H, W) of (B, 3, H, W) normalised images over scales and flips."""
    size = images.shape[-2:]
    views = []
    model.eval()
    with torch.inference_mode():
        for scale in inference.scales:
            side = [max(8, round(extent * scale)) for extent in size]
            scaled = images
            if scale != 1:
                scaled = F.interpolate(images, size=side, mode="bilinear", align_corners=False, antialias=scale < 1)
            for flipped in (False, True) if inference.flip else (False,):
                logits = model(scaled.flip(-1) if flipped else scaled).float()
                logits = F.interpolate(logits.flip(-1) if flipped else logits, size=size, mode="bilinear")
                views.append(logits.softmax(dim=1))
    stacked = torch.stack(views)
    fused = stacked.amax(dim=0) if inference.fuse == "max" else stacked.mean(dim=0)
    return fused / fused.sum(dim=1, keepdim=True)


def predict(
    model: nn.Module, dataset: LocalizationDataset, inference: Inference, batch_size: int = 32
) -> Iterator[tuple[Sample, np.ndarray]]:
    """Yield every sample with its predicted mask (H, W) uint8, at the image's size on disk."""
    held: list[tuple[Sample, Tensor]] = []
    mean, std = normalisation(model)
    for index in range(len(dataset)):
        sample = dataset[index]
        seen = sample
        if inference.image_size:
            seen = transforms.resize(sample, (inference.image_size, inference.image_size))
        image = to_tensor(seen.image, mean, std)
        if held and (len(held) == batch_size or held[0][1].shape != image.shape):
            yield from _predict(model, held, inference)
            held = []
        held.append((sample, image))
    if held:
        yield from _predict(model, held, inference)


def _predict(model, held: list[tuple[Sample, Tensor]], inference: Inference) -> Iterator[tuple[Sample, np.ndarray]]:
    device = next(model.parameters()).device
    found = probabilities(model, torch.stack([image for _, image in held]).to(device), inference)
    for (sample, _), own in zip(held, found, strict=True):
        own = F.interpolate(own[None], size=sample.size, mode="bilinear", align_corners=False)[0].cpu().numpy()
        yield sample, crf.refine(sample.image, own, inference.crf).argmax(axis=0).astype(np.uint8)


def evaluate(model: nn.Module, dataset: LocalizationDataset, inference: Inference) -> Segmentation:
    """Score predicted masks against the true ones of a data set, image by image; those without a mask are left out."""
    scores = SegmentationScores(len(dataset.class_names) + 1)
    for sample, mask in predict(model, dataset, inference):
        if sample.mask is not None:
            scores.update(mask, class_mask(sample, dataset.multi_label))
    return scores.compute()
