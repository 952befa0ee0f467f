import pytest
import timm
import torch

from wsolnb.backbones import create_backbone, normalisation
from wsolnb.backbones.photo import PhotoStem, load_stages
from wsolnb.backbones.wheels import load_installed
from wsolnb.errors import ParameterError


@pytest.fixture
def stem():
    torch.manual_seed(0)
    found = PhotoStem(64, 16, 3, 24)  # neither `train` nor `eval` is called
    load_stages(found)
    return found


def test_the_patches_are_the_published_networks_map_of_stride_16(stem):
    network = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(3,))
    whole = timm.create_model("tf_efficientnet_lite0")
    load_installed("efficientnet_lite0", whole)
    network.load_state_dict(whole.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network.eval()(images)[0]
        torch.testing.assert_close(stem.features(images), expected, rtol=1e-4, atol=1e-4)
        by_hand = torch.einsum("dc,bcyx->byxd", stem.proj.weight[:, :, 0, 0], expected) + stem.proj.bias
        torch.testing.assert_close(stem(images), by_hand.flatten(1, 2), rtol=1e-4, atol=1e-4)


def test_a_map_of_the_stages_is_embedded_like_its_image(stem):
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(stem(stem.features(images)), stem(images))


def test_training_leaves_the_stages_as_they_are(stem):
    before = {name: value.clone() for name, value in stem.stages.state_dict().items()}
    stem.train()
    assert not any(module.training for module in stem.stages.modules())
    stem(3 + torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in stem.stages.state_dict().items())
    assert all(p.grad is None for p in stem.stages.parameters())
    assert stem.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [None, 96])
def test_a_transformer_on_cells_of_16_pixels(size):
    backbone = create_backbone("vit_photo", image_size=size)
    side = size or 160
    tokens = backbone(torch.randn(2, 3, side, side))
    assert backbone.grid == (side // 16, side // 16)
    assert tokens.patches.shape == (2, (side // 16) ** 2, 192)
    assert tokens.attention.shape == (2, 4, 3, (side // 16) ** 2)
    assert normalisation(backbone) == normalisation("vit_photo") == normalisation("efficientnet_lite0")
    with pytest.raises(ParameterError, match="side 100"):
        create_backbone("vit_photo", image_size=100)
