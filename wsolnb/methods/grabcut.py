"""GrabCut-enhanced masks (LocLoc, supplement A): attention says where to look, colours say where to cut.

A map in [0, 1] is split by two thresholds into sure foreground, uncertain and sure background. GrabCut (Rother,
Kolmogorov, Blake, 2004; OpenCV's implementation: mixtures of 5 Gaussians, gamma 50, eight neighbours) models the
colours of both sure sets and gives every uncertain pixel to one side by a minimum cut.

The equations stand first: the three sets of pixels, and the energy that a mask has. `enhance` takes OpenCV's mask of
least energy. Masks of a data set are kept in a `wsolnb.data.store.Store`, one file an image, so that an interrupted run
goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import cv2
import numpy as np
import torch
from joblib import Parallel, delayed
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from tqdm.auto import tqdm

from wsolnb.backbones import TransformerBackbone
from wsolnb.data.base import LocalizationDataset
from wsolnb.data.loading import to_tensor
from wsolnb.data.sample import Sample
from wsolnb.data.store import Store
from wsolnb.data.transforms import resize
from wsolnb.errors import MapError, ParameterError
from wsolnb.maps import normalise

BACKGROUND, FOREGROUND, UNCERTAIN = cv2.GC_BGD, cv2.GC_FGD, cv2.GC_PR_BGD
"""Values of a tri-map, which are OpenCV's: 0, 1, 2."""

COMPONENTS = 5
"""Gaussians in each of the two colour models."""

# Three sets of pixels, and the energy of a mask


def trimap(attention: np.ndarray, fg_threshold: float, bg_threshold: float) -> np.ndarray:
    """Split an attention map F (H, W) in [0, 1] into three sets (supplement A, fig. 1), (H, W) uint8.

    Sure foreground is F >= fg_threshold, sure background F < bg_threshold, and all else uncertain.
    Raises MapError for a map of another shape or range, ParameterError for thresholds out of order or range.
    """
    attention = _checked(attention)
    if not 0 <= bg_threshold <= fg_threshold <= 1:
        problem = f"thresholds {bg_threshold} (background), {fg_threshold} (foreground)"
        raise ParameterError(problem, "keep 0 <= background <= foreground <= 1")
    found = np.full(attention.shape, UNCERTAIN, np.uint8)
    found[attention >= fg_threshold] = FOREGROUND
    found[attention < bg_threshold] = BACKGROUND
    return found


class Mixture(NamedTuple):
    """A colour model: weights (5,), means (5, 3) in RGB 0..255, covariances (5, 3, 3). Unused components weigh 0."""

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray


def colour_cost(image: np.ndarray, mixture: Mixture) -> np.ndarray:
    """Return the cost of each pixel on a side, (H, W): -log sum_k pi_k N(z; mu_k, Sigma_k) of its colour z, up to a
    constant."""
    density = np.zeros(image.shape[:2])
    for weight, mean, covariance in zip(*mixture, strict=True):
        if weight > 0:
            d = image.astype(float) - mean
            inside = np.einsum("hwi,ij,hwj->hw", d, np.linalg.inv(covariance), d)
            density += weight * np.exp(-0.5 * inside) / np.sqrt(np.linalg.det(covariance))
    return -np.log(density + 1e-300)


Pixel = tuple[int, int]


