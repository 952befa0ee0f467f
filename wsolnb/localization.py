"""Where is the object that a network names, in images of your own? One function for every method.

    model = CAMClassifier.published("efficientnet_lite0")
    for found in localize(["cat.jpg", "dog.jpg"], model, method="lpcam"):
        found.names, found.probabilities, found.boxes   # the class that is looked for, and where it is

A threshold belongs to one network and to one kind of images. If some of your images have boxes or masks, choose it on
those (`wsolnb.metrics`). The defaults here are guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wsolnb.backbones import Backbone
from wsolnb.data.base import Derived
from wsolnb.data.loading import to_tensor
from wsolnb.data.pictures import Picture, Pictures
from wsolnb.data.sample import IGNORE, Sample
from wsolnb.data.transforms import resize
from wsolnb.errors import DataError, MapError, ParameterError, check_choice, nearest
from wsolnb.maps import enlarge, upsample
from wsolnb.methods.base import LocalizationModel
from wsolnb.methods.cam import CAMClassifier
from wsolnb.methods.features import ConvExtractor, LiveFeatures
from wsolnb.methods.lpcam import LPCAMConfig
from wsolnb.methods.prototypes import directions, fit_prototypes, variant_maps
from wsolnb.metrics import boxes_from_score_map
from wsolnb.metrics.boxes import TSCAM, foreground_levels
from wsolnb.metrics.checks import check_thresholds

LONGER_SIDE = 320
"""Pixels of an image's longer side as a convolutional network sees it. This is near the 224 that ImageNet's networks
were trained with, and gives a finer map."""

THRESHOLD, LPCAM_THRESHOLD = 0.3, 0.5
"""Share of a map's maximum above which a pixel belongs to the object; higher for LPCAM, whose maps are wider."""

MANY = 100
"""Number of classes from which on few regions score above LPCAM's `mu_f` of 0.9."""


class Localized(NamedTuple):
    """What was found in one image of H x W pixels, for K classes.

    name: of the image. image: (H, W, 3) uint8, upright.
    ranking: (name of a class, probability), from most to least likely; empty for a model that draws a map alone.
    classes, names, probabilities: of the K classes that were looked for. A model that only draws a map has no
    probability; 1 stands in its place.
    maps: (K, H, W) float32 in [0, 1]. boxes: of each class (n, 4) int32, half-open `x0, y0, x1, y1` in pixels of the
    image; n is 1, or 0 where the map is empty at the threshold. mask: (H, W) uint8: 0 is background, and k is the class
    `classes[k - 1]`. Among the classes whose map is above the threshold, the one with the highest map counts.
    """

    name: str
    image: np.ndarray
    ranking: tuple[tuple[str, float], ...]
    classes: tuple[int, ...]
    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    maps: np.ndarray
    boxes: tuple[np.ndarray, ...]
    mask: np.ndarray


def localize(
    images: Picture | Iterable[Picture], model: LocalizationModel, *, method: str | None = None,
    classes: Sequence[str | int] | None = None, threshold: float | None = None, image_size: int | None = None,
    skipped: Callable[[DataError], None] | None = None,
) -> Iterator[Localized]:  # fmt: skip
    """Yield for each image its likely classes, and map, box and mask of the classes that are looked for.

    images: paths, arrays (H, W), (H, W, 3) or (H, W, 4), or images of Pillow; one, or several.
    model: any localization model, such as `CAMClassifier.published("efficientnet_lite0")` or `CAMClassifier.of` your
        own network. It runs on the device it is on.
    method: one of `model.maps` (default: the first), or `lpcam` of a `CAMClassifier`, whose prototypes are clustered
        from these images, class by class.
    classes: names or indices; default each image's most likely class. LPCAM assumes that all images show these classes.
    threshold: in [0, 1], a share of the map's maximum; default 0.3, and 0.5 for LPCAM.
    image_size: side of the square that the network sees. By default a transformer sees its own size, and a
        convolutional network sees the image in its own proportions.
    skipped: called with the error of an image that cannot be read; the image is left out. Default: the error is raised.

    Raises ParameterError for an unknown method or class, a threshold out of range or no image; DataError for an image
    that cannot be read; MapError if the network returns NaN.
    """
    pictures = Pictures([images] if isinstance(images, (str, np.ndarray, Image.Image)) or _is_path(images) else images)
    if not len(pictures):
        raise ParameterError("no image was given", "give at least one path, array or image of Pillow")
    method = method or model.maps[0]
    check_choice(f"{type(model).__name__} has no map", method, (*model.maps, "lpcam"))
    if method == "lpcam" and not isinstance(model, CAMClassifier):
        problem = f"LPCAM of a {type(model).__name__}, which has no linear classifier of a final map"
        raise ParameterError(problem, "give a CAMClassifier, such as CAMClassifier.published('efficientnet_lite0')")
    if method == "proxy" and model.decoder is None:
        raise ParameterError("a PPD of the probe alone draws no map", "give the checkpoint of its decoder")
    if threshold is None:
        threshold = LPCAM_THRESHOLD if method == "lpcam" else THRESHOLD
    (threshold,) = check_thresholds([threshold])
    wanted = None if classes is None else find_classes(classes, model.class_names)
    looked = (_lpcam_maps if method == "lpcam" else _own_maps)(
        _Look(model.eval(), method, wanted, image_size, skipped), pictures
    )
    return (_localized(seen, maps, threshold) for seen, maps in looked)


