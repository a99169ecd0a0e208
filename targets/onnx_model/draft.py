"""An ONNX graph while passes rewrite it, and the questions that passes ask of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from graphprune.targets.onnx_model.parts import embed, location_of, placeholder

if TYPE_CHECKING:
    import onnx

FLOAT = 1
"""float32 as ONNX numbers its types."""
MICROSOFT = "com.microsoft"
"""Domain of onnxruntime's own operators."""
OURS = "graphprune"
"""Domain of operators that stand in the graph until a pass writes them as ONNX; no file has them."""

GraphPass = Callable[["Draft"], int]
"""A pass: rewrites a draft, returns at how many places."""


@dataclass
class Draft:
    """An ONNX graph while passes rewrite it.

    Attributes:
        graph: An ``onnx_graphsurgeon.Graph``. Mutated by passes.
        transposed: Names of weights that lie transposed in it, compared with the source model.
        packed: Geometry of the weights that lie in the packed form of MatMulNBits, by name.
    """

    graph: Any
    transposed: set[str] = field(default_factory=set)
    packed: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._names = set(self.graph.tensors()) | {node.name for node in self.graph.nodes}

    @property
    def opset(self) -> int:
        """Version of the ONNX operator set."""
        return int(self.graph.opset)

    def nodes(self, *kinds: str) -> list[Any]:
        """The nodes of some operator types, in graph order; safe while nodes are added."""
        return [node for node in self.graph.nodes if node.op in kinds]

    def fresh(self, stem: str) -> str:
        """A name that nothing in the graph has: ``stem``, or ``stem`` with a number."""
        name, number = stem, 1
        while name in self._names:
            number += 1
            name = f"{stem}_{number}"
        self._names.add(name)
        return name

    def constant(self, name: str, values: np.ndarray) -> Any:
        """A new initializer of exactly this name."""
        self._names.add(name)
        return surgeon().Constant(name, np.ascontiguousarray(values).reshape(np.shape(values)))

    def add(
        self,
        kind: str,
        name: str,
        inputs: list[Any],
        attributes: dict[str, Any] | None = None,
        *,
        domain: str | None = None,
        output: Any | None = None,
    ) -> Any:
        """Append a node and return its output: ``output``, or a new value; the name is made unique."""
        name = self.fresh(name)
        result = surgeon().Variable(name) if output is None else output
        self.graph.nodes.append(
            surgeon().Node(op=kind, name=name, attrs=attributes or {}, inputs=inputs, outputs=[result], domain=domain)
        )
        return result

    def is_output(self, value: Any) -> bool:
        """Whether the graph returns a value."""
        return any(item is value for item in self.graph.outputs)


@dataclass(frozen=True)
class Quantized:
    """What a DequantizeLinear reads.

    Attributes:
        integers: The integer value.
        scale: Its scale.
        zero_point: Its zero-point, None where it has none.
        axis: Its axis attribute, as ONNX counts it.
        node: The DequantizeLinear.
    """

    integers: Any
    scale: Any
    zero_point: Any | None
    axis: int
    node: Any

    @property
    def per_tensor(self) -> bool:
        """Whether there is one scale."""
        if is_constant(self.scale):
            return bool(self.scale.values.size == 1)
        return not self.node.attrs.get("block_size", 0)  # a scale that is computed is DynamicQuantizeLinear's

    @property
    def blocked(self) -> bool:
        """Whether groups of entries share a scale."""
        return bool(self.node.attrs.get("block_size", 0))

    def parts(self, draft: Draft) -> list[Any]:
        """Integers, scale and zero-point, as QLinear operators take them; a missing zero-point is written out."""
        zero_point = self.zero_point
        if zero_point is None:
            dtype = self.integers.values.dtype if is_constant(self.integers) else np.uint8
            zeros = np.zeros(self.scale.values.shape, dtype)
            zero_point = draft.constant(draft.fresh(f"{self.integers.name}_zero"), zeros)
        return [self.integers, self.scale, zero_point]

    @property
    def symmetric(self) -> bool:
        """Whether the zero-point is known to be zero."""
        return self.zero_point is None or (
            is_constant(self.zero_point) and not np.any(self.zero_point.values.astype(np.int32))
        )


def surgeon() -> Any:
    """The module ``onnx_graphsurgeon``, imported when it is first needed."""
    return importlib.import_module("onnx_graphsurgeon")


def absent() -> Any:
    """An optional input that is left out."""
    return surgeon().Variable.empty()


def open_draft(model: onnx.ModelProto, arrays: Mapping[str, np.ndarray]) -> Draft:
    """A draft of a model whose weights lie beside it; see ``parts``. Passes replace its arrays and write in none of them."""
    places = {item.name: location_of(item) for item in model.graph.initializer}
    with _quiet():
        graph = surgeon().import_onnx(model)
    for value in graph.tensors().values():
        location = places.get(value.name)
        if location is not None:
            value.values, value.data_location = arrays[location], None
    return Draft(graph)


