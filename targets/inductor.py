"""The Inductor target: an AOTInductor package, compiled for the CPU, that runs without the model's Python code and from C++."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from graphprune.errors import LoweringError
from graphprune.ir.program import Program
from graphprune.ir.sites import attribute_behind, find_sites
from graphprune.pipeline.target import Lowered, Run, StoredWeight, Support, Target
from graphprune.sparsity.layout import Layout, to_logical
from graphprune.targets.inductor_model.compiling import compile_package
from graphprune.targets.inductor_model.package import (
    Constant,
    Place,
    check_package,
    find_places,
    read_constants,
    read_note,
    write_places,
)
from graphprune.targets.inductor_model.rewriting import inference_copy, integers_of, use_integers

_MODEL = "model.pt2"
_NOTE = "model.json"
_FORMAT = 1


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
        weights, scales = _weights(copied)
        counts = use_integers(copied)
        for name, (scale, _) in scales.items():
            integers = integers_of(scale)
            if any(integers == known for known, _ in copied.named_buffers()):
                values = copied.tensor(integers)
                weights[name] = values.t() if layouts.get(name) is Layout.IN_OUT else values
        limits = compile_package(copied, folder / _MODEL)
        constants = read_constants(folder / _MODEL)
        places = find_places(constants, weights, scales)
        inputs = [
            {"name": item.name, "dtype": str(item.dtype).removeprefix("torch."), "largest": largest}
            for item, largest in zip(copied.interface.inputs, limits, strict=True)
        ]
        write_places(folder / _NOTE, places, {"format": _FORMAT, "inputs": inputs, "outputs": list(outputs)})
        coverage = _coverage(places, constants, frozenset(layouts))
        return Lowered((_MODEL, _NOTE), copied.interface.names, outputs, coverage, counts)

    def open(self, folder: Path, threads: int | None = None) -> Run:
        """Load ``model.pt2``; threads are set for all of torch in this process."""
        path = folder / _MODEL
        check_package(path)
        note = read_note(folder / _NOTE)
        if threads is not None:
            torch.set_num_threads(threads)
        inductor: Any = importlib.import_module("torch._inductor")
        try:
            model = inductor.aoti_load_package(str(path))
        except RuntimeError as error:
            raise LoweringError(f"{path} cannot be loaded: {error}; lower the Program again") from error
        inputs, outputs = note["inputs"], note["outputs"]

        def run(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            tensors = {item["name"]: _tensor(item, given) for item in inputs}
            with torch.no_grad():
                results = model(**tensors)
            wide = (value.float() if value.is_floating_point() else value for value in results)
            return {name: value.numpy() for name, value in zip(outputs, wide, strict=True)}

        return run

    def weights(self, folder: Path, layouts: Mapping[str, str]) -> dict[str, StoredWeight]:
        """Read weights out of the constants of the package's library; packed ones are unpacked by oneDNN."""
        constants = read_constants(folder / _MODEL)
        found = {}
        for name, place in read_note(folder / _NOTE)["weights"].items():
            if name in layouts and place.constant in constants:
                found[name] = _stored(place, constants, Layout(layouts[name]))
        return found


def _tensor(item: Mapping[str, Any], given: Mapping[str, np.ndarray]) -> Tensor:
    """One input as the compiled code takes it, which checks nothing itself.

    Raises:
        LoweringError: It is missing, of another dtype or rank, or too large.
    """
    name, largest = item["name"], item["largest"]
    if name not in given:
        raise LoweringError(f"input {name!r} is missing; give it")
    array = given[name]
    if str(array.dtype) != item["dtype"] or array.ndim != len(largest):
        raise LoweringError(
            f"input {name!r} is {array.dtype} with {array.ndim} dimensions, and {_MODEL} takes {item['dtype']} with "
            f"{len(largest)}; convert it"
        )
    for dim, (size, limit) in enumerate(zip(array.shape, largest, strict=True)):
        if limit is not None and size > limit:
            raise LoweringError(
                f"input {name!r} has size {size} in dimension {dim}, and {_MODEL} takes at most {limit}"
            )
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _weights(program: Program) -> tuple[dict[str, Tensor], dict[str, tuple[str, str]]]:
    """Sites and embedding tables by name, and the names of scale and zero-point of those that are quantized.

    Tied names count as the first of them.
    """
    aten = torch.ops.aten
    names = [site.name for site in find_sites(program)[0]]
    for node in program.calls(aten.embedding.default):
        source = attribute_behind(node.args[0])
        if source is not None and str(source.target) not in names:
            names.append(str(source.target))
    scales = {}
    for node in program.calls(torch.ops.graphprune.fake_quantize.default):
        source = attribute_behind(node)
        if source is not None:
            scale, zero_point = (str(item.target) for item in node.args[1:3])  # type: ignore[union-attr]
            scales[str(source.target)] = (scale, zero_point)
    return {name: program.tensor(name).detach() for name in names}, scales


def _stored(place: Place, constants: Mapping[str, Constant], layout: Layout) -> StoredWeight:
    values = place.weight(constants)
    scale, zero_point = (
        None if name is None else constants[name].values.numpy() for name in (place.scale, place.zero_point)
    )
    if values.dtype not in (torch.int8, torch.uint8):
        return StoredWeight(_array(to_logical(values, layout)))
    logical = to_logical(values, layout).numpy()
    if zero_point is None:
        zero_point = np.zeros(len(logical), np.int32)
    return StoredWeight(logical, zero_point.astype(logical.dtype), scale)


def _array(values: Tensor) -> np.ndarray:
    """As numpy; bfloat16, which numpy has not, as that of ml_dtypes where it is installed and as float32 where not."""
    if values.dtype is not torch.bfloat16:
        return values.contiguous().numpy()
    wide = values.float().contiguous().numpy()
    try:
        return wide.astype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError:
        return wide


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
