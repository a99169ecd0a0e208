"""What every criterion offers; see ``criteria`` for the criteria themselves.

A criterion says how important a weight is; larger = keep. One that needs no gradient computes scores from the weight when the
masks are updated. One that needs gradients keeps *stored* scores, already reduced by the pattern, and adds to them after every
backward pass: it is an ``AccumulatedCriterion`` with an ``importance`` formula.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.sparsity.pattern_base import Pattern, Shape, matrix_shape
from graphprune.sparsity.spelling import format_named

CHUNK = 1 << 18
"""Weights worked on at a time: temporaries of 1 MB (float32) stay in a core's cache."""
Device = torch.device | str


@dataclass(frozen=True, eq=False)
class Moment:
    """When masks are chosen.

    Attributes:
        mask: The mask so far, bool ``[out, in]``, for criteria that drop and grow; None = nothing is pruned.
        progress: How much of the pruning window is over, in [0, 1].
    """

    mask: Tensor | None = None
    progress: float = 1.0


LAST = Moment()
"""The end of the window, with nothing pruned so far: one choice, once."""


class Criterion(abc.ABC):
    """Base of all criteria; subclasses are frozen dataclasses whose fields have defaults.

    Everything takes logical matrices ``[out, in]``, and nothing is recorded by autograd.
    """

    name: ClassVar[str]
    needs_gradient: ClassVar[bool] = False
    """Whether ``accumulate`` wants the gradient of every training step."""
    needs_samples: ClassVar[bool] = False
    """Whether ``accumulate`` wants gradients of batches that are drawn for it at every mask update."""
    samples: int = 0
    """How many of them for an update."""
    recomputations: int = 1
    """In how many rounds an update is made, each with new samples and a part of the way."""
    needs_activations: ClassVar[bool] = False
    """Whether it works from the inputs of the layer, once and without training."""
    dense_gradient: ClassVar[bool] = False
    """Whether the gradient of pruned entries is needed too."""
    keeps_weights: ClassVar[bool] = False
    """Whether pruned weights keep their value under the mask, so that they can come back, until the last mask update."""
    gated: ClassVar[bool] = False
    """Whether it ranks by trainable gates on the units, which are inserted with the masks."""
    strength: float = 0.0
    """Penalty on a weight whose gate is open."""
    freezes_weights: ClassVar[bool] = False
    """Whether the weights must not be trained while it scores them."""

    @property
    def needs_data(self) -> bool:
        """Whether the weights alone do not tell it enough."""
        return self.needs_gradient or self.needs_samples or self.needs_activations or self.gated

    def __str__(self) -> str:
        return format_named(self.name, self)

    def refusal(self, pattern: Pattern) -> str | None:
        """Say why the criterion cannot work with a pattern, or None where it can."""
        return None

    def initial(self, pattern: Pattern, shape: Shape, *, device: Device, name: str = "") -> Tensor | None:
        """Return the stored state before the first step, or None where the criterion keeps none.

        Args:
            pattern: Pattern of the site.
            shape: Logical shape of the weight.
            device: Where the state lives.
            name: The site, for criteria that draw random numbers: the same for the same site on every process.
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
    def scores(self, stored: Tensor | None, weight: Tensor, pattern: Pattern, at: Moment = LAST) -> Tensor:
        """Return the scores to decide on at a mask update.

        Args:
            stored: The state; None for a criterion without one.
            weight: ``[out, in]``, any float dtype and strides.
            pattern: Pattern of the site.
            at: When.

        Returns:
            Float tensor of ``pattern.score_shape``; may be ``stored`` itself, so do not modify it.

        Raises:
            SparsityError: The criterion needs gradients and has seen none.
        """

    def rearrange(self, stored: Tensor | None, prune: Tensor) -> Tensor:
        """Improve a choice of units of one site, keeping their number; bool in and out, True = prune."""
        return prune

    def compensate(self, stored: Tensor | None, weight: Tensor, mask: Tensor, pattern: Pattern) -> Tensor | None:
        """Return the weight with the kept entries adjusted for the pruned ones, or None where they stay as they are.

        Args:
            stored: The state.
            weight: ``[out, in]``, as it was when ``stored`` was accumulated.
            mask: The new mask, bool ``[out, in]``, True = kept.
            pattern: Pattern of the site.
        """
        return None

    def gradient_mask(self, weight: Tensor, pattern: Pattern, mask: Tensor) -> Tensor:
        """Return which entries the optimizer may change until the next update, bool ``[out, in]``; the kept ones by default."""
        return mask


class AccumulatedCriterion(Criterion):
    """A criterion of the form ``S <- decay * S + gain * f(reduce(importance(W, G)))``, where ``S`` starts at 0.

    The reduction comes before the accumulation, so one score per unit is stored and not one per weight. The
    work goes in parts of ``CHUNK`` weights: memory traffic is one read of the weight, one of the gradient,
    and one update of ``S``.
    """

    needs_gradient = True
    decay: float
    gain: float
    sums: ClassVar[bool] = False
    """Whether units are summed and not averaged."""

    @abc.abstractmethod
    def importance(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return each weight's score in a new float32 tensor, given a part of the weight and its gradient."""

    def transformed(self, reduced: Tensor) -> Tensor:
        """Return ``f`` of the reduced importance, which may be changed in place; the identity by default."""
        return reduced

    def initial(self, pattern: Pattern, shape: Shape, *, device: Device, name: str = "") -> Tensor | None:
        """Return zeros in the pattern's score shape."""
        return torch.zeros(pattern.score_shape(shape), device=device)

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
            if self.sums:
                new = new * pattern.score_sizes(matrix_shape(weight[part]), device=new.device)
            stored[place].mul_(self.decay).add_(self.transformed(new), alpha=self.gain)
        return stored

    def scores(self, stored: Tensor | None, weight: Tensor, pattern: Pattern, at: Moment = LAST) -> Tensor:
        """Return ``stored`` itself."""
        return seen(self, stored)


def seen(criterion: Criterion, stored: Tensor | None) -> Tensor:
    """Return the state; SparsityError where the criterion has seen nothing yet."""
    if stored is None:
        raise SparsityError(f"criterion {criterion} has seen no gradient; start pruning at step 1 or later")
    return stored


def magnitude(weight: Tensor, pattern: Pattern) -> Tensor:
    """Return ``reduce(|W|)``, float32 in the pattern's score shape, computed in parts that stay in cache."""
    shape = matrix_shape(weight)
    result = torch.empty(pattern.score_shape(shape), dtype=torch.float32, device=weight.device)
    for part, place in pattern.regions(shape, CHUNK):
        result[place] = pattern.reduce(weight[part].float().abs())
    return result


def product(weight: Tensor, grad: Tensor) -> Tensor:
    """Return ``W * G`` in a new float32 tensor."""
    return weight * grad if weight.dtype is torch.float32 else weight.float().mul_(grad)
