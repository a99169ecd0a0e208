"""How single operators of newer ONNX operator sets are written in older ones.

A rule gets one node and returns the nodes that stand for it; ``RULES`` says by operator which rule applies below which version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from graphprune.errors import LoweringError

if TYPE_CHECKING:
    import onnx

_FLOAT, _BOOL, _FLOAT16, _INT32 = 1, 9, 10, 6
_SMALL = frozenset({2, 3, 4, 5, _BOOL})
"""uint8, int8, uint16, int16 and bool: types that arithmetic got late, and that int32 holds."""

_AXES_ARE_INPUTS = 18
"""First operator set in which reductions other than ReduceSum take axes as an input."""
_ELEMENTWISE = ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare")
"""Reductions that change entries though they reduce nothing."""


class NoForm(LoweringError):
    """A node has no form in the operator set that is asked for; says why."""


@dataclass
class Values:
    """What is known of the values of a graph, and where rules put new ones.

    Attributes:
        types: ONNX element type by name.
        shapes: Shape by name; -1 for a size that is not known.
        constants: Contents of small initializers and Constant nodes by name.
        names: All names in use.
        made: Initializers that rules made.
        nodes: Nodes that the current rule made so far.
        stem: Start of the names that the current rule makes.
        opset: The operator set that the current rule writes.
    """

    types: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    made: list[onnx.TensorProto] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    stem: str = ""
    opset: int = 0

    def fresh(self, suffix: str) -> str:
        """A name that nothing has."""
        name, number = f"{self.stem}_{suffix}", 1
        while name in self.names:
            number += 1
            name = f"{self.stem}_{suffix}_{number}"
        self.names.add(name)
        return name

    def constant(self, suffix: str, values: np.ndarray) -> str:
        """Name of a new initializer."""
        from onnx import numpy_helper

        name = self.fresh(suffix)
        self.made.append(numpy_helper.from_array(values, name))
        self.constants[name] = values
        return name

    def number(self, value: float, kind: int = _FLOAT) -> str:
        """Name of a new scalar of an ONNX element type."""
        from onnx import helper

        return self.constant("value", np.array(value, helper.tensor_dtype_to_np_dtype(kind)))

    def add(self, kind: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        """Append a node and return the name of its output."""
        from onnx import helper

        result = self.fresh(kind.lower()) if output is None else output
        self.nodes.append(helper.make_node(kind, inputs, [result], name=self.fresh("node"), **attributes))
        return result

    def reduce(self, kind: str, source: str, axes: list[int], output: str | None = None, keepdims: int = 1) -> str:
        """Append a reduction, its axes where the operator set has them; no axes are all."""
        if not axes:
            return self.add(kind, [source], output, keepdims=keepdims)
        if self.opset >= _AXES_ARE_INPUTS:
            where = self.constant("axes", np.array(axes, np.int64))
            return self.add(kind, [source, where], output, keepdims=keepdims)
        return self.add(kind, [source], output, axes=axes, keepdims=keepdims)

    def rank(self, name: str) -> int:
        """Number of dimensions of a value."""
        if name not in self.shapes:
            raise NoForm("the rank of its input is not known")
        return len(self.shapes[name])

    def known(self, name: str, what: str) -> np.ndarray:
        """Contents of a constant."""
        if name not in self.constants:
            raise NoForm(f"its {what} are computed, and must be constants there")
        return self.constants[name]


Rule = Callable[["onnx.NodeProto", Values], None]


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Value of an attribute."""
    from onnx import helper

    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)


def without(node: onnx.NodeProto, *names: str) -> onnx.NodeProto:
    """A copy without some attributes."""
    copied: Any = type(node)()
    copied.CopyFrom(node)
    kept = [item for item in node.attribute if item.name not in names]
    del copied.attribute[:]
    copied.attribute.extend(kept)
    return cast("onnx.NodeProto", copied)


