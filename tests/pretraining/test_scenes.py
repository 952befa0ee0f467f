import numpy as np
import pytest

from wsolnb.data import aviary
from wsolnb.errors import DataError
from wsolnb.pretraining import scenes as creatures
from wsolnb.pretraining.scenes import BACKGROUND, LIMB, SASH, CreatureConfig

CONFIG = CreatureConfig(scenes=30, frames=2)


@pytest.fixture(scope="module")
def scenes():
    return [[creatures.render(CONFIG, i, f) for f in range(2)] for i in range(CONFIG.scenes)]


def test_nothing_is_shared_with_the_birds():
    assert not set(creatures.TEXTURES) & set(aviary.PATTERNS)
    birds = creatures.to_lab(np.array([*aviary.HEAD_COLOURS.values(), *aviary.PLUMAGES]))
    rng = np.random.default_rng(3)
    drawn = creatures.to_lab(np.array([creatures.draw_colour(rng) for _ in range(500)]))
    distances = np.linalg.norm(drawn[:, None] - birds[None], axis=2)
    assert distances.min() >= creatures.COLOUR_DISTANCE
    assert distances.max() > 100  # and yet they fill the colour space
    assert (np.ptp(drawn, axis=0) > [60, 80, 80]).all()


def test_every_colour_that_a_creature_wears_is_far_from_the_birds(scenes):
    birds = creatures.to_lab(np.array([*aviary.HEAD_COLOURS.values(), *aviary.PLUMAGES]))
    worn = np.concatenate(
        [np.stack([s.colours[s.textures >= 0][:, [0, 2, 3]] for s in [pair[0]]]).reshape(-1, 3) for pair in scenes]
    )
    assert len(worn) > 60
    assert np.linalg.norm(worn[:, None] - birds[None], axis=2).min() >= creatures.COLOUR_DISTANCE - 1e-3


def test_lab_is_that_of_the_standard():
    # Published values of the sRGB primaries (D65).
    lab = creatures.to_lab(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]))
    expected = [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [100, 0, 0]]
    np.testing.assert_allclose(lab, expected, atol=0.6)


def test_truth_is_consistent(scenes):
    for scene in (scene for pair in scenes for scene in pair):
        assert scene.image.shape == (112, 112, 3)
        assert scene.image.dtype == np.uint8
        assert ((scene.owner > 0) == (scene.parts != BACKGROUND)).all()
        count = int((scene.textures >= 0).sum())
        assert 1 <= count <= 3
        assert scene.owner.max() <= count
        assert np.isfinite(scene.colours[:count]).all()
        assert np.isnan(scene.colours[count:]).all()


def test_frames_show_the_same_creatures_elsewhere(scenes):
    for first, second in scenes:
        np.testing.assert_array_equal(first.textures, second.textures)
        np.testing.assert_array_equal(first.colours, second.colours)
        assert not np.array_equal(first.owner, second.owner)
    # The background is another one: corners differ far more than by grain.
    corners = [np.abs(a.image[:12, :12].mean((0, 1)) - b.image[:12, :12].mean((0, 1))).max() for a, b in scenes]
    assert np.median(corners) > 25


def test_the_sash_has_the_colours_of_the_truth():
    plain = CONFIG.model_copy(update={"sash": False})
    with_sash, without = creatures.render(CONFIG, 4), creatures.render(plain, 4)
    assert (with_sash.parts == SASH).any()
    assert not (without.parts == SASH).any()
    assert np.isnan(without.colours[0, 2:]).all()
    assert (without.parts == LIMB).sum() == (with_sash.parts == LIMB).sum()


def test_a_sash_moves_to_an_end_or_a_limb_and_nothing_else_changes():
    plain = CreatureConfig(scenes=30, frames=1)
    moved, kept, sizes = plain.model_copy(update={"ends": 1.0}), 0, []
    for index in range(30):
        before, after = creatures.render(plain, index), creatures.render(moved, index)
        np.testing.assert_array_equal(before.textures, after.textures)
        np.testing.assert_array_equal(before.colours, after.colours)
        kept += np.array_equal(before.parts == SASH, after.parts == SASH)
        if (before.textures >= 0).sum() == 1 and (after.parts == SASH).any():
            middle, sash = (np.argwhere(region).mean(axis=0) for region in (after.owner > 0, after.parts == SASH))
            old = np.argwhere(before.parts == SASH).mean(axis=0)
            sizes.append(np.linalg.norm(sash - middle) - np.linalg.norm(old - middle))
    assert kept == 0
    assert np.mean(np.array(sizes) > 0) > 0.8  # farther from the creature's centre than across its middle


def test_camouflage_brings_the_background_near_the_creature():
    def contrast(camouflage):
        config = CONFIG.model_copy(update={"camouflage": camouflage})
        values = []
        for index in range(CONFIG.scenes):
            scene = creatures.render(config, index)
            lab = creatures.to_lab(scene.image)
            body, ground = scene.parts == creatures.BODY, scene.owner == 0
            values.append(np.linalg.norm(np.median(lab[body], axis=0) - np.median(lab[ground], axis=0)))
        return np.median(values)

    assert contrast(1.0) < 0.7 * contrast(0.0)


def test_rough_backgrounds_have_more_light_and_shade():
    def spread(rough):
        grounds = [creatures._background(np.random.default_rng(i), 112, None, rough) for i in range(80)]
        return np.mean([creatures.to_lab(g.clip(0, 255).astype(np.uint8))[..., 0].std() for g in grounds])

    assert spread(True) > 1.2 * spread(False)


def test_images_are_the_same_every_time_and_depend_on_the_seed():
    again = creatures.render(CONFIG, 7, 1)
    np.testing.assert_array_equal(again.image, creatures.render(CONFIG, 7, 1).image)
    other = creatures.render(CONFIG.model_copy(update={"seed": 1}), 7, 1)
    assert not np.array_equal(again.image, other.image)


def test_scenes_are_rendered_once_and_only_whole(tmp_path, monkeypatch):
    small = CreatureConfig(scenes=6, frames=2, size=64)
    monkeypatch.setattr(creatures, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        creatures.load(small, tmp_path)
    assert not [made for made in tmp_path.iterdir() if made.suffix != ".lock"]
    monkeypatch.undo()
    scenes = creatures.load(small, tmp_path, workers=1)
    assert scenes["image"].shape == (6, 2, 64, 64, 3)
    for index, frame in ((0, 0), (5, 1)):
        for name, value in creatures.render(small, index, frame)._asdict().items():
            np.testing.assert_array_equal(scenes[name][index, frame], value)
    monkeypatch.setattr(creatures, "render", None)
    assert creatures.load(small, tmp_path)["image"].shape == (6, 2, 64, 64, 3)


def test_a_scene_that_is_not_there_is_named():
    with pytest.raises(DataError, match="no frame 2 of scene 3 among 30 scenes of 2 frames"):
        creatures.render(CONFIG, 3, 2)
