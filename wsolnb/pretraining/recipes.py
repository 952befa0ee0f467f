"""The embedded backbones' pretraining: a supervised recipe and a self-distilled one, on procedural scenes.

The supervised recipe plays the role of DeiT's and sees labels. The self-distilled recipe plays the role of DINO's
(Caron et al., ICCV 2021): a student learns to predict from one view what a slowly moving average of itself says of
another view. It sees neither labels nor masks. Both read the scenes of `wsolnb.pretraining.scenes`, which share no
class and no part with the rendered benchmark, and whose colours are drawn at a distance from its own.

    backbone, folder = pretrain(run, "vit_mini", RECIPES["vit_mini"])
    export(backbone, "vit_mini", RECIPES["vit_mini"], "wsolnb/weights", minutes=25)
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from wsolnb import backbones
from wsolnb.backbones import Mixing, Tokens, TransformerBackbone, create_backbone, forward_tapped, positioned_prefix
from wsolnb.data import LocalizationDataset, open_dataset
from wsolnb.data.loading import to_tensor
from wsolnb.data.transforms import resize
from wsolnb.errors import ParameterError, nearest
from wsolnb.files import resolve, write_atomically
from wsolnb.methods.base import Trainable
from wsolnb.notebook.runs import Run, cpu_model, device_name, now
from wsolnb.pretraining import scenes as creature_scenes
from wsolnb.pretraining.scenes import PARTS, TEXTURES, CreatureConfig
from wsolnb.train import loop
from wsolnb.train.loop import TrainingConfig, set_seed


class SceneLoader:
    """Batches of scenes, every other one mirrored at random; an epoch depends on (seed, epoch) only.

    Yields `image` (B, frames, 3, H, W) normalised. With `truth` of one frame only, another one in each epoch, and next
    to it `owner` and `parts` (B, H, W), `textures` (B, creatures) and `colours` (B, creatures, 4, 3). Photographs
    (`read_photographs`) have one frame, and next to it `label` (B,).
    """

    def __init__(self, scenes: dict[str, np.ndarray], batch_size: int, seed: int, truth: bool):
        self.scenes, self.batch_size, self.seed, self.truth, self.epoch = scenes, batch_size, seed, truth, 0

    def __len__(self) -> int:
        return len(self.scenes["image"]) // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.scenes["image"]))
        frame = self.epoch % self.scenes["image"].shape[1]
        shown = slice(frame, frame + 1) if self.truth else slice(None)
        for step in range(len(self)):
            chosen = np.sort(order[step * self.batch_size : (step + 1) * self.batch_size])
            step_x = -1 if rng.random() < 0.5 else 1
            batch = {"image": to_tensor(self.scenes["image"][chosen, shown][..., ::step_x, :])}
            for name in [name for name in self.scenes if self.truth and name != "image"]:
                values = self.scenes[name][chosen, frame]
                values = values[..., ::step_x] if name in ("owner", "parts") else values
                batch[name] = torch.from_numpy(np.ascontiguousarray(values))
            yield batch


def read_photographs(dataset: LocalizationDataset, size: int) -> dict[str, np.ndarray]:
    """Read a data set's images and labels into memory as `SceneLoader` takes them: scenes of one frame.

    size: side in pixels to which the images are resized. Raises DataError for missing or damaged files, ParameterError
    for a multi-label data set.
    """
    if dataset.multi_label:
        raise ParameterError(f"{dataset.name} has several labels an image", "use a data set with one")
    images = np.empty((len(dataset), 1, size, size, 3), np.uint8)
    for index in range(len(dataset)):
        images[index, 0] = resize(dataset.read(index, truth=False), (size, size)).image
    return {"image": images, "label": np.array(dataset.labels, np.int64)}


PALETTE = np.array(
    [[light, 45 * math.cos(turn), 45 * math.sin(turn)] for light in (38, 72) for turn in np.arange(6) * math.pi / 3]
    + [[light, 0.0, 0.0] for light in (15, 55, 90)],
    np.float32,
)
"""Fifteen colours (CIE Lab) to whose nearest a creature's colours are rounded where they are labels."""


def _palette_distance(lab: Tensor) -> Tensor:
    """Squared distances (..., 15) of (..., 3) Lab values to the colours of `PALETTE`; NaN where they are."""
    return (lab[..., None, :] - torch.from_numpy(PALETTE).to(lab.device)).square().sum(dim=-1)


