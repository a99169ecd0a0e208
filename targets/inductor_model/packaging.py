"""From a Program to a package, on the way that all targets go which compile with Inductor, and what becomes of number formats there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graphprune.ir.program import Program
from graphprune.pipeline.target import Support
from graphprune.sparsity.layout import Layout
from graphprune.targets.inductor_model.compiling import FIRST, compile_package
from graphprune.targets.inductor_model.package import Constant, Place, find_places, read_constants
from graphprune.targets.inductor_model.reading import take_integers, weights_of
from graphprune.targets.inductor_model.rewriting import use_integers
from graphprune.targets.inductor_model.running import MODEL, note_of

FORMATS: Mapping[str, Support] = {
    "fp32": Support.EXPLOITED,
    "fp16": Support.STORED,
    "bf16": Support.STORED,
    "int8": Support.EXPLOITED,
    "uint8": Support.EXPLOITED,
    "int4": Support.REFUSED,
    "uint4": Support.REFUSED,
    "int8 per group": Support.REFUSED,
    "int4 per group": Support.REFUSED,
    "dynamic uint8": Support.EXPLOITED,
}
"""Inductor's x86 kernels: products of uint8 by int8 are fast. bfloat16 and float16 are computed where the Program does; whether that
is faster than float32 depends on the CPU (AMX, AVX512-BF16, AVX512-FP16), and on one without them it is slower, so they count as
stored only. Four bits and groups are refused: the integer patterns take 8 bits and a scale a channel, and storing such weights in
float32 would be four times the size asked for."""


@dataclass(frozen=True)
class Packaged:
    """A package that was written, and what is known of it.

    Attributes:
        constants: What its library holds, by name.
        places: Where each weight lies among them.
        counts: What ``use_integers`` rewrote.
        note: What has to be known to run it.
    """

    constants: Mapping[str, Constant]
    places: Mapping[str, Place]
    counts: Mapping[str, int]
    note: Mapping[str, object]


def write_package(
    program: Program, outputs: tuple[str, ...], layouts: Mapping[str, Layout], folder: Path, first: int = FIRST
) -> Packaged:
    """Compile ``model.pt2`` and find the weights in it.

    Args:
        program: From ``inference_copy``, and so ``outputs``; mutated.
        outputs: Names of its results.
        layouts: Of its sites.
        folder: Where the package goes.
        first: Free size of the first dimension to export with.

    Raises:
        LoweringError: No compiler, an operator that cannot be compiled, or a number format without a kernel.
    """
    weights, scales = weights_of(program)
    counts = use_integers(program)
    take_integers(program, weights, scales, layouts)
    limits = compile_package(program, folder / MODEL, first)
    constants = read_constants(folder / MODEL)
    return Packaged(constants, find_places(constants, weights, scales), counts, note_of(program, outputs, limits))
