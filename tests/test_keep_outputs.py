"""keep-outputs: outputs that nobody wants are cut, with what only they need."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphprune.errors import PassError, TraceError
from graphprune.ir.program import Program
from graphprune.ir.trace import trace
from graphprune.passes import KeepOutputs
from graphprune.pipeline.recipe import Recipe
from tests.models import MODELS
from tests.traced import run_passes

Golden = Callable[[str, str], None]
IDS = torch.arange(10).view(2, 5)


@functools.cache
def _once() -> Program:
    return trace(MODELS["bert_qa"](), output_hidden_states=True, check=False)


def bert() -> Program:
    return copy.deepcopy(_once())


def outputs(program: Program) -> str:
    return str(program).splitlines()[-2]


def test_golden(golden: Golden) -> None:
    program = bert()
    before = outputs(program)
    run_passes(program, "keep-outputs{names=[start_logits,end_logits]}")
    golden("keep_outputs", f"{before}\n{outputs(program)}")


def test_running_twice_is_running_once() -> None:
    program = bert()
    assert KeepOutputs(("start_logits",)).run(program).changed
    text = str(program)
    assert not KeepOutputs(("start_logits",)).run(program).changed
    assert str(program) == text
    everything = bert()
    text = str(everything)
    assert not KeepOutputs(everything.interface.output_names).run(everything).changed
    assert str(everything) == text


@torch.no_grad()
def test_what_is_kept_is_bitwise_equal() -> None:
    program = bert()
    before = program(IDS)
    run_passes(program, "keep-outputs{names=[end_logits,hidden_states]}")
    after = program(IDS)
    assert torch.equal(after.end_logits, before.end_logits)
    assert after.start_logits is None
    assert all(torch.equal(a, b) for a, b in zip(after.hidden_states, before.hidden_states, strict=True))


def test_dead_nodes_go() -> None:
    program = bert()
    nodes = len(program.graph.nodes)
    result = KeepOutputs(("hidden_states_0",)).run(program)
    assert len(program.graph.nodes) < nodes / 4
    assert result.coverage.matched == ("hidden_states_0",)
    assert result.coverage.left_out["start_logits"] == "not in names"


def test_refusals() -> None:
    with pytest.raises(PassError, match="names is empty"):
        KeepOutputs()
    with pytest.raises(TraceError, match="unknown output 'start_logit'; did you mean 'start_logits'"):
        KeepOutputs(("start_logit",)).run(bert())


@given(st.lists(st.text(min_size=1), min_size=1, max_size=3).map(tuple))
def test_text_reads_back(names: tuple[str, ...]) -> None:
    step = KeepOutputs(names)
    assert Recipe.of(str(step)).passes == (step,)
