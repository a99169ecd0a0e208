"""dynamic-quant: weights once, activations by the range of each value; no data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import graphprune as gp
from graphprune.errors import PassError, RecipeError
from graphprune.ir import ops
from graphprune.ir.masking import masked_sites
from graphprune.ir.properties import Property
from graphprune.ir.quantizing import quantizers
from graphprune.passes import DynamicQuant
from graphprune.pipeline.recipe import Recipe
from graphprune.quant.affine import dequantize, dynamic_qparams, quantize_range
from tests.models import MODELS, example, mlp
from tests.traced import answer, assert_same, inputs_of, pair, run, run_passes, traced

Golden = Callable[[str, str], None]


def test_golden(golden: Golden) -> None:
    program = traced("mlp")
    golden("dynamic_quant_before", str(program))
    golden("dynamic_quant_after", str(run_passes(program, "dynamic-quant{exclude=[head]}")))


def test_it_is_annotating_inserting_and_freezing_in_one() -> None:
    (x,) = example("mlp") or ()
    one = run_passes(traced("mlp"), "dynamic-quant")
    three = run_passes(traced("mlp"), "annotate-quant{activations=dynamic},insert-fake-quant,freeze-quant")
    assert str(one) == str(three)
    assert torch.equal(answer(one, x), answer(three, x))
    assert Property.FROZEN in one.properties
    assert Property.OBSERVED not in one.properties


@pytest.mark.parametrize(
    "name",
    ["mlp", "residual", "attention", "gpt2_conv1d", "shared_weight", "grouped_conv", "tied_embedding", "bert_qa"],
)
def test_outputs_are_close_to_the_floats(name: str) -> None:
    model, program = pair(name)
    inputs = inputs_of(name, model)
    want = run(model, inputs)
    run_passes(program, "dynamic-quant")
    assert_same(want, run(program, inputs), 0.1)  # eight bits, a few layers


def test_a_linear_computes_as_the_reference_says() -> None:
    program, (x,) = run_passes(traced("mlp"), "dynamic-quant{select=[head]}"), example("mlp") or ()
    plain = traced("mlp")
    with torch.no_grad():
        hidden = torch.relu(torch.nn.functional.linear(x, plain.tensor("first.weight"), plain.tensor("first.bias")))
        hidden = torch.relu(
            torch.nn.functional.linear(hidden, plain.tensor("second.weight"), plain.tensor("second.bias"))
        )
        scale, zero_point = dynamic_qparams(hidden)
        shown = dequantize(quantize_range(hidden, scale, zero_point, qmin=0, qmax=255), scale, zero_point)
        want = torch.nn.functional.linear(shown, program.tensor("head.weight"), program.tensor("head.bias"))
    assert torch.equal(answer(program, x), want)


def test_activations_of_any_range_fit() -> None:
    program, (x,) = run_passes(traced("mlp"), "dynamic-quant"), example("mlp") or ()
    plain = traced("mlp")
    for factor in (1e-3, 1e4):
        want, have = answer(plain, factor * x), answer(program, factor * x)
        assert float((have - want).norm() / want.norm()) < 0.05
    assert bool(answer(program, torch.zeros(2, 16)).isfinite().all())


def test_gradients_pass_straight_through() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    ops.dynamic_fake_quantize(x, 0, 255).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(4, 3))


def test_a_value_of_several_readers_is_quantized_once() -> None:
    program = run_passes(traced("bert_qa"), "dynamic-quant")
    dynamic = list(program.calls(ops.dynamic_fake_quantize))
    assert len(dynamic) == len({node.args[0] for node in dynamic})
    assert max(len(node.users) for node in dynamic) == 3  # query, key and value


def test_masks_stay() -> None:
    masks = "insert-masks{pattern=4x1,schedule=one-shot,criterion=magnitude,sparsity=0.5}"
    program = run_passes(traced("mlp"), f"{masks},dynamic-quant")
    kept = {site.name: site.mask.clone() for site in masked_sites(program)}
    run_passes(program, "fold-masks")
    assert kept
    for name, mask in kept.items():
        assert not bool(program.tensor(name)[~mask].any())


def test_running_twice_is_refused() -> None:
    program = run_passes(traced("mlp"), "dynamic-quant")
    with pytest.raises(PassError, match="dynamic-quant cannot run on a Program that is fake-quant, planned"):
        run_passes(program, "dynamic-quant")
    with pytest.raises(PassError, match="dynamic-quant cannot run on a Program that is planned"):
        run_passes(traced("mlp"), "annotate-quant,dynamic-quant")


def test_a_rule_with_a_fixed_scale_is_refused() -> None:
    program = traced("mlp")
    text = str(program)
    with pytest.raises(PassError, match=r"head\.weight: a rule gives its activations a fixed scale"):
        DynamicQuant(rules=("name head: activations=uint8:affine:tensor",)).run(program)
    assert str(program) == text
    left = DynamicQuant(rules=("name head: off",)).run(program).coverage.left_out
    assert list(left) == ["head.weight"]


def test_bad_options() -> None:
    with pytest.raises(RecipeError, match="unknown quantization scheme"):
        DynamicQuant(weights="int7")
    with pytest.raises(RecipeError, match="matches no quantizable operator"):
        DynamicQuant(select=("nothing",)).run(traced("mlp"))


def test_save_and_load(tmp_path: Path) -> None:
    (x,) = example("mlp") or ()
    text = "dynamic-quant{weights=int4:symmetric:channel:group8}"
    program = gp.transform(MODELS["mlp"](), text, (x,), factory=f"{mlp.__module__}:mlp")
    gp.save(program, tmp_path / "saved")
    again = gp.load(tmp_path / "saved")
    assert str(again) == str(program)
    assert torch.equal(answer(again, x), answer(program, x))
    assert {decision.scheme for _, decision in quantizers(again)} == {"int4:symmetric:channel:group8"}


@given(
    weights=st.none() | st.sampled_from(["int8:symmetric:tensor", "int4:affine:channel:group32", "none"]),
    embeddings=st.none() | st.sampled_from(["none", "uint8:affine:tensor"]),
    reduce_range=st.none() | st.just(False),
    include_last=st.booleans(),
    rules=st.lists(st.just("op embedding: off")).map(tuple),
)
def test_text_reads_back(**options: object) -> None:
    step = DynamicQuant(**options)  # type: ignore[arg-type]
    assert Recipe.of(str(step)).passes == (step,)


@given(x=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20).map(torch.tensor))
def test_dynamic_quantization_keeps_zero_and_is_within_a_step(x: Tensor) -> None:
    shown = ops.dynamic_fake_quantize(x, 0, 255)
    assert not bool(shown[x == 0].any())
    step = float(x.clamp(min=0).max().double() - x.clamp(max=0).min().double()) / 255
    assert float((shown.double() - x.double()).abs().max()) <= step * 1.001 + 1e-30
