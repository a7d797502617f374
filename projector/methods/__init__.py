"""One file per method. A module dropped in here is found by itself, and so is an entry point in the group
`mainstem.methods`."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from projector.errors import UnknownMethod
from projector.method import Method
from projector.methods._layers import is_layered, layer_scales, layered

__all__ = ["is_layered", "layer_scales", "make", "methods"]


@cache
def methods() -> Mapping[str, type[Method]]:
    """Every installed method class by name, sorted."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = [value for module in modules for value in vars(module).values() if _is_method(value)]
    found += [point.load() for point in entry_points(group="mainstem.methods")]
    return {cls.name: cls for cls in sorted(found, key=lambda cls: cls.name)}


def make(name: str, params: Mapping[str, Any] | None = None) -> Method:
    """The method `name` with these parameters, and where `layer_alpha` or `layer_beta` is among them, with its task
    vectors scaled by layer. Raises UnknownMethod or BadParameter."""
    if name not in methods():
        raise UnknownMethod(f"there is no method {name!r}", f"choose one of {', '.join(methods())}")
    params = params or {}
    return (layered(methods()[name]) if is_layered(params) else methods()[name]).from_params(params)


def _is_method(value: object) -> bool:
    return (
        isinstance(value, type)
        and issubclass(value, Method)
        and hasattr(value, "name")
        and not value.__name__.startswith("_")  # what a method uses itself
    )
