"""ONNX passes that move QuantizeLinear and DequantizeLinear, so that what lies between them can run on integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphprune.targets.onnx_model.draft import (
    Draft,
    Quantized,
    is_constant,
    made_by,
    only_user,
    producer,
    quantized,
    quantizer_behind,
    quantizes_whole,
    rank_of,
    replace_value,
    same_constants,
    surgeon,
)  # fmt: skip

_MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")
"""Operators that hand entries of their first input on, each as it is."""


def lift_quantize(draft: Draft) -> int:
    """Quantize before a value is moved or pooled, and let quantization do what a Relu does.

    Before: ``Quantize(move(x))`` for Reshape, Transpose, Flatten, Squeeze, Unsqueeze and MaxPool.
    After: ``move(Quantize(x))``.

    Before: ``Quantize(Relu(x))`` with the zero-point at the smallest integer.  After: ``Quantize(x)``.

    Only where nothing else uses the value between.  Exact: QuantizeLinear with one scale treats every entry alike and keeps
    their order, and saturates where Relu cuts.
    """
    count = 0
    waiting = [node for node in draft.nodes("QuantizeLinear") if quantizes_whole(node)]
    while waiting:
        node = waiting.pop()
        before = made_by(node.inputs[0], *_MOVES, "MaxPool", "Relu")
        if before is None or only_user(draft, node.inputs[0]) is not node or len(before.outputs) != 1:
            continue
        if before.op == "Relu":
            if not _cuts_below_zero(node):
                continue
            node.inputs[0] = before.inputs[0]
        elif is_constant(before.inputs[0]):
            continue
        else:
            _swap(before, node)
        waiting.append(node)
        count += 1
    return count


def sink_dequantize(draft: Draft) -> int:
    """Dequantize after a value is moved.

    Before: ``move(Dequantize(x))`` for Reshape, Transpose, Flatten, Squeeze and Unsqueeze; with a scale a channel, of a
    constant (a tied embedding), for Transpose.  After: ``Dequantize(move(x))``.  Exact.
    """
    count = 0
    waiting = draft.nodes(*_MOVES)
    while waiting:
        node = waiting.pop()
        found = quantized(node.inputs[0])
        if found is None or not node.outputs or not _may_sink(found, node):
            continue
        attributes = dict(found.node.attrs)
        if not found.per_tensor:
            attributes["axis"] = list(node.attrs["perm"]).index(found.axis)
        real = node.outputs[0]
        moved = surgeon().Variable(draft.fresh(f"{real.name}_integers"), dtype=None, shape=real.shape)
        if is_constant(found.integers):
            moved.name = draft.fresh(f"{found.integers.name}_moved")
        node.inputs[0] = found.integers
        node.outputs = [moved]
        draft.add(
            "DequantizeLinear", f"{real.name}_dequantized", [moved, *found.node.inputs[1:]], attributes, output=real
        )
        waiting += [user for user in real.outputs if user.op in _MOVES]
        count += 1
    return count


def cancel_quantize_pairs(draft: Draft) -> int:
    """Drop a QuantizeLinear that undoes a DequantizeLinear.

    Before: ``Quantize(Dequantize(x))`` with equal scales and zero-points.  After: ``x``.  Exact: an integer survives the way to
    its float and back, because their quotient is less than a quarter of a step off.
    """
    count = 0
    for node in draft.nodes("QuantizeLinear"):
        found = quantized(node.inputs[0])
        if found is None or not quantizes_whole(node) or draft.is_output(node.outputs[0]):
            continue
        target = node.inputs[2] if len(node.inputs) > 2 else None
        if (
            found.per_tensor
            and same_constants(found.scale, node.inputs[1])
            and same_constants(found.zero_point, target)
        ):
            replace_value(draft, node.outputs[0], found.integers)
            node.outputs.clear()
            count += 1
    return count


def share_quantize(draft: Draft) -> int:
    """Quantize a value once.

    Before: several ``QuantizeLinear(x)`` with equal scales and zero-points, or several ``DynamicQuantizeLinear(x)``.
    After: one.  Exact.
    """
    count = 0
    first: dict[int, list[Any]] = {}
    for node in draft.nodes("QuantizeLinear", "DynamicQuantizeLinear"):
        known = first.setdefault(id(node.inputs[0]), [])
        twin = next((item for item in known if _quantizes_alike(item, node)), None)
        if twin is None or any(draft.is_output(item) for item in node.outputs):
            known.append(node)
            continue
        for old, new in zip(node.outputs, twin.outputs, strict=True):
            replace_value(draft, old, new)
        node.outputs.clear()
        count += 1
    return count


def pool_means(draft: Draft) -> int:
    """Write a mean over the pixels of quantized values as the pooling that onnxruntime has for integers.

    Before: ``Quantize(ReduceMean(Dequantize(x), axes=[2, 3]))``.  After: ``Quantize(GlobalAveragePool(Dequantize(x)))``, flattened
    where the mean dropped its dimensions.  Rounding: the sum may be added in another order.
    """
    count = 0
    for node in draft.nodes("ReduceMean"):
        value, result = node.inputs[0], node.outputs[0]
        found = quantized(value)
        rank = (rank_of(value) or rank_of(found.integers)) if found is not None else None
        if rank is None or rank < 3 or _axes(node, rank) != set(range(2, rank)):
            continue
        if quantizer_behind(draft, _after_moves(draft, result)) is None:
            continue
        keep = int(node.attrs.get("keepdims", 1))
        node.outputs.clear()
        name = f"{result.name}_pooled"
        if keep:
            draft.add("GlobalAveragePool", name, [value], output=result)
        else:
            draft.add(
                "Flatten",
                f"{result.name}_flat",
                [draft.add("GlobalAveragePool", name, [value])],
                {"axis": 1},
                output=result,
            )
        count += 1
    return count


def _swap(mover: Any, node: Any) -> None:
    """``node(mover(x))`` to ``mover(node(x))``."""
    middle, result = mover.outputs[0], node.outputs[0]
    source = mover.inputs[0]
    middle.shape, middle.dtype = source.shape, None
    node.inputs[0] = source
    mover.outputs.clear()
    node.outputs = [middle]
    mover.inputs[0] = middle
    mover.outputs = [result]


def _may_sink(found: Quantized, node: Any) -> bool:
    if is_constant(found.integers) and found.integers.values.dtype.name in ("int4", "uint4"):
        return False
    if found.blocked:
        return False
    if found.per_tensor:
        return True
    return node.op == "Transpose" and is_constant(found.integers) and "perm" in node.attrs


def _cuts_below_zero(node: Any) -> bool:
    zero_point = node.inputs[2].values if len(node.inputs) > 2 else np.zeros((), np.uint8)
    return bool(np.all(zero_point == np.iinfo(zero_point.dtype).min))


def _quantizes_alike(left: Any, right: Any) -> bool:
    if left.op != right.op or len(left.inputs) != len(right.inputs):
        return False
    same = all(same_constants(one, two) for one, two in zip(left.inputs[1:], right.inputs[1:], strict=True))
    return same and left.attrs.get("axis", 1) == right.attrs.get("axis", 1)


def _axes(node: Any, rank: int) -> set[int]:
    if "axes" in node.attrs:
        axes = node.attrs["axes"]
    elif len(node.inputs) > 1 and is_constant(node.inputs[1]):
        axes = node.inputs[1].values.reshape(-1).tolist()
    else:
        return set()
    return {int(axis) % rank for axis in axes}


def _after_moves(draft: Draft, value: Any) -> Any:
    """The value that a chain of moves hands on in the end."""
    user = only_user(draft, value)
    while user is not None and user.op in _MOVES and producer(user.outputs[0]) is user:
        value = user.outputs[0]
        user = only_user(draft, value)
    return value
