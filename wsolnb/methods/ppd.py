"""Proxy probing decoder (Xu et al., ACM MM 2022): frozen tokens, decoded to their attention, probed for the class.

PPD is the baseline of LocLoc. As in the listing of LocLoc's supplement (B.3), class and map come from separate passes
of the frozen transformer, over images that are loaded separately.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from wsolnb.backbones import TransformerBackbone
from wsolnb.data.base import LocalizationDataset
from wsolnb.data.loading import make_loader
from wsolnb.data.transforms import Transform
from wsolnb.errors import ParameterError
from wsolnb.files import write_atomically
from wsolnb.maps import normalise
from wsolnb.methods import register
from wsolnb.methods.frozen import FrozenBackbone, OnFrozen, deconvolutions, half_squared_error


class ProxyProbingDecoder(nn.Module):
    """Feature map (B, D, h, w) -> map (B, 4h, 4w), unbounded: 3x3 convolution, pooling by 2, three times up by 2.

    dim: channels D of the tokens. hidden: of the first convolution. channels: of the transposed convolutions.
    The pooling halves h and w, rounded up, so the map of 14 x 14 tokens is 56 x 56.
    """

    def __init__(self, dim: int, hidden: int = 2048, channels: int = 256):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(dim, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
            deconvolutions(hidden, channels, 3),
            nn.Conv2d(channels, 1, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return the map of each image."""
        return self.layers(features)[:, 0]


