"""remove-dead: nodes that reach no output go away."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.ir import ops
from graphprune.ir.program import Program
from graphprune.passes import RemoveDead
from graphprune.pipeline.recipe import Recipe
from tests.models import example
from tests.traced import answer, run_passes, traced

Golden = Callable[[str, str], None]


def with_dead_nodes(count: int) -> Program:
    """A chain of ``count`` nodes that nothing uses."""
    program = traced("mlp")
    node = next(iter(program.graph.nodes))
    with program.graph.inserting_before(program.output):
        for _ in range(count):
            value = node.meta.get("val")
            node = program.graph.call_function(torch.ops.aten.relu.default, (node,))
            node.meta["val"] = value
    program.recompile()
    return program


def test_golden(golden: Golden) -> None:
    program = with_dead_nodes(2)
    golden("remove_dead_before", str(program))
    golden("remove_dead_after", str(run_passes(program, "remove-dead")))


def test_nothing_is_dead() -> None:
    program = traced("mlp")
    text = str(program)
    result = RemoveDead().run(program)
    assert not result.changed
    assert result.stats == {"nodes-removed": 0}
    assert str(program) == text


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 5))
def test_whole_chains_go_and_outputs_are_bitwise_equal(count: int) -> None:
    program = with_dead_nodes(count)
    (x,) = example("mlp") or ()
    before = answer(program, x)
    result = RemoveDead().run(program)
    assert result.changed is (count > 0)
    assert result.stats["nodes-removed"] == count
    program.recompile()
    assert torch.equal(answer(program, x), before)
    assert not RemoveDead().run(program).changed


def test_operators_that_change_a_buffer_stay() -> None:
    program = traced("conv_bn")
    assert not RemoveDead().run(program).changed
    program = run_passes(traced("mlp"), "insert-fake-quant")
    observers = len(list(program.calls(ops.observe)))
    assert not RemoveDead().run(program).changed
    assert len(list(program.calls(ops.observe))) == observers == 6


def test_parameters_stay_in_the_state_dict() -> None:
    program = traced("mlp")
    keys = set(program.state_dict())
    node = program.attribute("head.bias")
    assert node is not None
    (user,) = node.users
    user.args = user.args[:2]
    assert RemoveDead().run(program).stats["nodes-removed"] == 1
    assert program.attribute("head.bias") is None
    assert set(program.state_dict()) == keys


def test_text_reads_back() -> None:
    assert Recipe.of(str(RemoveDead())).passes == (RemoveDead(),)
