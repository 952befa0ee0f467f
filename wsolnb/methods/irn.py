"""IRN (Ahn et al., CVPR 2019): from seeds to pseudo masks by a random walk that stops at learnt boundaries.

Two small branches on a frozen backbone are trained on pairs of nearby pixels whose seeds are confident: a boundary map
B, and a displacement field D towards an object's centre. The affinity of two pixels is 1 - max B on the straight way
between them. A random walk whose transition is that affinity spreads each class's map inside of boundaries.

    write_irn_labels(seeds, dataset, config, CRFConfig(), folder)     # masks of 0, class + 1 and 255
    model = IRN(create_backbone("resnet50", pretrained=True))         # trained on them with its own loss
    write_pseudo_masks(model, seeds, dataset, config, None, folder)   # maps that walked, and their masks

`seeds` is a store of maps, one file an image; each stage reads and writes image by image. By hand, for one image:

    boundary = boundaries(model, images)                              # (B, h, w), stride 4
    scores = unit_scores(propagate(maps, boundary[0]), (H, W))        # (K, H, W); the mask is their argmax with 0.35

If 4 does not divide the sides, give `unit_scores` the area that the cells see, `seen(boundary[0], (H, W))`.

The equations stand first, as https://arxiv.org/abs/1904.05044 writes them: matrices over all pairs of pixels. The code
that runs follows them, and gives the same results without a matrix of N x N numbers.

Used for semantic masks: the instance part (from D to centroids and their clusters, and the mean shift of D over the
training images, which no semantic mask depends on) is left out. The displacement branch is trained: its loss is part of
IRN's.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from scipy import sparse
from torch import Tensor, nn

from wsolnb.backbones import ConvBackbone
from wsolnb.data.base import LocalizationDataset
from wsolnb.data.loading import to_tensor
from wsolnb.data.sample import IGNORE, Sample
from wsolnb.data.store import ClassMaps, Store
from wsolnb.data.transforms import resize, resize_map
from wsolnb.errors import MapError, ParameterError
from wsolnb.maps import enlarge, seen_area
from wsolnb.methods import crf, register
from wsolnb.methods.base import Trainable
from wsolnb.methods.crf import CRFConfig
from wsolnb.metrics.segmentation import seed_mask
from wsolnb.workers import results

STRIDE = 4
"""Pixels of the network's input per cell of a boundary map."""

EPSILON = 1e-5
"""Inside of the logarithms and the denominators of the loss, as released."""

# The equations, as the paper writes them


@lru_cache
def offsets(radius: int) -> tuple[tuple[int, int], ...]:
    """Return the (down, right) offsets of the pairs: closer than `radius`, one of every two opposite ones."""
    return tuple(
        (down, right)
        for down in range(radius)
        for right in range(1 - radius, radius)
        if down * down + right * right < radius * radius and (down > 0 or right > 0)
    )


@lru_cache
def path(down: int, right: int) -> tuple[tuple[int, int], ...]:
    """Return the cells between two pixels: all in the offset's bounding rectangle, ends included, that are closer than
    1 to the straight line."""
    squared = down * down + right * right
    rows, columns = range(min(0, down), max(0, down) + 1), range(min(0, right), max(0, right) + 1)
    # In integers, so that a cell at distance exactly 1 is out on every machine.
    return tuple((y, x) for y in rows for x in columns if (down * x - right * y) ** 2 < squared)


def plain_affinity(boundary: np.ndarray, radius: int) -> np.ndarray:
    """Return A (N, N) with a_ij = 1 - max of B(x_k) over k in Pi_ij, for pixels i and j closer than `radius`, else 0.

    boundary: B (h, w) in [0, 1], N = h w, row by row. Pi_ij: the `path` between i and j. a_ii = 1.
    """
    pixels, found = list(np.ndindex(boundary.shape)), np.eye(boundary.size)
    for (i, (y, x)), (j, (y1, x1)) in itertools.permutations(enumerate(pixels), 2):
        if (y1 - y) ** 2 + (x1 - x) ** 2 < radius**2:
            found[i, j] = 1 - max(boundary[y + down, x + right] for down, right in path(y1 - y, x1 - x))
    return found


