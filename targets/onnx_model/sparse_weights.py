"""Weights of many zeros as ONNX sparse tensors: the values that are not zero, and where they lie."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from graphprune.targets.onnx_model.parts import contents

if TYPE_CHECKING:
    import onnx

_FORMATS = ("float32", "float16", "int8", "uint8")
_INDEX = 8
"""Bytes of an index: ONNX has int64 ones only."""


def store_sparse(model: onnx.ModelProto, arrays: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Store initializers as ``SparseTensorProto`` where that takes less space.

    Each value that is not zero takes its own bytes and eight of its index, so a float32 weight gets smaller from two thirds of zeros on,
    float16 from four fifths, int8 from eight ninths.  Indices are linear and ascend.  Onnxruntime makes the weight dense when it
    loads the model.

    Args:
        model: In two parts; mutated. Call it last: what reads initializers sees no sparse ones.
        arrays: Contents by location.

    Returns:
        Names of the weights that are sparse now.
    """
    from onnx import SparseTensorProto, numpy_helper

    stored, dense = [], []
    returned = {item.name for item in model.graph.output}
    for tensor in model.graph.initializer:
        values = contents(tensor, arrays)
        if values is None or values.dtype.name not in _FORMATS or values.ndim < 2 or tensor.name in returned:
            dense.append(tensor)
            continue
        where = np.flatnonzero(values)
        if not 0 < len(where) * (_INDEX + values.itemsize) < values.nbytes:
            dense.append(tensor)
            continue
        flat = np.ascontiguousarray(values).reshape(-1)
        sparse: Any = SparseTensorProto(dims=values.shape)
        sparse.values.CopyFrom(numpy_helper.from_array(flat[where], tensor.name))
        sparse.indices.CopyFrom(numpy_helper.from_array(where.astype(np.int64), f"{tensor.name}_indices"))
        model.graph.sparse_initializer.append(sparse)
        stored.append(tensor.name)
    kept = copy.deepcopy(dense)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return tuple(stored)


def to_dense(sparse: onnx.SparseTensorProto) -> np.ndarray:
    """The weight that a sparse initializer stands for."""
    from onnx import numpy_helper

    values = numpy_helper.to_array(sparse.values)
    dense = np.zeros(int(np.prod(sparse.dims)), values.dtype)
    dense[numpy_helper.to_array(sparse.indices)] = values
    return dense.reshape(tuple(sparse.dims))
