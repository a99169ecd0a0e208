"""The OpenVINO target: an IR file whose quantized layers OpenVINO's CPU plugin multiplies as integers.

The Program becomes ONNX, OpenVINO reads that, and its own model is written; the ONNX file is not kept.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from graphprune.errors import LoweringError, suggest
from graphprune.ir import ops
from graphprune.ir.origin import origin
from graphprune.ir.program import Program
from graphprune.ir.sites import weight_names
from graphprune.pipeline.target import Lowered, Run, StoredWeight, Support, Target
from graphprune.targets.onnx_model.draft import Draft, finish, surgeon
from graphprune.targets.onnx_model.export import export_model, inference_copy
from graphprune.targets.openvino_model.graph import name_nodes, read_interface, write_interface
from graphprune.targets.openvino_model.kernels import kernels
from graphprune.targets.openvino_model.passes import run_passes
from graphprune.targets.openvino_model.weights import stored_formats, stored_weights

_MODEL, _WEIGHTS = "model.xml", "model.bin"
_OPSET = 21
"""Of the ONNX model on the way: the first that has numbers of four bits and scales of groups."""
_PRECISIONS = {"f32": None, "bf16": 5e-2, "f16": 5e-2}
"""What floats are computed in, and the tolerance that goes with it."""
_HINTS = ("latency", "throughput")
_LARGE = 1_500_000_000
"""Bytes of weights above which they lie beside the ONNX model, which is 2 GB at most."""


@dataclass(frozen=True)
class OpenVino(Target):
    """Write OpenVINO IR, and run it on OpenVINO's CPU plugin.

    Attributes:
        half: Store weights that stay floats as float16, half as large; they are computed in ``precision``.
        precision: What floats are computed in: ``f32``, or ``bf16`` or ``f16`` as a hint: OpenVINO takes what the CPU has. Version 2026.4
            computes ``f16`` in bfloat16 on a CPU that has only that.
        sparse_rate: Share of zeros, above 0 and at most 1, from which on OpenVINO packs the int8 weights of a matrix product without
            their zeros and unpacks them in the kernel (its CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE); 0 packs none. It does so on CPUs with
            AMX only and changes nothing on others; answers are the same.
        dynamic_group: 0 computes inputs of layers as the Program does. Above 0, OpenVINO quantizes inputs itself while it runs, so many
            together, wherever the weights are integers and the input is not: faster, and another rounding than the Program's.
        hint: What to run for: ``latency``, one request at a time, or ``throughput``, several.
    """

    name = "openvino"
    legalize = ("fold-masks", "freeze-quant")
    extra = "openvino"
    remarks = MappingProxyType({
        "unstructured": "int8 weights are packed without zeros on CPUs with AMX, where sparse_rate is set",
        "dynamic uint8": "computed in float; dynamic_group=32 lets OpenVINO quantize inputs itself instead",
        "fp16": "the CPU plugin computes it in float32; half=true stores float32 Programs so",
        "bf16": "for float32 Programs, precision=bf16 lets OpenVINO compute in it",
    })  # fmt: skip

    half: bool = False
    precision: str = "f32"
    sparse_rate: float = 0.0
    dynamic_group: int = 0
    hint: str = "latency"

    def __post_init__(self) -> None:
        if self.precision not in _PRECISIONS:
            raise LoweringError(f"precision={self.precision!r} is not known{suggest(self.precision, _PRECISIONS)}")
        if self.hint not in _HINTS:
            raise LoweringError(f"hint={self.hint!r} is not known{suggest(self.hint, _HINTS)}")
        if not 0.0 <= self.sparse_rate <= 1.0:
            raise LoweringError(f"sparse_rate={self.sparse_rate} is not in [0, 1]; it is a share of zeros")
        if self.dynamic_group < 0:
            raise LoweringError(f"dynamic_group={self.dynamic_group} is negative; 0 turns it off, 32 is OpenVINO's own")

    @classmethod
    def capabilities(cls) -> Mapping[str, Support]:
        """OpenVINO's CPU plugin: integers of 8 bits are multiplied as integers, those of 4 bits are unpacked in the kernel.

        What ``annotate-quant{preset=openvino}`` plans runs on integers as a whole, attention too: its products want symmetric
        inputs, which the preset gives them, and ``expand-attention`` before it. Zeros are skipped by no kernel; packed weights are
        for CPUs with AMX (``sparse_rate``). float16 is computed in float32. bfloat16 is refused as a format of the Program,
        because the way through ONNX keeps no constants in it; ``precision`` has it for float32 Programs.
        """
        return {
            "unstructured": Support.STORED,
            "NxM": Support.STORED,
            "N:M": Support.STORED,
            "channel": Support.STORED,
            "fp32": Support.EXPLOITED,
            "fp16": Support.STORED,
            "bf16": Support.REFUSED,
            "int8": Support.EXPLOITED,
            "uint8": Support.EXPLOITED,
            "int4": Support.EXPLOITED,
            "uint4": Support.EXPLOITED,
            "int8 per group": Support.EXPLOITED,
            "int4 per group": Support.EXPLOITED,
            "dynamic uint8": Support.STORED,
        }

    def tolerance(self) -> float | None:
        """5e-2 where floats are computed in 16 bits or inputs are quantized by OpenVINO, 5e-3 where floats are stored in float16."""
        if self.dynamic_group:
            return 5e-2
        return _PRECISIONS[self.precision] or (5e-3 if self.half else None)

    def lower(self, program: Program, folder: Path) -> Lowered:
        """Write ``model.xml`` and ``model.bin``."""
        runtime = self._runtime()
        copied = inference_copy(program, quantized=True)
        if self.dynamic_group:
            _leave_to_runtime(copied)
        exported = export_model(copied, _OPSET)
        draft = Draft(surgeon().import_onnx(exported))
        counts = run_passes(draft)
        outputs = tuple(item.name for item in draft.graph.outputs)
        written = finish(draft)
        written.ir_version = exported.ir_version
        with tempfile.TemporaryDirectory(prefix="graphprune-") as scratch:
            model = self._convert(written, Path(scratch), copied)
            name_nodes(model)
            write_interface(model, copied.interface.names, outputs)
            try:
                runtime.save_model(model, str(folder / _MODEL), compress_to_fp16=self.half)
            except RuntimeError as error:
                raise LoweringError(
                    f"cannot write {folder / _MODEL}: {_first_line(error)}; free some space or choose another folder"
                ) from error
            del model  # it reads weights from the scratch folder
        coverage = self._coverage(folder, weight_names(copied))
        return Lowered((_MODEL, _WEIGHTS), copied.interface.names, outputs, coverage, counts)

    def open(self, folder: Path, threads: int | None = None) -> Run:
        """Compile ``model.xml`` for the CPU."""
        model = self._read(folder)
        wanted, outputs = read_interface(model)
        compiled = self._compile(model, threads)
        types = [item.get_element_type().to_dtype() for item in compiled.inputs]
        request = compiled.create_infer_request()

        def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            missing = [name for name in wanted if name not in inputs]
            if missing:
                raise LoweringError(f"input {missing[0]!r} is missing; {_MODEL} takes {', '.join(wanted)}")
            given = [np.ascontiguousarray(inputs[name], kind) for name, kind in zip(wanted, types, strict=True)]
            try:
                results = request.infer(given, share_inputs=True)
            except RuntimeError as error:
                raise LoweringError(f"{folder / _MODEL} does not run: {_first_line(error)}") from error
            return {name: np.array(results[index]) for index, name in enumerate(outputs)}

        return run

    def weights(self, folder: Path, layouts: Mapping[str, str]) -> dict[str, StoredWeight]:
        """Read constants by site name; integers with what the model subtracts from them and multiplies them by."""
        return stored_weights(self._read(folder), layouts)

    def _runtime(self) -> Any:
        """The package ``openvino``, kept from reporting its import over the network, which it does by default."""
        for name in ("onnx", "onnxscript", "onnx_graphsurgeon"):
            self.library(name)
        reporting = "openvino_telemetry"
        silent = "openvino" not in sys.modules and reporting not in sys.modules
        if silent:
            sys.modules[reporting] = None  # type: ignore[assignment]
        try:
            return self.library("openvino")
        finally:
            if silent:
                del sys.modules[reporting]

    def _convert(self, written: Any, scratch: Path, program: Program) -> Any:
        """OpenVINO's model of an ONNX model; the scratch folder has to stay until it is written."""
        import onnx

        path = scratch / "model.onnx"
        large = sum(len(item.raw_data) for item in written.graph.initializer) > _LARGE
        onnx.save_model(written, path, save_as_external_data=large, location="model.data", size_threshold=1024)
        try:
            return self._runtime().Core().read_model(str(path))
        except RuntimeError as error:
            raise LoweringError(_explain(program, written, str(error))) from error

    def _read(self, folder: Path) -> Any:
        runtime = self._runtime()
        path = folder / _MODEL
        for item in (path, folder / _WEIGHTS):
            if not item.exists():
                raise LoweringError(f"{folder} holds no {item.name}; lower a Program into it first")
        try:
            return runtime.Core().read_model(str(path))
        except RuntimeError as error:
            raise LoweringError(f"cannot read {path}: {_first_line(error)}; lower the Program again") from error

    def _compile(self, model: Any, threads: int | None) -> Any:
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "PERFORMANCE_HINT": self.hint.upper(),
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self.dynamic_group,
        }
        if self.sparse_rate:
            options["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = self.sparse_rate
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            return self._runtime().Core().compile_model(model, "CPU", options)
        except RuntimeError as error:
            raise LoweringError(f"OpenVINO cannot compile {_MODEL} for the CPU: {_first_line(error)}") from error

    def _coverage(self, folder: Path, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        model = self._read(folder)
        return stored_formats(model, names) | kernels(model, self._compile(model, 1), names)


def _leave_to_runtime(program: Program) -> None:
    """Take out quantizers whose range is found at run time: OpenVINO puts its own there."""
    for node in program.calls(ops.dynamic_fake_quantize):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        program.graph.erase_node(node)
    program.recompile()


def _explain(program: Program, model: Any, message: str) -> str:
    """Say which operator OpenVINO cannot read, and where in the source it comes from."""
    kinds = {node.op_type for node in model.graph.node}
    found = [kind for kind in sorted(kinds) if re.search(rf"\b{kind}\b", message)]
    written = {
        name
        for item in model.graph.node
        if item.op_type in found
        for name in (*item.output, item.name.removeprefix("node_"))
    }
    for node in program.graph.nodes:
        if node.op == "call_function" and (node.name in written or _spelled(node) & {kind.lower() for kind in found}):
            return (
                f"{program.name}: OpenVINO has no form for {origin(node)}, in ONNX {', '.join(found)}; rewrite it in the model, "
                f"or choose another target (graphprune targets)"
            )
    what = f"the ONNX operators {', '.join(found)}" if found else _first_line(message)
    return f"{program.name} cannot be read by OpenVINO: {what}; rewrite the model, or choose another target"


def _spelled(node: torch.fx.Node) -> set[str]:
    """The words of an operator's name: ``aten._linalg_det.default`` has ``linalg`` and ``det``."""
    return set(re.split(r"[._]", str(node.target).lower()))


def _first_line(error: object) -> str:
    """The first line of OpenVINO's message that tells something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '", "FrontEnd API"))]
    return (telling or lines or ["it gives no reason"])[0]
