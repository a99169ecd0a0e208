"""Leave activations in panels between sparse linear layers, so that they are not transposed and quantized in between.

Before: ``sparse_linear(pack(sparse_linear(p, ...)), ...)``.  After: ``sparse_linear(sparse_linear(p, ..., result="panels"), ...)``.
Before: ``sparse_linear_int8(pack_bytes(sparse_linear_int8(p, ...), s, z), ...)``.  After: the inner one has ``result="bytes"`` with that
scale and zero-point.  Bitwise equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphprune.ir.program import Program, eliminate_dead
from graphprune.ir.sparse_operators import LAYERS, pack, pack_bytes, read_argument, write_argument
from graphprune.pipeline.base import Coverage, Pass, PassResult

aten = torch.ops.aten


@dataclass(frozen=True)
class KeepPanels(Pass):
    """Join sparse linear layers whose results go nowhere but into the next one's panels."""

    name = "keep-panels"

    def run(self, program: Program) -> PassResult:
        """Change the form of results, and drop the operators that made panels of them."""
        matched, left_out, forwarded = [], {}, 0
        for node in program.calls(pack, pack_bytes):
            layer = node.args[0]
            if not isinstance(layer, fx.Node) or layer.target not in LAYERS or read_argument(layer, "result") != "rows":
                continue
            forwarded += _forward_sizes(program, layer)
            if len(layer.users) > 1:
                left_out[layer.name] = "its result is used in rows too"
            elif read_argument(layer, "residual") is not None:
                left_out[layer.name] = "its residual is in rows"
            else:
                write_argument(layer, "result", "panels" if node.target is pack else "bytes")
                for name, value in zip(("scale", "zero_point"), node.args[1:], strict=False):
                    write_argument(layer, name, value)
                layer.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(layer)
                program.graph.erase_node(node)
                matched.append(layer.name)
        changed = bool(matched or forwarded)
        if changed:
            eliminate_dead(program.graph)
            program.recompile()
        return PassResult(program, changed, {"joined": len(matched)}, Coverage(tuple(matched), left_out))


def _forward_sizes(program: Program, layer: fx.Node) -> int:
    """Let what reads a size of a layer's result read what the layer was told, so that it does not need the result in rows.

    Returns:
        How many readers there were.
    """
    sizes, forwarded = read_argument(layer, "sizes"), 0
    for user in list(layer.users):
        if user.target is aten.sym_size.int and user.args[1] in range(len(sizes)):
            size = sizes[user.args[1]]
            if isinstance(size, fx.Node):
                user.replace_all_uses_with(size)
                program.graph.erase_node(user)
                forwarded += 1
    return forwarded
