"""ONNX passes that write products and convolutions of quantized values as DeepSparse's engine multiplies integers.

The engine takes MatMulInteger and ConvInteger with both zero-points written out, a bias in int32 before Cast, and one Mul behind it;
QLinearConv with one scale for all channels.  Anything else it leaves to onnxruntime, or stops with an assertion.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphprune.errors import LoweringError
from graphprune.targets.onnx_model.draft import (
    FLOAT,
    Draft,
    Quantized,
    bias_behind,
    is_constant,
    quantized,
    quantizer_behind,
    rank_of,
    target_of,
)
from graphprune.targets.onnx_model.quantized_layers import integer_bias


def multiply_integers(draft: Draft) -> int:
    """Write products of quantized values with integer operators.

    Before: ``MatMul(DQ(x), DQ(w)) (-> Add(bias))``, w a weight or another activation.  After: ``MatMulInteger(x_q, w_q, x_zero_point,
    w_zero_point) (-> Add(bias int32)) -> Cast -> Mul(Mul(x_scale, w_scale))``.  Rounding: the sum is exact and scaled once; a bias
    moves by at most half a step of the product of the scales, and stays a float where it would not fit.

    Raises:
        LoweringError: The zero-point of a weight is not in the middle of its range.
    """
    count = 0
    for node in draft.nodes("MatMul"):
        left, right = (quantized(item) for item in node.inputs)
        if left is None or right is None or not _multiplies(left, right):
            continue
        _check_symmetry(right)
        output, stem = node.outputs[0], node.outputs[0].name
        addition = bias_behind(draft, output)
        inputs = [left.integers, right.integers, *_zero_points(draft, left, right)]
        node.outputs.clear()
        sums = draft.add("MatMulInteger", f"{stem}_sums", inputs)
        bias = next(item for item in addition.inputs if item is not output) if addition is not None else None
        integers = integer_bias(bias.values, [left.scale, right.scale]) if bias is not None else None
        if addition is not None and integers is not None:
            sums = draft.add("Add", f"{stem}_shifted", [sums, _as_integers(draft, bias, integers[0])])
            output = addition.outputs[0]
            addition.outputs.clear()
        _scale(draft, stem, sums, [left.scale, right.scale], output)
        count += 1
    return count


def convolve_integers(draft: Draft) -> int:
    """Write convolutions of quantized values with integer operators.

    Before: ``Conv(DQ(x), DQ(w), bias)``.  After: ``QLinearConv`` where the result is quantized and the weight has one scale; else
    ``ConvInteger(x_q, w_q, x_zero_point, w_zero_point) (-> Add(bias int32)) -> Cast -> Mul(Mul(x_scale, w_scale))``.  Rounding: as for
    ``multiply-integers``; a result of QLinearConv on the edge between two integers may fall to the other.

    Raises:
        LoweringError: The zero-point of a weight is not in the middle of its range.
    """
    count = 0
    for node in draft.nodes("Conv"):
        value, weight = quantized(node.inputs[0]), quantized(node.inputs[1])
        if value is None or weight is None or not _convolves(value, weight):
            continue
        _check_symmetry(weight)
        bias = _integer_bias(node, value, weight)
        after = quantizer_behind(draft, node.outputs[0])
        if after is not None and weight.per_tensor and (bias is not None or len(node.inputs) < 3):
            _write_qlinear(draft, node, value, weight, bias, after)
        else:
            _write_sums(draft, node, value, weight, bias)
        count += 1
    return count


def dequantize_weights(draft: Draft) -> int:
    """Let weights that meet floats become floats when the model is loaded.

    Before: ``DequantizeLinear(w)`` of an initializer.  After: ``Mul(Cast(w), scale)``, less the zero-point where it is not zero, which is
    computed once, where the engine would leave a scale a channel to onnxruntime.  Exact; a zero stays a zero.
    """
    count = 0
    for node in draft.nodes("DequantizeLinear"):
        found = quantized(node.outputs[0])
        if found is None or not is_constant(found.integers, found.scale) or found.blocked:
            continue
        weight, output = found.integers, node.outputs[0]
        node.outputs.clear()
        real = draft.add("Cast", f"{output.name}_cast", [weight], {"to": FLOAT})
        if not found.symmetric:
            middle = draft.add("Cast", f"{output.name}_middle", [found.zero_point], {"to": FLOAT})
            real = draft.add("Sub", f"{output.name}_centered", [real, _along(draft, middle, found)])
        draft.add("Mul", f"{output.name}_scaled", [real, _along(draft, found.scale, found)], output=output)
        count += 1
    return count


def _along(draft: Draft, value: Any, found: Quantized) -> Any:
    """A scale or zero-point in the shape in which it meets its weight."""
    if found.per_tensor:
        return value
    shape = [1] * found.integers.values.ndim
    shape[found.axis] = -1
    stem = f"{found.node.name}_shape"
    return draft.add("Reshape", f"{stem}d", [value, draft.constant(draft.fresh(stem), np.array(shape, np.int64))])


def _multiplies(left: Quantized, right: Quantized) -> bool:
    """Whether MatMulInteger takes these: eight bits, one constant scale on the left, one or one a column on the right."""
    if (
        not (_whole_bytes(left) and _whole_bytes(right))
        or not is_constant(left.scale, right.scale)
        or not left.per_tensor
    ):
        return False
    return right.per_tensor or right.axis == (rank_of(right.integers) or 0) - 1


def _convolves(value: Quantized, weight: Quantized) -> bool:
    if not (_whole_bytes(value) and _whole_bytes(weight)) or not is_constant(
        value.scale, weight.integers, weight.scale
    ):
        return False
    return value.per_tensor and (weight.per_tensor or weight.axis == 0)


def _whole_bytes(item: Quantized) -> bool:
    return not item.blocked and not (
        is_constant(item.integers) and item.integers.values.dtype.name not in ("int8", "uint8")
    )


def _check_symmetry(weight: Quantized) -> None:
    """Refuse what makes the engine stop with an assertion."""
    source = weight.integers
    while source.inputs and source.inputs[0].op in ("Transpose", "Reshape"):
        source = source.inputs[0].inputs[0]
    if not is_constant(source) or weight.zero_point is None:
        return
    middle = 128 if source.values.dtype == np.uint8 else 0
    if np.any(weight.zero_point.values.astype(np.int32) != middle):
        found = sorted(set(weight.zero_point.values.reshape(-1).tolist()) - {middle})
        raise LoweringError(
            f"{source.name} has the zero-point {found[0]}; DeepSparse multiplies by weights whose zero-point is {middle}. Plan "
            f"int8:symmetric for it, as annotate-quant{{preset=deepsparse}} does"
        )


def _zero_points(draft: Draft, left: Quantized, right: Quantized) -> list[Any]:
    """Both zero-points as numbers, written out where the graph has none; that of a weight lies under its name."""
    points = []
    for item in (left, right):
        point = item.zero_point
        if point is None or (is_constant(point) and point.values.ndim):
            dtype = item.integers.values.dtype if is_constant(item.integers) else np.uint8
            value = 0 if point is None else point.values.reshape(-1)[0]
            name = f"{item.integers.name}_zero_point"
            if point is not None and point.name == name:
                point.name = draft.fresh(f"{name}_channels")
            point = draft.constant(name if point is not None else draft.fresh(name), np.array(value, dtype))
        points.append(point)
    return points


def _integer_bias(node: Any, value: Quantized, weight: Quantized) -> tuple[np.ndarray, Any] | None:
    """The bias of a convolution as int32 and the value that it comes from, None where it has none or it does not fit."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    known = quantized(bias) if bias is not None else None
    if known is not None and is_constant(known.integers) and known.integers.values.dtype == np.int32:
        return known.integers.values, known.integers
    found = integer_bias(bias.values, [value.scale, weight.scale]) if bias is not None and is_constant(bias) else None
    return None if found is None else (found[0], bias)


