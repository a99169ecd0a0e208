"""Which kernel of onnxruntime each weight of a model ends in."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphprune.errors import LoweringError

INTEGER_KERNELS = frozenset({
    "ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "QGemm", "QLinearConv",
    "QLinearMatMul", "QAttention",
})  # fmt: skip
"""Operators of onnxruntime that multiply integers."""
_PASSED = ("DequantizeLinear", "QuantizeLinear", "Transpose", "Reshape", "Cast", "Identity", "Mul", "Sub")
_SUFFIXES = ("_moved", "_T", "_transposed")


def kernels(path: Path) -> dict[str, str]:
    """Load a model into onnxruntime and read off its optimized graph where each weight goes.

    Args:
        path: An ONNX model, its external data beside it.

    Returns:
        Operator type by name of the initializer, for initializers of two or more dimensions. A weight that several operators use
        has the one that tells most: a float kernel before an integer kernel before a look-up. Conversions between a weight and its
        operator are passed over.

    Raises:
        LoweringError: Onnxruntime cannot load the model.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    names = {item.name for item in graph.initializer if len(item.dims) > 1}
    names |= {item.values.name for item in graph.sparse_initializer}
    del graph
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        optimized = _optimize(path, Path(folder))
    users: dict[str, list[Any]] = {}
    for node in optimized.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    found: dict[str, str] = {}
    present = [item.name for item in optimized.graph.initializer]
    present += [item.values.name for item in optimized.graph.sparse_initializer]
    for name in present:
        source = _source(name, names)
        if source is None:
            continue
        for kind in _ends(name, users):
            if source not in found or _weight(kind) > _weight(found[source]):
                found[source] = kind
    return found


def _weight(kind: str) -> int:
    return 0 if kind.startswith("Gather") else 1 if kind in INTEGER_KERNELS else 2


def _optimize(path: Path, folder: Path) -> Any:
    """The graph after onnxruntime's fusions, before those that change layouts; weights lie beside it and are not read."""
    import onnx

    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has an exception of its own for every reason
        raise LoweringError(f"onnxruntime cannot load {path.name}: {error}") from error
    return onnx.load(str(folder / "optimized.onnx"), load_external_data=False)


def _source(name: str, names: set[str]) -> str | None:
    """The initializer of the file that one of the optimized graph comes from."""
    while name not in names:
        suffix = next((item for item in _SUFFIXES if name.endswith(item)), None)
        if suffix is None:
            return None
        name = name.removesuffix(suffix)
    return name


def _ends(name: str, users: Mapping[str, list[Any]]) -> list[str]:
    """Operators behind a value, conversions passed over."""
    kinds = []
    for node in users.get(name, []):
        if node.op_type in _PASSED and node.output and users.get(node.output[0]):
            kinds += _ends(node.output[0], users)
        else:
            kinds.append(node.op_type)
    return kinds
