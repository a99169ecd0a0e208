"""Reference: weights as matrices, and which weights a pattern prunes together.

Plain NumPy, written from the definitions and not from graphprune, which must not be imported here.  Slow and obvious: a
pattern is a matrix that says for every weight the number of its unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Geometry:
    """What a weight is.

    Attributes:
        kind: ``linear`` (stored [out, in]), ``conv1d`` (GPT-2's, stored [in, out]) or ``conv`` (stored
            [out, in/groups, *kernel]).
        shape: As stored.
        groups: Groups of a convolution.
    """

    kind: str
    shape: tuple[int, ...]
    groups: int = 1

    def matrix(self, stored: NDArray[np.generic]) -> NDArray[np.generic]:
        """See a stored weight as [out, in * kernel]; in a convolution the input channel varies fastest."""
        if self.kind == "conv":
            return np.moveaxis(stored, 1, -1).reshape(self.shape[0], -1)
        return stored.T if self.kind == "conv1d" else stored

    def stored(self, matrix: NDArray[np.generic]) -> NDArray[np.generic]:
        """The inverse of ``matrix``."""
        if self.kind == "conv":
            out, channels, *kernel = self.shape
            return np.moveaxis(matrix.reshape(out, *kernel, channels), -1, 1)
        return matrix.T if self.kind == "conv1d" else matrix

    @property
    def rows(self) -> int:
        return self.shape[1] if self.kind == "conv1d" else self.shape[0]

    @property
    def columns(self) -> int:
        return int(np.prod(self.shape)) // self.rows

    @property
    def channels(self) -> int:
        """Input channels that a row sees."""
        return self.shape[1] if self.kind == "conv" else self.columns


def unit_numbers(pattern: str, geometry: Geometry) -> Numbers:
    """Number of the unit of every weight, [rows, columns]; units are numbered along rows first.

    ``unstructured``; ``NxM``: N rows by M columns, smaller at the edges; ``N:M``: groups of M columns; ``1xchannel``: a row;
    ``channelx1``: an input channel, with all its kernel positions (of a grouped convolution: of one group).
    """
    row, column = np.indices((geometry.rows, geometry.columns))
    if pattern == "unstructured":
        height, width = 1, 1
    elif pattern == "1xchannel":
        return row
    elif pattern == "channelx1":
        group = row // (geometry.rows // geometry.groups)
        return group * geometry.channels + column % geometry.channels
    elif ":" in pattern:
        height, width = 1, int(pattern.split(":")[1])
    else:
        height, width = (int(part) for part in pattern.split("x"))
    return row // height * -(-geometry.columns // width) + column // width


def sums(values: Matrix, units: Numbers) -> NDArray[np.float64]:
    """Sum of every unit."""
    return np.bincount(units.ravel(), weights=values.ravel())


def means(values: Matrix, units: Numbers) -> Matrix:
    """Mean of every unit."""
    return (sums(values, units) / np.bincount(units.ravel())).astype(np.float32)


def dropped_in_groups(scores: Matrix, pattern: str) -> Flags:
    """The M - N smallest of every group of M columns; of equal ones the last. A short last group loses nothing."""
    keep, group = (int(part) for part in pattern.split(":"))
    lost = np.zeros(scores.shape, dtype=bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1] - group + 1, group):
            places = sorted(range(start, start + group), key=lambda place: (scores[row, place], -place))
            lost[row, places[: group - keep]] = True
    return lost
