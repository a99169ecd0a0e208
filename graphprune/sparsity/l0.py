"""L0 regularization: trainable gates that learn which units are needed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.sparsity.criterion import LAST, Criterion, Moment, seen
from graphprune.sparsity.pattern_base import Pattern


@dataclass(frozen=True)
class L0(Criterion):
    """Rank by hard-concrete gates, one a unit, that are trained with a penalty on the weights they let through.

    ``insert-masks`` puts a gate behind each mask; its parameter ``<weight>_log_alpha`` is trained by the user's optimizer (give it
    no weight decay, and a larger learning rate than the weights). Until the last update a session adds the gradient of
    ``strength * expected number of open weights`` to it; masks are chosen by ``log_alpha``, so the schedule sets the sparsity and
    the penalty decides which units it takes. ``fold-masks`` multiplies the gates into the weights. Source: Louizos et al.,
    arXiv:1712.01312; formulas in ``hard_concrete``.

    Raises:
        SparsityError: ``strength`` is negative or not finite.
    """

    strength: float = 1e-4
    name = "l0"
    gated = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength < float("inf"):
            raise SparsityError(f"l0 needs a finite strength >= 0, got {self.strength}")

    def scores(self, stored: Tensor | None, weight: Tensor, pattern: Pattern, at: Moment = LAST) -> Tensor:
        """Return ``stored``, the gates' ``log_alpha``."""
        return seen(self, stored)
