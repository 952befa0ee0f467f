"""Scores of networks that predict masks, and of mask files, against the true masks of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from wsolnb.backbones import normalisation
from wsolnb.data import IGNORE, LocalizationDataset, Sample
from wsolnb.data.loading import to_tensor
from wsolnb.data.store import Store, WithMasks
from wsolnb.data.transforms import resize
from wsolnb.metrics import SegmentationScores


def class_mask(sample: Sample, multi_label: bool) -> np.ndarray:
    """Return the true mask with class index + 1, also for data sets whose masks only say object or background.

    An image without a mask gets a mask that is unknown everywhere.
    """
    if sample.mask is None:
        return np.full(sample.size, IGNORE, np.uint8)
    if multi_label:
        return sample.mask
    return np.where((sample.mask > 0) & (sample.mask != IGNORE), sample.label + 1, sample.mask).astype(np.uint8)


class Inference(BaseModel):
    """How a segmentation network predicts.

    image_size: side of the square that images are resized to; None keeps their size. scales: of the input, each with
    its mirror image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int | None = None
    scales: tuple[float, ...] = (1.0,)


def probabilities(model: nn.Module, images: Tensor, inference: Inference) -> Tensor:
    """Return class probabilities (B, C, H, W) of (B, 3, H, W) normalised images, means over scales and flips."""
    size = images.shape[-2:]
    views = []
    model.eval()
    with torch.inference_mode():
        for scale in inference.scales:
            side = [max(8, round(extent * scale)) for extent in size]
            scaled = images
            if scale != 1:
                scaled = F.interpolate(images, size=side, mode="bilinear", align_corners=False, antialias=scale < 1)
            for flipped in (False, True):
                logits = model(scaled.flip(-1) if flipped else scaled).float()
                logits = F.interpolate(logits.flip(-1) if flipped else logits, size=size, mode="bilinear")
                views.append(logits.softmax(dim=1))
    fused = torch.stack(views).mean(dim=0)
    return fused / fused.sum(dim=1, keepdim=True)


def predict(
    model: nn.Module, dataset: LocalizationDataset, inference: Inference, batch_size: int = 32
) -> Iterator[tuple[Sample, np.ndarray]]:
    """Yield every sample with its predicted mask (H, W) uint8, at the image's size on disk.

    Memory: `batch_size` samples and their probabilities, scales x 2 x C x H x W x 4 bytes each.
    """
    held: list[tuple[Sample, Tensor]] = []
    mean, std = normalisation(model)
    for index in range(len(dataset)):
        sample = dataset[index]
        seen = resize(sample, (inference.image_size,) * 2) if inference.image_size else sample
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
        yield sample, own.argmax(axis=0).astype(np.uint8)


def score_model(model: nn.Module, dataset: LocalizationDataset, inference: Inference) -> list[dict[str, float]]:
    """Return one row: `Segmentation.means` of predicted masks against a data set's true ones, scored image by image.

    Images without a true mask are left out.
    """
    scores = SegmentationScores(len(dataset.class_names) + 1)
    for sample, mask in predict(model, dataset, inference):
        if sample.mask is not None:
            scores.update(mask, class_mask(sample, dataset.multi_label))
    return [scores.compute().means()]


def score_masks(dataset: WithMasks) -> list[dict[str, float]]:
    """Return one row: `Segmentation.means` of stored masks against the true ones; stored pixels of 255 do not count.

    One image's masks are held at a time.
    """
    scores = SegmentationScores(len(dataset.class_names) + 1)
    for index in range(len(dataset)):
        sample = dataset.dataset[index]
        truth, given = class_mask(sample, dataset.multi_label), dataset[index].mask
        scores.update(np.where(given == IGNORE, 0, given), np.where(given == IGNORE, IGNORE, truth))
    return [scores.compute().means()]


def write_true_masks(dataset: LocalizationDataset, folder: Path) -> None:
    """Store the true masks of a data set: full supervision, with which pseudo masks are compared."""
    for index, name in enumerate(dataset.image_ids):
        Store(folder).write_mask(name, class_mask(dataset[index], dataset.multi_label))
