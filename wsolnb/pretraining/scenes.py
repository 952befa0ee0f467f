"""Scenes of procedural creatures: what the embedded backbones are pretrained on.

A creature is a random blob with limbs, a texture and, on its body, a sash of two bands in different colours. It has no
head, beak, wing or class of the rendered benchmark (`wsolnb.data.aviary`), and no texture is a plumage pattern (some
creatures are nearly plain). Every colour that it is drawn from keeps a distance of at least `COLOUR_DISTANCE` (CIE Lab)
from every head and plumage colour of the birds; light, shade and mixing bring a part of the pixels nearer (notebook
06). Backgrounds are patchworks of noise, not landscapes.

A scene has several *frames*: the same creatures in another pose and place, before another background. Frame `f` of
scene `i` depends on (seed, i, f) only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from joblib import Parallel, cpu_count, delayed
from numpy.lib.format import open_memmap
from pydantic import BaseModel, ConfigDict, Field

from wsolnb.data.aviary import HEAD_COLOURS, PLUMAGES, fill, photograph, value_noise
from wsolnb.data.rendered import ensure_rendered, rendering_key
from wsolnb.errors import DataError
from wsolnb.files import open_array

FORMAT = 2
"""A number that goes up whenever the renderer's output changes on purpose. The model cards name the format of their
scenes."""

TEXTURES = ("checks", "zigzag", "rings", "marble", "waves", "diamonds", "maze", "gradient")
BACKGROUND, BODY, LIMB, SASH = 0, 1, 2, 3
PARTS = ("background", "body", "limb", "sash")
MAX_CREATURES = 3
COLOUR_DISTANCE = 18.0
"""Smallest CIE Lab distance (CIE76) between a colour drawn here and a colour of a bird."""


class CreatureConfig(BaseModel):
    """Everything that decides the scenes.

    scenes: number of scenes. frames: frames of each. size: image side in pixels.
    sash: whether creatures wear the two-coloured sash (an ablation turns it off).
    camouflage: probability that a frame's background is drawn towards the colour of its first creature.
    muted: probability of a greyish colour in a creature's texture.
    ends: probability that the sash is worn at one end of the body or on a limb, not across the middle.
    rough: whether backgrounds may have strong light and shade, bars, and heaps of two colours.
    seed: of everything that is drawn.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scenes: int = Field(8000, ge=1)
    frames: int = Field(1, ge=1, le=8)
    size: int = Field(112, ge=32, le=512)
    sash: bool = True
    camouflage: float = Field(0.35, ge=0, le=1)
    muted: float = Field(0.7, ge=0, le=1)
    ends: float = Field(0.0, ge=0, le=1)
    rough: bool = False
    seed: int = Field(0, ge=0)


class Scene(NamedTuple):
    """One rendered frame with its truth.

    image: (H, W, 3) uint8. owner: (H, W) uint8, 0 background, else position of the creature + 1.
    parts: (H, W) uint8, index into `PARTS`. textures: (MAX_CREATURES,) int8, index into `TEXTURES`, -1 = no creature.
    colours: (MAX_CREATURES, 4, 3) float32, CIE Lab of the two colours of the texture, of the sash's wide and of its
    narrow band; NaN where there is no such thing.
    """

    image: np.ndarray
    owner: np.ndarray
    parts: np.ndarray
    textures: np.ndarray
    colours: np.ndarray


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """Convert (..., 3) RGB in [0, 255] to CIE Lab, float32."""
    flat = np.asarray(rgb, np.float32).reshape(1, -1, 3) / 255
    return cv2.cvtColor(flat, cv2.COLOR_RGB2Lab).reshape(np.shape(rgb))


_BIRDS = to_lab(np.array([*HEAD_COLOURS.values(), *PLUMAGES]))


