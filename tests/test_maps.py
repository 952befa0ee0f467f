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


@pytest.mark.parametrize(("stride", "size"), [(16, (375, 500)), (8, (112, 112)), (4, (33, 70)), (32, (33, 31))])
def test_enlarged_maps_lie_where_their_cells_do(stride, size):
    cells = tuple(-(-side // stride) for side in size)
    area = maps.seen_area(cells, stride, size)
    assert area == tuple(count * stride for count in cells)
    raw = torch.rand(1, *cells, generator=torch.Generator().manual_seed(2))
    got = maps.enlarge(raw, size, area)[0]
    expected = slow_bilinear(raw[0].double().numpy(), *area)[: size[0], : size[1]]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    plain = torch.nn.functional.interpolate(raw[:, None], size, mode="bilinear")[0, 0]
    assert torch.equal(got, plain) == (area == size)  # where the stride divides both sides, bit for bit


def centre_of_mass(values):
    """The mean position of a map's pixels, weighed by its values."""
    values = np.asarray(values, np.float64)
    return [float((values * (index + 0.5)).sum() / values.sum()) for index in np.indices(values.shape)]


@pytest.mark.parametrize(("row", "column"), [(10, 3), (1, 30), (22, 30)])
def test_a_blob_of_one_cell_comes_out_at_its_place(row, column):
    blob = torch.zeros(1, 24, 32)
    blob[0, row, column] = 1
    place = [(row + 0.5) * 16, (column + 0.5) * 16]
    area = maps.seen_area((24, 32), 16, (375, 500))
    np.testing.assert_allclose(centre_of_mass(maps.enlarge(blob, (375, 500), area)[0]), place, atol=1)
    stretched = centre_of_mass(maps.enlarge(blob, (375, 500))[0])
    np.testing.assert_allclose(stretched, [place[0] * 375 / 384, place[1] * 500 / 512], atol=1)  # up to 8 and 11 off


def test_the_area_of_a_resized_image_is_told_in_its_own_pixels():
    assert maps.seen_area((14, 14), 8, (112, 112), (375, 500)) == (375, 500)
    assert maps.seen_area((15, 15), 8, (113, 113), (226, 339)) == (240, 360)
    assert maps.seen_area((4, 4), 8, (35, 35)) == (35, 35)  # a network that leaves the last pixels out
