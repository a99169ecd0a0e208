"""Which operators of a Program run in 16 bits: decided by what an operator is, never by the model that it comes from.

Three kinds. *Products* (layers, matrix products, convolutions, attention) are what 16 bits make fast; they round their operands
and add up in float32 inside. *Followers* move values or change each by itself; they run in 16 bits between products. All others
stay in float32: normalizations, reductions, softmax, exponentials, powers, losses, and whatever is not listed here.

Attention counts as a product, although a softmax is in it: PyTorch's kernels compute that softmax in float32. Measured on CPU
with random operands, its largest error in bfloat16 is 0.42 of the format's spacing of the largest output (0.27 is the rounding
of the result alone); the same written out in 16-bit operators has 1.13.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphprune.ir import ops
from graphprune.ir.blocks import base_of, changed_values
from graphprune.ir.interface import is_label
from graphprune.ir.program import Program
from graphprune.ir.sites import SEEN_THROUGH, attribute_behind

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""16-bit formats by name."""
PRODUCTS = frozenset({
    "addmm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "einsum",
    "linear", "matmul", "mm", "scaled_dot_product_attention",
})  # fmt: skip
"""Operators that run in 16 bits, by name."""
_MOVES = frozenset({
    "_unsafe_view", "alias", "cat", "chunk", "clone", "constant_pad_nd", "contiguous", "detach", "expand", "expand_as", "flatten",
    "flip", "movedim", "narrow", "pad", "permute", "pixel_shuffle", "repeat", "reshape", "roll", "select", "slice", "split",
    "split_with_sizes", "squeeze", "stack", "swapaxes", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view",
})  # fmt: skip
_ARITHMETIC = frozenset({"add", "div", "maximum", "minimum", "mul", "sub", "where"})
_POINTWISE = frozenset({
    "abs", "dropout", "feature_dropout", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "max_pool1d", "max_pool2d",
    "neg", "relu", "relu6", "sigmoid", "silu", "tanh",
})  # fmt: skip
FOLLOWERS = _MOVES | _ARITHMETIC | _POINTWISE
"""Operators that run in 16 bits between products, by name; those that change a value in place (``relu_``) count with the others."""
_QUANTIZERS = (ops.fake_quantize, ops.dynamic_fake_quantize)
_NO_READERS = ("sym_size", "sym_stride", "sym_numel", "sym_storage_offset")


@dataclass(frozen=True)
class Candidate:
    """An operator that can run in 16 bits.

    Attributes:
        node: The operator.
        op: Its name, one of ``PRODUCTS`` or ``embedding``.
        name: Name of the parameter that is its weight; ``<module>.<op>`` where it has none.
        module: Dotted name of the module that it belongs to.
    """

    node: fx.Node
    op: str
    name: str
    module: str

    @property
    def width(self) -> torch.dtype:
        """The float dtype of its result."""
        return dtypes_of(self.node)[0]


def find_candidates(program: Program, *, embeddings: bool) -> tuple[Candidate, ...]:
    """All products of a flat Program in graph order, and its embeddings where asked for."""
    wanted = PRODUCTS | {"embedding"} if embeddings else PRODUCTS
    parameters = {name for name, _ in program.named_parameters(remove_duplicate=False)}
    return tuple(
        _candidate(node, parameters) for node in program.graph.nodes if name_of(node) in wanted and dtypes_of(node)
    )


def _candidate(node: fx.Node, parameters: Collection[str]) -> Candidate:
    name = name_of(node)
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    for value in node.all_input_nodes:
        root = weight_behind(value)
        if root is not None and root.target in parameters and root.meta["val"].dim() > 1:
            return Candidate(node, name, str(root.target), str(root.target).rpartition(".")[0])
    module = str(stack[-1][0]) if stack else ""
    return Candidate(node, name, f"{module}.{name}" if module else name, module)


def weight_behind(value: fx.Node) -> fx.Node | None:
    """The attribute that a value is made of, seen through masks, gates, quantizers, casts and views; None for others."""
    *_, last = _chain(value)
    return last if last.op == "get_attr" else None


def is_quantized(node: fx.Node) -> bool:
    """Whether an operand of an operator comes out of a quantizer."""
    return any(step.target in _QUANTIZERS for value in node.all_input_nodes for step in _chain(value))


def _chain(value: fx.Node) -> Iterator[fx.Node]:
    """A value and what it is made of by views, masks, gates, quantizers and casts alone, back to where it begins."""
    while True:
        value = base_of(value)
        yield value
        source = value.args[0] if value.target in SEEN_THROUGH else None
        if not isinstance(source, fx.Node):
            return
        value = source


