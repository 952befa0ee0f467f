"""The experiments of SCM (Bai et al., ECCV 2022, https://arxiv.org/abs/2207.10447) and of its baselines.

baselines = scm.Baselines(**parameters)            # notebook 03: CAM, TS-CAM and other methods
pair = scm.Pair(**parameters)                      # notebook 11: TS-CAM and SCM from one start
model, folder = pair.fit(run, "scm", seed, splits)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from wsolnb.data.splits import DataSettings, Splits
from wsolnb.methods import get_method
from wsolnb.methods.base import LocalizationModel
from wsolnb.methods.cam import CAMClassifier
from wsolnb.methods.scm import SCMConfig
from wsolnb.notebook.runs import Run
from wsolnb.train.evaluation import validator
from wsolnb.train.loop import TrainingConfig
from wsolnb.train.recipe import Recipe, fit


class _Trained(DataSettings):
    """What both experiments share: how a single-label model is trained, and kept."""

    prefix: ClassVar[str] = ""
    image_size: int
    protocol: Literal["resize", "crop_resize", "crop"]
    pretrained: bool
    padding: Literal["zeros", "replicate"]
    batch_size: int
    weight_decay: float
    shift: int
    precision: Literal["auto", "bf16", "fp32"]
    device: str
    num_workers: int

    def recipe(self, method: str, seed: int, **changes: Any) -> Recipe:
        """Return how a method is trained with a seed."""
        raise NotImplementedError

    def fit(
        self, run: Run, method: str, seed: int, splits: Splits, progress: bool = True, **changes: Any
    ) -> tuple[LocalizationModel, Path]:
        """Return the trained model of a method at its last epoch, and its folder; trained once per run folder.

        The best epoch (`best` in the folder) is chosen on the validation images. changes: as of `recipe`.
        """
        recipe = self.recipe(method, seed, **changes)
        validate = validator(splits.val, recipe.test_transform())
        return fit(run, f"{self.prefix}{method}-{seed}", recipe, splits.train, validate, progress)

    def _recipe(self, method: str, backbone: str, options: dict[str, Any], seed: int, **loop: Any) -> Recipe:
        shared = {"pretrained", "image_size", "protocol", "batch_size", "shift", "num_workers"}
        loop |= self.model_dump(include={"weight_decay", "precision", "device"}) | {"seed": seed}
        training = TrainingConfig(**loop)
        return Recipe(
            method=method, backbone=backbone, options=options, training=training, **self.model_dump(include=shared)
        )


class Baselines(_Trained):
    """Notebook 03: a convolutional network for CAM and the methods built on it, a transformer for TS-CAM.

    The fields are the notebook's parameters.
    """

    cnn: str
    output_stride: int
    transformer: str
    cam_epochs: int
    cam_lr: float
    tscam_epochs: int
    tscam_lr: float
    tscam_head_lr: float

    def recipe(self, method: str, seed: int, **changes: Any) -> Recipe:
        """Return how a method is trained; a method over `CAMClassifier` as CAM is. changes: of the method's options."""
        if issubclass(get_method(method), CAMClassifier):
            loop = {"epochs": self.cam_epochs, "lr": self.cam_lr, "select": "top1_loc"}
            recipe = self._recipe(method, self.cnn, changes, seed, **loop)
            return recipe.model_copy(update={"output_stride": self.output_stride})
        loop = {"epochs": self.tscam_epochs, "lr": self.tscam_lr, "head_lr": self.tscam_head_lr, "select": "top1_loc"}
        return self._recipe(method, self.transformer, {"padding": self.padding, **changes}, seed, **loop)


class Pair(_Trained):
    """Notebook 11: TS-CAM and SCM from one start and in one order of images, without and with the calibration module.

    The fields are the notebook's parameters. preset: of `SCMConfig`.
    """

    prefix: ClassVar[str] = "pair-"
    backbone: str
    head_init: Literal["kaiming", "zeros"]
    preset: Literal["paper", "released"]
    epochs: int
    lr: float
    head_lr: float
    schedule: Literal["cosine", "constant"]
    betas: tuple[float, float]

    def recipe(self, method: str, seed: int, **changes: Any) -> Recipe:
        """Return how `tscam` or `scm` is trained. changes: of the preset's `SCMConfig`."""
        options: dict[str, Any] = {"padding": self.padding, "head_init": self.head_init}
        if method == "scm":
            options["config"] = getattr(SCMConfig, self.preset)(**changes).model_dump()
        loop = self.model_dump(include={"epochs", "lr", "head_lr", "schedule", "betas"}) | {"select": "gt_known"}
        return self._recipe(method, self.backbone, options, seed, **loop)
