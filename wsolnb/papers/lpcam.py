"""The experiments of LPCAM (Chen and Sun, CVPR 2023), from a multi-label classifier to its comparison with CAM.

    classifier = lpcam.Classifier(**parameters)            # notebook 20: what is trained on image labels
    host = classifier.host(run)
    base = lpcam.Prototypes(**parameters).config()         # notebook 21: what is clustered
    prototypes, _ = lpcam.cached_prototypes(run, host, base)
    claim = lpcam.Claim(**parameters)                      # notebook 22: LPCAM against CAM over seeds

Everything expensive is made once per run folder. Notebooks that describe the same classifier share it.
`wsolnb.papers.pseudo_masks` goes on from here to pseudo masks and segmentation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate.utils import set_seed
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from wsolnb.backbones import ConvBackbone, create_backbone
from wsolnb.data import LocalizationDataset, open_dataset
from wsolnb.data.base import hold_out
from wsolnb.data.loading import to_tensor
from wsolnb.data.splits import PUBLISHED, DataSettings, Splits
from wsolnb.data.store import ClassMaps, Store, WithMasks
from wsolnb.data.transforms import Resize, resize, resize_map
from wsolnb.errors import ParameterError
from wsolnb.files import resolve, within
from wsolnb.maps import upsample
from wsolnb.methods.amn import AMN, ConditionedFeatures
from wsolnb.methods.base import LocalizationModel
from wsolnb.methods.cam import CAMClassifier
from wsolnb.methods.crf import CRFConfig
from wsolnb.methods.edam import EDAM
from wsolnb.methods.features import ConvExtractor, Extractor, LiveFeatures, OwnMaps
from wsolnb.methods.grabcut import Attend, GrabCutConfig, maker
from wsolnb.methods.irn import IRNConfig, write_irn_labels
from wsolnb.methods.lpcam import Directions, LPCAMConfig, cam_of, centre_scores, lpcam_of
from wsolnb.methods.mctformer import MCTformer, PatchTokens, refine
from wsolnb.methods.prototypes import (
    KINDS,
    ClassPrototypes,
    clustering,
    directions_by_kind,
    fit_prototypes,
    variant_maps,
    write_maps,
)
from wsolnb.notebook.runs import Run
from wsolnb.notebook.studies import plus_minus, with_recorded
from wsolnb.pretraining.recipes import start_of
from wsolnb.train import multilabel
from wsolnb.train.evaluation import Evaluation, Reader
from wsolnb.train.evaluation import evaluate as score_boxes
from wsolnb.train.loop import pick_device
from wsolnb.train.recipe import Recipe, TrainingSettings, evenly, fit
from wsolnb.train.seeds import (
    REGIONS,
    best_thresholds,
    evaluate,
    miou_at,
    region_features,
    score_variants,
)
from wsolnb.train.seeds import scored as score_pair
from wsolnb.train.segmentation import class_mask

# ---------------------------------------------------------------------------------------- the classifier (notebook 20)


HELD_OUT = 0.1
"""Share of the training images of VOC and COCO that thresholds and hyperparameters are chosen on."""


class Classifier(TrainingSettings, DataSettings):
    """Notebook 20: a multi-label classifier, and its data. The fields are the notebook's parameters.

    method: of `cam`, `mctformer` and `edam` one network learns image labels; for `amn` that of `cam` comes first, whose
        seeds it learns (`taught`). dilations: of AMN's convolutions.
    dilate: as of `create_backbone`, and of IRN's backbone too (notebook 23); the released programs of IRN and LPCAM
        dilate neither.
    frozen: the backbone stays as it starts, and the classifier is logistic regression (`multilabel.frozen_maker`).
    """

    train_list: str
    render_size: int
    image_size: int
    long_side: tuple[int, ...]
    method: Literal["cam", "mctformer", "amn", "edam"]
    backbone: str
    pretrained: bool
    checkpoint: str
    output_stride: int
    dilations: tuple[int, ...]
    dilate: bool
    frozen: bool
    epochs: int
    optimizer: Literal["adamw", "sgd"]
    lr: float
    head_lr: float
    train_seed: int

    def splits(self, variant: Literal["single", "scenes"] = "scenes") -> Splits:
        """Open the data set.

        With VOC and COCO a share (`HELD_OUT`) of the published train images serves for choices. Training uses the rest
        of it, or the part of `train_list` (VOC's enlarged set) that does not serve for choices. The third split is this
        rest of the train images again, because published programs judge seed masks there. Classes and segmentation are
        scored on `evaluation`.
        """
        if self.dataset not in PUBLISHED:
            return super().splits(variant)
        published = self._open(PUBLISHED[self.dataset].train)
        rest, chosen = hold_out(published.labels, HELD_OUT, self.seed)
        val = published.subset(chosen)
        train = self._open("train", sbd_list=within(self.data_root, self.train_list)) if self.train_list else published
        kept = [index for index, name in enumerate(train.image_ids) if name not in set(val.image_ids)]
        return Splits(train.subset(kept), val, published.subset(rest))

    def evaluation(self, splits: Splits) -> LocalizationDataset:
        """Return the images that classes and segmentation are scored on: published val images of VOC and COCO, or test.

        No network sees them, and nothing is chosen on them.
        """
        return self._open(PUBLISHED[self.dataset].val) if self.dataset in PUBLISHED else splits.test

    def _open(self, split: str, **options: Any) -> LocalizationDataset:
        return open_dataset(self.dataset, resolve(self.data_root) if self.data_root else None, split, **options)

    def recipe(self) -> Recipe:
        """Return how the classifier is trained; the best epoch is that of the highest mean average precision."""
        loop: dict[str, Any] = {"seed": self.train_seed, "select": "map"}
        if self.optimizer == "sgd":  # as the release trains: plain steps whose rate falls as (1 - progress) ** 0.9
            loop |= {"momentum": 0.0, "schedule": "poly", "warmup": 0.0, "clip": 0.0}
        options = {"dilations": self.dilations} if self.method == "amn" else {}
        return self.recipe_of(loop, options=options, long_side=self.long_side or None)

    def host(self, run: Run, progress: bool = False, splits: Splits | None = None) -> Host:
        """Return the trained classifier as a host of maps; trained once per run folder.

        splits: other images than those of `splits`. Raises ParameterError for frozen features of a transformer, or of
        images at their own sizes.
        """
        splits, name = splits or self.splits(), f"classifier-{self.train_seed}"
        if self.frozen:
            return Host(self, splits, *self._frozen(run, name, splits))
        if self.method == "amn":
            return taught(run, self, self.changed(method="cam").host(run, progress), "cam", None, progress)
        validate = multilabel.validator(splits.val, self.image_size)
        return Host(self, splits, *fit(run, name, self.recipe(), splits.train, validate, progress))

    def _frozen(self, run: Run, name: str, splits: Splits) -> tuple[LocalizationModel, Path]:
        set_seed(self.train_seed)  # of random features, where nothing is pretrained
        options = self.model_dump(include={"pretrained", "output_stride", "dilate"})
        options["checkpoint"] = resolve(self.checkpoint) if self.checkpoint else None
        backbone = create_backbone(self.backbone, **options).to(pick_device(self.device))
        if self.method != "cam" or not isinstance(backbone, ConvBackbone):
            problem = f"frozen features of {self.backbone!r} for the method {self.method!r}"
            raise ParameterError(problem, "use cam and a convolutional network, or train all layers")
        if self.long_side:
            raise ParameterError("frozen features are those of whole images, resized", "leave long_side empty")
        folder = run.cached(name, multilabel.frozen_maker(backbone, splits.train, splits.val, self.image_size))
        model = multilabel.read_frozen(backbone, len(splits.train.class_names), folder)
        return model.to(pick_device(self.device)), folder


class Sources(NamedTuple):
    """Local features of train, validation and test images."""

    train: LiveFeatures
    val: LiveFeatures
    test: LiveFeatures


@dataclass(frozen=True)
class Host:
    """A trained classifier with what maps are made from: local features, and the weights that judge them.

    first: the host of the seeds that taught this one (`taught`), or None.
    """

    classifier: Classifier
    splits: Splits
    model: LocalizationModel
    folder: Path
    first: Host | None = None

    @property
    def number(self) -> int:
        """The seed of the training, which names what is made of it."""
        return self.classifier.train_seed

    @cached_property
    def extractor(self) -> Extractor:
        """Local features of images: the patch tokens of MCTformer, else the final feature map (AMN's with labels)."""
        if isinstance(self.model, MCTformer):
            return PatchTokens(self.model)
        if isinstance(self.model, AMN):
            return ConditionedFeatures(self.model)
        return ConvExtractor(self.model, self.model.weight if isinstance(self.model, EDAM) else None)

    @property
    def judge(self) -> LocalizationModel:
        """The network that says which classes an image has: of AMN, which is told, that of its seeds."""
        return self.first.judge if self.first else self.model

    @property
    def weight(self) -> Tensor:
        """The linear classifier behind the pooling, (C, D)."""
        return self.extractor.weight

    def source(self, dataset: LocalizationDataset) -> LiveFeatures:
        """Return the local features of a data set's images, at the size that maps are made at."""
        return LiveFeatures(self.extractor, dataset, self.classifier.recipe().map_size)

    @cached_property
    def sources(self) -> Sources:
        """Local features of the three splits."""
        return Sources(*map(self.source, self.splits))

    @cached_property
    def mean_average_precision(self) -> float:
        """The classifier's mean average precision on the images of `evaluation`."""
        return multilabel.mean_average_precision(self.judge, self.evaluation, self.classifier.image_size)

    @cached_property
    def evaluation(self) -> LocalizationDataset:
        """The images that classes and segmentation are scored on (`Classifier.evaluation`)."""
        return self.classifier.evaluation(self.splits)


Draw = Callable[[LocalizationDataset], Iterator[dict[str, ClassMaps]]]
"""Makes maps of every image of a data set, by name."""

SEED_SCALES = LPCAMConfig(scales=(1.0,))
"""How the maps are made that AMN's labels come from: one scale, and the mirror image."""

SEED_MARGINS = (0.2, 0.1)
"""How far AMN's thresholds of confident foreground and background lie above and below that of the seeds. Released: 0.45
and 0.15 around 0.25."""

SEED_CRF = CRFConfig(colour=13.0, wide=11.0, max_side=28)
"""The CRF that refines AMN's labels: that of notebook 23, on a coarser image, whose cells are still smaller than AMN's.
IRN's walk does not refine them, nor as released."""


def taught(
    run: Run, classifier: Classifier, first: Host, name: str, chosen: Directions | None, progress: bool = False
) -> Host:
    """Return AMN (the recipe of `classifier`) trained on seeds of a first host; made once per run folder.

    name, chosen: of the seeds' maps, as of `variant_maps` (None: CAM). Their threshold is the best on validation
    images; confident labels keep `SEED_MARGINS` from it. Where neither is sure, a pixel has no label.
    """
    number, train, by_name = first.number, first.splits.train, {name: chosen}
    title = file_name(name)
    maps = run.cached(f"seeds-{title}-{number}", partial(write_maps, first.sources.train, by_name, SEED_SCALES))
    found = run.cached_rows(
        f"seed-threshold-{title}-{number}", partial(best_thresholds, first.sources.val, by_name, SEED_SCALES)
    )
    threshold, (above, below) = found[0]["threshold"], SEED_MARGINS
    sure = IRNConfig(foreground=min(threshold + above, 0.95), background=max(threshold - below, 0.02))
    write = partial(write_irn_labels, Store(maps / name), train, sure, SEED_CRF)
    masks = WithMasks(train, Store(run.cached(f"seed-labels-{title}-{number}", write)))
    model, folder = fit(run, f"amn-{title}-{number}", classifier.recipe(), masks, None, progress)
    return Host(classifier, first.splits, model, folder, first)


# ------------------------------------------------------------------------------------------- prototypes (notebook 21)


class Prototypes(BaseModel):
    """Notebook 21: what is clustered, and what is selected of it. The fields are the notebook's parameters."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    clusters: int
    tau: float
    mu_f: float
    mu_b: float
    images_per_class: int
    features_per_class: int
    scales: tuple[float, ...]
    seed: int

    def config(self) -> LPCAMConfig:
        """Return the configuration of LPCAM."""
        return LPCAMConfig(**self.model_dump())


def cached_prototypes(run: Run, host: Host, config: LPCAMConfig) -> tuple[list[ClassPrototypes], Path]:
    """Return the prototypes of a host's training images, and their folder; clustered once per run folder."""
    source, asked = host.sources.train, clustering(config)
    folder = run.cached(f"prototypes-{host.number}", partial(fit_prototypes, source, asked))
    return fit_prototypes(source, asked, folder), folder


def shown_class(prototypes: Sequence[ClassPrototypes], dataset: LocalizationDataset, asked: int) -> int:
    """Return the class that pictures can show: `asked`, or else the first one.

    It has centres of foreground and of context, and an image of the data set. Raises ParameterError where no class has.
    """
    present = {label for own in dataset.labels for label in own}
    found = [c for c, own in enumerate(prototypes) if len(own.foreground) and len(own.context) and c in present]
    if not found:
        problem = f"no class of {dataset} has centres of foreground and of context: its maps are zero"
        raise ParameterError(problem, "train the classifier for longer, or lower `tau`")
    return asked if asked in found else found[0]


def weight_overlap(host: Host, top: int = 10) -> pd.DataFrame:
    """Return what a classifier's weights share with features of head, rest and background (fig. S1), a row per class.

    Columns: of the `top` largest dimensions of the class's weights, how many are among the largest of its mean feature
    in the region (`head`, `rest`, `context`), and how many chance would give; the cosine of weights and feature.
    """
    regions, weight = region_features(host.sources.val, host.splits.val), host.weight.cpu().double()
    largest = [[set(v.topk(top).indices.tolist()) for v in rows] for rows in regions.raw]
    own = [set(w.topk(top).indices.tolist()) for w in weight]
    overlap = [[len(mine & found) for found in theirs] for mine, theirs in zip(own, largest, strict=True)]
    table = pd.DataFrame(overlap, columns=list(REGIONS))
    table.insert(0, "class", host.splits.val.class_names)
    table["chance"] = round(top * top / weight.shape[1], 1)
    cosine = torch.nn.functional.cosine_similarity(weight[:, None], regions.raw, dim=2).numpy().round(2)
    return table.assign(**{f"cosine {name}": cosine[:, place] for place, name in enumerate(REGIONS)})


def confusing_classes(host: Host, count: int = 2) -> dict[int, list[int]]:
    """Return for each class the classes that it is most confused with, the most confusing first (fig. 1).

    Another class is scored by its mean logit on the validation images that show the class and not the other.
    """
    values, labels = multilabel.predict(host.judge, host.splits.val, host.classifier.image_size)
    confusing = {}
    for label in range(labels.shape[1]):
        apart = {k: (labels[:, label] == 1) & (labels[:, k] == 0) for k in range(labels.shape[1]) if k != label}
        strength = {k: values[where, k].mean() for k, where in apart.items() if where.any()}
        confusing[label] = sorted(strength, key=strength.__getitem__, reverse=True)[:count]
    return confusing


def cams_of_all_classes(host: Host, index: int) -> np.ndarray:
    """Return CAMs of a test image for all classes, present or not: (C, H, W), each divided by its own maximum."""
    image = next(host.sources.test.images([index], flip=True))
    return cam_of(image.scales, host.weight, image.size, image.area).cpu().numpy()


def confusion(host: Host, threshold: float, images: int = 100) -> pd.DataFrame:
    """Return which share of an object the CAMs of classes cover that its image does not show (fig. 1).

    A row for the two `confusing` classes of the object's class, and one for the `other absent` ones. Columns: the share
    above the threshold of the part of the object that its own CAM `covered`, of the part `left_out`, and of the
    image's `background`; `own`, the share of the object that its own CAM covers. Means over the objects of evenly
    spaced test images. An object that is covered wholly or not at all does not count.
    """
    confusing, rows = confusing_classes(host), []
    for index in np.linspace(0, len(host.splits.test) - 1, images).astype(int):
        sample, above = host.splits.test[index], cams_of_all_classes(host, index) > threshold
        truth = class_mask(sample, host.splits.test.multi_label)
        absent = set(range(len(above))) - set(sample.labels)
        for label in sample.labels:
            inside = truth == label + 1
            regions = {"covered": inside & above[label], "left_out": inside & ~above[label], "background": truth == 0}
            classes = {"confusing": absent & set(confusing[label]), "other absent": absent - set(confusing[label])}
            if all(classes.values()) and all(where.any() for where in regions.values()):
                own = above[label][inside].mean()
                for kind, chosen in classes.items():
                    shares = (np.mean([above[k][where].mean() for k in chosen]) for where in regions.values())
                    rows.append((kind, own, *shares))
    return pd.DataFrame(rows, columns=["maps", "own", "covered", "left_out", "background"]).groupby("maps").mean()


# ------------------------------------------------------------------------------- LPCAM against CAM (notebook 22)

CHECKED: dict[str, list[dict[str, Any]]] = {
    "tau": [{"tau": t} for t in (0.05, 0.1, 0.25, 0.5)],
    "K": [{"clusters": k} for k in (1, 4, 12, 24)],
    "samples": [{"images_per_class": n} for n in (5, 20, 50, 100, 200)],
    "clustering": [{"algorithm": "kmeans", "metric": "cosine"}, {"algorithm": "kmeans", "metric": "euclidean"},
                   {"algorithm": "minibatch", "metric": "cosine"}, {"algorithm": "hierarchical", "metric": "cosine"}],
    "switches": [{}, {"score": "sigmoid"}, {"flip": "none"}, {"flip": "features"}, {"scales": (1.0, 0.5, 1.5)},
                 {"split_cam": "final", "ties": "dropped"},
                 {"split_cam": "final", "ties": "dropped", "split_maximum": "image"}, {"relu": "with_context"},
                 {"mu_b_least": 0.05}],
    "mu_f": [{"mu_f": m} for m in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)],
    "mu_b": [{"mu_b": m} for m in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)],
}  # fmt: skip
"""Variants of a configuration by study."""
CUTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
"""The thresholds of the study `threshold`."""
REFERENCES = {
    "tau": "tau 0.1", "K": "clusters 12", "samples": "images_per_class 50",
    "clustering": "algorithm kmeans, metric cosine", "switches": "as chosen",
    "mu_f": "mu_f 0.9", "mu_b": "mu_b 0.9", "threshold": "threshold 0.3",
}  # fmt: skip
"""What the variants of each study are compared with: the paper's value, or the settings as they are."""

