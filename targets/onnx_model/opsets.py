"""Write an ONNX model in an older operator set.

``torch.onnx`` writes operator set 18 and newer, and onnx's own converter leaves many operators behind.  Here every node is
held against the schema of the older set: what fits stays, what has a rule in ``opset_rules`` is rewritten, and what is left is an
error that names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from graphprune.errors import LoweringError
from graphprune.targets.onnx_model.opset_rules import RULES, NoForm, Values, attribute, without
from graphprune.targets.onnx_model.origins import read_origins
from graphprune.targets.onnx_model.parts import contents

if TYPE_CHECKING:
    import onnx

OLDEST = 13
"""The oldest operator set that models are written in."""
_SMALL = 1024
"""Entries up to which constants are read; shapes, axes and limits are all smaller."""
_FOUR_BITS = (21, 22)
_NEW_VALUES: Mapping[tuple[str, str], Mapping[bytes, int]] = {
    ("ScatterElements", "reduction"): {b"max": 18, b"min": 18},
    ("ScatterND", "reduction"): {b"max": 18, b"min": 18},
    ("GridSample", "mode"): {b"linear": 20, b"cubic": 20},
    ("Pad", "mode"): {b"wrap": 19},
    ("Resize", "coordinate_transformation_mode"): {b"half_pixel_symmetric": 19},
}
"""Values of attributes that are older than they, with the version that brought them."""
_NEW_DEFAULTS: Mapping[tuple[str, str], tuple[int, bytes]] = {
    ("RoiAlign", "coordinate_transformation_mode"): (16, b"output_half_pixel"),
}
"""Attributes without which an older version does something else than the newer one does by default: what it does."""


def to_opset(
    model: onnx.ModelProto,
    opset: int,
    *,
    arrays: Mapping[str, np.ndarray] | None = None,
    origins: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Write a model in an older operator set.

    Args:
        model: In any newer operator set; it is left as it is. One in two parts (see ``parts``) is not copied with its weights.
        opset: Version to write, 13 or newer, at most the model's.
        arrays: Contents of its initializers, where it is in two parts.
        origins: Where nodes come from (operator, module and source line), by their names, for messages; None takes what
            ``export_model`` wrote into them.

    Returns:
        The model, valid in ``opset``, with the lowest IR version that has it. Weights keep names and values. Exact but for
        normalizations and activations that are written in several operators (some units in the last place).

    Raises:
        LoweringError: An operator has no form there; named with its place and the lowest operator set that has one. Or ``opset`` is not
            an older one.
    """
    import onnx

    current = opset_of(model)
    if not OLDEST <= opset <= current:
        raise LoweringError(f"opset={opset} cannot be made of opset {current}; choose {OLDEST} to {current}")
    places = read_origins(model) if origins is None else origins
    written = onnx.ModelProto()
    written.MergeFrom(model)  # type: ignore[no-untyped-call]
    if model.functions:
        import onnx.inliner

        written = onnx.inliner.inline_local_functions(written)
    if opset < current:
        _rewrite_graph(written.graph, _values_of(written, arrays or {}), (current, opset), places)
        for item in written.opset_import:
            if item.domain in ("", "ai.onnx"):
                item.version = opset
    small = any(item.data_type in _FOUR_BITS for item in written.graph.initializer)
    lowest = int(onnx.helper.find_min_ir_version_for(list(written.opset_import), ignore_unknown=True))
    written.ir_version = max(lowest, 10) if small else lowest
    return written


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the ONNX operator set that a model is in."""
    return next((int(item.version) for item in model.opset_import if item.domain in ("", "ai.onnx")), 1)


def _rewrite_graph(
    graph: onnx.GraphProto, values: Values, versions: tuple[int, int], origins: Mapping[str, str]
) -> None:
    """Rewrite the nodes of a graph and of the graphs inside it."""
    nodes: list[Any] = []
    outside, values.made = values.made, []
    for node in graph.node:
        for inner in _graphs_of(node):
            _rewrite_graph(inner, values, versions, origins)
        if node.domain in ("", "ai.onnx"):
            nodes += _rewrite_node(node, values, versions, origins)
        else:
            nodes.append(node)
    made, values.made = values.made, outside
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    graph.initializer.extend(made)
    used = {name for node in graph.node for name in _names_in(node)} | {item.name for item in graph.output}
    for tensor in list(graph.initializer):
        if tensor.name not in used and tensor.name in values.constants:
            graph.initializer.remove(tensor)  # axes that became an attribute


def _rewrite_node(
    node: onnx.NodeProto, values: Values, versions: tuple[int, int], origins: Mapping[str, str]
) -> list[onnx.NodeProto]:
    current, opset = versions
    try:
        return _written(node, values, current, opset)
    except NoForm as error:
        lowest = current
        for version in range(opset + 1, current):
            try:
                _written(node, values, current, version)
            except NoForm:
                continue
            lowest = version
            break
        place = origins.get(node.name) or _origin(node)
        raise LoweringError(
            f"{node.op_type} in {place} has no form in ONNX opset {opset}: {error}. The lowest opset that has one is {lowest}; set "
            f"opset={lowest}, or rewrite the operator in the model"
        ) from None


def _written(node: onnx.NodeProto, values: Values, current: int, opset: int) -> list[onnx.NodeProto]:
    """The nodes that stand for a node in an operator set.

    Raises:
        NoForm: There are none; says why.
    """
    kept = _keep(node, values, current, opset)
    if isinstance(kept, str):
        since, rule = RULES.get(node.op_type, (0, None))
        if rule is None or opset >= since:
            raise NoForm(kept)
        values.nodes, values.stem, values.opset = [], node.output[0], opset
        before = len(values.made)
        try:
            rule(node, values)
            result: list[onnx.NodeProto] = []
            for item in values.nodes:
                again = _keep(item, values, current, opset)
                if isinstance(again, str):
                    raise NoForm(again)
                result.append(again)
        except NoForm:
            del values.made[before:]
            raise
        return result
    return [kept]


def _keep(node: onnx.NodeProto, values: Values, current: int, opset: int) -> onnx.NodeProto | str:
    """The node as the older operator set has it, default attributes dropped; or why it does not fit there."""
    from onnx import defs, helper

    history = _history(node.op_type, current, opset)
    if history is None:
        return "the operator does not exist there"
    new, old = history
    if new.since_version == old.since_version:
        return node
    dropped = []
    for item in node.attribute:
        value = helper.get_attribute_value(item)
        if _NEW_VALUES.get((node.op_type, item.name), {}).get(value if isinstance(value, bytes) else b"", 0) > opset:
            return f"{item.name}={value.decode()!r} does not exist there"
        if item.name in old.attributes:
            continue
        version, usual = _NEW_DEFAULTS.get((node.op_type, item.name), (0, b""))
        known = item.name in new.attributes and new.attributes[item.name].default_value
        if value != (usual if opset < version else helper.get_attribute_value(known) if known and known.name else None):
            return f"its attribute {item.name} does not exist there"
        dropped.append(item.name)
    for (kind, name), (version, usual) in _NEW_DEFAULTS.items():
        if kind == node.op_type and opset < version and attribute(node, name, None) != usual:
            return f"its attribute {name} does not exist there"
    if len(node.input) > old.max_input and any(node.input[old.max_input :]):
        return f"its input {new.inputs[old.max_input].name} does not exist there"
    if len([name for name in node.input if name]) < old.min_input:
        return f"it needs its input {old.inputs[len(node.input)].name} there"
    if len(node.output) > old.max_output:
        return "it has fewer outputs there"
    for index, name in enumerate(node.input):
        formal = old.inputs[min(index, len(old.inputs) - 1)] if old.inputs else None
        if formal is None or name not in values.types:
            continue
        if not name or _type_text(values.types[name]) in formal.types or formal.option == _variadic(defs, formal):
            continue
        return f"its input {formal.name} is {_type_text(values.types[name])}, which is not supported there"
    return without(node, *dropped) if dropped else node


def _variadic(defs: Any, formal: Any) -> Any:
    """The option of a parameter whose inputs may differ in type, as those of Loop."""
    variadic = defs.OpSchema.FormalParameterOption.Variadic
    return variadic if not formal.is_homogeneous else None


def _history(kind: str, current: int, opset: int) -> tuple[Any, Any] | None:
    from onnx import defs

    try:
        new = defs.get_schema(kind, max_inclusive_version=current)
    except defs.SchemaError:
        return None
    try:
        return new, defs.get_schema(kind, max_inclusive_version=opset)
    except defs.SchemaError:
        return None


def _values_of(model: onnx.ModelProto, arrays: Mapping[str, np.ndarray]) -> Values:
    """Types, shapes and small constants of a model, found without its weights."""
    import onnx
    from onnx import numpy_helper

    values = Values()
    skeleton = onnx.ModelProto(ir_version=model.ir_version)
    skeleton.opset_import.extend(model.opset_import)
    graph = skeleton.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    given = {item.name for item in model.graph.input}
    for item in model.graph.initializer:
        values.names.add(item.name)
        values.types[item.name], values.shapes[item.name] = item.data_type, tuple(item.dims)
        known = contents(item, arrays) if arrays else None
        if (
            int(np.prod(item.dims)) <= _SMALL
            and item.data_type not in _FOUR_BITS
            and (known is not None or not item.external_data)
        ):
            values.constants[item.name] = numpy_helper.to_array(item) if known is None else known
            graph.initializer.append(numpy_helper.from_array(values.constants[item.name], item.name))
        elif item.name not in given:
            graph.input.append(onnx.helper.make_tensor_value_info(item.name, item.data_type, list(item.dims)))
    inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    for value in (*model.graph.value_info, *inferred.input, *inferred.output, *inferred.value_info):
        kind: Any = value.type.tensor_type
        if kind.elem_type:
            values.types[value.name] = kind.elem_type
        if kind.HasField("shape"):
            sizes = (size.dim_value if size.HasField("dim_value") else -1 for size in kind.shape.dim)
            values.shapes[value.name] = tuple(sizes)
    for node in _all_nodes(model.graph):
        values.names |= {*node.input, *node.output, node.name}
        tensor = attribute(node, "value") if node.op_type == "Constant" else None
        if tensor is not None and int(np.prod(tensor.dims)) <= _SMALL:
            values.constants[node.output[0]] = numpy_helper.to_array(tensor)
    return values


def _graphs_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside a node, such as the branches of an If."""
    found: Any
    for found in node.attribute:
        if found.HasField("g"):
            yield found.g
        yield from found.graphs


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for inner in _graphs_of(node):
            yield from _all_nodes(inner)


def _names_in(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those inside its graphs too."""
    yield from node.input
    for graph in _graphs_of(node):
        for inner in _all_nodes(graph):
            yield from inner.input
        yield from (value.name for value in graph.output)


def _type_text(kind: int) -> str:
    """Element type as schemas write it, such as ``tensor(float)``."""
    from onnx import helper

    return f"tensor({helper.tensor_dtype_to_string(kind).rpartition('.')[2].lower()})"


def _origin(node: onnx.NodeProto) -> str:
    """A place for messages, where nothing better is known: the node's name."""
    return f"node {node.name or node.output[0]}"
