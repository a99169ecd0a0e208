"""Compute attention in a kernel of our own.

Before: ``scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=s)``.
After: ``graphprune.attention(q, k, v, mask, s, causal, bfloat16)``.
Equal up to the order of sums; with ``bfloat16=true`` up to the rounding of the factors.
The operator: ``graphprune/ir/sparse_operators.py``.
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
_VIEWS = (aten.unsqueeze.default, aten.slice.Tensor, aten.expand.default, aten.view.default, aten.reshape.default)
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True)
class LowerAttention(Pass):
    """Write scaled dot-product attention as an operator that has a kernel for any CPU here. For inference: it has no gradient.

    Attributes:
        bfloat16: Factors may be rounded to bfloat16, where the CPU multiplies those faster.
    """

    name = "lower-attention"

    bfloat16: bool = False

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
                    program.graph,
                    node,
                    attention,
                    query,
                    key,
                    value,
                    _narrow(given.get("attn_mask")),
                    float(scale),
                    causal,
                    self.bfloat16,
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


def _narrow(mask: fx.Node | None) -> fx.Node | None:
    """A mask without what says nothing: the operator broadcasts by itself, and "and true" is left out.

    transformers writes masks as ``expand((arange(queries) >= 0) & mask[b, 1, 1, keys])``, all queries times all keys.
    """
    while mask is not None and mask.op == "call_function":
        if mask.target is aten.expand.default and mask.meta["val"].dim() == 4:
            inner = mask.args[0]
        elif mask.target is aten.__and__.Tensor:
            left, right = mask.args
            inner = right if _is_true(left) else left if _is_true(right) else None
        else:
            break
        if not isinstance(inner, fx.Node) or inner.meta["val"].dim() != 4:
            break
        mask = inner
    return mask


def _is_true(value: Any) -> bool:
    """Whether a bool tensor is true everywhere, by how it is made."""
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return False
    if value.target in (aten.new_ones.default, aten.ones.default, aten.ones_like.default):
        return True
    if value.target is aten.__and__.Tensor:
        return all(_is_true(item) for item in value.args)
    if value.target is aten.ge.Scalar:
        return bool(value.args[1] == 0) and _counts_from_zero(value.args[0])
    return value.target in _VIEWS and _is_true(value.args[0])


def _counts_from_zero(value: Any) -> bool:
    """Whether a tensor holds no negative number, because it is a range from zero on."""
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return False
    if value.target is aten.arange.default:
        return True
    if value.target is aten.add.Tensor:
        return _counts_from_zero(value.args[0]) and isinstance(value.args[1], int) and value.args[1] >= 0
    return value.target in _VIEWS and _counts_from_zero(value.args[0])
