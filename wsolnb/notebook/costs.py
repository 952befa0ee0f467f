"""What the steps of a profile will cost, before anything starts: hours, memory, disk and downloads.

    rows, remarks = costs.report(pipeline.resolved(steps), "a100")

Estimates, not measurements. The multiply-adds of a network are counted, on tensors without content. The images are
those of the data set, or of the catalogue where it is not there. Rates are `DEVICES` and the constants below. A step of
training is three forward passes of what is trained, one of what is frozen. Parameters are known by their names, as in
`preflight`; one that a notebook does not declare is that of the notebook it goes on from.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from wsolnb.data.downloads import catalogue, in_words
from wsolnb.errors import ParameterError, WsolnbError, check_choice
from wsolnb.files import resolve, within
from wsolnb.notebook import preflight


class Device(NamedTuple):
    """What computes. bf16, fp32: dense peaks, 10^12 operations a second; bf16 is 0 where the device has none.

    shares: of the two peaks that are reached. memory: GB. cores: that prepare images and do what needs no network.
    """

    title: str
    bf16: float
    fp32: float
    memory: float
    shares: tuple[float, float] = (0.2, 0.5)  # assumed, not measured
    cores: int = 8


DEVICES = {
    "cpu": Device("one core of this processor", 0.15, 0.1, 0, (1, 1), 1),  # what trainings of this repository reached
    "t4": Device("NVIDIA T4", 0, 8.1, 16),
    "v100": Device("NVIDIA V100 SXM2", 0, 15.7, 32),
    "rtx3090": Device("NVIDIA RTX 3090", 71, 35.6, 24),
    "rtx4090": Device("NVIDIA RTX 4090", 165, 82.6, 24),
    "l4": Device("NVIDIA L4", 121, 30.3, 24),
    "a100": Device("NVIDIA A100 SXM, 80 GB", 312, 19.5, 80),
    "h100": Device("NVIDIA H100 SXM", 989, 66.9, 80),
}
"""By the name that `wsolnb plan --device` takes. Peaks of GPUs: NVIDIA's data sheets, without sparsity."""

START = 30.0  # seconds of a notebook beside what is counted: imports, figures. Measured: 14 to 60
DRAWN, PHOTOGRAPH = 0.002, 0.010  # seconds of a core to read and augment one image. Measured
SCORING = 0.003  # seconds of a core to make and score the maps of one image. Measured at 112 px
GRABCUT = 1.2e-6  # seconds of a core a pixel. Measured (benchmarks/grabcut.py)
WALK = 25e-6  # seconds of a core a cell of IRN's grid. Measured (benchmarks/irn_propagation.py)
CRF = {"mean_field": 0.02, "pydensecrf": 1.0, "none": 0.0}  # seconds of a core an image. The second is assumed
PIXELS = 500 * 375  # of a photograph of VOC or COCO, where it keeps its size
LABELS = 1.5  # classes of an image of several labels, in the mean of VOC
HELD_OUT = 0.1  # of the training images of VOC and COCO, for choices; of others their reader says it


class Network(NamedTuple):
    """What is counted of one image: multiply-adds, forward and of a step of training; weights; what the step keeps."""

    forward: float
    step: float
    weights: int
    trained: int
    activations: int


class Work(NamedTuple):
    """Something that a step does. trained, seen: images that pass the network with a backward pass, and without.

    batch: of the training. scored: images whose maps are scored. alone: seconds of a core without a network. copies:
    how many networks are kept. stored: bytes besides.
    """

    network: Network | None = None
    trained: float = 0
    seen: float = 0
    batch: int = 1
    scored: float = 0
    alone: float = 0
    copies: int = 0
    stored: float = 0


class Cost(NamedTuple):
    """The estimate of one step. hours: of the device. memory: GB, the device's or of the process. disk: GB.

    note: why nothing is estimated, or what is left out.
    """

    notebook: str
    hours: float
    memory: float
    disk: float
    note: str = ""


class Images(NamedTuple):
    """How many images and classes a data set has."""

    train: int
    val: int
    test: int
    classes: int


