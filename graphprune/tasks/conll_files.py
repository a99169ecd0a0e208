"""CoNLL columns: a token a line with its tag in the last column, an empty line after each sentence."""

from __future__ import annotations

from graphprune.errors import GraphPruneError
from graphprune.tasks.tables import Table

_KNOWN = {2: ("tokens", "ner_tags"), 3: ("tokens", "pos_tags", "ner_tags")}
_KNOWN[4] = ("tokens", "pos_tags", "chunk_tags", "ner_tags")


def read_conll(name: str, text: str) -> Table:
    """Read sentences of tokens.

    Columns are parted by a tab where the line holds one, else by spaces. Lines of white space end a sentence, lines that
    begin with ``-DOCSTART-`` are left out. Two to four columns are called as in CoNLL-2003: ``tokens``, (``pos_tags``,
    (``chunk_tags``,)) ``ner_tags``; the columns between are ``column_2``, ``column_3``, ... where there are more.

    Returns:
        One row a sentence; every column holds a list of strings.

    Raises:
        GraphPruneError: There is no sentence, or a line has one column only or another number than the first.
    """
    sentences: list[tuple[int, list[list[str]]]] = []
    open_ = False
    width = 0
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("-DOCSTART-"):
            open_ = False
            continue
        values = [value.strip() for value in line.rstrip("\r").split("\t")] if "\t" in stripped else stripped.split()
        width = width or len(values)
        if len(values) != width or width < 2 or not values[-1]:
            raise GraphPruneError(_complaint(name, number, values, width))
        if not open_:
            sentences.append((number, []))
            open_ = True
        sentences[-1][1].append(values)
    if not sentences:
        raise GraphPruneError(f"{name} holds no sentences; it must hold a token and its tag on each line")
    names = _KNOWN.get(width) or ("tokens", *(f"column_{index}" for index in range(2, width)), "ner_tags")
    columns = {
        column: [[values[index] for values in lines] for _, lines in sentences] for index, column in enumerate(names)
    }
    return Table(name, columns, [f"line {number}" for number, _ in sentences])


def _complaint(name: str, number: int, values: list[str], width: int) -> str:
    if width < 2:
        return f"{name}, line {number}: {values[0]!r:.60} has no tag; each line is a token, a tab or space, and its tag"
    if len(values) == width:
        return f"{name}, line {number}: {values[0]!r:.60} has an empty tag"
    return f"{name}, line {number}: {len(values)} columns where the first token's line has {width}"
