"""Fix the scales of quantizers, take observers away and move weights onto their integer grid."""

from __future__ import annotations

import torch
from torch import fx

from graphprune.errors import PassError
from graphprune.ir.program import Program
from graphprune.ir.quantizing import Quantizer, observers, quantizers, read_observers, set_weight_range, unseen
from graphprune.quant.affine import fake_quantize
from graphprune.quant.schemes import parse_scheme


def freeze(program: Program) -> tuple[str, ...]:
    """Freeze every quantizer that has an observer.

    Scales of weights are found anew, unless the observers were frozen while training (``Program.freeze``): then what the Program
    computes in eval mode stays the same, bit by bit.

    Args:
        program: Mutated: observers and their records go; quantized weights are rounded in place.

    Returns:
        Names of what was frozen.

    Raises:
        PassError: An activation has seen no data; nothing was changed.
    """
    watched = list(observers(program))
    quantized = {decision.prefix for _, decision in quantizers(program)}
    missed = [name for name in unseen(program) if name in quantized]
    if missed:
        more = f" and {len(missed) - 1} more" if missed[1:] else ""
        raise PassError(f"{missed[0]}{more} saw no data; train a step or calibrate before freeze-quant")
    read_observers(program)
    for node, decision in watched:
        keep = decision.prefix in quantized
        if decision.weight and keep and not program.tensor(decision.prefix).is_meta:
            _round_weight(program, decision)
        _remove(program, node, keep=keep)
    return tuple(decision.prefix for _, decision in watched)


@torch.no_grad()
def _round_weight(program: Program, decision: Quantizer) -> None:
    if "observers" not in program.frozen:  # else training went on with the ranges as they were
        set_weight_range(program, decision)
    weight = program.tensor(decision.prefix)
    scale, zero_point = (program.tensor(f"{decision.prefix}_{kind}") for kind in ("scale", "zero_point"))
    weight.copy_(fake_quantize(weight.detach(), scale, zero_point, parse_scheme(decision.scheme)))


def _remove(program: Program, observer: fx.Node, *, keep: bool) -> None:
    """Erase an observer and its records; scale and zero-point too, unless something quantizes by them (``keep``)."""
    inputs = [item for item in observer.args[1 : 4 if keep else 6] if isinstance(item, fx.Node)]
    flag = observer.args[6]
    program.graph.erase_node(observer)
    for item in inputs:
        program.graph.erase_node(item)
        program.remove_buffer(str(item.target))
    if isinstance(flag, fx.Node) and not flag.users:
        program.graph.erase_node(flag)
