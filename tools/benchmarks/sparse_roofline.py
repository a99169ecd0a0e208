"""What the machine can do at most, measured, and what a sparse layer or model needs at least."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import Unavailable
from graphprune.targets.sparse_cpu.building import cache_folder

SOURCE = Path(__file__).with_name("peak.cpp")
_FLAGS = ("-std=c++20", "-O3", "-pthread")
_FLOAT, _COLUMN, _BLOCK = 4, 2, 4
"""Bytes of a float and of a column number, and rows of a block, which share one."""


@dataclass(frozen=True)
class Peaks:
    """The most that some threads of this machine reached, each in a loop that does nothing else.

    Attributes:
        isa: The instructions that it was reached with.
        floats: Operations a second on float32, two for a product and its sum (FMA).
        bytes: The same on uint8 by int8 with sums of int32 (VNNI where there is one).
        memory: Bytes a second read from memory.
    """

    isa: str
    floats: float
    bytes: float
    memory: float

    def __str__(self) -> str:
        return f"{self.isa}: {self.floats / 1e9:.0f} GFLOP/s, {self.bytes / 1e9:.0f} G operations on bytes/s, {self.memory / 1e9:.1f} GB/s"


def measure_peaks(threads: int) -> Peaks:
    """Run ``peak.cpp``, compiled if that was not done before; takes about a second.

    Raises:
        Unavailable: There is no C++ compiler, or it fails.
    """
    compiler = os.environ.get("CXX", "c++")
    key = hashlib.sha256(SOURCE.read_bytes() + "\0".join((compiler, *_FLAGS)).encode()).hexdigest()[:16]
    program = cache_folder() / "peaks" / key
    try:
        if not program.is_file():
            program.parent.mkdir(parents=True, exist_ok=True)
            part = program.with_suffix(f".{os.getpid()}")
            subprocess.run([compiler, *_FLAGS, str(SOURCE), "-o", str(part)], check=True, capture_output=True)
            part.replace(program)
        done = subprocess.run([str(program), str(threads)], check=True, capture_output=True, text=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(
            f"the roofline needs a C++ compiler, and {compiler} does not make {SOURCE.name}: {error}"
        ) from error
    return Peaks(**json.loads(done.stdout))


@dataclass(frozen=True)
class Work:
    """The least that has to be done.

    Attributes:
        floats: Operations on float32.
        bytes: Operations on bytes.
        memory: Bytes that have to be read or written once.
    """

    floats: float = 0.0
    bytes: float = 0.0
    memory: float = 0.0

    def of_peak(self, peaks: Peaks, seconds: float) -> float:
        """Share of the machine's arithmetic that was used: time at the measured peak over the time that it took."""
        return (self.floats / peaks.floats + self.bytes / peaks.bytes) / seconds

    def of_memory(self, peaks: Peaks, seconds: float) -> float:
        """Share of the machine's memory bandwidth that was used, if everything was moved once."""
        return self.memory / peaks.memory / seconds


def layer_work(rows: int, features: int, sparsity: float, tokens: int, number_format: str) -> Work:
    """Of a sparse linear layer: products of what is not zero, packed weights, activations in and out.

    Args:
        rows: Features of the result.
        features: Of the input.
        sparsity: Fraction of zeros, in blocks of 4x1.
        tokens: Rows of the activations.
        number_format: ``fp32`` or ``int8``, of weights and activations.
    """
    kept = (1 - sparsity) * rows * features
    size = _FLOAT if number_format == "fp32" else 1
    memory = kept * size + kept / _BLOCK * _COLUMN + tokens * (rows + features) * size
    operations = 2 * kept * tokens
    return Work(operations, 0.0, memory) if number_format == "fp32" else Work(0.0, operations, memory)


def model_work(layers: int, hidden: int, sparsity: float, batch: int, sequence: int, number_format: str) -> Work:
    """Of a BERT's layers: their linear layers, and both products of attention, of which two of bfloat16 count as one of float32.

    Args:
        layers: How many.
        hidden: Their width.
        sparsity: Of their linear layers.
        batch: Sequences.
        sequence: Tokens of each.
        number_format: Of the linear layers.
    """
    shapes = [*[(hidden, hidden)] * 4, (4 * hidden, hidden), (hidden, 4 * hidden)]
    total = total_work(layer_work(*shape, sparsity, batch * sequence, number_format) for shape in shapes)
    attention = 4.0 * batch * sequence**2 * hidden / (2 if number_format == "int8" else 1)
    return Work(layers * (total.floats + attention), layers * total.bytes, layers * total.memory)


def total_work(parts: Iterable[Work]) -> Work:
    """The sum of some."""
    known = list(parts)
    return Work(sum(p.floats for p in known), sum(p.bytes for p in known), sum(p.memory for p in known))
