"""Make a batch of features: pad what differs in length, leave out what no model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INDEX_COLUMNS = ("example_index", "feature_index")
"""Columns of every task's features: which example, and which feature of the split. They survive shuffling."""


@dataclass(frozen=True)
class Collator:
    """Pad features to the longest of their batch and stack them.

    Attributes:
        paddings: What to pad each column of lists with; 0 where a column is not named.
        left: Whether padding goes before the tokens.
        multiple: Pad to a multiple of this, such as 8 for tensor cores; None for none.
        keep: Index columns to hand on; the others are left out.
    """

    paddings: Mapping[str, int]
    left: bool = False
    multiple: int | None = None
    keep: tuple[str, ...] = ()

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Stack features.

        Args:
            features: Rows of a task's features; all have the same columns.

        Returns:
            int64 ``[batch, longest]`` for lists of numbers, int64 or float32 ``[batch]`` for numbers.
        """
        batch: dict[str, Tensor] = {}
        for name, first in features[0].items():
            if (name in INDEX_COLUMNS and name not in self.keep) or isinstance(first, str) or first is None:
                continue
            values = [feature[name] for feature in features]
            if isinstance(first, Sequence) or (isinstance(first, Tensor) and first.ndim):
                batch[name] = self._padded(values, self.paddings.get(name, 0))
            else:
                batch[name] = torch.as_tensor(values)
        return batch

    def _padded(self, values: Sequence[Sequence[int]], padding: int) -> Tensor:
        longest = max(len(value) for value in values)
        if self.multiple:
            longest += -longest % self.multiple
        stacked = torch.full((len(values), longest), padding, dtype=torch.int64)
        for row, value in enumerate(values):
            place = slice(longest - len(value), longest) if self.left else slice(0, len(value))
            stacked[row, place] = torch.as_tensor(value)
        return stacked
