"""Prune by gradients of calibration data: forward and backward passes without training, then one choice of masks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.ir.choosing import initial_scores, update_masks
from graphprune.ir.masking import MaskedSite
from graphprune.ir.program import Program
from graphprune.oneshot.plan import goal_of
from graphprune.sparsity.layout import to_logical

Loss = Callable[[object, Mapping[str, Tensor]], Tensor]


def prune_by_gradients(
    program: Program,
    sites: Sequence[MaskedSite],
    batches: Sequence[Mapping[str, Tensor]],
    loss: Loss | None,
    tick: Callable[[], None],
) -> None:
    """Accumulate the scores of one rule's sites over all batches, choose the masks, and let the criterion adjust kept weights.

    Args:
        program: In the mode to score in.
        sites: All sites of a rule whose criterion needs gradients or samples; masks are mutated, and weights where the
            criterion compensates. While scores are accumulated nothing changes.
        batches: Inputs by name; each is one sample for criteria that need samples.
        loss: Function of the output and the batch; None takes the ``loss`` of the output.
        tick: Called after each batch.

    Raises:
        SparsityError: There is no loss, it is not finite, or it does not depend on a weight; names batch or site.
    """
    rounds = sites[0].criterion.recomputations
    with _trainable([site.weight for site in sites]):
        for number in range(rounds):
            stored = initial_scores(sites)
            for place, batch in enumerate(batches):
                _accumulate(sites, stored, _gradients(program, sites, batch, place, loss))
                tick()
            part = (number + 1) / rounds
            shares = [goal_of(site) * part for site in sites]
            update_masks(sites, shares if sites[0].decision.share is not None else shares[0], stored)


def _gradients(
    program: Program, sites: Sequence[MaskedSite], batch: Mapping[str, Tensor], place: int, loss: Loss | None
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        output = program(**batch)
        value = _own_loss(output) if loss is None else loss(output, batch)
        if not bool(torch.isfinite(value).all()):
            raise SparsityError(
                f"the loss of batch {place} (counted from 0) is {float(value.detach())}; leave the batch out"
            )
        found = torch.autograd.grad(value, [site.weight for site in sites], allow_unused=True)
    for site, gradient in zip(sites, found, strict=True):
        if gradient is None:
            raise SparsityError(
                f"no gradient reached {site.name}; its criterion {site.decision.criterion} needs one: the loss does not depend on "
                f"this weight, so exclude the site"
            )
        if not bool(torch.isfinite(gradient.sum())):
            raise SparsityError(
                f"the gradient of {site.name} is not finite in batch {place} (counted from 0); leave the batch out"
            )
    return found


def _accumulate(sites: Sequence[MaskedSite], stored: dict[str, Tensor | None], gradients: Sequence[Tensor]) -> None:
    for site, gradient in zip(sites, gradients, strict=True):
        stored[site.name] = site.criterion.accumulate(
            stored[site.name], site.logical_weight, to_logical(gradient, site.decision.layout), site.pattern
        )


def _own_loss(output: object) -> Tensor:
    value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(value, Tensor):
        raise SparsityError(
            "the Program returns no loss, which the criterion needs: trace it with labels=True and give labels in the batches, or "
            "pass loss=, a function of output and batch"
        )
    return value


@contextlib.contextmanager
def _trainable(weights: Sequence[Tensor]) -> Iterator[None]:
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
