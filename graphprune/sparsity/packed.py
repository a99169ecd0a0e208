"""Sparse matrices in the form that kernels multiply: blocks of rows by one column, block row after block row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 4
"""Columns whose products an integer dot instruction adds up."""
UNIT = 16
"""Rows that a kernel computes at once: block rows are padded to a multiple of so many rows."""


@dataclass(frozen=True)
class Packed:
    """A matrix ``[rows, features]`` without its blocks of zeros.

    Attributes:
        values: Floats ``[stored, block]``, or int8 ``[groups, block, 4]``: four columns a group, the last group of a block row
            padded with zeros.
        columns: uint16 as int16, ``[stored]``, or ``[groups, 4]``; ascending in a block row.
        starts: int32 ``[block rows + 1]``: where each block row begins in ``columns``, or in groups.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor


def pack_matrix(weight: Tensor, block: int) -> Packed:
    """Leave out the blocks that are zero.

    Args:
        weight: ``[rows, features]``, float32 or int8, at most 65,536 features; rows that are no multiple of ``block`` are padded.
        block: Rows of a block.

    Returns:
        The blocks; of int8 in groups.
    """
    rows, features = weight.shape
    assert features <= 2**16
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -rows % UNIT)).view(-1, block, features)
    kept = padded.ne(0).any(dim=1)  # [block rows, features]
    counts = kept.sum(dim=1)
    where = kept.nonzero()  # in the order of block rows, then of columns
    values, columns = padded[where[:, 0], :, where[:, 1]], where[:, 1]
    if weight.dtype is torch.int8:
        groups = (counts + GROUP - 1) // GROUP
        ends = (groups * GROUP).cumsum(0) - groups * GROUP  # where each block row begins, padded
        rank = torch.arange(len(where)) - (counts.cumsum(0) - counts)[where[:, 0]]
        at = ends[where[:, 0]] + rank
        total = int(groups.sum()) * GROUP
        spread = torch.zeros((total, block), dtype=torch.int8)
        spread[at] = values
        places = torch.zeros(total, dtype=torch.int64)
        places[at] = columns
        values = spread.view(-1, GROUP, block).transpose(1, 2).contiguous()
        columns, counts = places.view(-1, GROUP), groups
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32)
    starts[1:] = counts.cumsum(0)
    return Packed(values.contiguous(), columns.to(torch.uint16).view(torch.int16), starts)


def unpack_matrix(packed: Packed, rows: int, features: int) -> Tensor:
    """The matrix ``[rows, features]`` that was packed.

    Args:
        packed: From ``pack_matrix``.
        rows: Rows of the matrix.
        features: Its columns.
    """
    values, columns = packed.values, packed.columns.view(torch.uint16).to(torch.int64)
    counts = packed.starts.diff().to(torch.int64)
    if values.dim() == 3:
        values, counts = values.transpose(1, 2).reshape(-1, values.shape[1]), counts * GROUP
    block = values.shape[1]
    row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    blocks = torch.zeros((len(counts), features, block), dtype=values.dtype)
    kept = values.ne(0).any(dim=1)  # padding points at columns that have a block of their own
    blocks[row[kept], columns.reshape(-1)[kept]] = values[kept]
    return blocks.transpose(1, 2).reshape(-1, features)[:rows].contiguous()


def choose_block(weight: Tensor) -> int:
    """Rows of the blocks that a matrix is packed in: 4 where most of a block is kept or goes together, else 1.

    A kernel of single rows reads each activation again for each weight, and takes about twice as long for one weight, so that
    blocks that are half empty are as good.
    """
    rows = weight.shape[0]
    blocks = torch.nn.functional.pad(weight.ne(0), (0, 0, 0, -rows % 4)).view(-1, 4, weight.shape[1]).any(dim=1)
    return 4 if int(blocks.sum()) * 4 <= 2 * int(weight.count_nonzero()) else 1
