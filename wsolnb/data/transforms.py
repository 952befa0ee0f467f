"""Transforms that move an image and all of its truth together.

A transform is called with a sample and a random generator, and returns a new sample. Boxes, mask and parts follow the
image, so truth of one protocol cannot be compared with maps of another. Random transforms take all of their randomness
from the generator; the others need no generator.

The two test protocols of the papers are `Resize(224)` (SCM, TS-CAM) and `ResizeCenterCrop(256, 224)` (PPD, LocLoc).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import cv2
import numpy as np
from PIL import Image

from wsolnb.data.sample import CONTEXT, IGNORE, Sample
from wsolnb.errors import ParameterError, check_choice

Transform = Callable[[Sample, np.random.Generator], Sample]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

# ------------------------------------------------------------------------------------------------------- mechanism


def _move(
    sample: Sample, image: np.ndarray, rows: np.ndarray, columns: np.ndarray, boxes: np.ndarray,
    clip: Literal["not", "drop", "keep"],
) -> Sample:  # fmt: skip
    """Return the sample with a new image and its truth brought to the same place.

    rows, columns: for each row and column of the new image the one of the old image that it shows, -1 for none.
    boxes: (n, 4), moved. clip: `not`, or cut them off at the image, and `drop` or `keep` those of which nothing is
        left.
    """
    kept = slice(None)
    if clip != "not":
        boxes = np.clip(boxes, 0, (image.shape[1], image.shape[0]) * 2)
    if clip == "drop":
        kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return replace(
        sample,
        image=np.ascontiguousarray(image),
        boxes=boxes[kept],
        box_labels=sample.box_labels[kept],
        mask=_take(sample.mask, rows, columns, IGNORE),
        parts=_take(sample.parts, rows, columns, CONTEXT),
    )


def _take(values: np.ndarray | None, rows: np.ndarray, columns: np.ndarray, outside: int) -> np.ndarray | None:
    if values is None:
        return None
    taken = values[rows][:, columns]
    taken[rows < 0] = outside
    taken[:, columns < 0] = outside
    return taken


def _window(
    sample: Sample, top: int, left: int, size: tuple[int, int], border: int = 0, colour: Sequence[int] = (),
    clip: Literal["drop", "keep"] = "drop",
) -> Sample:  # fmt: skip
    """Return the window of `size` whose first pixel is (top, left); beyond the image it shows OpenCV's `border`."""
    rows, columns = np.arange(size[0]) + top, np.arange(size[1]) + left
    around = []
    for places, side in ((rows, sample.size[0]), (columns, sample.size[1])):
        around += [max(-places[0], 0), max(places[-1] + 1 - side, 0)]
        places[(places < 0) | (places >= side)] = -1
    image = cv2.copyMakeBorder(sample.image, *around, border, value=colour) if any(around) else sample.image
    image = image[max(top, 0) :, max(left, 0) :][: size[0], : size[1]]
    return _move(sample, image, rows, columns, sample.boxes - np.array([left, top, left, top]), clip)


def _nearest(old: int, new: int) -> np.ndarray:
    """Return for each of `new` pixels along an axis the old pixel that holds its centre: floor((i + 1/2) old / new)."""
    return (2 * np.arange(new) + 1) * old // (2 * new)


