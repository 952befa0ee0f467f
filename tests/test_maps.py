import numpy as np
import pytest
import torch

from wsolnb import maps


def slow_bilinear(values, height, width):
    """Bilinear interpolation with aligned pixel centres and clamped borders, one pixel at a time."""
    rows, columns = values.shape
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * rows / height - 0.5, 0), rows - 1)
            u = min(max((x + 0.5) * columns / width - 0.5, 0), columns - 1)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            a, b = v - top, u - left
            out[y, x] = (
                values[top, left] * (1 - a) * (1 - b)
                + values[top, right] * (1 - a) * b
                + values[bottom, left] * a * (1 - b)
                + values[bottom, right] * a * b
            )
    return out


def test_normalise_is_min_max_per_map():
    raw = torch.tensor([[[1.0, 3.0], [2.0, 5.0]], [[-4.0, -4.0], [0.0, -2.0]]])
    expected = torch.tensor([[[0.0, 0.5], [0.25, 1.0]], [[0.0, 0.0], [1.0, 0.5]]])
    assert torch.equal(maps.normalise(raw), expected)


def test_normalise_of_a_constant_map_is_zero_and_nan_stays():
    assert torch.equal(maps.normalise(torch.full((1, 3, 4), 7.0)), torch.zeros(1, 3, 4))
    assert maps.normalise(torch.tensor([[[1.0, float("nan")]]])).isnan().any()


def test_normalise_stays_within_the_unit_interval():
    raw = torch.randn(200, 9, 9, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1
    scaled = maps.normalise(raw)
    assert scaled.min() == 0
    assert scaled.max() == 1


@pytest.mark.parametrize(("grid", "size"), [((14, 14), (112, 112)), ((3, 5), (17, 11)), ((1, 1), (4, 6))])
def test_upsample_equals_the_obvious_interpolation(grid, size):
    raw = torch.rand(2, *grid, generator=torch.Generator().manual_seed(1))
    got = maps.upsample(raw, size).numpy()
    for one, expected in zip(got, raw.double().numpy(), strict=True):
        full = slow_bilinear(expected, *size)
        span = full.max() - full.min()
        full = (full - full.min()) / span if span > 1e-6 else np.zeros_like(full)
        np.testing.assert_allclose(one, full, atol=1e-5)
