"""Files of measurements: JSON that is whole or not there, settings that must agree before they are continued, tables as text."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console, RenderableType

from graphprune.artifact.files import written
from graphprune.errors import GraphPruneError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_WIDTH = 10_000  # plain text is never cut: columns are as wide as their widest entry
_Found = TypeVar("_Found")


def write_measurements(path: Path | str, data: Mapping[str, object]) -> Path:
    """Write a JSON file, whole or not at all.

    Raises:
        GraphPruneError: It cannot be written.
    """
    with written(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return Path(path)


def read_measurements(path: Path | str, kind: str, form: int, build: Callable[[Mapping[str, Any]], _Found]) -> _Found:
    """Read what ``write_measurements`` wrote.

    Args:
        path: The file.
        kind: What it should be, for messages, such as ``sensitivity``.
        form: The number that it has under ``format``.
        build: Makes the result of its content.

    Raises:
        GraphPruneError: The file cannot be read, or holds something else.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GraphPruneError(f"{path} cannot be read: {error}") from error
    try:
        if data["format"] != form:
            raise GraphPruneError(f"{path} has format {data['format']}; this graphprune reads {form}")
        return build(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GraphPruneError(
            f"{path} is no {kind} file ({type(error).__name__}: {error}); choose another file, or delete it"
        ) from error


def differences(ours: DataclassInstance, theirs: DataclassInstance) -> str:
    """Say in what other settings differ from ours; empty where they are the same."""
    pairs = ((item.name, getattr(ours, item.name), getattr(theirs, item.name)) for item in fields(theirs))
    return ", ".join(f"{name} {mine!r} and not {other!r}" for name, mine, other in pairs if mine != other)


def plain_text(renderable: RenderableType) -> str:
    """A table as text without colors, folds and trailing spaces."""
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, legacy_windows=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
