"""Masks of a Program and what was decided about them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from graphprune.errors import SparsityError, VerifyError
from graphprune.ir import ops
from graphprune.ir.program import Program, argument
from graphprune.ir.sharding import whole
from graphprune.sparsity.criteria import Criterion, parse_criterion
from graphprune.sparsity.layout import Layout, logical_shape, to_logical
from graphprune.sparsity.pattern_base import Pattern
from graphprune.sparsity.patterns import parse_pattern
from graphprune.sparsity.regularizers import Regularizer, parse_regularizer
from graphprune.sparsity.schedules import Schedule, parse_schedule
from graphprune.sparsity.windows import Time


@dataclass(frozen=True)
class Masking:
    """Decision on a mask: what it is to become and how. Annotated on the mask's node.

    Attributes:
        pattern: Text of the sparsity pattern.
        sparsity: Sparsity at the end of the schedule, over all sites of the rule; None where the masks are final.
        share: Sparsity of this site at the end, where its rule gives each site its own; None where sites compete.
        rule: Number of the ``insert-masks`` pass that made it; sites of one rule share a budget.
        layout: Layout of the weight.
        groups: Groups of the convolution.
        coupling: Name of the attention or feed-forward block whose sites lose the same heads or neurons; empty for none.
        parts: For a coupled site, ``(first row or column, rows or columns a unit)`` of each part of the weight that has units.
        criterion: Text of the criterion.
        schedule: Text of the schedule.
        scope: ``global`` or ``local``.
        warm_up: Training before the first update; int = steps, float below 1 = fraction of training, "2 epochs" = epochs.
        cool_down: Training after the last update; likewise.
        end: Step of the last update, in place of ``cool_down``; likewise.
        frequency: Training between updates; likewise.
        progressive: Parts in which the units chosen by one update are masked, spread until the next; 0 = at once.
        regularizer: Text of the regularizer.
        min_sparsity: Least sparsity of a site.
        max_sparsity: Most.
    """

    pattern: str
    sparsity: float | None
    share: float | None = field(default=None, repr=False)
    rule: int = field(default=0, repr=False)
    layout: Layout = field(default=Layout.OUT_IN, repr=False)
    groups: int = field(default=1, repr=False)
    coupling: str = field(default="", repr=False)
    parts: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    criterion: str = field(default="snip_momentum", repr=False)
    schedule: str = field(default="cubic", repr=False)
    scope: str = field(default="global", repr=False)
    warm_up: Time = field(default=0, repr=False)
    cool_down: Time = field(default=0, repr=False)
    end: Time | None = field(default=None, repr=False)
    frequency: Time = field(default=1, repr=False)
    progressive: int = field(default=0, repr=False)
    regularizer: str = field(default="none", repr=False)
    min_sparsity: float = field(default=0.0, repr=False)
    max_sparsity: float = field(default=0.98, repr=False)

    @property
    def locked(self) -> bool:
        """Whether the masks are final as they are; nothing chooses them anew."""
        return self.sparsity is None


@dataclass(frozen=True)
class Pruned:
    """Record on a weight's node, left by ``fold-masks``: the pattern that its zeros follow."""

    pattern: str


@dataclass(frozen=True)
class MaskedSite:
    """A mask in a Program with everything that is known of it.

    Attributes:
        name: The weight's dotted name.
        node: The mask operator.
        decision: What was decided.
        weight: The weight, as stored.
        mask: The mask, as stored.
    """

    name: str
    node: fx.Node
    decision: Masking
    weight: Tensor
    mask: Tensor

    @property
    def pattern(self) -> Pattern:
        """The sparsity pattern, for the geometry of this weight."""
        kernel = math.prod(self.weight.shape[2:]) if self.decision.layout is Layout.CONV else 1
        return _pattern(self.decision.pattern, kernel, self.decision.groups)

    @property
    def criterion(self) -> Criterion:
        """The criterion."""
        return _criterion(self.decision.criterion)

    @property
    def schedule(self) -> Schedule:
        """The schedule."""
        return parse_schedule(self.decision.schedule)

    @property
    def regularizer(self) -> Regularizer:
        """The regularizer."""
        return parse_regularizer(self.decision.regularizer)

    @property
    def shape(self) -> tuple[int, int]:
        """Logical shape ``(out, in * kernel)``."""
        return logical_shape(tuple(self.weight.shape), self.decision.layout)

    @property
    def logical_mask(self) -> Tensor:
        """The mask as ``[out, in * kernel]``."""
        return to_logical(self.mask, self.decision.layout)

    @property
    def logical_weight(self) -> Tensor:
        """The weight as ``[out, in * kernel]``, detached; gathered where it is sharded."""
        return to_logical(whole(self.weight.detach()), self.decision.layout)


