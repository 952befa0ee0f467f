import pytest
import timm
import torch
from torch import nn

from wsolnb.backbones import create_backbone
from wsolnb.errors import ParameterError
from wsolnb.methods.base import pick
from wsolnb.methods.cam import CAMClassifier, cam, find_layer, layer_cam, layer_gradients


def test_cam_equals_loops():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    classes = torch.tensor([6, 2])
    got = cam(features, weight, classes)
    for image in range(2):
        for y in range(3):
            for x in range(4):
                value = sum(float(weight[classes[image], k] * features[image, k, y, x]) for k in range(5))
                assert got[image, y, x] == pytest.approx(max(0.0, value), abs=1e-12)


def test_layer_cam_equals_loops():
    generator = torch.Generator().manual_seed(1)
    activations, gradients = torch.randn(2, 2, 5, 3, 4, generator=generator, dtype=torch.float64)
    got = layer_cam(activations, gradients)
    for image in range(2):
        for y in range(3):
            for x in range(4):
                value = 0.0
                for k in range(5):
                    value += max(0.0, float(gradients[image, k, y, x])) * float(activations[image, k, y, x])
                assert got[image, y, x] == pytest.approx(max(0.0, value), abs=1e-12)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ParameterError, match=r"\(7, 6\)"):
        cam(torch.zeros(1, 5, 3, 3), torch.zeros(7, 6), torch.tensor([0]))
    with pytest.raises(ParameterError, match="differ"):
        layer_cam(torch.zeros(1, 5, 3, 3), torch.zeros(1, 5, 3, 4))
    with pytest.raises(ParameterError, match="class 9"):
        pick(torch.zeros(2, 3, 4, 4), torch.tensor([0, 9]))
    with pytest.raises(ParameterError, match="2 images"):
        pick(torch.zeros(2, 3, 4, 4), torch.tensor([0]))


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return CAMClassifier(create_backbone("resnet_mini", output_stride=8), num_classes=4).eval()


def test_logits_are_the_mean_of_the_signed_class_map(classifier):
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        output = classifier(images)
    assert output.features.shape == (2, 256, 14, 14)
    signed = torch.einsum("bkhw,ck->bchw", output.features, classifier.classifier.weight)
    torch.testing.assert_close(signed.mean(dim=(2, 3)), output.logits, atol=1e-5, rtol=1e-4)


def test_closed_form_layercam_of_the_last_layer_equals_autograd(classifier):
    images, classes = torch.randn(2, 3, 112, 112), torch.tensor([1, 3])
    with torch.no_grad():
        closed = classifier.localize(classifier(images), classes)["layercam"]
    by_hook = classifier.layer_cam(images, classes, classifier.backbone.resnet.layer4)
    torch.testing.assert_close(closed, by_hook, atol=1e-7, rtol=1e-4)


def test_layercam_of_an_inner_layer_has_its_resolution(classifier):
    found = classifier.layer_cam(torch.randn(1, 3, 112, 112), torch.tensor([0]), classifier.backbone.resnet.layer1)
    assert found.shape == (1, 28, 28)
    assert found.min() >= 0


def test_layercam_leaves_inference_mode_for_itself(classifier):
    images, classes = torch.randn(2, 3, 64, 64), torch.tensor([1, 3])
    layer = classifier.backbone.get_submodule("resnet.layer2")
    expected = classifier.layer_cam(images, classes, layer)
    with torch.inference_mode():
        found = classifier.layer_cam(images + 0, classes + 0, layer)  # sums: tensors of inference mode
        assert torch.is_inference_mode_enabled()
    assert torch.equal(found, expected)
    assert expected.max() > 0


def test_layercam_of_frozen_weights_leaves_no_trace(classifier):
    images, classes = torch.randn(2, 3, 64, 64), torch.tensor([1, 3])
    layer = classifier.backbone.get_submodule("resnet.layer2")
    expected = classifier.layer_cam(images, classes, layer)
    classifier.requires_grad_(False)
    try:
        assert torch.equal(classifier.layer_cam(images, classes, layer), expected)
    finally:
        classifier.requires_grad_(True)
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert not layer._forward_hooks


def test_a_layer_before_a_relu_in_place_keeps_its_negative_values(classifier):
    activations, _ = layer_gradients(
        classifier, torch.randn(1, 3, 64, 64), torch.tensor([0]), classifier.backbone.get_submodule("resnet.bn1")
    )
    assert activations.min() < 0


@pytest.mark.parametrize("asked", [[0, 4], [-1, 0]])
def test_a_class_that_the_model_lacks_is_refused(classifier, asked):
    images, classes = torch.randn(2, 3, 64, 64), torch.tensor(asked)
    with pytest.raises(ParameterError, match="4 classes"):
        classifier.layer_cam(images, classes, classifier.backbone)
    with pytest.raises(ParameterError, match="4 classes"):
        classifier.localize(classifier(images), classes)
    with pytest.raises(ParameterError, match="classes for 2 images"):
        classifier.localize(classifier(images), torch.tensor([0]))


def test_a_layer_off_the_way_to_the_score_is_refused(classifier):
    images, classes = torch.randn(1, 3, 64, 64), torch.tensor([0])
    unused = classifier.backbone.get_submodule("resnet.global_pool")
    with pytest.raises(ParameterError, match="does not run it"):
        classifier.layer_cam(images, classes, unused)
    with pytest.raises(ParameterError, match="no feature map"):
        classifier.layer_cam(images, classes, classifier.classifier)
    assert not unused._forward_hooks
    assert not classifier.classifier._forward_hooks


def test_an_unknown_layer_is_named_with_the_nearest(classifier):
    assert find_layer(classifier.backbone, "") is classifier.backbone
    with pytest.raises(ParameterError, match=r"cnn\.layer9.*mean 'cnn\.layer"):
        find_layer(classifier.backbone, "cnn.layer9")


@pytest.mark.parametrize("bias", [True, False])
def test_a_network_of_ones_own_classifies_as_before_with_its_own_bias(bias):
    network = timm.create_model("resnet18", num_classes=3).eval()
    nn.init.uniform_(network.fc.bias)
    if not bias:
        network.fc.register_parameter("bias", None)
    images = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        before = network(images)
        model = CAMClassifier.of(network, ["a", "b", "c"])
        assert torch.allclose(model(images).logits, before, atol=1e-4)
        assert torch.equal(network(images), before)  # the network itself is left as it was
    assert (model.classifier.bias is not None) == bias
    assert model.class_names == ("a", "b", "c")
    assert not model.training


def test_what_does_not_classify_the_mean_of_a_map_is_refused():
    refused = {
        "convnext_atto": "does not classify the mean of its final map",  # a normalisation stands between
        "vit_tiny_patch16_224": "does not classify the mean of its final map",
    }
    for name, message in refused.items():
        with pytest.raises(ParameterError, match=message):
            CAMClassifier.of(timm.create_model(name, num_classes=2))
    with pytest.raises(ParameterError, match="it is no network of timm"):
        CAMClassifier.of(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ParameterError, match="2 names for a network of 3 classes"):
        CAMClassifier.of(timm.create_model("resnet18", num_classes=3), ["a", "b"])
