"""Movement criteria: a weight matters when training moves it away from zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.sparsity.criterion import CHUNK, AccumulatedCriterion, product
from graphprune.sparsity.pattern_base import Pattern, matrix_shape


@dataclass(frozen=True)
class Movement(AccumulatedCriterion):
    """``S <- S - sum over the unit of W * G``: it grows while the weight moves away from zero.

    Pruned weights keep their values under the mask and go on being scored, so they can come back. Source: Sanh et al.,
    arXiv:2005.07683, equation 4 (the learning rate of the scores is 1: it does not change their order); for blocks,
    Lagunas et al., arXiv:2109.04838.
    """

    name = "movement"
    decay = 1.0
    gain = -1.0
    sums = True
    dense_gradient = True
    keeps_weights = True

    def importance(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return ``W * G``."""
        return product(weight, grad)


@dataclass(frozen=True)
class SoftMovement(AccumulatedCriterion):
    """Movement with a penalty on ``sigmoid(S)``: ``S <- S - rate * (sum of W * G + penalty * sigmoid'(S))``.

    The penalty is the regularized mask of soft movement pruning: it draws every score down, and only weights that movement
    holds up stay. In the paper a fixed threshold on ``sigmoid(S)`` then sets the sparsity; here the schedule sets it, and the
    scores only rank. Source: Sanh et al., arXiv:2005.07683, section 4; Lagunas et al., arXiv:2109.04838, section 3.

    Raises:
        SparsityError: ``rate`` not positive, or ``penalty`` negative.
    """

    rate: float = 1.0
    penalty: float = 1e-3
    name = "soft_movement"
    decay = 1.0
    sums = True
    dense_gradient = True
    keeps_weights = True

    def __post_init__(self) -> None:
        if not (0.0 < self.rate < float("inf") and 0.0 <= self.penalty < float("inf")):
            raise SparsityError(
                f"soft_movement needs rate > 0 and penalty >= 0, got rate={self.rate}, penalty={self.penalty}"
            )

    @property
    def gain(self) -> float:  # type: ignore[override]
        """Minus the rate: scores go against the gradient."""
        return -self.rate

    def importance(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return ``W * G``."""
        return product(weight, grad)

    @torch.no_grad()
    def accumulate(self, stored: Tensor | None, weight: Tensor, grad: Tensor, pattern: Pattern) -> Tensor:
        """Apply the penalty on the scores so far, then take the movement into account."""
        if stored is None:
            stored = torch.zeros(pattern.score_shape(matrix_shape(weight)), device=weight.device)
        if self.penalty:
            flat = stored.view(-1)
            for start in range(0, len(flat), CHUNK):
                part = flat[start : start + CHUNK]
                gate = torch.sigmoid(part)
                part.sub_(gate.mul_(1 - gate), alpha=self.rate * self.penalty)
        return super().accumulate(stored, weight, grad, pattern)
