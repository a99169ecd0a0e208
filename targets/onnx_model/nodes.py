"""Compare a written ONNX model with the Program inside: which value is where, and what each node makes of given inputs.

The exporter's graph is searched once, before any pass rewrites it, while every operator still has the shape that ``torch.onnx``
gives it; passes keep values as objects, and what is left of them in the end is written into the model's metadata.  The
model is cut there: a new input takes the place of the value for its users, and the value itself becomes an output.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from graphprune.errors import LoweringError
from graphprune.ir.program import Program
from graphprune.ir.quantizable import Quantizable, find_quantizable
from graphprune.pipeline.target import NodeValue
from graphprune.targets.onnx_model.draft import is_constant

if TYPE_CHECKING:
    import onnx

NODES = "graphprune.nodes"
"""Metadata key of the model: JSON object, keys of the Program's values (see ``Target.nodes``) to names of values in the file."""
_RECORDED = "recorded:"
_CARRIERS = ("QuantizeLinear", "DequantizeLinear", "FakeQuantize", "Transpose", "Cast", "Identity")
"""Operators between a weight and the one that uses it."""
_MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool")
"""Operators that keep integers and their scale."""
_OPERATORS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather")
_TARGET = {"QuantizeLinear": 1, "QLinearConv": 6, "QLinearMatMul": 6}
"""Position of the scale by which an operator quantizes its result; the zero-point comes next."""


def track_values(graph: Any, program: Program) -> dict[str, Any]:
    """Find the values of a Program in the graph that ``torch.onnx`` made of it.

    Args:
        graph: An ``onnx_graphsurgeon.Graph`` that no pass has rewritten yet; it is left as it is.
        program: The Program that was exported.

    Returns:
        Values by key. What cannot be told for certain is left out: an operator whose weight or bias is not found under its
        name, a weight that two operators of a kind use, a scale by which two values are quantized.
    """
    found: dict[str, list[Any]] = {}
    for node in graph.nodes:
        if node.op == "QuantizeLinear" and not is_constant(node.inputs[0]) and node.inputs[1].name.endswith("_scale"):
            found.setdefault(f"integers:{node.inputs[1].name.removesuffix('_scale')}", []).append(node.outputs[0])
    weights = {value.name: value for value in graph.tensors().values() if not value.inputs}
    for item in find_quantizable(program):
        weight = weights.get(item.name)
        if item.weight is None or weight is None:
            continue
        users = [node for node in _users(weight) if (node.op == "Gather") == (item.kind == "embedding")]
        result = _result(users[0], item) if len(users) == 1 else None
        found.setdefault(f"{item.kind}:{item.name}", []).append(result)
        dynamic = _dynamic_input(users[0]) if len(users) == 1 else None
        if dynamic is not None and dynamic.inputs:
            found.setdefault(f"range:{item.name}", []).append(dynamic)
    return {key: values[0] for key, values in found.items() if len(values) == 1 and values[0] is not None}


def write_names(model: onnx.ModelProto, tracked: Mapping[str, Any]) -> None:
    """Write into a model's metadata which of the tracked values it has; call it when no pass runs any more."""
    made = {name for node in model.graph.node for name in node.output}
    names = {key: value.name for key, value in tracked.items() if value.inputs and value.name in made}
    model.metadata_props.add(key=NODES, value=json.dumps(names))


def read_names(path: Path) -> dict[str, str]:
    """Read what ``write_names`` wrote; empty for a model without it.

    Raises:
        LoweringError: The file cannot be read.
    """
    return _names(_load(path))


def run_nodes(
    path: Path, inputs: Mapping[str, np.ndarray], recorded: Mapping[str, np.ndarray]
) -> tuple[dict[str, NodeValue], dict[str, np.ndarray]]:
    """See ``Target.run_nodes``.

    Raises:
        LoweringError: The file cannot be read, or onnxruntime cannot run the model once it is cut.
    """
    model = _load(path)
    outputs = [item.name for item in model.graph.output]
    names = _names(model)
    names = {key: name for key, name in names.items() if key in recorded}
    qparams = {key: _qparams(model, name) for key, name in names.items() if key.startswith("integers:")}
    forced = {names[key]: recorded[key] for key in names}
    cut(model, forced)
    computed = _run(model, path.parent, {**inputs, **{_RECORDED + name: array for name, array in forced.items()}})
    values = {key: NodeValue(computed[name], *qparams.get(key, (None, None))) for key, name in names.items()}
    return values, {name: computed[name] for name in outputs}


