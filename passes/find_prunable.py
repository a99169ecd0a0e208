"""Find prunable weights and annotate them; no node changes.

Before: ``%encoder.query.weight: f32[64,64] = param``.  After: the same; the node carries the annotation ``Prunable``,
which ``insert-masks`` looks for.  Embeddings, transposed convolutions and the last layer are left out, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.selection import Prunable, Selection
from graphprune.pipeline.base import Coverage, Pass, PassResult


@dataclass(frozen=True)
class FindPrunable(Pass):
    """Annotate the weights of linear and convolution operators that may be pruned.

    Attributes:
        select: Globs or ``re:`` expressions over module or parameter names; empty takes all.
        exclude: Names to leave out, in the same form.
        ops: Operators to take, such as ``linear``; empty takes all.
        include_last: Take the last layer before the output too.
    """

    name = "find-prunable"
    establishes = Property.SITES

    select: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    include_last: bool = False

    def run(self, program: Program) -> PassResult:
        """Annotate the chosen weights, and take the annotation from all others."""
        sites, excluded = Selection(self.select, self.exclude, self.ops, self.include_last).apply(program)
        chosen = {site.name for site in sites}
        changed = False
        for node in program.graph.nodes:
            if node.op != "get_attr":
                continue
            annotated = program.annotation(node, Prunable) is not None
            if node.target in chosen and not annotated:
                program.annotate(node, Prunable())
                changed = True
            elif node.target not in chosen and annotated:
                program.forget(node, Prunable)
                changed = True
        stats = {"sites": len(sites), "weights": sum(site.parameters for site in sites)}
        coverage = Coverage(tuple(site.name for site in sites), {item.name: item.reason for item in excluded})
        return PassResult(program, changed, stats, coverage)
