"""Criteria that score units by the gradient of a mask variable: block_mask and retrain_free.

A unit's mask variable ``m`` multiplies the unit's weights, so ``dL/dm`` is the sum over the unit of ``W * G``, where ``G`` is the
gradient of the masked weight. No variable is really kept: the sum is formed from the weight and its dense gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.sparsity.channels import Channel
from graphprune.sparsity.criterion import (
    CHUNK,
    LAST,
    AccumulatedCriterion,
    Criterion,
    Device,
    Moment,
    product,
    seen,
)
from graphprune.sparsity.grouped import NM
from graphprune.sparsity.pattern_base import Pattern, Shape, matrix_shape


@dataclass(frozen=True)
class BlockMask(AccumulatedCriterion):
    """``S <- decay * S + gain * |dL/dm|``, one mask variable a block. Source: "block_mask" of Neural Compressor 2.6.

    Raises:
        SparsityError: ``decay`` not in [0, 1), or ``gain`` not positive.
    """

    decay: float = 0.9
    gain: float = 1.0
    name = "block_mask"
    sums = True
    dense_gradient = True
    keeps_weights = True

    def __post_init__(self) -> None:
        if not (0.0 <= self.decay < 1.0 and 0.0 < self.gain < float("inf")):
            raise SparsityError(
                f"block_mask needs 0 <= decay < 1 and gain > 0, got decay={self.decay}, gain={self.gain}"
            )

    def refusal(self, pattern: Pattern) -> str | None:
        """Refuse N:M patterns, which have no blocks."""
        return f"block_mask scores whole blocks and {pattern} has none" if isinstance(pattern, NM) else None

    def importance(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return ``W * G``."""
        return product(weight, grad)

    def transformed(self, reduced: Tensor) -> Tensor:
        """Return the absolute value."""
        return reduced.abs_()


@dataclass(frozen=True)
class RetrainFree(Criterion):
    """Fisher information of the mask variables, and a rearrangement that looks at pairs of channels.

    State: ``F = sum over batches of g g^T`` with ``g = dL/dm``, ``[channels, channels]``. The score of a channel is ``F_ii``.
    The rearrangement keeps how many channels of a layer are pruned and looks for the set ``P`` with the smallest
    ``1_P^T F 1_P = sum over batches of (sum over P of g)^2``: each channel that was not chosen, in ascending order of its score,
    is added, and the member whose removal leaves the smallest sum goes.

    Weights are not trained while it scores them. Source: Kwon et al., arXiv:2204.09656, sections 4.2 and 4.3; "retrain_free" of
    Neural Compressor 2.6, which keeps every ``g`` and not their products.
    """

    name = "retrain_free"
    needs_gradient = True
    dense_gradient = True
    keeps_weights = True
    freezes_weights = True

    def refusal(self, pattern: Pattern) -> str | None:
        """Refuse all but channel patterns."""
        if isinstance(pattern, Channel):
            return None
        return f"retrain_free ranks whole channels, and {pattern} is none; use channelx1, 1xchannel, head or neuron"

    def initial(self, pattern: Pattern, shape: Shape, *, device: Device, name: str = "") -> Tensor | None:
        """Return zeros, float32 ``[channels, channels]``."""
        (channels,) = pattern.score_shape(shape)
        return torch.zeros(channels, channels, device=device)

    @torch.no_grad()
    def accumulate(self, stored: Tensor | None, weight: Tensor, grad: Tensor, pattern: Pattern) -> Tensor:
        """Add this batch's ``g g^T``."""
        shape = matrix_shape(weight)
        if stored is None:
            stored = self.initial(pattern, shape, device=weight.device)
        assert stored is not None
        gradient = torch.empty(pattern.score_shape(shape), device=weight.device)
        for part, place in pattern.regions(shape, CHUNK):
            values = pattern.reduce(product(weight[part], grad[part]))
            gradient[place] = values * pattern.score_sizes(matrix_shape(weight[part]), device=values.device)
        return stored.addr_(gradient, gradient)

    def scores(self, stored: Tensor | None, weight: Tensor, pattern: Pattern, at: Moment = LAST) -> Tensor:
        """Return the diagonal of ``F``."""
        return seen(self, stored).diagonal()

    @torch.no_grad()
    def rearrange(self, stored: Tensor | None, prune: Tensor) -> Tensor:
        """Exchange channels while that lowers ``1_P^T F 1_P``; ties keep the channel that was chosen first."""
        fisher = seen(self, stored).double()
        chosen = prune.clone()
        if not chosen.any():
            return chosen
        weight = fisher @ chosen.double()  # weight[i] = sum over P of F_ij
        candidates = fisher.diagonal().masked_fill(chosen, float("inf")).sort(stable=True).indices
        for candidate in candidates[: len(chosen) - int(chosen.count_nonzero())].tolist():
            # value of P + candidate without member i, up to what all choices share: F_ii - 2 * (weight_i + F_i,candidate)
            gain = fisher.diagonal() - 2 * (weight + fisher[candidate])
            members = chosen.clone()
            members[candidate] = True
            removed = int(gain.masked_fill(~members, float("inf")).argmin())
            if gain[removed] < gain[candidate]:
                chosen[candidate], chosen[removed] = True, False
                weight += fisher[candidate] - fisher[removed]
        return chosen
