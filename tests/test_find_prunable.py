"""find-prunable: annotations on prunable weights, and reasons for the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.ir.selection import Prunable
from graphprune.passes import FindPrunable, InsertMasks
from graphprune.pipeline.recipe import Recipe
from tests.models import example
from tests.traced import answer, run_passes, traced

Golden = Callable[[str, str], None]


def annotated(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if program.annotation(node, Prunable) is not None]


def test_golden(golden: Golden) -> None:
    program = traced("residual")
    golden("find_prunable_before", str(program))
    program = run_passes(program, "find-prunable")
    golden("find_prunable_after", str(program))
    assert annotated(program) == [f"{name}.weight" for name in ("stem", "branch1", "branch2")]


def test_running_twice_is_running_once() -> None:
    program = traced("mlp")
    assert FindPrunable().run(program).changed
    text = str(program)
    again = FindPrunable().run(program)
    assert not again.changed
    assert str(again.program) == text
    assert annotated(program) == ["first.weight", "second.weight"]


def test_a_second_run_replaces_the_first() -> None:
    program = traced("mlp")
    FindPrunable().run(program)
    assert FindPrunable(select=("second",)).run(program).changed
    assert annotated(program) == ["second.weight"]


def test_outputs_are_bitwise_equal() -> None:
    program = traced("mlp")
    (x,) = example("mlp") or ()
    before = answer(program, x)
    assert torch.equal(answer(run_passes(program, "find-prunable"), x), before)


def test_coverage_names_everything_and_says_why() -> None:
    coverage = FindPrunable(exclude=("first",)).run(traced("mlp")).coverage
    assert coverage.matched == ("second.weight",)
    assert coverage.left_out["first.weight"] == "excluded by name"
    assert coverage.left_out["head.weight"].startswith("last layer before the output")
    tied = FindPrunable().run(traced("tied_embedding"))
    assert "embedding" in tied.coverage.left_out["embedding.weight"]
    assert FindPrunable(ops=("conv2d",)).run(traced("conv_bn")).coverage.matched == ("conv1.weight", "conv2.weight")


@pytest.mark.parametrize(
    ("options", "matched"),
    [
        ({"select": ("s*",)}, ["stem.weight"]),
        ({"select": ("branch?.weight",)}, ["branch1.weight", "branch2.weight"]),
        ({"select": ("re:^branch",), "exclude": ("branch2",)}, ["branch1.weight"]),
        ({"select": ("head",)}, ["head.weight"]),
        ({"include_last": True, "select": ("re:^(stem|head)$",)}, ["stem.weight", "head.weight"]),
    ],
)
def test_selection(options: dict[str, object], matched: list[str]) -> None:
    program = traced("residual")
    result = FindPrunable(**options).run(program)  # type: ignore[arg-type]
    assert list(result.coverage.matched) == matched == annotated(program)
    assert result.stats["sites"] == len(matched)


def test_insert_masks_takes_what_is_annotated() -> None:
    program = run_passes(traced("residual"), "find-prunable{select=stem},insert-masks{sparsity=0.5}")
    assert "stem.weight_mask" in program.state_dict()
    assert "branch1.weight_mask" not in program.state_dict()
    result = InsertMasks(select=("branch1",)).run(run_passes(traced("residual"), "find-prunable{select=stem}"))
    assert result.coverage.matched == ("branch1.weight",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": ("steam",)}, "select: 'steam' matches no site; did you mean 'stem'"),
        ({"exclude": ("branch3",)}, "exclude: 'branch3' matches no site; did you mean"),
        ({"select": ("re:(",)}, r"select: 're:\(' is no regular expression"),
        ({"ops": ("linaer",)}, "ops: unknown operator 'linaer'; did you mean 'linear'"),
        ({"ops": ("conv2d",)}, "no site is left to work on: operator linear is not among ops"),
        ({"exclude": ("*",)}, "no site is left to work on: excluded by name"),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        FindPrunable(**options).run(traced("residual"))  # type: ignore[arg-type]


texts = st.lists(st.text(min_size=1), max_size=3).map(tuple)


@given(select=texts, exclude=texts, ops=texts, include_last=st.booleans())
def test_text_reads_back(
    select: tuple[str, ...], exclude: tuple[str, ...], ops: tuple[str, ...], include_last: bool
) -> None:
    step = FindPrunable(select, exclude, ops, include_last)
    assert Recipe.of(str(step)).passes == (step,)
