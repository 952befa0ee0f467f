import math

import numpy as np
import pytest
import torch

from wsolnb.backbones import create_backbone
from wsolnb.data.store import ClassMaps
from wsolnb.errors import MapError, ParameterError
from wsolnb.methods.crf import CRFConfig
from wsolnb.methods.irn import (
    IRN,
    IRNConfig,
    PairLabels,
    affinity,
    boundaries,
    irn_labels,
    offsets,
    pair_labels,
    pair_loss,
    path,
    plain_affinity,
    plain_walk,
    propagate,
    transition,
    unit_scores,
    walks,
)


def cells_near(y0, x0, y1, x1):
    """All cells of the bounding rectangle closer than 1 to the line through both ends, by the distance formula."""
    found = []
    for y in range(min(y0, y1), max(y0, y1) + 1):
        for x in range(min(x0, x1), max(x0, x1) + 1):
            area = abs((x1 - x0) * (y - y0) - (y1 - y0) * (x - x0))
            if area / math.sqrt((x1 - x0) ** 2 + (y1 - y0) ** 2) < 1 - 1e-9:
                found.append((y, x))
    return found


def walked_by_matrix(cam, boundary, radius, beta, exp_times):
    return plain_walk(cam.double().numpy(), boundary.double().numpy(), radius, beta, 2**exp_times)


# ----------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(("radius", "count"), [(2, 4), (3, 12), (5, 34), (10, 152)])
def test_offsets_are_one_half_of_the_open_disk(radius, count):
    found = set(offsets(radius))
    both = found | {(-y, -x) for y, x in found}
    reach = range(-radius, radius + 1)
    assert both == {(y, x) for y in reach for x in reach if 0 < y * y + x * x < radius**2}
    assert len(found) == len(both) // 2 == count


@pytest.mark.parametrize("radius", [5, 10])
def test_path_rule_equals_the_distance_formula(radius):
    for down, right in offsets(radius):
        assert sorted(path(down, right)) == sorted(cells_near(0, 0, down, right))
        assert {(0, 0), (down, right)} <= set(path(down, right))


def test_paths_of_some_offsets():
    assert set(path(0, 3)) == {(0, 0), (0, 1), (0, 2), (0, 3)}
    assert set(path(1, 1)) == {(0, 0), (1, 1), (0, 1), (1, 0)}  # both corners are 0.71 from the diagonal
    assert set(path(1, -2)) == {(0, 0), (0, -1), (1, -1), (1, -2), (0, -2), (1, 0)}  # 0.89 away counts
    assert (1, 0) in path(3, 4)
    assert (0, 2) not in path(2, 2)  # 1.41 away


def test_affinity_equals_the_plain_matrix():
    boundary = torch.rand(2, 6, 7, generator=torch.Generator().manual_seed(0))
    boundary[0, 2:4, 3] = 0.5  # equal values on a way
    got = affinity(boundary, 4)
    assert got.shape == (2, len(offsets(4)), 6, 7)
    for image in range(2):
        plain = plain_affinity(boundary[image].numpy(), 4)
        assert (plain == plain.T).all()
        counted = 42
        for pair, (down, right) in enumerate(offsets(4)):
            for y in range(6):
                for x in range(7):
                    inside = y + down < 6 and 0 <= x + right < 7
                    value = plain[7 * y + x, 7 * (y + down) + x + right] if inside else 0.0
                    assert float(got[image, pair, y, x]) == pytest.approx(value, abs=1e-7)
                    counted += 2 * inside
        assert np.count_nonzero(plain) == counted  # nothing beyond the radius


def test_the_plain_matrix_by_hand():
    boundary = np.array([[0.2, 0.5, 0.1]])
    expected = [[1, 0.5, 0.5], [0.5, 1, 0.5], [0.5, 0.5, 1]]
    np.testing.assert_allclose(plain_affinity(boundary, 3), expected)
    expected[0][2] = expected[2][0] = 0
    np.testing.assert_allclose(plain_affinity(boundary, 2), expected)


def test_affinity_has_the_right_gradient():
    boundary = torch.rand(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: affinity(b, 3), boundary)


def test_grids_smaller_than_the_radius():
    assert affinity(torch.rand(1, 1, 1), 5).abs().sum() == 0
    cam, boundary = torch.rand(2, 2, 3), torch.rand(2, 3)
    np.testing.assert_allclose(propagate(cam, boundary), walked_by_matrix(cam, boundary, 5, 10, 8), atol=1e-6)
    assert torch.equal(propagate(torch.ones(1, 1, 1), torch.zeros(1, 1)), torch.ones(1, 1, 1))


# -------------------------------------------------------------------------------------------------------- random walk


