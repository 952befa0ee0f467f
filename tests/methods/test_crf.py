import importlib.util
import math
import os

import cv2
import numpy as np
import pytest

from wsolnb.errors import MapError, ParameterError
from wsolnb.methods import crf
from wsolnb.methods.crf import CRFConfig, Refinement, refine, refine_labels

# `make lattice` builds the package and sets the variable: there nothing is skipped.
needs_lattice = pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None and "WSOLNB_LATTICE" not in os.environ,
    reason="the extra `crf` is not installed: `make lattice` builds it and runs this",
)


def two_halves(height=20, width=24, noise=4.0):
    """An image of two colours with a slanting edge, and the true half of each pixel."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    truth = (columns + 0.3 * rows > width * 0.6).astype(np.uint8)
    image = np.where(truth[..., None], (200, 60, 40), (40, 80, 160)) + rng.normal(0, noise, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8), truth


def plain_mean_field(image, probabilities, config):
    """Pixel by pixel in float64."""
    count, height, width = probabilities.shape
    cells = [(y, x) for y in range(height) for x in range(width)]

    def near(a, b):
        return math.exp(-((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) / (2 * config.near**2))

    def alike(a, b):
        place = ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) / (2 * config.wide**2)
        colour = sum((float(image[a][c]) - float(image[b][c])) ** 2 for c in range(3)) / (2 * config.colour**2)
        return math.exp(-place - colour)

    total = [[0.0] * len(cells) for _ in cells]
    for kernel, weight in ((near, config.near_weight), (alike, config.colour_weight)):
        values = [[kernel(a, b) for b in cells] for a in cells]
        sums = [sum(row) for row in values]
        for i in range(len(cells)):
            for j in range(len(cells)):
                total[i][j] += weight * values[i][j] / math.sqrt(sums[i] * sums[j])
    unary = {(k, i): math.log(probabilities[k][cell]) for i, cell in enumerate(cells) for k in range(count)}

    def normalised(scores):
        for i in range(len(cells)):
            whole = sum(math.exp(scores[k, i]) for k in range(count))
            for k in range(count):
                scores[k, i] = math.exp(scores[k, i]) / whole
        return scores

    belief = normalised(dict(unary))
    for _ in range(config.iterations):
        belief = normalised({
            (k, i): unary[k, i] + sum(total[i][j] * belief[k, j] for j in range(len(cells)))
            for i in range(len(cells)) for k in range(count)
        })  # fmt: skip
    return np.array([belief[k, i] for k in range(count) for i in range(len(cells))]).reshape(probabilities.shape)


def test_mean_field_equals_loops():
    image, _ = two_halves(6, 7, noise=30)
    given = np.random.default_rng(1).uniform(0.05, 1, (3, 6, 7))
    config = CRFConfig(near=1.5, near_weight=1.2, wide=4, colour=40, colour_weight=2, iterations=3)
    got = refine(image, given / given.sum(axis=0), config)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, plain_mean_field(image, given / given.sum(axis=0), config), atol=2e-5)
    np.testing.assert_allclose(got.sum(axis=0), 1, atol=1e-5)


def test_one_image_is_refined_any_number_of_times():
    image, truth = two_halves(50, 60)
    config, rng = CRFConfig(max_side=24), np.random.default_rng(0)
    both = Refinement(image, config)
    for labels in (truth, np.where(rng.random(truth.shape) < 0.2, 2, truth), truth * 5):
        np.testing.assert_array_equal(both.labels(labels), refine_labels(image, labels, config))
        given = rng.uniform(0.05, 1, (3, 50, 60))
        np.testing.assert_array_equal(both.probabilities(given), refine(image, given, config))


def test_wrong_labels_inside_of_a_colour_are_put_right():
    image, truth = two_halves()
    labels = truth * 7
    labels[4:7, 3:6], labels[15, 20] = 7, 0  # wrong ones on both sides
    refined = refine_labels(image, labels)
    assert set(np.unique(refined)) == {0, 7}
    assert (refined == truth * 7).all()
    assert (refine_labels(image, labels, CRFConfig(backend="none")) == labels).all()
    assert refine_labels(image, np.full_like(labels, 3)).tolist() == np.full_like(labels, 3).tolist()


def test_large_images_are_reduced_and_come_back_at_their_size():
    image, truth = two_halves(90, 120)
    labels = truth.copy()
    labels[20:26, 10:16] = 1
    refined = refine_labels(image, labels, CRFConfig(max_side=40))
    assert refined.shape == truth.shape
    # Off by what a pixel of the reduced image spans, along the edge.
    edge = cv2.dilate(truth, np.ones((7, 7))) != cv2.erode(truth, np.ones((7, 7)))
    assert (refined == truth)[~edge].all()


def test_bad_input_is_named():
    image, _ = two_halves(6, 7)
    with pytest.raises(MapError, match=r"\(6, 7, 3\) uint8 and probabilities \(2, 7, 6\)"):
        refine(image, np.ones((2, 7, 6)))
    with pytest.raises(MapError, match="float64"):
        refine(image.astype(float), np.ones((2, 6, 7)))
    assert refine(image, np.ones((1, 6, 7))).tolist() == np.ones((1, 6, 7)).tolist()
    assert np.isfinite(refine(image, np.stack([np.zeros((6, 7)), np.ones((6, 7))]))).all()


def test_the_default_does_not_ask_for_the_extra(monkeypatch):
    image, truth = two_halves()
    before = refine_labels(image, truth)

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(crf.importlib, "import_module", absent)
    assert (refine_labels(image, truth) == before).all()
    with pytest.raises(ParameterError, match=r"'pydensecrf' is not installed(.|\n)*wsolnb\[crf\]"):
        refine_labels(image, truth, CRFConfig(backend="pydensecrf"))


@needs_lattice
def test_the_lattice_agrees_with_the_exact_sums():
    image, truth = two_halves(40, 48, noise=12)
    labels = truth.copy()
    labels[8:12, 6:11] = 1
    exact, lattice = (refine_labels(image, labels, CRFConfig(backend=name)) for name in ("mean_field", "pydensecrf"))
    assert (exact == lattice).mean() > 0.98
    assert (lattice == truth).mean() > (labels == truth).mean()


@needs_lattice
def test_the_lattice_works_at_full_size_and_again():
    """Beyond `max_side`, which is of `mean_field` alone; one image's CRF refines any number of masks of it."""
    image, truth = two_halves(90, 120)
    config = CRFConfig(backend="pydensecrf", max_side=8)
    first, second = truth.copy(), np.where(truth == 1, 3, 2)
    first[20:26, 10:16] = 1
    second[70:76, 100:110] = 2
    both = Refinement(image, config)
    assert (both.labels(first) == truth).mean() > 0.99
    assert (both.labels(second) == np.where(truth == 1, 3, 2)).mean() > 0.99
    np.testing.assert_array_equal(both.labels(first), refine_labels(image, first, config))
    given = np.random.default_rng(0).uniform(0.05, 1, (3, 90, 120))
    got = both.probabilities(given / given.sum(axis=0))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got.sum(axis=0), 1, atol=1e-5)
