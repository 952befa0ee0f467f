import math

import numpy as np
import pytest
import torch
from over_cam import Tiny
from torch import nn

from wsolnb.data.sample import Sample
from wsolnb.errors import ParameterError
from wsolnb.methods import create_method
from wsolnb.methods.amn import AMN, ConditionedFeatures, pixel_loss
from wsolnb.methods.features import OwnMaps


def small(classes=3, **options):
    """AMN on the tiny backbone, in float64, with weights far from zero."""
    model = AMN(Tiny(), classes, dilations=(1, 2), **options).double()
    with torch.no_grad():
        for branch in model.aspp:
            branch.weight.normal_()
            branch.bias.normal_()
    return model.eval()


def plain_loss(scores, labels, smoothing):
    """The balanced loss, a pixel and a channel at a time."""
    batch, count, height, width = scores.shape
    sides = {"background": [], "foreground": []}
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                label = int(labels[b, y, x])
                if label == 255:
                    continue
                z = [float(scores[b, k, y, x]) for k in range(count)]
                total = math.log(sum(math.exp(value) for value in z))
                wanted = [1 - smoothing if k == label else smoothing / (count - 1) for k in range(count)]
                loss = -sum(q * (value - total) for q, value in zip(wanted, z, strict=True))
                sides["foreground" if label else "background"].append(loss)
    return sum(sum(losses) / max(1, len(losses)) for losses in sides.values()) / 2


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
@pytest.mark.parametrize("values", [(0, 1, 2, 255), (0, 255), (1, 2), (0, 1, 2)])
def test_the_loss_equals_loops(smoothing, values):
    rng = np.random.default_rng(len(values))
    scores = torch.from_numpy(rng.normal(size=(2, 3, 4, 5)) * 2)
    labels = torch.from_numpy(rng.choice(values, size=(2, 4, 5)))
    assert float(pixel_loss(scores, labels, smoothing)) == pytest.approx(plain_loss(scores, labels, smoothing))


def test_both_sides_weigh_the_same_however_many_pixels_they_have():
    scores = torch.zeros(1, 2, 1, 100, dtype=torch.float64)
    scores[0, 0] = 3.0  # the background is likelier everywhere
    labels = torch.zeros(1, 1, 100, dtype=torch.long)
    labels[..., 0] = 1
    right, wrong = (math.log(1 + math.exp(-3)), math.log(1 + math.exp(3)))
    assert float(pixel_loss(scores, labels, 0.0)) == pytest.approx((right + wrong) / 2)


def test_the_loss_has_the_gradient_that_it_should_and_none_where_nothing_is_known():
    scores = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 255, 0, 1, 255, 2, 0]).view(1, 3, 3).expand(2, -1, -1)
    assert torch.autograd.gradcheck(lambda z: pixel_loss(z, labels), scores)
    loss = pixel_loss(scores, torch.full((2, 3, 3), 255))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(scores.grad, torch.zeros_like(scores))


def test_scores_equal_loops_over_channels_and_dilations():
    model, images = small(), torch.randn(2, 3, 10, 8, dtype=torch.float64)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    with torch.no_grad():
        found, features = model(images, labels), model.backbone(images)
    v, b = model.condition.weight.detach(), model.condition.bias.detach()
    for n in range(2):
        factor = [float(b[d] + sum(v[d, c] for c in range(3) if labels[n, c])) for d in range(6)]
        for k, (y, x) in enumerate([(0, 0), (2, 3), (4, 1), (3, 2)]):
            total = sum(float(branch.bias.detach()[k]) for branch in model.aspp)
            for branch, r in zip(model.aspp, (1, 2), strict=True):
                for i in range(3):
                    for j in range(3):
                        row, column = y + r * (i - 1), x + r * (j - 1)
                        if 0 <= row < 5 and 0 <= column < 4:
                            cell = features[n, :, row, column]
                            kernel = branch.weight.detach()
                            total += sum(float(kernel[k, d, i, j] * cell[d]) * factor[d] for d in range(6))
            assert float(found.scores[n, k, y, x]) == pytest.approx(total)
    maps = model.localize(found, torch.tensor([2, 1]))
    assert tuple(maps) == model.maps == ("amn",)
    z = found.scores[0, :, 1, 1].tolist()
    assert float(maps["amn"][0, 1, 1]) == pytest.approx(math.exp(z[3]) / sum(map(math.exp, z)), abs=1e-6)
    assert torch.equal(found.logits, torch.zeros(2, 3, dtype=torch.float64))
    assert not model.classifies