def report(steps: Mapping[str, Mapping[str, Any]], device: str) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return a table of the steps' costs with their sum, its head first, and lines on downloads and assumptions.

    steps: as of `estimate`. device: a name of `DEVICES`. Raises ParameterError for an unknown one.
    """
    check_choice("no rates are known of the device", device, DEVICES)
    by, costs = DEVICES[device], estimate(steps, DEVICES[device])
    known = [cost for cost in costs if not math.isnan(cost.hours)]
    memory = max((cost.memory for cost in known), default=0.0)
    total = Cost("total", sum(cost.hours for cost in known), memory, sum(cost.disk for cost in known))
    rows = [("estimate", "hours", "memory, GB", "disk, GB", "")]
    rows += [(one.notebook, *(f"{number:.2f}" for number in one[1:4]), one.note) for one in [*costs, total]]
    fetched = ", ".join(f"{name} ({size})" for name, size in downloads(steps).items())
    reached = "; reached by trainings of this repository"
    if device != "cpu":
        reached = f"; the peaks of its data sheet, of which {by.shares[0]:.0%} and {by.shares[1]:.0%} are assumed"
    return rows, [
        f"downloads: {fetched or 'none'}",
        "Estimates, not measurements. Assumed:",
        f"  {by.title}, {by.bf16:g} (bf16) and {by.fp32:g} (fp32) x 10^12 operations a second{reached}",
        "  a step of training is three forward passes of what is trained, one of what is frozen, as counted",
        f"  {START:g} s a notebook, {1e3 * PHOTOGRAPH:g} ms of a core to read a photograph, as measured here",
        f"  {CRF['pydensecrf']:g} s of a core for the CRF `pydensecrf` on an image, not measured; cores: {by.cores}",
        "  memory: weights, gradients, two moments, activations of a batch; disk: last and best weights, maps, masks",
    ]


def estimate(steps: Mapping[str, Mapping[str, Any]], device: Device) -> list[Cost]:
    """Return the cost of each step in order. Nothing is trained or downloaded.

    steps: all parameters by notebook, with those of the notebooks that it goes on from (`pipeline.resolved`).
    """
    return [_cost(notebook, values, device) for notebook, values in steps.items()]


def _cost(notebook: str, values: Mapping[str, Any], device: Device) -> Cost:
    bf16 = device.bf16 and values.get("precision", "auto") != "fp32" and (device is not DEVICES["cpu"] or _has_bf16())
    rate = 1e12 * (device.bf16 * device.shares[0] if bf16 else device.fp32 * device.shares[1])
    reading = DRAWN if values.get("dataset", "aviary") == "aviary" else PHOTOGRAPH
    workers = min(device.cores, max(1, values.get("num_workers") or 1))
    try:
        works = list(_WORKS[notebook](values, _images(values))) if notebook in _WORKS else []
    except (WsolnbError, KeyError) as error:
        what = error.problem if isinstance(error, WsolnbError) else f"it has no parameter {error}"
        return Cost(notebook, float("nan"), float("nan"), float("nan"), f"not estimated: {what}")
    seconds, memory, disk = START, 1.0, 0.005e9
    for one in works:
        net = one.network or Network(0, 0, 0, 0, 0)
        computing = 2 * (one.trained * net.step + one.seen * net.forward) / rate
        fetching = (one.trained + one.seen) * reading / workers
        together = computing + fetching if device.cores == 1 else max(computing, fetching)
        seconds += together + (one.scored * SCORING + one.alone) / device.cores
        # Weights, gradients and two moments; activations of a batch, once for the pass and half for what it works with.
        held = 4 * net.weights + 12 * net.trained + 1.5 * (2 if bf16 else 4) * net.activations * one.batch
        memory = max(memory, 1.0 + held / 1e9)
        disk += one.copies * 2 * 4 * net.weights + one.stored  # the last and the best epoch
    note = "its studies are not counted" if values.get("studies") or values.get("variants") else ""
    if 0 < device.memory < memory:
        note = f"more than the {device.memory:g} GB of the device: give a smaller batch"
    return Cost(notebook, seconds / 3600, memory, disk / 1e9, note)


def is_heavy(notebook: str) -> bool:
    """Return whether a notebook trains, or passes many images through a network."""
    return notebook in _WORKS


def downloads(steps: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return what is still to be fetched, by name: data sets and published weights, each with its size in words.

    steps: as of `estimate`.
    """
    import timm
    import torch

    from wsolnb.backbones.registry import timm_name_of

    found: dict[str, str] = {}
    for values in steps.values():
        record = catalogue().get(_record_of(values))
        if record and not resolve(values.get("data_root") or record.folder).is_dir():
            found[record.title] = record.size
        for network in preflight.networks(values):
            if network not in found and preflight.is_download(network):
                with torch.device("meta"):
                    model = timm.create_model(timm_name_of(network))
                found[network] = in_words(4 * sum(weight.numel() for weight in model.parameters()))
    return found


