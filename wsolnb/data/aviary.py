"""The rendered benchmark: birds made of parts, with the truth of every pixel.

A bird has a head, beak, body, wing, tail and legs. Its class is a pair (cap colour, cheek colour) painted on the head;
nothing else is needed to tell it, and neither colour alone is enough. How much the rest of the bird and the background
*also* tell is up to two dials, `body_cue` and `context_correlation`: they make a classifier look at the head alone
(partial activation), at the whole bird, or at the background.

Two variants are written to disk in the layouts of the data sets they stand for, and read back by the same readers:
`single` (one bird an image) as CUB-200-2011 with `segmentations/` and `part_maps/`, and `scenes` (one to three birds of
different classes) as VOC2012 with `PartMaps/`.

Image `i` of a split depends on (configuration, split, i) only, so any part of the benchmark can be rendered alone.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

import cv2
import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from wsolnb import keys
from wsolnb.data.base import LocalizationDataset
from wsolnb.data.cub import CUB
from wsolnb.data.rendered import is_whole, rendering_key, seal
from wsolnb.data.sample import CONTEXT, DISCRIMINATIVE, REST, Sample, tight_box
from wsolnb.data.voc import VOC
from wsolnb.errors import DataError, ParameterError, nearest

FORMAT = 1
"""Raised whenever the renderer's output changes on purpose: recorded truths name the format that they are of."""

SPLITS = ("train", "val", "test")
BACKGROUNDS = ("sky", "water", "foliage", "grass")

# Head colours (RGB). With k of them there are k (k - 1) ordered pairs of different colours: 4 make 12 classes.
HEAD_COLOURS = {
    "red": (205, 38, 42),
    "yellow": (238, 202, 40),
    "blue": (38, 84, 205),
    "white": (240, 238, 232),
    "black": (26, 24, 30),
    "green": (40, 160, 74),
    "violet": (150, 62, 190),
}
PLUMAGES = (
    (150, 104, 66),
    (112, 118, 126),
    (196, 160, 112),
    (92, 78, 70),
    (140, 132, 84),
    (176, 120, 116),
)
PATTERNS = ("plain", "spots", "bars")
MAX_CLASSES = len(HEAD_COLOURS) * (len(HEAD_COLOURS) - 1)

# Part codes inside the renderer; on disk they are reduced to CONTEXT, DISCRIMINATIVE and REST.
_BODY, _HEAD = 1, 2
_SUPERSAMPLE = 2
_FIXED = 4  # fractional bits of polygon coordinates given to OpenCV: integers, so rasterisation is exact


