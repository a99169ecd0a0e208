"""Fold batch normalization into the convolution before it.

Before: ``batch_norm(conv2d(x, w, b), gamma, beta, mean, var)``.  After: ``conv2d(x, w * gamma / sqrt(var + eps), ...)``; the running
statistics are used as they are, in train mode too, so this comes after or without training of the normalization.  Equal to
the eval-mode model up to rounding (1e-5 relative in float32).  Zeros of ``w`` stay zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from graphprune.ir import ops
from graphprune.ir.blocks import FLAGS
from graphprune.ir.program import Program, argument
from graphprune.ir.rewrite import Call, Match, RewriteRule, apply_rule
from graphprune.ir.sites import OPERATORS
from graphprune.pipeline.base import Coverage, Pass, PassResult
from graphprune.sparsity.layout import Layout

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldConvBn(Pass):
    """Fold batch normalizations into convolutions."""

    name = "fold-conv-bn"

    def run(self, program: Program) -> PassResult:
        """Scale convolution weights in place, and remove the normalizations."""
        applied = apply_rule(program, _FoldRule())
        _drop_counters(program)
        stats = {"folded": len(applied.rewritten)}
        return PassResult(program, bool(applied.rewritten), stats, Coverage(applied.rewritten, applied.left_out))


class _FoldRule(RewriteRule):
    subgraph = Call(
        "normalization",
        (aten.batch_norm.default,),
        {0: Call("convolution", tuple(target for target, item in OPERATORS.items() if item.layout is Layout.CONV))},
    )

    def label(self, match: Match) -> str:
        gamma = match.root.args[1]
        return str(gamma.target) if isinstance(gamma, fx.Node) else match.root.name

    def check(self, program: Program, match: Match) -> str | None:
        convolution = match["convolution"]
        if len(convolution.users) > 1:
            return "the convolution's result is used elsewhere too"
        weight = _weight_of(convolution)
        if weight.op != "get_attr":
            return "the convolution's weight is fake-quantized; run fold-conv-bn before insert-fake-quant"
        uses = [user for user in weight.users if user.target is not ops.mask and user is not convolution]
        masked = [user for user in weight.users if user.target is ops.mask]
        if uses or any(len(item.users) > 1 for item in masked):
            return "the convolution's weight is used elsewhere too"
        bias = convolution.args[2] if len(convolution.args) > 2 else None
        if isinstance(bias, fx.Node) and len(bias.users) > 1:
            return "the convolution's bias is used elsewhere too"
        if not all(isinstance(item, fx.Node) for item in match.root.args[3:5]):
            return "it has no running statistics"
        return None

    def rewrite(self, program: Program, match: Match) -> fx.Node:
        _fold(program, match.root, match["convolution"])
        return match["convolution"]


def _weight_of(convolution: fx.Node) -> fx.Node:
    weight = argument(convolution, 1)
    return argument(weight, 0) if weight.target is ops.mask else weight


@torch.no_grad()
def _fold(program: Program, node: fx.Node, convolution: fx.Node) -> None:
    values = [program.tensor(str(item.target)) if isinstance(item, fx.Node) else None for item in node.args[1:5]]
    gamma, beta, mean, variance = values
    assert mean is not None
    assert variance is not None
    factor = torch.rsqrt(variance + float(node.args[7]))  # type: ignore[arg-type]
    factor = factor * gamma if gamma is not None else factor
    weight_name = str(_weight_of(convolution).target)
    weight = program.tensor(weight_name)
    weight.mul_(factor.view(-1, *[1] * (weight.dim() - 1)).to(weight.dtype))
    shift = -mean * factor if beta is None else beta - mean * factor
    bias = convolution.args[2] if len(convolution.args) > 2 else None
    if isinstance(bias, fx.Node):
        tensor = program.tensor(str(bias.target))
        tensor.copy_(tensor * factor + shift)
    else:
        with program.graph.inserting_before(convolution):
            added = program.graph.create_node("get_attr", _add_bias(program, weight_name, shift.to(weight.dtype)))
        added.meta["val"] = shift.to("meta", weight.dtype)
        convolution.args = (*convolution.args[:2], added, *convolution.args[3:])


def _add_bias(program: Program, weight_name: str, value: torch.Tensor) -> str:
    """Register a bias as ``bias`` beside its weight, or as ``<weight>_bias`` where the module has one of that name."""
    module, _, leaf = weight_name.rpartition(".")
    owner = program.get_submodule(module)
    name = "bias" if leaf == "weight" and getattr(owner, "bias", None) is None else f"{leaf}_bias"
    owner.register_parameter(name, nn.Parameter(value))
    return f"{module}.{name}" if module else name


def _drop_counters(program: Program) -> None:
    """Remove counters of batches whose normalization is gone."""
    alive = {
        str(item.target).rpartition(".")[0]
        for node in program.calls(aten.batch_norm.default)
        for item in node.all_input_nodes
        if item.op == "get_attr" and item.target not in FLAGS
    }
    for node in program.calls(aten.add_.Tensor):
        counter = node.args[0]
        if not isinstance(counter, fx.Node) or not str(counter.target).endswith("num_batches_tracked"):
            continue
        if str(counter.target).rpartition(".")[0] not in alive:
            program.graph.erase_node(node)
