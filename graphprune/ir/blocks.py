"""The module tree of a Program: holders of parameters, and blocks, which are parts of the graph that run as modules."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn

from graphprune.ir import ops

_MEMBERS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_NORMS = (
    "aten.batch_norm.default",
    "aten.instance_norm.default",
)  # they change their third and fourth argument in train mode
FLAGS = ("training", "observing", "calibrating", "batch_statistics")
"""Attributes that a graph reads and that are no tensors."""


class Holder(nn.Module):
    """An empty module; a tree of them carries parameters under their original names."""


def holder_tree(source: nn.Module) -> nn.Module:
    """Copy a module's tree of names without its code.

    Returns:
        Nested empty modules with the very parameter and buffer objects of ``source`` under the same names.
    """
    root = Holder()
    root.training = source.training
    for name, parameter in source._parameters.items():
        root.register_parameter(name, parameter)
    for name, buffer in source._buffers.items():
        root.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)
    for name, child in source._modules.items():
        if child is not None:
            root.add_module(name, holder_tree(child))
    return root


class Block(Holder):
    """A repeated block of the source, such as one encoder layer, that runs as a module of its own.

    It lies at its own path in the Program's tree and holds what was there, so names of parameters stay. What wraps modules
    works on it: ``fully_shard(block)`` and forward hooks. The Program calls it once a forward pass.

    Args:
        members: Holder whose parameters, buffers and children become the block's.
        path: Dotted name of the block in its Program.
        graph: What it computes. Placeholders are its inputs; attributes carry names from the Program's root and lie below
            ``path``; the output is one value, or a tuple where there are several.
        checkpoint: Keep only the inputs for the backward pass and compute the rest again there, with the same random numbers.
            Only while training with gradients, and without changing any buffer a second time.
    """

    _compiled: dict[str, Any]

    def __init__(self, members: nn.Module, path: str, graph: fx.Graph, *, checkpoint: bool = False) -> None:
        super().__init__()
        move_members(members, self)
        self.path = path
        self.graph = graph
        self.checkpoint = checkpoint
        self.recompile()

    def recompile(self) -> None:
        """Drop compiled code after the graph changed."""
        self.__dict__["_compiled"] = {}

    def forward(self, *values: object) -> Any:
        """Run the block.

        Args:
            *values: One for each placeholder of its graph: tensors, sizes, dtypes.

        Returns:
            Its one result, or a tuple of them.
        """
        if not (self.checkpoint and self.training and torch.is_grad_enabled()):
            return self._code("once")(self, *values)
        first = True

        def run(*given: object) -> Any:
            nonlocal first
            kind, first = "once" if first else "again", False
            return self._code(kind)(self, *given)

        plain = self._code("again") is self._code("once")  # then nothing needs to tell the two runs apart
        return torch.utils.checkpoint.checkpoint(
            self._run if plain else run, *values, use_reentrant=False, preserve_rng_state=self._compiled["random"]
        )

    def _run(self, *values: object) -> Any:
        return self._code("once")(self, *values)

    def _code(self, kind: str) -> Any:
        if not self._compiled:
            self._compile()
        return self._compiled[kind]

    def _compile(self) -> None:
        graph = copy_graph(self.graph)
        for node in graph.find_nodes(op="get_attr"):
            node.target = node.target.removeprefix(f"{self.path}.")
        once = again = executable(graph, self.path)
        if self.checkpoint and _silence(graph):
            again = executable(graph, f"{self.path} again")
        random = any(is_random(node) for node in graph.nodes)
        self.__dict__["_compiled"] = {"once": once, "again": again, "random": random}

    def __deepcopy__(self, memo: dict[int, Any]) -> Block:
        members = Holder()
        members.training = self.training
        for kind in _MEMBERS:
            members.__dict__[kind] = copy.deepcopy(self.__dict__[kind], memo)
        clone = Block(members, self.path, copy_graph(self.graph), checkpoint=self.checkpoint)
        memo[id(self)] = clone
        return clone


def move_members(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` hold the very parameters, buffers and children of ``source``, in the same order and mode."""
    target.training = source.training
    for kind in _MEMBERS:
        target.__dict__[kind] = source.__dict__[kind]


