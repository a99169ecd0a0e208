"""Programs of tiny models with blocks of zeros, in floats and in integers, for the passes of target sparse-cpu."""

from __future__ import annotations

from graphprune.ir.program import Program
from tests.test_quant_matrix import quantized
from tests.traced import run_passes, traced

PACK = "remove-dropout,pack-linear{at_least=0}"


def blocked(name: str, sparsity: float = 0.75, pattern: str = "4x1") -> Program:
    """``MODELS[name]`` with blocks of zeros in the weights of its linear layers, the last one left as it is."""
    rule = f"pattern={pattern},sparsity={sparsity},criterion=magnitude,schedule=one-shot,scope=local,ragged=pad"
    return run_passes(traced(name), f"insert-masks{{{rule}}},fold-masks")


def integers(name: str, way: str = "static", sparsity: float = 0.75) -> Program:
    """The same quantized, ``static``, by ``QAT`` or ``dynamic``, with frozen quantizers."""
    program = quantized(blocked(name, sparsity), way)
    return run_passes(program, "freeze-quant") if way == "QAT" else program


def with_round_scales(program: Program) -> Program:
    """The Program with scales that are the same on every machine, for golden texts."""
    for name, value in program.named_buffers():
        if name.endswith("input_scale"):
            value.fill_(0.0625)
        elif name.endswith("input_zero_point"):
            value.fill_(128)
    return program
