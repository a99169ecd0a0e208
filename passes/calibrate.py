"""Run calibration data through the observers.

Before: observers that have seen nothing.  After: the same graph; scales and zero-points are those of the data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from graphprune.errors import PassError
from graphprune.ir.calibration import calibrate
from graphprune.ir.program import Program, is_meta
from graphprune.ir.properties import Property
from graphprune.pipeline.base import DataPass, PassResult


@dataclass(frozen=True)
class Calibrate(DataPass):
    """Let observers see calibration data, and set scales from it.

    Attributes:
        batches: How many batches to use; 0 = all.
        progress: Show a progress bar.
    """

    name = "calibrate"
    requires = Property.OBSERVED
    forbids = Property.PARTITIONED | Property.FROZEN

    batches: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batches < 0:
            raise PassError(f"batches={self.batches} is below 0; 0 takes all")

    def run_on(self, program: Program, batches: Iterable[object]) -> PassResult:
        """Calibrate in eval mode; the graph stays as it is."""
        if is_meta(program):
            return PassResult(program, changed=False)
        taken = itertools.islice(batches, self.batches) if self.batches else batches
        seen = calibrate(program, taken, progress=self.progress)
        return PassResult(program, changed=True, stats={"batches": seen})
