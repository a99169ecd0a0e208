"""ONNX passes for weights of four bits, and of eight bits whose groups share scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from graphprune.errors import LoweringError
from graphprune.targets.onnx_model.draft import MICROSOFT, Draft, Quantized, absent, bias_behind, is_constant, quantized

FIRST_OPSET = 21
"""The ONNX operator set that has int4, uint4 and ``block_size``."""


def pack_products(draft: Draft) -> int:
    """Write products with small weights as onnxruntime's MatMulNBits.

    Before: ``MatMul(x, Dequantize(w)) (-> Add(bias))``, w int4, uint4, or int8 with ``block_size``.  After:
    ``com.microsoft.MatMulNBits(x, packed w, scale, zero_point, bias)``; two weights of four bits a byte; a scale an
    output is repeated for its blocks.  ``accuracy_level`` is 4: onnxruntime quantizes x to int8 in blocks, as it does by default
    when it makes this operator of DequantizeLinear and MatMul itself.  Rounding: exact to 3e-7 of the largest result in
    float, and measured within 1.2e-2 of it at level 4.  Groups that are no powers of two of at least 16 are left.
    """
    return _pack(draft, lambda node, found: is_small(found))


def pack_weight_only(draft: Draft) -> int:
    """Write products of floats with weights of eight bits as MatMulNBits.

    Before: ``MatMul(x, Dequantize(w)) (-> Add(bias))``, x a float, w int8 with a scale an output.  After: as for
    ``pack-products``.  Rounding: as there; onnxruntime does the same itself when it loads DequantizeLinear and MatMul.
    """
    return _pack(draft, lambda node, found: quantized(node.inputs[0]) is None)


def _pack(draft: Draft, wanted: Callable[[Any, Quantized], bool]) -> int:
    count = 0
    for node in draft.nodes("MatMul"):
        found = quantized(node.inputs[1])
        if found is None or not wanted(node, found) or not is_constant(found.integers, found.scale):
            continue
        alone = len(found.integers.outputs) == 1 and len(found.node.outputs[0].outputs) == 1
        if found.integers.values.ndim == 2 and _block(found) and alone:
            _pack_product(draft, node, found)
            count += 1
    return count


def _pack_product(draft: Draft, node: Any, found: Quantized) -> None:
    weight, block = found.integers, _block(found)
    bits = 4 if weight.values.dtype.name.endswith("int4") else 8
    shift = 0 if weight.values.dtype.name.startswith("u") else 1 << (bits - 1)
    rows, columns = weight.values.shape
    values, scale, offset = _in_blocks(found, block, shift)
    name = weight.name
    for item in (weight, found.scale, found.zero_point):
        if item is not None:
            item.name = draft.fresh(f"{item.name}_before")
    inputs = [node.inputs[0], draft.constant(name, pack(values, bits).reshape(columns, values.shape[1], -1))]
    inputs.append(draft.constant(f"{name}_scale", scale))
    if np.any(offset != 1 << (bits - 1)):
        inputs.append(draft.constant(f"{name}_zero_point", pack(offset, bits)))
    output = node.outputs[0]
    node.outputs.clear()
    addition = bias_behind(draft, output)
    if addition is not None:
        inputs += [absent() for _ in range(5 - len(inputs))]
        inputs.append(next(item for item in addition.inputs if item is not output))
        output = addition.outputs[0]
        addition.outputs.clear()
    attributes = {"K": rows, "N": columns, "bits": bits, "block_size": block, "accuracy_level": 4}
    draft.add("MatMulNBits", f"{output.name}_packed", inputs, attributes, domain=MICROSOFT, output=output)
    draft.packed[name] = {"bits": bits, "in": rows, "block": block, "signed": int(shift > 0)}
    draft.transposed.discard(name)


def check_formats(draft: Draft) -> int:
    """Refuse formats that the operator set does not have; change nothing.

    Before and after: the same.

    Returns:
        How many weights of four bits or with ``block_size`` are left to DequantizeLinear.

    Raises:
        LoweringError: There are some, and the operator set is older than 21.
    """
    count = 0
    for node in draft.nodes("DequantizeLinear"):
        found = quantized(node.outputs[0])
        if found is None or not is_small(found):
            continue
        if draft.opset < FIRST_OPSET:
            kind = found.integers.values.dtype.name if is_constant(found.integers) else "a value"
            users = sorted({user.op for user in node.outputs[0].outputs})
            raise LoweringError(
                f"{found.integers.name} is stored as {kind}{' in groups' if found.blocked else ''} and used by "
                f"{', '.join(users)}, for which ONNX opset {draft.opset} has no form; set opset={FIRST_OPSET}, or plan "
                f"int8:symmetric:channel for it. Products take groups of 16, 32, 64, 128 or 256 in every opset"
            )
        count += 1
    return count


def is_small(found: Quantized) -> bool:
    """Whether a weight has four bits or scales in groups."""
    return found.blocked or (is_constant(found.integers) and found.integers.values.dtype.name in ("int4", "uint4"))


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Lay unsigned numbers along the last dimension in bytes, the first of two in the lower half.

    Args:
        values: Integers in [0, 2**bits).
        bits: 4 or 8.

    Returns:
        uint8; for 4 bits half as long, rounded up.
    """
    values = values.astype(np.uint8)
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return np.asarray(values[..., 0::2] | (values[..., 1::2] << 4), dtype=np.uint8)


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The ``count`` numbers that ``pack`` laid along the last dimension."""
    if bits == 8:
        return packed[..., :count]
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)[..., :count]


def _block(found: Quantized) -> int:
    """Weights that share a scale along the inputs; 0 where MatMulNBits has no such block."""
    if found.blocked:
        block = int(found.node.attrs["block_size"])
        return block if found.axis == 0 and 16 <= block <= 256 and not block & (block - 1) else 0
    rows = int(found.integers.values.shape[0])
    per_output = found.scale.values.size == 1 or found.axis == 1
    return next((size for size in (128, 64, 32) if rows % size == 0), 16) if per_output else 0


def _in_blocks(found: Quantized, block: int, shift: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unsigned weights ``[out, blocks, block]``, scales and zero-points ``[out, blocks]``; weights of a last part are padded."""
    rows, columns = found.integers.values.shape
    blocks = -(-rows // block)
    shape = (blocks, columns)
    zero_point = (
        found.zero_point.values.astype(np.int32)
        if found.zero_point is not None
        else np.zeros_like(found.scale.values, np.int32)
    )
    spread = (lambda item: item) if found.blocked else (lambda item: np.broadcast_to(item.reshape(1, -1), shape))
    scale, offset = spread(found.scale.values), spread(zero_point)
    values = np.zeros((blocks * block, columns), np.int32)
    values[:rows] = found.integers.values.astype(np.int32)
    unsigned = (values + shift).T.reshape(columns, blocks, block)
    return unsigned, np.ascontiguousarray(scale.T.astype(np.float32)), np.ascontiguousarray(offset.T + shift)