def resize_map(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a map of classes (H, W) at `size` (height, width), by nearest pixel centre (no class is made up)."""
    rows, columns = _nearest(values.shape[0], size[0]), _nearest(values.shape[1], size[1])
    return values[rows][:, columns]


def resize(sample: Sample, size: tuple[int, int], interpolation: Interpolation = "bilinear") -> Sample:
    """Return the whole sample at `size` (height, width) in pixels.

    Pillow interpolates the image, and averages over all pixels that a smaller image merges. Mask and parts take the
    nearest pixel centre. Boxes are scaled exactly and not clipped.
    Raises ParameterError for an unknown interpolation.
    """
    check_choice("no interpolation", interpolation, get_args(Interpolation))
    (height, width), (old_height, old_width) = size, sample.size
    if size == sample.size:
        return sample
    image = Image.fromarray(sample.image).resize((width, height), Image.Resampling[interpolation.upper()])
    # Multiplied before divided: corners that fall on whole pixels do so exactly, and protocols may truncate them.
    boxes = sample.boxes * ((width, height) * 2) / ((old_width, old_height) * 2)
    return _move(sample, np.array(image), _nearest(old_height, height), _nearest(old_width, width), boxes, "not")


def crop(sample: Sample, top: int, left: int, size: tuple[int, int], clip: Literal["drop", "keep"] = "drop") -> Sample:
    """Return the window of `size` (height, width) whose first pixel is (top, left).

    Boxes are cut off at the window. If nothing is left of a box, it goes together with its label (`drop`), or it stays
    as a box without an area, which no prediction can hit (`keep`).
    Raises ParameterError when the window does not lie in the image.
    """
    height, width = size
    if not (0 <= top <= sample.size[0] - height and 0 <= left <= sample.size[1] - width):
        image = f"{sample.size[1]}x{sample.size[0]} image"
        problem = f"a {width}x{height} window at ({left}, {top}) does not lie in a {image}"
        raise ParameterError(problem, "crop less, or resize to more before")
    return _window(sample, top, left, size, clip=clip)


def flip(sample: Sample) -> Sample:
    """Return the sample mirrored left to right."""
    height, width = sample.size
    boxes = sample.boxes[:, [2, 1, 0, 3]] * (-1, 1, -1, 1) + (width, 0, width, 0)
    columns = np.arange(width)[::-1]
    return _move(sample, sample.image[:, ::-1], np.arange(height), columns, boxes, "not")


def shift(sample: Sample, down: int, right: int) -> Sample:
    """Return the sample moved by whole pixels (negative: up, left), at the same size.

    Where the image has moved away, it repeats its border pixels. Nothing is known there, so the mask is `IGNORE`.
    """
    return _window(sample, -down, -right, sample.size, cv2.BORDER_REPLICATE)


# ------------------------------------------------------------------------------------------------------ transforms


@dataclass(frozen=True)
class Compose:
    """Apply transforms one after the other."""

    transforms: Sequence[Transform]

    def __call__(self, sample: Sample, rng: np.random.Generator | None = None) -> Sample:
        """Return the transformed sample; `rng` is needed when one of the transforms is random."""
        for transform in self.transforms:
            sample = transform(sample, rng)
        return sample


@dataclass(frozen=True)
class Resize:
    """Resize the whole image to size x size, whatever its aspect ratio: the test protocol of SCM and TS-CAM."""

    size: int
    interpolation: Interpolation = "bilinear"

    def __call__(self, sample: Sample, rng: np.random.Generator | None = None) -> Sample:
        """Return the resized sample."""
        return resize(sample, (self.size, self.size), self.interpolation)


@dataclass(frozen=True)
class ResizeCenterCrop:
    """Resize, then keep the crop x crop pixels in the middle; image and truth lose what lies outside of them.

    A box that lies outside stays, without an area. It counts as a miss, as in the published protocol, so every image
    counts.

    keep_aspect: False resizes to resize x resize, whatever the aspect ratio. True gives the shorter side `resize`
        pixels (the longer one rounded down, as torchvision does): the test protocol of LocLoc's released code. An odd
        remainder is split as torchvision splits it.
    """

    resize: int = 256
    crop: int = 224
    keep_aspect: bool = False
    interpolation: Interpolation = "bilinear"

    def __call__(self, sample: Sample, rng: np.random.Generator | None = None) -> Sample:
        """Return the cropped sample."""
        height, width = self.resize, self.resize
        if self.keep_aspect:
            short = min(sample.size)
            height, width = (self.resize * side // short for side in sample.size)
        sample = resize(sample, (height, width), self.interpolation)
        top, left = round((height - self.crop) / 2), round((width - self.crop) / 2)
        return crop(sample, top, left, (self.crop, self.crop), "keep")


@dataclass(frozen=True)
class ResizeRandomCrop:
    """Resize to resize x resize, then keep a crop x crop window drawn anywhere in it: the papers' training protocol."""

    resize: int = 256
    crop: int = 224
    interpolation: Interpolation = "bilinear"

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the cropped sample."""
        top, left = rng.integers(0, max(0, self.resize - self.crop), 2, endpoint=True)
        sample = resize(sample, (self.resize, self.resize), self.interpolation)
        return crop(sample, top, left, (self.crop, self.crop))


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """Mirror left to right with probability `p`."""

    p: float = 0.5

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the sample, mirrored or not."""
        return flip(sample) if rng.random() < self.p else sample


@dataclass(frozen=True)
class RandomShift:
    """Move by up to `pixels` whole pixels along each axis, repeating the border; see `shift`."""

    pixels: int

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the moved sample."""
        down, right = rng.integers(-self.pixels, self.pixels, 2, endpoint=True)
        return shift(sample, down, right)


@dataclass(frozen=True)
class RandomBrightnessContrast:
    """Change the light: value -> gain * (mean + stretch * (value - mean)), rounded and clipped to 0..255.

    gain is drawn from [1 - brightness, 1 + brightness], stretch from [1 - contrast, 1 + contrast]; mean is the image's.
    """

    brightness: float = 0.2
    contrast: float = 0.2

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the sample with another image and the same truth."""
        gain, stretch = 1 + rng.uniform(-1, 1, 2) * (self.brightness, self.contrast)
        mean = sample.image.mean()
        table = np.rint(gain * (mean + stretch * (np.arange(256) - mean))).clip(0, 255).astype(np.uint8)
        return replace(sample, image=cv2.LUT(sample.image, table))


@dataclass(frozen=True)
class RandAugment:
    """Two operations on light, colour or place, drawn as timm's `rand_augment_transform` draws them.

    policy: as timm writes it: magnitude, its spread, which operations. mean: the colour, in [0, 1], of what comes into
    the image from outside.
    """

    policy: str = "rand-m9-mstd0.5-inc1"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the sample with another image and no truth: timm does not tell where it has moved the image."""
        before, seed = (random.getstate(), np.random.get_state()), int(rng.integers(2**32))  # noqa: NPY002
        try:  # timm draws from the states of the process
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            image = _rand_augment(self.policy, min(sample.size), self.mean)(Image.fromarray(sample.image))
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
        return Sample(np.array(image), sample.image_id, sample.labels)


@functools.cache
def _rand_augment(policy: str, side: int, mean: tuple[float, float, float]) -> Callable[[Image.Image], Image.Image]:
    """Return timm's transform for images whose shorter side is given, as its training on ImageNet sets it up."""
    from timm.data.auto_augment import rand_augment_transform

    colour = tuple(min(255, round(255 * channel)) for channel in mean)
    options = {"translate_const": int(0.45 * side), "img_mean": colour, "interpolation": Image.Resampling.BICUBIC}
    return rand_augment_transform(policy, options)


@dataclass(frozen=True)
class RandomLongSideCrop:
    """Resize so that the longer side is drawn from `long_side`, then crop, or pad, to a random window of `crop` pixels:
    how LPCAM's released program trains on photographs.

    Padding has the colour `mean` of the normalisation, in [0, 1], so that the network sees zeros; the mask is `IGNORE`
    there.
    """

    long_side: tuple[int, int] = (320, 640)
    crop: int = 512
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the crop x crop sample."""
        factor = int(rng.integers(*self.long_side, endpoint=True)) / max(sample.size)
        height, width = (max(1, round(side * factor)) for side in sample.size)
        sample = resize(sample, (height, width))
        window = (min(self.crop, height), min(self.crop, width))
        top, left = (int(rng.integers(0, side - kept, endpoint=True)) for side, kept in zip((height, width), window))  # noqa: B905
        sample = crop(sample, top, left, window)
        down, right = (int(rng.integers(0, self.crop - kept, endpoint=True)) for kept in window)
        colour = [round(255 * channel) for channel in self.mean]
        return _window(sample, -down, -right, (self.crop, self.crop), cv2.BORDER_CONSTANT, colour)


@dataclass(frozen=True)
class RandomScaleCrop:
    """Resize by a factor drawn from `scale`, then crop, or pad, to a random window of `crop` pixels."""

    scale: tuple[float, float]
    crop: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the crop x crop sample; the mask is `IGNORE` where the image was padded."""
        side = max(1, round(max(sample.size) * rng.uniform(*self.scale)))
        return RandomLongSideCrop((side, side), self.crop, self.mean)(sample, rng)
