"""The ONNX target: a model for onnxruntime and whatever else reads ONNX, weights int8 where they were quantized."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphprune.errors import LoweringError
from graphprune.ir.program import Program
from graphprune.ir.sites import find_sites
from graphprune.pipeline.target import Lowered, Run, StoredWeight, Support, Target
from graphprune.targets.onnx_export import export_model, inference_copy
from graphprune.targets.onnx_graph import Draft, run_passes, surgeon
from graphprune.targets.onnx_weights import TRANSPOSED, read_weights

if TYPE_CHECKING:
    import onnx

_MODEL = "model.onnx"
_DATA = "model.onnx.data"
_OPSETS = range(18, 24)  # torch.onnx writes 18 and newer; conversion to older ones leaves operators behind


@dataclass(frozen=True)
class Onnx(Target):
    """Write ONNX, and run it on onnxruntime's CPU provider.

    Attributes:
        opset: ONNX operator set version, 18 to 23.
        int8: Store quantized weights as int8 and compute on integers. False writes a float model: quantizers are left
            out, and weights keep the values of their integer grid.
        external_data_threshold: Bytes of weights above which they go into a file beside the model; at most 2 GB, which
            is what one ONNX file can hold.
    """

    name = "onnx"
    legalize = ("fold-masks", "freeze-quant")
    extra = "onnx"

    opset: int = 18
    int8: bool = True
    external_data_threshold: int = 2_000_000_000

    def __post_init__(self) -> None:
        if self.opset not in _OPSETS:
            raise LoweringError(f"opset={self.opset} is not supported; choose {_OPSETS[0]} to {_OPSETS[-1]}")
        if not 0 <= self.external_data_threshold <= 2_000_000_000:
            raise LoweringError(
                f"external_data_threshold={self.external_data_threshold} is not in [0, 2000000000]: a larger ONNX file "
                f"cannot be written in one piece"
            )

    @classmethod
    def capabilities(cls) -> Mapping[str, Support]:
        """Onnxruntime has integer kernels, and none that skip zeros."""
        return {
            "unstructured": Support.STORED,
            "NxM": Support.STORED,
            "N:M": Support.STORED,
            "channel": Support.STORED,
            "fp32": Support.EXPLOITED,
            "int8": Support.EXPLOITED,
            "int4": Support.IGNORED,
            "bf16": Support.STORED,
        }

    def lower(self, program: Program, folder: Path) -> Lowered:
        """Write ``model.onnx``, and ``model.onnx.data`` where the weights are large."""
        _require()
        copied = inference_copy(program, self.int8)
        model = export_model(copied, self.opset)
        draft = Draft(surgeon().import_onnx(model))
        run_passes(draft)
        outputs = tuple(item.name for item in draft.graph.outputs)
        written = surgeon().export_onnx(draft.graph, do_type_check=False)
        written.ir_version = model.ir_version
        written.producer_name = "graphprune"
        written.metadata_props.add(key=TRANSPOSED, value=json.dumps(sorted(draft.transposed)))
        files = self._write(written, folder)
        coverage = _coverage(copied, written)
        return Lowered(files, copied.interface.names, outputs, coverage)

    def _write(self, model: onnx.ModelProto, folder: Path) -> tuple[str, ...]:
        import onnx

        size = sum(len(item.raw_data) for item in model.graph.initializer)
        path = folder / _MODEL
        try:
            if size > self.external_data_threshold:
                onnx.save_model(model, path, save_as_external_data=True, location=_DATA, size_threshold=1024)
                files: tuple[str, ...] = (_MODEL, _DATA)
            else:
                onnx.save_model(model, path)
                files = (_MODEL,)
            onnx.checker.check_model(str(path))
        except OSError as error:
            raise LoweringError(f"cannot write {path}: {error}; free some space or choose another folder") from error
        except onnx.checker.ValidationError as error:
            raise LoweringError(f"the model written to {path} is not valid ONNX: {error}") from error
        return files

    def open(self, folder: Path, threads: int | None = None) -> Run:
        """Load ``model.onnx`` into onnxruntime's CPU provider."""
        _require()
        onnxruntime: Any = importlib.import_module("onnxruntime")
        path = folder / _MODEL
        if not path.exists():
            raise LoweringError(f"{folder} holds no {_MODEL}; lower a Program into it first")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [item.name for item in session.get_outputs()]
        wanted = [item.name for item in session.get_inputs()]

        def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            missing = [name for name in wanted if name not in inputs]
            if missing:
                raise LoweringError(f"input {missing[0]!r} is missing; {path.name} takes {', '.join(wanted)}")
            results = session.run(names, {name: np.ascontiguousarray(inputs[name]) for name in wanted})
            return dict(zip(names, results, strict=True))

        return run

    def weights(self, folder: Path, layouts: Mapping[str, str]) -> dict[str, StoredWeight]:
        """Read weights by site name; int8 with zero-point and scale."""
        _require()
        return read_weights(folder / _MODEL, layouts)


def _require() -> None:
    for name in ("onnx", "onnxscript", "onnx_graphsurgeon", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise LoweringError(
                f'the ONNX target needs {name}, which is not installed; run: pip install "graphprune[onnx]"'
            ) from error


def _coverage(program: Program, model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    import onnx

    integers = {
        item.name
        for item in model.graph.initializer
        if item.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    }
    sites, _ = find_sites(program)
    names = [site.name for site in sites]
    return {
        "int8": tuple(name for name in names if name in integers),
        "float": tuple(name for name in names if name not in integers),
    }
