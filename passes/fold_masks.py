"""Fold each mask into the weight it masks.

Before: ``linear(x, mask(w, w_mask))``.  After: ``linear(x, w)``; masked entries of ``w`` are zero in storage and the mask buffer
is gone.  Exact: outputs are bitwise equal.  The weight's node keeps a record of the pattern, for verification.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphprune.errors import SparsityError
from graphprune.ir.gates import fold_gates
from graphprune.ir.masking import MaskedSite, Pruned, check_patterns, masked_sites, reached, rules_of
from graphprune.ir.program import Program, argument
from graphprune.ir.properties import Property
from graphprune.pipeline.base import Coverage, Pass, PassResult
from graphprune.sparsity.schedules import OneShot


@dataclass(frozen=True)
class FoldMasks(Pass):
    """Fold masks into weights, so that a target needs no mask operator.

    Attributes:
        allow_unfinished: Fold masks that have not reached their sparsity; without it they are an error, because the
            training that was to reach it did not run to its end.
    """

    name = "fold-masks"
    requires = Property.MASKED
    destroys = Property.MASKED

    allow_unfinished: bool = False

    def run(self, program: Program) -> PassResult:
        """Zero masked weights in place and remove the masks."""
        check_patterns(program)
        sites = masked_sites(program)
        for rule, members in rules_of(sites).items():
            if members[0].mask.is_meta:
                continue  # a structure without values, as when a saved Program is rebuilt
            done, now, target = reached(members)
            if not done and not self.allow_unfinished:
                raise SparsityError(
                    f"rule {rule} ({members[0].decision.pattern}) has reached sparsity {now:.4f} of {target}; "
                    f"{_advice(members[0])}, or set allow_unfinished to fold it as it is"
                )
        fold_gates(program)
        for site in sites:
            with torch.no_grad():
                site.weight.mul_(site.mask.view(torch.uint8))
            weight, buffer = argument(site.node, 0), argument(site.node, 1)
            site.node.replace_all_uses_with(weight)
            program.graph.erase_node(site.node)
            program.graph.erase_node(buffer)
            program.remove_buffer(str(buffer.target))
            program.annotate(weight, Pruned(site.decision.pattern))
        return PassResult(
            program,
            changed=bool(sites),
            stats={"masks-folded": len(sites)},
            coverage=Coverage(tuple(site.name for site in sites)),
        )


def _advice(site: MaskedSite) -> str:
    if isinstance(site.schedule, OneShot) and site.criterion.needs_data:
        return (
            f"criterion {site.criterion} needs data to rank the weights: call graphprune.oneshot.prune(program, batches), or "
            f"train with a session"
        )
    return "train to the end of its schedule"
