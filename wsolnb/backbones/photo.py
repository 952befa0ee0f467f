"""`vit_photo`, a transformer for photographs whose patches are cells of an ImageNet network's feature map.

Such hybrids are described by Dosovitskiy et al. (2021, section 3.1, https://arxiv.org/abs/2010.11929).
EfficientNet-Lite0, which was trained on the image labels of ImageNet, tells what edges, fur and wheels look like. The
transformer learns by itself what belongs together and where to look.
"""

from __future__ import annotations

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from wsolnb.backbones.vit import TransformerBackbone, check_size
from wsolnb.backbones.wheels import load_installed
from wsolnb.errors import ParameterError

NETWORK = "efficientnet_lite0"
STAGES, CHANNELS, STRIDE = 5, 112, 16
"""How many of the network's seven stages make the patches, and their channels and stride."""


class PhotoStem(nn.Module):
    """Patch embedding by the first stages of EfficientNet-Lite0 and a linear layer on each cell of their map.

    The stages stay as they are: no gradient, and evaluation mode, also where the transformer behind them is trained.
    Plugs into timm's VisionTransformer in place of the linear patch embedding.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_ignored):
        super().__init__()
        if (patch_size, in_chans) != (STRIDE, 3):
            problem = f"PhotoStem was given patches of {patch_size} and {in_chans} channels"
            raise ParameterError(problem, f"use patches of {STRIDE} and 3 channels")
        check_size("PhotoStem", img_size, STRIDE)
        self.img_size, self.num_patches = img_size, (img_size // STRIDE) ** 2
        self.stages = first_stages(timm.create_model("tf_efficientnet_lite0")).requires_grad_(False).eval()
        self.proj = nn.Conv2d(CHANNELS, embed_dim, 1)
        nn.init.normal_(self.proj.weight, std=0.02)  # the stages' map has a deviation of 4: a token gets one of about 1

    def train(self, mode: bool = True) -> PhotoStem:
        """Leave the stages in evaluation mode."""
        super().train(mode)
        self.stages.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """Return the stages' map (B, 112, H / 16, W / 16) of (B, 3, H, W) images."""
        with torch.no_grad():
            return self.stages(images.contiguous(memory_format=torch.channels_last))

    def forward(self, images: Tensor) -> Tensor:
        """Embed the patches of (B, 3, H, W) images, or of their `features`; (B, N, D)."""
        maps = self.features(images) if images.shape[1] == 3 else images
        return self.proj(maps).flatten(2).transpose(1, 2)


def first_stages(network: nn.Module) -> nn.Sequential:
    """Return the stages of timm's EfficientNet-Lite0 that make the patches."""
    return nn.Sequential(network.conv_stem, network.bn1, *network.blocks[:STAGES])


def load_stages(stem: PhotoStem) -> None:
    """Load the published weights of the stages from the installed package; raises WeightsError as `load_installed`."""
    network = timm.create_model("tf_efficientnet_lite0")
    load_installed(NETWORK, network)
    stem.stages.load_state_dict(first_stages(network).state_dict())


def vit_photo(name: str, image_size: int | None = None, drop_path: float = 0.0) -> TransformerBackbone:
    """Return `vit_photo`: four layers of width 192 on 10 x 10 patches of a photograph of side 160, the default."""
    size = 160 if image_size is None else image_size
    check_size(name, size, STRIDE)
    model = VisionTransformer(
        img_size=size, patch_size=STRIDE, embed_dim=192, depth=4, num_heads=3, num_classes=0, global_pool="token",
        embed_layer=PhotoStem, drop_path_rate=drop_path,
    )  # fmt: skip
    model.pretrained_cfg = timm.get_pretrained_cfg("tf_efficientnet_lite0.in1k").to_dict()  # its mean and std
    return TransformerBackbone(model, name, size, STRIDE)