class AviaryConfig(BaseModel):
    """Everything that decides the rendered benchmark. Shares and probabilities are in [0, 1].

    variant: `single` (one bird an image, CUB layout) or `scenes` (1 to 3 birds of different classes, VOC layout).
    classes: number of classes, 2 to 42.
    size: image side in pixels.
    train, val, test: images per split; 0 takes the variant's default (2,400/300/600 and 1,600/300/300).
    body_cue: probability that the body wears the plumage of its class instead of one drawn at random.
    context_correlation: probability that the background is the one of the (first) bird's class.
    scale: range of the bird's longer side as a share of the image side; None takes the variant's default.
    off_centre: 0 puts the bird in the middle, 1 anywhere inside the image.
    occlusion: probability that a branch or leaves hide part of a bird (never most of its head).
    distractors: mean number of berries, flowers and stones in head colours.
    seed: of everything that is drawn.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: Literal["single", "scenes"] = "single"
    classes: int = Field(12, ge=2, le=MAX_CLASSES)
    size: int = Field(112, ge=32, le=1024)
    train: int = Field(0, ge=0)
    val: int = Field(0, ge=0)
    test: int = Field(0, ge=0)
    body_cue: float = Field(0.2, ge=0, le=1)
    context_correlation: float = Field(0.0, ge=0, le=1)
    scale: tuple[float, float] | None = None
    off_centre: float = Field(1.0, ge=0, le=1)
    occlusion: float = Field(0.35, ge=0, le=1)
    distractors: float = Field(3.0, ge=0, le=20)
    seed: int = Field(0, ge=0)

    def __init__(self, **values):
        unknown = [name for name in values if name not in type(self).model_fields]
        if unknown:
            hint = nearest(unknown[0], type(self).model_fields)
            known = ", ".join(type(self).model_fields)
            raise ParameterError(f"the aviary has no parameter {unknown[0]!r}{hint}", f"choose among {known}")
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "aviary"
            raise ParameterError(f"aviary parameter {name}: {first['msg']}", f"got {first['input']!r}") from error

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: dict) -> dict:
        """Write the variant's defaults out, so that equal benchmarks have equal configurations and hashes."""
        single = values.get("variant", "single") == "single"
        counts = (2400, 300, 600) if single else (1600, 300, 300)
        filled = dict(values)
        for split, count in zip(SPLITS, counts, strict=True):
            filled[split] = values.get(split) or count
        if filled.get("scale") is None:
            filled["scale"] = (0.38, 0.92) if single else (0.30, 0.62)
        return filled

    @model_validator(mode="after")
    def _check_scale(self) -> AviaryConfig:
        low, high = self.scale
        if not 0.1 <= low <= high <= 1:
            raise ValueError("scale must be (low, high) with 0.1 <= low <= high <= 1")
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names such as `red_cap_yellow_cheek`, index = class index."""
        return tuple(f"{cap}_cap_{cheek}_cheek" for cap, cheek in self.head_patterns)

    @property
    def head_patterns(self) -> tuple[tuple[str, str], ...]:
        """The (cap, cheek) colour names of each class: ordered pairs of different colours, from the fewest colours."""
        colours = 2
        while colours * (colours - 1) < self.classes:
            colours += 1
        names = list(HEAD_COLOURS)[:colours]
        return tuple((a, b) for a in names for b in names if a != b)[: self.classes]

    @property
    def key(self) -> str:
        """Hash of the configuration and of the format."""
        return keys.digest(json.dumps({"format": FORMAT, **self.model_dump()}, sort_keys=True))[:12]


# ---------------------------------------------------------------------------------------------------- backgrounds


def _value_noise(rng: np.random.Generator, size: int, cells: tuple[int, int], octaves: int = 1) -> np.ndarray:
    """Smooth noise (size, size) float32, about [-1, 1]: random grids of rising resolution, upsampled and added."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        rows, columns = (min(size, c << octave) for c in cells)
        grid = rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
        total += cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC) * 0.6**octave
    return total


def _jitter(rng: np.random.Generator, colour: tuple[int, int, int], spread: float) -> np.ndarray:
    return np.clip(np.asarray(colour, np.float32) + rng.normal(0, spread, 3).astype(np.float32), 0, 255)


