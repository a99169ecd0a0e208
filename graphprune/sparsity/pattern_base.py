"""What every sparsity pattern offers; see ``patterns`` for the patterns themselves.

A pattern is a frozen dataclass of pure functions over tensors. It cuts a logical matrix ``[out, in]`` into
*units* that are pruned whole. Scores are *stored* reduced as far as the pattern allows (one per block; for
N:M one per weight, because the mask needs to know which weights of a group to drop). Dimensions that do not
divide are padded logically: edge units are smaller, and their score is the mean over the elements that exist.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from graphprune.errors import SparsityError

Shape = tuple[int, int]
Region = tuple[tuple[slice, slice], tuple[slice, ...]]
ALL = slice(None)


class Pattern(abc.ABC):
    """Base of all patterns; subclasses are frozen dataclasses.

    Every method works on logical matrices ``[out, in]``; ``shape`` is always that of the logical matrix.
    ``str(pattern)`` is the canonical text and ``parse_pattern(str(p)) == p``. What depends on more than the
    logical matrix, such as the kernel of a convolution, a pattern learns by ``bound``.
    """

    examples: ClassVar[tuple[str, ...]]
    """Texts shown to a user whose text cannot be read."""

    @classmethod
    @abc.abstractmethod
    def from_text(cls, text: str) -> Pattern | None:
        """Read stripped, lower-case text; None where it is not of this pattern's form."""

    @abc.abstractmethod
    def __str__(self) -> str:
        """Return the canonical text."""

    def bound(self, *, kernel: int, groups: int) -> Pattern:
        """Return the pattern for a weight of a given geometry; the pattern itself where that changes nothing.

        The text stays the same: ``parse_pattern(str(p))`` is the pattern before it was bound, so bind again after reading.

        Args:
            kernel: Kernel positions of the weight: the product of its kernel sizes, 1 for a linear layer.
            groups: Groups of a convolution, else 1.
        """
        return self

    @abc.abstractmethod
    def misfit(self, shape: Shape) -> str | None:
        """Say why the pattern does not divide a matrix exactly, or None where it does.

        A misfit is no error: the methods below handle edges. Callers choose to pad, to skip the site, or to
        refuse.
        """

    @abc.abstractmethod
    def score_shape(self, shape: Shape) -> tuple[int, ...]:
        """Return the shape of the stored scores."""

    @abc.abstractmethod
    def reduce(self, scores: Tensor) -> Tensor:
        """Reduce scores of weights to stored scores.

        Args:
            scores: Float ``[out, in]``, any strides; not modified.

        Returns:
            ``score_shape``, dtype of ``scores``: the mean over the real elements of each block. Where nothing
            is reduced, ``scores`` itself.
        """

    def unit_scores(self, stored: Tensor) -> Tensor:
        """Return the score of every unit; ``stored`` itself where scores are stored per unit."""
        return stored

    @abc.abstractmethod
    def unit_sizes(self, shape: Shape) -> int | Tensor:
        """Return how many weights are zeroed when a unit is pruned.

        Returns:
            An int where that is the same for all units, else a CPU int64 tensor of the units' shape. 0 means
            that pruning the unit has no effect.
        """

    def score_sizes(self, shape: Shape, *, device: torch.device) -> int | Tensor:
        """Return how many weights each stored score stands for: an int, or a tensor of ``score_shape`` on ``device``."""
        sizes = self.unit_sizes(shape)
        return sizes if isinstance(sizes, int) else sizes.to(device)

    @abc.abstractmethod
    def spread(self, stored: Tensor, shape: Shape) -> Tensor:
        """Repeat every stored score over the weights that it stands for: ``[out, in]``, dtype of ``stored``."""

    def locked(self, zero: Tensor) -> Tensor:
        """Return the mask that keeps the zeros which are there.

        Args:
            zero: Bool ``[out, in]``, True where the weight is zero.

        Returns:
            Bool ``[out, in]``, True = kept. Exactly the units that are zero as a whole are pruned; for N:M the zeros of each
            group that keeps at most ``n``.
        """
        shape = matrix_shape(zero)
        shares = self.reduce(zero.float())
        return self.mask(shares, self.unit_scores(shares) == 1.0, shape)

    @abc.abstractmethod
    def mask(self, stored: Tensor, prune: Tensor, shape: Shape) -> Tensor:
        """Expand a choice of units to a mask.

        Args:
            stored: Stored scores; only N:M patterns look at them.
            prune: Bool, shape of ``unit_scores(stored)``, True = prune the unit.
            shape: Logical shape.

        Returns:
            Contiguous bool ``[out, in]``, True = kept. For N:M exactly the ``m - n`` smallest of a pruned
            group are zeroed; of equal scores the lowest index is kept.

        Raises:
            SparsityError: ``prune`` does not have one entry per unit.
        """

    @abc.abstractmethod
    def holds(self, kept: Tensor) -> bool:
        """Say whether a bool mask ``[out, in]`` (True = kept) obeys the pattern."""

    @abc.abstractmethod
    def pattern_sparsity(self, zero: Tensor) -> float:
        """Return the fraction of weights that lie in fully pruned units.

        Args:
            zero: Bool ``[out, in]``, True where the weight is zero.

        Returns:
            Fraction in [0, 1]. For N:M simply the fraction of zeros.
        """

    def max_sparsity(self, shape: Shape) -> float:
        """Return the sparsity of a matrix all of whose units are pruned, in [0, 1]."""
        return 1.0

    def regions(self, shape: Shape, elements: int) -> Iterator[Region]:
        """Cut the matrix into parts whose stored scores are independent, so that work on them stays in cache.

        Args:
            shape: Logical shape.
            elements: Wanted number of weights per part, > 0; a part has at least one row or column of units.

        Yields:
            ``(index into [out, in], index into the stored scores)``; together the parts cover both exactly
            once, and ``reduce(scores[part]) == reduce(scores)[stored_part]``.
        """
        yield (ALL, ALL), ()


def matrix_shape(values: Tensor) -> Shape:
    """Return the shape of a logical matrix; SparsityError where it is none."""
    if values.ndim != 2:
        raise SparsityError(
            f"patterns work on matrices [out, in], got shape {tuple(values.shape)}; use to_logical first"
        )
    return values.shape[0], values.shape[1]


def check_units(prune: Tensor, shape: tuple[int, ...], pattern: Pattern) -> None:
    """Raise SparsityError unless ``prune`` is a bool tensor with one entry per unit."""
    if tuple(prune.shape) != shape or prune.dtype != torch.bool:
        raise SparsityError(
            f"pattern {pattern} needs a bool choice of shape {shape}, got {prune.dtype} {tuple(prune.shape)}"
        )
