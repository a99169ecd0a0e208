"""Rewrite rules: matches, near misses, and rewriting on a small graph."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import graphprune as gp
from graphprune.ir.program import Program
from graphprune.ir.rewrite import Call, Match, RewriteRule, apply_rule, find

aten = torch.ops.aten


class Net(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(torch.relu(x + 1)), torch.relu(torch.tanh(x))


class OneRelu(RewriteRule):
    """Before: ``relu(relu(x))``.  After: ``relu(x)``."""

    subgraph = Call("outer", (aten.relu.default,), {0: Call("inner", (aten.relu.default,))})

    def check(self, program: Program, match: Match) -> str | None:
        return "used elsewhere" if len(match["inner"].users) > 1 else None

    def rewrite(self, program: Program, match: Match) -> fx.Node:
        return match["inner"]


def test_rewrites_what_matches_and_says_why_not_elsewhere() -> None:
    program = gp.trace(Net(), torch.randn(4, 3))
    x = torch.randn(5, 3)
    before = program(x)
    applied = apply_rule(program, OneRelu())
    assert len(applied.rewritten) == 1
    assert sorted(applied.left_out.values()) == ["aten.add.Tensor is no inner", "aten.tanh.default is no inner"]
    assert sum(1 for _ in program.calls(aten.relu.default)) == 2
    assert all(torch.equal(one, other) for one, other in zip(before, program(x), strict=True))
    assert apply_rule(program, OneRelu()).rewritten == ()


def test_a_checked_match_is_left_alone() -> None:
    program = gp.trace(Net(), torch.randn(4, 3))

    class Never(OneRelu):
        def check(self, program: Program, match: Match) -> str | None:
            return "not today"

    text = str(program)
    assert "not today" in apply_rule(program, Never()).left_out.values()
    assert str(program) == text


def test_find_names_what_is_missing() -> None:
    program = gp.trace(Net(), torch.randn(4, 3))
    tanh = next(program.calls(aten.tanh.default))
    assert find(tanh, OneRelu.subgraph) == "aten.tanh.default is no outer"
