from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from wsolnb.backbones import create_backbone
from wsolnb.data.base import LocalizationDataset
from wsolnb.data.sample import Sample
from wsolnb.data.store import Store
from wsolnb.data.transforms import Resize
from wsolnb.errors import MapError, ParameterError
from wsolnb.methods.grabcut import (
    BACKGROUND,
    FOREGROUND,
    UNCERTAIN,
    Attend,
    GrabCutConfig,
    enhance,
    maker,
    plain_energy,
    report,
    trimap,
)
from wsolnb.notebook import runs


def scene(side=48, noise=12, seed=0):
    """A red disc before green: image, truth, and an attention that is too wide and blurred."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    distance = np.hypot(y - side / 2, x - side / 2)
    truth = distance < side / 4
    colours = np.where(truth[..., None], (200, 40, 40), (40, 160, 60)) + rng.normal(0, noise, (side, side, 3))
    attention = np.clip(1 - distance / (side * 0.6), 0, 1).astype(np.float32)
    return colours.clip(0, 255).astype(np.uint8), truth, attention


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


# Tri-map


def test_trimap_is_a_comparison_of_every_pixel():
    attention = np.random.default_rng(1).random((9, 7))
    attention[0, :3] = 0.6, 0.2, 0.19999
    found = trimap(attention, 0.6, 0.2)
    for row in range(9):
        for column in range(7):
            value = attention[row, column]
            expected = FOREGROUND if value >= 0.6 else BACKGROUND if value < 0.2 else UNCERTAIN
            assert found[row, column] == expected
    assert list(found[0, :3]) == [FOREGROUND, UNCERTAIN, BACKGROUND]


def test_the_values_are_opencvs():
    assert (BACKGROUND, FOREGROUND, UNCERTAIN) == (cv2.GC_BGD, cv2.GC_FGD, cv2.GC_PR_BGD) == (0, 1, 2)


@pytest.mark.parametrize(("value", "outcome", "share"), [(0.0, "empty", 0), (0.15, "empty", 0), (0.25, "empty", 1),
                                                         (1.0, "full", 1)])  # fmt: skip
def test_constant_attention_falls_back_to_the_threshold(value, outcome, share):
    image, _, _ = scene()
    found = enhance(image, np.full((6, 6), value, np.float32), 0.3, 0.1)
    assert found.outcome == outcome
    assert found.mask.mean() == share  # the fallback is midway: 0.2
    assert found.background is None
    assert found.foreground is None


def test_without_sure_background_the_mask_is_the_thresholded_attention():
    image, _, attention = scene()
    attention = attention * 0.9 + 0.1
    found = enhance(image, attention, 0.5, 0.1, fallback=0.7)
    assert found.outcome == "full"
    assert np.array_equal(found.mask, attention >= 0.7)


def test_no_uncertain_pixel_is_unchanged():
    image, _, attention = scene()
    found = enhance(image, attention, 0.5, 0.5)
    assert found.outcome == "unchanged"
    assert np.array_equal(found.mask, attention >= 0.5)


@pytest.mark.parametrize("uncertain", ["background", "none"])
def test_all_uncertain_on_one_side_is_unchanged(uncertain):
    image, _, attention = scene()
    image[attention >= 0.2] = (200, 40, 40)  # what is uncertain looks like what is sure foreground
    image[attention < 0.2] = (40, 160, 60)
    found = enhance(image, attention, 0.8, 0.2, uncertain=uncertain)
    assert found.outcome == "unchanged"
    assert np.array_equal(found.mask, attention >= 0.5)


@pytest.mark.parametrize("uncertain", ["background", "none"])
@pytest.mark.parametrize("surer", [FOREGROUND, BACKGROUND])
def test_one_sure_pixel_is_enough(uncertain, surer):
    image, _, _ = scene()
    attention = np.full((48, 48), 0.5, np.float32)
    attention[:4] = 0.0 if surer == FOREGROUND else 1.0
    attention[24, 24] = 1.0 if surer == FOREGROUND else 0.0
    found = enhance(image, attention, 0.9, 0.1, uncertain=uncertain)
    assert (found.trimap == surer).sum() == 1
    assert found.mask[24, 24] == (surer == FOREGROUND)


def test_the_attention_is_resized_to_the_image():
    image, _, _ = scene()
    coarse = np.random.default_rng(2).random((6, 6)).astype(np.float32)
    found = enhance(image, coarse, 0.7, 0.3)
    for row, column in [(0, 0), (20, 31), (47, 47), (13, 5)]:
        y, x = ((v + 0.5) * 6 / 48 - 0.5 for v in (row, column))
        y0, x0 = int(np.floor(y)), int(np.floor(x))
        value = 0.0
        for i, wy in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
            for j, wx in ((x0, 1 - (x - x0)), (x0 + 1, x - x0)):
                value += wy * wx * coarse[min(max(i, 0), 5), min(max(j, 0), 5)]
        expected = FOREGROUND if value >= 0.7 else BACKGROUND if value < 0.3 else UNCERTAIN
        assert found.trimap[row, column] == expected


@pytest.mark.parametrize(
    ("attention", "error"),
    [(np.zeros((2, 3, 3)), MapError), (np.zeros((0, 3)), MapError), (np.full((3, 3), 1.5), MapError),
     (np.full((3, 3), np.nan), MapError), (np.full((3, 3), -0.1), MapError)],
)  # fmt: skip
def test_bad_attention_is_named(attention, error):
    with pytest.raises(error, match="attention"):
        enhance(scene()[0], attention)


def test_bad_arguments_are_named():
    image, _, attention = scene()
    with pytest.raises(ParameterError, match="thresholds"):
        enhance(image, attention, 0.3, 0.5)
    with pytest.raises(ParameterError, match="0 iterations"):
        enhance(image, attention, iterations=0)
    with pytest.raises(MapError, match="float64"):
        enhance(image / 255, attention)
    with pytest.raises(ValueError, match="bg_threshold"):
        GrabCutConfig(fg_threshold=0.1, bg_threshold=0.2)


# Cut


@pytest.mark.parametrize("uncertain", ["background", "none"])
def test_the_cut_finds_the_disc_that_the_attention_only_points_to(uncertain):
    image, truth, attention = scene()
    found = enhance(image, attention, 0.75, 0.3, uncertain=uncertain)
    best = max(iou(attention >= t, truth) for t in np.arange(0.05, 1, 0.05))
    assert found.outcome == "enhanced"
    assert iou(found.mask, truth) > 0.98 > best
    assert found.mask[found.trimap == FOREGROUND].all()
    assert not found.mask[found.trimap == BACKGROUND].any()


def test_the_models_have_the_moments_of_their_pixels():
    """Weights, means and covariances of a mixture fitted to a set add up to the set's own mean and covariance."""
    image, _, attention = scene(noise=30)
    found = enhance(image, attention, 0.75, 0.3, uncertain="none")
    for mixture, label in ((found.background, BACKGROUND), (found.foreground, FOREGROUND)):
        pixels = image[found.trimap == label].astype(float)
        mean = sum(w * m for w, m in zip(mixture.weights, mixture.means, strict=True))
        spread = np.zeros((3, 3))
        for w, m, c in zip(mixture.weights, mixture.means, mixture.covariances, strict=True):
            spread += w * (c + np.outer(m - mean, m - mean))
        assert mixture.weights.sum() == pytest.approx(1)
        assert np.allclose(mean, pixels.mean(axis=0))
        assert np.allclose(spread, np.cov(pixels.T, bias=True), atol=0.1)  # OpenCV adds 0.01 to singular ones


