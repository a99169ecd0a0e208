"""Read the weights of sites back out of a written ONNX model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from graphprune.errors import LoweringError
from graphprune.pipeline.target import StoredWeight
from graphprune.sparsity.layout import Layout, to_logical
from graphprune.targets.onnx_model.sparse_weights import to_dense
from graphprune.targets.onnx_model.weight_blocks import unpack

if TYPE_CHECKING:
    import onnx

TRANSPOSED = "graphprune.transposed"
"""Metadata key of the model: JSON list of the weights that lie transposed in it."""
PACKED = "graphprune.packed"
"""Metadata key of the model: JSON geometry of the weights that lie in the packed form of MatMulNBits, by name."""
_FORMATS = ("int8", "uint8", "int4", "uint4")


def read_weights(path: Path, layouts: Mapping[str, str]) -> dict[str, StoredWeight]:
    """Read weights in logical order.

    Args:
        path: An ONNX model, its external data beside it.
        layouts: Layout in the source model by site.

    Returns:
        Weights by site, ``[out, in * kernel]``; sites that the model does not have are absent.

    Raises:
        LoweringError: The file cannot be read.
    """
    import onnx
    from onnx import numpy_helper

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, ValueError) as error:
        raise LoweringError(f"cannot read {path}: {error}; lower the Program again") from error
    metadata = {item.key: item.value for item in model.metadata_props}
    transposed = set(json.loads(metadata.get(TRANSPOSED, "[]")))
    packed = json.loads(metadata.get(PACKED, "{}"))
    tensors = {item.name: item for item in model.graph.initializer}
    sparse = {item.values.name: item for item in model.graph.sparse_initializer}

    def array(name: str) -> np.ndarray:
        if name in sparse:
            return to_dense(sparse[name])
        return numpy_helper.to_array(tensors[name], base_dir=str(path.parent))

    def values_of(name: str) -> np.ndarray:
        values = array(name)
        return values.T if name.removesuffix("_scale").removesuffix("_zero_point") in transposed else values

    found: dict[str, StoredWeight] = {}
    for name, layout in layouts.items():
        if name not in tensors and name not in sparse:
            continue
        if name in packed:
            zero_point = array(f"{name}_zero_point") if f"{name}_zero_point" in tensors else None
            found[name] = _unpacked(packed[name], array(name), array(f"{name}_scale"), zero_point)
            continue
        values = values_of(name)
        kind = values.dtype
        logical = to_logical(torch.from_numpy(_wide(values)), Layout(layout)).numpy().astype(kind)
        if str(kind) not in _FORMATS:
            found[name] = StoredWeight(logical)
            continue
        scaled = f"{name}_scale" in tensors  # a sum of ConvInteger is scaled along its channels
        scale = values_of(f"{name}_scale") if scaled else values_of(f"{name}_scale_channels").reshape(-1)
        absent = f"{name}_zero_point" not in tensors  # a symmetric weight needs none in integer products
        zero_point = np.zeros_like(scale, dtype=kind) if absent else values_of(f"{name}_zero_point")
        if scale.ndim == 2:  # in groups: it lies as its weight does
            scale, zero_point = (
                to_logical(torch.from_numpy(_wide(item)), Layout(layout)).numpy() for item in (scale, zero_point)
            )
        found[name] = StoredWeight(logical, zero_point, scale)
    return found


def stored_formats(model: onnx.ModelProto, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Weights by how they are stored.

    Args:
        model: Before it is written.
        names: Names of weights.

    Returns:
        Names by ``int8``, ``uint8``, ``int4``, ``uint4`` (where there are such weights) and, always, ``int8`` and ``float``. A weight
        that was folded away, such as a table that is read at one row only, is in none.
    """
    import onnx

    packed = json.loads(next((item.value for item in model.metadata_props if item.key == PACKED), "{}"))
    types = {
        item.name: onnx.helper.tensor_dtype_to_string(item.data_type).rpartition(".")[2].lower()
        for item in model.graph.initializer
    }
    found: dict[str, list[str]] = {"int8": [], "float": []}
    for name in names:
        if name not in types:
            continue
        kind = types[name]
        if name in packed:
            kind = f"{'' if packed[name]['signed'] else 'u'}int{packed[name]['bits']}"
        found.setdefault(kind if kind in _FORMATS else "float", []).append(name)
    return {kind: tuple(items) for kind, items in found.items()}


def _unpacked(
    shape: Mapping[str, int], values: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None
) -> StoredWeight:
    """A weight of MatMulNBits in logical order, its numbers unsigned as they are stored."""
    import ml_dtypes

    bits, block, signed = shape["bits"], shape["block"], bool(shape["signed"])
    shift = 1 << (bits - 1)
    numbers = unpack(values, bits, block).reshape(values.shape[0], -1)[:, : shape["in"]].astype(np.int32)
    middle = (
        np.full(scale.shape, shift) if zero_point is None else unpack(zero_point, bits, scale.shape[1]).astype(np.int32)
    )
    if signed:
        numbers, middle = numbers - shift, middle - shift
    dtype = np.dtype(getattr(ml_dtypes, f"{'' if signed else 'u'}int4") if bits == 4 else "int8" if signed else "uint8")
    parts = -(-shape["in"] // block)
    assert middle.shape[1] == parts
    if shape["in"] % block:  # the last part is shorter than the others: a zero-point for every weight
        middle, scale = (np.repeat(item, block, axis=1)[:, : shape["in"]] for item in (middle, scale))
    return StoredWeight(numbers.astype(np.int8 if signed else np.uint8).astype(dtype), middle, scale)


def _wide(values: np.ndarray) -> np.ndarray:
    """Numbers of four bits as int8, and bfloat16 as float32, which torch knows as numpy arrays."""
    kind = {"int4": np.int8, "uint4": np.int8, "bfloat16": np.float32}.get(values.dtype.name)
    return np.array(values if kind is None else values.astype(kind))
