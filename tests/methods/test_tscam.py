import pytest
import torch

from wsolnb.backbones import create_backbone
from wsolnb.errors import ParameterError
from wsolnb.methods.tscam import TSCAM


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TSCAM(create_backbone("vit_mini"), num_classes=5).eval()


def test_maps_are_made_of_attention_and_semantics(model):
    images, classes = torch.randn(3, 3, 112, 112), torch.tensor([4, 0, 2])
    with torch.no_grad():
        output = model(images)
        maps = model.localize(output, classes)
        tokens = model.backbone(images)
    for image in range(3):
        attention = torch.zeros(196)
        for layer in range(4):
            for head in range(3):
                attention += tokens.attention[image, layer, head] / 12
        torch.testing.assert_close(maps["attention"][image].flatten(), attention, atol=1e-7, rtol=1e-5)
        assert torch.equal(maps["semantic"][image], output.semantic_map[image, classes[image]])
    torch.testing.assert_close(maps["tscam"], maps["attention"] * maps["semantic"])
    torch.testing.assert_close(output.logits, output.semantic_map.mean(dim=(2, 3)))


def test_semantic_map_is_a_3x3_convolution_of_the_patch_grid(model):
    """One cell by hand: rows and columns of the grid are not swapped, and zeros lie beyond the border."""
    images = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        tokens, output = model.backbone(images), model(images)
    kernel, bias = model.semantic.weight, model.semantic.bias
    for row, column in ((0, 0), (3, 9), (13, 5)):
        value = bias[1].clone()
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                y, x = row + dy, column + dx
                if 0 <= y < 14 and 0 <= x < 14:
                    value += kernel[1, :, dy + 1, dx + 1] @ tokens.patches[0, y * 14 + x]
        assert output.semantic_map[0, 1, row, column].item() == pytest.approx(value.item(), abs=1e-4)


def test_a_convolutional_backbone_is_refused():
    with pytest.raises(ParameterError, match="class token"):
        TSCAM(create_backbone("resnet_mini"), 5)


def test_a_head_of_zeros_says_nothing_and_learns():
    torch.manual_seed(0)
    model = TSCAM(create_backbone("vit_mini"), num_classes=5, padding="replicate", head_init="zeros")
    output = model(torch.randn(2, 3, 112, 112))
    assert output.semantic_map.abs().max() == 0
    torch.nn.functional.cross_entropy(output.logits, torch.tensor([1, 3])).backward()
    assert model.semantic.weight.grad.abs().sum() > 0
