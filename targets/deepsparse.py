"""The DeepSparse target: an ONNX model that Neural Magic's sparse CPU engine runs in full, and that engine as its runner."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphprune.errors import LoweringError
from graphprune.ir.program import Program
from graphprune.ir.sites import weight_names
from graphprune.pipeline.remote import interpreter
from graphprune.pipeline.target import Lowered, NodeValue, Run, StoredWeight, Support, Target
from graphprune.targets.deepsparse_model.engine import Engines, Examined, examine
from graphprune.targets.deepsparse_model.passes import write_model
from graphprune.targets.onnx_model.export import example_inputs, inference_copy
from graphprune.targets.onnx_model.nodes import read_names, run_nodes
from graphprune.targets.onnx_model.weights import read_weights, stored_formats

if TYPE_CHECKING:
    import onnx

_MODEL = "model.onnx"
_LIMIT = 2_000_000_000
_PRODUCTS = ("MatMulInteger", "ConvInteger", "QLinearConv")


@dataclass(frozen=True)
class DeepSparse(Target):
    """Write ONNX for DeepSparse 1.8, and run it there.

    The engine and its pins live in an environment of their own, which ``GRAPHPRUNE_DEEPSPARSE_PYTHON`` names; see ``remote``. A model is
    compiled for the sizes of its inputs when it first meets them, which takes seconds.

    Attributes:
        allow_fallback: Write a model of which the engine takes only a part, and leaves the rest to the onnxruntime inside it. The
            default refuses that and names the operators.
    """

    name = "deepsparse"
    legalize = ("fold-masks", "freeze-quant")
    extra = "deepsparse"

    allow_fallback: bool = False

    @classmethod
    def capabilities(cls) -> Mapping[str, Support]:
        """DeepSparse skips zeros wherever they lie, in float32 and in 8 bits.

        It multiplies uint8 or int8 values with one scale by weights of 8 bits with a zero-point in the middle; where a weight meets
        floats, it becomes a float32 weight when the model is loaded. Values quantized at run time stop the engine with an assertion, and
        it knows neither 16-bit floats nor smaller integers nor scales in groups.
        """
        return {
            "unstructured": Support.EXPLOITED,
            "NxM": Support.EXPLOITED,
            "N:M": Support.EXPLOITED,
            "channel": Support.EXPLOITED,
            "fp32": Support.EXPLOITED,
            "fp16": Support.REFUSED,
            "bf16": Support.REFUSED,
            "int8": Support.EXPLOITED,
            "uint8": Support.EXPLOITED,
            "int4": Support.REFUSED,
            "uint4": Support.REFUSED,
            "int8 per group": Support.REFUSED,
            "int4 per group": Support.REFUSED,
            "dynamic uint8": Support.REFUSED,
        }

    def lower(self, program: Program, folder: Path) -> Lowered:
        """Write ``model.onnx`` and let the engine compile it once."""
        python = self._python()
        _require()
        copied = inference_copy(program, quantized=True)
        model, counts = write_model(copied)
        coverage = stored_formats(model, weight_names(copied))
        coverage |= _kernels(model, coverage)
        outputs = tuple(item.name for item in model.graph.output)
        _write(model, folder / _MODEL)
        shapes = {
            name: list(tensor.shape)
            for name, tensor in zip(copied.interface.names, example_inputs(copied), strict=True)
        }
        found = examine(python, folder / _MODEL, shapes)
        if found.fraction < 1.0 and not self.allow_fallback:
            raise LoweringError(_refusal(copied, found))
        coverage["fraction_of_supported_ops"] = (f"{found.fraction:g}",)
        coverage["left to onnxruntime"] = found.left if found.fraction < 1.0 else ()
        return Lowered((_MODEL,), copied.interface.names, outputs, coverage, counts)

    def open(self, folder: Path, threads: int | None = None) -> Run:
        """Load ``model.onnx``; it is compiled for the sizes of the inputs that it gets, once for each."""
        path = folder / _MODEL
        if not path.exists():
            raise LoweringError(f"{folder} holds no {_MODEL}; lower a Program into it first")
        if importlib.util.find_spec("deepsparse") is None:
            raise LoweringError(_MISSING)
        return Engines(path, threads, self.allow_fallback).run

    def weights(self, folder: Path, layouts: Mapping[str, str]) -> dict[str, StoredWeight]:
        """Read weights by site name; integers with zero-point and scale."""
        self.library("onnx")
        return read_weights(folder / _MODEL, layouts)

    def nodes(self, folder: Path) -> frozenset[str]:
        """Read from the model's metadata which values of the Program it has."""
        self.library("onnx")
        return frozenset(read_names(folder / _MODEL))

    def run_nodes(
        self, folder: Path, inputs: Mapping[str, np.ndarray], recorded: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, NodeValue], dict[str, np.ndarray]]:
        """Cut the file at the recorded values and run it on onnxruntime: whether the file is right, whatever the engine makes of it."""
        _require()
        return run_nodes(folder / _MODEL, inputs, recorded)

    def _python(self) -> str:
        """The Python that has the engine."""
        named = interpreter(self.name)
        if named is not None:
            return named
        if importlib.util.find_spec("deepsparse") is None:
            raise LoweringError(_MISSING)
        return sys.executable


