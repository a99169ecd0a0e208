"""cast-mixed: 16 bits where products are, float32 elsewhere, with casts that the graph shows."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphprune.artifact.samples import make_inputs
from graphprune.errors import PassError, RecipeError
from graphprune.ir.parity import NoDropout
from graphprune.ir.precision import FOLLOWERS, PRODUCTS, dtypes_of, name_of
from graphprune.ir.program import Program
from graphprune.ir.trace import trace
from graphprune.passes import CastMixed
from graphprune.pipeline.recipe import Recipe
from tests.models import MODELS, PLAIN, example
from tests.traced import answer, pair, run, run_passes, tensors, traced

Golden = Callable[[str, str], None]
aten = torch.ops.aten
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # of a number, relative
PRUNE = "insert-masks{pattern=4x1,sparsity=0.5,schedule=one-shot,criterion=magnitude}"
ALWAYS_WIDE = {
    "layer_norm", "batch_norm", "pow", "mean", "rsqrt", "cross_entropy_loss", "log", "cos", "sin", "adaptive_avg_pool2d",
}  # fmt: skip


def mixed(program: Program, text: str = "cast-mixed") -> Program:
    return run_passes(copy.deepcopy(program), text)


def relative(want: Tensor, have: Tensor) -> float:
    return float((have.double() - want.double()).norm() / want.double().norm())


class Recorder(fx.Interpreter):
    """Runs a Program node by node and keeps the dtypes that are really there."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.seen: dict[fx.Node, torch.dtype] = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.seen[n] = result.dtype
        return result


def recorded(program: Program, inputs: dict[str, Tensor]) -> dict[fx.Node, torch.dtype]:
    recorder = Recorder(program)
    with torch.no_grad():
        recorder.run(*program.interface.bind((), inputs).values())
    return recorder.seen


# -- golden, nothing to do ------------------------------------------------------------------------------------------------


def test_golden(golden: Golden) -> None:
    golden("cast_mixed_before", str(traced("residual")))
    golden("cast_mixed_after", str(mixed(traced("residual"))))


def test_golden_stored(golden: Golden) -> None:
    golden("cast_mixed_stored", str(mixed(traced("tied_embedding"), f"{PRUNE},cast-mixed{{store=true}}")))


@pytest.mark.parametrize("text", ["cast-mixed", "cast-mixed{store=true}", "cast-mixed{dtype=float16}"])
@pytest.mark.parametrize("name", ["mlp", "residual", "t5", "resnet"])
def test_running_twice_is_running_once(name: str, text: str) -> None:
    program = mixed(traced(name), text)
    before = str(program)
    (step,) = Recipe.of(text).passes
    again = step.run(program)
    assert not again.changed
    assert str(program) == before
    assert set(again.coverage.left_out.values()) == {
        f"runs in {'float16' if 'float16' in text else 'bfloat16'} already"
    }


def test_a_bfloat16_model_has_nothing_to_do() -> None:
    program = trace(MODELS["mlp"]().bfloat16(), torch.randn(4, 16).bfloat16(), check=False)
    before = str(program)
    assert not CastMixed().run(program).changed
    assert str(program) == before


def test_one_part_after_the_other_is_both_at_once() -> None:
    parts = mixed(traced("mlp"), "cast-mixed{select=[first]},cast-mixed{select=[second,head]}")
    together = mixed(traced("mlp"))
    (x,) = example("mlp") or ()
    assert not any(doubled(parts))
    assert relative(answer(together, x), answer(parts, x)) < ROUNDING["bfloat16"]
    stored = mixed(traced("mlp"), "cast-mixed,cast-mixed{store=true}")
    assert str(stored) == str(mixed(traced("mlp"), "cast-mixed{store=true}"))


def doubled(program: Program) -> list[fx.Node]:
    """Casts of casts, and second casts of one value to one dtype."""
    casts = [
        node
        for node in program.calls(aten.to.dtype)
        if dtypes_of(node) and dtypes_of(node.args[0])  # type: ignore[arg-type]
    ]
    twice = [node for node in casts if node.args[0] in casts]
    keys = [(node.args[0], dtypes_of(node)) for node in casts]
    return twice + [node for node, key in zip(casts, keys, strict=True) if keys.count(key) > 1]


