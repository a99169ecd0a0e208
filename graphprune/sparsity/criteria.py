"""Criteria: how important a weight is; larger = keep.

A criterion that needs no gradient computes scores from the weight when the masks are updated. One that needs
gradients keeps *stored* scores, already reduced by the pattern, and adds to them after every backward pass. A
new one of that kind is an ``AccumulatedCriterion`` with an ``importance`` formula; list it in ``CRITERIA`` so
that text can name it.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.sparsity.pattern_base import Pattern, Shape, matrix_shape
from graphprune.sparsity.spelling import format_named, parse_named

CHUNK = 1 << 18
"""Weights worked on at a time: temporaries of 1 MB (float32) stay in a core's cache."""


class Criterion(abc.ABC):
    """Base of all criteria; subclasses are frozen dataclasses whose fields have defaults.

    Everything takes logical matrices ``[out, in]``, and nothing is recorded by autograd.
    """

    name: ClassVar[str]
    needs_gradient: ClassVar[bool]
    dense_gradient: ClassVar[bool] = False
    """Whether the gradient of pruned entries is needed too."""

    def __str__(self) -> str:
        return format_named(self.name, self)

    def initial(
        self,
        pattern: Pattern,
        shape: Shape,
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor | None:
        """Return the stored state before the first step, or None where the criterion keeps none.

        Args:
            pattern: Pattern of the site.
            shape: Logical shape of the weight.
            device: Where the state lives.
            dtype: Float dtype of the state.
        """
        return None

    def accumulate(self, stored: Tensor | None, weight: Tensor, grad: Tensor, pattern: Pattern) -> Tensor:
        """Take one backward pass into account.

        Args:
            stored: State so far, mutated in place; None starts from ``initial`` on the weight's device.
            weight: ``[out, in]``, any float dtype and strides.
            grad: Its gradient, same shape; finite and unscaled (the caller skips steps that overflowed).
            pattern: Pattern of the site.

        Returns:
            The new state: ``stored`` where it was given.

        Raises:
            SparsityError: The criterion uses no gradients, or shapes differ.
        """
        raise SparsityError(f"criterion {self} uses no gradients; only call accumulate where needs_gradient is True")

    @abc.abstractmethod
    def scores(self, stored: Tensor | None, weight: Tensor, pattern: Pattern) -> Tensor:
        """Return the scores to decide on at a mask update.

        Args:
            stored: The state; None for a criterion without one.
            weight: ``[out, in]``, any float dtype and strides.
            pattern: Pattern of the site.

        Returns:
            Float tensor of ``pattern.score_shape``; may be ``stored`` itself, so do not modify it.

        Raises:
            SparsityError: The criterion needs gradients and has seen none.
        """


@dataclass(frozen=True)
class Magnitude(Criterion):
    """``reduce(|W|)``. Source: Han et al., arXiv:1506.02626."""

    name = "magnitude"
    needs_gradient = False

    @torch.no_grad()
    def scores(self, stored: Tensor | None, weight: Tensor, pattern: Pattern) -> Tensor:
        """Return the reduced magnitude; ``stored`` is ignored."""
        shape = matrix_shape(weight)
        result = torch.empty(pattern.score_shape(shape), dtype=torch.float32, device=weight.device)
        for part, place in pattern.regions(shape, CHUNK):
            result[place] = pattern.reduce(weight[part].float().abs())
        return result


class AccumulatedCriterion(Criterion):
    """A criterion of the form ``S <- decay * S + gain * reduce(importance(W, G))``, where ``S`` starts at 0.

    The reduction comes before the accumulation, so one score per unit is stored and not one per weight. The
    work goes in parts of ``CHUNK`` weights: memory traffic is one read of the weight, one of the gradient,
    and one update of ``S``.
    """

    needs_gradient = True
    decay: float
    gain: float

    @abc.abstractmethod
    def importance(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return each weight's score in a new float32 tensor, given a part of the weight and its gradient."""

    def initial(
        self,
        pattern: Pattern,
        shape: Shape,
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor | None:
        """Return zeros in the pattern's score shape."""
        return torch.zeros(pattern.score_shape(shape), device=device, dtype=dtype)

    @torch.no_grad()
    def accumulate(self, stored: Tensor | None, weight: Tensor, grad: Tensor, pattern: Pattern) -> Tensor:
        """Decay the stored scores in place and add those of this backward pass."""
        shape = matrix_shape(weight)
        if grad.shape != weight.shape:
            raise SparsityError(
                f"gradient of shape {tuple(grad.shape)} for a weight of shape {shape}; use to_logical on both"
            )
        if stored is None:
            stored = torch.zeros(pattern.score_shape(shape), device=weight.device)
        for part, place in pattern.regions(shape, CHUNK):
            new = pattern.reduce(self.importance(weight[part], grad[part]))
            stored[place].mul_(self.decay).add_(new, alpha=self.gain)
        return stored

    def scores(self, stored: Tensor | None, weight: Tensor, pattern: Pattern) -> Tensor:
        """Return ``stored`` itself."""
        if stored is None:
            raise SparsityError(f"criterion {self} has seen no gradient; start pruning at step 1 or later")
        return stored


@dataclass(frozen=True)
class SnipMomentum(AccumulatedCriterion):
    """``S <- decay * S + gain * reduce(|W * G|)``, Intel Neural Compressor's default criterion.

    Sources: Lee et al., arXiv:1810.02340 (``|W * G|``); the moving sum follows the code of Neural Compressor
    2.6, whose documentation swaps the two factors.

    Raises:
        SparsityError: ``decay`` not in [0, 1), or ``gain`` not positive.
    """

    decay: float = 0.9
    gain: float = 1.0
    name = "snip_momentum"

    def __post_init__(self) -> None:
        if not (0.0 <= self.decay < 1.0 and 0.0 < self.gain < float("inf")):
            raise SparsityError(
                f"snip_momentum needs 0 <= decay < 1 and gain > 0, got decay={self.decay}, gain={self.gain}"
            )

    def importance(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return ``|W * G|``."""
        if weight.dtype is torch.float32:
            return (weight * grad).abs_()
        return weight.float().mul_(grad).abs_()


CRITERIA: Mapping[str, type[Criterion]] = MappingProxyType({cls.name: cls for cls in (Magnitude, SnipMomentum)})
"""Every criterion that text can name."""


def parse_criterion(text: str) -> Criterion:
    """Read a criterion: "magnitude", "snip_momentum" or with options "snip_momentum(decay=0.8,gain=1.0)".

    Args:
        text: The text; ``str(criterion)`` is the canonical form.

    Returns:
        The criterion.

    Raises:
        SparsityError: The text is malformed, or the name, an option or a value is not known.
    """
    return parse_named(text, CRITERIA, "criterion")
