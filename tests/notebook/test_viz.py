import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from wsolnb.data import aviary
from wsolnb.data.aviary import AviaryConfig
from wsolnb.notebook import viz

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def samples():
    viz.set_style()
    return [aviary.render(AviaryConfig(), "val", index) for index in range(3)]


def test_maps_keep_the_fixed_scale(samples):
    figure = viz.map_rows(samples, [{"half": np.full((112, 112), 0.5, np.float32)}] * 3)
    drawn = [axis.images[-1] for axis in figure.axes if len(axis.images) == 2]  # a map over its image
    assert all(image.get_cmap().name == viz.MAP_COLOURS for image in drawn)
    assert len(drawn) == 3
    assert all(image.get_clim() == (0, 1) for image in drawn)


def test_figures_are_drawn_for_dense_screens_and_shown_at_their_own_size():
    figure, _ = viz.grid(1, 2, side=1.0)
    drawn, size = viz.shown(figure)
    assert Image.open(io.BytesIO(drawn)).size == (2 * size["width"], 2 * size["height"]) == (320, 208)


@pytest.mark.parametrize(("length", "expected"), [(600, [20, 160, 300, 440, 580]), (12, [3, 4, 6, 7, 9]), (1, [0] * 5)])
def test_spaced_positions_are_of_the_list(length, expected):
    assert viz.spaced(length, 5, margin=20).tolist() == expected


def test_boxes_are_drawn_at_pixel_edges(samples):
    _, axes = viz.grid(1, 1)
    viz.draw_boxes(axes[0, 0], np.array([[2, 3, 10, 8]]))
    outline = axes[0, 0].patches[-1]
    assert (outline.get_x(), outline.get_y(), outline.get_width(), outline.get_height()) == (1.5, 2.5, 8, 5)


def test_truth_and_prediction_differ_in_colour_and_line(samples):
    _, axes = viz.grid(1, 1)
    viz.draw_boxes(axes[0, 0], np.array([[2, 3, 10, 8]]))
    viz.draw_boxes(axes[0, 0], np.array([[2, 3, 10, 8]]), predicted=True)
    truth, predicted = axes[0, 0].patches[1], axes[0, 0].patches[3]
    assert truth.get_linestyle() != predicted.get_linestyle()
    assert truth.get_edgecolor() != predicted.get_edgecolor()


def test_small_png_shows_the_same_picture(samples):
    figure = viz.gallery(samples, ["a", "b", "c"], parts=True)
    plain = io.BytesIO()
    figure.savefig(plain, format="png", dpi=figure.dpi)
    small = viz.png(figure)
    assert len(small) < 0.6 * len(plain.getvalue())
    expected, got = (np.asarray(Image.open(file).convert("RGB")).astype(int) for file in (plain, io.BytesIO(small)))
    difference = np.abs(got - expected)
    assert difference.mean() < 3


def test_masks_have_a_colour_per_class():
    picture = viz.mask_colours(np.array([[0, 1, 2, 8, 255]], np.uint8))
    assert picture.shape == (1, 5, 3)
    assert picture[0, 0].tolist() == [0, 0, 0]
    assert picture[0, 4].tolist() == [255, 255, 255]
    assert picture[0, 1].tolist() == picture[0, 3].tolist() == [0, 0x72, 0xB2]
    assert picture[0, 2].tolist() != picture[0, 1].tolist()


def test_the_legend_of_classes_has_the_colours_of_the_masks():
    names = [f"kind_{index}" for index in range(7)]
    figure, _ = viz.grid(1, 1)
    viz.class_legend(figure, names, unknown=True)
    handles = figure.legends[0].get_patches()
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["background", "kind 0"]
    drawn = [np.round(np.array(handle.get_facecolor()[:3]) * 255).tolist() for handle in handles]
    assert drawn == viz.mask_colours(np.array([[*range(8), 255]]))[0].tolist()
    repeated, _ = viz.grid(1, 1)
    viz.class_legend(repeated, [*names, "kind_7"])
    assert not repeated.legends


def test_a_contact_sheet_names_what_it_shows():
    samples = [aviary.render(AviaryConfig(variant="scenes"), "val", index) for index in range(4)]
    names = [f"kind_{index}" for index in range(30)]
    axes = [axis for axis in viz.sample_sheet(samples, names, columns=3).axes if axis.images]
    assert len(axes) == 4
    for axis, sample in zip(axes, samples, strict=True):
        assert axis.get_title() == ", ".join(f"kind {label}" for label in sample.labels)
        boxed = [names[label] for label in sample.box_labels] if len(sample.labels) > 1 else []
        assert [text.get_text() for text in axis.texts] == boxed
        assert len(axis.patches) == 2 * len(sample.boxes)
        np.testing.assert_array_equal(axis.images[1].get_alpha() > 0, sample.mask > 0)
    assert any(len(sample.labels) > 1 for sample in samples)


def test_arrows_of_a_diagram_go_from_box_to_box():
    figure, axes = plt.subplots()
    axes.set(xlim=(0, 4), ylim=(0, 2))
    viz.draw_flow(axes, {"here": (1, 1, "white"), "there": (3, 1, "grey")}, [("here", "there", "tokens")])
    figure.canvas.draw()
    boxes = {text.get_text(): text.get_bbox_patch().get_window_extent() for text in axes.texts if text.get_text()}
    (arrow,) = (text.arrow_patch for text in axes.texts if getattr(text, "arrow_patch", None))
    tail, _, tip = arrow.get_transform().transform_path(arrow.get_path()).vertices[:3]
    plt.close(figure)
    assert set(boxes) == {"here", "there", "tokens"}
    assert boxes["here"].x1 <= tail[0] < boxes["tokens"].x0 < boxes["tokens"].x1 < tip[0] <= boxes["there"].x0 + 1
