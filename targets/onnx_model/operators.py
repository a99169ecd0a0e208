"""How single operators are written in ONNX, where ``torch.onnx`` has no form for them or one that runtimes do not fuse.

``fake_quantize`` becomes QuantizeLinear and DequantizeLinear; where the type or the range is not one of QuantizeLinear's, an
operator of our own that a pass of the draft replaces.  ``dynamic_fake_quantize`` becomes DynamicQuantizeLinear and
DequantizeLinear.  Attention multiplies by transposed keys and scales once, and a row of the mask that allows nothing gives zero,
as in PyTorch.  GELU keeps the order of factors that onnxruntime looks for.

Import it only where onnxscript is installed.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from onnx_ir import DataType, tensor

from graphprune.ir import ops
from graphprune.targets.onnx_model.draft import OURS
from graphprune.targets.onnx_model.export import QUANTIZED, WHOLE

op: Any = importlib.import_module("onnxscript").opset18
_values: Any = importlib.import_module("onnxscript").values


def _own_operator() -> Any:
    """``FakeQuantize(x, scale, zero_point)`` of our own domain, with its schema, as the exporter asks for it."""
    schema: Any = importlib.import_module("onnx.defs").OpSchema
    formal = schema.FormalParameter
    attributes = ("quant_min", "quant_max", "axis", "group")
    return _values.Op(
        _values.Opset(OURS, 1),
        "FakeQuantize",
        schema(
            "FakeQuantize",
            OURS,
            1,
            inputs=[
                formal("x", "tensor(float)"),
                formal("scale", "tensor(float)"),
                formal("zero_point", "tensor(int32)"),
            ],
            outputs=[formal("y", "tensor(float)")],
            attributes=[schema.Attribute(name, schema.AttrType.INT) for name in attributes],
        ),
    )


_ours = _own_operator()


def _fake_quantize(  # type: ignore[no-untyped-def]
    x, scale, zero_point, quant_min: int, quant_max: int, axis: int = -1, group: int = 0
):
    real = x if x.dtype == DataType.FLOAT else op.Cast(x, to=DataType.FLOAT)
    if (quant_min, quant_max) in WHOLE and not group:
        integer = op.Cast(zero_point, to=DataType[QUANTIZED[quant_min, quant_max]])
        where = {"axis": axis} if axis >= 0 else {}
        quantized = op.QuantizeLinear(real, scale, integer, **where)
        result = op.DequantizeLinear(quantized, scale, integer, **where)
    else:
        result = _ours(real, scale, zero_point, quant_min=quant_min, quant_max=quant_max, axis=axis, group=group)
    return result if x.dtype == DataType.FLOAT else op.Cast(result, to=x.dtype)


def _dynamic_fake_quantize(x, quant_min: int, quant_max: int):  # type: ignore[no-untyped-def]
    real = x if x.dtype == DataType.FLOAT else op.Cast(x, to=DataType.FLOAT)
    result = op.DequantizeLinear(*op.DynamicQuantizeLinear(real))
    return result if x.dtype == DataType.FLOAT else op.Cast(result, to=x.dtype)


def _attention(  # type: ignore[no-untyped-def]
    query, key, value, attn_mask=None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
):  # fmt: skip
    if enable_gqa and query.shape[1] != key.shape[1]:
        key, value = _repeat_heads(query, key), _repeat_heads(query, value)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    rank = len(key.shape)
    swapped = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = op.Mul(op.MatMul(query, swapped), op.Constant(value=tensor(factor, dtype=query.dtype)))
    if is_causal:
        size = op.Concat(op.Shape(query, start=-2, end=-1), op.Shape(key, start=-2, end=-1), axis=0)
        ones = op.Expand(op.Constant(value=tensor(1.0, dtype=DataType.FLOAT)), size)
        lower = op.Cast(op.Trilu(ones, upper=0), to=DataType.BOOL)
        return op.MatMul(op.Softmax(op.Add(scores, _penalty(lower, query)), axis=-1), value)
    if attn_mask is None:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    if attn_mask.dtype != DataType.BOOL:
        return op.MatMul(op.Softmax(op.Add(scores, attn_mask), axis=-1), value)
    result = op.MatMul(op.Softmax(op.Add(scores, _penalty(attn_mask, query)), axis=-1), value)
    sees = op.ReduceMax(op.Cast(attn_mask, to=DataType.INT32), op.Constant(value_ints=[-1]), keepdims=1)
    zero = op.Constant(value=tensor(0.0, dtype=query.dtype))
    return op.Where(op.Cast(sees, to=DataType.BOOL), result, zero)


def _penalty(mask: Any, query: Any) -> Any:
    zero = op.Constant(value=tensor(0.0, dtype=query.dtype))
    return op.Where(mask, zero, op.Constant(value=tensor(float(query.dtype.min), dtype=query.dtype)))


def _repeat_heads(query: Any, value: Any) -> Any:
    heads, groups = query.shape[1], value.shape[1]
    batch = op.Shape(value, start=0, end=1)
    inner = op.Shape(value, start=2, end=4)
    times = op.Constant(value_ints=[groups, heads // groups])
    wide = op.Expand(op.Unsqueeze(value, op.Constant(value_ints=[2])), op.Concat(batch, times, inner, axis=0))
    return op.Reshape(wide, op.Concat(batch, op.Constant(value_ints=[heads]), inner, axis=0))


def _gelu(self, approximate: str = "none"):  # type: ignore[no-untyped-def]
    def number(value: float) -> Any:
        return op.Constant(value=tensor(value, dtype=self.dtype))

    if approximate == "none":
        inner = op.Erf(op.Div(self, number(math.sqrt(2.0))))
    else:
        cubic = op.Mul(op.Pow(self, number(3.0)), number(0.044715))
        inner = op.Tanh(op.Mul(op.Add(self, cubic), number(math.sqrt(2.0 / math.pi))))
    return op.Mul(op.Mul(self, op.Add(inner, number(1.0))), number(0.5))


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.gelu.default: _gelu,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    ops.fake_quantize: _fake_quantize,
    ops.dynamic_fake_quantize: _dynamic_fake_quantize,
}
"""Translations by operator. Parameters without a type are tensors, the others attributes."""
