import pytest
import torch
from over_cam import Tiny, assert_learns_and_repeats

from wsolnb.backbones import create_backbone
from wsolnb.errors import ParameterError
from wsolnb.methods import create_method
from wsolnb.methods.cam import CAMClassifier, cam, layer_gradients
from wsolnb.methods.grad_cam import GradCAM, grad_cam


def test_grad_cam_equals_loops():
    activations, gradients = torch.randn(2, 3, 5, 3, 4, dtype=torch.float64)
    found = grad_cam(activations, gradients)
    for image in range(3):
        alpha = [sum(float(value) for value in gradients[image, k].flatten()) / 12 for k in range(5)]
        for y in range(3):
            for x in range(4):
                value = sum(alpha[k] * float(activations[image, k, y, x]) for k in range(5))
                assert found[image, y, x] == pytest.approx(max(0.0, value), abs=1e-12)
    with pytest.raises(ParameterError, match="differ"):
        grad_cam(activations, gradients[:, :, :, :2])


def test_gradients_of_an_inner_layer_equal_finite_differences():
    model, images, classes = GradCAM(Tiny(), 3).double(), torch.randn(2, 3, 4, 4).double(), torch.tensor([2, 0])
    activations, gradients = layer_gradients(model, images, classes, model.backbone.inner)
    torch.testing.assert_close(activations, model.backbone.inner(images))

    def score(image, values):
        features = model.backbone.conv(values.relu()).relu()
        return float(model.classifier(features.mean(dim=(2, 3)))[image, classes[image]])

    for image, k, y, x in [(0, 0, 0, 0), (0, 4, 3, 2), (1, 2, 1, 3), (1, 3, 2, 2)]:
        step = torch.zeros_like(activations)
        step[image, k, y, x] = 1e-6
        slope = (score(image, activations + step) - score(image, activations - step)) / 2e-6
        assert float(gradients[image, k, y, x]) == pytest.approx(slope, abs=1e-7)


def test_of_the_final_layer_it_is_cam_over_the_positions():
    model, images, classes = GradCAM(Tiny(), 3).double(), torch.randn(4, 3, 8, 8).double(), torch.tensor([2, 0, 1, 1])
    expected = cam(model.backbone(images), model.classifier.weight, classes) / 16
    assert expected.max() > 0
    found = grad_cam(*layer_gradients(model, images, classes, model.backbone))
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-12)
    maps = model.localize(model(images), classes)
    assert tuple(maps) == model.maps
    torch.testing.assert_close(maps["grad_cam"], maps["cam"] / 16, atol=1e-7, rtol=1e-5)


def test_after_inference_mode_and_with_frozen_weights_it_is_the_same():
    model = GradCAM(create_backbone("resnet_mini", output_stride=8), 3, layer="resnet.layer2").eval()
    images, classes = torch.randn(2, 3, 48, 48), torch.tensor([2, 0])
    expected = model.localize(model(images), classes)
    assert expected["grad_cam"].shape == (2, 6, 6)
    assert expected["grad_cam"].max() > 0
    assert not expected["grad_cam"].requires_grad
    with torch.inference_mode():
        inside = model.localize(model(images + 0), classes + 0)
        output = model(images + 0)
    after = model.localize(output, classes)
    model.requires_grad_(False)
    frozen = model.localize(model(images), classes)
    for found in (inside, after, frozen):
        assert all(torch.equal(found[name], expected[name]) for name in model.maps)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_maps_do_not_depend_on_the_batch_and_grow_with_the_logits():
    model = GradCAM(Tiny(), 3, layer="inner").double().eval()
    images, classes = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([2, 0, 1, 1])
    whole = model.localize(model(images), classes)
    for i in range(4):
        one = model.localize(model(images[i : i + 1]), classes[i : i + 1])
        for name in model.maps:
            torch.testing.assert_close(one[name][0], whole[name][i], atol=1e-7, rtol=1e-5)
    model.classifier.weight.data *= 4
    torch.testing.assert_close(model.localize(model(images), classes)["grad_cam"], 4 * whole["grad_cam"])


def test_it_is_trained_as_cam():
    model = GradCAM(Tiny(), 3)
    plain = CAMClassifier(model.backbone, 3)
    plain.load_state_dict(model.state_dict())
    images = torch.randn(4, 3, 8, 8)
    for labels in (torch.tensor([0, 2, 1, 1]), torch.eye(4, 3)):
        batch = {"image": images, "label": labels}
        assert torch.equal(model.loss(model, batch, 0.1), plain.loss(plain, batch, 0.1))


@pytest.mark.parametrize("multi", [False, True])
def test_training_reduces_the_loss_and_is_reproducible(multi):
    assert_learns_and_repeats("grad_cam", multi)


def test_unknown_layers_and_layers_that_are_not_run_are_refused():
    with pytest.raises(ParameterError, match=r"'iner' \(did you mean 'inner'"):
        create_method("grad_cam", Tiny(), 3, layer="iner")
    model = GradCAM(Tiny(), 3, layer="unused")
    with pytest.raises(ParameterError, match="does not run it"):
        model.localize(model(torch.zeros(1, 3, 8, 8)), torch.tensor([0]))
    model = GradCAM(Tiny(), 3)
    for asked in (3, -1):
        with pytest.raises(ParameterError, match="3 classes"):
            model.localize(model(torch.zeros(1, 3, 8, 8)), torch.tensor([asked]))
