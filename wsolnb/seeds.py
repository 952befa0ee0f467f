"""From any network's local features to seeds: one interface, 'features and classifier weights -> maps -> seed masks'.

    source = LiveFeatures(ConvExtractor(model), dataset)          # or FeatureDump(folder), or your own extractor
    prototypes = fit_prototypes(source, config, folder)           # goes on by class after an interruption
    for found in seed_maps(source, "lpcam", config, prototypes):  # or "cam", "lpcam-f"
        mask = seed_mask(found.maps, found.classes, threshold=0.3)

A source hands out, image by image, local features at every scale, and holds the classifier's weights. That is all that
CAM and LPCAM need, so a host (IRN, AMN, EDAM, MCTformer, ...) is plugged in with an extractor of a few lines, or with
its features dumped to disk.
"""

from __future__ import annotations

import json
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from wsolnb.backbones import normalisation
from wsolnb.data import CONTEXT, DISCRIMINATIVE, IGNORE, REST, LocalizationDataset
from wsolnb.data.loading import IMAGENET_MEAN, IMAGENET_STD, to_tensor
from wsolnb.data.transforms import resize, resize_map
from wsolnb.errors import DataError, MapError, ParameterError, nearest
from wsolnb.files import fingerprint, write_atomically
from wsolnb.methods import lpcam
from wsolnb.methods.cam import CAMClassifier
from wsolnb.methods.lpcam import Directions, LPCAMConfig
from wsolnb.metrics import PartCoverage, SeedScores
from wsolnb.metrics.parts import Coverage
from wsolnb.metrics.segmentation import SeedSegmentation
from wsolnb.notebook.runs import Run

KINDS = ("cam", "lpcam-f", "lpcam")
"""CAM (eq. 1), LPCAM without its context term, LPCAM (eq. 6)."""

Unreadable = Literal["stop", "skip"]
"""What an image that cannot be read does: end the run with its error, or be left out with a warning of its name."""

# ------------------------------------------------------------------------------------------------------- extractors


class Extractor(Protocol):
    """What makes a network a host: a function of images, and the classifier's weights.

    weight: (C, D), the linear classifier behind the pooling.
    """

    weight: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Return local features (B, D, h, w) of normalised images (B, 3, H, W)."""


class ConvExtractor:
    """The final map of a convolutional classifier with a linear (1 x 1) head: `CAMClassifier`."""

    def __init__(self, model: CAMClassifier):
        self.model = model.eval()
        self.mean, self.std = normalisation(model)
        self.weight = model.classifier.weight.detach().float()

    def __call__(self, images: Tensor) -> Tensor:
        """Return the feature map that the pooling sees."""
        return self.model.backbone(images)


class TokenExtractor:
    """The patch tokens of a transformer whose patches are classified: TS-CAM's and MCTformer's heads.

    backbone: returns `patches` (B, N, D) of square grids, as those of `wsolnb.backbones`.
    weight: (C, D), or (C, D, k, k) of a convolution. A prototype is one vector, which a convolution can only be asked
        about as a field of equal vectors: its kernel summed over the positions.
    """

    def __init__(self, backbone: torch.nn.Module, weight: Tensor):
        self.backbone = backbone.eval()
        self.mean, self.std = normalisation(backbone)
        weight = weight.detach().float()
        if weight.ndim not in (2, 4):
            raise ParameterError(f"classifier weights of shape {tuple(weight.shape)}", "give (C, D) or (C, D, k, k)")
        self.weight = weight if weight.ndim == 2 else weight.sum(dim=(2, 3))

    def __call__(self, images: Tensor) -> Tensor:
        """Return the patch tokens on their grid."""
        patches = self.backbone(images).patches
        side = round(patches.shape[1] ** 0.5)
        if side * side != patches.shape[1]:
            raise ParameterError(f"{patches.shape[1]} patch tokens are no square grid", "write an extractor for it")
        return patches.transpose(1, 2).unflatten(2, (side, side))


# ---------------------------------------------------------------------------------------------------------- sources


class ImageFeatures(NamedTuple):
    """Local features of one image.

    image_id, labels: as in the data set. size: (height, width) of the image on disk, in pixels.
    scales: per scale (F, D, h, w) float32: the image and, where there is a second one, its mirror image, mirrored back
    so that both show the same place at the same position.
    """

    image_id: str
    labels: tuple[int, ...]
    size: tuple[int, int]
    scales: list[Tensor]


class FeatureSource(ABC):
    """Images as local features, and the classifier's weights (C, D)."""

    weight: Tensor
    class_names: tuple[str, ...]
    image_ids: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    @abstractmethod
    def images(
        self,
        indices: Iterable[int] | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        unreadable: Unreadable = "stop",
    ) -> Iterator[ImageFeatures]:
        """Yield the features of the images at `indices` (default all), in that order.

        Raises DataError for an image that cannot be read, or warns of it and goes on, as `unreadable` says.
        """  # fmt: skip

    def _guarded(self, indices: Iterable[int] | None, unreadable: Unreadable, read) -> Iterator:
        """Yield `read(index)`, passing over what raises DataError where that is asked for."""
        for index in range(len(self)) if indices is None else indices:
            try:
                found = read(index)
            except DataError as error:
                if unreadable == "stop":
                    raise
                warnings.warn(f"left out {self.image_ids[index]}: {error.problem}", stacklevel=3)
                continue
            yield found