FLOOR = {"mu_b_least": 0.05}
"""The floor of VOC's released code, which the paper does not mention: context prototypes must score above 0.05."""


def scored(
    run: Run, host: Host, by_name: Mapping[str, Directions | None], config: LPCAMConfig
) -> dict[str, dict[str, float]]:
    """Return, by name of the variant, test scores at the threshold that validation images chose."""
    measure = partial(score_variants, host.sources.val, host.sources.test, by_name, config)
    return dict(zip(by_name, run.cached_rows(f"scores-{host.number}", measure), strict=True))


def plugged(
    host: Host, by_name: Mapping[str, Directions | None], config: LPCAMConfig, dataset: LocalizationDataset
) -> Iterator[dict[str, ClassMaps]]:
    """Yield the maps that MCTformer makes of an image's classes, with CAM or with LPCAM in CAM's place.

    The map is multiplied by the class's attention, and the affinity of patches refines the product. One scale, no flip.
    by_name: as of `variant_maps`. Maps are those of the image resized to the classifier's size, enlarged to the image.
    """
    model, tokens = host.model, host.extractor
    device, side = host.weight.device, host.classifier.image_size
    for index, (image_id, labels) in enumerate(zip(dataset.image_ids, dataset.labels, strict=True)):
        sample, own = dataset.read(index, truth=False), list(labels)
        image = to_tensor(resize(sample, (side, side)).image, tokens.mean, tokens.std)[None].to(device)
        with torch.inference_mode():
            found = model(image)
        attention = found.attention[0].mean(dim=0)[own]
        result = {}
        for name, chosen in by_name.items():
            if chosen is None:
                maps = found.semantic_map[0, own].float().relu()
            else:
                theirs = Directions(*(values[own] for values in chosen))
                maps = lpcam_of([found.features.float()], theirs, attention.shape[1:], config)
            refined = refine((attention * maps.to(attention))[None], found.affinity)[0]
            result[name] = ClassMaps(image_id, labels, upsample(refined, sample.size).cpu().numpy())
        yield result