def plain_walk(maps: np.ndarray, boundary: np.ndarray, radius: int, beta: float, steps: int) -> np.ndarray:
    """Return T^t vec(M * (1 - B)), t = `steps`, for each of the maps M (K, h, w), with T = S^-1 A^beta.

    A^beta: `plain_affinity`, each element to the power beta. S: diagonal, its row sums.
    """
    a = plain_affinity(boundary, radius) ** beta
    t = a / a.sum(axis=1, keepdims=True)
    start = (maps * (1 - boundary)).reshape(len(maps), -1)
    return (np.linalg.matrix_power(t, steps) @ start.T).T.reshape(maps.shape)


class IRNConfig(BaseModel):
    """Hyperparameters; the defaults are LPCAM's for IRN on VOC.

    IRN's own released code sets foreground, background and mask_background to 0.30, 0.05 and 0.25 (recalled).

    foreground, background: a pixel is confident foreground where its refined map exceeds the first, confident
        background where no map exceeds the second. mask_background: the background's score in pseudo masks.
    label_radius: largest distance of the pairs that are trained on, radius: of the walk's steps; both exclusive, in
        cells of stride 4. beta: exponent of the affinity. exp_times: the walk has 2 ** exp_times steps.
    damping: the walk starts from maps times 1 - damping * boundary; released 1. On small images, where outlines of one
        or two cells are a large part of an object, a damping of 1 removes the object.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    foreground: float = Field(0.45, ge=0, le=1)
    background: float = Field(0.25, ge=0, le=1)
    mask_background: float = Field(0.35, ge=0, le=1)
    label_radius: int = Field(10, ge=2)
    radius: int = Field(5, ge=2)
    beta: float = Field(10.0, gt=0)
    exp_times: int = Field(8, ge=0)
    damping: float = Field(1.0, ge=0, le=1)


# The affinities and the walk without a matrix of N x N numbers


def _window(size: tuple[int, int], down: int, right: int, y: int = 0, x: int = 0) -> tuple[slice, slice]:
    """Return where the pixels lie that have a partner at the offset inside of `size`, moved by (y, x)."""
    (height, width), left = size, max(0, -right)
    return slice(y, y + max(0, height - down)), slice(left + x, left + x + max(0, width - abs(right)))


class _PathMax(torch.autograd.Function):
    """Largest value on the way to each offset's partner. Keeps a byte a pair for the backward pass: where it was."""

    @staticmethod
    def forward(ctx, values: Tensor, radius: int) -> Tensor:
        size, around = values.shape[-2:], offsets(radius)
        shape = (len(values), len(around), *size)
        result, which = values.new_ones(shape), torch.zeros(shape, dtype=torch.uint8, device=values.device)
        for pair, offset in enumerate(around):
            source = _window(size, *offset)
            best, chosen = result[:, pair][:, *source], which[:, pair][:, *source]
            for index, cell in enumerate(path(*offset)):
                value = values[:, *_window(size, *offset, *cell)]
                if index == 0:
                    best.copy_(value)
                else:
                    chosen.masked_fill_(value > best, index)
                    torch.maximum(best, value, out=best)
        ctx.save_for_backward(which)
        ctx.radius = radius
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (which,) = ctx.saved_tensors
        size = gradient.shape[-2:]
        result = gradient.new_zeros((len(gradient), *size))
        for pair, offset in enumerate(offsets(ctx.radius)):
            source = _window(size, *offset)
            own, chosen = gradient[:, pair][:, *source], which[:, pair][:, *source]
            for index, cell in enumerate(path(*offset)):
                result[:, *_window(size, *offset, *cell)] += own * (chosen == index)
        return result, None


def affinity(boundary: Tensor, radius: int) -> Tensor:
    """Return 1 - max of the boundary map on the way to each pixel's partners (`plain_affinity`); differentiable.

    boundary: (B, h, w) in [0, 1]. Returns (B, P, h, w) for the P `offsets(radius)`, 0 where the partner is outside.
    """
    return 1 - _PathMax.apply(boundary, radius)


