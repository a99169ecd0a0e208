"""insert-observers: ranges are recorded, and no value changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import PassError
from graphprune.ir import ops
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.quantizing import observers, unseen
from graphprune.passes import InsertObservers
from graphprune.pipeline.recipe import Recipe
from tests.models import PLAIN, example
from tests.traced import answer, run_passes, traced

Golden = Callable[[str, str], None]
PLAN = "annotate-quant{outputs=true}"


def prefixes(program: Program) -> list[str]:
    return [decision.prefix for _, decision in observers(program)]


def test_golden(golden: Golden) -> None:
    text = "annotate-quant{select=[first],observer=percentile},annotate-quant{select=[second],activations=dynamic}"
    program = run_passes(traced("mlp"), text)
    golden("insert_observers_before", str(program))
    golden("insert_observers_after", str(run_passes(program, "insert-observers")))


@pytest.mark.parametrize("name", PLAIN)
def test_outputs_are_bitwise_equal_and_need_no_data(name: str) -> None:
    program, inputs = traced(name), example(name) or ()
    pipeline = "annotate-quant{activations=none}" if name == "tied_embedding" else PLAN
    before = answer(program, *inputs)
    run_passes(program, f"{pipeline},insert-observers")
    assert Property.OBSERVED in program.properties
    assert prefixes(program)
    assert torch.equal(answer(program, *inputs), before)  # nothing was observed yet, and nothing asks for it
    program.train()
    program(*inputs)
    assert torch.equal(answer(program, *inputs), before) or name == "conv_bn"  # batch statistics moved on


def test_running_twice_is_running_once() -> None:
    program = run_passes(traced("mlp"), f"{PLAN},insert-observers")
    text = str(program)
    again = InsertObservers().run(program)
    assert not again.changed
    assert again.stats == {"observers": 0}
    assert str(program) == text


def test_nothing_is_observed_where_ranges_are_taken_at_run_time() -> None:
    program = run_passes(traced("mlp"), "annotate-quant{activations=dynamic}")
    result = InsertObservers().run(program)
    assert prefixes(program) == ["first.weight", "second.weight", "head.weight"]
    assert set(result.coverage.left_out.values()) == {"its range is taken from each value when it is computed"}


def test_train_mode_observes_and_eval_mode_does_not() -> None:
    program, (x,) = run_passes(traced("mlp"), f"{PLAN},insert-observers"), example("mlp") or ()
    answer(program, x)
    assert unseen(program) == ["first.input", "second.input", "head.input"]
    program.train()
    program(x)
    assert unseen(program) == []
    assert float(program.tensor("first.input_low")) == float(x.min())
    assert float(program.tensor("first.input_high")) == float(x.max())
    answer(program, 100 * x)
    assert float(program.tensor("first.input_high")) == float(x.max())


def test_weights_are_known_without_data() -> None:
    program = run_passes(traced("mlp"), f"{PLAN},insert-observers")
    weight = program.tensor("first.weight").detach()
    assert torch.equal(program.tensor("first.weight_low"), weight.amin(1))
    assert torch.equal(program.tensor("first.weight_scale"), weight.abs().amax(1) / 127)


def test_only_observers_with_a_histogram_have_one() -> None:
    program = run_passes(traced("mlp"), 'annotate-quant{rules=["name head: observer=mse(bins=64)"]},insert-observers')
    assert program.tensor("head.input_histogram").shape == (64,)
    assert "first.input_histogram" not in program.state_dict()
    flags = {str(node.args[10]): str(node.args[6]) for node in program.calls(ops.observe)}
    assert flags["head.input"] == "calibrating"
    assert flags["first.input"] == "observing"


def test_a_value_has_one_observer_a_scheme() -> None:
    program = run_passes(traced("attention"), f"{PLAN},insert-observers")
    values = [(node.args[0], decision.scheme) for node, decision in observers(program)]
    assert len(values) == len(set(values))


def test_the_manager_refuses_it_without_a_plan() -> None:
    with pytest.raises(PassError, match="insert-observers requires planned"):
        run_passes(traced("mlp"), "insert-observers")
    with pytest.raises(PassError, match="cannot run on a Program that is partitioned"):
        run_passes(traced("bert_qa"), "annotate-quant,partition-blocks,insert-observers")


def test_infinite_weights_are_named() -> None:
    program = run_passes(traced("mlp"), PLAN)
    with torch.no_grad():
        program.tensor("second.weight")[0, 0] = float("nan")
    with pytest.raises(PassError, match=r"second\.weight: observer min-max: the tensor holds NaN or infinity"):
        InsertObservers().run(program)


@settings(max_examples=15)
@given(
    rules=st.lists(st.sampled_from(["name first: off", "name second: weights=none", "op linear: observer=mse"])),
    scheme=st.sampled_from(["int8:symmetric:tensor", "int4:symmetric:channel:group8", "int8:affine:channel", "none"]),
)
def test_buffers_fit_their_schemes(rules: list[str], scheme: str) -> None:
    listed = ",".join(f'"{rule}"' for rule in rules)
    program = run_passes(traced("mlp"), f"annotate-quant{{weights={scheme},rules=[{listed}]}},insert-observers")
    state = program.state_dict()
    for node, decision in observers(program):
        shape = tuple(node.args[0].meta["val"].shape)  # type: ignore[union-attr]
        for kind in ("low", "high", "scale", "zero_point"):
            assert state[f"{decision.prefix}_{kind}"].dim() == (
                0 if not decision.weight else len(state[f"{decision.prefix}_low"].shape)
            )
        if decision.weight:
            assert state[f"{decision.prefix}_scale"].numel() in (1, shape[0], shape[0] * shape[1] // 8)


def test_text_reads_back() -> None:
    assert Recipe.of(str(InsertObservers())).passes == (InsertObservers(),)