def _record_of(values: Mapping[str, Any]) -> str:
    dataset = values.get("dataset", "")
    return {"metadata": "ilsvrc"}.get(dataset, dataset)


def _has_bf16() -> bool:
    import torch

    from wsolnb.train.loop import pick_precision

    return pick_precision("auto", torch.device("cpu")) == "bf16"


@functools.cache
def count(method: str, backbone: str, size: int, classes: int, options: tuple = (), stride: int = 16) -> Network:
    """Count a method's network on one image of `size` x `size` pixels. No weights are loaded, nothing is computed.

    options: of the method, as pairs. stride: of a CNN's final map. Raises ParameterError as `create_method` does.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from wsolnb.methods import create_method, get_method

    network = get_method(method).make_backbone(backbone, image_size=size, output_stride=stride)
    model = create_method(method, network, classes, **dict(options)).eval()
    held = 0

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        nonlocal held
        held += output.numel() if isinstance(output, torch.Tensor) and output.requires_grad else 0

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(keep)
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size))
    operations, of = counter.get_flop_counts(), type(model).__name__
    weights = {f"{of}.{name}": [w.requires_grad for w in one.parameters()] for name, one in model.named_modules()}
    fixed = [name for name in operations if weights.get(name) and not any(weights[name])]
    outer = [name for name in fixed if not any(name.startswith(f"{other}.") for other in fixed)]
    frozen = sum(sum(operations[name].values()) for name in outer) / 2
    forward, sizes = counter.get_total_flops() / 2, [(w.numel(), w.requires_grad) for w in model.parameters()]
    learns = sum(number for number, trained in sizes if trained)
    return Network(forward, frozen + 3 * (forward - frozen), sum(number for number, _ in sizes), learns, held)


def _images(v: Mapping[str, Any]) -> Images:
    """Return the numbers of the data set: of the folder where it is there, else of the catalogue."""
    dataset, root = v.get("dataset", "aviary"), v.get("data_root", "")
    if dataset == "aviary":
        return Images(*(v.get(f"{split}_images", 0) for split in ("train", "val", "test")), v.get("classes", 0))
    record = catalogue().get(_record_of(v))
    if root and resolve(root).is_dir():
        train, val, test, classes = _opened(dataset, root, v.get("seed", 0))
    elif record is None:
        raise ParameterError(f"the data set {dataset!r} is not in {root or '(no folder given)'}")
    else:
        published = {name: split.images for name, split in record.splits.items()}
        train = published.get("trainval") or published["train"]
        val = 0 if dataset in ("voc", "coco") else published.get("val", 0)
        test, classes = published.get("test") or published["val"], record.classes
    if v.get("train_list"):  # a longer list of VOC
        path = within(root, v["train_list"])
        train = len(path.read_text("utf-8").split()) if path.is_file() else record.splits["train_aug"].images
    held = 0 if val else round(_held_out(dataset) * train)
    train = min(v.get("images") or train, train - held)
    return Images(train, val or held, test, classes)


def _held_out(dataset: str) -> float:
    from wsolnb.data.readers import get_reader

    parameters = {} if dataset in ("voc", "coco") else inspect.signature(get_reader(dataset)).parameters
    return parameters["val_fraction"].default if "val_fraction" in parameters else HELD_OUT


def _opened(dataset: str, root: str, seed: int) -> Images:
    from wsolnb.data.readers import open_dataset
    from wsolnb.data.splits import load_splits

    if dataset in ("voc", "coco"):  # their `test` has no labels
        train, test = (open_dataset(dataset, resolve(root), split) for split in ("train", "val"))
        return Images(len(train), 0, len(test), len(train.class_names))
    splits = load_splits(dataset, root, seed)
    return Images(*map(len, splits), len(splits.train.class_names))


# What each notebook does


def _training(v: Mapping[str, Any], n: Images, net: Network, epochs: int, times: int = 1, scored: bool = True) -> Work:
    """A training over all images; `scored`: on validation images after each epoch, on all others at the end."""
    others = (epochs * n.val + 2 * (n.val + n.test)) if scored else 0
    batch = v.get("batch_size", 32)
    return Work(net, times * epochs * n.train, times * others, batch, times * others, copies=times)


def _baselines(v: Mapping[str, Any], n: Images) -> Iterator[Work]:
    times = len(v["seeds"])
    cam = count("cam", v["cnn"], v["image_size"], n.classes, stride=v["output_stride"])
    yield _training(v, n, cam, v["cam_epochs"], times * (1 + len(v["compared"])))
    yield _training(v, n, count("tscam", v["transformer"], v["image_size"], n.classes), v["tscam_epochs"], times)


def _pretraining(v: Mapping[str, Any], n: Images) -> Iterator[Work]:
    nets = [count("tscam", one, 112, n.classes) for one in v["tuned"] if one in v["transformers"]]
    yield from (_training(v, n, net, v["epochs"], len(v["seeds"])) for net in nets)


def _scm(v: Mapping[str, Any], n: Images) -> Iterator[Work]:
    nets = [count(method, v["backbone"], v["image_size"], n.classes) for method in ("tscam", "scm")]
    yield from (_training(v, n, net, v["epochs"], len(v["seeds"])) for net in nets)
    if v["literal_epochs"]:
        yield _training(v, n, nets[1], v["literal_epochs"])


def _scm_results(v: Mapping[str, Any], n: Images) -> Iterator[Work]:
    held = 2 * (n.val + n.test) + (25 * n.val if v["couplings"] else 0)
    yield Work(count("tscam", v["backbone"], v["image_size"], n.classes), seen=held, scored=held)


def _host(v: Mapping[str, Any], n: Images) -> Network:
    return count(v["method"], v["backbone"], v["image_size"], n.classes, stride=v["output_stride"])


def _classifier(v: Mapping[str, Any], n: Images) -> Iterator[Work]:
    held = 2 * 2 * (n.val + n.test)  # each with its mirror image: maps, and scores of classes
    if v["frozen"]:
        yield Work(_host(v, n), seen=n.train + held, scored=held)
    else:
        yield _training(v, n, _host(v, n), v["epochs"], scored=False)
        yield Work(_host(v, n), seen=v["epochs"] * n.val + held, scored=held)


def _passes(v: Mapping[str, Any]) -> float:
    """Passes of an image over all scales with its mirror image, in passes at the training's size."""
    return 2 * sum(scale**2 for scale in v["scales"])


