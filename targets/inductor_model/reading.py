"""Weights of a Program, and the same as a package's library holds them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from graphprune.ir.program import Program
from graphprune.ir.sites import attribute_behind, find_sites
from graphprune.pipeline.target import StoredWeight
from graphprune.sparsity.layout import Layout, to_logical
from graphprune.targets.inductor_model.package import Constant, Place
from graphprune.targets.inductor_model.rewriting import integers_of


def weights_of(program: Program) -> tuple[dict[str, Tensor], dict[str, tuple[str, str]]]:
    """Sites and embedding tables by name, and the names of scale and zero-point of those that are quantized.

    Tied names count as the first of them.
    """
    aten = torch.ops.aten
    names = [site.name for site in find_sites(program)[0]]
    for node in program.calls(aten.embedding.default):
        source = attribute_behind(node.args[0])
        if source is not None and str(source.target) not in names:
            names.append(str(source.target))
    scales = {}
    for node in program.calls(torch.ops.graphprune.fake_quantize.default):
        source = attribute_behind(node)
        if source is not None:
            scale, zero_point = (str(item.target) for item in node.args[1:3])  # type: ignore[union-attr]
            scales[str(source.target)] = (scale, zero_point)
    return {name: program.tensor(name).detach() for name in names}, scales


def stored_weight(place: Place, constants: Mapping[str, Constant], layout: Layout) -> StoredWeight:
    """A weight as a library holds it, in logical shape."""
    values = place.weight(constants)
    scale, zero_point = (
        None if name is None else constants[name].values.numpy() for name in (place.scale, place.zero_point)
    )
    if values.dtype not in (torch.int8, torch.uint8):
        return StoredWeight(_array(to_logical(values, layout)))
    logical = to_logical(values, layout).numpy()
    if zero_point is None:
        zero_point = np.zeros(len(logical), np.int32)
    return StoredWeight(logical, zero_point.astype(logical.dtype), scale)


def _array(values: Tensor) -> np.ndarray:
    """As numpy; bfloat16, which numpy has not, as that of ml_dtypes where it is installed and as float32 where not."""
    if values.dtype is not torch.bfloat16:
        return values.contiguous().numpy()
    wide = values.float().contiguous().numpy()
    try:
        return wide.astype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError:
        return wide


def take_integers(
    program: Program, weights: dict[str, Tensor], scales: Mapping[str, tuple[str, str]], layouts: Mapping[str, Layout]
) -> None:
    """Put the integers that ``use_integers`` made in place of the floats they stand for.

    Args:
        program: After ``use_integers``.
        weights: From ``weights_of``; mutated.
        scales: From ``weights_of``.
        layouts: Of the sites before ``use_integers``.
    """
    buffers = dict(program.named_buffers())
    for name, (scale, _) in scales.items():
        values = buffers.get(integers_of(scale))
        if values is not None:
            weights[name] = values.t() if layouts.get(name) is Layout.IN_OUT else values
