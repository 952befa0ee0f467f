"""The rendered benchmark: birds made of parts, with the truth of every pixel.

A bird has a head, beak, body, wing, tail and legs. Its class is a pair (cap colour, cheek colour) painted on the head.
Nothing else is needed to tell the class, and neither colour alone is enough. Two dials, `body_cue` and
`context_correlation`, set how much the rest of the bird and the background *also* tell. They make a classifier look at
the head alone (partial activation), at the whole bird, or at the background.

Two variants are written to disk in the layouts of the data sets they stand for, and read back by the same readers:
`single` (one bird an image) as CUB-200-2011 with `segmentations/` and `part_maps/`, and `scenes` (one to three birds of
different classes) as VOC2012 with `PartMaps/`.

Image `i` of a split depends on (configuration, split, i) only, so any part of the benchmark can be rendered alone.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

import cv2
import numpy as np
from joblib import Parallel, cpu_count, delayed
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from wsolnb import keys
from wsolnb.data.base import LocalizationDataset, save_picture
from wsolnb.data.cub import CUB
from wsolnb.data.rendered import ensure_rendered, rendering_key
from wsolnb.data.sample import CONTEXT, DISCRIMINATIVE, REST, Sample, tight_box
from wsolnb.data.voc import VOC
from wsolnb.errors import DataError, ParameterError, nearest

FORMAT = 1
"""A number that goes up whenever the renderer's output changes on purpose. Recorded truths name the format that they
belong to."""

SPLITS = ("train", "val", "test")
BACKGROUNDS = {
    "sky": (((92, 140, 205), 18), ((205, 222, 238), 14)),
    "water": (((120, 165, 180), 16), ((38, 88, 118), 16)),
    "foliage": (((34, 66, 32), 10), ((112, 150, 70), 16)),
    "grass": (((112, 124, 62), 14), ((70, 122, 44), 16)),
}
"""Two colours of each (top and bottom, dark and light, soil and blades) and how much they vary."""

# Head colours (RGB). With k of them there are k (k - 1) ordered pairs of different colours: 4 make 12 classes.
HEAD_COLOURS = {
    "red": (205, 38, 42), "yellow": (238, 202, 40), "blue": (38, 84, 205), "white": (240, 238, 232),
    "black": (26, 24, 30), "green": (40, 160, 74), "violet": (150, 62, 190),
}  # fmt: skip
PLUMAGES = ((150, 104, 66), (112, 118, 126), (196, 160, 112), (92, 78, 70), (140, 132, 84), (176, 120, 116))
PATTERNS = ("plain", "spots", "bars")
MAX_CLASSES = len(HEAD_COLOURS) * (len(HEAD_COLOURS) - 1)

DEFAULTS = {
    "single": {"train": 2400, "val": 300, "test": 600, "scale": (0.38, 0.92)},
    "scenes": {"train": 1600, "val": 300, "test": 300, "scale": (0.30, 0.62)},
}
"""What the variants do not share."""

# Part codes inside the renderer; on disk they are reduced to CONTEXT, DISCRIMINATIVE and REST.
_BODY, _HEAD = 1, 2
_SUPERSAMPLE = 2
_FIXED = 4  # fractional bits of polygon coordinates given to OpenCV: integers, so rasterisation is exact


class AviaryConfig(BaseModel):
    """Everything that decides the rendered benchmark. Shares and probabilities are in [0, 1].

    variant: `single` (one bird an image, CUB layout) or `scenes` (1 to 3 birds of different classes, VOC layout).
    classes: number of classes, 2 to 42.
    size: image side in pixels.
    train, val, test: images per split; 0 takes the variant's default (`DEFAULTS`).
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
        known = type(self).model_fields
        for name in values:
            if name not in known:
                problem = f"the aviary has no parameter {name!r}{nearest(name, known)}"
                raise ParameterError(problem, f"choose among {', '.join(known)}")
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "aviary"
            raise ParameterError(f"aviary parameter {name}: {first['msg']}", f"got {first['input']!r}") from error

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: dict) -> dict:
        """Fill in the variant's defaults, so that equal benchmarks have equal configurations and hashes."""
        defaults = DEFAULTS.get(values.get("variant", "single"), {})
        return values | {name: default for name, default in defaults.items() if values.get(name) in (0, None)}

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
        colours = next(count for count in itertools.count(2) if count * (count - 1) >= self.classes)
        return tuple(itertools.permutations(list(HEAD_COLOURS)[:colours], 2))[: self.classes]

    @property
    def key(self) -> str:
        """Hash of the configuration and of the format."""
        return keys.digest(json.dumps({"format": FORMAT, **self.model_dump()}, sort_keys=True))[:12]


