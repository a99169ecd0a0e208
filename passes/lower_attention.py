"""Compute attention in a kernel of our own.

Before: ``scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=s)``.  After: ``graphprune.attention(q, k, v, mask, s, causal)``.
Equal up to the order of sums.  The operator: ``graphprune/ir/sparse_operators.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ir.calling import insert_call
from graphprune.ir.program import Program, eliminate_dead
from graphprune.ir.sparse_operators import attention
from graphprune.pipeline.base import Coverage, Pass, PassResult

aten = torch.ops.aten
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True)
class LowerAttention(Pass):
    """Write scaled dot-product attention as an operator that has a kernel for any CPU here. For inference: it has no gradient."""

    name = "lower-attention"

    def run(self, program: Program) -> PassResult:
        """Replace every attention whose shapes and dtypes the kernel takes."""
        matched, left_out = [], {}
        for node in program.calls(aten.scaled_dot_product_attention.default):
            given: dict[str, Any] = {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
            reason = _unfit(given)
            if reason is not None:
                left_out[node.name] = reason
                continue
            query, key, value = given["query"], given["key"], given["value"]
            scale = given.get("scale")
            if scale is None:
                scale = 1.0 / math.sqrt(query.meta["val"].shape[-1])
            causal = bool(given.get("is_causal", False))
            with program.graph.inserting_before(node):
                made = insert_call(
                    program.graph, node, attention, query, key, value, given.get("attn_mask"), float(scale), causal
                )
            node.replace_all_uses_with(made)
            program.graph.erase_node(node)
            matched.append(made.name)
        if matched:
            eliminate_dead(program.graph)
            program.recompile()
        return PassResult(program, bool(matched), {"lowered": len(matched)}, Coverage(tuple(matched), left_out))


def _unfit(given: dict[str, Any]) -> str | None:
    """Why an attention is left to torch."""
    values = [given[name].meta["val"] for name in ("query", "key", "value")]
    features = values[0].shape[-1]
    if isinstance(given.get("dropout_p", 0.0), fx.Node) or given.get("dropout_p", 0.0):
        return "it has dropout; run remove-dropout first"
    if any(value.dtype is not torch.float32 or value.dim() != 4 for value in values):
        return "it is not of float32 [batch, heads, tokens, features]"
    if not isinstance(features, int) or features % 16 or values[2].shape[-1] != features:
        return f"it has {features} features a head, and the kernel takes multiples of 16"
    if given.get("enable_gqa", False) and values[0].shape[1] != values[1].shape[1]:
        return "its heads share keys"
    mask = given.get("attn_mask")
    if mask is not None:
        value = mask.meta["val"]
        if not isinstance(value, Tensor) or value.dtype not in (torch.bool, torch.float32):
            return "its mask is neither bool nor float32"
    return None
