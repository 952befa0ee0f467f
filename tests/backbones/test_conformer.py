import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wsolnb.backbones import create_backbone
from wsolnb.backbones.conformer import Conformer, ConvBlock, ToFeatures
from wsolnb.errors import ParameterError, WeightsError
from wsolnb.methods.scm import SCM, SCMConfig


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(("name", "width", "published"), [("small", 256, 37_673_424), ("tiny", 64, 23_524_704)])
def test_parameters_are_those_of_the_published_networks(name, width, published):
    # Published: 37.7 M and 23.5 M, with both classifiers and the last way back, which are not built here.
    last = 4 * width
    left_out = count(
        ToFeatures(384, width, 1), ConvBlock(last, last, 2, True), nn.Conv2d(width, last, 1, bias=False),
        nn.BatchNorm2d(last), nn.Linear(384, 1000), nn.Linear(last, 1000),
    )  # fmt: skip
    assert count(create_backbone(f"conformer_{name}")) + left_out == published


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    made = create_backbone("conformer_tiny", image_size=64).eval()
    for module in made.modules():  # statistics of their own, so that a forgotten normalisation shows
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return made


def bn(state, name, x, eps=1e-6):
    shape = (1, -1, 1, 1)
    mean, variance, weight, bias = (
        state[f"{name}.{key}"].view(shape) for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def conv(state, name, x, stride=1):
    weight = state[f"{name}.weight"]
    return torch.conv2d(x, weight, state.get(f"{name}.bias"), stride, weight.shape[2] // 2)


def bottleneck(state, name, x, stride, added=0):
    inside = bn(state, f"{name}.bn1", conv(state, f"{name}.conv1", x)).clamp(min=0)
    inside = bn(state, f"{name}.bn2", conv(state, f"{name}.conv2", inside + added, stride)).clamp(min=0)
    if f"{name}.conv3.weight" not in state:  # the last block's
        return None, inside
    if f"{name}.residual_conv.weight" in state:
        x = bn(state, f"{name}.residual_bn", conv(state, f"{name}.residual_conv", x, stride))
    return (bn(state, f"{name}.bn3", conv(state, f"{name}.conv3", inside)) + x).clamp(min=0), inside


def layer_norm(state, name, x, eps=1e-6):
    centred = x - x.mean(dim=-1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def transformer_block(state, name, x, heads=6):
    y = linear(state, f"{name}.attn.qkv", layer_norm(state, f"{name}.norm1", x))
    q, k, v = y.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
    x = x + linear(state, f"{name}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
    hidden = torch.nn.functional.gelu(linear(state, f"{name}.mlp.fc1", layer_norm(state, f"{name}.norm2", x)))
    return x + linear(state, f"{name}.mlp.fc2", hidden), weights[:, :, 0, 1:]


def published_forward(state, images):
    """The published computation, from the tensors' names alone, in float64."""
    stem = bn(state, "bn1", conv(state, "conv1", images, 2), eps=1e-5).clamp(min=0)
    stem = torch.max_pool2d(stem, 3, 2, 1)
    x, _ = bottleneck(state, "conv_1", stem, 1)
    patches = torch.conv2d(stem, state["trans_patch_conv.weight"], state["trans_patch_conv.bias"], 4)
    tokens = torch.cat([state["cls_token"].expand(len(images), -1, -1), patches.flatten(2).mT], dim=1)
    tokens, row = transformer_block(state, "trans_1", tokens)
    rows = [row]
    for number in range(2, 13):
        name = f"conv_trans_{number}"
        x, inside = bottleneck(state, f"{name}.cnn_block", x, 2 if number in (5, 9) else 1)
        cell = {0: 4, 1: 2, 2: 1}[(number - 1) // 4]
        pooled = (
            torch.nn.functional.avg_pool2d(conv(state, f"{name}.squeeze_block.conv_project", inside), cell)
            .flatten(2)
            .mT
        )
        pooled = torch.nn.functional.gelu(layer_norm(state, f"{name}.squeeze_block.ln", pooled))
        tokens = torch.cat([tokens[:, :1], pooled], dim=1) + tokens
        tokens, row = transformer_block(state, f"{name}.trans_block", tokens)
        rows.append(row)
        if number < 12:
            grid = inside.shape[2] // cell
            back = conv(state, f"{name}.expand_block.conv_project", tokens[:, 1:].mT.unflatten(2, (grid, grid)))
            back = bn(state, f"{name}.expand_block.bn", back).clamp(min=0)
            back = back.repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)
            x, _ = bottleneck(state, f"{name}.fusion_block", x, 1, back)
    return layer_norm(state, "trans_norm", tokens, eps=1e-5), torch.stack(rows, dim=1)


def test_tokens_and_attention_equal_the_published_computation(backbone):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = backbone(images)
        state = {name: value.double() for name, value in backbone.vit.state_dict().items()}
        tokens, rows = published_forward(state, images.double())
    torch.testing.assert_close(found.patches.double(), tokens[:, 1:], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.class_token.double(), tokens[:, 0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.attention.double(), rows, atol=1e-6, rtol=1e-3)


def test_published_files_load_by_their_names(backbone, tmp_path):
    extra = {
        "trans_cls_head.weight": torch.zeros(1000, 384), "conv_cls_head.bias": torch.zeros(1000),
        "conv_trans_12.expand_block.bn.weight": torch.zeros(64),
        "conv_trans_12.fusion_block.conv1.weight": torch.zeros(1),
    }  # fmt: skip
    state = backbone.vit.state_dict()
    save_file({**state, **extra}, tmp_path / "published.safetensors")
    loaded = create_backbone("conformer_tiny", image_size=64, checkpoint=tmp_path / "published.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(loaded.vit.state_dict().values(), state.values(), strict=True))
    with pytest.raises(WeightsError, match="give its path as the checkpoint"):
        create_backbone("conformer_small", pretrained=True)
    with pytest.raises(ParameterError, match="cannot take images of side 100"):
        create_backbone("conformer_tiny", image_size=100)


def test_scm_trains_on_it():
    torch.manual_seed(0)
    model = SCM(create_backbone("conformer_tiny", image_size=64), 3, config=SCMConfig.released(first_steps=2)).train()
    assert isinstance(model.backbone.vit, Conformer)
    output = model(torch.randn(2, 3, 64, 64))
    assert output.attention.shape == (2, 12, 6, 16)
    nn.functional.cross_entropy(output.logits, torch.tensor([0, 2])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
