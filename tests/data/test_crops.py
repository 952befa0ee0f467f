import numpy as np
import pytest

from wsolnb.data import IGNORE, Sample
from wsolnb.data.transforms import RandomLongSideCrop, RandomScaleCrop


@pytest.mark.parametrize("size", [(60, 100), (100, 60), (20, 30)])
def test_the_long_side_crop_moves_truth_with_the_image(size):
    height, width = size
    mask = np.zeros(size, np.uint8)
    mask[height // 4 : height // 2, width // 4 : width // 2] = 1
    image = np.repeat((mask * 255)[..., None], 3, axis=2)
    sample = Sample(image, "a", (0,), mask=mask, parts=mask)
    seen = set()
    for seed in range(20):
        found = RandomLongSideCrop((64, 128), 80)(sample, np.random.default_rng(seed))
        assert found.image.shape == (80, 80, 3)
        known = found.mask != IGNORE
        bright = found.image[..., 0] > 127
        assert (bright[known] == (found.mask[known] == 1)).mean() > 0.97  # the border of the square is interpolated
        assert (np.abs(found.image[~known].astype(int) - [124, 116, 104]) <= 0).all()
        rows, columns = np.where(known)
        extent = (np.ptp(rows) + 1, np.ptp(columns) + 1)
        assert known.sum() == extent[0] * extent[1]
        seen.add(extent)
    assert len(seen) > 5


def test_a_scaled_crop_keeps_image_and_mask_together():
    rows, columns = np.mgrid[:40, :60].astype(np.uint8)
    image = np.stack([rows * 4, columns * 4, 0 * rows], axis=2)
    sample = Sample(image, "", (0,), mask=(columns >= 30).astype(np.uint8))
    rng = np.random.default_rng(0)
    padded = 0
    for _ in range(20):
        cropped = RandomScaleCrop((0.5, 1.5), 32)(sample, rng)
        assert cropped.image.shape == (32, 32, 3)
        known = cropped.mask != IGNORE
        padded += not known.all()
        right = cropped.image[..., 1].astype(int) >= 30 * 4 - 2
        assert (right == (cropped.mask == 1))[known].mean() > 0.95
    assert 0 < padded < 20
