import numpy as np
import pytest
import torch

from wsolnb.errors import MapError, ParameterError
from wsolnb.methods import lpcam as module
from wsolnb.methods.lpcam import LPCAMConfig, cluster_local_features, lpcam, select_prototypes, split_local_features


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


def test_pixels_are_split_as_equation_2_says():
    torch.manual_seed(0)
    features, cam = torch.randn(4, 3, 5), torch.rand(3, 5)
    cam[0, 0], cam[2, 4] = 2.0, 0.6  # the maximum; and exactly tau times it
    foreground, context = split_local_features(features, cam, tau=0.3)
    expected = {True: [], False: []}
    for y in range(3):
        for x in range(5):
            share = float(cam[y, x]) / 2.0
            if abs(share - 0.3) > 1e-6:
                expected[share > 0.3].append(features[:, y, x])
    assert torch.equal(foreground, torch.stack(expected[True]))
    assert torch.equal(context, torch.stack(expected[False]))
    assert len(foreground) + len(context) == 14
    plain, rest = split_local_features(features, cam, 0.3, "context", divide=False)  # the values as they are
    assert torch.equal(plain, torch.stack([features[:, y, x] for y in range(3) for x in range(5) if cam[y, x] > 0.3]))
    assert len(plain) + len(rest) == 15
    nothing, everything = split_local_features(features, torch.zeros(3, 5), 0.1)
    assert (len(nothing), len(everything)) == (0, 15)
    with pytest.raises(MapError, match="NaN"):
        split_local_features(features, torch.full((3, 5), torch.nan), 0.1)
    with pytest.raises(MapError, match=r"\(4, 3, 5\) and CAM \(5, 3\)"):
        split_local_features(features, cam.T, 0.1)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_k_means_is_a_fixed_point_of_its_two_steps(metric):
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(3, 6))
    features = np.concatenate([(d + 0.1 * rng.normal(size=(40, 6))) * rng.uniform(0.5, 3, (40, 1)) for d in directions])
    config = LPCAMConfig(clusters=3, metric=metric)
    centres = cluster_local_features(torch.from_numpy(features), config).tolist()
    members = {k: [] for k in range(3)}
    for f in features.tolist():
        if metric == "cosine":
            best = max(range(3), key=lambda k: cosine(f, centres[k]))
        else:
            best = min(range(3), key=lambda k: sum((a - b) ** 2 for a, b in zip(f, centres[k], strict=True)))
        members[best].append(f)
    for k in range(3):
        np.testing.assert_allclose(centres[k], np.mean(members[k], axis=0), atol=1e-9)  # of *raw* features
    if metric == "cosine":  # the three directions are found, whatever the lengths
        found = [max(range(3), key=lambda k: cosine(c, directions[k].tolist())) for c in centres]
        assert sorted(found) == [0, 1, 2]
        assert sorted(len(m) for m in members.values()) == [40, 40, 40]


@pytest.mark.parametrize("algorithm", ["kmeans", "minibatch", "hierarchical"])
def test_every_algorithm_finds_separate_groups(algorithm):
    rng = np.random.default_rng(1)
    groups = np.repeat(np.eye(4) * 5, 25, axis=0) + 0.05 * rng.normal(size=(100, 4))
    centres = cluster_local_features(torch.from_numpy(groups).float(), LPCAMConfig(clusters=4, algorithm=algorithm))
    assert centres.dtype == torch.float32
    assert sorted(centres.argmax(dim=1).tolist()) == [0, 1, 2, 3]


def test_few_equal_and_no_features():
    config = LPCAMConfig(clusters=4)
    assert cluster_local_features(torch.zeros(0, 3), config).shape == (0, 3)
    assert len(cluster_local_features(torch.randn(2, 3), config)) == 2
    same = cluster_local_features(torch.ones(50, 3), config)  # clusters run empty
    assert same.isfinite().all()
    assert torch.allclose(same, torch.ones(len(same), 3))
    zeros = cluster_local_features(torch.zeros(50, 3), config)
    assert zeros.isfinite().all()


