"""Peak memory of every pass over a data set, at 100 and at 1,000 images: it must not grow with their number.

Each stage runs in a process of its own, forked when everything is loaded; what counts is the peak of its resident
memory. The images are rectangles on noise, 64 x 64, made when they are read, with masks and boxes, of two classes each
(notebooks 22 and 23) or of one (the others); the networks are the embedded ones, untrained. Beside the growth stands
what a list of one map of each image more would take, in float32.

What the allocator keeps of freed memory differs by some 15 MB between runs. It does not go on: notebook 12 took
765, 787 and 785 MB at 100, 1,000 and 3,000 images, the maps of notebook 23 took 763, 773 and 767 MB.
"""

from __future__ import annotations

import itertools
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from wsolnb.backbones import TransformerBackbone, create_backbone
from wsolnb.data.base import LocalizationDataset
from wsolnb.data.sample import Sample
from wsolnb.data.store import Store, WithMasks
from wsolnb.data.transforms import Resize
from wsolnb.methods import create_method, grabcut, irn
from wsolnb.methods.crf import CRFConfig
from wsolnb.methods.features import ConvExtractor, LiveFeatures
from wsolnb.methods.grabcut import GrabCutConfig
from wsolnb.methods.locloc import GrabCutEnhancedGenerator, LocalFeatureDigging, LocLoc
from wsolnb.methods.lpcam import Directions, LPCAMConfig
from wsolnb.methods.prototypes import write_maps
from wsolnb.papers import locloc, pseudo_masks, scm
from wsolnb.train import evaluation, seeds, segmentation

SIDE, CLASSES = 64, 3
SETTINGS = LPCAMConfig(scales=(1.0,))


class Rectangles(LocalizationDataset):
    """Rectangles, a colour for each class, on noise: image `index` is the same whenever it is read."""

    name, split, class_names, root = "rectangles", "test", ("red", "green", "blue"), Path()

    def __init__(self, count: int, multi_label: bool):
        self.multi_label = multi_label
        self.image_ids = tuple(f"{index:05d}" for index in range(count))
        pairs = [(index % CLASSES, (index + 1) % CLASSES) for index in range(count)]
        self.labels = tuple(tuple(sorted(pair)) if multi_label else pair[:1] for pair in pairs)

    def read(self, index: int, truth: bool = True) -> Sample:
        """Draw an image."""
        rng, unit = np.random.default_rng(index), SIDE // 32
        image, mask = rng.integers(0, 120, (SIDE, SIDE, 3), np.uint8), np.zeros((SIDE, SIDE), np.uint8)
        boxes = []
        for half, label in enumerate(self.labels[index]):
            x, y = half * SIDE // 2 + rng.integers(1, 5) * unit, rng.integers(1, 15) * unit
            area = slice(y, y + 13 * unit), slice(x, x + 10 * unit)
            image[(*area, label)] = 220
            mask[area] = label + 1 if self.multi_label else 1
            boxes.append([area[1].start, area[0].start, area[1].stop, area[0].stop])
        sample = Sample(image, self.image_ids[index], self.labels[index])
        if truth:
            sample.boxes, sample.box_labels = np.array(boxes, float), np.array(self.labels[index])
            sample.mask, sample.parts = mask, np.where(mask > 0, 1 + (np.arange(SIDE) % 2), 0).astype(np.uint8)
        return sample


def rows(found: Iterator) -> None:
    """Go through what a generator yields, and keep nothing."""
    for _ in found:
        pass


class Work:
    """What the stages share: networks, data sets of `count` images, and a folder for the stages that write."""

    def __init__(self, count: int, folder: Path):
        torch.manual_seed(0)
        self.scenes, self.single = Rectangles(count, True), Rectangles(count, False)
        self.maps, self.labels, self.pseudo = (folder / name for name in ("maps", "labels", "pseudo"))
        self.store, self.transform = Store(self.maps / "lpcam"), Resize(SIDE)
        classifier = create_method("cam", create_backbone("resnet_mini", output_stride=8), CLASSES)
        self.source = LiveFeatures(ConvExtractor(classifier), self.scenes, SIDE)
        weight = self.source.weight
        self.by_name = {"cam": None, "lpcam": Directions(torch.randn_like(weight), torch.ones(len(weight)).bool())}
        self.config, self.crf = irn.IRNConfig(radius=3, exp_times=2), CRFConfig(max_side=16)
        self.irn = irn.IRN(create_backbone("resnet_mini"), width=8).eval()
        backbone: TransformerBackbone = create_backbone("vit_mini", image_size=SIDE).eval()
        self.scm = create_method("scm", backbone, CLASSES)
        parts = GrabCutEnhancedGenerator(backbone.dim, CLASSES), LocalFeatureDigging(backbone, CLASSES)
        self.locloc, self.attend = LocLoc(backbone, CLASSES, *parts).eval(), grabcut.Attend(backbone)
        self.grabcut, self.masks = GrabCutConfig(size=SIDE), Store(folder / "grabcut")

    def four_maps(self) -> None:
        """The comparison of notebook 31: attention, stored masks, and a model's maps beside each other."""
        grabcut.maker(self.single, self.attend, self.grabcut, 1, progress=False)(self.masks.folder)
        models = {"GEG": self.locloc}
        evaluation.score(locloc.four_maps(self.attend, self.masks, models, self.single, self.transform))

    def thresholds(self) -> None:
        """The search of notebook 30."""
        cuts = [{"fg_threshold": fg, "bg_threshold": bg} for fg, bg in itertools.product(locloc.FG[:2], locloc.BG[:1])]
        locloc.try_out(locloc.guided(self.single, self.attend, SIDE), (0.1, 0.2), cuts, 1)


