"""smooth-quant: outliers of activations move into weights, and the model computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.trace import trace
from graphprune.passes import SmoothQuant
from graphprune.pipeline.base import PassResult
from graphprune.pipeline.manager import PassManager
from graphprune.pipeline.recipe import Recipe
from graphprune.quant.affine import choose_qparams, fake_quantize
from graphprune.quant.schemes import parse_scheme
from tests.models import MODELS
from tests.traced import answer, assert_same, inputs_of, pair, run, run_passes, traced

Golden = Callable[[str, str], None]
MUL = torch.ops.aten.mul.Tensor


def smooth(program: Program, *batches: object, **options: object) -> PassResult:
    """The result of the pass; the Program is rewritten."""
    step = SmoothQuant(**options)  # type: ignore[arg-type]
    return PassManager((step,), data=batches).run(program, in_place=True).results[0]


class NormFeed(nn.Module):
    """A normalization that two layers read, a relu between two layers, and a gated product."""

    def __init__(self, features: int = 12, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.left, self.right = nn.Linear(features, 8, bias=bias), nn.Linear(features, 8, bias=bias)
        self.down = nn.Linear(8, 8, bias=bias)
        self.last = nn.Linear(8, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.last(F.relu(self.down(F.silu(self.left(y)) * self.right(y))))


def fed(features: int = 12, bias: bool = True) -> tuple[Program, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(16, features)
    x[:, 3] *= 40
    model = NormFeed(features, bias)
    with torch.no_grad():
        model.norm.weight[1] = 30.0
    return trace(model, x, check=False).eval(), x


def test_golden(golden: Golden) -> None:
    program, x = fed()
    golden("smooth_quant_before", str(program))
    golden("smooth_quant_folded", str(run_smooth(program, x)))
    program, x = fed()
    golden("smooth_quant_inserted", str(run_smooth(program, x, folding=False)))


def run_smooth(program: Program, x: Tensor, **options: object) -> Program:
    return smooth(program, x, **options).program


@pytest.mark.parametrize("options", [{}, {"folding": False}, {"alpha": "auto"}, {"alpha": 1.0}, {"alpha": 0}])
@pytest.mark.parametrize("name", ["mlp", "residual", "attention", "gpt2_conv1d", "gpt2", "llama", "t5", "vit"])
def test_models_compute_the_same(name: str, options: dict[str, object]) -> None:
    model, program = pair(name)
    inputs = inputs_of(name, model)
    result = smooth(program, inputs, **options)
    assert result.changed
    assert_same(run(model, inputs), run(program, inputs), 1e-4)


def test_factors_are_those_of_the_formula() -> None:
    program, x = fed()
    before = copy.deepcopy(program)
    result = smooth(program, x[:7], x[7:], alpha=0.7)
    assert result.stats == {"weights-smoothed": 4, "folded": 3, "inserted": 0, "alpha-mean": 0.7}
    with torch.no_grad():
        y = F.layer_norm(x, (12,), before.tensor("norm.weight"), before.tensor("norm.bias"))
        weights = torch.cat([before.tensor("left.weight"), before.tensor("right.weight")])
        s = y.abs().amax(0) ** 0.7 / weights.abs().amax(0) ** 0.3
    torch.testing.assert_close(program.tensor("left.weight").data, before.tensor("left.weight").data * s)
    torch.testing.assert_close(program.tensor("norm.weight").data, before.tensor("norm.weight").data / s)
    torch.testing.assert_close(program.tensor("norm.bias").data, before.tensor("norm.bias").data / s)


def test_nothing_is_folded_where_another_reads_the_value() -> None:
    program, x = fed()
    result = smooth(program, x, exclude=("right",))
    assert result.stats["folded"] == 1  # of the input of "last"; the one of "down" would go into "right"
    (node,) = [node for node in program.calls(MUL) if node.args[1].target == "left.input_smoothing"]
    assert [user.name for user in node.users] == ["linear"]
    assert result.coverage.left_out == {"right.weight": "excluded by name"}


class Normed(nn.Module):
    """A normalization of some kind and a layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.LayerNorm(8, bias=kind != "layer without bias")
        self.root = nn.RMSNorm(8)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = {
            "layer": lambda: self.layer(x),
            "layer without bias": lambda: self.layer(x),
            "plain layer": lambda: F.layer_norm(x, (8,)),
            "root": lambda: self.root(x),
            "plain root": lambda: F.rms_norm(x, (8,)),
            "two dimensions": lambda: F.layer_norm(x, (4, 8)),
            "weight used twice": lambda: self.root(self.root(x)),
        }[self.kind]()
        return self.linear(y)


