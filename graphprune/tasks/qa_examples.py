"""Examples of question answering: rows of any source brought to one form and checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphprune.errors import GraphPruneError
from graphprune.tasks.data_settings import DataSettings
from graphprune.tasks.in_memory import make_dataset
from graphprune.tasks.tables import Table

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset

Answers = tuple[list[str], list[int]]


def qa_examples(table: Table, settings: DataSettings, *, answers_needed: bool) -> Dataset:
    """Check a table and bring it to SQuAD's form.

    Answers are SQuAD's ``{"text": [...], "answer_start": [...]}``, a list of ``{"text", "answer_start"}``, or one text; a
    cell of a CSV or TSV file holds either as JSON, or the text. Where a start is missing, the text must occur exactly
    once in its context; or a column ``answer_start`` says it.

    Args:
        table: Columns of questions, contexts and answers as the settings name them; ``id`` if it has one.
        settings: Names of the columns; ``version_2_with_negative`` allows questions without an answer.
        answers_needed: Whether a table without answers is an error; where it is not, all of its ``answers`` are empty.

    Returns:
        Columns ``id``, ``question``, ``context`` (strings) and ``answers`` (``text``: strings, ``answer_start``: int64;
        characters).

    Raises:
        GraphPruneError: A column is missing, an id occurs twice, an answer does not lie in its context where it should, or
            questions have no answer and the settings do not allow it.
    """
    questions = table.texts(settings.question_column_name, "question_column_name")
    contexts = table.texts(settings.context_column_name, "context_column_name")
    name = settings.answer_column_name
    ids = [str(value) for value in table.columns.get("id", range(len(table)))]
    _check_ids(table, ids)
    answers: list[Answers] = [([], [])] * len(table)
    if answers_needed or name in table.columns:
        values = list(table.column(name, "answer_column_name"))
        if answers_needed or any(value is not None for value in values):
            starts = table.columns.get("answer_start", [None] * len(table))
            answers = [_answers(table, row, values[row], starts[row], contexts[row]) for row in range(len(table))]
    unanswered = [row for row, (texts, _) in enumerate(answers) if not texts]
    if unanswered and not settings.version_2_with_negative and (answers_needed or len(unanswered) < len(table)):
        raise GraphPruneError(
            f"{len(unanswered)} of {len(table)} questions of {table.name} have no answer, the first at "
            f"{table.places[unanswered[0]]}; if that is meant, as in SQuAD 2.0, pass --version_2_with_negative"
        )
    kinds = {"id": "string", "question": "string", "context": "string"}
    return make_dataset(
        {
            "id": ids,
            "question": questions,
            "context": contexts,
            "answers": [{"text": texts, "answer_start": starts} for texts, starts in answers],
        },
        {**kinds, "answers": {"text": "texts", "answer_start": "numbers"}},
    )


def _check_ids(table: Table, ids: Sequence[str]) -> None:
    if len(set(ids)) == len(ids):
        return
    seen: dict[str, int] = {}
    for row, name in enumerate(ids):
        if name in seen:
            raise GraphPruneError(f"{table.where(row)}: id {name!r} is that of {table.places[seen[name]]} too")
        seen[name] = row


def _answers(table: Table, row: int, value: object, start: object, context: str) -> Answers:
    texts: list[str] = []
    starts: list[int] = []
    for text, given in _pairs(table, row, _parsed(value), start):
        if not isinstance(text, str):
            raise GraphPruneError(f"{table.where(row)}: the answer {text!r:.60} is no text")
        if not text:
            continue  # an empty answer is none
        texts.append(text)
        starts.append(_place(table, row, text, given, context))
    return texts, starts


def _parsed(value: object) -> object:
    """A cell of a text file that holds JSON, as what it holds."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _pairs(table: Table, row: int, value: object, start: object) -> Iterator[tuple[object, object]]:
    if value is None:
        return
    if isinstance(value, str):
        yield value, None if start == "" else start
    elif isinstance(value, Mapping) and "text" in value:
        texts, starts = value["text"], value.get("answer_start")
        if isinstance(texts, str):
            texts, starts = [texts], [starts]
        starts = [None] * len(texts) if starts is None else list(starts)
        if len(starts) != len(texts):
            raise GraphPruneError(f"{table.where(row)}: {len(texts)} answers and {len(starts)} values of answer_start")
        yield from zip(texts, starts, strict=True)
    elif isinstance(value, Sequence):
        for item in value:
            if not isinstance(item, Mapping) or "text" not in item:
                yield item, None
            else:
                yield item["text"], item.get("answer_start")
    else:
        raise GraphPruneError(
            f"{table.where(row)}: the answers are {value!r:.60}; they must be {{'text': [...], 'answer_start': [...]}} or a text"
        )


def _place(table: Table, row: int, text: str, given: Any, context: str) -> int:
    if given is None:
        start = context.find(text)
        if start < 0:
            raise GraphPruneError(f"{table.where(row)}: the answer {text!r:.60} does not occur in its context")
        if context.find(text, start + 1) >= 0:
            raise GraphPruneError(
                f"{table.where(row)}: the answer {text!r:.60} occurs more than once in its context; give its answer_start"
            )
        return start
    try:
        start = int(given)
    except (TypeError, ValueError):
        raise GraphPruneError(f"{table.where(row)}: answer_start is {given!r:.60}; it must be a whole number") from None
    there = context[start : start + len(text)] if start >= 0 else ""
    if there != text:
        elsewhere = context.find(text)
        found = f"; it begins at {elsewhere}" if elsewhere >= 0 else "; it does not occur in it"
        raise GraphPruneError(
            f"{table.where(row)}: the answer {text!r:.60} does not lie at character {start} of its context, "
            f"where {there!r:.60} is{found}"
        )
    return start
