"""From start and end logits to answers: the post-processing of transformers' question answering example, in arrays.

For each window the ``n_best`` largest start and end logits are combined; spans that leave the context, run backwards or are
too long fall out; the ``n_best`` highest sums over all windows of a question are its candidates. With unanswerable
questions, the null score is the lowest sum of start and end logit at the null position over the question's windows, and it
wins where it exceeds the best non-empty candidate's by more than a threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphprune.errors import GraphPruneError
from graphprune.tasks.qa_features import Windows

_CHUNK = 512  # windows at a time: n_best squared sums for each
_NOTHING = "empty"  # what the original answers where it has no span


@dataclass(frozen=True)
class Candidates:
    """Spans for all questions, best first within a question.

    Attributes:
        first: Index of each question's first span, int64 ``[questions + 1]``; the last is their number.
        begin: First character, int64 ``[spans]``.
        end: One past the last character.
        start_logit: Of the first token, ``[spans]``.
        end_logit: Of the last token.
        null_start: Start logit of the window with the lowest null score, ``[questions]``.
        null_end: End logit of that window.
    """

    first: NDArray[np.int64]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    start_logit: NDArray[Any]
    end_logit: NDArray[Any]
    null_start: NDArray[Any]
    null_end: NDArray[Any]

    def best(self) -> NDArray[np.int64]:
        """Index of the best span of each question whose text is not empty; -1 where there is none."""
        questions = len(self.first) - 1
        owner = np.repeat(np.arange(questions), np.diff(self.first))
        filled = np.flatnonzero(self.end > self.begin)
        found = np.full(questions, -1, dtype=np.int64)
        found[owner[filled][::-1]] = filled[::-1]  # the last assignment wins: the first span
        return found


def find_candidates(
    windows: Windows,
    questions: int,
    start_logits: NDArray[Any],
    end_logits: NDArray[Any],
    *,
    n_best: int = 20,
    max_answer_length: int = 30,
) -> Candidates:
    """Candidates of all questions.

    Args:
        windows: Of the features.
        questions: How many; each has at least one window.
        start_logits: Of all windows, ``[features, tokens]``; columns beyond the windows' width are padding.
        end_logits: Likewise.
        n_best: Positions to combine in a window, and spans to keep for a question.
        max_answer_length: Most tokens of a span.

    Returns:
        Candidates. Ties: the higher start logit's token first, then the lower token, then the earlier window.

    Raises:
        GraphPruneError: The logits' shapes do not fit the windows.

    Source: transformers, examples/pytorch/question-answering/utils_qa.py.
    """
    start_logits, end_logits = _fitted(windows, start_logits), _fitted(windows, end_logits)
    rows = np.arange(len(start_logits))
    spans = [
        _window_spans(windows, rows[at : at + _CHUNK], start_logits, end_logits, n_best, max_answer_length)
        for at in range(0, len(rows), _CHUNK)
    ]
    feature, start, end = (np.concatenate([part[index] for part in spans]) for index in range(3))
    sums = start_logits[feature, start] + end_logits[feature, end]
    owner = windows.example[feature]
    order = np.lexsort((-sums, owner))
    bounds = np.searchsorted(owner[order], np.arange(questions + 1))
    rank = np.arange(len(order)) - bounds[owner[order]]
    order = order[rank < n_best]
    feature, start, end, owner = feature[order], start[order], end[order], owner[order]

    null = np.stack([logits[rows, windows.null_position] for logits in (start_logits, end_logits)])
    lowest = np.lexsort((null[0] + null[1], windows.example))
    lowest = lowest[np.searchsorted(windows.example[lowest], np.arange(questions))]
    return Candidates(
        first=np.searchsorted(owner, np.arange(questions + 1)).astype(np.int64),
        begin=windows.starts[feature, start].astype(np.int64),
        end=windows.ends[feature, end].astype(np.int64),
        start_logit=start_logits[feature, start],
        end_logit=end_logits[feature, end],
        null_start=null[0, lowest],
        null_end=null[1, lowest],
    )


def _fitted(windows: Windows, logits: NDArray[Any]) -> NDArray[Any]:
    """Logits cut or padded to the windows' width."""
    count, width = windows.starts.shape
    if logits.ndim != 2 or len(logits) != count:
        raise GraphPruneError(
            f"logits of shape {list(logits.shape)} for {count} features; they must be [features, tokens]"
        )
    missing = width - logits.shape[1]
    if missing <= 0:
        return logits[:, :width]
    if (windows.starts[:, logits.shape[1] :] >= 0).any():
        raise GraphPruneError(f"logits for {logits.shape[1]} tokens; the longest feature has {width}")
    return np.pad(logits, ((0, 0), (0, missing)), constant_values=-np.inf)


