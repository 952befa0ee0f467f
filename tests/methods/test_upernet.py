import pytest
import torch

from wsolnb.errors import ParameterError, WeightsError
from wsolnb.methods.upernet import UPerNet
from wsolnb.train.loop import TrainingConfig
from wsolnb.train.recipe import Recipe


def test_upernet_takes_any_size():
    model = UPerNet(UPerNet.make_backbone("swin_tiny_patch4_window7_224"), 4).eval()
    with torch.no_grad():
        for size in ((64, 64), (70, 100)):
            assert model(torch.randn(1, 3, *size)).shape == (1, 4, *size)
    names = {name for name, p in model.named_parameters() if any(p is q for q in model.head.parameters())}
    assert names
    assert not any(name.startswith("net.encoder") for name in names)
    with pytest.raises(ParameterError, match="resnet50"):
        UPerNet(UPerNet.make_backbone("resnet50"), 4)
    with pytest.raises(WeightsError, match="swin_of_the_moon"):
        UPerNet(UPerNet.make_backbone("swin_of_the_moon"), 4)


def test_recipes_that_cannot_be():
    loop = {"training": TrainingConfig(epochs=1, lr=1e-3)}
    with pytest.raises(ParameterError, match="did you mean 'resnet_mini'"):
        Recipe(method="deeplabv2", backbone="resnet_mino", **loop).build(3)
    with pytest.raises(ParameterError, match="takes no checkpoint"):
        Recipe(method="upernet", backbone="swin_tiny_patch4_window7_224", checkpoint="x", **loop).build(3)
    with pytest.raises(ParameterError, match=r"'deeplab'.*\n?.*deeplabv2"):
        Recipe(method="deeplab", backbone="resnet_mini", **loop).build(3)
    with pytest.raises(ParameterError, match=r"'mctforme' \(did you mean 'mctformer'\?\)"):
        Recipe(method="mctforme", backbone="vit_mini", **loop).build(3)
