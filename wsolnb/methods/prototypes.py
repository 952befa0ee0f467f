"""LPCAM over a whole data set: prototypes of every class, and the maps that they make.

    prototypes = fit_prototypes(source, config, folder)           # goes on by class after an interruption
    for found in seed_maps(source, "lpcam", config, prototypes):  # or "cam", "lpcam-f"
        mask = seed_mask(found.maps, found.classes, threshold=0.3)

`source` is a `FeatureSource` of `wsolnb.methods.features`. Features are read, and maps made, image by image.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from wsolnb.data.store import ClassMaps, Store
from wsolnb.errors import ParameterError, nearest
from wsolnb.files import fingerprint, write_atomically
from wsolnb.methods import lpcam
from wsolnb.methods.features import FeatureSource, Unreadable
from wsolnb.methods.lpcam import Directions, LPCAMConfig

KINDS = ("cam", "lpcam-f", "lpcam")
"""CAM (eq. 1), LPCAM without its context term, LPCAM (eq. 6)."""


class ClassPrototypes(NamedTuple):
    """What is known of one class: its centres, and what the clustering saw.

    foreground, context: centres (K', D). images: number that were clustered. features: (n, m) numbers of local
    features, foreground and context.
    """

    foreground: Tensor
    context: Tensor
    images: int
    features: tuple[int, int]


class _Reservoir:
    """A uniform sample of at most `limit` rows of all that are added (0 = all), drawn by a generator.

    Memory: twice `limit` rows, and those of one image; without a limit all rows, which only a clustering of all needs.
    """

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
) -> ClassPrototypes:
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
            cam = lpcam.cam_of(found.scales, weight, found.size, found.area)
            cam = F.interpolate(cam[None], size=features.shape[1:], mode="nearest")[0, 0]
        else:
            cam = torch.einsum("dhw,d->hw", features, weight[0].to(features)).relu()
        divide = config.split_maximum == "grid"
        split = lpcam.split_local_features(features, cam, config.tau, config.ties, divide)
        for part, rows in zip(parts, split, strict=True):
            part.add(rows.cpu())
        images += 1
    dim = source.weight.shape[1]
    centres = [lpcam.cluster_local_features(part.all(dim), config) for part in parts]
    return ClassPrototypes(*centres, images, tuple(part.seen for part in parts))


CLUSTERING = (
    "clusters", "tau", "ties", "split_cam", "split_maximum", "metric", "algorithm", "start", "tolerance",
    "images_per_class", "replacement", "features_per_class", "seed",
)  # fmt: skip
"""The fields of the configuration that decide the centres; what else differs can share them."""


def fit_prototypes(
    source: FeatureSource, config: LPCAMConfig, folder: str | Path | None = None, unreadable: Unreadable = "stop"
) -> list[ClassPrototypes]:
    """Cluster the local features of every class; one `ClassPrototypes` per class.

    folder: each class is written there as soon as it is done, and read back by a second call, so that an interrupted
        clustering goes on with the next class. A class is clustered again if the settings of `CLUSTERING`, the
        classifier's weights or the list of images have changed.

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


def clustering(config: LPCAMConfig) -> LPCAMConfig:
    """Return a configuration that keeps only the fields that decide the centres: others may share these."""
    return LPCAMConfig(**config.model_dump(include=_asked(config)))


def _asked(config: LPCAMConfig) -> set[str]:
    """Return the fields that decide the centres; where the final CAM splits, its scales and flips are among them."""
    return set(CLUSTERING if config.split_cam == "grid" else (*CLUSTERING, "scales", "flip"))


def _write_prototypes(path: Path, found: ClassPrototypes, key: str) -> None:
    tensors = {"foreground": found.foreground.contiguous(), "context": found.context.contiguous()}
    facts = {"key": key, "images": str(found.images), "features": json.dumps(found.features)}
    write_atomically(path, safetensors_bytes(tensors, metadata=facts))


def _read_prototypes(path: Path, key: str) -> ClassPrototypes | None:
    """Return what was written for this key; None where there is nothing, or something else."""
    try:
        with safe_open(path, framework="pt") as stored:
            facts = stored.metadata() or {}
            if facts.get("key") != key:
                return None
            tensors = [stored.get_tensor(name) for name in ("foreground", "context")]
            return ClassPrototypes(*tensors, int(facts["images"]), tuple(json.loads(facts["features"])))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def directions(
    prototypes: Sequence[ClassPrototypes], weight: Tensor, config: LPCAMConfig, context: bool = True,
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


def directions_by_kind(
    prototypes: Sequence[ClassPrototypes] | None, weight: Tensor, config: LPCAMConfig, kinds: Sequence[str] = KINDS,
    missing: Literal["error", "zero"] = "error",
) -> dict[str, Directions | None]:  # fmt: skip
    """Return what `variant_maps` compares features with, by kind of map (`KINDS`); None for CAM.

    Raises ParameterError for an unknown kind, and without the prototypes that all kinds but `cam` need.
    """
    by_kind: dict[str, Directions | None] = {}
    for kind in kinds:
        if kind not in KINDS:
            raise ParameterError(f"no maps are called {kind!r}{nearest(kind, KINDS)}", f"choose of {', '.join(KINDS)}")
        if kind != "cam" and prototypes is None:
            raise ParameterError("LPCAM's maps need prototypes", "make them with `fit_prototypes`")
        by_kind[kind] = None if kind == "cam" else directions(prototypes, weight, config, kind == "lpcam", missing)
    return by_kind


def variant_maps(
    source: FeatureSource, by_name: Mapping[str, Directions | None], config: LPCAMConfig,
    indices: Iterable[int] | None = None, unreadable: Unreadable = "stop",
) -> Iterator[dict[str, ClassMaps]]:  # fmt: skip
    """Yield, for every image, the maps of its own classes by name, all from one pass over the features.

    by_name: the `directions` of each variant; None stands for CAM. `config` sets scales and flips, also of CAM.
    Memory: one image's maps at a time, variants x K x H x W x 4 bytes, and the source's batch of features.
    Raises DataError as the source does.
    """
    for found in source.images(indices, config.scales, config.flip != "none", unreadable):
        own, result = list(found.labels), {}
        for name, chosen in by_name.items():
            if chosen is None:
                maps = lpcam.cam_of(found.scales, source.weight[own], found.size, found.area)
            else:
                theirs = Directions(*(values[own] for values in chosen))
                maps = lpcam.lpcam_of(found.scales, theirs, found.size, config, found.area)
            result[name] = ClassMaps(found.image_id, found.labels, maps.float().cpu().numpy())
        yield result


def all_seed_maps(
    source: FeatureSource, kinds: Sequence[str], config: LPCAMConfig,
    prototypes: Sequence[ClassPrototypes] | None = None, indices: Iterable[int] | None = None,
    unreadable: Unreadable = "stop", missing: Literal["error", "zero"] = "error",
) -> Iterator[dict[str, ClassMaps]]:  # fmt: skip
    """Yield the maps of every image by kind (`KINDS`), all from one pass over the features.

    `config` says scales and flips, also of CAM. prototypes: needed by all kinds but `cam`.
    Raises ParameterError for an unknown kind and for missing prototypes, DataError as the source does.
    """
    by_name = directions_by_kind(prototypes, source.weight, config, kinds, missing)
    yield from variant_maps(source, by_name, config, indices, unreadable)


def seed_maps(source: FeatureSource, kind: str, config: LPCAMConfig, *args, **options) -> Iterator[ClassMaps]:
    """Yield the maps of one kind; arguments as of `all_seed_maps`."""
    for found in all_seed_maps(source, (kind,), config, *args, **options):
        yield found[kind]


def write_maps(
    source: FeatureSource, by_name: Mapping[str, Directions | None], config: LPCAMConfig, folder: Path
) -> None:
    """Write `variant_maps` of every image, a `Store` below the folder for each name; images already there are left out.

    What is damaged is written again. Memory as of `variant_maps`.
    """
    stores = {name: Store(folder / name) for name in by_name}
    left = sorted({index for store in stores.values() for index in store.to_do(source.image_ids, "maps")})
    for found in variant_maps(source, by_name, config, left):
        for name, image in found.items():
            stores[name].write_maps(image)
