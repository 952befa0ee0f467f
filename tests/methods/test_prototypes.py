import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wsolnb import backbones, seeds
from wsolnb.data import Sample
from wsolnb.data.base import LocalizationDataset
from wsolnb.data.store import Store
from wsolnb.errors import DataError, MapError, ParameterError
from wsolnb.methods import lpcam
from wsolnb.methods import prototypes as prototypes_module
from wsolnb.methods.cam import CAMClassifier
from wsolnb.methods.lpcam import LPCAMConfig
from wsolnb.methods.mctformer import MCTformer, PatchTokens
from wsolnb.train.seeds import best_thresholds, image_scores, score_stored, score_variants

ONE = {"scales": (1.0,), "flip": "none"}


class Images(LocalizationDataset):
    """Random images with labels; `broken` cannot be read."""

    name, multi_label, split = "images", True, "train"

    def __init__(self, labels, sizes=None, broken=(), masks=True):
        self.labels = tuple(tuple(sorted(x)) for x in labels)
        self.image_ids = tuple(f"im_{i}" for i in range(len(labels)))
        self.class_names = ("a", "b", "c")
        self.sizes, self.broken, self.masks = sizes or [(32, 32)] * len(labels), set(broken), masks

    def read(self, index, truth=True):
        if index in self.broken:
            raise DataError(f"cannot decode /data/{self.image_ids[index]}.jpg: truncated", "copy it again")
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (*self.sizes[index], 3), dtype=np.uint8)
        mask = rng.choice([0, 255, *(c + 1 for c in self.labels[index])], self.sizes[index]).astype(np.uint8)
        return Sample(image, self.image_ids[index], self.labels[index], mask=mask if self.masks and truth else None)


class Pixels:
    """A host of a few numbers: features are a fixed mix of colours, averaged over 8 x 8 pixels."""

    def __init__(self, classes=3, dim=5):
        generator = torch.Generator().manual_seed(0)
        self.mix = torch.randn(dim, 3, generator=generator)
        self.weight = torch.randn(classes, dim, generator=generator) + 0.5

    def __call__(self, images):
        return F.avg_pool2d(torch.einsum("dc,bchw->bdhw", self.mix, images), 8).relu()


def live(labels=((0,), (1,), (0, 2), (2,), (0,)), **options):
    return seeds.LiveFeatures(Pixels(), Images(labels, **options))


def test_features_are_aligned_at_every_scale_and_flip():
    source = live(sizes=[(32, 48)] * 2 + [(32, 32)] * 3)
    found = list(source.images(scales=(1.0, 0.5), flip=True))
    assert [f.image_id for f in found] == list(source.image_ids)
    assert found[0].size == (32, 48)
    assert [tuple(s.shape) for s in found[0].scales] == [(2, 5, 4, 6), (2, 5, 2, 3)]
    # Averages of cells do not see the mirror, so both views agree where they show the same place.
    torch.testing.assert_close(found[0].scales[0][0], found[0].scales[0][1])
    alone = next(source.images([4]))
    torch.testing.assert_close(alone.scales[0][0], found[4].scales[0][0])
    assert next(seeds.LiveFeatures(Pixels(), source.dataset, 64).images()).scales[0].shape == (1, 5, 8, 8)


class OneSquare(Images):
    """A black image of 375 x 500 pixels with one white square, two cells of stride 16 wide: one at half the size."""

    def __init__(self, row, column):
        super().__init__([(0,)], [(375, 500)])
        self.place = slice(16 * row, 16 * row + 32), slice(16 * column, 16 * column + 32)

    def read(self, index, truth=True):
        image = np.zeros((375, 500, 3), np.uint8)
        image[self.place] = 255
        return Sample(image, self.image_ids[index], self.labels[index])


class Brightness:
    """A host of stride 16: its one feature is the mean brightness of a cell, of what lies inside of the image."""

    stride, mean, std = 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    weight = torch.ones(3, 1)

    def __call__(self, images):
        return F.avg_pool2d(images.mean(dim=1, keepdim=True), 16, ceil_mode=True)