def plain_energy(
    image: np.ndarray, start: np.ndarray, background: Mixture, foreground: Mixture, gamma: float = 50.0
) -> tuple[np.ndarray, dict[tuple[Pixel, Pixel], float]]:
    """Return U and V of E(mask) = sum_p U(mask_p, p) + sum of V(p, q) over neighbours p, q that the mask separates.

    U: (2, H, W), the `colour_cost` of an uncertain pixel in the background, and in the object; a sure pixel of `start`
    costs nothing where it belongs, and 9 gamma elsewhere. V: by pairs of pixels, each of which has up to eight
    neighbours, gamma / |p - q| exp(-beta |z_p - z_q|^2) with 1 / beta = 2 <|z_p - z_q|^2>, the mean over all pairs.

    GrabCut's mask is the one of least energy (Rother, Kolmogorov, Blake, 2004, sec. 3).
    """
    u = np.stack([colour_cost(image, background), colour_cost(image, foreground)])
    for side, label in enumerate((BACKGROUND, FOREGROUND)):
        u[side, start == label], u[1 - side, start == label] = 0, 9 * gamma
    pixels = {p: image[p].astype(float) for p in np.ndindex(start.shape)}
    around = ((0, 1), (1, 0), (1, 1), (1, -1))
    pairs = [(p, q) for p in pixels for down, right in around if (q := (p[0] + down, p[1] + right)) in pixels]
    squares = [((pixels[p] - pixels[q]) ** 2).sum() for p, q in pairs]
    beta = 1 / (2 * np.mean(squares))
    v = [gamma / math.dist(p, q) * math.exp(-beta * square) for (p, q), square in zip(pairs, squares, strict=True)]
    return u, dict(zip(pairs, v, strict=True))


# GrabCut

Outcome = Literal["enhanced", "unchanged", "empty", "full"]
"""What became of a mask. `enhanced`: GrabCut decided. `unchanged`: GrabCut put all uncertain pixels on one side, or
there were no uncertain pixels, so the mask is a thresholded attention. `empty`, `full`: no pixel was sure foreground,
or none was sure background, so there was nothing to model. All outcomes but `enhanced` fall back to the attention >=
the fallback threshold."""


class GrabCutConfig(BaseModel):
    """How attention becomes a mask.

    fg_threshold, bg_threshold: attention >= the first is sure foreground, < the second sure background.
    iterations: of GrabCut, each a fit of both colour models and a cut.
    uncertain: the side that uncertain pixels are counted to when the models are first fitted: `background`, or `none`
        (sure pixels only, also in the first iteration).
    fallback: threshold of the attention where GrabCut has no say; None = midway between the other two.
    size: side in pixels of the square that image and mask are resized to.
    layers: the attention of the `last` layer, or the `mean` over all. heads: mean of that many first heads, 0 = all.
    seed: of the k-means that starts the colour models, the same for every image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fg_threshold: float = Field(0.1, ge=0, le=1)
    bg_threshold: float = Field(0.03, ge=0, le=1)
    iterations: int = Field(1, ge=1)
    uncertain: Literal["background", "none"] = "background"
    fallback: float | None = Field(None, ge=0, le=1)
    size: int = Field(256, ge=8)
    layers: Literal["last", "mean"] = "last"
    heads: int = Field(0, ge=0)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check_order(self) -> GrabCutConfig:
        if self.bg_threshold > self.fg_threshold:
            raise ValueError("bg_threshold must not be above fg_threshold")
        return self

    @classmethod
    def paper(cls, **changes) -> GrabCutConfig:
        """The supplement's settings: colour models of the sure pixels, attention of all heads. The supplement names no
        thresholds, so those of the released code are used."""
        return cls(**{"uncertain": "none", "heads": 0, **changes})

    @classmethod
    def released(cls, **changes) -> GrabCutConfig:
        """The released code's settings: uncertain pixels start as background; mean of the first three heads."""
        return cls(**{"uncertain": "background", "heads": 3, **changes})


class Enhanced(NamedTuple):
    """A mask and how it came about.

    mask: (H, W) bool. trimap: (H, W) uint8, `BACKGROUND`, `FOREGROUND` or `UNCERTAIN`. outcome: see `Outcome`.
    background, foreground: the colour models of the last cut; None where GrabCut had nothing to model.
    """

    mask: np.ndarray
    trimap: np.ndarray
    outcome: Outcome
    background: Mixture | None
    foreground: Mixture | None