def find_classes(classes: Sequence[str | int], class_names: Sequence[str]) -> tuple[int, ...]:
    """Return the indices of classes, each once. A name may be one of several words that a comma separates.

    Raises ParameterError for no class, an unknown name, with the nearest one, and for a name that several classes have.
    """
    words: dict[str, set[int]] = {}
    for index, name in enumerate(class_names):
        for word in (name, *name.split(",")):
            words.setdefault(word.strip().lower(), set()).add(index)
    found = []
    for wanted in [classes] if isinstance(classes, (str, int)) else classes:
        if isinstance(wanted, str):
            matching = sorted(words.get(wanted.strip().lower(), ()))
            if not matching and wanted.strip().isdecimal():
                matching = [int(wanted)]
            if not matching:
                remedy = f"use a name of its {len(class_names)} classes, or an index" if class_names else "use an index"
                raise ParameterError(f"no class is called {wanted!r}{nearest(wanted.strip().lower(), words)}", remedy)
            if len(matching) > 1:
                several = "; ".join(f"{index}: {class_names[index]}" for index in matching)
                raise ParameterError(f"several classes are called {wanted!r} ({several})", "give the index of one")
            found.append(matching[0])
        else:
            found.append(int(wanted))
        if found[-1] < 0 or (class_names and found[-1] >= len(class_names)):
            raise ParameterError(f"no class has the index {found[-1]}", f"use 0 to {len(class_names) - 1}")
    if not 0 < len(found) < IGNORE:
        raise ParameterError(f"{len(found)} classes were asked for", f"ask for 1 to {IGNORE - 1}, or for none by name")
    return tuple(dict.fromkeys(found))


def _is_path(value: object) -> bool:
    return hasattr(value, "__fspath__")


class _Seen(NamedTuple):
    """An image, the network's output for it, and the classes that are looked for with all that is known of them."""

    sample: Sample
    output: NamedTuple
    ranking: tuple[tuple[str, float], ...]
    classes: tuple[int, ...]
    names: tuple[str, ...]
    probabilities: tuple[float, ...]


class _Look(NamedTuple):
    """How images are looked at: the arguments of `localize`."""

    model: LocalizationModel
    method: str
    wanted: tuple[int, ...] | None
    image_size: int | None
    skipped: Callable[[DataError], None] | None

    def small(self, sample: Sample) -> Sample:
        """Return the sample at the size that the network sees."""
        backbone = next(part for part in self.model.modules() if isinstance(part, Backbone))
        square = self.image_size or getattr(backbone, "image_size", None)
        if square:
            return resize(sample, (square, square))
        # Of two cells, so that also at half of the size the cells see the image to its edge, and no more.
        step, longer = 2 * backbone.stride, max(sample.size)
        height, width = (max(1, round(side * LONGER_SIDE / longer / step)) * step for side in sample.size)
        return resize(sample, (height, width))

    @torch.inference_mode()
    def at(self, sample: Sample) -> _Seen:
        """Classify a sample."""
        model = self.model
        device = next(model.parameters()).device
        output = model(to_tensor(self.small(sample).image, model.mean, model.std)[None].to(device))
        logits = output.logits[0].float().cpu()
        if not logits.isfinite().all():
            raise MapError(f"{sample.image_id}: the network's scores are not finite", "look at its weights")
        if not model.classifies:
            classes = self.wanted or (0,)
            names = [model.class_names[index] if model.class_names else f"class {index}" for index in classes]
            names = names if self.wanted else ["object"]
            return _Seen(sample, output, (), classes, tuple(names), (1.0,) * len(classes))
        scores = logits.sigmoid() if model.multi_label else logits.softmax(dim=0)
        names = model.class_names or [f"class {index}" for index in range(len(scores))]
        order = scores.argsort(descending=True, stable=True).tolist()
        classes = self.wanted or (order[0],)
        if max(classes) >= len(scores):
            problem = f"class {max(classes)} asked of a model with {len(scores)} classes"
            raise ParameterError(problem, f"use 0 to {len(scores) - 1}")
        ranking = tuple((names[index], float(scores[index])) for index in order)
        return _Seen(
            sample, output, ranking, classes, tuple(names[c] for c in classes), tuple(float(scores[c]) for c in classes)
        )

    def all(self, pictures: Pictures) -> Iterator[tuple[int, _Seen]]:
        """Yield what is seen in each picture that can be read, with its place."""
        for index in range(len(pictures)):
            try:
                sample = pictures.read(index)
            except DataError as error:
                if self.skipped is None:
                    raise
                self.skipped(error)
                continue
            yield index, self.at(sample)