def _axes_as_attribute(node: onnx.NodeProto, values: Values) -> None:
    """``ReduceX(x, axes)`` to ``ReduceX[axes=...](x)``, bool by way of int32. Exact."""
    axes = values.known(node.input[1], "axes").reshape(-1).tolist() if len(node.input) > 1 and node.input[1] else []
    source, keepdims = node.input[0], attribute(node, "keepdims", 1)
    if not axes and attribute(node, "noop_with_empty_axes", 0):
        if node.op_type in _ELEMENTWISE:
            raise NoForm("it reduces nothing (noop_with_empty_axes=1)")
        values.add("Identity", [source], node.output[0])
    elif values.types.get(source) == _BOOL:
        reduced = values.reduce(node.op_type, values.add("Cast", [source], to=_INT32), axes, keepdims=keepdims)
        values.add("Cast", [reduced], node.output[0], to=_BOOL)
    else:
        values.reduce(node.op_type, source, axes, node.output[0], keepdims)


def _split(node: onnx.NodeProto, values: Values) -> None:
    """``Split[num_outputs=n](x)`` to ``Split(x, sizes)``; the last part is the shorter one. Exact."""
    copied, parts = without(node, "num_outputs"), len(node.output)
    if len(node.input) < 2 or not node.input[1]:
        axis, shape = attribute(node, "axis", 0), values.shapes.get(node.input[0])
        numbers = np.arange(parts, dtype=np.int64)
        if shape is not None and shape[axis] >= 0:
            part = -(-shape[axis] // parts)
            sizes = values.constant("sizes", np.clip(shape[axis] - part * numbers, 0, part))
        else:
            shape_now = values.add("Shape", [node.input[0]])
            size = values.add("Gather", [shape_now, values.constant("axis", np.array([axis], np.int64))])
            more = values.add("Add", [size, values.constant("round", np.array([parts - 1], np.int64))])
            part_now = values.add("Div", [more, values.constant("parts", np.array([parts], np.int64))])
            before = values.add("Mul", [part_now, values.constant("numbers", numbers)])
            left = values.add("Min", [values.add("Sub", [size, before]), part_now])
            sizes = values.add("Max", [left, values.constant("zero", np.zeros(1, np.int64))])
        copied.input[:] = [node.input[0], sizes]
    values.nodes.append(copied)


def _layer_normalization(node: onnx.NodeProto, values: Values) -> None:
    """``LayerNormalization`` to its mean, variance and scale, the form that onnxruntime fuses again.

    Rounding: as where LayerNormalization adds in another order. float16 is normalized in float32, as there.
    """
    source, scale = node.input[0], node.input[1]
    bias = node.input[2] if len(node.input) > 2 else ""
    axis, kind = attribute(node, "axis", -1), values.types.get(source, _FLOAT)
    axes = list(range(axis, 0)) if axis < 0 else list(range(axis - values.rank(source), 0))
    wide = kind == _FLOAT16
    inner = values.add("Cast", [source], to=_FLOAT) if wide else source
    mean = values.reduce("ReduceMean", inner, axes, _named(node, 1))
    centered = values.add("Sub", [inner, mean])
    working = _FLOAT if wide else kind
    squares = values.add("Pow", [centered, values.number(2.0, working)])
    variance = values.reduce("ReduceMean", squares, axes)
    shifted = values.add("Add", [variance, values.number(attribute(node, "epsilon", 1e-5), working)])
    deviation = values.add("Sqrt", [shifted])
    if _named(node, 2):
        values.add("Reciprocal", [deviation], node.output[2])
    normal = values.add("Div", [centered, deviation])
    if wide:
        normal = values.add("Cast", [normal], to=kind)
    if not bias:
        values.add("Mul", [normal, scale], node.output[0])
    else:
        values.add("Add", [values.add("Mul", [normal, scale]), bias], node.output[0])


def _rms_normalization(node: onnx.NodeProto, values: Values) -> None:
    """``RMSNormalization`` to ``Mul(Div(x, Sqrt(mean of squares + epsilon)), scale)``. Rounding."""
    source, kind = node.input[0], values.types.get(node.input[0], _FLOAT)
    axis = attribute(node, "axis", -1)
    axes = list(range(axis, 0)) if axis < 0 else list(range(axis - values.rank(source), 0))
    wide = kind == _FLOAT16
    inner, working = (values.add("Cast", [source], to=_FLOAT), _FLOAT) if wide else (source, kind)
    squares = values.reduce("ReduceMean", values.add("Pow", [inner, values.number(2.0, working)]), axes)
    root = values.add("Sqrt", [values.add("Add", [squares, values.number(attribute(node, "epsilon", 1e-5), working)])])
    normal = values.add("Div", [inner, root])
    normal = values.add("Cast", [normal], to=kind) if wide else normal
    values.add("Mul", [normal, node.input[1]], node.output[0])


def _gelu(node: onnx.NodeProto, values: Values) -> None:
    """``Gelu`` to Erf or Tanh, in the order of factors that onnxruntime fuses. Rounding."""
    source, kind = node.input[0], values.types.get(node.input[0], _FLOAT)
    if attribute(node, "approximate", b"none") == b"none":
        inner = values.add("Erf", [values.add("Div", [source, values.number(2.0**0.5, kind)])])
    else:
        cube = values.add("Pow", [source, values.number(3.0, kind)])
        cubic = values.add("Add", [source, values.add("Mul", [cube, values.number(0.044715, kind)])])
        inner = values.add("Tanh", [values.add("Mul", [cubic, values.number((2.0 / np.pi) ** 0.5, kind)])])
    twice = values.add("Mul", [source, values.add("Add", [inner, values.number(1.0, kind)])])
    values.add("Mul", [twice, values.number(0.5, kind)], node.output[0])


def _hard_swish(node: onnx.NodeProto, values: Values) -> None:
    """``HardSwish(x)`` to ``Mul(x, HardSigmoid(x))``. Rounding."""
    gate = values.add("HardSigmoid", [node.input[0]], alpha=1.0 / 6.0, beta=0.5)
    values.add("Mul", [node.input[0], gate], node.output[0])


def _mish(node: onnx.NodeProto, values: Values) -> None:
    """``Mish(x)`` to ``Mul(x, Tanh(Softplus(x)))``. Rounding."""
    gate = values.add("Tanh", [values.add("Softplus", [node.input[0]])])
    values.add("Mul", [node.input[0], gate], node.output[0])


def _swish(node: onnx.NodeProto, values: Values) -> None:
    """``Swish(x)`` to ``Mul(x, Sigmoid(alpha * x))``. Rounding."""
    source, kind, alpha = node.input[0], values.types.get(node.input[0], _FLOAT), attribute(node, "alpha", 1.0)
    scaled = source if alpha == 1.0 else values.add("Mul", [source, values.number(alpha, kind)])
    values.add("Mul", [source, values.add("Sigmoid", [scaled])], node.output[0])


def _shape(node: onnx.NodeProto, values: Values) -> None:
    """``Shape[start, end](x)`` to ``Slice(Shape(x), start, end)``. Exact."""
    start, end = attribute(node, "start", 0), attribute(node, "end")
    whole = values.add("Shape", [node.input[0]])
    last = np.iinfo(np.int64).max if end is None else end
    limits = [values.constant(name, np.array([value], np.int64)) for name, value in (("start", start), ("end", last))]
    values.add("Slice", [whole, *limits], node.output[0])


def _reshape(node: onnx.NodeProto, values: Values) -> None:
    """``Reshape[allowzero=1]`` to ``Reshape``. Exact but for tensors with no entries, which a computed shape may ask for."""
    shape = values.constants.get(node.input[1])
    if shape is not None and (shape == 0).any() and attribute(node, "allowzero", 0):
        raise NoForm("it makes a tensor with no entries (allowzero=1)")
    values.nodes.append(without(node, "allowzero"))


def _trilu(node: onnx.NodeProto, values: Values) -> None:
    """``Trilu(x, k)`` to ``Where(column - row >= k, x, 0)`` (``<= k`` for the lower part). Exact."""
    source, kind = node.input[0], values.types.get(node.input[0], _FLOAT)
    shape = values.add("Shape", [source])
    zero, one = values.constant("zero", np.array(0, np.int64)), values.constant("one", np.array(1, np.int64))
    counts = []
    for position in (-2, -1):
        size = values.add("Gather", [shape, values.constant("position", np.array(position, np.int64))])
        counts.append(values.add("Range", [zero, size, one]))
    rows = values.add("Unsqueeze", [counts[0], values.constant("axis", np.array([1], np.int64))])
    offset = values.add("Sub", [counts[1], rows])
    limit = node.input[1] if len(node.input) > 1 and node.input[1] else zero
    kept = values.add("GreaterOrEqual" if attribute(node, "upper", 1) else "LessOrEqual", [offset, limit])
    values.add("Where", [kept, source, values.number(0, kind)], node.output[0])


def _cast_like(node: onnx.NodeProto, values: Values) -> None:
    """``CastLike(x, y)`` to ``Cast[to](x)``. Exact."""
    if node.input[1] not in values.types:
        raise NoForm("the type that it casts to is not known")
    values.add("Cast", [node.input[0]], node.output[0], to=values.types[node.input[1]])


def _pad(node: onnx.NodeProto, values: Values) -> None:
    """``Pad(x, pads, value, axes)`` to ``Pad(x, pads of all axes, value)``. Exact."""
    copied = without(node)
    if len(node.input) > 3 and node.input[3]:
        rank = values.rank(node.input[0])
        axes = [int(axis) % rank for axis in values.known(node.input[3], "axes").reshape(-1)]
        pads = values.known(node.input[1], "pads").reshape(2, -1)
        whole = np.zeros((2, rank), np.int64)
        whole[:, axes] = pads
        copied.input[1] = values.constant("pads", whole.reshape(-1))
        del copied.input[3:]
    values.nodes.append(copied)


def _bitwise_not(node: onnx.NodeProto, values: Values) -> None:
    """``BitwiseNot(x)`` of signed integers to ``Sub(-1, x)``. Exact."""
    kind = values.types.get(node.input[0])
    if kind not in (_INT32, 7):
        raise NoForm("only int32 and int64 have another form")
    values.add("Sub", [values.number(-1, kind), node.input[0]], node.output[0])


def _batch_normalization(node: onnx.NodeProto, values: Values) -> None:
    """Drop ``training_mode=0``. Exact."""
    if attribute(node, "training_mode", 0):
        raise NoForm("it is in training mode")
    values.nodes.append(without(node, "training_mode"))


def _through_int32(node: onnx.NodeProto, values: Values) -> None:
    """``Add(int8, int8)`` and the like to ``Cast(Add(Cast(x), Cast(y)))`` by way of int32. Exact where int8 would not overflow."""
    kinds = {values.types.get(name) for name in node.input if name}
    if len(kinds) != 1 or not kinds <= _SMALL:
        raise NoForm("its types are not supported there")
    wide = [values.add("Cast", [name], to=_INT32) for name in node.input if name]
    copied = without(node)
    copied.input[:] = wide
    copied.output[:] = [values.fresh("wide")]
    values.nodes.append(copied)
    values.add("Cast", [copied.output[0]], node.output[0], to=kinds.pop())


def _grid_sample(node: onnx.NodeProto, values: Values) -> None:
    """Modes ``linear`` and ``cubic`` by their older names. Exact; four dimensions only."""
    from onnx import helper

    if values.rank(node.input[0]) != 4:
        raise NoForm("it samples a volume")
    copied = without(node, "mode")
    mode = {b"linear": "bilinear", b"cubic": "bicubic"}.get(attribute(node, "mode", b"linear"), "nearest")
    copied.attribute.append(helper.make_attribute("mode", mode))
    values.nodes.append(copied)


def _named(node: onnx.NodeProto, index: int) -> str | None:
    return node.output[index] or None if len(node.output) > index else None


_REDUCTIONS = ("Max", "Min", "Mean", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")

RULES: Mapping[str, tuple[int, Rule]] = MappingProxyType({
    **{f"Reduce{name}": (20 if name in ("Max", "Min") else 18, _axes_as_attribute) for name in _REDUCTIONS},
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Relu", "CumSum"), (14, _through_int32)),
    "BatchNormalization": (14, _batch_normalization),
    "BitwiseNot": (18, _bitwise_not),
    "CastLike": (15, _cast_like),
    "Gelu": (20, _gelu),
    "GridSample": (20, _grid_sample),
    "HardSwish": (14, _hard_swish),
    "LayerNormalization": (17, _layer_normalization),
    "Mish": (18, _mish),
    "Pad": (18, _pad),
    "RMSNormalization": (23, _rms_normalization),
    "Reshape": (14, _reshape),
    "Shape": (15, _shape),
    "Split": (18, _split),
    "Swish": (24, _swish),
    "Trilu": (14, _trilu),
})  # fmt: skip
"""For each operator the version that brought something new, and the rule that writes it in the versions below."""