def masked_sites(program: Program) -> tuple[MaskedSite, ...]:
    """All masks of a Program, in graph order."""
    found = []
    for node in program.calls(ops.mask):
        weight, mask = argument(node, 0), argument(node, 1)
        decision = program.annotation(mask, Masking)
        if decision is None:
            raise SparsityError(f"mask {mask.target} carries no decision; insert it with insert-masks")
        found.append(
            MaskedSite(
                str(weight.target), node, decision, program.tensor(str(weight.target)), program.tensor(str(mask.target))
            )
        )
    return tuple(found)


def check_patterns(program: Program) -> None:
    """Check that every mask follows its pattern: no unit is pruned in part.

    Raises:
        VerifyError: One does not, because somebody edited it; names the site.
    """
    for site in masked_sites(program):
        if site.decision.progressive and not reached([site])[0]:
            continue  # an update is under way, in parts
        if not site.mask.is_meta and not site.pattern.holds(site.logical_mask):
            raise VerifyError(
                f"the mask of {site.name} does not follow its pattern {site.decision.pattern}: some unit is pruned in part; "
                f"masks are set by a session or a one-shot schedule, not by hand"
            )


def rules_of(sites: Sequence[MaskedSite]) -> dict[int, tuple[MaskedSite, ...]]:
    """Group masks by the rule that made them."""
    return {
        rule: tuple(site for site in sites if site.decision.rule == rule)
        for rule in sorted({site.decision.rule for site in sites})
    }


def sparsity_of(sites: Sequence[MaskedSite]) -> float:
    """Fraction of masked weights over some sites."""
    total = sum(site.mask.numel() for site in sites)
    return 1.0 - sum(int(torch.count_nonzero(site.mask)) for site in sites) / total if total else 0.0


def target_of(sites: Sequence[MaskedSite]) -> float:
    """Sparsity that one rule's sites are to reach together."""
    wanted = sites[0].decision.sparsity
    if wanted is None:
        return sparsity_of(sites)
    if sites[0].decision.share is None:
        return wanted
    total = sum(site.mask.numel() for site in sites)
    return sum((site.decision.share or 0.0) * site.mask.numel() for site in sites) / total


def reached(sites: Sequence[MaskedSite]) -> tuple[bool, float, float]:
    """Whether one rule's masks have reached their target.

    Returns:
        ``(reached, sparsity, target)``. Reached means within one unit (of the largest unit) a site.
    """
    target, now = target_of(sites), sparsity_of(sites)
    total = sum(site.mask.numel() for site in sites)
    slack = sum(_largest_unit(site) for site in sites) / total if total else 0.0
    return now >= target - slack, now, target


def _largest_unit(site: MaskedSite) -> int:
    sizes = site.pattern.unit_sizes(site.shape)
    largest = sizes if isinstance(sizes, int) else int(sizes.max())
    return largest * max(1, max((width for _, width in site.decision.parts), default=1))


@functools.cache
def _pattern(text: str, kernel: int, groups: int) -> Pattern:
    return parse_pattern(text).bound(kernel=kernel, groups=groups)


@functools.cache
def _criterion(text: str) -> Criterion:
    return parse_criterion(text)