def test_selection_by_loops():
    torch.manual_seed(0)
    centres, weight = 3 * torch.randn(30, 5), torch.randn(4, 5)
    config = LPCAMConfig(mu_f=0.8, mu_b=0.5, mu_b_least=0.05)
    kept, context = [], []
    for centre in centres.tolist():
        logits = [sum(c * w for c, w in zip(centre, row, strict=True)) for row in weight.tolist()]
        score = np.exp(logits[2]) / sum(np.exp(logits))
        if score > 0.8:
            kept.append(centre)
        if 0.05 < score < 0.5:
            context.append(centre)
    assert 0 < len(kept) < 30
    assert 0 < len(context) < 30
    np.testing.assert_allclose(select_prototypes(centres, weight, 2, config), kept, rtol=1e-6)
    np.testing.assert_allclose(select_prototypes(centres, weight, 2, config, context=True), context, rtol=1e-6)
    one = module.centre_scores(centres[:1], weight, 2, "sigmoid")
    assert float(one) == pytest.approx(1 / (1 + np.exp(-float(centres[0] @ weight[2]))), rel=1e-5)


def test_no_prototype_left():
    centres, weight = torch.tensor([[0.1, 0.0], [0.2, 0.0]]), torch.eye(2)
    best = select_prototypes(centres, weight, 0, LPCAMConfig.paper())
    assert torch.equal(best, centres[1:])
    with pytest.raises(ParameterError, match=r"class 0 scores above 0.9; the best has 0.550"):
        select_prototypes(centres, weight, 0, LPCAMConfig.released())
    with pytest.raises(ParameterError, match="class 1 has no local features"):
        select_prototypes(centres[:0], weight, 1, LPCAMConfig.paper())
    assert len(select_prototypes(centres[:0], weight, 1, LPCAMConfig.paper(), context=True)) == 0


def test_maps_equal_prototype_by_prototype_similarity():
    torch.manual_seed(0)
    features = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    classes, contexts = torch.randn(6, 16, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)
    for context in (None, contexts):
        expected = torch.zeros(2, 5, 7, dtype=torch.float64)
        for image in range(2):
            for y in range(5):
                for x in range(7):
                    local = features[image, :, y, x].tolist()
                    value = np.mean([cosine(local, p) for p in classes.tolist()])
                    if context is not None:
                        value -= np.mean([cosine(local, p) for p in context.tolist()])
                    expected[image, y, x] = max(0.0, value)
            expected[image] /= expected[image].max()
        torch.testing.assert_close(lpcam(features, classes, context), expected, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(module.plain_lpcam(features, classes, contexts), expected, atol=1e-10, rtol=1e-8)
    each = module.similarity_maps(features, classes)
    assert float(each[1, 3, 2, 4]) == pytest.approx(cosine(features[1, :, 2, 4].tolist(), classes[3].tolist()))


def test_maps_of_nothing():
    features, prototype = torch.zeros(1, 3, 2, 2), torch.ones(1, 3)
    assert lpcam(features, prototype).abs().max() == 0
    assert lpcam(-torch.ones(1, 3, 2, 2), prototype).abs().max() == 0
    assert torch.equal(lpcam(torch.ones(1, 3, 2, 2), prototype, prototype[:0]), torch.ones(1, 2, 2))
    with pytest.raises(ParameterError, match="no class prototype"):
        lpcam(features, prototype[:0])
    with pytest.raises(ParameterError, match=r"\(1, 3, 2, 2\) and prototypes \(1, 4\)"):
        lpcam(features, torch.ones(1, 4))


def test_presets():
    assert (LPCAMConfig.paper().clusters, LPCAMConfig.paper("coco").clusters) == (12, 20)
    assert (LPCAMConfig.released().mu_b_least, LPCAMConfig.released("coco").mu_b) == (0.05, 0.5)
    assert LPCAMConfig.released(none_left="best").none_left == "best"


def test_emptied_clusters_never_empty_another():
    rng = np.random.default_rng(0)
    for seed in range(30):
        points = rng.integers(0, 3, (40, 2)).astype(np.float32)  # few distinct points: clusters run empty
        for start in ("random", "k-means++"):
            config = LPCAMConfig(clusters=12, metric="euclidean", start=start, seed=seed)
            centres = cluster_local_features(torch.from_numpy(points), config)
            assert centres.isfinite().all()
            assert 1 <= len(centres) <= 12


def test_hierarchical_is_average_linkage_by_loops():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(14, 3)) + np.array([2, 0, 0])
    clusters = [[i] for i in range(14)]
    distance = [[1 - cosine(a, b) for b in points.tolist()] for a in points.tolist()]
    while len(clusters) > 4:
        pairs = [(i, j) for i in range(len(clusters)) for j in range(i)]
        means = [np.mean([distance[a][b] for a in clusters[i] for b in clusters[j]]) for i, j in pairs]
        i, j = pairs[int(np.argmin(means))]
        clusters[j] += clusters.pop(i)
    expected = sorted(points[c].mean(axis=0).tolist() for c in clusters)
    config = LPCAMConfig(clusters=4, algorithm="hierarchical")
    np.testing.assert_allclose(sorted(cluster_local_features(torch.from_numpy(points), config).tolist()), expected)
    with_zeros = torch.from_numpy(np.concatenate([points, np.zeros((3, 3))]))
    np.testing.assert_allclose(sorted(cluster_local_features(with_zeros, config).tolist()), expected)
    with pytest.raises(ParameterError, match="of 20001 features needs all of their distances"):
        cluster_local_features(torch.rand(20_001, 2), config)


