"""Follow the output features of linear layers through the graph: which of them does every entry of a later value depend on?

Every entry of a value gets, for each layer that it stems from, the range of output features that it depends on. Operators that
move entries (view, transpose, split, cat, ...) run on the ranges themselves; elementwise operators unite the ranges of what
they combine; operators along a dimension (softmax, layer_norm) unite along it; attention and products of two values unite all
of a head. Ranges may be wider than the truth, never narrower. No model family and no module name is known here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from graphprune.ir.sites import size_hint

aten = torch.ops.aten
_MOVES = frozenset({
    "_unsafe_view", "alias", "cat", "chunk", "clone", "concat", "contiguous", "detach", "expand", "expand_as", "flatten", "flip",
    "lift_fresh", "movedim", "narrow", "permute", "repeat", "repeat_interleave", "reshape", "reshape_as", "roll", "select", "slice",
    "split", "split_with_sizes", "squeeze", "stack", "swapaxes", "t", "tensor_split", "transpose", "unbind", "unflatten",
    "unsafe_chunk", "unsafe_split", "unsqueeze", "view",
})  # fmt: skip
_ELEMENTWISE = frozenset({
    "_to_copy", "alpha_dropout", "dropout", "fake_quantize", "hardswish", "hardswish_", "log_sigmoid", "masked_fill", "prelu", "to",
    "type_as", "where",
})  # fmt: skip
_ALONG = frozenset({
    "amax", "amin", "layer_norm", "linalg_vector_norm", "log_softmax", "mean", "rms_norm", "softmax", "sum", "var",
})  # fmt: skip
_PRODUCTS = frozenset({"baddbmm", "bmm", "matmul", "scaled_dot_product_attention"})
_SHAPE_ONLY = frozenset({
    "empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like",
})  # fmt: skip
_COPYING: dict[object, object] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}
"""What runs on ranges in place of an operator that wants its own strides."""
_NONE = (torch.iinfo(torch.int32).max, -1)


class Origin(NamedTuple):
    """A range of output features of one use of a layer, both ends included; split and slice narrow it."""

    use: fx.Node
    first: int
    last: int


Span = tuple[Tensor, Tensor]
"""For each entry of a value, the first and the last output feature that it depends on; first > last where it depends on none."""
Spans = Mapping[Origin, Span]


class LostTrackError(Exception):
    """Features cannot be followed; says why, for users."""


def is_followed(node: fx.Node) -> bool:
    """Whether features can be followed through an operator."""
    name = _name(node)
    if node.op != "call_function":
        return False
    return node.target is operator.getitem or name in _MOVES | _ALONG | _PRODUCTS or _is_elementwise(node)


def sees_values(node: fx.Node) -> bool:
    """Whether an operator has a result that depends on the numbers in its inputs, and not on their shape alone."""
    value = node.meta.get("val")
    return node.op == "output" or (isinstance(value, (Tensor, list, tuple)) and _name(node) not in _SHAPE_ONLY)


def is_product(node: fx.Node) -> bool:
    """Whether an operator multiplies matrices of values, as attention does."""
    return node.op == "call_function" and _name(node) in _PRODUCTS


def followed_region(value: fx.Node, layers: Collection[fx.Node]) -> tuple[set[fx.Node], list[fx.Node]]:
    """Walk from a value back to the layers that it stems from.

    Args:
        value: Where to start.
        layers: Nodes to stop at.

    Returns:
        All nodes on the way from such a layer to ``value``, both included, and the layers among them; both empty where there
        is none.
    """
    seen, waiting, found = {value}, [value], []
    while waiting:
        node = waiting.pop()
        if node in layers:
            found.append(node)
        elif is_followed(node):
            fresh = [used for used in node.all_input_nodes if used not in seen]
            seen.update(fresh)
            waiting.extend(fresh)
    region, waiting = set(found), list(found)
    while waiting:
        users = [user for user in waiting.pop().users if user not in region and user not in layers]
        fresh = [user for user in users if user in seen and is_followed(user)]
        region.update(fresh)
        waiting.extend(fresh)
    return region, found


def follow(graph: fx.Graph, region: Collection[fx.Node], layers: Iterable[fx.Node]) -> dict[fx.Node, Any]:
    """Compute what every entry of the values in a region depends on.

    Args:
        graph: The graph.
        region: Nodes between the layers and a value, from ``followed_region``.
        layers: The layers to start from; their features are the last dimension of their result.

    Returns:
        ``Spans`` of each node; a list of them for operators with several results.

    Raises:
        LostTrackError: An operator does something that cannot be followed; says what.
    """
    data = _data(graph)
    spans: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node not in region:
            continue
        if node in layers:
            shape = shape_of(node)
            rows = torch.arange(shape[-1], dtype=torch.int32).expand(shape)
            spans[node] = {Origin(node, 0, shape[-1] - 1): (rows, rows)}
            continue
        try:
            spans[node] = _step(node, spans, data)
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise LostTrackError(f"features cannot be followed through {_name(node)} ({reason})") from error
    return spans


def all_spans(value: Any) -> Iterator[Spans]:
    """The spans of a node with one result or several."""
    yield from value if isinstance(value, list) else (value,)


def unite(first: Span, second: Span) -> Span:
    """The smallest ranges that hold both."""
    return torch.minimum(first[0], second[0]), torch.maximum(first[1], second[1])


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's value, with the traced size of dynamic dimensions."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise LostTrackError(f"the shape of {node.name} is unknown")
    return tuple(size_hint(size) for size in value.shape)


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).rpartition("::")[2] if schema is not None else str(getattr(node.target, "__name__", ""))


def _is_elementwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or _name(node) in _ELEMENTWISE


def _step(node: fx.Node, spans: Mapping[fx.Node, Any], data: Collection[fx.Node]) -> Any:
    if node.target is operator.getitem:
        return spans[node.args[0]][node.args[1]]  # type: ignore[index]
    name = _name(node)
    values = [used for used in node.all_input_nodes if isinstance(used.meta.get("val"), Tensor)]
    followed = [used for used in values if used in spans]
    if name in _MOVES:
        result = _move(node, followed, spans)
    elif name in _PRODUCTS:
        result = _multiply(node, followed, spans)
    elif name in _ALONG:
        if followed != [node.args[0]]:
            raise LostTrackError(f"features are used as a parameter of {name}")
        result = _along(node, name, spans[followed[0]])
    else:
        if len(followed) > 1 and node.target._schema.is_mutable:  # type: ignore[union-attr]
            raise LostTrackError(f"{name} changes features in place")
        shape = shape_of(node)
        result = _united(_spread(spans[used], shape) for used in followed)
        _check_mixed(node, followed, spans)
    for used in values:
        if used not in spans and used in data:
            for part in all_spans(result):
                _check_other(node, used, part)
    return result


def _check_other(node: fx.Node, other: fx.Node, spans: Spans) -> None:
    """Refuse a second operand that differs from feature to feature, depends on the input, and comes from no linear layer."""
    matrix = 2 if is_product(node) else 0
    sizes = shape_of(other)[: -matrix or None]
    if any(size > 1 and _varies(spans, back + matrix) for back, size in enumerate(reversed(sizes), 1)):
        raise LostTrackError(f"{_name(node)} joins its features with {other.name}, which comes from no linear layer")


def _check_mixed(node: fx.Node, followed: Iterable[fx.Node], spans: Mapping[fx.Node, Any]) -> None:
    """Refuse operands of which one has features of its own at each place, and another has features that were mixed."""
    for back in range(1, len(shape_of(node)) + 1):
        wide = [used for used in followed if len(shape_of(used)) >= back and shape_of(used)[-back] > 1]
        varying = [used for used in wide if _varies(spans[used], back)]
        if varying and len(varying) < len(wide):
            (other, *_) = (used for used in wide if used not in varying)
            raise LostTrackError(f"{_name(node)} joins its features with {other.name}, whose features are mixed")


def _varies(spans: Spans, back: int) -> bool:
    """Whether the features that entries depend on differ along a dimension, counted from the last one."""
    lows = [low for low, _ in spans.values() if low.dim() >= back]
    return any(bool((low != low.narrow(-back, 0, 1)).any()) for low in lows)


def _united(parts: Iterable[Spans]) -> Spans:
    result: dict[Origin, Span] = {}
    for part in parts:
        for origin, span in part.items():
            result[origin] = unite(result[origin], span) if origin in result else span
    return result


def _spread(spans: Spans, shape: tuple[int, ...]) -> Spans:
    return {origin: (low.expand(shape), high.expand(shape)) for origin, (low, high) in spans.items()}


def _move(node: fx.Node, followed: list[fx.Node], spans: Mapping[fx.Node, Any]) -> Any:
    """Run an operator on the ranges themselves; a result with fewer entries narrows its origins."""
    results: list[dict[Origin, Span]] = []
    several = False
    run: Any = _COPYING.get(node.target, node.target)
    for origin in dict.fromkeys(origin for used in followed for origin in spans[used]):

        def value(end: int, used: fx.Node, origin: Origin = origin) -> Any:
            given = used.meta.get("val")
            if not isinstance(given, Tensor):
                return size_hint(given) if isinstance(given, torch.SymInt) else given
            span = spans.get(used, {}).get(origin)
            return span[end] if span is not None else torch.tensor(_NONE[end], dtype=torch.int32).expand(shape_of(used))

        low, high = (
            run(*fx.node.map_arg(node.args, partial(value, end)), **fx.node.map_arg(node.kwargs, partial(value, end)))
            for end in (0, 1)
        )
        several = not isinstance(low, Tensor)
        smaller = several or low.numel() < math.prod(shape_of(followed[0]))
        for index, span in enumerate(zip(low, high, strict=True) if several else [(low, high)]):
            while len(results) <= index:
                results.append({})
            narrow = _narrowed(origin, span) if smaller else origin
            if narrow is not None:
                known = results[index].get(narrow)
                results[index][narrow] = span if known is None else unite(known, span)
    return results if several else results[0]


def _narrowed(origin: Origin, span: Span) -> Origin | None:
    """The origin with the range that a span really has; None where it is empty."""
    first, last = (int(span[0].min()), int(span[1].max())) if span[0].numel() else _NONE
    return Origin(origin.use, first, last) if first <= last else None


def _along(node: fx.Node, name: str, spans: Spans) -> Spans:
    """Unite ranges along the dimensions that an operator works along."""
    rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    given: Any = node.args[2 if name == "linalg_vector_norm" else 1] if len(node.args) > 1 else None
    if name in ("layer_norm", "rms_norm"):
        dims = list(range(rank - len(given), rank))
    else:
        given = given if given is not None else node.kwargs.get("dim")
        dims = [given % rank] if isinstance(given, int) else [dim % rank for dim in given or range(rank)]
    shape = shape_of(node)
    result = {}
    for origin, (low, high) in spans.items():
        ends = (low.amin(dims, keepdim=True), high.amax(dims, keepdim=True))
        same = len(shape) == rank
        result[origin] = tuple(end.expand(shape) if same else end.reshape(shape) for end in ends)
    return result  # type: ignore[return-value]


def _multiply(node: fx.Node, followed: list[fx.Node], spans: Mapping[fx.Node, Any]) -> Spans:
    """Unite the ranges of each matrix of a batch, of all operands: a head is one whole."""
    shape = shape_of(node)
    grouped = bool(node.kwargs.get("enable_gqa", False))
    left, right = (node.args[0], node.args[1]) if _name(node) != "baddbmm" else (node.args[1], node.args[2])
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    size = shape_of(right if _is_scores(left, spans) else left)[-1]  # of a head
    result: list[Spans] = []
    for used in followed:
        repeats = shape[-3] // shape_of(used)[-3] if grouped and used in node.args[1:3] else 1
        heads = {}
        for origin, (low, high) in spans[used].items():
            dims = list(range(max(0, low.dim() - 2), low.dim()))
            ends = [low.amin(dims, keepdim=True), high.amax(dims, keepdim=True)]
            if not _is_scores(used, spans) and int((ends[1] - ends[0]).max()) >= size:
                raise LostTrackError("heads are mixed before attention")
            if repeats > 1:
                ends = [end.repeat_interleave(repeats, dim=-3) for end in ends]
            heads[origin] = (ends[0].expand(shape), ends[1].expand(shape))
        result.append(heads)
    return _united(result)


def _is_scores(value: fx.Node, spans: Mapping[fx.Node, Any]) -> bool:
    """Whether a value comes from a product of features, as the attention of tokens to each other does."""
    seen, waiting = {value}, [value]
    while waiting:
        node = waiting.pop()
        if node in spans and is_product(node):
            return True
        fresh = [used for used in node.all_input_nodes if used in spans and used not in seen]
        seen.update(fresh)
        waiting.extend(fresh)
    return False


def _data(graph: fx.Graph) -> set[fx.Node]:
    """Values with features of the input: what depends on float inputs, or on anything looked up by the input's numbers.

    Masks and positions are not among them: they stem from integer inputs, and differ from token to token.
    """
    given: set[fx.Node] = set()
    data: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            if any(used in data for used in node.all_input_nodes) and isinstance(value, (tuple, list)):
                data.add(node)
            continue
        inputs = node.all_input_nodes
        if node.op == "placeholder" or any(used in given for used in inputs):
            given.add(node)
        if _name(node) in _SHAPE_ONLY:
            continue
        looked_up = _name(node) in ("embedding", "index", "index_select", "gather") and node in given
        own = value.is_floating_point() and (node.op in ("placeholder", "call_module") or looked_up)
        if own or any(used in data for used in inputs):
            data.add(node)
    return data
