"""Make each repeated block of the source, such as an encoder layer, a module of its own inside the Program.

Before: ``%9 = aten.linear(%8, %encoder.layer.0.dense.weight)`` and all other lines of all layers in one graph.
After: ``%30 = block @encoder.layer.0(%8) {`` these lines ``}``.  ``program.get_submodule("encoder.layer.0")`` is then a module that
can be wrapped with ``fully_shard``, and that can recompute its activations in the backward pass.  Names of parameters and
buffers, outputs, gradients and the order of random numbers stay: the results are bitwise equal.

Blocks are found by the modules that the traced operators came from: numbered siblings of one class with children of their own,
at the outermost level where there are several.  ``inline-blocks`` gives the flat graph back.
"""

from __future__ import annotations

import fnmatch
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import networkx as nx
from torch import fx, nn

from graphprune.errors import PassError, RecipeError, suggest
from graphprune.ir import ops
from graphprune.ir.blocks import (
    POSITION,
    Block,
    base_of,
    changed_values,
    is_random,
    is_result,
    obstacle_to_recomputing,
)
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.pipeline.base import Coverage, Pass, PassResult


@dataclass(frozen=True)
class PartitionBlocks(Pass):
    """Turn repeated blocks into modules, for FSDP and for recomputing activations block by block.

    Attributes:
        checkpoint: Keep only each block's inputs for the backward pass, and compute its activations again there, with the
            same random numbers: less memory for one more forward pass. Works while training; results stay bitwise equal.
        select: Globs over names of blocks (``encoder.layer.*``), at any level of numbered modules; of a block and one inside
            it the outer one is taken. Empty takes all repeated blocks of the outermost level.
    """

    name = "partition-blocks"
    establishes = Property.PARTITIONED
    forbids = Property.NONE

    checkpoint: bool = False
    select: tuple[str, ...] = ()

    def run(self, program: Program) -> PassResult:
        """Find the blocks, then move them."""
        wanted, left_out = self._wanted(program)
        members = _members(program, wanted)
        left_out |= _obstacles(program, members)
        members = {path: nodes for path, nodes in members.items() if path not in left_out}
        order, entangled = _order(program, members)
        left_out |= entangled
        members = {path: nodes for path, nodes in members.items() if path not in left_out}
        if not members and not program.blocks:
            reasons = "; ".join(f"{path}: {reason}" for path, reason in left_out.items())
            raise PassError(
                f"no block can be made a module: {reasons or 'the model has no numbered siblings of one class'}; "
                f"leave partition-blocks out for this model, or name blocks with select"
            )
        if members:
            left_out |= _move(program, members, order, self.checkpoint)
        inside = sum(len(nodes) for nodes in members.values())
        stats = {"blocks": len(members), "nodes-in-blocks": inside}
        return PassResult(program, bool(members), stats, Coverage(tuple(members), left_out))

    def _wanted(self, program: Program) -> tuple[set[str], dict[str, str]]:
        """Names of the blocks to make, and reasons for others."""
        known = _numbered(program)
        repeated = {path for path, (count, calls) in known.items() if count > 1 or calls > 1}
        left_out: dict[str, str] = {}
        chosen = repeated
        if self.select:
            for text in self.select:
                if not fnmatch.filter(known, text):
                    raise RecipeError(f"select: {text!r} matches no block{suggest(text, known)}")
            chosen = {path for path in known if any(fnmatch.fnmatchcase(path, text) for text in self.select)}
            left_out = dict.fromkeys(_outermost(repeated - chosen), "not selected")
            left_out = {path: why for path, why in left_out.items() if not any(_lies_in(item, path) for item in chosen)}
        chosen = _outermost(chosen)
        left_out |= {path: f"it is called {known[path][1]} times" for path in chosen if known[path][1] > 1}
        for block in program.blocks:
            for path in chosen:
                if path == block:
                    left_out[path] = "a block already"
                elif _lies_in(path, block) or _lies_in(block, path):
                    left_out[path] = f"{block} is a block already, and blocks do not nest"
        return chosen - set(left_out), left_out


# -- finding -----------------------------------------------------------------------------------------------------------


def _stack(node: fx.Node) -> Mapping[str, tuple[str, object]]:
    """Modules that an operator was called in, outermost first: a key (with ``@1`` for a second call) to path and class."""
    stack: Mapping[str, tuple[str, object]] = node.meta.get("nn_module_stack") or {}
    return stack


def _numbered(program: Program) -> dict[str, tuple[int, int]]:
    """Numbered modules with children that the graph calls: how many siblings have the same class, and how often each is called."""
    kinds: dict[str, object] = {}
    keys: dict[str, set[str]] = {}
    for node in program.nodes():
        for key, (path, kind) in _stack(node).items():
            kinds[path] = kind
            keys.setdefault(path, set()).add(key)
    found = {
        path: kind for path, kind in kinds.items() if path.rpartition(".")[2].isdigit() and _children(program, path)
    }
    same = Counter((path.rpartition(".")[0], kind) for path, kind in found.items())
    return {path: (same[path.rpartition(".")[0], kind], len(keys[path])) for path, kind in found.items()}


