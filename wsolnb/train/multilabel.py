"""Classifiers of several classes an image: scores of all images, their mean average precision, and fixed features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from torch import Tensor

from wsolnb.backbones import ConvBackbone
from wsolnb.data.base import LocalizationDataset
from wsolnb.data.loading import make_loader
from wsolnb.data.transforms import Resize
from wsolnb.errors import MapError, ParameterError
from wsolnb.files import write_atomically
from wsolnb.methods.base import LocalizationModel
from wsolnb.methods.cam import CAMClassifier
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
    """Return the logits and the labels (0 and 1) of all images, each (images, C); the model runs where it is.

    Memory: one batch, and C numbers an image, which a ranking of all images needs.
    """
    return _outputs(model, dataset, image_size, lambda found: found.logits, batch_size), _present(dataset)


def _outputs(
    model: LocalizationModel, dataset: LocalizationDataset, image_size: int, read: Callable[[Any], Tensor],
    batch_size: int = 50,
) -> np.ndarray:  # fmt: skip
    """Return what `read` takes from the model's output, (B, ...), for all images."""
    device = next(model.parameters()).device
    found = []
    model.eval()
    for batch in make_loader(dataset, Resize(image_size), batch_size, mean=model.mean, std=model.std):
        with torch.inference_mode():
            found.append(read(model(batch["image"].to(device))).float().cpu().numpy())
    return np.concatenate(found)


def _present(dataset: LocalizationDataset) -> np.ndarray:
    """Return which classes each image has, (images, C) of 0 and 1."""
    labels = np.zeros((len(dataset), len(dataset.class_names)), np.int64)
    for row, present in zip(labels, dataset.labels, strict=True):
        row[list(present)] = 1
    return labels


def mean_average_precision(model: LocalizationModel, dataset: LocalizationDataset, image_size: int) -> float:
    """Return the mean of `average_precision` over the classes that have a positive image."""
    return float(np.nanmean(average_precision(*predict(model, dataset, image_size))))


def validator(dataset: LocalizationDataset, image_size: int) -> Scorer:
    """Return the function that `fit` calls after every epoch: the mean average precision on validation images,
    `map`."""
    return lambda model: {"map": mean_average_precision(model, dataset, image_size)}


# A classifier of features that do not change, at the minimum of its loss

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Inverse strengths of the penalty among which validation images choose."""


def logistic(features: np.ndarray, labels: np.ndarray, c: float) -> np.ndarray:
    """Return weights (C, F) without bias at the minimum of the multi-label soft margin loss and a penalty.

    features: (n, F). labels: (n, C) of 0 and 1. c: inverse strength of the penalty. For the fit, features are divided
    by their standard deviations; the returned weights are for the undivided features. Features are not centred, because
    a centre would be a bias.
    Raises ParameterError for a class that all images have, or none, and where the solver did not reach the minimum.
    """
    counts = labels.sum(axis=0)
    if one_sided := np.flatnonzero((counts == 0) | (counts == len(labels))).tolist():
        raise ParameterError(f"the classes {one_sided} are in all of the images, or in none", "use more images")
    spread = features.std(axis=0, dtype=np.float64)
    scaled = features / np.where(spread > 0, spread, 1)
    solver = LogisticRegression(C=c, tol=1e-6, max_iter=10_000, fit_intercept=False)
    rows = []
    for own in labels.T:
        rows.append(solver.fit(scaled, own).coef_[0])
        if solver.n_iter_.max() >= solver.max_iter:
            raise ParameterError(f"logistic regression with C = {c:g} has not converged", "use a smaller C")
    return np.stack(rows) / np.where(spread > 0, spread, 1)


def soft_margin(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of the binary cross-entropies of logits and labels (0 and 1), each (n, C)."""
    return float(np.logaddexp(0, np.where(labels, -logits, logits)).mean())


def frozen_maker(
    backbone: ConvBackbone, train: LocalizationDataset, val: LocalizationDataset, image_size: int
) -> Callable[[Path], None]:
    """Return a function that fills a folder with a classifier, `logistic` of pooled features; see `read_frozen`.

    Each image is seen once, resized, not augmented. `C` is that of `C_GRID` with the lowest loss on `val`.
    Memory: one batch, and of each image its pooled features, a number for each channel.
    """

    def make(folder: Path) -> None:
        model = CAMClassifier(backbone, len(train.class_names)).to(next(backbone.parameters()).device)
        features = [_outputs(model, part, image_size, lambda found: found.features.mean(dim=(2, 3)))
                    for part in (train, val)]  # fmt: skip
        labels, rows, weights = [_present(part) for part in (train, val)], [], []
        for c in C_GRID:
            weights.append(logistic(features[0], labels[0], c))
            losses = [soft_margin(x @ weights[-1].T, y) for x, y in zip(features, labels, strict=True)]
            rows.append({"C": c, "training loss": losses[0], "validation loss": losses[1]})
        choice = pd.DataFrame(rows)
        best = torch.from_numpy(weights[choice["validation loss"].idxmin()]).float().contiguous()
        write_atomically(folder / "classifier.safetensors", save({"weight": best}))
        write_atomically(folder / "choice.csv", choice.to_csv(index=False))

    return make


def read_frozen(backbone: ConvBackbone, num_classes: int, folder: Path) -> CAMClassifier:
    """Return the model with the classifier that `frozen_maker` has left in a folder; `choice.csv` has losses by C."""
    model = CAMClassifier(backbone, num_classes)
    model.classifier.load_state_dict(load_file(folder / "classifier.safetensors"))
    return model.eval()
