"""Scores as functions of the threshold, which all accumulators return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from wsolnb.errors import ParameterError, check_choice


@dataclass(frozen=True)
class ThresholdCurve:
    """Named scores at every threshold.

    thresholds: (T,) ascending; scores: name -> (T,).

    A threshold that maximizes a score on the images it is reported for is an oracle: take it from `best` on a
    validation split, and report `at(threshold)` of the test split.
    """

    thresholds: np.ndarray
    scores: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        """Return the curve (T,) of the score `name`; ParameterError when there is none of that name."""
        check_choice("no score is called", name, self.scores)
        return self.scores[name]

    def best(self, name: str) -> tuple[float, float]:
        """Return (threshold, score) at the maximum of score `name`; the lowest threshold of equally good ones.

        Both are NaN if the score is NaN at every threshold, because then nothing was measured that could choose.
        """
        values = self[name]
        if np.isnan(values).all():
            return np.nan, np.nan
        index = int(np.argmax(values))
        return float(self.thresholds[index]), float(values[index])

    def at(self, threshold: float) -> dict[str, float]:
        """Return all scores at a threshold chosen elsewhere, which must be one of `thresholds`.

        Raises ParameterError for any other threshold, because nothing is interpolated. At a threshold of NaN all scores
        are NaN.
        """
        if np.isnan(threshold):
            return dict.fromkeys(self.scores, np.nan)
        index = self.index(threshold)
        return {name: float(values[index]) for name, values in self.scores.items()}

    def index(self, threshold: float) -> int:
        """Return the position of `threshold` in `thresholds`; ParameterError when it is not there."""
        index = int(np.argmin(np.abs(self.thresholds - threshold)))
        if not np.isclose(self.thresholds[index], threshold, rtol=0, atol=1e-9):
            raise ParameterError(
                f"the curve has no threshold {threshold:g}; the nearest one is {self.thresholds[index]:g}",
                "use the same thresholds for validation and test",
            )
        return index


@dataclass(frozen=True)
class Scored:
    """What `compute` of an accumulator returns: a curve, and more. MAIN: its main score."""

    MAIN: ClassVar[str]

    curve: ThresholdCurve

    def best(self, name: str = "") -> tuple[float, float]:
        """Return (threshold, score) at the maximum of a score, by default the main one."""
        return self.curve.best(name or self.MAIN)

    def at(self, threshold: float) -> dict[str, float]:
        """Return all scores at a threshold chosen elsewhere."""
        return self.curve.at(threshold)
