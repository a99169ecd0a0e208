"""The Program: a traced model as an FX graph in normal form that is still called, trained and moved like a module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from graphprune.errors import TraceError, VerifyError, suggest
from graphprune.ir.blocks import Block, Holder, copy_graph, executable, flat_graph
from graphprune.ir.interface import Interface, named_forward
from graphprune.ir.properties import Property
from graphprune.ir.source import Source
from graphprune.ir.training_log import TrainingLog

FREEZABLE = ("observers", "batch-norm")
META = "graphprune"
"""Key under which ``node.meta`` holds graphprune's decisions, a mapping from decision type to a frozen dataclass."""


class Program(fx.GraphModule):
    """A model graph that passes rewrite.

    Weights are values: a ``get_attr`` node with the parameter's original name feeds the operator. Parameters and buffers
    are the source model's own objects under their own names. ``train()``, ``eval()``, ``to()``, ``state_dict()`` and
    ``deepcopy`` work; a call takes the source's arguments and returns the source's output class.

    Attributes:
        name: Name of the source model's class, in snake case.
        interface: Inputs and outputs.
        source: Where it came from.
        properties: What holds of the graph.
        history: Texts of the passes that ran, in order.
        observing: Whether observers look at the data; follows ``train()`` and ``eval()``.
        calibrating: Whether observers that are read once, at the end, look at the data; only while ``calibrate`` runs.
        batch_statistics: Whether batch normalization uses the batch's statistics; follows ``train()`` and ``eval()``.
        frozen: What no longer follows ``train()``: ``observers``, ``batch-norm``; see ``freeze``.
        training_log: Step, sparsity and loss of the sessions that trained it.
        config: The source model's config, where it has one.
    """

    name: str
    interface: Interface
    source: Source
    properties: Property
    history: tuple[str, ...]
    observing: bool
    calibrating: bool
    batch_statistics: bool
    frozen: frozenset[str]
    training_log: TrainingLog
    _compiled: dict[frozenset[str], Callable[..., tuple[object, ...]]]

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        *,
        name: str,
        interface: Interface,
        source: Source,
        properties: Property = Property.FUNCTIONAL,
        history: tuple[str, ...] = (),
        config: object | None = None,
    ) -> None:
        self.__dict__["interface"] = interface
        self.__dict__["_compiled"] = {}
        super().__init__(nn.Module(), fx.Graph())
        _adopt(self, root)
        self.name, self.source, self.properties, self.history = name, source, properties, history
        self.training = root.training
        self.calibrating = False
        self.frozen, self.training_log = frozenset(), TrainingLog()
        self.observing = self.batch_statistics = root.training
        if config is not None:
            self.config = config
        self.graph = graph
        self.register_state_dict_post_hook(_unshare)  # type: ignore[no-untyped-call]

    # -- calling ------------------------------------------------------------------------------------------------------

    def recompile(self) -> None:  # type: ignore[override]
        """Drop compiled code after the graph changed; it is made anew at the next call."""
        type(self).forward = named_forward(Program.call, self.interface)  # type: ignore[method-assign,assignment]
        for block in self.blocks.values():
            block.recompile()
        self.__dict__["_compiled"] = {}
        self.__dict__.update(_code="", _lineno_map=None, _prologue_start=0)  # what a GraphModule has, for torch.compile

    def call(self, *args: object, **kwargs: object) -> Any:
        """Run the graph as ``forward`` does: bind the arguments, run, and build the source's output object.

        Returns:
            The source's output. Entries that need an input that was left out are None.

        Raises:
            TraceError: An unknown argument, one that does not fit, or one that every output needs is missing.
        """
        tensors = self.interface.bind(args, kwargs)
        missing = frozenset(self.interface.names).difference(tensors)
        function = self._compiled.get(missing) or self._compile(missing)
        return pytree.tree_unflatten(list(function(self, *tensors.values())), self.interface.output)

    def _compile(self, missing: frozenset[str]) -> Callable[..., tuple[object, ...]]:
        self._compiled[missing] = executable(prune_inputs(self, missing), self.name)
        return self._compiled[missing]

    # -- modes, copies ------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Program:
        """Set training mode; observers and batch normalization follow it, unless they are frozen."""
        super().train(mode)
        self.observing = mode and "observers" not in self.frozen
        self.batch_statistics = mode and "batch-norm" not in self.frozen
        return self

    def freeze(self, *what: str) -> None:
        """Keep ranges (``observers``) or running statistics (``batch-norm``) as they are, in train mode too, from now on.

        Raises:
            VerifyError: Something else is named.
        """
        for name in what:
            if name not in FREEZABLE:
                raise VerifyError(f"nothing called {name!r} can be frozen{suggest(name, FREEZABLE)}")
        self.frozen |= frozenset(what)
        self.train(self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        root = Holder()
        root.training = self.training
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            root.__dict__[kind] = copy.deepcopy(self.__dict__[kind], memo)
        clone = Program(
            root,
            copy_graph(self._graph),
            name=self.name,
            interface=self.interface,
            source=self.source,
            properties=self.properties,
            history=self.history,
            config=copy.deepcopy(getattr(self, "config", None), memo),
        )
        clone.frozen, clone.training_log = self.frozen, copy.deepcopy(self.training_log, memo)
        clone.observing, clone.batch_statistics = self.observing, self.batch_statistics
        memo[id(self)] = clone
        return clone

    # -- looking at the graph -----------------------------------------------------------------------------------------

    @property
    def blocks(self) -> dict[str, Block]:
        """Blocks by their dotted names, in the order in which they run; see the pass ``partition-blocks``."""
        calls = self._graph.find_nodes(op="call_module")
        return {str(node.target): cast(Block, self.get_submodule(str(node.target))) for node in calls}

    def graphs(self) -> tuple[fx.Graph, ...]:
        """The Program's own graph and those of its blocks. Attributes are named from the Program's root in all of them."""
        return (self._graph, *(block.graph for block in self.blocks.values()))

    def flat_graph(self) -> fx.Graph:
        """A copy of the graph with what blocks compute in place of their calls."""
        return flat_graph(self._graph, self.blocks)

    def nodes(self) -> Iterator[fx.Node]:
        """All nodes in the order in which they run, those of a block before the node that calls it."""
        blocks = self.blocks
        for node in list(self._graph.nodes):
            if node.op == "call_module":
                yield from list(blocks[node.target].graph.nodes)
            yield node

    def calls(self, *targets: object) -> Iterator[fx.Node]:
        """Nodes that call one of the given operators, in graph order and inside blocks too; safe while nodes are erased."""
        for node in self.nodes():
            if node.op == "call_function" and node.target in targets:
                yield node

    def attribute(self, name: str) -> fx.Node | None:
        """The ``get_attr`` node of a parameter or buffer, if a graph has one; the one in a block comes first."""
        found = (node for graph in reversed(self.graphs()) for node in graph.find_nodes(op="get_attr", target=name))
        return next(found, None)

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of a dotted name.

        Raises:
            AttributeError: There is none.
        """
        module, leaf = self._owner(name)
        value: Tensor | None = module._parameters.get(leaf)
        value = module._buffers.get(leaf) if value is None else value
        if value is None:
            raise AttributeError(f"{self.name} has no parameter or buffer {name}")
        return value

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds a dotted name, and the last part; ``get_submodule`` takes ten times as long."""
        module: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            child = module._modules.get(part)
            if child is None:
                raise AttributeError(f"{self.name} has no module {name.rpartition('.')[0]}")
            module = child
        return module, leaf

    def add_buffer(self, name: str, value: Tensor) -> None:
        """Register a buffer under a dotted name, beside the weight that it belongs to."""
        module, leaf = self._owner(name)
        module.register_buffer(leaf, value)

    def remove_buffer(self, name: str) -> None:
        """Delete a buffer by its dotted name."""
        module, leaf = self._owner(name)
        delattr(module, leaf)

    @property
    def output(self) -> fx.Node:
        """The one output node."""
        return self._graph.output_node()

    def annotation(self, node: fx.Node, kind: type[Any]) -> Any | None:
        """The decision of a type that some pass recorded on a node, if any."""
        return node.meta.get(META, {}).get(kind.__name__)

    def annotate(self, node: fx.Node, decision: object) -> None:
        """Record a decision (a frozen dataclass) on a node, in place of an earlier one of its type."""
        node.meta[META] = {**node.meta.get(META, {}), type(decision).__name__: decision}

    def forget(self, node: fx.Node, kind: type[Any]) -> None:
        """Drop a decision from a node."""
        node.meta[META] = {key: value for key, value in node.meta.get(META, {}).items() if key != kind.__name__}

    def drop_inputs(self, names: frozenset[str]) -> None:
        """Cut inputs, and all outputs that need them, out of the graph for good."""
        self.graph = prune_inputs(self, names)
        self.interface = self.interface.without(names)
        self.recompile()

    def keep_outputs(self, names: Collection[str]) -> None:
        """Cut all other outputs, and what only they need, out of the graph for good; they are None from then on.

        Args:
            names: Among ``interface.output_names``; ``hidden_states`` stands for all of its entries.

        Raises:
            TraceError: A name is unknown.
        """
        known = self.interface.output_names
        for name in names:
            if not any(_is_entry(item, name) for item in known):
                raise TraceError(f"unknown output {name!r}{suggest(name, known)}")
        leaves = cast(tuple[Any, ...], self.output.args[0])
        kept = [any(_is_entry(item, name) for name in names) for item in known]
        self.output.args = (tuple(leaf if keep else None for leaf, keep in zip(leaves, kept, strict=True)),)
        eliminate_dead(self._graph)
        self.recompile()

    def __str__(self) -> str:
        """The text form of the graph; see ``graphprune.ir.printer``."""
        from graphprune.ir.printer import print_program

        return print_program(self)

    def __repr__(self) -> str:
        nodes = sum(len(graph.nodes) for graph in self.graphs())
        return f"Program({self.name}: {nodes} nodes, inputs {', '.join(self.interface.names)}; {self.properties})"


def _is_entry(output: str, name: str) -> bool:
    return output == name or output.rpartition("_")[0] == name


def prune_inputs(program: Program, missing: frozenset[str]) -> fx.Graph:
    """The graph without some inputs; outputs that depend on them become None.

    Raises:
        TraceError: Every output depends on one of the inputs; names it.
    """
    tainted: dict[str, set[fx.Node]] = {name: set() for name in program.interface.names if name in missing}
    for node in program.graph.nodes:
        for name, nodes in tainted.items():
            given = node.op == "placeholder" and node.target == name
            if given or any(user in nodes for user in node.all_input_nodes):
                nodes.add(node)
    leaves = [leaf for leaf in program.output.args[0] if isinstance(leaf, fx.Node)]  # type: ignore[union-attr]
    for name, nodes in tainted.items():
        if leaves and all(leaf in nodes for leaf in leaves):
            raise TraceError(
                f"input {name!r} is missing and every output needs it; "
                f"this Program takes {', '.join(program.interface.names)}"
            )
    gone = set().union(*tainted.values())
    if leaves and all(leaf in gone for leaf in leaves):
        raise TraceError(f"inputs {', '.join(sorted(missing))} are missing and every output needs one of them")
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node not in gone and node.op != "output":
            copied[node] = graph.node_copy(node, copied.__getitem__)
    kept = [
        (None if leaf in gone else copied[leaf]) if isinstance(leaf, fx.Node) else leaf
        for leaf in program.output.args[0]  # type: ignore[union-attr]
    ]
    graph.output(tuple(kept))
    _copy_output_meta(program.graph, graph)
    eliminate_dead(graph)
    return graph


def eliminate_dead(graph: fx.Graph) -> int:
    """Erase nodes that reach no output and change no buffer; unlike FX's own, random ones such as dropout too.

    Returns:
        How many were erased.
    """
    before = len(graph.nodes)
    graph.eliminate_dead_code(_has_effect)
    return before - len(graph.nodes)


def _has_effect(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output", "call_module") or (schema is not None and bool(schema.is_mutable))


def _copy_output_meta(source: fx.Graph, target: fx.Graph) -> None:
    target.output_node().meta.update(source.output_node().meta)


def _adopt(program: Program, root: nn.Module) -> None:
    for name, parameter in root._parameters.items():
        program.register_parameter(name, parameter)
    for name, buffer in root._buffers.items():
        program.register_buffer(name, buffer, persistent=name not in root._non_persistent_buffers_set)
    for name, child in root._modules.items():
        program.add_module(name, child)


def _unshare(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Mapping[str, object]) -> None:
    """Give tied entries of a state_dict storage of their own, so that safetensors writes it."""
    seen: set[tuple[int, int, tuple[int, ...]]] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor) or not name.startswith(prefix) or value.is_meta:
            continue
        local = value.to_local() if hasattr(value, "to_local") else value  # a DTensor itself has no storage
        key = (local.data_ptr(), local.numel(), tuple(local.stride()))
        if local.numel() and key in seen:
            state[name] = value.clone()
        seen.add(key)


def attributes(program: Program) -> dict[str, fx.Node]:
    """All parameter and buffer nodes of a flat graph by name."""
    return {str(node.target): node for node in program.graph.find_nodes(op="get_attr")}


def argument(node: fx.Node, position: int) -> fx.Node:
    """The node at a position among another's arguments.

    Raises:
        VerifyError: There is a constant or nothing.
    """
    value = node.args[position] if position < len(node.args) else None
    if not isinstance(value, fx.Node):
        raise VerifyError(f"{node.name}: argument {position} must be a value of the graph, not {value!r}")
    return value


def device_of(program: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; the CPU where there is none."""
    first: Tensor | None = next(iter(program.parameters()), None)
    first = first if first is not None else next(iter(program.buffers()), None)
    return first.device if first is not None else torch.device("cpu")


def is_meta(program: nn.Module) -> bool:
    """Whether there are parameters or buffers and all are on the meta device: a graph without values, as in a replay."""
    tensors = [*program.parameters(), *program.buffers()]
    return bool(tensors) and all(tensor.is_meta for tensor in tensors)