@pytest.mark.parametrize(
    ("size", "radius", "beta", "exp_times"),
    [((7, 9), 5, 10, 8), ((12, 10), 5, 10, 8), ((9, 6), 3, 4, 5), ((5, 5), 10, 10, 8), ((8, 8), 5, 2.5, 0)],
)
def test_random_walk_equals_dense_float64_powers(size, radius, beta, exp_times):
    generator = torch.Generator().manual_seed(sum(size))
    boundary = torch.rand(size, generator=generator) ** 3
    boundary[size[0] // 2] = torch.rand(size[1], generator=generator) * 0.1 + 0.9  # a wall
    cam = torch.rand(3, *size, generator=generator)
    got = propagate(cam, boundary, radius, beta, exp_times)
    assert got.dtype == torch.float32
    expected = walked_by_matrix(cam, boundary, radius, beta, exp_times)
    assert np.abs(got.numpy() - expected).max() <= 1e-6


def test_several_walks_are_parts_of_one():
    generator = torch.Generator().manual_seed(4)
    cam, boundary = torch.rand(2, 6, 7, generator=generator), torch.rand(6, 7, generator=generator)
    for exp_times, found in zip((0, 2, 5), walks(cam, boundary, 3, 10, (0, 2, 5)), strict=True):
        assert torch.equal(found, propagate(cam, boundary, 3, 10, exp_times))


def test_damping_is_of_the_start_only():
    generator = torch.Generator().manual_seed(8)
    cam, boundary = torch.rand(2, 6, 7, generator=generator), torch.rand(6, 7, generator=generator)
    for damping in (0.0, 0.5, 1.0):
        start = cam * (1 - damping * boundary)
        expected = propagate(start, boundary, 3, 10, 4, damping=0)
        torch.testing.assert_close(propagate(cam, boundary, 3, 10, 4, damping), expected)


def test_transition_is_symmetric_affinity_by_row_sums():
    boundary = torch.rand(6, 8, generator=torch.Generator().manual_seed(3))
    matrix = transition(boundary, 5, 10).to_dense().numpy()
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    plain = plain_affinity(boundary.double().numpy(), 5) ** 10
    np.testing.assert_allclose(matrix, plain / plain.sum(axis=1, keepdims=True), atol=1e-6)


def test_scores_stay_behind_a_closed_wall_and_pass_an_open_one():
    boundary = torch.zeros(8, 15)
    boundary[:, 6:8] = 1  # two cells, which no way closer than 1 avoids
    cam = torch.zeros(1, 8, 15)
    cam[0, :, :6] = 1
    walked = propagate(cam, boundary)[0]
    np.testing.assert_allclose(walked[:, :6], 1, atol=1e-5)
    assert walked[:, 6:].abs().max() == 0
    boundary[3:5] = 0
    assert propagate(cam, boundary)[0][:, 8:].min() > 0


def test_no_map_and_no_boundary():
    assert propagate(torch.zeros(0, 4, 5), torch.zeros(4, 5)).shape == (0, 4, 5)
    zero = propagate(torch.zeros(2, 4, 5), torch.rand(4, 5))
    assert torch.equal(zero, torch.zeros(2, 4, 5))
    flat = propagate(torch.full((1, 9, 9), 0.3), torch.zeros(9, 9))
    np.testing.assert_allclose(flat, 0.3, atol=1e-5)


@pytest.mark.parametrize(
    ("cam", "boundary", "message"),
    [
        (torch.zeros(2, 4, 5), torch.zeros(5, 4), r"\(2, 4, 5\) and boundary \(5, 4\)"),
        (torch.zeros(4, 5), torch.zeros(4, 5), "do not fit"),
        (torch.zeros(1, 2, 2), torch.full((2, 2), 1.5), "from 1.5 to 1.5"),
        (torch.zeros(1, 2, 2), torch.full((2, 2), torch.nan), "probabilities"),
        (torch.full((1, 2, 2), torch.inf), torch.zeros(2, 2), "NaN or infinity"),
    ],
)
def test_bad_maps_are_named(cam, boundary, message):
    with pytest.raises(MapError, match=message):
        propagate(cam, boundary)


def test_scores_are_divided_by_their_common_maximum():
    scores = torch.zeros(2, 2, 2)
    scores[0, 0, 0], scores[1, 1, 1], scores[0, 1, 0] = 4.0, 1.5, 1.0
    np.testing.assert_allclose(unit_scores(scores, (2, 2)), [[[1, 0], [0.25, 0]], [[0, 0], [0, 0.375]]])
    wide = unit_scores(scores, (8, 8))
    assert wide.shape == (2, 8, 8)
    assert float(wide.max()) == 1
    assert not unit_scores(torch.zeros(1, 2, 2), (4, 4)).any()
    assert unit_scores(scores[:0], (3, 4)).shape == (0, 3, 4)


# -------------------------------------------------------------------------------------------------- labels and losses


def seeds_with_everything():
    seeds = torch.zeros(2, 6, 7, dtype=torch.int64)
    seeds[0, 1:4, 1:4], seeds[0, 2:6, 4:6], seeds[0, :2, 5:] = 3, 8, 255
    seeds[1, 0], seeds[1, 5, 2:], seeds[1, 3, 3] = 255, 1, 255
    return seeds


def kinds_by_loops(seeds, radius):
    """Return {(image, pair, y, x): kind} of all pairs of which both seeds are known."""
    found, (height, width) = {}, seeds.shape[1:]
    for image in range(len(seeds)):
        for pair, (down, right) in enumerate(offsets(radius)):
            for y in range(height):
                for x in range(width):
                    if y + down >= height or not 0 <= x + right < width:
                        continue
                    a, b = int(seeds[image, y, x]), int(seeds[image, y + down, x + right])
                    if 255 not in (a, b):
                        found[image, pair, y, x] = "different" if a != b else "foreground" if a else "background"
    return found


def test_pair_labels_equal_loops():
    seeds = seeds_with_everything()
    got, expected = pair_labels(seeds, 4), kinds_by_loops(seeds, 4)
    for name in PairLabels._fields:
        where = {tuple(index) for index in getattr(got, name).nonzero().tolist()}
        assert where == {key for key, kind in expected.items() if kind == name}
        assert where  # the case occurs


def test_losses_equal_loops_in_float64():
    radius, seeds = 4, seeds_with_everything()
    generator = torch.Generator().manual_seed(5)
    boundary = torch.rand(2, 6, 7, dtype=torch.float64, generator=generator)
    boundary[1, 2, 2] = 1.0  # an affinity of exactly 0
    displacement = 3 * torch.randn(2, 2, 6, 7, dtype=torch.float64, generator=generator)
    terms = {"foreground": [], "background": [], "different": [], "pull": [], "still": []}
    for (image, pair, y, x), kind in kinds_by_loops(seeds, radius).items():
        down, right = offsets(radius)[pair]
        a = 1 - max(float(boundary[image, i, j]) for i, j in cells_near(y, x, y + down, x + right))
        terms[kind].append(-math.log(a + 1e-5) if kind != "different" else -math.log(1 + 1e-5 - a))
        move = [float(displacement[image, c, y, x] - displacement[image, c, y + down, x + right]) for c in (0, 1)]
        if kind == "foreground":
            terms["pull"].append(abs(move[0] - down) + abs(move[1] - right))
        elif kind == "background":
            terms["still"].append(abs(move[0]) + abs(move[1]))
    mean = {name: sum(values) / (len(values) + 1e-5) for name, values in terms.items()}
    pull = sum(terms["pull"]) / (2 * len(terms["pull"]) + 1e-5)
    still = sum(terms["still"]) / (2 * len(terms["still"]) + 1e-5)
    same = (mean["foreground"] + mean["background"]) / 2
    labels = pair_labels(seeds, radius)
    got = pair_loss(boundary, displacement, labels, radius)
    assert float(got) == pytest.approx((same + mean["different"]) / 2 + (pull + still) / 2, abs=1e-9)
    none = torch.zeros_like(labels.foreground)
    for kind, expected in (
        ("foreground", mean["foreground"] / 4 + pull / 2),
        ("background", mean["background"] / 4 + still / 2),
        ("different", mean["different"] / 2),
    ):
        alone = PairLabels(none, none, none)._replace(**{kind: getattr(labels, kind)})
        assert float(pair_loss(boundary, displacement, alone, radius)) == pytest.approx(expected, abs=1e-9)


def test_losses_have_the_right_gradients():
    generator = torch.Generator().manual_seed(6)
    boundary = (0.1 + 0.8 * torch.rand(1, 5, 5, dtype=torch.float64, generator=generator)).requires_grad_()
    displacement = torch.randn(1, 2, 5, 5, dtype=torch.float64, generator=generator).requires_grad_()
    labels = pair_labels(seeds_with_everything()[:1, 1:, 1:6], 3)
    assert torch.autograd.gradcheck(lambda b, d: pair_loss(b, d, labels, 3), (boundary, displacement))


def test_a_field_that_points_to_one_place_has_no_loss():
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    field = torch.stack([2.5 - rows, 4.0 - columns])[None]  # from everywhere to (2.5, 4)
    labels = pair_labels(torch.full((1, 6, 7), 2), 4)
    assert float(pair_loss(torch.zeros(1, 6, 7), field, labels, 4)) == pytest.approx(0, abs=1e-5)


def test_unknown_seeds_give_no_loss():
    labels = pair_labels(torch.full((1, 4, 4), 255), 3)
    assert float(pair_loss(torch.rand(1, 4, 4), torch.randn(1, 2, 4, 4), labels, 3)) == 0


def test_confident_labels_by_hand():
    maps = np.array([[[0.6, 0.4, 0.1, 0.1]], [[0.1, 0.1, 0.1, 0.6]]], np.float32)
    image = np.zeros((1, 4, 3), np.uint8)
    found = irn_labels(ClassMaps("x", (2, 4), maps), image, IRNConfig(), CRFConfig(backend="none"))
    np.testing.assert_array_equal(found, [[3, 255, 0, 5]])
    assert found.dtype == np.uint8


# ------------------------------------------------------------------------------------------------------------ network


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return IRN(create_backbone("resnet_mini", output_stride=16), width=8)


@pytest.mark.parametrize("size", [(112, 112), (64, 96), (70, 90)])
def test_outputs_have_stride_4(model, size):
    output = model.eval()(torch.randn(2, 3, *size))
    cells = tuple(-(-side // 4) for side in size)
    assert output.boundary.shape == (2, *cells)
    assert output.displacement.shape == (2, 2, *cells)


def test_resnet50_has_the_published_branches():
    big = IRN(create_backbone("resnet50", output_stride=16))
    shapes = [tuple(unit[0].weight.shape[:2]) for unit in big.boundary]
    assert shapes == [(32, 64), (32, 256), (32, 512), (32, 1024), (32, 2048)]
    shapes = [tuple(unit[0].weight.shape[:2]) for unit in big.displacement]
    assert shapes == [(64, 64), (128, 256), (256, 512), (256, 1024), (256, 2048)]
    assert big.displacement_join[0].weight.shape[:2] == (256, 768)
    assert big.displacement_out[0][0].weight.shape[:2] == (256, 448)
    with torch.no_grad():
        assert big.eval()(torch.randn(1, 3, 64, 64)).boundary.shape == (1, 16, 16)


def test_an_efficientnet_has_five_stages_too():
    backbone = create_backbone("efficientnet_lite0", output_stride=16)
    small = IRN(backbone, width=8)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert small.eval()(images).boundary.shape == (2, 16, 24)
        stages, final = backbone.stages(images), backbone.cnn.forward_features(images)
    assert [tuple(stage.shape[1:]) for stage in stages] == [
        (16, 16, 24), (24, 16, 24), (40, 8, 12), (112, 4, 6), (320, 4, 6)
    ]  # fmt: skip
    assert final.shape[2:] == stages[-1].shape[2:]
    assert backbone.stage_channels() == (16, 24, 40, 112, 320)


def test_only_the_branches_learn(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    torch.manual_seed(0)
    images, seeds = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 16, 16))
    model.train()
    losses = []
    for _ in range(12):
        output = model(images)
        loss = pair_loss(output.boundary.sigmoid(), output.displacement, pair_labels(seeds, 3), 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, value in model.state_dict().items():
        changed = not torch.equal(value, before[name])
        assert changed != name.startswith("backbone."), name
    in_head = {id(p) for p in model.head.parameters()}
    learns = {name for name, p in model.named_parameters() if id(p) in in_head}
    assert learns == {name for name, _ in model.named_parameters() if name.startswith("displacement")}


def test_boundaries_are_those_of_image_and_mirror_image(model):
    images = torch.randn(2, 3, 64, 64)
    maps = boundaries(model, images)
    assert maps.shape == (2, 16, 16)
    assert 0 <= float(maps.min()) <= float(maps.max()) <= 1
    torch.testing.assert_close(boundaries(model, images.flip(-1)), maps.flip(-1))
    with torch.no_grad():
        plain, mirrored = model(images).boundary, model(images.flip(-1)).boundary
    torch.testing.assert_close(maps, ((plain + mirrored.flip(-1)) / 2).sigmoid())


def test_backbones_that_do_not_fit():
    with pytest.raises(ParameterError, match="stride 8"):
        IRN(create_backbone("resnet_mini", output_stride=8))
    with pytest.raises(ParameterError, match="TransformerBackbone"):
        IRN(create_backbone("vit_mini"))
    with pytest.raises(ParameterError, match=r"(?s)convnext_atto.*gives 4 stages.*use a ResNet or an EfficientNet"):
        IRN(create_backbone("convnext_atto", output_stride=16))
    with pytest.raises(ParameterError, match="width 6"):
        IRN(create_backbone("resnet_mini", output_stride=16), width=6)