def _prototypes(v: Mapping[str, Any], n: Images) -> Iterator[Work]:
    chosen = min(n.train, v["images_per_class"] * n.classes) or n.train
    held = n.val + n.test
    # One round of k-means: every feature with every centre. Some 20 rounds, at some 10^10 operations a second.
    features = 2 * n.classes * (v["features_per_class"] or 100_000)
    clustering = 20 * 2 * features * v["clusters"] * 2048 / 1e10
    yield Work(_host(v, n), seen=chosen + _passes(v) * held, scored=4 * held, alone=clustering)


def _lpcam_results(v: Mapping[str, Any], n: Images) -> Iterator[Work]:
    held = n.val + n.test
    yield Work(_host(v, n), seen=_passes(v) * 2 * held, scored=8 * held)


def _segmentation(v: Mapping[str, Any], n: Images) -> Iterator[Work]:
    train, tune = min(v["images"] or n.train, n.train), min(v["tuning_images"] or n.val, n.val)
    pixels = v["irn_size"] ** 2 if v["resize"] else PIXELS
    stored = 2 * (2 * train + tune) * LABELS * pixels * 2  # maps in half precision of CAM and LPCAM, seeds and walked
    grid = len(v["grid_mu"] or [0]) ** 2 * len(v["floors"])
    yield Work(_host(v, n), seen=_passes(v) * (train + tune), scored=(grid + 2) * tune + 2 * train, stored=stored)
    irn = count("irn", v["irn_backbone"], v["irn_size"], n.classes, (("width", v["irn_width"]),), 16)
    walked = train + tune * len(v["dampings"]) * len(v["steps"])
    alone = 2 * (2 * train * CRF[v["crf_backend"]] + walked * WALK * pixels / 16)
    yield Work(irn, 2 * v["irn_epochs"] * train, 4 * (train + tune), v["irn_batch_size"], 0, alone, copies=2)
    options = (("dilations", tuple(v["dilations"])),) if v["segmenter"] == "deeplabv2" else ()
    net = count(v["segmenter"], v["segmenter_backbone"], v["segmenter_size"], n.classes, options, 8)
    shown = 1 if v["resize"] else PIXELS / v["segmenter_size"] ** 2
    seen = 3 * 2 * sum(scale**2 for scale in v["test_scales"]) * shown * n.test
    yield Work(net, 3 * v["segmenter_epochs"] * train, seen, v["segmenter_batch_size"], 3 * n.test, copies=3)


