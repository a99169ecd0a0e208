"""Patterns of small groups of consecutive input entries of which some are kept: N:M."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.sparsity.pattern_base import ALL, Pattern, Region, Shape, check_units

_UNROLLED = 32
"""Largest group that is handled by comparing entries pairwise: ten times as fast as sorting groups of 4."""


@dataclass(frozen=True)
class NM(Pattern):
    """Of every ``m`` consecutive input entries at most ``n`` are kept (NVIDIA's meaning of N:M).

    A unit is one group of ``m``. It is pruned by dropping its ``m - n`` smallest weights, or left dense. A
    last group of fewer than ``m`` entries always stays dense. Source: Mishra et al., arXiv:2104.08378.

    Raises:
        SparsityError: Not ``0 < n < m``.
    """

    n: int
    m: int
    examples = ("2:4",)

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise SparsityError(
                f"pattern {self.n}:{self.m} keeps {self.n} of every {self.m}; it needs 0 < n < m, as in 2:4"
            )

    @classmethod
    def from_text(cls, text: str) -> NM | None:
        """Read ``n:m``."""
        match = re.fullmatch(r"(\d+):(\d+)", text)
        return cls(int(match[1]), int(match[2])) if match else None

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def misfit(self, shape: Shape) -> str | None:
        """Name the input size that is no multiple of ``m``."""
        if shape[1] < self.m:
            return f"pattern {self} spans {self.m} inputs but the weight has only {shape[1]}"
        return f"{shape[1]} inputs are not a multiple of m={self.m} of pattern {self}" if shape[1] % self.m else None

    def score_shape(self, shape: Shape) -> tuple[int, ...]:
        """Return ``shape``: one score per weight."""
        return shape

    def reduce(self, scores: Tensor) -> Tensor:
        """Return ``scores`` itself."""
        return scores

    def unit_scores(self, stored: Tensor) -> Tensor:
        """Return the mean of the ``m - n`` smallest of each group, ``[out, ceil(in/m)]``; inf for a tail."""
        full = stored.shape[1] // self.m
        scores = smallest_mean(stored[:, : full * self.m].view(len(stored), full, self.m), self.m - self.n)
        return torch.nn.functional.pad(scores, (0, 1), value=float("inf")) if stored.shape[1] % self.m else scores

    def unit_sizes(self, shape: Shape) -> int | Tensor:
        """Return ``m - n``, and 0 for the short last group of each row."""
        if shape[1] % self.m == 0:
            return self.m - self.n
        sizes = torch.full((shape[0], shape[1] // self.m + 1), self.m - self.n, dtype=torch.int64)
        sizes[:, -1] = 0
        return sizes

    def spread(self, stored: Tensor, shape: Shape) -> Tensor:
        """Return ``stored`` itself."""
        return stored

    def locked(self, zero: Tensor) -> Tensor:
        """Prune the zeros of each whole group that keeps at most ``n``."""
        full = zero.shape[1] // self.m
        kept = torch.ones_like(zero)
        groups = zero[:, : full * self.m].view(len(zero), full, self.m)
        sparse = groups.sum(2, keepdim=True) >= self.m - self.n
        kept[:, : full * self.m] = groups.logical_and(sparse).logical_not().flatten(1)
        return kept

    def score_sizes(self, shape: Shape, *, device: torch.device) -> int | Tensor:
        """Return 1: every weight has its score."""
        return 1

    def mask(self, stored: Tensor, prune: Tensor, shape: Shape) -> Tensor:
        """Drop the ``m - n`` smallest of each pruned group."""
        check_units(prune, (shape[0], -(-shape[1] // self.m)), self)
        full = shape[1] // self.m
        kept = torch.ones(shape, dtype=torch.bool, device=prune.device)
        dropped = drop_smallest(stored[:, : full * self.m].view(len(stored), full, self.m), self.m - self.n)
        dropped.logical_and_(prune[:, :full, None])
        torch.logical_not(dropped.flatten(1), out=kept[:, : full * self.m])
        return kept

    def holds(self, kept: Tensor) -> bool:
        """Say whether each group is dense or keeps at most ``n``."""
        short = -kept.shape[1] % self.m
        padded = torch.nn.functional.pad(kept, (0, short)) if short else kept
        counts = padded.reshape(len(padded), -1, self.m).sum(2)
        dense = torch.full_like(counts[:1], self.m)
        if short:
            dense[:, -1] -= short
        return bool(((counts <= self.n) | (counts == dense)).all())

    def pattern_sparsity(self, zero: Tensor) -> float:
        """Return the fraction of zeros."""
        return int(zero.count_nonzero()) / max(1, zero.numel())

    def max_sparsity(self, shape: Shape) -> float:
        """Return ``1 - n/m``, less where a short last group stays dense."""
        return (self.m - self.n) * (shape[1] // self.m) / max(1, shape[1])

    def regions(self, shape: Shape, elements: int) -> Iterator[Region]:
        """Cut into bands of rows."""
        step = max(1, elements // max(1, shape[1]))
        for start in range(0, shape[0], step):
            part = slice(start, min(start + step, shape[0]))
            yield (part, ALL), (part, ALL)


def smallest_mean(groups: Tensor, count: int) -> Tensor:
    """Return the mean of the ``count`` smallest entries along the last dimension.

    Args:
        groups: Float ``[a, b, m]``.
        count: ``0 < count < m``.

    Returns:
        ``[a, b]``.
    """
    if groups.shape[2] > _UNROLLED:
        return groups.topk(count, largest=False).values.mean(2)
    entries = list(groups.permute(2, 0, 1).contiguous())
    for done in range(count):  # compare and exchange, over the entries of a group and not over the groups
        for place in range(len(entries) - 1, done, -1):
            one, other = entries[place - 1], entries[place]
            entries[place - 1], entries[place] = torch.minimum(one, other), torch.maximum(one, other)
    total: Tensor = entries[0] if count == 1 else entries[0] + entries[1]
    for entry in entries[2:count]:
        total += entry
    return total / count


def drop_smallest(groups: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest entries along the last dimension; of equal ones the highest indices.

    Args:
        groups: Float ``[a, b, m]``.
        count: ``0 < count < m``.

    Returns:
        Bool, shape of ``groups``, exactly ``count`` True along the last dimension; any strides.
    """
    size = groups.shape[2]
    if size > _UNROLLED:
        order = groups.sort(dim=2, descending=True, stable=True).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order[..., size - count :], True)
    entries = groups.permute(2, 0, 1).contiguous()
    rank = torch.zeros(entries.shape, dtype=torch.uint8, device=groups.device)
    for second in range(1, size):
        for first in range(second):
            wins = entries[first] >= entries[second]
            rank[second] += wins
            rank[first] += wins.logical_not_()
    return (rank >= size - count).permute(1, 2, 0)