def _window_spans(
    windows: Windows,
    rows: NDArray[np.int64],
    start_logits: NDArray[Any],
    end_logits: NDArray[Any],
    n_best: int,
    longest: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Feature, first and last token of the best spans of some windows."""
    starts = np.argsort(-start_logits[rows], axis=1, kind="stable")[:, :n_best]
    ends = np.argsort(-end_logits[rows], axis=1, kind="stable")[:, :n_best]
    column = rows[:, None]
    inside = (windows.starts[column, starts] >= 0)[:, :, None] & (windows.starts[column, ends] >= 0)[:, None, :]
    lengths = ends[:, None, :] - starts[:, :, None] + 1
    valid = (inside & (lengths >= 1) & (lengths <= longest)).reshape(len(rows), -1)
    sums = start_logits[column, starts][:, :, None] + end_logits[column, ends][:, None, :]
    ranked = np.where(valid, -sums.reshape(len(rows), -1), np.inf)
    order = np.lexsort((ranked, ~valid), axis=1)[:, :n_best]
    kept, place = np.nonzero(np.take_along_axis(valid, order, axis=1))
    pair = order[kept, place]
    return rows[kept], starts[kept, pair // ends.shape[1]], ends[kept, pair % ends.shape[1]]


@dataclass(frozen=True)
class Chosen:
    """The answer of every question.

    Attributes:
        texts: What is answered; "" for no answer.
        non_null: The best answer where one must be given.
        null_odds: Null score minus the best answer's, ``[questions]``.
    """

    texts: list[str]
    non_null: list[str]
    null_odds: NDArray[Any]


def choose(found: Candidates, contexts: Sequence[str], *, threshold: float | None) -> Chosen:
    """Choose answers.

    Args:
        found: Candidates of all questions.
        contexts: Of all questions.
        threshold: Null odds above which no answer is given; None where every question has an answer.

    Returns:
        Answers. A question without a span answers ``"empty"`` with logits 0, as the original's does; so does one with empty
        spans only, at which the original fails. Where ``n_best`` is 1 and the null answer leads, the original takes
        ``"empty"`` for the best answer; here it is the best span.
    """
    best = found.best()
    has = best >= 0
    begin, end = (np.where(has, values[best], 0) if len(values) else has * 0 for values in (found.begin, found.end))
    non_null = [
        context[b:e] if there else _NOTHING for context, b, e, there in zip(contexts, begin, end, has, strict=True)
    ]
    logits = [
        np.where(has, values[best], 0) if len(values) else has * 0.0 for values in (found.start_logit, found.end_logit)
    ]
    odds = (found.null_start + found.null_end) - logits[0] - logits[1]
    if threshold is None:
        texts = list(non_null)
        leading = found.first[:-1][np.diff(found.first) > 1]  # an only span that is empty does not count
        owner = np.flatnonzero(np.diff(found.first) > 1)
        for question in owner[(found.end <= found.begin)[leading]].tolist():
            texts[question] = ""
        return Chosen(texts, non_null, odds)
    texts = ["" if value > threshold else text for value, text in zip(odds.tolist(), non_null, strict=True)]
    return Chosen(texts, non_null, odds)


def n_best_lists(
    found: Candidates, contexts: Sequence[str], n_best: int, *, with_null: bool
) -> list[list[dict[str, Any]]]:
    """Candidates of each question with their probabilities: a softmax over the sums of those that are kept.

    Args:
        found: Candidates.
        contexts: Of all questions.
        n_best: Most of them; the null answer is kept beside them if it falls out.
        with_null: Whether the null answer takes part.

    Returns:
        For each question mappings ``text``, ``start_logit``, ``end_logit``, ``probability``, best first.
    """
    return [_listed(found, question, context, n_best, with_null) for question, context in enumerate(contexts)]


def _listed(found: Candidates, question: int, context: str, n_best: int, with_null: bool) -> list[dict[str, Any]]:
    spans = range(int(found.first[question]), int(found.first[question + 1]))
    rows = [(found.start_logit[i], found.end_logit[i], int(found.begin[i]), int(found.end[i])) for i in spans]
    if with_null:
        null = (found.null_start[question], found.null_end[question], 0, 0)
        rows = sorted([*rows, null], key=lambda row: row[0] + row[1], reverse=True)[:n_best]
        if not any(row[2:] == (0, 0) for row in rows):
            rows.append(null)
    texts = [context[row[2] : row[3]] for row in rows]
    if not rows or texts == [""]:
        rows.insert(0, (np.float32(0), np.float32(0), 0, 0))
        texts.insert(0, _NOTHING)
    sums = np.array([row[0] + row[1] for row in rows])
    weights = np.exp(sums - sums.max())
    return [
        {"text": text, "start_logit": float(row[0]), "end_logit": float(row[1]), "probability": float(share)}
        for text, row, share in zip(texts, rows, weights / weights.sum(), strict=True)
    ]