@pytest.mark.parametrize("kind", ["live", "dump"])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5)])
def test_a_square_at_the_edge_is_found_at_its_place(scales, kind, tmp_path):
    dataset = OneSquare(20, 26)
    source = seeds.LiveFeatures(Brightness(), dataset)
    if kind == "dump":
        source = seeds.write_dump(source, tmp_path, scales)
    found = next(source.images(scales=scales))
    assert (found.size, found.area) == ((375, 500), (384, 512))
    made = next(seeds.seed_maps(source, "cam", LPCAMConfig(scales=scales, flip="none"))).maps[0].astype(float)
    for index, place in zip(np.indices(made.shape), dataset.place, strict=True):
        assert abs((made * (index + 0.5)).sum() / made.sum() - (place.start + 16)) < 1
    both = lpcam.Directions(torch.ones(1, 1), torch.tensor([False]))
    config = LPCAMConfig(scales=scales, flip="none")
    # The cosine of one feature is 1 in the square's cells and 0 outside.
    same = lpcam.lpcam_of(found.scales[:1], both, found.size, config, found.area)[0].numpy()
    assert np.argwhere(same > 0.5).mean(axis=0) + 0.5 == pytest.approx([16 * 20 + 16, 16 * 26 + 16], abs=1)
    resized = next(seeds.LiveFeatures(Brightness(), dataset, 112).images())
    assert resized.area == resized.size == (375, 500)  # 7 cells of 16 are the 112 pixels that it was given


def test_the_area_of_a_real_network():
    model = CAMClassifier(backbones.create_backbone("resnet_mini", output_stride=16), 3)
    source = seeds.LiveFeatures(seeds.ConvExtractor(model), Images([(0,), (1,)], [(70, 90), (64, 96)]))
    found = list(source.images())
    assert [image.scales[0].shape[2:] for image in found] == [(5, 6), (4, 6)]
    assert [image.area for image in found] == [(80, 96), (64, 96)]


def test_split_and_clusters_by_loops():
    source = live()
    config = LPCAMConfig(clusters=500, tau=0.3, **ONE)  # more clusters than features: centres are the features
    made = seeds.fit_class(source, 0, config)
    foreground, context = [], []
    for index in (0, 2, 4):
        features = next(source.images([index])).scales[0][0].double()
        activation = [
            [max(0.0, float(features[:, y, x] @ source.weight[0].double())) for x in range(4)] for y in range(4)
        ]
        top = max(map(max, activation))
        for y in range(4):
            for x in range(4):
                (foreground if activation[y][x] > 0.3 * top else context).append(features[:, y, x])
    assert made.images == 3
    assert made.features == (len(foreground), len(context))
    torch.testing.assert_close(made.foreground.double(), torch.stack(foreground))
    torch.testing.assert_close(made.context.double(), torch.stack(context))


@pytest.mark.parametrize("maximum", ["grid", "image"])
def test_split_by_the_final_map_takes_the_nearest_pixel(maximum):
    source = live()
    config = LPCAMConfig(
        clusters=500, tau=0.2, split_cam="final", split_maximum=maximum, scales=(1.0, 2.0), flip="features"
    )
    made = seeds.fit_class(source, 1, config)
    found = next(source.images([1], config.scales, True))
    full = lpcam.cam_of(found.scales, source.weight[1:2], found.size)[0]
    grid = torch.stack([torch.stack([full[8 * y, 8 * x] for x in range(4)]) for y in range(4)])
    assert grid.max() < full.max() == 1  # no cell takes the pixel of the maximum
    top = grid.max() if maximum == "grid" else 1
    assert made.features == (int((grid > 0.2 * top).sum()), int((grid <= 0.2 * top).sum()))


