"""SQuAD's official JSON, versions 1.1 and 2.0: articles, paragraphs, questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from graphprune.errors import GraphPruneError
from graphprune.tasks.tables import Table


def is_squad(content: object) -> bool:
    """Whether parsed JSON has the outer form of SQuAD: ``{"data": [{"paragraphs": ...}, ...]}``."""
    if not isinstance(content, Mapping) or not isinstance(content.get("data"), list):
        return False
    articles = content["data"]
    return bool(articles) and isinstance(articles[0], Mapping) and "paragraphs" in articles[0]


def squad_table(name: str, content: Mapping[str, Any]) -> Table:
    """Flatten SQuAD's structure to one row a question.

    Args:
        name: The file, for messages.
        content: Its parsed JSON.

    Returns:
        Columns ``id``, ``title``, ``question``, ``context`` (strings) and ``answers``, each a mapping of lists ``text``
        and ``answer_start`` (empty where the question is unanswerable). Places are paths such as
        ``data[0].paragraphs[3].qas[1]``.

    Raises:
        GraphPruneError: A member is missing or of another type; there are no questions.
    """
    columns: dict[str, list[Any]] = {key: [] for key in ("id", "title", "question", "context", "answers")}
    places: list[str] = []
    for a, article in _members(name, "", content, "data"):
        where = f"data[{a}]"
        for p, paragraph in _members(name, where, article, "paragraphs"):
            inner = f"{where}.paragraphs[{p}]"
            context = _text(name, inner, paragraph, "context")
            for q, question in _members(name, inner, paragraph, "qas"):
                place = f"{inner}.qas[{q}]"
                columns["id"].append(str(question["id"]) if "id" in question else str(len(places)))
                columns["title"].append(str(article.get("title", "")))
                columns["question"].append(_text(name, place, question, "question"))
                columns["context"].append(context)
                columns["answers"].append(_answers(name, place, question))
                places.append(place)
    if not places:
        raise GraphPruneError(f"{name} holds no questions")
    return Table(name, columns, places)


def _members(name: str, place: str, parent: Mapping[str, Any], key: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    found = parent.get(key)
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
        raise GraphPruneError(f"{name}, {place or 'top level'}: {key!r} must be a list of objects, as in SQuAD")
    yield from enumerate(found)


def _text(name: str, place: str, parent: Mapping[str, Any], key: str) -> str:
    if not isinstance(parent.get(key), str):
        raise GraphPruneError(f"{name}, {place}: {key!r} must be a text, as in SQuAD")
    return str(parent[key])


def _answers(name: str, place: str, question: Mapping[str, Any]) -> dict[str, list[Any]] | None:
    if question.get("is_impossible"):
        return {"text": [], "answer_start": []}
    if "answers" not in question:
        return None  # a test set without answers
    texts: list[str] = []
    starts: list[int] = []
    for index, answer in _members(name, place, question, "answers"):
        texts.append(_text(name, f"{place}.answers[{index}]", answer, "text"))
        start = answer.get("answer_start")
        if not isinstance(start, int):
            raise GraphPruneError(f"{name}, {place}.answers[{index}]: 'answer_start' must be a whole number")
        starts.append(start)
    return {"text": texts, "answer_start": starts}
