"""Backbones by timm's own names, of every kind that a method can use, and of those that it cannot."""

import copy
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from wsolnb.backbones import ConvBackbone, TransformerBackbone, create_backbone, normalisation
from wsolnb.data import Sample
from wsolnb.data.loading import IMAGENET_MEAN, IMAGENET_STD
from wsolnb.data.transforms import RandomLongSideCrop
from wsolnb.errors import ParameterError, WeightsError
from wsolnb.methods import create_method
from wsolnb.methods.locloc import (
    GrabCutEnhancedGenerator,
    LocalFeatureDigging,
    LocLoc,
    LocLocConfig,
)
from wsolnb.methods.mctformer import MCTformer
from wsolnb.methods.ppd import PPD, LinearProbe, ProxyProbingDecoder
from wsolnb.train.loop import TrainingConfig
from wsolnb.train.recipe import Recipe

HALF = (0.5, 0.5, 0.5)
VITS = {  # patch, prefix tokens, mean
    "vit_tiny_patch16_224": (16, 1, HALF),
    "vit_small_patch8_224.dino": (8, 1, IMAGENET_MEAN),
    "vit_small_patch14_dinov2": (14, 1, IMAGENET_MEAN),
    "vit_small_patch14_reg4_dinov2": (14, 5, IMAGENET_MEAN),
    "deit3_small_patch16_224": (16, 1, IMAGENET_MEAN),
    "vit_tiny_r_s16_p8_224": (32, 1, HALF),
}
CNNS = {
    "resnet18": (8, 32),
    "resnet50.a1_in1k": (16,),
    "efficientnet_lite0": (8, 16, 32),
    "tf_efficientnet_lite0": (16,),
    "convnext_atto": (8, 16, 32),
    "regnetx_002": (16,),
}


@contextmanager
def thin(depth=2):
    """Vision transformers have their first blocks only in here: all blocks of a model are alike."""
    whole = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda *names, **options: whole(*names, **options, depth=depth))
        yield


def shallow(name, side=4, **options):
    """A backbone of `side` x `side` patches and two blocks."""
    torch.manual_seed(0)
    with thin():
        backbone = create_backbone(name, image_size=side * VITS[name][0], **options)
    for parameter in (backbone.vit.cls_token, backbone.vit.pos_embed, backbone.vit.reg_token):
        if parameter is not None and not options:  # zeros would hide what is forgotten
            torch.nn.init.normal_(parameter, std=0.5)
    return backbone.eval()


@pytest.fixture(scope="module")
def built():
    return {name: shallow(name) for name in VITS}


@pytest.fixture(params=VITS)
def backbone(request, built):
    return copy.deepcopy(built[request.param])


def images_of(backbone, count=2):
    return torch.randn(count, 3, backbone.image_size, backbone.image_size)


def slow_rows(backbone, images):
    """Class-token rows over the patches, by an explicit softmax of all scores in float64, token by token."""
    vit = copy.deepcopy(backbone.vit).double()
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images.double())))
    rows = []
    for block in vit.blocks:
        attention, y = block.attn, block.norm1(x)
        q, k, _ = attention.qkv(y).chunk(3, dim=-1)
        width = q.shape[-1] // attention.num_heads
        row = torch.zeros(len(images), attention.num_heads, x.shape[1], dtype=torch.float64)
        for image in range(len(images)):
            for head in range(attention.num_heads):
                part = slice(head * width, (head + 1) * width)
                scores = [float(q[image, 0, part] @ k[image, token, part]) / width**0.5 for token in range(x.shape[1])]
                row[image, head] = torch.tensor(scores).exp() / torch.tensor(scores).exp().sum()
        rows.append(row)
        x = block(x)
    return torch.stack(rows, 1)[..., x.shape[1] - backbone.grid[0] * backbone.grid[1] :]


