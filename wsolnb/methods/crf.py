"""Refining masks by colour: a fully connected CRF over the pixels of an image (Kraehenbuehl and Koltun, 2011).

Mean-field inference draws neighbours, and pixels of like colour anywhere near, to one label. There are two ways:

- `mean_field`, always there: exact, on the image reduced to a side of `max_side`, since it builds all pairs of pixels.
- `pydensecrf`, the lattice filter that weakly supervised segmentation uses, at full size: the optional package
  `pydensecrf2` (extra `crf`; its installation needs a C++ compiler). Chosen by name only, never because it is there.
"""

from __future__ import annotations

import importlib
from functools import cached_property
from typing import Literal

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.linalg.blas import ssymv
from scipy.special import softmax

from wsolnb.errors import MapError, ParameterError

BLOCK = 512
"""Rows of the matrix of all pairs of pixels that are computed at once."""


class CRFConfig(BaseModel):
    """Kernels and inference; the defaults are those of IRN's seed refinement.

    backend: `mean_field`, `pydensecrf`, or `none`, which refines nothing. iterations: of mean field.
    certainty: probability that a label given to `refine_labels` is right.
    near, near_weight: standard deviation in pixels and weight of the kernel of position alone. wide, colour,
        colour_weight: deviations in pixels and in grey levels, and weight, of the kernel of position and colour.
    max_side: of the reduced image of `mean_field`, in pixels; memory is 4 * max_side ** 4 bytes for a square image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Literal["mean_field", "pydensecrf", "none"] = "mean_field"
    iterations: int = Field(10, ge=1)
    certainty: float = Field(0.7, gt=0, lt=1)
    near: float = Field(3.0, gt=0)
    near_weight: float = Field(3.0, ge=0)
    wide: float = Field(50.0, gt=0)
    colour: float = Field(5.0, gt=0)
    colour_weight: float = Field(10.0, ge=0)
    max_side: int = Field(64, ge=8, le=160)


def _kernel(features: np.ndarray) -> np.ndarray:
    """Return K = exp(-|f_i - f_j|^2 / 2) of features (N, d); below the blocks on the diagonal nothing is filled in.

    Values are at least e^-45. So many together are less than a rounding error, and smaller numbers are slow.
    """
    half = (features**2).sum(axis=1, keepdims=True) / 2
    one = np.ones_like(half)
    left, right = np.hstack([features, -half, one]), np.hstack([features, one, -half])
    kernel = np.empty((len(features), len(features)), np.float32)
    for first in range(0, len(features), BLOCK):
        part = kernel[first : first + BLOCK, first:]
        np.matmul(left[first : first + BLOCK], right[first:].T, out=part)
        np.exp(np.clip(part, -45, 0, out=part), out=part)
    return kernel


def _times(kernel: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the symmetric matrix, of which the upper triangle is filled in, times x (N,)."""
    return ssymv(1.0, kernel.T, x, lower=1)


def _along(size: int, spread: float) -> np.ndarray:
    """Return D^-1/2 K D^-1/2 (size, size) for K = exp(-(i - j)^2 / (2 spread^2)), D its row sums."""
    place = np.arange(size, dtype=np.float32) / np.float32(spread)
    kernel = np.exp(-((place[:, None] - place) ** 2) / 2)
    scale = 1 / np.sqrt(kernel.sum(axis=1))
    return scale[:, None] * kernel * scale


