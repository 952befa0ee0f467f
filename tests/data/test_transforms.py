"""Transforms keep image, boxes, mask and parts aligned to the pixel."""

from __future__ import annotations

import random

import cv2
import numpy as np
import pytest
from PIL import Image

from wsolnb.data.sample import CONTEXT, DISCRIMINATIVE, IGNORE, REST, Sample, tight_box
from wsolnb.data.transforms import (
    Compose,
    RandAugment,
    RandomBrightnessContrast,
    RandomHorizontalFlip,
    RandomShift,
    Resize,
    ResizeCenterCrop,
    ResizeRandomCrop,
    crop,
    flip,
    resize,
    resize_map,
    shift,
)
from wsolnb.errors import ParameterError
from wsolnb.metrics import box_iou

BACK, FORE = (40, 90, 30), (220, 20, 160)


def make_sample(height: int, width: int, box: tuple[int, int, int, int]) -> Sample:
    """One rectangle, told by colour, mask, box and parts alike (its upper half discriminative)."""
    x0, y0, x1, y1 = box
    image = np.full((height, width, 3), BACK, np.uint8)
    mask, parts = np.zeros((height, width), np.uint8), np.full((height, width), CONTEXT, np.uint8)
    image[y0:y1, x0:x1], mask[y0:y1, x0:x1], parts[y0:y1, x0:x1] = FORE, 1, REST
    parts[y0 : (y0 + y1) // 2, x0:x1] = DISCRIMINATIVE
    return Sample(image, "x", (0,), np.array([box], float), np.array([0]), mask, parts)


def random_sample(rng: np.random.Generator, factor: int = 1) -> Sample:
    """A rectangle whose corners, and the image's sides, are multiples of `factor`."""
    height, width = rng.integers(4, 40, 2)
    (x0, x1), (y0, y1) = (np.sort(rng.choice(side + 1, 2, replace=False)) for side in (width, height))
    return make_sample(*(factor * np.array([height, width])), tuple(factor * np.array([x0, y0, x1, y1])))


def fore(image: np.ndarray) -> np.ndarray:
    """Pixels nearer to the object's colour than to the background's."""
    values = image.astype(float)
    return np.abs(values - FORE).sum(-1) < np.abs(values - BACK).sum(-1)


def check_aligned(sample: Sample, tolerance: float = 0.0) -> None:
    """Image, mask, parts and box show the same rectangle; a box that is gone means that nothing of it is seen."""
    known = sample.mask != IGNORE
    np.testing.assert_array_equal(sample.parts[known] != CONTEXT, sample.mask[known] == 1)
    assert sample.mask.shape == sample.parts.shape == sample.size
    assert len(sample.boxes) == len(sample.box_labels)
    found = tight_box(sample.mask == 1)
    if len(sample.boxes):
        assert np.abs(sample.boxes[0] - found).max() <= tolerance
    else:
        assert not found.any()
    seen = tight_box(fore(sample.image) & known)
    assert np.abs(seen - found).max() <= max(tolerance, 0)


def slow_nearest(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each new pixel takes the old pixel that its centre lies in."""
    old_height, old_width = values.shape
    out = np.zeros((height, width), values.dtype)
    for i in range(height):
        for j in range(width):
            y, x = (i + 0.5) * old_height / height, (j + 0.5) * old_width / width
            out[i, j] = values[int(y), int(x)]
    return out


class TestMechanism:
    def test_map_takes_nearest_pixel_centre(self):
        rng = np.random.default_rng(0)
        for _ in range(40):
            old, new = rng.integers(1, 30, 2), rng.integers(1, 30, 2)
            values = rng.integers(0, 256, old, dtype=np.uint8)
            np.testing.assert_array_equal(resize_map(values, tuple(new)), slow_nearest(values, *new))
            exact = cv2.resize(values, (int(new[1]), int(new[0])), interpolation=cv2.INTER_NEAREST_EXACT)
            # A centre on the border of two pixels may go to either.
            rows, columns = ((2 * np.arange(n) + 1) * o % (2 * n) != 0 for o, n in zip(old, new, strict=True))
            np.testing.assert_array_equal(resize_map(values, tuple(new))[rows][:, columns], exact[rows][:, columns])

    @pytest.mark.parametrize("factor", [1, 2, 3, 5])
    def test_integer_factors_are_exact(self, factor):
        rng = np.random.default_rng(factor)
        for _ in range(20):
            sample = random_sample(rng)
            larger = resize(sample, tuple(factor * side for side in sample.size), "nearest")
            check_aligned(larger)
            np.testing.assert_array_equal(larger.boxes, sample.boxes * factor)
            coarse = random_sample(rng, factor)
            check_aligned(resize(coarse, tuple(side // factor for side in coarse.size)))

    def test_any_resize_is_within_a_pixel(self):
        rng = np.random.default_rng(1)
        for _ in range(60):
            sample = random_sample(rng)
            size = tuple(int(side) for side in rng.integers(8, 60, 2))
            resized = resize(sample, size)
            scale = np.array([size[1] / sample.size[1], size[0] / sample.size[0]] * 2)
            np.testing.assert_allclose(resized.boxes, sample.boxes * scale, rtol=1e-12)
            if (resized.boxes[0, 2:] - resized.boxes[0, :2] >= 2).all():
                check_aligned(resized, tolerance=1.0)

    def test_crop_and_shift_are_exact_or_drop_the_box(self):
        rng = np.random.default_rng(2)
        dropped = 0
        for _ in range(100):
            sample = random_sample(rng)
            height, width = (int(rng.integers(1, side + 1)) for side in sample.size)
            top, left = rng.integers(0, sample.size[0] - height + 1), rng.integers(0, sample.size[1] - width + 1)
            cropped = crop(sample, top, left, (height, width))
            assert cropped.size == (height, width)
            np.testing.assert_array_equal(cropped.image, sample.image[top : top + height, left : left + width])
            check_aligned(cropped)
            down, right = rng.integers(-45, 46, 2)
            shifted = shift(sample, down, right)
            assert shifted.size == sample.size
            check_aligned(shifted)
            dropped += (len(cropped.boxes) == 0) + (len(shifted.boxes) == 0)
            assert len(sample.boxes) == 1
        assert dropped > 20

    def test_shift_repeats_the_border_and_ignores_it(self):
        image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
        sample = Sample(image, "x", (0,), mask=np.ones((4, 5), np.uint8), parts=np.full((4, 5), REST, np.uint8))
        padded = np.pad(image, ((9, 9), (9, 9), (0, 0)), mode="edge")
        for down in range(-6, 7):
            for right in range(-6, 7):
                moved = shift(sample, down, right)
                np.testing.assert_array_equal(moved.image, padded[9 - down : 13 - down, 9 - right : 14 - right])
                inside = np.pad(np.ones((4, 5), bool), 9)[9 - down : 13 - down, 9 - right : 14 - right]
                np.testing.assert_array_equal(moved.mask, np.where(inside, 1, IGNORE))
                np.testing.assert_array_equal(moved.parts, np.where(inside, REST, CONTEXT))

    def test_flip_moves_all_and_undoes_itself(self):
        rng = np.random.default_rng(3)
        for _ in range(20):
            sample = random_sample(rng)
            sample.image = rng.integers(0, 256, sample.image.shape, dtype=np.uint8)
            sample.boxes += rng.uniform(0, 0.5, (1, 4)) * (1, 1, -1, -1)
            once, twice = flip(sample), flip(flip(sample))
            np.testing.assert_array_equal(once.image, sample.image[:, ::-1])
            np.testing.assert_array_equal(once.mask, sample.mask[:, ::-1])
            for field in ("image", "mask", "parts", "box_labels"):
                np.testing.assert_array_equal(getattr(twice, field), getattr(sample, field))
            np.testing.assert_allclose(twice.boxes, sample.boxes, rtol=0, atol=1e-12)
            check_aligned(flip(random_sample(rng)))

    def test_boxes_keep_their_labels_and_samples_their_arrays(self):
        boxes = np.array([[0, 0, 4, 4], [6, 6, 10, 10], [2, 2, 9, 9]], float)
        image = np.zeros((10, 10, 3), np.uint8)
        sample = Sample(image, "x", (3, 5, 7), boxes, np.array([3, 5, 7]))
        cropped = crop(sample, 5, 5, (5, 5))
        np.testing.assert_array_equal(cropped.boxes, [[1, 1, 5, 5], [0, 0, 4, 4]])
        np.testing.assert_array_equal(cropped.box_labels, [5, 7])
        assert cropped.labels == (3, 5, 7)
        assert cropped.mask is None
        assert cropped.parts is None
        cropped.image[:] = 9
        cropped.boxes[:] = 9
        np.testing.assert_array_equal(sample.boxes, [[0, 0, 4, 4], [6, 6, 10, 10], [2, 2, 9, 9]])
        empty = Sample(image, "x", (0,))
        for result in (resize(empty, (5, 5)), crop(empty, 1, 1, (3, 3)), flip(empty), shift(empty, 1, 1)):
            assert result.boxes.shape == (0, 4)
            assert result.box_labels.shape == (0,)

    def test_the_centre_crop_keeps_a_lost_box_as_a_miss(self):
        sample = Sample(
            np.zeros((64, 64, 3), np.uint8), "x", (0,), np.array([[0.0, 0, 6, 6], [0, 0, 40, 40]]), np.zeros(2, int)
        )
        found = ResizeCenterCrop(64, 48)(sample)
        np.testing.assert_array_equal(found.boxes, [[0, 0, 0, 0], [0, 0, 32, 32]])
        assert len(found.box_labels) == 2
        assert len(ResizeRandomCrop(64, 48)(sample, np.random.default_rng(1)).boxes) == 1  # training asks for no miss
        every = np.array([[x, y, x + w, y + w] for x in range(0, 48, 8) for y in range(0, 48, 8) for w in (1, 8, 48)])
        assert box_iou(every.astype(float), found.boxes[:1]).max() <= 0.25  # pixels count: far below any demand

    @pytest.mark.parametrize(("top", "left", "size"), [(-1, 0, (5, 5)), (0, 6, (5, 5)), (0, 0, (11, 5))])
    def test_crop_outside_of_the_image(self, top, left, size):
        with pytest.raises(ParameterError, match="does not lie in a 10x10 image"):
            crop(make_sample(10, 10, (1, 1, 5, 5)), top, left, size)


class TestProtocols:
    def test_plain_resize_keeps_the_whole_image(self):
        sample = Resize(224)(make_sample(100, 200, (50, 25, 200, 75)))
        assert sample.size == (224, 224)
        np.testing.assert_array_equal(sample.boxes, [[56, 56, 224, 168]])
        check_aligned(sample)
        same = make_sample(112, 112, (1, 2, 3, 4))
        assert Resize(112)(same) is same

    def test_unknown_interpolation(self):
        with pytest.raises(ParameterError, match="did you mean 'bilinear'"):
            Resize(5, "bilinaer")(make_sample(8, 8, (1, 1, 2, 2)))

    def test_center_crop_of_a_square_resize(self):
        sample = ResizeCenterCrop(256, 224)(make_sample(128, 512, (0, 32, 384, 96)))
        assert sample.size == (224, 224)
        # resized to 0, 64, 192, 192; 16 pixels go at every side
        np.testing.assert_array_equal(sample.boxes, [[0, 48, 176, 176]])
        check_aligned(sample)

    def test_center_crop_that_keeps_the_aspect_ratio(self):
        sample = ResizeCenterCrop(256, 224, keep_aspect=True)(make_sample(128, 512, (200, 32, 384, 96)))
        # resized to 256 x 1024: 400, 64, 768, 192; 400 columns and 16 rows go at every side
        np.testing.assert_array_equal(sample.boxes, [[0, 48, 224, 176]])
        check_aligned(sample)

    @pytest.mark.parametrize(
        ("size", "resized", "window"),
        [((37, 81), (64, 140), (4, 42)), ((81, 37), (140, 64), (42, 4)), ((333, 500), (64, 96), (4, 20))],
    )
    def test_center_crop_sizes_and_offsets_are_torchvision_s(self, size, resized, window):
        """Recorded from torchvision: the longer side is rounded down, half an odd remainder to the even number."""
        image = np.random.default_rng(4).integers(0, 256, (*size, 3), dtype=np.uint8)
        picture = Image.fromarray(image).resize(resized[::-1], Image.Resampling.BILINEAR)
        expected = np.asarray(picture)[window[0] :, window[1] :][:57, :57]
        got = ResizeCenterCrop(64, 57, keep_aspect=True)(Sample(image, "x", (0,)))
        np.testing.assert_array_equal(got.image, expected)

    def test_random_crop_reaches_every_window(self):
        transform = ResizeRandomCrop(20, 18)
        sample = make_sample(20, 20, (9, 9, 10, 10))
        boxes = {tuple(transform(sample, np.random.default_rng(seed)).boxes[0]) for seed in range(100)}
        assert {box[:2] for box in boxes} == {(x, y) for x in (7, 8, 9) for y in (7, 8, 9)}
        check_aligned(transform(sample, np.random.default_rng(0)))
        with pytest.raises(ParameterError, match="does not lie in a 20x20 image"):
            ResizeRandomCrop(20, 24)(sample, np.random.default_rng(0))


class TestAugmentation:
    transform = Compose(
        [ResizeRandomCrop(30, 24), RandomHorizontalFlip(), RandomShift(5), RandomBrightnessContrast(0.3, 0.3)]
    )

    def test_same_generator_state_same_result(self):
        rng = np.random.default_rng(5)
        sample = random_sample(rng)
        first, second = (self.transform(sample, np.random.default_rng(7)) for _ in range(2))
        for field in ("image", "mask", "parts", "boxes", "box_labels"):
            np.testing.assert_array_equal(getattr(first, field), getattr(second, field))
        others = [self.transform(sample, np.random.default_rng(seed)).image for seed in range(8)]
        assert any((first.image != other).any() for other in others)

    def test_whole_chain_stays_aligned(self):
        rng = np.random.default_rng(6)
        chain = Compose(self.transform.transforms[:3])
        for _ in range(40):
            sample = make_sample(30, 30, (6, 9, 21, 24))
            check_aligned(chain(sample, rng))

    def test_flip_probability(self):
        sample = make_sample(4, 4, (0, 0, 1, 1))
        rng = np.random.default_rng(0)
        count = sum(RandomHorizontalFlip(0.3)(sample, rng).boxes[0, 0] > 0 for _ in range(1000))
        assert 240 < count < 360

    def test_brightness_and_contrast(self):
        rng = np.random.default_rng(8)
        sample = make_sample(8, 8, (2, 2, 6, 6))
        sample.image = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        same = RandomBrightnessContrast(0, 0)(sample, rng)
        np.testing.assert_array_equal(same.image, sample.image)
        state = np.random.default_rng(9)
        gain, stretch = 1 + state.uniform(-1, 1, 2) * (0.5, 0.25)
        values = sample.image.astype(float)
        expected = np.rint(gain * (values.mean() + stretch * (values - values.mean()))).clip(0, 255)
        got = RandomBrightnessContrast(0.5, 0.25)(sample, np.random.default_rng(9))
        np.testing.assert_array_equal(got.image, expected)
        assert got.mask is sample.mask
        np.testing.assert_array_equal(got.boxes, sample.boxes)


def test_rand_augment_is_timms_drawn_from_the_generator_alone():
    from timm.data.auto_augment import rand_augment_transform

    sample = make_sample(40, 60, (10, 5, 30, 25))
    options = {"translate_const": 18, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    plain = rand_augment_transform("rand-m9-mstd0.5-inc1", options)
    random.seed(7)
    np.random.seed(8)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    seen = set()
    for seed in range(12):
        found = RandAugment()(sample, np.random.default_rng(seed))
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
        own = int(np.random.default_rng(seed).integers(2**32))
        random.seed(own)
        np.random.seed(own)  # noqa: NPY002
        np.testing.assert_array_equal(found.image, np.array(plain(Image.fromarray(sample.image))))
        random.seed(7)
        np.random.seed(8)  # noqa: NPY002
        seen.add(found.image.tobytes())
        assert found.image.shape == sample.image.shape
        assert (found.image_id, found.labels) == (sample.image_id, sample.labels)
        assert found.mask is None  # the truth cannot follow
        assert found.parts is None
        assert len(found.boxes) == 0
    assert len(seen) >= 8
    assert len(sample.boxes) == 1
