"""Classifiers of several classes an image: scores of all images, and their mean average precision."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from wsolnb.data.base import LocalizationDataset
from wsolnb.data.loading import make_loader
from wsolnb.data.transforms import Resize
from wsolnb.errors import MapError
from wsolnb.methods.base import LocalizationModel
from wsolnb.train.loop import Scorer


def average_precision(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the average precision of each class, (C,); NaN for a class without a positive image.

    scores, labels: (images, C), labels of 0 and 1. Raises MapError for scores that are not finite.
    """
    if not np.isfinite(scores).all():
        raise MapError("the scores hold NaN or infinity", "look at the classifier's training")
    return np.array(
        [average_precision_score(t, s) if t.any() else np.nan for t, s in zip(labels.T, scores.T, strict=True)]
    )


def predict(
    model: LocalizationModel, dataset: LocalizationDataset, image_size: int, batch_size: int = 50
) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits and the labels (0 and 1) of all images, each (images, C); the model runs where it is."""
    device = next(model.parameters()).device
    found = []
    model.eval()
    for batch in make_loader(dataset, Resize(image_size), batch_size, mean=model.mean, std=model.std):
        with torch.inference_mode():
            found.append(model(batch["image"].to(device)).logits.float().cpu().numpy())
    labels = np.zeros((len(dataset), len(dataset.class_names)), np.int64)
    for row, present in zip(labels, dataset.labels, strict=True):
        row[list(present)] = 1
    return np.concatenate(found), labels


def mean_average_precision(model: LocalizationModel, dataset: LocalizationDataset, image_size: int) -> float:
    """Return the mean of `average_precision` over the classes that have a positive image."""
    return float(np.nanmean(average_precision(*predict(model, dataset, image_size))))


def validator(dataset: LocalizationDataset, image_size: int) -> Scorer:
    """Return what `fit` calls after every epoch: the mean average precision on validation images, `map`."""
    return lambda model: {"map": mean_average_precision(model, dataset, image_size)}
