"""freeze-quant: fixed scales, no observers, weights on the integer grid."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import PassError
from graphprune.ir import ops
from graphprune.ir.masking import masked_sites
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.passes import FreezeQuant, InsertFakeQuant
from graphprune.pipeline.recipe import Recipe
from tests.models import example
from tests.traced import answer, run_passes, traced

Golden = Callable[[str, str], None]


def observed(name: str, text: str = "insert-fake-quant") -> Program:
    program = run_passes(traced(name), text)
    program.train()
    torch.manual_seed(0)  # dropout draws
    program(*(example(name) or ()))
    return program.eval()


def test_golden(golden: Golden) -> None:
    program = observed("mlp", "insert-fake-quant{select=[first]}")
    golden("freeze_quant_before", str(program))
    golden("freeze_quant_after", str(run_passes(program, "freeze-quant")))


@pytest.mark.parametrize("name", ["mlp", "residual", "gpt2_conv1d", "grouped_conv", "shared_weight"])
def test_outputs_are_those_of_the_observed_program(name: str) -> None:
    inputs = example(name) or ()
    program = observed(name)
    before = answer(program, *inputs)
    run_passes(program, "freeze-quant")
    torch.testing.assert_close(answer(program, *inputs), before, rtol=1e-5, atol=1e-5)
    assert Property.FROZEN in program.properties
    assert not list(program.calls(ops.observe))
    assert not [key for key in program.state_dict() if key.endswith(("_low", "_high"))]


def test_frozen_weights_are_multiples_of_their_scale() -> None:
    program = run_passes(observed("mlp"), "freeze-quant")
    weight, scale = program.tensor("first.weight").detach(), program.tensor("first.weight_scale")
    steps = weight / scale.view(-1, 1)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    shown = ops.fake_quantize(weight, scale, program.tensor("first.weight_zero_point"), -127, 127, 0)
    torch.testing.assert_close(shown, weight, rtol=0, atol=1e-7)


def test_running_twice_is_running_once() -> None:
    program = run_passes(observed("mlp"), "freeze-quant")
    text, weight = str(program), program.tensor("first.weight").clone()
    assert not FreezeQuant().run(program).changed
    assert str(program) == text
    assert torch.equal(program.tensor("first.weight"), weight)


@settings(max_examples=8, deadline=None)
@given(pattern=st.sampled_from(["unstructured", "4x1", "2:4", "3x5"]), folded=st.booleans())
def test_pruned_weights_stay_exactly_zero(pattern: str, folded: bool) -> None:
    masks = f"insert-masks{{pattern={pattern},ragged=pad,schedule=one-shot,criterion=magnitude,sparsity=0.4}}"
    program = observed("mlp", f"{masks},insert-fake-quant")
    kept = {site.name: site.mask.clone() for site in masked_sites(program)}
    run_passes(program, "fold-masks,freeze-quant" if folded else "freeze-quant,fold-masks")
    for name, mask in kept.items():
        assert not bool(program.tensor(name)[~mask].any())


def test_folding_before_or_after_is_the_same() -> None:
    masks = "insert-masks{schedule=one-shot,criterion=magnitude,sparsity=0.5}"
    first = observed("mlp", f"{masks},insert-fake-quant")
    second = observed("mlp", f"{masks},insert-fake-quant")
    (x,) = example("mlp") or ()
    run_passes(first, "fold-masks,freeze-quant")
    run_passes(second, "freeze-quant,fold-masks")
    assert torch.equal(answer(first, x), answer(second, x))
    assert str(first) == str(second)


def test_more_quantizers_after_freezing() -> None:
    program = run_passes(observed("mlp", "insert-fake-quant{select=[first]}"), "freeze-quant")
    frozen = program.tensor("first.weight").clone()
    run_passes(program, "insert-fake-quant{select=[second]}")
    assert Property.FROZEN not in program.properties
    program.train()
    program(*(example("mlp") or ()))
    result = FreezeQuant().run(program.eval())
    assert set(result.coverage.matched) == {"second.weight", "second.input"}
    assert torch.equal(program.tensor("first.weight"), frozen)


def test_scales_of_frozen_observers_stay_as_they_are() -> None:
    program, (x,) = observed("mlp"), example("mlp") or ()
    program.freeze("observers")
    with torch.no_grad():
        program.tensor("first.weight").mul_(1.1)
    scale, before = program.tensor("first.weight_scale").clone(), answer(program, x)
    run_passes(program, "freeze-quant")
    assert torch.equal(program.tensor("first.weight_scale"), scale)
    assert torch.equal(answer(program, x), before)


def test_weights_that_are_observed_only_are_not_rounded() -> None:
    program = observed("mlp", "insert-fake-quant{select=[first]}")
    weight = program.tensor("head.weight").detach().clone()
    run_passes(program, "annotate-quant{select=[head]},insert-observers,freeze-quant")
    assert torch.equal(program.tensor("head.weight"), weight)
    assert "head.weight_scale" not in program.state_dict()


def test_frozen_twice_is_refused_by_the_manager() -> None:
    program = run_passes(observed("mlp"), "freeze-quant")
    with pytest.raises(PassError, match="freeze-quant cannot run on a Program that is frozen"):
        run_passes(program, "freeze-quant")


def test_an_unobserved_activation_is_refused() -> None:
    program = run_passes(traced("mlp"), "insert-fake-quant")
    text = str(program)
    with pytest.raises(PassError, match=r"first\.input and 2 more saw no data; train a step or calibrate"):
        FreezeQuant().run(program)
    assert str(program) == text


def test_a_program_without_quantizers_is_refused_by_the_manager() -> None:
    with pytest.raises(PassError, match="freeze-quant requires fake-quant, which does not hold there"):
        run_passes(traced("mlp"), "freeze-quant")
    with pytest.raises(PassError, match=r"pipeline\[1\]\.insert-fake-quant establishes it; put it before freeze-quant"):
        run_passes(traced("mlp"), "freeze-quant,insert-fake-quant")


def test_nothing_to_freeze() -> None:
    program = traced("mlp")
    text = str(program)
    assert not FreezeQuant().run(program).changed
    assert str(program) == text


def test_text_reads_back() -> None:
    assert Recipe.of(str(FreezeQuant())).passes == (FreezeQuant(),)
    assert Recipe.of("insert-fake-quant,freeze-quant").passes == (InsertFakeQuant(), FreezeQuant())