def draw_colour(
    rng: np.random.Generator, apart_from: tuple[np.ndarray, ...] = (), distance: float = 25.0, muted: float = 0.4
) -> np.ndarray:
    """Draw an RGB colour (3,) that is far from every colour of a bird, and `distance` from the colours given.

    muted: probability of a greyish one.
    """
    others = [to_lab(other) for other in apart_from]
    while True:
        colour = rng.uniform(8, 247, 3).astype(np.float32)
        if rng.random() < muted:  # as most of what is photographed is
            colour = colour.mean() + rng.uniform(0.1, 0.5) * (colour - colour.mean())
        lab = to_lab(colour)
        far_from_birds = np.linalg.norm(_BIRDS - lab, axis=1).min() >= COLOUR_DISTANCE
        if far_from_birds and all(np.linalg.norm(lab - other) >= distance for other in others):
            return colour


# ------------------------------------------------------------------------------------------------------ background


def _background(rng: np.random.Generator, size: int, near: np.ndarray | None = None, rough: bool = False) -> np.ndarray:
    """Render a patchwork of 1 to 3 noise textures of related colours, littered, with strokes and pebbles on it.

    near: a colour that its own is drawn towards, so that what wears it is hard to see. rough: as of `CreatureConfig`.
    Returns (size, size, 3) float32.
    """
    count = int(rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))
    choice = np.stack([value_noise(rng, size, (2, 2), 2) for _ in range(count)]).argmax(axis=0)
    image = np.zeros((size, size, 3), np.float32)
    tint = draw_colour(rng)
    if near is not None:
        share = rng.uniform(0.4, 0.9)
        tint = share * near + (1 - share) * tint
    for patch in range(count):
        pull = 0.2 if near is not None else 0.4
        first = pull * draw_colour(rng) + (1 - pull) * tint
        second = first + rng.normal(0, 22, 3).astype(np.float32)
        if rough and rng.random() < 0.6:  # light and shade, as between leaves
            second = second * rng.uniform(0.35, 1.8)
        cells = int(rng.integers(2, 30)), int(rng.integers(2, 30))
        noise = np.clip(0.5 + 0.5 * value_noise(rng, size, cells, int(rng.integers(1, 4))), 0, 1)[..., None]
        image = np.where((choice == patch)[..., None], first * (1 - noise) + second * noise, image)
    soft = rng.uniform(0, 3)
    if soft > 0.5:
        image = cv2.GaussianBlur(image, (0, 0), soft)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)[:, None, None]
    image = np.ascontiguousarray(image * (1 + rng.uniform(-0.2, 0.2) * ramp), np.float32)
    if rng.random() < 0.5:
        _scatter(rng, image)
    if rough and rng.random() < 0.45:
        # Bars behind the creatures; `_cover` puts others in front.
        for _ in range(int(rng.integers(1, 3))):
            start, along = rng.uniform(0, size, 2), rng.normal(0, 0.6 * size, 2)
            colour = draw_colour(rng, muted=0.8) * rng.uniform(0.5, 1.1)
            _line(image, start - along, start + along, colour.tolist(), int(rng.integers(2, max(3, size // 9))))
    for _ in range(int(rng.poisson(3))):
        colour = (image[tuple(rng.integers(0, size, 2))] + rng.normal(0, 35, 3)).clip(0, 255)
        start = rng.uniform(0, size, 2)
        _line(image, start, start + rng.normal(0, 0.25 * size, 2), colour.tolist(), int(rng.integers(1, 3)))
    for _ in range(int(rng.poisson(3))):
        # Heaps of vivid pebbles: small things of one colour (or, rough, of two) that are no creature.
        middle, spread, tone = rng.uniform(0, size, 2), rng.uniform(0, 0.045) * size, draw_colour(rng)
        other = draw_colour(rng) if rough and rng.random() < 0.4 else tone
        for _ in range(int(rng.integers(1, 6))):
            centre = _pixel(middle + rng.normal(0, 1, 2) * spread)
            axes = _pixel(np.maximum(1, rng.uniform(0.012, 0.05, 2) * size))
            own = tone if not rough or rng.random() < 0.6 else other
            shade = (own * rng.uniform(0.85, 1.15)).clip(0, 255).tolist()
            cv2.ellipse(image, centre, axes, float(rng.uniform(0, 180)), 0, 360, shade, -1, cv2.LINE_AA)
    return image


def _scatter(rng: np.random.Generator, image: np.ndarray) -> None:
    """Litter the ground, in place, with many small shapes of one kind and of colours related to what is there."""
    size = len(image)
    kind, extent = rng.integers(3), rng.uniform(0.02, 0.1) * size
    contrast, slant = rng.uniform(10, 45) / 3, rng.uniform(0, 180)
    for _ in range(int(rng.uniform(1, 5) * (0.1 * size) ** 2 / max(2.0, extent))):
        y, x = rng.integers(0, size, 2)
        place = np.array([x, y])
        colour = (image[y, x] * rng.uniform(0.6, 1.4) + rng.normal(0, contrast, 3)).clip(0, 255).tolist()
        angle = slant + rng.normal(0, 30)
        long = max(1, round(extent * rng.uniform(0.5, 1.2)))
        if kind == 0:
            axes = (long, max(1, round(long * rng.uniform(0.25, 0.6))))
            cv2.ellipse(image, place.tolist(), axes, angle, 0, 360, colour, -1, cv2.LINE_AA)
        elif kind == 1:
            step = 2 * long * np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
            _line(image, place, place + step, colour, int(rng.integers(1, 3)))
        else:
            corners = place + rng.normal(0, 0.6 * long, (int(rng.integers(3, 6)), 2))
            cv2.fillPoly(image, [np.rint(corners).astype(np.int32)], colour, cv2.LINE_AA)


def _pixel(point: np.ndarray) -> list[int]:
    return np.rint(point).astype(int).tolist()


def _line(image: np.ndarray, start, end, colour, width: int, kind: int = cv2.LINE_AA) -> None:
    cv2.line(image, _pixel(start), _pixel(end), colour, width, kind)


# ------------------------------------------------------------------------------------------------------- creatures


class _Creature(NamedTuple):
    """What stays the same from frame to frame."""

    outline: np.ndarray  # (n, 2), of the body, about one unit long
    limbs: list[tuple[np.ndarray, np.ndarray]]  # polyline (m, 2) and its width (m,)
    texture: int
    first: np.ndarray
    second: np.ndarray
    limb_colour: np.ndarray
    scale: float  # cells of the texture per unit
    turn: float  # of the texture, radians
    sash: tuple[np.ndarray, np.ndarray]  # colours of the wide and the narrow band
    band: tuple[float, float, float]  # position along the body, width of the wide band, direction
    on_limb: int  # which limb wears the sash instead of the body; -1 = none
    blotches: np.ndarray  # (n, 6): centre u, v, half axes, direction, and the factor on the light of what it covers
    noise_seed: int


def _creature(rng: np.random.Generator, muted: float) -> _Creature:
    """Draw what a creature looks like in all of its frames."""
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    radius = np.ones_like(angle)
    for k in range(2, 6):
        radius += rng.normal(0, 0.24 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    radius = np.clip(radius, 0.45, 1.6)
    stretch = rng.uniform(1.0, 2.2)
    outline = np.stack([radius * np.cos(angle) * stretch, radius * np.sin(angle)], axis=1)
    outline *= 0.5 / np.abs(outline).max()
    limbs = []
    for _ in range(int(rng.integers(0, 5))):
        root = outline[rng.integers(len(outline))] * 0.75
        direction = np.arctan2(root[1], root[0]) + rng.normal(0, 0.4)
        bend = rng.normal(0, 0.25)
        points = [root]
        for _ in range(6):
            direction += bend
            points.append(points[-1] + rng.uniform(0.05, 0.11) * np.array([np.cos(direction), np.sin(direction)]))
        tip = rng.uniform(0.12, 0.28) if rng.random() < 0.3 else rng.uniform(0.02, 0.08)  # a fan, else a tapering limb
        width = np.linspace(rng.uniform(0.05, 0.16), tip, len(points))
        limbs.append((np.array(points), width))
    first = draw_colour(rng, muted=muted)
    second = draw_colour(rng, (first,), 15.0, muted=muted)
    wide = draw_colour(rng, (first, second))
    narrow = draw_colour(rng, (first, second, wide))
    limb_colour = first * rng.uniform(0.7, 1.1) if rng.random() < 0.7 else second
    if rng.random() < 0.2:  # nearly plain: the texture is faint
        second = first + 0.3 * (second - first)
    return _Creature(
        outline, limbs, int(rng.integers(len(TEXTURES))), first, second, limb_colour, rng.uniform(5, 11),
        rng.uniform(0, np.pi), (wide, narrow), (rng.uniform(-0.25, 0.25), rng.uniform(0.2, 0.36), rng.normal(0, 0.5)),
        -1, _blotches(rng), int(rng.integers(2**31)),
    )  # fmt: skip


def _move_sash(rng: np.random.Generator, creature: _Creature) -> _Creature:
    """Let a creature wear its sash on a limb (every other one that has limbs), or around one end of its body."""
    if creature.limbs and rng.random() < 0.5:
        return creature._replace(on_limb=int(rng.integers(len(creature.limbs))))
    lean, width = rng.normal(0, 0.4) + rng.choice([0.0, np.pi]), rng.uniform(0.1, 0.24)
    end = float((creature.outline @ [np.cos(lean), np.sin(lean)]).max())
    return creature._replace(band=(end - width, width, lean))


def _blotches(rng: np.random.Generator) -> np.ndarray:
    """Draw 0 to 2 elliptic spots of another shade."""
    count = int(rng.integers(3))
    low, high = np.array([[-0.3, -0.2, 0.1, 0.06, 0, 0.5], [0.3, 0.2, 0.32, 0.18, np.pi, 0.85]])
    drawn = rng.uniform(low, high, (count, 6))
    brighter = rng.random(count) < 0.3
    drawn[brighter, 5] = 1 / np.maximum(drawn[brighter, 5], 0.65)
    return drawn


_REGULAR = {
    "checks": lambda x, y: (np.floor(x) + np.floor(y)) % 2 > 0,
    "zigzag": lambda x, y: (x + np.abs((y % 2) - 1) * 1.5) % 2 > 1,
    "rings": lambda x, y: np.hypot(x, y) % 1.6 > 0.8,
    "waves": lambda x, y: 0.5 + 0.5 * np.sin(2.2 * x + 1.5 * np.sin(1.3 * y)),
    "diamonds": lambda x, y: np.abs((x % 2) - 1) + np.abs((y % 2) - 1) > 1,
}


def _pattern(creature: _Creature, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Mixing share in [0, 1] of the second colour at the creature's own coordinates (u, v)."""
    c, s = np.cos(creature.turn), np.sin(creature.turn)
    x, y = creature.scale * (c * u + s * v), creature.scale * (c * v - s * u)
    name = TEXTURES[creature.texture]
    if name in _REGULAR:
        share = _REGULAR[name](x, y)
        return share.astype(np.float32) if share.dtype == bool else share
    if name == "gradient":
        return np.clip(0.5 + x / creature.scale, 0, 1)
    rng = np.random.default_rng(creature.noise_seed)
    grid = value_noise(rng, 64, (12, 12), 2)
    near = np.clip((np.stack([x, y]) / creature.scale * 40 + 32), 0, 63).astype(np.float32)
    noise = cv2.remap(grid, near[0], near[1], cv2.INTER_LINEAR)
    return np.clip(0.5 + noise, 0, 1) if name == "marble" else (np.abs(noise) < 0.18).astype(np.float32)


def _draw(rng: np.random.Generator, creature: _Creature, size: int, scale: tuple[float, float], sash: bool):
    """Pose a creature. Returns colour (H, W, 3) and the part map (H, W), both at the image's size."""
    angle, mirror = rng.uniform(0, 2 * np.pi), rng.choice([-1.0, 1.0])
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[mirror * c, mirror * s], [-s, c]])
    squeeze = rng.uniform(0.85, 1.15)
    pieces = [creature.outline, *(points for points, _ in creature.limbs)]
    extent = np.concatenate(pieces) * [squeeze, 1 / squeeze] @ turn
    low, high = extent.min(axis=0), extent.max(axis=0)
    factor = rng.uniform(*scale) * size / float((high - low).max())
    free = size - (high - low) * factor
    origin = free * rng.uniform(-0.03, 1.03, 2) - low * factor

    def place(points):
        return (points * [squeeze, 1 / squeeze]) @ turn * factor + origin

    parts, bands = np.zeros((size, size), np.uint8), np.zeros((size, size), np.uint8)  # bands: 1 wide, 2 narrow
    for number, (points, width) in enumerate(creature.limbs):
        spine, thick = place(points), width * factor
        worn = sash and number == creature.on_limb
        for joint, (start, end, wide) in enumerate(zip(spine[:-1], spine[1:], thick[:-1], strict=True)):
            wide = max(1, round(max(wide, 0.08 * factor) if worn else wide))
            _line(parts, start - 0.5, end - 0.5, SASH if worn else LIMB, wide, cv2.LINE_8)
            if worn:
                _line(bands, start - 0.5, end - 0.5, 1 if 2 * joint < len(points) - 1 else 2, wide, cv2.LINE_8)
    fill(parts, place(creature.outline), BODY, scale=1)
    # Back to the creature's own coordinates, so that texture and sash move with it.
    rows, columns = np.mgrid[:size, :size].astype(np.float32) + 0.5
    own = (np.stack([columns, rows], axis=-1) - origin) / factor @ turn.T / [squeeze, 1 / squeeze]
    u, v = own[..., 0], own[..., 1]
    share = _pattern(creature, u, v)[..., None]
    colour = creature.first * (1 - share) + creature.second * share
    for at_u, at_v, long, short, lean, shade in creature.blotches:
        c, s = np.cos(lean), np.sin(lean)
        along, across = c * (u - at_u) + s * (v - at_v), c * (v - at_v) - s * (u - at_u)
        colour[(along / long) ** 2 + (across / short) ** 2 < 1] *= shade
    colour[parts == LIMB] = creature.limb_colour
    if sash and creature.on_limb < 0:
        at, width, lean = creature.band
        along = u * np.cos(lean) + v * np.sin(lean) - at
        bands = np.where(parts == BODY, np.digitize(along, (-width / 2, width / 2, width)) % 3, 0)
        parts[bands > 0] = SASH
    for band, tint in enumerate(creature.sash, 1):
        colour[(parts == SASH) & (bands == band)] = tint
    light = rng.uniform(0.85, 1.2) + rng.uniform(-0.35, 0.35) * (rows - size / 2) / size
    rough = 1 + 0.06 * value_noise(rng, size, (size // 6, size // 6))
    return colour * (light * rough)[..., None], parts


def render(config: CreatureConfig, index: int, frame: int = 0) -> Scene:
    """Render frame `frame` of scene `index`.

    Raises DataError for a scene or frame that the configuration does not have.
    """
    if not (0 <= index < config.scenes and 0 <= frame < config.frames):
        raise DataError(
            f"no frame {frame} of scene {index} among {config.scenes} scenes of {config.frames} frames",
            "ask for less, or raise CreatureConfig.scenes or frames",
        )
    kept = np.random.default_rng([config.seed, index])
    rng = np.random.default_rng([config.seed, index, frame + 1])
    size = config.size
    count = int(kept.choice([1, 2, 3], p=[0.6, 0.3, 0.1]))
    creatures = [_creature(kept, config.muted) for _ in range(count)]
    # Numbers of their own, so that the same scenes with other sashes can be compared.
    moving = np.random.default_rng([config.seed, index, 0, 1])
    creatures = [_move_sash(moving, c) if moving.random() < config.ends else c for c in creatures]
    scale = {1: (0.4, 1.0), 2: (0.35, 0.65), 3: (0.3, 0.5)}[count]
    camouflaged = rng.random() < config.camouflage
    image = _background(rng, size, creatures[0].first if camouflaged else None, config.rough)
    owner, parts = np.zeros((size, size), np.uint8), np.zeros((size, size), np.uint8)
    for position, creature in enumerate(creatures):
        colour, own = _draw(rng, creature, size, scale, config.sash)
        seen = own > 0
        soft = cv2.GaussianBlur(seen.astype(np.float32), (0, 0), 0.6)[..., None]
        image = image * (1 - soft) + colour * soft
        owner[seen], parts[seen] = position + 1, own[seen]
    if rng.random() < 0.35:
        hidden = _cover(rng, image)
        owner[hidden] = parts[hidden] = 0
    textures = np.full(MAX_CREATURES, -1, np.int8)
    colours = np.full((MAX_CREATURES, 4, 3), np.nan, np.float32)
    for position, creature in enumerate(creatures):
        textures[position] = creature.texture
        worn = (creature.first, creature.second, *(creature.sash if config.sash else ()))
        colours[position, : len(worn)] = to_lab(np.stack(worn))
    image = photograph(rng, image.astype(np.float32), blur=0.9, grain=8, limits=(-np.inf, np.inf))
    return Scene(image, owner, parts, textures, colours)


def _cover(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Put a bar or two, or a heap of leaves, in front of everything, in place. Returns where, (H, W) boolean."""
    size = len(image)
    colour, cover = draw_colour(rng, muted=0.6), np.zeros((size, size), np.uint8)
    if rng.random() < 0.6:
        for _ in range(int(rng.integers(1, 3))):
            start = rng.uniform(0, size, 2)
            end = start + rng.normal(0, 0.6 * size, 2)
            _line(cover, start, end, 1, int(rng.integers(2, max(3, size // 16))), cv2.LINE_8)
    else:
        middle = rng.uniform(0.2, 0.8, 2) * size
        for _ in range(int(rng.integers(2, 6))):
            centre = _pixel(middle + rng.normal(0, 0.07 * size, 2))
            axes = _pixel(rng.uniform([0.05, 0.025], [0.11, 0.06]) * size)
            cv2.ellipse(cover, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
    image[cover > 0] = colour * rng.uniform(0.8, 1.2)
    return cover > 0


# ------------------------------------------------------------------------------------------------------------- disk

ARRAYS = Scene._fields


def load(config: CreatureConfig, cache: str | Path, workers: int | None = None) -> dict[str, np.ndarray]:
    """Return all scenes as memory-mapped arrays by the names of `Scene`, each (scenes, frames, ...).

    Rendered into `cache` when they are not there. workers: processes; default all cores.
    Raises DataError when the cache cannot be written.
    """
    target = Path(cache) / f"creatures-{rendering_key(f'{FORMAT} {config.model_dump_json()}', __name__)}"
    ensure_rendered(target, lambda root: _write(config, root, workers), "the scenes")
    return {name: np.load(target / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}


def _write(config: CreatureConfig, root: Path, workers: int | None) -> None:
    for name, value in render(config, 0)._asdict().items():
        open_array(root / f"{name}.npy", value.dtype, (config.scenes, config.frames, *value.shape)).flush()
    chunks = [range(start, min(start + 200, config.scenes)) for start in range(0, config.scenes, 200)]
    # Fresh processes: a forked one would inherit OpenCV's threads in whatever state they are, and hang.
    Parallel(workers or cpu_count())(delayed(_write_chunk)(config, root, chunk) for chunk in chunks)
    (root / "config.json").write_text(json.dumps({"format": FORMAT, **config.model_dump()}, indent=1))


def _write_chunk(config: CreatureConfig, root: Path, indices: range) -> None:
    cv2.setNumThreads(1)
    arrays = {name: open_memmap(root / f"{name}.npy", "r+") for name in ARRAYS}
    for index in indices:
        for frame in range(config.frames):
            for name, value in render(config, index, frame)._asdict().items():
                arrays[name][index, frame] = value
