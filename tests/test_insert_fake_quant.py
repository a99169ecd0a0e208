"""insert-fake-quant: quantizers with observers on weights and activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.errors import PassError, RecipeError
from graphprune.ir import ops
from graphprune.ir.program import Program
from graphprune.ir.quantizing import quantizers
from graphprune.ir.trace import trace
from graphprune.passes import InsertFakeQuant
from graphprune.pipeline.recipe import Recipe
from graphprune.quant.affine import fake_quantize
from graphprune.quant.schemes import parse_scheme
from tests.models import example
from tests.traced import answer, run_passes, traced

Golden = Callable[[str, str], None]


def observed(name: str, text: str = "insert-fake-quant") -> Program:
    """A quantized Program whose observers have seen the example."""
    program = run_passes(traced(name), text)
    program.train()
    torch.manual_seed(0)  # dropout draws
    program(*(example(name) or ()))
    return program.eval()


def test_golden(golden: Golden) -> None:
    program = traced("mlp")
    golden("insert_fake_quant_before", str(program))
    golden("insert_fake_quant_after", str(run_passes(program, "insert-fake-quant{select=[first,second]}")))


def test_golden_attention_quantizes_a_shared_input_once(golden: Golden) -> None:
    golden("insert_fake_quant_attention", str(run_passes(traced("attention"), "insert-fake-quant")))


def test_running_twice_is_running_once() -> None:
    program = run_passes(traced("mlp"), "insert-fake-quant")
    text = str(program)
    again = InsertFakeQuant().run(program)
    assert not again.changed
    assert str(program) == text
    assert set(again.coverage.left_out.values()) == {"quantized already"}


@pytest.mark.parametrize("name", ["mlp", "residual", "attention", "gpt2_conv1d", "shared_weight", "grouped_conv"])
def test_quantized_outputs_are_close_to_the_floats(name: str) -> None:
    inputs = example(name) or ()
    before = answer(traced(name), *inputs)
    after = answer(observed(name), *inputs)
    assert float((after - before).norm() / before.norm()) < 0.05  # eight bits, a few layers
    assert not torch.equal(after, before)


def test_weights_are_on_the_grid_of_the_reference() -> None:
    program = observed("mlp")
    weight = program.tensor("first.weight").detach()
    scheme = parse_scheme("int8:symmetric:channel")
    scale, zero_point = program.tensor("first.weight_scale"), program.tensor("first.weight_zero_point")
    want = fake_quantize(weight, scale, zero_point, scheme)
    have = ops.fake_quantize(weight, scale, zero_point, scheme.qmin, scheme.qmax, 0)
    torch.testing.assert_close(have, want, rtol=0, atol=1e-7)
    assert float((want - weight).abs().max()) <= float(scale.max()) / 2 + 1e-7


def test_gpt2_weights_have_a_scale_an_output_column() -> None:
    program = observed("gpt2_conv1d")
    assert program.tensor("up.weight_scale").shape == (32,)
    assert {d.prefix: d.scheme for _, d in quantizers(program)}["up.weight"] == "int8:symmetric:axis1"


def test_zeros_of_masks_stay_zero() -> None:
    program = observed("mlp", "insert-masks{schedule=one-shot,criterion=magnitude,sparsity=0.5},insert-fake-quant")
    weight, mask = program.tensor("first.weight").detach(), program.tensor("first.weight_mask")
    shown = ops.fake_quantize(
        ops.mask(weight, mask),
        program.tensor("first.weight_scale"),
        program.tensor("first.weight_zero_point"),
        -127,
        127,
        0,
    )
    assert not bool(shown[~mask].any())


def test_gradients_pass_inside_the_range_only() -> None:
    x = torch.tensor([-3.0, -0.5, 0.5, 3.0], requires_grad=True)
    ops.fake_quantize(x, torch.tensor(0.01), torch.tensor(0, dtype=torch.int32), -127, 127).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_observers_follow_train_mode() -> None:
    program = observed("mlp")
    before = program.tensor("first.input_high").clone()
    answer(program, 10 * torch.ones(2, 16))
    assert torch.equal(program.tensor("first.input_high"), before)
    program.train()
    program(10 * torch.ones(2, 16))
    torch.testing.assert_close(program.tensor("first.input_high"), before + 0.01 * (10 - before))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_quantizers_work_in_other_dtypes(dtype: torch.dtype) -> None:
    program = observed("mlp").to(dtype)
    (x,) = example("mlp") or ()
    assert answer(program, x.to(dtype)).dtype is dtype
    program.train()
    program(x.to(dtype)).float().sum().backward()


def test_an_unseen_activation_is_an_error() -> None:
    program = run_passes(traced("mlp"), "insert-fake-quant")
    with pytest.raises(PassError, match="has seen no data"):
        answer(program, *(example("mlp") or ()))


class TwoMatrices(nn.Module):
    """Two weights in one module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(8, 4))
        self.down = nn.Parameter(torch.randn(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.up)), self.down)