def test_the_energy_by_loops():
    image, _, attention = scene(side=8, noise=45)
    found = enhance(image, attention, 0.7, 0.3, uncertain="none")
    u, v = plain_energy(image, found.trimap, found.background, found.foreground, gamma=7.0)
    pixels, squares = image.astype(float), {}
    for row, column, other_row, other_column in np.ndindex(8, 8, 8, 8):
        if 0 < max(abs(row - other_row), abs(column - other_column)) < 2:
            pair = (row, column), (other_row, other_column)
            squares[pair] = sum((pixels[pair[0]][c] - pixels[pair[1]][c]) ** 2 for c in range(3))
    assert len(v) == len(squares) / 2  # each pair once
    for (p, q), weight in v.items():
        far = ((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2) ** 0.5
        expected = 7 / far * np.exp(-squares[p, q] / (2 * np.mean(list(squares.values()))))
        assert weight == pytest.approx(expected)
    for p in np.ndindex(8, 8):
        if found.trimap[p] != UNCERTAIN:
            assert u[:, p[0], p[1]].tolist() == ([63, 0] if found.trimap[p] == FOREGROUND else [0, 63])
            continue
        for side, mixture in enumerate((found.background, found.foreground)):
            density = 0.0
            for weight, mean, covariance in zip(*mixture, strict=True):
                if weight > 0:
                    d = pixels[p] - mean
                    density += (
                        weight / np.sqrt(np.linalg.det(covariance)) * np.exp(-d @ np.linalg.inv(covariance) @ d / 2)
                    )
            assert u[side][p] == pytest.approx(-np.log(density + 1e-300))


def test_the_mask_is_a_minimum_cut_of_the_published_energy():
    image, _, attention = scene(side=16, noise=45)
    found = enhance(image, attention, 0.7, 0.3, uncertain="none")
    u, v = plain_energy(image, found.trimap, found.background, found.foreground)
    u -= u.min(axis=0)  # shifted alike, no mask is better or worse for it; and capacities must not be negative

    def energy(mask):
        return np.where(mask, u[1], u[0]).sum() + sum(weight for (p, q), weight in v.items() if mask[p] != mask[q])

    scale, size = 1e4, found.mask.size
    graph = np.zeros((size + 2, size + 2), np.int64)
    for (p, q), weight in v.items():
        i, j = np.ravel_multi_index(p, found.mask.shape), np.ravel_multi_index(q, found.mask.shape)
        graph[i, j] = graph[j, i] = round(weight * scale)
    graph[size, :size], graph[:size, size + 1] = np.rint(u * scale).reshape(2, -1)
    least = maximum_flow(csr_matrix(graph.astype(np.int32)), size, size + 1).flow_value / scale
    assert found.outcome == "enhanced"
    assert energy(found.mask) == pytest.approx(least, rel=1e-4)
    assert energy(attention >= 0.5) > 1.01 * least  # the thresholded attention is no minimum: the comparison can fail


def test_released_counts_the_uncertain_as_background_first():
    """A ring of one more colour, uncertain: whether it belongs to the background's model decides what becomes of it."""
    image, _, attention = scene(noise=15)
    ring = (attention < 0.75) & (attention >= 0.45)
    image[ring] = np.clip(image[ring] * 0.1 + (190, 80, 40), 0, 255)  # nearer to the disc than to the ground
    released, paper = (enhance(image, attention, 0.75, 0.3, uncertain=u) for u in ("background", "none"))
    assert paper.mask[ring].mean() > 0.9
    assert released.outcome == "unchanged", "nothing was added to the sure foreground"
    nearest = [np.abs(m.background.means - (195, 90, 44)).max(axis=1).min() for m in (released, paper)]
    assert nearest[0] < 20 < 60 < nearest[1]


def test_equal_arguments_give_equal_masks_in_any_order():
    images = [scene(noise=60, seed=s) for s in range(4)]
    first = [enhance(i, a, 0.7, 0.2).mask for i, _, a in images]
    cv2.setRNGSeed(77)
    again = [enhance(i, a, 0.7, 0.2).mask for i, _, a in reversed(images)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


class Tokens(torch.nn.Linear):
    """A transformer that has made up its mind: two images, three layers, four heads, a grid of 2 x 3."""

    grid, attention = (2, 3), torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))

    def forward(self, images):
        return self


