"""Bring an exported graph into normal form, one named rewrite after the other.

After them the graph follows its inputs to any device and its weights to any float dtype, follows the Program's mode, holds
no assertion on metadata, takes sizes from the first input that has them, and is flat.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_ASSERTIONS = {
    "aten._assert_tensor_metadata.default",
    "aten._assert_scalar.default",
    "aten._assert_async.msg",
    "aten.sym_constrain_range_for_size.default",
    "aten.sym_constrain_range.default",
}
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}  # operator: arguments before its submodule
_TO_WITHOUT_DEVICE = ("aten.to.device", "aten.to.dtype_layout", "aten.to.prim_Device", "aten._to_copy.default")
_DTYPE_OF_RESULT = (
    "aten.softmax.int",
    "aten.sum.dim_IntList",
    "aten.mean.dim",
    "aten.log_softmax.int",
    "aten.cumsum.default",
)


def normalize(module: fx.GraphModule, inputs: Iterable[str], dtype: torch.dtype) -> fx.Graph:
    """Rewrite the graph of an exported module, in place, into normal form.

    Args:
        module: What ``ExportedProgram.module()`` returned.
        inputs: Names of the tensor inputs, those that sizes should be taken from first.
        dtype: Float dtype of the model's weights.

    Returns:
        The module's graph. Its output is a flat tuple.
    """
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    drop_assertions(graph)
    inline_regions(module)
    drop_assertions(graph)
    order_inputs(graph, tuple(inputs))
    take_sizes_from_first_input(graph)
    follow_device(graph)
    follow_dtype(graph, dtype)
    module.__dict__["batch_statistics"] = True  # as a Program has it
    follow_mode(graph)
    output = graph.output_node()
    output.args = (tuple(output.args[0]) if isinstance(output.args[0], (tuple, list)) else (output.args[0],),)
    graph.eliminate_dead_code()
    return graph


def drop_assertions(graph: fx.Graph) -> None:
    """Remove guards and metadata assertions; the Program's interface checks its inputs itself."""
    for node in reversed(list(graph.nodes)):
        guard = node.op == "call_module" and node.target == "_guards_fn"
        if guard or (node.op == "call_function" and str(node.target) in _ASSERTIONS):
            graph.erase_node(node)


def inline_regions(module: fx.GraphModule) -> None:
    """Inline the submodules of no-grad and autocast regions; results of a no-grad region are detached."""
    graph = module.graph
    for node in list(graph.nodes):
        leading = _REGIONS.get(getattr(node.target, "__name__", "")) if node.op == "call_function" else None
        if leading is None:
            continue
        region = module.get_submodule(node.args[leading].target)
        if not isinstance(region, fx.GraphModule):
            continue
        inline_regions(region)
        names = [item for item in region.graph.nodes if item.op == "placeholder"]
        copied: dict[fx.Node, fx.Node] = dict(zip(names, node.args[leading + 1 :], strict=True))
        with graph.inserting_before(node):
            for item in region.graph.nodes:
                if item.op not in ("placeholder", "output"):
                    copied[item] = graph.node_copy(item, copied.__getitem__)
            detach = leading == 1 and node.args[0] is False
            returned = cast(tuple[fx.Node, ...], region.graph.output_node().args[0])
            results = [_region_result(graph, copied[item], detach) for item in returned]
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        submodule = node.args[leading]
        graph.erase_node(node)
        if not submodule.users:
            graph.erase_node(submodule)


def _region_result(graph: fx.Graph, value: fx.Node, detach: bool) -> fx.Node:
    if not detach or not isinstance(value.meta.get("val"), Tensor) or not value.meta["val"].requires_grad:
        return value
    node = graph.call_function(aten.detach.default, (value,))
    node.meta = dict(value.meta)
    return node


def order_inputs(graph: fx.Graph, names: tuple[str, ...]) -> None:
    """Put placeholders, in the order of ``names``, and then all attributes before every other node."""
    found = {node.target: node for node in graph.nodes if node.op == "placeholder"}
    for node in reversed([node for node in graph.nodes if node.op == "get_attr"]):
        graph._root.append(node)
    for name in reversed(names):
        if name in found:
            graph._root.append(found[name])


