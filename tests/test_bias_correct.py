"""bias-correct: the means of outputs after weights were rounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphprune.errors import PassError
from graphprune.ir.program import Program
from graphprune.ir.trace import trace
from graphprune.passes import BiasCorrect
from graphprune.pipeline.manager import PassManager
from graphprune.pipeline.recipe import Recipe
from tests.models import example
from tests.traced import run_passes, traced

Golden = Callable[[str, str], None]
COARSE = 'annotate-quant{weights="int4:symmetric:channel",activations="uint8:affine:tensor"},insert-observers'
BATCHES = [torch.randn(64, 16, generator=torch.Generator().manual_seed(seed)) + 1.0 for seed in range(3)]


def prepared(program: Program, batches: list[Tensor], *text: str) -> Program:
    """Calibrated and quantized, with four-bit weights, whose rounding moves means."""
    recipe = Recipe.of([COARSE, "calibrate{progress=false}", "insert-fake-quant", *text])
    return PassManager(recipe.passes, data=batches).run(program, in_place=True).program


def first_means(program: Program, node_target: object, inputs: list[Tensor]) -> Tensor:
    """Mean over the data of each channel of the first operator of a kind."""
    node = next(iter(program.calls(node_target)))
    seen: list[Tensor] = []

    class Keep(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            if n is node:
                seen.append(result)
            return result

    with torch.no_grad():
        for batch in inputs:
            Keep(program.eval()).run(batch)
    channel = 1 if seen[0].dim() > 2 else -1
    return torch.cat([item.movedim(channel, -1).reshape(-1, item.shape[channel]) for item in seen]).mean(0)


def test_golden(golden: Golden) -> None:
    golden("bias_correct_after", str(prepared(traced("mlp"), BATCHES, "bias-correct{progress=false}")))


def test_the_mean_of_each_output_is_that_of_the_float_weight() -> None:
    plain, corrected = (prepared(traced("mlp"), BATCHES, *text) for text in ((), ("bias-correct{progress=false}",)))
    want = first_means(traced("mlp"), torch.ops.aten.linear.default, BATCHES)
    before = first_means(plain, torch.ops.aten.linear.default, BATCHES)
    after = first_means(corrected, torch.ops.aten.linear.default, BATCHES)
    assert float((after - want).abs().max()) < 0.1 * float((before - want).abs().max())


@pytest.mark.parametrize("name", ["mlp", "gpt2_conv1d", "grouped_conv", "conv_bn"])
def test_corrections_are_the_formula(name: str) -> None:
    program = traced(name)
    if name == "conv_bn":
        program = run_passes(program, "fold-conv-bn")
    (inputs,) = example(name) or ()
    before = {key: value.detach().clone() for key, value in program.named_parameters() if key.endswith("bias")}
    result = PassManager(
        Recipe.of([COARSE, "calibrate{progress=false}", "insert-fake-quant", "bias-correct{progress=false}"]).passes,
        data=[inputs],
    ).run(program, in_place=True)
    stats = result.results[-1].stats
    assert stats["biases-corrected"] == len(result.results[-1].coverage.matched) > 0
    changes = [
        float((value.detach() - before[key]).abs().max())
        for key, value in result.program.named_parameters()
        if key in before
    ]
    assert max(changes) == pytest.approx(stats["largest-correction"], rel=1e-3)
    assert stats["largest-correction"] > 0


def test_running_twice_corrects_once() -> None:
    program = prepared(traced("mlp"), BATCHES, "bias-correct{progress=false}")
    biases = {name: value.detach().clone() for name, value in program.named_parameters()}
    again = BiasCorrect(progress=False).run_on(program, BATCHES)
    assert not again.changed
    assert set(again.coverage.left_out.values()) == {"corrected already"}
    assert all(torch.equal(value, biases[name]) for name, value in program.named_parameters())


class NoBias(nn.Module):
    """A layer without bias before one with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 8, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


def test_layers_without_bias_are_left_out_with_a_reason() -> None:
    program = trace(NoBias(), torch.randn(4, 16))
    recipe = Recipe.of([COARSE, "calibrate{progress=false}", "insert-fake-quant", "bias-correct{progress=false}"])
    result = PassManager(recipe.passes, data=BATCHES).run(program)
    assert result.results[-1].coverage.left_out == {"first.weight": "it has no bias"}


def test_pruned_weights_stay_zero_and_error_is_under_the_mask() -> None:
    masks = "insert-masks{pattern=unstructured,sparsity=0.5,criterion=magnitude,schedule=one-shot}"
    program = prepared(run_passes(traced("mlp"), masks), BATCHES, "bias-correct{progress=false}")
    mask = program.tensor("first.weight_mask").clone()
    frozen = run_passes(program, "freeze-quant,fold-masks")
    assert not bool(frozen.tensor("first.weight").detach()[~mask].any())


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 1000), st.sampled_from(["int4:symmetric:channel", "int8:symmetric:tensor", "int4:affine:channel"])
)
def test_the_error_of_means_never_grows(seed: int, scheme: str) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5))
    batches = [torch.randn(32, 6) + 0.5]
    program = trace(model, batches[0])
    text = f'annotate-quant{{weights="{scheme}",activations=none}},insert-observers,calibrate{{progress=false}},insert-fake-quant'
    plain, corrected = (
        PassManager(Recipe.of([text, *more]).passes, data=batches).run(program).program.eval()
        for more in ((), ("bias-correct{progress=false}",))
    )
    with torch.no_grad():
        want, before, after = (item(batches[0]).mean(0) for item in (model, plain, corrected))
    assert float((after - want).abs().max()) <= float((before - want).abs().max()) + 1e-6


def test_refusals() -> None:
    with pytest.raises(PassError, match="bias-correct requires"):
        PassManager(Recipe.of("bias-correct").passes, data=BATCHES).run(traced("mlp"))
    with pytest.raises(PassError, match="needs calibration data"):
        run_passes(traced("mlp"), f"{COARSE},insert-fake-quant,bias-correct")
    frozen = prepared(traced("mlp"), BATCHES, "freeze-quant")
    with pytest.raises(PassError, match="bias-correct"):
        PassManager(Recipe.of("bias-correct").passes, data=BATCHES).run(frozen)
    with pytest.raises(PassError, match="no batches"):
        BiasCorrect(progress=False).run_on(prepared(traced("mlp"), BATCHES), [])


def test_text_reads_back() -> None:
    assert Recipe.of("bias-correct{progress=false}").passes == (BiasCorrect(progress=False),)
    assert str(BiasCorrect()) == "bias-correct"