def _children(program: Program, path: str) -> Mapping[str, nn.Module | None]:
    try:
        return program.get_submodule(path)._modules
    except AttributeError:
        return {}


def _lies_in(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.")


def _outermost(paths: Iterable[str]) -> set[str]:
    paths = set(paths)
    return {path for path in paths if not any(_lies_in(path, other) for other in paths)}


def _members(program: Program, blocks: set[str]) -> dict[str, list[fx.Node]]:
    """The operators of each block, in graph order.

    Operators that passes or tracing inserted do not say where they belong. One goes where all its users are, if it is a mask or
    a quantizer, or needs nothing from outside that block.
    """
    home: dict[fx.Node, str] = {}
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    for node in nodes:
        inside = {path for path, _ in _stack(node).values()} & blocks
        if inside:
            home[node] = inside.pop()
    for node in reversed(nodes):
        if not _stack(node) and not is_result(node):
            block = _block_of_users(node, home)
            if block is not None and (
                node.target in ops.OURS or all(_is_in(item, block, home) for item in node.all_input_nodes)
            ):
                home[node] = block
    members: dict[str, list[fx.Node]] = {}
    for node in nodes:
        if node in home:
            members.setdefault(home[node], []).append(node)
    return members


def _block_of_users(node: fx.Node, home: Mapping[fx.Node, str]) -> str | None:
    """The one block that all users are in; those of an operator without users are the others that use what it changes."""
    users = set(node.users) or {user for value in changed_values(node) for user in value.users} - {node}
    blocks = {home.get(user) for user in users}
    return blocks.pop() if len(blocks) == 1 else None


def _is_in(node: fx.Node, block: str, home: Mapping[fx.Node, str]) -> bool:
    owned = node.op == "get_attr" and (_lies_in(str(node.target), block) or node.target == "training")
    return owned or home.get(node) == block


# -- what stands against it --------------------------------------------------------------------------------------------


def _obstacles(program: Program, members: Mapping[str, list[fx.Node]]) -> dict[str, str]:
    """Reasons why a block cannot be a module: its weights are used elsewhere too, or it is no closed piece of the graph."""
    home = {node: path for path, nodes in members.items() for node in nodes}
    names: dict[int, list[str]] = {}
    for name, parameter in program.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    for path in members:
        for name, parameter in program.get_submodule(path).named_parameters(path, remove_duplicate=False):
            for other in names[id(parameter)]:
                if not _lies_in(other, path):
                    found.setdefault(path, f"its weight {name} is tied to {other}, outside of it")
        for name in ("path", "graph", "checkpoint"):
            if name in _children(program, path):
                found.setdefault(path, f"a module in it is called {name}, which a block needs for itself")
    parameters = {name for shared in names.values() for name in shared}
    for node in program.graph.find_nodes(op="get_attr"):
        owner = next((item for item in members if _lies_in(str(node.target), item)), None)
        if owner is None or node.target not in parameters:
            continue
        for user in node.users:
            if home.get(user) != owner and user.target is not getattr:  # its dtype may be read from anywhere
                found.setdefault(owner, f"its weight {node.target} is used outside of it too, by {user.name}")
    for path, nodes in members.items():
        leaving = _results(nodes, home)
        if not leaving:
            found.setdefault(path, "nothing uses its results")
        for node in leaving:
            if isinstance(node.meta.get("val"), (list, tuple)):
                found.setdefault(path, f"its result {node.name} is a list")
    return found


def _results(nodes: Iterable[fx.Node], home: Mapping[fx.Node, str]) -> list[fx.Node]:
    return [node for node in nodes if any(home.get(user) != home[node] for user in node.users)]


def _order(program: Program, members: dict[str, list[fx.Node]]) -> tuple[list[fx.Node | str], dict[str, str]]:
    """An order of the graph with each block in one piece, as close to the present one as possible.

    Returns:
        Nodes, and blocks by name; and for each block that cannot be in one piece, what it is entangled with. Random operators keep
        their order, and operators that change a value in place stay between the same readers of it.
    """
    members = dict(members)
    entangled: dict[str, str] = {}
    place = {node: index for index, node in enumerate(program.graph.nodes)}
    while True:
        unit: dict[fx.Node, fx.Node | str] = {node: path for path, nodes in members.items() for node in nodes}
        graph: nx.DiGraph[fx.Node | str] = nx.DiGraph()
        last: dict[fx.Node | str, int] = {}
        for node, index in place.items():
            graph.add_node(unit.get(node, node))
            last[unit.get(node, node)] = index
        pairs = ((unit.get(before, before), unit.get(after, after)) for before, after in _precedence(program))
        graph.add_edges_from((before, after) for before, after in pairs if before != after)
        knots = [knot for knot in nx.strongly_connected_components(graph) if len(knot) > 1]
        if not knots:
            return list(nx.lexicographical_topological_sort(graph, key=last.__getitem__)), entangled
        for knot in knots:
            path = max((item for item in knot if isinstance(item, str)), key=last.__getitem__)
            others = sorted(str(item) for item in knot if item != path)
            entangled[path] = (
                f"its operators are entangled with {', '.join(others[:3])}, which need its results and it theirs"
            )
            del members[path]


def _precedence(program: Program) -> Iterable[tuple[fx.Node, fx.Node]]:
    """Pairs of nodes of which the first must run before the second."""
    previous: fx.Node | None = None
    readers: dict[fx.Node, list[fx.Node]] = {}
    writer: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        bases = {base_of(used) for used in node.all_input_nodes}
        yield from ((used, node) for used in node.all_input_nodes)
        yield from ((writer[base], node) for base in bases if base in writer)
        for base in map(base_of, changed_values(node)):
            yield from ((reader, node) for reader in readers.get(base, ()))
            writer[base] = node
        for base in bases:
            readers.setdefault(base, []).append(node)
        if is_random(node) or node.op == "call_module":
            if previous is not None:
                yield previous, node
            previous = node


# -- moving ------------------------------------------------------------------------------------------------------------


def _move(
    program: Program, members: Mapping[str, list[fx.Node]], order: Iterable[fx.Node | str], checkpoint: bool
) -> dict[str, str]:
    """Write the graph anew with a call in place of each block's operators.

    Returns:
        Blocks that cannot recompute their activations although they should, and why.
    """
    for index, node in enumerate(program.graph.nodes):
        if not program.blocks:
            node.meta[POSITION] = index
    home = {node: path for path, nodes in members.items() for node in nodes}
    kept: dict[str, str] = {}
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for item in order:
        if isinstance(item, str):
            inner, inputs, leaving = _extract(item, members[item], home)
            obstacle = obstacle_to_recomputing(inner) if checkpoint else None
            if obstacle:
                kept[item] = f"a module now, but its activations are kept: {obstacle}"
            _install(program, Block(program.get_submodule(item), item, inner, checkpoint=checkpoint and not obstacle))
            copied |= _call(graph, item, [copied[value] for value in inputs], leaving)
        elif not (item.op == "get_attr" and item.users and all(_takes_along(item, user, home) for user in item.users)):
            copied[item] = graph.node_copy(item, copied.__getitem__)
    program.graph = graph
    return kept


def _takes_along(attribute: fx.Node, user: fx.Node, home: Mapping[fx.Node, str]) -> bool:
    """Whether a user lies in a block that holds the attribute itself."""
    return user in home and _is_in(attribute, home[user], {})


def _extract(
    path: str, nodes: list[fx.Node], home: Mapping[fx.Node, str]
) -> tuple[fx.Graph, list[fx.Node], list[fx.Node]]:
    """A block's own graph, the values that come in and those that go out."""
    used = dict.fromkeys(
        value for node in nodes for value in node.all_input_nodes if value not in home or home[value] != path
    )
    attributes = [value for value in used if _is_in(value, path, {})]
    inputs = [value for value in used if value not in attributes]
    leaving = _results(nodes, home)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for value in inputs:
        copied[value] = graph.placeholder(value.name if value.op != "get_attr" else str(value.target).replace(".", "_"))
        copied[value].meta = {key: item for key, item in value.meta.items() if key == "val"}
    for node in (*sorted(attributes, key=lambda item: item.meta[POSITION]), *nodes):
        copied[node] = graph.node_copy(node, copied.__getitem__)
    returned = tuple(copied[node] for node in leaving)
    graph.output(returned if len(returned) > 1 else returned[0])
    return graph, inputs, leaving


def _call(graph: fx.Graph, path: str, inputs: list[fx.Node], leaving: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Call a block; returns what stands for each of its results."""
    call = graph.create_node("call_module", path, tuple(inputs), name=path.replace(".", "_"))
    values = [node.meta.get("val") for node in leaving]
    call.meta["val"] = values[0] if len(leaving) == 1 else tuple(values)
    if len(leaving) == 1:
        return {leaving[0]: call}
    picked = {}
    for index, node in enumerate(leaving):
        picked[node] = graph.call_function(operator.getitem, (call, index))
        picked[node].meta["val"] = values[index]
    return picked


def _install(program: Program, block: Block) -> None:
    owner, _, leaf = block.path.rpartition(".")
    program.get_submodule(owner)._modules[leaf] = block
