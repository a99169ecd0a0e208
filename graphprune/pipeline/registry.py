"""Find passes and targets by name, through the entry points ``graphprune.passes`` and ``graphprune.targets``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from graphprune.errors import GraphPruneError, RecipeError, suggest
from graphprune.pipeline.base import Pass
from graphprune.pipeline.target import Target
from graphprune.pipeline.text import parse_pipeline

T = TypeVar("T", Pass, Target)


@cache
def _load(group: str, base: Any) -> Mapping[str, Any]:
    """Classes that the installed packages offer. Each entry point names a package whose ``__all__`` lists them."""
    found: dict[str, Any] = {}
    for point in entry_points(group=group):
        package = point.load()
        for name in package.__all__:
            offered = getattr(package, name)
            if isinstance(offered, type) and issubclass(offered, base):
                cls: Any = offered
                other = found.setdefault(cls.name, cls)
                if other is not cls:
                    raise GraphPruneError(
                        f"two packages offer {cls.name!r} in {group}: {other.__module__} and {cls.__module__}; uninstall one"
                    )
    if not found:
        raise GraphPruneError(f"no entry points {group} are installed; install graphprune itself (pip install -e .)")
    return dict(sorted(found.items()))


def known_passes() -> Mapping[str, type[Pass]]:
    """All installed passes by name."""
    return _load("graphprune.passes", Pass)


def known_targets() -> Mapping[str, type[Target]]:
    """All installed targets by name."""
    return _load("graphprune.targets", Target)


def make_pass(name: str, options: Mapping[str, object], where: str = "") -> Pass:
    """Build a pass from its name and options.

    Args:
        name: A registered name.
        options: Values by option name.
        where: Path in the recipe, such as ``pipeline[1]``, for messages.

    Raises:
        RecipeError: Unknown pass or option, or a value of the wrong type or out of range.
    """
    passes = known_passes()
    if name not in passes:
        raise RecipeError(f"{_at(where)}unknown pass {name!r}{suggest(name, passes)}")
    return _build(passes[name], name, options, where)


def find_target(name: str, where: str = "") -> type[Target]:
    """The class of a target.

    Raises:
        RecipeError: No installed package offers it; suggests a close match.
    """
    targets = known_targets()
    if name not in targets:
        raise RecipeError(f"{_at(where)}unknown target {name!r}{suggest(name, targets)}")
    return targets[name]


def make_target(name: str, options: Mapping[str, object] | None = None, where: str = "") -> Target:
    """Build a target from its name and options.

    Raises:
        RecipeError: Unknown target or option, or a value of the wrong type or out of range.
    """
    return _build(find_target(name, where), name, options or {}, where)


def read_target(text: str) -> Target:
    """Build a target from its name, with options as those of a pass: ``onnx``, ``onnx{opset=19}``.

    Raises:
        RecipeError: The text names none, or more than one; and as ``make_target``.
    """
    found = parse_pipeline(text)
    if len(found) != 1:
        raise RecipeError(f"{text!r} names {len(found)} targets; give one, as NAME or NAME{{option=value}}")
    return make_target(*found[0])


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _build(cls: type[T], name: str, options: Mapping[str, object], where: str) -> T:
    path = f"{where}.{name}" if where else name
    known = {item.name for item in fields(cls)}
    for key in options:
        if key not in known:
            raise RecipeError(f"{path}: unknown option {key!r}{suggest(key, known)}")
    for item in fields(cls):
        if item.default is MISSING and item.default_factory is MISSING and item.name not in options:
            raise RecipeError(f"{path}: option {item.name!r} is required")
    hints = get_type_hints(cls)
    try:
        values = {key: _adapter(cls, key).validate_python(_listed(value, hints[key])) for key, value in options.items()}
    except ValidationError as error:
        problem = error.errors()[0]
        raise RecipeError(f"{path}.{error.title}: {problem['msg']}, not {problem['input']!r}") from None
    try:
        return cls(**values)
    except GraphPruneError as error:
        raise RecipeError(f"{path}: {error}") from error


def _listed(value: object, hint: object) -> object:
    """A list as the tuple that options hold; a single name stands for a list of one."""
    if get_origin(hint) is not tuple:
        return value
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) if isinstance(value, str) else value


@cache
def _adapter(cls: Any, option: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(cls)[option], config=ConfigDict(title=option, strict=True))
