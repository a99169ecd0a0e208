"""ONNX passes that bring quantized layers into the form that onnxruntime runs on integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphprune.targets.onnx_model.draft import Draft, is_constant, quantized, quantizer_behind, surgeon


def split_gemms(draft: Draft) -> int:
    """Write Gemm as its parts where no integer Gemm can take it.

    Before: ``Gemm(x, Dequantize(w), bias)`` with x in float, quantized at run time, or w in four bits or groups.  After:
    ``Add(MatMul(x, Dequantize(w)), bias)``; ``Sum`` for Add where x is a float, because onnxruntime makes a Gemm of MatMul
    and Add before it looks for small weights.  Rounding: the bias is added last.
    """
    return _split(draft, [node for node in draft.nodes("Gemm") if _is_plain(node) and not _runs_as_qgemm(node)])


def split_all_gemms(draft: Draft) -> int:
    """Write every Gemm of two quantized values as its parts, for the form of integer operators.

    Before: ``Gemm(Dequantize(x), Dequantize(w), bias)``.  After: ``Add(MatMul(Dequantize(x), Dequantize(w)), bias)``.  Rounding:
    the bias is added last.
    """
    nodes = [node for node in draft.nodes("Gemm") if _is_plain(node)]
    return _split(draft, [node for node in nodes if all(quantized(item) for item in node.inputs[:2])])


def quantize_biases(draft: Draft) -> int:
    """Store biases as int32 where a runtime adds them to an integer sum.

    Before: ``Gemm(DQ(x), DQ(w), bias)``, or ``Conv(...)`` whose result is quantized.  After: ``Gemm(DQ(x), DQ(w),
    DQ(bias))`` with scale ``x_scale * w_scale``, which onnxruntime runs as QGemm and QLinearConv.  A bias moves by at
    most half a step of that fine scale.  Where the integers would not fit, Gemm is written as MatMul and Add.
    """
    count = 0
    for node in draft.nodes("Gemm", "Conv"):
        if len(node.inputs) < 3 or not all(quantized(item) for item in node.inputs[:2]):
            continue
        if node.op == "Gemm" and not _runs_as_qgemm(node):
            continue
        if node.op == "Conv" and quantizer_behind(draft, node.outputs[0]) is None:
            continue
        bias = node.inputs[2]
        if not is_constant(bias):
            continue
        scales = [item.scale for item in map(quantized, node.inputs[:2]) if item is not None]
        integers = integer_bias(bias.values, scales)
        if integers is not None and len(bias.outputs) == 1:
            values, scale = integers
            name, bias.name = bias.name, draft.fresh(f"{bias.name}_float")
            parts = [draft.constant(name, values), draft.constant(f"{name}_scale", scale)]
            node.inputs[2] = draft.add("DequantizeLinear", f"{name}_dequantized", parts, {"axis": 0})
        elif node.op == "Gemm":
            _split(draft, [node])
        else:
            continue
        count += 1
    return count


def dedicate_dequantize(draft: Draft) -> int:
    """Give each user a DequantizeLinear of its own, as onnxruntime's fusions ask for; the QuantizeLinear stays shared.

    Before: ``Q -> DQ -> {MatMul, MatMul, MatMul}``.  After: ``Q -> {DQ -> MatMul, DQ -> MatMul, DQ -> MatMul}``.  Exact.
    """
    count = 0
    for node in draft.nodes("DequantizeLinear"):
        value = node.outputs[0]
        for user in list(value.outputs)[1:]:
            copied = draft.add("DequantizeLinear", f"{value.name}_for_{user.name}", list(node.inputs), dict(node.attrs))
            user.inputs = [copied if item is value else item for item in user.inputs]
            count += 1
    return count


def integer_bias(bias: np.ndarray, scales: list[Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """A bias as int32 and its scales, None where they are not known or the integers do not fit."""
    if not is_constant(*scales) or bias.ndim != 1:
        return None
    scale = np.broadcast_to(scales[0].values.reshape(-1) * scales[1].values.reshape(-1), bias.shape).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        values = np.rint(bias.astype(np.float64) / scale)
    if not np.all(np.abs(values) < 2**30):  # half of int32 is left to the sum itself
        return None
    return values.astype(np.int32), scale


def _split(draft: Draft, nodes: list[Any]) -> int:
    for node in nodes:
        bias = node.inputs.pop(2) if len(node.inputs) > 2 else None
        node.op = "MatMul"
        node.attrs.clear()
        if bias is None or not bias.name:
            continue
        output, kind = node.outputs[0], "Add" if quantized(node.inputs[0]) else "Sum"
        product = surgeon().Variable(draft.fresh(f"{output.name}_product"), dtype=output.dtype, shape=output.shape)
        node.outputs = [product]
        draft.add(kind, f"{output.name}_bias", [product, bias], output=output)
    return len(nodes)


def _runs_as_qgemm(node: Any) -> bool:
    """Whether Gemm multiplies a value with one constant scale by a weight of eight bits, or its weight is a float."""
    left, right = (quantized(item) for item in node.inputs[:2])
    if right is None:
        return True
    if left is None or not left.per_tensor or not is_constant(left.scale, right.scale) or right.blocked:
        return False
    return not is_constant(right.integers) or right.integers.values.dtype.name in ("int8", "uint8")


def _is_plain(node: Any) -> bool:
    scaled = node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0
    return not scaled and not node.attrs.get("transA", 0) and not node.attrs.get("transB", 0)
