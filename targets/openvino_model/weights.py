"""Read the weights of sites out of an OpenVINO model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from graphprune.pipeline.target import StoredWeight
from graphprune.sparsity.layout import Layout, to_logical
from graphprune.targets.openvino_model.graph import constants, dequantization, values_of

_FORMATS = {"i8": "int8", "u8": "uint8", "i4": "int4", "u4": "uint4"}


def stored_weights(model: Any, layouts: Mapping[str, str]) -> dict[str, StoredWeight]:
    """Read weights in logical order.

    Args:
        model: An OpenVINO model.
        layouts: Layout in the source model by site.

    Returns:
        Weights by site, ``[out, in * kernel]``, with the scale and the zero-point that the model dequantizes them by; sites that
        the model does not have are absent.
    """
    known = constants(model)
    found = {}
    for name, layout in layouts.items():
        if name not in known:
            continue
        values = values_of(known[name])
        logical = _logical(values, layout).astype(values.dtype)
        if known[name].get_element_type().get_type_name() not in _FORMATS:
            found[name] = StoredWeight(logical)
            continue
        rule = dequantization(known[name])
        if rule is None:
            continue
        scale = rule.scale
        zero_point = np.zeros(scale.shape, values.dtype) if rule.zero_point is None else rule.zero_point
        if scale.ndim == 2:  # in groups: it lies as its weight does
            scale, zero_point = _logical(scale, layout), _logical(zero_point, layout)
        found[name] = StoredWeight(logical, zero_point, scale)
    return found


def stored_formats(model: Any, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Weights by how they are stored.

    Args:
        model: An OpenVINO model.
        names: Names of weights.

    Returns:
        Names by ``int8``, ``uint8``, ``int4``, ``uint4`` (where there are such weights) and, always, ``int8`` and ``float``.
    """
    known = constants(model)
    found: dict[str, list[str]] = {"int8": [], "float": []}
    for name in names:
        if name in known:
            kind = known[name].get_element_type().get_type_name()
            found.setdefault(_FORMATS.get(kind, "float"), []).append(name)
    return {kind: tuple(items) for kind, items in found.items()}


def _logical(values: np.ndarray, layout: str) -> np.ndarray:
    """Logical ``[out, in * kernel]``; numbers of four bits as int8, which torch knows as numpy arrays."""
    wide = values.astype(np.int8) if values.dtype.name in ("int4", "uint4") else values
    return np.asarray(to_logical(torch.from_numpy(np.array(wide)), Layout(layout)).numpy())
