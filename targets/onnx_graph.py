"""graphprune's own passes over an ONNX graph: int8 weights, and DequantizeLinear where runtimes fuse it.

Each pass is a function from a draft to the number of places that it changed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Pass = Callable[["Draft"], int]


@dataclass
class Draft:
    """An ONNX graph while passes rewrite it.

    Attributes:
        graph: An ``onnx_graphsurgeon.Graph``. Mutated by passes.
        transposed: Names of weights that lie transposed in it, compared with the source model.
    """

    graph: Any
    transposed: set[str] = field(default_factory=set)

    def nodes(self, *kinds: str) -> list[Any]:
        """The nodes of some operator types, in graph order; safe while nodes are added."""
        return [node for node in self.graph.nodes if node.op in kinds]

    def constant(self, name: str, values: np.ndarray) -> Any:
        """A new initializer."""
        return surgeon().Constant(name, np.ascontiguousarray(values))

    def add(self, kind: str, name: str, inputs: list[Any], attributes: dict[str, Any] | None = None) -> Any:
        """Append a node with one output of its own name and return that output."""
        result = surgeon().Variable(name)
        self.graph.nodes.append(
            surgeon().Node(op=kind, name=name, attrs=attributes or {}, inputs=inputs, outputs=[result])
        )
        return result


def surgeon() -> Any:
    """The module ``onnx_graphsurgeon``, imported when it is first needed."""
    return importlib.import_module("onnx_graphsurgeon")


def run_passes(draft: Draft) -> dict[str, int]:
    """Run all passes in order, and sort the graph.

    Returns:
        Number of matches by pass name.
    """
    counts = {}
    for function in PASSES:
        counts[function.__name__.replace("_", "-")] = function(draft)
        draft.graph.cleanup(remove_unused_graph_inputs=False)
    draft.graph.toposort()
    return counts


def fold_weight_quantization(draft: Draft) -> int:
    """Store quantized weights as integers.

    Before: ``float -> QuantizeLinear -> DequantizeLinear``.  After: ``int8 -> DequantizeLinear``, with the scale and
    the zero-point named after the weight.  Exact: rounding is that of QuantizeLinear, to even.
    """
    count = 0
    for node in draft.nodes("DequantizeLinear"):
        quantize = _producer(node.inputs[0])
        if quantize is None or quantize.op != "QuantizeLinear" or not _is_constant(*quantize.inputs):
            continue
        weight, scale, zero_point = quantize.inputs
        axis = int(quantize.attrs.get("axis", 1))
        values = _quantize(weight.values, scale.values, zero_point.values, axis)
        alone = len(weight.outputs) == 1
        name = weight.name if alone else f"{weight.name}_quantized"
        if alone:
            weight.name = f"{name}_float"
        node.inputs = [
            draft.constant(name, values),
            draft.constant(f"{name}_scale", scale.values),
            draft.constant(f"{name}_zero_point", zero_point.values),
        ]
        scale.name, zero_point.name = _spare(scale.name, name), _spare(zero_point.name, name)
        count += 1
    return count


def fold_weight_transposes(draft: Draft) -> int:
    """Store weights in the order in which operators use them.

    Before: ``weight (-> DequantizeLinear) -> Transpose -> MatMul``, or ``Gemm`` with ``transB``.  After:
    ``weight[in, out] (-> DequantizeLinear) -> MatMul``; the axis of scales follows.  A weight that others use
    untransposed (a tied embedding) is left, so that it is stored once.
    """
    for node in draft.nodes("Gemm"):
        value = node.inputs[1]
        if node.attrs.get("transB", 0) and _is_own_weight(value) and len(value.outputs) == 1:
            node.inputs[1] = draft.add("Transpose", f"{node.name}_transposed", [value], {"perm": [1, 0]})
            node.attrs["transB"] = 0
    count = 0
    for node in draft.nodes("Transpose"):
        value, perm = node.inputs[0], node.attrs.get("perm")
        if not node.outputs or perm is None or not _is_own_weight(value):
            continue
        twins = list(value.outputs)
        if any(item.op != "Transpose" or item.attrs.get("perm") != perm for item in twins):
            continue
        weight, dequantize = _weight_of(value), _producer(value)
        if dequantize is not None and dequantize.inputs[1].values.ndim:
            dequantize.attrs["axis"] = list(perm).index(int(dequantize.attrs.get("axis", 1)))
        weight.values = np.ascontiguousarray(np.transpose(weight.values, perm))
        draft.transposed.add(weight.name)
        for twin in twins:
            _replace(draft, twin.outputs[0], value)
            twin.outputs.clear()
        count += 1
    return count


def quantize_biases(draft: Draft) -> int:
    """Store biases as int32 where a runtime adds them to an integer sum.

    Before: ``Gemm(DQ(x), DQ(w), bias)``, or ``Conv(...)`` whose result is quantized.  After: ``Gemm(DQ(x), DQ(w),
    DQ(bias))`` with scale ``x_scale * w_scale``, which onnxruntime runs as QGemm and QLinearConv.  A bias moves by at
    most half a step of that fine scale.  Where the integers would not fit, Gemm is written as MatMul and Add.
    """
    count = 0
    for node in draft.nodes("Gemm", "Conv"):
        if len(node.inputs) < 2 or not all(_is_dequantized(item) for item in node.inputs[:2]):
            continue
        if node.op == "Gemm" and not _is_plain(node):
            continue
        if node.op == "Conv" and not _is_quantized_next(node.outputs[0]):
            continue
        if len(node.inputs) < 3 or not _is_constant(node.inputs[2]):
            continue
        bias = node.inputs[2]
        scales = [_producer(item).inputs[1] for item in node.inputs[:2]]
        integers = _integer_bias(bias.values, scales)
        if integers is not None and len(bias.outputs) == 1:
            values, scale = integers
            name, bias.name = bias.name, f"{bias.name}_float"
            parts = [draft.constant(name, values), draft.constant(f"{name}_scale", scale)]
            node.inputs[2] = draft.add("DequantizeLinear", f"{name}_dequantized", parts, {"axis": 0})
            count += 1
        elif node.op == "Gemm":
            _split_gemm(draft, node)
            count += 1
    return count


def write_residuals_as_sums(draft: Draft) -> int:
    """Keep onnxruntime from fusing a residual into its SkipLayerNormalization.

    Before: ``LayerNormalization(Add(x, residual))``.  After: ``LayerNormalization(Sum(x, residual))``, the same
    numbers.  The fused kernel of onnxruntime's CPU provider (1.31) was measured to take several times as
    long as its parts.
    """
    count = 0
    for node in draft.nodes("Add"):
        users = {user.op for user in node.outputs[0].outputs}
        if "LayerNormalization" in users and not any(_is_constant(item) for item in node.inputs):
            node.op = "Sum"
            count += 1
    return count


def divide_by_roots(draft: Draft) -> int:
    """Write the root mean square normalization of Llama and T5 as onnxruntime's fusion knows it.

    Before: ``Mul(x, Reciprocal(Sqrt(v)))``.  After: ``Div(x, Sqrt(v))``; equal up to one rounding.
    """
    count = 0
    for node in draft.nodes("Mul"):
        for index, value in enumerate(node.inputs):
            inverse = _producer(value)
            root = _producer(inverse.inputs[0]) if inverse is not None and inverse.op == "Reciprocal" else None
            if root is not None and root.op == "Sqrt":
                node.op = "Div"
                node.inputs = [node.inputs[1 - index], inverse.inputs[0]]
                count += 1
                break
    return count


def dedicate_dequantize(draft: Draft) -> int:
    """Give each user a DequantizeLinear of its own, as onnxruntime's fusions ask for; the QuantizeLinear stays shared.

    Before: ``Q -> DQ -> {MatMul, MatMul, MatMul}``.  After: ``Q -> {DQ -> MatMul, DQ -> MatMul, DQ -> MatMul}``.
    """
    count = 0
    for node in draft.nodes("DequantizeLinear"):
        value = node.outputs[0]
        users = list(value.outputs)
        for user in users[1:]:
            copied = draft.add("DequantizeLinear", f"{value.name}_for_{user.name}", list(node.inputs), dict(node.attrs))
            user.inputs = [copied if item is value else item for item in user.inputs]
            count += 1
    return count


def compose_transposes(draft: Draft) -> int:
    """Make one Transpose of two in a row.

    Before: ``Transpose(Transpose(x))``.  After: one Transpose, or none where they cancel.
    """
    count = 0
    for node in draft.nodes("Transpose"):
        before = _producer(node.inputs[0])
        if before is None or before.op != "Transpose" or "perm" not in before.attrs or "perm" not in node.attrs:
            continue
        perm = [before.attrs["perm"][index] for index in node.attrs["perm"]]
        if perm == sorted(perm) and node.outputs[0] in draft.graph.outputs:
            continue
        if perm == sorted(perm):
            _replace(draft, node.outputs[0], before.inputs[0])
            node.outputs.clear()
        else:
            node.inputs[0] = before.inputs[0]
            node.attrs["perm"] = perm
        count += 1
    return count


def remove_identities(draft: Draft) -> int:
    """Drop nodes that hand a value on.

    Before: ``Identity(x)``, or ``Cast(Cast(x, to=T), to=T)``.  After: ``x``.  A graph output keeps its name.
    """
    count = 0
    for node in draft.nodes("Identity", "Cast"):
        source, result = node.inputs[0], node.outputs[0]
        if node.op == "Cast":
            before = _producer(source)
            same = before is not None and before.op == "Cast" and before.attrs["to"] == node.attrs["to"]
            if not same:
                continue
        if result in draft.graph.outputs:
            continue
        _replace(draft, result, source)
        node.outputs.clear()
        count += 1
    return count


def _replace(draft: Draft, old: Any, new: Any) -> None:
    for user in list(old.outputs):
        user.inputs = [new if item is old else item for item in user.inputs]
    draft.graph.outputs = [new if item is old else item for item in draft.graph.outputs]


def _producer(value: Any) -> Any:
    """The node that makes a value, None for initializers and inputs."""
    return value.inputs[0] if value.inputs else None


def _is_constant(*values: Any) -> bool:
    return all(isinstance(value, surgeon().Constant) for value in values)


def _weight_of(value: Any) -> Any:
    """The initializer behind a value: itself, or what its DequantizeLinear reads."""
    if _is_constant(value):
        return value
    node = _producer(value)
    if node is not None and node.op == "DequantizeLinear" and _is_constant(node.inputs[0]):
        return node.inputs[0]
    return None


def _is_own_weight(value: Any) -> bool:
    """Whether a matrix lies behind a value that nothing else reads."""
    weight = _weight_of(value)
    return weight is not None and weight.values.ndim == 2 and (weight is value or len(weight.outputs) == 1)


def _is_dequantized(value: Any) -> bool:
    node = _producer(value)
    return node is not None and node.op == "DequantizeLinear"


def _is_plain(node: Any) -> bool:
    scaled = node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0
    return not scaled and not node.attrs.get("transA", 0) and not node.attrs.get("transB", 0)


def _is_quantized_next(value: Any) -> bool:
    """Whether a value is only quantized, or first goes through a Relu that its quantization contains."""
    if len(value.outputs) != 1:
        return False
    user = value.outputs[0]
    if user.op == "Relu" and len(user.outputs[0].outputs) == 1:
        user = user.outputs[0].outputs[0]
    return bool(user.op == "QuantizeLinear")


def _integer_bias(bias: np.ndarray, scales: list[Any]) -> tuple[np.ndarray, np.ndarray] | None:
    if not _is_constant(*scales) or bias.ndim != 1:
        return None
    scale = np.broadcast_to(scales[0].values * scales[1].values, bias.shape).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        values = np.rint(bias.astype(np.float64) / scale)
    if not np.all(np.abs(values) < 2**30):  # half of int32 is left to the sum itself
        return None
    return values.astype(np.int32), scale


def _split_gemm(draft: Draft, node: Any) -> None:
    bias, output = node.inputs.pop(2), node.outputs[0]
    node.op = "MatMul"
    node.attrs.clear()
    node.outputs = [surgeon().Variable(f"{output.name}_product", dtype=output.dtype, shape=output.shape)]
    inputs = [node.outputs[0], bias]
    draft.graph.nodes.append(surgeon().Node(op="Add", name=f"{output.name}_bias", inputs=inputs, outputs=[output]))


def _spare(name: str, weight: str) -> str:
    return f"{name}_before" if name.startswith(weight) else name


def _quantize(values: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int) -> np.ndarray:
    limits = np.iinfo(zero_point.dtype)
    if scale.ndim:
        shape = [-1 if dim == axis else 1 for dim in range(values.ndim)]
        scale, offset = scale.reshape(shape), zero_point.reshape(shape)
    else:
        offset = zero_point
    rounded = np.rint(values / scale) + offset.astype(np.float32)
    return np.asarray(np.clip(rounded, limits.min, limits.max).astype(zero_point.dtype))


PASSES: tuple[Pass, ...] = (
    remove_identities,
    fold_weight_quantization,
    fold_weight_transposes,
    compose_transposes,
    quantize_biases,
    dedicate_dequantize,
    write_residuals_as_sums,
    divide_by_roots,
)
"""All passes, in the order in which they run."""
