"""AMN (Lee, Kim, Shim, CVPR 2022): a network that learns seed masks pixel by pixel, told which classes are there.

CAM's activation is uneven: high on a head, low on a body, so that no one threshold fits all images. A classification of
pixels has two levels only. Its labels are confident seeds (`irn.write_irn_labels` of CAM's maps), image labels are all
that stands behind them, and it is given the image's labels at test, too, where seed masks are made.

    taught = WithMasks(dataset, Store(folder))                        # masks of 0, class + 1 and 255 (unknown)
    model = create_method("amn", create_backbone("resnet50"), 20)     # trained on them with its own loss
    maps = model.localize(model(images, labels), classes)

As the released program (github.com/gaviotas/AMN) has it: dilations, initialisation, dropout, smoothing, and labels of
the nearest pixel on the network's grid. It makes maps of training images, and min-max scales a class's probability
where the image's own seed label is not background. Here images have no seed labels, and the map is the probability.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsolnb.backbones import ConvBackbone
from wsolnb.data.sample import IGNORE
from wsolnb.data.transforms import resize_map
from wsolnb.errors import ParameterError
from wsolnb.methods import register
from wsolnb.methods.base import LocalizationModel, pick
from wsolnb.methods.deeplabv2 import aspp
from wsolnb.methods.features import ConvExtractor


def pixel_loss(scores: Tensor, labels: Tensor, smoothing: float = 0.4) -> Tensor:
    """Return the balanced per-pixel loss of scores z (B, 1 + C, h, w), channel 0 the background's.

        L = (mean over P_bg of H(u) + mean over P_fg of H(u)) / 2,   H(u) = - sum_k q_k(u) log softmax(z(u))_k,
        q_k(u) = 1 - e where k is the label of u, else e / C.

    labels: (B, h, w) of 0 (P_bg), class + 1 (P_fg) and 255, which is left out. smoothing: e.
    A side without a pixel counts as zero; the released program gives NaN then.
    """
    count = scores.shape[1]
    # PyTorch's smoothing s leaves 1 - s + s / count to the label.
    losses = F.cross_entropy(
        scores, labels, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing * count / (count - 1)
    )
    sides = (labels == 0, (labels != 0) & (labels != IGNORE))
    return sum((losses * side).sum() / side.sum().clamp(min=1) for side in sides) / 2


class AMNOutput(NamedTuple):
    """scores: (B, 1 + C, h, w), the background's first. features: (B, D, h, w), after the labels' factor.

    logits: (B, C) of zeros, since the labels are given and not found.
    """

    logits: Tensor
    features: Tensor
    scores: Tensor


@register("amn")
class AMN(LocalizationModel):
    """An activation manipulation network (https://arxiv.org/abs/2203.16045). With t the image's labels, 0 or 1,

        x'(u) = x(u) * (V t + b),   z = sum over dilations r of conv_r(x'),   M_c = softmax(z)_c of the 1 + C channels.

    The factor V t + b (label conditioning) is the same at all places; it lets absent classes fall in the softmax.

    smoothing: e of `pixel_loss`. dilations: of the 3 x 3 convolutions, in cells. dropout: of x', in training.
    """

    maps = ("amn",)
    classifies = False
    learns_from_masks = True

    def __init__(
        self, backbone: ConvBackbone, num_classes: int, smoothing: float = 0.4,
        dilations: Sequence[int] = (6, 12, 18, 24), dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        if not 0 <= smoothing < 0.5:
            raise ParameterError(f"smoothing={smoothing}", "choose within [0, 0.5), or no label is the likeliest")
        self.backbone, self.smoothing, self.num_classes = backbone, smoothing, num_classes
        self.condition = nn.Linear(num_classes, backbone.dim)
        self.dropout = nn.Dropout(dropout)
        self.aspp = aspp(backbone.dim, 1 + num_classes, dilations)

    @property
    def head(self) -> nn.Module:
        """The labels' factor and the ASPP."""
        return nn.ModuleList([self.condition, self.aspp])

    def forward(self, images: Tensor, labels: Tensor | None = None) -> AMNOutput:
        """Score the cells of normalised images (B, 3, H, W).

        labels: (B, C) of 0 and 1, or (B,) class indices; None: every class may be there.
        Raises ParameterError for labels of another shape.
        """
        features = self.condition_on(self.backbone(images), labels)
        scores = torch.stack([branch(self.dropout(features)) for branch in self.aspp]).sum(dim=0)
        return AMNOutput(scores.new_zeros(len(images), self.num_classes), features, scores)

    def condition_on(self, features: Tensor, labels: Tensor | None) -> Tensor:
        """Return features (B, D, h, w) times the factor of their images' labels (as of `forward`)."""
        if labels is None:
            labels = features.new_ones(len(features), self.num_classes)
        if labels.ndim == 1:
            labels = F.one_hot(labels, self.num_classes)
        if labels.shape != (len(features), self.num_classes):
            problem = f"labels {tuple(labels.shape)} for {len(features)} images and {self.num_classes} classes"
            raise ParameterError(problem, "give (B, C) of 0 and 1")
        return features * self.condition(labels.to(features))[:, :, None, None]

    def loss(self, forward: Callable[..., Any], batch: dict[str, Any], label_smoothing: float = 0.0) -> Tensor:
        """Return `pixel_loss` against the seed masks in `batch["samples"]`, at the nearest pixel of each cell."""
        scores = forward(batch["image"], batch["label"]).scores.float()
        masks = np.stack([resize_map(sample.mask, scores.shape[2:]) for sample in batch["samples"]])
        return pixel_loss(scores, torch.from_numpy(masks).to(scores.device).long(), self.smoothing)

    def class_maps(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return M of every class, (B, C, h, w) in [0, 1]; arguments as of `forward`."""
        return self(images, labels).scores.float().softmax(dim=1)[:, 1:]

    def localize(self, output: AMNOutput, classes: Tensor) -> dict[str, Tensor]:
        """M of one class per image; (B, h, w) in [0, 1]."""
        return {"amn": pick(output.scores.float().softmax(dim=1)[:, 1:], classes)}


class ConditionedFeatures(ConvExtractor):
    """AMN as an `Extractor`: x' of images and their labels, and what a field of equal x' scores above the background.

    weight: (C, D), the kernels summed over positions and dilations, less those of the background. Softmax over classes
    is the same with and without the latter; CAM is then positive where a class beats the background. No bias.
    """

    takes_labels = True

    def __init__(self, model: AMN):
        kernels = sum(branch.weight.detach().float().sum(dim=(2, 3)) for branch in model.aspp)
        super().__init__(model, kernels[1:] - kernels[:1])

    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return x' (B, D, h, w)."""
        return self.model.condition_on(self.model.backbone(images), labels)