def name_of(node: fx.Node) -> str:
    """Name of an operator of PyTorch without overload and without the ending of those in place; empty for other nodes."""
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    namespace, _, name = (schema.name if schema is not None else "").rpartition("::")
    if namespace != "aten":
        return ""
    return str(name).removesuffix("_") if schema is not None and schema.is_mutable else str(name)


def dtypes_of(node: fx.Node) -> tuple[torch.dtype, ...]:
    """Dtypes of a node's float results, one for most operators; empty where it has none."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(item.dtype for item in values if isinstance(item, Tensor) and item.is_floating_point())


def reads_values(node: fx.Node) -> bool:
    """Whether an operator reads the numbers in its operands, and not only their sizes, device or dtype."""
    return node.target is not getattr and not name_of(node).startswith(_NO_READERS)


def changed_later(graph: fx.Graph) -> set[fx.Node]:
    """Values that are changed in place while something still reads them afterwards, other than through the changed result.

    Each stands for all views of it (see ``blocks.base_of``). A copy of such a value can be read only where it was made.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    views: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        views.setdefault(base_of(node), []).append(node)
    found: set[fx.Node] = set()
    for node in graph.nodes:
        for value in changed_values(node):
            base = base_of(value)
            earlier = [view for view in views[base] if order[view] < order[node]]
            given = base.op in ("placeholder", "get_attr")
            if given or any(order[user] > order[node] for view in earlier for user in view.users):
                found.add(base)
    return found


def plan(
    graph: fx.Graph, products: Collection[fx.Node], dtype: torch.dtype, keep: Collection[str], neutral: Collection[str]
) -> set[fx.Node]:
    """Choose everything that runs in 16 bits, given which products do.

    A follower does where all its float operands are in 16 bits and something that reads its result runs in 16 bits. So a
    residual stream that only normalizations and sums read stays in float32, as it does under autocast.

    Args:
        graph: A flat graph.
        products: Products that run in 16 bits.
        dtype: The 16-bit format.
        keep: Names of followers that stay in float32.
        neutral: Parameters, which are rounded where they meet 16-bit values.

    Returns:
        ``products`` and followers.
    """
    fixed = changed_later(graph)
    loss = _loss(graph)
    chosen = set(products)

    def in_16_bits(node: fx.Node) -> bool:
        return node in chosen or dtype in dtypes_of(node)

    for node in graph.nodes:
        if node.target is operator.getitem and node.args[0] in chosen:
            chosen.add(node)
        elif node not in loss and base_of(node) not in fixed and _may_follow(node, dtype, keep):
            operands = [used for used in node.all_input_nodes if dtypes_of(used)]
            others = [used for used in operands if not _is_parameter(used, neutral)]
            if others and all(map(in_16_bits, others)):
                chosen.add(node)
    for node in reversed(graph.nodes):
        if node in chosen and node not in products and node.target is not operator.getitem:
            parts = [user for user in node.users if user.target is operator.getitem]
            readers = [reader for value in (node, *parts) for reader in value.users if reader not in parts]
            if not any(map(in_16_bits, readers)):
                chosen.difference_update((node, *parts))
    return chosen


def _may_follow(node: fx.Node, dtype: torch.dtype, keep: Collection[str]) -> bool:
    name = name_of(node)
    if name not in FOLLOWERS or name in keep or set(dtypes_of(node)) != {torch.float32}:
        return False
    if name == "div" and isinstance(node.args[1], fx.Node):
        return False  # by a value, as normalizations do
    if name in _ARITHMETIC and any(not isinstance(used.meta.get("val"), Tensor) for used in node.all_input_nodes):
        return False  # by a number that is computed, such as the lowest float32
    numbers = [item for item in (*node.args, *node.kwargs.values()) if isinstance(item, float) and math.isfinite(item)]
    return all(abs(number) <= torch.finfo(dtype).max for number in numbers)


def _is_parameter(node: fx.Node, neutral: Collection[str]) -> bool:
    root = attribute_behind(node)
    return root is not None and root.target in neutral


def _loss(graph: fx.Graph) -> set[fx.Node]:
    """What depends on labels, up to the next product or lookup: labels that are fed to a decoder are data there."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        label = node.op == "placeholder" and is_label(str(node.target))
        ends = name_of(node) in PRODUCTS or name_of(node) == "embedding"
        if label or (not ends and any(used in found for used in node.all_input_nodes)):
            found.add(node)
    return found


def with_dtype(value: object, dtype: torch.dtype) -> object:
    """What ``node.meta["val"]`` becomes where float results change their dtype."""
    if isinstance(value, (list, tuple)):
        return type(value)(with_dtype(item, dtype) for item in value)
    if isinstance(value, Tensor) and value.is_floating_point():
        with torch.no_grad():
            return value.detach().to(dtype)
    return value
