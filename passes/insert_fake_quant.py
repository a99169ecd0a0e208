"""Insert fake-quantize operators where the plan quantizes something.

Before: ``linear(x, w)``.  After: ``linear(fake_quantize(x, ...), fake_quantize(w, ...))``, each with an observer beside it; where there
is a mask, ``fake_quantize(mask(w, w_mask), ...)``, so zeros stay zero.  A value that several operators use is quantized once.
Observers that ``insert-observers`` put there, and what they recorded, are used.  While observers see data (in train mode, or while
calibrating), they follow its range.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from graphprune.errors import PassError
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.quant_plan import QuantPlan, Request, decide, planned
from graphprune.ir.quantizing import FreezeTimes, annotate_plan, find_quantizer, quantize_planned, wanted_values
from graphprune.pipeline.base import Coverage, Pass, PassResult
from graphprune.sparsity.windows import Time, check_time

_CHOOSING = ("select", "exclude", "ops", "include_last")
_PLANNING = ("momentum", *_CHOOSING)
"""Options that mean nothing where there is a plan."""


@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Insert fake-quantization for quantization-aware training, or behind calibrated observers.

    It acts on the plan of ``annotate-quant``. Without one it plans by the preset ``onnxruntime`` with moving averages: weights
    int8, symmetric, one scale an output channel; activations uint8, affine, one scale a tensor. Where operators are chosen here
    (``select``, ``exclude``, ``ops``, ``include_last``), it plans those so, beside what is quantized already.

    Attributes:
        momentum: Share of each batch in the moving average of an activation's range, in (0, 1]; where it plans.
        select: As for ``annotate-quant``.
        exclude: As for ``annotate-quant``.
        ops: As for ``annotate-quant``.
        include_last: Quantize the last layer before the output too.
        reduce_range: As for ``annotate-quant``; where it plans.
        freeze_observers: Length of training after which ranges stay as they are: steps, a fraction, or "2 epochs"; null = never.
        freeze_batch_norm: The same for the running statistics of batch normalization.
    """

    name = "insert-fake-quant"
    establishes = Property.FAKE_QUANT | Property.OBSERVED | Property.PLANNED
    destroys = Property.FROZEN

    momentum: float = 0.01
    select: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    include_last: bool = True
    reduce_range: bool | None = None
    freeze_observers: Time | None = None
    freeze_batch_norm: Time | None = None

    def __post_init__(self) -> None:
        if not 0 < self.momentum <= 1:
            raise PassError(f"momentum={self.momentum} is not in (0, 1]")
        for name in ("freeze_observers", "freeze_batch_norm"):
            if getattr(self, name) is not None:
                check_time(name, getattr(self, name))
        _ = self.request

    @property
    def request(self) -> Request:
        """What is planned where there is no plan."""
        return Request(
            observer=f"moving-average-min-max(momentum={self.momentum})",
            select=self.select,
            exclude=self.exclude,
            ops=self.ops,
            include_last=self.include_last,
            reduce_range=self.reduce_range,
        )

    def recorded(self) -> InsertFakeQuant:
        """The pass with what it takes from this machine written out."""
        return replace(self, reduce_range=self.request.written_range())

    def run(self, program: Program) -> PassResult:
        """Insert one quantizer a value and scheme.

        Raises:
            PassError: A plan of ``annotate-quant`` waits, and something here would plan otherwise.
        """
        left = self._plan(program)
        inserted, moved = quantize_planned(program)
        times = FreezeTimes(self.freeze_observers, self.freeze_batch_norm)
        timed = times != FreezeTimes() and program.annotation(program.output, FreezeTimes) != times
        if timed:
            program.annotate(program.output, times)
        weights = sum(wanted.operand.weight for wanted in inserted)
        return PassResult(
            program,
            changed=bool(inserted or moved or timed),
            stats={"weights-quantized": weights, "activations-quantized": len(inserted) - weights},
            coverage=Coverage(tuple(dict.fromkeys(wanted.asked_by for wanted in inserted)), left),
        )

    def _plan(self, program: Program) -> dict[str, str]:
        """Plan where there is no plan, or where operators are chosen here; reasons for what is left out."""
        waiting = {wanted.asked_by for wanted in wanted_values(program) if find_quantizer(wanted, program) is None}
        done = {plan.name: "quantized already" for _, plan in planned(program) if plan.name not in waiting}
        given = {item.name for item in fields(self) if getattr(self, item.name) != item.default} & {*_PLANNING}
        if waiting and given:
            raise PassError(
                f"{', '.join(sorted(given))}: the plan of annotate-quant waits to be inserted; say there what is quantized, and "
                f"how (observer=moving-average-min-max(momentum=...) for momentum)"
            )
        if waiting or (done and not given & {*_CHOOSING}):
            return done
        decided = decide(program, self.request)
        new = {node: plan for node, plan in decided.plans.items() if program.annotation(node, QuantPlan) is None}
        annotate_plan(program, new)
        return {**decided.left_out, **done}
