"""Freeze quantization: fix every scale, take the observers away and move weights onto their integer grid.

Before: ``observe(w, ...)`` and ``fake_quantize(w, w_scale, ...)``.  After: only ``fake_quantize``; ``w`` is stored as a multiple of its
scale, so that quantizing it again changes nothing.  A pruned weight is zero and stays exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphprune.errors import PassError
from graphprune.ir import ops
from graphprune.ir.masking import masked_sites
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.quantizing import quantizers, set_weight_range
from graphprune.pipeline.base import Coverage, Pass, PassResult
from graphprune.quant.affine import fake_quantize
from graphprune.quant.schemes import parse_scheme


@dataclass(frozen=True)
class FreezeQuant(Pass):
    """Fix scales and zero-points, so that a target can store integers."""

    name = "freeze-quant"
    requires = Property.FAKE_QUANT
    establishes = Property.FROZEN

    def run(self, program: Program) -> PassResult:
        """Remove observers, recompute weight scales and round weights in place."""
        masks = {site.name: site.mask for site in masked_sites(program)}
        observers = list(program.calls(ops.observe))
        observed = {str(node.args[3].target) for node in observers if isinstance(node.args[3], torch.fx.Node)}
        frozen = []
        for _, decision in quantizers(program):
            if f"{decision.prefix}_scale" not in observed:
                continue  # frozen before
            if program.tensor(f"{decision.prefix}_scale").is_meta:
                pass  # a structure without values, as when a saved Program is rebuilt
            elif decision.weight:
                _round_weight(program, decision.prefix, parse_scheme(decision.scheme), masks.get(decision.prefix))
            elif bool((program.tensor(f"{decision.prefix}_high") < program.tensor(f"{decision.prefix}_low")).any()):
                raise PassError(
                    f"{decision.prefix} has seen no data; train a step or run graphprune.training.calibrate before freeze-quant"
                )
            frozen.append(decision.prefix)
        for node in observers:
            ranges = [item for item in node.args[1:3] if isinstance(item, torch.fx.Node)]
            observing = node.args[5]
            program.graph.erase_node(node)
            for item in ranges:
                program.graph.erase_node(item)
                program.remove_buffer(str(item.target))
            if isinstance(observing, torch.fx.Node) and not observing.users:
                program.graph.erase_node(observing)
        return PassResult(program, bool(frozen), {"quantizers-frozen": len(frozen)}, Coverage(tuple(frozen)))


@torch.no_grad()
def _round_weight(program: Program, name: str, scheme: object, mask: torch.Tensor | None) -> None:
    weight = program.tensor(name)
    shown = weight.detach() if mask is None else weight.detach() * mask.view(torch.uint8)
    set_weight_range(program, name, shown, scheme)  # type: ignore[arg-type]
    scale, zero_point = program.tensor(f"{name}_scale"), program.tensor(f"{name}_zero_point")
    weight.copy_(fake_quantize(weight.detach(), scale, zero_point, scheme))  # type: ignore[arg-type]
