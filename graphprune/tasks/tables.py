"""A table of examples as it was read: rows, and where each came from, so that errors can point at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from graphprune.errors import GraphPruneError, suggest


@dataclass(frozen=True)
class Table:
    """Columns of equal length with the place of every row.

    Attributes:
        name: What to call it in messages: a file's path, or a hub name with its split.
        columns: Values by column name, a sequence of one length each. Values of text files are strings.
        places: Place of each row in ``name``, such as ``line 7``.
        class_names: Label names of integer columns whose source names them.
    """

    name: str
    columns: Mapping[str, Sequence[Any]]
    places: Sequence[str]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.places)

    def where(self, row: int) -> str:
        """Source and place of a row."""
        return f"{self.name}, {self.places[row]}"

    def column(self, name: str, flag: str | None = None) -> Sequence[Any]:
        """Values of a column.

        Args:
            name: The column.
            flag: Option that names another column, for the message.

        Raises:
            GraphPruneError: There is no such column; the message lists those there are.
        """
        if name in self.columns:
            return self.columns[name]
        there = ", ".join(repr(column) for column in self.columns)
        close = suggest(name, self.columns)
        hint = close if close.startswith("; did") else ""
        advice = f" (--{flag} names another)" if flag else ""
        raise GraphPruneError(f"{self.name} has no column {name!r}{hint}; its columns are {there}{advice}")

    def texts(self, name: str, flag: str | None = None) -> list[str]:
        """Values of a column that must be strings.

        Raises:
            GraphPruneError: There is no such column, or a value is no string; the message names the first bad row.
        """
        values = list(self.column(name, flag))
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise GraphPruneError(f"{self.where(row)}: {name!r} is {_shown(value)}; it must be a text")
        return values

    def first(self, count: int | None) -> Table:
        """The first ``count`` rows; all of them where it is None or larger."""
        if count is None or count >= len(self):
            return self
        return self.take(range(count))

    def take(self, rows: Sequence[int]) -> Table:
        """The given rows, in their order."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return replace(self, columns=columns, places=[self.places[row] for row in rows])

    def parted(self, percent: int) -> tuple[Table, Table]:
        """A part without and a part with ``percent`` percent of the rows, drawn with a fixed seed, in their old order.

        Raises:
            GraphPruneError: There are too few rows for two parts.
        """
        count = round(len(self) * percent / 100)
        if not 0 < count < len(self):
            raise GraphPruneError(
                f"{self.name}: {percent} percent of {len(self)} examples leave one part empty; "
                f"give validation data or change --validation_split_percentage"
            )
        order = np.random.default_rng(0).permutation(len(self))
        held = sorted(order[:count].tolist())
        kept = sorted(order[count:].tolist())
        return self.take(kept), self.take(held)


def of_rows(name: str, rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> Table:
    """A table of rows that must all have the first row's columns.

    Raises:
        GraphPruneError: There is no row, or one lacks a column.
    """
    if not rows:
        raise GraphPruneError(f"{name} holds no examples")
    columns: dict[str, list[Any]] = {column: [] for column in rows[0]}
    for row, place in zip(rows, places, strict=True):
        for column, values in columns.items():
            if column not in row:
                raise GraphPruneError(f"{name}, {place}: {column!r} is missing, which the first example has")
            values.append(row[column])
    return Table(name, columns, places)


def _shown(value: object) -> str:
    return "null" if value is None else f"{value!r:.60} ({type(value).__name__})"
