"""ONNX passes for embeddings: rows are looked up as integers, and only those that are needed become floats."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphprune.targets.onnx_model.draft import FLOAT, MICROSOFT, Draft, Quantized, is_constant, quantized


def look_up_integers(draft: Draft) -> int:
    """Gather the integers of a table, not the floats that onnxruntime would make of all of it at every run.

    Before: ``table int8 -> DequantizeLinear -> Gather(ids)``.  After: with one scale or a scale a column
    ``Gather(ids) -> DequantizeLinear``; with a scale a row, axis 0, ``Mul(Cast(Gather(table, ids)), Gather(scale, ids))``, less
    the gathered zero-point where it is not zero.  Exact: DequantizeLinear computes ``(q - zero_point) * scale`` too.
    """
    count = 0
    for node in draft.nodes("Gather"):
        found = quantized(node.inputs[0])
        if found is None or found.blocked or _is_packed(found) or not _is_table(found, node):
            continue
        stem = node.outputs[0].name
        if found.scale.values.size != 1 and found.axis == 0:
            _look_up_rows(draft, node, found)
        else:
            rows = draft.add("Gather", f"{stem}_integers", [found.integers, node.inputs[1]], dict(node.attrs))
            attributes = {"axis": -1} if found.scale.values.size != 1 else {}
            inputs = [rows, *found.node.inputs[1:]]
            output = node.outputs[0]
            node.outputs.clear()
            draft.add("DequantizeLinear", f"{stem}_dequantized", inputs, attributes, output=output)
        count += 1
    return count


def look_up_blocks(draft: Draft) -> int:
    """Gather from a table of four-bit numbers, or of numbers that share scales in groups.

    Before: ``table -> DequantizeLinear -> Gather(ids)``, the table int4 or uint4, or with ``block_size``.  After:
    ``com.microsoft.GatherBlockQuantized(table, ids, scale, zero_point)``; a scale a row is repeated for its blocks.
    Exact.  Tables whose groups are no powers of two of at least 16 are left.
    """
    count = 0
    for node in draft.nodes("Gather"):
        found = quantized(node.inputs[0])
        if found is None or not _is_table(found, node) or not (found.blocked or _is_packed(found)):
            continue
        table = found.integers.values
        parts = _blocks_of(found, table)
        if parts is None:
            continue
        block, scale, zero_point = parts
        alone = len(found.integers.outputs) == 1 and len(found.node.outputs[0].outputs) == 1
        inputs = [found.integers, node.inputs[1]]
        attributes: dict[str, Any] = {"block_size": block, "gather_axis": 0, "quantize_axis": 1}
        stem = found.integers.name
        if not _is_packed(found):  # the operator has eight bits as uint8 only
            shift = 0 if table.dtype == np.uint8 else 128
            if shift:
                zero_point = (zero_point.astype(np.int32) + shift).astype(np.uint8)
                inputs[0] = draft.constant(
                    draft.fresh(f"{stem}_unsigned"), (table.astype(np.int32) + shift).astype(np.uint8)
                )
            attributes["bits"] = 8
        if alone and inputs[0] is found.integers:
            for item in (found.scale, found.zero_point):
                if item is not None:
                    item.name = draft.fresh(f"{item.name}_before")
        names = [draft.fresh(f"{stem}_{kind}") if not alone else f"{stem}_{kind}" for kind in ("scale", "zero_point")]
        inputs.append(draft.constant(names[0], scale))
        inputs.append(draft.constant(names[1], zero_point))
        output = node.outputs[0]
        node.outputs.clear()
        draft.add("GatherBlockQuantized", f"{output.name}_rows", inputs, attributes, domain=MICROSOFT, output=output)
        count += 1
    return count


def _look_up_rows(draft: Draft, node: Any, found: Quantized) -> None:
    output, ids, axis = node.outputs[0], node.inputs[1], {"axis": 0}
    node.outputs.clear()
    stem, table = output.name, found.integers.name
    rows = draft.add("Gather", f"{stem}_integers", [found.integers, ids], axis)
    real = draft.add("Cast", f"{stem}_cast", [rows], {"to": FLOAT})
    columns = draft.constant(draft.fresh(f"{table}_scale_rows"), found.scale.values.reshape(-1, 1))
    scale = draft.add("Gather", f"{stem}_scale", [columns, ids], axis)
    if not found.symmetric:
        assert found.zero_point is not None
        offsets = draft.constant(draft.fresh(f"{table}_zero_point_rows"), found.zero_point.values.reshape(-1, 1))
        offset = draft.add("Gather", f"{stem}_zero_point", [offsets, ids], axis)
        offset = draft.add("Cast", f"{stem}_zero_point_cast", [offset], {"to": FLOAT})
        real = draft.add("Sub", f"{stem}_centered", [real, offset])
    draft.add("Mul", f"{stem}_scaled", [real, scale], output=output)


def _is_table(found: Quantized, node: Any) -> bool:
    constants = is_constant(found.integers, found.scale) and (found.zero_point is None or is_constant(found.zero_point))
    return constants and found.integers.values.ndim == 2 and int(node.attrs.get("axis", 0)) == 0


def _is_packed(found: Quantized) -> bool:
    return is_constant(found.integers) and found.integers.values.dtype.name in ("int4", "uint4")


def _blocks_of(found: Quantized, table: np.ndarray) -> tuple[int, np.ndarray, np.ndarray] | None:
    """Block size, scales and zero-points along the columns, ``[rows, blocks]``."""
    zero_point = (
        np.zeros_like(found.scale.values, dtype=table.dtype) if found.zero_point is None else found.zero_point.values
    )
    if found.blocked:
        block = int(found.node.attrs["block_size"])
        if found.axis != 1 or block < 16 or block & (block - 1):
            return None
        return block, found.scale.values, zero_point
    block = next((size for size in (128, 64, 32, 16) if table.shape[1] % size == 0), 0)
    if not block or (found.scale.values.size != 1 and found.axis != 0):
        return None
    shape = (table.shape[0], table.shape[1] // block)
    scale = np.broadcast_to(found.scale.values.reshape(-1, 1), shape)
    return block, np.ascontiguousarray(scale), np.ascontiguousarray(np.broadcast_to(zero_point.reshape(-1, 1), shape))