def _background(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    """Render a background, (size, size, 3) float32 in [0, 255]."""
    ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    if kind == "sky":
        top, bottom = _jitter(rng, (92, 140, 205), 18), _jitter(rng, (205, 222, 238), 14)
        image = top * (1 - ramp) + bottom * ramp
        clouds = np.clip(_value_noise(rng, size, (3, 4), 3) + rng.uniform(-0.5, 0.3), 0, 1)[..., None]
        return image * (1 - 0.7 * clouds) + 245.0 * 0.7 * clouds
    if kind == "water":
        top, bottom = _jitter(rng, (120, 165, 180), 16), _jitter(rng, (38, 88, 118), 16)
        image = top * (1 - ramp) + bottom * ramp
        ripple = _value_noise(rng, size, (int(rng.integers(14, 30)), 3), 2)[..., None]
        return image + 22.0 * ripple
    if kind == "foliage":
        dark, light = _jitter(rng, (34, 66, 32), 10), _jitter(rng, (112, 150, 70), 16)
        noise = np.clip(0.5 + 0.5 * _value_noise(rng, size, (7, 7), 3), 0, 1)[..., None]
        image = np.ascontiguousarray(dark * (1 - noise) + light * noise)
        for _ in range(int(rng.integers(8, 20))):
            centre = rng.integers(0, size, 2).tolist()
            axes = (int(rng.integers(4, 11)), int(rng.integers(2, 5)))
            shade = (dark + (light - dark) * rng.uniform(0, 1.2)).tolist()
            cv2.ellipse(image, centre, axes, float(rng.uniform(0, 180)), 0, 360, shade, -1, cv2.LINE_AA)
        return image
    soil, blade = _jitter(rng, (112, 124, 62), 14), _jitter(rng, (70, 122, 44), 16)
    image = np.ascontiguousarray(soil * (1 - 0.35 * ramp) + 14.0 * _value_noise(rng, size, (6, 6), 3)[..., None])
    count = int(rng.integers(50, 90))
    x, y = rng.uniform(0, size, count), rng.uniform(0.1 * size, 1.1 * size, count)
    dx, dy = rng.normal(0, 0.05 * size, count), -rng.uniform(0.06, 0.2, count) * size
    gains = rng.uniform(0.65, 1.35, count)
    for i in range(count):
        start, end = (int(x[i]), int(y[i])), (int(x[i] + dx[i]), int(y[i] + dy[i]))
        cv2.line(image, start, end, np.minimum(blade * gains[i], 255).tolist(), 1, cv2.LINE_AA)
    return image


# ---------------------------------------------------------------------------------------------------------- birds


def _ellipse(cx: float, cy: float, a: float, b: float, angle: float = 0.0, points: int = 28) -> np.ndarray:
    """Points (points, 2) of an ellipse with semi-axes a, b, turned by `angle` radians."""
    t = np.linspace(0, 2 * math.pi, points, endpoint=False)
    c, s = math.cos(angle), math.sin(angle)
    x, y = a * np.cos(t), b * np.sin(t)
    return np.stack([cx + c * x - s * y, cy + s * x + c * y], axis=1)


def _stroke(start: tuple[float, float], end: tuple[float, float], width: float) -> np.ndarray:
    """Points (4, 2) of a straight bar of a given width."""
    (x0, y0), (x1, y1) = start, end
    length = math.hypot(x1 - x0, y1 - y0) or 1.0
    nx, ny = -(y1 - y0) / length * width / 2, (x1 - x0) / length * width / 2
    return np.array([(x0 + nx, y0 + ny), (x1 + nx, y1 + ny), (x1 - nx, y1 - ny), (x0 - nx, y0 - ny)])


def _bird(
    rng: np.random.Generator, pattern: tuple[str, str], plumage: tuple[int, str]
) -> list[tuple[np.ndarray, np.ndarray, int, int]]:
    """Build one bird in its own coordinates (facing right, y downwards, body about one unit long).

    Returns layers back to front: (points (n, 2), colour (3,), part code, clip) where `clip` names the earlier layer
    (by index) inside which the layer is painted, or -1. Painting inside a layer (spots, cap, cheek) adds no area.
    """
    base = _jitter(rng, PLUMAGES[plumage[0]], 9)
    dark, light = base * rng.uniform(0.55, 0.72), np.minimum(base * rng.uniform(1.15, 1.35) + 12, 255)
    horn = _jitter(rng, ((222, 150, 40), (60, 56, 54), (188, 170, 140))[rng.integers(3)], 10)
    layers: list[tuple[np.ndarray, np.ndarray, int, int]] = []

    def add(points: np.ndarray, colour: np.ndarray, part: int = _BODY, clip: int = -1) -> int:
        layers.append((points, np.asarray(colour, np.float32), part, clip))
        return len(layers) - 1

    flying = rng.random() < 0.25
    a, b = rng.uniform(0.44, 0.52), rng.uniform(0.28, 0.36)
    lean = rng.uniform(-0.45, 0.05)  # radians; negative raises the front
    front = np.array([math.cos(lean), math.sin(lean)])
    up = np.array([front[1], -front[0]])
    radius = rng.uniform(0.17, 0.205)
    neck = rng.uniform(0.02, 0.20)
    head = front * (a * 0.86) + up * (b * 0.55 + neck) + np.array([radius * 0.25, -radius * 0.25])

    rump = -front * a * 0.82
    tail_angle = math.pi + lean + rng.uniform(-0.35, 0.3)
    tail_tip = rump + rng.uniform(0.30, 0.50) * np.array([math.cos(tail_angle), math.sin(tail_angle)])
    across = np.array([-math.sin(tail_angle), math.cos(tail_angle)])
    fan = rng.uniform(0.09, 0.18)
    tail = np.array([rump + across * 0.07, tail_tip + across * fan, tail_tip - across * fan, rump - across * 0.07])
    add(tail, dark)

    if not flying:
        reach = b + rng.uniform(0.18, 0.30)
        for offset in (-0.10, 0.08):
            foot = np.array([offset + rng.uniform(-0.04, 0.04), reach])
            add(_stroke((offset, b * 0.6), tuple(foot), 0.045), horn)
            add(_stroke((foot[0] - 0.05, foot[1]), (foot[0] + 0.11, foot[1]), 0.035), horn)
    else:
        tip = -front * rng.uniform(0.05, 0.35) + up * rng.uniform(0.6, 0.85)
        add(np.array([front * 0.28 + up * b * 0.5, tip, -front * 0.25 + up * b * 0.5]), dark * 0.9)

    body = add(_ellipse(0, 0, a, b, lean), base)
    bridge = np.array(
        [front * a * 0.45 + up * b * 0.75, head - front * radius * 0.8, head + front * radius * 0.5, front * a * 0.9]
    )
    add(bridge, base)
    if plumage[1] == "spots":
        for _ in range(int(rng.integers(12, 20))):
            u, v = rng.uniform(-0.85, 0.85, 2)
            add(_ellipse(*(front * a * u + up * b * v), 0.035, 0.03, points=8), dark, clip=body)
    elif plumage[1] == "bars":
        for u in np.linspace(-0.8, 0.8, int(rng.integers(5, 8))):
            centre = front * a * u
            add(_stroke(tuple(centre + up * b), tuple(centre - up * b), 0.05), dark, clip=body)
    add(_ellipse(*(-up * b * 0.55), a * 0.75, b * 0.42, lean), light, clip=body)

    if flying:
        tip = -front * rng.uniform(0.15, 0.5) + up * rng.uniform(0.65, 0.95)
        add(np.array([front * 0.22, tip, -front * 0.12 + up * 0.3, -front * 0.3]), dark)
    else:
        add(_ellipse(*(-front * a * 0.22 + up * b * 0.12), a * 0.62, b * 0.5, lean + rng.uniform(0.0, 0.3)), dark)

    beak_angle = rng.uniform(-0.15, 0.3)
    ahead = np.array([math.cos(beak_angle), math.sin(beak_angle)])
    side = np.array([-ahead[1], ahead[0]])
    root = head + ahead * radius * 0.85
    length = rng.uniform(0.14, 0.32)
    add(np.array([root + side * 0.06, root + ahead * length, root - side * 0.06]), horn)

    cap, cheek = (_jitter(rng, HEAD_COLOURS[name], 12) for name in pattern)
    skull = add(_ellipse(*head, radius, radius * rng.uniform(0.92, 1.05)), cheek, _HEAD)
    # The cap is everything of the head above a line, so cap and cheek share the head about equally.
    turn = beak_angle + rng.uniform(-0.25, 0.1)
    along, above = np.array([math.cos(turn), math.sin(turn)]), np.array([math.sin(turn), -math.cos(turn)])
    edge = head + above * radius * rng.uniform(-0.12, 0.12)
    wide, high = along * radius * 2, above * radius * 2.5
    add(np.array([edge - wide, edge + wide, edge + wide + high, edge - wide + high]), cap, _HEAD, skull)
    eye = head + ahead * radius * 0.38 - side * radius * 0.1
    add(_ellipse(*eye, radius * 0.2, radius * 0.2, points=12), np.array([235, 235, 225]), _HEAD, skull)
    add(_ellipse(*eye, radius * 0.12, radius * 0.12, points=10), np.array([12, 12, 14]), _HEAD, skull)
    return layers


def _place(rng: np.random.Generator, layers: list, size: int, scale: tuple[float, float], off_centre: float) -> list:
    """Mirror, turn, scale and shift a bird's layers into an image of `size` pixels; the whole bird stays inside."""
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    angle = rng.uniform(-0.35, 0.35)
    c, s = math.cos(angle), math.sin(angle)
    turn = np.array([[mirror * c, mirror * s], [-s, c]])
    placed = [(points @ turn, colour, part, clip) for points, colour, part, clip in layers]
    outline = np.concatenate([points for points, _, _, clip in placed if clip < 0])
    low, high = outline.min(axis=0), outline.max(axis=0)
    factor = rng.uniform(*scale) * size / float((high - low).max())
    free = size - (high - low) * factor
    # Beta(.5, .5) prefers the borders: a centred box must not be a good guess.
    share = 0.5 + off_centre * (rng.beta(0.5, 0.5, 2) - 0.5)
    origin = free * share - low * factor
    return [(points * factor + origin, colour, part, clip) for points, colour, part, clip in placed]


def _fill(canvas: np.ndarray, points: np.ndarray, colour) -> None:
    """Fill a polygon given in image pixels on a supersampled canvas."""
    # A pixel centre lies at integer coordinates for OpenCV and at +0.5 for us.
    fixed = np.rint((points * _SUPERSAMPLE - 0.5) * (1 << _FIXED)).astype(np.int32)
    cv2.fillPoly(canvas, [fixed], colour, cv2.LINE_8, _FIXED)


def _paint(layers: list, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a placed bird. Returns colour (size, size, 3) premultiplied, opacity (size, size), head share, float32."""
    side = size * _SUPERSAMPLE
    colour = np.zeros((side, side, 3), np.float32)
    part = np.zeros((side, side), np.uint8)
    inside: dict[int, np.ndarray] = {}
    clipped_to = {clip for _, _, _, clip in layers if clip >= 0}
    for index, (points, tint, code, clip) in enumerate(layers):
        if index in clipped_to:
            inside[index] = np.zeros((side, side), np.uint8)
            _fill(inside[index], points, 1)
        if clip < 0:
            _fill(colour, points, tint.tolist())
            _fill(part, points, code)
            continue
        low = np.maximum(np.floor(points.min(axis=0) * _SUPERSAMPLE).astype(int) - 1, 0)
        high = np.ceil(points.max(axis=0) * _SUPERSAMPLE).astype(int) + 2
        window = slice(low[1], high[1]), slice(low[0], high[0])
        if inside[clip][window].size == 0:
            continue
        shape = np.zeros(inside[clip][window].shape, np.uint8)
        _fill(shape, points - low / _SUPERSAMPLE, 1)
        colour[window][(shape & inside[clip][window]) > 0] = tint
    down = {"dsize": (size, size), "interpolation": cv2.INTER_AREA}
    opacity = cv2.resize((part > 0).astype(np.float32), **down)
    head = cv2.resize((part == _HEAD).astype(np.float32), **down)
    return cv2.resize(colour, **down), opacity, head


def _shade(rng: np.random.Generator, colour: np.ndarray, opacity: np.ndarray, size: int) -> np.ndarray:
    """Light a bird from above and roughen its plumage; `colour` stays premultiplied."""
    rows = np.flatnonzero(opacity.any(axis=1))
    position = (np.arange(size, dtype=np.float32) - rows[0]) / max(1, rows[-1] - rows[0])
    light = rng.uniform(1.08, 1.22) - rng.uniform(0.2, 0.4) * np.clip(position, 0, 1)
    rough = 1 + 0.06 * _value_noise(rng, size, (size // 6, size // 6))
    return colour * (light[:, None] * rough)[..., None]


def _occluder(rng: np.random.Generator, box: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a branch or a bunch of leaves over a box. Returns premultiplied colour (H, W, 3) and opacity (H, W)."""
    side = size * _SUPERSAMPLE
    colour, opacity = np.zeros((side, side, 3), np.float32), np.zeros((side, side), np.float32)
    x0, y0, x1, y1 = box
    width = max(x1 - x0, y1 - y0)
    centre = np.array([rng.uniform(x0, x1), rng.uniform(y0, y1)])
    shapes: list[tuple[np.ndarray, np.ndarray]] = []
    if rng.random() < 0.5:
        angle, reach = rng.uniform(-0.6, 0.6), 1.5 * size
        step = reach * np.array([math.cos(angle), math.sin(angle)])
        bark = _jitter(rng, (94, 72, 50), 10)
        shapes.append((_stroke(tuple(centre - step), tuple(centre + step), rng.uniform(0.06, 0.12) * width), bark))
    else:
        for _ in range(int(rng.integers(3, 7))):
            spot = centre + rng.normal(0, 0.12 * width, 2)
            axes = rng.uniform(0.10, 0.17) * width, rng.uniform(0.05, 0.08) * width
            shapes.append((_ellipse(*spot, *axes, rng.uniform(0, math.pi)), _jitter(rng, (70, 116, 48), 16)))
    for points, tint in shapes:
        _fill(colour, points, tint.tolist())
        _fill(opacity, points, 1.0)
    down = {"dsize": (size, size), "interpolation": cv2.INTER_AREA}
    return cv2.resize(colour, **down), cv2.resize(opacity, **down)


def _add_distractors(rng: np.random.Generator, image: np.ndarray, count: int, palette: list[tuple]) -> None:
    """Draw berries, flowers and stones in place: patches in head colours that are no bird."""
    size = image.shape[0]
    for _ in range(count):
        centre = rng.uniform(0, size, 2)
        radius = rng.uniform(0.018, 0.045) * size
        tint = _jitter(rng, palette[rng.integers(len(palette))], 10)
        kind = rng.integers(3)
        if kind == 0:
            offsets = rng.normal(0, radius, (3, 2))
            blobs = [(centre + offset, radius * 0.8, tint) for offset in offsets]
        elif kind == 1:
            heart = _jitter(rng, palette[rng.integers(len(palette))], 10)
            turns = np.arange(5) * (2 * math.pi / 5) + rng.uniform(0, 1)
            petals = centre + radius * np.stack([np.cos(turns), np.sin(turns)], axis=1)
            blobs = [(petal, radius * 0.62, tint) for petal in petals] + [(centre, radius * 0.55, heart)]
        else:
            blobs = [(centre, radius * 1.3, _jitter(rng, (128, 124, 118), 18))]
        for spot, extent, colour in blobs:
            at = np.rint(spot * 16).astype(int).tolist()
            cv2.circle(image, at, max(16, round(extent * 16)), colour.tolist(), -1, cv2.LINE_AA, 4)


# ---------------------------------------------------------------------------------------------------------- images


def render(config: AviaryConfig, split: str, index: int) -> Sample:
    """Render image `index` of a split, with its truth.

    Boxes are the tight boxes of what is visible of each bird; a pixel belongs to a bird that covers at least half of
    it. The sample follows the variant: single-label with mask 0/1, or multi-label with mask values class + 1.
    """
    if split not in SPLITS:
        raise DataError(f"the aviary has no split {split!r}{nearest(split, SPLITS)}", f"choose one of {SPLITS}")
    rng = np.random.default_rng([config.seed, SPLITS.index(split), index])
    size, scenes = config.size, config.variant == "scenes"
    # Classes in turn: every split is balanced.
    first = index % config.classes
    count = int(rng.integers(1, min(3, config.classes) + 1)) if scenes else 1
    others = rng.permutation([c for c in range(config.classes) if c != first])[: count - 1]
    classes = [first, *(int(c) for c in others)]

    kind = BACKGROUNDS[first % len(BACKGROUNDS)]
    if rng.random() >= config.context_correlation:
        kind = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    background = _background(rng, kind, size)
    palette = [HEAD_COLOURS[name] for name in sorted({n for pair in config.head_patterns for n in pair})]
    _add_distractors(rng, background, int(rng.poisson(config.distractors)), palette)

    while True:
        image = background.copy()
        owner = np.zeros((size, size), np.uint8)  # which bird is seen at a pixel: 0 none, else position + 1
        head_seen = np.zeros((size, size), bool)
        whole, heads = [], []
        for position, label in enumerate(classes):
            own = rng.random() < config.body_cue
            choice = label if own else int(rng.integers(config.classes))
            plumage = (choice % len(PLUMAGES), PATTERNS[(choice // len(PLUMAGES) + choice) % len(PATTERNS)])
            layers = _place(
                rng, _bird(rng, config.head_patterns[label], plumage), size, config.scale, config.off_centre
            )
            colour, opacity, head = _paint(layers, size)
            image = image * (1 - opacity[..., None]) + _shade(rng, colour, opacity, size)
            seen = opacity >= 0.5
            owner[seen] = position + 1
            head_seen[seen] = (head >= 0.5 * opacity)[seen]
            whole.append(int(seen.sum()))
            heads.append(int((seen & (head >= 0.5 * opacity)).sum()))
        for position in range(count):
            if rng.random() < config.occlusion and (owner == position + 1).any():
                colour, opacity = _occluder(rng, tight_box(owner == position + 1), size)
                image = image * (1 - opacity[..., None]) + colour
                owner[opacity >= 0.5] = 0
        head_seen &= owner > 0
        # The head must be told and the bird be found: redraw a layout that hides too much of either.
        visible = [(owner == p + 1).sum() / max(1, whole[p]) for p in range(count)]
        heads_left = [(head_seen & (owner == p + 1)).sum() / max(1, heads[p]) for p in range(count)]
        if min(visible) >= 0.5 and min(heads_left) >= 0.7:
            break

    parts = np.where(head_seen, DISCRIMINATIVE, np.where(owner > 0, REST, CONTEXT)).astype(np.uint8)
    labels = np.array(classes)
    values = labels + 1 if scenes else np.ones(count, int)
    mask = np.concatenate([[0], values]).astype(np.uint8)[owner]
    boxes = np.stack([tight_box(owner == p + 1) for p in range(count)])
    return Sample(
        image=_photograph(rng, image),
        image_id=f"{split}_{index:05d}",
        labels=tuple(sorted(classes)),
        boxes=boxes,
        box_labels=labels.astype(np.int64),
        mask=mask,
        parts=parts,
    )


def _photograph(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Expose, blur and grain the scene, (H, W, 3) float32 -> uint8."""
    gain = rng.uniform(0.6, 1.15) * (1 + rng.normal(0, 0.05, 3))
    image = np.clip(image * gain.astype(np.float32), 0, 255)
    sigma = rng.uniform(0, 1.0)
    if sigma > 0.25:
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    image = image + rng.uniform(1, 10) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------- disk


def ensure(config: AviaryConfig, cache: str | Path, workers: int | None = None) -> Path:
    """Return the folder of the rendered benchmark under `cache`, rendering it first if it is not there.

    The folder appears only when it is complete: an interrupted rendering leaves nothing that could be mistaken for it.
    workers: processes; default all cores. Raises DataError when the cache cannot be written.
    """
    cache = Path(cache)
    target = cache / f"aviary-{config.variant}-{rendering_key(config.key, __name__)}"
    if is_whole(target):
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache))
    except OSError as error:
        raise DataError(f"cannot write the benchmark to {cache}: {error}", "choose another cache folder") from error
    try:
        _write(config, temporary, workers or os.cpu_count() or 1)
        try:
            os.replace(temporary, target)
        except OSError:
            if not target.is_dir():  # else: another process has finished the same one first
                raise
    except OSError as error:
        raise DataError(f"cannot write the benchmark to {cache}: {error}", "free space there and run again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def load(config: AviaryConfig, split: str, cache: str | Path) -> LocalizationDataset:
    """Return a split of the benchmark, read by the reader of the layout it is written in (rendered when absent)."""
    root = ensure(config, cache)
    return CUB(root, split) if config.variant == "single" else VOC(root, split)


def _write(config: AviaryConfig, root: Path, workers: int) -> None:
    jobs = [(split, index) for split in SPLITS for index in range(getattr(config, split))]
    _make_folders(config, root)
    chunks = [(config, root, jobs[start : start + 100]) for start in range(0, len(jobs), 100)]
    if workers > 1 and len(chunks) > 1:
        with ProcessPoolExecutor(workers) as pool:
            records = [record for chunk in pool.map(_write_chunk, chunks) for record in chunk]
    else:
        records = [record for chunk in map(_write_chunk, chunks) for record in chunk]
    (_index_cub if config.variant == "single" else _index_voc)(config, root, records)
    (root / "config.json").write_text(json.dumps(config.model_dump(), indent=1))
    seal(root)


def _make_folders(config: AviaryConfig, root: Path) -> None:
    if config.variant == "single":
        folders = [
            f"{kind}/{number + 1:03d}.{name}"
            for kind in ("images", "segmentations", "part_maps")
            for number, name in enumerate(config.class_names)
        ]
    else:
        folders = ["JPEGImages", "Annotations", "SegmentationClass", "PartMaps", "ImageSets/Segmentation"]
    for folder in folders:
        (root / folder).mkdir(parents=True)


def _write_chunk(job: tuple[AviaryConfig, Path, list[tuple[str, int]]]) -> list[tuple]:
    config, root, jobs = job
    cv2.setNumThreads(1)
    records = []
    for split, index in jobs:
        sample = render(config, split, index)
        if config.variant == "single":
            stem = f"{sample.label + 1:03d}.{config.class_names[sample.label]}/{sample.image_id}"
            paths = [f"images/{stem}.jpg", f"segmentations/{stem}.png", f"part_maps/{stem}.png"]
            mask, record = sample.mask * 255, (split, stem, sample.label, sample.boxes[0])
        else:
            name = sample.image_id
            paths = [f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png", f"PartMaps/{name}.png"]
            mask, record = sample.mask, (split, name, sample.box_labels, sample.boxes)
            (root / "Annotations" / f"{name}.xml").write_text(_voc_annotation(config, sample))
        # Full-resolution chroma: the head pattern is a few pixels of colour.
        Image.fromarray(sample.image).save(root / paths[0], quality=95, subsampling=0)
        for values, path in ((mask, paths[1]), (sample.parts, paths[2])):
            _save_mask(values, root / path, palette=config.variant == "scenes")
        records.append(record)
    return records


def _save_mask(values: np.ndarray, path: Path, palette: bool) -> None:
    picture = Image.fromarray(values)
    if palette:
        colours = np.random.default_rng(0).integers(40, 256, (256, 3), dtype=np.uint8)
        colours[0] = 0
        picture.putpalette(colours.tobytes())
    picture.save(path, optimize=False)


def _index_cub(config: AviaryConfig, root: Path, records: list[tuple]) -> None:
    tables: dict[str, list[str]] = {
        "classes.txt": [f"{i + 1} {i + 1:03d}.{name}" for i, name in enumerate(config.class_names)],
        "images.txt": [],
        "image_class_labels.txt": [],
        "bounding_boxes.txt": [],
        "train_test_split.txt": [],
        "train_val_test_split.txt": [],
    }
    for number, (split, stem, label, (x0, y0, x1, y1)) in enumerate(records, start=1):
        tables["images.txt"].append(f"{number} {stem}.jpg")
        tables["image_class_labels.txt"].append(f"{number} {label + 1}")
        tables["bounding_boxes.txt"].append(f"{number} {x0:.1f} {y0:.1f} {x1 - x0:.1f} {y1 - y0:.1f}")
        tables["train_test_split.txt"].append(f"{number} {int(split != 'test')}")
        tables["train_val_test_split.txt"].append(f"{number} {split}")
    for name, lines in tables.items():
        (root / name).write_text("\n".join(lines) + "\n")


def _index_voc(config: AviaryConfig, root: Path, records: list[tuple]) -> None:
    (root / "class_names.txt").write_text("\n".join(config.class_names) + "\n")
    for split in SPLITS:
        names = [name for where, name, _, _ in records if where == split]
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")


def _voc_annotation(config: AviaryConfig, sample: Sample) -> str:
    height, width = sample.size
    objects = "".join(
        f"<object><name>{escape(config.class_names[label])}</name><pose>Unspecified</pose><truncated>0</truncated>"
        f"<difficult>0</difficult><bndbox><xmin>{x0 + 1:.0f}</xmin><ymin>{y0 + 1:.0f}</ymin>"
        f"<xmax>{x1:.0f}</xmax><ymax>{y1:.0f}</ymax></bndbox></object>\n"
        for label, (x0, y0, x1, y1) in zip(sample.box_labels, sample.boxes, strict=True)
    )
    return (
        f"<annotation><folder>aviary</folder><filename>{sample.image_id}.jpg</filename>\n"
        f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size><segmented>1</segmented>\n"
        f"{objects}</annotation>\n"
    )
