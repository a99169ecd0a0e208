"""Put a mask between each chosen weight and the operators that use it.

Before: ``linear(x, w)``.  After: ``linear(x, mask(w, w_mask))``; ``w_mask`` is a bool buffer beside ``w``, True = kept, and its
node carries the decision (pattern, sparsity, criterion, schedule) that a training session carries out.  All entries
are kept at first, so outputs are bitwise equal; a one-shot schedule with a criterion that needs no gradient masks at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.errors import SparsityError, suggest
from graphprune.ir.choosing import choose_without_data
from graphprune.ir.gates import insert_gates
from graphprune.ir.masking import Masking, masked_sites, rules_of, sparsity_of
from graphprune.ir.placing import Placement, add_masks, coupled, each, share_out
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.selection import Selection, selected_sites
from graphprune.ir.sites import Site
from graphprune.pipeline.base import Coverage, Pass, PassResult
from graphprune.sparsity.criteria import parse_criterion
from graphprune.sparsity.patterns import parse_pattern
from graphprune.sparsity.regularizers import parse_regularizer
from graphprune.sparsity.schedules import OneShot, parse_schedule
from graphprune.sparsity.tiled import Unstructured
from graphprune.sparsity.windows import check_time

_SCOPES = ("global", "local", "erdos-renyi", "erdos-renyi-kernel")
_COUPLED = ("head", "neuron")


@dataclass(frozen=True)
class InsertMasks(Pass):
    """Insert mask operators that a training session drives to a sparsity.

    Times are counted in optimizer steps (an int), as a fraction of training (a float below 1), or in epochs ("2 epochs").

    Attributes:
        pattern: Sparsity pattern: ``unstructured``, ``4x1``, ``2:4``, ``channelx1``, ..., or ``head`` and ``neuron``, which prune
            whole attention heads and feed-forward neurons in all the layers that have a part of them.
        sparsity: Fraction of zeros at the end, in [0, 1).
        criterion: What ranks the weights: ``snip_momentum``, ``magnitude``, ``movement``, ``obs``, ``wanda``, ...
        schedule: How sparsity grows: ``cubic``, ``linear``, ``cube``, ``exponential``, ``cosine``, ``one-shot``, ``constant``, ``acdc``.
        scope: ``global`` (sites share the budget), ``local`` (each site gets the sparsity), ``erdos-renyi`` or
            ``erdos-renyi-kernel`` (large sites get more).
        targets: Sparsity of single sites, as ``name=0.7``, the name as in ``select``; the last one that matches counts. Local
            scope only.
        warm_up: Time before the first update.
        cool_down: Time after the last update.
        end: Time of the last update, in place of ``cool_down``.
        frequency: Time between updates.
        progressive: Number of parts in which what an update chose is masked, spread evenly until the next update; 0 masks
            it at once.
        min_sparsity: Least sparsity of a site.
        max_sparsity: Most sparsity of a site.
        regularizer: What draws weights towards zero until then: ``none``, ``group_lasso(strength=0.0001)``.
        ragged: Where the pattern does not divide a weight: ``skip`` leaves it dense, ``pad`` lets edge blocks be smaller.
        select: As for ``find-prunable``; where nothing is selected here, the sites that ``find-prunable`` annotated.
        exclude: As for ``find-prunable``.
        ops: As for ``find-prunable``.
        include_last: As for ``find-prunable``.
    """

    name = "insert-masks"
    establishes = Property.MASKED

    pattern: str = "4x1"
    sparsity: float = 0.8
    criterion: str = "snip_momentum"
    schedule: str = "cubic"
    scope: str = "global"
    targets: tuple[str, ...] = ()
    warm_up: int | float | str = 0.05
    cool_down: int | float | str = 0.3
    end: int | float | str | None = None
    frequency: int | float | str = 10
    progressive: int = 0
    min_sparsity: float = 0.0
    max_sparsity: float = 0.98
    regularizer: str = "none"
    ragged: str = "skip"
    select: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    include_last: bool = False

    def __post_init__(self) -> None:
        if self.pattern not in _COUPLED:
            parse_pattern(self.pattern)
        parse_schedule(self.schedule)
        parse_regularizer(self.regularizer)
        for option, known in (("scope", _SCOPES), ("ragged", ("skip", "pad"))):
            value = getattr(self, option)
            if value not in known:
                raise SparsityError(f"{option}={value!r} is unknown{suggest(value, known)}")
        if not 0 <= self.sparsity < 1:
            raise SparsityError(f"sparsity={self.sparsity} is not in [0, 1); it is a fraction, 0.8 for 80 percent")
        if not 0 <= self.min_sparsity <= self.max_sparsity <= 1:
            raise SparsityError(
                f"it needs 0 <= min_sparsity ({self.min_sparsity}) <= max_sparsity ({self.max_sparsity}) <= 1"
            )
        if self.min_sparsity > self.sparsity or self.max_sparsity < self.sparsity:
            raise SparsityError(f"sparsity={self.sparsity} lies outside [min_sparsity, max_sparsity]")
        self._check_times()
        self._check_criterion()
        if self.targets and self.scope != "local":
            raise SparsityError(f"targets give single sites their sparsity, so they need scope=local, not {self.scope}")

    def _check_times(self) -> None:
        for option in ("warm_up", "cool_down", "end", "frequency"):
            value = getattr(self, option)
            if value is not None:
                check_time(option, value)
        if self.frequency in (0, 0.0):
            raise SparsityError(f"frequency={self.frequency} is below 1 optimizer step")
        if isinstance(self.end, int) and isinstance(self.warm_up, int) and self.end < self.warm_up:
            raise SparsityError(f"end={self.end} comes before the first update at step warm_up={self.warm_up}")
        if self.progressive < 0:
            raise SparsityError(f"progressive={self.progressive} is negative; 0 masks at once")
        if self.progressive and self.pattern in ("unstructured", "1x1", *_COUPLED):
            raise SparsityError(
                f"progressive prunes units in parts, and pattern {self.pattern} has none to divide; set 0"
            )
        if self.progressive and isinstance(self.frequency, int) and self.frequency < self.progressive:
            raise SparsityError(
                f"progressive={self.progressive} parts do not fit into frequency={self.frequency} steps between updates; "
                f"set frequency to at least {self.progressive}, or progressive to 0"
            )

    def _check_criterion(self) -> None:
        criterion, schedule = parse_criterion(self.criterion), parse_schedule(self.schedule)
        if criterion.needs_activations and (not isinstance(schedule, OneShot) or self.scope == "global"):
            raise SparsityError(
                f"criterion {criterion} prunes each layer once, by the data that reaches it: it needs schedule=one-shot and "
                f"scope=local, not schedule={self.schedule} and scope={self.scope}"
            )
        if self.progressive and isinstance(schedule, OneShot):
            raise SparsityError("progressive spreads an update until the next one, and schedule one-shot has only one")

    def run(self, program: Program) -> PassResult:
        """Insert one mask a chosen weight."""
        sites, excluded = selected_sites(program, Selection(self.select, self.exclude, self.ops, self.include_last))
        already = masked_sites(program)
        placements, left_out = coupled(program, sites, self.pattern) if self.pattern in _COUPLED else self._fit(sites)
        self._refuse_twice(placements, {site.name: site.decision for site in already})
        left_out |= {item.name: item.reason for item in excluded}
        if not placements:
            raise SparsityError(
                f"pattern {self.pattern} fits none of {len(sites)} sites: {'; '.join(left_out.values()) or 'none found'}"
            )
        self._check_reachable(placements)
        shares = share_out(placements, self.scope, self.sparsity, self.targets, (self.min_sparsity, self.max_sparsity))
        rule = max(rules_of(already), default=-1) + 1
        dense = parse_criterion(self.criterion).dense_gradient
        add_masks(
            program,
            [(item, self._decision(item, share, rule)) for item, share in zip(placements, shares, strict=True)],
            dense,
        )
        mine = rules_of(masked_sites(program))[rule]
        if mine[0].criterion.gated:
            insert_gates(program, mine)
        names = tuple(item.site.name for item in placements)
        stats: dict[str, int | float] = {
            "masks": len(names),
            "weights": sum(item.site.parameters for item in placements),
        }
        if not mine[0].weight.is_meta:
            if isinstance(mine[0].schedule, OneShot) and not mine[0].criterion.needs_data:
                choose_without_data(mine)
            stats["sparsity"] = round(sparsity_of(mine), 6)
        return PassResult(program, True, stats, Coverage(names, left_out))

    def _refuse_twice(self, placements: list[Placement], masked: dict[str, Masking]) -> None:
        for site in (item.site for item in placements):
            if site.name in masked:
                first = masked[site.name]
                kind = "lock-masks" if first.locked else "insert-masks"
                raise SparsityError(
                    f"{site.name} has a mask already, from rule {first.rule} ({kind}, {first.pattern}); rule "
                    f"{max(item.rule for item in masked.values()) + 1} (insert-masks, {self.pattern}) wants it too: two rules on "
                    f"one site contradict each other; exclude it in one of them"
                )

    def _fit(self, sites: tuple[Site, ...]) -> tuple[list[Placement], dict[str, str]]:
        pattern = parse_pattern(self.pattern)
        refusal = parse_criterion(self.criterion).refusal(pattern)
        if refusal:
            raise SparsityError(refusal)
        if self.progressive and isinstance(pattern, Unstructured):
            raise SparsityError("progressive prunes units in parts, and single weights have none; set progressive to 0")
        return each(sites, pattern, pad=self.ragged == "pad")

    def _check_reachable(self, placements: list[Placement]) -> None:
        total = sum(item.site.parameters for item in placements)
        best = sum(item.bound.max_sparsity(item.site.shape) * item.site.parameters for item in placements) / total
        if self.sparsity > best + 1e-9:
            raise SparsityError(f"pattern {self.pattern} cannot reach sparsity {self.sparsity}; its most is {best:.4g}")

    def _decision(self, item: Placement, share: float | None, rule: int) -> Masking:
        return Masking(
            pattern=str(item.pattern),
            sparsity=self.sparsity,
            share=share,
            rule=rule,
            layout=item.site.layout,
            groups=item.site.groups,
            coupling=item.coupling,
            parts=item.parts,
            criterion=self.criterion,
            schedule=self.schedule,
            scope=self.scope,
            warm_up=self.warm_up,
            cool_down=self.cool_down,
            end=self.end,
            frequency=self.frequency,
            progressive=self.progressive,
            min_sparsity=self.min_sparsity,
            max_sparsity=self.max_sparsity,
            regularizer=self.regularizer,
        )
