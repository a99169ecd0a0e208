"""Number formats that a Program asks of a runtime, by the names that capability tables use."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphprune.ir import ops
from graphprune.ir.program import Program
from graphprune.ir.quantizing import quantizers
from graphprune.quant.schemes import parse_scheme

_FLOATS = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def formats_of(program: Program) -> Mapping[str, tuple[str, ...]]:
    """Names of what is computed or stored in each format: weights and values by their quantizers, operators by their dtype.

    Returns:
        By ``int8``, ``uint8``, ``int4``, ``uint4``, each with `` per group`` where scales are, ``dynamic uint8``, ``fp16``, ``bf16``;
        formats that do not occur are absent, and so is float32.
    """
    found: dict[str, list[str]] = {}
    for _, decision in quantizers(program):
        scheme = parse_scheme(decision.scheme)
        row = f"{scheme.dtype.value} per group" if scheme.group else scheme.dtype.value
        found.setdefault(row, []).append(decision.prefix)
    for node in program.calls(ops.dynamic_fake_quantize):
        found.setdefault("dynamic uint8", []).append(str(node.args[0]))
    for node in program.nodes():
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype in _FLOATS and node.op == "call_function":
            found.setdefault(_FLOATS[value.dtype], []).append(node.name)
    return {row: tuple(names) for row, names in found.items()}