def take_sizes_from_first_input(graph: fx.Graph) -> None:
    """Read every dynamic size from the first input that has it, so that leaving a later input out loses no size."""
    first: dict[str, tuple[fx.Node, int]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            for dim, size in enumerate(node.meta["val"].shape):
                if not isinstance(size, int):
                    first.setdefault(str(size), (node, dim))
    made: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten.sym_size.int:
            key = str(node.meta.get("val"))
            if key in made:
                node.replace_all_uses_with(made[key])
                graph.erase_node(node)
            elif key in first:
                node.args = first[key]
                made[key] = node


def follow_device(graph: fx.Graph) -> None:
    """Make factories create on the first input's device, and drop device changes, so that ``Program.to`` moves all."""
    anchor = next((node for node in graph.nodes if node.op == "placeholder"), None)
    if anchor is None:
        return
    device: fx.Node | None = None
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if str(node.target) in _TO_WITHOUT_DEVICE:
            _drop_device_change(graph, node)
        elif isinstance(node.kwargs.get("device"), torch.device):
            if str(node.target).split(".")[1].startswith("new_") or str(node.target).split(".")[1].endswith("_like"):
                node.kwargs = {key: value for key, value in node.kwargs.items() if key != "device"}
                continue
            if device is None:
                with graph.inserting_before(_first_after_attributes(graph)):
                    device = graph.call_function(getattr, (anchor, "device"))
            node.kwargs = {**node.kwargs, "device": device}


def _drop_device_change(graph: fx.Graph, node: fx.Node) -> None:
    source, wanted = node.args[0], node.meta["val"].dtype
    if isinstance(source, fx.Node) and source.meta["val"].dtype == wanted:
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    else:
        node.target, node.args, node.kwargs = aten.to.dtype, (source, wanted), {}


def follow_dtype(graph: fx.Graph, dtype: torch.dtype) -> None:
    """Make the graph follow the weights' float dtype, so that ``Program.to(dtype)`` computes in it.

    Casts to the dtype that a tensor already has go away (in a float32 trace an upcast and the cast back look the same, and
    both are nothing); other casts and factories that name the weights' dtype name the dtype of a weight instead; and the
    lowest finite value of that dtype, which masks use, is taken from it.
    """
    weight = next(
        (node for node in graph.nodes if node.op == "get_attr" and _val_dtype(node) == dtype and node.users), None
    )
    follow: fx.Node | None = None
    lowest: fx.Node | None = None
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        name = str(node.target)
        if name == "aten.to.dtype" and isinstance(node.args[0], fx.Node) and _val_dtype(node.args[0]) == node.args[1]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        if name in _DTYPE_OF_RESULT and _is_own_dtype(node):
            node.args, node.kwargs = _without_dtype(node)
            continue
        if weight is None or not (_names(node, dtype) or _names(node, torch.finfo(dtype).min)):
            continue
        if follow is None:
            with graph.inserting_before(_first_after_attributes(graph)):
                follow = graph.call_function(getattr, (weight, "dtype"))
                lowest = graph.call_function(_lowest, (follow,))
        node.args = tuple(_swap(item, dtype, follow, lowest) for item in node.args)
        node.kwargs = {key: _swap(item, dtype, follow, lowest) for key, item in node.kwargs.items()}
    for unused in (lowest, follow):
        if unused is not None and not unused.users:
            graph.erase_node(unused)


def _first_after_attributes(graph: fx.Graph) -> fx.Node:
    nodes = cast(list[fx.Node], list(graph.nodes))
    return next((node for node in nodes if node.op not in ("get_attr", "placeholder")), nodes[-1])


def _lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min


def _val_dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def _is_own_dtype(node: fx.Node) -> bool:
    source = node.args[0]
    wanted = [item for item in (*node.args[1:], *node.kwargs.values()) if isinstance(item, torch.dtype)]
    return bool(wanted) and isinstance(source, fx.Node) and _val_dtype(source) == wanted[0]


def _without_dtype(node: fx.Node) -> tuple[tuple[object, ...], dict[str, object]]:
    args = tuple(None if isinstance(item, torch.dtype) else item for item in node.args)
    return args, {key: item for key, item in node.kwargs.items() if not isinstance(item, torch.dtype)}


def _names(node: fx.Node, value: object) -> bool:
    return any(type(item) is type(value) and item == value for item in (*node.args, *node.kwargs.values()))


def _swap(item: object, dtype: torch.dtype, follow: fx.Node, lowest: fx.Node | None) -> object:
    if isinstance(item, torch.dtype) and item == dtype:
        return follow
    if isinstance(item, float) and item == torch.finfo(dtype).min:
        return lowest
    return item


def follow_mode(graph: fx.Graph) -> None:
    """Make dropout, attention dropout and batch normalization follow ``train()`` and ``eval()``.

    Before: ``dropout(x, 0.1, True)``. After: ``dropout(x, 0.1, training)`` where ``training`` reads the Program's flag;
    batch normalization has one of its own, ``batch_statistics``. The traced graph must be in train mode.
    """
    flags: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        name = str(node.target)
        position = {
            "aten.dropout.default": 2,
            "aten.feature_dropout.default": 2,
            "aten.alpha_dropout.default": 2,
            "aten.batch_norm.default": 5,
            "aten.instance_norm.default": 5,
            "aten.rrelu.default": 3,
        }.get(name)
        attention = name == "aten.scaled_dot_product_attention.default" and len(node.args) > 4 and node.args[4]
        counter = name == "aten.add_.Tensor" and _is_counter(node)
        if position is None and not attention and not counter:
            continue
        flag = "batch_statistics" if counter or name == "aten.batch_norm.default" else "training"
        if flag not in flags:
            with graph.inserting_before(_first_after_attributes(graph)):
                flags[flag] = graph.create_node("get_attr", flag)
        if position is not None:
            if node.args[position] is True:
                node.update_arg(position, flags[flag])
        else:
            where = 4 if attention else 1
            with graph.inserting_before(node):
                scaled = graph.call_function(operator.mul, (node.args[where], flags[flag]))
            node.update_arg(where, scaled)


def _is_counter(node: fx.Node) -> bool:
    target = node.args[0]
    return (
        isinstance(target, fx.Node)
        and target.op == "get_attr"
        and str(target.target).endswith("num_batches_tracked")
        and bool(node.args[1] == 1)
    )