class LiveFeatures(FeatureSource):
    """Features that a network computes when they are asked for.

    dataset: images of any size. image_size: side of the square that each is resized to before `scales`; None keeps an
    image's own size (and goes image by image where sizes differ). Maps are made at the size on disk either way.
    batch_size: images per forward pass.
    """

    def __init__(
        self, extractor: Extractor, dataset: LocalizationDataset, image_size: int | None = None, batch_size: int = 32
    ):
        self.extractor, self.dataset = extractor, dataset
        self.image_size, self.batch_size = image_size, batch_size
        self.weight = extractor.weight
        self.mean = getattr(extractor, "mean", IMAGENET_MEAN)
        self.std = getattr(extractor, "std", IMAGENET_STD)
        self.class_names, self.image_ids, self.labels = dataset.class_names, dataset.image_ids, dataset.labels
        if len(self.weight) != len(self.class_names):
            raise ParameterError(
                f"the classifier has {len(self.weight)} classes, the data set {len(self.class_names)}",
                "use the data set that the classifier was trained on",
            )

    def images(self, indices=None, scales=(1.0,), flip=False, unreadable="stop"):
        """Yield features of the images; see `FeatureSource.images`."""
        held: list[tuple] = []
        for item in self._guarded(indices, unreadable, self._read):
            if held and (len(held) == self.batch_size or item[1].shape != held[0][1].shape):
                yield from self._extract(held, scales, flip)
                held = []
            held.append(item)
        if held:
            yield from self._extract(held, scales, flip)

    def _read(self, index: int) -> tuple[int, Tensor, tuple[int, int]]:
        sample = self.dataset.read(index, truth=False)
        size = sample.size
        if self.image_size:
            sample = resize(sample, (self.image_size, self.image_size))
        return index, to_tensor(sample.image, self.mean, self.std), size

    def _extract(self, held: list[tuple], scales: Sequence[float], flip: bool) -> Iterator[ImageFeatures]:
        batch = torch.stack([image for _, image, _ in held]).to(self.weight.device)
        found = []
        for scale in scales:
            images = batch
            if scale != 1:
                side = [max(1, round(extent * scale)) for extent in batch.shape[2:]]
                images = F.interpolate(batch, size=side, mode="bilinear", align_corners=False, antialias=scale < 1)
            with torch.inference_mode():
                views = [self.extractor(images).float()]
                if flip:
                    views.append(self.extractor(images.flip(3)).float().flip(3))
            found.append(torch.stack(views, dim=1))
        for row, (index, _, size) in enumerate(held):
            yield ImageFeatures(self.image_ids[index], self.labels[index], size, [values[row] for values in found])


