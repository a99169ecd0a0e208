"""JSON: a list of examples, an example a line, or SQuAD's nested structure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from graphprune.errors import GraphPruneError
from graphprune.tasks.squad_files import is_squad, squad_table
from graphprune.tasks.tables import Table, of_rows


def read_json(name: str, text: str) -> Table:
    """Read examples as JSON, whichever way they are written down.

    - SQuAD's ``{"version": ..., "data": [{"title", "paragraphs": [{"context", "qas": [...]}]}]}``, see
      :func:`~graphprune.tasks.squad_files.squad_table`;
    - a list of objects, or ``{"data": [objects]}``;
    - JSON lines: an object a line, empty lines left out.

    Raises:
        GraphPruneError: It is no JSON (file, line and column), holds no example, or an example is no object or lacks a
            member that the first one has.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" and not _has_lines(text):
            raise GraphPruneError(f"{name}, line {error.lineno}, column {error.colno}: no JSON: {error.msg}") from error
        return _read_lines(name, text)
    if is_squad(content):
        return squad_table(name, content)
    if isinstance(content, Mapping):
        content = content["data"] if isinstance(content.get("data"), list) else [content]
    if not isinstance(content, list):
        raise GraphPruneError(
            f"{name} holds a {type(content).__name__}; it must hold a list of objects, one an example"
        )
    places = [f"example {index}" for index in range(1, len(content) + 1)]
    return of_rows(name, [_object(name, item, place) for item, place in zip(content, places, strict=True)], places)


def _has_lines(text: str) -> bool:
    """Whether the first line is a whole object, so that later lines are to blame by their own number."""
    line = text.lstrip().split("\n", 1)[0]
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _read_lines(name: str, text: str) -> Table:
    rows: list[Mapping[str, Any]] = []
    places: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise GraphPruneError(f"{name}, {place}, column {error.colno}: no JSON: {error.msg}") from error
        rows.append(_object(name, item, place))
        places.append(place)
    return of_rows(name, rows, places)


def _object(name: str, item: object, place: str) -> Mapping[str, Any]:
    if not isinstance(item, Mapping):
        raise GraphPruneError(f"{name}, {place}: {item!r:.60} is no object; an example is one with a member a column")
    return item