CUE = GrabCutConfig(fg_threshold=0.3, bg_threshold=0.005, uncertain="none", size=112)
"""How EDAM's background cue is cut: as notebook 30 cuts masks."""


def salient(run: Run, host: Host, dataset: LocalizationDataset) -> Store:
    """Return masks of what is salient in images: GrabCut's, guided by the attention of a self-distilled transformer.

    It knows no class and has seen no mask. It stands for EDAM's saliency network, which was trained with masks.
    """
    backbone = create_backbone("vit_mini_dino", pretrained=True).to(pick_device(host.classifier.device)).eval()
    return Store(run.cached("cue", maker(dataset, Attend(backbone), CUE, progress=False)))


def drawn(
    hosts: Mapping[str, Host], by_name: Mapping[str, Directions], config: LPCAMConfig, dataset: LocalizationDataset
) -> Iterator[dict[str, ClassMaps]]:
    """Yield the maps that AMN or EDAM makes by itself of an image's classes, and maps of LPCAM in their place.

    hosts: by name; AMN's differ in the seeds that taught them. by_name: LPCAM's directions among the features of the
    first host. Both are made at the scales and with the mirror image of `config`, and divided by their maximum.
    """
    first, *_ = hosts.values()
    size = first.classifier.recipe().map_size
    made = [
        variant_maps(LiveFeatures(OwnMaps(host.model), dataset, size), {name: None}, config)
        for name, host in hosts.items()
    ]
    for parts in zip(*made, variant_maps(first.source(dataset), by_name, config), strict=True):
        yield {name: maps for part in parts for name, maps in part.items()}