class Refinement:
    """The CRF of one image: what depends on the image alone is computed once, whatever is refined with it.

    image: (H, W, 3) uint8. Memory: the kernel of `mean_field`, 4 * max_side ** 4 bytes for a square image.
    """

    def __init__(self, image: np.ndarray, config: CRFConfig | None = None):
        self.image, self.config = image, config or CRFConfig()

    def probabilities(self, given: np.ndarray) -> np.ndarray:
        """Return the label probabilities (K, H, W) float32 after mean-field inference; see `refine`."""
        if given.ndim != 3 or self.image.shape != (*given.shape[1:], 3) or self.image.dtype != np.uint8:
            problem = f"an image {self.image.shape} {self.image.dtype} and probabilities {given.shape} do not fit"
            raise MapError(problem, "give (H, W, 3) uint8 and (K, H, W)")
        if self.config.backend == "none" or len(given) < 2:
            return given.astype(np.float32)
        compute = self._lattice if self.config.backend == "pydensecrf" else self._mean_field
        return compute(np.maximum(given, 1e-8).astype(np.float32))

    def labels(self, labels: np.ndarray) -> np.ndarray:
        """Return a mask (H, W) of the same values as `labels`, each pixel's most probable one; see `refine_labels`."""
        values, index = np.unique(labels, return_inverse=True)
        index = index.reshape(labels.shape)
        if len(values) < 2 or self.config.backend == "none":
            return labels.copy()
        other = (1 - self.config.certainty) / (len(values) - 1)
        given = np.where(index == np.arange(len(values))[:, None, None], self.config.certainty, other)
        return values[self.probabilities(given).argmax(axis=0)]

    @cached_property
    def _reduced(self) -> tuple[int, int]:
        """Width and height of the image that `mean_field` works on."""
        height, width = self.image.shape[:2]
        shrink = self._shrink
        return (max(1, round(width * shrink)), max(1, round(height * shrink))) if shrink < 1 else (width, height)

    @property
    def _shrink(self) -> float:
        return min(1.0, self.config.max_side / max(self.image.shape[:2]))

    @cached_property
    def _alike(self) -> tuple[np.ndarray, np.ndarray]:
        """The kernel of position and colour of all pairs of pixels, (N, N) as of `_kernel`, and its D^-1/2 (N,)."""
        image, shrink, config = self.image, self._shrink, self.config
        if shrink < 1:
            image = cv2.resize(image, self._reduced, interpolation=cv2.INTER_AREA)
        rows, columns = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float32)
        place = np.stack([rows.ravel(), columns.ravel()], axis=1) / np.float32(shrink)
        place -= place.mean(axis=0)  # smaller numbers round less
        colours = image.reshape(-1, 3).astype(np.float32) / np.float32(config.colour)
        colours -= colours.mean(axis=0)
        kernel = _kernel(np.concatenate([place / np.float32(config.wide), colours], axis=1))
        return kernel, 1 / np.sqrt(_times(kernel, np.ones(len(kernel), np.float32)))

    @cached_property
    def _near(self) -> tuple[np.ndarray, np.ndarray]:
        """The kernel of position alone: by rows, and by columns, whose product it is."""
        width, height = self._reduced
        return _along(height, self.config.near * self._shrink), _along(width, self.config.near * self._shrink)

    def _message(self, belief: np.ndarray) -> np.ndarray:
        """Return what all pixels say of one label, (N,), of their belief in it."""
        (kernel, scale), (by_row, by_column) = self._alike, self._near
        alike = scale * _times(kernel, scale * belief)
        near = by_row @ belief.reshape(len(by_row), -1) @ by_column
        return np.float32(self.config.colour_weight) * alike + np.float32(self.config.near_weight) * near.ravel()

    def _mean_field(self, probabilities: np.ndarray) -> np.ndarray:
        height, width = self.image.shape[:2]
        shrunk = self._shrink < 1
        if shrunk:
            size = self._reduced
            probabilities = np.stack([cv2.resize(p, size, interpolation=cv2.INTER_AREA) for p in probabilities])
        unary = np.log(probabilities.reshape(len(probabilities), -1))
        belief = softmax(unary, axis=0)
        whole = self._message(np.ones_like(unary[0]))
        for _ in range(self.config.iterations):
            # A pixel's own belief is in the sum, as in the filter of the published implementation.
            # Beliefs of less than a rounding error would be slow. Those in all labels sum to 1, so that one label's
            # message is what the others leave.
            messages = [self._message(np.maximum(one, np.float32(1e-15))) for one in belief[1:]]
            belief = softmax(unary + np.stack([whole - sum(messages), *messages]), axis=0)
        belief = belief.reshape(probabilities.shape)
        if shrunk:
            belief = np.stack([cv2.resize(b, (width, height), interpolation=cv2.INTER_LINEAR) for b in belief])
        return belief

    def _lattice(self, probabilities: np.ndarray) -> np.ndarray:
        try:
            densecrf = importlib.import_module("pydensecrf.densecrf")
        except ImportError as error:
            raise ParameterError(
                "the CRF backend 'pydensecrf' is not installed",
                "pip install 'wsolnb[crf]' (needs a C++ compiler), or choose the backend mean_field",
            ) from error
        config, (count, height, width) = self.config, probabilities.shape
        crf = densecrf.DenseCRF2D(width, height, count)
        crf.setUnaryEnergy(np.ascontiguousarray(-np.log(probabilities).reshape(count, -1)))
        crf.addPairwiseGaussian(sxy=config.near, compat=config.near_weight)
        image = np.ascontiguousarray(self.image)
        crf.addPairwiseBilateral(sxy=config.wide, srgb=config.colour, rgbim=image, compat=config.colour_weight)
        return np.array(crf.inference(config.iterations), np.float32).reshape(probabilities.shape)


def refine(image: np.ndarray, probabilities: np.ndarray, config: CRFConfig | None = None) -> np.ndarray:
    """Return the label probabilities (K, H, W) float32 after mean-field inference.

    image: (H, W, 3) uint8. probabilities: (K, H, W), positive where a label is possible; their logarithm is the unary
    term. Raises MapError for shapes that do not fit, ParameterError when `pydensecrf` is asked for and not installed.
    """
    return Refinement(image, config).probabilities(probabilities)


def refine_labels(image: np.ndarray, labels: np.ndarray, config: CRFConfig | None = None) -> np.ndarray:
    """Return a mask (H, W) of the same values as `labels`, each pixel's most probable one.

    A label is taken to be right with `config.certainty`; the rest is shared by the mask's other values.
    """
    return Refinement(image, config).labels(labels)
