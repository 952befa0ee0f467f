"""LPCAM (Chen and Sun, CVPR 2023): class activation maps from clustered local features instead of classifier weights.

Nothing is trained: local features of a class's images are split by CAM into foreground and context (eq. 2), clustered,
the clusters judged by the classifier (eq. 3 and 4), and a new image's features compared with those that are kept (eq. 5
and 6). Only features and classifier weights are asked for, so any network that has them can be its host.

    foreground, context = split_local_features(features, cam, config.tau)           # for each image of the class
    centres = cluster_local_features(torch.cat(all_foregrounds), config)
    prototypes = select_prototypes(centres, weight, class_index, config)
    found = lpcam(features, prototypes, context_prototypes)
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from sklearn.cluster import AgglomerativeClustering, MiniBatchKMeans, kmeans_plusplus
from torch import Tensor

from wsolnb.errors import MapError, ParameterError


class LPCAMConfig(BaseModel):
    """Everything that paper and released code do differently, and the hyperparameters.

    clusters: K, of foreground and of context each. tau: of eq. 2, on CAM divided by its maximum.
    mu_f: least score of a class prototype (eq. 3). mu_b, mu_b_least: a context prototype scores between them (eq. 4).
    score: of a centre, the classifier's `softmax` over classes, or the `sigmoid` that its loss was made for.
    metric: of the assignment to centres. algorithm: `kmeans`, `minibatch` (k-means for large sets) or `hierarchical`.
    none_left: what happens when no centre scores mu_f: take the `best`, or raise an `error` (as VOC's released code).
    seed: of the clustering's start.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    clusters: int = Field(12, ge=1)
    tau: float = Field(0.1, ge=0, lt=1)
    mu_f: float = Field(0.9, ge=0, le=1)
    mu_b: float = Field(0.9, ge=0, le=1)
    mu_b_least: float = Field(0.0, ge=0, le=1)
    score: Literal["softmax", "sigmoid"] = "softmax"
    metric: Literal["cosine", "euclidean"] = "cosine"
    algorithm: Literal["kmeans", "minibatch", "hierarchical"] = "kmeans"
    none_left: Literal["best", "error"] = "best"
    seed: int = 0

    @classmethod
    def paper(cls, dataset: Literal["voc", "coco"] = "voc", **changes: Any) -> LPCAMConfig:
        """As the paper writes it."""
        coco = {"clusters": 20, "tau": 0.25, "mu_b": 0.5} if dataset == "coco" else {}
        return cls(**coco | changes)

    @classmethod
    def released(cls, dataset: Literal["voc", "coco"] = "voc", **changes: Any) -> LPCAMConfig:
        """As the released code computes it."""
        voc = {"mu_b_least": 0.05, "none_left": "error"} if dataset == "voc" else {}
        return cls.paper(dataset, **voc | changes)


def split_local_features(features: Tensor, cam: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Return foreground (n, D) and context (m, D) local features of one image (eq. 2).

    features: (D, h, w). cam: (h, w), >= 0, of the image's class; divided by its maximum here, and all context where it
    is zero everywhere. Foreground is > tau, context < tau: what equals tau is dropped, as released.
    Raises MapError for NaN or shapes that do not fit.
    """
    if features.ndim != 3 or features.shape[1:] != cam.shape:
        raise MapError(
            f"features {tuple(features.shape)} and CAM {tuple(cam.shape)} do not fit", "give (D, h, w) and (h, w)"
        )
    if not (cam.isfinite().all() and features.isfinite().all()):
        raise MapError("features or CAM hold NaN or infinity", "look at the classifier's training")
    unit = cam / cam.max().clamp(min=1e-12)
    local = features.flatten(1).T
    return local[(unit > tau).flatten()], local[(unit < tau).flatten()]


def cluster_local_features(features: Tensor, config: LPCAMConfig, iterations: int = 100) -> Tensor:
    """Return at most K centres (K', D) of local features (n, D); none of no features.

    k-means: started by k-means++ (scikit-learn), assignment by `config.metric`, a centre is the mean of its *raw*
    features. A cluster that runs empty restarts at the feature that is farthest from its centre.
    """
    distinct = config.clusters
    if len(features) <= distinct:
        return features.clone()
    data = features.detach().double().cpu().numpy()
    lengths = np.linalg.norm(data, axis=1, keepdims=True)
    view = data / np.maximum(lengths, 1e-12) if config.metric == "cosine" else data
    if config.algorithm == "hierarchical":
        linkage = AgglomerativeClustering(distinct, linkage="average", metric=config.metric)
        labels = linkage.fit_predict(view)
    elif config.algorithm == "minibatch":
        labels = MiniBatchKMeans(distinct, random_state=config.seed, n_init=1).fit_predict(view)
    else:
        labels = _lloyd(data, view, distinct, config, iterations)
    centres = [data[labels == k].mean(axis=0) for k in range(distinct) if (labels == k).any()]
    return torch.from_numpy(np.stack(centres)).to(features)


def _lloyd(data: np.ndarray, view: np.ndarray, count: int, config: LPCAMConfig, iterations: int) -> np.ndarray:
    """Assign each row to one of `count` clusters by Lloyd's alternation; centres are means of `data`."""
    start, _ = kmeans_plusplus(view, count, random_state=config.seed)
    # Unit vectors nearest by angle are nearest by distance, so both metrics share the search.
    centres, labels = start, np.full(len(data), -1)
    for _ in range(iterations):
        if config.metric == "cosine":
            centres = centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
            distance = 1 - view @ centres.T
        else:
            distance = (view**2).sum(1, keepdims=True) - 2 * view @ centres.T + (centres**2).sum(1)
        found = distance.argmin(axis=1)
        own = distance[np.arange(len(data)), found]
        for empty in np.flatnonzero(np.bincount(found, minlength=count) == 0):
            farthest = own.argmax()
            found[farthest], own[farthest] = empty, -np.inf
        if np.array_equal(found, labels):
            return labels
        labels = found
        centres = np.stack([data[labels == k].mean(axis=0) for k in range(count)])
    warnings.warn(f"k-means has not settled after {iterations} iterations", stacklevel=3)
    return labels


def centre_scores(centres: Tensor, weight: Tensor, class_index: int, score: str = "softmax") -> Tensor:
    """Return the classifier's score (n,) of each centre (n, D) for a class (eq. 3 and 4); weight: (C, D)."""
    logits = centres.float() @ weight.float().T
    return logits.softmax(dim=1)[:, class_index] if score == "softmax" else logits[:, class_index].sigmoid()


def select_prototypes(
    centres: Tensor, weight: Tensor, class_index: int, config: LPCAMConfig, context: bool = False
) -> Tensor:
    """Return the centres (n, D) that are kept as prototypes: of the class (score > mu_f), or of its context (< mu_b).

    Raises ParameterError when no class prototype is left and `config.none_left` is `error`. Of context prototypes there
    may be none: nothing is subtracted then.
    """
    if not len(centres):
        if context:
            return centres
        raise ParameterError(f"class {class_index} has no local features to cluster", "give images of the class")
    scores = centre_scores(centres, weight, class_index, config.score)
    if context:
        return centres[(scores < config.mu_b) & (scores > config.mu_b_least)]
    kept = centres[scores > config.mu_f]
    if not len(kept) and config.none_left == "error":
        raise ParameterError(
            f"no centre of class {class_index} scores above {config.mu_f}; the best has {float(scores.max()):.3f}",
            "lower mu_f, or set none_left='best'",
        )
    return kept if len(kept) else centres[scores.argmax()][None]


def similarity_maps(features: Tensor, prototypes: Tensor) -> Tensor:
    """Return cosine similarities (B, K, h, w) of each local feature of (B, D, h, w) to each prototype (K, D)."""
    return torch.einsum("bdhw,kd->bkhw", F.normalize(features, dim=1), F.normalize(prototypes, dim=1))


def lpcam(features: Tensor, class_prototypes: Tensor, context_prototypes: Tensor | None = None) -> Tensor:
    """Return LPCAM (B, h, w) in [0, 1] (eq. 5 and 6); without context prototypes LPCAM-F.

    features: (B, D, h, w). class_prototypes: (K, D), at least one. context_prototypes: (K', D), may be empty.
    The mean over prototypes of a cosine similarity is *one* product with the mean of the unit prototypes, so the cost
    does not depend on K. A map without a positive value is zero. Raises ParameterError for shapes that do not fit.
    """
    if features.ndim != 4 or class_prototypes.ndim != 2 or features.shape[1] != class_prototypes.shape[1]:
        raise ParameterError(
            f"features {tuple(features.shape)} and prototypes {tuple(class_prototypes.shape)} do not fit",
            "give (B, D, h, w) and (K, D)",
        )
    if not len(class_prototypes):
        raise ParameterError("no class prototype was given", "`select_prototypes` with none_left='best' gives one")
    direction = F.normalize(class_prototypes, dim=1).mean(dim=0)
    if context_prototypes is not None and len(context_prototypes):
        direction = direction - F.normalize(context_prototypes, dim=1).mean(dim=0)
    lengths = torch.linalg.vector_norm(features, dim=1).clamp(min=1e-12)
    found = (torch.einsum("bdhw,d->bhw", features, direction) / lengths).relu()
    return found / found.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
