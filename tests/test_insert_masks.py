"""insert-masks: mask operators and the decisions on them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.errors import RecipeError, SparsityError
from graphprune.ir import ops
from graphprune.ir.masking import Masking, masked_sites, sparsity_of
from graphprune.ir.program import Program
from graphprune.ir.trace import trace
from graphprune.ir.verifier import verify
from graphprune.passes import InsertMasks
from graphprune.pipeline.recipe import Recipe
from graphprune.sparsity.patterns import parse_pattern
from tests.models import example
from tests.traced import answer, run_passes, traced

Golden = Callable[[str, str], None]
ONE_SHOT = "insert-masks{schedule=one-shot,criterion=magnitude,sparsity=0.5}"


def test_golden(golden: Golden) -> None:
    program = traced("mlp")
    golden("insert_masks_before", str(program))
    golden("insert_masks_after", str(run_passes(program, "insert-masks{pattern=2:4,sparsity=0.5}")))


def test_golden_one_shot_on_convolutions(golden: Golden) -> None:
    program = traced("conv_bn")
    golden("insert_masks_one_shot_before", str(program))
    golden("insert_masks_one_shot_after", str(run_passes(program, ONE_SHOT)))


def test_a_second_rule_on_one_site_is_refused() -> None:
    program = run_passes(traced("mlp"), "insert-masks")
    text = str(program)
    message = r"first\.weight has a mask already, from rule 0 \(insert-masks, 4x1\); rule 1 .*two rules on one site"
    with pytest.raises(SparsityError, match=message):
        InsertMasks().run(program)
    assert str(program) == text
    run_passes(program, "insert-masks{select=head}")
    assert [site.decision.rule for site in masked_sites(program)] == [0, 0, 1]


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "gpt2_conv1d", "shared_weight", "grouped_conv", "attention"])
def test_masks_of_a_gradual_schedule_change_nothing_at_first(name: str) -> None:
    program = traced(name)
    inputs = example(name) or ()
    before = answer(program, *inputs)
    run_passes(program, "insert-masks{ragged=pad}")
    assert torch.equal(answer(program, *inputs), before)
    assert all(bool(site.mask.all()) for site in masked_sites(program))


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "gpt2_conv1d", "shared_weight", "grouped_conv"])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "channelx1", "2:4"])
def test_one_shot_masks_reach_their_sparsity(name: str, pattern: str) -> None:
    options = f"schedule=one-shot,criterion=magnitude,sparsity=0.4,pattern={pattern},ragged=pad"
    program = run_passes(traced(name), f"insert-masks{{{options}}}")
    sites = masked_sites(program)
    assert sparsity_of(sites) == pytest.approx(0.4, abs=0.05)
    for site in sites:
        assert site.pattern.holds(site.logical_mask)


def test_masked_outputs_equal_those_of_a_masked_model() -> None:
    program = traced("conv_bn")
    (x,) = example("conv_bn") or ()
    run_passes(program, ONE_SHOT)
    have = answer(program, x)
    by_hand = traced("conv_bn")
    with torch.no_grad():
        for site in masked_sites(program):
            by_hand.tensor(site.name).mul_(site.mask)
    assert torch.equal(have, answer(by_hand, x))


def test_a_tied_weight_has_one_mask_for_all_its_uses() -> None:
    program = run_passes(traced("shared_weight"), ONE_SHOT)
    (site,) = masked_sites(program)
    assert site.name == "body.weight"
    assert len(site.node.users) == 3
    assert program.attribute("body.weight").users.keys() == {site.node}  # type: ignore[union-attr]


def test_gradients_stop_at_pruned_entries_unless_the_criterion_wants_them() -> None:
    for criterion, dense in (("magnitude", False), ("snip_momentum", True)):
        program = traced("mlp")
        run_passes(program, f"insert-masks{{criterion={criterion},sparsity=0.5}}")
        (first, *_) = masked_sites(program)
        with torch.no_grad():
            first.mask[:, ::2] = False
        program(*(example("mlp") or ())).square().sum().backward()
        assert first.weight.grad is not None
        pruned = first.weight.grad[:, ::2]
        assert bool(pruned.any()) is (dense and first.node.args[-1] is True)


def test_decision_holds_the_options() -> None:
    program = run_passes(
        traced("mlp"), "insert-masks{pattern=8x1,sparsity=0.7,warm_up=3,cool_down=0.1,frequency=5,scope=local}"
    )
    decision = masked_sites(program)[0].decision
    assert decision == Masking(
        "8x1",
        0.7,
        0.7,
        schedule="cubic",
        scope="local",
        warm_up=3,
        cool_down=0.1,
        frequency=5,
        criterion="snip_momentum",
    )


def test_masks_go_under_fake_quantizers() -> None:
    program = run_passes(traced("mlp"), f"insert-fake-quant,{ONE_SHOT}")
    for node in program.calls(ops.mask):
        assert {user.target for user in node.users} == {ops.fake_quantize, ops.observe}


def test_masks_survive_a_copy_and_a_change_of_dtype() -> None:
    program = run_passes(traced("mlp"), ONE_SHOT).to(torch.bfloat16)
    assert masked_sites(program)[0].mask.dtype is torch.bool
    verify(program)
    assert answer(program, torch.randn(3, 16).to(torch.bfloat16)).dtype is torch.bfloat16


class Matrix(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.layer = nn.Linear(columns, rows)
        self.head = nn.Linear(rows, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.layer(x)))


def matrix(rows: int, columns: int) -> Program:
    torch.manual_seed(0)
    return trace(Matrix(rows, columns), torch.randn(2, columns), check=False).eval()


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(2, 13),
    columns=st.integers(2, 13),
    pattern=st.sampled_from(["unstructured", "4x1", "1x4", "2x2", "2:4", "1:4", "channelx1", "1xchannel"]),
    ragged=st.sampled_from(["skip", "pad"]),
)
def test_shapes_that_the_pattern_does_not_divide(rows: int, columns: int, pattern: str, ragged: str) -> None:
    program = matrix(rows, columns)
    step = InsertMasks(pattern, 0.25, "magnitude", "one-shot", ragged=ragged)
    known = parse_pattern(pattern)
    if ragged == "skip" and known.misfit((rows, columns)) is not None:
        with pytest.raises(SparsityError, match="fits none of 1 sites"):
            step.run(program)
        return
    if known.max_sparsity((rows, columns)) < 0.25:
        with pytest.raises(SparsityError, match=r"cannot reach sparsity 0\.25"):
            step.run(program)
        return
    result = step.run(program)
    verify(program)
    (site,) = masked_sites(program)
    assert result.coverage.matched == ("layer.weight",)
    assert site.mask.shape == (rows, columns)
    assert site.pattern.holds(site.logical_mask)


def test_what_does_not_divide_is_left_dense_and_reported() -> None:
    program = traced("conv_bn")  # conv1 is [8, 27]
    result = InsertMasks("1x4", 0.5).run(program)
    assert result.coverage.matched == ("conv2.weight",)
    assert "set ragged=pad" in result.coverage.left_out["conv1.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 80.0}, r"sparsity=80.0 is not in \[0, 1\); it is a fraction, 0.8 for 80 percent"),
        ({"sparsity": 1.0}, r"is not in \[0, 1\)"),
        ({"sparsity": -0.1}, r"is not in \[0, 1\)"),
        ({"sparsity": float("nan")}, r"is not in \[0, 1\)"),
        ({"scope": "globl"}, "scope='globl' is unknown; did you mean 'global'"),
        ({"ragged": "cut"}, "ragged='cut' is unknown"),
        ({"min_sparsity": 0.9}, r"sparsity=0.8 lies outside \[min_sparsity, max_sparsity\]"),
        ({"min_sparsity": 0.9, "max_sparsity": 0.5}, r"0 <= min_sparsity \(0.9\) <= max_sparsity \(0.5\)"),
        ({"frequency": 0}, "frequency=0 is below 1"),
        ({"warm_up": 1.5}, "warm_up=1.5 is no length of training"),
        ({"cool_down": -1}, "cool_down=-1 is no length of training"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(SparsityError, match=message):
        InsertMasks(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("pattern", "4y1", "4y1"),
        ("criterion", "magnitud", "magnitude"),
        ("schedule", "cubik", "cubic"),
    ],
)
def test_unknown_words_are_named(option: str, value: str, message: str) -> None:
    with pytest.raises((SparsityError, RecipeError), match=message):
        InsertMasks(**{option: value})  # type: ignore[arg-type]


def test_a_sparsity_that_the_pattern_cannot_reach() -> None:
    with pytest.raises(SparsityError, match=r"pattern 2:4 cannot reach sparsity 0.9; its most is 0.5"):
        InsertMasks("2:4", 0.9).run(traced("mlp"))


def test_a_pattern_that_fits_nothing() -> None:
    with pytest.raises(SparsityError, match="pattern 64x1 fits none of 2 sites"):
        InsertMasks("64x1").run(traced("mlp"))


def test_a_site_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match="select: 'frist' matches no site; did you mean 'first'"):
        InsertMasks(select=("frist",)).run(traced("mlp"))


fractions = st.floats(0, 0.99)
names = st.lists(st.text(min_size=1, max_size=8), max_size=2).map(tuple)


@given(
    pattern=st.sampled_from(["4x1", "2:4", "unstructured", "channelx1"]),
    sparsity=st.floats(0, 0.98),
    criterion=st.sampled_from(["magnitude", "snip_momentum"]),
    schedule=st.sampled_from(["cubic", "linear", "one-shot", "cosine"]),
    scope=st.sampled_from(["global", "local"]),
    warm_up=st.one_of(st.integers(0, 10**6), fractions),
    cool_down=st.one_of(st.integers(0, 10**6), fractions),
    frequency=st.integers(1, 10**6),
    ragged=st.sampled_from(["skip", "pad"]),
    select=names,
    exclude=names,
    include_last=st.booleans(),
)
def test_text_reads_back(**options: object) -> None:
    step = InsertMasks(**options)  # type: ignore[arg-type]
    (again,) = Recipe.of(str(step)).passes
    assert again == step
    assert type(again.warm_up) is type(step.warm_up)  # type: ignore[attr-defined]
