"""annotate-quant: what is quantized and how, decided without changing an operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphprune.errors import PassError, RecipeError
from graphprune.ir.properties import Property
from graphprune.ir.quant_plan import planned
from graphprune.ir.trace import trace
from graphprune.passes import AnnotateQuant
from graphprune.pipeline.recipe import Recipe
from graphprune.quant.presets import PRESETS
from tests.models import example
from tests.planned import left_out, plans, residuals
from tests.traced import answer, run_passes, traced

Golden = Callable[[str, str], None]
WEIGHT, INPUT = "int8:symmetric:channel", "uint8:affine:tensor"


def test_golden(golden: Golden) -> None:
    golden("annotate_quant_mlp", str(run_passes(traced("mlp"), "annotate-quant{exclude=[head]}")))


def test_no_operator_and_no_number_changes() -> None:
    program = traced("mlp")
    nodes, (x,) = [node.format_node() for node in program.graph.nodes], example("mlp") or ()
    before = answer(program, x)
    run_passes(program, "annotate-quant")
    assert [node.format_node() for node in program.graph.nodes] == nodes
    assert torch.equal(answer(program, x), before)
    assert Property.PLANNED in program.properties


def test_running_twice_is_running_once() -> None:
    program = run_passes(traced("mlp"), "annotate-quant")
    text = str(program)
    again = AnnotateQuant().run(program)
    assert not again.changed
    assert again.stats == {"operators": 0, "operands": 0}
    assert set(again.coverage.left_out.values()) == {"annotated already"}
    assert str(program) == text


def test_nothing_is_left_to_quantize() -> None:
    program = traced("mlp")
    text = str(program)
    with pytest.raises(RecipeError, match="nothing is left to quantize: excluded by name"):
        AnnotateQuant(exclude=("*",)).run(program)
    with pytest.raises(RecipeError, match="neither weights nor activations of it are to be quantized"):
        AnnotateQuant(weights="none", activations="none").run(program)
    assert str(program) == text
    relu = trace(nn.ReLU(), torch.randn(2, 3))
    with pytest.raises(RecipeError, match="the model has no operator that can be quantized"):
        AnnotateQuant().run(relu)


# -- presets and options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_what_is_quantized(name: str) -> None:
    preset = PRESETS[name]
    found = plans(residuals(), f"annotate-quant{{preset={name}}}")
    result = f";result@{preset.activations}" if preset.outputs else ""
    assert found["first.weight"] == f"0@{preset.activations};1@{preset.weights}{result}"
    assert found["head.weight"] == f"0@{preset.activations};1@{preset.weights}"
    sums = {text for key, text in found.items() if key.startswith("add")}
    assert sums == ({f"0@{preset.activations};1@{preset.activations}{result}"} if "add" in preset.operators else set())
    tables = plans(traced("bert_qa"), f"annotate-quant{{preset={name}}}")
    table = tables.get("bert.embeddings.word_embeddings.weight")
    assert table == (None if preset.embeddings is None else f"0@{preset.embeddings}")


def test_an_unknown_preset() -> None:
    with pytest.raises(RecipeError, match="unknown quantization preset 'tensorr'; did you mean 'tensorrt'"):
        AnnotateQuant(preset="tensorr")


def test_options_replace_parts_of_the_preset() -> None:
    text = "annotate-quant{weights=int8:symmetric:tensor,activations=int8:symmetric:tensor}"
    assert plans(traced("mlp"), text)["first.weight"] == "0@int8:symmetric:tensor;1@int8:symmetric:tensor"
    assert plans(traced("mlp"), "annotate-quant{activations=none}")["first.weight"] == f"1@{WEIGHT}"
    assert plans(traced("mlp"), "annotate-quant{weights=none}")["first.weight"] == f"0@{INPUT}"
    dynamic = plans(traced("mlp"), "annotate-quant{activations=dynamic}")
    assert dynamic["first.weight"] == f"0@uint8:dynamic;1@{WEIGHT}"


def test_outputs_and_embeddings() -> None:
    assert "result" not in plans(residuals(), "annotate-quant{outputs=false}")["first.weight"]
    assert "result" in plans(residuals(), "annotate-quant{preset=ipex,outputs=true}")["first.weight"]
    embedding = plans(traced("tied_embedding"), "annotate-quant{preset=tensorrt,embeddings=int8:symmetric:channel}")
    assert embedding["embedding.weight"] == f"0@{WEIGHT}"
    assert "embedding.weight" in left_out(traced("tied_embedding"), embeddings="none", exclude=("feed",))


def test_only_sums_that_a_convolution_ends_in() -> None:
    found = plans(residuals())
    assert sum(name.startswith("add") for name in found) == 1
    assert not [name for name in plans(traced("residual")) if "add" in name]


def test_weights_stored_the_other_way_have_channels_along_the_other_axis() -> None:
    found = plans(traced("gpt2_conv1d"))
    assert found["up.weight"] == f"1@{INPUT};2@int8:symmetric:axis1"
    assert found["head.weight"] == f"0@{INPUT};1@{WEIGHT}"


def test_the_last_layer_can_be_left() -> None:
    assert left_out(traced("mlp"), include_last=False) == {
        "head.weight": "last layer before the output; set include_last to take it"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int9:symmetric:channel"}, "unknown quantization scheme"),
        ({"weights": "dynamic"}, "weights: 'dynamic' is for activations"),
        ({"embeddings": "dynamic"}, "embeddings: 'dynamic' is for activations"),
        ({"activations": "int8:symmetric:channel"}, "activations: .*write int8:symmetric:tensor"),
        ({"weights": "int4:symmetric:channel:group31"}, "not an even number"),
        ({"weights": "int4:symmetric:channel", "reduce_range": True}, "int4 cannot be reduced"),
        ({"observer": "minmax"}, "unknown observer 'minmax'; did you mean 'min-max'"),
        ({"weight_observer": "mse(grid=0)"}, r"grid=0 is not in \[1, 1000\]"),
    ],
)
def test_options_are_read_when_the_pass_is_made(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        AnnotateQuant(**options)  # type: ignore[arg-type]


# -- what cannot be had -----------------------------------------------------------------------------------------------


def test_a_group_that_does_not_divide() -> None:
    group = "int4:symmetric:channel:group32"
    left = left_out(traced("mlp"), weights=group)
    assert left == {"first.weight": "its 16 input features are not a multiple of the group of 32"}
    with pytest.raises(PassError, match=r"first\.weight cannot be quantized as asked: its 16 input features"):
        AnnotateQuant(weights=group, select=("first.weight",)).run(traced("mlp"))
    left = left_out(traced("gpt2_conv1d"), weights=group)
    assert left["up.weight"] == "its 16 input features are not a multiple of the group of 32"
    assert "down.weight" not in left


def test_a_scheme_that_a_weight_cannot_have() -> None:
    left = left_out(residuals(), weights="int4:symmetric:channel:group2", activations="none")
    assert left["first.weight"] == "scales per group of 2 are for matrices, not for a weight of 4 dimensions"
    left = left_out(residuals(), weights="int8:symmetric:axis2", activations="none")
    assert left["head.weight"] == "its weight of shape (4, 4) has no dimension 2 for the scheme int8:symmetric:axis2"


def test_a_convolution_before_batch_norm_waits_for_folding() -> None:
    left = left_out(traced("conv_bn"))
    assert left["conv1.weight"] == "followed by batch normalization; run fold-conv-bn first"
    folded = plans(traced("conv_bn"), "fold-conv-bn,annotate-quant")
    assert set(folded) == {"conv1.weight", "conv2.weight", "head.weight"}


def test_attention_in_one_operator_is_named() -> None:
    left = left_out(traced("attention"), preset="deepsparse")
    (name,) = (name for name in left if "scaled_dot_product" in name)
    assert left[name].endswith("run expand-attention first")
    left = left_out(traced("attention"))
    assert left[name] == "matmul operators are off; a rule such as 'op matmul: on' takes them"
    with pytest.raises(PassError, match="cannot be quantized as asked: attention is one operator"):
        AnnotateQuant(select=(name,), ops=("matmul",)).run(traced("attention"))


def test_gates_and_casts_are_left() -> None:
    program = run_passes(traced("mlp"), "insert-masks{criterion=l0,sparsity=0.5,select=[first]}")
    assert "trainable gate" in left_out(program)["first.weight"]
    cast = run_passes(traced("mlp"), "cast-mixed{select=[first]}")
    assert left_out(cast)["first.weight"] == "its weight is cast to another dtype; quantize before cast-mixed"


def test_dynamic_sums_are_left() -> None:
    left = left_out(residuals(), activations="dynamic")
    assert list(left.values()) == ["sums are quantized with fixed scales only"]


# -- asked for twice, tied weights ------------------------------------------------------------------------------------


def test_asked_for_twice_in_two_ways() -> None:
    program = run_passes(traced("mlp"), "annotate-quant{select=[first,second],weights=int8:symmetric:tensor}")
    text = str(program)
    with pytest.raises(PassError, match=r"first\.weight, second\.weight: asked for twice, in two ways"):
        AnnotateQuant().run(program)
    assert str(program) == text
    AnnotateQuant(select=("head",)).run(program)
    assert len(list(planned(program))) == 3


def test_tied_weights_have_one_scheme() -> None:
    rules = 'rules=["op linear: weights=int8:symmetric:tensor"]'
    found = plans(traced("tied_embedding"), f"annotate-quant{{{rules}}}")
    assert found == {
        "embedding.weight": f"0@{WEIGHT}",
        "feed.weight": f"0@{INPUT};1@int8:symmetric:tensor",
        "embedding.weight:2": f"0@{INPUT};1@{WEIGHT}",
    }
    assert len(set(plans(traced("shared_weight")).values())) == 1


def test_a_tied_weight_asked_for_twice() -> None:
    program = run_passes(traced("tied_embedding"), "annotate-quant{ops=[embedding]}")
    with pytest.raises(PassError, match=r"embedding\.weight: asked for twice"):
        AnnotateQuant(ops=("linear",), weights="int8:symmetric:tensor").run(program)
    assert AnnotateQuant(ops=("linear",)).run(program).changed


# -- what depends on the machine --------------------------------------------------------------------------------------


def test_reduced_range() -> None:
    reduced = f"{WEIGHT}:reduced"
    assert plans(traced("mlp"), "annotate-quant{reduce_range=true}")["head.weight"] == f"0@{INPUT};1@{reduced}"
    for text in ("preset=tensorrt", "weights=int8:symmetric:channel"):
        found = plans(traced("mlp"), f"annotate-quant{{{text},reduce_range=true}}")
        assert found["head.weight"].endswith(":reduced")
    table = plans(traced("tied_embedding"), "annotate-quant{reduce_range=true,exclude=[feed]}")["embedding.weight"]
    assert table == f"0@{WEIGHT}"


def test_the_history_says_what_was_taken_from_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"})
    program = run_passes(traced("mlp"), "annotate-quant")
    assert program.history == ("annotate-quant{reduce_range=true}",)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx512_vnni": True})
    again = run_passes(traced("mlp"), program.history[0])
    assert str(again) == str(program)
    for step in (AnnotateQuant(preset="tensorrt"), AnnotateQuant(weights="int4:symmetric:channel")):
        assert step.recorded() == step


# -- properties -------------------------------------------------------------------------------------------------------

words = st.lists(st.text(min_size=1, max_size=8), max_size=2).map(tuple)
schemes = st.sampled_from(["int8:symmetric:channel", "int8:symmetric:tensor", "int4:symmetric:channel:group32", "none"])


@given(
    preset=st.sampled_from(sorted(PRESETS)),
    weights=st.none() | schemes,
    activations=st.none() | st.sampled_from(["dynamic", "none", "int8:symmetric:tensor"]),
    embeddings=st.none() | schemes,
    observer=st.none() | st.sampled_from(["min-max", "percentile(fraction=0.999)"]),
    outputs=st.none() | st.booleans(),
    select=words,
    exclude=words,
    include_last=st.booleans(),
    rules=st.lists(st.sampled_from(["op add: off", "name re:a{1,2}: weights=none observer=mse(grid=9)"])).map(tuple),
)
def test_text_reads_back(**options: object) -> None:
    step = AnnotateQuant(**options)  # type: ignore[arg-type]
    assert Recipe.of(str(step)).passes == (step,)


@given(
    select=st.sets(st.sampled_from(["second", "head"])),
    rules=st.lists(st.sampled_from(["name second: off", "op linear: weights=none", "name head: activations=none"])),
)
def test_every_operator_is_planned_or_left_out_with_a_reason(select: set[str], rules: list[str]) -> None:
    program = traced("mlp")
    result = AnnotateQuant(select=("first", *sorted(select)), rules=tuple(rules)).run(program)
    names = {plan.name for _, plan in planned(program)}
    assert names == set(result.coverage.matched)
    assert names | set(result.coverage.left_out) == {"first.weight", "second.weight", "head.weight"}
    assert not names & set(result.coverage.left_out)