def token_targets(batch: dict[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
    """Reduce the pixels' truth to the tokens of a `grid`.

    Returns shares of a token's pixels, `textures` (B, N, 1 + T; index 0 = background) and `parts` (B, N, P); of its
    most frequent creature, `worn` (B, N, 15), how near the palette's colours are to one that it wears anywhere, and
    `sash` (B, N, 2, 15), how near they are to its wide and to its narrow band's, zero = none; and `object` (B, N), the
    creatures' share. Nearness is a Gaussian of 15 (CIE Lab), of sum one: a colour between two of the palette's is told
    from both, also one never seen.
    """
    size = batch["owner"].shape[1] // grid[0], batch["owner"].shape[2] // grid[1]

    def shares(name: str, classes: int) -> Tensor:
        onehot = F.one_hot(batch[name].long(), classes).permute(0, 3, 1, 2).float()
        return F.avg_pool2d(onehot, size).flatten(2).transpose(1, 2)

    owners = shares("owner", 1 + batch["textures"].shape[1])  # (B, N, 1 + creatures)
    creature_texture = F.one_hot(batch["textures"].long().clamp(min=0), len(TEXTURES)).float()
    textures = torch.cat([owners[..., :1], owners[..., 1:] @ creature_texture], dim=-1)
    most = owners[..., 1:].argmax(dim=-1)[..., None]
    likeness = (-0.5 * _palette_distance(batch["colours"]) / 15**2).softmax(dim=-1).nan_to_num(0)
    bands = likeness[:, :, 2:].flatten(2)  # of (B, creatures, 4, 15)
    return {
        "textures": textures,
        "parts": shares("parts", len(PARTS)),
        "worn": likeness.amax(dim=2).gather(1, most.expand(-1, -1, len(PALETTE))),
        "sash": bands.gather(1, most.expand(-1, -1, bands.shape[2])).unflatten(2, (2, len(PALETTE))),
        "object": 1 - owners[..., 0],
    }


def composition(images: Tensor, object_share: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the shares of 27 colours in the area of a scene's creatures, (B, 27); they sum to one.

    All zero without creatures. A token's colour is its mean over the pixels of normalised `images` (B, 3, H, W), each
    channel in three levels; it counts by its `object_share` (B, N). Predicting shares of area takes a look at *all* of
    each creature.
    """
    size = images.shape[2] // grid[0], images.shape[3] // grid[1]
    mean = F.avg_pool2d(images, size).flatten(2)  # (B, 3, N)
    level = (mean > -0.6).long() + (mean > 0.5).long()
    bins = F.one_hot(9 * level[:, 0] + 3 * level[:, 1] + level[:, 2], 27).float()
    total = (bins * object_share[..., None]).sum(dim=1)
    return total / total.sum(dim=1, keepdim=True).clamp(min=1e-6)


def places(object_share: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return how the creatures' area is shared out among 7 x 7 cells of the image, (B, 49); all zero without any."""
    cells = F.adaptive_avg_pool2d(object_share.unflatten(1, grid), 7).flatten(1)
    return cells / cells.sum(dim=1, keepdim=True).clamp(min=1e-6)


def scene_target(batch: dict[str, Tensor]) -> Tensor:
    """Return the labels of a scene, (B, T + 15) of 0 and 1: the textures and the colours that its creatures wear."""
    nearest_colour = _palette_distance(batch["colours"]).nan_to_num(0).argmin(dim=-1)
    colours = nearest_colour.masked_fill(batch["colours"][..., 0].isnan(), -1).flatten(1)
    labels = [(batch["textures"] == texture).any(dim=1) for texture in range(len(TEXTURES))]
    labels += [(colours == colour).any(dim=1) for colour in range(len(PALETTE))]
    return torch.stack(labels, dim=1).float()


TERMS = ("texture", "part", "colour", "code", "scene", "composition", "place", "attend")
"""The terms of the supervised loss on scenes."""


def attend_loss(attention: Tensor, object_share: Tensor) -> Tensor:
    """Cross-entropy of attention (B, N), which sums to one, to the creatures' area `object_share` (B, N), shared out
    evenly; scenes without creatures do not count."""
    area = object_share.sum(dim=1)
    told = (object_share * attention.clamp(min=1e-8).log()).sum(dim=1) / area.clamp(min=1e-6)
    return -told[area > 0].sum() / (area > 0).sum().clamp(min=1)


def code_loss(found: Tensor, target: dict[str, Tensor]) -> Tensor:
    """Squared distance of (B, N, 45) outputs to the colours of `token_targets`, less their mean over all objects.

    On the background the target is zero. Objects count as much as the background, which has more tokens.
    """
    share = target["object"][..., None]
    colours = torch.cat([target["worn"], target["sash"].flatten(2)], dim=-1)
    mean = (colours * share).sum(dim=(0, 1)) / share.sum().clamp(min=1)
    wrong = (found - share * (colours - mean)).square().sum(dim=-1, keepdim=True)
    return sum((wrong * part).sum() / part.sum().clamp(min=1) for part in (share, 1 - share))


class Pretext(Trainable):
    """A backbone with the layers that train it. Called with a batch of `SceneLoader`, it returns the batch's loss.

    projection: what is thrown away after pretraining. vary: whether a transformer's layers and heads count by random
    weights in training (`looked_at`). seed: of the random views, with the number of `step`s done.
    """

    def __init__(self, backbone: nn.Module, projection: nn.Module, vary: bool, seed: int = 0):
        super().__init__()
        self.backbone, self.projection, self.vary, self.seed = backbone, projection, vary, seed
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    @property
    def head(self) -> nn.Module:
        """The layers that are thrown away after pretraining."""
        return self.projection

    def loss(self, forward: Callable[[Any], Tensor], batch: dict[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
        """Return the loss of a batch, on the device of the model; labels are not smoothed."""
        # The loop moves the batches of a DataLoader only; scenes come from memory-mapped arrays.
        return forward({name: value.to(self.step.device) for name, value in batch.items()})

    def generator(self) -> torch.Generator:
        """Return the random numbers of this step, the same on every device."""
        return torch.Generator().manual_seed((self.seed << 32) + int(self.step))

    def see(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, int]]:
        """Return patches (B, N, D), what is looked at of them (B, D), their weights (B, N) and their grid.

        A convolutional backbone looks evenly and has no weights.
        """
        if isinstance(self.backbone, TransformerBackbone):
            tokens = forward_view(self.backbone, images)
            weights = look(tokens, self.vary and self.training)
            rows, columns = (side // self.backbone.patch_size for side in images.shape[2:])
            return tokens.patches, _weighted(weights, tokens), weights, (rows, columns)
        features = self.backbone(images)
        return features.flatten(2).transpose(1, 2), features.mean(dim=(2, 3)), None, tuple(features.shape[2:])


class SupervisedPretext(Pretext):
    """A backbone that learns to name the texture, the part and the colours at every token.

    Called with a batch, returns its loss, the sum of `TERMS` times their `weights` (an ablation sets one to 0):
    `texture` (or background) and `part` of each token; `colour`, what the creature wears and its sash's two colours, on
    *all* of its tokens and on none of the background, so that what is seen in one place must travel through the
    creature and no further; `code`, the same as a regression, whose answer on the background is zero: a probability
    may still vary there, far below one half, and a classifier that sums over all tokens would find it; and of what the
    class token looks at, `scene`, the set of textures and colours, `composition`, the shares of colours, and `place`,
    where the creatures are. `attend` asks the class token's attention itself to be even over the creatures and nowhere
    else (a convolutional backbone has none, and no such term).
    """

    def __init__(self, backbone: nn.Module, weights: dict[str, float], vary: bool = True):
        textures, colours = len(TEXTURES), len(PALETTE)
        sizes = {"texture": 1 + textures, "part": len(PARTS), "worn": colours, "sash": 2 * colours}
        sizes |= {"scene": textures + colours, "composition": 27, "place": 49, "code": 3 * colours}
        heads = {name: nn.Linear(backbone.dim, size) for name, size in sizes.items()}
        super().__init__(backbone, nn.ModuleDict(heads), vary)
        self.weights = weights

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch of `SceneLoader`."""
        return sum(self.weights[name] * value for name, value in self.losses(batch).items())

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the terms of the loss by name."""
        images = batch["image"][:, 0]
        patches, whole, weights, grid = self.see(images)
        target = token_targets(batch, grid)

        def say(name: str) -> Tensor:
            return self.projection[name](whole if name in ("scene", "composition", "place") else patches).float()

        # By the creature's share of a token: on the background nothing is worn, so a classifier finds no class there.
        share = target["object"][..., None]
        worn = F.binary_cross_entropy_with_logits(say("worn"), target["worn"] * share)
        named = say("sash").unflatten(-1, (2, len(PALETTE))).log_softmax(dim=-1)
        counted = target["sash"] * share[..., None]
        bands = -(counted * named).sum() / counted.sum().clamp(min=1)
        terms = {} if weights is None else {"attend": attend_loss(weights, target["object"])}
        return terms | {
            "texture": F.cross_entropy(say("texture").flatten(0, 1), target["textures"].flatten(0, 1)),
            "part": F.cross_entropy(say("part").flatten(0, 1), target["parts"].flatten(0, 1)),
            "colour": worn + bands,
            "code": code_loss(say("code"), target),
            "scene": F.binary_cross_entropy_with_logits(say("scene"), scene_target(batch)),
            "composition": F.cross_entropy(say("composition"), composition(images, target["object"], grid)),
            "place": F.cross_entropy(say("place"), places(target["object"], grid)),
        }


class LabelPretext(Pretext):
    """A backbone that learns one label per image, which is all that photographs come with.

    Called with a batch, returns the cross-entropy of a linear classifier on what the class token looks at (of a ResNet:
    on the mean of its features). Crops and light vary in training.
    """

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch of `SceneLoader` over photographs."""
        images = batch["image"][:, 0]
        if self.training:
            generator = self.generator()
            images = jitter(random_crops(images, images.shape[-1], (0.4, 1.0), generator), 0.3, generator)
            self.step += 1
        return F.cross_entropy(self.projection(self.see(images)[1]).float(), batch["label"])


def looked_at(tokens: Tokens, vary: bool = False) -> Tensor:
    """Return (B, D): the mean of the patch tokens, weighted by what the class token attends to in all layers and heads.

    Classifying this vector, instead of the class token, makes the classification depend on the attention. What the
    attention misses is not seen, and what it wrongly takes in dilutes the rest. vary: layers and heads count by random
    weights, drawn for each image, so that none relies on the others.
    """
    return _weighted(look(tokens, vary), tokens)


def _weighted(weights: Tensor, tokens: Tokens) -> Tensor:
    return (weights[:, None] @ tokens.patches.float()).squeeze(1)


def look(tokens: Tokens, vary: bool = False) -> Tensor:
    """Return (B, N): the class token's attention, over all layers and heads, as weights that sum to one.

    vary: as of `looked_at`.
    """
    rows = tokens.attention.flatten(1, 2)
    if vary:
        rows = rows * torch.empty(*rows.shape[:2], 1, device=rows.device).exponential_()
    weights = rows.mean(dim=1)
    return weights / weights.sum(dim=1, keepdim=True)


def forward_view(backbone: TransformerBackbone, images: Tensor) -> Tokens:
    """Run a transformer on (B, 3, H, H) views of any size that its patches divide: resamples the position embedding.

    Views of any other number of channels are maps (B, C, h, h) of the stem, a cell for each patch.
    """
    vit, grid = backbone.vit, images.shape[-1] // (backbone.patch_size if images.shape[1] == 3 else 1)
    if grid == backbone.grid[0]:
        return forward_tapped(vit, images, backbone.masks)
    whole, prefix = vit._parameters["pos_embed"], positioned_prefix(vit)
    try:
        vit._parameters["pos_embed"] = resample_abs_pos_embed(whole, (grid, grid), num_prefix_tokens=prefix)
        masks = _masks(backbone.mixing, grid, backbone.depth, images.device) if backbone.mixing else ()
        return forward_tapped(vit, images, masks)
    finally:
        vit._parameters["pos_embed"] = whole


@lru_cache(maxsize=16)
def _masks(mixing: Mixing, grid: int, depth: int, device: torch.device) -> list[Tensor | None]:
    return [mask if mask is None else mask.to(device) for mask in mixing.masks(grid, grid, depth)]


def forward_halfway(backbone: TransformerBackbone, images: Tensor, layers: int) -> tuple[Tokens, Tensor]:
    """Run `forward_view`; returns its tokens and the patches (B, N, D) as they are after so many layers."""
    if layers >= backbone.depth:
        raise ParameterError(f"{backbone.name} has {backbone.depth} layers, got {layers}", "give a smaller number")
    halfway, first = [], backbone.prefix_tokens
    norm = backbone.vit.blocks[layers].norm1
    with norm.register_forward_pre_hook(lambda _, x: halfway.append(x[0][:, first:])):
        return forward_view(backbone, images), halfway[0]


def co_attention(
    attention: Tensor, patches: Tensor, others: int = 8, width: float = 0.2, steepness: float = 10.0
) -> Tensor:
    """Return where attention should be, (2B, N), rows summing to one: on what both frames of a scene have in common.

    attention: (2B, N), where it is. patches: (2B, N, D), what is there. The first B rows are one frame of each scene,
    the others another frame of the same scenes. A patch is common as far as some patch of its scene's other frame is
    more like it (cosine) than the most similar patches of `others` other scenes are on average (in a smaller batch: of
    all others). The logarithm of the attention is added; both are standardised within the image. The sum is then passed
    on between patches that are alike (temperature `width`), so that what is found in one part of a creature is found in
    all of it. Two-means clustering divides an image's patches into two groups. A logistic of `steepness` between the
    two means keeps the higher group, with about equal weights.

    Raises ParameterError for anything but two frames of two or more scenes.
    """
    batch = len(patches) // 2
    if len(attention) != len(patches) or len(patches) != 2 * batch or batch < 2:
        raise ParameterError(
            f"co_attention was given {tuple(attention.shape)} attention and {tuple(patches.shape)} patches",
            "give two frames of each scene, and more than one scene",
        )
    others = min(others, batch - 1)
    with torch.autocast(patches.device.type, enabled=False):
        patches = patches.float()
        unit = F.normalize(patches, dim=-1)
        score = _standardised(attention.float().clamp(min=1e-8).log())
        frames = (unit[:batch], unit[batch:]), (unit[batch:], unit[:batch])
        score = score + _standardised(torch.cat([_commonness(*pair, others) for pair in frames]))
        unit = F.normalize(patches - patches.mean(dim=(0, 1)), dim=-1)
        alike = (unit @ unit.transpose(1, 2) / width).softmax(dim=-1)
        score = _standardised((alike @ score[..., None]).squeeze(-1))
        low, high = _two_means(score)
        member = (steepness * (score - (low + high) / 2) / (high - low).clamp(min=1e-6)).sigmoid()
        return member / member.sum(dim=1, keepdim=True)


def _standardised(x: Tensor) -> Tensor:
    return (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True).clamp(min=1e-6)


def _commonness(unit: Tensor, other: Tensor, others: int) -> Tensor:
    best = [(unit @ other.roll(shift, 0).transpose(1, 2)).amax(dim=-1) for shift in range(1 + others)]
    return best[0] - torch.stack(best[1:]).mean(dim=0)


def _two_means(score: Tensor, rounds: int = 8) -> tuple[Tensor, Tensor]:
    def mean(part: Tensor) -> Tensor:
        return (score * part).sum(dim=1, keepdim=True) / part.sum(dim=1, keepdim=True).clamp(min=1)

    low, high = score.amin(dim=1, keepdim=True), score.amax(dim=1, keepdim=True)
    for _ in range(rounds):
        above = (score > (low + high) / 2).float()
        low, high = mean(1 - above), mean(above)
    return low, high


class DistillationHead(nn.Module):
    """DINO's projection: an MLP to a unit vector and, if there are prototypes, its cosine to each of them."""

    def __init__(self, dim: int, prototypes: int = 0):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64))
        self.prototypes = nn.Parameter(torch.randn(prototypes, 64)) if prototypes else None

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 64) unit vectors or (B, prototypes) cosines of (B, dim) class tokens."""
        z = F.normalize(self.mlp(x).float(), dim=-1)
        return z if self.prototypes is None else z @ F.normalize(self.prototypes, dim=-1).T


def random_crops(images: Tensor, size: int, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Cut a square out of each image (B, C, H, W), `scale` of its area, resized to `size`, half of them mirrored."""
    batch = len(images)
    side = torch.empty(batch).uniform_(*scale, generator=generator).sqrt()
    shift = (1 - side)[:, None] * torch.empty(batch, 2).uniform_(-1, 1, generator=generator)
    flip = torch.randint(0, 2, (batch,), generator=generator) * 2.0 - 1
    matrix = torch.zeros(batch, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, :, 2] = side * flip, side, shift
    grid = F.affine_grid(matrix, (batch, 3, size, size), align_corners=False).to(images.device)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def jitter(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change contrast, light and white balance of normalised images (B, 3, H, W), each at random, and add grain."""
    batch = len(images)

    def draw(*shape):
        return (torch.empty(batch, *shape, 1, 1).uniform_(-1, 1, generator=generator) * strength).to(images.device)

    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    changed = (images - mean) * (1 + draw(1)) + mean + 1.5 * draw(1) + 0.75 * draw(3)
    grain = torch.empty(images.shape).normal_(generator=generator).to(images.device)
    return changed + 0.2 * draw(1).abs() * grain


class SelfDistillation(BaseModel):
    """Settings of `SelfDistilled`.

    loss: `contrast` compares a view with the teacher's views of the batch's scenes (MoCo v3), `prototypes` with learned
    prototypes, balanced by Sinkhorn-Knopp (DINO, SwAV). prototypes: their number.
    global_size, local_size: sides of the views in pixels (of a stem's maps: in cells); global_scale, local_scale:
    shares of the image's area that they show. local_crops: number of local views. jitter: strength of the changes of
    light.
    momentum: of the teacher at the start; rises to 1. temperature: divides the student's cosines;
    teacher_temperature: the teacher's (`prototypes` only).
    common: weight of the term that asks the student's attention to be where the teacher finds what both frames of a
    scene have in common (`co_attention`), reached after a tenth of the training. common_layer: after how many layers
    the teacher's patches are compared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: Literal["contrast", "prototypes"] = "contrast"
    prototypes: int = Field(256, ge=2)
    global_size: int = 80
    global_scale: tuple[float, float] = (0.7, 1.0)
    local_size: int = 48
    local_scale: tuple[float, float] = (0.35, 0.6)
    local_crops: int = Field(2, ge=0)
    jitter: float = Field(0.2, ge=0)
    momentum: float = Field(0.99, ge=0, le=1)
    temperature: float = Field(0.1, gt=0)
    teacher_temperature: float = Field(0.05, gt=0)
    common: float = Field(0.0, ge=0)
    common_layer: int = Field(2, ge=0)


class SelfDistilled(Pretext):
    """Student and teacher, multi-crop, no labels and no masks.

    Called with a batch, returns its loss: the mean cross-entropy between what the teacher says of one global view and
    what the student says of every other view of the scene, global or local. The teacher is the moving average of the
    student. With several frames per scene the views come from different frames. With `common` the teacher also says
    where in the global views to look: neither labels nor masks tell it, but that a scene's frames show the same
    creatures before different backgrounds.
    """

    def __init__(self, backbone: nn.Module, config: SelfDistillation, steps: int, seed: int, vary: bool = True):
        projection = DistillationHead(backbone.dim, config.prototypes if config.loss == "prototypes" else 0)
        super().__init__(backbone, projection, vary, seed)
        self.config, self.steps = config, steps
        self.teacher = nn.ModuleList([copy.deepcopy(backbone), copy.deepcopy(projection)]).requires_grad_(False)

    def views(self, frames: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Cut the global and local views out of (B, frames, 3, H, W) images, or of maps of a stem."""
        c, generator = self.config, self.generator()

        def view(position: int, size: int, scale: tuple[float, float]) -> Tensor:
            crop = random_crops(frames[:, position % frames.shape[1]], size, scale, generator)
            return jitter(crop, c.jitter, generator) if c.jitter else crop

        wide = [view(i, c.global_size, c.global_scale) for i in range(2)]
        return wide, [view(i, c.local_size, c.local_scale) for i in range(c.local_crops)]

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch of `SceneLoader`, after moving the teacher towards the student."""
        c = self.config
        self._move_teacher()
        wide, narrow = self.views(batch["image"])
        with torch.no_grad():
            self.teacher.eval()
            seen, halfway = forward_halfway(self.teacher[0], torch.cat(wide), c.common_layer)
            said = self.teacher[1](looked_at(seen)).float().chunk(2)
            told = co_attention(look(seen), halfway) if c.common else None
        answers, vary, missed = [], self.vary and self.training, 0.0
        for group in (wide, narrow):
            if group:
                seen = forward_view(self.backbone, torch.cat(group))
                if group is wide and told is not None:
                    missed = -(told * look(seen, vary).clamp(min=1e-8).log()).sum(dim=1).mean()
                answers += self.projection(looked_at(seen, vary)).float().chunk(len(group))
        self.step += 1
        terms = []
        for i, view in enumerate(said):
            own = torch.arange(len(view), device=view.device)
            target = own if c.loss == "contrast" else sinkhorn(view / c.teacher_temperature)
            for answer in (answer for j, answer in enumerate(answers) if i != j):
                likeness = answer @ view.T if c.loss == "contrast" else answer
                terms.append(F.cross_entropy(likeness / c.temperature, target))
        # At the start the teacher's patches tell little.
        return sum(terms) / len(terms) + c.common * min(1.0, int(self.step) / max(1, 0.1 * self.steps)) * missed

    @torch.no_grad()
    def _move_teacher(self) -> None:
        momentum = 1 - (1 - self.config.momentum) * (math.cos(math.pi * int(self.step) / self.steps) + 1) / 2
        student = nn.ModuleList([self.backbone, self.projection]).state_dict()
        for name, slow in self.teacher.state_dict().items():
            slow.lerp_(student[name], 1 - momentum) if slow.is_floating_point() else slow.copy_(student[name])


def sinkhorn(logits: Tensor, rounds: int = 3) -> Tensor:
    """Turn (B, K) logits into distributions over K whose sum over the batch is the same for every prototype."""
    plan = (logits - logits.amax(dim=1, keepdim=True)).double().exp().T
    for _ in range(rounds):
        plan = plan / plan.sum(dim=1, keepdim=True).clamp(min=1e-12) / plan.shape[0]
        plan = plan / plan.sum(dim=0, keepdim=True) / plan.shape[1]
    return (plan * plan.shape[1]).T.float()


class PretrainingConfig(BaseModel):
    """One recipe, with everything that decides its weights.

    recipe: `supervised` or `distilled`. backbone: a name of `wsolnb.backbones`. mixing: of a mini transformer.
    scenes: what is rendered. photographs: name of a data set whose training images are used instead, such as
    `tiny_imagenet`; empty = scenes. vary: whether a transformer's layers and heads count by random weights in training
    (`looked_at`). positions: how much of the position embedding is left after the training (`shrink_positions`).
    weights: of the supervised losses on scenes. distillation: of the self-distilled recipe.
    batch_size: scenes per step. training: the loop's hyperparameters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Literal["supervised", "distilled"]
    backbone: str
    mixing: Mixing = Mixing()
    scenes: CreatureConfig
    photographs: str = ""
    vary: bool = True
    positions: float = Field(1.0, ge=0, le=1)
    weights: dict[str, float] = {**dict.fromkeys(TERMS, 1.0), "attend": 0.0}
    distillation: SelfDistillation = SelfDistillation()
    batch_size: int = Field(16, ge=2)
    training: TrainingConfig

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.recipe == "distilled" and self.distillation.common and (self.photographs or self.scenes.frames < 2):
            raise ValueError("common > 0 needs two frames of each scene: set scenes.frames=2, or common=0")
        if self.positions < 1 and self.backbone not in backbones.MIXING:
            raise ValueError(f"{self.backbone} has no position embedding to shrink: set positions=1")
        return self

    def build(self, steps: int, num_classes: int = 0) -> SupervisedPretext | LabelPretext | SelfDistilled:
        """Return the backbone with random weights inside of what trains it for `steps` steps.

        num_classes: of the photographs.
        """
        set_seed(self.training.seed)
        # Each ignores the option of the other kind; stride 8 gives a ResNet as many cells as a transformer has tokens.
        backbone = create_backbone(self.backbone, mixing=self.mixing, output_stride=8)
        if self.recipe == "distilled":
            return SelfDistilled(backbone, self.distillation, steps, self.training.seed, self.vary)
        if self.photographs:
            return LabelPretext(backbone, nn.Linear(backbone.dim, num_classes), self.vary, self.training.seed)
        return SupervisedPretext(backbone, self.weights, self.vary)


SCENES = CreatureConfig(scenes=8000, frames=2, ends=0.8)
ROUGH = SCENES.model_copy(update={"rough": True})
PLAIN_SIGHT = SCENES.model_copy(update={"camouflage": 0.0, "muted": 0.4, "ends": 0.0})
"""Scenes in which creatures are easier to see: without labels, what cannot be seen cannot be learnt."""

_DISTILLED: dict[str, Any] = {"recipe": "distilled", "batch_size": 32, "training": TrainingConfig(epochs=24, lr=1.5e-3)}

RECIPES: dict[str, PretrainingConfig] = {
    "vit_mini": PretrainingConfig(
        recipe="supervised",
        backbone="vit_mini",
        mixing=backbones.MIXING["vit_mini"],
        scenes=ROUGH,
        weights={**dict.fromkeys(TERMS, 1.0), "colour": 3.0},
        training=TrainingConfig(epochs=28, lr=2e-3),
    ),
    "vit_mini_dino": PretrainingConfig(backbone="vit_mini_dino", scenes=PLAIN_SIGHT, **_DISTILLED),
    "vit_mini_dino_co": PretrainingConfig(
        backbone="vit_mini_dino_co",
        scenes=ROUGH,
        positions=0.5,
        distillation=SelfDistillation(common=1.0),
        **_DISTILLED,
    ),
    "resnet_mini": PretrainingConfig(
        recipe="supervised", backbone="resnet_mini", scenes=SCENES, training=TrainingConfig(epochs=5, lr=1.5e-3)
    ),
}
"""How each embedded backbone was made."""


ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "nothing (supervised)": ("vit_mini", {}),
    "local layers": ("vit_mini", {"mixing": Mixing(local_layers=0)}),
    "the last two local layers": ("vit_mini", {"mixing": Mixing(local_layers=2)}),
    "patches blind to the class token": ("vit_mini", {"mixing": Mixing(4, sees_class=True)}),
    "bounded scores": ("vit_mini", {"mixing": Mixing(4, bound=None)}),
    "attention told where": ("vit_mini", {"weights": {"attend": 0.0}}),
    "background told to be none": ("vit_mini", {"weights": {"code": 0.0}}),
    "rough backgrounds": ("vit_mini", {"scenes": {"rough": False}}),
    "colours on all tokens": ("vit_mini", {"weights": {"colour": 0.0}}),
    "shares of colours": ("vit_mini", {"weights": {"composition": 0.0}}),
    "places": ("vit_mini", {"weights": {"place": 0.0}}),
    "varied layers and heads": ("vit_mini", {"vary": False}),
    "camouflage": ("vit_mini", {"scenes": {"camouflage": 0.0}}),
    "sashes at ends and on limbs": ("vit_mini", {"scenes": {"ends": 0.0}}),
    "the sash (no head-like part)": ("vit_mini", {"scenes": {"sash": False}}),
    "nothing (self-distilled)": ("vit_mini_dino_co", {}),
    "what frames have in common": ("vit_mini_dino_co", {"distillation": {"common": 0.0}}),
    "halving the positions": ("vit_mini_dino_co", {"positions": 1.0}),
    "the second frame": ("vit_mini_dino_co", {"scenes": {"frames": 1}, "distillation": {"common": 0.0}}),
    "local crops": ("vit_mini_dino_co", {"distillation": {"local_crops": 0}}),
    "scenes as prototypes": ("vit_mini_dino_co", {"distillation": {"loss": "prototypes"}}),
}
"""What notebook 06 leaves out, one ingredient at a time: the recipe, and what is changed in it."""


def ablation(name: str, epochs: int, seed: int) -> PretrainingConfig:
    """Return the recipe without one ingredient, a name of `ABLATIONS`, for so many epochs.

    Raises ParameterError for an unknown name.
    """
    if name not in ABLATIONS:
        raise ParameterError(f"unknown ablation {name!r}{nearest(name, ABLATIONS)}", f"one of {', '.join(ABLATIONS)}")
    base, changes = ABLATIONS[name]
    values = RECIPES[base].model_dump()
    for field, change in {**changes, "training": {"epochs": epochs, "seed": seed}}.items():
        values[field] = {**values[field], **change} if isinstance(change, dict) else change
    return PretrainingConfig.model_validate(values)


def on_photographs(name: str, dataset: str) -> PretrainingConfig:
    """Return the recipe `name` of `RECIPES` for the photographs of a data set: as many epochs, one frame, wider crops.

    One image has only one background, so the compared views share less of the image. What they have in common is not an
    object, so `co_attention` is left out. The recipe is untuned: a start, not a result.
    """
    recipe = RECIPES[name]
    wider = {"global_scale": (0.4, 1.0), "local_scale": (0.15, 0.4), "jitter": 0.4, "common": 0.0}
    distillation = recipe.distillation.model_copy(update=wider)
    return recipe.model_copy(update={"photographs": dataset, "distillation": distillation})


@torch.no_grad()
def shrink_positions(backbone: TransformerBackbone, share: float) -> None:
    """Move the position embedding of the patches towards its mean over all places; `share` of the difference is left.

    Where a creature cannot be told from the background, attention learns that creatures lie in the middle, and learns
    it mainly from the position embedding. 1 changes nothing; with 0 only the windows of local layers, which the border
    cuts off, tell a patch where it is.
    """
    patches = backbone.vit.pos_embed[:, positioned_prefix(backbone.vit) :]
    patches.lerp_(patches.mean(dim=1, keepdim=True), 1 - share)


def pretrain(
    run: Run, name: str, config: PretrainingConfig, data_root: str = "", progress: bool = True
) -> tuple[nn.Module, Path]:
    """Return the backbone that a recipe gives, and the folder of its training (`history.csv`).

    It is trained once per run folder, epoch by epoch and resumable; scenes are rendered into `outputs/cache`. A
    self-distilled recipe returns the teacher. The folder holds the training's end, before `shrink_positions`.
    data_root: folder of the photographs, if the recipe names any.
    Raises TrainingError, DataError and ParameterError as the loop, the renderer and the readers do.
    """
    # Positions are shrunk after the training, which they do not change.
    trained = config.model_copy(update={"positions": 1.0})
    photographs = open_dataset(config.photographs, resolve(data_root), "train") if config.photographs else None
    classes = len(photographs.class_names) if photographs else 0

    def build(folder: Path) -> None:
        size, cache = trained.scenes.size, resolve("outputs/cache")
        scenes = read_photographs(photographs, size) if photographs else creature_scenes.load(trained.scenes, cache)
        loader = SceneLoader(scenes, trained.batch_size, trained.training.seed, trained.recipe == "supervised")
        model = trained.build(trained.training.epochs * len(loader), classes)
        loop.train(model, loader, trained.training, folder, progress=progress)

    folder = run.cached(name, build)
    model = loop.load_checkpoint(config.build(1, classes), folder, "last")  # whose weights know no number of steps
    backbone = model.backbone if config.recipe == "supervised" else model.teacher[0]
    if config.positions < 1:
        shrink_positions(backbone, config.positions)
    return backbone, folder


def export(backbone: nn.Module, name: str, config: BaseModel, folder: str | Path, minutes: float) -> Path:
    """Write a backbone in half precision to `<name>.safetensors`, and what is known of it into its model card.

    config: a `PretrainingConfig`, or the recipe of a backbone that no scenes have made. minutes: of the training.
    Tensors that another embedded file has (`backbones.SHARED`) are left out. The card has room for scores, which are
    measured later; its text below the front matter is kept. Returns the path of the card.
    """
    folder = Path(folder)
    model = backbone.vit if isinstance(backbone, TransformerBackbone) else backbone.cnn
    state = {n: v.detach().cpu().contiguous() for n, v in model.state_dict().items()}
    if name in backbones.SHARED:
        state = {n: v for n, v in state.items() if not n.startswith(backbones.SHARED[name].names)}
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    content = safetensors.torch.save(half)
    write_atomically(folder / f"{name}.safetensors", content)
    front = {
        "name": name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": round(float(minutes), 1),
        "hardware": f"{torch.get_num_threads()} thread(s), {device_name()}, {cpu_model()}",
        "made": now()[:10],
        "torch": str(torch.__version__),
        "scores": {},
        "recipe": config.model_dump(mode="json"),
    }
    if isinstance(config, PretrainingConfig):
        front |= {"scenes_format": creature_scenes.FORMAT}
        front["recipe"] |= {"mixing": config.mixing._asdict()}
    card = folder / f"{name}.md"
    text = card.read_text("utf-8").split("---\n", 2)[2] if card.exists() else f"\n# {name}\n"
    return write_atomically(card, f"---\n{yaml.safe_dump(front, sort_keys=False, width=110)}---\n{text}")


def start_of(run: Run, name: str, seed: int) -> dict[str, Any]:
    """Return `pretrained` and `checkpoint`, as `create_backbone` takes them, of a mini backbone pretrained with a seed.

    seed: of the scenes and of everything random in the training. 0: the embedded weights. Any other: weights made by
    the same recipe, once per run folder, in 10 to 60 minutes of a core. Raises ParameterError for a backbone without a
    recipe.
    """
    if seed == 0:
        return {"pretrained": True, "checkpoint": ""}
    if name not in RECIPES:
        raise ParameterError(f"there is no recipe to pretrain {name!r} again", f"use {', '.join(RECIPES)}")
    own = RECIPES[name]
    seeded = {part: getattr(own, part).model_copy(update={"seed": seed}) for part in ("scenes", "training")}
    config = own.model_copy(update=seeded)
    backbone, folder = pretrain(run, f"pretraining-{name}-{seed}", config, progress=False)
    return exported_start(run, backbone, name, config, folder)


def exported_start(run: Run, backbone: nn.Module, name: str, config: Any, folder: Path) -> dict[str, Any]:
    """Export what a training of `folder` gave into the run folder; returns `pretrained` and `checkpoint` of it."""
    target = run.folder / "weights" / f"seed-{config.training.seed}"
    export(backbone, name, config, target, run.seconds_of(folder) / 60)
    return {"pretrained": False, "checkpoint": str(target / f"{name}.safetensors")}