def finish(draft: Draft) -> onnx.ModelProto:
    """Write a draft as a model; numbers of four bits two a byte."""
    model, arrays = finish_parts(draft)
    embed(model, arrays)
    return model


def finish_parts(draft: Draft) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Write a draft as a model and the contents of its initializers beside it; numbers of four bits two a byte."""
    lazy: Any = importlib.import_module("onnx_graphsurgeon.ir.tensor").LazyValues
    arrays: dict[str, np.ndarray] = {}
    for value in draft.graph.tensors().values():
        if is_constant(value):
            proto, packed = placeholder(value.name, value.values, str(len(arrays)))
            arrays[str(len(arrays))] = packed
            value.values, value.data_location = lazy(proto), None
    with _quiet():
        model: onnx.ModelProto = surgeon().export_onnx(draft.graph, do_type_check=False)
    return model, arrays


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence graphsurgeon's notes on types that numpy does not have; they are kept as they are."""
    logger: Any = importlib.import_module("onnx_graphsurgeon.logger").G_LOGGER
    before, logger.severity = logger.severity, logger.ERROR
    try:
        yield
    finally:
        logger.severity = before


def producer(value: Any) -> Any:
    """The node that makes a value, None for initializers and inputs."""
    return value.inputs[0] if value.inputs else None


def made_by(value: Any, *kinds: str) -> Any:
    """The node that makes a value, if it is of some operator types; else None."""
    node = producer(value)
    return node if node is not None and node.op in kinds else None


def is_constant(*values: Any) -> bool:
    """Whether all values are initializers."""
    return all(isinstance(value, surgeon().Constant) for value in values)


def quantized(value: Any) -> Quantized | None:
    """What lies behind a value that DequantizeLinear makes, else None."""
    node = made_by(value, "DequantizeLinear")
    if node is None:
        return None
    zero_point = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    return Quantized(node.inputs[0], node.inputs[1], zero_point, int(node.attrs.get("axis", 1)), node)


def only_user(draft: Draft, value: Any) -> Any:
    """The one node that uses a value, None where there are more or the graph returns it."""
    users = list(value.outputs)
    return users[0] if len(users) == 1 and not draft.is_output(value) else None


def quantizes_whole(node: Any) -> bool:
    """Whether a node is a QuantizeLinear with one constant scale for all entries."""
    return bool(node is not None and node.op == "QuantizeLinear" and is_constant(*node.inputs[1:])) and bool(
        node.inputs[1].values.size == 1
    )


def quantizer_behind(draft: Draft, value: Any) -> Any:
    """The QuantizeLinear that is the only user of a value, for the whole tensor; else None."""
    node = only_user(draft, value)
    return node if quantizes_whole(node) else None


def target_of(draft: Draft, quantize: Any) -> list[Any]:
    """Scale and zero-point that a QuantizeLinear quantizes to; a missing zero-point is written out."""
    if len(quantize.inputs) > 2:
        return list(quantize.inputs[1:])
    name = draft.fresh(f"{quantize.outputs[0].name}_zero")
    return [quantize.inputs[1], draft.constant(name, np.zeros(quantize.inputs[1].values.shape, np.uint8))]


def bias_behind(draft: Draft, value: Any) -> Any:
    """An Add or Sum of a constant vector that is the only user of a value, else None."""
    node = only_user(draft, value)
    if node is None or node.op not in ("Add", "Sum") or len(node.inputs) != 2:
        return None
    bias = [item for item in node.inputs if item is not value]
    return node if len(bias) == 1 and is_constant(*bias) and bias[0].values.ndim == 1 else None


def same_constants(left: Any, right: Any) -> bool:
    """Whether two values are one, or initializers with equal contents."""
    if left is right:
        return True
    if left is None or right is None or not is_constant(left, right):
        return False
    return left.values.dtype == right.values.dtype and np.array_equal(left.values, right.values)


def replace_value(draft: Draft, old: Any, new: Any) -> None:
    """Let all users of a value use another."""
    for user in list(old.outputs):
        user.inputs = [new if item is old else item for item in user.inputs]
    draft.graph.outputs = [new if item is old else item for item in draft.graph.outputs]


def use_instead(node: Any, old: Any, new: Any) -> None:
    """Let one node use another value."""
    node.inputs = [new if item is old else item for item in node.inputs]


def weight_of(value: Any) -> Any:
    """The initializer behind a value: itself, or what its DequantizeLinear reads."""
    if is_constant(value):
        return value
    found = quantized(value)
    return found.integers if found is not None and is_constant(found.integers) else None


def rank_of(value: Any) -> int | None:
    """Number of dimensions, None where it is not known."""
    return None if value.shape is None else len(value.shape)
