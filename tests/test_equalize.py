"""equalize: neighboring layers share the ranges of their channels, and the model computes the same."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphprune as gp
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.trace import trace
from graphprune.passes import Equalize
from graphprune.pipeline.base import PassResult
from graphprune.pipeline.manager import PassManager
from graphprune.pipeline.recipe import Recipe
from graphprune.quant.affine import choose_qparams, fake_quantize
from graphprune.quant.schemes import parse_scheme
from tests.models import MODELS, example
from tests.traced import answer, assert_same, inputs_of, pair, run, run_passes, traced

Golden = Callable[[str, str], None]


def equalize(program: Program, **options: object) -> PassResult:
    """The result of the pass; the Program is rewritten."""
    return PassManager((Equalize(**options),)).run(program, in_place=True).results[0]  # type: ignore[arg-type]


def uneven(model: nn.Module, x: Tensor) -> Program:
    """A Program of the model whose output channels have very different ranges."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                spread = 10 ** (2 * torch.rand(len(module.weight), generator=generator) - 1)
                module.weight.mul_(spread.view(-1, *[1] * (module.weight.dim() - 1)))
    return trace(model.eval(), x, check=False)


def assert_equalizes(model: nn.Module, x: Tensor, pairs: int) -> Program:
    program = uneven(model, x)
    want = answer(program, x)
    result = equalize(program)
    assert result.stats["pairs"] == pairs
    torch.testing.assert_close(answer(program, x), want, rtol=1e-4, atol=1e-5 * max(1.0, float(want.abs().max())))
    return program


def test_golden(golden: Golden) -> None:
    program = traced("mlp")
    text = str(program)
    golden("equalize_mlp", text)
    assert equalize(program).changed
    assert str(program) == text  # values change, the graph does not


def test_ranges_are_equal_afterwards() -> None:
    torch.manual_seed(0)
    program = assert_equalizes(MODELS["mlp"](), torch.randn(4, 16), 2)
    for first, second in (("first", "second"), ("second", "head")):
        rows = program.tensor(f"{first}.weight").abs().amax(1)
        columns = program.tensor(f"{second}.weight").abs().amax(0)
        torch.testing.assert_close(rows, columns, rtol=3e-3, atol=0)


def test_twice_equals_once() -> None:
    program = uneven(MODELS["mlp"](), torch.randn(4, 16))
    assert equalize(program, iterations=100).changed
    text, state = str(program), copy.deepcopy(program.state_dict())
    assert not equalize(program, iterations=100).changed
    assert str(program) == text
    assert all(torch.equal(value, state[name]) for name, value in program.state_dict().items())


@pytest.mark.parametrize("name", [*MODELS])
def test_every_model_computes_the_same(name: str) -> None:
    model, program = pair(name)
    inputs = inputs_of(name, model)
    want = run(program, inputs)
    equalize(program)
    assert_same(want, run(program, inputs), 1e-4)


def test_nothing_to_do_and_reasons() -> None:
    program = traced("residual")
    state = copy.deepcopy(program.state_dict())
    result = equalize(program)
    assert not result.changed
    assert result.coverage.left_out == {
        "stem.weight": "its output is read by several operators",
        "branch1.weight": "its output reaches gelu, through which channels are not scaled one by one",
        "branch2.weight": "its output reaches add, through which channels are not scaled one by one",
        "head.weight": "its output is an output of the model",
    }
    assert all(torch.equal(value, state[name]) for name, value in program.state_dict().items())
    reasons = equalize(traced("conv_bn")).coverage.left_out
    assert "run fold-conv-bn before equalize" in reasons["conv1.weight"]
    assert "used several times" in equalize(traced("shared_weight")).coverage.left_out["body.weight"]


