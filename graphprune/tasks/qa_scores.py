"""Exact match and F1 of answers, as SQuAD's scripts give them, in percent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def squad_scores(
    answers: Sequence[str], truths: Sequence[Sequence[str]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Exact match and F1 of each question, the best over its true answers.

    Args:
        answers: What was answered; "" for no answer.
        truths: True answers of each question; none for a question that has no answer.

    Returns:
        Exact match (0 or 1) and F1 in [0, 1], float64 ``[questions]``.
    """
    from torchmetrics.functional.text import squad

    exact, f1 = np.zeros(len(answers)), np.zeros(len(answers))
    for row, (answer, true) in enumerate(zip(answers, truths, strict=True)):
        target: Any = {"id": "0", "answers": {"text": list(true) or [""], "answer_start": []}}
        scores = squad({"id": "0", "prediction_text": answer}, target)
        exact[row], f1[row] = float(scores["exact_match"]) / 100, float(scores["f1"]) / 100
    return exact, f1


def summary_v1(exact: NDArray[np.float64], f1: NDArray[np.float64]) -> dict[str, float]:
    """``exact_match`` and ``f1`` in percent, as SQuAD 1.1's script prints them."""
    return {"exact_match": _percent(exact), "f1": _percent(f1)}


def summary_v2(
    answers: Sequence[str],
    truths: Sequence[Sequence[str]],
    non_null: Sequence[str],
    null_odds: NDArray[np.floating],
) -> dict[str, float]:
    """What SQuAD 2.0's script prints: percent over all questions, and over those with and without an answer.

    ``best_exact`` and ``best_f1`` say what the best threshold would give, ``best_exact_thresh`` and ``best_f1_thresh`` which
    it is, as a value of ``null_score_diff_threshold``. They are made from the best non-null answers, so that they do not
    depend on the threshold that was used; the original makes them from the answers, where a threshold hides the rest.

    Args:
        answers: What was answered.
        truths: True answers; none for unanswerable questions.
        non_null: What would be answered if an answer had to be given.
        null_odds: Null score minus the score of that answer.
    """
    exact, f1 = squad_scores(answers, truths)
    has = np.array([bool(true) for true in truths])
    scores: dict[str, float] = {"exact": _percent(exact), "f1": _percent(f1), "total": float(len(has))}
    for name, chosen in (("HasAns", has), ("NoAns", ~has)):
        if chosen.any():
            scores[f"{name}_exact"] = _percent(exact[chosen])
            scores[f"{name}_f1"] = _percent(f1[chosen])
            scores[f"{name}_total"] = float(chosen.sum())
    forced = squad_scores(non_null, truths)
    for name, each in zip(("best_exact", "best_f1"), forced, strict=True):
        scores[name], scores[f"{name}_thresh"] = best_threshold(np.where(has, each, 0.0), has, null_odds)
    return scores


def best_threshold(
    each: NDArray[np.float64], has: NDArray[np.bool_], null_odds: NDArray[np.floating]
) -> tuple[float, float]:
    """Best score over all thresholds of null odds.

    Args:
        each: Score of each question when it is answered.
        has: Whether it has an answer.
        null_odds: It is answered where these do not exceed the threshold.

    Returns:
        Percent, and the lowest threshold that gives it; 0.0 where answering nothing is best.
    """
    order = np.argsort(null_odds, kind="stable")
    gains = np.cumsum(np.where(has, each, -1.0)[order])
    last = np.append(np.diff(null_odds[order]) != 0, True)  # questions of equal odds are answered together
    at = int(np.argmax(np.where(last, gains, -np.inf)))
    nothing = float((~has).sum())
    if gains[at] <= 0:
        return 100.0 * nothing / len(has), 0.0
    return 100.0 * (nothing + float(gains[at])) / len(has), float(null_odds[order][at])


def _percent(values: NDArray[np.float64]) -> float:
    return 100.0 * float(values.mean())
