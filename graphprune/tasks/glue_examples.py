"""Examples of classification: which columns hold the texts and the label, and what kind of label it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from graphprune.errors import GraphPruneError, RecipeError
from graphprune.tasks.data_settings import DataSettings
from graphprune.tasks.glue_tasks import GlueDefinition
from graphprune.tasks.tables import Table

_LABELS = ("label", "labels")
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
)
_SINGLE = ("sentence", "text")
_NUMBERS = ("id", "idx", "index", "guid")


def label_column(table: Table, settings: DataSettings, task: GlueDefinition | None) -> str | None:
    """Name of the column of labels: the settings', the task's, ``label`` or ``labels``; None where there is none."""
    if settings.label_column_name is not None:
        return settings.label_column_name if settings.label_column_name in table.columns else None
    return next((name for name in (task.label if task else _LABELS) if name in table.columns), None)


def text_columns(table: Table, settings: DataSettings, task: GlueDefinition | None) -> tuple[str, ...]:
    """Names of the one or two columns of texts.

    The settings' if they name any; the task's; columns of a known name; else the only one or two columns that are neither
    label nor number of the example.

    Raises:
        GraphPruneError: A column is missing, or there is no telling which columns hold texts.
    """
    if settings.text_column_name:
        names = tuple(name.strip() for name in settings.text_column_name.split(","))
        if len(names) > 2:
            raise RecipeError(
                f"text_column_name {settings.text_column_name!r} names {len(names)} columns; name one or two"
            )
        for name in names:
            table.column(name, "text_column_name")
        return names
    if task is not None:
        return tuple(_first(table, names) for names in task.texts)
    for pair in _PAIRS:
        if all(name in table.columns for name in pair):
            return pair
    for name in _SINGLE:
        if name in table.columns:
            return (name,)
    label = label_column(table, settings, task)
    left = tuple(name for name in table.columns if name != label and name.lower() not in _NUMBERS)
    if label is not None and 1 <= len(left) <= 2:
        return left
    raise GraphPruneError(
        f"{table.name}: no telling which of the columns {', '.join(map(repr, table.columns))} hold texts; say it with "
        f"--text_column_name NAME or FIRST,SECOND, and --label_column_name"
    )


def _first(table: Table, names: tuple[str, ...]) -> str:
    found = next((name for name in names if name in table.columns), None)
    if found is None:
        table.column(names[0], "text_column_name")  # raises
    return str(found)


def raw_labels(table: Table, name: str) -> list[str | float | None]:
    """Labels as the source writes them: names, numbers as floats only if they are fractions, None where there is none.

    A hub's class numbers become names, and its -1 None; whole numbers and truth values become text.
    """
    names = table.class_names.get(name)
    found: list[str | float | None] = []
    for row, value in enumerate(table.columns[name]):
        if names is not None and isinstance(value, int):
            found.append(names[value] if 0 <= value < len(names) else None)
        elif value is None or isinstance(value, float):
            found.append(value)
        elif isinstance(value, (str, bool, int)):
            found.append(str(value).lower() if isinstance(value, bool) else str(value).strip())
        else:
            raise GraphPruneError(f"{table.where(row)}: the label {value!r:.60} is neither text nor number")
    return found


def is_regression(values: Iterable[str | float | None]) -> bool:
    """Whether labels are numbers to predict: all are numbers, or texts of numbers, and one of them is written as a fraction."""
    fraction = False
    for value in values:
        if isinstance(value, str):
            if not _number(value):
                return False
            fraction = fraction or not value.lstrip("+-").isdigit()
        else:
            fraction = fraction or value is not None
    return fraction


def numbers(table: Table, values: Sequence[str | float | None]) -> list[float]:
    """Labels as numbers.

    Raises:
        GraphPruneError: One is none; the message names its row.
    """
    for row, value in enumerate(values):
        if value is None or (isinstance(value, str) and not _number(value)) or not math.isfinite(float(value)):
            raise GraphPruneError(f"{table.where(row)}: the label {value!r:.60} is no number, and this is a regression")
    return [float(value) for value in values if value is not None]


def class_indices(
    table: Table, values: Sequence[str | float | None], indices: dict[str, int], numbered: Sequence[str], whose: str
) -> list[int]:
    """Labels as the model's class indices.

    Args:
        table: Where they come from.
        values: What :func:`raw_labels` returned.
        indices: Index by name.
        numbered: Names that whole numbers in the data stand for, by number; empty where numbers are names.
        whose: What the known labels are, for the message, such as ``training has``.

    Raises:
        GraphPruneError: A label is missing or unknown; the message names its row.
    """
    folded = {name.casefold(): index for name, index in indices.items()}
    found = []
    for row, value in enumerate(values):
        name = (
            "" if value is None else str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        )
        if name.isdigit() and int(name) < len(numbered):
            name = numbered[int(name)]
        index = indices.get(name, folded.get(name.casefold()))
        if index is None:
            known = ", ".join(map(repr, indices))
            raise GraphPruneError(
                f"{table.where(row)}: the label {value!r:.60} is not among those that {whose}: {known}"
            )
        found.append(index)
    return found


def _number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
