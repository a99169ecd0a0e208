"""remove-quant: no quantizers, weights on their grid, float activations."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from graphprune.errors import PassError
from graphprune.ir import ops
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.quantizing import Dequantized
from graphprune.passes import RemoveQuant
from graphprune.pipeline.recipe import Recipe
from tests.models import example
from tests.traced import answer, run_passes, traced

Golden = Callable[[str, str], None]


def frozen(name: str, text: str = "insert-fake-quant") -> Program:
    program = run_passes(traced(name), text)
    if Property.FROZEN in program.properties:
        return program
    program.train()
    program(*(example(name) or ()))
    return run_passes(program.eval(), "freeze-quant")


def record(program: Program, name: str) -> Dequantized | None:
    node = program.attribute(name)
    return None if node is None else program.annotation(node, Dequantized)


def test_golden(golden: Golden) -> None:
    program = frozen("mlp", "insert-fake-quant{select=[first]}")
    golden("remove_quant_before", str(program))
    golden("remove_quant_after", str(run_passes(program, "remove-quant")))


@pytest.mark.parametrize("text", ["insert-fake-quant", "dynamic-quant"])
@pytest.mark.parametrize("name", ["mlp", "conv_bn", "gpt2_conv1d", "tied_embedding"])
def test_only_activations_change(name: str, text: str) -> None:
    program = frozen(name, text)
    weights = {key: value.clone() for key, value in program.named_parameters()}
    by_hand = copy.deepcopy(program)  # weights quantized, activations not
    for node in by_hand.calls(ops.fake_quantize, ops.dynamic_fake_quantize):
        if node.args[0].op != "get_attr":  # type: ignore[union-attr]
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            by_hand.graph.erase_node(node)
    by_hand.recompile()
    inputs = example(name) or ()
    expected = answer(by_hand, *inputs)
    run_passes(program, "remove-quant")
    torch.testing.assert_close(answer(program, *inputs), expected, rtol=1e-6, atol=1e-6)
    assert not list(program.calls(ops.fake_quantize, ops.dynamic_fake_quantize))
    assert not program.properties & (Property.FAKE_QUANT | Property.FROZEN)
    assert all(torch.equal(value, weights[key]) for key, value in program.named_parameters())
    assert not [key for key in program.state_dict() if key.endswith(("_scale", "_zero_point"))]


def test_weights_remember_their_scheme() -> None:
    program = run_passes(frozen("mlp", "insert-fake-quant{select=[first]}"), "remove-quant")
    assert record(program, "first.weight") == Dequantized("int8:symmetric:channel", True)
    assert record(program, "second.weight") is None
    small = "annotate-quant{weights=int4:symmetric:channel:group16,activations=none},insert-fake-quant"
    program = run_passes(frozen("mlp", small), "remove-quant")
    assert record(program, "first.weight") == Dequantized("int4:symmetric:channel:group16", False)


def test_nothing_to_do_twice() -> None:
    program = run_passes(frozen("mlp"), "remove-quant")
    text = str(program)
    result = RemoveQuant().run(program)
    assert not result.changed
    assert result.stats == {"weights": 0, "activations": 0}
    assert str(program) == text


def test_unfrozen_quantizers_are_refused() -> None:
    with pytest.raises(PassError, match="requires frozen"):
        run_passes(traced("mlp"), "insert-fake-quant,remove-quant")


def test_text_reads_back() -> None:
    assert Recipe.of(str(RemoveQuant())).passes == (RemoveQuant(),)
