"""LPCAM (Chen and Sun, CVPR 2023): class activation maps from clustered local features instead of classifier weights.

Nothing is trained. CAM splits the local features of a class's images into foreground and context (eq. 2). Both are
clustered. The classifier judges the clusters (eq. 3 and 4), and the features of a new image are compared with the
clusters that are kept (eq. 5 and 6). LPCAM needs only features and classifier weights, so any network that has them can
be its host.

    foreground, context = split_local_features(features, cam, config.tau)           # for each image of the class
    centres = cluster_local_features(torch.cat(all_foregrounds), config)
    prototypes = select_prototypes(centres, weight, class_index, config)
    found = lpcam(features, prototypes, context_prototypes)

The equations stand first, in the order of https://arxiv.org/abs/2303.10334. They write eq. 5 and 6 prototype by
prototype. The code that runs follows them, with one product for any number of prototypes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from sklearn.cluster import AgglomerativeClustering, MiniBatchKMeans, kmeans_plusplus
from torch import Tensor

from wsolnb.errors import MapError, ParameterError
from wsolnb.maps import enlarge

# Equations 2 to 6, as the paper writes them


def split_local_features(
    features: Tensor, cam: Tensor, tau: float, ties: Literal["context", "dropped"] = "dropped", divide: bool = True
) -> tuple[Tensor, Tensor]:
    """Return F = {f(x, y): CAM(x, y) > tau} (n, D) and B, the other local features (m, D), of one image (eq. 2).

    features: f (D, h, w). cam: (h, w), >= 0, of the image's class; divided by its maximum here if `divide`, else taken
    as it is. If the CAM is zero everywhere, all features are context. Where the CAM equals tau, `ties` decides between
    context and dropping.
    Raises MapError for NaN or shapes that do not fit.
    """
    if features.ndim != 3 or features.shape[1:] != cam.shape:
        problem = f"features {tuple(features.shape)} and CAM {tuple(cam.shape)} do not fit"
        raise MapError(problem, "give (D, h, w) and (h, w)")
    if not (cam.isfinite().all() and features.isfinite().all()):
        raise MapError("features or CAM hold NaN or infinity", "look at the classifier's training")
    unit = (cam / cam.max().clamp(min=1e-12) if divide else cam).flatten()
    local = features.flatten(1).T
    below = (unit <= tau) if ties == "context" or not cam.any() else (unit < tau)
    return local[unit > tau], local[below]


def cluster_local_features(features: Tensor, config: LPCAMConfig, iterations: int = 300) -> Tensor:
    """Return at most K centres (K', D) of local features (n, D): F_1 ... F_K of F, B_1 ... B_K of B.

    k-means starts by k-means++ (scikit-learn) or from random features, and assigns by `config.metric`. A centre is the
    mean of its *raw* features. A cluster that runs empty restarts at the feature that is farthest from its centre.
    Hierarchical clustering has average linkage. With the cosine metric it leaves out zero features, which have no
    direction.

    Raises ParameterError for a hierarchical clustering of more than 20,000 features, whose distances take 3 GB.
    """
    count = config.clusters
    if len(features) <= count:
        return features.clone()
    if config.algorithm == "hierarchical" and len(features) > 20_000:
        problem = f"hierarchical clustering of {len(features)} features needs all of their distances"
        raise ParameterError(problem, "set features_per_class to 20,000 or fewer, or use kmeans or minibatch")
    data = features.detach().cpu().numpy()
    lengths = np.linalg.norm(data, axis=1, keepdims=True)
    if config.algorithm == "hierarchical" and config.metric == "cosine" and not lengths.all():
        data, lengths = data[lengths[:, 0] > 0], lengths[lengths[:, 0] > 0]
        if len(data) <= count:
            return torch.from_numpy(data).to(features) if len(data) else features[:1].clone()
    view = data / np.maximum(lengths, 1e-12) if config.metric == "cosine" else data
    if config.algorithm == "hierarchical":
        labels = AgglomerativeClustering(count, linkage="average", metric=config.metric).fit_predict(view)
    elif config.algorithm == "minibatch":
        labels = MiniBatchKMeans(count, random_state=config.seed, n_init=1).fit_predict(view)
    else:
        labels = _lloyd(data, view, count, config, iterations)
    centres = [data[labels == k].mean(axis=0, dtype=np.float64) for k in range(count) if (labels == k).any()]
    return torch.from_numpy(np.stack(centres)).to(features)


def _lloyd(data: np.ndarray, view: np.ndarray, count: int, config: LPCAMConfig, iterations: int) -> np.ndarray:
    """Assign each row to its nearest centre, set each centre to the mean of its rows of `data`, until nothing moves."""
    if config.start == "random":
        centres = data[np.random.default_rng(config.seed).choice(len(data), count, replace=False)]
    else:
        centres, _ = kmeans_plusplus(view, count, random_state=config.seed)
    labels = np.full(len(data), -1)
    squares = None if config.metric == "cosine" else (view**2).sum(1, keepdims=True)
    for _ in range(iterations):
        if config.metric == "cosine":
            unit = centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
            distance = 1 - view @ unit.T
        else:
            distance = squares - 2 * view @ centres.T + (centres**2).sum(1)
        found = distance.argmin(axis=1)
        own = distance[np.arange(len(data)), found]
        sizes = np.bincount(found, minlength=count)
        for empty in np.flatnonzero(sizes == 0):
            farthest = np.where(sizes[found] > 1, own, -np.inf).argmax()  # taken from a cluster that keeps others
            sizes[found[farthest]] -= 1
            found[farthest], sizes[empty] = empty, 1
        if np.array_equal(found, labels):
            return labels
        labels, before = found, centres
        centres = np.stack([data[labels == k].mean(axis=0) for k in range(count)])
        if np.linalg.norm(centres - before, axis=1).sum() ** 2 < config.tolerance:
            return labels
    warnings.warn(f"k-means has not settled after {iterations} iterations", stacklevel=3)
    return labels


def centre_scores(centres: Tensor, weight: Tensor, class_index: int, score: str = "softmax") -> Tensor:
    """Return p_i (n,): how the classifier, (C, D), scores each centre F_i or B_i, (n, D), for a class (eq. 3 and 4)."""
    logits = centres.float() @ weight.float().T
    return logits.softmax(dim=1)[:, class_index] if score == "softmax" else logits[:, class_index].sigmoid()


def select_prototypes(
    centres: Tensor, weight: Tensor, class_index: int, config: LPCAMConfig, context: bool = False
) -> Tensor:
    """Return the centres (n, D) that are kept as prototypes of the class (p_i > mu_f), or of its context (p_i < mu_b).

    Raises ParameterError when no class prototype is left and `config.none_left` is `error`. There may be no context
    prototype; then nothing is subtracted.
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
        problem = f"no centre of class {class_index} scores above {config.mu_f}; the best has {float(scores.max()):.3f}"
        raise ParameterError(problem, "lower mu_f, or set none_left='best'")
    return kept if len(kept) else centres[scores.argmax()][None]


def similarity_maps(features: Tensor, prototypes: Tensor) -> Tensor:
    """Return cos(F_i, f(x, y)) (B, K, h, w), the maps that eq. 5 averages, for (B, D, h, w) features.

    prototypes: F_i or B_i, (K, D).
    """
    return torch.einsum("bdhw,kd->bkhw", F.normalize(features, dim=1), F.normalize(prototypes, dim=1))


def plain_lpcam(features: Tensor, class_prototypes: Tensor, context_prototypes: Tensor) -> Tensor:
    """Return LPCAM (B, h, w) = ReLU(FG - BG), divided by its maximum (eq. 6). Arguments as of `lpcam`, but not empty.

    FG, BG: the means over the prototypes of the class, and of its context, of `similarity_maps` (eq. 5).
    """
    fg = similarity_maps(features, class_prototypes).mean(dim=1)
    bg = similarity_maps(features, context_prototypes).mean(dim=1)
    return by_maximum(fg - bg)


def by_maximum(maps: Tensor) -> Tensor:
    """Return (..., h, w) maps without their negative values, divided by their maximum: in [0, 1]; zero stays zero."""
    positive = maps.relu()
    top = positive.amax(dim=(-2, -1), keepdim=True)
    return torch.where(top > 0, positive / top, positive)


class LPCAMConfig(BaseModel):
    """Everything that paper and released code do differently, and the hyperparameters.

    clusters: K, of foreground and of context each. tau: of eq. 2, on CAM divided by a maximum, see `split_maximum`.
    ties: a pixel whose CAM equals tau goes to the `context`, or is `dropped`.
    split_cam: the CAM of eq. 2 is that of the feature `grid` at scale 1, or the `final` one (all scales and flips, at
        the image's size); each cell of the grid then takes its nearest pixel.
    split_maximum: the maximum that divides this CAM: over the cells of the `grid`, or over the pixels of the `image`.
        The final CAM is already divided by the latter, so `image` takes its values as they are, as released. For the
        CAM of the grid only `grid` is allowed.
    mu_f: least score of a class prototype (eq. 3). mu_b, mu_b_least: a context prototype scores between them (eq. 4).
    score: of a centre, the classifier's `softmax` over classes, or the `sigmoid` that its loss was made for.
    metric: of the assignment to centres. algorithm: `kmeans`, `minibatch` (k-means for large sets) or `hierarchical`.
    start: of k-means, `k-means++` or `random` features. tolerance: k-means stops when the square of the summed shifts
        of all centres is below it; 0 = when no feature changes its cluster.
    images_per_class: number of images that are clustered, drawn at random, with `replacement` or without; 0 = all.
    features_per_class: the largest number of local features that are clustered, for foreground and context each; 0 =
        all. The limit bounds the memory: if there are more, a uniform sample is kept.
    none_left: what happens when no centre scores mu_f: take the `best`, or raise an `error` (as VOC's released code).
    flip: how the mirror image enters a map: its `features` are added to the image's before the cosine, its `maps` are
        added, or it does not enter (`none`).
    scales: of the input image. over_scales: the maps' `mean` or `sum`; they are divided by their maximum afterwards.
    relu: of eq. 6, `always` or only `with_context` prototypes. For features behind a ReLU both are the same, because
        their cosines to means of such features are not negative.
    seed: of everything drawn: images, features, the clustering's start.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    clusters: int = Field(12, ge=1)
    tau: float = Field(0.1, ge=0, lt=1)
    ties: Literal["context", "dropped"] = "context"
    split_cam: Literal["grid", "final"] = "grid"
    split_maximum: Literal["grid", "image"] = "grid"
    mu_f: float = Field(0.9, ge=0, le=1)
    mu_b: float = Field(0.9, ge=0, le=1)
    mu_b_least: float = Field(0.0, ge=0, le=1)
    score: Literal["softmax", "sigmoid"] = "softmax"
    metric: Literal["cosine", "euclidean"] = "cosine"
    algorithm: Literal["kmeans", "minibatch", "hierarchical"] = "kmeans"
    start: Literal["k-means++", "random"] = "k-means++"
    tolerance: float = Field(0.0, ge=0)
    images_per_class: int = Field(0, ge=0)
    replacement: bool = False
    features_per_class: int = Field(0, ge=0)
    none_left: Literal["best", "error"] = "best"
    flip: Literal["none", "features", "maps"] = "maps"
    scales: tuple[float, ...] = (1.0, 0.5, 1.5, 2.0)
    over_scales: Literal["mean", "sum"] = "mean"
    relu: Literal["always", "with_context"] = "always"
    seed: int = 0

    @field_validator("scales")
    @classmethod
    def _check_scales(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if not scales or scales[0] != 1 or min(scales) <= 0:
            raise ValueError("scales are positive, the first is 1, whose features are clustered")
        return scales

    @model_validator(mode="after")
    def _check_split(self) -> Self:
        if self.split_cam == "grid" and self.split_maximum == "image":
            raise ValueError("split_maximum='image' needs split_cam='final': the CAM of the grid has no other maximum")
        return self

    @classmethod
    def paper(cls, dataset: Literal["voc", "coco"] = "voc", **changes: Any) -> LPCAMConfig:
        """The paper's settings."""
        coco = {"clusters": 20, "tau": 0.25, "mu_b": 0.5, "images_per_class": 100} if dataset == "coco" else {}
        return cls(**coco | changes)

    @classmethod
    def released(cls, dataset: Literal["voc", "coco"] = "voc", **changes: Any) -> LPCAMConfig:
        """The released code's settings."""
        both = {"ties": "dropped", "split_cam": "final", "split_maximum": "image", "start": "random", "tolerance": 5.0}
        both |= {"flip": "features", "relu": "with_context"}
        voc = {"mu_b_least": 0.05, "none_left": "error"}
        coco = {"over_scales": "sum", "replacement": True}
        return cls.paper(dataset, **both | (coco if dataset == "coco" else voc) | changes)


# The same in one product, however many prototypes there are


def direction(class_prototypes: Tensor, context_prototypes: Tensor | None = None) -> Tensor:
    """Return (D,): the mean of the unit class prototypes, minus that of the unit context prototypes (eq. 5 and 6).

    The mean over prototypes of a cosine similarity is *one* product with this vector, so a map costs the same for any
    K. class_prototypes: (K, D), at least one. context_prototypes: (K', D), may be empty: LPCAM-F.
    Raises ParameterError when there is no class prototype.
    """
    if not len(class_prototypes):
        raise ParameterError("no class prototype was given", "`select_prototypes` with none_left='best' gives one")
    mean = F.normalize(class_prototypes, dim=1).mean(dim=0)
    if context_prototypes is not None and len(context_prototypes):
        mean = mean - F.normalize(context_prototypes, dim=1).mean(dim=0)
    return mean


def similarity(features: Tensor, directions: Tensor) -> Tensor:
    """Return FG - BG of eq. 6 before its ReLU, (B, C, h, w), for (B, D, h, w) features and `direction`s (C, D)."""
    lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp(min=1e-12)
    return torch.einsum("bdhw,cd->bchw", features, directions) / lengths


def lpcam(features: Tensor, class_prototypes: Tensor, context_prototypes: Tensor | None = None) -> Tensor:
    """Return LPCAM (B, h, w) in [0, 1] (eq. 5 and 6); without context prototypes LPCAM-F.

    features: (B, D, h, w). class_prototypes: (K, D), at least one. context_prototypes: (K', D), may be empty.
    A map without a positive value is zero. Raises ParameterError for shapes that do not fit.
    """
    if features.ndim != 4 or class_prototypes.ndim != 2 or features.shape[1] != class_prototypes.shape[1]:
        problem = f"features {tuple(features.shape)} and prototypes {tuple(class_prototypes.shape)} do not fit"
        raise ParameterError(problem, "give (B, D, h, w) and (K, D)")
    return by_maximum(similarity(features, direction(class_prototypes, context_prototypes)[None])[:, 0])


# Of one image, over scales and flips


class Directions(NamedTuple):
    """What LPCAM compares features with: (C, D) `direction` of each class, and (C,) whether context is subtracted."""

    vectors: Tensor
    has_context: Tensor


def cam_of(
    scales: Sequence[Tensor], weight: Tensor, size: tuple[int, int], area: tuple[int, int] | None = None
) -> Tensor:
    """Return CAM (C, H, W) in [0, 1] of one image over scales and flips (eq. 1, as the released program computes it).

    scales: per scale features (F, D, h, w) of the image and, F = 2, of its mirror image, mirrored back.
    weight: (C, D) of the classes of interest. size: (H, W). area: that the cells see (`maps.enlarge`); None is `size`.
    At each scale the rectified maps of both are added. They are then enlarged, summed over scales and divided by their
    maximum.

    As released, the maps of *every* scale are enlarged to the area of the first scale. This is exact where a scale s
    has s times the cells. Otherwise its map is off at the lower and right edge: of 500 pixels at stride 16 and scale
    1.5, 47 cells see 501 and are enlarged to 512.
    """
    both = (torch.einsum("fdhw,cd->cfhw", features.to(weight), weight).relu() for features in scales)
    return by_maximum(_summed((maps.sum(dim=1) for maps in both), size, area))


def lpcam_of(
    scales: Sequence[Tensor], directions: Directions, size: tuple[int, int], config: LPCAMConfig,
    area: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Return LPCAM (C, H, W) in [0, 1] of one image over scales and flips; arguments as of `cam_of`.

    `config.flip`, `over_scales` and `relu` say how.
    """

    def at(features: Tensor) -> Tensor:
        if config.flip == "none":
            features = features[:1]
        elif config.flip == "features":
            features = features.sum(dim=0, keepdim=True)
        maps = similarity(features, directions.vectors)
        rectified = maps.relu()
        if config.relu == "with_context":
            rectified = torch.where(directions.has_context[None, :, None, None], rectified, maps)
        return rectified.mean(dim=0)

    total = _summed((at(features.to(directions.vectors)) for features in scales), size, area)
    return by_maximum(total / len(scales) if config.over_scales == "mean" else total)


def _summed(grids: Iterable[Tensor], size: tuple[int, int], area: tuple[int, int] | None) -> Tensor:
    """Enlarge the (C, h, w) maps of each scale to pixels, and add them; C may be 0."""
    return sum(enlarge(maps, size, area) for maps in grids)