STAGES: dict[str, Callable[[Work], object]] = {
    "22: scores of seeds": lambda own: seeds.score_variants(own.source, own.source, own.by_name, SETTINGS),
    "22: scores by image": lambda own: rows(seeds.image_scores(
        own.source, own.by_name, SETTINGS, dict.fromkeys(own.by_name, 0.3))),
    "23: maps": lambda own: write_maps(own.source, own.by_name, SETTINGS, own.maps),
    "23: scores of stored maps": lambda own: seeds.score_stored(own.store, own.scenes, own.store, own.scenes),
    "23: labels of IRN": lambda own: irn.write_irn_labels(own.store, own.scenes, own.config, own.crf, own.labels),
    "23: scores of walks": lambda own: pseudo_masks.score_walks(
        own.irn, own.store, own.scenes, own.config, (1.0, 0.0), (0, 2), SIDE),
    "23: pseudo masks": lambda own: irn.write_pseudo_masks(
        own.irn, own.store, own.scenes, own.config, SIDE, own.pseudo),
    "23: scores of masks": lambda own: segmentation.score_masks(WithMasks(own.scenes, Store(own.pseudo))),
    "23: scores of a segmenter": lambda own: segmentation.score_model(
        create_method("deeplabv2", create_backbone("resnet_mini", output_stride=8), CLASSES), own.scenes,
        segmentation.Inference(image_size=SIDE)),
    "12: scores of SCM": lambda own: evaluation.evaluate(own.scm, own.single, own.transform),
    "12: couplings": lambda own: scm.coupled(own.scm, own.single, own.transform),
    "33: scores of LocLoc": lambda own: evaluation.evaluate(own.locloc, own.single, own.transform),
    "31: four maps": Work.four_maps,
    "30: thresholds": Work.thresholds,
    "01, 03: box in the middle": lambda own: evaluation.centre_box(own.single),
}  # fmt: skip
"""What goes over all images of a split; some stages read what those before them have written."""


def peak(stage: str, count: int, folder: Path) -> dict[str, float]:
    """Run a stage in a fork of this process; return its peak of resident memory in MB, and its seconds."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def measure() -> None:
        started = time.perf_counter()
        STAGES[stage](Work(count, folder))
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
        megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
        sender.send({"megabytes": round(megabytes, 1), "seconds": round(time.perf_counter() - started, 1)})

    process = context.Process(target=measure)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def main(few: int = 100, many: int = 1000) -> dict:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result: dict = {}
    try:
        with tempfile.TemporaryDirectory() as place:
            warm = Work(4, Path(place) / "warm")  # compiles, and loads what is loaded once
            for stage in STAGES.values():
                stage(warm)
            for stage in STAGES:
                own = {count: peak(stage, count, Path(place) / str(count)) for count in (few, many)}
                growth = round(own[many]["megabytes"] - own[few]["megabytes"], 1)
                result[stage] = {"megabytes": own[few]["megabytes"], "growth": growth, "seconds": own[many]["seconds"]}
                print(f"{stage}: {own[few]['megabytes']:.0f} MB at {few} images, {growth:+.1f} MB at {many} "
                      f"({own[many]['seconds']:.0f} s)", flush=True)  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    one = round(SIDE * SIDE * 4 / 1e6 * (many - few), 1)
    print(f"one map of each image more would take {one:.0f} MB, two kinds of maps of two classes {4 * one:.0f} MB")
    return {"stages": result, "one_map_of_each": one, "largest_growth": max(own["growth"] for own in result.values())}


if __name__ == "__main__":
    main()