def where_salient(run: Run, host: Host, draw: Draw, dataset: LocalizationDataset) -> Iterator[dict[str, ClassMaps]]:
    """Yield the maps that `draw` makes of a data set, zero outside of what is `salient`."""
    cue = salient(run, host, dataset)
    for found in draw(dataset):
        image_id, _, maps = next(iter(found.values()))
        inside = resize_map(cue.read_mask(image_id)[0], maps.shape[1:])
        yield {name: own._replace(maps=own.maps * inside) for name, own in found.items()}


def score_own(draw: Draw, names: Sequence[str], held: Sequence[LocalizationDataset]) -> list[dict[str, float]]:
    """Return test scores of the maps of `names` that `draw` makes, at thresholds that validation images chose.

    held: validation and test images.
    """
    val, test = (evaluate(draw(part), part) for part in held)
    return [score_pair(val[name], test[name]) for name in names]


def file_name(name: str) -> str:
    """Return the name of a map, of a study or of a variant as a part of file names."""
    return name.replace(", ", "-")


def confidence(prototypes: Sequence[ClassPrototypes], weight: Tensor, config: LPCAMConfig) -> dict[str, float]:
    """Return how sure a classifier (C, D) is of its clusters, as means over the classes.

    `best_centre`: the largest score of a class's foreground centres (eq. 3). `kept_centres`: how many of them score
    above `config.mu_f`. A class without such a centre counts as 0, although its best centre is used.
    """
    scores = [centre_scores(own.foreground, weight, c, config.score) for c, own in enumerate(prototypes)]
    known = [found for found in scores if len(found)]
    kept = [int((found > config.mu_f).sum()) for found in known]
    return {"best_centre": float(np.mean([float(s.max()) for s in known])), "kept_centres": float(np.mean(kept))}


