"""What criteria offer that prune a layer from its inputs, once and without training: wanda and sparsegpt.

The caller collects a statistic of the inputs of a layer with ``observe`` and then prunes the layer with it. ``graphprune.oneshot``
does that for all layers of a Program. Layers with the same inputs share one statistic.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.sparsity.criterion import LAST, Criterion, Moment
from graphprune.sparsity.pattern_base import Pattern, Shape, matrix_shape


@dataclass
class Statistic:
    """What is kept of the inputs of a layer.

    Attributes:
        values: Float, first dimension = groups of the layer (1 unless it is a grouped convolution). Mutated by ``observe``.
        tokens: Rows of input seen so far.
        dead: Bool ``[groups, in]``, True = the input was always zero; None until the statistic is finished, after which
            nothing more can be observed.
    """

    values: Tensor
    tokens: int = 0
    dead: Tensor | None = None

    @property
    def groups(self) -> int:
        """Groups of the layer."""
        return len(self.values)

    @property
    def features(self) -> int:
        """Input entries of one group."""
        return self.values.shape[1]


class ActivationCriterion(Criterion):
    """Base of criteria that work from the inputs of a layer; subclasses are frozen dataclasses.

    Weights are logical matrices ``[out, in]``; of a grouped convolution, group ``g`` of ``G`` has the rows
    ``[g * out / G, (g + 1) * out / G)`` and inputs of its own.
    """

    needs_activations = True

    @abc.abstractmethod
    def statistic(
        self, features: int, device: torch.device | str, *, groups: int = 1, dtype: torch.dtype = torch.float32
    ) -> Statistic:
        """Return a statistic of no inputs.

        Args:
            features: Columns of the logical weight.
            device: Where it lives.
            groups: Groups of the layer.
            dtype: float32 or float64.
        """

    @abc.abstractmethod
    def add(self, statistic: Statistic, x: Tensor) -> None:
        """Bring ``x`` into ``statistic.values``; ``tokens`` is still without it. ``x`` is ``[groups, tokens, in]``, as ``values``."""

    @torch.no_grad()
    def observe(self, statistic: Statistic, x: Tensor) -> None:
        """Take inputs into account.

        Args:
            statistic: Mutated.
            x: ``[tokens, in]``, or ``[groups, tokens, in]`` for a grouped layer; any float dtype, finite. The columns are
                those of the logical weight.

        Raises:
            SparsityError: The shape does not fit, or the statistic is finished.
        """
        if x.ndim == 2:
            x = x[None]
        if x.ndim != 3 or x.shape[0] != statistic.groups or x.shape[2] != statistic.features:
            raise SparsityError(
                f"inputs of shape {tuple(x.shape)} for {statistic.groups} groups of {statistic.features} features; "
                f"give [groups, tokens, features]"
            )
        if statistic.dead is not None:
            raise SparsityError("a statistic that pruned a layer takes no more inputs; begin a new one")
        if x.shape[1]:
            self.add(statistic, x.to(statistic.values.dtype))
            statistic.tokens += x.shape[1]

    @abc.abstractmethod
    def prune(self, weight: Tensor, statistic: Statistic, pattern: Pattern, sparsity: float) -> tuple[Tensor, Tensor]:
        """Prune a layer.

        Args:
            weight: ``[out, in]``, any float dtype and strides; not modified.
            statistic: Of the layer's inputs; finished by the first call, and good for other layers with the same inputs.
            pattern: Pattern of the site.
            sparsity: Fraction of zeros in [0, 1], reached to the nearest unit.

        Returns:
            The new weight, zero where it is pruned, dtype of ``weight``; and the mask, bool ``[out, in]``, True = kept. Of
            equal scores the lowest index is kept.

        Raises:
            SparsityError: No inputs were seen, the shapes do not fit, the pattern is refused or cannot reach the sparsity.
        """

    def workspace(self, shape: Shape, groups: int = 1) -> int:
        """Return how many bytes ``prune`` takes at most beside the weight and the statistic."""
        return 0

    def scores(self, stored: Tensor | None, weight: Tensor, pattern: Pattern, at: Moment = LAST) -> Tensor:
        """Refuse: there are no scores without the inputs of the layer."""
        raise SparsityError(
            f"criterion {self} prunes from the inputs of a layer, once and without training; "
            f"call graphprune.oneshot.prune(program, batches) with schedule=one-shot"
        )

    def problem(self, pattern: Pattern, shape: Shape, groups: int, sparsity: float) -> str | None:
        """Say why ``prune`` would refuse a layer, or None where it would not; no inputs are needed to know that."""
        refused = self.refusal(pattern)
        if refused:
            return refused
        if not 0.0 <= sparsity <= pattern.max_sparsity(shape) + 1e-9:
            return (
                f"sparsity {sparsity:.6g} is out of reach: pattern {pattern} reaches at most {pattern.max_sparsity(shape):.6g} "
                f"on a weight of shape {shape}"
            )
        return None

    def check(self, weight: Tensor, statistic: Statistic, pattern: Pattern, sparsity: float) -> Shape:
        """Return the shape of the weight; raise SparsityError where ``prune`` cannot work."""
        shape = matrix_shape(weight)
        if not statistic.tokens:
            raise SparsityError(f"criterion {self} has seen no inputs of the layer; observe some first")
        if statistic.features != shape[1] or shape[0] % statistic.groups:
            raise SparsityError(
                f"a statistic of {statistic.groups} groups of {statistic.features} features for a weight of shape {shape}"
            )
        problem = self.problem(pattern, shape, statistic.groups, sparsity)
        if problem:
            raise SparsityError(problem)
        return shape
