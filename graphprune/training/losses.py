"""Losses between a student and its teacher: pure functions of logits, hidden states, attention maps and embeddings.

Every loss is a mean over the entries that count (rows, tokens or queries); an entry that is masked out has no influence, not even
on the divisor. Half precision is computed in float32. No gradient reaches the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LogitsKind = Literal["kl", "ce", "mse"]
FeatureKind = Literal["mse", "kl", "l1", "cosine", "relative"]
LOGITS_KINDS: tuple[str, ...] = ("kl", "ce", "mse")
FEATURE_KINDS: tuple[str, ...] = ("mse", "kl", "l1", "cosine", "relative")
_SMALLEST = 1e-9  # under a logarithm; INC's value
_SUMS_TO_ONE = 1e-3


def logits_loss(
    student: Tensor,
    teacher: Tensor | Sequence[Tensor],
    temperature: float = 1.0,
    *,
    kind: LogitsKind = "kl",
    mask: Tensor | None = None,
    classes: Tensor | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Distance of a student's logits to those of one teacher or several.

    With ``p = softmax(teacher / T)`` and ``q = softmax(student / T)`` over the last dimension:

    - ``kl``: ``T^2 * sum(p * (log p - log q))``; zero where both agree;
    - ``ce``: ``T^2 * -sum(p * log q)``: the same gradient, plus the entropy of ``p``;
    - ``mse``: the mean of ``(student - teacher)^2`` over classes; ``T`` cancels out.

    Args:
        student: Logits ``[..., classes]``.
        teacher: Logits of the same shape, or several of them: ``p`` is then the weighted mean of their softened distributions
            (of their logits under ``mse``).
        temperature: Positive.
        kind: Which distance.
        mask: Bool ``[...]``, True = the entry counts; None = all.
        classes: Bool, broadcasts to ``[..., classes]``, True = the class takes part; None = all. Positions of padding in the
            start and end logits of question answering are no classes.
        weights: One for each teacher, summing to 1; None = equal.

    Returns:
        Scalar: the mean over the entries that count; 0 where none does.

    Source: Hinton et al., arXiv:1503.02531, section 2; the mean of several teachers: You et al., "Learning from Multiple Teacher
    Networks", KDD 2017.
    """
    teachers = (teacher,) if isinstance(teacher, Tensor) else tuple(teacher)
    shares = [1 / len(teachers)] * len(teachers) if weights is None else list(weights)
    student, teachers = _full(student), tuple(_full(item.detach()) for item in teachers)
    if kind == "mse":
        wanted = torch.stack([share * item for share, item in zip(shares, teachers, strict=True)]).sum(0)
        return _mean(_over_columns((student - wanted).square(), classes), mask)
    mixed = _mixed([_log_softmax(item, temperature, classes) for item in teachers], shares)
    log_student = _log_softmax(student, temperature, classes)
    entries = -mixed.exp() * log_student if kind == "ce" else mixed.exp() * (mixed - log_student)
    if classes is not None:
        entries = entries.masked_fill(~classes, 0.0)
    return _mean(entries.sum(-1), mask) * temperature**2


