"""ONNX pass for runtimes without bfloat16 arithmetic: weights keep their 16 bits, everything is computed in float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphprune.targets.onnx_model.draft import FLOAT, Draft, is_constant, replace_value

_BFLOAT16 = 16


def widen_bfloat16(draft: Draft) -> int:
    """Compute in float32 what is bfloat16.

    Before: ``MatMul(Cast(x, to=BFLOAT16), weight bf16) -> Cast(to=FLOAT)``.  After: ``MatMul(x, Cast(weight bf16, to=FLOAT))``; numbers
    that are no weights become float32, and so do inputs and outputs; a table is looked up in 16 bits.  Weights have the values that
    they have in bfloat16; what is computed is no longer rounded to it, so outputs come closer to those of float32: by 2^-9 of
    their size for each operator on the way.
    """
    values = [value for value in draft.graph.tensors().values() if _is_bfloat16(value.dtype)]
    constants = [value for value in values if is_constant(value)]
    for value in values:
        if not is_constant(value):
            value.dtype = np.dtype(np.float32)
    for value in constants:
        if value.values.ndim < 2:
            value.values = value.values.astype(np.float32)
            continue
        users = [user for user in list(value.outputs) if not _look_up(draft, user, value)]
        if not users:
            continue
        wide = draft.add("Cast", f"{value.name}_float", [value], {"to": FLOAT})
        wide.dtype, wide.shape = np.dtype(np.float32), value.values.shape
        for user in users:
            user.inputs = [wide if item is value else item for item in user.inputs]
    for node in draft.nodes("Cast"):
        if node.attrs["to"] == _BFLOAT16:
            node.attrs["to"] = FLOAT
        source, result = node.inputs[0], node.outputs[0]
        if node.attrs["to"] == FLOAT and _is_float(source.dtype) and not draft.is_output(result):
            replace_value(draft, result, source)
            node.outputs.clear()
    return len(values)


def _look_up(draft: Draft, node: Any, table: Any) -> bool:
    """Widen only the rows that a Gather takes from a table; whether it is one."""
    if node.op != "Gather" or node.inputs[0] is not table:
        return False
    output = node.outputs[0]
    rows = draft.add("Gather", f"{output.name}_rows", list(node.inputs), dict(node.attrs))
    node.outputs.clear()
    draft.add("Cast", f"{output.name}_float", [rows], {"to": FLOAT}, output=output)
    return True


def _is_bfloat16(kind: Any) -> bool:
    return kind == _BFLOAT16 if isinstance(kind, int) else kind is not None and np.dtype(kind).name == "bfloat16"


def _is_float(kind: Any) -> bool:
    return kind == FLOAT if isinstance(kind, int) else kind is not None and np.dtype(kind) == np.float32
