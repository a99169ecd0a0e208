"""Which layers run faster without their zeros: measured on this machine, once for each shape."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.ir.sparse_operators import pack, pack_bytes, sparse_linear, sparse_linear_int8
from graphprune.sparsity.packed import Packed, choose_block, pack_matrix
from graphprune.targets.sparse_cpu.building import cache_folder, kernel_key, load_kernels

_MARGIN = 0.95
"""A sparse kernel must need at most this share of the dense one's time, so that noise makes no layer slower."""
_ROUNDS = 7
_SHORTEST = 1e-3
"""Seconds that one timing lasts at least."""


@dataclass(frozen=True)
class Decision:
    """How one layer is computed.

    Attributes:
        sparse: Whether by a sparse kernel.
        gain: Time of the dense kernel divided by that of the sparse one, its share of the panels included.
        zeros: Fraction of the weights that is zero.
        block: Rows of the blocks it is packed in.
    """

    sparse: bool
    gain: float
    zeros: float
    block: int

    def __str__(self) -> str:
        if self.sparse:
            return f"sparse, {self.gain:.1f}x"
        return f"dense (sparse {self.gain:.1f}x)"


def decide(weight: Tensor, tokens: int, quantized: bool = False) -> Decision:
    """Compare the kernels for one layer.

    Args:
        weight: ``[out, in]``; what counts are its shape and how many of its blocks are zero.
        tokens: For how many.
        quantized: Whether weight and activations are of 8 bits.
    """
    isa = load_kernels()
    zeros = 1 - float(weight.count_nonzero()) / max(1, weight.numel())
    block = choose_block(weight)
    dense = (weight.sign() * 64).to(torch.int8) if quantized else weight.float().contiguous()
    packed = pack_matrix(dense, block)
    stored = packed.columns.numel() * block / max(1, weight.numel())
    kind, threads = "int8" if quantized else "fp32", torch.get_num_threads()
    key = f"{kind} {weight.shape[0]}x{weight.shape[1]} block={block} stored={stored:.2f} tokens={tokens} threads={threads}"
    gain = _read().get(key)
    if gain is None:
        gain = round((_measure_integers if quantized else _measure_floats)(dense, packed, tokens), 3)
        _write({**_read(), key: gain})  # others may have written meanwhile
    return Decision(isa != "torch" and gain * _MARGIN >= 1, gain, zeros, block)


def _measure_floats(weight: Tensor, packed: Packed, tokens: int) -> float:
    rows, features = weight.shape
    x, bias = torch.randn(1, tokens, features), torch.zeros(rows)
    parts = (packed.values, packed.columns, packed.starts)
    return _ratio(
        lambda: torch.nn.functional.linear(x, weight, bias),
        lambda: sparse_linear(pack(x), *parts, bias, None, (1, tokens), rows),
    )


def _measure_integers(weight: Tensor, packed: Packed, tokens: int) -> float:
    rows, features = weight.shape
    x, bias, scales = torch.randn(1, tokens, features), torch.zeros(rows), torch.full((rows,), 0.01)
    correction, zeros = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
    parts = (packed.values, packed.columns, packed.starts, correction, scales)
    onednn: Any = torch.ops.onednn
    dense = onednn.qlinear_prepack(weight, [1, tokens, features])
    quantized = torch.randint(0, 255, (1, tokens, features), dtype=torch.uint8)

    def run_dense() -> Tensor:
        pack_bytes(x, 0.02, 128)  # the dense kernel's input has to be quantized too, which costs as much
        result: Tensor = onednn.qlinear_pointwise(
            quantized, 0.02, 128, dense, scales, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
        )
        return result

    return _ratio(
        run_dense, lambda: sparse_linear_int8(pack_bytes(x, 0.02, 128), *parts, bias, None, (1, tokens), rows)
    )


@torch.no_grad()
def _ratio(dense: Callable[[], Tensor], sparse: Callable[[], Tensor]) -> float:
    """Median, over rounds in which both take their turn, of the dense time over the sparse time."""
    repeat = {}
    for function in (dense, sparse):
        function()
        start = time.perf_counter()
        function()
        repeat[function] = max(1, int(_SHORTEST / max(time.perf_counter() - start, 1e-7)))
    ratios = []
    for _ in range(_ROUNDS):
        times = [_time(function, repeat[function]) for function in (dense, sparse)]
        ratios.append(times[0] / times[1])
    return statistics.median(ratios)


def _time(function: Callable[[], Tensor], repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        function()
    return (time.perf_counter() - start) / repeat


@functools.cache
def _file() -> Path:
    """Of this kind of machine, and this version of torch and of the kernels."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    words = f"{cpu} {os.cpu_count()} {load_kernels()} {kernel_key()}"
    name = "".join(letter if letter.isalnum() else "-" for letter in words)
    return cache_folder() / f"costs-{name}.json"


def _read() -> dict[str, float]:
    """What is known; entries that are no positive numbers count as unknown."""
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    items = found.items() if isinstance(found, dict) else ()
    return {key: float(value) for key, value in items if isinstance(value, (int, float)) and 0 < value < math.inf}


def _write(costs: Mapping[str, float]) -> None:
    with contextlib.suppress(OSError):  # then they are measured again
        _file().parent.mkdir(parents=True, exist_ok=True)
        part = _file().with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(costs, indent=1, sort_keys=True) + "\n")
        part.replace(_file())
