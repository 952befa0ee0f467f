"""EDAM (Wu et al., CVPR 2021): class masks that are part of the classification, and attention across images.

One layer makes a mask of every class and of the background; each class is then judged from the features that its own
mask lets through, of two images at once. The masks are the localization: a better mask makes a better classification.

    model = create_method("edam", create_backbone("resnet50"), 20)
    maps = model.localize(model(images), classes)

The equations are those of the released program (github.com/allenwu97/EDAM), which trains on listed pairs of images with
a class in common; `partners` pairs those of a batch. Its background cue, saliency maps of a network that was trained
with masks, is no part of the model. No such network is here: `papers.lpcam.salient` has GrabCut's masks in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsolnb.backbones import ConvBackbone
from wsolnb.errors import ParameterError
from wsolnb.methods import register
from wsolnb.methods.base import LocalizationModel, pick


def partners(labels: Tensor) -> Tensor:
    """Return an order of (B, C) images in which neighbours 2i and 2i + 1 share a class, as far as one can be found.

    Each image in turn takes the first one left that shares a class; those without come last, as they were.
    """
    common = (labels.float() @ labels.float().T).cpu() > 0
    left, paired, alone = list(range(len(labels))), [], []
    while left:
        first = left.pop(0)
        other = next((k for k in left if common[first, k]), None)
        if other is None:
            alone.append(first)
        else:
            left.remove(other)
            paired += [first, other]
    return torch.tensor(paired + alone, dtype=torch.long, device=labels.device)


def positions(cells: int, dim: int) -> Tensor:
    """Return the code (cells, dim) of cells by number n: sin(n w_j), cos(n w_j) by turns, w_j = 10000^(-2j / dim)."""
    turn = torch.arange(cells)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    return torch.stack([turn.sin(), turn.cos()], dim=2).flatten(1)[:, :dim]


class EDAMOutput(NamedTuple):
    """logits: (B, C). features: (B, D, h, w). responses: (B, C + 1, h, w), unit vectors n, the background's last."""

    logits: Tensor
    features: Tensor
    responses: Tensor


@register("edam")
class EDAM(LocalizationModel):
    """Embedded discriminative attention, with x the feature map; for the paper see
    https://openaccess.thecvf.com/content/CVPR2021/html/Wu_Embedded_Discriminative_Attention_Mechanism_for_Weakly_Supervised_Semantic_Segmentation_CVPR_2021_paper.html

        n = (W * x) / |W * x| over the C + 1 channels,   M_k = |n_k|                             (the masks)
        s_k = U x M_k + position + image,   a_k = block_k(s_k of both images),   z_k = w_k . mean over cells of a_k

    W is a 3 x 3 convolution, block_k a transformer block of class k (collaborative multi-attention) over the cells of
    two images in training, and of one at test. Loss: binary cross-entropy of z. The masks are the map.

    hidden: width of U and of the blocks; None = 128 as released, or a quarter of the channels where that is less.
    heads: of the blocks. dropout: in them, and of s; not of attention weights.
    """

    maps = ("edam",)

    def __init__(
        self, backbone: ConvBackbone, num_classes: int, hidden: int | None = None, heads: int = 2, dropout: float = 0.1
    ):
        super().__init__()
        hidden = min(128, max(2 * heads, backbone.dim // 4)) if hidden is None else hidden
        if heads < 1 or hidden < 2 or hidden % heads:
            raise ParameterError(f"hidden={hidden} for {heads} heads", "give a multiple of heads, at least 2")
        self.backbone, self.num_classes = backbone, num_classes
        self.masks = nn.Conv2d(backbone.dim, num_classes + 1, 3, padding=1, bias=False)
        self.embed = nn.Conv2d(backbone.dim, hidden, 1, bias=False)
        self.image = nn.Embedding(2, hidden)
        options = {"dropout": dropout, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, **options) for _ in range(num_classes)
        )
        for block in self.blocks:
            block.self_attn.dropout = 0.0  # the fused attention of the CPU has none; released 0.1
        self.judges = nn.ModuleList(nn.Linear(hidden, 1, bias=False) for _ in range(num_classes))
        self.dropout = nn.Dropout(dropout)
        for parameter in self.head.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        # Which sign of n_k means class k: a mask is the same for both. Counted over training images of the class.
        self.register_buffer("polarity", torch.zeros(num_classes))

    @property
    def head(self) -> nn.Module:
        """All but the backbone."""
        return nn.ModuleList([self.masks, self.embed, self.image, self.blocks, self.judges])

    @property
    def weight(self) -> Tensor:
        """(C, D): W of the classes, summed over its positions, of the sign that its own images have."""
        summed = self.masks.weight.detach().float().sum(dim=(2, 3))[: self.num_classes]
        return torch.where(self.polarity[:, None] < 0, -summed, summed)

    def forward(self, images: Tensor) -> EDAMOutput:
        """Classify (B, 3, H, W) normalised images: in training images 2i and 2i + 1 together, else each alone."""
        features = self.backbone(images)
        responses = F.normalize(self.masks(features), dim=1)
        embedded, place = self.embed(features), positions(features[0, 0].numel(), self.embed.out_channels).to(features)
        count = len(images) - len(images) % 2 if self.training else 0
        groups = [(slice(0, count), 2), (slice(count, None), 1)]
        logits = [self._judge(embedded[i], responses[i].abs(), place, n) for i, n in groups if len(images[i])]
        return EDAMOutput(torch.cat(logits), features, responses)

    def _judge(self, embedded: Tensor, masks: Tensor, place: Tensor, size: int) -> Tensor:
        """Return logits (B, C) of images whose cells attend to each other in groups of `size` neighbours."""
        found = []
        code = place + self.image.weight[:size, None]  # (size, cells, hidden)
        for k, (block, judge) in enumerate(zip(self.blocks, self.judges, strict=True)):
            tokens = (embedded * masks[:, k : k + 1]).flatten(2).mT.unflatten(0, (-1, size))
            mixed = block(self.dropout(tokens + code).flatten(1, 2)).unflatten(1, (size, -1))
            found.append(judge(self.dropout(mixed).mean(dim=2)).flatten())
        return torch.stack(found, dim=1)

    def loss(self, forward: Callable[[Tensor], Any], batch: dict[str, Any], label_smoothing: float = 0.0) -> Tensor:
        """Return the multi-label loss of a batch whose images are paired by `partners`, in training.

        Labels are (B, C) of 0 and 1, or (B,) class indices.
        """
        images, labels = batch["image"], batch["label"]
        labels = labels if labels.ndim == 2 else F.one_hot(labels, self.num_classes)
        if self.training:
            order = partners(labels)
            images, labels = images[order], labels[order]
        output = forward(images)
        if self.training:
            own = output.responses.detach().float()[:, : self.num_classes] * labels[:, :, None, None]
            seen = (own * own.abs()).sum(dim=(0, 2, 3)) / labels.sum(dim=0).clamp(min=1)
            self.polarity.lerp_(seen.to(self.polarity), 0.1)
        return F.multilabel_soft_margin_loss(output.logits.float(), labels.float())

    def class_maps(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return M of every class, (B, C, h, w) in [0, 1]; no label is asked for."""
        return F.normalize(self.masks(self.backbone(images)).float(), dim=1).abs()[:, : self.num_classes]

    def localize(self, output: EDAMOutput, classes: Tensor) -> dict[str, Tensor]:
        """M of one class per image; (B, h, w) in [0, 1]."""
        return {"edam": pick(output.responses.detach().float().abs()[:, : self.num_classes], classes)}
