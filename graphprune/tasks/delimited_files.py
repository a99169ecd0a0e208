"""Tables with a header line: CSV, and TSV as GLUE writes it."""

from __future__ import annotations

import csv
import io

from graphprune.errors import GraphPruneError
from graphprune.tasks.tables import Table


def read_csv(name: str, text: str) -> Table:
    """Read comma-separated values: a header line, double quotes around values that hold commas or line breaks.

    Raises:
        GraphPruneError: There is no example, a line has another number of values than the header, or quotes are
            unbalanced.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines: list[tuple[int, list[str]]] = []
    before = 0
    try:
        for values in reader:
            if values:
                lines.append((before + 1, values))
            before = reader.line_num
    except csv.Error as error:
        raise GraphPruneError(f"{name}, line {before + 1}: {error}; check the quotes of this example") from error
    return _table(name, lines)


def read_tsv(name: str, text: str) -> Table:
    """Read tab-separated values: a header line, no quoting (a quote is an ordinary character, as in GLUE's files).

    CoLA's file has no header; four columns whose second is 0 or 1 and whose third is empty or ``*`` are taken for it.

    Raises:
        GraphPruneError: There is no example, or a line has another number of values than the header.
    """
    split = text.split("\n")
    lines = [(index + 1, line.rstrip("\r").split("\t")) for index, line in enumerate(split) if line.strip("\r")]
    if lines and len(lines[0][1]) == 4 and lines[0][1][1] in ("0", "1") and lines[0][1][2] in ("", "*"):
        lines.insert(0, (0, ["source", "label", "mark", "sentence"]))
    return _table(name, lines)


def _table(name: str, lines: list[tuple[int, list[str]]]) -> Table:
    if not lines:
        raise GraphPruneError(f"{name} is empty; its first line must name the columns")
    header = lines[0][1]
    twice = {column for column in header if header.count(column) > 1}
    if twice:
        raise GraphPruneError(f"{name}, line {lines[0][0]}: column {min(twice)!r} is named twice")
    if len(lines) == 1:
        raise GraphPruneError(f"{name} holds a header and no examples")
    for line, values in lines[1:]:
        if len(values) != len(header):
            raise GraphPruneError(
                f"{name}, line {line}: {len(values)} values where the header names {len(header)} columns "
                f"({', '.join(header)})"
            )
    columns = {column: [values[index] for _, values in lines[1:]] for index, column in enumerate(header)}
    return Table(name, columns, [f"line {line}" for line, _ in lines[1:]])
