"""Sites: the weights of a Program that can be pruned, and the reasons why others cannot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphprune.errors import PassError
from graphprune.ir import ops
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.sparsity.layout import Layout, logical_shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Operator:
    """How an operator uses a weight.

    Attributes:
        name: Name shown to users.
        weight: Position of the weight among the arguments.
        layout: How the weight is stored.
        groups: Position of the number of groups, for convolutions.
    """

    name: str
    weight: int
    layout: Layout
    groups: int | None = None


OPERATORS: dict[object, Operator] = {
    aten.linear.default: Operator("linear", 1, Layout.OUT_IN),
    aten.addmm.default: Operator("addmm", 2, Layout.IN_OUT),
    aten.mm.default: Operator("mm", 1, Layout.IN_OUT),
    aten.matmul.default: Operator("matmul", 1, Layout.IN_OUT),
    aten.conv1d.default: Operator("conv1d", 1, Layout.CONV, groups=6),
    aten.conv2d.default: Operator("conv2d", 1, Layout.CONV, groups=6),
    aten.conv3d.default: Operator("conv3d", 1, Layout.CONV, groups=6),
    aten.conv1d.padding: Operator("conv1d", 1, Layout.CONV, groups=6),
    aten.conv2d.padding: Operator("conv2d", 1, Layout.CONV, groups=6),
    aten.conv3d.padding: Operator("conv3d", 1, Layout.CONV, groups=6),
}
"""Operators whose weight is a site."""

SEEN_THROUGH = (ops.mask, ops.gate, ops.fake_quantize, ops.dynamic_fake_quantize, aten.to.dtype)
"""Operators between a weight and the operator that uses it, with the weight as their first argument."""

_REASONS = {
    "embedding": "embedding: rows are looked up, not multiplied",
    "conv_transpose1d": "transposed convolution: its weight is laid out [in, out/groups, ...] and no pattern is defined for it",
    "conv_transpose2d": "transposed convolution: its weight is laid out [in, out/groups, ...] and no pattern is defined for it",
    "conv_transpose3d": "transposed convolution: its weight is laid out [in, out/groups, ...] and no pattern is defined for it",
    "lstm": "recurrent layer: one operator holds all its weights",
    "gru": "recurrent layer: one operator holds all its weights",
    "bilinear": "bilinear layer: its weight has three dimensions",
    **dict.fromkeys(
        ("split", "split_with_sizes", "chunk", "slice", "select", "unbind", "narrow"),
        "cut into parts before it is used: its parts are no parameters, and patterns apply to whole ones",
    ),
    **dict.fromkeys(
        ("t", "numpy_T", "mT", "transpose", "permute", "reshape", "view"),
        "transposed or reshaped before it is used, not as the weight of a linear or conv",
    ),
}


@dataclass(frozen=True)
class Site:
    """One prunable weight.

    Attributes:
        name: The parameter's dotted name.
        op: Operator that uses it, such as ``linear``.
        layout: How it is stored.
        stored_shape: Its shape.
        shape: Logical shape ``(out, in * kernel)``; patterns apply to it.
        groups: Groups of a convolution, else 1.
        uses: Names of all nodes that use it (tied or shared weights have several).
        macs: Multiply-accumulates of one example of the traced size, over all uses.
    """

    name: str
    op: str
    layout: Layout
    stored_shape: tuple[int, ...]
    shape: tuple[int, int]
    groups: int
    uses: tuple[str, ...]
    macs: int

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return math.prod(self.stored_shape)

    @property
    def kernel(self) -> int:
        """Kernel positions: the product of a convolution's kernel sizes, 1 for other layers."""
        return math.prod(self.stored_shape[2:])

    @property
    def module(self) -> str:
        """Dotted name of the module that owns the weight."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Excluded:
    """A weight that is left out, and why."""

    name: str
    reason: str


def find_sites(program: Program) -> tuple[tuple[Site, ...], tuple[Excluded, ...]]:
    """Find all weights that linear, matrix and convolution operators use.

    Returns:
        Sites in the order of the graph, and every other parameter of two or more dimensions with the reason why it is
        none. A weight that several operators use is one site; one that is used in two layouts is excluded.

    Raises:
        PassError: The Program is partitioned.
    """
    if Property.PARTITIONED in program.properties:
        raise PassError(
            f"{program.name} is partitioned and sites are found in flat graphs only; run inline-blocks first"
        )
    sites: list[Site] = []
    excluded: list[Excluded] = []
    parameters = dict(program.named_parameters())
    batch = _batch(program)
    for name, nodes in _weight_nodes(program).items():
        weight = parameters[name]
        if weight.dim() < 2:
            continue
        site, reason = _site(name, weight, nodes, batch)
        if site is not None:
            sites.append(site)
        else:
            excluded.append(Excluded(name, reason))
    order = {node.name: index for index, node in enumerate(program.graph.nodes)}
    return tuple(sorted(sites, key=lambda site: order[site.uses[0]])), tuple(excluded)


def _weight_nodes(program: Program) -> dict[str, list[fx.Node]]:
    """The ``get_attr`` nodes of each parameter in graph order, those of tied names under the first of them."""
    aliases = parameter_names(program)
    nodes: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target in aliases:
            nodes.setdefault(aliases[node.target], []).append(node)
    return nodes


def parameter_names(program: Program) -> dict[str, str]:
    """Every parameter name, tied ones included, to the first name of the same parameter."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in program.named_parameters(remove_duplicate=False)}