def test_images_do_not_depend_on_the_batch_and_labels_have_three_forms():
    model, images = small(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    labels = torch.tensor([[1, 0, 0], [0, 0, 1], [1, 1, 0]])
    with torch.no_grad():
        whole = model(images, labels).scores
        alone = torch.cat([model(images[i : i + 1], labels[i : i + 1]).scores for i in range(3)])
        torch.testing.assert_close(whole, alone)
        torch.testing.assert_close(model(images[:2], torch.tensor([0, 2])).scores, whole[:2])
        torch.testing.assert_close(model(images).scores, model(images, torch.ones(3, 3)).scores)
    assert not torch.allclose(whole[0], model(images[:1], torch.tensor([[0, 1, 0]])).scores[0])
    with pytest.raises(ParameterError, match=r"labels \(3, 2\) for 3 images and 3 classes"):
        model(images, torch.ones(3, 2))
    with pytest.raises(ParameterError, match="class 3 asked of a model with 3"):
        model.localize(model(images, labels), torch.tensor([0, 1, 3]))


def test_it_learns_from_the_nearest_pixel_of_the_seed_masks():
    model, images = small(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    masks = np.random.default_rng(0).choice([0, 1, 3, 255], size=(2, 12, 12)).astype(np.uint8)
    picture = np.zeros((12, 12, 3), np.uint8)
    samples = [Sample(picture, str(i), (0, 2), mask=mask) for i, mask in enumerate(masks)]
    batch = {"image": images, "label": torch.tensor([[1, 0, 1], [1, 0, 1]]), "samples": samples}
    nearest = torch.from_numpy(masks[:, 1::3, 1::3]).long()  # the middle pixels of 3 x 3 pixels a cell
    expected = pixel_loss(model(images, batch["label"]).scores.float(), nearest, 0.4)
    torch.testing.assert_close(model.loss(model, batch), expected)
    assert model.learns_from_masks


def test_training_reduces_the_loss_and_is_reproducible():
    label, where = torch.arange(8) % 2, np.zeros((16, 16), np.uint8)
    images = torch.randn(8, 3, 16, 16) * 0.2
    images[torch.arange(8), label, 4:12, 4:12] += 1.5
    samples = []
    for i in range(8):
        mask = where.copy()
        mask[4:12, 4:12] = int(label[i]) + 1
        samples.append(Sample(np.zeros((16, 16, 3), np.uint8), str(i), (int(label[i]),), mask=mask))
    batch = {"image": images, "label": nn.functional.one_hot(label, 2), "samples": samples}

    def run():
        torch.manual_seed(3)
        model = create_method("amn", Tiny(), 2, smoothing=0.1, dilations=(1, 2))
        before = model.eval().loss(model, batch).item()
        optimizer = torch.optim.Adam(model.train().parameters(), lr=0.02)
        for _ in range(40):
            optimizer.zero_grad()
            model.loss(model, batch).backward()
            optimizer.step()
        return before, model.eval().loss(model, batch).item()

    before, after = run()
    assert after < 0.7 * before
    assert run() == (before, after)


def test_the_weights_are_what_a_field_of_equal_features_scores_above_the_background():
    model = small()
    extractor, vector = ConditionedFeatures(model), torch.randn(6, dtype=torch.float64)
    field = vector.view(1, 6, 1, 1).expand(1, 6, 9, 9)
    scores = torch.stack([branch(field) for branch in model.aspp]).sum(dim=0)[0, :, 4, 4]  # away from the border
    bias = sum(branch.bias for branch in model.aspp)
    expected = (scores - bias)[1:] - (scores - bias)[0]
    torch.testing.assert_close(extractor.weight.double() @ vector, expected.detach(), rtol=1e-5, atol=1e-5)
    images, labels = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([[1, 0, 0], [0, 1, 1]])
    torch.testing.assert_close(extractor(images, labels), model(images, labels).features)


def test_its_own_maps_are_probabilities_of_the_classes():
    model, images, labels = small(), torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([[1, 0, 0], [0, 1, 1]])
    own = OwnMaps(model)
    maps = own(images, labels)
    assert torch.equal(own.weight, torch.eye(3))
    for c in range(3):
        alone = model.localize(model(images, labels), torch.tensor([c, c]))["amn"]
        torch.testing.assert_close(maps[:, c], alone)
    assert (maps.sum(dim=1) < 1).all()  # the rest is the background's


@pytest.mark.parametrize("options", [{"smoothing": 0.5}, {"smoothing": -0.1}, {"dilation": 3}])
def test_bad_options_are_refused(options):
    with pytest.raises(ParameterError):
        create_method("amn", Tiny(), 3, **options)
