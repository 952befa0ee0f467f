"""What the notebooks train, by the notebook's name: for `python -m wsolnb.train`, on one device or on several.

    TRAININGS["11_scm_training"](run, parameters)

Each calls the functions that its notebook calls, with the same parameters. So the notebook finds what is trained here.
What a notebook trains for its studies (`variants`) is left to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from wsolnb.notebook.runs import Run
from wsolnb.papers import locloc, lpcam, scm


def train_baselines(run: Run, parameters: Mapping[str, Any]) -> None:
    """Notebook 03: CAM, TS-CAM and the compared methods."""
    baselines = scm.Baselines(**parameters)
    methods = dict.fromkeys(["cam", "tscam", *parameters["compared"]])
    baselines.fit_all(run, methods, parameters["seeds"], baselines.splits())


def train_pair(run: Run, parameters: Mapping[str, Any]) -> None:
    """Notebook 11: TS-CAM and SCM."""
    pair, seeds = scm.Pair(**parameters), parameters["seeds"]
    splits = pair.splits()
    pair.fit_all(run, scm.PAIR, seeds, splits)
    if parameters["literal_epochs"]:
        pair.fit_literal(run, seeds[0], splits, parameters["literal_epochs"])


def train_classifier(run: Run, parameters: Mapping[str, Any]) -> None:
    """Notebook 20: the multi-label classifier."""
    lpcam.Classifier(**parameters).host(run, progress=True)


def train_decoders(run: Run, parameters: Mapping[str, Any]) -> None:
    """Notebook 31: LocLoc's generator and PPD's decoder, and GrabCut's masks where there are none yet."""
    experiment = locloc.Experiment(masks=run.used("30_locloc_grabcut"), decoders=parameters)
    taught = experiment.masks.taught(run, experiment.masks.splits().train)
    for part in ("generator", "decoder"):
        experiment.fit(run, part, parameters["seeds"][0], taught)


def train_classifiers(run: Run, parameters: Mapping[str, Any]) -> None:
    """Notebook 32: LocLoc's classifier, and PPD's probe."""
    settings = {"masks": run.used("30_locloc_grabcut"), "decoders": run.used("31_locloc_generator")}
    experiment = locloc.Experiment(**settings, classifiers=parameters)
    taught = experiment.masks.taught(run, experiment.masks.splits().train)
    for part in ("classifier", "generator", "probe"):
        experiment.fit(run, part, parameters["seeds"][0], taught)


TRAININGS: dict[str, Callable[[Run, Mapping[str, Any]], None]] = {
    "03_cam_and_tscam": train_baselines,
    "11_scm_training": train_pair,
    "20_lpcam_classifier": train_classifier,
    "31_locloc_generator": train_decoders,
    "32_locloc_classifier": train_classifiers,
}
