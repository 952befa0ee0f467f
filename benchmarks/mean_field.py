"""The mean-field CRF on 64 x 64 cells, one core: ours beside the plain form, all in matrices of all pairs of pixels.

Two photographs of 320 x 320, and two or three labels. Both run in turn in one process; time is that of the processor,
the median of repeated images. The plain form in float64 is the truth. Mean field amplifies rounding, so that both
float32 forms are compared with it after one iteration and after ten.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
from scipy.special import softmax
from sklearn.datasets import load_sample_images

from wsolnb.methods.crf import CRFConfig, refine

SIDE = 320


def plain(image: np.ndarray, given: np.ndarray, config: CRFConfig, kind: type = np.float32) -> np.ndarray:
    """As `refine`, for images larger than `config.max_side`, with one matrix of both kernels."""
    side, shrink = config.max_side, config.max_side / len(image)
    small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    place = np.stack(np.mgrid[:side, :side], axis=2).reshape(-1, 2).astype(kind) / kind(shrink)
    colours = small.reshape(-1, 3).astype(kind) / kind(config.colour)
    colours -= colours.mean(axis=0)

    def kernel(features: np.ndarray, weight: float) -> np.ndarray:
        squares = (features**2).sum(axis=1)
        values = np.exp(np.minimum(-(squares[:, None] + squares - 2 * features @ features.T) / 2, 0))
        scale = 1 / np.sqrt(values.sum(axis=1))
        return values * (scale[:, None] * kind(weight)) * scale

    pairs = kernel(np.concatenate([place / kind(config.wide), colours], axis=1), config.colour_weight)
    pairs += kernel(place / kind(config.near), config.near_weight)
    reduced = np.stack([cv2.resize(p, (side, side), interpolation=cv2.INTER_AREA) for p in given.astype(kind)])
    unary = np.log(reduced.reshape(len(given), -1))
    belief = softmax(unary, axis=0)
    for _ in range(config.iterations):
        belief = softmax(unary + belief @ pairs, axis=0)
    belief = belief.reshape(reduced.shape)
    return np.stack([cv2.resize(b, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR) for b in belief])


def main(repeats: int = 5) -> dict:
    images = [photo[:SIDE, :SIDE] for photo in load_sample_images().images]
    rng, result = np.random.default_rng(0), {}
    forms: dict[str, Callable] = {"ours": refine, "plain": plain}
    for labels in (2, 3):
        given = cv2.GaussianBlur(rng.uniform(0, 1, (SIDE, SIDE, labels)), (0, 0), 20).transpose(2, 0, 1)
        given = softmax(30 * given, axis=0)
        spent: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(repeats):
            for image in images:
                for name, form in forms.items():
                    started = time.process_time()
                    form(image, given, CRFConfig())
                    spent[name].append(time.process_time() - started)
        seconds = {name: statistics.median(values) for name, values in spent.items()}
        row = {"ratio": seconds["plain"] / seconds["ours"], "milliseconds": 1e3 * seconds["ours"]}
        for iterations in (1, 10):
            config = CRFConfig(iterations=iterations)
            for name in forms:
                row[f"error of {name}, {iterations}"] = max(
                    float(np.abs(forms[name](image, given, config) - plain(image, given, config, np.float64)).max())
                    for image in images
                )
        result[f"{labels} labels"] = row
        print(f"{labels} labels: plain {1e3 * seconds['plain']:.0f} ms, ours {1e3 * seconds['ours']:.0f} ms of the "
              f"processor, ratio {row['ratio']:.1f} (claim >= 5)")  # fmt: skip
        for iterations in (1, 10):
            errors = [row[f"error of {name}, {iterations}"] for name in forms]
            print("  after {} iteration(s), largest difference from float64: ours {:.1e}, plain {:.1e}".format(
                iterations, *errors))  # fmt: skip
    return result


if __name__ == "__main__":
    main()
