"""Remove nodes that reach no output.

Before: ``%3 = aten.add(%1, %2)`` without users.  After: the line is gone.  Parameters and buffers stay, because a state_dict keeps
the source's keys; operators that change a buffer stay too.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.ir.program import Program, eliminate_dead
from graphprune.pipeline.base import Pass, PassResult


@dataclass(frozen=True)
class RemoveDead(Pass):
    """Remove nodes without effect."""

    name = "remove-dead"

    def run(self, program: Program) -> PassResult:
        """Erase dead nodes until none is left."""
        removed = eliminate_dead(program.graph)
        return PassResult(program, changed=removed > 0, stats={"nodes-removed": removed})
