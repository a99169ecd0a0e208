"""Sparse linear layers against dense ones of torch: the kernels alone, with their packing, and what the cost model makes of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import medians
from benchmarks.sparse_roofline import Peaks, layer_work
from graphprune.ir.sparse_operators import pack, pack_bytes, sparse_linear, sparse_linear_int8
from graphprune.sparsity.packed import pack_matrix
from graphprune.targets.sparse_cpu.cost import decide

BLOCK = 4
_TURN = 5e-3
"""Seconds that a turn takes at least."""
_SCALE, _ZERO_POINT = 0.02, 128


@dataclass(frozen=True)
class Case:
    """One layer.

    Attributes:
        rows: Features of the result.
        features: Of the input.
        number_format: ``fp32`` or ``int8``.
        sparsity: Fraction of zeros, in blocks of 4x1.
        tokens: Rows of the activations.
        threads: Of torch.
    """

    rows: int
    features: int
    number_format: str
    sparsity: float
    tokens: int
    threads: int


@dataclass(frozen=True)
class Layer:
    """What was measured of one layer; ratios above 1 are faster.

    Attributes:
        case: Which.
        kernel: Over torch's dense float32 layer, from panels to panels: what a layer costs whose neighbors are sparse.
        layer: The same from rows to rows, so that panels are packed and unpacked for this layer alone.
        same_format: Of ``layer`` over torch's dense layer in the same number format; of int8 both quantize their input.
        sparse: Whether the cost model takes the sparse kernel.
        of_peak: Share of the measured peak (FMA or VNNI) that the kernel reaches; None where that was not measured.
        of_memory: Share of the memory bandwidth.
    """

    case: Case
    kernel: float
    layer: float
    same_format: float
    sparse: bool
    of_peak: float | None
    of_memory: float | None

    @property
    def chosen(self) -> float:
        """Ratio of what the cost model takes over the dense kernel, which is 1 where it takes that."""
        return self.same_format if self.sparse else 1.0


def random_weight(rows: int, features: int, sparsity: float) -> Tensor:
    """A weight ``[rows, features]`` with random blocks of 4x1 left; ``rows`` is a multiple of 4."""
    generator = torch.Generator().manual_seed(0)
    count = rows // BLOCK * features
    kept = torch.zeros(count, dtype=torch.bool)
    kept[torch.randperm(count, generator=generator)[: round((1 - sparsity) * count)]] = True
    mask = kept.view(-1, 1, features).expand(-1, BLOCK, features).reshape(rows, features)
    return torch.randn(rows, features, generator=generator) * mask


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch have so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def measure_layer(case: Case, repeats: int, peaks: Peaks | None) -> Layer:
    """Run one layer in all its forms, in turns.

    Args:
        case: Which; its kernels have to be loaded.
        repeats: Rounds that count.
        peaks: Of the machine with the same threads.
    """
    weight = random_weight(case.rows, case.features, case.sparsity)
    with torch_threads(case.threads):
        runs = (_floats if case.number_format == "fp32" else _integers)(case, weight)
        times = medians({name: _turn(run) for name, run in runs.items()}, repeats)
        sparse = decide(weight, case.tokens, case.number_format == "int8").sparse
    work = layer_work(case.rows, case.features, case.sparsity, case.tokens, case.number_format)
    return Layer(
        case,
        times["dense"] / times["kernel"],
        times["dense"] / times["layer"],
        times.get("dense int8", times["dense"]) / times["layer"],
        sparse,
        None if peaks is None else work.of_peak(peaks, times["kernel"]),
        None if peaks is None else work.of_memory(peaks, times["kernel"]),
    )


def _turn(run: Callable[[], Tensor]) -> Callable[[], float]:
    """Seconds of a run, out of as many in a row as make a turn; the first is not counted, since others had the caches."""
    run()
    start = time.perf_counter()
    run()
    calls = max(1, int(_TURN / max(time.perf_counter() - start, 1e-6)))

    def turn() -> float:
        run()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    return turn


def _floats(case: Case, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    packed = pack_matrix(weight, BLOCK)
    parts = (packed.values, packed.columns, packed.starts)
    x, bias, sizes = torch.randn(1, case.tokens, case.features), torch.randn(case.rows), (1, case.tokens)
    panels = pack(x)
    return {
        "dense": lambda: torch.nn.functional.linear(x, weight, bias),
        "kernel": lambda: sparse_linear(panels, *parts, bias, None, sizes, case.rows, "none", "panels"),
        "layer": lambda: sparse_linear(pack(x), *parts, bias, None, sizes, case.rows),
    }


def _integers(case: Case, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    grid = (weight * 32).round().clamp(-127, 127).to(torch.int8)
    packed = pack_matrix(grid, BLOCK)
    scales, correction = torch.full((case.rows,), _SCALE / 32), (grid.sum(1) * _ZERO_POINT).to(torch.int32)
    parts = (packed.values, packed.columns, packed.starts, correction, scales)
    x, bias, sizes = torch.randn(1, case.tokens, case.features), torch.randn(case.rows), (1, case.tokens)
    panels = pack_bytes(x, _SCALE, _ZERO_POINT)
    onednn: Any = torch.ops.onednn
    dense, zeros = (
        onednn.qlinear_prepack(grid, [1, case.tokens, case.features]),
        torch.zeros(case.rows, dtype=torch.int64),
    )
    given = (x / _SCALE + _ZERO_POINT).round().clamp(0, 255).to(torch.uint8)

    def dense_int8() -> Tensor:
        pack_bytes(x, _SCALE, _ZERO_POINT)  # costs as much as quantizing into rows
        result: Tensor = onednn.qlinear_pointwise(
            given, _SCALE, _ZERO_POINT, dense, scales / _SCALE, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
        )
        return result

    return {
        "dense": lambda: torch.nn.functional.linear(x, weight, bias),
        "dense int8": dense_int8,
        "kernel": lambda: sparse_linear_int8(
            panels, *parts, bias, None, sizes, case.rows, "none", "bytes", _SCALE, _ZERO_POINT
        ),
        "layer": lambda: sparse_linear_int8(pack_bytes(x, _SCALE, _ZERO_POINT), *parts, bias, None, sizes, case.rows),
    }


def cases(hidden: int, sparsities: Sequence[float], tokens: Sequence[int], threads: Sequence[int]) -> Iterator[Case]:
    """The shapes of a BERT's linear layers in all combinations."""
    for count in threads:
        for number_format in ("fp32", "int8"):
            for sparsity in sparsities:
                for number in tokens:
                    for rows, features in ((hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)):
                        yield Case(rows, features, number_format, sparsity, number, count)