def transition(boundary: Tensor, radius: int = 5, beta: float = 10.0) -> Tensor:
    """Return T of `plain_walk`, (N, N), N = h * w, sparse (CSR), float64.

    boundary: (h, w) in [0, 1]. A pixel's affinity to itself is 1; rows sum to 1, so `T @ x` replaces each pixel's score
    by a mean over its neighbourhood. (The released code normalises columns, and multiplies from the left: the same.)
    """
    height, width = boundary.shape
    index = np.arange(height * width).reshape(height, width)
    weights = affinity(boundary.detach()[None].double().cpu(), radius)[0].pow(beta).numpy()
    rows, columns, values = [index.ravel()], [index.ravel()], [np.ones(index.size)]
    for (down, right), weight in zip(offsets(radius), weights, strict=True):
        source = _window((height, width), down, right)
        first, second = index[source].ravel(), index[_window((height, width), down, right, down, right)].ravel()
        rows += [first, second]
        columns += [second, first]
        values += [weight[source].ravel()] * 2
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    matrix = sparse.csr_matrix(entries, shape=(index.size, index.size))
    data = matrix.data / np.repeat(np.add.reduceat(matrix.data, matrix.indptr[:-1]), np.diff(matrix.indptr))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        # torch's product with several columns is five times as fast as scipy's.
        parts = map(torch.from_numpy, (matrix.indptr, matrix.indices, data))
        return torch.sparse_csr_tensor(*parts, size=matrix.shape, check_invariants=False)


def propagate(
    cam: Tensor, boundary: Tensor, radius: int = 5, beta: float = 10.0, exp_times: int = 8, damping: float = 1.0
) -> Tensor:
    """Spread maps by 2 ** exp_times steps of the random walk (`plain_walk`), damped first by 1 - damping * boundary.

    cam: (K, h, w), >= 0. boundary: (h, w) in [0, 1]. radius: of a step, exclusive, in cells. Returns (K, h, w) float32.
    One step costs K multiplications for each pair of neighbours: time and memory are linear in the number of pixels.
    Walks in float64, where 2^8 steps differ from dense powers by rounding only; on CUDA, else on the CPU.
    Raises MapError for shapes that do not fit and values that are NaN or out of range.
    """
    return walks(cam, boundary, radius, beta, (exp_times,), damping)[0]