def _write_qlinear(
    draft: Draft, node: Any, value: Quantized, weight: Quantized, bias: tuple[np.ndarray, Any] | None, after: Any
) -> None:
    inputs = [*value.parts(draft), *weight.parts(draft), *target_of(draft, after)]
    if bias is not None:
        inputs.append(_as_integers(draft, bias[1], bias[0]))
    result, name = after.outputs[0], node.outputs[0].name
    after.outputs.clear()
    node.outputs.clear()
    draft.add("QLinearConv", f"{name}_integers", inputs, dict(node.attrs), output=result)


def _write_sums(
    draft: Draft, node: Any, value: Quantized, weight: Quantized, bias: tuple[np.ndarray, Any] | None
) -> None:
    output, stem = node.outputs[0], node.outputs[0].name
    node.outputs.clear()
    pixels = [1] * (weight.integers.values.ndim - 2)
    inputs = [value.integers, weight.integers, *_zero_points(draft, value, weight)]
    sums = draft.add("ConvInteger", f"{stem}_sums", inputs, dict(node.attrs))
    late = node.inputs[2] if len(node.inputs) > 2 and bias is None else None
    if bias is not None:
        shift = draft.constant(draft.fresh(f"{bias[1].name}_channels"), bias[0].reshape(-1, *pixels))
        sums = draft.add("Add", f"{stem}_shifted", [sums, shift])
    scales = weight.scale
    if scales.values.ndim:
        scales = draft.constant(draft.fresh(f"{weight.scale.name}_channels"), scales.values.reshape(-1, *pixels))
    if late is None:
        _scale(draft, stem, sums, [value.scale, scales], output)
        return
    shape = draft.constant(draft.fresh(f"{stem}_bias_shape"), np.array([-1, *pixels], np.int64))
    real = _scale(draft, stem, sums, [value.scale, scales], None)
    draft.add("Add", f"{stem}_biased", [real, draft.add("Reshape", f"{stem}_bias", [late, shape])], output=output)


def _scale(draft: Draft, stem: str, sums: Any, scales: list[Any], output: Any | None) -> Any:
    """``Mul(Cast(sums), Mul(scales))``."""
    scale = draft.add("Mul", f"{stem}_scale", scales)
    real = draft.add("Cast", f"{stem}_cast", [sums], {"to": FLOAT})
    return draft.add("Mul", f"{stem}_scaled", [real, scale], output=output)


def _as_integers(draft: Draft, bias: Any, values: np.ndarray) -> Any:
    """A bias as int32, under its name where nothing else reads it."""
    if bias.values.dtype == np.int32:
        return bias
    name = bias.name
    bias.name = draft.fresh(f"{name}_float")
    taken = len(bias.outputs) > 1
    return draft.constant(draft.fresh(f"{name}_integers") if taken else name, values)
