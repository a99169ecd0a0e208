"""ONNX passes that write attention masks as DeepSparse's engine takes them: floats that are multiplied, no conditions."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphprune.targets.onnx_model.draft import FLOAT, Draft, is_constant, made_by, replace_value

_BOOL = 9
_LEAST = -1e30
"""Above which a number that closes a mask could come near to scores."""
_HANDED = ("Unsqueeze", "Squeeze", "Expand", "Reshape", "Transpose", "Slice", "Identity")
"""Operators that hand entries of their first input on, each as it is."""


def gather_in_order(draft: Draft) -> int:
    """Write a look-up of all entries in their order as the value itself.

    Before: ``GatherND(x, Concat(rows, columns))``, the indices ``Range(0, size)`` of each dimension, unsqueezed and expanded: how the
    mask functions of transformers look up ``attention_mask[batch, key]``.  After: ``Unsqueeze(x)``.  Exact; the dimensions that
    were expanded are left to the broadcasting of what follows.
    """
    count = 0
    for node in draft.nodes("GatherND"):
        source = node.inputs[0]
        places = _places(node)
        if places is None or draft.is_output(node.outputs[0]):
            continue
        order, rank = places
        if sorted(order) != list(order):
            continue
        axes = np.array([index for index in range(rank) if index not in order], np.int64)
        stem = node.outputs[0].name
        inputs = [source, draft.constant(draft.fresh(f"{stem}_axes"), axes)]
        replace_value(draft, node.outputs[0], draft.add("Unsqueeze", f"{stem}_in_order", inputs))
        node.outputs.clear()
        count += 1
    return count


def drop_open_masks(draft: Draft) -> int:
    """Drop masks that allow everything.

    Before: ``Add(scores, Where(mask, 0, least))`` and ``Where(mask, x, other)`` with a mask that is true everywhere, whatever the sizes,
    and ``And(mask, other)``.  After: ``scores``, ``x`` and ``other``.  Exact.
    """
    count = 0
    for node in draft.nodes("Where", "And"):
        if not node.outputs or draft.is_output(node.outputs[0]):
            continue
        output = node.outputs[0]
        if node.op == "And":
            kept = [item for item in node.inputs if not _always_true(item)]
            if len(kept) != 1:
                continue
            replace_value(draft, output, kept[0])
        else:
            mask, yes, no = _choice(node)
            if not _always_true(mask) or _number(no) is None:
                continue
            if not is_constant(yes):
                if not _covers(yes, mask):
                    continue
                replace_value(draft, output, yes)
            elif not _drop_zeros(draft, output, yes, mask):
                continue
        node.outputs.clear()
        count += 1
    return count


def _drop_zeros(draft: Draft, zeros: Any, number: Any, mask: Any) -> bool:
    """Drop zeros, as a mask is open, out of the sums that they are added in; whether that could be done."""
    others = [[item for item in user.inputs if item is not zeros] for user in zeros.outputs]
    if _number(number) != 0.0 or any(user.op != "Add" for user in zeros.outputs):
        return False
    if not all(len(items) == 1 and _covers(items[0], mask) for items in others):
        return False
    for user, (scores,) in zip(list(zeros.outputs), others, strict=True):
        replace_value(draft, user.outputs[0], scores)
        user.outputs.clear()
    return True


def multiply_masks(draft: Draft) -> int:
    """Write masks as factors.

    Before: ``Add(scores, Where(mask, 0, least))`` or ``Where(mask, scores, least)``, and ``Where(any(mask), x, 0)`` for rows that may see
    nothing.  After: ``Add(scores, Mul(Sub(1, mask), least))`` and ``Mul(x, any(mask))`` with the mask as floats 0 and 1, where ``And(a,
    b)`` is ``Mul(a, b)`` and ``any`` is ReduceMax.  Exact for scores that are small beside ``least``, below 1e30.
    """
    count = 0
    made: dict[int, Any] = {}
    for node in draft.nodes("Where"):
        mask, yes, no = _choice(node)
        output, least = node.outputs[0], _number(no)
        if is_constant(mask) or least is None or not (least == 0.0 or _LEAST > least > -np.inf):
            continue
        if no.values.dtype != np.float32 or (is_constant(yes) and not (least and _number(yes) == 0.0)):
            continue
        factor = _as_float(draft, mask, made)
        node.outputs.clear()
        if least == 0.0:
            draft.add("Mul", f"{output.name}_masked", [yes, factor], output=output)
        else:
            left = draft.add("Sub", f"{output.name}_closed", [_one(draft, output.name), factor])
            if is_constant(yes):
                draft.add("Mul", f"{output.name}_penalty", [left, no], output=output)
            else:
                penalty = draft.add("Mul", f"{output.name}_penalty", [left, no])
                draft.add("Add", f"{output.name}_scores", [yes, penalty], output=output)
        count += 1
    return count


def _choice(node: Any) -> tuple[Any, Any, Any]:
    """Mask, value where it is true and value where it is false, of a Where; a Not before it is taken away."""
    mask, yes, no = node.inputs
    inverted = made_by(mask, "Not")
    return (mask, yes, no) if inverted is None else (inverted.inputs[0], no, yes)


def _one(draft: Draft, stem: str) -> Any:
    return draft.constant(draft.fresh(f"{stem}_one"), np.array(1.0, np.float32))


def _as_float(draft: Draft, value: Any, made: dict[int, Any]) -> Any:
    """A mask as floats, 0 and 1; ``made`` holds those that exist, by their bool value."""
    if id(value) in made:
        return made[id(value)]
    node, stem = value.inputs[0] if value.inputs else None, f"{value.name}_factor"
    if is_constant(value):
        result = draft.constant(draft.fresh(stem), value.values.astype(np.float32))
    elif node is not None and node.op == "And":
        result = draft.add("Mul", stem, [_as_float(draft, item, made) for item in node.inputs])
    elif node is not None and node.op == "Not":
        result = draft.add("Sub", stem, [_one(draft, stem), _as_float(draft, node.inputs[0], made)])
    elif node is not None and node.op in _HANDED:
        result = draft.add(node.op, stem, [_as_float(draft, node.inputs[0], made), *node.inputs[1:]], dict(node.attrs))
    elif node is not None and _any_of(value) is not None:
        attributes = {"axes": list(node.inputs[0].inputs[0].attrs["axes"]), "keepdims": 1}
        result = draft.add("ReduceMax", stem, [_as_float(draft, _any_of(value), made)], attributes)
    else:
        result = draft.add("Cast", stem, [value], {"to": FLOAT})
    made[id(value)] = result
    return result


def _any_of(value: Any) -> Any:
    """The mask behind ``Cast(ReduceMax(Cast(mask, int32)), bool)``, else None."""
    outer = made_by(value, "Cast")
    reduced = made_by(outer.inputs[0], "ReduceMax") if outer is not None and outer.attrs["to"] == _BOOL else None
    inner = made_by(reduced.inputs[0], "Cast") if reduced is not None else None
    if reduced is None or inner is None or "axes" not in reduced.attrs or not reduced.attrs.get("keepdims", 1):
        return None
    return inner.inputs[0]


def _covers(value: Any, mask: Any) -> bool:
    """Whether a value has every size that a mask would broadcast it to."""
    have, want = _shape(value), _shape(mask)
    if have is None or want is None or len(want) > len(have):
        return False
    return all(size in (1, other) for size, other in zip(reversed(want), reversed(have), strict=False))


def _number(value: Any) -> float | None:
    """The number that a constant holds everywhere, else None."""
    if not is_constant(value) or value.values.size != 1:
        return None
    return float(value.values.reshape(()).item())


def _always_true(value: Any) -> bool:
    """Whether a bool value is true everywhere, at every size."""
    if is_constant(value):
        return bool(np.all(value.values))
    node = value.inputs[0] if value.inputs else None
    if node is None:
        return False
    if node.op in _HANDED:
        return _always_true(node.inputs[0])
    if node.op == "And":
        return all(map(_always_true, node.inputs))
    if node.op == "GreaterOrEqual":
        return _number(node.inputs[1]) == 0.0 and _counts(node.inputs[0])
    return _any_of(value) is not None and _always_true(_any_of(value))


def _counts(value: Any) -> bool:
    """Whether a value is ``Range(0, ...)``, moved about."""
    while value.inputs and value.inputs[0].op in _HANDED:
        value = value.inputs[0].inputs[0]
    node = made_by(value, "Range")
    return node is not None and _number(node.inputs[0]) == 0.0 and (_number(node.inputs[2]) or 0.0) > 0.0


def _places(node: Any) -> tuple[list[int], int] | None:
    """For each dimension of what GatherND reads, where it is in the indices, and their rank; None where they are not in order."""
    source, joined = node.inputs[0], made_by(node.inputs[1], "Concat")
    sizes = _shape(source)
    if joined is None or sizes is None or len(joined.inputs) != len(sizes) or node.attrs.get("batch_dims", 0):
        return None
    order, ranks = [], set()
    for value, size in zip(joined.inputs, sizes, strict=True):
        last = made_by(value, "Unsqueeze")  # to be one of the entries of an index
        expanded = made_by(last.inputs[0], "Expand") if last is not None else None
        found = _where_it_counts(expanded.inputs[0] if expanded is not None else None, size)
        if found is None:
            return None
        order.append(found[0])
        ranks.add(found[1])
    return (order, ranks.pop()) if len(ranks) == 1 else None


def _where_it_counts(value: Any, size: object) -> tuple[int, int] | None:
    """Position of the dimension in which an unsqueezed ``Range(0, size)`` counts, and the rank; None where it is something else."""
    axes = []
    while value is not None and value.inputs and value.inputs[0].op == "Unsqueeze":
        node = value.inputs[0]
        if not is_constant(node.inputs[1]):
            return None
        axes.append([int(axis) for axis in node.inputs[1].values.reshape(-1)])
        value = node.inputs[0]
    node = made_by(value, "Range") if value is not None else None
    if (
        node is None
        or _number(node.inputs[0]) != 0.0
        or _number(node.inputs[2]) != 1.0
        or _size(node.inputs[1]) != size
    ):
        return None
    dims = [True]
    for group in reversed(axes):
        rank = len(dims) + len(group)
        taken = {axis % rank for axis in group}
        rest = iter(dims)
        dims = [False if index in taken else next(rest) for index in range(rank)]
    return dims.index(True), len(dims)


def _size(value: Any) -> object:
    """The size that ``Squeeze(Slice(Shape(x), i, i + 1))`` reads, as its number or its name; None where it cannot be told."""
    if is_constant(value):
        return int(value.values.item()) if value.values.size == 1 else None
    squeezed = made_by(value, "Squeeze", "Reshape")
    part = made_by(squeezed.inputs[0], "Slice") if squeezed is not None else None
    whole = made_by(part.inputs[0], "Shape") if part is not None else None
    if part is None or whole is None or not is_constant(*part.inputs[1:]):
        return None
    start, end = (int(item.values.reshape(-1)[0]) for item in part.inputs[1:3])
    sizes = _shape(whole.inputs[0])
    return sizes[start] if sizes is not None and end == start + 1 and 0 <= start < len(sizes) else None


def _shape(value: Any) -> list[object] | None:
    """Sizes of a value as numbers and names; a Cast has its input's."""
    while value.shape is None and value.inputs and value.inputs[0].op == "Cast":
        value = value.inputs[0].inputs[0]
    return None if value.shape is None else list(value.shape)
