import hashlib
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsolnb.data import aviary, rendered
from wsolnb.data.aviary import AviaryConfig
from wsolnb.data.sample import CONTEXT, DISCRIMINATIVE, REST
from wsolnb.errors import DataError, ParameterError

GOLDEN = Path(__file__).parents[1] / "golden"


def truth_checksum(config, split, count):
    """Checksum of everything but the pixels of the images."""
    digest = hashlib.sha256()
    for index in range(count):
        sample = aviary.render(config, split, index)
        digest.update(json.dumps([sample.labels, sample.boxes.tolist(), sample.box_labels.tolist()]).encode())
        digest.update(sample.mask.tobytes())
        digest.update(sample.parts.tobytes())
    return digest.hexdigest()


def golden_strip(config):
    return np.concatenate([aviary.render(config, "val", index).image for index in range(4)], axis=1)


@pytest.mark.parametrize("variant", ["single", "scenes"])
def test_truth_and_images_are_the_recorded_ones(variant):
    config = AviaryConfig(variant=variant)
    recorded = json.loads((GOLDEN / "aviary.json").read_text())[variant]
    assert config.key == recorded["key"], "the defaults changed: raise FORMAT or record again"
    assert truth_checksum(config, "val", 24) == recorded["truth"]
    expected = np.asarray(Image.open(GOLDEN / f"aviary_{variant}.png")).astype(int)
    assert np.abs(golden_strip(config).astype(int) - expected).max() <= 1


def test_an_image_depends_on_configuration_split_and_index_only():
    config = AviaryConfig()
    first = aviary.render(config, "train", 7)
    aviary.render(config, "train", 8)
    assert np.array_equal(first.image, aviary.render(config, "train", 7).image)
    others = [
        aviary.render(config, "val", 7),
        aviary.render(config, "train", 19),
        aviary.render(AviaryConfig(seed=1), "train", 7),
    ]
    assert not any(np.array_equal(first.image, other.image) for other in others)


@pytest.mark.parametrize("variant", ["single", "scenes"])
def test_truth_is_consistent_with_itself(variant):
    config = AviaryConfig(variant=variant)
    for index in range(40):
        sample = aviary.render(config, "test", index)
        assert sample.image.shape == (112, 112, 3)
        assert np.array_equal(sample.mask > 0, sample.parts != CONTEXT)
        assert (sample.parts == DISCRIMINATIVE).any()
        assert (sample.parts == REST).any()
        assert sorted(sample.box_labels.tolist()) == list(sample.labels)
        assert len(set(sample.labels)) == len(sample.labels)
        for label, (x0, y0, x1, y1) in zip(sample.box_labels, sample.boxes.astype(int), strict=True):
            mine = sample.mask == (label + 1 if variant == "scenes" else 1)
            rows, columns = np.nonzero(mine)
            assert (x0, y0, x1, y1) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_default_benchmark_is_as_hard_as_promised():
    samples = [aviary.render(AviaryConfig(), "val", index) for index in range(300)]
    object_share = np.mean([(s.mask > 0).mean() for s in samples])
    head_share = np.mean([(s.parts == DISCRIMINATIVE).sum() / (s.mask > 0).sum() for s in samples])
    assert 0.10 < object_share < 0.17
    assert 0.13 < head_share < 0.19
    boxes = np.concatenate([s.boxes for s in samples])
    hits = []
    for width in range(24, 113, 4):
        for height in range(24, 113, 4):
            x0, y0, x1, y1 = 56 - width / 2, 56 - height / 2, 56 + width / 2, 56 + height / 2
            both = np.maximum(0, np.minimum(x1, boxes[:, 2]) - np.maximum(x0, boxes[:, 0])) * np.maximum(
                0, np.minimum(y1, boxes[:, 3]) - np.maximum(y0, boxes[:, 1])
            )
            either = width * height + (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) - both
            hits.append((both / either >= 0.5).mean())
    assert max(hits) <= 0.40


def test_classes_are_pairs_of_different_head_colours():
    for classes in (2, 3, 12, 13, aviary.MAX_CLASSES):
        patterns = AviaryConfig(classes=classes).head_patterns
        assert len(set(patterns)) == classes
        assert all(cap != cheek for cap, cheek in patterns)
    # No single colour tells a class of the default benchmark: each cap and each cheek occurs three times.
    caps = [cap for cap, _ in AviaryConfig().head_patterns]
    assert all(caps.count(colour) == 3 for colour in set(caps))


def bird_colour(sample):
    """Mean colour of what is visible of the bird besides its head."""
    return sample.image[sample.parts == REST].mean(axis=0)


def test_body_cue_makes_the_body_tell_the_class():
    def spread_within_class(cue):
        config = AviaryConfig(body_cue=cue, classes=6, occlusion=0)
        plumage = [[bird_colour(aviary.render(config, "train", 6 * k + c)) for k in range(25)] for c in range(6)]
        # Chromaticity, since the light differs between images.
        shares = np.array(plumage) / np.array(plumage).sum(axis=2, keepdims=True)
        means = shares.mean(axis=1)
        return np.linalg.norm(means - means.mean(axis=0), axis=1).mean()

    assert spread_within_class(1.0) > 2 * spread_within_class(0.0)


