"""Insert fake-quantize operators on weights and on the activations that meet them.

Before: ``linear(x, w)``.  After: ``linear(fake_quantize(x, ...), fake_quantize(w, ...))``, each with an observer before it; where there
is a mask, ``fake_quantize(mask(w, w_mask), ...)``, so zeros stay zero.  An activation that several operators use is observed
once.  While observers see data (in train mode, or while calibrating), they follow its range.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import fx

from graphprune.errors import PassError
from graphprune.ir import ops
from graphprune.ir.gates import gated_sites
from graphprune.ir.masking import MaskedSite, masked_sites
from graphprune.ir.program import Program, attributes
from graphprune.ir.properties import Property
from graphprune.ir.quantizing import Quantizer, insert_quantizer, quantizers, set_weight_range
from graphprune.ir.selection import Selection
from graphprune.ir.sites import Site
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
        before = list(quantizers(program))
        done = {decision.prefix for _, decision in before}
        activations = {node.all_input_nodes[0]: node for node, decision in before if not decision.weight}
        nodes = {node.name: node for node in program.graph.nodes}
        weights = attributes(program)
        masks = {item.name: item for item in masked_sites(program)}
        gated = {item.name for item in gated_sites(program)}
        known = len(activations)
        taken: list[Site] = []
        for site in sites:
            uses = [nodes[use] for use in site.uses]
            reason = _obstacle(site, uses, done, gated)
            if reason:
                left_out[site.name] = reason
                continue
            self._quantize_weight(program, site, weights[site.name], masks.get(site.name))
            self._quantize_inputs(program, site, uses, activations)
            taken.append(site)
        program.recompile()
        return PassResult(
            program,
            changed=bool(taken),
            stats={"weights-quantized": len(taken), "activations-quantized": len(activations) - known},
            coverage=Coverage(tuple(site.name for site in taken), left_out),
        )

    def _quantize_weight(self, program: Program, site: Site, weight: fx.Node, masked: MaskedSite | None) -> None:
        axis = "axis1" if site.layout is Layout.IN_OUT else "channel"
        decision = Quantizer(f"int8:symmetric:{axis}", site.name, weight=True)
        value = weight if masked is None else masked.node
        users = list(value.users)
        fake = insert_quantizer(program, value, decision, momentum=1.0)
        for user in users:
            user.replace_input_with(value, fake)
        tensor = program.tensor(site.name)
        if not tensor.is_meta:
            shown = tensor.detach()
            if masked is not None and int(torch.count_nonzero(masked.mask)) < tensor.numel():
                shown = shown * masked.mask.view(torch.uint8)
            set_weight_range(program, site.name, shown, parse_scheme(decision.scheme))

    def _quantize_inputs(
        self, program: Program, site: Site, uses: list[fx.Node], activations: dict[fx.Node, fx.Node]
    ) -> None:
        for index, node in enumerate(uses):
            position = 1 if str(node.target).startswith("aten.addmm") else 0
            value = node.args[position]
            assert isinstance(value, fx.Node)
            if value.target is ops.fake_quantize:
                continue
            if value not in activations:
                decision = Quantizer("uint8:affine:tensor", _free_prefix(program, site, index), weight=False)
                activations[value] = insert_quantizer(program, value, decision, self.momentum)
            node.update_arg(position, activations[value])


def _obstacle(site: Site, uses: list[fx.Node], done: set[str], gated: set[str]) -> str | None:
    if site.name in done:
        return "quantized already"
    if site.name in gated:
        return "it has a trainable gate, whose range changes; run fold-masks before insert-fake-quant"
    if any(str(user.target).startswith("aten.batch_norm") for node in uses for user in node.users):
        return "followed by batch normalization; run fold-conv-bn before insert-fake-quant"
    return None


def _free_prefix(program: Program, site: Site, index: int) -> str:
    """``<module>.input`` for a site's first use, then ``<module>.input_1`` and so on; a name that no buffer has yet."""
    owner = program.get_submodule(site.module)
    names = (f"input_{number}" if number else "input" for number in itertools.count(index))
    leaf = next(name for name in names if not hasattr(owner, f"{name}_scale"))
    return f"{site.module}.{leaf}" if site.module else leaf
