"""Before the first notebook starts: is everything there that the steps of a profile need?

    findings = preflight.look({"20_lpcam_classifier": {"dataset": "voc", "data_root": "data/VOC2012", ...}})

Data, lists and files, published weights, optional packages, the device, disk and memory are checked, each once. One
report names what is missing. Parameters are known by their names, which all notebooks share.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from wsolnb.errors import WsolnbError
from wsolnb.files import resolve, within

NETWORKS = ("backbone", "cnn", "transformer", "irn_backbone", "segmenter_backbone")
"""Parameters that name a network."""
FILES = ("train_list", "checkpoint", "photos_root", "tiny_root")
"""Parameters that name a file or a folder other than a data set's; an empty one is not used. A list may lie beside the
data."""
PACKAGES = {
    ("crf_backend", "pydensecrf"): ("pydensecrf", "pip install -e '.[crf]', or use `-p crf_backend=mean_field`"),
    ("segmenter", "upernet"): ("segmentation_models_pytorch", "run tools/setup.sh, which installs the lock"),
}
"""By name and value of a parameter: the package that it needs, and the remedy."""
LEAST_DISK, LEAST_MEMORY = 1.0, 2.0
"""GB that must be free in the run folder, and GB of memory below which a note is made."""


class Missing(WsolnbError):
    """Something that the steps of a profile need is not there."""


class Finding(NamedTuple):
    """Something that a step lacks, or that the user should know. fatal: the step cannot run without it."""

    notebook: str
    text: str
    remedy: str = ""
    fatal: bool = True


def look(steps: Mapping[str, Mapping[str, Any]], folder: Path, gpu: bool = False) -> list[Finding]:
    """Return what is missing, or worth a note, for steps with all their parameters; each thing once.

    steps: parameters by notebook. folder: the run folder, which need not be there. gpu: the profile is made for one.
    """
    found: dict[Any, Finding] = {}
    for notebook, values in steps.items():
        for key, check in _checks(values):
            if key not in found and (finding := check()):
                found[key] = finding._replace(notebook=notebook)
    return [*found.values(), *_machine(folder, gpu)]


def report(findings: list[Finding], say: Callable[[str], None]) -> None:
    """Say the notes among findings, and raise `Missing` with all that is fatal."""
    for finding in findings:
        if not finding.fatal:
            say(f"note: {finding.text}")
    if fatal := [finding for finding in findings if finding.fatal]:
        lines = "".join(f"\n  - {one.notebook}: {one.text}\n    Remedy: {one.remedy}" for one in fatal)
        things = "thing is" if len(fatal) == 1 else "things are"
        raise Missing(f"nothing was started: {len(fatal)} {things} missing{lines}")


def _checks(values: Mapping[str, Any]) -> Iterator[tuple[Any, Callable[[], Finding | None]]]:
    """Yield a key for each thing that is checked, and the function that checks it."""
    root = values.get("data_root", "")
    if (dataset := values.get("dataset", "aviary")) != "aviary":
        yield ("data", dataset, root), lambda: _data(dataset, root, values.get("seed", 0))
    for name in FILES:
        if path := values.get(name, ""):
            yield ("file", path), lambda name=name, path=path: _file(name, path, root)
    for network in networks(values):
        yield ("weights", network), lambda network=network: _weights(network)
    for (name, value), (package, remedy) in PACKAGES.items():
        if values.get(name) == value:
            yield ("package", package), lambda package=package, remedy=remedy: _package(package, remedy)
    if (device := values.get("device", "auto")) in ("cuda", "mps"):
        yield ("device", device), lambda: _device(device)


def networks(values: Mapping[str, Any]) -> list[str]:
    """Return the networks whose published weights a step with these parameters starts from."""
    if not values.get("pretrained", True) or values.get("checkpoint"):
        return []
    return [values[name] for name in NETWORKS if values.get(name)]


def is_download(network: str) -> bool:
    """Return whether a network's weights are published, and not on this machine."""
    finding = _weights(network)
    return finding is not None and not finding.fatal


