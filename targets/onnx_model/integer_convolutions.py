"""ONNX passes that write convolutions of quantized values with integer operators."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphprune.targets.onnx_model.draft import (
    FLOAT,
    Draft,
    Quantized,
    absent,
    is_constant,
    quantized,
    quantizer_behind,
    target_of,
)  # fmt: skip


def convolve_dynamic(draft: Draft) -> int:
    """Write convolutions of values that are quantized at run time with integer operators.

    Before: ``Conv(DQ(DynamicQuantizeLinear(x)), DQ(w), bias)``.  After: ``ConvInteger(x_q, w_q, x_zero_point) -> Cast ->
    Mul(Mul(x_scale, w_scale)) -> Add(bias)``.  Rounding: the sum is exact and scaled once.
    """
    count = 0
    for node in draft.nodes("Conv"):
        found = _operands(node)
        if found is not None and not is_constant(found[0].scale):
            _write_sum(draft, node, *found)
            count += 1
    return count


def convolve_quantized(draft: Draft) -> int:
    """Write convolutions whose result is quantized as QLinearConv.

    Before: ``Quantize(Conv(DQ(x), DQ(w), DQ(bias)))``, the bias int32.  After: ``QLinearConv``.  Rounding: a result on the edge
    between two integers may fall to the other.
    """
    count = 0
    for node in draft.nodes("Conv"):
        found = _operands(node)
        after = quantizer_behind(draft, node.outputs[0])
        if found is None or after is None or not is_constant(found[0].scale):
            continue
        bias = quantized(node.inputs[2]) if len(node.inputs) > 2 else None
        if len(node.inputs) > 2 and (
            bias is None or not is_constant(bias.integers) or bias.integers.values.dtype != np.int32
        ):
            continue
        value, weight = found
        inputs = [*value.parts(draft), *weight.parts(draft), *target_of(draft, after)]
        if bias is not None:
            inputs.append(bias.integers)
        result, name = after.outputs[0], node.outputs[0].name
        after.outputs.clear()
        node.outputs.clear()
        draft.add("QLinearConv", f"{name}_integers", inputs, dict(node.attrs), output=result)
        count += 1
    return count


def convolve_integers(draft: Draft) -> int:
    """Write convolutions of quantized values, whose result stays in float, with integer operators.

    Before: ``Conv(DQ(x), DQ(w), bias)``.  After: ``ConvInteger(x_q, w_q, x_zero_point) -> Cast -> Mul(Mul(x_scale, w_scale)) ->
    Add(bias)``.  Rounding: the sum is exact and scaled once.
    """
    count = 0
    for node in draft.nodes("Conv"):
        found = _operands(node)
        if found is not None:
            _write_sum(draft, node, *found)
            count += 1
    return count


def _operands(node: Any) -> tuple[Quantized, Quantized] | None:
    """Input and weight, where ConvInteger takes them: eight bits, one scale of the input, a symmetric weight."""
    value, weight = quantized(node.inputs[0]), quantized(node.inputs[1])
    if value is None or weight is None or not value.per_tensor or value.blocked or weight.blocked:
        return None
    if not is_constant(weight.integers, weight.scale) or weight.integers.values.dtype.name not in ("int8", "uint8"):
        return None
    if not weight.symmetric and weight.scale.values.size != 1:
        return None
    return (value, weight) if weight.per_tensor or weight.axis == 0 else None


def _write_sum(draft: Draft, node: Any, value: Quantized, weight: Quantized) -> None:
    output = node.outputs[0]
    node.outputs.clear()
    stem = output.name
    pixels = [1] * (weight.integers.values.ndim - 2)
    inputs = [value.integers, weight.integers]
    if not (value.symmetric and weight.symmetric):
        inputs.append(absent() if value.symmetric else value.zero_point)
    if not weight.symmetric:
        inputs.append(weight.zero_point)
    sums = draft.add("ConvInteger", f"{stem}_sums", inputs, dict(node.attrs))
    real = draft.add("Cast", f"{stem}_cast", [sums], {"to": FLOAT})
    scales = weight.scale
    if scales.values.ndim:
        scales = draft.constant(draft.fresh(f"{weight.scale.name}_channels"), scales.values.reshape(-1, *pixels))
    scale = draft.add("Mul", f"{stem}_scale", [value.scale, scales])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        draft.add("Mul", f"{stem}_scaled", [real, scale], output=output)
        return
    real = draft.add("Mul", f"{stem}_scaled", [real, scale])
    if is_constant(bias):
        shift = draft.constant(draft.fresh(f"{bias.name}_channels"), bias.values.reshape(-1, *pixels))
    else:
        shape = draft.constant(draft.fresh(f"{stem}_bias_shape"), np.array([-1, *pixels], np.int64))
        shift = draft.add("Reshape", f"{stem}_bias", [bias, shape])
    draft.add("Add", f"{stem}_shifted", [real, shift], output=output)
