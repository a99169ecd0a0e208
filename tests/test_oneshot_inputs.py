"""Inputs of operators as matrices: times the logical weight they are the outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.ir.masking import masked_sites
from graphprune.ir.sites import OPERATORS
from graphprune.oneshot.batches import bind_batches
from graphprune.oneshot.inputs import geometry, input_rows
from graphprune.oneshot.plan import make_plan
from graphprune.sparsity.layout import to_logical
from tests.test_oneshot import data, masked


@pytest.mark.parametrize("name", ["conv_bn", "grouped_conv", "resnet", "vit"])
def test_conv_inputs_times_logical_weight_are_the_outputs(name: str) -> None:
    program = masked(name, "wanda", include_last="true")
    checked = 0

    class Checker(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> object:
            nonlocal checked
            result = super().run_node(node)
            operator = OPERATORS.get(node.target)
            if operator is not None and operator.name.startswith("conv"):
                x, weight = self.env[node.args[0]], self.env[node.args[1]]
                rows = input_rows(x, geometry(node, operator, tuple(weight.shape)))
                logical = to_logical(weight, operator.layout)
                made = rows @ logical.unflatten(0, (len(rows), -1)).mT  # [groups, tokens, out/groups]
                bias = node.args[2] if len(node.args) > 2 else None
                bare = result if bias is None else result - self.env[bias].view(-1, *[1] * (result.dim() - 2))
                torch.testing.assert_close(
                    made.permute(1, 0, 2).flatten(1), bare.movedim(1, -1).flatten(0, -2), rtol=1e-4, atol=1e-5
                )
                checked += 1
            return result

    program.eval()
    with torch.no_grad():
        Checker(program).run(*bind_batches(program, data(name)[:1], [])[0].values())
    assert checked > 0


@pytest.mark.parametrize("padding", ["same", "valid", 2])
@pytest.mark.parametrize("kernel", [2, 3])
def test_every_padding(padding: str | int, kernel: int) -> None:
    conv = nn.Conv1d(4, 6, kernel, padding=padding, dilation=2, groups=2)
    program = gp.transform(
        conv,
        "insert-masks{pattern=1:2,sparsity=0.5,criterion=wanda,schedule=one-shot,scope=local,include_last=true}",
        (torch.randn(3, 4, 12),),
    )
    (site,) = masked_sites(program)
    plan = make_plan(program, [site], ["input"])
    (use,) = plan.stops[0].uses
    x = torch.randn(3, 4, 12)
    rows = input_rows(x, use.shape)
    made = rows @ to_logical(conv.weight.detach(), site.decision.layout).unflatten(0, (2, -1)).mT
    expected = (conv(x) - conv.bias.view(-1, 1)).movedim(1, -1).flatten(0, 1).detach()
    torch.testing.assert_close(made.permute(1, 0, 2).flatten(1), expected)