def test_the_guide_takes_layers_and_heads():
    tokens, images = Tokens(1, 1), torch.zeros(2, 3, 8, 8)
    for layers, first in (("last", 2), ("mean", 0)):
        for image, found in enumerate(Attend(tokens, layers, heads=2).maps(images)):
            rows = tokens.attention[image, first:]
            plain = sum(rows[layer, head] for layer in range(len(rows)) for head in range(2))
            plain = (plain - plain.min()) / (plain.max() - plain.min())
            assert torch.allclose(found.flatten(), plain, atol=1e-5)
    with pytest.raises(ParameterError, match="5 heads"):
        Attend(tokens, heads=5).maps(images)


def test_presets_differ_where_the_sources_differ():
    paper, released = GrabCutConfig.paper(), GrabCutConfig.released(iterations=2)
    assert (paper.uncertain, paper.heads) == ("none", 0)
    assert (released.uncertain, released.heads, released.iterations) == ("background", 3, 2)
    assert (released.fg_threshold, released.bg_threshold, released.size) == (0.1, 0.03, 256)


# Masks of a data set


class Discs(LocalizationDataset):
    """Six scenes in memory; counts what is read."""

    name, root, split, class_names = "discs", Path("."), "train", ("disc",)

    def __init__(self, count=6):
        self.scenes = [scene(seed=s) for s in range(count)]
        self.image_ids = tuple(f"discs/{s}" for s in range(count))
        self.labels = ((0,),) * count
        self.asked = []

    def __cache_key__(self, _reading):
        return self.image_ids

    def read(self, index, truth=True):
        assert not truth, "masks are made without looking at the truth"
        self.asked.append(index)
        return Sample(self.scenes[index][0], self.image_ids[index], (0,))


CONFIG = GrabCutConfig(fg_threshold=0.75, bg_threshold=0.3, size=48)


def attend(samples):
    return np.stack([scene(seed=int(s.image_id.split("/")[1]))[2] for s in samples])


def made(folder, dataset=None, guide=attend, config=CONFIG, **options):
    return maker(dataset or Discs(), guide, config, **{"progress": False, **options})(folder)


