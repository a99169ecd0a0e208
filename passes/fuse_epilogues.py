"""Compute what follows a sparse linear layer where its results are still in registers.

Before: ``gelu(sparse_linear(p, ...))``.  After: ``sparse_linear(p, ..., activation="gelu")``; relu and both forms of gelu.
Before: ``sparse_linear(p, ...) + x``.  After: ``sparse_linear(p, ..., residual=x)``; ``x`` of the same shape.

Equal up to rounding in the last place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphprune.ir.program import Program, eliminate_dead
from graphprune.ir.sparse_operators import LAYERS, read_argument, write_argument
from graphprune.pipeline.base import Coverage, Pass, PassResult

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseEpilogues(Pass):
    """Fuse activations and residual additions into the sparse linear layers before them."""

    name = "fuse-epilogues"

    def run(self, program: Program) -> PassResult:
        """Take in as many operators as follow."""
        counts = {"activations": 0, "residuals": 0}
        matched = []
        for node in program.calls(*LAYERS):
            fused = _fuse_activation(program, node, counts)
            fused = _fuse_residual(program, node, counts) or fused
            if fused:
                matched.append(node.name)
        if matched:
            eliminate_dead(program.graph)
            program.recompile()
        return PassResult(program, bool(matched), counts, Coverage(tuple(matched)))


def _only_user(node: fx.Node) -> fx.Node | None:
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and user.op == "call_function" else None


def _fuse_activation(program: Program, node: fx.Node, counts: dict[str, int]) -> bool:
    user = _only_user(node)
    if (
        user is None
        or read_argument(node, "activation") != "none"
        or read_argument(node, "residual") is not None
        or read_argument(node, "result") != "rows"
    ):
        return False
    if user.target is aten.gelu.default:
        activation = "gelu_tanh" if user.kwargs.get("approximate", "none") == "tanh" else "gelu"
    elif user.target is aten.relu.default:
        activation = "relu"
    else:
        return False
    write_argument(node, "activation", activation)
    user.replace_all_uses_with(node)
    program.graph.erase_node(user)
    counts["activations"] += 1
    return True


def _fuse_residual(program: Program, node: fx.Node, counts: dict[str, int]) -> bool:
    user = _only_user(node)
    if user is None or user.target is not aten.add.Tensor or user.kwargs or len(user.args) != 2:
        return False
    if read_argument(node, "residual") is not None or read_argument(node, "result") != "rows":
        return False
    other = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(other, fx.Node) or other is node:
        return False
    mine, theirs = node.meta["val"], other.meta.get("val")
    if not isinstance(theirs, torch.Tensor) or theirs.dtype is not torch.float32 or theirs.shape != mine.shape:
        return False
    if node < other:
        user.prepend(node)  # down to where both of its inputs are
    write_argument(node, "residual", other)
    user.replace_all_uses_with(node)
    program.graph.erase_node(user)
    counts["residuals"] += 1
    return True
