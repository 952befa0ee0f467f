"""Figures with one look: fixed 0-1 colour scale for maps, truth solid and orange, predictions dashed and blue."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from wsolnb.data.sample import CONTEXT, DISCRIMINATIVE, IGNORE, REST, Sample
from wsolnb.metrics import boxes_from_score_map

# Okabe and Ito's colours: told apart with any colour vision, and in grey.
TRUTH, PREDICTION = "#E69F00", "#56B4E9"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00")
METHODS = ("#0072B2", "#56B4E9", "#000000", "#D55E00", "#CC79A7", "#009E73")
"""Colours of up to six maps and scores in one figure."""
MAP_COLOURS = "viridis"
PART_COLOURS = {CONTEXT: "#DDDDDD", DISCRIMINATIVE: "#D55E00", REST: "#0072B2", IGNORE: "#FFFFFF"}
PART_NAMES = {DISCRIMINATIVE: "discriminative part", REST: "rest of the object", CONTEXT: "context"}


def set_style() -> None:
    """Set fonts, colours, resolution and file size of all figures; call it once at the top of a notebook."""
    plt.rc("figure", dpi=80, **{"constrained_layout.use": True})
    plt.rc("savefig", dpi=120)
    plt.rc("font", size=10)
    plt.rc("axes", titlesize=10, grid=False, prop_cycle=plt.cycler(color=SERIES))
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("legend", frameon=False)
    plt.rc("image", cmap=MAP_COLOURS)
    shell = get_ipython()
    if shell is not None:
        # The inline backend sets its own formatter after the cell in which it is loaded: load it now, come after it.
        plt.close(plt.figure())
        shell.events.register("post_run_cell", _show_small)


def _show_small(_result: object) -> None:
    get_ipython().display_formatter.formatters["image/png"].for_type(Figure, png)


def draw_boxes(axes: Axes, boxes: np.ndarray, predicted: bool = False) -> None:
    """Outline half-open boxes (n, 4), in pixels, in the style of truth or of a prediction."""
    colour, line = (PREDICTION, "--") if predicted else (TRUTH, "-")
    for x0, y0, x1, y1 in np.asarray(boxes).reshape(-1, 4):
        # imshow puts the centre of pixel (0, 0) at (0, 0), so its left edge is at -0.5.
        for width, shade in ((3.2, "black"), (1.8, colour)):
            box = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, lw=width, ec=shade, ls=line)
            axes.add_patch(box)


def draw_map(axes: Axes, score_map: np.ndarray, image: np.ndarray | None = None, opacity: float = 0.65):
    """Show a score map (H, W) on the fixed scale 0 to 1, over its image if given; return the drawn map."""
    if image is not None:
        grey = image.astype(np.float32).mean(axis=2)
        axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
    return axes.imshow(score_map, vmin=0, vmax=1, cmap=MAP_COLOURS, alpha=opacity if image is not None else 1.0)


def draw_parts(axes: Axes, parts: np.ndarray) -> None:
    """Show a part map (H, W): discriminative part, rest of the object, context."""
    values = (CONTEXT, DISCRIMINATIVE, REST)
    colours = ListedColormap([PART_COLOURS[v] for v in values])
    axes.imshow(np.where(parts == IGNORE, CONTEXT, parts), vmin=-0.5, vmax=2.5, cmap=colours, interpolation="nearest")


def mask_colours(mask: np.ndarray) -> np.ndarray:
    """Return a mask (H, W) of classes as a picture (H, W, 3) uint8: background black, unknown (255) white.

    The first seven classes have colours that are told apart with any colour vision; from the eighth on they repeat.
    """
    names = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
    table = np.zeros((256, 3), np.uint8)
    table[1:IGNORE] = np.resize([to_rgba_array(names)[:, :3] * 255], (IGNORE - 1, 3)).round()
    table[IGNORE] = 255
    return table[mask]


def box_legend(figure: Figure, predicted: bool = True) -> None:
    """Put the legend of box styles under a figure."""
    handles = [Line2D([], [], color=TRUTH, lw=2, label="truth")]
    if predicted:
        handles.append(Line2D([], [], color=PREDICTION, lw=2, ls="--", label="prediction"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)


def part_legend(figure: Figure) -> None:
    """Put the legend of part colours under a figure."""
    handles = [Patch(color=PART_COLOURS[value], label=name) for value, name in PART_NAMES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


def grid(rows: int, columns: int, side: float = 1.7) -> tuple[Figure, np.ndarray]:
    """Return a figure of rows x columns square axes without ticks, `side` inches each; axes as (rows, columns)."""
    figure, axes = plt.subplots(rows, columns, figsize=(side * columns, side * rows + 0.3), squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure, axes


def png(figure: Figure) -> bytes:
    """Draw a figure into the bytes of a PNG file of 256 colours: a quarter of the size, so notebooks stay small."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=figure.dpi)
    picture = Image.open(drawn).convert("RGB")
    # Maximum coverage keeps rare colours, such as a bird's head; k-means then fits the palette to the rest. Both are
    # slow, so they see every third pixel of every third row.
    sparse = picture.resize((-(-picture.width // 3), -(-picture.height // 3)), Image.Resampling.NEAREST)
    palette = sparse.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2)
    picture.quantize(palette=palette, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()


def gallery(samples: Sequence[Sample], titles: Sequence[str] | None = None, columns: int = 8, parts: bool = False):
    """Show samples with their true boxes; with `parts`, the part map (or mask) of each under its image.

    Returns the figure. titles: one per sample.
    """
    columns = min(columns, len(samples))
    lines = -(-len(samples) // columns)
    step = 2 if parts else 1
    figure, axes = grid(lines * step, columns)
    for position, sample in enumerate(samples):
        row, column = divmod(position, columns)
        axis = axes[row * step, column]
        axis.imshow(sample.image)
        draw_boxes(axis, sample.boxes)
        if titles is not None:
            axis.set_title(titles[position], fontsize=9)
        if parts and sample.parts is not None:
            draw_parts(axes[row * step + 1, column], sample.parts)
        elif parts and sample.mask is not None:
            shown = np.where(sample.mask == IGNORE, 0.5, sample.mask > 0)
            axes[row * step + 1, column].imshow(shown, vmin=0, vmax=1, cmap="gray")
    if parts and any(sample.parts is not None for sample in samples):
        part_legend(figure)
    else:
        box_legend(figure, predicted=False)
    return figure


def map_rows(
    samples: Sequence[Sample],
    maps: Sequence[Mapping[str, np.ndarray]],
    boxes: Sequence[Mapping[str, np.ndarray]] | None = None,
    side: float = 1.7,
) -> Figure:
    """One row per sample: the image with its true box, then each named map with the box predicted from it.

    maps: per sample {name: (H, W) in [0, 1]}. boxes: per sample {name: (n, 4)}, as the metrics return them.
    side: of each picture, inches.
    """
    names = list(maps[0])
    figure, axes = grid(len(samples), 1 + len(names), side)
    drawn = None
    for row, (sample, named) in enumerate(zip(samples, maps, strict=True)):
        axes[row, 0].imshow(sample.image)
        draw_boxes(axes[row, 0], sample.boxes)
        for column, name in enumerate(names, start=1):
            drawn = draw_map(axes[row, column], named[name], sample.image)
            draw_boxes(axes[row, column], sample.boxes)
            if boxes is not None:
                draw_boxes(axes[row, column], boxes[row][name], predicted=True)
    for column, name in enumerate(["image", *names]):
        axes[0, column].set_title(name)
    figure.colorbar(drawn, ax=axes[:, -1].tolist(), shrink=0.7, label="score")
    box_legend(figure, predicted=boxes is not None)
    return figure


def prediction_rows(predictions: Iterable[Any], thresholds: Mapping[str, float], side: float = 1.7) -> Figure:
    """Draw `map_rows` of predictions (`wsolnb.train.evaluation`), with the box of each map at its threshold.

    A threshold of NaN, which no true box chose, gives no box.
    """
    predictions = list(predictions)
    boxes = [
        {
            name: boxes_from_score_map(values, [thresholds[name]])[0] if thresholds[name] >= 0 else np.zeros((0, 4))
            for name, values in found.maps.items()
        }
        for found in predictions
    ]
    return map_rows([found.sample for found in predictions], [found.maps for found in predictions], boxes, side)