def test_attributes_are_those_of_the_model(backbone):
    patch, prefix, mean = VITS[backbone.name]
    assert (backbone.patch_size, backbone.prefix_tokens, backbone.grid) == (patch, prefix, (4, 4))
    assert backbone.mean == mean == backbone.vit.pretrained_cfg["mean"] == normalisation(backbone.name)[0]
    assert backbone.std == backbone.vit.pretrained_cfg["std"] == normalisation(backbone.name)[1]
    assert backbone.dim == backbone.vit.num_features


def test_tokens_are_timms_and_rows_are_an_explicit_softmax(backbone):
    images = images_of(backbone)
    with torch.no_grad():
        tokens, whole = backbone(images), backbone.vit.forward_features(images)
        expected = slow_rows(backbone, images)
    assert torch.equal(tokens.patches, whole[:, -16:])
    assert torch.equal(tokens.class_token, whole[:, 0])
    torch.testing.assert_close(tokens.attention.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["tscam", "scm", "mctformer"])
def test_methods_of_one_head_train(backbone, method):
    options = {"config": {"blocks": 1}} if method == "scm" else {}
    model = create_method(method, backbone, 3, **options).train()
    output = model(images_of(backbone))
    assert {found.shape for found in model.localize(output, torch.tensor([0, 2])).values()} == {(2, 4, 4)}
    torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 2])).backward()
    assert backbone.vit.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert model.head.weight.grad.abs().sum() > 0 if method == "tscam" else True
    assert (model.mean, model.std) == (backbone.mean, backbone.std)


def test_ppd_and_locloc_train(built):
    for name in ("vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224", "vit_small_patch8_224.dino"):
        backbone = copy.deepcopy(built[name])
        whole = images_of(backbone)
        decoder, probe = ProxyProbingDecoder(backbone.dim, 8, 8), LinearProbe(backbone.dim, 3, blocks=2)
        batch = {"image": whole, "label": torch.tensor([0, 2])}
        for model in (PPD(backbone, 3, decoder), PPD(backbone, 3, probe=probe)):
            model.train().loss(model, batch).backward()
        assert all(part.weight.grad is not None for part in (decoder.layers[0], probe.linear))
        backbone = shallow(name, side=8)
        config = LocLocConfig.paper(base=1, channels=4)
        generator = GrabCutEnhancedGenerator(backbone.dim, 3, config)
        classifier = LocalFeatureDigging(backbone, 3)
        whole = images_of(backbone)
        mask = np.zeros(whole.shape[2:], np.uint8)
        mask[:30, :30] = 1
        samples = [Sample(np.zeros((*mask.shape, 3), np.uint8), "", (0,), mask=mask)] * 2
        batch = {"image": whole, "label": torch.tensor([0, 2]), "samples": samples}
        for part in ({"generator": generator}, {"classifier": classifier}):
            model = LocLoc(backbone, 3, **part, config=config).train()
            model.loss(model, batch).backward()
        assert next(generator.to_map.parameters()).grad.abs().sum() > 0
        assert classifier.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
        assert LocLoc(backbone, 3, generator, classifier, config).eval()(whole).class_maps.shape == (2, 3, 8, 8)


