"""Criteria from weights and first-order gradients: magnitude, gradient, snip, snip_momentum, taylor, random."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.sparsity.criterion import (
    LAST,
    AccumulatedCriterion,
    Criterion,
    Device,
    Moment,
    magnitude,
    product,
)
from graphprune.sparsity.pattern_base import Pattern, Shape


@dataclass(frozen=True)
class Magnitude(Criterion):
    """``reduce(|W|)``. Source: Han et al., arXiv:1506.02626."""

    name = "magnitude"

    @torch.no_grad()
    def scores(self, stored: Tensor | None, weight: Tensor, pattern: Pattern, at: Moment = LAST) -> Tensor:
        """Return the reduced magnitude; ``stored`` is ignored."""
        return magnitude(weight, pattern)


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform random scores, drawn once for each site from its name and the seed: a baseline to compare others with.

    Raises:
        SparsityError: ``seed`` is negative.
    """

    seed: int = 0
    name = "random"

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise SparsityError(f"random needs a seed of 0 or more, got {self.seed}")

    def initial(self, pattern: Pattern, shape: Shape, *, device: Device, name: str = "") -> Tensor | None:
        """Return the random scores in [0, 1), the same on every process and device."""
        generator = torch.Generator().manual_seed(self.seed * 0x9E3779B1 + zlib.crc32(name.encode()))
        return torch.rand(pattern.score_shape(shape), generator=generator).to(device)

    def scores(self, stored: Tensor | None, weight: Tensor, pattern: Pattern, at: Moment = LAST) -> Tensor:
        """Return the scores that ``initial`` drew."""
        if stored is None:
            raise SparsityError("criterion random ranks by what initial drew; pass that as stored")
        return stored


@dataclass(frozen=True)
class Gradient(AccumulatedCriterion):
    """``reduce(|G|)`` of the last step. Source: "gradient" of Neural Compressor 2.6."""

    name = "gradient"
    decay = 0.0
    gain = 1.0

    def importance(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return ``|G|``."""
        return grad.float().abs()


@dataclass(frozen=True)
class Snip(AccumulatedCriterion):
    """``reduce(|W * G|)`` of the last step. Source: Lee et al., arXiv:1810.02340."""

    name = "snip"
    decay = 0.0
    gain = 1.0

    def importance(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return ``|W * G|``."""
        return product(weight, grad).abs_()


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
        _check_momentum(self)

    def importance(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return ``|W * G|``."""
        return product(weight, grad).abs_()


@dataclass(frozen=True)
class Taylor(AccumulatedCriterion):
    """``S <- decay * S + gain * (sum over the unit of W * G)**2``: the squared change of the loss, to first order.

    For single weights this ranks by ``|W * G|``; for a block, products of opposite sign cancel, as they do in the loss.
    Source: Molchanov et al., arXiv:1906.10771, equations 7 and 8.

    Raises:
        SparsityError: ``decay`` not in [0, 1), or ``gain`` not positive.
    """

    decay: float = 0.9
    gain: float = 1.0
    name = "taylor"
    sums = True

    def __post_init__(self) -> None:
        _check_momentum(self)

    def importance(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return ``W * G``."""
        return product(weight, grad)

    def transformed(self, reduced: Tensor) -> Tensor:
        """Return the square."""
        return reduced.square_()


def _check_momentum(criterion: SnipMomentum | Taylor) -> None:
    if not (0.0 <= criterion.decay < 1.0 and 0.0 < criterion.gain < float("inf")):
        raise SparsityError(
            f"{criterion.name} needs 0 <= decay < 1 and gain > 0, got decay={criterion.decay}, gain={criterion.gain}"
        )
