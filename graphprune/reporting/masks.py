"""Pictures of masks as text: one character a cell, drawn by the page on a canvas in its own colors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CELLS = 128
"""Most cells of a density picture along its longer side."""
CORNER = 64
"""Weights along each side of the picture at true resolution."""
_LEAST = 16  # cells along the shorter side, however long the matrix is
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_SYMBOLS = np.frombuffer(_ALPHABET.encode(), dtype=np.uint8)
_TOP = len(_ALPHABET) - 1


@dataclass(frozen=True)
class Picture:
    """A picture of a mask.

    Attributes:
        rows: Cells from top to bottom; rows of the matrix are output features.
        columns: Cells from left to right; columns are input features.
        cells: One character of the base64 alphabet a cell, row by row: its place, 0 to 63, says how much is kept.
        weights: Rows and columns of the matrix that the picture covers.
    """

    rows: int
    columns: int
    cells: str
    weights: tuple[int, int]


def density(zeros: np.ndarray, most: int = CELLS) -> Picture:
    """How much of each part of a matrix is kept.

    Args:
        zeros: Bool ``[out, in]``, True where a weight is zero.
        most: Cells along the longer side, where the matrix has that many rows or columns.

    Returns:
        A picture of cells of equal size to within one row and one column. Each is the exact fraction that is kept, rounded to 64
        levels; 0 stands for nothing kept and 63 for everything, and no other fraction gets these two.
    """
    rows, columns = zeros.shape
    longer = max(rows, columns)
    height, width = (min(size, max(_LEAST, round(min(most, longer) * size / longer))) for size in (rows, columns))
    first, left = _edges(rows, height), _edges(columns, width)
    kept = np.add.reduceat((~zeros).astype(np.int64), left[:-1], axis=1)
    kept = np.add.reduceat(kept, first[:-1], axis=0)
    total = np.diff(first)[:, None] * np.diff(left)[None, :]
    levels = np.clip(np.rint(kept / total * _TOP), 1, _TOP - 1).astype(np.int64)
    levels[kept == 0] = 0
    levels[kept == total] = _TOP
    return Picture(height, width, _text(levels), (rows, columns))


def corner(zeros: np.ndarray, size: int = CORNER) -> Picture:
    """The first rows and columns of a matrix, a cell a weight.

    Args:
        zeros: Bool ``[out, in]``, True where a weight is zero.
        size: Most rows and columns.
    """
    kept = ~zeros[:size, :size]
    return Picture(kept.shape[0], kept.shape[1], _text(kept.astype(np.int64) * _TOP), kept.shape)


def _edges(size: int, cells: int) -> np.ndarray:
    return np.arange(cells + 1) * size // cells


def _text(levels: np.ndarray) -> str:
    return str(_SYMBOLS[levels.ravel()].tobytes(), "ascii")
