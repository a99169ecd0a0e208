"""An ONNX model in two parts, the graph and its weights, so that no step holds large weights twice or meets protobuf's 2 GB.

In such a model an initializer has no data but a location, the key of its array in a mapping beside the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphprune.errors import LoweringError

if TYPE_CHECKING:
    import onnx

PIECE_LIMIT = 2_000_000_000
"""Bytes of weights that one ONNX file can hold."""
_EXTERNAL = 1  # TensorProto.EXTERNAL
_SMALL = 1024
"""Bytes up to which an initializer stays in the model, though weights lie beside it."""
_PAGE, _LINE = 4096, 64
"""Offsets of tensors of a megabyte and more, which runtimes map into memory, and of smaller ones."""


def take_apart(model: Any) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Write an ``onnx_ir`` model without the contents of its initializers.

    Returns:
        The model, and contents by location: read-only views, of PyTorch's own memory where they are parameters.
    """
    import onnx_ir

    arrays: dict[str, np.ndarray] = {}
    for value in model.graph.initializers.values():
        found = value.const_value
        array = np.asarray(found.numpy()).view()
        array.flags.writeable = False
        location = str(len(arrays))
        arrays[location] = array
        value.const_value = onnx_ir.ExternalTensor(location, 0, None, found.dtype, shape=found.shape, name=value.name)
    proto: onnx.ModelProto = onnx_ir.to_proto(model)
    return proto, arrays


def location_of(tensor: onnx.TensorProto) -> str | None:
    """Key of an initializer's contents, None for one that has them itself."""
    if tensor.data_location != _EXTERNAL:
        return None
    return next((item.value for item in tensor.external_data if item.key == "location"), None)


def placeholder(name: str, values: np.ndarray, location: str) -> tuple[onnx.TensorProto, np.ndarray]:
    """An initializer without contents, and its contents as they lie in a file."""
    from onnx import TensorProto, helper, numpy_helper

    proto = TensorProto(name=name, dims=values.shape, data_type=helper.np_dtype_to_tensor_dtype(values.dtype))
    _point(proto, {"location": location})
    if values.dtype.name in ("int4", "uint4"):
        return proto, np.frombuffer(numpy_helper.from_array(values, name).raw_data, np.uint8)
    return proto, values


def contents(tensor: onnx.TensorProto, arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Contents of an initializer of such a model; None for one that has them itself."""
    location = location_of(tensor)
    return None if location is None else arrays[location]


def embed(model: onnx.ModelProto, arrays: dict[str, np.ndarray]) -> None:
    """Move contents into a model; each leaves the mapping, so that it is not held twice."""
    for tensor in model.graph.initializer:
        location = location_of(tensor)
        if location is not None:
            _embed(tensor, arrays.pop(location))


def write_model(
    model: onnx.ModelProto, arrays: dict[str, np.ndarray], folder: Path, names: tuple[str, str], *, beside: bool
) -> tuple[str, ...]:
    """Write a model in two parts as files.

    Args:
        model: Mutated: its initializers get their contents or places.
        arrays: Contents by location; those that go into the model leave it.
        folder: Where to.
        names: Names of the model's file and of the file of weights.
        beside: Write weights of more than 1 kB into a file of their own, one after the other.

    Returns:
        Names of the files that were written.

    Raises:
        LoweringError: What stays in the model is more than one file can hold.
        OSError: The operating system refuses.
    """
    if not beside:
        embed(model, arrays)
    else:
        with (folder / names[1]).open("wb") as file:
            for tensor in model.graph.initializer:
                values = contents(tensor, arrays)
                if values is not None and values.nbytes <= _SMALL:
                    _embed(tensor, values)
                elif values is not None:
                    step = _PAGE if values.nbytes >= 1 << 20 else _LINE
                    file.write(bytes(-file.tell() % step))
                    start = file.tell()
                    file.write(_bytes(values))
                    length = file.tell() - start
                    _point(tensor, {"location": names[1], "offset": str(start), "length": str(length)})
    size = int(model.ByteSize())  # type: ignore[no-untyped-call]
    if size > PIECE_LIMIT:
        raise LoweringError(
            f"{names[0]} would be {size:,} bytes, and one ONNX file holds {PIECE_LIMIT:,}; leave sparse_storage out"
        )
    (folder / names[0]).write_bytes(model.SerializeToString(deterministic=True))  # type: ignore[no-untyped-call]
    return names if beside else names[:1]


def _bytes(values: np.ndarray) -> Any:
    """The bytes of an array in order, without a copy where it is contiguous."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _embed(tensor: onnx.TensorProto, values: np.ndarray) -> None:
    del tensor.external_data[:]
    tensor.ClearField("data_location")  # type: ignore[no-untyped-call]
    tensor.raw_data = bytes(_bytes(values))


def _point(tensor: onnx.TensorProto, entries: Mapping[str, str]) -> None:
    del tensor.external_data[:]
    tensor.data_location = _EXTERNAL  # type: ignore[assignment]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
