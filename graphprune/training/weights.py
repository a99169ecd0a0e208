"""Weights of losses and of teachers, and how other tools spell them."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.errors import GraphPruneError


def hardness_weights(hardness: float) -> dict[str, float]:
    """SparseML's spelling of the weights: ``hardness * distillation + (1 - hardness) * task``.

    Args:
        hardness: In [0, 1].

    Returns:
        ``task`` and ``logits``, for ``Distillation`` and for recipes.
    """
    if not 0 <= hardness <= 1:
        raise GraphPruneError(f"hardness={hardness} is not in [0, 1]; it is the part of the teacher in the loss")
    return {"task": 1 - hardness, "logits": hardness}


def loss_weights(weights: Sequence[float]) -> dict[str, float]:
    """Intel Neural Compressor's spelling of the weights: ``loss_weights=[task, teacher]``, divided by their sum.

    Returns:
        ``task`` and ``logits``, for ``Distillation`` and for recipes.
    """
    if len(weights) != 2 or min(weights) < 0 or sum(weights) <= 0:
        raise GraphPruneError(
            f"loss_weights={list(weights)} must be two numbers, of the task and of the teacher, not both 0"
        )
    return {"task": weights[0] / sum(weights), "logits": weights[1] / sum(weights)}


def teacher_shares(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Weights of teachers divided by their sum; equal ones where None is given.

    Raises:
        GraphPruneError: Not one positive number for each of ``count`` teachers.
    """
    if weights is None:
        return (1 / max(count, 1),) * count
    if len(weights) != count or min(weights, default=0) <= 0:
        raise GraphPruneError(f"teacher_weights={list(weights)} must be {count} positive numbers, one for each teacher")
    return tuple(weight / sum(weights) for weight in weights)
