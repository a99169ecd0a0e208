"""Read the weights of sites back out of a written ONNX model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from graphprune.errors import LoweringError
from graphprune.pipeline.target import StoredWeight
from graphprune.sparsity.layout import Layout, to_logical

TRANSPOSED = "graphprune.transposed"
"""Metadata key of the model: JSON list of the weights that lie transposed in it."""


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
        model = onnx.load(str(path))
    except (OSError, ValueError) as error:
        raise LoweringError(f"cannot read {path}: {error}; lower the Program again") from error
    metadata = {item.key: item.value for item in model.metadata_props}
    transposed = set(json.loads(metadata.get(TRANSPOSED, "[]")))
    tensors = {item.name: item for item in model.graph.initializer}
    found: dict[str, StoredWeight] = {}
    for name, layout in layouts.items():
        if name not in tensors:
            continue
        values = numpy_helper.to_array(tensors[name])
        if name in transposed:
            values = values.T
        logical = to_logical(torch.from_numpy(np.array(values)), Layout(layout)).numpy()
        if np.issubdtype(logical.dtype, np.integer):
            scale = numpy_helper.to_array(tensors[f"{name}_scale"])
            zero_point = numpy_helper.to_array(tensors[f"{name}_zero_point"])
            found[name] = StoredWeight(logical, zero_point, scale)
        else:
            found[name] = StoredWeight(logical)
    return found
