"""The ONNX target: a model for onnxruntime and whatever else reads ONNX, weights integers where they were quantized."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphprune.errors import LoweringError, suggest
from graphprune.ir.program import Program
from graphprune.ir.sites import weight_names
from graphprune.pipeline.target import Lowered, NodeValue, Run, StoredWeight, Support, Target
from graphprune.targets.onnx_model.draft import finish_parts, open_draft
from graphprune.targets.onnx_model.export import export_parts, inference_copy
from graphprune.targets.onnx_model.kernels import INTEGER_KERNELS, kernels
from graphprune.targets.onnx_model.nodes import read_names, run_nodes, track_values, write_names
from graphprune.targets.onnx_model.opsets import OLDEST, to_opset
from graphprune.targets.onnx_model.origins import read_origins
from graphprune.targets.onnx_model.parts import PIECE_LIMIT, location_of, write_model
from graphprune.targets.onnx_model.passes import FORMS, run_passes
from graphprune.targets.onnx_model.sparse_weights import store_sparse
from graphprune.targets.onnx_model.weights import PACKED, TRANSPOSED, read_weights, stored_formats

if TYPE_CHECKING:
    import onnx

_MODEL = "model.onnx"
_DATA = "model.onnx.data"
_OPSETS = range(OLDEST, 27)  # onnxruntime 1.31 runs up to 26
_EXPORTED = 18
"""The oldest operator set that torch.onnx writes; older ones are made of it."""


@dataclass(frozen=True)
class Onnx(Target):
    """Write ONNX, and run it on onnxruntime's CPU provider.

    Attributes:
        opset: ONNX operator set version, 13 to 26.
        form: How quantized operators are written. ``qdq``: DequantizeLinear before float operators, which onnxruntime, OpenVINO and
            TensorRT fuse to integer kernels. ``integer``: integer operators, standard ones and onnxruntime's own.
            ``float``: quantizers are left out, and weights keep the values of their integer grid.
        external_data_threshold: Bytes of weights above which they go into a file beside the model; at most 2 GB, which
            is what one ONNX file can hold.
        sparse_storage: Store weights that are mostly zeros as ONNX sparse tensors where that is smaller (float32: from two thirds of
            zeros on). The file gets smaller, nothing gets faster: onnxruntime makes them dense when it loads them.
    """

    name = "onnx"
    legalize = ("fold-masks", "freeze-quant")
    extra = "onnx"

    opset: int = 18
    form: str = "qdq"
    external_data_threshold: int = PIECE_LIMIT
    sparse_storage: bool = False

    def __post_init__(self) -> None:
        if self.opset not in _OPSETS:
            raise LoweringError(f"opset={self.opset} is not supported; choose {_OPSETS[0]} to {_OPSETS[-1]}")
        if self.form not in FORMS:
            raise LoweringError(f"form={self.form!r} is not known{suggest(self.form, FORMS)}")
        if not 0 <= self.external_data_threshold <= PIECE_LIMIT:
            raise LoweringError(
                f"external_data_threshold={self.external_data_threshold} is not in [0, {PIECE_LIMIT}]: a larger ONNX file "
                f"cannot be written in one piece"
            )

    @classmethod
    def capabilities(cls) -> Mapping[str, Support]:
        """Onnxruntime's CPU kernels: integers of 8 and 4 bits are fast, zeros are not skipped.

        float16 is written where the Program computes in it; the CPU provider converts it to float32 and back. It has no kernels
        for bfloat16 but Cast: such weights are stored in 16 bits, and everything is computed in float32.
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
            "int4": Support.EXPLOITED,
            "uint4": Support.EXPLOITED,
            "int8 per group": Support.EXPLOITED,
            "int4 per group": Support.EXPLOITED,
            "dynamic uint8": Support.EXPLOITED,
        }

    def lower(self, program: Program, folder: Path) -> Lowered:
        """Write ``model.onnx``, and ``model.onnx.data`` where the weights are large."""
        self._require()
        copied = inference_copy(program, self.form != "float")
        model, arrays = export_parts(copied, max(self.opset, _EXPORTED))
        origins = read_origins(model)
        draft = open_draft(model, arrays)
        tracked = track_values(draft.graph, copied)
        counts = run_passes(draft, self.form)
        outputs = tuple(item.name for item in draft.graph.outputs)
        written, arrays = finish_parts(draft)
        written.ir_version = model.ir_version
        if self.opset != _EXPORTED:
            written = to_opset(written, self.opset, arrays=arrays, origins=origins)
        written.producer_name = "graphprune"
        written.metadata_props.add(key=TRANSPOSED, value=json.dumps(sorted(draft.transposed)))
        written.metadata_props.add(key=PACKED, value=json.dumps(draft.packed, sort_keys=True))
        write_names(written, tracked)
        coverage = stored_formats(written, weight_names(copied))
        sparse = store_sparse(written, arrays) if self.sparse_storage else ()
        files = self._write(written, arrays, folder)
        del draft, tracked, written, arrays  # weights that passes made, before onnxruntime makes its own
        coverage |= _kernels(folder / _MODEL, coverage)
        if self.sparse_storage:
            coverage["sparse tensor"] = sparse
        return Lowered(files, copied.interface.names, outputs, coverage, counts)

    def _write(self, model: onnx.ModelProto, arrays: dict[str, np.ndarray], folder: Path) -> tuple[str, ...]:
        import onnx

        size = sum(arrays[str(location_of(item))].nbytes for item in model.graph.initializer if location_of(item))
        path = folder / _MODEL
        try:
            files = write_model(model, arrays, folder, (_MODEL, _DATA), beside=size > self.external_data_threshold)
            onnx.checker.check_model(str(path))
        except OSError as error:
            raise LoweringError(f"cannot write {path}: {error}; free some space or choose another folder") from error
        except onnx.checker.ValidationError as error:
            raise LoweringError(f"the model written to {path} is not valid ONNX: {error}") from error
        return files

    def _require(self) -> None:
        for name in ("onnx", "onnxscript", "onnx_graphsurgeon", "onnxruntime"):
            self.library(name)

    def open(self, folder: Path, threads: int | None = None) -> Run:
        """Load ``model.onnx`` into onnxruntime's CPU provider."""
        self._require()
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
        self._require()
        return read_weights(folder / _MODEL, layouts)

    def nodes(self, folder: Path) -> frozenset[str]:
        """Read from the model's metadata which values of the Program it has."""
        self._require()
        return frozenset(read_names(folder / _MODEL))

    def run_nodes(
        self, folder: Path, inputs: Mapping[str, np.ndarray], recorded: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, NodeValue], dict[str, np.ndarray]]:
        """Cut the model at the recorded values and run it on onnxruntime's CPU provider."""
        self._require()
        return run_nodes(folder / _MODEL, inputs, recorded)


def _kernels(path: Path, formats: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Weights that onnxruntime multiplies as integers and as floats; embeddings are looked up, not multiplied."""
    found = kernels(path)
    names = [name for kind in formats.values() for name in kind]
    multiplied = [name for name in names if not found.get(name, "").startswith("Gather")]
    return {
        "integer kernel": tuple(name for name in multiplied if found.get(name) in INTEGER_KERNELS),
        "float kernel": tuple(name for name in multiplied if found.get(name) not in INTEGER_KERNELS),
    }