@pytest.mark.parametrize(
    ("kind", "folded"),
    [
        ("layer", 1),
        ("layer without bias", 1),
        ("plain layer", 0),
        ("root", 1),
        ("plain root", 0),
        ("two dimensions", 0),
        ("weight used twice", 0),
    ],
)
@pytest.mark.filterwarnings("ignore:.*unused:UserWarning")
def test_normalizations_of_every_kind(kind: str, folded: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 8) * torch.logspace(-1, 1, 8)
    program = trace(Normed(kind), x, check=False).eval()
    want = answer(program, x)
    assert smooth(program, x).stats["folded"] == folded
    torch.testing.assert_close(answer(program, x), want, rtol=1e-4, atol=1e-4)


def test_twice_changes_nothing() -> None:
    program, x = fed()
    first = smooth(program, x)
    text, state = str(program), copy.deepcopy(program.state_dict())
    second = smooth(program, x)
    assert first.changed
    assert not second.changed
    assert set(second.coverage.left_out.values()) == {"smoothed already"}
    assert str(program) == text
    assert all(torch.equal(value, state[name]) for name, value in program.state_dict().items())


def test_nothing_to_do() -> None:
    program = traced("conv_transpose")
    text = str(program)
    result = smooth(program, torch.randn(2, 3, 8, 8))
    assert not result.changed
    assert str(program) == text
    assert "a convolution: only linear layers are smoothed" in result.coverage.left_out.values()


def test_shared_and_tied_weights_are_left_out() -> None:
    result = smooth(traced("shared_weight"), torch.randn(4, 16))
    assert "used several times" in result.coverage.left_out["body.weight"]
    assert result.coverage.matched == ("head.weight",)
    result = smooth(traced("tied_embedding"), torch.randint(0, 32, (4, 6)))
    assert "also used by embedding" in result.coverage.left_out["embedding.weight"]


def test_zero_columns_and_silent_activations_keep_factor_one_and_zeros_stay() -> None:
    program, x = fed()
    with torch.no_grad():
        for name in ("left", "right"):
            program.tensor(f"{name}.weight")[:, 2] = 0
        program.tensor("norm.weight")[5] = 0
        program.tensor("norm.bias")[5] = 0
    want = answer(program, x)
    before = copy.deepcopy(program.state_dict())
    smooth(program, x)
    after = program.state_dict()
    assert torch.equal(after["left.weight"][:, [2, 5]], before["left.weight"][:, [2, 5]])
    assert torch.equal(after["norm.weight"][[2, 5]], before["norm.weight"][[2, 5]])
    assert all(bool(value.isfinite().all()) for value in after.values())
    torch.testing.assert_close(answer(program, x), want, rtol=1e-4, atol=1e-5)


def test_masks_stay_and_only_kept_weights_count() -> None:
    program, x = fed()
    run_passes(
        program,
        "insert-masks{schedule=one-shot,criterion=magnitude,sparsity=0.5,pattern=unstructured,include_last=true}",
    )
    mask = program.tensor("left.weight_mask")
    with torch.no_grad():
        program.tensor("left.weight")[~mask] = 1e6
    want = answer(program, x)
    smooth(program, x)
    torch.testing.assert_close(answer(program, x), want, rtol=1e-4, atol=1e-5)
    assert float(program.tensor("norm.weight").detach().abs().max()) < 100
    run_passes(program, "fold-masks")
    assert not bool(program.tensor("left.weight")[~mask].any())


@settings(max_examples=25)
@given(
    features=st.integers(1, 9),
    rows=st.integers(1, 6),
    bias=st.booleans(),
    alpha=st.one_of(st.floats(0, 1), st.just("auto")),
    folding=st.booleans(),
    spread=st.floats(0, 8),
)
def test_any_shape_and_alpha(
    features: int, rows: int, bias: bool, alpha: float | str, folding: bool, spread: float
) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows + 1, features) * torch.logspace(-spread / 2, spread / 2, features)
    model = nn.Sequential(nn.Linear(features, 5, bias=bias), nn.ReLU(), nn.Linear(5, 3, bias=bias))
    program = trace(model, x, check=False).eval()
    want = answer(program, x)
    smooth(program, x, alpha=alpha, folding=folding)
    torch.testing.assert_close(answer(program, x), want, rtol=1e-3, atol=1e-4 * max(1.0, float(want.abs().max())))


