"""Insert observers where the plan quantizes something; nothing is quantized yet.

Before: ``linear(x, w)``, annotated by ``annotate-quant``.  After: the same, with ``observe(x, ...)`` and ``observe(w, ...)`` beside it,
which record ranges while ``calibrate`` runs and change no value: outputs are bitwise equal.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.quant_plan import DYNAMIC
from graphprune.ir.quantizing import Quantizer, find_observer, find_quantizer, insert_observer, wanted_values
from graphprune.pipeline.base import Coverage, Pass, PassResult


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Insert an observer for each value that the plan quantizes by a fixed scale."""

    name = "insert-observers"
    requires = Property.PLANNED
    establishes = Property.OBSERVED
    destroys = Property.FROZEN

    def run(self, program: Program) -> PassResult:
        """Insert observers."""
        made: list[str] = []
        left: dict[str, str] = {}
        for wanted in wanted_values(program):
            if wanted.operand.scheme == DYNAMIC:
                left[wanted.asked_by] = "its range is taken from each value when it is computed"
            elif find_observer(wanted, program) is None and find_quantizer(wanted, program) is None:
                decision = program.annotation(insert_observer(program, wanted), Quantizer)
                made.append(decision.prefix)  # type: ignore[union-attr]
        return PassResult(program, bool(made), {"observers": len(made)}, Coverage(tuple(made), left))