def test_masks_are_those_of_enhance_and_are_read_back(tmp_path):
    discs = Discs()
    store = made(tmp_path, discs, jobs=2, chunk=4)
    for image_id, (image, _, attention) in zip(discs.image_ids, discs.scenes, strict=True):
        expected = enhance(image, attention, 0.75, 0.3)
        mask, facts = store.read_mask(image_id)
        assert mask.dtype == bool
        assert np.array_equal(mask, expected.mask)
        assert facts == {"outcome": expected.outcome}
    assert report(store, discs.image_ids) == {"images": 6, "enhanced": 6, "unchanged": 0, "empty": 0, "full": 0}


def test_masks_do_not_depend_on_jobs_chunks_or_order(tmp_path):
    discs = Discs()
    store = made(tmp_path / "together", discs, jobs=2, chunk=4)
    alone = made(tmp_path / "alone", jobs=1, chunk=1)
    reversed_ = made(tmp_path / "reversed", Discs().subset([5, 4, 3, 2, 1, 0]), jobs=1, chunk=3)
    for image_id in discs.image_ids:
        whole = store.path(image_id, ".png").read_bytes()
        assert alone.path(image_id, ".png").read_bytes() == whole
        assert reversed_.path(image_id, ".png").read_bytes() == whole


def test_the_report_counts_what_fell_back(tmp_path):
    discs = Discs(3)
    maps = {"discs/0": 0.0, "discs/1": 1.0}

    def odd(samples):
        return np.stack([np.full((6, 6), maps[s.image_id]) if s.image_id in maps else attend([s])[0][::8, ::8]
                         for s in samples])  # fmt: skip

    store = made(tmp_path, discs, odd)
    assert report(store, discs.image_ids) == {"images": 3, "enhanced": 1, "unchanged": 0, "empty": 1, "full": 1}


def test_an_interrupted_run_goes_on_without_redoing_or_losing(tmp_path):
    discs = Discs()

    def interrupted(samples):
        if samples[0].image_id == "discs/4":
            raise KeyboardInterrupt
        return attend(samples)

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, discs, interrupted, jobs=1, chunk=2)
    kept = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*.png")}
    assert len(kept) == 4
    again = Discs()
    store = made(tmp_path, again, jobs=1, chunk=2)
    assert sorted(again.asked) == [4, 5]
    assert all((path.read_bytes(), path.stat().st_mtime_ns) == state for path, state in kept.items())
    assert store.to_do(discs.image_ids) == []
    assert not list(tmp_path.rglob(".*png*")), "half-written files are left"


def test_finished_masks_ask_for_nothing(tmp_path):
    made(tmp_path)
    again = Discs()
    made(tmp_path, again, guide=None)
    assert again.asked == []


def test_a_damaged_mask_is_made_again_and_no_other(tmp_path):
    discs = Discs()
    store = made(tmp_path, discs)
    file = store.path("discs/2", ".png")
    whole = file.read_bytes()
    for damaged in (whole[:-40], store.path("discs/3", ".png").read_bytes()):
        file.write_bytes(damaged)
        again = Discs()
        made(tmp_path, again)
        assert again.asked == [2]
        assert file.read_bytes() == whole


def test_the_guide_is_the_backbones_attention_of_the_resized_images():
    torch.manual_seed(0)
    backbone = create_backbone("vit_mini_dino", image_size=64).eval()
    samples = [Sample(scene(side=80, seed=s)[0], str(s), (0,)) for s in range(2)]
    images = np.stack([Resize(64)(sample, None).image for sample in samples])
    pixels = (images / 255 - backbone.mean) / backbone.std
    for layers, heads in (("last", 0), ("mean", 2)):
        attend = Attend(backbone, layers, heads)
        expected = attend.maps(torch.from_numpy(pixels).permute(0, 3, 1, 2).float()).numpy()
        assert np.allclose(attend(samples), expected, atol=1e-5)


@pytest.fixture
def run(tmp_path):
    return runs.start("x", {"seed": 0}, tmp_path)


def test_a_run_keeps_masks_and_makes_what_is_damaged(run, capsys):
    discs = Discs()

    def make(config=CONFIG, jobs=1):
        return run.cached("masks", maker(discs, attend, config, jobs, False))

    folder = make()
    assert make(jobs=2) == folder, "the number of jobs does not change a mask"
    file = Store(folder).path("discs/2", ".png")
    whole, seen = file.read_bytes(), len(discs.asked)
    file.write_bytes(whole[:50])
    assert make() == folder
    assert file.read_bytes() == whole
    assert discs.asked[seen:] == [2]
    assert make(CONFIG.model_copy(update={"iterations": 2})) != folder
    assert "iterations was 1, is 2" in capsys.readouterr().out