# -- numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "store"),
    [(False, True), (True, False), *(pytest.param(both, both, marks=pytest.mark.slow) for both in (False, True))],
)
@pytest.mark.parametrize("name", MODELS)
def test_dtypes_are_those_that_the_graph_shows(name: str, train: bool, store: bool) -> None:
    program = traced(name, labels=name not in PLAIN)
    program = mixed(program, f"cast-mixed{{store={str(store).lower()}}}").train(train)
    seen = recorded(program, make_inputs(program)[0])
    narrow = 0
    for node, dtype in seen.items():
        assert (dtype,) == dtypes_of(node), node.format_node()
        operands = {seen[used] for used in node.all_input_nodes if used in seen}
        if name_of(node) in PRODUCTS:
            narrow += 1
            assert {dtype, *operands} == {torch.bfloat16}
        elif name_of(node) in ALWAYS_WIDE or name_of(node) not in FOLLOWERS | {"embedding", "to", ""}:
            assert {dtype, *operands} == {torch.float32}, node.format_node()
        elif name_of(node) in FOLLOWERS:
            assert operands == {dtype}, node.format_node()
    assert narrow
    assert not doubled(program)
    leaves = [leaf for leaf in program.output.all_input_nodes if leaf in seen]
    assert {seen[leaf] for leaf in leaves} == {torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_close_and_no_worse_than_under_autocast(name: str, dtype: str) -> None:
    model, program = pair(name, labels=name not in PLAIN)
    inputs = make_inputs(program)[0]
    want = tensors(run(program, inputs))
    with torch.autocast("cpu", DTYPES[dtype]):
        theirs = tensors(run(model, inputs))
    for text in (f"cast-mixed{{dtype={dtype}}}", f"cast-mixed{{dtype={dtype},store=true}}"):
        ours = tensors(run(mixed(program, text), inputs))
        for reference, have, other in zip(want, ours, theirs, strict=True):
            assert have.dtype is reference.dtype
            # some ten products in a row, each with three roundings of half a unit, add up like a random walk
            assert relative(reference, have) < 4 * ROUNDING[dtype]
            assert relative(reference, have) < 2 * relative(reference, other) + ROUNDING[dtype]


@pytest.mark.parametrize(
    "name",
    [
        "conv_bn",
        "residual",
        "attention",
        "bert_sequence",
        "gpt2",
        "llama",
        pytest.param("t5", marks=pytest.mark.slow),
        "resnet",
    ],
)
def test_gradients_reach_float32_weights(name: str) -> None:
    model, program = pair(name, labels=name not in PLAIN)
    inputs = make_inputs(program)[0]

    def gradients(candidate: nn.Module) -> dict[str, Tensor]:
        candidate.train()
        with NoDropout():  # type: ignore[no-untyped-call]
            output = candidate(**inputs)
        loss = getattr(output, "loss", None)
        (loss if loss is not None else output.square().mean()).backward()
        return {key: value.grad for key, value in candidate.named_parameters() if value.grad is not None}

    want, have = gradients(copy.deepcopy(program)), gradients(mixed(program))
    with torch.autocast("cpu", torch.bfloat16):
        other = gradients(model)
    assert set(want) == set(have)
    assert all(value.dtype is torch.float32 for value in have.values())
    exact, ours, theirs = (torch.cat([item[key].flatten() for key in want]) for item in (want, have, other))
    # a ReLU whose input rounds to the other side of zero switches a whole path, so layers count less than kinks
    assert relative(exact, ours) < max(8 * ROUNDING["bfloat16"], 1.5 * relative(exact, theirs))


def test_storing_changes_no_bit_and_halves_the_weights() -> None:
    for name in ("mlp", "attention", "gpt2_conv1d"):  # their casts stay where they were
        program, (x,) = traced(name), example(name) or ()
        cast, stored = mixed(program), mixed(program, "cast-mixed{store=true}")
        assert torch.equal(answer(cast, x), answer(stored, x))
    size = [sum(item.numel() * item.element_size() for item in item.parameters()) for item in (cast, stored)]
    assert size[0] == 2 * size[1]


def test_tables_are_stored_and_tied_weights_stay_tied() -> None:
    program = mixed(traced("gpt2"), "cast-mixed{store=true}")
    assert program.get_parameter("lm_head.weight") is program.get_parameter("transformer.wte.weight")
    assert program.tensor("transformer.wte.weight").dtype is torch.bfloat16
    assert program.tensor("transformer.ln_f.weight").dtype is torch.float32
    result = CastMixed(store=True, exclude=("*wte*",)).run(traced("gpt2"))
    assert result.coverage.left_out["transformer.wte.weight"] == "excluded by name"
    assert "transformer.wpe.weight" in result.coverage.matched
    result = CastMixed(store=True, ops=("embedding",)).run(traced("gpt2"))
    assert result.coverage.matched == ("transformer.wpe.weight",)


def test_a_net_trains() -> None:
    torch.manual_seed(0)
    program = mixed(traced("conv_bn")).train()
    optimizer = torch.optim.Adam(program.parameters(), lr=0.01)
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(program(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3


def test_rows_that_see_nothing_stay_finite() -> None:
    """T5 adds the lowest float32 to hidden positions; in 16 bits that would be -inf."""
    for dtype in DTYPES:
        program = mixed(traced("t5"), f"cast-mixed{{dtype={dtype}}}")
        inputs = make_inputs(program)[0]
        inputs["attention_mask"][0] = 0
        assert all(bool(torch.isfinite(item).all()) for item in tensors(run(program, inputs)))


def test_the_program_still_follows_to() -> None:
    program = mixed(traced("residual"))
    (x,) = example("residual") or ()
    want = answer(program, x)
    wide = answer(copy.deepcopy(program).double(), x.double())
    assert wide.dtype is torch.float64
    assert relative(want, wide) < ROUNDING["bfloat16"]
    assert answer(copy.deepcopy(program).bfloat16(), x.bfloat16()).dtype is torch.bfloat16


class InPlace(nn.Module):
    """Values that are changed in place: one that nobody else reads, and one that is read afterwards through a view."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.third(F.relu_(self.first(x))))
        y = self.second(x)
        seen = y.view(-1, 2, 4)
        before = self.third(y)
        y.add_(1.0)
        return self.third(y) + before + seen.flatten(1)


def test_values_that_change_in_place() -> None:
    model, x = InPlace(), torch.randn(3, 8)
    program = trace(model, x)
    result = CastMixed().run(program)
    assert result.coverage.left_out == {"second.weight": "its result is changed in place and read afterwards"}
    assert relative(answer(model, x), answer(program, x)) < 2 * ROUNDING["bfloat16"]
    assert [node for node in program.calls(aten.relu_.default) if dtypes_of(node) == (torch.bfloat16,)]


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.scale = nn.Linear(8, 8), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x) * self.scale
        x = self.body(x / 3.0)
        return (x * labels.unsqueeze(1)).sum(), x


def test_losses_are_float32_and_scales_follow() -> None:
    program = mixed(trace(OwnLoss(), (torch.randn(3, 8), torch.arange(3))))
    products = [dtypes_of(node)[0] for node in program.calls(aten.mul.Tensor)]
    assert products == [torch.bfloat16, torch.float32]
    assert [dtypes_of(node)[0] for node in program.calls(aten.div.Tensor)] == [torch.bfloat16]


# -- options --------------------------------------------------------------------------------------------------------------


def test_choosing() -> None:
    result = CastMixed(select=("bert.encoder.layer.0.*",), exclude=("*.query",)).run(traced("bert_qa"))
    matched = result.coverage.matched
    assert "bert.encoder.layer.0.attention.self.scaled_dot_product_attention" in matched
    assert "bert.encoder.layer.0.attention.self.key.weight" in matched
    assert result.coverage.left_out["bert.encoder.layer.0.attention.self.query.weight"] == "excluded by name"
    assert result.coverage.left_out["bert.encoder.layer.1.output.dense.weight"] == "not selected"
    result = CastMixed(ops=("linear",)).run(traced("bert_qa"))
    reason = result.coverage.left_out["bert.encoder.layer.1.attention.self.scaled_dot_product_attention"]
    assert reason == "operator scaled_dot_product_attention is not among ops"


def test_keeping() -> None:
    program = traced("attention")
    result = CastMixed(keep=("scaled_dot_product_attention", "gelu")).run(program)
    assert any("is among keep" in reason for reason in result.coverage.left_out.values())
    for node in program.calls(aten.gelu.default, aten.scaled_dot_product_attention.default):
        assert dtypes_of(node) == (torch.float32,)
    for node in program.calls(aten.linear.default):
        assert dtypes_of(node) == (torch.bfloat16,)


def test_unknown_options() -> None:
    with pytest.raises(PassError, match="dtype='bfloat' is no 16-bit float format; did you mean 'bfloat16'"):
        CastMixed(dtype="bfloat")
    with pytest.raises(RecipeError, match="keep: 'layer_norm' is no operator that could run in 16 bits"):
        CastMixed(keep=("layer_norm",)).run(traced("mlp"))
    with pytest.raises(RecipeError, match=r"ops: 'linaer' .*did you mean 'linear'"):
        CastMixed(ops=("linaer",)).run(traced("mlp"))


def test_other_dtypes_are_refused() -> None:
    wide = trace(MODELS["mlp"]().double(), torch.randn(4, 16, dtype=torch.float64), check=False)
    with pytest.raises(PassError, match=r"x is torch.float64; mixed precision starts from float32"):
        CastMixed().run(wide)
    with pytest.raises(PassError, match=r"first.weight is torch.float64 and was traced as torch.float32"):
        CastMixed().run(traced("mlp").double())


def test_nothing_matched() -> None:
    with pytest.raises(RecipeError, match="select: 'haed' matches no product; did you mean 'head'"):
        CastMixed(select=("haed",)).run(traced("mlp"))
    with pytest.raises(PassError, match="nothing is left to run in bfloat16: operator linear is not among ops"):
        CastMixed(ops=("conv2d",)).run(traced("mlp"))
    with pytest.raises(PassError, match="the model has no matrix products"):
        CastMixed().run(trace(nn.LayerNorm(4), torch.randn(2, 4)))
    with pytest.raises(PassError, match="nothing is left to run in float16: runs in bfloat16 already"):
        CastMixed(dtype="float16").run(mixed(traced("mlp")))


def test_weights_beyond_the_format() -> None:
    program = traced("mlp")
    with torch.no_grad():
        program.tensor("second.weight")[0, 0] = 1e5
    with pytest.raises(PassError, match=r"second.weight has entries that are not finite in torch.float16"):
        CastMixed(dtype="float16", store=True).run(copy.deepcopy(program))
    assert CastMixed(store=True).run(program).stats["weights-stored"] == 6


# -- properties -----------------------------------------------------------------------------------------------------------

operators = st.lists(st.sampled_from(sorted(PRODUCTS | FOLLOWERS)), max_size=4, unique=True).map(tuple)
texts = st.lists(st.text(min_size=1, max_size=8), max_size=2).map(tuple)


@given(
    dtype=st.sampled_from(sorted(DTYPES)), keep=texts, store=st.booleans(), select=texts, exclude=texts,
    ops=st.lists(st.sampled_from(sorted(PRODUCTS)), max_size=2).map(tuple),
)  # fmt: skip
def test_text_reads_back(**options: object) -> None:
    step = CastMixed(**options)  # type: ignore[arg-type]
    assert Recipe.of(str(step)).passes == (step,)


@given(
    name=st.sampled_from(["residual", "attention", "conv_bn", "tied_embedding", "gpt2_conv1d", "grouped_conv"]),
    dtype=st.sampled_from(sorted(DTYPES)),
    keep=operators,
    store=st.booleans(),
)
def test_any_choice_of_operators_is_consistent(name: str, dtype: str, keep: tuple[str, ...], store: bool) -> None:
    program = traced(name)
    (x,) = example(name) or ()
    want = answer(program, x)
    step = CastMixed(dtype=dtype, keep=keep, store=store)
    candidates = {name_of(node) for node in program.graph.nodes} & PRODUCTS
    if candidates <= set(keep):
        with pytest.raises(PassError, match="nothing is left"):
            step.run(program)
        return
    step.run(program)
    assert not doubled(program)
    assert all((seen,) == dtypes_of(node) for node, seen in recorded(program, {program.interface.names[0]: x}).items())
    assert relative(want, answer(program, x)) < 4 * ROUNDING[dtype]
    text = str(program)
    assert not step.run(program).changed
    assert str(program) == text