def test_after_folding_batch_normalization() -> None:
    (x,) = example("conv_bn") or ()
    program = run_passes(traced("conv_bn"), "fold-conv-bn")
    want = answer(program, x)
    result = equalize(program)
    assert result.coverage.matched == ("conv1.weight", "conv2.weight", "head.weight")
    torch.testing.assert_close(answer(program, x), want, rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(
    groups=st.sampled_from([1, 2, 4]),
    depthwise=st.booleans(),
    bias=st.booleans(),
    end=st.sampled_from(["mean", "flatten", "pool"]),
    act=st.sampled_from([nn.ReLU, lambda: nn.ReLU(inplace=True), lambda: nn.LeakyReLU(0.1), nn.PReLU, nn.Identity]),
)
def test_any_convolution(groups: int, depthwise: bool, bias: bool, end: str, act: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    middle = nn.Conv2d(8, 16, 3, groups=8) if depthwise else nn.Conv2d(8, 16, 3, groups=groups)
    tail: list[nn.Module] = {
        "mean": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)],
        "flatten": [nn.Flatten(), nn.Linear(16 * 16, 3)],
        "pool": [nn.MaxPool2d(2), nn.Dropout(0.1), nn.Flatten(), nn.Linear(16 * 4, 3)],
    }[end]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=bias), act(), middle, act(), *tail)
    assert_equalizes(model, torch.randn(2, 3, 6, 6), 2)


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(1, 7), min_size=2, max_size=5), bias=st.booleans(), iterations=st.integers(1, 5))
def test_any_chain_of_linear_layers(sizes: list[int], bias: bool, iterations: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
    assert_equalizes(model, torch.randn(3, sizes[0]), len(layers) - 1)
    step = Equalize(iterations=iterations)
    assert Recipe.of(str(step)).passes == (step,)


def test_zero_ranges_are_left_and_zeros_stay() -> None:
    program = uneven(MODELS["mlp"](), torch.randn(4, 16))
    with torch.no_grad():
        program.tensor("first.weight")[3] = 0
        program.tensor("second.weight")[:, 5] = 0
    state = copy.deepcopy(program.state_dict())
    want = answer(program, torch.ones(2, 16))
    equalize(program)
    after = program.state_dict()
    assert after["first.bias"][3] == state["first.bias"][3]
    assert after["first.bias"][5] == state["first.bias"][5]
    assert not after["second.weight"][:, 5].any()
    assert all(bool(value.isfinite().all()) for value in after.values())
    torch.testing.assert_close(answer(program, torch.ones(2, 16)), want, rtol=1e-4, atol=1e-5)


def test_masked_weights_stay_masked() -> None:
    program = run_passes(traced("mlp"), "insert-masks{schedule=one-shot,criterion=magnitude,sparsity=0.6}")
    x = torch.randn(4, 16)
    want = answer(program, x)
    assert equalize(program).changed
    torch.testing.assert_close(answer(program, x), want, rtol=1e-4, atol=1e-5)
    mask = program.tensor("second.weight_mask").clone()
    run_passes(program, "fold-masks")
    assert not bool(program.tensor("second.weight")[~mask].any())


def quantization_error(program: Program, x: Tensor, wanted: Tensor) -> float:
    """Squared error of the outputs where every weight is rounded to int8 with one scale."""
    scheme = parse_scheme("int8:symmetric:tensor")
    rounded = copy.deepcopy(program)
    with torch.no_grad():
        for name, value in rounded.named_parameters():
            if name.endswith("weight"):
                value.copy_(fake_quantize(value, *choose_qparams(value.amin(), value.amax(), scheme), scheme))
    return float((answer(rounded, x) - wanted).square().mean())


def test_uneven_channels_cost_several_times_less() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    model = MODELS["mlp"]()
    with torch.no_grad():
        model.first.weight[7] *= 100
        model.first.bias[7] *= 100
        model.second.weight[:, 7] /= 100
    program = trace(model, x, check=False)
    wanted = answer(program, x)
    before = quantization_error(program, x, wanted)
    equalize(program)
    assert quantization_error(program, x, wanted) < before / 4


def test_a_saved_program_is_rebuilt(tmp_path: Path) -> None:
    program = gp.transform(MODELS["mlp"](), "equalize", example("mlp"), factory="tests.models:mlp")
    gp.save(program, tmp_path / "saved")
    loaded = gp.load(tmp_path / "saved")
    assert str(loaded) == str(program)
    assert all(torch.equal(value, program.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_refusals() -> None:
    with pytest.raises(gp.PassError, match="iterations=0 is below 1"):
        Equalize(iterations=0)
    with pytest.raises(gp.PassError, match="tolerance=0"):
        Equalize(tolerance=0.0)
    for held in (Property.FAKE_QUANT, Property.OBSERVED):
        with pytest.raises(gp.PassError, match=f"cannot run on a Program that is {held}"):
            PassManager((Equalize(),)).check_order(Property.FUNCTIONAL | held)
    with pytest.raises(gp.RecipeError, match="matches no site"):
        equalize(traced("mlp"), select=("frist",))