def test_two_weights_of_one_module_have_quantizers_of_their_own() -> None:
    program = run_passes(trace(TwoMatrices(), torch.randn(3, 4)), "insert-fake-quant")
    prefixes = [decision.prefix for _, decision in quantizers(program)]
    assert len(set(prefixes)) == len(prefixes) == 4


def test_a_second_run_uses_the_quantizers_of_the_first() -> None:
    program = run_passes(traced("attention"), "insert-fake-quant{select=[attention.in_proj_weight]}")
    seen = sum(not decision.weight for _, decision in quantizers(program))
    result = InsertFakeQuant(select=("feed",)).run(program)
    assert result.stats == {"weights-quantized": 1, "activations-quantized": 1}
    assert sum(not decision.weight for _, decision in quantizers(program)) == seen + 1


class TwoReaders(nn.Module):
    """Two layers that read one activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


@pytest.mark.parametrize(
    "text", ["insert-fake-quant", "insert-fake-quant{select=left},insert-fake-quant{select=right}"]
)
def test_an_activation_of_two_layers_is_observed_once(text: str) -> None:
    program = run_passes(trace(TwoReaders(), torch.randn(3, 4)), text)
    activations = [(node, decision) for node, decision in quantizers(program) if not decision.weight]
    assert [decision.prefix for _, decision in activations] == ["left.input"]
    assert len(activations[0][0].users) == 2


def test_a_convolution_before_batch_norm_waits_for_folding() -> None:
    result = InsertFakeQuant().run(traced("conv_bn"))
    assert result.coverage.matched == ("head.weight",)
    assert "run fold-conv-bn first" in result.coverage.left_out["conv1.weight"]


@pytest.mark.parametrize("momentum", [0.0, -0.1, 1.5, float("nan")])
def test_momentum_out_of_range(momentum: float) -> None:
    with pytest.raises(PassError, match=r"momentum=.* is not in \(0, 1\]"):
        InsertFakeQuant(momentum=momentum)


def test_a_site_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match="'haed' matches no quantizable operator; did you mean 'head'"):
        InsertFakeQuant(exclude=("haed",)).run(traced("mlp"))


# -- plans ------------------------------------------------------------------------------------------------------------


def test_it_acts_on_a_plan_and_only_on_that() -> None:
    program = run_passes(traced("mlp"), "annotate-quant{select=[head],weights=int8:symmetric:tensor,activations=none}")
    result = InsertFakeQuant().run(program)
    assert result.coverage.matched == ("head.weight",)
    assert [decision.scheme for _, decision in quantizers(program)] == ["int8:symmetric:tensor"]
    again = InsertFakeQuant().run(program)
    assert not again.changed
    assert again.coverage.left_out == {"head.weight": "quantized already"}


def test_observers_that_are_there_are_used() -> None:
    program, (x,) = run_passes(traced("mlp"), "annotate-quant,insert-observers"), example("mlp") or ()
    program.train()
    program(x)
    seen = {name: value.clone() for name, value in program.named_buffers()}
    run_passes(program.eval(), "insert-fake-quant")
    assert {name: tuple(value.shape) for name, value in program.named_buffers()} == {
        name: tuple(value.shape) for name, value in seen.items()
    }
    assert all(torch.equal(value, seen[name]) for name, value in program.named_buffers())
    assert bool(answer(program, x).isfinite().all())


@pytest.mark.parametrize("options", [{"select": ("first",)}, {"momentum": 0.1}, {"include_last": False}])
def test_choosing_where_a_plan_waits_is_refused(options: dict[str, object]) -> None:
    program = run_passes(traced("mlp"), "annotate-quant")
    (name,) = options
    with pytest.raises(PassError, match=f"{name}: the plan of annotate-quant waits to be inserted"):
        InsertFakeQuant(**options).run(program)  # type: ignore[arg-type]
    assert InsertFakeQuant(freeze_observers=10, reduce_range=False).run(program).changed


def test_times_of_freezing_change_the_program_once() -> None:
    program = run_passes(traced("mlp"), "insert-fake-quant{freeze_observers=10}")
    assert not InsertFakeQuant(freeze_observers=10).run(program).changed
    assert InsertFakeQuant(freeze_observers=11).run(program).changed


# -- text -------------------------------------------------------------------------------------------------------------

names = st.lists(st.text(min_size=1, max_size=8), max_size=2).map(tuple)
operators = st.lists(st.sampled_from(["linear", "conv2d", "embedding", "addmm", "add"]), max_size=2).map(tuple)
times = st.none() | st.integers(0, 10**6) | st.floats(0, 1, exclude_max=True) | st.just("2 epochs")


@given(
    momentum=st.floats(0, 1, exclude_min=True),
    select=names,
    exclude=names,
    ops=operators,
    include_last=st.booleans(),
    reduce_range=st.none() | st.booleans(),
    freeze_observers=times,
    freeze_batch_norm=times,
)
def test_text_reads_back(**options: object) -> None:
    step = InsertFakeQuant(**options)  # type: ignore[arg-type]
    assert Recipe.of(str(step)).passes == (step,)
