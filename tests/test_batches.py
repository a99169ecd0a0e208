"""Calibration batches: what a Program takes, and looking at values while they run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

import graphprune as gp
from graphprune.ir.batches import bind_batch, each_batch, run_batch
from graphprune.ir.trace import trace
from graphprune.ir.watching import watch
from tests.models import MODELS
from tests.traced import assert_same, inputs_of, pair, run, run_passes, tensors, traced


def test_batches_of_all_kinds() -> None:
    program = traced("mlp")
    x = torch.randn(4, 16)
    want = program(x)
    for batch in (x, (x,), [x], {"x": x}):
        assert torch.equal(run_batch(program, batch), want)


def test_left_out_inputs_are_filled_in() -> None:
    model, program = pair("bert_qa")
    inputs = inputs_of("bert_qa", model)
    bound = bind_batch(program, {"input_ids": inputs["input_ids"]})
    assert list(bound) == ["input_ids", "attention_mask", "token_type_ids"]
    assert_same(run(model, inputs), run_batch(program, {"input_ids": inputs["input_ids"]}))


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        ("text", gp.PassError, "batch 3 is a str; give a mapping"),
        (7, gp.PassError, "batch 3 is a int; give a mapping"),
        ({"y": torch.zeros(2, 16)}, gp.TraceError, "batch 3: unknown input 'y'"),
        ({0: torch.zeros(2, 16)}, gp.TraceError, "batch 3: unknown input '0'"),
        ({}, gp.TraceError, "batch 3: input 'x' is missing"),
        (torch.zeros(2, 5), gp.TraceError, "batch 3: input 'x' has size 5 in dimension 1"),
        (torch.zeros(16), gp.TraceError, "batch 3: input 'x' has 1 dimensions"),
        ((torch.zeros(2, 16), torch.zeros(2)), gp.TraceError, "batch 3: 2 positional arguments given"),
        (torch.zeros(0, 16), gp.PassError, r"batch 3: input 'x' of shape \(0, 16\) has no entries"),
        (torch.full((2, 16), float("nan")), gp.PassError, "batch 3: input 'x' has NaN"),
        ("no tensor", gp.PassError, "batch 3"),
    ],
)
def test_refused_batches(batch: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        run_batch(traced("mlp"), batch, 3)


def test_refused_data() -> None:
    with pytest.raises(gp.PassError, match="got no batches"):
        list(each_batch(iter(())))
    for single in (torch.zeros(2, 16), {"x": torch.zeros(2, 16)}):
        with pytest.raises(gp.PassError, match=r"one batch and not several; give a list: \[batch\]"):
            list(each_batch(single))


def test_a_progress_bar_does_not_change_the_batches() -> None:
    assert list(each_batch([3, 4], "looking")) == [(0, 3), (1, 4)]


@pytest.mark.parametrize("name", [*MODELS])
def test_watched_outputs_are_those_of_a_call(name: str) -> None:
    model, program = pair(name)
    inputs = inputs_of(name, model)
    program.train()
    seen: dict[fx.Node, Tensor] = {}
    state = copy.deepcopy(program.state_dict())
    outputs = [node for node in program.output.args[0] if isinstance(node, fx.Node)]  # type: ignore[union-attr]
    assert watch(program, outputs, [inputs], lambda node, value: seen.update({node: value.clone()})) == 1
    assert program.training
    assert all(torch.equal(value, state[key]) for key, value in program.state_dict().items())
    want = tensors(run(program.eval(), inputs))
    have = [seen[node] for node in outputs if node in seen]
    assert len(have) == len(want)
    assert all(torch.equal(first, second) for first, second in zip(have, want, strict=True))


def test_every_batch_is_shown_in_the_order_of_the_graph() -> None:
    program = traced("mlp")
    relus = list(program.calls(torch.ops.aten.relu.default))
    seen: list[tuple[str, int]] = []
    batches = [torch.randn(2, 16), torch.randn(3, 16)]
    assert watch(program, set(relus), batches, lambda node, value: seen.append((node.name, len(value)))) == 2
    assert seen == [(node.name, size) for size in (2, 3) for node in relus]


class InPlace(nn.Module):
    """An activation that is changed in place and read again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.clamp_(min=0.0)
        return self.second(y) + y


def test_changes_in_place_are_carried_out() -> None:
    x = torch.randn(3, 4)
    model = InPlace().eval()
    program = trace(model, x)
    (output,) = program.output.args[0]  # type: ignore[misc]
    seen: list[Tensor] = []
    watch(program, [output], [x], lambda node, value: seen.append(value))
    with torch.no_grad():
        assert torch.equal(seen[0], model(x))


def test_what_needs_labels_is_not_run_without_them() -> None:
    model, program = pair("bert_sequence", labels=True)
    inputs = inputs_of("bert_sequence", model)
    linear = list(program.calls(torch.ops.aten.linear.default))
    seen: list[fx.Node] = []
    watch(program, linear, [inputs], lambda node, value: seen.append(node))
    assert seen == linear
    loss = program.output.args[0][0]  # type: ignore[index]
    with pytest.raises(gp.TraceError, match="batch 0: input 'labels' is missing"):
        watch(program, [loss], [inputs], lambda node, value: None)


def test_watching_refuses_blocks_and_what_is_no_tensor() -> None:
    program = traced("gpt2")
    sizes = list(program.calls(torch.ops.aten.sym_size.int))[:1]
    ids = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(gp.PassError, match="its value is a int, not a tensor"):
        watch(program, sizes, [ids], lambda node, value: None)
    program = run_passes(traced("gpt2"), "partition-blocks")
    with pytest.raises(gp.PassError, match="run inline-blocks first"):
        watch(program, [], [ids], lambda node, value: None)
