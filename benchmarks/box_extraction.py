"""Boxes at all thresholds at once against a plain loop over the thresholds, on 200 maps of all kinds.

Both run in one process on one thread, and every box of every map is compared. The plain loop is timed once per map (it
repeats itself a hundred or a thousand times), ours is the median of five. The time of a kind is the sum over its maps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np

from wsolnb.metrics import boxes_from_score_map

CASES = [(multi, count) for multi in (False, True) for count in (100, 1000)]


def plain_boxes(score_map: np.ndarray, thresholds: np.ndarray, multi_contour: bool) -> list[np.ndarray]:
    """Threshold by threshold, with OpenCV's own contours."""
    height, width = score_map.shape
    grey = (score_map * 255).astype(np.uint8)
    found = []
    for threshold in thresholds:
        _, foreground = cv2.threshold(grey, int(threshold * np.max(grey)), 255, cv2.THRESH_BINARY)
        contours, _ = cv2.findContours(foreground, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
        if len(contours) == 0:
            found.append(np.array([[0, 0, 0, 0]]))
            continue
        if not multi_contour:
            contours = [max(contours, key=cv2.contourArea)]
        boxes = []
        for contour in contours:
            x, y, w, h = cv2.boundingRect(contour)
            boxes.append([x, y, min(x + w, width - 1), min(y + h, height - 1)])
        found.append(np.array(boxes))
    return found


def _normalized(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return ((values - low) / (high - low)).astype(np.float32)


def _blobs(rng: np.random.Generator, size: int, count: int, low: float, high: float) -> np.ndarray:
    y, x = np.mgrid[:size, :size] / size
    total = np.zeros((size, size))
    for _ in range(count):
        (cx, cy), width = rng.uniform(0.15, 0.85, 2), rng.uniform(low, high)
        total += rng.uniform(0.3, 1) * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * width**2))
    return _normalized(total)


def _plateaus(rng: np.random.Generator, size: int) -> np.ndarray:
    values = np.zeros((size, size), np.float32)
    for _ in range(8):
        x, y = rng.integers(0, size, 2)
        w, h = rng.integers(size // 20, size // 2, 2)
        values[y : y + h, x : x + w] = rng.random()
    return values


def _ring(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] / size - 0.5
    radius = np.hypot(x, y)
    return _normalized(
        np.exp(-(((radius - rng.uniform(0.2, 0.4)) / 0.06) ** 2)) + 0.9 * np.exp(-((radius / 0.05) ** 2))
    )


def _peaks(rng: np.random.Generator, size: int) -> np.ndarray:
    values = np.zeros((size, size), np.float32)
    values[tuple(rng.integers(0, size, (2, 30)))] = rng.random(30)
    return values


def _upsampled(rng: np.random.Generator, size: int, blur: float, interpolation: int) -> np.ndarray:
    tokens = rng.random((14, 14)).astype(np.float32)
    if blur:
        tokens = cv2.GaussianBlur(tokens, (0, 0), blur)
    return _normalized(cv2.resize(tokens, (size, size), interpolation=interpolation))


KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "upsampled 14x14": lambda rng, size: _upsampled(rng, size, 0, cv2.INTER_LINEAR),
    "smooth 14x14, cubic": lambda rng, size: _upsampled(rng, size, 1.5, cv2.INTER_CUBIC),
    "one Gaussian": lambda rng, size: _blobs(rng, size, 1, 0.1, 0.3),
    "six Gaussians": lambda rng, size: _blobs(rng, size, 6, 0.03, 0.1),
    "plateaus": _plateaus,
    "constant": lambda rng, size: np.full((size, size), rng.random(), np.float32),
    "ring and island": _ring,
    "sparse peaks": _peaks,
    "blurred peaks": lambda rng, size: _normalized(cv2.GaussianBlur(_peaks(rng, size), (0, 0), 2.0)),
    "noise": lambda rng, size: rng.random((size, size)).astype(np.float32),
}


def _maps() -> list[tuple[str, int, np.ndarray]]:
    """200 maps: ten of each kind and size, noise (which is slow for the plain loop) mostly small."""
    rng = np.random.default_rng(0)
    sizes = {112: 10, 224: 10}
    noise = {28: 10, 56: 7, 112: 2, 224: 1}
    return [
        (kind, size, make(rng, size))
        for kind, make in KINDS.items()
        for size, count in (noise if kind == "noise" else sizes).items()
        for _ in range(count)
    ]


def _seconds(run: Callable[[], list[np.ndarray]], repeats: int) -> tuple[float, list[np.ndarray]]:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - started)
    return statistics.median(times), result


def main() -> dict:
    cv2.setNumThreads(1)
    for multi in (False, True):  # compile
        boxes_from_score_map(np.ones((4, 4), np.float32), [0.5], multi)
    maps = _maps()
    rows: dict[tuple[str, int], dict[tuple[bool, int], list[float]]] = {}
    for kind, size, score_map in maps:
        row = rows.setdefault((kind, size), {case: [0.0, 0.0, 0] for case in CASES})
        for multi, count in CASES:
            thresholds = np.arange(0, 1, 1 / count)
            plain, expected = _seconds(lambda: plain_boxes(score_map, thresholds, multi), 1)  # noqa: B023
            ours, found = _seconds(lambda: boxes_from_score_map(score_map, thresholds, multi), 5)  # noqa: B023
            if not all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True)):
                raise AssertionError(f"boxes differ: {kind} at {size} px, {count} thresholds, multi_contour={multi}")
            for i, value in enumerate((plain, ours, 1)):
                row[multi, count][i] += value

    def ratio(case: tuple[bool, int], leave_out: str = "") -> float:
        chosen = [row[case] for (kind, _), row in rows.items() if kind != leave_out]
        return sum(c[0] for c in chosen) / sum(c[1] for c in chosen)

    titles = [f"{'all' if multi else 'largest'}, {count}" for multi, count in CASES]
    print(
        f"{len(maps)} maps, all boxes identical. Milliseconds per map, plain -> ours (ratio), by contours, thresholds:"
    )
    print(f"| kind | px | {' | '.join(titles)} |\n|---|---|{'---|' * len(CASES)}")
    for (kind, size), row in rows.items():
        cells = [f"{1e3 * p / n:.2f} -> {1e3 * o / n:.2f} ({p / o:.1f}x)" for p, o, n in row.values()]
        print(f"| {kind} | {size} | {' | '.join(cells)} |")
    result: dict = {"maps": len(maps), "identical_boxes": True}
    for name, leave_out in (("all kinds", ""), ("without noise", "noise")):
        print(f"| **{name}** | | {' | '.join(f'{ratio(case, leave_out):.1f}x' for case in CASES)} |")
    for case, title in zip(CASES, titles, strict=True):
        result[title] = {
            "ratio": ratio(case),
            "ratio_without_noise": ratio(case, "noise"),
            "ratio_by_kind": {f"{kind}, {size} px": row[case][0] / row[case][1] for (kind, size), row in rows.items()},
        }
        result[title]["lowest_ratio"] = min(result[title]["ratio_by_kind"].values())
    print("claims, over all kinds: >= 10x at 1000 thresholds, >= 4x at 100")
    return result


if __name__ == "__main__":
    main()
