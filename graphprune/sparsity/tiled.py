"""Patterns whose units are rectangles: single weights and blocks.

A new one is a ``Tiled`` subclass with a ``tile`` method and its text.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.sparsity.pattern_base import ALL, Pattern, Region, Shape, check_units, matrix_shape


class Tiled(Pattern):
    """A pattern whose units are equal rectangles, smaller at the right and bottom edges."""

    @abc.abstractmethod
    def tile(self, shape: Shape) -> Shape:
        """Return rows and columns of one unit."""

    def grid(self, shape: Shape) -> Shape:
        """Return the number of units down and across, edges included."""
        rows, columns = self.tile(shape)
        return -(-shape[0] // rows), -(-shape[1] // columns)

    def misfit(self, shape: Shape) -> str | None:
        """Name the first dimension that does not divide into tiles."""
        for size, part, name, unit in zip(
            shape, self.tile(shape), ("outputs", "inputs"), ("rows", "columns"), strict=True
        ):
            if part > size:
                return f"pattern {self} spans {part} {unit} but the weight has only {size} {name}"
            if size % part:
                return f"{size} {name} are not a multiple of the {part} {unit} of pattern {self}"
        return None

    def score_shape(self, shape: Shape) -> tuple[int, ...]:
        """Return the grid of tiles."""
        return self.grid(shape)

    def reduce(self, scores: Tensor) -> Tensor:
        """Return the mean of each tile."""
        shape = matrix_shape(scores)
        return _reduce_tiles(scores, self.tile(shape), _mean)

    def unit_sizes(self, shape: Shape) -> int | Tensor:
        """Return the area of a tile, one per tile where edges are smaller."""
        rows, columns = self.tile(shape)
        if shape[0] % rows == 0 and shape[1] % columns == 0:
            return rows * columns
        heights = torch.full((self.grid(shape)[0],), rows, dtype=torch.int64)
        widths = torch.full((self.grid(shape)[1],), columns, dtype=torch.int64)
        heights[-1] = shape[0] - rows * (len(heights) - 1)
        widths[-1] = shape[1] - columns * (len(widths) - 1)
        return torch.outer(heights, widths)

    def spread(self, stored: Tensor, shape: Shape) -> Tensor:
        """Repeat each tile's score over the tile."""
        return _expand_tiles(stored.view(self.grid(shape)), self.tile(shape), shape)

    def mask(self, stored: Tensor, prune: Tensor, shape: Shape) -> Tensor:
        """Expand each tile's choice over the tile; ``stored`` is ignored."""
        check_units(prune, self.score_shape(shape), self)
        return _expand_tiles(prune.logical_not(), self.tile(shape), shape)

    def holds(self, kept: Tensor) -> bool:
        """Say whether each tile is all kept or all pruned."""
        shape = matrix_shape(kept)
        rows, columns = self.tile(shape)
        whole = _expand_tiles(kept[::rows, ::columns], (rows, columns), shape)
        return not bool((whole.view(torch.uint8) ^ kept.view(torch.uint8)).any())  # five times as fast as equal on bool

    def pattern_sparsity(self, zero: Tensor) -> float:
        """Return the share of weights in tiles that are all zero."""
        shape = matrix_shape(zero)
        pruned = _reduce_tiles(zero, self.tile(shape), _all)
        sizes = self.unit_sizes(shape)
        if isinstance(sizes, int):
            weights = int(pruned.count_nonzero()) * sizes
        else:
            weights = int(sizes[pruned.cpu()].sum())
        return weights / max(1, zero.numel())

    def regions(self, shape: Shape, elements: int) -> Iterator[Region]:
        """Cut into bands of tiles: of rows, or of columns where one tile spans all rows."""
        tile = self.tile(shape)
        axis = 1 if tile[0] >= shape[0] else 0
        step = max(1, elements // max(1, tile[axis] * shape[1 - axis])) * tile[axis]
        for start in range(0, shape[axis], step):
            part = slice(start, min(start + step, shape[axis]))
            stored = slice(start // tile[axis], -(-part.stop // tile[axis]))
            yield ((part, ALL), (stored, ALL)) if axis == 0 else ((ALL, part), (ALL, stored))


@dataclass(frozen=True)
class Unstructured(Tiled):
    """Every weight for itself."""

    examples = ("unstructured",)

    @classmethod
    def from_text(cls, text: str) -> Unstructured | None:
        """Read "unstructured" or "1x1"."""
        return cls() if text in ("unstructured", "1x1") else None

    def __str__(self) -> str:
        return "unstructured"

    def tile(self, shape: Shape) -> Shape:
        """Return 1x1."""
        return 1, 1

    def reduce(self, scores: Tensor) -> Tensor:
        """Return ``scores`` itself."""
        return scores

    def pattern_sparsity(self, zero: Tensor) -> float:
        """Return the fraction of zeros."""
        return int(zero.count_nonzero()) / max(1, zero.numel())


@dataclass(frozen=True)
class Block(Tiled):
    """Blocks of consecutive outputs (rows) by consecutive inputs (columns); "4x1" is 4 outputs of one input.

    Raises:
        SparsityError: Rows or columns are not positive, or the block is 1x1 (that is ``Unstructured``).
    """

    rows: int
    columns: int
    examples = ("4x1", "1x4", "32x32")

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1:
            raise SparsityError(f"a block of {self.rows}x{self.columns} is empty; rows and columns are at least 1")
        if self.rows == self.columns == 1:
            raise SparsityError("a block of 1x1 is no block; use Unstructured()")

    @classmethod
    def from_text(cls, text: str) -> Block | None:
        """Read ``rows x columns`` without spaces."""
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        return cls(int(match[1]), int(match[2])) if match else None

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    def tile(self, shape: Shape) -> Shape:
        """Return rows and columns of the block."""
        return self.rows, self.columns


def _mean(tiles: Tensor) -> Tensor:
    rows = tiles.mean(1) if tiles.shape[1] > 1 else tiles.squeeze(1)
    return rows.mean(2) if rows.shape[2] > 1 else rows.squeeze(2)


def _all(tiles: Tensor) -> Tensor:
    return tiles.all(3).all(1)


def _reduce_tiles(values: Tensor, tile: Shape, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduce every tile of ``[out, in]``, smaller ones at the edges, to an entry of the grid."""
    (out, width), (rows, columns) = values.shape, tile
    bands = []
    for band in (values[: out - out % rows], values[out - out % rows :]):
        parts = [
            reduce(_split(part, min(rows, part.shape[0]), min(columns, part.shape[1])))
            for part in (band[:, : width - width % columns], band[:, width - width % columns :])
            if part.numel()
        ]
        if parts:
            bands.append(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
    if not bands:
        return values.new_empty((-(-out // rows), -(-width // columns)))
    return bands[0] if len(bands) == 1 else torch.cat(bands)


def _split(values: Tensor, rows: int, columns: int) -> Tensor:
    """View a matrix that divides into tiles as ``[down, rows, across, columns]``."""
    return values.view(values.shape[0] // rows, rows, values.shape[1] // columns, columns)


def _expand_tiles(units: Tensor, tile: Shape, shape: Shape) -> Tensor:
    """Repeat every entry of a grid over its tile, cut to ``shape``; contiguous."""
    (down, across), (rows, columns) = units.shape, tile
    whole = units[:, None, :, None].expand(down, rows, across, columns).reshape(down * rows, across * columns)
    return whole[: shape[0], : shape[1]].contiguous()