def _site(name: str, weight: Tensor, nodes: list[fx.Node], batch: int) -> tuple[Site | None, str]:
    found: list[tuple[Operator, fx.Node]] = []
    others: list[str] = []
    for node in nodes:
        for user, value in users_of_value(node):
            operator = OPERATORS.get(user.target)
            if operator is not None and user.args[operator.weight] is value and weight.dim() == _rank(operator):
                found.append((operator, user))
            else:
                others.append(_operator_name(user))
    if not found:
        kind = others[0] if others else ""
        return None, _REASONS.get(
            kind, f"used by {kind}, not as the weight of a linear or conv" if kind else "not used"
        )
    if others:
        return None, f"also used by {', '.join(sorted(set(others)))}: pruning it would change that too"
    layouts = {operator.layout for operator, _ in found}
    if len(layouts) > 1:
        return None, "used in two layouts, as [out, in] and as [in, out]"
    operator = found[0][0]
    groups = {_groups(node, operator) for operator, node in found}
    if len(groups) > 1:
        return None, f"used with {' and '.join(str(number) for number in sorted(groups))} groups"
    shape = logical_shape(tuple(weight.shape), operator.layout)
    macs = sum(_macs(node, shape) for _, node in found) // batch
    site = Site(
        name=name,
        op=operator.name,
        layout=operator.layout,
        stored_shape=tuple(weight.shape),
        shape=shape,
        groups=groups.pop(),
        uses=tuple(node.name for _, node in found),
        macs=macs,
    )
    return site, ""


def _groups(node: fx.Node, operator: Operator) -> int:
    position = operator.groups
    return 1 if position is None or len(node.args) <= position else int(node.args[position])  # type: ignore[arg-type]


def users_of_value(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Operators that use a weight, seen through masks, gates, quantizers and casts.

    Yields:
        ``(user, value)``: the operator and the argument of it that stems from the weight.
    """
    for user in node.users:
        if user.target is ops.observe:
            continue
        if user.target in SEEN_THROUGH and user.args[0] is node:
            yield from users_of_value(user)
        elif user.op == "call_function" and user.target is not getattr:
            yield user, node


def attribute_behind(value: object) -> fx.Node | None:
    """The parameter or buffer behind an operand, seen through masks, gates, quantizers and casts; None for other values."""
    while isinstance(value, fx.Node) and value.target in SEEN_THROUGH:
        value = value.args[0]
    return value if isinstance(value, fx.Node) and value.op == "get_attr" else None


def weight_names(program: Program) -> tuple[str, ...]:
    """Names of what a target stores as weights: sites and embedding tables, in graph order."""
    sites, _ = find_sites(program)
    tables = (attribute_behind(node.args[0]) for node in program.calls(torch.ops.aten.embedding.default))
    names = [*(site.name for site in sites), *(str(table.target) for table in tables if table is not None)]
    return tuple(dict.fromkeys(names))


def _rank(operator: Operator) -> int:
    return 2 + int(operator.name[4]) if operator.name.startswith("conv") else 2


def _operator_name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


def _macs(node: fx.Node, shape: tuple[int, int]) -> int:
    value = node.meta.get("val")
    return math.prod(size_hint(size) for size in value.shape) * shape[1] if isinstance(value, Tensor) else 0


def _batch(program: Program) -> int:
    first = next((node for node in program.graph.nodes if node.op == "placeholder"), None)
    return max(size_hint(first.meta["val"].shape[0]), 1) if first is not None and first.meta["val"].dim() else 1


def size_hint(size: int | torch.SymInt) -> int:
    """The traced size of a dimension, dynamic or not."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 1