def test_sampling_of_images_and_features():
    labels = [(0,)] * 30
    source = live(labels)
    config = LPCAMConfig(images_per_class=10, seed=3)
    chosen = seeds.class_images(source, 0, config)
    assert len(set(chosen)) == 10
    assert chosen == seeds.class_images(source, 0, config)
    drawn = seeds.class_images(source, 0, config.model_copy(update={"images_per_class": 40, "replacement": True}))
    assert len(drawn) == 40 > len(set(drawn))
    kept = seeds.fit_class(source, 0, LPCAMConfig(clusters=500, features_per_class=7, **ONE))
    assert len(kept.foreground) == len(kept.context) == 7 < min(kept.features)
    everything = seeds.fit_class(source, 0, LPCAMConfig(clusters=500, **ONE))
    assert all((everything.foreground == row).all(dim=1).any() for row in kept.foreground)
    # Uniform: over seeds, the first and the last half of the stream are kept equally often.
    reservoir_first = 0
    for seed in range(200):
        reservoir = prototypes_module._Reservoir(10, np.random.default_rng(seed))
        for row in range(40):
            reservoir.add(torch.tensor([[float(row)]]))
        reservoir_first += int((reservoir.all(1) < 20).sum())
    assert abs(reservoir_first / 2000 - 0.5) < 0.05


def test_interrupted_clustering_goes_on_by_class(tmp_path, monkeypatch):
    source, config = live(), LPCAMConfig(clusters=4, **ONE)
    plain = seeds.fit_prototypes(source, config)
    real, asked = seeds.fit_class, []

    def interrupted(source, index, *args):
        asked.append(index)
        if index == 2 and len(asked) == 3:
            raise KeyboardInterrupt
        return real(source, index, *args)

    monkeypatch.setattr(prototypes_module, "fit_class", interrupted)
    with pytest.raises(KeyboardInterrupt):
        seeds.fit_prototypes(source, config, tmp_path)
    found = seeds.fit_prototypes(
        source, config.model_copy(update={"mu_f": 0.5}), tmp_path
    )  # selection is no clustering
    assert asked == [0, 1, 2, 2]
    for a, b in zip(plain, found, strict=True):
        assert torch.equal(a.foreground, b.foreground)
        assert (a.images, a.features) == (b.images, b.features)
    seeds.fit_prototypes(source, config.model_copy(update={"tau": 0.5}), tmp_path)
    assert asked[4:] == [0, 1, 2]
    (tmp_path / "class_001.safetensors").write_bytes(b"cut off")
    seeds.fit_prototypes(source, config.model_copy(update={"tau": 0.5}), tmp_path)
    assert asked[7:] == [1]


def test_maps_by_loops():
    source, config = live(), LPCAMConfig(clusters=3, mu_f=0.3, mu_b=0.5, scales=(1.0, 2.0), flip="maps")
    prototypes = seeds.fit_prototypes(source, config)
    by_kind = list(seeds.all_seed_maps(source, seeds.KINDS, config, prototypes))
    found = list(source.images(None, config.scales, flip=True))
    cosine = nn.CosineSimilarity(dim=0)
    for image, kinds in zip(found, by_kind, strict=True):
        for position, label in enumerate(image.labels):
            chosen = lpcam.select_prototypes(prototypes[label].foreground, source.weight, label, config)
            context = lpcam.select_prototypes(prototypes[label].context, source.weight, label, config, context=True)
            for kind in seeds.KINDS:
                total = torch.zeros(image.size)
                for features in image.scales:
                    grid = torch.zeros(features.shape[2:])
                    for y in range(grid.shape[0]):
                        for x in range(grid.shape[1]):
                            for view in features:
                                local = view[:, y, x]
                                if kind == "cam":
                                    value = local @ source.weight[label]
                                else:
                                    value = torch.stack([cosine(local, p) for p in chosen]).mean()
                                    if kind == "lpcam" and len(context):
                                        value = value - torch.stack([cosine(local, p) for p in context]).mean()
                                grid[y, x] += max(0.0, float(value))
                    total += F.interpolate(grid[None, None], image.size, mode="bilinear", align_corners=False)[0, 0]
                expected = total / total.max() if total.max() > 0 else total
                np.testing.assert_allclose(kinds[kind].maps[position], expected, atol=1e-5)


