"""Masks of a Program: what was decided about them, and computing them anew from scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from graphprune.errors import SparsityError, VerifyError
from graphprune.ir import ops
from graphprune.ir.program import Program, argument
from graphprune.sparsity.allocation import Scope, allocate
from graphprune.sparsity.criteria import Criterion, parse_criterion
from graphprune.sparsity.layout import Layout, from_logical, logical_shape, to_logical
from graphprune.sparsity.pattern_base import Pattern
from graphprune.sparsity.patterns import parse_pattern
from graphprune.sparsity.schedules import Schedule, parse_schedule


@dataclass(frozen=True)
class Masking:
    """Decision on a mask: what it is to become and how. Annotated on the mask's node.

    Attributes:
        pattern: Text of the sparsity pattern.
        sparsity: Sparsity at the end of the schedule, over all sites of the rule (global) or of this one (local).
        rule: Number of the ``insert-masks`` pass that made it; sites of one rule share a budget.
        layout: Layout of the weight.
        criterion: Text of the criterion.
        schedule: Text of the schedule.
        scope: ``global`` or ``local``.
        warm_up: Before the first update; int = steps, float below 1 = fraction of training.
        cool_down: After the last update; likewise.
        frequency: Optimizer steps between updates.
        min_sparsity: Least sparsity of a site.
        max_sparsity: Most.
    """

    pattern: str
    sparsity: float
    rule: int = field(default=0, repr=False)
    layout: Layout = field(default=Layout.OUT_IN, repr=False)
    criterion: str = field(default="snip_momentum", repr=False)
    schedule: str = field(default="cubic", repr=False)
    scope: str = field(default="global", repr=False)
    warm_up: float = field(default=0, repr=False)
    cool_down: float = field(default=0, repr=False)
    frequency: int = field(default=1, repr=False)
    min_sparsity: float = field(default=0.0, repr=False)
    max_sparsity: float = field(default=0.98, repr=False)


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
        """The sparsity pattern."""
        return parse_pattern(self.decision.pattern)

    @property
    def criterion(self) -> Criterion:
        """The criterion."""
        return parse_criterion(self.decision.criterion)

    @property
    def schedule(self) -> Schedule:
        """The schedule."""
        return parse_schedule(self.decision.schedule)

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
        """The weight as ``[out, in * kernel]``, detached."""
        return to_logical(self.weight.detach(), self.decision.layout)


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


@torch.no_grad()
def update_masks(sites: Sequence[MaskedSite], sparsity: float, stored: Mapping[str, Tensor | None]) -> None:
    """Choose the masks of one rule's sites anew and write them in place.

    Args:
        sites: Sites of one rule.
        sparsity: Sparsity to reach now, a fraction.
        stored: Stored scores of each site by name; None or absent for criteria without.

    Raises:
        SparsityError: NaN scores, or the sparsity cannot be reached under the caps; names the site.
    """
    decision = sites[0].decision
    scores = [site.criterion.scores(stored.get(site.name), site.logical_weight, site.pattern) for site in sites]
    chosen = allocate(
        [site.pattern.unit_scores(score) for site, score in zip(sites, scores, strict=True)],
        [site.pattern.unit_sizes(site.shape) for site in sites],
        [site.weight.numel() for site in sites],
        sparsity,
        scope=Scope(decision.scope),
        max_sparsity=decision.max_sparsity,
        min_sparsity=decision.min_sparsity,
        names=[site.name for site in sites],
    )
    for site, score, prune in zip(sites, scores, chosen, strict=True):
        mask = site.pattern.mask(score, prune, site.shape)
        site.mask.copy_(from_logical(mask, site.decision.layout, tuple(site.weight.shape)))


def sparsity_of(sites: Sequence[MaskedSite]) -> float:
    """Fraction of masked weights over some sites."""
    total = sum(site.mask.numel() for site in sites)
    return 1.0 - sum(int(torch.count_nonzero(site.mask)) for site in sites) / total if total else 0.0


def reached(sites: Sequence[MaskedSite]) -> tuple[bool, float, float]:
    """Whether one rule's masks have reached their target.

    Returns:
        ``(reached, sparsity, target)``. Reached means within one unit (of the largest unit) a site.
    """
    target = sites[0].decision.sparsity
    now = sparsity_of(sites)
    total = sum(site.mask.numel() for site in sites)
    slack = sum(_largest_unit(site) for site in sites) / total if total else 0.0
    return now >= target - slack, now, target


def _largest_unit(site: MaskedSite) -> int:
    sizes = site.pattern.unit_sizes(site.shape)
    return sizes if isinstance(sizes, int) else int(sizes.max())
