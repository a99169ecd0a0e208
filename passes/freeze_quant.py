"""Freeze quantization: fix every scale, take the observers away and move weights onto their integer grid.

Before: ``observe(w, ...)`` and ``fake_quantize(w, w_scale, ...)``.  After: only ``fake_quantize``; ``w`` is stored as a multiple of its
scale, so that quantizing it again changes nothing.  A pruned weight is zero and stays exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.ir.freezing import freeze
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.pipeline.base import Coverage, Pass, PassResult


@dataclass(frozen=True)
class FreezeQuant(Pass):
    """Fix scales and zero-points, so that a target can store integers."""

    name = "freeze-quant"
    requires = Property.FAKE_QUANT
    establishes = Property.FROZEN
    destroys = Property.OBSERVED
    forbids = Property.PARTITIONED | Property.FROZEN

    def run(self, program: Program) -> PassResult:
        """Remove observers, recompute weight scales (unless training froze the observers) and round weights in place."""
        frozen = freeze(program)
        return PassResult(program, bool(frozen), {"quantizers-frozen": len(frozen)}, Coverage(frozen))
