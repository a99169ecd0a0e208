"""Quantize weights, and activations by the range of each value when it is computed; no data is needed.

Before: ``linear(x, w)``.  After: ``linear(dynamic_fake_quantize(x, 0, 255), fake_quantize(w, ...))``, ``w`` on its integer grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphprune.errors import PassError
from graphprune.ir.freezing import freeze
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.quant_plan import DYNAMIC, Request, decide
from graphprune.ir.quantizing import annotate_plan, quantize_planned
from graphprune.pipeline.base import Coverage, Pass, PassResult


@dataclass(frozen=True)
class DynamicQuant(Pass):
    """Quantize for inference without calibration: weights once, activations at run time.

    Attributes:
        weights: Scheme of weights.
        embeddings: Scheme of embedding tables; ``none`` leaves them.
        reduce_range: As for ``annotate-quant``.
        select: As for ``annotate-quant``.
        exclude: As for ``annotate-quant``.
        ops: As for ``annotate-quant``.
        include_last: Quantize the last layer before the output too.
        rules: As for ``annotate-quant``.
    """

    name = "dynamic-quant"
    establishes = Property.PLANNED | Property.FAKE_QUANT | Property.FROZEN
    forbids = Property.PARTITIONED | Property.FAKE_QUANT | Property.PLANNED

    weights: str | None = None
    embeddings: str | None = None
    reduce_range: bool | None = None
    select: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    include_last: bool = True
    rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _ = self.request

    @property
    def request(self) -> Request:
        """The options as the plan takes them."""
        return Request(activations=DYNAMIC, **vars(self))

    def recorded(self) -> DynamicQuant:
        """The pass with what it takes from this machine written out."""
        return replace(self, reduce_range=self.request.written_range())

    def run(self, program: Program) -> PassResult:
        """Plan, insert and freeze.

        Raises:
            PassError: A rule gives an activation a fixed scale, which takes data to find.
        """
        decided = decide(program, self.request)
        for plan in decided.plans.values():
            if any(operand.scheme != DYNAMIC and not operand.weight for operand in plan.operands):
                raise PassError(
                    f"{plan.name}: a rule gives its activations a fixed scale, which takes data to find; run "
                    f"annotate-quant{{activations=dynamic,...}}, insert-observers, calibrate, insert-fake-quant, freeze-quant"
                )
        annotate_plan(program, decided.plans)
        quantize_planned(program)
        frozen = freeze(program)
        names = tuple(plan.name for plan in decided.plans.values())
        stats = {"operators": len(names), "weights-quantized": len(frozen)}
        return PassResult(program, changed=True, stats=stats, coverage=Coverage(names, decided.left_out))