@settings(max_examples=25)
@given(alpha=st.one_of(st.floats(0, 1), st.just("auto")), folding=st.booleans(), select=st.lists(st.text(max_size=8)))
def test_text_reads_back(alpha: float | str, folding: bool, select: list[str]) -> None:
    step = SmoothQuant(alpha=alpha, folding=folding, select=tuple(select))
    assert Recipe.of(str(step)).passes == (step,)


def quantization_error(program: Program, x: Tensor, wanted: Tensor) -> float:
    """Squared error of the outputs where weights and inputs of all linear layers are rounded to 8 bits."""
    weight, activation = parse_scheme("int8:symmetric:channel"), parse_scheme("uint8:affine:tensor")

    def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        x = fake_quantize(x, *choose_qparams(x.amin(), x.amax(), activation), activation)
        return F.linear(x, fake_quantize(w, *choose_qparams(w.amin(1), w.amax(1), weight), weight), b)

    rounded = copy.deepcopy(program)
    for node in rounded.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            node.target = linear
    rounded.recompile()
    return float((answer(rounded, x) - wanted).square().mean())


@pytest.mark.parametrize("options", [{}, {"folding": False}, {"alpha": "auto"}])
def test_an_outlier_channel_costs_several_times_less(options: dict[str, object]) -> None:
    program, x = fed()
    wanted = answer(program, x)
    before = quantization_error(program, x, wanted)
    smooth(program, x, **options)
    assert quantization_error(program, x, wanted) < before / 4


def test_auto_is_at_least_as_good_as_any_alpha_it_tries_for_one_layer() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 16) * torch.logspace(-1, 1, 16)
    layer = trace(nn.Linear(16, 8), x, check=False).eval()
    wanted = answer(layer, x)
    errors = {}
    for alpha in ("auto", 0.0, 0.25, 0.5, 0.75, 1.0):
        program = copy.deepcopy(layer)
        smooth(program, x, alpha=alpha, alpha_step=0.25)
        errors[alpha] = quantization_error(program, x, wanted)
    assert errors.pop("auto") <= min(errors.values()) * 1.01


def test_other_dtypes_move_along() -> None:
    program, x = fed()
    program = program.to(torch.bfloat16)
    want = answer(program, x.bfloat16()).float()
    smooth(program, x.bfloat16(), folding=False)
    assert program.tensor("left.input_smoothing").dtype == torch.bfloat16
    torch.testing.assert_close(
        answer(program, x.bfloat16()).float(), want, rtol=0.05, atol=0.05 * float(want.abs().max())
    )


@pytest.mark.parametrize("options", ["", "{folding=false}", "{alpha=auto,exclude=[classifier]}"])
def test_a_saved_program_is_rebuilt_without_data(options: str, tmp_path: Path) -> None:
    model = MODELS["bert_sequence"]()
    inputs = inputs_of("bert_sequence", model)
    program = gp.transform(model, f"insert-masks,smooth-quant{options}", data=[inputs])
    gp.save(program, tmp_path / "saved")
    loaded = gp.load(tmp_path / "saved")
    assert str(loaded) == str(program)
    assert_same(run(program, inputs), run(loaded, inputs), 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha=1.5 is not in"),
        ({"alpha": "automatic"}, "did you mean 'auto'"),
        ({"alpha_min": 0.8, "alpha_max": 0.2}, "alpha_min"),
        ({"alpha_step": 0.0}, "alpha_step"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(gp.PassError, match=message):
        SmoothQuant(**options)  # type: ignore[arg-type]


def test_refusals() -> None:
    program, x = fed()
    with pytest.raises(gp.PassError, match="smooth-quant needs calibration data"):
        gp.transform(program, "smooth-quant")
    with pytest.raises(gp.PassError, match="got no batches"):
        smooth(program, *())
    with pytest.raises(gp.PassError, match=r"input of (left|right).weight has NaN or infinite"):
        smooth(program, torch.full((2, 12), float("inf")))
    with pytest.raises(gp.RecipeError, match="matches no site"):
        smooth(program, x, select=("lefft",))
    for held in (Property.FAKE_QUANT, Property.OBSERVED):
        with pytest.raises(gp.PassError, match=f"cannot run on a Program that is {held}"):
            PassManager((SmoothQuant(),), data=[x]).check_order(Property.FUNCTIONAL | held)
