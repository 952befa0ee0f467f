import math

import pytest
import torch
from over_cam import Tiny, assert_cam_in_evaluation, assert_learns_and_repeats

from wsolnb.errors import ParameterError
from wsolnb.methods import create_method
from wsolnb.methods.base import classification_loss
from wsolnb.methods.cutmix import CutMix, cut_box, cut_mix


def test_the_box_has_the_area_unless_it_is_clipped():
    for kept in (0.0, 0.1, 0.5, 0.9, 1.0):
        for row in range(0, 40, 3):
            for column in range(0, 30, 3):
                top, bottom, left, right = cut_box(kept, row, column, 40, 30)
                assert 0 <= top <= bottom <= 40
                assert 0 <= left <= right <= 30
                # Of the pixels of the unclipped box, those inside of the image.
                rows, columns = int(40 * math.sqrt(1 - kept)), int(30 * math.sqrt(1 - kept))
                inside_rows = [y for y in range(row - rows // 2, row - rows // 2 + rows) if 0 <= y < 40]
                inside_columns = [
                    x for x in range(column - columns // 2, column - columns // 2 + columns) if 0 <= x < 30
                ]
                assert list(range(top, bottom)) == inside_rows
                assert list(range(left, right)) == inside_columns
    top, bottom, left, right = cut_box(0.75, 20, 15, 40, 30)
    assert (bottom - top) * (right - left) == 0.25 * 40 * 30


@pytest.mark.parametrize("box", [(1, 4, 0, 2), (0, 5, 0, 6), (2, 2, 3, 3)])
def test_mixed_images_equal_loops(box):
    images = torch.rand(4, 3, 5, 6, dtype=torch.float64)
    before, partner = images.clone(), torch.tensor([2, 1, 3, 0])
    mixed, kept = cut_mix(images, partner, box)
    own = 0
    for image in range(4):
        for y in range(5):
            for x in range(6):
                inside = box[0] <= y < box[1] and box[2] <= x < box[3]
                own += not inside
                source = int(partner[image]) if inside else image
                assert torch.equal(mixed[image, :, y, x], images[source, :, y, x])
    assert kept == pytest.approx(own / (4 * 5 * 6), abs=1e-15)
    assert torch.equal(images, before)
    assert torch.autograd.gradcheck(lambda values: cut_mix(values, partner, box)[0], images.requires_grad_())


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_mixed_labels(multi, smoothing):
    model = CutMix(Tiny(), 3).train()
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 2, 1, 1, 0, 2])
    if multi:
        labels = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1]])
    torch.manual_seed(7)
    found = model.loss(model, {"image": images, "label": labels}, smoothing)
    torch.manual_seed(7)
    torch.rand(())
    share = float(torch.distributions.Beta(1.0, 1.0).sample())
    row, column, partner = int(torch.randint(16, ())), int(torch.randint(16, ())), torch.randperm(6)
    mixed, kept = cut_mix(images, partner, cut_box(share, row, column, 16, 16))
    assert 0 < kept < 1
    logits = model(mixed).logits.detach().double()
    expected = 0.0
    for image in range(6):
        target = [0.0] * 3
        for source, weight in ((image, kept), (int(partner[image]), 1 - kept)):
            for c in range(3):
                one = (
                    float(labels[source, c]) if multi else float(labels[source] == c) * (1 - smoothing) + smoothing / 3
                )
                target[c] += weight * one
        for c in range(3):
            logit = float(logits[image, c])
            if multi:
                yes, no = -math.log1p(math.exp(-logit)), -math.log1p(math.exp(logit))
                expected -= (target[c] * yes + (1 - target[c]) * no) / 3 / 6
            else:
                expected -= target[c] * (logit - float(logits[image].logsumexp(0))) / 6
    assert float(found.detach()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_the_shares_follow_the_beta_distribution(monkeypatch, alpha):
    drawn = []

    def record(kept, row, column, height, width):
        drawn.append((kept, row, column))
        return cut_box(kept, row, column, height, width)

    monkeypatch.setattr("wsolnb.methods.cutmix.cut_box", record)
    model = CutMix(Tiny(), 3, alpha=alpha).train()
    output = model(torch.zeros(2, 3, 4, 6))
    batch = {"image": torch.zeros(2, 3, 4, 6), "label": torch.tensor([0, 1])}
    for _ in range(400):
        model.loss(lambda _images: output, batch)
    kept, rows, columns = (torch.tensor(values, dtype=torch.float64) for values in zip(*drawn, strict=True))
    # Beta(a, a) has the mean 1 / 2 and the variance 1 / (8 a + 4).
    variance = 1 / (8 * alpha + 4)
    assert float(kept.mean()) == pytest.approx(0.5, abs=4 * (variance / 400) ** 0.5)
    assert float(kept.var()) == pytest.approx(variance, rel=0.25)
    assert set(rows.tolist()) == set(range(4))
    assert set(columns.tolist()) == set(range(6))


def test_the_probability_is_that_of_mixing():
    batch = {"image": torch.randn(4, 3, 8, 8), "label": torch.tensor([0, 2, 1, 1])}
    never = CutMix(Tiny(), 3, probability=0.0).train()
    plain = classification_loss(never(batch["image"]).logits, batch["label"])
    assert all(torch.equal(never.loss(never, batch), plain) for _ in range(5))
    mixed = 0
    half = CutMix(Tiny(), 3, probability=0.5).train()
    for _ in range(100):
        seen = []
        half.loss(lambda images, seen=seen: (seen.append(images), half(images))[1], batch)
        mixed += seen[0] is not batch["image"]
    assert 30 <= mixed <= 70


def test_in_evaluation_it_is_cam():
    assert_cam_in_evaluation(CutMix)


@pytest.mark.parametrize("multi", [False, True])
def test_training_reduces_the_loss_and_is_reproducible(multi):
    assert_learns_and_repeats("cutmix", multi, share=0.8, steps=60)


@pytest.mark.parametrize("options", [{"alpha": 0}, {"alpha": -1.0}, {"alpha": float("nan")}, {"probability": 1.1}])
def test_bad_options_are_refused(options):
    with pytest.raises(ParameterError):
        create_method("cutmix", Tiny(), 3, **options)
