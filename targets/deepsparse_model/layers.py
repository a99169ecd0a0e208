"""ONNX passes that write layers in the words of DeepSparse's engine."""

from __future__ import annotations

from typing import Any

from graphprune.targets.onnx_model.draft import Draft, made_by, only_user, rank_of


def pool_pixels(draft: Draft) -> int:
    """Write a mean over all pixels as pooling.

    Before: ``ReduceMean(x, axes=[2, 3])`` of four dimensions.  After: ``GlobalAveragePool(x)``, flattened where the mean dropped its
    dimensions.  Rounding: the sum may be added in another order.
    """
    count = 0
    for node in draft.nodes("ReduceMean"):
        value, result = node.inputs[0], node.outputs[0]
        axes = node.attrs.get("axes", ())
        rank = rank_of(value)
        if len(axes) != 2 or {axis % 4 for axis in axes} != {2, 3} or (rank is not None and rank != 4):
            continue
        if rank is None and not _is_image(value):
            continue
        keep = int(node.attrs.get("keepdims", 1))
        node.outputs.clear()
        name = f"{result.name}_pooled"
        if keep:
            draft.add("GlobalAveragePool", name, [value], output=result)
        else:
            pooled = draft.add("GlobalAveragePool", name, [value])
            draft.add("Flatten", f"{result.name}_flat", [pooled], {"axis": 1}, output=result)
        count += 1
    return count


def pool_floats(draft: Draft) -> int:
    """Take the largest of floats, which the engine does, and not of integers, which it leaves to onnxruntime.

    Before: ``MaxPool(Quantize(x))``.  After: ``Quantize(MaxPool(x))``.  Exact: QuantizeLinear with one scale keeps the order of
    entries.
    """
    count = 0
    for node in draft.nodes("MaxPool"):
        quantize = made_by(node.inputs[0], "QuantizeLinear")
        if quantize is None or only_user(draft, node.inputs[0]) is not node:
            continue
        source, middle, result = quantize.inputs[0], quantize.outputs[0], node.outputs[0]
        middle.shape, middle.dtype = result.shape, source.dtype
        quantize.outputs.clear()
        node.inputs[0] = source
        node.outputs[0] = middle
        quantize.inputs[0] = middle
        quantize.outputs = [result]
        count += 1
    return count


def _is_image(value: Any) -> bool:
    """Whether a value whose rank is not known comes out of a convolution."""
    while value.inputs:
        node = value.inputs[0]
        if node.op == "Conv":
            return rank_of(node.inputs[1]) in (None, 4)
        if node.op not in (
            "Relu",
            "Add",
            "Sum",
            "Clip",
            "QuantizeLinear",
            "DequantizeLinear",
            "BatchNormalization",
            "MaxPool",
        ):
            return False
        value = node.inputs[0]
    return False