def walks(
    cam: Tensor, boundary: Tensor, radius: int, beta: float, exp_times: Sequence[int], damping: float = 1.0,
    matrix: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Return what `propagate` returns after each of several numbers of steps, from one walk; `exp_times` ascend.

    matrix: the `transition` of the boundary, where it is there already.
    """
    if cam.ndim != 3 or boundary.shape != cam.shape[1:]:
        problem = f"maps {tuple(cam.shape)} and boundary {tuple(boundary.shape)} do not fit"
        raise MapError(problem, "give (K, h, w) and (h, w)")
    if boundary.numel() and not (float(boundary.min()) >= 0 and float(boundary.max()) <= 1):
        problem = f"the boundary has values from {float(boundary.min()):g} to {float(boundary.max()):g}"
        raise MapError(problem, "give probabilities: the sigmoid of the boundary branch")
    if not cam.isfinite().all():
        raise MapError("the maps hold NaN or infinity", "look at the network that they come from")
    walked_on = cam.device if cam.device.type == "cuda" else torch.device("cpu")  # MPS has no float64
    start = cam.to(walked_on).double() * (1 - damping * boundary.to(walked_on).double())
    scores = start.flatten(1).T.contiguous()
    if not scores.numel():
        matrix = None
    else:
        matrix = (transition(boundary, radius, beta) if matrix is None else matrix).to(walked_on)
    found, done = [], 0
    for power in exp_times:
        for _ in range(2**power - done if matrix is not None else 0):
            scores = matrix @ scores
        done = 2**power
        found.append(scores.T.reshape(cam.shape).float().to(cam.device))
    return found


def unit_scores(scores: Tensor, size: tuple[int, int], area: tuple[int, int] | None = None) -> Tensor:
    """Return scores (K, h, w) >= 0 of an image's classes, enlarged to `size` in pixels, in [0, 1]; zeros stay zero.

    area: that the cells see (`seen`); None is `size`. All scores are divided by the maximum over *all* classes, as
    released, so a weak second class stays weak.
    """
    if not len(scores):
        return scores.new_zeros((0, *size), dtype=torch.float32)
    up = enlarge(scores.float(), size, area)
    return (up / up.max().clamp(min=1e-12)).clamp(0, 1)


# The losses: means over pairs of pixels, of a batch


class PairLabels(NamedTuple):
    """What is known of pairs of pixels, each (B, P, h, w) booleans. A pair with a pixel of unknown seed is in none of
    them.

    foreground: both of one class. background: both background. different: of two classes, or of one and background.
    """

    foreground: Tensor
    background: Tensor
    different: Tensor


def pair_labels(seeds: Tensor, radius: int) -> PairLabels:
    """Compare each pixel's seed with those of its partners at `offsets(radius)`.

    seeds: (B, h, w) integers, 0 background, class index + 1, 255 unknown. The released code leaves out the pairs of the
    pixels near the border; here every pair inside of the image counts.
    """
    size, around = seeds.shape[-2:], offsets(radius)
    found = [torch.zeros(len(seeds), len(around), *size, dtype=torch.bool, device=seeds.device) for _ in range(3)]
    for pair, offset in enumerate(around):
        source = _window(size, *offset)
        first, second = seeds[:, *source], seeds[:, *_window(size, *offset, *offset)]
        known, same = (first != IGNORE) & (second != IGNORE), first == second
        for kind, value in enumerate((known & same & (first > 0), known & same & (first == 0), known & ~same)):
            found[kind][:, pair][:, *source] = value
    return PairLabels(*found)


def _mean(values: Tensor, of: Tensor) -> Tensor:
    return (values * of).sum() / (of.sum().to(values.dtype) + EPSILON)


def pair_loss(boundary: Tensor, displacement: Tensor, labels: PairLabels, radius: int) -> Tensor:
    """Return IRN's loss of a batch, the sum of these means over pairs, each of the last three weighed by a half:

    of -log a over pairs of equal seeds, a quarter each for foreground and background; of -log(1 - a) over pairs of
    different ones; of |D(i) - D(j) - (j - i)| over foreground pairs of one class (both pixels point to one place); of
    |D(i) - D(j)| over background pairs.

    boundary: B (B, h, w) in [0, 1]. displacement: D (B, 2, h, w), (down, right) in cells.
    """
    close = affinity(boundary, radius)
    near, far = -(close + EPSILON).log(), -(1 + EPSILON - close).log()
    same = (_mean(near, labels.foreground) + _mean(near, labels.background)) / 2
    different = _mean(far, labels.different)
    size = boundary.shape[-2:]
    pulled, still = [], []
    for pair, offset in enumerate(offsets(radius)):
        source, target = _window(size, *offset), _window(size, *offset, *offset)
        move = displacement[:, :, *source] - displacement[:, :, *target]
        want = move.new_tensor(offset)[:, None, None]
        pulled.append(((move - want).abs().sum(dim=1) * labels.foreground[:, pair][:, *source]).sum())
        still.append((move.abs().sum(dim=1) * labels.background[:, pair][:, *source]).sum())
    counts = [2 * kind.sum().to(displacement.dtype) + EPSILON for kind in labels[:2]]
    foreground, background = torch.stack(pulled).sum() / counts[0], torch.stack(still).sum() / counts[1]
    return (same + different) / 2 + (foreground + background) / 2


# The network


class IRNOutput(NamedTuple):
    """boundary: logits (B, h, w). displacement: (B, 2, h, w), (down, right) in cells. Both of stride 4."""

    boundary: Tensor
    displacement: Tensor


def _unit(before: int, after: int, groups: int, scale: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(before, after, 1, bias=False), nn.GroupNorm(groups, after)]
    if scale > 1:
        layers.append(nn.Upsample(scale_factor=scale, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers, nn.ReLU(inplace=True))


@register("irn")
class IRN(Trainable):
    """Boundary and displacement branches on the five stages of a frozen ResNet, or EfficientNet, of stride 16.

    backbone: of `wsolnb.backbones`, with `stages`; its weights and statistics stay as they are.
    width: channels a stage gives to the boundary branch; the displacement branch has 2 to 8 times as many. 32 is the
    published size.
    label_radius: largest distance, exclusive, of the pairs that the loss compares, in cells of stride 4.
    """

    learns_from_masks = True

    def __init__(self, backbone: ConvBackbone, width: int = 32, label_radius: int = 10):
        super().__init__()
        self.label_radius = label_radius
        if not isinstance(backbone, ConvBackbone) or backbone.stride != 16:
            problem = f"IRN was given {type(backbone).__name__} of stride {getattr(backbone, 'stride', None)}"
            raise ParameterError(problem, "create_backbone with a ResNet or an EfficientNet, and output_stride=16")
        if width % 4:
            raise ParameterError(f"IRN of width {width}", "choose a multiple of 4")
        self.backbone = backbone.requires_grad_(False)
        channels = backbone.stage_channels()
        scales = (1, 1, 2, 4, 4)
        self.boundary = nn.ModuleList(_unit(c, width, 4, s) for c, s in zip(channels, scales, strict=True))
        self.boundary_out = nn.Conv2d(5 * width, 1, 1)
        wide = 8 * width
        units = zip(
            channels, (2 * width, 4 * width, wide, wide, wide), (8, 16, 16, 16, 16), (1, 1, 1, 2, 2), strict=True
        )
        self.displacement = nn.ModuleList(_unit(*unit) for unit in units)
        self.displacement_join = _unit(3 * wide, wide, 16, 2)
        self.displacement_out = nn.Sequential(_unit(14 * width, wide, 16), nn.Conv2d(wide, 2, 1, bias=False))

    @classmethod
    def create(cls, backbone: ConvBackbone, num_classes: int, **options: Any) -> IRN:
        """Return a network on a backbone; what it learns does not depend on the number of classes."""
        return cls(backbone, **options)

    @property
    def head(self) -> nn.Module:
        """The displacement branch, which the released code trains at ten times the rate of the boundary branch."""
        return nn.ModuleList([self.displacement, self.displacement_join, self.displacement_out])

    def train(self, mode: bool = True) -> IRN:
        """Switch the branches' mode; the backbone's normalisation keeps its statistics."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> IRNOutput:
        """Run both branches on (B, 3, H, W) normalised images; h, w = H / 4, W / 4, rounded up."""
        with torch.no_grad():
            stages = self.backbone.stages(images)
        size = stages[1].shape[-2:]

        def fit(x: Tensor) -> Tensor:  # sides that are no multiple of 16 come out larger
            return x[..., : size[0], : size[1]]

        edges = [fit(unit(x)) for unit, x in zip(self.boundary, stages, strict=True)]
        boundary = self.boundary_out(torch.cat(edges, 1))
        first, second, *deep = (unit(x) for unit, x in zip(self.displacement, stages, strict=True))
        half = deep[0].shape[-2:]
        joined = self.displacement_join(torch.cat([x[..., : half[0], : half[1]] for x in deep], 1))
        displacement = self.displacement_out(torch.cat([first, second, fit(joined)], 1))
        return IRNOutput(boundary[:, 0], displacement)

    def loss(self, forward: Callable[[Tensor], Any], batch: dict[str, Any], label_smoothing: float = 0.0) -> Tensor:
        """Return `pair_loss` of a batch, whose masks are brought to stride 4 by nearest pixel centre."""
        output = forward(batch["image"])
        size = tuple(output.boundary.shape[-2:])
        labels = np.stack([resize_map(sample.mask, size) for sample in batch["samples"]])
        labels = pair_labels(torch.from_numpy(labels).to(output.boundary.device), self.label_radius)
        # Logarithms of affinities near 0 and 1: outside of autocast.
        with torch.autocast(output.boundary.device.type, enabled=False):
            boundary, displacement = output.boundary.float().sigmoid(), output.displacement.float()
            return pair_loss(boundary, displacement, labels, self.label_radius)


def boundaries(model: IRN, images: Tensor) -> Tensor:
    """Return boundary maps (B, h, w) in [0, 1] of (B, 3, H, W): the mean logit of image and mirrored image."""
    model.eval()
    with torch.inference_mode():
        logits = model(torch.cat([images, images.flip(-1)])).boundary.float()
    plain, mirrored = logits.chunk(2)
    return ((plain + mirrored.flip(-1)) / 2).sigmoid()


# Stages, image by image


def irn_labels(found: ClassMaps, image: np.ndarray, config: IRNConfig, refinement: CRFConfig) -> np.ndarray:
    """Return the mask (H, W) that IRN learns from: confident classes and background, 255 elsewhere.

    The seed mask is made at a high and at a low background score, and the CRF refines both, once where they are equal.
    Pixels that are foreground in the first mask are confident foreground. Pixels that are background in *both* masks
    are confident background.
    """
    both = [seed_mask(found.maps, found.classes, threshold) for threshold in (config.foreground, config.background)]
    refined = crf.Refinement(image, refinement)
    high = refined.labels(both[0])
    low = high if np.array_equal(*both) else refined.labels(both[1])
    return np.where((high == 0) & (low != 0), IGNORE, high).astype(np.uint8)


def write_irn_labels(
    seeds: Store, dataset: LocalizationDataset, config: IRNConfig, refinement: CRFConfig, folder: Path,
    workers: int = 1,
) -> None:  # fmt: skip
    """Write `irn_labels` of every image of a data set whose seeds are stored; what is there and whole is kept.

    workers: processes, as of `wsolnb.workers.results`; the masks do not depend on it. Memory of each: one image, its
    maps (K, H, W), the beliefs of the CRF (of twice that size), and its kernel (`crf.Refinement`).
    """
    task = partial(_write_labels, seeds, Store(folder), dataset, config, refinement)
    _write_all(task, Store(folder), dataset, workers)


def _write_labels(
    seeds: Store, labels: Store, dataset: LocalizationDataset, config: IRNConfig, refinement: CRFConfig, index: int
) -> None:
    name, image = dataset.image_ids[index], dataset.read(index, truth=False).image
    labels.write_mask(name, irn_labels(seeds.read_maps(name), image, config, refinement))


def _write_all(task: Callable[[int], None], made: Store, dataset: LocalizationDataset, workers: int) -> None:
    """Call `task(index)` for each image whose mask the store lacks, or holds damaged."""
    left = [(dataset.image_ids[index], index) for index in made.to_do(dataset.image_ids)]
    for _ in results(task, left, workers):
        pass


def boundary_of(model: IRN, image: np.ndarray, image_size: int | None = None) -> Tensor:
    """Return the boundary map (h, w) of an image (H, W, 3), resized to a square of `image_size` unless that is None."""
    if image_size:
        image = resize(Sample(image, "", ()), (image_size, image_size)).image
    device = next(model.parameters()).device
    return boundaries(model, to_tensor(image, model.mean, model.std)[None].to(device))[0]


def seen(boundary: Tensor, size: tuple[int, int], image_size: int | None = None) -> tuple[int, int]:
    """Return the area in pixels of an image of `size` that the cells of its boundary map see: four times the grid."""
    return seen_area(boundary.shape, STRIDE, (image_size, image_size) if image_size else size, size)


def on_grid(maps: np.ndarray, boundary: Tensor, area: tuple[int, int] | None = None) -> Tensor:
    """Return seed maps (K, H, W) on the grid of a boundary map, each by its own maximum, as released.

    area: what the cells see (`seen`); None is the area of the maps. Beyond the maps their last row and column are
    repeated.
    """
    if not len(maps):
        return boundary.new_zeros((0, *boundary.shape))
    small = torch.from_numpy(maps).to(boundary.device)[None]
    if area:
        below, right = (more - own for more, own in zip(area, maps.shape[1:], strict=True))
        small = F.pad(small, (0, right, 0, below), mode="replicate")
    small = F.interpolate(small, size=boundary.shape, mode="bilinear", align_corners=False, antialias=True)[0]
    return small / small.amax(dim=(1, 2), keepdim=True).clamp(min=1e-5)


def walk_steps(
    model: IRN, found: Iterable[ClassMaps], dataset: LocalizationDataset, config: IRNConfig, exp_times: Sequence[int],
    image_size: int | None = None, dampings: Sequence[float] | None = None, workers: int = 1,
) -> Iterator[dict[tuple[float, int], ClassMaps]]:  # fmt: skip
    """Yield each image's maps after 2 ** e steps of the random walk, by damping and e of the ascending `exp_times`.

    The maps have the image's size and values in [0, 1]; the rule of seeds makes masks of them. All walks of an image
    share its boundary and its transition.
    image_size: side of the square that images are resized to before the network; None keeps their size.
    dampings: default the configuration's. workers: processes, as of `wsolnb.workers.results`, of a network on the CPU;
    the maps do not depend on it.
    Memory of each: one image's maps (K, H, W) for each damping and e, and the transition, 24 bytes for each of the
    pairs of cells of stride 4 that are closer than the radius (69 a cell for 5).
    """
    position = {name: index for index, name in enumerate(dataset.image_ids)}
    dampings = (config.damping,) if dampings is None else dampings
    task = partial(_walk, model, dataset, config, exp_times, image_size, dampings)
    named = ((seed.image_id, (position[seed.image_id], seed)) for seed in found)
    yield from results(task, named, _workers_for(model, workers))


def _walk(
    model: IRN, dataset: LocalizationDataset, config: IRNConfig, exp_times: Sequence[int], image_size: int | None,
    dampings: Sequence[float], item: tuple[int, ClassMaps],
) -> dict[tuple[float, int], ClassMaps]:  # fmt: skip
    """Return what `walk_steps` yields for the image at a position of the data set, and its maps."""
    index, seed = item
    boundary = boundary_of(model, dataset.read(index, truth=False).image, image_size)
    size = seed.maps.shape[1:]
    area = seen(boundary, size, image_size)
    maps, result = on_grid(seed.maps, boundary, area), {}
    matrix = transition(boundary, config.radius, config.beta)
    for damping in dampings:
        walked = walks(maps, boundary, config.radius, config.beta, exp_times, damping, matrix)
        for e, scores in zip(exp_times, walked, strict=True):
            result[damping, e] = seed._replace(maps=unit_scores(scores, size, area).cpu().numpy())
    return result


def _workers_for(model: IRN, workers: int) -> int:
    """Return the number of workers; a network on an accelerator, where the walk is fast, stays in this process."""
    return workers if next(model.parameters()).device.type == "cpu" else 1


def write_pseudo_masks(
    model: IRN, seeds: Store, dataset: LocalizationDataset, config: IRNConfig, image_size: int | None, folder: Path,
    workers: int = 1,
) -> None:  # fmt: skip
    """Write the pseudo mask of every image at `config.mask_background`, and the maps after `config.exp_times`.

    Arguments and memory as of `walk_steps`. Images whose mask is there and whole are left out.
    """
    task = partial(_write_pseudo, model, seeds, Store(folder), dataset, config, image_size)
    _write_all(task, Store(folder), dataset, _workers_for(model, workers))


def _write_pseudo(
    model: IRN, seeds: Store, made: Store, dataset: LocalizationDataset, config: IRNConfig, image_size: int | None,
    index: int,
) -> None:  # fmt: skip
    seed = seeds.read_maps(dataset.image_ids[index])
    (found,) = _walk(model, dataset, config, (config.exp_times,), image_size, (config.damping,), (index, seed)).values()
    made.write_maps(found)
    made.write_mask(found.image_id, seed_mask(found.maps, found.classes, config.mask_background))
