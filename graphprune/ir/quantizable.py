"""Quantizable operators: what a Program computes that an integer kernel could compute, and what would be quantized there.

An operator is found by what it is, never by the model that it comes from: products with a weight, convolutions, embeddings, products
of two activations, and sums in which the result of a convolution ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphprune.ir import ops
from graphprune.ir.program import Program
from graphprune.ir.sites import OPERATORS, Operator, attribute_behind, parameter_names
from graphprune.sparsity.layout import Layout

aten = torch.ops.aten
KINDS = ("linear", "conv", "embedding", "matmul", "add")
"""Kinds of quantizable operators, as rules and presets name them."""
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
_ATTENTION = aten.scaled_dot_product_attention.default
_SUMS = (aten.add.Tensor, aten.add_.Tensor)
_CLIPS = (aten.relu.default, aten.relu_.default)
"""Operators that runtimes absorb into the one before, where the result is quantized."""
_CARRIERS = (*_CLIPS, aten.dropout.default, aten.contiguous.default)
"""Operators behind which a value is still the result of a convolution."""


@dataclass(frozen=True)
class Quantizable:
    """One operator that can be quantized.

    Attributes:
        node: The operator.
        kind: One of ``KINDS``.
        op: Its name, such as ``conv2d`` or ``addmm``.
        name: The weight's parameter name; ``<module>.<node>`` where there is none.
        module: Dotted name of the module that it belongs to.
        types: Class names of that module and of all around it, innermost last.
        inputs: Positions of the activations among its arguments that can be quantized.
        weight: Position of the weight, None where there is none.
        layout: How the weight is stored.
    """

    node: fx.Node
    kind: str
    op: str
    name: str
    module: str
    types: tuple[str, ...]
    inputs: tuple[int, ...]
    weight: int | None = None
    layout: Layout | None = None

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution."""
        return self.kind == "conv"

    @property
    def is_cast(self) -> bool:
        """Whether its weight is cast to another dtype in the graph."""
        value = None if self.weight is None else self.node.args[self.weight]
        while isinstance(value, fx.Node) and value.op != "get_attr":
            if value.target is aten.to.dtype:
                return True
            value = value.args[0]
        return False

    @property
    def is_attention(self) -> bool:
        """Whether it is attention as one operator: its products are those of a ``matmul``, and cannot be reached one by one."""
        return self.node.target is _ATTENTION


def find_quantizable(program: Program) -> tuple[Quantizable, ...]:
    """All quantizable operators of a flat Program, in graph order."""
    names = parameter_names(program)
    found: list[Quantizable] = []
    sums: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op != "call_function" or not _is_float(node):
            continue
        item = _weighted(node, names) or _activations_only(node)
        if item is None:
            continue
        if item.kind == "add":
            if not any(_from_convolution(node.args[place], sums) for place in item.inputs):
                continue
            sums.add(node)
        found.append(item)
    return tuple(found)


def result_of(node: fx.Node) -> fx.Node:
    """The value to quantize in place of a result: that of the ReLU behind it, where nothing else reads the result."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in _CLIPS else node


def _weighted(node: fx.Node, names: dict[str, str]) -> Quantizable | None:
    operator: Operator | None = OPERATORS.get(node.target)
    if node.target is aten.embedding.default:
        operator = Operator("embedding", 0, Layout.OUT_IN)
    if operator is None or len(node.args) <= operator.weight:
        return None
    root = attribute_behind(node.args[operator.weight])
    if root is None or root.target not in names:
        return None
    name = names[str(root.target)]
    module, types = _owner(node, name.rpartition(".")[0])
    if operator.name == "embedding":
        return Quantizable(node, "embedding", "embedding", name, module, types, (), 0, operator.layout)
    kind = "conv" if operator.layout is Layout.CONV else "linear"
    inputs = (1,) if operator.name == "addmm" else (0,)
    return Quantizable(node, kind, operator.name, name, module, types, inputs, operator.weight, operator.layout)


def _activations_only(node: fx.Node) -> Quantizable | None:
    kind = "add" if node.target in _SUMS else "matmul" if node.target in (*_PRODUCTS, _ATTENTION) else None
    if kind is None or not all(isinstance(item, fx.Node) and _is_float(item) for item in node.args[:2]):
        return None
    if any(attribute_behind(item) is not None for item in node.args[:2]):
        return None
    module, types = _owner(node, "")
    op = str(node.target).removeprefix("aten.").split(".")[0]
    name = f"{module}.{node.name}" if module else node.name
    return Quantizable(node, kind, op, name, module, types, () if node.target is _ATTENTION else (0, 1))


def _from_convolution(value: object, sums: set[fx.Node]) -> bool:
    """Whether a value is the result of a convolution or of such a sum, seen through quantizers and ReLU."""
    while isinstance(value, fx.Node) and value.target in (*_CARRIERS, ops.fake_quantize):
        value = value.args[0]
    if not isinstance(value, fx.Node):
        return False
    operator = OPERATORS.get(value.target)
    return value in sums or (operator is not None and operator.layout is Layout.CONV)


def _owner(node: fx.Node, module: str) -> tuple[str, tuple[str, ...]]:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    types = tuple(str(kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2] for _, kind in stack)
    return module or (str(stack[-1][0]) if stack else ""), types


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
