"""Feature extractors: vision transformers with the class token's attention, Conformers, and convolutional networks.

    backbone = create_backbone("vit_mini", pretrained=True)                   # a short name, `BACKBONES`
    backbone = create_backbone("vit_small_patch14_dinov2", image_size=224)    # any classifier of timm that fits

Every backbone has `dim`, `mean` and `std`. A transformer also has `grid`, `patch_size` and `prefix_tokens`, and a
convolutional network has `stride`.
"""

from wsolnb.backbones.base import Backbone
from wsolnb.backbones.checkpoints import positioned_prefix
from wsolnb.backbones.cnn import ConvBackbone
from wsolnb.backbones.conformer import ConformerBackbone
from wsolnb.backbones.registry import (
    BACKBONES,
    MIXING,
    SHARED,
    TRANSFORMERS,
    create_backbone,
    linear_classifier,
    load_classifier,
    normalisation,
    published_classifier,
)
from wsolnb.backbones.vit import (
    BoundedNorm,
    Mixing,
    Tokens,
    TransformerBackbone,
    embed,
    forward_tapped,
    plain_block,
    run_block,
    run_blocks,
)