def test_released_switches():
    torch.manual_seed(0)
    scales = [torch.randn(2, 4, 3, 3), torch.randn(2, 4, 6, 6)]
    class_prototypes, context = torch.randn(3, 4), torch.randn(2, 4)
    both = lpcam.Directions(
        torch.stack([lpcam.direction(class_prototypes, context), lpcam.direction(class_prototypes)]),
        torch.tensor([True, False]),
    )
    config = LPCAMConfig.released("voc", scales=(1.0, 2.0))
    found = lpcam.lpcam_of(scales, both, (12, 12), config)
    total = torch.zeros(2, 12, 12)
    for features in scales:
        summed = features[0] + features[1]  # before the cosine
        for row, contexts in enumerate((context, None)):
            grid = torch.zeros(summed.shape[1:])
            for y in range(grid.shape[0]):
                for x in range(grid.shape[1]):
                    value = F.cosine_similarity(summed[None, :, y, x], class_prototypes).mean()
                    if contexts is not None:
                        value = (value - F.cosine_similarity(summed[None, :, y, x], contexts).mean()).relu()
                    grid[y, x] = value  # without context prototypes there is no ReLU
            total[row] += F.interpolate(grid[None, None], (12, 12), mode="bilinear", align_corners=False)[0, 0]
    expected = total.clamp(min=0) / total.amax(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    summed = lpcam.lpcam_of(scales, both, (12, 12), config.model_copy(update={"over_scales": "sum"}))
    torch.testing.assert_close(summed, found)  # divided by the maximum afterwards, so it makes no difference
    for flip in ("none", "maps"):
        assert not torch.allclose(
            lpcam.lpcam_of(scales, both, (12, 12), config.model_copy(update={"flip": flip})), found
        )


def test_images_without_labels_and_zero_maps():
    source = live([(), (0,)])
    config = LPCAMConfig(clusters=2, **ONE)
    prototypes = seeds.fit_prototypes(source, config)
    none, one = seeds.all_seed_maps(source, seeds.KINDS[:1], config, prototypes)
    assert none["cam"].maps.shape == (0, 32, 32)
    assert (seeds.seed_mask(none["cam"].maps, (), 0.3) == 0).all()
    assert one["cam"].maps.shape == (1, 32, 32)
    with pytest.raises(ParameterError, match="class 1 has no local features"):
        list(seeds.all_seed_maps(source, ("lpcam",), config, prototypes))
    found = list(seeds.all_seed_maps(source, ("lpcam",), config, prototypes, missing="zero"))
    assert found[1]["lpcam"].maps.max() == 1
    assert prototypes[1].images == 0
    zero = lpcam.lpcam_of(
        [-torch.ones(1, 5, 4, 4)], lpcam.Directions(torch.ones(1, 5), torch.tensor([True])), (8, 8), config
    )
    assert torch.equal(zero, torch.zeros(1, 8, 8))
    assert torch.equal(lpcam.cam_of([-torch.ones(1, 5, 4, 4)], torch.ones(1, 5), (8, 8)), torch.zeros(1, 8, 8))


@pytest.mark.parametrize("kind", ["live", "dump"])
def test_an_unreadable_image_in_the_middle(kind, tmp_path):
    labels = [(0,), (1,), (2,), (0, 1)]
    source = live(labels, broken=() if kind == "dump" else [2])
    if kind == "dump":
        source = seeds.write_dump(source, tmp_path)
        (tmp_path / "im_2.npz").write_bytes(b"PK cut off")
    config = LPCAMConfig(clusters=2, **ONE)
    with pytest.raises(DataError, match="im_2"):
        list(seeds.all_seed_maps(source, ("cam",), config))
    with pytest.warns(UserWarning, match="left out im_2: .*im_2.(npz cannot be read|jpg: truncated)"):
        found = list(seeds.all_seed_maps(source, ("cam",), config, unreadable="skip"))
    assert [f["cam"].image_id for f in found] == ["im_0", "im_1", "im_3"]
    with pytest.warns(UserWarning, match="left out im_2"):
        prototypes = seeds.fit_prototypes(source, config, unreadable="skip")
    assert [p.images for p in prototypes] == [2, 2, 0]


def test_a_dump_gives_what_the_network_gave(tmp_path):
    source = live(sizes=[(32, 48)] * 5)
    config = LPCAMConfig(clusters=3, mu_f=0.3, scales=(1.0, 0.5), flip="maps")
    dump = seeds.write_dump(source, tmp_path, config.scales, flip=True, dtype=np.float32)
    assert (dump.class_names, dump.labels, len(dump)) == (source.class_names, source.labels, 5)
    prototypes = [seeds.fit_prototypes(s, config) for s in (source, dump)]
    for a, b in zip(
        *(seeds.seed_maps(s, "lpcam", config, p) for s, p in zip((source, dump), prototypes, strict=True)), strict=True
    ):
        np.testing.assert_array_equal(a.maps, b.maps)
    with pytest.raises(ParameterError, match=r"asked for: \[3.0\]"):
        next(dump.images(scales=(3.0,)))
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "images"}))
    with pytest.raises(DataError, match="no feature dump: KeyError: 'images'"):
        seeds.FeatureDump(tmp_path)
    with pytest.raises(DataError, match="nowhere"):
        seeds.FeatureDump(tmp_path / "nowhere")


