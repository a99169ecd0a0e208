"""How a stored weight maps to the logical matrix ``[out, in*k]`` that patterns and criteria work on."""

from __future__ import annotations

import enum
import math

from torch import Tensor

from graphprune.errors import SparsityError


class Layout(enum.Enum):
    """The storage order of a prunable weight.

    ``OUT_IN`` is ``nn.Linear`` (``[out, in]``), ``IN_OUT`` is the Conv1D of GPT-2 (``[in, out]``), ``CONV``
    is a convolution (``[out, in/groups, *kernel]`` with one or more kernel dimensions).
    """

    OUT_IN = "out_in"
    IN_OUT = "in_out"
    CONV = "conv"


def logical_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    """Return the logical ``(out, in*k)`` of a weight.

    Args:
        shape: Shape of the stored weight.
        layout: Storage order of the weight.

    Returns:
        Rows (outputs) and columns (input entries) of the logical matrix.

    Raises:
        SparsityError: The number of dimensions does not fit the layout.
    """
    if layout is Layout.CONV:
        if len(shape) < 3:
            raise SparsityError(
                f"a conv weight is [out, in/groups, *kernel], got shape {tuple(shape)}; check the layout"
            )
        return shape[0], math.prod(shape[1:])
    if len(shape) != 2:
        raise SparsityError(
            f"a weight of layout {layout.value} has 2 dimensions, got shape {tuple(shape)}; check the layout"
        )
    return (shape[0], shape[1]) if layout is Layout.OUT_IN else (shape[1], shape[0])


def to_logical(weight: Tensor, layout: Layout) -> Tensor:
    """See a stored weight as the logical matrix ``[out, in*k]``.

    Args:
        weight: Stored weight, any dtype.
        layout: Storage order of ``weight``. In a conv the input channel varies fastest: the column of input
            channel ``c`` at kernel position ``p`` is ``p * (in/groups) + c``, so consecutive columns are
            consecutive input channels.

    Returns:
        ``[out, in*k]``: a view where the strides allow one (always for ``OUT_IN`` and ``IN_OUT``, for a conv
        where the kernel or the input has size 1, or the memory is channels-last), else a copy.

    Raises:
        SparsityError: The number of dimensions does not fit the layout.
    """
    shape = logical_shape(tuple(weight.shape), layout)
    if layout is Layout.OUT_IN:
        return weight
    if layout is Layout.IN_OUT:
        return weight.t()
    return weight.movedim(1, -1).reshape(shape)


def from_logical(logical: Tensor, layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """Bring a logical matrix back to the stored order; the exact inverse of ``to_logical``.

    Args:
        logical: ``[out, in*k]``, any dtype (a mask, scores or a weight).
        layout: Storage order wanted.
        shape: Shape of the stored weight.

    Returns:
        Contiguous tensor of shape ``shape``; shares memory with ``logical`` where no reordering is needed.

    Raises:
        SparsityError: ``logical`` is not the logical matrix of a weight of that shape.
    """
    if tuple(logical.shape) != logical_shape(shape, layout):
        raise SparsityError(
            f"a matrix of shape {tuple(logical.shape)} is no {layout.value} weight of shape {tuple(shape)}"
        )
    if layout is Layout.OUT_IN:
        return logical.contiguous()
    if layout is Layout.IN_OUT:
        return logical.t().contiguous()
    return logical.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()
