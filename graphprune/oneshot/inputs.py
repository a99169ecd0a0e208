"""The inputs of an operator as the matrix that its logical weight is multiplied with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ir.sites import Operator
from graphprune.sparsity.layout import Layout

Geometry = tuple[Any, ...]
"""Kernel, stride, padding, dilation and groups of a convolution; empty for a matrix product."""


def geometry(node: fx.Node, operator: Operator, stored_shape: tuple[int, ...]) -> Geometry:
    """Read how a convolution moves over its input.

    Args:
        node: A call of one of ``graphprune.ir.sites.OPERATORS``.
        operator: Its entry there.
        stored_shape: Shape of the stored weight.

    Returns:
        ``(kernel, stride, padding, dilation, groups)``: tuples of one int a dimension, padding as ``(left, right)`` pairs; ``()`` for
        operators that are no convolutions.
    """
    if operator.layout is not Layout.CONV:
        return ()
    kernel = tuple(stored_shape[2:])
    stride, padding, dilation = (
        _given(node, place, name) for place, name in ((3, "stride"), (4, "padding"), (5, "dilation"))
    )
    steps, spread = _each(stride, 1, len(kernel)), _each(dilation, 1, len(kernel))
    if padding == "same":
        spans = [gap * (size - 1) for size, gap in zip(kernel, spread, strict=True)]
        around = tuple((span // 2, span - span // 2) for span in spans)
    else:
        sizes = _each(0 if padding == "valid" else padding, 0, len(kernel))
        around = tuple((size, size) for size in sizes)
    groups = _given(node, 6, "groups")
    return kernel, steps, around, spread, 1 if groups is None else int(groups)


def input_rows(x: Tensor, shape: Geometry) -> Tensor:
    """Bring the input of an operator into rows.

    Args:
        x: ``[..., in]``, or ``[batch, channels, *size]`` (also without batch) for a convolution.
        shape: From ``geometry``.

    Returns:
        ``[groups, tokens, columns]`` such that each row times the transposed logical weight of its group is one output: for a
        convolution one row for every output position, in the column order of ``to_logical`` (kernel position major, input
        channel fastest).
    """
    if not shape:
        return x.reshape(1, -1, x.shape[-1])
    kernel, stride, padding, dilation, groups = shape
    dims = len(kernel)
    if x.dim() == dims + 1:
        x = x[None]
    around = [size for pair in reversed(padding) for size in pair]
    if any(around):
        x = torch.nn.functional.pad(x, around)
    for dim in range(dims):
        x = x.unfold(2 + dim, (kernel[dim] - 1) * dilation[dim] + 1, stride[dim])[..., :: dilation[dim]]
    x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])  # [batch, groups, in/groups, *out, *kernel]
    outs = tuple(range(3, 3 + dims))
    positions = tuple(range(3 + dims, 3 + 2 * dims))
    rows = x.permute(1, 0, *outs, *positions, 2)
    return rows.reshape(groups, rows.shape[1 : 2 + dims].numel(), -1)


def _given(node: fx.Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def _each(value: Any, default: int, dims: int) -> tuple[int, ...]:
    """One number a dimension; the operator takes one number, or a list of one, for all of them."""
    if value is None:
        return (default,) * dims
    sizes = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return sizes * dims if len(sizes) == 1 else sizes
