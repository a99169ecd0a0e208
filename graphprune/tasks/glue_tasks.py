"""The tasks of GLUE: columns on the hub and in GLUE's own files, labels, and which scores are usual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphprune.errors import RecipeError, suggest

_REGRESSION = ("pearson", "spearmanr")


@dataclass(frozen=True)
class GlueDefinition:
    """One task.

    Attributes:
        texts: Column names of each text: the hub's, then those of other files.
        label: Names of the label's column, likewise.
        names: Classes by index; empty for regression.
        metrics: Names of the scores; the first is the main one.
    """

    texts: tuple[tuple[str, ...], ...]
    label: tuple[str, ...]
    names: tuple[str, ...]
    metrics: tuple[str, ...]


def _pair(first: str, second: str, *others: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    left, right = ((first,), (second,)) if not others else ((first, *others[0]), (second, *others[1]))
    return (left, right)


_SENTENCES = _pair("sentence1", "sentence2")
_EQUAL = ("not_equivalent", "equivalent")
_FOLLOWS = ("entailment", "not_entailment")
_MNLI = ("entailment", "neutral", "contradiction")
_STRINGS = _pair("sentence1", "sentence2", ("#1 String",), ("#2 String",))
_PREMISES = _pair("premise", "hypothesis", ("sentence1",), ("sentence2",))

TASKS = {
    "cola": GlueDefinition(
        (("sentence",),), ("label",), ("unacceptable", "acceptable"), ("matthews_correlation", "accuracy")
    ),
    "mnli": GlueDefinition(_PREMISES, ("label", "gold_label"), _MNLI, ("accuracy",)),
    "mrpc": GlueDefinition(_STRINGS, ("label", "Quality"), _EQUAL, ("f1", "accuracy")),
    "qnli": GlueDefinition(_pair("question", "sentence"), ("label",), _FOLLOWS, ("accuracy",)),
    "qqp": GlueDefinition(
        _pair("question1", "question2"), ("label", "is_duplicate"), ("not_duplicate", "duplicate"), ("f1", "accuracy")
    ),
    "rte": GlueDefinition(_SENTENCES, ("label",), _FOLLOWS, ("accuracy",)),
    "sst2": GlueDefinition((("sentence",),), ("label",), ("negative", "positive"), ("accuracy",)),
    "stsb": GlueDefinition(_SENTENCES, ("label", "score"), (), _REGRESSION),
    "wnli": GlueDefinition(_SENTENCES, ("label",), ("not_entailment", "entailment"), ("accuracy",)),
}


def find_task(name: str) -> GlueDefinition:
    """The definition of a task of GLUE; case and dashes do not count (``SST-2`` is ``sst2``).

    Raises:
        RecipeError: There is no such task.
    """
    known = name.lower().replace("-", "").replace("_", "")
    if known not in TASKS:
        raise RecipeError(f"task_name {name!r} is no task of GLUE{suggest(name, TASKS)}")
    return TASKS[known]


def class_scores(
    chosen: NDArray[np.int64], true: NDArray[np.int64], classes: int, wanted: Sequence[str]
) -> dict[str, float]:
    """Scores of classes.

    Args:
        chosen: Predicted classes, ``[examples]``.
        true: True classes.
        classes: How many there are.
        wanted: Of ``accuracy``, ``f1`` (of class 1 where there are two, else the mean over the classes) and
            ``matthews_correlation``.

    Returns:
        Scores by name: fractions, the correlation in [-1, 1]; ``combined_score``, their mean, where there are several, as in
        transformers' example.
    """
    import torch
    from torchmetrics.functional import classification

    predictions, target = torch.from_numpy(chosen), torch.from_numpy(true)
    found: dict[str, float] = {}
    for name in wanted:
        if name == "accuracy":
            value = (predictions == target).double().mean()
        elif name == "matthews_correlation":
            value = classification.multiclass_matthews_corrcoef(predictions, target, num_classes=classes)
        elif classes == 2:
            value = classification.binary_f1_score(predictions, target)
        else:
            value = classification.multiclass_f1_score(predictions, target, num_classes=classes, average="macro")
        found[name] = float(value)
    return _combined(found)


def number_scores(predicted: NDArray[np.floating], true: NDArray[np.floating]) -> dict[str, float]:
    """Scores of numbers: ``pearson``, ``spearmanr`` (in [-1, 1]; 0 where either side is constant), their mean, and ``mse``."""
    import torch
    from torchmetrics.functional import regression

    predictions, target = (torch.from_numpy(np.asarray(values, dtype=np.float64)) for values in (predicted, true))
    constant = bool((predictions == predictions[0]).all() or (target == target[0]).all())
    found = dict.fromkeys(_REGRESSION, 0.0)
    if not constant:
        found["pearson"] = float(regression.pearson_corrcoef(predictions, target))
        found["spearmanr"] = float(regression.spearman_corrcoef(predictions, target))
    return {**_combined(found), "mse": float(((predictions - target) ** 2).mean())}


def _combined(found: dict[str, float]) -> dict[str, float]:
    return {**found, "combined_score": sum(found.values()) / len(found)} if len(found) > 1 else found
