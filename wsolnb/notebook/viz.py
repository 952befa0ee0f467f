"""Figures with one look: fixed 0-1 colour scale for maps, truth solid and orange, predictions dashed and blue."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from wsolnb.data.exports import voc_palette
from wsolnb.data.sample import CONTEXT, DISCRIMINATIVE, IGNORE, REST, Sample
from wsolnb.metrics import boxes_from_score_map

# Okabe and Ito's colours: told apart with any colour vision, and in grey.
TRUTH, PREDICTION = "#E69F00", "#56B4E9"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00")
METHODS = ("#0072B2", "#56B4E9", "#000000", "#D55E00", "#CC79A7", "#009E73")
"""Colours of up to six maps and scores in one figure."""
MASK_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
MAP_COLOURS = "viridis"
PART_COLOURS = {CONTEXT: "#DDDDDD", DISCRIMINATIVE: "#D55E00", REST: "#0072B2", IGNORE: "#FFFFFF"}
PART_NAMES = {DISCRIMINATIVE: "discriminative part", REST: "rest of the object", CONTEXT: "context"}


DPI = 160
"""Dots per inch of all figures. A notebook shows a figure at 80 dots per inch, so a dense screen shows every dot."""


def set_style() -> None:
    """Set fonts, colours, resolution and file size of all figures; call it once at the top of a notebook."""
    plt.rc("figure", dpi=DPI, **{"constrained_layout.use": True})
    plt.rc("savefig", dpi=DPI)
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
    get_ipython().display_formatter.formatters["image/png"].for_type(Figure, shown)


def shown(figure: Figure) -> tuple[bytes, dict[str, int]]:
    """Return the file of `png`, and the width and height, in pixels of a screen, at which a notebook shows it."""
    width, height = (round(80 * inches) for inches in figure.get_size_inches())
    return png(figure), {"width": width, "height": height}


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
    table = np.zeros((256, 3), np.uint8)
    table[1:IGNORE] = np.resize([to_rgba_array(MASK_COLOURS)[:, :3] * 255], (IGNORE - 1, 3)).round()
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


def class_legend(figure: Figure, class_names: Sequence[str], unknown: bool = False) -> None:
    """Put the legend of `mask_colours` under a figure: background, each class, and if asked the white of 255.

    More than seven classes share colours: then there is no legend.
    """
    if len(class_names) > len(MASK_COLOURS):
        return
    named = {"black": "background"} | dict(zip(MASK_COLOURS, class_names, strict=False))
    named |= {"white": "unknown"} if unknown else {}
    handles = [Patch(fc=colour, ec="#888888", label=name.replace("_", " ")) for colour, name in named.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)


def spaced(length: int, count: int, margin: int) -> np.ndarray:
    """Return `count` evenly spaced positions (count,) in a list of `length`, which leave out `margin` at either end.

    Of a list shorter than four margins a quarter is left out at either end. Positions of a short list come twice.
    """
    edge = min(margin, length // 4)
    return np.linspace(edge, length - max(edge, 1), count).astype(int)


def grid(rows: int, columns: int, side: float = 1.7) -> tuple[Figure, np.ndarray]:
    """Return a figure of rows x columns square axes without ticks, `side` inches each; axes as (rows, columns)."""
    figure, axes = plt.subplots(rows, columns, figsize=(side * columns, side * rows + 0.3), squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure, axes


def draw_flow(
    axes: Axes, boxes: Mapping[str, tuple[float, float, str]], arrows: Iterable[tuple[str, str, str]], size: float = 9
) -> None:
    """Draw a diagram of boxes and of arrows between them.

    boxes: by the text of a box the place (x, y) of its middle, in data coordinates, and its colour. arrows: from, to,
    and what flows, which stands at the middle of the arrow. size: of the letters, in points.
    """
    axes.set_axis_off()
    drawn = {}
    for text, (x, y, colour) in boxes.items():
        shape = {"boxstyle": "round,pad=0.4", "fc": colour, "ec": "black", "lw": 0.8}
        drawn[text] = axes.text(x, y, text, ha="center", va="center", fontsize=size, bbox=shape).get_bbox_patch()
    for start, end, what in arrows:
        (x0, y0, _), (x1, y1, _) = boxes[start], boxes[end]
        line = {"arrowstyle": "-|>", "color": "black", "lw": 0.9, "patchA": drawn[start], "patchB": drawn[end]}
        axes.annotate("", (x1, y1), (x0, y0), arrowprops=line)
        plain = {"fc": "white", "ec": "none", "pad": 0.8}
        axes.text((x0 + x1) / 2, (y0 + y1) / 2, what, ha="center", va="center", fontsize=size - 1, bbox=plain)


def png(figure: Figure) -> bytes:
    """Draw a figure into the bytes of a PNG file of 192 colours: a fifth of the size, so notebooks stay small."""
    drawn, small = io.BytesIO(), io.BytesIO()
    for axes in figure.axes:
        for image in axes.images:
            # An enlarged picture keeps its pixels: one sees what the network sees, and the file is smaller.
            if image.get_interpolation() == "auto" and image.get_size()[0] < axes.get_window_extent().height:
                image.set_interpolation("nearest")
    figure.savefig(drawn, format="png", dpi=DPI)
    picture = Image.open(drawn).convert("RGB")
    # Maximum coverage keeps rare colours, such as a bird's head; k-means then fits the palette to the rest. Both are
    # slow, far more than all else here, so they see every fifth pixel of every fifth row. A dot of five pixels is seen.
    sparse = picture.resize((-(-picture.width // 5), -(-picture.height // 5)), Image.Resampling.NEAREST)
    palette = sparse.quantize(192, Image.Quantize.MAXCOVERAGE, kmeans=2)
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


def sample_sheet(samples: Sequence[Sample], class_names: Sequence[str], columns: int = 4) -> Figure:
    """Show samples with their boxes, their masks in colour over them, and the names of their classes."""
    columns = min(columns, len(samples))
    figure, axes = grid(-(-len(samples) // columns), columns, side=2.6)
    for axis, sample in zip(axes.flat, samples, strict=False):
        axis.imshow(sample.image)
        if sample.mask is not None:
            axis.imshow(mask_colours(sample.mask), alpha=np.where(sample.mask > 0, 0.5, 0.0))
        draw_boxes(axis, sample.boxes)
        if len(sample.labels) > 1:  # else the title tells
            for (x0, y0, *_), label in zip(sample.boxes, sample.box_labels, strict=True):
                style = {"boxstyle": "square,pad=0.1", "fc": TRUTH, "ec": "none"}
                axis.text(max(x0, 0), max(y0, 0), class_names[label], fontsize=6, va="top", bbox=style, clip_on=True)
        names = ", ".join(class_names[label] for label in sample.labels)
        axis.set_title(textwrap.shorten(names.replace("_", " "), 32, placeholder=" ..."), fontsize=9)
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

    A threshold of NaN, where no true box could choose one, gives no box.
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


class SheetRow(NamedTuple):
    """A row of a contact sheet: a result (`wsolnb.localization`), which of its classes, and that one's palette index.

    name: of the image, as it is shown.
    """

    name: str
    found: Any
    place: int
    index: int


def results_sheet(rows: Sequence[SheetRow]) -> Figure:
    """Draw results: image, map, box and mask of each in a row, with a legend. The masks have VOC's colours."""
    width = 2.4
    heights = [width * min(1.3, max(0.25, row.found.mask.shape[0] / row.found.mask.shape[1])) + 0.3 for row in rows]
    size = (4 * width + 0.9, sum(heights) + 0.35 * (2 + len({row.index for row in rows}) // 4))
    options = {"squeeze": False, "layout": "constrained", "height_ratios": heights}
    figure, axes = plt.subplots(len(rows), 4, figsize=size, **options)
    colours, named, drawn = voc_palette() / 255, {}, None
    for (name, found, place, index), row in zip(rows, axes, strict=True):
        label = found.names[place].partition(",")[0]
        named[index] = label
        likely = f" {found.probabilities[place]:.2f}" if found.ranking else ""
        empty = not len(found.boxes[place])
        titles = (_shortened(name, 30), f"{_shortened(label, 26)}{likely}")
        titles += ("no box: the map is empty" if empty else "box", f"mask, index {index}")
        for axis, title in zip(row, titles, strict=True):
            axis.set_title(title, fontsize=9, pad=3)
            axis.set_axis_off()
        row[0].imshow(found.image)
        drawn = draw_map(row[1], found.maps[place], found.image)
        row[2].imshow(found.image)
        draw_boxes(row[2], found.boxes[place], predicted=True)
        grey = np.repeat(found.image.mean(axis=2, keepdims=True) / 255, 3, axis=2)
        inside = (found.mask == place + 1)[..., None]
        row[3].imshow(np.where(inside, 0.4 * grey + 0.6 * colours[index], grey))
    figure.colorbar(drawn, ax=axes.ravel().tolist(), label="score of the map", shrink=min(1, 3 / size[1]), pad=0.01)
    handles = [Line2D([], [], color=PREDICTION, lw=2, ls="--", label="box")]
    handles += [Patch(color=colours[i], label=f"{i} {_shortened(n, 24)}") for i, n in sorted(named.items())]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