_MISSING = (
    "target deepsparse needs DeepSparse 1.8.0, whose pins (numpy<2, onnx<1.15, Python 3.11 or older) are for an environment of their own. "
    "In a checkout, run: export GRAPHPRUNE_DEEPSPARSE_PYTHON=$(python tools/environment.py deepsparse). Without one, run: "
    'python3.11 -m venv deepsparse && deepsparse/bin/pip install "graphprune[deepsparse]" && '
    "export GRAPHPRUNE_DEEPSPARSE_PYTHON=$PWD/deepsparse/bin/python"
)


def _require() -> None:
    for name in ("onnx", "onnxscript", "onnx_graphsurgeon", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise LoweringError(
                f'target deepsparse writes ONNX with {name}, which is not installed; run: pip install "graphprune[onnx]"'
            ) from error


def _write(model: onnx.ModelProto, path: Path) -> None:
    import onnx

    size: int = model.ByteSize()  # type: ignore[no-untyped-call]
    if size > _LIMIT:
        raise LoweringError(
            f"the model has {size} bytes; DeepSparse reads ONNX files of up to {_LIMIT} bytes. Use the target onnx"
        )
    try:
        onnx.save_model(model, path)
        onnx.checker.check_model(str(path))
    except OSError as error:
        raise LoweringError(f"cannot write {path}: {error}; free some space or choose another folder") from error
    except onnx.checker.ValidationError as error:
        raise LoweringError(f"the model written to {path} is not valid ONNX: {error}") from error


def _refusal(program: Program, found: Examined) -> str:
    left = ", ".join(found.left[:5]) + (f" and {len(found.left) - 5} more" if found.left[5:] else "")
    reasons = "; ".join(found.reasons[:5]) or "it does not know these operators"
    return (
        f"DeepSparse takes {found.fraction:.1%} of the operators of {program.name} and leaves {left or 'the rest'} to onnxruntime, which "
        f"is slow ({reasons}). Rewrite them in the model, choose another target, or export with allow_fallback=true"
    )


def _kernels(model: onnx.ModelProto, formats: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Weights that are multiplied as integers and as floats; embeddings are looked up, not multiplied."""
    integer = {name for node in model.graph.node if node.op_type in _PRODUCTS for name in node.input}
    looked_up = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    names = [name for kind in formats.values() for name in kind]
    multiplied = [name for name in names if name in integer or name not in looked_up]
    return {
        "integer kernel": tuple(name for name in multiplied if name in integer),
        "float kernel": tuple(name for name in multiplied if name not in integer),
    }
