"""ONNX passes that write matrix products of quantized values with integer operators."""

from __future__ import annotations

from typing import Any

from graphprune.targets.onnx_model.draft import (
    FLOAT,
    MICROSOFT,
    Draft,
    Quantized,
    absent,
    bias_behind,
    is_constant,
    made_by,
    only_user,
    quantized,
    quantizer_behind,
    rank_of,
    target_of,
)  # fmt: skip


def multiply_dynamic(draft: Draft) -> int:
    """Write products of values that are quantized at run time with integer operators.

    Before: ``MatMul(DQ(DynamicQuantizeLinear(x)), DQ(w))``.  After: ``MatMulInteger(x_q, w_q, x_zero_point, w_zero_point) ->
    Cast -> Mul(Mul(x_scale, w_scale))``, which onnxruntime fuses with the bias behind it to DynamicQuantizeMatMul, or to
    MatMulIntegerToFloat where several products share x.  Rounding: the sum is exact and scaled once, where MatMul rounds
    each step.
    """
    pairs = [(node, *_operands(node)) for node in draft.nodes("MatMul")]
    count = 0
    for node, left, right in pairs:
        if left is None or right is None or not _multiplies(left, right):
            continue
        if not is_constant(left.scale, right.scale):
            _write_product(draft, node, left, right)
            count += 1
    return count


def multiply_quantized(draft: Draft) -> int:
    """Write products whose result is quantized as QLinearMatMul.

    Before: ``Quantize(MatMul(DQ(x), DQ(w)))``, w a weight or another activation.  After: ``QLinearMatMul``.  Rounding: a
    result on the edge between two integers may fall to the other.
    """
    count = 0
    for node in draft.nodes("MatMul"):
        left, right = _operands(node)
        if left is None or right is None or not _multiplies(left, right) or not is_constant(left.scale, right.scale):
            continue
        after = quantizer_behind(draft, node.outputs[0])
        if after is None:
            continue
        result = after.outputs[0]
        after.outputs.clear()
        inputs = [*left.parts(draft), *right.parts(draft), *target_of(draft, after)]
        name = node.outputs[0].name
        node.outputs.clear()
        draft.add("QLinearMatMul", f"{name}_integers", inputs, output=result)
        count += 1
    return count


def multiply_integers(draft: Draft) -> int:
    """Write products of quantized values, whose result stays in float, with integer operators.

    Before: ``MatMul(DQ(x), DQ(w))``, w a weight or another activation.  After: ``MatMulInteger(x_q, w_q, x_zero_point,
    w_zero_point) -> Cast -> Mul(Mul(x_scale, w_scale))``.  Rounding: as for ``multiply-dynamic``.
    """
    count = 0
    for node in draft.nodes("MatMul"):
        left, right = _operands(node)
        if left is not None and right is not None and _multiplies(left, right):
            _write_product(draft, node, left, right)
            count += 1
    return count


def fuse_products(draft: Draft) -> int:
    """Write what onnxruntime cannot fuse itself, because it folds the product of two constant scales first.

    Before: ``MatMulInteger -> Cast -> Mul(Mul(x_scale, w_scale)) (-> Add(bias))``, both scales constants.  After:
    ``com.microsoft.MatMulIntegerToFloat``.  Rounding: the product of the scales, and the bias, in another order.
    """
    count = 0
    for node in draft.nodes("Mul"):
        cast = made_by(node.inputs[0], "Cast")
        product = made_by(cast.inputs[0], "MatMulInteger") if cast is not None else None
        scales = made_by(node.inputs[1], "Mul")
        if cast is None or product is None or scales is None or not is_constant(*scales.inputs):
            continue
        if only_user(draft, product.outputs[0]) is not cast or only_user(draft, cast.outputs[0]) is not node:
            continue
        left, right = scales.inputs
        zero_points = list(product.inputs[2:]) + [absent() for _ in range(4 - len(product.inputs))]
        inputs = [*product.inputs[:2], left, right, *zero_points]
        output = node.outputs[0]
        node.outputs.clear()
        addition = bias_behind(draft, output)
        if addition is not None:
            inputs.append(next(item for item in addition.inputs if item is not output))
            output = addition.outputs[0]
            addition.outputs.clear()
        draft.add("MatMulIntegerToFloat", f"{output.name}_fused", inputs, domain=MICROSOFT, output=output)
        count += 1
    return count


def _operands(node: Any) -> tuple[Quantized | None, Quantized | None]:
    left, right = node.inputs
    return quantized(left), quantized(right)


def _multiplies(left: Quantized, right: Quantized) -> bool:
    """Whether MatMulInteger takes these: eight bits, one scale on the left, one or one a column on the right."""
    for item in (left, right):
        if item.blocked or (is_constant(item.integers) and item.integers.values.dtype.name not in ("int8", "uint8")):
            return False
    if not left.per_tensor:
        return False
    return right.per_tensor or (is_constant(right.scale) and right.axis == (rank_of(right.integers) or 0) - 1)


def _write_product(draft: Draft, node: Any, left: Quantized, right: Quantized) -> None:
    output = node.outputs[0]
    node.outputs.clear()
    stem = output.name
    scale = draft.add("Mul", f"{stem}_scale", [left.scale, right.scale])
    inputs = [left.integers, right.integers]
    if not (left.symmetric and right.symmetric):
        inputs.append(absent() if left.symmetric else left.zero_point)
    if not right.symmetric:
        inputs.append(right.zero_point)
    sums = draft.add("MatMulInteger", f"{stem}_sums", inputs)
    real = draft.add("Cast", f"{stem}_cast", [sums], {"to": FLOAT})
    draft.add("Mul", f"{stem}_scaled", [real, scale], output=output)