def cut(model: onnx.ModelProto, forced: Mapping[str, np.ndarray]) -> None:
    """Cut a model at some values.

    Before: ``made -> value -> users``.  After: ``made -> value``, an output; ``recorded:value``, an input, ``-> users``.
    Integers are where onnxruntime's integer kernels have their borders, so that the same kernels run as in the whole model.

    Args:
        model: Rewritten in place.
        forced: An array of the value's type and rank, by its name.
    """
    import onnx

    graph = model.graph
    for node in graph.node:
        node.input[:] = [_RECORDED + name if name in forced else name for name in node.input]
    present = {item.name for item in graph.output}
    for name, array in forced.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(_RECORDED + name, kind, [None] * array.ndim))
        if name not in present:
            graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))


def _run(model: onnx.ModelProto, folder: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    try:
        content: bytes = model.SerializeToString()  # type: ignore[no-untyped-call]
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        wanted = [item.name for item in session.get_inputs()]
        names = [item.name for item in session.get_outputs()]
        results = session.run(names, {name: np.ascontiguousarray(inputs[name]) for name in wanted})
    except Exception as error:  # onnxruntime has an exception of its own for every reason
        raise LoweringError(f"the model does not run when it is cut at its nodes: {error}") from error
    return dict(zip(names, results, strict=True))


def _load(path: Path) -> onnx.ModelProto:
    import onnx

    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf has exceptions of its own
        raise LoweringError(f"cannot read {path}: {error}; lower the Program again") from error


def _names(model: onnx.ModelProto) -> dict[str, str]:
    text = next((item.value for item in model.metadata_props if item.key == NODES), "{}")
    made = {name for node in model.graph.node for name in node.output}
    try:
        return {key: name for key, name in json.loads(text).items() if name in made}
    except (ValueError, AttributeError, TypeError):
        raise LoweringError(f"the model's metadata {NODES} is damaged; lower the Program again") from None


def _qparams(model: onnx.ModelProto, name: str) -> tuple[float | None, int | None]:
    """Scale and zero-point of the operator that makes integers, seen through those that only move them."""
    from onnx import numpy_helper

    makers = {output: node for node in model.graph.node for output in node.output}
    node = makers[name]
    while node.op_type in _MOVES and node.input[0] in makers:
        node = makers[node.input[0]]
    if node.op_type not in _TARGET:
        return None, None
    at = _TARGET[node.op_type]
    constants = {item.name: item for item in model.graph.initializer}
    scale, zero_point = (constants.get(item) for item in (*node.input[at : at + 2], "")[:2])
    if scale is None or scale.external_data:
        return None, None
    offset = 0 if zero_point is None else numpy_helper.to_array(zero_point).item()
    return float(numpy_helper.to_array(scale).item()), int(offset)


def _users(value: Any) -> Iterator[Any]:
    """The operators that use a weight, conversions passed over."""
    for node in value.outputs:
        if node.op in _CARRIERS and node.inputs[0] is value:
            yield from _users(node.outputs[0])
        elif node.op in _OPERATORS:
            yield node


def _result(node: Any, item: Quantizable) -> Any:
    """The value that stands for an operator's result, its bias added; None where that cannot be told."""
    bias = _bias(item)
    if bias is None or any(_root(value).name == bias for value in node.inputs[2:]):
        return node.outputs[0]
    users = [user for user in node.outputs[0].outputs if user.op == "Add"]
    fits = len(node.outputs[0].outputs) == 1 and users and any(_root(value).name == bias for value in users[0].inputs)
    return users[0].outputs[0] if fits else None


def _bias(item: Quantizable) -> str | None:
    """Name of an operator's bias; None where it has none."""
    if item.kind == "embedding":
        return None
    place = 0 if item.op == "addmm" else 2
    bias = item.node.args[place] if len(item.node.args) > place and item.op != "mm" else None
    return str(bias.target) if isinstance(bias, fx.Node) else None


def _root(value: Any) -> Any:
    while value.inputs and value.inputs[0].op in _CARRIERS:
        value = value.inputs[0].inputs[0]
    return value


def _dynamic_input(node: Any) -> Any:
    """The float that is quantized at run time for an operator; None where there is none."""
    for value in node.inputs[:2]:
        dequantize = value.inputs[0] if value.inputs else None
        if dequantize is not None and dequantize.op == "DequantizeLinear" and dequantize.inputs[0].inputs:
            maker = dequantize.inputs[0].inputs[0]
            if maker.op == "DynamicQuantizeLinear":
                return maker.inputs[0]
    return None
