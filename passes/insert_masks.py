"""Put a mask between each chosen weight and the operators that use it.

Before: ``linear(x, w)``.  After: ``linear(x, mask(w, w_mask))``; ``w_mask`` is a bool buffer beside ``w``, True = kept, and its
node carries the decision (pattern, sparsity, criterion, schedule) that a training session carries out.  All entries
are kept at first, so outputs are bitwise equal; a one-shot schedule with a criterion that needs no gradient masks at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphprune.errors import SparsityError, suggest
from graphprune.ir import ops
from graphprune.ir.masking import Masking, masked_sites, rules_of, sparsity_of, update_masks
from graphprune.ir.program import Program, attributes
from graphprune.ir.properties import Property
from graphprune.ir.selection import Selection, selected_sites
from graphprune.ir.sites import Site
from graphprune.pipeline.base import Coverage, Pass, PassResult
from graphprune.sparsity.criteria import parse_criterion
from graphprune.sparsity.patterns import parse_pattern
from graphprune.sparsity.schedules import parse_schedule


@dataclass(frozen=True)
class InsertMasks(Pass):
    """Insert mask operators that a training session drives to a sparsity.

    Attributes:
        pattern: Sparsity pattern: ``unstructured``, ``4x1``, ``2:4``, ``channelx1``, ...
        sparsity: Fraction of zeros at the end, in [0, 1).
        criterion: What ranks the weights: ``snip_momentum``, ``magnitude``, ...
        schedule: How sparsity grows: ``cubic``, ``linear``, ``exponential``, ``cosine``, ``one-shot``.
        scope: ``global`` (sites share the budget) or ``local`` (each site gets the sparsity).
        warm_up: Before the first update: an int counts optimizer steps, a float below 1 is a fraction of training.
        cool_down: After the last update, likewise.
        frequency: Optimizer steps between updates.
        min_sparsity: Least sparsity of a site.
        max_sparsity: Most sparsity of a site.
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
    warm_up: int | float = 0.05
    cool_down: int | float = 0.3
    frequency: int = 10
    min_sparsity: float = 0.0
    max_sparsity: float = 0.98
    ragged: str = "skip"
    select: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    include_last: bool = False

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)
        parse_criterion(self.criterion)
        parse_schedule(self.schedule)
        for option, known in (("scope", ("global", "local")), ("ragged", ("skip", "pad"))):
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
        if self.frequency < 1:
            raise SparsityError(f"frequency={self.frequency} is below 1 optimizer step")
        for option in ("warm_up", "cool_down"):
            value = getattr(self, option)
            if value < 0 or (isinstance(value, float) and value >= 1):
                raise SparsityError(f"{option}={value} is neither a number of steps nor a fraction below 1 of training")

    def run(self, program: Program) -> PassResult:
        """Insert one mask a chosen weight."""
        sites, excluded = selected_sites(program, Selection(self.select, self.exclude, self.ops, self.include_last))
        fitting, left_out = self._fitting(sites)
        left_out |= {item.name: item.reason for item in excluded}
        already = masked_sites(program)
        masked = {site.name for site in already}
        for site in fitting:
            if site.name in masked:
                raise SparsityError(
                    f"{site.name} has a mask already; two rules on one site contradict each other, exclude it in one"
                )
        rule = max(rules_of(already), default=-1) + 1
        weights = attributes(program)
        for site in fitting:
            self._insert(program, site, weights[site.name], rule)
        program.recompile()
        mine = rules_of(masked_sites(program))[rule]
        stats: dict[str, int | float] = {"masks": len(fitting), "weights": sum(site.parameters for site in fitting)}
        if not mine[0].weight.is_meta:
            stats["sparsity"] = 0.0
            if self.schedule == "one-shot" and not mine[0].criterion.needs_gradient:
                update_masks(mine, self.sparsity, {})
                stats["sparsity"] = round(sparsity_of(mine), 6)
        return PassResult(program, True, stats, Coverage(tuple(site.name for site in fitting), left_out))

    def _fitting(self, sites: tuple[Site, ...]) -> tuple[list[Site], dict[str, str]]:
        pattern = parse_pattern(self.pattern)
        fitting, left_out = [], {}
        reachable = 0.0
        for site in sites:
            misfit = pattern.misfit(site.shape) if self.ragged == "skip" else None
            if misfit:
                left_out[site.name] = f"{misfit}; set ragged=pad to prune it with smaller edge blocks"
            else:
                fitting.append(site)
                reachable += pattern.max_sparsity(site.shape) * site.parameters
        if not fitting:
            raise SparsityError(
                f"pattern {self.pattern} fits none of {len(sites)} sites: {'; '.join(left_out.values())}"
            )
        best = reachable / sum(site.parameters for site in fitting)
        if self.sparsity > best + 1e-9:
            raise SparsityError(f"pattern {self.pattern} cannot reach sparsity {self.sparsity}; its most is {best:.4g}")
        return fitting, left_out

    def _insert(self, program: Program, site: Site, weight: fx.Node, rule: int) -> None:
        name = f"{site.name}_mask"
        program.add_buffer(name, torch.ones_like(program.tensor(site.name), dtype=torch.bool))
        users = list(weight.users)
        with program.graph.inserting_after(weight):
            buffer = program.graph.create_node("get_attr", name)
        dense = parse_criterion(self.criterion).dense_gradient
        with program.graph.inserting_before(min(users)):
            masked = program.graph.call_function(ops.mask, (weight, buffer, dense) if dense else (weight, buffer))
        buffer.meta["val"] = torch.empty(site.stored_shape, dtype=torch.bool, device="meta")
        masked.meta = {key: value for key, value in weight.meta.items() if key == "val"}
        for user in users:
            user.replace_input_with(weight, masked)
        decision = Masking(
            pattern=self.pattern,
            sparsity=self.sparsity,
            rule=rule,
            layout=site.layout,
            criterion=self.criterion,
            schedule=self.schedule,
            scope=self.scope,
            warm_up=self.warm_up,
            cool_down=self.cool_down,
            frequency=self.frequency,
            min_sparsity=self.min_sparsity,
            max_sparsity=self.max_sparsity,
        )
        program.annotate(buffer, decision)
