"""ONNX passes that store weights: as integers where they are quantized, and in the order in which operators use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphprune.errors import LoweringError
from graphprune.targets.onnx_model.draft import (
    OURS,
    Draft,
    is_constant,
    made_by,
    quantized,
    replace_value,
    weight_of,
)  # fmt: skip
from graphprune.targets.onnx_model.export import QUANTIZED


@dataclass(frozen=True)
class _Rounding:
    """A constant that the graph quantizes and dequantizes; ``last`` is the node whose output is its rounded value."""

    weight: Any
    scale: Any
    zero_point: Any
    limits: tuple[int, int]
    dtype: str
    axis: int
    group: int
    last: Any

    @property
    def key(self) -> tuple[object, ...]:
        parts = (self.scale.values.tobytes(), self.zero_point.values.astype(np.int32).tobytes())
        return (id(self.weight), self.dtype, self.limits, self.axis, self.group, *parts)


def fold_weight_casts(draft: Draft) -> int:
    """Store weights, and the zero-points of their channels, in the number format that operators use them in.

    Before: ``weight float32 -> Cast(float16)``, or ``zero_point int32 -> Cast(int8)``.  After: ``weight float16``, or
    ``zero_point int8``, under its own name.  One that others use as it is, is left.  Exact: the Cast rounds in the same way, to
    even.  The exporter folds the small ones itself.
    """
    import onnx.helper

    count = 0
    for node in draft.nodes("Cast"):
        weight = node.inputs[0]
        if not is_constant(weight) or draft.is_output(node.outputs[0]):
            continue
        users = list(weight.outputs)
        if any(user.op != "Cast" or user.attrs["to"] != node.attrs["to"] for user in users):
            continue
        dtype = onnx.helper.tensor_dtype_to_np_dtype(int(node.attrs["to"]))
        values, name = weight.values.astype(dtype), weight.name
        weight.name = draft.fresh(f"{name}_before")
        stored = draft.constant(name, values)
        for user in users:
            replace_value(draft, user.outputs[0], stored)
            user.outputs.clear()
        count += 1
    return count


def fold_weight_quantization(draft: Draft) -> int:
    """Store quantized weights as integers.

    Before: ``float -> QuantizeLinear -> DequantizeLinear``, or ``float -> graphprune.FakeQuantize`` for formats that
    QuantizeLinear does not have in this opset.  After: ``integers -> DequantizeLinear``, with the scale and the zero-point
    named after the weight, ``block_size`` where groups share a scale.  A weight that several operators quantize alike is
    stored once.  Exact: rounding is that of QuantizeLinear, to even.
    """
    found = [item for item in map(_rounding, draft.nodes("DequantizeLinear", "FakeQuantize")) if item is not None]
    keys: dict[int, set[tuple[object, ...]]] = {}
    for item in found:
        keys.setdefault(id(item.weight), set()).add(item.key)
    stored: dict[tuple[object, ...], list[Any]] = {}
    for item in found:
        if item.key not in stored:
            alone = len(keys[id(item.weight)]) == 1 and all(_rounds(user) for user in item.weight.outputs)
            stored[item.key] = _store(draft, item, alone)
        attributes = {"axis": (1 - item.axis if item.group else item.axis)} if item.scale.values.ndim else {}
        if item.group:
            attributes["block_size"] = item.group
        node = item.last
        node.op, node.domain, node.attrs = "DequantizeLinear", None, attributes
        node.inputs = list(stored[item.key])
    return len(found)


def _rounds(node: Any) -> bool:
    return node.op in ("QuantizeLinear", "FakeQuantize")


def _rounding(node: Any) -> _Rounding | None:
    if node.op == "FakeQuantize":
        if node.domain != OURS or not is_constant(*node.inputs):
            return None
        limits = (int(node.attrs["quant_min"]), int(node.attrs["quant_max"]))
        weight, scale, zero_point = node.inputs
        axis, group = int(node.attrs["axis"]), int(node.attrs["group"])
        return _Rounding(weight, scale, zero_point, limits, QUANTIZED[limits].lower(), axis, group, node)
    quantize = made_by(node.inputs[0], "QuantizeLinear")
    if quantize is None or not is_constant(*quantize.inputs):
        return None
    weight, scale, zero_point = quantize.inputs
    info = np.iinfo(zero_point.values.dtype)
    axis = int(quantize.attrs.get("axis", 1))
    dtype = zero_point.values.dtype.name
    return _Rounding(weight, scale, zero_point, (int(info.min), int(info.max)), dtype, axis, 0, node)


def _store(draft: Draft, item: _Rounding, alone: bool) -> list[Any]:
    """Initializers of the integers, their scale and zero-point; where ``alone``, they take the weight's own name."""
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, item.dtype) if item.dtype.endswith("int4") else item.dtype)
    scale, offset = item.scale.values.astype(np.float32), item.zero_point.values.astype(np.float32)
    values = _quantize(item.weight.values.astype(np.float32), scale, offset, item)
    name = item.weight.name if alone else draft.fresh(f"{item.weight.name}_quantized")
    if alone:
        item.weight.name = draft.fresh(f"{name}_float")
    for value in (item.scale, item.zero_point):
        if value.name.startswith(name):
            value.name = draft.fresh(f"{value.name}_before")
    return [
        draft.constant(name, values.astype(np.int8 if values.min(initial=0) < 0 else np.uint8).astype(dtype)),
        draft.constant(f"{name}_scale", scale),
        draft.constant(f"{name}_zero_point", item.zero_point.values.astype(np.int32).astype(dtype)),
    ]


