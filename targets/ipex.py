"""The IPEX target: TorchScript for the Intel Extension for PyTorch 2.8, its last release, on x86 CPUs."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.errors import LoweringError, suggest
from graphprune.ir.formats import formats_of
from graphprune.ir.interface import is_label
from graphprune.ir.program import Program
from graphprune.ir.source_model import remove_idle_normalizations, source_model
from graphprune.pipeline.target import Lowered, Run, StoredWeight, Support, Target
from graphprune.sparsity.layout import Layout, to_logical
from graphprune.targets.ipex_model.layers import Use, find_uses
from graphprune.targets.ipex_model.quantize import quantize_dynamic, quantize_static
from graphprune.targets.ipex_model.script import (
    Answers,
    example_inputs,
    quiet,
    read_script,
    read_weights,
    warm_up,
    write_script,
)

_MODEL = "model.pt"
_PRECISIONS = ("fp32", "bf16")
_TORCH = "2.8"
_LIBRARY = "intel_extension_for_pytorch"
_KINDS = {torch.float32: "float", torch.bfloat16: "bf16", torch.qint8: "int8"}


@dataclass(frozen=True)
class Ipex(Target):
    """Put the weights back into the source model's class and let IPEX optimize that.

    The file is TorchScript: it runs without the model's Python code, in an environment that has IPEX. Integers are multiplied by
    oneDNN's fused kernels, by the scales of the Program.

    Attributes:
        precision: ``fp32`` or ``bf16``, for what is not quantized. A Program that computes in bfloat16 is lowered to it always.
    """

    name = "ipex"
    legalize = ("fold-masks", "fold-conv-bn", "freeze-quant")
    extra = "ipex"
    fresh = True
    elsewhere = _LIBRARY

    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in _PRECISIONS:
            raise LoweringError(f"precision={self.precision!r} is not known{suggest(self.precision, _PRECISIONS)}")

    @classmethod
    def capabilities(cls) -> Mapping[str, Support]:
        """IPEX's kernels: products of uint8 or int8 by int8 are fast, zeros are not skipped.

        bfloat16 is stored and computed; it is faster than float32 only on CPUs with AMX or AVX512-BF16, so it counts as stored. uint8
        is for activations. Weights with a scale a group, and four bits, have no kernel here.
        """
        return {
            "unstructured": Support.STORED,
            "NxM": Support.STORED,
            "N:M": Support.STORED,
            "channel": Support.STORED,
            "fp32": Support.EXPLOITED,
            "fp16": Support.REFUSED,
            "bf16": Support.STORED,
            "int8": Support.EXPLOITED,
            "uint8": Support.EXPLOITED,
            "int4": Support.REFUSED,
            "uint4": Support.REFUSED,
            "int8 per group": Support.REFUSED,
            "int4 per group": Support.REFUSED,
            "dynamic uint8": Support.EXPLOITED,
        }

    def tolerance(self) -> float | None:
        """5e-2 in bfloat16, which keeps 8 bits of every number."""
        return 5e-2 if self.precision == "bf16" else None

    def lower(self, program: Program, folder: Path) -> Lowered:
        """Write ``model.pt``."""
        ipex = self.library(_LIBRARY)
        program = _without_labels(program)
        model = source_model(program)
        uses = find_uses(program, model)
        half = self.precision == "bf16" or "bf16" in formats_of(program)
        if half and any(use.is_integer for use in uses):
            raise LoweringError(
                f"{program.name} is quantized, and precision=bf16 is for models that are not; use precision=fp32"
            )
        leaves: Any = program.output.args[0]
        names = program.interface.output_names
        outputs = tuple(name for name, leaf in zip(names, leaves, strict=True) if leaf is not None)
        example = example_inputs(program)
        dtype = torch.bfloat16 if half else torch.float32
        weights = {
            use.site: use.stored(value) if use.is_integer else value.to(dtype)
            for use in uses
            for value in (program.tensor(use.site).detach().float(),)
        }
        remove_idle_normalizations(program, model)
        quantize_dynamic(model, uses)
        answers = Answers(model, program.interface, outputs)
        with quiet(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            prepared = _optimized(ipex, answers, example, uses, dtype)
            note = {"inputs": list(program.interface.names), "outputs": list(outputs)}
            found, integers = write_script(prepared, example, folder / _MODEL, note, weights)
        return Lowered((_MODEL,), program.interface.names, outputs, _coverage(weights, found, integers))

    def open(self, folder: Path, threads: int | None = None) -> Run:
        """Load ``model.pt``; threads are set for all of torch in this process."""
        self.library("intel_extension_for_pytorch")
        script, note = read_script(folder / _MODEL)
        if threads is not None:
            torch.set_num_threads(threads)
        warm: set[tuple[tuple[int, ...], ...]] = set()

        @torch.no_grad()
        def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            missing = [name for name in note["inputs"] if name not in inputs]
            if missing:
                raise LoweringError(f"input {missing[0]!r} is missing; {_MODEL} takes {', '.join(note['inputs'])}")
            values = [torch.from_numpy(np.array(inputs[name])) for name in note["inputs"]]
            shapes = tuple(tuple(value.shape) for value in values)
            if shapes not in warm:
                warm_up(script, values)
                warm.add(shapes)
            return {name: _array(value) for name, value in zip(note["outputs"], script(*values), strict=True)}

        return run

    def weights(self, folder: Path, layouts: Mapping[str, str]) -> dict[str, StoredWeight]:
        """Read weights out of the constants of the TorchScript graph, by site name."""
        self.library("intel_extension_for_pytorch")
        found = read_weights(folder / _MODEL)
        return {name: _stored(found[name], Layout(layout)) for name, layout in layouts.items() if name in found}

    def library(self, name: str) -> Any:
        """Import IPEX, quietly.

        Raises:
            LoweringError: It is not installed, or was built for another torch; says the lines that make an environment for it.
        """
        advice = (
            f"make an environment for it: `python tools/environment.py ipex` in a checkout of graphprune does and prints the path of its "
            f'Python, or run: python -m venv ipex && ipex/bin/pip install "graphprune[{self.extra}]". Lower there what graphprune.save or '
            f"transform -o wrote here; GRAPHPRUNE_IPEX_PYTHON=<its Python> lets verify and bench run from here"
        )
        if not torch.__version__.startswith(f"{_TORCH}."):
            raise LoweringError(
                f"target ipex needs torch {_TORCH} and intel-extension-for-pytorch {_TORCH}, its last release; here is torch "
                f"{torch.__version__} {_installed()}. One environment cannot have two versions of torch: {advice}"
            )
        try:
            with quiet():
                return super().library(name)
        except LoweringError as error:
            raise LoweringError(f"{str(error).partition('; run: ')[0]}; {advice}") from error.__cause__


def _installed() -> str:
    try:
        return f"with IPEX {version('intel-extension-for-pytorch')}"
    except PackageNotFoundError:
        return "without IPEX"


def _without_labels(program: Program) -> Program:
    """A copy without the loss; its tensors are those of the Program."""
    shared: dict[int, Any] = {id(item): item for item in (*program.parameters(), *program.buffers())}
    copied = copy.deepcopy(program, shared).eval()
    labels = frozenset(name for name in copied.interface.names if is_label(name))
    if labels:
        copied.drop_inputs(labels)
    return copied


def _optimized(
    ipex: Any, answers: nn.Module, example: tuple[Tensor, ...], uses: tuple[Use, ...], dtype: torch.dtype
) -> nn.Module:
    """The model in the form that IPEX traces.

    Raises:
        LoweringError: IPEX cannot prepare it.
    """
    try:
        if any(use.input is not None for use in uses):
            return quantize_static(ipex, answers, example, uses, "model.")
        if any(use.dynamic for use in uses):
            return answers
        optimized: nn.Module = ipex.optimize(
            answers, dtype=dtype, inplace=True, conv_bn_folding=False, linear_bn_folding=False,
            weights_prepack=False,  # packed weights fit the CPU at hand only, and cannot be read
        )  # fmt: skip
        return optimized
    except LoweringError:
        raise
    except Exception as error:  # it calls the model's code, and patches torch while it does
        raise LoweringError(
            f"IPEX cannot prepare the model: {error}; choose another target, such as inductor"
        ) from error


def _coverage(
    weights: Mapping[str, Tensor], found: Mapping[str, Tensor], integers: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """Sites by the format that they have in the file, and by what multiplies them."""
    kinds = {name: _KINDS[found[name].dtype] for name in weights if name in found}
    coverage = {kind: tuple(name for name in kinds if kinds[name] == kind) for kind in dict.fromkeys(kinds.values())}
    return {
        **coverage,
        "integer kernel": tuple(name for name in kinds if name in integers),
        "float kernel": tuple(name for name in kinds if name not in integers),
    }


def _stored(weight: Tensor, layout: Layout) -> StoredWeight:
    if not weight.is_quantized:
        return StoredWeight(_array(to_logical(weight, layout)))
    values = to_logical(weight.int_repr(), layout).numpy()
    if weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        zero_point = weight.q_per_channel_zero_points().numpy().astype(np.int32)
        return StoredWeight(values, zero_point, weight.q_per_channel_scales().float().numpy())
    return StoredWeight(values, np.asarray(weight.q_zero_point(), np.int32), np.asarray(weight.q_scale(), np.float32))


def _array(value: Tensor) -> np.ndarray:
    """As numpy, which has no bfloat16."""
    value = value.detach()
    return (value.float() if value.dtype is torch.bfloat16 else value).contiguous().numpy()