def test_registers_are_in_no_map_and_no_mean(built):
    backbone = copy.deepcopy(built["vit_small_patch14_reg4_dinov2"])
    images = images_of(backbone)
    model = PPD(backbone, 3, probe=LinearProbe(backbone.dim, 3, blocks=1))
    with torch.no_grad():
        whole = backbone.vit.forward_features(images)
        features = torch.cat([whole[:, 0], whole[:, 5:].mean(dim=1)], dim=1)
        assert torch.allclose(model(images).logits, model.probe.linear(features), atol=1e-5)
        grid = model.frozen.to_grid(whole)
        assert torch.equal(grid[:, :, 1, 2], whole[:, 5 + 4 + 2])


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224", "vit_tiny_patch16_224"])
def test_mctformer_with_one_class_is_the_transformer(built, name):
    """With one class token, that of the backbone, nothing else may differ: registers, positions, order of tokens."""
    backbone = copy.deepcopy(built[name])
    model = MCTformer(backbone, 1).eval()
    vit, images = backbone.vit, images_of(backbone)
    with torch.no_grad():
        model.class_tokens.copy_(vit.cls_token if vit.no_embed_class else vit.cls_token + vit.pos_embed[:, :1])
        tokens, output = backbone(images), model(images)
    torch.testing.assert_close(output.features.flatten(2).mT, tokens.patches, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.attention[:, :, 0].flatten(2), tokens.attention.mean(dim=2), atol=1e-5, rtol=1e-4)
    larger = torch.randn(1, 3, backbone.patch_size * 5, backbone.patch_size * 3)
    assert model(larger).features.shape[2:] == (5, 3)


@pytest.mark.parametrize(("name", "stride"), [(name, stride) for name, strides in CNNS.items() for stride in strides])
def test_final_maps_have_the_stride_that_was_asked_for(name, stride):
    backbone = create_backbone(name, output_stride=stride)
    assert isinstance(backbone, ConvBackbone)
    features = backbone.eval()(torch.randn(2, 3, 64, 96))
    assert features.shape == (2, backbone.dim, 64 // stride, 96 // stride)
    assert backbone.mean == backbone.cnn.pretrained_cfg["mean"]
    if stride == 16:
        model = create_method("cam", backbone.train(), 3)
        output = model(torch.randn(2, 3, 64, 64))
        assert set(model.localize(output, torch.tensor([0, 2]))) == {"cam", "layercam"}
        output.logits.sum().backward()
        assert next(backbone.parameters()).grad.abs().sum() > 0


def test_strides_that_cannot_be_had():
    for name in ("resnet_mini", "resnet18", "vit_mini"):
        for stride in (0, 4, 12, 64):
            with pytest.raises(ParameterError, match="use 8, 16 or 32"):
                create_backbone(name, output_stride=stride)
    with pytest.raises(ParameterError, match="output_stride=32"):
        create_backbone("ghostnet_050")
    assert create_backbone("ghostnet_050", output_stride=32).stride == 32
    with pytest.raises(ParameterError, match="stages of a ResNet"):
        _ = create_backbone("convnext_atto", output_stride=16).resnet


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("swin_tiny_patch4_window7_224", "has no class token"),
        ("deit_tiny_distilled_patch16_224", "distillation token"),
        ("vit_little_patch16_reg4_gap_256", "no class token"),
        ("vit_small_patch16_18x2_224", "blocks that the attention tap does not know"),
        ("eva02_tiny_patch14_224", "blocks of their own"),
        ("vit_tiny_patch16_22", "did you mean 'vit_tiny_patch16_224'"),
        ("vit_small_patch16_224.dini", "did you mean 'vit_small_patch16_224.dino'"),
        ("deit_smal", "did you mean 'deit_small'"),
        ("../resnet18", "unknown backbone"),
    ],
)
def test_what_no_method_can_use_is_told_before_a_download(name, told):
    with thin() if name.startswith("vit_") else nullcontext(), pytest.raises(ParameterError, match=told):
        create_backbone(name, pretrained=True)


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("vit_mini", 8),
        ("vit_mini_plain", 8),
        ("deit_base", 16),
        ("conformer_small", 16),
        ("vit_small_patch14_dinov2", 14),
    ],
)
def test_sizes_that_no_patches_fill(name, patch):
    sizes = {0: "multiple", -patch: "multiple", patch - 1: f"use {patch} or {2 * patch}"}
    sizes |= {2 * patch + 1: f"use {2 * patch} or {3 * patch}", 5 * patch - 1: f"use {4 * patch} or {5 * patch}"}
    for size, told in sizes.items():
        with thin(1) if "former" not in name else nullcontext(), pytest.raises(ParameterError, match=told) as caught:
            create_backbone(name, image_size=size)
        assert f"side {size}" in str(caught.value)


