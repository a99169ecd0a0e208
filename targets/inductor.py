"""The Inductor target: an AOTInductor package, compiled for the CPU, that runs without the model's Python code and from C++."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from graphprune.ir.program import Program
from graphprune.ir.sites import find_sites
from graphprune.pipeline.target import Lowered, Run, StoredWeight, Support, Target
from graphprune.sparsity.layout import Layout
from graphprune.targets.inductor_model.compiling import compile_package
from graphprune.targets.inductor_model.package import (
    Constant,
    Place,
    find_places,
    read_constants,
    read_note,
    write_places,
)
from graphprune.targets.inductor_model.reading import stored_weight, take_integers, weights_of
from graphprune.targets.inductor_model.rewriting import inference_copy, use_integers
from graphprune.targets.inductor_model.running import MODEL, NOTE, note_of, open_package


@dataclass(frozen=True)
class Inductor(Target):
    """Compile with AOTInductor for this kind of CPU. Needs torch and a C++ compiler to lower, torch alone to run.

    ``model.pt2`` is the package. ``model.json`` beside it says what its inputs are and which of its constants is which weight, since
    Inductor packs and renames them; the values are always read out of the package.
    """

    name = "inductor"
    legalize = ("fold-masks", "fold-conv-bn", "freeze-quant")
    fresh = True
    remarks: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("fp16", "bf16"), "faster than fp32 only on a CPU that computes in it"),
        "int8": "products with activations of 8 bits, and tables; other weights are float numbers on their grid",
        "dynamic uint8": "linear layers; convolutions compute in float",
    }

    @classmethod
    def capabilities(cls) -> Mapping[str, Support]:
        """Inductor's x86 kernels: products of uint8 by int8 are fast, zeros are not skipped.

        bfloat16 and float16 are computed where the Program does; whether that is faster than float32 depends on the CPU (AMX, AVX512-BF16,
        AVX512-FP16), and on one without them it is slower, so they count as stored only. Four bits and groups are refused: the integer
        patterns take 8 bits and a scale a channel, and storing such weights in float32 would be four times the size asked for.
        """
        return {
            "unstructured": Support.STORED,
            "NxM": Support.STORED,
            "N:M": Support.STORED,
            "channel": Support.STORED,
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

    def lower(self, program: Program, folder: Path) -> Lowered:
        """Compile ``model.pt2`` and find the weights in it; takes from half a minute to minutes.

        Raises:
            LoweringError: No compiler, an operator that cannot be compiled, or a number format without a kernel.
        """
        copied, outputs = inference_copy(program)
        layouts = {site.name: site.layout for site in find_sites(copied)[0]}
        weights, scales = weights_of(copied)
        counts = use_integers(copied)
        take_integers(copied, weights, scales, layouts)
        limits = compile_package(copied, folder / MODEL)
        constants = read_constants(folder / MODEL)
        places = find_places(constants, weights, scales)
        write_places(folder / NOTE, places, note_of(copied, outputs, limits))
        coverage = _coverage(places, constants, frozenset(layouts))
        return Lowered((MODEL, NOTE), copied.interface.names, outputs, coverage, counts)

    def open(self, folder: Path, threads: int | None = None) -> Run:
        """Load ``model.pt2``; threads are set for all of torch in this process."""
        return open_package(folder, threads)

    def weights(self, folder: Path, layouts: Mapping[str, str]) -> dict[str, StoredWeight]:
        """Read weights out of the constants of the package's library; packed ones are unpacked by oneDNN."""
        constants = read_constants(folder / MODEL)
        found = {}
        for name, place in read_note(folder / NOTE)["weights"].items():
            if name in layouts and place.constant in constants:
                found[name] = stored_weight(place, constants, Layout(layouts[name]))
        return found


def _coverage(
    places: Mapping[str, Place], constants: Mapping[str, Constant], sites: frozenset[str]
) -> dict[str, tuple[str, ...]]:
    """Weights by how they are stored, and sites by what multiplies them: only oneDNN's integer kernels take packed integers."""
    integers = {
        name for name, place in places.items() if constants[place.constant].values.dtype in (torch.int8, torch.uint8)
    }
    kernels = {name for name in integers if constants[places[name].constant].packed}
    return {
        "int8": tuple(name for name in places if name in integers),
        "float": tuple(name for name in places if name not in integers),
        "integer kernel": tuple(name for name in places if name in sites and name in kernels),
        "float kernel": tuple(name for name in places if name in sites and name not in kernels),
    }
