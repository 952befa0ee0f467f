import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsolnb.backbones import create_backbone
from wsolnb.data import IGNORE, Sample
from wsolnb.methods import create_method
from wsolnb.methods.deeplabv2 import DeepLabV2


def test_aspp_is_the_sum_of_dilated_convolutions():
    torch.manual_seed(0)
    model = DeepLabV2(create_backbone("resnet_mini", output_stride=8), 5, dilations=(1, 3)).eval()
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        features = model.backbone(images)
        assert features.shape[2:] == (6, 8)
        expected = torch.zeros(2, 5, 6, 8)
        for branch, dilation in zip(model.aspp, (1, 3), strict=True):
            padded = F.pad(features, (dilation,) * 4)
            for row in range(3):
                for column in range(3):
                    y, x = row * dilation, column * dilation
                    moved = padded[:, :, y : y + 6, x : x + 8]
                    expected += torch.einsum("bdhw,cd->bchw", moved, branch.weight[:, :, row, column])
            expected += branch.bias[:, None, None]
        got = model(images)
    assert got.shape == (2, 5, 48, 64)
    resized = F.interpolate(expected, size=(48, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(got, resized, atol=1e-4, rtol=1e-4)


def test_the_published_deeplab():
    model = DeepLabV2(create_backbone("resnet101", output_stride=8), 21)
    assert [(b.dilation, b.in_channels, b.out_channels) for b in model.aspp] == [
        ((d, d), 2048, 21) for d in (6, 12, 18, 24)
    ]
    assert len(model.backbone.resnet.layer3) == 23
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 65, 81)).shape == (1, 21, 65, 81)
        assert model.backbone(torch.randn(1, 3, 64, 80)).shape[2:] == (8, 10)


def test_a_transformer_can_be_the_backbone():
    model = DeepLabV2(create_backbone("vit_mini", image_size=64), 4, dilations=(1, 2)).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4, 64, 64)


def batch_of(masks):
    samples = [Sample(np.zeros((*mask.shape, 3), np.uint8), "", (0,), mask=mask) for mask in masks]
    return {"image": torch.zeros(len(masks), 3, *masks[0].shape), "samples": samples}


def test_cross_entropy_leaves_unknown_pixels_out():
    rng = np.random.default_rng(0)
    masks = [rng.choice([0, 1, 2, IGNORE], (4, 5)).astype(np.uint8) for _ in range(2)]
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    losses = []
    for image in range(2):
        for y in range(4):
            for x in range(5):
                if masks[image][y, x] != IGNORE:
                    scores = logits[image, :, y, x].double()
                    losses.append(float(torch.logsumexp(scores, 0) - scores[masks[image][y, x]]))
    model = create_method("deeplabv2", create_backbone("resnet_mini", output_stride=8), 2, dilations=(1,))
    assert model.learns_from_masks
    assert model.aspp[0].out_channels == 3  # with the background
    assert float(model.loss(lambda images: logits, batch_of(masks))) == pytest.approx(np.mean(losses), abs=1e-5)
    unknown = [np.full((4, 5), IGNORE, np.uint8)] * 2
    assert float(model.loss(lambda images: logits, batch_of(unknown))) == 0
