"""Wanda: weights ranked by magnitude times the norm of their input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.sparsity.activation import ActivationCriterion, Statistic
from graphprune.sparsity.allocation import Scope, allocate
from graphprune.sparsity.pattern_base import Pattern, Shape
from graphprune.sparsity.tiled import Unstructured

_BAND = 1 << 16
"""Weights sorted at a time."""


@dataclass(frozen=True)
class Wanda(ActivationCriterion):
    """``|W_ij| * sqrt(mean over tokens of x_j**2)``; kept weights do not change.

    Single weights compete inside their output row, weights of an N:M group inside the group, blocks and channels inside the
    layer (by the mean over their weights). Statistic: ``[groups, in]``, the mean of the squares. An input that was always zero has
    score 0, so its weights go first. Source: Sun et al., arXiv:2306.11695, section 3.
    """

    name = "wanda"

    def statistic(
        self, features: int, device: torch.device | str, *, groups: int = 1, dtype: torch.dtype = torch.float32
    ) -> Statistic:
        """Return zeros ``[groups, features]``."""
        return Statistic(torch.zeros(groups, features, device=device, dtype=dtype))

    def add(self, statistic: Statistic, x: Tensor) -> None:
        """Move the mean of the squares."""
        total = statistic.tokens + x.shape[1]
        statistic.values.mul_(statistic.tokens / total).add_(x.square().sum(1), alpha=1 / total)

    @torch.no_grad()
    def prune(self, weight: Tensor, statistic: Statistic, pattern: Pattern, sparsity: float) -> tuple[Tensor, Tensor]:
        """Prune the smallest scores; exactly ``round(sparsity * weights)`` of single weights, spread evenly over the rows."""
        shape = self.check(weight, statistic, pattern, sparsity)
        statistic.dead = statistic.values == 0
        norms = statistic.values.sqrt().repeat_interleave(shape[0] // statistic.groups, 0)
        scores = norms.mul_(weight.abs())
        if isinstance(pattern, Unstructured):
            mask = keep_largest_of_rows(scores, sparsity)
        else:
            stored = pattern.reduce(scores)
            (prune,) = allocate(
                [pattern.unit_scores(stored)],
                [pattern.unit_sizes(shape)],
                [weight.numel()],
                sparsity,
                scope=Scope.LOCAL,
                max_sparsity=1.0,
            )
            mask = pattern.mask(stored, prune, shape)
        return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device)), mask

    def workspace(self, shape: Shape, groups: int = 1) -> int:
        """Scores, magnitudes and the choice of units, and what a band of rows takes while it is sorted."""
        return 3 * 4 * shape[0] * shape[1] + 24 * min(shape[0] * shape[1], max(_BAND, shape[1]))


def keep_largest_of_rows(scores: Tensor, sparsity: float) -> Tensor:
    """Keep the largest scores of every row.

    Args:
        scores: Float ``[out, in]``; larger = keep.
        sparsity: Fraction of zeros in [0, 1].

    Returns:
        Bool ``[out, in]``, True = kept, with exactly ``round(sparsity * out * in)`` False entries; the numbers of two rows differ
        by at most one. Of equal scores of a row the lowest index is kept.
    """
    rows, columns = scores.shape
    total = round(sparsity * rows * columns)
    ends = torch.arange(rows + 1, device=scores.device) * total // max(1, rows)
    counts = columns - ends.diff()
    places = torch.arange(columns, device=scores.device)
    kept = torch.empty_like(scores, dtype=torch.bool)
    step = max(1, _BAND // max(1, columns))
    for start in range(0, rows, step):
        band = slice(start, start + step)
        order = scores[band].sort(dim=1, descending=True, stable=True).indices
        kept[band] = torch.zeros_like(kept[band]).scatter_(1, order, places < counts[band, None])
    return kept
