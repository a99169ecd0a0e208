"""Remove dropout, for inference.

Before: ``dropout(x, p, training)``, and attention with ``dropout_p``.  After: ``x``, and attention without.  Equal in eval mode.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphprune.ir.program import Program, eliminate_dead
from graphprune.pipeline.base import Coverage, Pass, PassResult

aten = torch.ops.aten
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
_PROBABILITY = 4  # position among the arguments of attention


@dataclass(frozen=True)
class RemoveDropout(Pass):
    """Remove dropout operators, so that what stands before one meets what stands behind it."""

    name = "remove-dropout"

    def run(self, program: Program) -> PassResult:
        """Erase them, in train mode too."""
        matched = []
        for node in program.calls(*_DROPOUTS):
            node.replace_all_uses_with(node.all_input_nodes[0])
            program.graph.erase_node(node)
            matched.append(node.name)
        for node in program.calls(aten.scaled_dot_product_attention.default):
            if len(node.args) > _PROBABILITY and node.args[_PROBABILITY] != 0.0:
                node.update_arg(_PROBABILITY, 0.0)
                matched.append(node.name)
        if matched:
            eliminate_dead(program.graph)
            program.recompile()
        return PassResult(program, bool(matched), {"removed": len(matched)}, Coverage(tuple(matched)))
