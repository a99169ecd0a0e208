"""The text form of observers in recipes: ``name`` or ``name(option=value,...)``, without axis and group."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from graphprune.errors import RecipeError, suggest
from graphprune.quant.histograms import EntropyHistogram, MeanSquaredError, Percentile
from graphprune.quant.observers import MinMax, MovingAverageMinMax, Observer

OBSERVERS: Mapping[str, type[Observer]] = MappingProxyType(
    {cls.name: cls for cls in (MinMax, MovingAverageMinMax, Percentile, EntropyHistogram, MeanSquaredError)}
)
"""Every observer by name."""

_CALL = re.compile(r"\s*([\w.-]+)\s*(?:\((.*)\))?\s*", re.DOTALL)
_SET_BY_CALLER = ("axis", "group")


def parse_observer(text: str, *, axis: int | None = None, group: int | None = None) -> Observer:
    """Read "min-max" or "percentile(fraction=0.999)"; ``parse_observer(format_observer(o)) == o`` but for axis and group.

    Args:
        text: The text; spaces around its parts do not matter.
        axis: Axis of the observer.
        group: Group of the observer.

    Returns:
        The observer.

    Raises:
        RecipeError: The text cannot be read; the name, an option or a value is not known or not possible.
    """
    match = _CALL.fullmatch(text)
    if match is None:
        raise RecipeError(
            f"cannot read observer {text!r}; write name or name(option=value,...){suggest(text, OBSERVERS)}"
        )
    name, listed = match[1], match[2] or ""
    if name not in OBSERVERS:
        raise RecipeError(f"unknown observer {name!r}{suggest(name, OBSERVERS)}")
    defaults = _options(OBSERVERS[name])
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in listed.split(","))):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in defaults:
            known = suggest(key, defaults) or "; it has no options"
            raise RecipeError(f"observer {name}: unknown option {key!r}{known}")
        if key in options:
            raise RecipeError(f"observer {name}: option {key!r} is given twice; leave one out")
        try:
            options[key] = int(value) if isinstance(defaults[key], int) else float(value)
        except ValueError as error:
            example = f"write for example {key}={defaults[key]}"
            raise RecipeError(f"observer {name}: {key}={value!r} is no number of its kind; {example}") from error
    return OBSERVERS[name](axis=axis, group=group, **options)


def format_observer(observer: Observer) -> str:
    """Write an observer as text; axis, group and options that have their default are left out."""
    options = [
        f"{key}={getattr(observer, key)!r}"
        for key, default in _options(type(observer)).items()
        if getattr(observer, key) != default
    ]
    return f"{observer.name}({','.join(options)})" if options else observer.name


def _options(cls: type[Observer]) -> dict[str, int | float]:
    default = cls()
    return {
        field.name: getattr(default, field.name)
        for field in dataclasses.fields(cls)
        if field.name not in _SET_BY_CALLER
    }