def test_extractors_of_real_networks():
    images = torch.randn(2, 3, 64, 64)
    model = CAMClassifier(backbones.create_backbone("resnet_mini", output_stride=8), 3)
    host = seeds.ConvExtractor(model)
    with torch.inference_mode():
        features, output = host(images), model.eval()(images)
    torch.testing.assert_close(features, output.features)
    assert host.weight.shape == (3, 256)
    cam = lpcam.cam_of([features[:1]], host.weight[1:2], (8, 8))[0]
    expected = model.localize(output, torch.tensor([1, 1]))["cam"][0]
    torch.testing.assert_close(cam, expected / expected.max(), atol=1e-5, rtol=1e-4)

    vit = backbones.create_backbone("vit_mini", image_size=64)
    tokens = seeds.TokenExtractor(vit, torch.randn(3, 96, 3, 3))
    with torch.inference_mode():
        features = tokens(images)
    assert features.shape == (2, 96, 8, 8)
    torch.testing.assert_close(features[0, :, 2, 5], vit.eval()(images).patches[0, 2 * 8 + 5])
    field = torch.ones(1, 96, 3, 3) * features[:1, :, :1, :1]
    # Weights of all ones would sum normalised features, which is zero but for rounding.
    kernel = torch.randn(3, 96, 3, 3)
    asked = F.conv2d(field, kernel)[0, :, 0, 0]
    found = seeds.TokenExtractor(vit, kernel).weight @ features[0, :, 0, 0]
    torch.testing.assert_close(found, asked, atol=1e-3, rtol=1e-4)
    with pytest.raises(ParameterError, match=r"shape \(3,\)"):
        seeds.TokenExtractor(vit, torch.ones(3))

    host = PatchTokens(MCTformer(vit, 3))
    source = seeds.LiveFeatures(host, Images([(0,), (1, 2)]), 64)
    config = LPCAMConfig(clusters=2, scales=(1.0, 0.5))
    found = list(seeds.seed_maps(source, "lpcam", config, seeds.fit_prototypes(source, config), missing="zero"))
    assert [f.maps.shape for f in found] == [(1, 32, 32), (2, 32, 32)]
    data = Images([(0,)])
    data.class_names = ("a", "b")
    with pytest.raises(ParameterError, match="3 classes, the data set 2"):
        seeds.LiveFeatures(host, data)