Grids = Mapping[str, list[LPCAMConfig]]


def grid(config: LPCAMConfig, **values: Sequence[float]) -> list[LPCAMConfig]:
    """Return a configuration with every combination of some fields' values; the last field changes first."""
    combinations = itertools.product(*values.values())
    return [config.model_copy(update=dict(zip(values, chosen, strict=True))) for chosen in combinations]


def choose(
    run: Run, host: Host, source: LiveFeatures, prototypes: list[ClassPrototypes], grids: Grids, config: LPCAMConfig
) -> dict[str, LPCAMConfig]:
    """Return for each kind of map the configuration of its grid with the highest mIoU on a source's images.

    config: says scales and flips.
    """
    by_name = {
        f"{kind} {index}": directions_by_kind(prototypes, host.weight, one, [kind], "zero")[kind]
        for kind, configs in grids.items()
        for index, one in enumerate(configs)
    }
    found = run.cached_rows(f"choice-{host.number}", partial(best_thresholds, source, by_name, config))
    miou = iter([row["miou"] for row in found])
    return {kind: max(configs, key=lambda _: next(miou)) for kind, configs in grids.items()}


IMAGENET = {
    "method": "cam", "backbone": "efficientnet_lite0", "pretrained": True, "frozen": True, "output_stride": 16,
    "image_size": 320, "long_side": (),
}  # fmt: skip
"""The classifier of the study `imagenet`: features of an ImageNet network, as published."""


SIGNED = "cam, signed"
"""The name of CAM without the ReLU of eq. 1: the scores of every place, the negative ones too."""


class DirectedOutput(NamedTuple):
    """logits: (B, C). features: (B, 2, D, h, w), of the images and of their mirror images, mirrored back."""

    logits: Tensor
    features: Tensor


class Directed(Reader):
    """CAM and LPCAM of a classifier as maps at one scale, for metrics of boxes.

    by_name: LPCAM's directions of every class by name of the map; as of `variant_maps`, that of CAM is None, and so is
        that of `SIGNED`.
    """

    def __init__(self, model: CAMClassifier, by_name: Mapping[str, Directions | None]):
        super().__init__()
        self.model, self.by_name, self.maps = model, dict(by_name), tuple(by_name)

    def forward(self, images: Tensor) -> DirectedOutput:
        """Classify (B, 3, H, W) normalised images."""
        output, mirrored = self.model(images), self.model.backbone(images.flip(3)).flip(3)
        return DirectedOutput(output.logits, torch.stack([output.features, mirrored], dim=1))

    def localize(self, output: DirectedOutput, classes: Tensor) -> dict[str, Tensor]:
        """Return the maps for one class per image, each (B, h, w)."""
        weight, size = self.model.classifier.weight, output.features.shape[-2:]

        def draw(features: Tensor, c: int, name: str, own: Directions | None) -> Tensor:
            if name == SIGNED:
                return torch.einsum("fdhw,d->hw", features, weight[c].to(features))
            if own is None:
                return cam_of([features], weight[c : c + 1], size)[0]
            chosen = Directions(*(values[c : c + 1] for values in own))
            return lpcam_of([features], chosen, size, LPCAMConfig(scales=(1.0,)))[0]

        images = list(zip(output.features.float(), classes.tolist(), strict=True))
        return {n: torch.stack([draw(*one, n, own) for one in images]) for n, own in self.by_name.items()}


