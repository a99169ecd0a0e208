"""From a Program to an ONNX model through ``torch.export`` and ``torch.onnx``, before graphprune's own ONNX passes.

Fake-quantization becomes QuantizeLinear and DequantizeLinear; attention and GELU are written in the plain form that
onnxruntime fuses.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphprune.errors import LoweringError
from graphprune.ir import ops
from graphprune.ir.interface import is_label
from graphprune.ir.program import Program
from graphprune.pipeline.quiet import quiet
from graphprune.targets.onnx_model.origins import explain, origins_of, write_origins
from graphprune.targets.onnx_model.parts import embed, take_apart

if TYPE_CHECKING:
    import numpy as np
    import onnx

aten = torch.ops.aten

_LOGGERS = ("torch.export", "torch._export", "torch.onnx", "onnxscript", "onnx_ir")
_RULES = (  # of onnxscript; none changes or drops a weight, as its fusions of batch norm and of zero biases do
    "add_0", "sub_0", "mul_by_1", "div_by_1", "no_op_cast", "no_op_expand", "no_op_transpose", "cast_cast",
    "transpose_transpose", "reshape_reshape", "unsqueeze_unsqueeze", "squeeze_reshape_1d", "slice_split",
    "collapse_slice", "collapse_slice2", "materialize_reshape_shape", "cast_constant_of_shape",
    "cast_constant_of_shape_without_value",
)  # fmt: skip
_SIZES = {"batch": 2, "other": 8}

WHOLE = {(0, 255): "UINT8", (-128, 127): "INT8", (-127, 127): "INT8"}
"""ONNX types that QuantizeLinear has in every opset, by range.

A symmetric activation that is further below its range than half a step becomes -128, not -127.
"""
QUANTIZED = {
    **WHOLE, (0, 127): "UINT8", (-64, 63): "INT8", (-64, 64): "INT8", (0, 15): "UINT4", (-8, 7): "INT4", (-7, 7): "INT4",
}  # fmt: skip
"""ONNX integer types by range."""


def inference_copy(program: Program, quantized: bool) -> Program:
    """A copy in eval mode without the loss, and without quantizers where ``quantized`` is False.

    Its parameters and buffers are those of the Program, so that large weights are not held twice.

    Raises:
        LoweringError: A mask or an observer is left, because the passes of ``Onnx.legalize`` did not run.
    """
    shared: dict[int, Any] = {id(item): item for item in (*program.parameters(), *program.buffers())}
    program = copy.deepcopy(program, shared).eval()
    labels = frozenset(name for name in program.interface.names if is_label(name))
    if labels:
        program.drop_inputs(labels)
    for node in program.calls(ops.mask, ops.observe, ops.gate):
        raise LoweringError(f"{node.target} is left in the graph at {node.name}; run fold-masks and freeze-quant first")
    for node in program.calls(ops.fake_quantize, ops.dynamic_fake_quantize):
        if not quantized:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            program.graph.erase_node(node)
        elif node.target is ops.fake_quantize and node.args[3:5] not in QUANTIZED:
            raise LoweringError(
                f"{node.name} quantizes to {node.args[3]} to {node.args[4]}; ONNX has {sorted(QUANTIZED)}"
            )
    program.graph.eliminate_dead_code()
    program.recompile()
    return program


def export_model(program: Program, opset: int) -> onnx.ModelProto:
    """Export an inference copy, its weights in the model; see ``export_parts``."""
    model, arrays = export_parts(program, opset)
    embed(model, arrays)
    return model


def export_parts(program: Program, opset: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Export an inference copy.

    Args:
        program: From ``inference_copy``.
        opset: ONNX operator set version, 18 or newer.

    Returns:
        The model with parameters under their own names, untransposed; inputs, outputs and sizes are named for the user. And the
        contents of its initializers by the location that each gives: read-only, the Program's own memory where they are its weights.

    Raises:
        LoweringError: ``torch.onnx`` has no translation for some operator, or none in this opset; names the operator, its module and
            source line.
    """
    translations = importlib.import_module("graphprune.targets.onnx_model.operators").TRANSLATIONS
    with torch.no_grad(), quiet(*_LOGGERS):
        try:
            exported = torch.export.export(
                program, example_inputs(program), dynamic_shapes=_dynamic_shapes(program), strict=False
            )
            _make_views_reshapes(exported.graph_module)
            exporting: Any = torch.onnx.export
            written = exporting(
                exported,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                custom_translation_table=dict(translations),
            )
            model, arrays = _optimize(written.model)
        except Exception as error:  # the exporters raise whatever their stages raise
            raise LoweringError(explain(program, error)) from error
    found = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    if found != opset:
        raise LoweringError(f"{program.name} has no form in ONNX opset {opset}, only in {found}; set opset={found}")
    _name_tied_weights(model, program)
    name_interface(model, program)
    return model, arrays


def example_inputs(program: Program) -> tuple[Tensor, ...]:
    """Tensors to export with: fixed sizes as traced, 2 for a dynamic first dimension, 8 for others."""
    tensors = []
    for item in program.interface.inputs:
        shape = [
            size if isinstance(size, int) else _SIZES["batch" if dim == 0 else "other"]
            for dim, size in enumerate(item.shape)
        ]
        tensors.append(torch.ones(shape, dtype=item.dtype))
    return tuple(tensors)


def output_names(program: Program) -> tuple[str, ...]:
    """Names of the outputs that exist, by their keys in the source's output object, such as ``logits``."""
    leaves = program.output.args[0]
    assert isinstance(leaves, (tuple, list))
    return tuple(name for name, leaf in zip(program.interface.output_names, leaves, strict=True) if leaf is not None)


