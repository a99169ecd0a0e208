"""Questions to an OpenVINO model: which weights it has, what they are dequantized by, and which operators use them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

OPERATORS = (
    "MatMul",
    "Convolution",
    "GroupConvolution",
    "ConvolutionBackpropData",
    "GroupConvolutionBackpropData",
    "Gather",
)
"""Operators that a weight is for."""
_CARRIERS = ("Convert", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Subtract", "Multiply", "FakeQuantize")
"""Operators between a weight and the one that it is for."""


_OURS = "graphprune"
"""Key of what we say in a model's own information."""


@dataclass(frozen=True)
class Dequantization:
    """What turns the integers of a constant into floats, ``(q - zero_point) * scale``.

    Attributes:
        scale: Float32, ``[]``, ``[channels]``, or of the weight's rank where groups have scales.
        zero_point: Integers of the same shape, None where nothing is subtracted.
    """

    scale: np.ndarray
    zero_point: np.ndarray | None


def constants(model: Any) -> dict[str, Any]:
    """The Constant nodes of a model by their names, without what OpenVINO adds where it stores them as float16."""
    return {
        node.get_friendly_name().removesuffix("_compressed"): node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Constant"
    }


def values_of(constant: Any) -> np.ndarray:
    """The entries of a Constant; numbers of four bits as ``ml_dtypes`` has them.

    OpenVINO lays two of them into a byte, the lower half first.
    """
    kind = constant.get_element_type().get_type_name()
    shape = tuple(constant.get_output_shape(0))
    if kind not in ("i4", "u4"):
        return np.array(constant.data)
    import ml_dtypes

    packed = np.asarray(constant.data).reshape(-1).view(np.uint8)
    numbers = np.stack((packed & 15, packed >> 4), axis=1).reshape(-1)[: int(np.prod(shape))].astype(np.int8)
    if kind == "i4":
        numbers = np.where(numbers > 7, numbers - 16, numbers).astype(np.int8)
    return numbers.astype(ml_dtypes.int4 if kind == "i4" else ml_dtypes.uint4).reshape(shape)


def dequantization(constant: Any) -> Dequantization | None:
    """What lies behind an integer constant: ``Convert -> Subtract -> Multiply``, the constant reshaped before or not.

    Returns:
        None where no user of the constant is such a chain.
    """
    for node in users(constant):
        zero_point, seen = None, node
        while seen is not None and seen.get_type_name() in ("Reshape", "Unsqueeze", "Transpose", "Convert", "Subtract"):
            if seen.get_type_name() == "Subtract":
                zero_point = _root(seen.input_value(1).get_node())
            seen = next(users(seen), None)
        scale = None if seen is None or seen.get_type_name() != "Multiply" else _root(seen.input_value(1).get_node())
        if scale is not None:
            return Dequantization(values_of(scale), None if zero_point is None else values_of(zero_point))
    return None


def operators(constant: Any) -> Iterator[Any]:
    """The operators that a weight is for, conversions passed over."""
    for node in users(constant):
        if node.get_type_name() in OPERATORS:
            yield node
        elif node.get_type_name() in _CARRIERS:
            yield from operators(node)


def users(node: Any) -> Iterator[Any]:
    """The nodes that use the first result of a node as a value, not for its shape."""
    for port in node.output(0).get_target_inputs():
        if port.get_node().get_type_name() != "ShapeOf":
            yield port.get_node()


def name_nodes(model: Any) -> None:
    """Number the nodes that OpenVINO named itself by their place in the model.

    Before: ``Convert_8123``, after a counter of the process.  After: ``Convert_17``.  The same Program gives the same file.
    """
    for index, node in enumerate(model.get_ordered_ops()):
        kind = node.get_type_name()
        if re.fullmatch(rf"{kind}_\d+", node.get_friendly_name()):
            node.set_friendly_name(f"{kind}_{index}")


def write_interface(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Write the names of inputs and outputs into a model: a value can have several, of which OpenVINO picks one."""
    for key, names in (("inputs", inputs), ("outputs", outputs)):
        model.set_rt_info(json.dumps(list(names)), [_OURS, key])


def read_interface(model: Any) -> tuple[list[str], list[str]]:
    """Names of the inputs and of the outputs in their order; OpenVINO's own choice for a model that says none."""
    if not model.has_rt_info([_OURS]):
        return [item.get_any_name() for item in model.inputs], [item.get_any_name() for item in model.outputs]
    inputs, outputs = (json.loads(model.get_rt_info([_OURS, key]).astype(str)) for key in ("inputs", "outputs"))
    return inputs, outputs


def _root(node: Any) -> Any:
    """The Constant behind a value; None where it is computed."""
    while node.get_type_name() in ("Convert", "Reshape", "Unsqueeze", "Squeeze", "Transpose"):
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None