class FeatureDump(FeatureSource):
    """Features of any host, dumped to a folder: what `write_dump` writes, or another program.

    `index.json`: {"class_names": [...], "scales": [1.0, ...], "flip": bool, "images": [{"id", "labels", "size"}, ...]},
    `weight.npy` (C, D), and of each image `<id>.npz` with one array (F, D, h, w) per scale, named `scale_0`, ...

    Raises DataError when index or weights are missing or damaged.
    """

    REMEDY = "write the folder with `write_dump`, or as its documentation says"

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / "index.json").read_text())
            self.weight = torch.from_numpy(np.load(self.folder / "weight.npy", allow_pickle=False)).float()
            self.class_names = tuple(index["class_names"])
            self.image_ids = tuple(str(image["id"]) for image in index["images"])
            self.labels = tuple(tuple(sorted(image["labels"])) for image in index["images"])
            self._sizes = [tuple(image["size"]) for image in index["images"]]
            self.scales, self.flip = tuple(index["scales"]), bool(index["flip"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.folder} is no feature dump: {error}", self.REMEDY) from error

    def images(self, indices=None, scales=(1.0,), flip=False, unreadable="stop"):
        """Yield the dumped features; ParameterError when a scale or mirror image was not dumped."""
        lacking = [scale for scale in scales if scale not in self.scales]
        if lacking or (flip and not self.flip):
            raise ParameterError(
                f"{self.folder} holds scales {list(self.scales)}, mirrored: {self.flip}; asked for: {list(scales)}, "
                f"mirrored: {flip}",
                "ask for what was dumped, or dump it",
            )
        names = [f"scale_{self.scales.index(scale)}" for scale in scales]

        def read(index: int) -> ImageFeatures:
            path = self.folder / f"{self.image_ids[index]}.npz"
            try:
                with np.load(path, allow_pickle=False) as stored:
                    arrays = [torch.from_numpy(stored[name]).float()[: 2 if flip else 1] for name in names]
            except (OSError, ValueError, KeyError, EOFError) as error:
                raise DataError(f"cannot read {path}: {error}", self.REMEDY) from error
            return ImageFeatures(self.image_ids[index], self.labels[index], self._sizes[index], arrays)

        yield from self._guarded(indices, unreadable, read)


def write_dump(
    source: FeatureSource, folder: str | Path, scales: Sequence[float] = (1.0,), flip: bool = False,
    dtype: np.typing.DTypeLike = np.float16, unreadable: Unreadable = "stop",
) -> FeatureDump:  # fmt: skip
    """Write the features of a source to a folder and return it as a source; images left out are not in its index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for found in source.images(None, scales, flip, unreadable):
        arrays = {f"scale_{i}": values.cpu().numpy().astype(dtype) for i, values in enumerate(found.scales)}
        path = folder / f"{found.image_id}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)
        written.append({"id": found.image_id, "labels": list(found.labels), "size": list(found.size)})
    np.save(folder / "weight.npy", source.weight.cpu().numpy())
    index = {"class_names": source.class_names, "scales": list(scales), "flip": flip, "images": written}
    write_atomically(folder / "index.json", json.dumps(index))
    return FeatureDump(folder)


# ------------------------------------------------------------------------------------------------------- prototypes


class Prototypes(NamedTuple):
    """What is known of one class: its centres, and what the clustering saw.

    foreground, context: centres (K', D). images: number that were clustered. features: (n, m) numbers of local
    features, foreground and context.
    """

    foreground: Tensor
    context: Tensor
    images: int
    features: tuple[int, int]


class _Reservoir:
    """A uniform sample of at most `limit` rows of all that are added (0 = all), drawn by a generator."""

    def __init__(self, limit: int, rng: np.random.Generator):
        self.limit, self.rng, self.seen = limit, rng, 0
        self.rows: list[Tensor] = []
        self.keys: list[np.ndarray] = []

    def add(self, rows: Tensor) -> None:
        self.seen += len(rows)
        self.rows.append(rows.clone())
        if self.limit:
            # The rows with the smallest keys are kept: a uniform sample of any stream.
            self.keys.append(self.rng.random(len(rows)))
            if sum(map(len, self.rows)) > 2 * self.limit:
                self._shrink()

    def _shrink(self) -> None:
        keys = np.concatenate(self.keys)
        kept = np.sort(np.argsort(keys, kind="stable")[: self.limit])
        self.rows, self.keys = [torch.cat(self.rows)[torch.from_numpy(kept)]], [keys[kept]]

    def all(self, dim: int) -> Tensor:
        if self.limit and self.rows:
            self._shrink()
        return torch.cat(self.rows) if self.rows else torch.zeros(0, dim)


def class_images(source: FeatureSource, class_index: int, config: LPCAMConfig) -> list[int]:
    """Return the images whose features of a class are clustered, as `config.images_per_class` says."""
    members = [i for i, labels in enumerate(source.labels) if class_index in labels]
    count = config.images_per_class
    if not members or not count or (not config.replacement and count >= len(members)):
        return members
    rng = np.random.default_rng((config.seed, class_index))
    return sorted(rng.choice(members, count, replace=config.replacement).tolist())


def fit_class(
    source: FeatureSource, class_index: int, config: LPCAMConfig, unreadable: Unreadable = "stop"
) -> Prototypes:
    """Split the local features of a class's images by CAM and cluster both parts (eq. 2)."""
    rng = np.random.default_rng((config.seed, class_index, 1))
    parts = [_Reservoir(config.features_per_class, rng) for _ in range(2)]
    weight = source.weight[class_index : class_index + 1]
    final = config.split_cam == "final"
    scales, flip = (config.scales, config.flip != "none") if final else ((1.0,), False)
    images = 0
    for found in source.images(class_images(source, class_index, config), scales, flip, unreadable):
        features = found.scales[0][0]
        if final:
            cam = lpcam.cam_of(found.scales, weight, found.size)
            cam = F.interpolate(cam[None], size=features.shape[1:], mode="nearest")[0, 0]
        else:
            cam = torch.einsum("dhw,d->hw", features, weight[0].to(features)).relu()
        for part, rows in zip(parts, lpcam.split_local_features(features, cam, config.tau, config.ties), strict=True):
            part.add(rows.cpu())
        images += 1
    dim = source.weight.shape[1]
    centres = [lpcam.cluster_local_features(part.all(dim), config) for part in parts]
    return Prototypes(*centres, images, tuple(part.seen for part in parts))


CLUSTERING = (
    "clusters", "tau", "ties", "split_cam", "metric", "algorithm", "start", "tolerance", "images_per_class",
    "replacement", "features_per_class", "seed",
)  # fmt: skip
"""The fields of the configuration that decide the centres; what else differs can share them."""


def fit_prototypes(
    source: FeatureSource, config: LPCAMConfig, folder: str | Path | None = None, unreadable: Unreadable = "stop"
) -> list[Prototypes]:
    """Cluster the local features of every class; one `Prototypes` per class.

    folder: each class is written there as soon as it is done, and read back by a second call, so that an interrupted
        clustering goes on with the next class. What was made with other settings of `CLUSTERING`, another classifier
        (told by its weights) or list of images is made again.

    A class without images has no centres; `directions` says what becomes of it.
    """
    asked = config.model_dump(include=_asked(config))
    key = fingerprint([asked, source.image_ids, source.labels, source.weight.double().sum(dim=0).cpu()])
    result = []
    for index in range(len(source.weight)):
        path = Path(folder) / f"class_{index:03d}.safetensors" if folder else None
        found = _read_prototypes(path, key) if path else None
        if found is None:
            found = fit_class(source, index, config, unreadable)
            if path:
                _write_prototypes(path, found, key)
        result.append(found)
    return result


def cached_prototypes(
    run: Run, name: str, classifier: Path, source: FeatureSource, config: LPCAMConfig
) -> tuple[list[Prototypes], Path]:
    """Return the prototypes of a trained classifier's features, and their folder; clustered once per run folder.

    name: how the artefact is called in the run folder. classifier: the classifier's checkpoint folder, whose name holds
    the hash of all that it depends on.
    """
    inputs = {"classifier": classifier.name, "clustering": config.model_dump(include=_asked(config))}
    inputs |= {"images": fingerprint(source.image_ids), "labels": fingerprint(source.labels)}
    code = [lpcam, sys.modules[__name__]]
    folder = run.cached(name, inputs, code, lambda folder: fit_prototypes(source, config, folder))
    return fit_prototypes(source, config, folder), folder


def _asked(config: LPCAMConfig) -> set[str]:
    """Return the fields that decide the centres; where the final CAM splits, its scales and flips are among them."""
    return set(CLUSTERING if config.split_cam == "grid" else (*CLUSTERING, "scales", "flip"))


def _write_prototypes(path: Path, found: Prototypes, key: str) -> None:
    tensors = {"foreground": found.foreground.contiguous(), "context": found.context.contiguous()}
    facts = {"key": key, "images": str(found.images), "features": json.dumps(found.features)}
    write_atomically(path, safetensors_bytes(tensors, metadata=facts))


def _read_prototypes(path: Path, key: str) -> Prototypes | None:
    """Return what was written for this key; None where there is nothing, or something else."""
    try:
        with safe_open(path, framework="pt") as stored:
            facts = stored.metadata() or {}
            if facts.get("key") != key:
                return None
            tensors = [stored.get_tensor(name) for name in ("foreground", "context")]
            return Prototypes(*tensors, int(facts["images"]), tuple(json.loads(facts["features"])))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def directions(
    prototypes: Sequence[Prototypes], weight: Tensor, config: LPCAMConfig, context: bool = True,
    missing: Literal["error", "zero"] = "error",
) -> Directions:  # fmt: skip
    """Select the prototypes of every class (eq. 3 and 4) and return what a map compares features with.

    context: subtract the context term (LPCAM), or not (LPCAM-F).
    missing: what a class without foreground features (without images) does: raise, or give maps of zero.
    Raises ParameterError for such a class, and where `config.none_left` says so.
    """
    rows, has_context = [], []
    for index, found in enumerate(prototypes):
        if not len(found.foreground) and missing == "zero":
            rows.append(weight.new_zeros(weight.shape[1]))
            has_context.append(False)
            continue
        chosen = lpcam.select_prototypes(found.foreground.to(weight), weight, index, config)
        kept = lpcam.select_prototypes(found.context.to(weight), weight, index, config, context=True)
        rows.append(lpcam.direction(chosen, kept if context else None))
        has_context.append(context and len(kept) > 0)
    return Directions(torch.stack(rows), torch.tensor(has_context, device=weight.device))


# ------------------------------------------------------------------------------------------------------------- maps


class SeedMaps(NamedTuple):
    """Maps of one image: image_id; classes (K,) 0-based, its labels; maps (K, H, W) float32 in [0, 1]; K may be 0."""

    image_id: str
    classes: tuple[int, ...]
    maps: np.ndarray


def variant_maps(
    source: FeatureSource,
    by_name: Mapping[str, Directions | None],
    config: LPCAMConfig,
    indices: Iterable[int] | None = None,
    unreadable: Unreadable = "stop",
) -> Iterator[dict[str, SeedMaps]]:
    """Yield, for every image, the maps of its own classes by name, all from one pass over the features.

    by_name: the `directions` of each variant; None stands for CAM. `config` says scales and flips, also of CAM.
    Raises DataError as the source does.
    """
    for found in source.images(indices, config.scales, config.flip != "none", unreadable):
        own, result = list(found.labels), {}
        for name, chosen in by_name.items():
            if chosen is None:
                maps = lpcam.cam_of(found.scales, source.weight[own], found.size)
            else:
                theirs = Directions(*(values[own] for values in chosen))
                maps = lpcam.lpcam_of(found.scales, theirs, found.size, config)
            result[name] = SeedMaps(found.image_id, found.labels, maps.float().cpu().numpy())
        yield result


def all_seed_maps(
    source: FeatureSource,
    kinds: Sequence[str],
    config: LPCAMConfig,
    prototypes: Sequence[Prototypes] | None = None,
    indices: Iterable[int] | None = None,
    unreadable: Unreadable = "stop",
    missing: Literal["error", "zero"] = "error",
) -> Iterator[dict[str, SeedMaps]]:
    """Yield the maps of every image by kind (`KINDS`), all from one pass over the features.

    `config` says scales and flips, also of CAM. prototypes: needed by all kinds but `cam`.
    Raises ParameterError for an unknown kind and for missing prototypes, DataError as the source does.
    """
    by_name: dict[str, Directions | None] = {}
    for kind in kinds:
        if kind not in KINDS:
            raise ParameterError(f"no maps are called {kind!r}{nearest(kind, KINDS)}", f"choose of {', '.join(KINDS)}")
        if kind != "cam" and prototypes is None:
            raise ParameterError("LPCAM's maps need prototypes", "make them with `fit_prototypes`")
        chosen = None if kind == "cam" else directions(prototypes, source.weight, config, kind == "lpcam", missing)
        by_name[kind] = chosen
    yield from variant_maps(source, by_name, config, indices, unreadable)


def seed_maps(source: FeatureSource, kind: str, config: LPCAMConfig, *args, **options) -> Iterator[SeedMaps]:
    """Yield the maps of one kind; arguments as of `all_seed_maps`."""
    for found in all_seed_maps(source, (kind,), config, *args, **options):
        yield found[kind]


def seed_mask(maps: np.ndarray, classes: Sequence[int], threshold: float) -> np.ndarray:
    """Return the seed mask (H, W) uint8: 0 background, class index + 1; the rule of `metrics.SeedScores`.

    maps: (K, H, W) in [0, 1], one per class; K = 0 gives background. A pixel belongs to the class of its highest map
    where that exceeds the threshold; the first of equal ones.
    """
    if maps.ndim != 3 or len(maps) != len(classes):
        raise MapError(f"maps of shape {maps.shape} for {len(classes)} classes", "pass one map per class: (K, H, W)")
    if not len(maps):
        return np.zeros(maps.shape[1:], np.uint8)
    best = maps.argmax(axis=0)
    values = np.asarray(classes, np.uint8)[best] + np.uint8(1)
    return np.where(maps.max(axis=0) > np.float32(threshold), values, 0).astype(np.uint8)


def write_seeds(found: Iterable[SeedMaps], folder: str | Path, threshold: float) -> int:
    """Write maps (`<id>.npz`: `maps` (K, H, W) float16, `classes`) and seed masks (`<id>.png`); return their number."""
    folder, count = Path(folder), 0
    for image in found:
        path = folder / f"{image.image_id}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, maps=image.maps.astype(np.float16), classes=np.array(image.classes, np.int64))
        Image.fromarray(seed_mask(image.maps, image.classes, threshold)).save(folder / f"{image.image_id}.png")
        count += 1
    return count


def read_seeds(folder: str | Path, image_id: str) -> SeedMaps:
    """Return the maps that `write_seeds` wrote of an image; DataError when they are missing or damaged."""
    path = Path(folder) / f"{image_id}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return SeedMaps(image_id, tuple(stored["classes"].tolist()), stored["maps"].astype(np.float32))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}", "write the seeds again with `write_seeds`") from error


# ----------------------------------------------------------------------------------------------------------- scores

THRESHOLDS = np.round(np.arange(0, 1, 0.01), 2)
"""The 100 thresholds that seed maps are judged at."""


class SeedEvaluation(NamedTuple):
    """What the maps of one kind scored.

    segmentation: of the seed masks at every threshold. parts: coverage of head, rest and context, per class map and
    then averaged; None where the data set has no part maps.
    """

    segmentation: SeedSegmentation
    parts: Coverage | None


def evaluate(
    found: Iterable[dict[str, SeedMaps]],
    dataset: LocalizationDataset,
    thresholds: Sequence[float] = THRESHOLDS,
    parts: bool = True,
) -> dict[str, SeedEvaluation]:
    """Score maps by kind against the masks of a data set, in one streaming pass; images without a mask are left out.

    parts: measure part coverage too, where there are part maps; it takes most of the time.
    Of single-label data sets the mask of the object counts as the image's class. In part coverage other classes'
    objects are not counted, so that `context` is background.
    Raises MapError when no image has a mask.
    """
    position = {name: index for index, name in enumerate(dataset.image_ids)}
    scores: dict[str, SeedScores] = {}
    coverage: dict[str, PartCoverage] = {}
    for by_kind in found:
        sample = dataset[position[next(iter(by_kind.values())).image_id]]
        if sample.mask is None:
            continue
        mask = sample.mask
        if not dataset.multi_label:
            mask = np.where((mask > 0) & (mask != IGNORE), sample.label + 1, mask).astype(np.uint8)
        for kind, image in by_kind.items():
            if kind not in scores:
                scores[kind] = SeedScores(len(dataset.class_names) + 1, thresholds)
            scores[kind].update(image.maps, image.classes, mask)
            if not parts or sample.parts is None:
                continue
            for score_map, label in zip(image.maps, image.classes, strict=True):
                own = np.where((mask == 0) | (mask == label + 1), sample.parts, IGNORE).astype(np.uint8)
                coverage.setdefault(kind, PartCoverage(thresholds)).update(score_map, own)
    if not scores:
        raise MapError("no image has a mask to be judged by", "use a split with masks")
    return {
        kind: SeedEvaluation(score.compute(), coverage[kind].compute() if kind in coverage else None)
        for kind, score in scores.items()
    }


def scored(validation: SeedEvaluation, test: SeedEvaluation, fixed: float = 0.3) -> dict[str, float]:
    """Return a row of test scores: at the threshold of the highest validation mIoU, at a fixed one, and coverage.

    miou, fp, fn, precision, recall: at the validation threshold, `threshold`. miou_fixed: at `fixed`. oracle: the mIoU
    at the test images' own best threshold. covers_*: shares of the parts above the validation threshold.
    """
    threshold = validation.segmentation.best()[0]
    curve = test.segmentation.curve
    row = {"threshold": threshold} | curve.at(threshold)
    row |= {"miou_fixed": curve.at(fixed)["miou"], "oracle": curve.best("miou")[1]}
    if test.parts is not None:
        shares = test.parts.at(threshold)
        row |= {f"covers_{name}": shares[name] for name in ("discriminative", "rest", "context") if name in shares}
    return row


REGIONS = {"head": DISCRIMINATIVE, "rest": REST, "context": CONTEXT}
"""Parts of a class's objects, and the background of their images."""


class RegionFeatures(NamedTuple):
    """Local features by class and region (`REGIONS`), averaged: raw, and scaled to length one; each (C, 3, D) float64.

    NaN where a class has no cell of a region.
    """

    raw: Tensor
    unit: Tensor

    def similarity(self) -> dict[str, float]:
        """Return the mean cosine of two local features by pair of regions (`head, rest`), averaged over classes."""
        names = list(REGIONS)
        pairs = [(i, j) for i in range(len(names)) for j in range(i, len(names))]
        # The mean of all cosines between two sets is the product of their mean unit vectors.
        products = {(i, j): (self.unit[:, i] * self.unit[:, j]).sum(dim=1) for i, j in pairs}
        return {f"{names[i]}, {names[j]}": float(value.nanmean()) for (i, j), value in products.items()}


def region_features(source: FeatureSource, dataset: LocalizationDataset) -> RegionFeatures:
    """Average a source's local features over the true regions of each class: an analysis, not a step of the method.

    A cell belongs to the region of the pixel at its centre.
    Raises MapError when the data set has no masks or no part maps.
    """
    shape = (len(source.weight), len(REGIONS), source.weight.shape[1])
    raw, unit = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    counts = torch.zeros(*shape[:2], 1, dtype=torch.float64)
    position = {name: index for index, name in enumerate(dataset.image_ids)}
    for found in source.images():
        sample = dataset[position[found.image_id]]
        if sample.mask is None or sample.parts is None:
            raise MapError(f"{found.image_id} has no mask or no part map", "use the rendered benchmark")
        features = found.scales[0][0].double().cpu()
        mask, parts = (torch.from_numpy(resize_map(m, features.shape[1:])) for m in (sample.mask, sample.parts))
        for label in found.labels:
            for row, value in enumerate(REGIONS.values()):
                inside = features[:, (parts == value) & (mask == (0 if value == CONTEXT else label + 1))]
                raw[label, row] += inside.sum(dim=1)
                unit[label, row] += F.normalize(inside, dim=0).sum(dim=1)
                counts[label, row] += inside.shape[1]
    return RegionFeatures(raw / counts, unit / counts)
