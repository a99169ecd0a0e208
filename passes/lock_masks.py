"""Freeze the zeros that a weight has, whatever made them.

Before: ``linear(x, w)``.  After: ``linear(x, mask(w, w_mask))``, where ``w_mask`` is False exactly where ``w`` is zero (for another
pattern than ``unstructured``: where a whole unit is zero).  Outputs are bitwise equal, and training keeps the zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.errors import SparsityError, suggest
from graphprune.ir.choosing import write_mask
from graphprune.ir.masking import Masking, masked_sites, rules_of, sparsity_of
from graphprune.ir.placing import Placement, add_masks, each
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.selection import Selection, selected_sites
from graphprune.pipeline.base import Coverage, Pass, PassResult
from graphprune.sparsity.patterns import parse_pattern


@dataclass(frozen=True)
class LockMasks(Pass):
    """Insert masks that keep the zeros which are there: pattern lock, for sparse transfer and quantization-aware training.

    Attributes:
        pattern: What counts as pruned: ``unstructured`` freezes every zero; ``4x1`` whole zero blocks, ``2:4`` the zeros of groups
            that have enough of them.
        ragged: As for ``insert-masks``.
        select: As for ``find-prunable``; where nothing is selected here, the sites that ``find-prunable`` annotated.
        exclude: As for ``find-prunable``.
        ops: As for ``find-prunable``.
        include_last: As for ``find-prunable``.
    """

    name = "lock-masks"
    establishes = Property.MASKED

    pattern: str = "unstructured"
    ragged: str = "skip"
    select: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    include_last: bool = False

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)
        if self.ragged not in ("skip", "pad"):
            raise SparsityError(f"ragged={self.ragged!r} is unknown{suggest(self.ragged, ('skip', 'pad'))}")

    def run(self, program: Program) -> PassResult:
        """Insert one mask a sparse weight."""
        sites, excluded = selected_sites(program, Selection(self.select, self.exclude, self.ops, self.include_last))
        already = masked_sites(program)
        twice = {site.name for site in already} & {site.name for site in sites}
        if twice:
            raise SparsityError(f"{min(twice)} has a mask already; exclude it here, or insert no mask before")
        placements, left_out = each(sites, parse_pattern(self.pattern), pad=self.ragged == "pad")
        left_out |= {item.name: item.reason for item in excluded}
        rule = max(rules_of(already), default=-1) + 1
        add_masks(program, [(item, self._decision(item, rule)) for item in placements], dense_gradient=False)
        mine = rules_of(masked_sites(program)).get(rule, ())
        stats: dict[str, int | float] = {
            "masks": len(mine),
            "weights": sum(item.site.parameters for item in placements),
        }
        if mine and not mine[0].weight.is_meta:
            for site in mine:
                write_mask(site, site.pattern.locked(site.logical_weight == 0))
            stats["sparsity"] = round(sparsity_of(mine), 6)
            if not stats["sparsity"]:
                raise SparsityError(
                    f"no weight has zeros in pattern {self.pattern} to lock; load sparse weights, or prune with insert-masks"
                )
        return PassResult(program, True, stats, Coverage(tuple(item.site.name for item in placements), left_out))

    def _decision(self, item: Placement, rule: int) -> Masking:
        return Masking(
            pattern=self.pattern,
            sparsity=None,
            rule=rule,
            layout=item.site.layout,
            groups=item.site.groups,
            criterion="magnitude",
            schedule="one-shot",
        )