def test_k_means_stops_at_the_tolerance():
    points = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 4)))
    settled = cluster_local_features(points, LPCAMConfig(clusters=6, start="random"))
    early = cluster_local_features(points, LPCAMConfig(clusters=6, start="random", tolerance=1e9))
    start = points[torch.from_numpy(np.random.default_rng(0).choice(300, 6, replace=False))]
    labels = torch.tensor([max(range(6), key=lambda k: cosine(p, start[k].tolist())) for p in points.tolist()])
    first = torch.stack([points[labels == k].mean(dim=0) for k in range(6)])
    torch.testing.assert_close(early, first)  # one step from the drawn features
    assert not torch.allclose(settled, early)


def test_ties_and_scales():
    features, cam = torch.arange(4.0).reshape(1, 2, 2), torch.tensor([[1.0, 0.5], [0.25, 0.0]])
    for ties, expected in (("context", [1.0, 2.0, 3.0]), ("dropped", [2.0, 3.0])):
        foreground, context = split_local_features(features, cam, 0.5, ties)
        assert foreground.flatten().tolist() == [0.0]
        assert context.flatten().tolist() == expected
    for ties in ("context", "dropped"):
        assert len(split_local_features(features, torch.zeros(2, 2), 0.0, ties)[1]) == 4
    with pytest.raises(ValueError, match="the first is 1"):
        LPCAMConfig(scales=(0.5, 1.0))
    with pytest.raises(ValueError, match="needs split_cam='final'"):
        LPCAMConfig(split_maximum="image")


def test_presets_say_which_maximum_tau_is_a_share_of():
    assert (LPCAMConfig.paper().split_cam, LPCAMConfig.paper().split_maximum) == ("grid", "grid")
    for dataset in ("voc", "coco"):
        released = LPCAMConfig.released(dataset)
        assert (released.split_cam, released.split_maximum) == ("final", "image")


def test_the_relu_is_all_the_same_to_features_behind_one():
    """Without context prototypes FG >= 0, so that `relu` and the floor of context scores are separate switches."""
    scales = [torch.rand(2, 5, 3, 4)]
    both = module.Directions(module.direction(torch.rand(4, 5))[None], torch.tensor([False]))
    maps = [
        module.lpcam_of(scales, both, (12, 16), LPCAMConfig(relu=relu, scales=(1.0,)))
        for relu in ("always", "with_context")
    ]
    assert torch.equal(*maps)