def box_rows(host: Host, prototypes: list[ClassPrototypes], grids: Grids, base: LPCAMConfig) -> list[dict[str, Any]]:
    """Return box scores of CAM, also of `SIGNED`, and of LPCAM-F and LPCAM, by `base` and by the best of their grids.

    Scores are those of test images. Validation images choose the threshold of every map, and among the configurations
    of a grid the one with the highest GT-known (the first, where several have it). `gt_known_fixed`: GT-known at 0.3.
    """
    configs = {"cam, paper": base, SIGNED: base} | {f"{kind}, paper": base for kind in grids}
    configs |= {f"{kind}, {n}": one for kind, tried in grids.items() for n, one in enumerate(tried)}

    def score(names: Sequence[str], dataset: LocalizationDataset, quick: bool = False) -> Evaluation:
        kinds = {name: name.partition(", ")[0] for name in names}
        by_name = {
            name: directions_by_kind(prototypes, host.weight, configs[name], [kind], "zero")[kind]
            for name, kind in kinds.items()
        }
        return score_boxes(Directed(host.model, by_name), dataset, Resize(host.classifier.image_size), quick)

    found = score(list(configs), host.splits.val, quick=True).localization
    best = {
        kind: max(range(len(grids[kind])), key=lambda n: found[f"{kind}, {n}"].best("gt_known")[1]) for kind in grids
    }
    names = {name: name for name in configs if name == SIGNED or name.endswith(", paper")}
    names |= {f"{kind}, chosen": f"{kind}, {n}" for kind, n in best.items()}
    val, test = (score(list(names.values()), part) for part in host.splits[1:])
    tested = {row.pop("map"): row for row in test.table(val)}
    rows = []
    for name, own in names.items():
        kind, _, hyper = name.partition(", ")
        row = {"map": kind, "hyper": hyper, "mu_f": configs[own].mu_f, "mu_b": configs[own].mu_b, **tested[own]}
        rows.append(row | {"gt_known_fixed": test.localization[own].at(0.3)["gt_known"]})
    return rows


HOSTS: dict[str, dict[str, Any]] = {
    "mctformer": {"method": "mctformer", "backbone": "vit_mini", "lr": 0.0002, "head_lr": 0.002},
    "amn": {"method": "amn"},
    "edam": {"method": "edam"},
}
"""The hosts of the study `hosts`, and how they differ from the classifier of notebook 20."""

INSIDE = ("cam, paper", "lpcam, paper", "lpcam, chosen, floor")
"""What stands inside of a host's own map in the studies named after hosts."""


