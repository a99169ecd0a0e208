"""Where a walk reads weights from and writes pruned ones to, and how much memory they take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from graphprune.ir import ops
from graphprune.ir.masking import MaskedSite
from graphprune.ir.program import Program
from graphprune.sparsity.layout import from_logical


class Weights(Protocol):
    """Parameters and buffers by name. Weights that were pruned are zero where their mask is False."""

    def read(self, name: str) -> Tensor:
        """Return one; it stays in memory until ``drop``."""

    def size(self, name: str) -> int:
        """Return the bytes that reading it takes; 0 where it is in memory all the time."""

    def write(self, site: MaskedSite, weight: Tensor, mask: Tensor) -> None:
        """Replace a weight by the logical matrices of the new one and of its mask."""

    def drop(self) -> None:
        """Forget what was read."""


class InMemory:
    """The tensors of a Program itself."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def read(self, name: str) -> Tensor:
        """Return the tensor that the Program holds."""
        return self.program.tensor(name).detach()

    def size(self, name: str) -> int:
        """Return 0."""
        return 0

    @torch.no_grad()
    def write(self, site: MaskedSite, weight: Tensor, mask: Tensor) -> None:
        """Write into the Program's weight and mask."""
        site.weight.copy_(from_logical(weight, site.decision.layout, tuple(site.weight.shape)))
        site.mask.copy_(from_logical(mask, site.decision.layout, tuple(site.mask.shape)))
        ops.mark_clean(site.weight, site.mask)

    def drop(self) -> None:
        """Do nothing."""


class Meter:
    """Counts bytes by what is asked for and given back, so that the peak is the same on every machine."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0

    def add(self, count: int) -> None:
        """Count bytes that are taken, or given back where negative."""
        self.now += count
        self.peak = max(self.peak, self.now)

    @contextlib.contextmanager
    def held(self, count: int) -> Iterator[None]:
        """Count bytes while a block runs."""
        self.add(count)
        try:
            yield
        finally:
            self.add(-count)
