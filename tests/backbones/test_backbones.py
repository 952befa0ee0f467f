import pytest
import timm
import torch
from safetensors.torch import save_file

from wsolnb import backbones
from wsolnb.backbones import Mixing
from wsolnb.errors import ParameterError, WeightsError


def may_attend(layer, i, j, mixing, columns):
    """The rule of local tokens, for tokens i and j (0 = class token), as its docstring says it."""
    if mixing is None or i == 0:
        return True
    if j == 0:
        return mixing.sees_class
    if layer >= mixing.local_layers:
        return True
    (r, c), (s, t) = divmod(i - 1, columns), divmod(j - 1, columns)
    return abs(r - s) <= mixing.radius and abs(c - t) <= mixing.radius


def dense_rows(vit, images, mixing=None):
    """Class-token rows from full attention matrices in float64, written without the package's code."""
    vit = vit.double().eval()
    x = vit._pos_embed(vit.patch_embed(images.double()))
    rows = []
    for layer, block in enumerate(vit.blocks):
        y = block.norm1(x)
        batch, tokens, width = y.shape
        columns = int((tokens - 1) ** 0.5)
        allowed = [[may_attend(layer, i, j, mixing, columns) for j in range(tokens)] for i in range(tokens)]
        heads = block.attn.num_heads
        size = width // heads
        qkv = block.attn.qkv(y)
        mixed = torch.zeros_like(y)
        row = torch.zeros(batch, heads, tokens, dtype=torch.float64)
        for head in range(heads):
            q, k, v = (qkv[..., part * width + head * size : part * width + (head + 1) * size] for part in range(3))
            if mixing is not None and mixing.bound is not None:
                q, k = (x / x.norm(dim=-1, keepdim=True) * (mixing.bound * size**0.5) ** 0.5 for x in (q, k))
            scores = q @ k.transpose(1, 2) / size**0.5
            weights = torch.softmax(scores.masked_fill(~torch.tensor(allowed), -torch.inf), dim=-1)
            row[:, head] = weights[:, 0]
            mixed[..., head * size : (head + 1) * size] = weights @ v
        rows.append(row)
        x = x + block.attn.proj(mixed)
        x = x + block.mlp(block.norm2(x))
    return vit.norm(x), torch.stack(rows, 1)[..., 1:]


