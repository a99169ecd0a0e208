"""Criteria of dynamic sparse training: weights are dropped and grown while the network trains sparse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.sparsity.criterion import LAST, AccumulatedCriterion, Criterion, Moment, magnitude, seen
from graphprune.sparsity.pattern_base import Pattern, matrix_shape
from graphprune.sparsity.selection import select_smallest


@dataclass(frozen=True)
class RigL(AccumulatedCriterion):
    """Drop the units of smallest magnitude, grow those of largest gradient.

    At progress ``t`` the share ``fraction / 2 * (1 + cos(pi * t))`` of a site's kept units is dropped, and as many pruned ones
    (or dropped ones) grow, those with the largest ``reduce(|G|)`` of the last step; they start at zero. The first update
    chooses by magnitude. Use it with the schedule ``constant``, and scope ``erdos-renyi-kernel`` or ``local``. Source: Evci et al.,
    arXiv:1911.11134, section 3.

    Raises:
        SparsityError: ``fraction`` not in (0, 1).
    """

    fraction: float = 0.3
    name = "rigl"
    decay = 0.0
    gain = 1.0
    dense_gradient = True

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction < 1.0:
            raise SparsityError(f"rigl needs 0 < fraction < 1, got {self.fraction}")

    def importance(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return ``|G|``."""
        return grad.float().abs()

    @torch.no_grad()
    def scores(self, stored: Tensor | None, weight: Tensor, pattern: Pattern, at: Moment = LAST) -> Tensor:
        """Return scores above 2 for units that stay, and below 1, by their gradient, for all others."""
        sizes = magnitude(weight, pattern)
        if at.mask is None or bool(at.mask.all()):
            return sizes
        kept = pattern.reduce(at.mask.float()) > 0
        count = int(kept.count_nonzero())
        dropped = round(self.fraction / 2 * (1 + math.cos(math.pi * at.progress)) * count)
        (weakest,) = select_smallest([sizes.masked_fill(~kept, float("inf"))], dropped)
        growth = seen(self, stored)
        return torch.where(kept & ~weakest, 2 + sizes / (1 + sizes), growth / (1 + growth))


@dataclass(frozen=True)
class TopKast(Criterion):
    """Keep the units of largest magnitude in forward, but train a larger set, so that others can overtake them.

    The mask holds the forward set. The optimizer changes the backward set: the units of largest magnitude up to
    ``backward_sparsity``; it contains the forward set. Weights keep their values under the mask, and become zero at the last
    update. Source: Jayakumar et al., arXiv:2106.03517, section 2.

    Raises:
        SparsityError: ``backward_sparsity`` not in [0, 1).
    """

    backward_sparsity: float = 0.5
    name = "top_kast"
    dense_gradient = True
    keeps_weights = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.backward_sparsity < 1.0:
            raise SparsityError(f"top_kast needs 0 <= backward_sparsity < 1, got {self.backward_sparsity}")

    @torch.no_grad()
    def scores(self, stored: Tensor | None, weight: Tensor, pattern: Pattern, at: Moment = LAST) -> Tensor:
        """Return the reduced magnitude of the stored weights, those under the mask included."""
        return magnitude(weight, pattern)

    @torch.no_grad()
    def gradient_mask(self, weight: Tensor, pattern: Pattern, mask: Tensor) -> Tensor:
        """Return the backward set."""
        scores = magnitude(weight, pattern)
        units = pattern.unit_scores(scores)
        (prune,) = select_smallest([units], int(units.numel() * self.backward_sparsity))
        return pattern.mask(scores, prune, matrix_shape(weight)) | mask
