"""pack-linear: weights of sparse linear layers are stored without their zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphprune.errors import PassError, RecipeError
from graphprune.ir import ops
from graphprune.ir.program import Program
from graphprune.ir.sites import find_sites
from graphprune.ir.sparse_operators import LAYERS, pack, pack_bytes, read_argument, sparse_linear, sparse_linear_int8
from graphprune.ir.trace import trace
from graphprune.passes import PackLinear
from graphprune.pipeline.base import PassResult
from graphprune.pipeline.recipe import Recipe
from graphprune.pipeline.transform import transform
from graphprune.sparsity.layout import to_logical
from graphprune.sparsity.packed import Packed, unpack_matrix
from tests.models import MODELS, example
from tests.packed_programs import blocked, integers, with_round_scales
from tests.traced import answer, assert_same, inputs_of, run, run_passes, traced

Golden = Callable[[str, str], None]


def _packed(program: Program) -> dict[str, Tensor]:
    """Every packed weight, unpacked, by name."""
    found = {}
    for node in program.calls(*LAYERS):
        name = str(read_argument(node, "values").target)
        parts = (program.tensor(str(read_argument(node, part).target)) for part in ("values", "columns", "starts"))
        features = int(node.args[0].meta["val"].shape[1])  # type: ignore[union-attr]
        found[name.removesuffix("_values")] = unpack_matrix(Packed(*parts), read_argument(node, "rows"), features)
    return found


def _left_out(model: nn.Module, x: Tensor) -> PassResult:
    return PackLinear(0.0).run(trace(model.eval(), (x,)))


def test_golden(golden: Golden) -> None:
    program = blocked("mlp")
    golden("pack_linear_before", str(program))
    golden("pack_linear_after", str(run_passes(program, "pack-linear")))


def test_golden_of_integers(golden: Golden) -> None:
    program = with_round_scales(integers("mlp"))
    golden("pack_linear_integers_before", str(program))
    golden("pack_linear_integers_after", str(run_passes(program, "pack-linear")))


def test_golden_of_weights_that_are_stored_transposed(golden: Golden) -> None:
    golden("pack_linear_gpt2_conv1d", str(run_passes(blocked("gpt2_conv1d"), "pack-linear")))


@pytest.mark.parametrize(
    "name",
    ["mlp", "residual", "attention", "shared_weight", "tied_embedding", "gpt2_conv1d", "conv_bn", "bert_qa", "gpt2"],
)
def test_outputs_are_equal_and_weights_come_back(name: str) -> None:
    program = blocked(name)
    sites = find_sites(program)[0]
    weights = {site.name: to_logical(program.tensor(site.name).detach(), site.layout) for site in sites}
    inputs = inputs_of(name, MODELS[name]())
    before = run(program, inputs)
    result = PackLinear(0.0).run(program)
    assert result.changed
    assert_same(before, run(program, inputs), 2e-6)
    packed = _packed(program)
    assert set(result.coverage.matched) == packed.keys() & weights.keys()
    assert all(torch.equal(packed[weight], weights[weight]) for weight in result.coverage.matched)
    assert set(result.coverage.matched) | result.coverage.left_out.keys() >= weights.keys()
    assert result.stats["packed"] == len(result.coverage.matched)
    assert result.stats["entries"] == sum(weights[weight].numel() for weight in result.coverage.matched)


def test_other_sizes_than_the_traced_ones() -> None:
    program = blocked("bert_qa")
    packed = run_passes(copy.deepcopy(program), "pack-linear{at_least=0}")
    for batch, length in ((1, 1), (1, 64), (7, 20)):
        inputs = inputs_of("bert_qa", MODELS["bert_qa"](), batch, length)
        assert_same(run(program, inputs), run(packed, inputs), 2e-6)


@pytest.mark.parametrize("way", ["static", "QAT"])
@pytest.mark.parametrize("name", ["mlp", "residual", "shared_weight", "gpt2_conv1d", "bert_qa"])
def test_integers_are_packed_and_computed_alike(name: str, way: str) -> None:
    program = integers(name, way)
    inputs = inputs_of(name, MODELS[name]())
    before = run(program, inputs)
    result = PackLinear(0.0).run(program)
    assert len(result.coverage.matched) == result.stats["packed"] > 0
    assert {node.target for node in program.calls(*LAYERS)} == {sparse_linear_int8}
    assert all(weight.dtype is torch.int8 for weight in _packed(program).values())
    assert_same(before, run(program, inputs), 1e-2)  # a last place that differs may move a byte by one


def test_the_sums_of_integers_are_exact() -> None:
    program = integers("mlp")
    weight, bias = program.tensor("first.weight").detach(), program.tensor("first.bias").detach()
    step, zero = program.tensor("first.input_scale"), int(program.tensor("first.input_zero_point"))
    scales = program.tensor("first.weight_scale")
    (x,) = example("mlp") or ()
    grid = (torch.round(x / step) + zero).clamp(0, 255).long()
    sums = (grid - zero) @ torch.round(weight / scales[:, None]).long().t()
    run_passes(program, "pack-linear{at_least=0,select=[first]}")
    (node,) = program.calls(sparse_linear_int8)
    seen: list[Tensor] = []

    class Watched(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            if n is node:
                assert isinstance(result, Tensor)
                seen.append(result)
            return result

    with torch.no_grad():
        Watched(program).run(*([x] if len(list(program.graph.find_nodes(op="placeholder"))) == 1 else [x, False]))
    assert torch.equal(seen[0], sums.float() * (scales * step) + bias)


def test_weights_are_replaced_by_their_parts() -> None:
    program = run_passes(integers("mlp"), "pack-linear{at_least=0}")
    state = program.state_dict()
    assert {"first.weight_values", "first.weight_columns", "first.weight_starts", "first.weight_scales"} <= state.keys()
    assert not {"first.weight", "second.weight", "head.weight"} & state.keys()
    assert {"first.bias", "second.bias", "head.bias"} <= state.keys()
    assert not list(program.calls(ops.fake_quantize))


def test_weights_are_stored_in_half_the_bytes_on_request() -> None:
    program, (x,) = blocked("mlp"), example("mlp") or ()
    exact = answer(program, x)
    weight = program.tensor("first.weight").detach().clone()
    result = PackLinear(0.0, storage="bfloat16").run(program)
    assert len(result.coverage.matched) == 3
    values = program.tensor("first.weight_values")
    assert values.dtype is torch.bfloat16
    assert torch.equal(_packed(program)["first.weight"], weight.bfloat16())
    assert_same(exact, answer(program, x), 2.0**-7)
    grid = integers("mlp")
    PackLinear(0.0, storage="bfloat16").run(grid)
    assert grid.tensor("first.weight_values").dtype is torch.int8


def test_layers_that_read_one_value_share_its_panels() -> None:
    program = run_passes(blocked("bert_qa"), "pack-linear{at_least=0}")
    assert (len(list(program.calls(sparse_linear))), len(list(program.calls(pack)))) == (13, 9)
    program = run_passes(integers("bert_qa"), "pack-linear{at_least=0}")
    assert (len(list(program.calls(sparse_linear_int8))), len(list(program.calls(pack_bytes)))) == (13, 9)


def test_a_weight_that_an_embedding_uses_too_stays() -> None:
    program = blocked("tied_embedding")
    result = PackLinear(0.0).run(program)
    assert result.coverage.matched == ("feed.weight",)
    assert "embedding.weight" in result.coverage.left_out
    assert program.attribute("embedding.weight") is not None


def test_every_use_of_a_shared_weight_is_packed() -> None:
    program = run_passes(blocked("shared_weight"), "pack-linear{at_least=0}")
    assert len(list(program.calls(sparse_linear))) == 4
    assert not list(program.calls(torch.ops.aten.linear.default))
    assert program.attribute("body.weight") is None


def test_the_source_model_is_not_touched() -> None:
    model = MODELS["mlp"]()
    program = trace(model, example("mlp"), check=False)
    transform(program, ["pack-linear{at_least=0}"])
    assert program.attribute("first.weight") is not None
    assert "first.weight" in model.state_dict()


# -- what is left out ----------------------------------------------------------------------------------------------


def test_dense_layers_stay_and_nothing_changes() -> None:
    program = traced("mlp")
    text = str(program)
    result = PackLinear().run(program)
    assert (result.changed, result.stats) == (False, {"packed": 0, "entries": 0, "stored": 0})
    assert result.coverage.left_out["first.weight"] == "0.0% of its weights are zero, less than at_least=0.6"
    assert str(program) == text


def test_at_least_is_a_bound() -> None:
    program = blocked("mlp", 0.75)  # the last layer has no mask
    assert PackLinear(0.76).run(program).coverage.matched == ()
    assert PackLinear(0.75).run(program).coverage.matched == ("first.weight", "second.weight")


def test_twice_is_once() -> None:
    program = run_passes(blocked("bert_qa"), "pack-linear")
    text = str(program)
    assert not PackLinear().run(program).changed
    assert str(program) == text


def test_names_are_selected_and_excluded() -> None:
    result = PackLinear(0.0, select=("first", "second"), exclude=("second",)).run(blocked("mlp"))
    assert result.coverage.matched == ("first.weight",)
    assert result.coverage.left_out == {"second.weight": "excluded by name", "head.weight": "not selected"}


def test_convolutions_are_left_out() -> None:
    result = PackLinear(0.0).run(traced("conv_bn"))
    assert result.coverage.matched == ("head.weight",)
    assert result.coverage.left_out["conv1.weight"] == "conv2d: packed weights are of linear layers"


def test_other_floats_are_left_out() -> None:
    result = _left_out(nn.Linear(8, 4).double(), torch.randn(2, 8).double())
    assert result.coverage.left_out == {"weight": "torch.float64: kernels take float32 and int8"}


def test_columns_of_more_than_sixteen_bits_are_left_out() -> None:
    result = _left_out(nn.Linear(2**16 + 1, 1), torch.randn(2, 2**16 + 1))
    assert result.coverage.left_out == {"weight": "65537 inputs: columns are numbers of 16 bits"}
    assert _left_out(nn.Linear(2**16, 1), torch.randn(2, 2**16)).changed


class _Product(nn.Module):
    """A weight in one of the forms that products have: [b, 8] to [b, 4]."""

    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.weight, self.bias)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (lambda x, w, b: torch.mm(x, w), ""),
        (lambda x, w, b: x @ w, ""),
        (lambda x, w, b: x.view(-1, 1, 8) @ w + b, ""),
        (lambda x, w, b: torch.addmm(b, x, w), ""),
        (lambda x, w, b: torch.addmm(b, x, w, beta=2), "its operator scales the bias or the product"),
        (lambda x, w, b: torch.addmm(b, x, w, alpha=2), "its operator scales the bias or the product"),
        (lambda x, w, b: torch.addmm(b * 2, x, w), "its bias is no vector of the model"),
        (lambda x, w, b: torch.addmm(x[:, :4], x, w), "its bias is no vector of the model"),
    ],
)
def test_forms_of_products(form: Callable[[Tensor, Tensor, Tensor], Tensor], reason: str) -> None:
    model, x = _Product(form).eval(), torch.randn(5, 8)
    program = trace(model, (torch.randn(3, 8),))
    result = PackLinear(0.0).run(program)
    assert result.coverage.left_out.get("weight", "") == reason
    assert len(list(program.calls(sparse_linear))) == (not reason)
    with torch.no_grad():
        torch.testing.assert_close(answer(program, x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ("weights=int8:symmetric:channel", ""),
        ("weights=int8:symmetric:tensor", ""),
        ("weights=int4:symmetric:channel", ""),
        (
            "weights=int8:affine:channel",
            "it is not quantized by int8:symmetric; the kernels take that, with a scale a row or one",
        ),
        ("weights=int8:symmetric:channel:group16", "it is not quantized by int8:symmetric"),
        (
            "activations=int8:symmetric:tensor",
            "its activations are quantized to (-127, 127); the kernels take uint8:affine:tensor",
        ),
        (
            "activations=none",
            "its activations are not quantized, or at run time, and there is no sparse kernel for that",
        ),
    ],
)
def test_number_formats(plan: str, reason: str) -> None:
    recipe = f"annotate-quant{{{plan},embeddings=none}},insert-fake-quant"
    program = run_passes(blocked("mlp"), recipe).train()
    (x,) = example("mlp") or ()
    program(x)
    run_passes(program.eval(), "freeze-quant")
    before = answer(program, x)
    result = PackLinear(0.0).run(program)
    assert result.coverage.left_out.get("first.weight", "").startswith(reason)
    assert ("first.weight" in result.coverage.matched) is (not reason)
    assert_same(before, answer(program, x), 1e-2)


def test_ranges_that_are_found_at_run_time_are_left_out() -> None:
    program = integers("mlp", "dynamic")
    result = PackLinear(0.0).run(program)
    assert not result.changed
    assert all("at run time" in reason for reason in result.coverage.left_out.values())


# -- properties and refusals ---------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    rows=st.integers(1, 40),
    features=st.integers(1, 30),
    tokens=st.integers(0, 140),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    height=st.sampled_from([1, 4, 16]),
)
def test_any_shape_is_packed(rows: int, features: int, tokens: int, density: float, height: int) -> None:
    model = nn.Linear(features, rows).eval()
    kept = (torch.rand(-(-rows // height), features) < density).repeat_interleave(height, 0)[:rows]
    with torch.no_grad():
        model.weight.mul_(kept)
    program = run_passes(trace(model, (torch.randn(3, features),), check=False), "pack-linear{at_least=0}")
    assert torch.equal(_packed(program)["weight"], model.weight)
    x = torch.randn(tokens, features)
    with torch.no_grad():
        torch.testing.assert_close(answer(program, x), model(x), rtol=1e-5, atol=1e-5)


@given(
    at_least=st.floats(0, 1),
    select=st.sampled_from([(), ("first",), ("re:f.*", "head")]),
    storage=st.sampled_from(["float32", "bfloat16"]),
)
def test_text_reads_back(at_least: float, select: tuple[str, ...], storage: str) -> None:
    made = PackLinear(at_least, select, storage=storage)
    assert Recipe.of(str(made)).passes == (made,)


@pytest.mark.parametrize("at_least", [-0.1, 1.5, float("nan")])
def test_options_out_of_range_are_refused(at_least: float) -> None:
    with pytest.raises(PassError, match=rf"at_least={at_least} is not in \[0, 1\]"):
        PackLinear(at_least)


def test_other_storage_is_refused() -> None:
    with pytest.raises(PassError, match="storage=float16 is neither float32 nor bfloat16"):
        PackLinear(storage="float16")


def test_names_that_match_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"select: 'frist' matches no site.*first"):
        PackLinear(0.0, select=("frist",)).run(traced("mlp"))


def test_masks_and_observers_are_refused() -> None:
    for before in ("insert-masks{schedule=one-shot}", "annotate-quant,insert-observers"):
        with pytest.raises(PassError, match=r"pack-linear"):
            run_passes(traced("mlp"), f"{before},pack-linear")


def test_a_layer_without_outputs_is_no_error() -> None:
    model = nn.Linear(8, 4).eval()
    model.weight, model.bias = nn.Parameter(torch.zeros(0, 8)), nn.Parameter(torch.zeros(0))
    program = run_passes(trace(model, (torch.randn(2, 8),)), "pack-linear{at_least=0}")
    assert answer(program, torch.randn(3, 8)).shape == (3, 0)