def feature_loss(
    student: Tensor,
    teacher: Tensor,
    kind: FeatureKind = "mse",
    *,
    mask: Tensor | None = None,
    columns: Tensor | None = None,
    distributions: bool | None = None,
) -> Tensor:
    """Distance of hidden states, or of attention maps.

    Row by row, over the last dimension: ``mse`` the mean of squared differences; ``l1`` that of absolute ones; ``cosine`` one
    minus the cosine; ``kl`` ``sum(p * (log p - log q))`` with the teacher's row as ``p``. ``relative``: see ``hidden_loss``.

    Args:
        student: ``[..., features]``.
        teacher: The same shape.
        kind: Which distance.
        mask: Bool, broadcasts to ``[...]``, True = the row counts; None = all.
        columns: Bool, broadcasts to ``[..., features]``, True = the feature counts; for keys of attention. None = all.
        distributions: For ``kl``: whether rows are distributions already; others are softmaxed. None looks at the teacher's
            rows: not negative, and a sum of 1 to three digits.

    Returns:
        Scalar: the mean over the rows that count.
    """
    student, teacher = _full(student), _full(teacher.detach())
    if kind == "relative":
        return _relative(student, teacher, mask)
    if kind == "cosine":
        return _mean(1 - F.cosine_similarity(student, teacher, dim=-1), mask)
    if kind == "kl":
        if _are_distributions(teacher, mask) if distributions is None else distributions:
            p, log_q = teacher, student.clamp_min(_SMALLEST).log()
            return _mean((p * (p.clamp_min(_SMALLEST).log() - log_q)).sum(-1), mask)
        log_p = F.log_softmax(teacher, -1)
        return _mean((log_p.exp() * (log_p - F.log_softmax(student, -1))).sum(-1), mask)
    difference = student - teacher
    return _mean(_over_columns(difference.abs() if kind == "l1" else difference.square(), columns), mask)


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared distance of hidden states, relative to the teacher's variance, so that layers of any scale weigh alike.

    Args:
        student: ``[batch, tokens, features]``.
        teacher: The same shape; no gradient flows into it.
        mask: ``[batch, tokens]``, nonzero = a real token; None = all.

    Returns:
        Scalar: squared error over real tokens divided by the sum of squares of the teacher's centered states.
    """
    return feature_loss(student, teacher, "relative", mask=None if mask is None else mask != 0)


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine between embeddings.

    Args:
        student: ``[batch, features]``.
        teacher: The same shape; no gradient flows into it.

    Returns:
        Scalar in [0, 2]: the mean over the batch.
    """
    return 1 - F.cosine_similarity(student, teacher.detach(), dim=-1).mean()


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the hidden states of real tokens: sentence embeddings.

    Args:
        hidden: ``[batch, tokens, features]``.
        mask: ``[batch, tokens]``, nonzero = a real token.

    Returns:
        ``[batch, features]``.

    Source: Reimers and Gurevych, arXiv:1908.10084, section 3.
    """
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1e-9)


def _full(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _log_softmax(logits: Tensor, temperature: float, classes: Tensor | None) -> Tensor:
    logits = logits / temperature
    if classes is not None:  # not minus infinity: zero times it would be NaN
        logits = logits.masked_fill(~classes, torch.finfo(logits.dtype).min)
    return F.log_softmax(logits, -1)


def _mixed(log_probabilities: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Logarithm of the weighted mean of distributions."""
    if len(log_probabilities) == 1:
        return log_probabilities[0]
    parts = [item + math.log(share) for item, share in zip(log_probabilities, shares, strict=True) if share > 0]
    return torch.logsumexp(torch.stack(parts), 0)


def _over_columns(values: Tensor, columns: Tensor | None) -> Tensor:
    """Mean over the last dimension, of the columns that count."""
    if columns is None:
        return values.mean(-1)
    weight = columns.to(values.dtype).expand_as(values)
    return (values * weight).sum(-1) / weight.sum(-1).clamp_min(1)


def _mean(entries: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return entries.mean()
    mask = mask.expand_as(entries)
    return entries.masked_fill(~mask, 0.0).sum() / mask.sum().clamp_min(1)


def _relative(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    weight = torch.ones_like(teacher[..., :1])
    if mask is not None:
        weight = mask.expand(teacher.shape[:-1]).unsqueeze(-1).to(teacher.dtype)
    leading = tuple(range(teacher.dim() - 1))
    error = ((student - teacher).square() * weight).sum()
    center = (teacher * weight).sum(leading) / weight.sum().clamp_min(1)
    scale = ((teacher - center).square() * weight).sum()
    return error / scale.clamp_min(torch.finfo(teacher.dtype).tiny)


def _are_distributions(rows: Tensor, mask: Tensor | None) -> bool:
    if mask is not None:
        rows = rows[mask.expand(rows.shape[:-1])]
    return bool((rows >= 0).all()) and bool(((rows.sum(-1) - 1).abs() < _SUMS_TO_ONE).all())