def copy_graph(source: fx.Graph) -> fx.Graph:
    """A copy of a graph, its metadata included."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(source, {}))
    graph.output_node().meta.update(source.output_node().meta)
    return graph


def executable(graph: fx.Graph, label: str) -> Callable[..., Any]:
    """Python code that runs a graph.

    Args:
        graph: Its mask operators are replaced in place by what runs for them.
        label: Shown in tracebacks.

    Returns:
        A function of the module that holds the graph's attributes, and of the graph's inputs.
    """
    for node in graph.find_nodes(op="call_function", target=ops.mask):
        node.target = ops.apply_mask
    code = graph.python_code(root_module="self")
    scope = dict(code.globals)
    exec(compile(code.src, f"<graphprune {label}>", "exec"), scope)
    function: Callable[..., Any] = scope["forward"]
    return function


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The inputs of a graph, in order."""
    return list(graph.find_nodes(op="placeholder"))


def results(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """What a block's graph returns, in order."""
    returned: Any = graph.output_node().args[0]
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def is_random(node: fx.Node) -> bool:
    """Whether an operator draws random numbers, in some mode at least."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def changed_values(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments that an operator changes in place, by its schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    given = dict(zip((item.name for item in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    written = (
        given.get(item.name) for item in schema.arguments if item.alias_info is not None and item.alias_info.is_write
    )
    return tuple(value for value in written if isinstance(value, fx.Node))


def obstacle_to_recomputing(graph: fx.Graph) -> str | None:
    """Why a block cannot be computed a second time with the same result, or None where it can."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        for value in map(base_of, changed_values(node)):
            if value.op == "placeholder":
                return f"{node.name} changes its input {value.name} in place"
            early = any(order[user] < order[node] for user in value.users)
            if value.op == "get_attr" and (node.users or early):
                return f"{node.name} changes {value.target} in place, and the block uses its value"
    return None


def base_of(value: fx.Node) -> fx.Node:
    """The value that a chain of views looks at."""
    schema = getattr(value.target, "_schema", None)
    views = schema is not None and any(item.alias_info is not None for item in schema.returns)
    first = value.args[0] if views and value.args else None
    return base_of(first) if isinstance(first, fx.Node) else value


def _silence(graph: fx.Graph) -> bool:
    """Take out of a graph what changes buffers: counters and observers go, normalizations update copies of their statistics."""
    changed = False
    for node in list(graph.nodes):
        if any(base_of(value).op == "get_attr" for value in changed_values(node)):
            graph.erase_node(node)
            changed = True
        elif str(node.target) in _NORMS and isinstance(node.args[5], fx.Node):
            for position in (3, 4):
                statistic = node.args[position]
                if isinstance(statistic, fx.Node):
                    with graph.inserting_before(node):
                        node.update_arg(position, graph.call_function(torch.ops.aten.clone.default, (statistic,)))
                    changed = True
    return changed


# -- from blocks back to one flat graph -----------------------------------------------------------------------------------

POSITION = "position"
"""Key in ``node.meta`` of a node's place in the flat graph, from which it is put together again."""


def flat_graph(graph: fx.Graph, blocks: Mapping[str, Block]) -> fx.Graph:
    """The graph that a partitioned graph was made of: what the blocks compute in place of their calls.

    Args:
        graph: Of a partitioned Program; left as it is.
        blocks: Its blocks by path.

    Returns:
        A new graph with the same names, order and metadata as before the partition.
    """
    stands: dict[fx.Node, fx.Node] = {}
    nodes: list[tuple[int, fx.Node]] = []
    attributes: dict[object, fx.Node] = {}
    last = -1
    for node in _walk(graph, blocks, stands):
        if node.op == "get_attr" and attributes.setdefault(node.target, node) is not node:
            stands[node] = attributes[node.target]
            continue
        position = node.meta.get(POSITION, last)  # a node that came later stays behind what was before it
        nodes.append((position, node))
        last = max(last, position)
    flat = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while node in stands:
            node = stands[node]
        return copied[node]

    for _, node in sorted(nodes, key=lambda item: item[0]):
        copied[node] = flat.node_copy(node, find)
        copied[node].meta.pop(POSITION, None)
    return flat


def _walk(graph: fx.Graph, blocks: Mapping[str, Block], stands: dict[fx.Node, fx.Node]) -> Iterator[fx.Node]:
    """Nodes that compute something, in order; notes which others only hand a value in or out of a block."""
    for node in graph.nodes:
        if node.op == "call_module":
            inner = blocks[str(node.target)].graph
            stands.update(zip(placeholders(inner), node.all_input_nodes, strict=True))
            returned = results(inner)
            for user in node.users:
                if is_result(user):
                    stands[user] = returned[user.args[1]]
            stands[node] = returned[0]
            yield from (item for item in inner.nodes if item.op not in ("placeholder", "output"))
        elif not is_result(node):
            yield node


def is_result(node: fx.Node) -> bool:
    """Whether a node takes one of a block's several results."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.op == "call_module"