def enlarge(attention: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return an attention map (h, w) in [0, 1] resized bilinearly to `size` = (H, W), float32. Raises as `trimap`."""
    whole = _checked(attention).astype(np.float32)
    if whole.shape == tuple(size):
        return whole
    # Clipped: bilinear weights add up to one only up to rounding.
    return cv2.resize(whole, (size[1], size[0]), interpolation=cv2.INTER_LINEAR).clip(0, 1)


def _checked(attention: np.ndarray) -> np.ndarray:
    attention = np.asarray(attention)
    if attention.ndim != 2 or not attention.size:
        raise MapError(f"an attention map of shape {attention.shape}", "give one map (H, W)")
    if not np.isfinite(attention).all() or attention.min() < 0 or attention.max() > 1:
        raise MapError("the attention map leaves [0, 1] or holds NaN", "min-max it first: wsolnb.maps.normalise")
    return attention


def enhance(
    image: np.ndarray, attention: np.ndarray, fg_threshold: float = 0.1, bg_threshold: float = 0.03,
    iterations: int = 1, uncertain: Literal["background", "none"] = "background", fallback: float | None = None,
    seed: int = 0,
) -> Enhanced:  # fmt: skip
    """Cut the object out of an image where its attention is (supplement A).

    image: (H, W, 3) uint8. attention: (h, w) in [0, 1], resized bilinearly to the image. The others: `GrabCutConfig`.
    The same arguments give the same mask, whatever was cut before and in whichever thread.
    Raises MapError and ParameterError as `trimap`, and for an image of another form.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise MapError(f"an image of shape {image.shape} and type {image.dtype}", "give (H, W, 3) uint8")
    if iterations < 1:
        raise ParameterError(f"{iterations} iterations of GrabCut", "use one or more")
    height, width = image.shape[:2]
    whole = enlarge(attention, (height, width))
    start = trimap(whole, fg_threshold, bg_threshold)
    threshold = (fg_threshold + bg_threshold) / 2 if fallback is None else fallback
    if not (start == FOREGROUND).any() or not (start == BACKGROUND).any():
        outcome = "full" if (start == FOREGROUND).any() else "empty"
        return Enhanced(whole >= threshold, start, outcome, None, None)
    mask, background, foreground = _cut(image, start, iterations, uncertain, seed)
    if (mask == (start == FOREGROUND)).all() or (mask == (start != BACKGROUND)).all():
        return Enhanced(whole >= threshold, start, "unchanged", background, foreground)
    return Enhanced(mask, start, "enhanced", background, foreground)


def _cut(image: np.ndarray, start: np.ndarray, iterations: int, uncertain: str, seed: int):
    """GrabCut from a tri-map with pixels of both sure sets: (mask, background model, foreground model)."""
    cv2.setRNGSeed(seed)  # of this thread, as OpenCV keeps one generator per thread
    image, labels = np.ascontiguousarray(image), start.copy()
    background, foreground = np.zeros((1, 13 * COMPONENTS)), np.zeros((1, 13 * COMPONENTS))
    if uncertain == "none":
        # An image of the sure pixels alone: no iteration, so that only its models are made.
        sure = start != UNCERTAIN
        cv2.grabCut(image[sure][None], start[sure][None], None, background, foreground, 0, cv2.GC_INIT_WITH_MASK)
        cv2.grabCut(image, labels, None, background, foreground, 1, cv2.GC_EVAL_FREEZE_MODEL)
        if iterations > 1:
            cv2.grabCut(image, labels, None, background, foreground, iterations - 1, cv2.GC_EVAL)
    else:
        cv2.grabCut(image, labels, None, background, foreground, iterations, cv2.GC_INIT_WITH_MASK)
    mask = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    return mask, _mixture(background), _mixture(foreground)


def _mixture(model: np.ndarray) -> Mixture:
    """Read OpenCV's row of 65 numbers: all weights, then all means, then all covariances."""
    weights, means, covariances = np.split(model[0], [COMPONENTS, 4 * COMPONENTS])
    return Mixture(weights, means.reshape(-1, 3), covariances.reshape(-1, 3, 3))


# Masks of a data set


class Attend:
    """The guide of GrabCut: a frozen transformer's attention maps of whole images.

    backbone: in evaluation mode, on the device where it is to run. layers, heads: as of `GrabCutConfig`.
    """

    def __init__(self, backbone: TransformerBackbone, layers: Literal["last", "mean"] = "last", heads: int = 0):
        self.backbone, self.layers, self.heads = backbone, layers, heads

    def maps(self, images: Tensor) -> Tensor:
        """Return the maps (B, h, w) in [0, 1], float32, of normalised images (B, 3, H, W) of the backbone's size.

        Raises ParameterError when there are fewer heads.
        """
        with torch.inference_mode():
            attention = self.backbone(images.to(next(self.backbone.parameters()).device)).attention
            if self.heads > attention.shape[2]:
                raise ParameterError(f"{self.heads} heads asked of {attention.shape[2]}", "use fewer, or 0 for all")
            rows = attention[:, -1] if self.layers == "last" else attention.mean(dim=1)
            return normalise(rows[:, : self.heads or None].float().mean(dim=1).unflatten(1, self.backbone.grid))

    def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return the maps (B, h, w) in [0, 1] of whole samples, each resized to the backbone's input."""
        side = self.backbone.image_size
        images = np.stack([resize(sample, (side, side)).image for sample in samples])
        return self.maps(to_tensor(images, self.backbone.mean, self.backbone.std)).cpu().numpy()


def maker(
    dataset: LocalizationDataset, attend: Callable[[Sequence[Sample]], np.ndarray], config: GrabCutConfig,
    jobs: int = -1, progress: bool = True, chunk: int = 64,
) -> Callable[[Path], Store]:  # fmt: skip
    """Return a function that fills a folder with the masks that are missing or damaged, and returns the `Store`.

    Masks are bool, of `config.size`; their fact `outcome` is an `Outcome`. Whole masks in the folder are kept, whatever
    they were made with, so a folder is for one configuration.

    attend: gives the attention maps (B, h, w) in [0, 1] of samples; called with `chunk` of them, never when all masks
    are there. jobs: images that are cut at once, in threads (OpenCV frees the interpreter); -1 = one per core.
    After an interruption the function can be called again, and goes on. Masks do not depend on `jobs`, `chunk` or
    order. Memory: `chunk` samples at their own sizes, and their attention. The function stands in this module because
    of the cache: masks depend on this module's code, not on that of the networks that learn from them.
    """

    def make(folder: Path) -> Store:
        store = Store(folder)
        left = store.to_do(dataset.image_ids)
        pool = Parallel(n_jobs=jobs, prefer="threads")
        with tqdm(total=len(left), disable=not (progress and left), unit="mask", leave=False, mininterval=1.0) as bar:
            for first in range(0, len(left), chunk):
                indices = left[first : first + chunk]
                samples = pool(delayed(dataset.read)(index, False) for index in indices)
                maps = attend(samples)
                pool(delayed(_make)(store, *pair, config) for pair in zip(samples, maps, strict=True))
                bar.update(len(indices))
        return store

    return make


def _make(store: Store, sample: Sample, attention: np.ndarray, config: GrabCutConfig) -> None:
    cut = enhance_sample(sample, attention, config)
    store.write_mask(sample.image_id, cut.mask, outcome=cut.outcome)


def enhance_sample(sample: Sample, attention: np.ndarray, config: GrabCutConfig) -> Enhanced:
    """Return `enhance` of a sample's image, resized to the square of the configuration."""
    image = resize(sample, (config.size, config.size)).image
    options = config.model_dump(include={"fg_threshold", "bg_threshold", "iterations", "uncertain", "fallback", "seed"})
    return enhance(image, attention, **options)


def report(store: Store, image_ids: Sequence[str]) -> dict[str, int]:
    """Count the masks of some images by `Outcome`; `images` is their sum. Raises DataError for a damaged mask."""
    found = store.count(image_ids, "outcome")
    return {"images": found.total(), **{outcome: found[outcome] for outcome in get_args(Outcome)}}
