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
from graphprune.targets.inductor_model.package import Constant, Place, read_constants, read_note, write_places
from graphprune.targets.inductor_model.packaging import FORMATS, write_package
from graphprune.targets.inductor_model.reading import stored_weight
from graphprune.targets.inductor_model.rewriting import inference_copy
from graphprune.targets.inductor_model.running import MODEL, NOTE, open_package


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
        """Zeros are not skipped; ``inductor_model.packaging.FORMATS`` says what becomes of numbers."""
        return {**dict.fromkeys(("unstructured", "NxM", "N:M", "channel"), Support.STORED), **FORMATS}

    def lower(self, program: Program, folder: Path) -> Lowered:
        """Compile ``model.pt2`` and find the weights in it; takes from half a minute to minutes.

        Raises:
            LoweringError: No compiler, an operator that cannot be compiled, or a number format without a kernel.
        """
        copied, outputs = inference_copy(program)
        layouts = {site.name: site.layout for site in find_sites(copied)[0]}
        made = write_package(copied, outputs, layouts, folder)
        write_places(folder / NOTE, made.places, made.note)
        coverage = _coverage(made.places, made.constants, frozenset(layouts))
        return Lowered((MODEL, NOTE), copied.interface.names, outputs, coverage, made.counts)

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
