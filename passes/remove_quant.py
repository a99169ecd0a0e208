"""Remove quantizers and keep what they did to the weights, for targets that hold float weights only.

Before: ``linear(fake_quantize(x, ...), fake_quantize(w, ...))``, frozen.  After: ``linear(x, w)``, where ``w`` keeps its values on the
integer grid, and a record of the scheme.  Weights are bitwise the same; activations are no longer rounded, so outputs differ from
before by what that did.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.ir import ops
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.quantizing import Dequantized, quantizers
from graphprune.ir.sites import attribute_behind, find_sites
from graphprune.pipeline.base import Coverage, Pass, PassResult


@dataclass(frozen=True)
class RemoveQuant(Pass):
    """Remove quantizers: weights stay on their integer grid, activations become float again."""

    name = "remove-quant"
    requires = Property.FROZEN
    destroys = Property.FAKE_QUANT | Property.FROZEN
    forbids = Property.PARTITIONED

    def run(self, program: Program) -> PassResult:
        """Erase every quantizer, its scale and its zero-point; record on each weight what it was quantized by."""
        schemes = {decision.prefix: decision.scheme for _, decision in quantizers(program) if decision.weight}
        activations = 0
        sites = {site.name for site in find_sites(program)[0]}
        rounded: set[str] = set()  # weights whose operator reads a quantized activation
        for node in program.calls(ops.fake_quantize, ops.dynamic_fake_quantize):
            root = attribute_behind(node)
            if root is None or str(root.target) not in schemes:
                activations += 1
                roots = [attribute_behind(value) for user in node.users for value in user.all_input_nodes]
                rounded |= {str(root.target) for root in roots if root is not None and root.target in sites}
        for name in sorted(schemes.keys() | rounded):
            weight = program.attribute(name)
            if weight is not None:
                program.annotate(weight, Dequantized(schemes.get(name, ""), name in rounded))
        for node in program.calls(ops.fake_quantize, ops.dynamic_fake_quantize):
            value, qparams = node.all_input_nodes[0], node.all_input_nodes[1:]
            node.replace_all_uses_with(value)
            program.graph.erase_node(node)
            for item in qparams:
                if not item.users:
                    program.graph.erase_node(item)
                    program.remove_buffer(str(item.target))
        stats = {"weights": len(schemes), "activations": activations}
        return PassResult(program, bool(schemes or activations), stats, Coverage(tuple(schemes)))
