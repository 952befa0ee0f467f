"""The package's errors: each names the thing that is wrong and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class WsolnbError(Exception):
    """Base of every error that this package raises on bad input.

    `problem` names the thing that is wrong, `remedy` says what to do; both are shown.
    """

    def __init__(self, problem: str, remedy: str = ""):
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}\n  Remedy: {remedy}" if remedy else problem)

    def __reduce__(self):
        return type(self), (self.problem, self.remedy)


class DataError(WsolnbError):
    """A data set on disk is missing, truncated or inconsistent."""


class MapError(WsolnbError, ValueError):
    """A score map, mask or box has a wrong shape, type or range, or holds NaN."""


class ParameterError(WsolnbError, ValueError):
    """A parameter is unknown, has a wrong type or a value out of range."""


class WeightsError(WsolnbError):
    """Weights are missing, damaged or belong to another model."""


class TrainingError(WsolnbError):
    """Training cannot go on (loss not finite, out of memory, damaged checkpoint)."""


class RunError(WsolnbError):
    """A run folder cannot be written, or what should go into it cannot be stored."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint ` (did you mean 'x'?)` for the known name closest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def check_choice(problem: str, name: str, known: Collection[str]) -> None:
    """Raise ParameterError (`problem`, the name and the nearest known name) when the name is not a known one."""
    if name not in known:
        raise ParameterError(f"{problem} {name!r}{nearest(name, known)}", f"choose one of {', '.join(known)}")
