"""Casts between float32 and a 16-bit format in a Program's graph, and weights that are stored in the format they are read in."""

from __future__ import annotations

import itertools
from collections.abc import Collection

import torch
from torch import fx, nn

from graphprune.errors import PassError
from graphprune.ir import ops
from graphprune.ir.blocks import base_of
from graphprune.ir.precision import DTYPES, changed_later, dtypes_of, name_of, reads_values, with_dtype
from graphprune.ir.program import Program, attributes

aten = torch.ops.aten


def insert_casts(program: Program, dtype: torch.dtype, narrow: Collection[fx.Node]) -> int:
    """Make some operators run in 16 bits: cast their operands down, and back up where others read their results.

    Args:
        program: Mutated: casts are inserted, and ``node.meta["val"]`` of ``narrow`` gets the dtype.
        dtype: The 16-bit format.
        narrow: Operators, see ``precision.plan``.

    Returns:
        Number of casts. A value is cast once to each dtype, before the first operator that needs it, and never back again.
    """
    return _Casts(program, dtype, frozenset(narrow)).insert()


def store_weights(program: Program, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """Convert float32 parameters that are read through casts to one 16-bit format only, and drop those casts.

    Outputs are bitwise the same. Tied names stay tied; masks stay, and zeros stay zero.

    Args:
        program: Mutated, and so are its parameters, in place.
        dtype: The format; None takes every one.

    Returns:
        Names of the parameters converted.

    Raises:
        PassError: A weight has entries that are not finite in the format; nothing is changed.
    """
    parameters: dict[str, nn.Parameter] = dict(program.named_parameters(remove_duplicate=False))
    nodes = attributes(program)
    found: dict[str, list[fx.Node]] = {}
    for name, node in nodes.items():
        casts = _casts_of(node) if name in parameters and dtypes_of(node) == (torch.float32,) else None
        formats = {cast.args[1] for cast in casts or ()}
        if casts and len(formats) == 1 and formats <= (set(DTYPES.values()) if dtype is None else {dtype}):
            found[name] = casts
    for name, casts in found.items():
        weight, wanted = parameters[name].detach(), _format(casts)
        if not weight.is_meta and not bool(torch.isfinite(weight.to(wanted)).all()):
            raise PassError(
                f"{name} has entries that are not finite in {wanted}; exclude it, or choose dtype=bfloat16, whose range is float32's"
            )
    _move_dtypes(program.graph, frozenset(nodes[name] for name in found))
    for name, casts in found.items():
        wanted = _format(casts)
        parameters[name].data = parameters[name].detach().to(wanted)
        parameters[name].grad = None
        nodes[name].meta["val"] = with_dtype(nodes[name].meta["val"], wanted)
        for cast in casts:
            source = cast.args[0]
            assert isinstance(source, fx.Node)
            source.meta["val"] = with_dtype(source.meta["val"], wanted)
            cast.replace_all_uses_with(source)
            program.graph.erase_node(cast)
    program.recompile()
    return tuple(found)


def _format(casts: list[fx.Node]) -> torch.dtype:
    wanted = casts[0].args[1]
    assert isinstance(wanted, torch.dtype)
    return wanted


def _casts_of(value: fx.Node) -> list[fx.Node] | None:
    """The casts that read a weight, seen through masks; None where something else reads it."""
    found: list[fx.Node] = []
    for user in value.users:
        if user.target is aten.to.dtype and isinstance(user.args[1], torch.dtype):
            found.append(user)
        elif user.target is ops.mask and user.args[0] is value:
            behind = _casts_of(user)
            if behind is None:
                return None
            found += behind
        elif user.target is not getattr:
            return None
    return found


class _Casts:
    """Inserts casts, one for each value and dtype, before the first operator that needs it."""

    def __init__(self, program: Program, dtype: torch.dtype, narrow: frozenset[fx.Node]) -> None:
        self.graph = program.graph
        self.dtype = dtype
        self.narrow = narrow
        self.fixed = changed_later(self.graph)
        self.made: dict[tuple[object, ...], fx.Node] = {}
        self.wide = _float32(self.graph)
        self.count = 0

    def insert(self) -> int:
        """Rewrite the graph and return the number of casts."""
        for node in list(self.graph.nodes):
            if node.op not in ("call_function", "output") or node.target is aten.to.dtype or not reads_values(node):
                continue
            into = node in self.narrow
            if not into and self.dtype in dtypes_of(node):
                continue  # in 16 bits before, with operands that fit
            for value in node.all_input_nodes:
                if dtypes_of(value) and into is not self._is_narrow(value):
                    mask = name_of(node) == "scaled_dot_product_attention" and value not in node.args[:3]
                    node.replace_input_with(value, self._cast(value, node, into, saturate=into and mask))
        for node in self.narrow:
            node.meta["val"] = with_dtype(node.meta["val"], self.dtype)
        self._tidy()
        return self.count

    def _is_narrow(self, value: fx.Node) -> bool:
        return value in self.narrow or self.dtype in dtypes_of(value)

    def _cast(self, value: fx.Node, user: fx.Node, into: bool, *, saturate: bool) -> fx.Node:
        source = value.args[0] if value.target is aten.to.dtype else None
        if into and isinstance(source, fx.Node) and self._is_narrow(source):
            return source  # it was 16 bits before it was cast up
        key = (value, into, saturate, user if base_of(value) in self.fixed else None)
        if key not in self.made:
            inner = value
            if saturate:  # the lowest float32, which stands for "not this one", would become -inf and a row of them NaN
                inner = self._call(user, aten.clamp.default, (value, torch.finfo(self.dtype).min), value.meta["val"])
            wanted = with_dtype(value.meta["val"], self.dtype if into else torch.float32)
            self.made[key] = self._call(user, aten.to.dtype, (inner, self.dtype if into else self.wide), wanted)
            self.count += 1
        return self.made[key]

    def _call(self, user: fx.Node, target: object, arguments: tuple[object, ...], value: object) -> fx.Node:
        with self.graph.inserting_before(user):
            node = self.graph.call_function(target, arguments)  # type: ignore[arg-type]
        node.meta = {key: user.meta[key] for key in ("nn_module_stack",) if key in user.meta}
        node.meta["val"] = value
        return node

    def _tidy(self) -> None:
        """Drop casts that an earlier run left without use or that change nothing any more."""
        for node in reversed(list(self.graph.nodes)):
            if node.target is aten.to.dtype and node.args[1] is self.dtype:
                source = node.args[0]
                if isinstance(source, fx.Node) and self.dtype in dtypes_of(source):
                    node.replace_all_uses_with(source)
            is_cast = node.target is aten.to.dtype or (node is self.wide)
            if is_cast and not node.users:
                self.graph.erase_node(node)


def _float32(graph: fx.Graph, stored: frozenset[fx.Node] = frozenset()) -> fx.Node | torch.dtype:
    """The dtype of weights that stay float32, read from one of them, so that ``Program.to(dtype)`` changes it with them."""
    nodes: list[fx.Node] = list(graph.nodes)
    leading = list(itertools.takewhile(lambda node: node.op in ("placeholder", "get_attr"), nodes))
    anchors = [
        node for node in leading if node.op == "get_attr" and dtypes_of(node) == (torch.float32,) and node not in stored
    ]
    for anchor in anchors:
        for user in anchor.users:
            if user.target is getattr and user.args[1] == "dtype":
                return user
    if not anchors:
        return torch.float32
    with graph.inserting_after(leading[-1]):
        return graph.call_function(getattr, (anchors[0], "dtype"))


def _move_dtypes(graph: fx.Graph, stored: frozenset[fx.Node]) -> None:
    """Read the float dtype from weights that stay float32, wherever the graph reads it from one that will not."""
    readers = [user for node in stored for user in node.users if user.target is getattr and user.args[1] == "dtype"]
    if not readers:
        return
    wide = _float32(graph, stored)
    for reader in readers:

        def moved(item: fx.Node, reader: fx.Node = reader) -> fx.Node | torch.dtype:
            return wide if item is reader else item

        for user in list(reader.users):
            user.args, user.kwargs = fx.map_arg(user.args, moved), fx.map_arg(user.kwargs, moved)
        graph.erase_node(reader)
