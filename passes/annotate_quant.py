"""Decide what is quantized, and how; change no operator.

Before: ``linear(x, w)``.  After: the same, annotated ``{quantize=0@uint8:affine:tensor;1@int8:symmetric:channel}``: argument 0 and
argument 1 will be quantized so.  ``insert-observers`` and ``insert-fake-quant`` act on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.quant_plan import Request, decide
from graphprune.ir.quantizing import annotate_plan
from graphprune.pipeline.base import Coverage, Pass, PassResult


@dataclass(frozen=True)
class AnnotateQuant(Request, Pass):
    """Decide which operands of which operators are quantized, by a preset, options and rules.

    Attributes:
        preset: ``onnxruntime``, ``deepsparse``, ``tensorrt``, ``ipex`` or ``openvino``; what follows changes it.
        weights: Scheme of weights, such as ``int8:symmetric:channel`` or ``int4:symmetric:channel:group32``; ``none`` leaves them.
        activations: Scheme of activations, with one scale a tensor; ``dynamic`` takes the range of each value when it is
            computed; ``none`` leaves them.
        embeddings: Scheme of embedding tables; ``none`` leaves them.
        observer: How ranges of activations are found: ``min-max``, ``moving-average-min-max``, ``percentile``, ``histogram-kl``, ``mse``.
        weight_observer: The same for weights.
        outputs: Quantize results of convolutions and of sums they end in, so that runtimes fuse them.
        reduce_range: Use one bit less for weights, for CPUs without VNNI; not for embeddings, nor for the weights that a rule
            sets. By default the preset ``onnxruntime`` does so where this CPU has none.
        select: Globs or ``re:`` expressions over module and parameter names; empty takes all.
        exclude: Names to leave out, in the same form.
        ops: Kinds of operators to take (``linear``, ``conv``, ``embedding``, ``matmul``, ``add``), also those that the preset leaves.
        include_last: Quantize the last layer before the output too.
        rules: Changes for operators by kind, name or type, such as ``op embedding: off``, ``type BertPooler: off`` or
            ``name *.layer.0.*: weights=int8:symmetric:tensor``; the later rule wins.
    """

    name = "annotate-quant"
    establishes = Property.PLANNED

    @property
    def request(self) -> Request:
        """The options as the plan takes them: the pass is a request."""
        return self

    def recorded(self) -> AnnotateQuant:
        """The pass with what it takes from this machine written out."""
        return replace(self, reduce_range=self.request.written_range())

    def run(self, program: Program) -> PassResult:
        """Annotate operators."""
        decided = decide(program, self.request)
        new = [decided.plans[node] for node in annotate_plan(program, decided.plans)]
        names = tuple(plan.name for plan in new)
        done = {plan.name: "annotated already" for plan in decided.plans.values() if plan.name not in names}
        stats = {"operators": len(new), "operands": sum(len(plan.operands) for plan in new)}
        return PassResult(program, bool(new), stats, Coverage(names, {**decided.left_out, **done}))