def _own_maps(look: _Look, pictures: Pictures) -> Iterator[tuple[_Seen, Tensor]]:
    """Yield the method's own maps (K, H, W), min-max normalised at the image's size."""
    device = next(look.model.parameters()).device
    for _, seen in look.all(pictures):
        with torch.inference_mode():
            raw = [look.model.localize(seen.output, torch.tensor([c], device=device)) for c in seen.classes]
            maps = upsample(torch.cat([found[look.method] for found in raw]), seen.sample.size)
        yield seen, maps  # outside: what the caller does meanwhile is no inference


class _Small(Derived):
    """Some pictures at the size that the network sees, each with the classes that are looked for in it."""

    def __init__(self, look: _Look, pictures: Pictures):
        super().__init__(pictures)
        self.look = look

    def read(self, index: int, truth: bool = True) -> Sample:
        """Read a picture and resize it."""
        return self.look.small(self.dataset.read(index, truth))


def lpcam_config(classes: int) -> LPCAMConfig:
    """Return LPCAM's settings for a network of so many classes: among many, few regions score above the paper's 0.9."""
    return LPCAMConfig(mu_f=0.1 if classes >= MANY else 0.9, scales=(1.0, 0.5))


def _lpcam_maps(look: _Look, pictures: Pictures) -> Iterator[tuple[_Seen, Tensor]]:
    """Yield LPCAM's maps (K, H, W); the prototypes of each class are clustered from the pictures looked at for it."""
    extractor = ConvExtractor(look.model)
    pictures.class_names = tuple(map(str, range(len(extractor.weight))))
    # Little is kept of every picture; pixels and features are read again when they are needed.
    kept = {index: seen._replace(sample=None, output=None) for index, seen in look.all(pictures)}
    pictures.labels = tuple(kept[index].classes if index in kept else () for index in range(len(pictures)))
    if not kept:
        return
    source, config = LiveFeatures(extractor, _Small(look, pictures), batch_size=1), lpcam_config(len(extractor.weight))
    found = directions(fit_prototypes(source, config), source.weight, config, missing="zero")
    for (index, seen), maps in zip(
        kept.items(), variant_maps(source, {"lpcam": found}, config, list(kept)), strict=True
    ):
        sample = pictures.read(index)
        yield seen._replace(sample=sample), enlarge(torch.from_numpy(maps["lpcam"].maps), sample.size)


def _localized(seen: _Seen, maps: Tensor, threshold: float) -> Localized:
    """Return the result of one image: boxes and mask of its maps at the threshold."""
    found = maps.clamp(0, 1).cpu().numpy()
    masks, boxes = [], []
    for score_map in found:
        grey, (level,) = foreground_levels(score_map, np.array([threshold]))
        masks.append(grey > level)
        box = boxes_from_score_map(score_map, [threshold], protocol=TSCAM)[0]
        boxes.append(box if masks[-1].any() else np.zeros((0, 4), np.int32))
    scores = np.where(masks, found, -1.0)
    mask = np.where(scores.max(axis=0) >= 0, scores.argmax(axis=0) + 1, 0).astype(np.uint8)
    sample = seen.sample
    return Localized(sample.image_id, sample.image, *seen[2:], found, tuple(boxes), mask)
