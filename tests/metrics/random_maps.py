"""Maps with many of the things that go wrong."""

import cv2
import numpy as np


def random_map(rng, height, width, kind):
    """A map of the given kind (0..7) with many of the things that go wrong: ties, holes in holes, borders, plateaus."""
    values = rng.random((height, width))
    if kind == 1:  # smooth
        values = cv2.GaussianBlur(values, (0, 0), float(rng.uniform(0.4, 3)))
    elif kind == 2:  # upsampled, also with flat squares
        coarse = rng.random((max(1, height // 4), max(1, width // 4)))
        values = cv2.resize(coarse, (width, height), interpolation=int(rng.integers(0, 3)))
    elif kind == 3:  # two values
        values = values > rng.uniform(0.05, 0.95)
    elif kind == 4:  # a few values
        values = np.floor(values * rng.integers(2, 6))
    elif kind == 5:  # peaks
        values = np.where(values > 0.95, rng.random((height, width)), 0)
    elif kind == 6:  # pits
        values = np.where(values < 0.95, 1 - 0.3 * rng.random((height, width)), 0)
    elif kind == 7:  # nested rings with islands
        y, x = np.mgrid[:height, :width]
        values = np.cos(np.hypot(x - width / 2, y - height / 2) * rng.uniform(0.3, 1.5)) + 0.2 * values
    values = np.asarray(values, np.float64).reshape(height, width)
    spread = np.ptp(values)
    values = (values - values.min()) / spread if spread else values * 0 + rng.random()
    return (values * rng.choice([1.0, 0.5, 0.02])).astype(np.float32)
