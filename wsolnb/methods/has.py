"""Hide-and-Seek (Kumar Singh & Lee, ICCV 2017, https://arxiv.org/abs/1704.04232): training images with holes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wsolnb.backbones import ConvBackbone
from wsolnb.errors import ParameterError
from wsolnb.methods import register
from wsolnb.methods.cam import CAMClassifier


def hide(images: Tensor, grid: int, probability: float) -> Tensor:
    """Return (B, C, H, W) images in which each of the grid * grid cells is hidden (zero) independently.

    probability: that a cell is hidden. Cell (i, j) holds the pixels with floor(y grid / H) = i and floor(x grid / W) =
    j.
    """
    batch, _, height, width = images.shape
    if grid > min(height, width):
        raise ParameterError(f"a grid of {grid} cells on {height} x {width} pixels", "use fewer cells")
    # Drawn on the CPU, whose generator the training loop stores: a resumed training hides the same cells.
    hidden = torch.rand(batch, 1, grid, grid) < probability
    rows, columns = torch.arange(height) * grid // height, torch.arange(width) * grid // width
    return images.masked_fill(hidden[:, :, rows[:, None], columns].to(images.device), 0.0)


@register("has")
class HideAndSeek(CAMClassifier):
    """CAM of a classifier that was trained on images with hidden cells (https://arxiv.org/abs/1704.04232).

    A network that misses the most discriminative part must seek the others. With v the mean colour of the data, which
    is zero after normalisation,

        x'(u) = v if the cell of pixel u is hidden, else x(u);  P(hidden) = p, in training only.

    grid: cells per side; 4 is the paper's cell of 56 pixels in 224. probability: p, in the paper 0.5.

        model = create_method("has", create_backbone("resnet50"), 200, grid=4, probability=0.5)
        model.loss(model, {"image": images, "label": labels}).backward()
    """

    def __init__(self, backbone: ConvBackbone, num_classes: int, grid: int = 4, probability: float = 0.5):
        super().__init__(backbone, num_classes)
        if not isinstance(grid, int) or grid < 1:
            raise ParameterError(f"grid={grid}", "give the number of cells per side, at least 1")
        if not 0 <= probability <= 1:
            raise ParameterError(f"probability={probability}", "choose within [0, 1]")
        self.grid, self.probability = grid, probability

    def loss(self, forward: Callable[[Tensor], Any], batch: dict[str, Any], label_smoothing: float = 0.0) -> Tensor:
        """Return the classification loss of images with hidden cells, or of whole images in evaluation mode."""
        if self.training:
            batch = batch | {"image": hide(batch["image"], self.grid, self.probability)}
        return super().loss(forward, batch, label_smoothing)