class LinearProbe(nn.Module):
    """Linear classifier of the class tokens of the last blocks and, with `pool`, of the last one's mean patch token.

    dim: channels D of the tokens. PPD sets `prefix_tokens`, how many come before the patches, to those of the backbone.
    """

    def __init__(self, dim: int, num_classes: int, blocks: int = 4, pool: bool = True):
        super().__init__()
        self.blocks, self.pool, self.prefix_tokens = blocks, pool, 1
        self.linear = nn.Linear(dim * (blocks + pool), num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def features(self, last: list[Tensor]) -> Tensor:
        """Return what is classified (B, F) of the normalised outputs (B, P + N, D) of the last blocks."""
        features = [tokens[:, 0] for tokens in last[-self.blocks :]]
        if self.pool:
            features.append(last[-1][:, self.prefix_tokens :].mean(dim=1))
        return torch.cat(features, dim=-1)

    def forward(self, last: list[Tensor]) -> Tensor:
        """Return logits (B, C) from the normalised outputs (B, P + N, D) of the last blocks, in their order."""
        return self.linear(self.features(last))


class PPDOutput(NamedTuple):
    """logits: (B, C), zeros without a probe. proxy: (B, h, w), the decoder's map; None without a decoder."""

    logits: Tensor
    proxy: Tensor | None


@register("ppd")
class PPD(OnFrozen):
    """Frozen transformer, decoder and probe. Decoder or probe may be missing, so that the other is trained alone.

    threshold: turns the attention that the decoder learns into 0 and 1 (>= threshold); None leaves it soft.
    """

    maps = ("proxy",)

    def __init__(
        self, backbone: TransformerBackbone, num_classes: int, decoder: ProxyProbingDecoder | None = None,
        probe: LinearProbe | None = None, threshold: float | None = None,
    ):  # fmt: skip
        super().__init__()
        if decoder is None and probe is None:
            raise ParameterError("a PPD of neither decoder nor probe", "give one of them, or both")
        self.frozen, self.num_classes = FrozenBackbone(backbone), num_classes
        self.decoder, self.probe, self.threshold = decoder, probe, threshold
        self.classifies = probe is not None
        if probe is not None:
            probe.prefix_tokens = backbone.prefix_tokens

    @classmethod
    def create(
        cls, backbone: TransformerBackbone, num_classes: int, part: Literal["decoder", "probe"] = "decoder",
        hidden: int = 2048, channels: int = 256, threshold: float | None = None,
    ) -> PPD:  # fmt: skip
        """Return a model with one part alone, to be trained.

        hidden, channels: of the `ProxyProbingDecoder`. threshold: of the attention that it learns.
        Raises ParameterError for an unknown part.
        """
        if part == "decoder":
            decoder = ProxyProbingDecoder(backbone.dim, hidden, channels)
            return cls(backbone, num_classes, decoder, threshold=threshold)
        if part != "probe":
            raise ParameterError(f"PPD has no part {part!r}", "use decoder or probe")
        return cls(backbone, num_classes, probe=LinearProbe(backbone.dim, num_classes))

    @property
    def head(self) -> nn.Module:
        """The probe, or without one the decoder."""
        return self.decoder if self.probe is None else self.probe

    def classify(self, images: Tensor) -> Tensor:
        """Return logits (B, C): one pass of the transformer, then the probe."""
        if self.probe is None:
            return images.new_zeros(len(images), self.num_classes)
        return self.probe(self._last(images))

    def describe(self, images: Tensor) -> Tensor:
        """Return what the probe classifies, (B, F)."""
        return self.probe.features(self._last(images))

    def _last(self, images: Tensor) -> list[Tensor]:
        return [self.frozen.normalise(tokens) for tokens in self.frozen(images, self.probe.blocks).last]

    def draw(self, images: Tensor) -> Tensor | None:
        """Return maps (B, h, w): another pass of the transformer, then the decoder."""
        if self.decoder is None:
            return None
        tokens = self.frozen.normalise(self.frozen(images).last[-1])
        return self.decoder(self.frozen.to_grid(tokens))

    def forward(self, images: Tensor, class_images: Tensor | None = None) -> PPDOutput:
        """Classify `class_images` (B, 3, H, W), by default the images, and draw the maps of `images` (B, 3, H, W)."""
        return PPDOutput(self.classify(images if class_images is None else class_images), self.draw(images))

    def localize(self, output: PPDOutput, classes: Tensor) -> dict[str, Tensor]:
        """The decoder's map, the same for every class. Without a decoder it is uniform and has no box."""
        empty = output.logits.new_zeros(len(classes), *self.frozen.grid)
        return {"proxy": empty if output.proxy is None else output.proxy.float()}

    def loss(self, forward: Callable[[Tensor], Any], batch: dict[str, Any], label_smoothing: float = 0.0) -> Tensor:
        """Return the loss of a batch: the probe's cross-entropy, or half the decoder's squared error to the attention.

        The target is the class token's attention of the same frozen transformer, last layer, mean over heads, min-max
        normalised, resized bilinearly to the decoder's grid, and thresholded if the model has a threshold.
        Raises ParameterError for a model of both parts, which are trained one by one.
        """
        if self.decoder is None:
            return super().loss(forward, batch, label_smoothing)
        if self.probe is not None:
            raise ParameterError("decoder and probe have losses of their own", "train each of them alone")
        drawn = forward(batch["image"]).proxy
        with torch.no_grad():
            # Not through `forward`: that may be a wrapper, which joins the gradients of several processes.
            backbone = self.frozen.backbone
            attention = backbone(batch["image"]).attention[:, -1].mean(dim=1)
            target = normalise(attention.unflatten(1, backbone.grid))
            target = F.interpolate(target[:, None], size=drawn.shape[1:], mode="bilinear", align_corners=False)[:, 0]
            if self.threshold is not None:
                target = (target >= self.threshold).float()
        return half_squared_error(drawn, target)


# The probe at the minimum of its loss

C_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Inverse strengths of the penalty among which validation images choose."""


def logistic(features: np.ndarray, labels: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (C, F) and biases (C,) of the multinomial logistic regression of features (n, F).

    Features are standardised for the fit; the scaling is folded into the weights. c: inverse strength of the penalty.
    Raises ParameterError where the solver did not reach the minimum.
    """
    scaler = StandardScaler().fit(features.astype(np.float64))
    solver = LogisticRegression(C=c, tol=1e-5, max_iter=10_000)
    found = solver.fit(scaler.transform(features.astype(np.float64)), labels)
    if found.n_iter_.max() >= solver.max_iter:
        raise ParameterError(f"logistic regression with C = {c:g} has not converged", "use a smaller C")
    weight, bias = found.coef_, found.intercept_
    if len(weight) == 1:  # two classes: scikit-learn keeps the second one's alone
        weight, bias = np.vstack([0 * weight, weight]), np.append(0 * bias, bias)
    weight = weight / scaler.scale_
    return weight, bias - weight @ scaler.mean_


def described(model: Any, dataset: LocalizationDataset, transform: Transform) -> tuple[np.ndarray, np.ndarray]:
    """Return what the model's probe reads of all images (n, F), and their labels (n,).

    Memory: F numbers an image, no maps; where that is too much the probe is trained by `sgd`.
    """
    device = next(model.parameters()).device
    loader = make_loader(dataset, transform, 50, mean=model.mean, std=model.std)
    with torch.inference_mode():
        found = [(model.describe(batch["image"].to(device)).cpu().numpy(), batch["label"].numpy()) for batch in loader]
    features, labels = (np.concatenate(part) for part in zip(*found, strict=True))
    return features, labels


def fit_probe(
    model: Any, train: LocalizationDataset, val: LocalizationDataset, transform: Transform
) -> tuple[dict[str, Tensor], pd.DataFrame]:
    """Return the state of a linear layer fitted by `logistic` to what `model.describe` reads, and top-1 by `C`.

    Each image is seen once, not augmented. `C` is the smallest of `C_GRID` with the best top-1 on `val`.
    Raises ParameterError for a class without a training image.
    """
    (features, labels), (held, truth) = (described(model, part, transform) for part in (train, val))
    if missing := set(range(len(train.class_names))) - set(labels.tolist()):
        raise ParameterError(f"the classes {sorted(missing)} have no training image", "use more images")
    rows, best = [], {}
    for c in C_GRID:
        weight, bias = logistic(features, labels, c)
        right = (held @ weight.T + bias).argmax(axis=1) == truth
        fitted = (features @ weight.T + bias).argmax(axis=1) == labels
        if all(right.mean() > row["validation top-1"] for row in rows):
            best = {"weight": torch.from_numpy(weight).float(), "bias": torch.from_numpy(bias).float()}
        rows.append({"C": c, "training top-1": fitted.mean(), "validation top-1": right.mean()})
    return best, pd.DataFrame(rows)


def probe_maker(
    backbone: TransformerBackbone, train: LocalizationDataset, val: LocalizationDataset, transform: Transform
) -> Callable[[Path], None]:
    """Return a function that fills a folder with a probe of the frozen transformer (`fit_probe`); see `read_probe`."""

    def make(folder: Path) -> None:
        model = PPD.create(backbone, len(train.class_names), "probe")
        best, rows = fit_probe(model, train, val, transform)
        content = save({name: value.contiguous() for name, value in best.items()})
        write_atomically(folder / "probe.safetensors", content)
        write_atomically(folder / "choice.csv", rows.to_csv(index=False))

    return make


def read_probe(backbone: TransformerBackbone, num_classes: int, folder: Path) -> PPD:
    """Return the model with the probe that `probe_maker` has left in a folder; `choice.csv` there has top-1 by C."""
    model = PPD.create(backbone, num_classes, "probe")
    model.probe.linear.load_state_dict(load_file(folder / "probe.safetensors"))
    return model.eval()