@pytest.mark.parametrize("name", ["resnet_mini", "resnet101", "convnext_atto"])
def test_small_images_of_convolutional_networks(name):
    for size in (-1, 0, 31):
        with pytest.raises(ParameterError, match="use 32 or more"):
            create_backbone(name, image_size=size)


def test_embedded_backbones_keep_imagenets_colours():
    for name in ("vit_mini", "vit_mini_dino", "resnet_mini", "deit_small", "dino_small", "conformer_tiny", "resnet50"):
        assert normalisation(name) == (IMAGENET_MEAN, IMAGENET_STD)
    for name in ("vit_mini", "resnet_mini", "conformer_tiny"):
        backbone = create_backbone(name, image_size=64)
        assert (backbone.mean, backbone.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert normalisation("vit_small") == (HALF, HALF)
    assert normalisation(torch.nn.Linear(2, 2)) == (IMAGENET_MEAN, IMAGENET_STD)


def test_padding_has_the_backbones_mean():
    loop = TrainingConfig(epochs=1, lr=1e-3)
    for name, mean in (("vit_small", HALF), ("resnet_mini", IMAGENET_MEAN)):
        recipe = Recipe(method="cam", backbone=name, long_side=(32, 32), image_size=64, training=loop)
        crop = recipe.train_transform(normalisation(name)[0]).transforms[0]
        assert isinstance(crop, RandomLongSideCrop)
        found = crop(Sample(np.zeros((32, 32, 3), np.uint8), "", (0,)), np.random.default_rng(0)).image
        assert set(np.unique(found)) == {0, *(round(255 * value) for value in mean)}


# ------------------------------------------------------------------------------------------------ files of other grids


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224"]
)
def test_positions_of_another_grid(name, tmp_path):
    source = shallow(name)
    state = source.vit.state_dict()
    save_file(state, tmp_path / "file.safetensors")
    same = shallow(name, checkpoint=tmp_path / "file.safetensors").vit
    assert all(torch.equal(value, state[key]) for key, value in same.state_dict().items())
    larger = shallow(name, 6, checkpoint=tmp_path / "file.safetensors").vit
    prefix = 0 if source.vit.no_embed_class else 1
    expected = timm.layers.resample_abs_pos_embed(state["pos_embed"], (6, 6), num_prefix_tokens=prefix)
    assert torch.equal(larger.pos_embed, expected)
    if prefix:
        return
    # As DINOv2 was published: a position for the class token, which timm has added to it.
    position = torch.randn(1, 1, source.dim)
    published = {**state, "pos_embed": torch.cat([position, state["pos_embed"]], dim=1), "mask_token": torch.zeros(1)}
    if "reg_token" in published:
        published["register_tokens"] = published.pop("reg_token")
    torch.save(published, tmp_path / "published.pth")
    loaded = shallow(name, checkpoint=tmp_path / "published.pth").vit
    assert torch.equal(loaded.pos_embed, state["pos_embed"])
    torch.testing.assert_close(loaded.cls_token, state["cls_token"] + position)


def test_another_width_of_positions_is_told(tmp_path):
    state = create_backbone("vit_mini").vit.state_dict()
    for shape in ((1, 197, 95), (1, 199, 96), (197, 96), (1, 1, 96)):
        save_file({**state, "pos_embed": torch.zeros(shape)}, tmp_path / "file.safetensors")
        with pytest.raises(WeightsError, match="'pos_embed'"):
            create_backbone("vit_mini", checkpoint=tmp_path / "file.safetensors")


def test_transformers_made_elsewhere_are_taken():
    vit = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=56, depth=1)
    backbone = TransformerBackbone(vit, "own", 56)
    assert (backbone.grid, backbone.patch_size, backbone.prefix_tokens) == ((4, 4), 14, 5)
