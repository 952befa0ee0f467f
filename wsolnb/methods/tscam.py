"""TS-CAM (Gao et al., ICCV 2021): the class token's attention times a semantic map over the patch tokens."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn

from wsolnb.backbones import TransformerBackbone
from wsolnb.errors import ParameterError
from wsolnb.methods import register
from wsolnb.methods.base import LocalizationModel, pick


class TSCAMOutput(NamedTuple):
    """What one forward pass holds.

    logits: (B, C), the semantic map averaged over the patches.
    semantic_map: (B, C, h, w), one map per class (S in the papers).
    attention: (B, L, heads, h * w), the class token's rows.
    """

    logits: Tensor
    semantic_map: Tensor
    attention: Tensor


@register("tscam")
class TSCAM(LocalizationModel):
    """A transformer whose patch tokens are classified by a 3x3 convolution and global average pooling.

    padding: how the convolution sees beyond the patch grid. `zeros` is the published head; it shows the classifier
        where the border is, which from scratch becomes a frame in the semantic map. `replicate` does not.
    head_init: the convolution's first weights, random (`kaiming`, as published) or `zeros`. The loss sees only the
        semantic map's mean, so a pattern that random weights draw into the map can stay there.
    """

    maps = ("tscam", "semantic", "attention")

    def __init__(
        self,
        backbone: TransformerBackbone,
        num_classes: int,
        padding: Literal["zeros", "replicate"] = "zeros",
        head_init: Literal["kaiming", "zeros"] = "kaiming",
    ):
        super().__init__()
        if not isinstance(backbone, TransformerBackbone):
            raise ParameterError(
                "TS-CAM and SCM need a transformer with a class token, whose attention to the patches is their map; "
                f"got {type(backbone).__name__}",
                "use vit_mini, deit_small or conformer_small; a ResNet has no such token, and neither has Swin (SCM's "
                "Discussion)",
            )
        self.backbone = backbone
        self.semantic = nn.Conv2d(backbone.dim, num_classes, kernel_size=3, padding=1, padding_mode=padding)
        if head_init == "zeros":
            nn.init.zeros_(self.semantic.weight)
        else:
            nn.init.kaiming_normal_(self.semantic.weight, nonlinearity="relu")
        nn.init.zeros_(self.semantic.bias)

    @property
    def head(self) -> nn.Module:
        """The convolution that makes the semantic map."""
        return self.semantic

    def forward(self, images: Tensor) -> TSCAMOutput:
        """Classify (B, 3, H, W) normalised images."""
        tokens = self.backbone(images)
        grid = tokens.patches.transpose(1, 2).unflatten(2, self.backbone.grid)
        semantic_map = self.semantic(grid)
        return TSCAMOutput(semantic_map.mean(dim=(2, 3)), semantic_map, tokens.attention)

    def localize(self, output: TSCAMOutput, classes: Tensor) -> dict[str, Tensor]:
        """Attention map, semantic map of one class per image, and their product; each (B, h, w).

        attention: mean over layers and heads. semantic: may be negative. Eq. 9 of TS-CAM couples the two as they are.
        """
        rows, columns = self.backbone.grid
        attention = output.attention.float().mean(dim=(1, 2)).unflatten(1, (rows, columns))
        semantic = pick(output.semantic_map, classes).float()
        return {"tscam": attention * semantic, "semantic": semantic, "attention": attention}