def size_names(program: Program) -> dict[tuple[str, int], str]:
    """Readable names of dynamic sizes by input and dimension: ``batch`` first, ``sequence`` for tokens."""
    by_letter: dict[str, str] = {}
    found = {}
    for item in program.interface.inputs:
        for dim, letter in enumerate(item.shape):
            if isinstance(letter, int):
                continue
            stem = "sequence" if dim == 1 and not item.dtype.is_floating_point else f"{item.name}_dim{dim}"
            if stem == "sequence" and stem in by_letter.values() and letter not in by_letter:
                stem = f"{item.name.partition('_')[0]}_sequence"
            name = "batch" if dim == 0 else by_letter.setdefault(letter, stem)
            found[item.name, dim] = name
    return found


def name_interface(model: onnx.ModelProto, program: Program) -> None:
    """Name inputs, outputs and dynamic sizes of an exported model."""
    graph = model.graph
    names = dict(zip((item.name for item in graph.input), program.interface.names, strict=True))
    outputs = output_names(program)
    if len(outputs) != len(graph.output):
        raise LoweringError(f"{program.name} has {len(outputs)} outputs and its ONNX model {len(graph.output)}")
    sizes = size_names(program)
    symbols: dict[str, str] = {}
    for item in graph.input:
        for dim, size in enumerate(item.type.tensor_type.shape.dim):
            if size.dim_param:
                symbols.setdefault(size.dim_param, sizes.get((names[item.name], dim), size.dim_param))
    for item in (*graph.input, *graph.output, *graph.value_info):
        for size in item.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\w+", lambda match: symbols.get(match[0], match[0]), size.dim_param)
    _rename_values(graph, names)
    produced = {name for node in graph.node for name in node.output}
    for item, name in zip(graph.output, outputs, strict=True):
        if item.name not in produced or list(graph.output).count(item) > 1:
            graph.node.add(op_type="Identity", input=[item.name], output=[name])
            item.name = name
        else:
            _rename_values(graph, {item.name: name})
    graph.name = program.name


def _name_tied_weights(model: onnx.ModelProto, program: Program) -> None:
    """Store a weight that goes by several names once, under the first, which is its site's name."""
    first: dict[int, str] = {}
    names = {
        name: first.setdefault(id(value), name) for name, value in program.named_parameters(remove_duplicate=False)
    }
    present: set[str] = set()
    for item in list(model.graph.initializer):
        if names.get(item.name, item.name) in present:
            model.graph.initializer.remove(item)
        else:
            item.name = names.get(item.name, item.name)
            present.add(item.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def _rename_values(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    taken = {name for node in graph.node for name in node.output} | {item.name for item in graph.initializer}
    moved = {name: f"{name}__inner" for name in names.values() if name in taken and name not in names}
    names = {**names, **moved}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    values: tuple[Any, ...] = (*graph.input, *graph.output, *graph.initializer, *graph.value_info)
    for item in values:
        item.name = names.get(item.name, item.name)


def _dynamic_shapes(program: Program) -> tuple[dict[int, object], ...]:
    auto = torch.export.Dim.AUTO  # sizes of one name become one size again by the guards that made them one
    return tuple(
        {dim: auto for dim, size in enumerate(item.shape) if not isinstance(size, int)}
        for item in program.interface.inputs
    )


def _make_views_reshapes(module: torch.fx.GraphModule) -> None:
    """Let ``view`` copy where it must.

    Before: ``view(transpose(attention(...)))``.  After: ``reshape(...)``.  Export has turned the model's ``reshape``
    into ``view`` because of the strides that attention returned; its decomposition, which T5 gets, returns others.
    """
    for node in module.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
    module.recompile()


def _optimize(model: Any) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Fold constants and sizes, keep parameters whole and apart."""
    import onnxscript.optimizer
    import onnxscript.rewriter

    common: Any = importlib.import_module("onnx_ir.passes.common")
    known: Any = importlib.import_module("onnxscript.rewriter.rules.common")
    rules = [getattr(known, f"{name}_rule") for name in _RULES]
    common.InlinePass()(model)
    parameters = frozenset(model.graph.initializers)
    kept = {name for name, value in model.graph.initializers.items() if len(value.shape or ()) >= 1}
    weights = {name for name, value in model.graph.initializers.items() if len(value.shape or ()) >= 2}

    def should_fold(node: Any) -> bool | None:
        parameter = any(item is not None and item.name in kept for item in node.inputs)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return False
        if node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].name in weights:
            return False  # a pass folds it and keeps the name
        return False if parameter and node.op_type != "Cast" else None  # zero-points are cast to their type

    for _ in range(2):
        onnxscript.optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=should_fold)
        onnxscript.rewriter.rewrite(model, rules)
        common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _merge_constants(model, parameters)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)
    places = origins_of(model)
    common.ClearMetadataAndDocStringPass()(model)
    proto, arrays = take_apart(model)
    write_origins(proto, places)
    return proto, arrays


def _merge_constants(model: Any, parameters: frozenset[str]) -> None:
    """Give equal constants of the exporter one initializer, so that equal nodes meet; parameters stay apart."""
    first: dict[tuple[object, ...], Any] = {}
    for name, value in list(model.graph.initializers.items()):
        if name in parameters or value.const_value is None:
            continue
        array = value.const_value.numpy()
        known = first.setdefault((str(array.dtype), array.shape, array.tobytes()), value)
        if known is not value and not value.is_graph_output():
            value.replace_all_uses_with(known)
            del model.graph.initializers[name]
