"""Checkpoints of the published programs, loaded into the models of this package by tables of names.

    model = create_method("tscam", create_backbone("deit_small"), 200)
    report = load_published(model, "model_best.pth", source="tscam")

Names and shapes are those of the released programs. Their own modules were filled with random numbers. The models here
give the same outputs after loading these states, to 1e-5 of the largest value. Of the published files only PPD's probe
of CUB could be had, and it was loaded. All of these programs normalise images by ImageNet's mean and standard
deviation.

- tscam (github.com/vasgaowei/TS-CAM): DeiT-T, DeiT-S, DeiT-B of 384 pixels, Conformer-S. The logits of the last one add
  there those of the convolutional branch, which is not built here: its maps are the published ones, its logits not.
- scm (github.com/164140757/SCM): DeiT-S. Its program also has a Conformer, but offers no weights for it: not read.
- lpcam (github.com/zhaozhengChen/LPCAM): the classifier, `res50_cam.pth`, which the program writes and nobody offers;
  20 classes of VOC, 80 of COCO. Its ResNet-50 has stride 16 without dilation.
- irn (github.com/jiwoon-ahn/irn, and LPCAM's copy): `res50_irn.pth`, likewise.
- mctformer_v1, mctformer_v2 (github.com/xulianuwa/MCTformer as of 2022): DeiT-S. For images of other sizes than 224 it
  enlarges the positions by another bicubic rule (maps differ by half a percent). MCTformer+, which came later, ranks
  its patches: not read.
- locloc (github.com/Cliffia123/LocLoc): the generator in one file (the U-Net of its evaluation script), the classifier
  in another. The classifier has 1,000 outputs also on CUB, where the first 200 are the classes. The backbone is DeiT-S.
- ppd (github.com/ustcjinggg/ProxyProbingDecoder): the decoder in one file, in another the probe, of class tokens alone.
  The backbone is DINO's ViT-S/16, for images of 256 pixels. LocLoc's training script writes a decoder of the same names
  and shapes, for tokens without a final normalisation: it cannot be told apart.
- conformer (github.com/pengzhiliang/Conformer): Tiny and Small of ImageNet, into the backbone alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from wsolnb.backbones import ConformerBackbone
from wsolnb.backbones.checkpoints import prefix_of, read_tensors
from wsolnb.errors import ParameterError, WeightsError, check_choice
from wsolnb.methods.cam import CAMClassifier
from wsolnb.methods.irn import IRN
from wsolnb.methods.locloc import LocLoc
from wsolnb.methods.mctformer import MCTformer
from wsolnb.methods.ppd import PPD
from wsolnb.methods.scm import SCM
from wsolnb.methods.tscam import TSCAM


@dataclass(frozen=True)
class Report:
    """How the tensors of a file and those of a model go together.

    matched: the model's name by the file's. ignored: why a tensor of the file is not used. kept: why a tensor of the
    model is not filled. mismatched: what is wrong with any other tensor of either; nothing may be loaded then.
    others: other sources whose names are those of the file, looked for where something is wrong.
    """

    source: str
    matched: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    mismatched: dict[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.matched)} tensors matched"]
        for title in ("ignored", "kept", "mismatched"):
            reasons: dict[str, list[str]] = {}
            for name, reason in getattr(self, title).items():
                reasons.setdefault(reason, []).append(name)
            lines += [f"{len(names)} {title}: {reason} ({names[0]}, ...)" for reason, names in reasons.items()]
        return "\n".join(lines)


class Layout(NamedTuple):
    """The tensors of one kind of file. In names, `*` stands for a part without dots, a last dot for all that follows.

    model: class that the file is loaded into. built: how to make it. names: names here by names there, of which each is
    in every file. ignored: why names there are left out. copies: names there of what is there under a second name, too.
    fills: how the names here begin that the file fills. kept: why names here are not filled.
    needs: values that attributes of the model must have for its results to be the published ones.
    convert: changes tensors by names here, where more than a name differs.
    """

    model: type[nn.Module]
    built: str
    names: Mapping[str, str]
    ignored: Mapping[str, str] = {}
    copies: Mapping[str, str] = {}
    fills: str = ""
    kept: Mapping[str, str] = {}
    needs: Mapping[str, Any] = {}
    convert: Callable[[dict[str, Tensor]], None] | None = None


def _under(there: str, here: str, names: Sequence[str]) -> dict[str, str]:
    return {there + name: here + name for name in names}


def _class_tokens(found: dict[str, Tensor]) -> None:
    """Add to MCTformer's class tokens their rows of the position embedding, whose other rows are the patches'."""
    tokens, position = found.get("class_tokens"), found.get("backbone.vit.pos_embed")
    if tokens is None or position is None or tokens.ndim != 3 or position.shape[1:2] <= tokens.shape[1:2]:
        return
    rows = tokens.shape[1]
    found["class_tokens"] = tokens + position[:, :rows]
    found["backbone.vit.pos_embed"] = torch.cat([torch.zeros_like(position[:, :1]), position[:, rows:]], dim=1)


VIT = _under("", "backbone.vit.", ("cls_token", "pos_embed", "patch_embed.proj.", "blocks.", "norm."))
CONFORMER = ("cls_token", "conv1.", "bn1.", "conv_1.", "trans_patch_conv.", "trans_1.", "conv_trans_*.", "trans_norm.")
RESNET = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
UNET = ("down_1", "down_2", "down_3", "up_1", "up_2", "up_3")

NOT_BUILT = "of the convolutional branch behind the last tokens, on which no map depends"
CONVOLUTIONAL = {
    "conv_cls_head.": "of the convolutional branch's logits, which are not built here",
    **dict.fromkeys([f"conv_trans_12.{name}." for name in ("expand_block", "fusion_block")], NOT_BUILT),
    **dict.fromkeys([f"conv_trans_12.cnn_block.{name}." for name in ("conv3", "bn3")], NOT_BUILT),
}
MEAN_SHIFT = "of the instance masks, which are not made here"

MCTFORMER = "create_method('mctformer', create_backbone('deit_small'), 20, final_norm=False)"
UNSEEN = {"backbone.vit.cls_token": "not used: MCTformer has class tokens of its own"}

SOURCES: dict[str, tuple[Layout, ...]] = {
    "tscam": (
        Layout(
            TSCAM,
            "create_method('tscam', create_backbone('deit_small'), 200)",
            VIT | {"head.": "semantic."},
            needs={"semantic.padding_mode": "zeros"},
        ),
        Layout(
            TSCAM,
            "create_method('tscam', create_backbone('conformer_small'), 200)",
            _under("", "backbone.vit.", CONFORMER) | {"trans_cls_head.": "semantic."},
            CONVOLUTIONAL,
            needs={"semantic.padding_mode": "zeros"},
        ),
    ),
    "scm": (
        Layout(
            SCM,
            "create_method('scm', create_backbone('deit_small'), 200, config=SCMConfig.released())",
            VIT
            | {
                "head.": "semantic.",
                "layers.*.fuse._loss_rate": "calibration.blocks.*.lam",
                "layers.*.thred": "calibration.blocks.*.beta",
            },
            needs={"semantic.padding_mode": "zeros", "calibration.config.attention": "min_max"},
        ),
    ),
    "lpcam": (
        Layout(
            CAMClassifier,
            "create_method('cam', create_backbone('resnet50', output_stride=16, dilate=False), 20)",
            _under("resnet50.", "backbone.cnn.", RESNET) | {"classifier.": "classifier."},
            copies={
                "stage1.0.": "resnet50.conv1.",
                "stage1.1.": "resnet50.bn1.",
                "stage1.4.": "resnet50.layer1.",
                **{f"stage{number}.0.": f"resnet50.layer{number}." for number in range(2, 5)},
                **{f"backbone.{number - 1}.": f"stage{number}." for number in range(1, 5)},
                "newly_added.0.": "classifier.",
            },
            needs={"backbone.stride": 16, "backbone.dilated": False},
        ),
    ),
    "irn": (
        Layout(
            IRN,
            "create_method('irn', create_backbone('resnet50', output_stride=16, dilate=False), 20)",
            _under("resnet50.", "backbone.cnn.", RESNET)
            | {f"fc_edge{number}.": f"boundary.{number - 1}." for number in range(1, 6)}
            | {f"fc_dp{number}.": f"displacement.{number - 1}." for number in range(1, 6)}
            | {
                "fc_edge6.": "boundary_out.",
                "fc_dp6.": "displacement_join.",
                "fc_dp7.0.": "displacement_out.0.0.",
                "fc_dp7.1.": "displacement_out.0.1.",
                "fc_dp7.3.": "displacement_out.1.",
            },
            ignored={
                **dict.fromkeys(
                    ("mean_shift.running_mean", "fc_dp7.4.running_mean", "dp_layers.6.4.running_mean"), MEAN_SHIFT
                ),
                **dict.fromkeys(("path_indices*", "disp_target"), "an index of the training loss, made anew here"),
            },
            copies={
                "stage1.0.": "resnet50.conv1.",
                "stage1.1.": "resnet50.bn1.",
                **{f"stage{number}.0.": f"resnet50.layer{number - 1}." for number in range(2, 6)},
                **{f"backbone.{number - 1}.": f"stage{number}." for number in range(1, 6)},
                **{f"edge_layers.{number - 1}.": f"fc_edge{number}." for number in range(1, 7)},
                **{f"dp_layers.{number - 1}.": f"fc_dp{number}." for number in range(1, 8)},
            },
            needs={"backbone.dilated": False},
        ),
    ),
    "mctformer_v2": (
        Layout(
            MCTformer,
            MCTFORMER,
            VIT | {"cls_token": "class_tokens", "head.": "semantic."},
            kept=UNSEEN,
            needs={"final_norm": False, "semantic.padding_mode": "zeros"},
            convert=_class_tokens,
        ),
    ),
    "mctformer_v1": (
        Layout(
            MCTformer,
            MCTFORMER.removesuffix(")") + ", version=1)",
            VIT | {"cls_token": "class_tokens"},
            ignored={"head.": "V1 runs no classifier behind its tokens"},
            kept=UNSEEN,
            needs={"final_norm": False, "semantic": None},
            convert=_class_tokens,
        ),
    ),
    "locloc": (
        Layout(
            LocLoc,
            "create_method('locloc', create_backbone('deit_small', pretrained=True), 200, part='generator')",
            {f"att_layer4.{name}.*.UConv.": f"generator.{name}." for name in UNET}
            | {f"up{number}.": f"generator.enlarge.{3 * number - 3}." for number in (1, 2, 3)}
            | {f"bn{number}.": f"generator.enlarge.{3 * number - 2}." for number in (1, 2, 3)}
            | {"att_conv2.": "generator.to_map.0.", "bn_att2.": "generator.to_map.1."},
            fills="generator.",
            needs={"generator.config.third_level": False},
        ),
        Layout(
            LocLoc,
            "create_method('locloc', create_backbone('deit_small', pretrained=True), 1000, part='classifier')",
            {
                "blocks_mini.": "classifier.blocks.",
                "norm_mini.": "classifier.norm.",
                "conv.": "classifier.classifier.0.",
                "classifier.0.": "classifier.classifier.2.",
                "classifier.1.": "classifier.classifier.3.",
            },
            fills="classifier.",
            needs={"config.enhance_test": False},
        ),
    ),
    "ppd": (
        Layout(
            PPD,
            "create_method('ppd', create_backbone('dino_small', pretrained=True, image_size=256), 200)",
            {
                "conv0.": "decoder.layers.0.",
                "bn0.": "decoder.layers.1.",
                "deconv_layers.": "decoder.layers.4.",
                "final_layer.": "decoder.layers.5.",
            },
            fills="decoder.",
        ),
        Layout(
            PPD,
            "PPD(create_backbone('dino_small', pretrained=True, image_size=256), 200, "
            "probe=LinearProbe(384, 200, pool=False))",
            {"linear.": "probe.linear."},
            fills="probe.",
            needs={"probe.blocks": 4, "probe.pool": False},
        ),
    ),
    "conformer": (
        Layout(
            ConformerBackbone,
            "create_backbone('conformer_small')",
            _under("", "vit.", CONFORMER),
            CONVOLUTIONAL | {"trans_cls_head.": "the classifier of ImageNet, which a backbone has not"},
        ),
    ),
}
"""The kinds of files of each source."""

BESIDE = {
    **dict.fromkeys(("optimizer", "scheduler", "lr_scheduler", "scaler", "amp"), "a state of the training"),
    **dict.fromkeys(("ema", "model_ema", "state_dict_ema"), "a running mean of the network, which itself is taken"),
    "best_state_dict": "a second copy of the network",
}
"""What may stand in a file beside the network, by the first part of its name, and why it is left out."""


def load_published(model: nn.Module, path: str | Path, source: str) -> Report:
    """Load a published checkpoint into a model, and return what was filled by what; no code of the file is run.

    Loading is strict: every tensor of the file is used, or ignored for a reason, and every tensor of the model is
    filled, or kept for a reason. Wrappers (`state_dict`, `model`, `net`) and prefixes (`module.`, `model.`,
    `_orig_mod.`) are opened. For LocLoc and PPD the part that the file holds is filled; the weights of the backbone are
    a file of their own, for `create_backbone`. If anything is wrong, the model is left as it was.

    source: whose program wrote the file, one of `SOURCES`. path: a `.pth`, `.pt`, `.tar` or `.safetensors` file.
    Raises ParameterError for an unknown source, or a model whose results would not be the published ones; WeightsError
    for a file that cannot be read, or whose tensors do not fit, with the name and the shapes of the first.
    """
    report, tensors, built = _compare(model, path, source)
    if report.mismatched:
        (name, told), more = next(iter(report.mismatched.items())), len(report.mismatched) - 1
        raise WeightsError(
            f"{path} does not fit {type(model).__name__} as a file of {source!r}: {name!r} {told}"
            + (f"; {more} more do not fit" if more else ""),
            f"build the model for the file's backbone, image size and number of classes, as {built}"
            + _hint(report.others),
        )
    model.load_state_dict(tensors, strict=False)
    return report


def check_published(model: nn.Module, path: str | Path, source: str) -> Report:
    """Return how a published checkpoint and a model go together, `mismatched` included; the model is left as it is.

    Arguments and errors as of `load_published`, but for tensors that do not fit.
    """
    return _compare(model, path, source)[0]


def _compare(model: nn.Module, path: str | Path, source: str) -> tuple[Report, dict[str, Tensor], str]:
    """Return the report, the file's tensors by names of the model, and how to build the file's model."""
    check_choice("unknown source", source, SOURCES)
    state = read_tensors(path)
    known, layout = max(((_known(state, layout), layout) for layout in SOURCES[source]), key=lambda pair: len(pair[0]))
    if not known:
        problem = f"no tensor of {path} has a name of {source!r}; its first is {next(iter(state))!r}"
        raise WeightsError(problem, "give the source that the file is from" + _hint(_others(state, source)))
    _check_model(model, source, layout)

    report, found, prefix = Report(source), {}, prefix_of(state, known)
    for whole, value in state.items():
        name = whole.removeprefix(prefix)
        if not whole.startswith(prefix) or not _knows(layout, name):
            beside = BESIDE.get(whole.partition(".")[0])
            told = f"of shape {tuple(value.shape)} is not among the names of this source"
            (report.ignored if beside else report.mismatched)[whole] = beside or told
        elif reason := _told(name, layout.ignored):
            report.ignored[whole] = reason
        elif first := _renamed(name, layout.copies):
            original = state.get(prefix + first)
            same = original is not None and torch.equal(original.to(value.dtype), value)
            told = "a second name of the same tensor" if same else f"should be a copy of {first!r}, and is not"
            (report.ignored if same else report.mismatched)[whole] = told
        else:
            here = report.matched[whole] = _renamed(name, layout.names)
            found[here] = value
    if layout.convert:
        layout.convert(found)
    _place(report, found, model.state_dict(), layout)
    return replace(report, others=_others(state, source)) if report.mismatched else report, found, layout.built


def _place(report: Report, found: dict[str, Tensor], own: dict[str, Tensor], layout: Layout) -> None:
    """Complete the report by what becomes of each tensor of the model, `own`; `found` are the file's by its names."""
    for whole, here in list(report.matched.items()):
        value, wanted = found[here], own.get(here)
        if wanted is not None and set(value.shape[wanted.ndim :]) == {1}:  # a 1x1 convolution, a number
            value = found[here] = value.reshape(value.shape[: wanted.ndim])
        if wanted is None:
            report.mismatched[whole] = f"of shape {tuple(value.shape)} is {here!r} here, which the model has not"
        elif value.shape != wanted.shape:
            told = f"has shape {tuple(value.shape)}, the model's {here!r} has {tuple(wanted.shape)}"
            report.mismatched[whole] = told
    for here in (name for name in own if name not in found):
        if not here.startswith(layout.fills):
            report.kept[here] = f"the file holds the {layout.fills.strip('.')} alone"
        elif reason := _told(here, layout.kept):
            report.kept[here] = reason
        elif here.endswith("num_batches_tracked"):
            report.kept[here] = "files older than PyTorch 0.4.1 do not count batches"
        else:
            report.mismatched[here] = f"of the model, of shape {tuple(own[here].shape)}, is not in the file"
    for name in report.mismatched:
        report.matched.pop(name, None)