def _grabcut(v: Mapping[str, Any], n: Images) -> Iterator[Work]:
    images = n.train + n.val + n.test
    searched = 40 * min(v["search_images"], n.val)  # 5 x 4 thresholds and two sides
    net = count("ppd", v["backbone"], v["image_size"], n.classes, (("part", "probe"),))  # little more than its backbone
    cuts = (images + 2 * n.val + searched) * v["size"] ** 2 * GRABCUT
    yield Work(net, seen=images + 3 * n.val + n.test, alone=cuts, stored=4096 * images)


def _decoders(v: Mapping[str, Any], n: Images) -> Iterator[Work]:
    taught = n._replace(train=min(v["generator_images"] or n.train, n.train))
    for part in ("generator", "decoder"):
        yield _training(v, taught, _part(v, n, part), v[f"{part}_epochs"], scored=False)
        yield Work(_part(v, n, part), seen=n.val + n.test, scored=2 * (n.val + n.test))


def _part(v: Mapping[str, Any], n: Images, part: str) -> Network:
    from wsolnb.methods.locloc import LocLocConfig

    method = "locloc" if part in ("generator", "classifier") else "ppd"
    options = {"decoder": (("hidden", v["ppd_hidden"]), ("channels", v["ppd_channels"]))}
    options["generator"] = (("config", getattr(LocLocConfig, v["preset"])(channels=v["channels"])),)
    return count(method, v["backbone"], v["image_size"], n.classes, (("part", part), *options.get(part, ())))


def _classifiers(v: Mapping[str, Any], n: Images) -> Iterator[Work]:
    held, probe = n.val + n.test, _part(v, n, "probe")
    yield _training(v, n, _part(v, n, "classifier"), v["classifier_epochs"], scored=False)
    if v["probe"] == "sgd":
        yield _training(v, n, probe, v["probe_epochs"], scored=False)
    else:
        yield Work(probe, seen=n.train)
    yield Work(_part(v, n, "classifier"), seen=4 * held, scored=2 * held)


def _locloc_results(v: Mapping[str, Any], n: Images) -> Iterator[Work]:
    held = n.val + n.test
    for part in ("generator", "classifier", "decoder"):
        yield Work(_part(v, n, part), seen=held, scored=2 * held)


_WORKS: dict[str, Callable[[Mapping[str, Any], Images], Iterator[Work]]] = {
    "03_cam_and_tscam": _baselines,
    "04_pretraining": _pretraining,
    "11_scm_training": _scm,
    "12_scm_results": _scm_results,
    "20_lpcam_classifier": _classifier,
    "21_lpcam_prototypes": _prototypes,
    "22_lpcam_results": _lpcam_results,
    "23_lpcam_segmentation": _segmentation,
    "30_locloc_grabcut": _grabcut,
    "31_locloc_generator": _decoders,
    "32_locloc_classifier": _classifiers,
    "33_locloc_results": _locloc_results,
}
"""What trains or passes many images; the other notebooks take `START`."""
