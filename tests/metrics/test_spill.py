import math

import numpy as np
import pytest

from wsolnb.errors import MapError
from wsolnb.metrics import spill


def slow(score_map, mask, ring, away=0):
    """Sums over pixels, one by one."""
    sums = {"object": [], "background": [], "edge": [], "middle": []}
    height, width = mask.shape
    for y in range(height):
        for x in range(width):
            value = float(score_map[y, x])
            if mask[y, x] == 255:
                continue
            if mask[y, x]:
                sums["object"].append(value)
                continue
            sums["background"].append(value)
            window = mask[max(0, y - away) : y + away + 1, max(0, x - away) : x + away + 1]
            if ((window > 0) & (window < 255)).any():
                continue
            outer = y < ring or x < ring or y >= height - ring or x >= width - ring
            sums["edge" if outer else "middle"].append(value)
    mean = {name: math.fsum(values) / len(values) if values else math.nan for name, values in sums.items()}
    return mean["object"], mean["background"], mean["edge"] - mean["middle"]


@pytest.mark.parametrize("seed", range(5))
def test_equals_sums_over_pixels(seed):
    rng = np.random.default_rng(seed)
    mask = rng.choice([0, 0, 1, 4, 255], (20, 27)).astype(np.uint8)
    score_map = rng.random((20, 27)).astype(np.float32)
    ring = int(rng.integers(1, 8))
    np.testing.assert_allclose(spill(score_map, mask, ring), slow(score_map, mask, ring), rtol=1e-5)
    sparse = np.where(rng.random(mask.shape) < 0.02, mask, 0).astype(np.uint8)
    sparse[9, 9] = 1
    expected = slow(score_map, sparse, 4, away=2)
    np.testing.assert_allclose(spill(score_map, sparse, 4, away=2), expected, rtol=1e-5)


def test_a_frame_is_positive_and_a_map_on_the_object_does_not_spill():
    mask = np.zeros((24, 24), np.uint8)
    mask[8:16, 8:16] = 1
    frame = np.zeros((24, 24), np.float32)
    frame[:4], frame[-4:], frame[:, :4], frame[:, -4:] = 1, 1, 1, 1
    assert spill(frame, mask, 4) == (0.0, pytest.approx(320 / 512), 1.0)
    assert spill(mask.astype(np.float32), mask, 4) == (1.0, 0.0, 0.0)


def test_a_halo_is_no_frame_when_only_the_background_away_from_it_counts():
    mask = np.zeros((24, 24), np.uint8)
    mask[8:16, 8:16] = 1
    halo = np.full((24, 24), 0.25, np.float32)
    halo[6:18, 6:18] = 0.5
    assert spill(halo, mask, 4).frame < -0.05
    assert spill(halo, mask, 4, away=2).frame == 0
    assert math.isnan(spill(halo, mask, 4, away=20).frame)


def test_a_mask_without_background_or_object_is_named():
    for value in (0, 1):
        with pytest.raises(MapError, match="background pixels"):
            spill(np.zeros((4, 4), np.float32), np.full((4, 4), value, np.uint8))
