"""Any network as a host: local features of images at every scale, and the weights of the classifier behind them.

    source = LiveFeatures(ConvExtractor(model), dataset)          # or FeatureDump(folder), or your own extractor
    for found in source.images(scales=(1.0, 0.5), flip=True):
        found.scales[0]                                            # (2, D, h, w): the image, and its mirror image

A source yields one image at a time. CAM and LPCAM need no more, so a host (IRN, AMN, EDAM, MCTformer, ...) is plugged
in with an extractor of a few lines, or with its features dumped to disk.
"""

from __future__ import annotations

import io
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wsolnb.backbones import normalisation
from wsolnb.data.base import LocalizationDataset
from wsolnb.data.loading import IMAGENET_MEAN, IMAGENET_STD, to_tensor
from wsolnb.data.store import read_arrays
from wsolnb.data.transforms import resize
from wsolnb.errors import DataError, ParameterError
from wsolnb.files import inside, write_atomically
from wsolnb.maps import seen_area
from wsolnb.methods.base import LocalizationModel

Unreadable = Literal["stop", "skip"]
"""What to do with an image that cannot be read: end the run with its error, or leave it out with a warning that names
it."""


class Extractor(Protocol):
    """What makes a network a host: a function of images, and the classifier's weights.

    weight: (C, D), the linear classifier behind the pooling. An extractor may also have `mean` and `std` of the images
    that it takes. It has `stride`, pixels per cell, if it takes images that the stride does not divide. If it has
    `takes_labels`, it is also called with the images' labels, (B, C) of 0 and 1.
    """

    weight: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Return local features (B, D, h, w) of normalised images (B, 3, H, W)."""


class ConvExtractor:
    """The final map of a convolutional classifier with a linear (1 x 1) head: `CAMClassifier`.

    weight: (C, D), what judges that map; None = the weights of the head.
    """

    def __init__(self, model: LocalizationModel, weight: Tensor | None = None):
        self.model = model.eval()
        self.mean, self.std = normalisation(model)
        self.weight = model.classifier.weight.detach().float() if weight is None else weight
        self.stride = model.backbone.stride

    def __call__(self, images: Tensor) -> Tensor:
        """Return the feature map that the pooling sees."""
        return self.model.backbone(images)


class OwnMaps(ConvExtractor):
    """What AMN or EDAM itself draws of every class, as local features: with unit weights CAM is the host's own map."""

    takes_labels = True

    def __init__(self, model: LocalizationModel):
        super().__init__(model, torch.eye(model.num_classes, device=next(model.parameters()).device))

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the maps (B, C, h, w), >= 0, of images that have the classes `labels` (B, C)."""
        return self.model.class_maps(images, labels)


class TokenExtractor:
    """The patch tokens of a transformer whose patches are classified: TS-CAM's and MCTformer's heads.

    backbone: returns `patches` (B, N, D) of square grids, as those of `wsolnb.backbones`.
    weight: (C, D), or (C, D, k, k) of a convolution. A prototype is one vector. The convolution sees it as a field of
        equal vectors, so the classifier is the kernel summed over its positions.
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
    so that both show the same place at the same position (where the stride does not divide the width, to within the
    part of the last cell that is outside, as released).
    area: (height, width) in the same pixels that the cells see at the first scale (`maps.seen_area`); None is `size`.
    """

    image_id: str
    labels: tuple[int, ...]
    size: tuple[int, int]
    scales: list[Tensor]
    area: tuple[int, int] | None = None


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
        self, indices: Iterable[int] | None = None, scales: Sequence[float] = (1.0,), flip: bool = False,
        unreadable: Unreadable = "stop",
    ) -> Iterator[ImageFeatures]:  # fmt: skip
        """Yield the features of the images at `indices` (default all), in that order.

        Raises DataError for an image that cannot be read, or warns of it and goes on, as `unreadable` says.
        """

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
    batch_size: images per forward pass. Memory: the features of one batch, F x D x h x w x 4 bytes of each image and
    scale.
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
            problem = f"the classifier has {len(self.weight)} classes, the data set {len(self.class_names)}"
            raise ParameterError(problem, "use the data set that the classifier was trained on")

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
        known = []
        if getattr(self.extractor, "takes_labels", False):
            known.append(batch.new_zeros(len(held), len(self.weight)))
            for row, (index, _, _) in zip(known[0], held, strict=True):
                row[list(self.labels[index])] = 1
        found = []
        for scale in scales:
            images = batch
            if scale != 1:
                side = [max(1, round(extent * scale)) for extent in batch.shape[2:]]
                images = F.interpolate(batch, size=side, mode="bilinear", align_corners=False, antialias=scale < 1)
            with torch.inference_mode():
                views = [self.extractor(images, *known).float()]
                if flip:
                    views.append(self.extractor(images.flip(3), *known).float().flip(3))
            found.append(torch.stack(views, dim=1))
        cells, stride = found[0].shape[-2:], getattr(self.extractor, "stride", None)
        for row, (index, _, size) in enumerate(held):
            own, area = [values[row] for values in found], None
            if stride:
                area = seen_area(cells, stride, batch.shape[2:], size)
            yield ImageFeatures(self.image_ids[index], self.labels[index], size, own, area)


class FeatureDump(FeatureSource):
    """Features of any host, dumped to a folder by `write_dump` or by another program.

    `index.json`: {"class_names": [...], "scales": [1.0, ...], "flip": bool, "images": [{"id", "labels", "size"}, ...]},
    each image with its "area" where the cells see more than the image; `weight.npy` (C, D), and of each image
    `<id>.npz` with one array (F, D, h, w) per scale, named `scale_0`, ...

    Raises DataError when index or weights are missing or damaged, and for an id that leads out of the folder.
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
            self._areas = [tuple(image.get("area") or image["size"]) for image in index["images"]]
            self.scales, self.flip = tuple(index["scales"]), bool(index["flip"])
            if self.weight.ndim != 2 or len(self.weight) != len(self.class_names):
                raise ValueError(f"weights of shape {tuple(self.weight.shape)} for {len(self.class_names)} classes")
            if unknown := {label for own in self.labels for label in own}.difference(range(len(self.class_names))):
                raise ValueError(f"the labels {unknown} of {len(self.class_names)} classes")
        except Exception as error:  # a file of another program may hold anything
            problem = f"{self.folder} is no feature dump: {type(error).__name__}: {error}"
            raise DataError(problem, self.REMEDY) from error
        for image_id in self.image_ids:
            inside(self.folder, image_id, ".npz")

    def images(self, indices=None, scales=(1.0,), flip=False, unreadable="stop"):
        """Yield the dumped features; ParameterError when a scale or mirror image was not dumped."""
        if not set(scales) <= set(self.scales) or (flip and not self.flip):
            has = f"{self.folder} holds scales {list(self.scales)}, mirrored: {self.flip}"
            problem = f"{has}; asked for: {list(scales)}, mirrored: {flip}"
            raise ParameterError(problem, "ask for what was dumped, or dump it")
        names = [f"scale_{self.scales.index(scale)}" for scale in scales]

        def read(index: int) -> ImageFeatures:
            path = inside(self.folder, self.image_ids[index], ".npz")
            arrays = []
            for name, values in zip(names, read_arrays(path, names, self.REMEDY), strict=True):
                numbers = values.dtype.kind in "fiu" and values.ndim == 4
                if not numbers or len(values) < 1 + flip or values.shape[1] != self.weight.shape[1]:
                    wanted = f"not numbers ({1 + flip} or more views, {self.weight.shape[1]}, h, w)"
                    raise DataError(f"{path} holds {name}: {values.dtype} {values.shape}, {wanted}", self.REMEDY)
                arrays.append(torch.from_numpy(values[: 2 if flip else 1]).float())
            named = self.image_ids[index], self.labels[index], self._sizes[index]
            return ImageFeatures(*named, arrays, self._areas[index])

        yield from self._guarded(indices, unreadable, read)


def write_dump(
    source: FeatureSource, folder: str | Path, scales: Sequence[float] = (1.0,), flip: bool = False,
    dtype: np.typing.DTypeLike = np.float16, unreadable: Unreadable = "stop",
) -> FeatureDump:  # fmt: skip
    """Write the features of a source to a folder and return it as a source; images left out are not in its index."""
    folder, written = Path(folder), []
    for found in source.images(None, scales, flip, unreadable):
        arrays = {f"scale_{i}": values.cpu().numpy().astype(dtype) for i, values in enumerate(found.scales)}
        np.savez(file := io.BytesIO(), **arrays)
        write_atomically(inside(folder, found.image_id, ".npz"), file.getvalue(), lasting=False)
        facts = {"id": found.image_id, "labels": list(found.labels), "size": list(found.size)}
        written.append(facts | ({"area": list(found.area)} if found.area else {}))
    np.save(file := io.BytesIO(), source.weight.cpu().numpy())
    write_atomically(folder / "weight.npy", file.getvalue())
    index = {"class_names": source.class_names, "scales": list(scales), "flip": flip, "images": written}
    write_atomically(folder / "index.json", json.dumps(index))
    return FeatureDump(folder)
