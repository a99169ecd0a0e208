"""Insert fake-quantize operators on weights and on the activations that meet them.

Before: ``linear(x, w)``.  After: ``linear(fake_quantize(x, ...), fake_quantize(w, ...))``, each with an observer before it; where there
is a mask, ``fake_quantize(mask(w, w_mask), ...)``, so zeros stay zero.  An activation that several operators use is observed
once.  While observers see data (in train mode, or while calibrating), they follow its range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphprune.errors import PassError
from graphprune.ir import ops
from graphprune.ir.masking import masked_sites
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.quantizing import Quantizer, insert_quantizer, quantizers, set_weight_range
from graphprune.ir.selection import Selection
from graphprune.ir.sites import OPERATORS, Site
from graphprune.pipeline.base import Coverage, Pass, PassResult
from graphprune.quant.schemes import parse_scheme
from graphprune.sparsity.layout import Layout


@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Insert int8 fake-quantization for quantization-aware training or calibration.

    Weights are int8, symmetric, one scale an output channel; activations uint8, affine, one scale a tensor.

    Attributes:
        momentum: Share of each batch in the moving average of an activation's range, in (0, 1].
        select: As for ``find-prunable``; all linear and convolution operators where empty.
        exclude: As for ``find-prunable``.
        ops: As for ``find-prunable``.
        include_last: Quantize the last layer before the output too.
    """

    name = "insert-fake-quant"
    establishes = Property.FAKE_QUANT
    destroys = Property.FROZEN

    momentum: float = 0.01
    select: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    include_last: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.momentum <= 1:
            raise PassError(f"momentum={self.momentum} is not in (0, 1]")

    def run(self, program: Program) -> PassResult:
        """Insert one quantizer a weight and one an activation."""
        sites, excluded = Selection(self.select, self.exclude, self.ops, self.include_last).apply(program)
        left_out = {item.name: item.reason for item in excluded}
        done = {decision.prefix for _, decision in quantizers(program)}
        activations: dict[fx.Node, fx.Node] = {}
        taken: list[Site] = []
        for site in sites:
            reason = self._obstacle(program, site, done)
            if reason:
                left_out[site.name] = reason
                continue
            self._quantize_weight(program, site)
            self._quantize_inputs(program, site, activations)
            taken.append(site)
        program.recompile()
        return PassResult(
            program,
            changed=bool(taken),
            stats={"weights-quantized": len(taken), "activations-quantized": len(activations)},
            coverage=Coverage(tuple(site.name for site in taken), left_out),
        )

    def _obstacle(self, program: Program, site: Site, done: set[str]) -> str | None:
        if site.name in done:
            return "quantized already"
        for use in site.uses:
            node = _node(program, use)
            if any(str(user.target).startswith("aten.batch_norm") for user in node.users):
                return "followed by batch normalization; run fold-conv-bn before insert-fake-quant"
        return None

    def _quantize_weight(self, program: Program, site: Site) -> None:
        axis = "axis1" if site.layout is Layout.IN_OUT else "channel"
        decision = Quantizer(f"int8:symmetric:{axis}", site.name, weight=True)
        weight = program.attribute(site.name)
        assert weight is not None
        masked = [user for user in weight.users if user.target is ops.mask]
        value = masked[0] if masked else weight
        users = [user for user in value.users if user.target is not ops.mask]
        fake = insert_quantizer(program, value, decision, momentum=1.0)
        for user in users:
            user.replace_input_with(value, fake)
        tensor = program.tensor(site.name)
        if not tensor.is_meta:
            mask = next((item.mask for item in masked_sites(program) if item.name == site.name), None) if masked else None
            shown = tensor.detach() if mask is None else tensor.detach() * mask.view(torch.uint8)
            set_weight_range(program, site.name, shown, parse_scheme(decision.scheme))

    def _quantize_inputs(self, program: Program, site: Site, activations: dict[fx.Node, fx.Node]) -> None:
        for index, use in enumerate(site.uses):
            node = _node(program, use)
            position = 1 if str(node.target).startswith("aten.addmm") else 0
            value = node.args[position]
            assert isinstance(value, fx.Node) and OPERATORS[node.target].weight != position
            if value.target is ops.fake_quantize:
                continue
            if value not in activations:
                suffix = f"_{index}" if index else ""
                decision = Quantizer("uint8:affine:tensor", f"{site.module}.input{suffix}".lstrip("."), weight=False)
                activations[value] = insert_quantizer(program, value, decision, self.momentum)
            node.update_arg(position, activations[value])


def _node(program: Program, name: str) -> fx.Node:
    return next(node for node in program.graph.nodes if node.name == name)