def test_context_correlation_ties_background_to_class():
    """With correlation 1 all backgrounds of a class are of one kind: greenness of the context separates classes."""

    def greenness(sample):
        context = sample.image[sample.parts == CONTEXT].mean(axis=0)
        return context[1] - context[2]

    def spread(correlation):
        config = AviaryConfig(context_correlation=correlation, classes=4)
        return np.std(
            [np.mean([greenness(aviary.render(config, "val", 4 * k + c)) for k in range(20)]) for c in range(4)]
        )

    assert spread(1.0) > 2 * spread(0.0)


def test_scale_and_position_dials():
    big = [aviary.render(AviaryConfig(scale=(0.8, 0.8), occlusion=0), "val", i).boxes[0] for i in range(20)]
    longest = [max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in big]
    assert all(abs(side - 0.8 * 112) <= 3 for side in longest)
    middle = [aviary.render(AviaryConfig(off_centre=0, occlusion=0), "val", i).boxes[0] for i in range(20)]
    assert all(abs((x0 + x1) / 2 - 56) <= 3 and abs((y0 + y1) / 2 - 56) <= 3 for x0, y0, x1, y1 in middle)


def test_occlusion_dial_hides_pixels():
    def area(occlusion):
        config = AviaryConfig(occlusion=occlusion, scale=(0.6, 0.6))
        return np.mean([(aviary.render(config, "val", index).mask > 0).mean() for index in range(60)])

    assert area(1.0) < 0.97 * area(0.0)


@pytest.mark.parametrize("variant", ["single", "scenes"])
def test_written_and_read_back_is_what_was_rendered(variant, tmp_path):
    config = AviaryConfig(variant=variant, train=14, val=3, test=5)
    for split, count in (("train", 14), ("val", 3), ("test", 5)):
        dataset = aviary.load(config, split, tmp_path)
        assert len(dataset) == count
        name, classes = f"aviary({split}", len(config.class_names)
        assert repr(dataset) == f"{name}: {count} images, {classes} classes)", "not the name of the layout's owner"
        assert repr(dataset.subset([0, 1])) == f"{name}: 2 images, {classes} classes)"
        assert tuple(name.split(".")[-1] for name in dataset.class_names) == config.class_names
        for index in range(count):
            read, made = dataset[index], aviary.render(config, split, index)
            assert read.labels == made.labels
            assert np.array_equal(read.boxes, made.boxes)
            assert np.array_equal(read.box_labels, made.box_labels)
            assert np.array_equal(read.mask, made.mask)
            assert np.array_equal(read.parts, made.parts)
            assert np.abs(read.image.astype(int) - made.image).mean() < 6  # JPEG


def test_cached_by_configuration_and_independent_of_workers(tmp_path):
    config = AviaryConfig(train=101, val=2, test=2)
    one = aviary.ensure(config, tmp_path / "one", workers=1)
    before = (one / "config.json").stat().st_mtime_ns
    assert aviary.ensure(config, tmp_path / "one") == one
    assert (one / "config.json").stat().st_mtime_ns == before
    two = aviary.ensure(config, tmp_path / "two", workers=2)
    assert one.name == two.name
    for path in sorted(one.rglob("*.*")):
        if path.is_file():
            assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path
    assert AviaryConfig(train=101, val=2, test=2, body_cue=0.5).key != config.key
    assert AviaryConfig(train=2400).key == AviaryConfig().key


def test_rendering_does_not_hang_where_opencv_has_threads(tmp_path):
    program = f"""
import cv2, numpy as np
from wsolnb.data import aviary, rendered
cv2.setNumThreads(2)
cv2.GaussianBlur(np.zeros((3000, 3000, 3), np.uint8), (31, 31), 5)
aviary.ensure(aviary.AviaryConfig(train=120, val=60, test=30, classes=2, size=64), {str(tmp_path)!r}, workers=2)
assert cv2.getNumThreads() == 2
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_interrupted_rendering_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(aviary, "_write_chunk", interrupt)
    with pytest.raises(KeyboardInterrupt):
        aviary.ensure(AviaryConfig(train=2, val=1, test=1), tmp_path, workers=1)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_what_several_want_at_once_is_rendered_once(tmp_path, capsys):
    written = []

    def write(folder):
        written.append(folder)
        time.sleep(0.5)
        (folder / "image").write_text("rendered")

    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(rendered.ensure_rendered, tmp_path / "set", write, "a set") for _ in range(3)]
    assert {one.result() for one in asked} == {tmp_path / "set"}
    assert len(written) == 1
    assert capsys.readouterr().out.count("which is rendering a set") == 2


def test_bad_parameters_are_named(tmp_path):
    with pytest.raises(ParameterError, match="did you mean 'body_cue'"):
        AviaryConfig(body_que=0.5)
    with pytest.raises(ParameterError, match="body_cue"):
        AviaryConfig(body_cue=1.5)
    with pytest.raises(ParameterError, match="scale"):
        AviaryConfig(scale=(0.9, 0.4))
    with pytest.raises(DataError, match="did you mean 'train'"):
        aviary.render(AviaryConfig(), "trian", 0)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        aviary.ensure(AviaryConfig(train=1, val=1, test=1), tmp_path / "file" / "cache")
