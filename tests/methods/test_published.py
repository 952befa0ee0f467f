"""Files with the names and shapes that the released programs write, each table written out from their sources.

Depth and grid are those of the programs, widths are smaller where the class allows it. What a loaded model computes is
compared with the program's computation, by hand from the tensors of the file.
"""

import os

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from wsolnb.backbones import create_backbone
from wsolnb.errors import ParameterError, WeightsError
from wsolnb.methods import create_method
from wsolnb.methods.locloc import GrabCutEnhancedGenerator, LocalFeatureDigging, LocLoc, LocLocConfig
from wsolnb.methods.ppd import PPD, LinearProbe, ProxyProbingDecoder
from wsolnb.methods.published import SOURCES, check_published, load_published
from wsolnb.methods.scm import SCMConfig

DIM, HEADS, DEPTH = 192, 3, 12  # of DeiT-T

# ----------------------------------------------------------------------------------------------- tables of the files


def affine(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def batch_norm(name, channels):
    statistics = {f"{name}.{key}": (channels,) for key in ("running_mean", "running_var")}
    return {**affine(name, channels), **statistics, f"{name}.num_batches_tracked": ()}


def conv(name, before, after, kernel, bias=False):
    return {f"{name}.weight": (after, before, kernel, kernel), **({f"{name}.bias": (after,)} if bias else {})}


def linear(name, before, after):
    return {f"{name}.weight": (after, before), f"{name}.bias": (after,)}


def block(name, dim):
    return {
        **affine(f"{name}.norm1", dim),
        **linear(f"{name}.attn.qkv", dim, 3 * dim),
        **linear(f"{name}.attn.proj", dim, dim),
        **affine(f"{name}.norm2", dim),
        **linear(f"{name}.mlp.fc1", dim, 4 * dim),
        **linear(f"{name}.mlp.fc2", 4 * dim, dim),
    }


def blocks(name, dim=DIM):
    return {key: shape for number in range(DEPTH) for key, shape in block(f"{name}.{number}", dim).items()}


def deit(patches, tokens=1, dim=DIM):
    return {
        "cls_token": (1, tokens, dim),
        "pos_embed": (1, patches + tokens, dim),
        **conv("patch_embed.proj", 3, dim, 16, bias=True),
        **blocks("blocks", dim),
        **affine("norm", dim),
    }


def tscam(patches, classes):
    return {**deit(patches), **conv("head", DIM, classes, 3, bias=True)}


def scm(patches, classes):
    layers = {f"layers.{i}.{name}": (1,) for i in range(4) for name in ("thred", "fuse._loss_rate")}
    return {**tscam(patches, classes), **layers}


def conv_block(name, before, after, project=False):
    inner = after // 4
    shapes = {
        **conv(f"{name}.conv1", before, inner, 1), **batch_norm(f"{name}.bn1", inner),
        **conv(f"{name}.conv2", inner, inner, 3), **batch_norm(f"{name}.bn2", inner),
        **conv(f"{name}.conv3", inner, after, 1), **batch_norm(f"{name}.bn3", after),
    }  # fmt: skip
    if project:
        shapes |= {**conv(f"{name}.residual_conv", before, after, 1), **batch_norm(f"{name}.residual_bn", after)}
    return shapes


def conformer(classifier, width=64, dim=384, classes=5):
    """Conformer-Ti: 64, 128, 256 channels in three stages of blocks 1 to 4, 5 to 8, 9 to 12."""
    shapes = {
        "cls_token": (1, 1, dim), **affine("trans_norm", dim), **classifier("trans_cls_head", dim, classes),
        **linear("conv_cls_head", 4 * width, classes), **conv("conv1", 3, 64, 7), **batch_norm("bn1", 64),
        **conv_block("conv_1", 64, width, project=True), **conv("trans_patch_conv", 64, dim, 4, bias=True),
        **block("trans_1", dim),
    }  # fmt: skip
    before = width
    for number in range(2, 13):
        name, after = f"conv_trans_{number}", width * (1 if number < 5 else 2 if number < 9 else 4)
        shapes |= {
            **conv_block(f"{name}.cnn_block", before, after, project=number in (5, 9)),
            **conv_block(f"{name}.fusion_block", after, after, project=number == 12),
            **conv(f"{name}.squeeze_block.conv_project", after // 4, dim, 1, bias=True),
            **affine(f"{name}.squeeze_block.ln", dim),
            **conv(f"{name}.expand_block.conv_project", dim, after // 4, 1, bias=True),
            **batch_norm(f"{name}.expand_block.bn", after // 4),
            **block(f"{name}.trans_block", dim),
        }
        before = after
    return shapes


RESNET_LAYERS = {1: (64, 3), 2: (128, 4), 3: (256, 6), 4: (512, 3)}


def resnet50(name):
    shapes, before = {**conv(f"{name}.conv1", 3, 64, 7), **batch_norm(f"{name}.bn1", 64)}, 64
    for layer, (width, count) in RESNET_LAYERS.items():
        for number in range(count):
            at = f"{name}.layer{layer}.{number}"
            shapes |= {**conv(f"{at}.conv1", before, width, 1), **batch_norm(f"{at}.bn1", width)}
            shapes |= {**conv(f"{at}.conv2", width, width, 3), **batch_norm(f"{at}.bn2", width)}
            shapes |= {**conv(f"{at}.conv3", width, 4 * width, 1), **batch_norm(f"{at}.bn3", 4 * width)}
            if number == 0:
                shapes |= {**conv(f"{at}.downsample.0", before, 4 * width, 1)}
                shapes |= batch_norm(f"{at}.downsample.1", 4 * width)
            before = 4 * width
    return shapes


def irn_branches():
    shapes = {}
    for number, before in enumerate((64, 256, 512, 1024, 2048), 1):
        shapes |= {**conv(f"fc_edge{number}.0", before, 32, 1), **affine(f"fc_edge{number}.1", 32)}
    shapes |= conv("fc_edge6", 160, 1, 1, bias=True)
    wide = ((64, 64), (256, 128), (512, 256), (1024, 256), (2048, 256), (768, 256), (448, 256))
    for number, (before, after) in enumerate(wide, 1):
        shapes |= {**conv(f"fc_dp{number}.0", before, after, 1), **affine(f"fc_dp{number}.1", after)}
    return {**shapes, **conv("fc_dp7.3", 256, 2, 1), "fc_dp7.4.running_mean": (2,)}


def unet(classes, dim=DIM):
    shapes = {}
    sides = {"down_1.1": (dim, 8), "down_2.1": (8, 16), "down_3.1": (16, 32)}
    sides |= {"up_1.conv": (48, 16), "up_2.conv": (24, 12), "up_3.conv": (12 + dim, classes)}
    for name, (before, after) in sides.items():
        at = f"att_layer4.{name}.UConv"
        shapes |= {**conv(f"{at}.0", before, after, 3), **batch_norm(f"{at}.1", after)}
        shapes |= {**conv(f"{at}.3", after, after, 3), **batch_norm(f"{at}.4", after)}
    for number, before in ((1, classes), (2, 256), (3, 256)):
        shapes |= {f"up{number}.weight": (before, 256, 4, 4), **batch_norm(f"bn{number}", 256)}
    return {**shapes, **conv("att_conv2", 256, 1, 3), **batch_norm("bn_att2", 1)}


def mini_transformer(classes, dim=DIM):
    return {
        **blocks("blocks_mini"), **affine("norm_mini", dim), **conv("conv", dim, dim, 3, bias=True),
        **conv("classifier.0", dim, classes, 3), **batch_norm("classifier.1", classes),
    }  # fmt: skip


def deconv_net(hidden=2048, dim=DIM):
    shapes = {**conv("conv0", dim, hidden, 3), **batch_norm("bn0", hidden)}
    for place, before in ((0, hidden), (3, 256), (6, 256)):
        shapes |= {f"deconv_layers.{place}.weight": (before, 256, 4, 4)}
        shapes |= batch_norm(f"deconv_layers.{place + 1}", 256)
    return {**shapes, **conv("final_layer", 256, 1, 1, bias=True)}


def drawn(shapes):
    """Random tensors of a table, of a size that keeps deep networks finite, and no two alike."""
    found = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            found[name] = torch.tensor(7)
        elif name.endswith("running_var") or (name.endswith(".weight") and len(shape) == 1):
            found[name] = torch.empty(shape).uniform_(0.5, 1.5)
        elif len(shape) > 1:
            found[name] = torch.randn(shape) / torch.tensor(shape[1:]).prod().clamp(max=4000) ** 0.5
        else:
            found[name] = 0.2 * torch.randn(shape)
    return found


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def write(state, path):
    torch.save(state, path)
    return path


# ------------------------------------------------------------------------------------- the computations, from the names


def by_name(state, name, x, stride=1, padding=None):
    weight = state[f"{name}.weight"]
    padding = weight.shape[2] // 2 if padding is None else padding
    return torch.conv2d(x, weight, state.get(f"{name}.bias"), stride, padding)


def normed(state, name, x, eps=1e-5):
    mean, variance, weight, bias = (
        state[f"{name}.{key}"].view(-1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def layer_norm(state, name, x):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def run_block(state, name, x, heads=HEADS):
    """One block, and the attention of its heads; q, k, v lie in this order, each head by head."""
    width = x.shape[-1] // heads
    y = layer_norm(state, f"{name}.norm1", x) @ state[f"{name}.attn.qkv.weight"].T + state[f"{name}.attn.qkv.bias"]
    q, k, v = y.split(x.shape[-1], dim=-1)
    mixed, seen = [], []
    for head in range(heads):
        at = slice(head * width, (head + 1) * width)
        seen.append((q[..., at] @ k[..., at].mT / width**0.5).softmax(-1))
        mixed.append(seen[-1] @ v[..., at])
    x = x + torch.cat(mixed, -1) @ state[f"{name}.attn.proj.weight"].T + state[f"{name}.attn.proj.bias"]
    y = layer_norm(state, f"{name}.norm2", x) @ state[f"{name}.mlp.fc1.weight"].T + state[f"{name}.mlp.fc1.bias"]
    return x + F.gelu(y) @ state[f"{name}.mlp.fc2.weight"].T + state[f"{name}.mlp.fc2.bias"], torch.stack(seen, 1)


def run_blocks(state, name, x):
    """The outputs of all blocks, and their attention (L, B, N, N), mean over heads."""
    outputs, attention = [], []
    for number in range(DEPTH):
        x, seen = run_block(state, f"{name}.{number}", x)
        outputs.append(x)
        attention.append(seen.mean(1))
    return outputs, torch.stack(attention)


def embedded(state, images):
    patches = by_name(state, "patch_embed.proj", images, stride=16, padding=0).flatten(2).mT
    return torch.cat([state["cls_token"].expand(len(images), -1, -1), patches], 1) + state["pos_embed"]


def as_grid(patches):
    side = round(patches.shape[1] ** 0.5)
    return patches.mT.unflatten(2, (side, side))


def close(found, expected, tolerance=1e-3):
    scale = float(expected.abs().max())
    assert scale > 1e-6
    assert float((found - expected).abs().max()) <= tolerance * scale


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def small(name="deit_tiny", size=64):
    return create_backbone(name, image_size=size)


# ------------------------------------------------------------------------------------------------- each source's files


def test_tscam(images, tmp_path):
    state = drawn(tscam(16, 7))
    file = {"epoch": 3, "state_dict": under("module.", state), "best_map": 0.877}
    model = create_method("tscam", small(), 7).eval()
    report = load_published(model, write(file, tmp_path / "model_best.pth"), "tscam")
    assert report.matched["state_dict.module.head.weight"] == "semantic.weight"
    assert report.matched["state_dict.module.blocks.3.attn.qkv.bias"] == "backbone.vit.blocks.3.attn.qkv.bias"
    assert len(report.matched) == len(model.state_dict()) == len(state)
    assert (report.ignored, report.kept, report.mismatched) == ({}, {}, {})
    outputs, attention = run_blocks(state, "blocks", embedded(state, images))
    semantic = by_name(state, "head", as_grid(layer_norm(state, "norm", outputs[-1])[:, 1:]))
    published = attention.sum(0)[:, 0, 1:].unflatten(1, (4, 4))[:, None] * semantic
    output = model(images)
    close(output.logits, semantic.mean((2, 3)))
    close(12 * model.localize(output, torch.tensor([6, 2]))["tscam"], published[[0, 1], [6, 2]])


def test_scm(images, tmp_path):
    state = drawn(scm(16, 7))
    path = write({"state_dict": under("module.", state)}, tmp_path / "model_best.pth")
    model = create_method("scm", small(), 7, config=SCMConfig.released()).eval()
    report = load_published(model, path, "scm")
    assert len(report.matched) == len(state)
    assert report.matched["state_dict.module.layers.2.thred"] == "calibration.blocks.2.beta"
    for number, one in enumerate(model.calibration.blocks):
        assert float(one.lam) == float(state[f"layers.{number}.fuse._loss_rate"])
        assert float(one.beta) == float(state[f"layers.{number}.thred"])
    outputs, attention = run_blocks(state, "blocks", embedded(state, images))
    semantic = by_name(state, "head", as_grid(layer_norm(state, "norm", outputs[-1])[:, 1:]))
    map_ = attention.sum(0)[:, 0, 1:]
    map_ = map_ - map_.amin(1, keepdim=True)
    map_ = (map_ / map_.amax(1, keepdim=True)).unflatten(1, (4, 4))
    output = model(images)
    close(output.logits, semantic.mean((2, 3)))
    close(model.localize(output, torch.tensor([0, 5]))["tscam"], (map_[:, None] * semantic)[[0, 1], [0, 5]])
    plain = create_method("scm", small(), 7)  # the paper's map is another one
    with pytest.raises(ParameterError, match=r"attention = 'min_max', this model has 'mean'(?s:.*)SCMConfig.released"):
        load_published(plain, path, "scm")


def test_conformer_and_tscam_on_it(images, tmp_path):
    state = drawn(conformer(lambda name, before, after: conv(name, before, after, 3, bias=True)))
    path = write({"state_dict": under("module.", state)}, tmp_path / "tscam.pth")
    model = create_method("tscam", small("conformer_tiny"), 5).eval()
    report = load_published(model, path, "tscam")
    own = model.state_dict()
    assert torch.equal(own["backbone.vit.conv_trans_7.fusion_block.bn3.running_var"],
                       state["conv_trans_7.fusion_block.bn3.running_var"])  # fmt: skip
    assert len(report.matched) + len(report.ignored) == len(state)
    assert len(report.matched) == len(own)
    left = {name.removeprefix("state_dict.module.") for name in report.ignored}
    assert {name for name in left if not name.startswith("conv_trans_12.")} == {
        "conv_cls_head.weight",
        "conv_cls_head.bias",
    }
    assert "logits, which are not built here" in report.ignored["state_dict.module.conv_cls_head.weight"]
    output = model(images)
    close(output.semantic_map, by_name(state, "trans_cls_head", as_grid(model.backbone(images).patches)))

    state = drawn(conformer(linear))
    backbone = small("conformer_tiny").eval()
    report = load_published(backbone, write(state, tmp_path / "Conformer_tiny_patch16.pth"), "conformer")
    assert "classifier of ImageNet" in report.ignored["trans_cls_head.bias"]
    stem = F.max_pool2d(normed(state, "bn1", by_name(state, "conv1", images, 2)).relu(), 3, 2, 1)
    tokens = by_name(state, "trans_patch_conv", stem, 4, 0).flatten(2).mT
    tokens = torch.cat([state["cls_token"].expand(2, -1, -1), tokens], 1)
    _, seen = run_block(state, "trans_1", tokens, heads=6)
    close(backbone(images).attention[:, 0], seen[:, :, 0, 1:])


def aliased(state, pairs):
    """A state of modules that are registered several times: pairs of a second name's beginning and the first's."""
    for second, first in pairs:
        state = state | {second + name.removeprefix(first): value for name, value in state.items()
                         if name.startswith(first)}  # fmt: skip
    return state


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(4)
    return drawn(resnet50("resnet50"))


def resnet_stages(state, images):
    """Five stages of the released ResNet-50: stride 16, of which the last stage has none, and no dilation."""
    x = F.max_pool2d(normed(state, "resnet50.bn1", by_name(state, "resnet50.conv1", images, 2)).relu(), 3, 2, 1)
    found = [x]
    for layer, (_, count) in RESNET_LAYERS.items():
        for number in range(count):
            at, stride = f"resnet50.layer{layer}.{number}", 2 if layer in (2, 3) and number == 0 else 1
            y = normed(state, f"{at}.bn1", by_name(state, f"{at}.conv1", x)).relu()
            y = normed(state, f"{at}.bn2", by_name(state, f"{at}.conv2", y, stride)).relu()
            y = normed(state, f"{at}.bn3", by_name(state, f"{at}.conv3", y))
            if number == 0:
                x = normed(state, f"{at}.downsample.1", by_name(state, f"{at}.downsample.0", x, stride))
            x = (x + y).relu()
        found.append(x)
    return found


def test_lpcam(resnet, images, tmp_path):
    state = aliased(
        resnet | drawn(conv("classifier", 2048, 20, 1)),
        [("stage1.0.", "resnet50.conv1."), ("stage1.1.", "resnet50.bn1."), ("stage1.4.", "resnet50.layer1."),
         ("stage2.0.", "resnet50.layer2."), ("stage3.0.", "resnet50.layer3."), ("stage4.0.", "resnet50.layer4."),
         *((f"backbone.{i}.", f"stage{i + 1}.") for i in range(4)), ("newly_added.0.", "classifier.")],
    )  # fmt: skip
    path = write(state, tmp_path / "res50_cam.pth")
    model = create_method("cam", create_backbone("resnet50", output_stride=16, dilate=False), 20).eval()
    report = load_published(model, path, "lpcam")
    assert len(report.matched) == len(model.state_dict()) == len(resnet) + 1
    assert len(report.ignored) == 2 * len(resnet) + 1
    assert set(report.ignored.values()) == {"a second name of the same tensor"}
    features = resnet_stages(state, images)[-1]
    output = model(images)
    assert output.features.shape == (2, 2048, 4, 4)
    close(output.features, features)
    close(output.logits, features.mean((2, 3)) @ state["classifier.weight"][:, :, 0, 0].T)
    cam = torch.conv2d(features, state["classifier.weight"]).relu()[[0, 1], [3, 19]]
    close(model.localize(output, torch.tensor([3, 19]))["cam"], cam)

    dilated = create_method("cam", create_backbone("resnet50", output_stride=16), 20)
    with pytest.raises(ParameterError, match=r"backbone.dilated = False, this model has True(?s:.*)dilate=False"):
        load_published(dilated, path, "lpcam")
    state["stage4.0.2.conv2.weight"] = state["stage4.0.2.conv2.weight"] + 1
    report = check_published(model, write(state, path), "lpcam")
    assert report.mismatched == {
        "stage4.0.2.conv2.weight": "should be a copy of 'resnet50.layer4.2.conv2.weight', and is not",
        "backbone.3.0.2.conv2.weight": "should be a copy of 'stage4.0.2.conv2.weight', and is not",
    }


def test_irn(resnet, images, tmp_path):
    branches = drawn(irn_branches())
    state = aliased(
        resnet | branches | {"mean_shift.running_mean": branches["fc_dp7.4.running_mean"]},
        [("stage1.0.", "resnet50.conv1."), ("stage1.1.", "resnet50.bn1."), ("stage2.0.", "resnet50.layer1."),
         ("stage3.0.", "resnet50.layer2."), ("stage4.0.", "resnet50.layer3."), ("stage5.0.", "resnet50.layer4."),
         *((f"backbone.{i}.", f"stage{i + 1}.") for i in range(5)),
         *((f"edge_layers.{i}.", f"fc_edge{i + 1}.") for i in range(6)),
         *((f"dp_layers.{i}.", f"fc_dp{i + 1}.") for i in range(7))],
    )  # fmt: skip
    state |= {f"path_indices{i}": torch.zeros(2, 3, 5, dtype=torch.long) for i in range(9)}
    state |= {"disp_target": torch.zeros(1, 2, 34, 1)}
    model = create_method("irn", create_backbone("resnet50", output_stride=16, dilate=False), 20).eval()
    report = load_published(model, write(state, tmp_path / "res50_irn.pth"), "irn")
    assert len(report.matched) == len(model.state_dict())
    assert len(report.matched) + len(report.ignored) == len(state)
    reasons = {report.ignored[name] for name in ("mean_shift.running_mean", "fc_dp7.4.running_mean", "path_indices8")}
    assert reasons == {
        "of the instance masks, which are not made here",
        "an index of the training loss, made anew here",
    }

    def unit(name, x, groups, scale=1):
        x = F.group_norm(by_name(state, f"{name}.0", x), groups, state[f"{name}.1.weight"], state[f"{name}.1.bias"])
        return (x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bilinear")).relu()

    stages = resnet_stages(state, images)
    edges = [unit(f"fc_edge{i + 1}", x, 4, (1, 1, 2, 4, 4)[i]) for i, x in enumerate(stages)]
    moves = [unit(f"fc_dp{i + 1}", x, (8, 16, 16, 16, 16)[i], (1, 1, 1, 2, 2)[i]) for i, x in enumerate(stages)]
    deep = unit("fc_dp6", torch.cat(moves[2:], 1), 16, 2)
    deep = unit("fc_dp7", torch.cat([*moves[:2], deep], 1), 16)
    output = model(images)
    close(output.boundary, by_name(state, "fc_edge6", torch.cat(edges, 1))[:, 0])
    close(output.displacement, by_name(state, "fc_dp7.3", deep))


@pytest.mark.parametrize("version", [1, 2])
def test_mctformer(version, images, tmp_path):
    head = linear("head", DIM, 20) if version == 1 else conv("head", DIM, 20, 3, bias=True)
    state = drawn({**deit(16, tokens=20), **head})
    path, source = write({"model": state}, tmp_path / "checkpoint.pth"), f"mctformer_v{version}"
    model = create_method("mctformer", small(), 20, final_norm=False, version=version).eval()
    report = load_published(model, path, source)
    assert report.kept == {"backbone.vit.cls_token": "not used: MCTformer has class tokens of its own"}
    assert report.matched["model.cls_token"] == "class_tokens"
    assert [*report.ignored] == (["model.head.weight", "model.head.bias"] if version == 1 else [])
    outputs, attention = run_blocks(state, "blocks", embedded(state, images))
    tokens, patches = outputs[-1][:, :20], as_grid(outputs[-1][:, 20:])
    attention = attention[-3:].mean(0)[:, :20, 20:].unflatten(2, (4, 4))
    output = model(images)
    close(output.token_logits, tokens.mean(-1))
    maps, classes = model.localize(output, torch.tensor([19, 4])), ([0, 1], [19, 4])
    close(maps["attention"], attention[classes])
    if version == 2:
        semantic = by_name(state, "head", patches)
        close(output.patch_logits, semantic.mean((2, 3)))
        close(maps["mctformer"], (attention * semantic.relu())[classes])
    normalised = create_method("mctformer", small(), 20, version=version)
    with pytest.raises(ParameterError, match="final_norm = False, this model has True"):
        load_published(normalised, path, source)
    if version == 1:
        with pytest.raises(ParameterError, match=r"semantic.padding_mode = 'zeros', this model has None"):
            load_published(model, path, "mctformer_v2")
        model = create_method("mctformer", small(), 20, final_norm=False)
        told = r"head.weight' has shape \(20, 192\), the model's 'semantic.weight' has \(20, 192, 3, 3\)"
        with pytest.raises(WeightsError, match=told):
            load_published(model, path, "mctformer_v2")


def double(state, name, x):
    for place in (0, 3):
        x = normed(state, f"{name}.{place + 1}", by_name(state, f"{name}.{place}", x))
        x = torch.where(x > 0, x, 0.01 * x)
    return x


def test_locloc_generator(tmp_path):
    state, backbone = drawn(unet(6)), small(size=224)
    path = write({"state_dict": state}, tmp_path / "CUB_loc.pth")
    model = LocLoc(backbone, 6, generator=GrabCutEnhancedGenerator(DIM, 6)).eval()
    frozen = {name: value.clone() for name, value in backbone.state_dict().items()}
    report = load_published(model, path, "locloc")
    assert report.matched["state_dict.att_layer4.up_2.conv.UConv.3.weight"] == "generator.up_2.3.weight"
    assert {*report.kept} == {name for name in model.state_dict() if name.startswith("frozen.")}
    assert all(torch.equal(value, frozen[name]) for name, value in backbone.state_dict().items())
    features = torch.randn(2, DIM, 14, 14)
    at = "att_layer4"
    second = double(state, f"{at}.down_1.1.UConv", F.max_pool2d(features, 2))
    third = double(state, f"{at}.down_2.1.UConv", F.max_pool2d(second, 2))
    up = torch.cat([second, F.interpolate(third, size=7, mode="bilinear")], 1)  # of 3 x 3 cells, as released
    up = double(state, f"{at}.up_2.conv.UConv", up)
    up = torch.cat([features, F.interpolate(up, scale_factor=2, mode="bilinear")], 1)
    up = double(state, f"{at}.up_3.conv.UConv", up)
    for number in (1, 2, 3):
        up = torch.conv_transpose2d(up, state[f"up{number}.weight"], stride=2, padding=1)
        up = normed(state, f"bn{number}", up).relu()
    close(model.generator(features), normed(state, "bn_att2", by_name(state, "att_conv2", up))[:, 0].sigmoid(), 1e-4)
    paper = LocLocConfig.paper()
    paper = LocLoc(backbone, 6, generator=GrabCutEnhancedGenerator(DIM, 6, paper), config=paper)
    with pytest.raises(ParameterError, match="third_level = False, this model has True"):
        load_published(paper, path, "locloc")


def test_locloc_classifier(images, tmp_path):
    state, backbone = drawn(mini_transformer(30)), small()
    path = write({"state_dict": under("module.", state)}, tmp_path / "CUB_cls.pth")
    model = LocLoc(backbone, 30, classifier=LocalFeatureDigging(backbone, 30)).eval()
    report = load_published(model, path, "locloc")
    assert report.matched["state_dict.module.classifier.1.bias"] == "classifier.classifier.3.bias"
    assert set(report.kept.values()) == {"the file holds the classifier alone"}
    outputs, _ = run_blocks(state, "blocks_mini", model.frozen.embed(images))
    x = by_name(state, "conv", as_grid(layer_norm(state, "norm_mini", outputs[-1])[:, 1:])).relu()
    x = normed(state, "classifier.1", by_name(state, "classifier.0", x)).relu()
    close(model(images).logits, F.avg_pool2d(x, 3, 1, 1).mean((2, 3)))
    short = LocLoc(backbone, 20, classifier=LocalFeatureDigging(backbone, 20))
    told = r"classifier.0.weight' has shape \(30, 192, 3, 3\), the model's 'classifier.classifier.2.weight' has \(20, "
    with pytest.raises(WeightsError, match=told):
        load_published(short, path, "locloc")


def test_ppd(images, tmp_path):
    backbone, state = small(), drawn(deconv_net())
    model = PPD(backbone, 9, ProxyProbingDecoder(DIM), LinearProbe(DIM, 9, pool=False)).eval()
    report = load_published(model, write(state, tmp_path / "cub_localizer.pth"), "ppd")
    assert report.matched["deconv_layers.6.weight"] == "decoder.layers.4.6.weight"
    assert {"probe.linear.weight", "frozen.backbone.vit.pos_embed"} < {*report.kept}
    features = torch.randn(2, DIM, 14, 14)
    x = F.max_pool2d(normed(state, "bn0", by_name(state, "conv0", features)).relu(), 3, 2, 1)
    for place in (0, 3, 6):
        x = torch.conv_transpose2d(x, state[f"deconv_layers.{place}.weight"], stride=2, padding=1)
        x = normed(state, f"deconv_layers.{place + 1}", x).relu()
    close(model.decoder(features), by_name(state, "final_layer", x)[:, 0])

    state = drawn(linear("linear", 4 * DIM, 9))  # as it lies in the program's repository, states of its training too
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(9, 4 * DIM)}}, "param_groups": [{"lr": 0.0}]}
    file = {"epoch": 100, "state_dict": under("module.", state), "optimizer": optimizer, "best_acc": 81.1}
    path = write(file, tmp_path / "cub_classifier.pth.tar")
    report = load_published(model, path, "ppd")
    assert report.ignored == {"optimizer.state.0.momentum_buffer": "a state of the training"}
    own = backbone.vit.state_dict()
    outputs, _ = run_blocks(own, "blocks", embedded(own, images))
    tokens = torch.cat([layer_norm(own, "norm", x)[:, 0] for x in outputs[-4:]], 1)
    close(model(images).logits, tokens @ state["linear.weight"].T + state["linear.bias"])
    pooled = PPD(backbone, 9, probe=LinearProbe(DIM, 9))
    with pytest.raises(ParameterError, match=r"probe.pool = False, this model has True(?s:.*)pool=False"):
        load_published(pooled, path, "ppd")


def test_every_source_is_tested():
    mctformer = {"mctformer_v1", "mctformer_v2"}
    assert {*SOURCES} == {"tscam", "scm", "conformer", "lpcam", "irn", "locloc", "ppd"} | mctformer


# ------------------------------------------------------------------------------------- what a file may be, and may not


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(3)
    return drawn(tscam(4, 3))


@pytest.fixture(scope="module")
def model():
    return create_method("tscam", small(size=32), 3)


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [
        *((None, prefix) for prefix in ("", "module.", "model.", "_orig_mod.", "module._orig_mod.")),
        *((wrapper, prefix) for wrapper in ("state_dict", "model", "net") for prefix in ("", "module.")),
    ],
)
def test_wrappers_and_prefixes(wrapper, prefix, state, model, tmp_path):
    named = under(prefix, state)
    other = {"model_ema": {name: value + 1 for name, value in named.items()}, "scaler": {"scale": torch.ones(1)}}
    model.semantic.bias.zero_()
    load_published(model, write({**other, wrapper: named} if wrapper else named, tmp_path / "x.pth"), "tscam")
    assert torch.equal(model.semantic.bias, state["head.bias"])
    assert torch.equal(model.backbone.vit.blocks[11].mlp.fc2.weight, state["blocks.11.mlp.fc2.weight"])


def test_safetensors(state, model, tmp_path):
    save_file(under("module.", state), tmp_path / "x.safetensors")
    assert len(load_published(model, tmp_path / "x.safetensors", "tscam").matched) == len(state)


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("blocks.7.attn.qkv.weight"),
         r"'backbone.vit.blocks.7.attn.qkv.weight' of the model, of shape \(576, 192\), is not in the file"),
        (lambda state: state | {"blocks.7.gate": torch.zeros(2)},
         r"'blocks.7.gate' of shape \(2,\) is 'backbone.vit.blocks.7.gate' here, which the model has not"),
        (lambda state: state | {"extra.weight": torch.zeros(2, 1)},
         r"'extra.weight' of shape \(2, 1\) is not among the names of this source"),
        (lambda state: state | {"head.weight": torch.zeros(9, 192, 3, 3), "head.bias": torch.zeros(9)},
         r"'head.weight' has shape \(9, 192, 3, 3\), the model's 'semantic.weight' has \(3, 192, 3, 3\); 1 more"),
        (lambda state: state | {"layers.0.thred": torch.zeros(1), "layers.0.fuse._loss_rate": torch.zeros(1)},
         r"'layers.0.thred' of shape \(1,\) is not among(?s:.*); its names are those of source 'scm'"),
    ],
    ids=["missing", "surplus in a block", "surplus", "shape", "scm's file"],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_loaded(change, told, state, model, tmp_path):
    path, before = write(change(state), tmp_path / "x.pth"), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(WeightsError, match=told) as caught:
        load_published(model, path, "tscam")
    assert "create_method('tscam', create_backbone('deit_small'), 200)" in caught.value.remedy
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = check_published(model, path, "tscam")
    assert report.mismatched
    assert "mismatched" in str(report)
    assert not {*report.mismatched} & {*report.matched}


def test_files_of_another_source(state, model, tmp_path):
    path = write({"state_dict": under("module.", state)}, tmp_path / "x.pth")
    scm_model = create_method("scm", small(size=32), 3, config=SCMConfig.released())
    told = r"'calibration.blocks.0.lam' of the model(?s:.*)its names are those of source 'tscam' or "
    with pytest.raises(WeightsError, match=told):
        load_published(scm_model, path, "scm")
    with pytest.raises(WeightsError, match=r"no tensor of .* has a name of 'ppd'; its first is 'state_dict.module.cls"):
        load_published(model, path, "ppd")
    with pytest.raises(ParameterError, match=r"unknown source 'tscan' \(did you mean 'tscam'"):
        load_published(model, path, "tscan")
    with pytest.raises(ParameterError, match="of 'tscam' is loaded into TSCAM, got MCTformer"):
        load_published(create_method("mctformer", small(size=32), 3), path, "tscam")
    with pytest.raises(ParameterError, match=r"padding_mode = 'zeros', this model has 'replicate'"):
        load_published(create_method("tscam", small(size=32), 3, padding="replicate"), path, "tscam")
    coloured = create_method("tscam", create_backbone("vit_small", image_size=32), 3)
    with pytest.raises(ParameterError, match=r"mean = \(0.485, .*\), this model has \(0.5, 0.5, 0.5\)"):
        load_published(coloured, path, "tscam")


class Malicious:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("function", "argument", "named"),
    [(os.system, "touch {}", r"\w+\.system"), (eval, "open('{}', 'w')", "eval")],
    ids=["system", "eval"],
)
def test_a_file_that_would_run_code_is_refused(function, argument, named, legacy, state, model, tmp_path):
    file = {"state_dict": state, "best_map": Malicious(function, argument.format(tmp_path / "ran"))}
    torch.save(file, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match=f"it holds {named}, which would run code") as caught:
        load_published(model, tmp_path / "x.pth", "tscam")
    assert "do not load this file in any way" in caught.value.remedy
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_not_there(model, tmp_path):
    with pytest.raises(WeightsError, match="no checkpoint at"):
        load_published(model, tmp_path / "absent.pth", "tscam")
