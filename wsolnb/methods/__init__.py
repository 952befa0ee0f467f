"""Methods, one file each: a class over `LocalizationModel` or `Trainable`, registered under the file's name.

    @register("has")
    class HideAndSeek(CAMClassifier): ...

A method needs no more than a file in this folder. `create_method("has", backbone, 12)` finds it, and so do the
notebooks and parameter files that name it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from wsolnb.errors import ParameterError, nearest

if TYPE_CHECKING:
    from torch import nn

    from wsolnb.methods.base import Trainable

_METHODS: dict[str, type[Trainable]] = {}


def register(name: str) -> Callable[[type], type]:
    """Return a decorator that registers a class as the method `name`, which must be the name of its file."""

    def add(method: type) -> type:
        if method.__module__.rpartition(".")[2] != name:
            raise ParameterError(f"the method {name!r} lies in {method.__module__}", f"name the file {name}.py")
        _METHODS[name] = method
        return method

    return add


def methods() -> list[str]:
    """Return the names of all methods, in alphabetical order."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return sorted(_METHODS)


def get_method(name: str) -> type[Trainable]:
    """Return the class of a method.

    Raises ParameterError for an unknown name; the nearest one is given.
    """
    # Only the file that is asked for is imported: another method's code must not count as code that this one runs.
    if name not in _METHODS and name in {module.name for module in pkgutil.iter_modules(__path__)}:
        import_module(f"{__name__}.{name}")
    if name not in _METHODS:
        known = methods()
        raise ParameterError(f"unknown method {name!r}{nearest(name, known)}", f"use one of {', '.join(known)}")
    return _METHODS[name]


def create_method(name: str, backbone: nn.Module, num_classes: int, **options: Any) -> Trainable:
    """Return a method's model on a backbone, with fresh weights of its own layers.

    Raises ParameterError for an unknown method or option, or a backbone that the method cannot use.
    """
    method = get_method(name)
    try:
        return method.create(backbone, num_classes, **options)
    except TypeError as error:
        raise ParameterError(f"{name} cannot be made: {error}", f"see the options of {method.__name__}") from error
