"""Look at values inside a Program while data runs through it, and change nothing.

Nodes run one by one, in the order of the graph and in eval mode, and only those that a watched value depends on; a value is
freed after its last use, so that no more lives than in the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.errors import PassError, TraceError
from graphprune.ir.batches import bind_batch, each_batch
from graphprune.ir.blocks import FLAGS
from graphprune.ir.program import Program, device_of
from graphprune.ir.properties import Property


def watch(
    program: Program,
    nodes: Collection[fx.Node],
    batches: Iterable[object],
    see: Callable[[fx.Node, Tensor], None],
    progress: str = "",
) -> int:
    """Show the values of some nodes, for every batch.

    Args:
        program: A flat Program; neither its graph, its tensors nor its mode are mutated.
        nodes: Nodes of its graph whose values are tensors; with none, batches are checked and nothing runs.
        batches: As for ``each_batch``.
        see: Called with a node and its value, in the order of the graph within a batch. It must not mutate or keep the value:
            an operator that works in place may change it later.
        progress: What a progress bar says; empty shows none.

    Returns:
        Number of batches.

    Raises:
        PassError: The Program is partitioned, or a batch is none.
        TraceError: A batch does not fit the Program, or lacks an input that a watched value depends on.
    """
    if Property.PARTITIONED in program.properties:
        raise PassError(f"{program.name} is partitioned and only flat graphs can be watched; run inline-blocks first")
    walk = _Walk(program, nodes, see)
    count = 0
    with torch.no_grad():
        for number, batch in each_batch(batches, progress):
            walk.run(bind_batch(program, batch, number), number)
            count += 1
    return count


class _Walk:
    """Which nodes run for the inputs that are given, and when each value is used last."""

    def __init__(self, program: Program, nodes: Collection[fx.Node], see: Callable[[fx.Node, Tensor], None]) -> None:
        self.program, self.watched, self.see = program, frozenset(nodes), see
        self.order: list[fx.Node] = list(program.graph.nodes)
        self.devices = frozenset(node for node in self.order if _reads_device(node))
        self._plans: dict[frozenset[str], tuple[list[fx.Node], dict[fx.Node, list[fx.Node]]]] = {}

    def run(self, inputs: Mapping[str, Tensor], number: int) -> None:
        """Run one batch."""
        nodes, free = self._plan(frozenset(inputs), number)
        device = device_of(self.program)
        live: dict[fx.Node, object] = dict.fromkeys(self.devices, device)
        for node in nodes:
            if node.op == "placeholder":
                live[node] = inputs[str(node.target)]
            elif node.op == "get_attr":
                live[node] = False if node.target in FLAGS else self.program.tensor(str(node.target))
            else:
                live[node] = call_node(node, live.__getitem__)
            if node in self.watched:
                self._show(node, live[node])
            for value in free[node]:
                del live[value]

    def _plan(self, given: frozenset[str], number: int) -> tuple[list[fx.Node], dict[fx.Node, list[fx.Node]]]:
        """Nodes to run with some inputs, and the values to free after each of them."""
        if given not in self._plans:
            needed: set[fx.Node] = set()
            missing = collect_needed(list(self.watched), self.devices, given, needed)
            if missing is not None:
                names = ", ".join(self.program.interface.names)
                raise TraceError(
                    f"batch {number}: input {missing!r} is missing, and what is looked at depends on it; give {names}"
                )
            add_changes_in_place(self.order, self.devices, given, needed)
            nodes = [node for node in self.order if node in needed]
            last: dict[fx.Node, fx.Node] = {}
            for node in nodes:
                last[node] = node
                last |= {value: node for value in node.all_input_nodes if value in needed}
            free: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
            for value, node in last.items():
                free[node].append(value)
            self._plans[given] = nodes, free
        return self._plans[given]

    def _show(self, node: fx.Node, value: object) -> None:
        if not isinstance(value, Tensor):
            raise PassError(f"{node.name} is watched and its value is a {type(value).__name__}, not a tensor")
        self.see(node, value)


def call_node(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> object:
    """Run one ``call_function`` node with the values of its inputs."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value_of)  # type: ignore[misc]
    assert callable(node.target)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def without_data(nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
    """Nodes whose value is the same for every batch; the device of an input is."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr" or (
            node.op == "call_function"
            and (_reads_device(node) or all(value in found for value in node.all_input_nodes))
        ):
            found.add(node)
    return frozenset(found)


def _reads_device(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] == "device"


def collect_needed(
    roots: Sequence[fx.Node], shared: frozenset[fx.Node], given: Collection[str], found: set[fx.Node]
) -> str | None:
    """Add roots and their ancestors that depend on the data to ``found``.

    Returns:
        The name of an input that is not given, where one is met.
    """
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node in found or node in shared:
            continue
        if node.op == "placeholder" and node.target not in given:
            return str(node.target)
        found.add(node)
        waiting.extend(node.all_input_nodes)
    return None


def add_changes_in_place(
    nodes: Iterable[fx.Node], shared: frozenset[fx.Node], given: Collection[str], needed: set[fx.Node]
) -> None:
    """Add operators that change a needed value in place to ``needed``; they may have no user of their own."""
    for node in nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and node not in needed:
            changed = node.args[0]
            if isinstance(changed, fx.Node) and changed in needed:
                extra: set[fx.Node] = set()
                if collect_needed([node], shared, given, extra) is None:
                    needed |= extra