def _check_model(model: nn.Module, source: str, layout: Layout) -> None:
    """Raise ParameterError for a model of another class, or one that would compute something else than published."""
    if not isinstance(model, layout.model):
        problem = f"this file of {source!r} is loaded into {layout.model.__name__}, got {type(model).__name__}"
        raise ParameterError(problem, f"build the model as {layout.built}")
    for name, wanted in {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, **layout.needs}.items():
        try:
            found = attrgetter(name)(model)
        except AttributeError:
            found = None
        if found != wanted:
            problem = f"the published network of {source!r} has {name} = {wanted!r}, this model has {found!r}"
            raise ParameterError(problem, f"build the model as {layout.built}")


def _known(state: Mapping[str, Tensor], layout: Layout) -> set[str]:
    """Return the ends of the file's names, cut at dots, that the layout knows."""
    ends = {name[cut:] for name in state for cut in (0, *(dot.end() for dot in re.finditer(r"\.", name)))}
    return {end for end in ends if _knows(layout, end)}


def _knows(layout: Layout, name: str) -> bool:
    return any(_row(name, table) for table in (layout.names, layout.ignored, layout.copies))


def _others(state: Mapping[str, Tensor], source: str) -> tuple[str, ...]:
    """Return the other sources whose names are those of the file, all of them and no more."""
    found = []
    for other, layouts in SOURCES.items():
        for layout in layouts:
            prefix = prefix_of(state, _known(state, layout))
            names = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
            used = {row[0] for name in names if (row := _row(name, layout.names))}
            if other != source and used == set(layout.names) and all(_knows(layout, name) for name in names):
                found.append(other)
    return tuple(found)


def _hint(others: Sequence[str]) -> str:
    return f"; its names are those of source {' or '.join(map(repr, others))}" if others else ""


@lru_cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\*", "([^.]+)") + ("(.+)" if name.endswith(".") else ""))


def _row(name: str, table: Mapping[str, str]) -> tuple[str, tuple[str, ...]] | None:
    """Return the row's key that a name fits, and what its wildcards stand for."""
    for key in table:
        if match := _pattern(key).fullmatch(name):
            return key, match.groups()
    return None


def _told(name: str, table: Mapping[str, str]) -> str | None:
    """Return the reason that a table gives for a name; None where it has no row."""
    row = _row(name, table)
    return row and table[row[0]]


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    """Return the other name that a table gives; None where it has no row."""
    if not (row := _row(name, table)):
        return None
    key, parts = row
    other, rest = table[key], list(parts)
    while "*" in other:
        other = other.replace("*", rest.pop(0), 1)
    return other + (rest[-1] if key.endswith(".") else "")
