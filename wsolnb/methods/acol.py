"""Adversarial complementary learning, ACoL (Zhang et al., CVPR 2018, https://arxiv.org/abs/1804.06962)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from wsolnb.backbones import ConvBackbone
from wsolnb.errors import ParameterError
from wsolnb.maps import normalise
from wsolnb.methods import register
from wsolnb.methods.base import LocalizationModel, classification_loss, pick


class ACoLOutput(NamedTuple):
    """logits: (B, C) of the first branch. features: (B, K, h, w). class_maps: (B, C, h, w) of the first branch."""

    logits: Tensor
    features: Tensor
    class_maps: Tensor


def erase(output: ACoLOutput, labels: Tensor, delta: float) -> Tensor:
    """Return the features (B, K, h, w), zero where the first branch's map of a label, scaled to [0, 1], reaches delta.

    labels: (B,), or multi-hot (B, C): then the union over the present classes is erased.
    """
    present = (labels if labels.ndim == 2 else nn.functional.one_hot(labels, output.logits.shape[1])) > 0
    found = normalise(output.class_maps.detach().flatten(0, 1)).view(output.class_maps.shape) >= delta
    return output.features.masked_fill((found & present[:, :, None, None]).any(dim=1, keepdim=True), 0.0)


@register("acol")
class ACoL(LocalizationModel):
    """Two branches: the second sees the features F without the region that the first found
    (https://arxiv.org/abs/1804.06962).

    With the first branch's map A of the class, scaled to [0, 1] as ~A, and the second's map B of the erased features:

        F' = F [~A < delta],  loss = L(mean A) + L(mean B),  map = max(~A, ~B),  logits = mean A

    delta: 0.6 in the paper, which tried 0.5 to 0.9. hidden: channels of a branch's two 3x3 convolutions; 1024 in the
    authors' code, whose evaluation also reads the first branch's logits. At test the region of the requested class is
    erased.

        model = create_method("acol", create_backbone("resnet50"), 200, delta=0.6)
        maps = model.localize(model(images), labels)["acol"]
    """

    maps = ("acol", "first", "second")

    def __init__(self, backbone: ConvBackbone, num_classes: int, delta: float = 0.6, hidden: int = 1024):
        super().__init__()
        if not 0 < delta <= 1 or hidden < 1:
            raise ParameterError(f"delta={delta}, hidden={hidden}", "choose delta within (0, 1], hidden from 1")
        self.backbone, self.delta, self.head_layers = backbone, delta, nn.ModuleList()
        for _ in range(2):
            wide = (nn.Conv2d(backbone.dim, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, hidden, 3, padding=1))
            self.head_layers.append(nn.Sequential(*wide, nn.ReLU(), nn.Conv2d(hidden, num_classes, 1)))

    head = property(lambda self: self.head_layers, doc="Both branches.")

    def forward(self, images: Tensor) -> ACoLOutput:
        """Classify (B, 3, H, W) normalised images by the first branch."""
        features = self.backbone(images)
        class_maps = self.head[0](features)
        return ACoLOutput(class_maps.mean(dim=(2, 3)), features, class_maps)

    def loss(self, forward: Callable[[Tensor], Any], batch: dict[str, Any], label_smoothing: float = 0.0) -> Tensor:
        """Return the sum of both branches' losses of classification."""
        output, labels = forward(batch["image"]), batch["label"]
        second = self.head[1](erase(output, labels, self.delta)).mean(dim=(2, 3))
        first = classification_loss(output.logits.float(), labels, label_smoothing)
        return first + classification_loss(second.float(), labels, label_smoothing)

    def localize(self, output: ACoLOutput, classes: Tensor) -> dict[str, Tensor]:
        """Fused map in [0, 1] of one class per image, and both branches' own, unbounded; each (B, h, w)."""
        first = pick(output.class_maps, classes).detach().float()
        second = pick(self.head[1](erase(output, classes, self.delta)), classes).detach().float()
        return {"acol": normalise(first).maximum(normalise(second)), "first": first, "second": second}