# ---------------------------------------------------------------------------------------------------- backgrounds


def value_noise(rng: np.random.Generator, size: int, cells: tuple[int, int], octaves: int = 1) -> np.ndarray:
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
    first, second = (_jitter(rng, *tone) for tone in BACKGROUNDS[kind])
    if kind == "sky":
        clouds = np.clip(value_noise(rng, size, (3, 4), 3) + rng.uniform(-0.5, 0.3), 0, 1)[..., None]
        return (first * (1 - ramp) + second * ramp) * (1 - 0.7 * clouds) + 245.0 * 0.7 * clouds
    if kind == "water":
        ripple = value_noise(rng, size, (int(rng.integers(14, 30)), 3), 2)[..., None]
        return first * (1 - ramp) + second * ramp + 22.0 * ripple
    if kind == "foliage":
        noise = np.clip(0.5 + 0.5 * value_noise(rng, size, (7, 7), 3), 0, 1)[..., None]
        image = np.ascontiguousarray(first * (1 - noise) + second * noise)
        for _ in range(int(rng.integers(8, 20))):
            centre = rng.integers(0, size, 2).tolist()
            axes = (int(rng.integers(4, 11)), int(rng.integers(2, 5)))
            shade = (first + (second - first) * rng.uniform(0, 1.2)).tolist()
            cv2.ellipse(image, centre, axes, float(rng.uniform(0, 180)), 0, 360, shade, -1, cv2.LINE_AA)
        return image
    image = np.ascontiguousarray(first * (1 - 0.35 * ramp) + 14.0 * value_noise(rng, size, (6, 6), 3)[..., None])
    count = int(rng.integers(50, 90))
    x, y = rng.uniform(0, size, count), rng.uniform(0.1 * size, 1.1 * size, count)
    dx, dy = rng.normal(0, 0.05 * size, count), -rng.uniform(0.06, 0.2, count) * size
    ends = np.stack([x, y, x + dx, y + dy], axis=1).astype(int).reshape(-1, 2, 2)
    for (start, end), gain in zip(ends.tolist(), rng.uniform(0.65, 1.35, count), strict=True):
        cv2.line(image, start, end, np.minimum(second * gain, 255).tolist(), 1, cv2.LINE_AA)
    return image


# ---------------------------------------------------------------------------------------------------------- birds


def _ellipse(cx: float, cy: float, a: float, b: float, angle: float = 0.0, points: int = 28) -> np.ndarray:
    """Points (points, 2) of an ellipse with semi-axes a, b, turned by `angle` radians."""
    t = np.linspace(0, 2 * math.pi, points, endpoint=False)
    c, s = math.cos(angle), math.sin(angle)
    x, y = a * np.cos(t), b * np.sin(t)
    return np.stack([cx + c * x - s * y, cy + s * x + c * y], axis=1)


def _stroke(start: np.ndarray, end: np.ndarray, width: float) -> np.ndarray:
    """Points (4, 2) of a straight bar of a given width."""
    dx, dy = end - start
    aside = np.array([-dy, dx]) / (math.hypot(dx, dy) or 1.0) * width / 2
    return np.array([start + aside, end + aside, end - aside, start - aside])


def _towards(angle: float) -> np.ndarray:
    """Unit vector (2,) of a direction in radians."""
    return np.array([math.cos(angle), math.sin(angle)])


