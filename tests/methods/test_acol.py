import pytest
import torch
from over_cam import Tiny, assert_learns_and_repeats

from wsolnb.errors import ParameterError
from wsolnb.methods import create_method
from wsolnb.methods.acol import ACoL, ACoLOutput, erase
from wsolnb.methods.base import classification_loss


def scaled(values):
    """Min-max normalise a list of numbers; a constant list becomes zeros."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


@pytest.fixture
def output():
    features = torch.rand(3, 2, 4, 5, dtype=torch.float64) + 1
    class_maps = torch.randn(3, 4, 4, 5, dtype=torch.float64)
    return ACoLOutput(class_maps.mean(dim=(2, 3)), features, class_maps)


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("delta", [0.3, 0.6, 1.0])
def test_erased_features_equal_loops(output, multi, delta):
    labels = torch.tensor([3, 0, 2])
    if multi:
        labels = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    found = erase(output, labels, delta)
    for image in range(3):
        classes = [c for c in range(4) if (labels[image, c] if multi else labels[image] == c)]
        gone = set()
        for c in classes:
            values = scaled([float(value) for value in output.class_maps[image, c].flatten()])
            gone |= {position for position, value in enumerate(values) if value >= delta}
        assert bool(gone) == bool(classes)
        for position in range(20):
            for k in range(2):
                value = output.features[image, k].flatten()[position]
                assert found[image, k].flatten()[position] == (0.0 if position in gone else value)


def test_erasing_knows_neither_scale_nor_offset_of_a_map(output):
    labels = torch.tensor([3, 0, 2])
    moved = output._replace(class_maps=4 * output.class_maps + 8)
    assert torch.equal(erase(moved, labels, 0.6), erase(output, labels, 0.6))
    # A constant map has found nothing.
    constant = output._replace(class_maps=torch.ones_like(output.class_maps))
    assert torch.equal(erase(constant, labels, 0.6), output.features)


def test_gradients_pass_what_is_left():
    model = ACoL(Tiny(), 3, hidden=4).double()
    class_maps = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    features = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, 0])

    def second(value):
        return model.head[1](erase(ACoLOutput(class_maps.mean(dim=(2, 3)), value, class_maps), labels, 0.6))

    assert torch.autograd.gradcheck(second, features)
    (gradients,) = torch.autograd.grad(second(features).sum(), features)
    erased = erase(ACoLOutput(class_maps.mean(dim=(2, 3)), torch.ones_like(features), class_maps), labels, 0.6) == 0
    assert erased.any()
    assert torch.equal(gradients[erased], torch.zeros_like(gradients[erased]))


@pytest.mark.parametrize("labels", [[0, 2], [[1, 0, 1], [0, 1, 0]]])
def test_the_loss_is_the_sum_over_both_branches(labels):
    model, images, labels = ACoL(Tiny(), 3, hidden=4), torch.randn(2, 3, 8, 8), torch.tensor(labels)
    calls = []
    found = model.loss(lambda each: (calls.append(1), model(each))[1], {"image": images, "label": labels}, 0.1)
    output = model(images)
    second = model.head[1](erase(output, labels, 0.6)).mean(dim=(2, 3))
    expected = classification_loss(output.logits, labels, 0.1) + classification_loss(second, labels, 0.1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(output.logits, model.head[0](model.backbone(images)).mean(dim=(2, 3)))
    assert len(calls) == 1
    found.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "unused" not in name)


def test_fused_maps_equal_loops():
    model, images, classes = ACoL(Tiny(), 3, hidden=4).double(), torch.randn(2, 3, 8, 8).double(), torch.tensor([2, 0])
    output = model(images)
    found = model.localize(output, classes)
    assert tuple(found) == model.maps
    second = model.head[1](erase(output, classes, 0.6))
    for image in range(2):
        own = [output.class_maps[image, classes[image]], second[image, classes[image]]]
        a, b = (scaled(each.detach().flatten().tolist()) for each in own)
        fused = torch.tensor([max(pair) for pair in zip(a, b, strict=True)]).view(4, 4)
        torch.testing.assert_close(found["acol"][image], fused, atol=1e-4, rtol=0)  # float32
        torch.testing.assert_close(found["first"][image].double(), own[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(found["second"][image].double(), own[1], atol=1e-6, rtol=0)
    assert found["acol"].max() <= 1
    assert found["acol"].min() >= 0


def test_maps_do_not_depend_on_the_batch_nor_on_the_scale_of_the_logits():
    model = ACoL(Tiny(), 3, hidden=4).double().eval()
    images, classes = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([2, 0, 1, 1])
    with torch.inference_mode():
        whole = model.localize(model(images), classes)
        for i in range(4):
            one = model.localize(model(images[i : i + 1]), classes[i : i + 1])
            for name in model.maps:
                torch.testing.assert_close(one[name][0], whole[name][i], atol=1e-6, rtol=0)
    with torch.no_grad():
        for branch in model.head:
            branch[-1].weight *= 4
            branch[-1].bias *= 4
    output = model(images)
    torch.testing.assert_close(model.localize(output, classes)["acol"], whole["acol"], atol=1e-6, rtol=0)


def test_a_class_that_the_model_lacks_is_refused():
    model = ACoL(Tiny(), 3, hidden=4)
    for asked in (3, -1):
        with pytest.raises(ParameterError, match="3 classes"):
            model.localize(model(torch.zeros(1, 3, 8, 8)), torch.tensor([asked]))


def test_the_head_is_both_branches():
    model = ACoL(Tiny(), 3)
    inside = {id(p) for p in model.head.parameters()}
    outside = {id(p) for p in model.parameters()} - inside
    assert outside == {id(p) for p in model.backbone.parameters()}
    assert [tuple(p.shape) for p in model.head[0].parameters() if p.ndim == 4] == [
        (1024, 6, 3, 3),
        (1024, 1024, 3, 3),
        (3, 1024, 1, 1),
    ]


@pytest.mark.parametrize("multi", [False, True])
def test_training_reduces_the_loss_and_is_reproducible(multi):
    assert_learns_and_repeats("acol", multi, hidden=8)


@pytest.mark.parametrize(
    "options", [{"delta": 0}, {"delta": 1.2}, {"delta": float("nan")}, {"hidden": 0}, {"gamma": 1}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ParameterError):
        create_method("acol", Tiny(), 3, **options)
