"""Correct biases for what rounding weights does to the mean of each output.

Before: ``linear(x, fake_quantize(w, ...), b)``.  After: the same graph; ``b`` is larger by ``(w - fake_quantize(w)) @ mean(x)``, so that
each output channel has the mean over the calibration data that the float weight gives it.  Weights and scales stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphprune.ir.masking import masked_sites
from graphprune.ir.program import Program, is_meta
from graphprune.ir.properties import Property
from graphprune.ir.quantizable import Quantizable, find_quantizable
from graphprune.ir.quantizing import Quantizer, quantizers
from graphprune.ir.watching import watch
from graphprune.pipeline.base import Coverage, DataPass, PassResult
from graphprune.quant.affine import fake_quantize
from graphprune.quant.schemes import parse_scheme
from graphprune.sparsity.layout import Layout, to_logical


@dataclass(frozen=True)
class BiasCorrected:
    """Annotation on an operator: its bias was corrected."""

    corrected: bool = True


@dataclass(frozen=True)
class BiasCorrect(DataPass):
    """Take the mean of the error of rounded weights out of each output channel; it runs between calibration and freezing.

    Attributes:
        progress: Show a progress bar.

    Source: Nagel et al., arXiv:1906.04721, section 4.2, with means of the inputs measured on the data.
    """

    name = "bias-correct"
    requires = Property.FAKE_QUANT | Property.OBSERVED
    forbids = Property.PARTITIONED | Property.FROZEN

    progress: bool = True

    def run_on(self, program: Program, batches: Iterable[object]) -> PassResult:
        """Add to biases in place."""
        decisions = {decision.prefix: decision for _, decision in quantizers(program) if decision.weight}
        left: dict[str, str] = {}
        chosen: list[Quantizable] = []
        for item in find_quantizable(program):
            reason = _obstacle(program, item, decisions)
            if reason is None:
                chosen.append(item)
            else:
                left[item.name] = reason
        means = {} if is_meta(program) else _means(program, chosen, batches, self.progress)
        masks = {site.name: site.mask for site in masked_sites(program)}
        largest = 0.0
        for item in chosen:
            if means:
                largest = max(largest, _correct(program, item, decisions[item.name], masks.get(item.name), means))
            program.annotate(item.node, BiasCorrected())
        coverage = Coverage(tuple(item.name for item in chosen), left)
        return PassResult(
            program, bool(chosen), {"biases-corrected": len(chosen), "largest-correction": largest}, coverage
        )


def _obstacle(program: Program, item: Quantizable, decisions: dict[str, Quantizer]) -> str | None:
    if item.weight is None or item.kind == "embedding":
        return "it has no weight that is multiplied with its input"
    if item.name not in decisions:
        return "its weight is not quantized"
    if program.annotation(item.node, BiasCorrected) is not None:
        return "corrected already"
    bias = _bias(item)
    if bias is None:
        return "it has no bias"
    if len(bias.users) > 1:
        return "its bias is used in several places, whose inputs differ"
    return None


def _bias(item: Quantizable) -> fx.Node | None:
    place = 0 if item.op == "addmm" else 2
    bias = item.node.args[place] if len(item.node.args) > place and item.op not in ("mm", "matmul") else None
    return bias if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def _means(
    program: Program, chosen: list[Quantizable], batches: Iterable[object], progress: bool
) -> dict[fx.Node, Tensor]:
    """Mean of each operator's input over all data, float64 ``[input channels]``, by the value that is its input."""
    channels = {_input(item): 1 if item.is_convolution else -1 for item in chosen}
    sums: dict[fx.Node, Tensor] = {}
    counts: dict[fx.Node, int] = {}

    def see(node: fx.Node, value: Tensor) -> None:
        rows = value.movedim(channels[node], -1).reshape(-1, value.shape[channels[node]])
        sums[node] = sums.get(node, 0.0) + rows.sum(0, dtype=torch.float64)
        counts[node] = counts.get(node, 0) + len(rows)

    watch(program, list(channels), batches, see, "correcting biases" if progress else "")
    return {node: total / counts[node] for node, total in sums.items()}


def _input(item: Quantizable) -> fx.Node:
    value = item.node.args[item.inputs[0]]
    assert isinstance(value, fx.Node)
    return value


@torch.no_grad()
def _correct(
    program: Program, item: Quantizable, decision: Quantizer, mask: Tensor | None, means: dict[fx.Node, Tensor]
) -> float:
    """Correct one bias; the largest change."""
    weight = program.tensor(item.name).detach()
    weight = weight if mask is None else weight * mask.view(torch.uint8)
    scale, zero_point = (program.tensor(f"{item.name}_{kind}") for kind in ("scale", "zero_point"))
    error = weight - fake_quantize(weight, scale, zero_point, parse_scheme(decision.scheme))
    assert item.layout is not None
    mean = means[_input(item)]
    if item.layout is Layout.CONV:
        error = error.flatten(2).sum(-1)  # every kernel position sees the same mean, but for padding
        groups = len(mean) // error.shape[1]
        each = error.double().reshape(groups, -1, error.shape[1]) @ mean.view(groups, -1, 1)
        change = each.flatten()
    else:
        change = to_logical(error, item.layout).double() @ mean
    bias_node = _bias(item)
    assert bias_node is not None
    bias = program.tensor(str(bias_node.target))
    bias.add_(change.to(bias.dtype))
    return float(change.abs().max())
