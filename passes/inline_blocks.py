"""Give a partitioned Program its flat graph back.

Before: ``%30 = block @encoder.layer.0(%8) {`` lines ``}``.  After: the lines, where they were before ``partition-blocks``: the text is
the same again.  Exact: nothing is computed differently.  Every pass that looks at the whole graph needs it flat; export
runs this pass by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.ir.blocks import Holder, move_members
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.pipeline.base import Coverage, Pass, PassResult


@dataclass(frozen=True)
class InlineBlocks(Pass):
    """Undo partition-blocks."""

    name = "inline-blocks"
    requires = Property.PARTITIONED
    destroys = Property.PARTITIONED
    forbids = Property.NONE

    def run(self, program: Program) -> PassResult:
        """Put the lines of each block in place of its call, and a plain holder of parameters in place of the block."""
        blocks = program.blocks
        if blocks:
            program.graph = program.flat_graph()
        for path, block in blocks.items():
            holder = Holder()
            move_members(block, holder)
            owner, _, leaf = path.rpartition(".")
            program.get_submodule(owner)._modules[leaf] = holder
        return PassResult(program, bool(blocks), {"blocks": len(blocks)}, Coverage(tuple(blocks)))