class Claim(BaseModel):
    """Notebook 22: the studies over training seeds. The fields are the notebook's parameters."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    claim_seeds: tuple[int, ...]
    pretraining_seeds: tuple[int, ...]
    checked_seeds: tuple[int, ...]
    checked_on: tuple[Literal["scenes", "photographs"], ...]
    cases: tuple[tuple[float, float, int], ...]
    ladder: tuple[int, ...]
    study_train_images: int
    study_val_images: int
    study_test_images: int
    grid_mu_f: tuple[float, ...]
    grid_mu_b: tuple[float, ...]
    photos_root: str
    photo_epochs: int
    tiny_root: str
    tiny_images: int

    def choose(
        self, run: Run, host: Host, prototypes: list[ClassPrototypes], config: LPCAMConfig
    ) -> dict[str, LPCAMConfig]:
        """Return the configurations with mu_f and mu_b of the highest validation mIoU, of LPCAM-F and of LPCAM."""
        return choose(run, host, host.sources.val, prototypes, self.grids(config), config)

    def grids(self, config: LPCAMConfig) -> Grids:
        """Return the configurations that validation images choose among, of LPCAM-F and of LPCAM."""
        grids = {"lpcam-f": grid(config, mu_f=self.grid_mu_f)}
        return grids | {"lpcam": grid(config, mu_f=self.grid_mu_f, mu_b=self.grid_mu_b)}

    def measured(
        self, run: Run, classifier: Classifier, base: LPCAMConfig, study: str, where: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Yield rows of one classifier: CAM, and LPCAM-F and LPCAM with the paper's and with chosen hyperparameters.

        For the other hosts there are also rows of studies under their names: `inside`.
        where: columns that name the case.
        """
        base = base.model_copy(update={"seed": classifier.seed})
        if study == "imagenet":
            base = base.model_copy(update={"scales": LPCAMConfig.paper().scales})
        host = classifier.host(run)
        prototypes, variants, by_name = self.variants(run, host, base)
        alike = confidence(prototypes, host.weight, base)
        if host.splits.val[0].parts is not None:
            alike |= region_features(host.sources.val, host.splits.val).similarity()
        columns = {
            f"{kind}, {hyper}": {**where, "seed": host.number, "map": kind, "hyper": hyper, "mu_f": config.mu_f,
                                 "mu_b": config.mu_b, "mAP": host.mean_average_precision}
            for kind, hyper, config in variants
        }  # fmt: skip
        for name, row in scored(run, host, by_name, base).items():
            yield {"study": study, **columns[name], **row, **alike}
        of_seeds = {}
        if host.first:  # LPCAM is among the features of the first host, and so is mu
            of_seeds = {
                f"{k}, {h}": {"mu_f": c.mu_f, "mu_b": c.mu_b} for k, h, c in self.variants(run, host.first, base)[1]
            }
        for place, draw in self.own_maps(run, host, by_name, base).items():
            measure = partial(score_own, draw, INSIDE, host.splits[1:])
            found = run.cached_rows(f"{file_name(place)}-{host.number}", measure)
            for name, row in zip(INSIDE, found, strict=True):
                yield {"study": place, **columns[name], **row, **of_seeds.get(name, {})}

    def variants(
        self, run: Run, host: Host, base: LPCAMConfig
    ) -> tuple[list[ClassPrototypes], list[tuple[str, str, LPCAMConfig]], dict[str, Directions | None]]:
        """Return a host's prototypes, variants as (kind, hyperparameters, configuration), and directions by name.

        A name is `kind, hyperparameters`. As of `variant_maps`, the direction of CAM is None.
        """
        prototypes, _ = cached_prototypes(run, host, base)
        chosen = self.choose(run, host, prototypes, base)
        floor = chosen["lpcam"].model_copy(update=FLOOR)
        variants = [(kind, "paper", base) for kind in KINDS]
        variants += [(kind, "chosen", config) for kind, config in chosen.items()] + [("lpcam", "chosen, floor", floor)]
        by_name = {
            f"{kind}, {hyper}": directions_by_kind(prototypes, host.weight, config, [kind], "zero")[kind]
            for kind, hyper, config in variants
        }
        return prototypes, variants, by_name

    def own_maps(
        self, run: Run, host: Host, by_name: Mapping[str, Directions | None], base: LPCAMConfig
    ) -> dict[str, Draw]:
        """Return by study what makes the maps `INSIDE` of a host: its own map, and LPCAM in CAM's place. Of CAM none.

        `mctformer`: inside of its map (`plugged`). `edam`: instead of its mask; `edam, cue`: the same, where `salient`.
        `amn`: the network's map, taught by seeds of CAM or of LPCAM in its first host; mu is of the latter.
        by_name: directions among the host's features, as of `variants`.
        """
        cam, *others = INSIDE
        if isinstance(host.model, MCTformer):
            return {"mctformer": partial(plugged, host, {name: by_name[name] for name in INSIDE}, base)}
        if isinstance(host.model, EDAM):
            draw = partial(drawn, {cam: host}, {name: by_name[name] for name in others}, base)
            return {"edam": draw, "edam, cue": partial(where_salient, run, host, draw)}
        if host.first:
            _, _, seeds = self.variants(run, host.first, base)
            hosts = {cam: host} | {n: taught(run, host.classifier, host.first, n, seeds[n]) for n in others}
            return {"amn": partial(drawn, hosts, {}, base)}
        return {}

    def trainings(
        self, study: str, classifier: Classifier, run: Run | None = None
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield, for each training of a paired study, the columns that name its case, and changes of the classifier.

        study: `claim`; `ladder`, which trains for more and more epochs; `pretrainings`, the first case of `claim` from
        networks that other seeds have pretrained; `photographs`, on Oxford-IIIT Pet; `imagenet`, the same with an
        ImageNet network, whose seeds also hold out other validation images and start the clusters anew; `hosts`, all of
        `HOSTS`. Others train nothing.
        run: where `pretrainings` makes its starts; the others need none.
        """
        cases: list[dict[str, Any]] = []
        changes: dict[str, Any] = {}
        if study in ("claim", "ladder", "pretrainings"):
            by_epochs = [(classifier.body_cue, classifier.context_correlation, epochs) for epochs in self.ladder]
            chosen = {"claim": self.cases, "ladder": by_epochs, "pretrainings": self.cases[:1]}[study]
            cases = [dict(zip(("body_cue", "context_correlation", "epochs"), case, strict=True)) for case in chosen]
            changes = {f"{split}_images": getattr(self, f"study_{split}_images") for split in Splits._fields}
        elif study == "photographs":
            cases, changes = [{"epochs": self.photo_epochs}], {"dataset": "pets", "data_root": self.photos_root}
        elif study == "imagenet":
            cases = [{"epochs": 0}]
            changes = self._imagenet(0) | {"epochs": classifier.epochs}  # a recipe has some; nothing is trained by it
        elif study == "hosts":
            cases = [{"host": name, "epochs": classifier.epochs} for name in HOSTS]
        if study == "pretrainings":
            cases = [case | {"pretraining": number} for case in cases for number in self.pretraining_seeds]
        for case, seed in itertools.product(cases, self.claim_seeds):
            if number := case.get("pretraining"):
                changes = changes | start_of(run, classifier.backbone, number)
            drawn = {"train_seed": seed} | ({"seed": seed} if study == "imagenet" else {})
            own = {name: value for name, value in case.items() if name != "host"} | HOSTS.get(case.get("host"), {})
            yield case, {"frozen": False, **own, **changes, **drawn}

    def checked_host(
        self, run: Run, classifier: Classifier, base: LPCAMConfig, data: str, number: int
    ) -> tuple[Host, LPCAMConfig]:
        """Return a classifier of one seed, and the configuration that `checked` varies.

        For `scenes`: the classifier of notebook 20, and the selection that validation images choose. For `photographs`:
        the classifier of the study `imagenet`, and the paper's selection and scales.
        """
        if data == "photographs":
            host = classifier.changed(**self._imagenet(number), train_seed=number).host(run)
            return host, base.model_copy(update={"scales": LPCAMConfig.paper().scales, "seed": number})
        host = classifier.changed(train_seed=number).host(run)
        return host, self.choose(run, host, cached_prototypes(run, host, base)[0], base)["lpcam"]

    def _imagenet(self, seed: int) -> dict[str, Any]:
        return {"dataset": "pets", "data_root": self.photos_root, "seed": seed, **IMAGENET}

    def boxes(self, run: Run, classifier: Classifier, base: LPCAMConfig) -> Iterator[dict[str, Any]]:
        """Yield rows of `box_rows` on Tiny-ImageNet, with features of an ImageNet network, for every seed.

        A seed starts the clusters anew. Images and classifier, and so the scores of CAM, are the same for all seeds.
        """
        tiny = {**IMAGENET, "image_size": 160, "dataset": "tiny_imagenet", "data_root": self.tiny_root}
        for seed in self.claim_seeds:
            own, config = classifier.changed(**tiny, seed=seed, train_seed=seed), base.model_copy(update={"seed": seed})
            splits = own.splits()
            host = own.host(run, splits=splits._replace(train=evenly(splits.train, self.tiny_images)))
            measure = partial(box_rows, host, cached_prototypes(run, host, config)[0], self.grids(config), config)
            yield from ({"seed": seed, **row} for row in run.cached_rows(f"boxes-{seed}", measure))

    def tables(
        self, run: Run, studies: Sequence[str], classifier: Classifier, base: LPCAMConfig
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the recorded tables of the paired studies and of all others, with some made here.

        studies: to make. base: the configuration of notebook 21; `checked_on` says whose classifiers `CHECKED` varies.
        """

        def looked_at() -> Iterator[dict[str, Any]]:
            asked = [study for study in studies if study in REFERENCES]
            for number in self.checked_seeds if "bias" in studies else ():
                bias = weight_overlap(classifier.changed(train_seed=number).host(run))
                where = {"study": "bias", "data": "scenes", "seed": number}
                yield from (where | row for row in bias.rename(columns={"class": "variant"}).to_dict("records"))
            for number in self.checked_seeds if "confusion" in studies else ():
                host = classifier.changed(train_seed=number).host(run)
                threshold = best_thresholds(host.sources.val, {"cam": None}, base)[0]["threshold"]
                where = {"study": "confusion", "data": "scenes", "threshold": threshold, "seed": number}
                found = confusion(host, threshold).reset_index(names="variant")
                yield from (where | row for row in found.to_dict("records"))
            for data, number in itertools.product(self.checked_on if asked else (), self.checked_seeds):
                host, config = self.checked_host(run, classifier, base, data, number)
                yield from ({"data": data, **row} for study in asked for row in checked(run, host, config, study))

        rows = (
            row
            for study in studies
            for where, changes in self.trainings(study, classifier, run)
            for row in self.measured(run, classifier.changed(**changes), base, study, where)
        )
        claims = with_recorded(run, "22_claim", rows, "study")
        return claims, with_recorded(run, "22_checked", looked_at(), ["study", "data"])


def against_cam(table: pd.DataFrame, study: str, by: list[str]) -> pd.DataFrame:
    """Return a row per condition: mIoU of CAM, and the paired differences of the others to it, with 95 % intervals.

    table: of rows of `Claim.measured`. by: the columns that tell a condition.
    """
    rows = []
    for key, group in table[table.study == study].groupby(by, sort=False):
        cam = group[group["map"] == "cam"].set_index("seed")
        row = dict(zip(by, key, strict=True)) | {"seeds": len(cam), "mAP": cam.mAP.mean(), "CAM": cam.miou.mean()}
        for name, column in (("", "miou"), (" at 0.3", "miou_fixed")):
            for hyper, kind in itertools.product(("paper", "chosen", "chosen, floor"), ("lpcam-f", "lpcam")):
                other = group[(group["map"] == kind) & (group.hyper == hyper)].set_index("seed")
                if len(other):
                    row[f"{kind}, {hyper}{name}"] = plus_minus(other[column] - cam[column])
        rows.append(row)
    return pd.DataFrame(rows).round(3)


def differences(
    table: pd.DataFrame, study: str, by: list[str], measures: Sequence[str], kind: str = "lpcam",
    hyper: str = "chosen, floor", less: tuple[str, str] = ("cam", "paper"),
) -> pd.DataFrame:  # fmt: skip
    """Return a row per condition: paired differences of one kind of map to another, with 95 % intervals, by measure.

    Arguments as of `against_cam`. measures: columns of the table. hyper: how the kind's hyperparameters were found.
    less: the other kind, and how its hyperparameters were found.
    """
    rows = []
    for key, group in table[table.study == study].groupby(by, sort=False):
        one, other = (
            group[(group["map"] == k) & (group.hyper == h)].set_index("seed") for k, h in ((kind, hyper), less)
        )
        found = {name: plus_minus(one[name] - other[name]) for name in measures}
        rows.append(dict(zip(by, key, strict=True)) | {"map": f"{kind}, {hyper}"} | found)
    return pd.DataFrame(rows)


def checked(run: Run, host: Host, config: LPCAMConfig, study: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each of the study's `CHECKED` variants of a configuration: best mIoU on validation images.

    Variants that ask for the same scales and flips share one pass over the images.
    The study `threshold` has instead the mIoU of the configuration at each of `CUTS`.
    """
    if study == "threshold":
        by_kind = directions_by_kind(cached_prototypes(run, host, config)[0], host.weight, config, missing="zero")
        measure = partial(miou_at, host.sources.val, by_kind, config, CUTS)
        for cut, own in zip(CUTS, run.cached_rows(f"checked-{study}-{host.number}", measure), strict=True):
            yield {"study": study, "variant": f"threshold {cut}", **own, "threshold": cut, "seed": host.number}
        return
    variants = [(changes, config.model_copy(update=changes)) for changes in CHECKED[study]]
    for asked, group in itertools.groupby(variants, lambda one: _of_maps(one[1])):
        made = [(changes, changed, *cached_prototypes(run, host, changed)) for changes, changed in group]
        by_name = {
            (index, kind): chosen
            for index, (_, changed, prototypes, _) in enumerate(made)
            for kind, chosen in directions_by_kind(prototypes, host.weight, changed, missing="zero").items()
        }
        measure = partial(best_thresholds, host.sources.val, by_name, config.model_copy(update=asked))
        found = dict(zip(by_name, run.cached_rows(f"checked-{study}-{host.number}", measure), strict=True))
        for index, (changes, _, _, folder) in enumerate(made):
            row = {"study": study, "variant": ", ".join(f"{k} {v}" for k, v in changes.items()) or "as chosen"}
            row |= {kind: found[index, kind]["miou"] for kind in KINDS}
            row |= {"threshold": found[index, "lpcam"]["threshold"]}
            yield row | {"mAP": host.mean_average_precision, "seed": host.number, "seconds": run.seconds_of(folder)}


def _of_maps(config: LPCAMConfig) -> dict[str, Any]:
    """Return the fields that decide how directions become maps; the other fields decide the directions."""
    return config.model_dump(include={"scales", "flip", "over_scales", "relu"})