def _data(dataset: str, root: str, seed: int) -> Finding | None:
    """Open the splits, and read one image of each."""
    from wsolnb.data.readers import open_dataset
    from wsolnb.data.splits import PUBLISHED, load_splits

    try:
        if dataset in PUBLISHED:  # the published test images have no labels
            splits = [open_dataset(dataset, resolve(root) if root else None, split) for split in PUBLISHED[dataset]]
        else:
            splits = list(load_splits(dataset, root, seed))
        for split in splits:
            split.read(0, truth=False)
    except WsolnbError as error:
        return Finding("", f"the data set {dataset!r} at {root or '(no folder given)'}: {error.problem}", error.remedy)
    return None


def _file(name: str, path: str, root: str) -> Finding | None:
    if within(root, path).exists():
        return None
    return Finding("", f"{name}: there is no {path}", f"give another with `-p {name}=...`")


def _weights(network: str) -> Finding | None:
    from wsolnb import weights

    if network in weights.embedded():
        return None
    # Only here: each process that runs a notebook imports this module, and PyTorch takes seconds and memory.
    from wsolnb.backbones.wheels import WHEELS, installed

    if network in WHEELS and installed(network):
        return None
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    from wsolnb.backbones.registry import CONFORMERS, timm_name_of

    if network in CONFORMERS:
        remedy = "download Conformer's file, and give its path with `-p checkpoint=...`"
        return Finding("", f"no library holds the weights of {network!r}", remedy)
    try:
        config = timm.get_pretrained_cfg(name := timm_name_of(network))
    except WsolnbError as error:
        return Finding("", error.problem, error.remedy)
    if config is None or not config.hf_hub_id:
        return Finding("", f"nobody has published weights of {network!r}", "use `-p pretrained=false`, or a checkpoint")
    repository = f"timm/{name}" if config.hf_hub_id == "timm/" else config.hf_hub_id
    cached = [try_to_load_from_cache(repository, file) for file in ("model.safetensors", "pytorch_model.bin")]
    if any(isinstance(path, str) for path in cached):
        return None
    source = f"https://huggingface.co/{repository}"
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") == "1":
        remedy = f"unset HF_HUB_OFFLINE, or copy {source} into the cache (HF_HOME)"
        return Finding("", f"the weights of {network!r} are not in the cache, and downloads are off", remedy)
    return Finding("", f"the weights of {network!r} will be downloaded from {source}", fatal=False)


def _package(package: str, remedy: str) -> Finding | None:
    if importlib.util.find_spec(package):
        return None
    return Finding("", f"the package {package!r} is not installed", remedy)


def _device(device: str) -> Finding | None:
    import torch

    there = torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available()
    return None if there else Finding("", f"PyTorch finds no {device} device", "use `-p device=auto`")


def gpus() -> list[str]:
    """Return what notebooks could fight for: the GPUs of CUDA, as CUDA_VISIBLE_DEVICES names them, or that of MPS."""
    import torch

    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if count := torch.cuda.device_count():
        return (visible or [str(index) for index in range(count)])[:count]
    return ["mps"] if torch.backends.mps.is_available() else []


def _machine(folder: Path, gpu: bool) -> Iterator[Finding]:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        what = "cannot be written" if there.is_dir() else "is no folder"
        yield Finding("all", f"{there} {what}", "change its permissions, or give another folder with `--outputs DIR`")
    if (disk := shutil.disk_usage(there).free / 1e9) < LEAST_DISK:
        yield Finding("all", f"{disk:.1f} GB are free in {there}", f"free {LEAST_DISK:g} GB, or give `--outputs DIR`")
    if (memory := psutil.virtual_memory().available / 1e9) < LEAST_MEMORY:
        yield Finding("all", f"{memory:.1f} GB of memory are free; notebooks take up to {LEAST_MEMORY:g}", fatal=False)
    if gpu:
        import torch

        if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
            yield Finding("all", "this profile is made for a GPU, and there is none: days or weeks", fatal=False)
