"""The sparse-cpu target: linear layers multiply by what is not zero, and the rest is compiled by Inductor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from graphprune.errors import LoweringError
from graphprune.ir import ops
from graphprune.ir.program import Program
from graphprune.ir.sites import Site, find_sites
from graphprune.ir.sparse_operators import LAYERS, PANEL, attention, pack, pack_bytes
from graphprune.passes import FuseEpilogues, KeepPanels, LowerAttention, PackLinear, RemoveDropout
from graphprune.pipeline.base import Pass
from graphprune.pipeline.legalize import legalized
from graphprune.pipeline.manager import PassManager
from graphprune.pipeline.target import Choice, Choices, Lowered, Run, StoredWeight, Support, Target
from graphprune.sparsity.layout import Layout, to_logical
from graphprune.targets.inductor_model.package import read_constants, read_note, write_places
from graphprune.targets.inductor_model.packaging import FORMATS, write_package
from graphprune.targets.inductor_model.reading import stored_weight
from graphprune.targets.inductor_model.rewriting import inference_copy
from graphprune.targets.inductor_model.running import MODEL, NOTE, open_package
from graphprune.targets.sparse_cpu.building import load_kernels
from graphprune.targets.sparse_cpu.cost import Decision, decide
from graphprune.targets.sparse_cpu.places import packed_places, packed_weights

_FIRST = 2 * PANEL + 2
"""Free size to export with: where tokens filled one panel, export would fix their number of panels to one."""


@dataclass(frozen=True)
class SparseCpu(Target):
    """Run sparse linear layers in kernels of our own, and everything else as target inductor does.

    Needs torch, ninja and a C++ compiler, to lower and, once on each machine, to run.

    Attributes:
        tokens: Tokens that the model is expected to see at once (batch times length); the cost of each layer is measured for so many.
        storage: ``float32``, or ``bfloat16`` for half the bytes of packed weights that are not quantized.
        attention: ``float32``, ``bfloat16`` for products of numbers rounded to that, on CPUs that have instructions for them, or ``auto``:
            bfloat16 in models with quantized linear layers.
        all: Take the sparse kernel for every layer that has one, faster or not.
    """

    name = "sparse-cpu"
    legalize = ("fold-masks", "fold-conv-bn", "freeze-quant")
    extra = "sparse-cpu"
    fresh = True
    remarks: ClassVar[Mapping[str, str]] = {
        "unstructured": "linear layers, where it was measured to be faster",
        "NxM": "linear layers; 4x1 and more rows as blocks, others as single weights",
        "N:M": "zeros are skipped where that was measured to be faster",
        "channel": "linear layers; a channel is a block like any other",
        "int8": "linear layers with activations of 8 bits, and tables; other weights are float numbers on their grid",
        "dynamic uint8": "dense layers; the sparse kernels take fixed scales",
    }

    tokens: int = 128
    storage: str = "float32"
    attention: str = "auto"
    all: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise LoweringError(f"tokens={self.tokens} is below 1")
        if self.storage not in ("float32", "bfloat16"):
            raise LoweringError(f"storage={self.storage} is neither float32 nor bfloat16")
        if self.attention not in ("auto", "float32", "bfloat16"):
            raise LoweringError(f"attention={self.attention} is none of auto, float32, bfloat16")

    def tolerance(self) -> float | None:
        """Factors that are rounded to 8 bits move the outputs by as much."""
        return 2.0**-7 if "bfloat16" in (self.storage, self.attention) else None

    @classmethod
    def capabilities(cls) -> Mapping[str, Support]:
        """Zeros of linear layers are skipped, in blocks and one by one; the rest is that of target inductor."""
        patterns = {**dict.fromkeys(("unstructured", "NxM", "channel"), Support.EXPLOITED), "N:M": Support.STORED}
        return {**patterns, **FORMATS}

    def candidates(self, program: Program) -> dict[str, Tensor]:
        """Weights of linear layers that have zeros, ``[out, in]``, by name.

        Args:
            program: Legalized.
        """
        found = {
            site.name: to_logical(program.tensor(site.name).detach(), site.layout)
            for site in find_sites(program)[0]
            if site.layout is not Layout.CONV
        }
        return {name: weight for name, weight in found.items() if weight.dtype is torch.float32 and not weight.all()}

    def decisions(self, program: Program) -> dict[str, Decision]:
        """What the cost model says of each candidate, by name; measures what it does not know.

        Args:
            program: Legalized.

        Raises:
            LoweringError: The kernels cannot be compiled here.
        """
        integers = {site.name for site in find_sites(program)[0] if _quantized(program, site)}
        return {
            name: decide(weight, self.tokens, name in integers) for name, weight in self.candidates(program).items()
        }

    def choices(self, program: Program) -> Choices:
        """``decisions`` for every layer in words; layers without zeros, and those without a sparse kernel, are dense.

        Raises:
            LoweringError: The weights are on the meta device, or the kernels cannot be compiled here.
            PassError: A legalizing pass refused.
        """
        if any(parameter.is_meta for parameter in program.parameters()):
            raise LoweringError(
                f"{program.name} has no weights here, and what is gained depends on their zeros; inspect a checkpoint"
            )
        legal = legalized(program, self.legalize)
        sites, decisions = find_sites(legal)[0], self.decisions(legal)
        taken = tuple(name for name, decision in decisions.items() if decision.sparse or self.all)
        unfit = PackLinear(0.0, taken, storage=self.storage).run(legal).coverage.left_out if taken else {}
        layers = {site.name: Choice("dense", {"sparse": False}) for site in sites}
        for name, decision in decisions.items():
            if name in taken and name in unfit:
                layers[name] = Choice(f"dense ({unfit[name]})", {"sparse": False, "reason": unfit[name]})
            else:
                text = f"sparse, {decision.gain:.1f}x" if name in taken else str(decision)
                layers[name] = Choice(text, {**asdict(decision), "sparse": name in taken})
        remark = f"a gain is the dense kernel's time over the sparse one's, measured here for {self.tokens} tokens and {_threads()}"
        return Choices(layers, remark if decisions else "")

    def lower(self, program: Program, folder: Path) -> Lowered:
        """Measure what is not known, pack what gains by it, and compile; takes from half a minute to minutes.

        Raises:
            LoweringError: No compiler, an operator that cannot be compiled, or a number format without a kernel.
        """
        load_kernels()
        decisions = {} if self.all else self.decisions(program)
        taken = (
            tuple(self.candidates(program)) if self.all else tuple(n for n, item in decisions.items() if item.sparse)
        )
        layouts = {site.name: site.layout for site in find_sites(program)[0]}
        packed = PassManager(self.passes(program, taken)).run(legalized(program, ()), in_place=True).program
        copied, outputs = inference_copy(packed, (pack, pack_bytes, attention, *LAYERS))
        made = write_package(copied, outputs, layouts, folder, _FIRST)
        sparse = packed_places(copied, made.constants)
        decided = {name: {**asdict(decision), "sparse": name in sparse} for name, decision in decisions.items()}
        write_places(folder / NOTE, made.places, {**made.note, "sparse": sparse, "decisions": decided})
        coverage = {
            "sparse kernel": tuple(name for name in layouts if name in sparse),
            "dense kernel": tuple(name for name in layouts if name not in sparse),
        }
        return Lowered((MODEL, NOTE), copied.interface.names, outputs, coverage, {**made.counts, "packed": len(sparse)})

    def passes(self, program: Program, taken: tuple[str, ...]) -> tuple[Pass, ...]:
        """What rewrites a Program for the kernels, in this order.

        Args:
            program: Legalized.
            taken: Weights of the layers that get a sparse kernel.
        """
        rounded = self.attention == "bfloat16"
        if self.attention == "auto":
            rounded = any(_quantized(program, site) for site in find_sites(program)[0])
        packing = (PackLinear(0.0, taken, storage=self.storage), FuseEpilogues(), KeepPanels()) if taken else ()
        return (RemoveDropout(), LowerAttention(rounded), *packing)

    def open(self, folder: Path, threads: int | None = None) -> Run:
        """Compile the kernels if this machine has not yet, and load ``model.pt2``; threads are set for all of torch in this process."""
        load_kernels()
        return open_package(folder, threads)

    def weights(self, folder: Path, layouts: Mapping[str, str]) -> dict[str, StoredWeight]:
        """Read weights out of the constants of the package's library; packed ones are unpacked."""
        load_kernels()
        constants = read_constants(folder / MODEL)
        note = read_note(folder / NOTE)
        found = packed_weights(note.get("sparse", {}), constants, layouts)
        for name, place in note["weights"].items():
            if name in layouts and name not in found and place.constant in constants:
                found[name] = stored_weight(place, constants, Layout(layouts[name]))
        return found


def _threads() -> str:
    number = torch.get_num_threads()
    return f"{number} thread{'' if number == 1 else 's'}"


def _quantized(program: Program, site: Site) -> bool:
    node = next(node for node in program.graph.nodes if node.name == site.uses[0])
    return any(item.target is ops.fake_quantize for item in node.all_input_nodes)