def _quantize(values: np.ndarray, scale: np.ndarray, offset: np.ndarray, item: _Rounding) -> np.ndarray:
    if item.group:
        along = 1 - item.axis
        scale, offset = np.repeat(scale, item.group, along), np.repeat(offset, item.group, along)
    elif scale.ndim:
        shape = [-1 if dim == item.axis else 1 for dim in range(values.ndim)]
        scale, offset = scale.reshape(shape), offset.reshape(shape)
    return np.asarray(np.clip(np.rint(values / scale) + offset, *item.limits))


def clip_reduced_ranges(draft: Draft) -> int:
    """Write activations that use a part of the integers.

    Before: ``graphprune.FakeQuantize(x)`` to 0..127.  After: ``Clip(x) -> QuantizeLinear -> DequantizeLinear``, with the reals
    of 0 and 127 as bounds.  Rounding: a bound may differ from the integer's value in the last bit, which rounds away.

    Raises:
        LoweringError: An activation is quantized to four bits or in groups.
    """
    count = 0
    for node in draft.nodes("FakeQuantize"):
        value, scale, zero_point = node.inputs
        limits = (int(node.attrs["quant_min"]), int(node.attrs["quant_max"]))
        dtype = QUANTIZED[limits].lower()
        if dtype.endswith("int4") or node.attrs["group"] or not is_constant(scale, zero_point) or scale.values.ndim:
            raise LoweringError(
                f"{value.name} is an activation quantized to {limits[0]}..{limits[1]}"
                f"{' in groups' if node.attrs['group'] else ''}; onnxruntime has activations of 8 bits and one scale only. "
                f"Plan uint8:affine:tensor for it"
            )
        stem = node.outputs[0].name
        low, high = ((limit - zero_point.values.astype(np.float32)) * scale.values for limit in limits)
        bounds = [
            draft.constant(draft.fresh(f"{stem}_{kind}"), np.asarray(at, np.float32))
            for kind, at in (("low", low), ("high", high))
        ]
        offset = draft.constant(draft.fresh(f"{stem}_zero_point"), zero_point.values.astype(dtype))
        clipped = draft.add("Clip", f"{stem}_clipped", [value, *bounds])
        integers = draft.add("QuantizeLinear", f"{stem}_quantized", [clipped, scale, offset])
        node.op, node.domain, node.attrs = "DequantizeLinear", None, {}
        node.inputs = [integers, scale, offset]
        count += 1
    return count


def fold_weight_transposes(draft: Draft) -> int:
    """Store weights in the order in which operators use them.

    Before: ``weight (-> DequantizeLinear) -> Transpose -> MatMul``, or ``Gemm`` with ``transB``.  After:
    ``weight[in, out] (-> DequantizeLinear) -> MatMul``; the axis of scales follows, and scales of groups themselves.  A weight
    that others use untransposed (a tied embedding) is left, so that it is stored once.  Exact.
    """
    for node in draft.nodes("Gemm"):
        value = node.inputs[1]
        if node.attrs.get("transB", 0) and weight_of(value) is not None and weight_of(value).values.ndim == 2:
            node.inputs[1] = draft.add("Transpose", f"{node.name}_transposed", [value], {"perm": [1, 0]})
            node.attrs["transB"] = 0
    count = 0
    for node in draft.nodes("Transpose"):
        value, perm = node.inputs[0], node.attrs.get("perm")
        if not node.outputs or perm is None or not _is_own_matrix(value):
            continue
        twins = list(value.outputs)
        if any(item.op != "Transpose" or item.attrs.get("perm") != perm for item in twins):
            continue
        _transpose(value, list(perm))
        draft.transposed.add(weight_of(value).name)
        for twin in twins:
            replace_value(draft, twin.outputs[0], value)
            twin.outputs.clear()
        count += 1
    return count


def _transpose(value: Any, perm: list[int]) -> None:
    """Transpose the initializer behind a value, and what its DequantizeLinear says of it."""
    weight, found = weight_of(value), quantized(value)
    weight.values = np.ascontiguousarray(np.transpose(weight.values, perm))
    if value is not weight and value.shape is not None:
        value.shape = [value.shape[index] for index in perm]
    if found is None or not found.scale.values.ndim:
        return
    found.node.attrs["axis"] = perm.index(found.axis)
    if found.blocked:
        for item in (found.scale, found.zero_point):
            if item is not None:
                item.values = np.ascontiguousarray(np.transpose(item.values, perm))


def _is_own_matrix(value: Any) -> bool:
    """Whether a matrix lies behind a value that nothing else reads."""
    weight = weight_of(value)
    return weight is not None and weight.values.ndim == 2 and (weight is value or len(weight.outputs) == 1)
