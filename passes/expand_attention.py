"""Write attention as the products that it consists of, so that they can be quantized one by one.

Before: ``scaled_dot_product_attention(q, k, v, mask, p, scale=s)``.  After: ``matmul(dropout(softmax(matmul(q, k^T) * s + mask)), v)``;
equal up to rounding in eval mode; in train mode dropout draws other numbers.  A row that may see nothing gives zero, as before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphprune.ir.calling import insert_call
from graphprune.ir.program import Program
from graphprune.pipeline.base import Coverage, Pass, PassResult

aten = torch.ops.aten


@dataclass(frozen=True)
class ExpandAttention(Pass):
    """Write scaled dot-product attention as two products with a softmax between them."""

    name = "expand-attention"

    def run(self, program: Program) -> PassResult:
        """Expand every attention operator; one whose sizes are not known to fit is left."""
        expanded = []
        for node in program.calls(aten.scaled_dot_product_attention.default):
            with program.graph.inserting_before(node):
                result = _Writer(program.graph, node).attention()
            node.replace_all_uses_with(result)
            program.graph.erase_node(node)
            expanded.append(node.name)
        if expanded:
            program.graph.eliminate_dead_code()
        return PassResult(program, bool(expanded), {"expanded": len(expanded)}, Coverage(tuple(expanded)))


class _Writer:
    """Writes the operators of one attention in front of it."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph, self.node = graph, node
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        self.query, self.key, self.value = given["query"], given["key"], given["value"]
        self.mask, self.dropout = given.get("attn_mask"), given.get("dropout_p", 0.0)
        self.causal, self.scale = given.get("is_causal", False), given.get("scale")
        self.grouped = given.get("enable_gqa", False)

    def attention(self) -> fx.Node:
        """The result."""
        query, key, value = self.query, self.key, self.value
        if self.grouped:
            heads, groups = (item.meta["val"].shape[-3] for item in (query, key))
            if heads != groups:
                key, value = (
                    self.call(aten.repeat_interleave.self_int, item, heads // groups, -3) for item in (key, value)
                )
        scale = self.scale if self.scale is not None else 1.0 / math.sqrt(query.meta["val"].shape[-1])
        scores = self.call(aten.matmul.default, query, self.call(aten.transpose.int, key, -2, -1))
        scores = self.call(aten.mul.Tensor, scores, scale)
        mask = self.causal_mask(scores) if self.causal else self.mask
        boolean = mask is not None and mask.meta["val"].dtype == torch.bool
        if boolean:
            hidden = self.call(aten.logical_not.default, mask)
            lowest = torch.finfo(query.meta["val"].dtype).min
            scores = self.call(aten.masked_fill.Scalar, scores, hidden, lowest)
        elif mask is not None:
            scores = self.call(aten.add.Tensor, scores, mask)
        weights = self.call(aten.softmax.int, scores, -1)
        if boolean and not self.causal:
            blind = self.call(aten.logical_not.default, self.call(aten.any.dim, mask, -1, True))
            weights = self.call(aten.masked_fill.Scalar, weights, blind, 0.0)
        return self.call(aten.matmul.default, self.dropped(weights), value)

    def causal_mask(self, scores: fx.Node) -> fx.Node:
        """Bool: where a position may look, at itself and before."""
        return self.call(aten.tril.default, self.call(aten.ones_like.default, scores, dtype=torch.bool))

    def dropped(self, weights: fx.Node) -> fx.Node:
        """Dropout as the attention had it: a probability times the Program's flag."""
        if not isinstance(self.dropout, fx.Node):
            return weights if not self.dropout else self.call(aten.dropout.default, weights, self.dropout, True)
        probability, training = self.dropout.args
        return self.call(aten.dropout.default, weights, probability, training)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return insert_call(self.graph, self.node, target, *args, **kwargs)
