"""GrabCut-enhanced masks (LocLoc, supplement A): attention says where to look, colours say where to cut.

A map in [0, 1] is split by two thresholds into sure foreground, uncertain and sure background. GrabCut (Rother,
Kolmogorov, Blake, 2004; OpenCV's implementation: mixtures of 5 Gaussians, gamma 50, eight neighbours) models the
colours of both sure sets and gives every uncertain pixel to one side by a minimum cut.

Masks of a data set are kept in a `wsolnb.data.store.Store`, one file an image, so that an interrupted run goes on.
"""

from __future__ import annotations

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

Outcome = Literal["enhanced", "unchanged", "empty", "full"]
"""What became of a mask. `enhanced`: GrabCut decided. `unchanged`: it put all uncertain pixels on one side, or there
were none, so its mask is a thresholded attention. `empty`, `full`: no pixel was sure foreground, or none sure
background, so there was nothing to model. All but `enhanced` fall back to the attention >= the fallback threshold."""


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
        """As the supplement tells it: colour models of the sure pixels, attention of all heads. It names no thresholds;
        those of the released code stand in."""
        return cls(**{"uncertain": "none", "heads": 0, **changes})

    @classmethod
    def released(cls, **changes) -> GrabCutConfig:
        """As the released code has it: uncertain pixels start as background, mean of the first three heads."""
        return cls(**{"uncertain": "background", "heads": 3, **changes})


class Mixture(NamedTuple):
    """A colour model: weights (5,), means (5, 3) in RGB 0..255, covariances (5, 3, 3). Unused components weigh 0."""

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray


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


def class_token_map(
    attention: Tensor, grid: tuple[int, int], layers: Literal["last", "mean"] = "last", heads: int = 0
) -> Tensor:
    """Return the class token's attention as (B, h, w) maps in [0, 1], float32.

    attention: (B, L, heads, h * w), as a backbone returns it. layers, heads: as of `GrabCutConfig`.
    Raises ParameterError when there are fewer heads.
    """
    if heads > attention.shape[2]:
        raise ParameterError(f"{heads} heads asked of {attention.shape[2]}", "use fewer, or 0 for all")
    rows = attention[:, -1] if layers == "last" else attention.mean(dim=1)
    rows = rows[:, : heads or None].float().mean(dim=1)
    return normalise(rows.unflatten(1, grid))


def trimap(attention: np.ndarray, fg_threshold: float, bg_threshold: float) -> np.ndarray:
    """Split an attention map (H, W) in [0, 1] into sure foreground, uncertain, sure background; (H, W) uint8.

    Raises MapError for a map of another shape or range, ParameterError for thresholds out of order or range.
    """
    attention = _checked(attention)
    if not 0 <= bg_threshold <= fg_threshold <= 1:
        raise ParameterError(
            f"thresholds {bg_threshold} (background), {fg_threshold} (foreground)",
            "keep 0 <= background <= foreground <= 1",
        )
    found = np.full(attention.shape, UNCERTAIN, np.uint8)
    found[attention >= fg_threshold] = FOREGROUND
    found[attention < bg_threshold] = BACKGROUND
    return found


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
    image: np.ndarray,
    attention: np.ndarray,
    fg_threshold: float = 0.1,
    bg_threshold: float = 0.03,
    iterations: int = 1,
    uncertain: Literal["background", "none"] = "background",
    fallback: float | None = None,
    seed: int = 0,
) -> Enhanced:
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
        """Return the maps (B, h, w) in [0, 1], float32, of normalised images (B, 3, H, W) of the backbone's size."""
        with torch.inference_mode():
            attention = self.backbone(images.to(next(self.backbone.parameters()).device)).attention
            return class_token_map(attention, self.backbone.grid, self.layers, self.heads)

    def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return the maps (B, h, w) in [0, 1] of whole samples, each resized to the backbone's input."""
        side = self.backbone.image_size
        images = np.stack([resize(sample, (side, side)).image for sample in samples])
        return self.maps(to_tensor(images, self.backbone.mean, self.backbone.std)).cpu().numpy()


def generate(
    dataset: LocalizationDataset,
    attend: Callable[[Sequence[Sample]], np.ndarray],
    config: GrabCutConfig,
    store: Store,
    jobs: int = -1,
    chunk: int = 64,
    progress: bool = True,
) -> Store:
    """Make the masks of a data set that the store lacks, or holds damaged, and return the store.

    Masks are bool, of `config.size`; their fact `outcome` is an `Outcome`. What is whole in the store is kept, whatever
    it was made with: a store is for one configuration.

    attend: gives the attention maps (B, h, w) in [0, 1] of samples; called with `chunk` of them, never when all masks
        are there. jobs: images that are cut at once, in threads (OpenCV frees the interpreter); -1 = one per core.
    Interrupted, it has kept what was done; called again it goes on. Masks do not depend on `jobs`, `chunk` or order.
    """
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


def _make(store: Store, sample: Sample, attention: np.ndarray, config: GrabCutConfig) -> None:
    cut = enhance_sample(sample, attention, config)
    store.write_mask(sample.image_id, cut.mask, outcome=cut.outcome)


def enhance_sample(sample: Sample, attention: np.ndarray, config: GrabCutConfig) -> Enhanced:
    """Return `enhance` of a sample's image, resized to the square of the configuration."""
    image = resize(sample, (config.size, config.size)).image
    options = config.model_dump(include={"fg_threshold", "bg_threshold", "iterations", "uncertain", "fallback", "seed"})
    return enhance(image, attention, **options)


def maker(
    dataset: LocalizationDataset,
    attend: Callable[[Sequence[Sample]], np.ndarray],
    config: GrabCutConfig,
    jobs: int = -1,
    progress: bool = True,
) -> Callable[[Path], None]:
    """Return what fills a folder with the masks of a data set, for a cache. The arguments are those of `generate`.

    It stands here so that masks depend on the code of this module, and not on that of the networks that learn them.
    """

    def make(folder: Path) -> None:
        generate(dataset, attend, config, Store(folder), jobs, progress=progress)

    return make


def report(store: Store, image_ids: Sequence[str]) -> dict[str, int]:
    """Count the masks of some images by `Outcome`; `images` is their sum. Raises DataError for a damaged mask."""
    found = store.count(image_ids, "outcome")
    return {"images": found.total(), **{outcome: found[outcome] for outcome in get_args(Outcome)}}