@pytest.mark.parametrize("name", ["vit_mini_plain", "deit_tiny"])
def test_tap_equals_full_attention(name):
    torch.manual_seed(0)
    backbone = backbones.create_backbone(name, image_size=64).eval()
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    with torch.no_grad():
        tokens = backbone(images)
        plain = backbone.vit.forward_features(images)
        expected_tokens, expected_rows = dense_rows(backbone.vit, images)
    assert tokens.attention.shape == (2, backbone.depth, backbone.heads, backbone.grid[0] * backbone.grid[1])
    torch.testing.assert_close(tokens.attention.double(), expected_rows, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.patches, plain[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.class_token.double(), expected_tokens[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "mixing",
    [Mixing(), Mixing(0, 1, True, None), Mixing(3, 1, False, 1.5), Mixing(1, 20, True, 6.0)],
    ids=["default", "global", "narrow", "wide"],
)
def test_local_tokens_equal_masked_full_attention(mixing):
    torch.manual_seed(0)
    backbone = backbones.create_backbone("vit_mini", image_size=48, mixing=mixing).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        tokens = backbone(images)
        expected_tokens, expected_rows = dense_rows(backbone.vit, images, mixing)
    torch.testing.assert_close(tokens.attention.double(), expected_rows, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.patches.double(), expected_tokens[:, 1:], atol=1e-4, rtol=1e-4)


def test_patches_of_the_default_do_not_know_the_class_token():
    backbone = backbones.create_backbone("vit_mini").eval()
    images = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        before = backbone(images)
        backbone.vit.cls_token.add_(torch.randn(1, 1, 96))
        after = backbone(images)
    torch.testing.assert_close(before.patches, after.patches)
    assert (before.class_token - after.class_token).abs().max() > 0.01


def test_a_bounded_score_keeps_attention_spread():
    norm = backbones.BoundedNorm(2.0, 32)
    q, k = norm(100 * torch.randn(50, 32)), norm(torch.randn(70, 32))
    assert ((q @ k.T) / 32**0.5).abs().max() <= 2.0 + 1e-5
    assert torch.isfinite(norm(torch.zeros(1, 32))).all()


def test_gradients_flow_through_the_rows():
    backbone = backbones.create_backbone("vit_mini")
    tokens = backbone(torch.randn(1, 3, 112, 112))
    tokens.attention[:, -1].pow(2).sum().backward()
    first = backbone.vit.blocks[0].attn.qkv.weight.grad
    assert first is not None
    assert first.abs().sum() > 0


def test_autocast_on_the_cpu_trains_with_explicit_and_infers_with_fused_attention():
    torch.manual_seed(0)
    backbone = backbones.create_backbone("vit_mini").eval()
    images = torch.randn(2, 3, 112, 112)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = backbone(images)
        with torch.no_grad():
            inferred = backbone(images)
    assert trained.attention.dtype == inferred.attention.dtype == torch.float32
    torch.testing.assert_close(trained.patches.float(), inferred.patches.float(), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("name", "stride", "dim"), [("resnet18", 8, 512), ("resnet50", 16, 2048), ("resnet_mini", 8, 256)]
)
def test_resnet_stride_and_width(name, stride, dim):
    backbone = backbones.create_backbone(name, output_stride=stride)
    assert backbone(torch.randn(1, 3, 112, 96)).shape == (1, dim, 112 // stride, 96 // stride)
    assert backbone.dim == dim


@pytest.mark.parametrize("name", ["resnet_mini", "efficientnet_lite0"])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_without_dilation_maps_keep_their_size_and_kernels_their_neighbours(name, stride):
    dilated, plain = (backbones.create_backbone(name, output_stride=stride, dilate=dilate) for dilate in (True, False))
    assert dilated.dilated == (stride < 32)
    assert not plain.dilated
    images = torch.randn(1, 3, 96, 64)
    assert dilated(images).shape == plain(images).shape == (1, plain.dim, 96 // stride, 64 // stride)
    if name == "resnet_mini":
        convolution = plain.cnn.layer4[0].conv2
        impulse = torch.zeros(1, convolution.in_channels, 9, 9)
        impulse[:, :, 4, 4] = 1
        reached = (convolution(impulse).abs().amax(1)[0] > 0).nonzero()
        assert (reached.amin(0).tolist(), reached.amax(0).tolist()) == ([3, 3], [5, 5])


def test_unknown_name_and_wrong_image_size_are_named():
    with pytest.raises(ParameterError, match="did you mean 'deit_small'"):
        backbones.create_backbone("deit_smal")
    with pytest.raises(ParameterError, match=r"\(1, 3, 96, 96\)"):
        backbones.create_backbone("vit_mini")(torch.randn(1, 3, 96, 96))


def test_transformers_without_class_token_are_refused():
    vit = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", num_classes=0)
    with pytest.raises(ParameterError, match="no class token"):
        backbones.TransformerBackbone(vit, "vit_without", 224, 16)


def test_pretrained_without_network_says_what_to_download(monkeypatch):
    def offline(*_arguments, **_options):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError) as caught:
        backbones.create_backbone("dino_small", pretrained=True)
    assert "vit_small_patch16_224.dino" in str(caught.value)
    assert "HF_HOME" in str(caught.value)


def test_checkpoints_load_and_damaged_ones_are_refused(tmp_path):
    torch.manual_seed(1)
    source = backbones.create_backbone("vit_mini").vit
    state = source.state_dict()
    save_file(state, tmp_path / "good.safetensors")
    torch.save({"model": {**state, "head.weight": torch.zeros(3, 96)}}, tmp_path / "good.pth")
    for name in ("good.safetensors", "good.pth"):
        loaded = backbones.create_backbone("vit_mini", checkpoint=tmp_path / name).vit.state_dict()
        assert all(torch.equal(loaded[key], state[key]) for key in state)

    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:5000])
    save_file({key: value for key, value in state.items() if key != "norm.bias"}, tmp_path / "short.safetensors")
    save_file({**state, "norm.bias": torch.zeros(5)}, tmp_path / "shape.safetensors")
    save_file({**state, "blocks.4.norm1.bias": torch.zeros(5)}, tmp_path / "deep.safetensors")
    torch.save({"model": pytest.raises}, tmp_path / "code.pth")
    for name, told in [
        ("absent.pth", "no checkpoint"),
        ("cut.safetensors", "cannot read"),
        ("short.safetensors", "norm.bias"),
        ("shape.safetensors", r"\(5,\)"),
        ("deep.safetensors", "blocks.4"),
        ("code.pth", "cannot read"),
    ]:
        with pytest.raises(WeightsError, match=told):
            backbones.create_backbone("vit_mini", checkpoint=tmp_path / name)
