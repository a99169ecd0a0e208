"""ONNX passes that bring a graph into the form that OpenVINO fuses."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphprune.targets.onnx_model.draft import (
    Draft,
    is_constant,
    made_by,
    only_user,
    quantizes_whole,
    replace_value,
    use_instead,
)  # fmt: skip

_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool")
"""Operators that hand entries of their first input on, each as it is, or the largest of some."""


def lift_pairs(draft: Draft) -> int:
    """Quantize and dequantize before a value is moved or pooled.

    Before: ``Dequantize(Quantize(move(x)))`` for Reshape, Transpose, Flatten, Squeeze, Unsqueeze and MaxPool.  After:
    ``move(Dequantize(Quantize(x)))``, which OpenVINO fuses with what makes ``x``; it moves integers then.  The two stay
    neighbors: apart, OpenVINO takes them for conversions.  Only where nothing else uses the value between.  Exact: one scale
    treats every entry alike and keeps their order.
    """
    count = 0
    waiting = draft.nodes("QuantizeLinear")
    while waiting:
        node = waiting.pop()
        pair = only_user(draft, node.outputs[0]) if quantizes_whole(node) else None
        move = made_by(node.inputs[0], *_MOVES)
        if pair is None or pair.op != "DequantizeLinear" or move is None or not _may_lift(draft, node, pair, move):
            continue
        _swap(draft, move, node, pair)
        waiting.append(node)
        count += 1
    return count


def part_scalars(draft: Draft) -> int:
    """Give each user of a scalar constant one of its own.

    Before: ``Where(mask, 0, low)`` and ``Where(sees, x, 0)`` with one zero.  After: two zeros.  Exact.  Where both lie in one
    attention, OpenVINO 2026.4 refuses to compile it: "All consumers of a Scalar expression are expected to have the same loop IDs".
    """
    count = 0
    scalars = [value for value in draft.graph.tensors().values() if is_constant(value) and value.values.size == 1]
    for value in scalars:
        if value.values.dtype != np.float32 or any(user.op in _QUANTIZERS for user in value.outputs):
            continue
        for user in list(value.outputs)[1:]:
            use_instead(user, value, draft.constant(draft.fresh(value.name), value.values))
            count += 1
    return count


def _may_lift(draft: Draft, node: Any, pair: Any, move: Any) -> bool:
    alone = only_user(draft, node.inputs[0]) is node and len(move.outputs) == 1
    return alone and not is_constant(move.inputs[0]) and not draft.is_output(pair.outputs[0])


def _swap(draft: Draft, move: Any, quantize: Any, dequantize: Any) -> None:
    """``dequantize(quantize(move(x)))`` to ``move(dequantize(quantize(x)))``; names of values stay with their nodes."""
    source, moved, real = move.inputs[0], move.outputs[0], dequantize.outputs[0]
    replace_value(draft, real, moved)
    quantize.inputs[0], move.inputs[0] = source, real
    real.shape = quantize.outputs[0].shape = source.shape