def _up(ahead: np.ndarray) -> np.ndarray:
    """Return the direction (2,) that is up for somebody who looks along `ahead` to the right."""
    return np.array([ahead[1], -ahead[0]])


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

    def add(points, colour, part: int = _BODY, clip: int = -1) -> int:
        layers.append((np.array(points), np.asarray(colour, np.float32), part, clip))
        return len(layers) - 1

    flying = rng.random() < 0.25
    a, b = rng.uniform(0.44, 0.52), rng.uniform(0.28, 0.36)
    lean = rng.uniform(-0.45, 0.05)  # radians; negative raises the front
    front = _towards(lean)
    up = _up(front)
    radius = rng.uniform(0.17, 0.205)
    neck = rng.uniform(0.02, 0.20)
    head = front * (a * 0.86) + up * (b * 0.55 + neck) + np.array([radius * 0.25, -radius * 0.25])

    rump = -front * a * 0.82
    back = _towards(math.pi + lean + rng.uniform(-0.35, 0.3))
    tip = rump + rng.uniform(0.30, 0.50) * back
    across, fan = -_up(back), rng.uniform(0.09, 0.18)
    add([rump + across * 0.07, tip + across * fan, tip - across * fan, rump - across * 0.07], dark)

    if flying:
        tip = -front * rng.uniform(0.05, 0.35) + up * rng.uniform(0.6, 0.85)
        add([front * 0.28 + up * b * 0.5, tip, -front * 0.25 + up * b * 0.5], dark * 0.9)
    else:
        reach = b + rng.uniform(0.18, 0.30)
        for offset in (-0.10, 0.08):
            foot = np.array([offset + rng.uniform(-0.04, 0.04), reach])
            add(_stroke(np.array([offset, b * 0.6]), foot, 0.045), horn)
            add(_stroke(foot - [0.05, 0], foot + np.array([0.11, 0]), 0.035), horn)

    body = add(_ellipse(0, 0, a, b, lean), base)
    nape, throat = head - front * radius * 0.8, head + front * radius * 0.5
    add([front * a * 0.45 + up * b * 0.75, nape, throat, front * a * 0.9], base)
    if plumage[1] == "spots":
        for _ in range(int(rng.integers(12, 20))):
            u, v = rng.uniform(-0.85, 0.85, 2)
            add(_ellipse(*(front * a * u + up * b * v), 0.035, 0.03, points=8), dark, clip=body)
    elif plumage[1] == "bars":
        for u in np.linspace(-0.8, 0.8, int(rng.integers(5, 8))):
            add(_stroke(front * a * u + up * b, front * a * u - up * b, 0.05), dark, clip=body)
    add(_ellipse(*(-up * b * 0.55), a * 0.75, b * 0.42, lean), light, clip=body)

    if flying:
        tip = -front * rng.uniform(0.15, 0.5) + up * rng.uniform(0.65, 0.95)
        add([front * 0.22, tip, -front * 0.12 + up * 0.3, -front * 0.3], dark)
    else:
        add(_ellipse(*(-front * a * 0.22 + up * b * 0.12), a * 0.62, b * 0.5, lean + rng.uniform(0.0, 0.3)), dark)

    look = rng.uniform(-0.15, 0.3)
    ahead = _towards(look)
    side, root = -_up(ahead), head + ahead * radius * 0.85
    add([root + side * 0.06, root + ahead * rng.uniform(0.14, 0.32), root - side * 0.06], horn)

    cap, cheek = (_jitter(rng, HEAD_COLOURS[name], 12) for name in pattern)
    skull = add(_ellipse(*head, radius, radius * rng.uniform(0.92, 1.05)), cheek, _HEAD)
    # The cap is everything of the head above a line, so cap and cheek share the head about equally.
    along = _towards(look + rng.uniform(-0.25, 0.1))
    above = _up(along)
    edge = head + above * radius * rng.uniform(-0.12, 0.12)
    wide, high = along * radius * 2, above * radius * 2.5
    add([edge - wide, edge + wide, edge + wide + high, edge - wide + high], cap, _HEAD, skull)
    eye = head + ahead * radius * 0.38 - side * radius * 0.1
    add(_ellipse(*eye, radius * 0.2, radius * 0.2, points=12), (235, 235, 225), _HEAD, skull)
    add(_ellipse(*eye, radius * 0.12, radius * 0.12, points=10), (12, 12, 14), _HEAD, skull)
    return layers


def _place(rng: np.random.Generator, layers: list, config: AviaryConfig) -> list:
    """Mirror, turn, scale and shift a bird's layers into an image; the whole bird stays inside."""
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    c, s = _towards(rng.uniform(-0.35, 0.35))
    turn = np.array([[mirror * c, mirror * s], [-s, c]])
    placed = [(points @ turn, colour, part, clip) for points, colour, part, clip in layers]
    outline = np.concatenate([points for points, _, _, clip in placed if clip < 0])
    low, high = outline.min(axis=0), outline.max(axis=0)
    factor = rng.uniform(*config.scale) * config.size / float((high - low).max())
    free = config.size - (high - low) * factor
    # Beta(.5, .5) prefers the borders: a centred box must not be a good guess.
    share = 0.5 + config.off_centre * (rng.beta(0.5, 0.5, 2) - 0.5)
    origin = free * share - low * factor
    return [(points * factor + origin, colour, part, clip) for points, colour, part, clip in placed]