def test_seed_masks_and_scores_agree(tmp_path):
    source = live()
    config = LPCAMConfig(**ONE)
    found = list(seeds.all_seed_maps(source, ("cam",), config))
    scores = seeds.evaluate(found, source.dataset)["cam"]
    assert scores.parts is None
    confusion = np.zeros((4, 4))
    for index, by_kind in enumerate(found):
        mask = source.dataset[index].mask
        own = seeds.seed_mask(by_kind["cam"].maps, by_kind["cam"].classes, 0.37)
        for y in range(32):
            for x in range(32):
                values = by_kind["cam"].maps[:, y, x]
                best = int(values.argmax())
                expected = by_kind["cam"].classes[best] + 1 if values[best] > np.float32(0.37) else 0
                assert own[y, x] == expected
                if mask[y, x] != 255:
                    confusion[mask[y, x], expected] += 1
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    assert scores.segmentation.curve.at(0.37)["miou"] == pytest.approx(np.mean(np.diag(confusion) / union))
    prototypes_module.write_maps(source, {"cam": None, "again": None}, config, tmp_path)
    for name in ("cam", "again"):
        stored = Store(tmp_path / name).read_maps("im_2")
        assert stored.classes == (0, 2)
        np.testing.assert_allclose(stored.maps, found[2]["cam"].maps, atol=1e-3)
    before = (tmp_path / "cam" / "im_1.npz").stat().st_mtime_ns
    (tmp_path / "cam" / "im_2.npz").unlink()  # an interruption: the next call makes what is missing
    prototypes_module.write_maps(source, {"cam": None, "again": None}, config, tmp_path)
    np.testing.assert_allclose(Store(tmp_path / "cam").read_maps("im_2").maps, found[2]["cam"].maps, atol=1e-3)
    assert (tmp_path / "cam" / "im_1.npz").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="im_9"):
        Store(tmp_path / "cam").read_maps("im_9")
    by_image = list(image_scores(source, {"cam": None}, config, {"cam": 0.37}))
    one = seeds.evaluate(found[2:3], source.dataset)["cam"].segmentation.at(0.37)
    assert len(by_image) == 5
    assert by_image[2]["cam"] == pytest.approx(one.miou)
    (row,) = score_stored(Store(tmp_path / "cam"), source.dataset, Store(tmp_path / "again"), source.dataset)
    best = seeds.evaluate(({"cam": m} for m in Store(tmp_path / "cam").all_maps(source.image_ids)), source.dataset)
    assert (row["threshold"], row["val_miou"]) == best["cam"].segmentation.best()
    assert row["miou"] == pytest.approx(row["val_miou"])
    assert best_thresholds(source, {"x": None}, config)[0]["miou"] == scores.segmentation.best()[1]
    assert score_variants(source, source, {"x": None}, config)[0] == seeds.scored(scores, scores)
    with pytest.raises(MapError, match="for 2 classes"):
        seeds.seed_mask(np.zeros((1, 2, 2), np.float32), (0, 1), 0.3)
    with pytest.raises(MapError, match="no image has a mask"):
        seeds.evaluate(found, live(masks=False).dataset)
    row = seeds.scored(scores, scores)
    assert row["miou"] == row["oracle"] >= row["miou_fixed"]


def test_unknown_maps_and_missing_prototypes():
    source = live()
    with pytest.raises(ParameterError, match=r"'lpcamf' \(did you mean 'lpcam-f'\?\)"):
        list(seeds.all_seed_maps(source, ("lpcamf",), LPCAMConfig()))
    with pytest.raises(ParameterError, match="need prototypes"):
        list(seeds.all_seed_maps(source, ("lpcam",), LPCAMConfig()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(source.images())) == 5