def fill(canvas: np.ndarray, points: np.ndarray, colour, scale: int = _SUPERSAMPLE) -> None:
    """Fill a polygon given in image pixels on a canvas of `scale` times their number."""
    # A pixel centre lies at integer coordinates for OpenCV and at +0.5 for us.
    fixed = np.rint((points * scale - 0.5) * (1 << _FIXED)).astype(np.int32)
    cv2.fillPoly(canvas, [fixed], colour, cv2.LINE_8, _FIXED)


def _shrink(values: np.ndarray, size: int) -> np.ndarray:
    """Average a supersampled canvas to (size, size), float32."""
    return cv2.resize(values.astype(np.float32, copy=False), (size, size), interpolation=cv2.INTER_AREA)


def _paint(rng: np.random.Generator, layers: list, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a placed bird, lit from above.

    Returns premultiplied colour (size, size, 3), opacity (size, size) and the share of its head.
    """
    side = size * _SUPERSAMPLE
    colour, part = np.zeros((side, side, 3), np.float32), np.zeros((side, side), np.uint8)
    inside: dict[int, np.ndarray] = {}
    for points, tint, code, clip in layers:
        if clip < 0:
            fill(colour, points, tint.tolist())
            fill(part, points, code)
            continue
        if clip not in inside:
            inside[clip] = np.zeros((side, side), np.uint8)
            fill(inside[clip], layers[clip][0], 1)
        low = np.maximum(np.floor(points.min(axis=0) * _SUPERSAMPLE).astype(int) - 1, 0)
        high = np.ceil(points.max(axis=0) * _SUPERSAMPLE).astype(int) + 2
        window = slice(low[1], high[1]), slice(low[0], high[0])
        shape = np.zeros_like(inside[clip][window])
        if shape.size:
            fill(shape, points - low / _SUPERSAMPLE, 1)
            colour[window][(shape & inside[clip][window]) > 0] = tint
    opacity = _shrink(part > 0, size)
    rows = np.flatnonzero(opacity.any(axis=1))
    position = (np.arange(size, dtype=np.float32) - rows[0]) / max(1, rows[-1] - rows[0])
    light = rng.uniform(1.08, 1.22) - rng.uniform(0.2, 0.4) * np.clip(position, 0, 1)
    rough = 1 + 0.06 * value_noise(rng, size, (size // 6, size // 6))
    return _shrink(colour, size) * (light[:, None] * rough)[..., None], opacity, _shrink(part == _HEAD, size)


def _occluder(rng: np.random.Generator, box: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a branch or a bunch of leaves over a box. Returns premultiplied colour (H, W, 3) and opacity (H, W)."""
    side = size * _SUPERSAMPLE
    colour, opacity = np.zeros((side, side, 3), np.float32), np.zeros((side, side), np.float32)
    width = (box[2:] - box[:2]).max()
    centre = rng.uniform(box[:2], box[2:])
    shapes: list[tuple[np.ndarray, np.ndarray]] = []
    if rng.random() < 0.5:
        step = 1.5 * size * _towards(rng.uniform(-0.6, 0.6))
        bark = _jitter(rng, (94, 72, 50), 10)
        shapes.append((_stroke(centre - step, centre + step, rng.uniform(0.06, 0.12) * width), bark))
    else:
        for _ in range(int(rng.integers(3, 7))):
            spot = centre + rng.normal(0, 0.12 * width, 2)
            axes = rng.uniform(0.10, 0.17) * width, rng.uniform(0.05, 0.08) * width
            shapes.append((_ellipse(*spot, *axes, rng.uniform(0, math.pi)), _jitter(rng, (70, 116, 48), 16)))
    for points, tint in shapes:
        fill(colour, points, tint.tolist())
        fill(opacity, points, 1.0)
    return _shrink(colour, size), _shrink(opacity, size)


def _add_distractors(rng: np.random.Generator, image: np.ndarray, count: int, palette: list[tuple]) -> None:
    """Draw berries, flowers and stones in place: patches in head colours that are no bird."""
    size = image.shape[0]
    for _ in range(count):
        centre = rng.uniform(0, size, 2)
        radius = rng.uniform(0.018, 0.045) * size
        tint = _jitter(rng, palette[rng.integers(len(palette))], 10)
        kind = rng.integers(3)
        if kind == 0:
            blobs = [(centre + offset, 0.8, tint) for offset in rng.normal(0, radius, (3, 2))]
        elif kind == 1:
            heart = _jitter(rng, palette[rng.integers(len(palette))], 10)
            turns = np.arange(5) * (2 * math.pi / 5) + rng.uniform(0, 1)
            petals = centre + radius * np.stack([np.cos(turns), np.sin(turns)], axis=1)
            blobs = [(petal, 0.62, tint) for petal in petals] + [(centre, 0.55, heart)]
        else:
            blobs = [(centre, 1.3, _jitter(rng, (128, 124, 118), 18))]
        for spot, extent, colour in blobs:
            at = np.rint(spot * 16).astype(int).tolist()
            cv2.circle(image, at, max(16, round(radius * extent * 16)), colour.tolist(), -1, cv2.LINE_AA, 4)


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

    kinds = list(BACKGROUNDS)
    tells_class = rng.random() < config.context_correlation
    background = _background(rng, kinds[first % len(kinds) if tells_class else rng.integers(len(kinds))], size)
    palette = [HEAD_COLOURS[name] for name in sorted({n for pair in config.head_patterns for n in pair})]
    _add_distractors(rng, background, int(rng.poisson(config.distractors)), palette)

    while True:
        image = background.copy()
        owner = np.zeros((size, size), np.uint8)  # which bird is seen at a pixel: 0 none, else its position
        head_seen = np.zeros((size, size), bool)
        whole = []  # pixels of each bird and of its head, before others hide them
        for position, label in enumerate(classes, 1):
            choice = label if rng.random() < config.body_cue else int(rng.integers(config.classes))
            plumage = (choice % len(PLUMAGES), PATTERNS[(choice // len(PLUMAGES) + choice) % len(PATTERNS)])
            layers = _place(rng, _bird(rng, config.head_patterns[label], plumage), config)
            colour, opacity, head = _paint(rng, layers, size)
            image = image * (1 - opacity[..., None]) + colour
            seen, is_head = opacity >= 0.5, head >= 0.5 * opacity
            owner[seen], head_seen[seen] = position, is_head[seen]
            whole.append((seen.sum(), (seen & is_head).sum()))
        for position in range(1, count + 1):
            if rng.random() < config.occlusion and (owner == position).any():
                colour, opacity = _occluder(rng, tight_box(owner == position), size)
                image = image * (1 - opacity[..., None]) + colour
                owner[opacity >= 0.5] = 0
        head_seen &= owner > 0
        birds = [owner == position for position in range(1, count + 1)]
        left = np.array([(bird.sum(), (head_seen & bird).sum()) for bird in birds]) / np.maximum(1, whole)
        # The head must be told and the bird be found: redraw a layout that hides too much of either.
        if (left >= (0.5, 0.7)).all():
            break

    values = np.array([0, *(label + 1 if scenes else 1 for label in classes)], np.uint8)
    return Sample(
        image=photograph(rng, image, blur=1.0, grain=10, limits=(0, 255)),
        image_id=f"{split}_{index:05d}",
        labels=tuple(sorted(classes)),
        boxes=np.stack([tight_box(bird) for bird in birds]),
        box_labels=np.array(classes, np.int64),
        mask=values[owner],
        parts=np.where(head_seen, DISCRIMINATIVE, np.where(owner > 0, REST, CONTEXT)).astype(np.uint8),
    )


def photograph(
    rng: np.random.Generator, image: np.ndarray, blur: float, grain: float, limits: tuple[float, float]
) -> np.ndarray:
    """Expose, blur and grain the scene, (H, W, 3) -> uint8.

    blur, grain: the largest, in pixels and in steps of 255. limits: of the light before them.
    """
    gain = rng.uniform(0.6, 1.15) * (1 + rng.normal(0, 0.05, 3))
    image = np.clip(image * gain.astype(np.float32), *limits)
    sigma = rng.uniform(0, blur)
    if sigma > 0.25:
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    image = image + rng.uniform(1, grain) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------- disk


def ensure(config: AviaryConfig, cache: str | Path, workers: int | None = None) -> Path:
    """Return the folder of the rendered benchmark under `cache`, rendering it first if it is not there.

    workers: processes; default all cores. Raises DataError when the cache cannot be written.
    """
    target = Path(cache) / f"aviary-{config.variant}-{rendering_key(config.key, __name__)}"
    return ensure_rendered(target, lambda root: _write(config, root, workers), "the benchmark")


_PALETTE = bytes(3) + np.random.default_rng(0).integers(40, 256, (256, 3), dtype=np.uint8).tobytes()[3:]
"""Colours that the masks of the scenes are shown in; 0 is black."""


def load(config: AviaryConfig, split: str, cache: str | Path) -> LocalizationDataset:
    """Return a split of the benchmark, read by the reader of the layout it is written in (rendered when absent).

    The data set is called `aviary`; only its layout is that of CUB-200-2011 or VOC2012.
    """
    root = ensure(config, cache)
    dataset = CUB(root, split) if config.variant == "single" else VOC(root, split)
    dataset.name = "aviary"
    dataset.remedy = f"run again: what is damaged in {root} is found at the start, and rendered anew"
    return dataset


def _write(config: AviaryConfig, root: Path, workers: int | None) -> None:
    jobs = [(split, index) for split in SPLITS for index in range(getattr(config, split))]
    chunks = [jobs[start : start + 100] for start in range(0, len(jobs), 100)]
    parallel = Parallel(min(workers or cpu_count(), len(chunks)), backend="multiprocessing")
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # ends OpenCV's threads: a forked process that inherits their locks without them hangs
    try:
        made = parallel(delayed(_write_chunk)(config, root, chunk) for chunk in chunks)
    finally:
        cv2.setNumThreads(threads)
    records = [record for chunk in made for record in chunk]
    (_index_cub if config.variant == "single" else _index_voc)(config, root, records)
    (root / "config.json").write_text(json.dumps(config.model_dump(), indent=1))


def _write_chunk(config: AviaryConfig, root: Path, jobs: list[tuple[str, int]]) -> list[tuple]:
    single, records = config.variant == "single", []
    folders = ("images", "segmentations", "part_maps") if single else ("JPEGImages", "SegmentationClass", "PartMaps")
    for split, index in jobs:
        sample = render(config, split, index)
        stem = sample.image_id
        if single:
            stem = f"{sample.label + 1:03d}.{config.class_names[sample.label]}/{stem}"
        else:
            _path(root, f"Annotations/{stem}.xml").write_text(_voc_annotation(config, sample))
        # Full-resolution chroma: the head pattern is a few pixels of colour.
        image = _path(root, f"{folders[0]}/{stem}.jpg")
        save_picture(Image.fromarray(sample.image), image, quality=95, subsampling=0)
        mask = sample.mask * 255 if single else sample.mask
        for folder, values in zip(folders[1:], (mask, sample.parts), strict=True):
            picture = Image.fromarray(values)
            if not single:
                picture.putpalette(_PALETTE)
            save_picture(picture, _path(root, f"{folder}/{stem}.png"))
        records.append((split, stem, sample.box_labels, sample.boxes))
    return records


def _path(root: Path, name: str) -> Path:
    """Return the path of a file whose folder is there, then."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _index_cub(config: AviaryConfig, root: Path, records: list[tuple]) -> None:
    tables = {"classes": [f"{i + 1} {i + 1:03d}.{name}" for i, name in enumerate(config.class_names)]}
    for number, (split, stem, (label,), ((x0, y0, x1, y1),)) in enumerate(records, start=1):
        line = {
            "images": f"{stem}.jpg",
            "image_class_labels": label + 1,
            "bounding_boxes": f"{x0:.1f} {y0:.1f} {x1 - x0:.1f} {y1 - y0:.1f}",
            "train_test_split": int(split != "test"),
            "train_val_test_split": split,
        }
        for name, value in line.items():
            tables.setdefault(name, []).append(f"{number} {value}")
    for name, lines in tables.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")


def _index_voc(config: AviaryConfig, root: Path, records: list[tuple]) -> None:
    (root / "class_names.txt").write_text("\n".join(config.class_names) + "\n")
    for split in SPLITS:
        names = [name for where, name, _, _ in records if where == split]
        _path(root, f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")


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
