"""lock-masks: the zeros that are there stay, and nothing else is pruned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graphprune as gp
from graphprune.errors import PassError, SparsityError
from graphprune.ir.masking import masked_sites, sparsity_of
from graphprune.ir.program import Program
from graphprune.sparsity import parse_pattern
from tests.traced import answer, run_passes, traced


def sparse(name: str = "mlp", pattern: str = "unstructured", share: float = 0.9) -> Program:
    """A Program whose weights were pruned somewhere else."""
    program = traced(name)
    return run_passes(
        program, f"insert-masks{{pattern={pattern},sparsity={share},criterion=magnitude,schedule=one-shot}},fold-masks"
    )


def test_golden(golden: Callable[[str, str], None]) -> None:
    program = sparse()
    golden("lock_masks_before", str(program))
    golden("lock_masks_after", str(run_passes(program, "lock-masks")))


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "2:4", "1x4", "channelx1"])
@pytest.mark.parametrize("name", ["mlp", "conv_bn", "gpt2_conv1d", "grouped_conv"])
def test_locks_exactly_the_zeros_and_changes_no_output(name: str, pattern: str) -> None:
    program = sparse(name, pattern, 0.5)
    zeros = {site: value.detach() == 0 for site, value in program.named_parameters()}
    inputs = program.interface.inputs[0]
    x = torch.randn(*[3 if isinstance(size, str) else size for size in inputs.shape])
    before = answer(program, x)
    locked = run_passes(program, f"lock-masks{{pattern={pattern}}}")
    for site in masked_sites(locked):
        assert torch.equal(~site.mask, zeros[site.name])
        assert site.pattern.holds(site.logical_mask)
    assert torch.equal(answer(locked, x), before)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_ninety_percent_unstructured_stay_exactly(optimizer: type[torch.optim.Optimizer]) -> None:
    program = run_passes(sparse(), "lock-masks").train()
    before = {site.name: site.weight.detach() == 0 for site in masked_sites(program)}
    steps = optimizer(program.parameters(), lr=0.05)
    session = gp.training.Session(program, steps, total_steps=10)
    for step in range(10):
        program(torch.randn(8, 16, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        steps.step()
        steps.zero_grad()
    assert session.done
    for site in masked_sites(program):
        assert torch.equal(site.weight == 0, before[site.name])


def test_a_unit_that_is_zero_in_part_may_train() -> None:
    program = traced("mlp")
    with torch.no_grad():
        weight = program.get_parameter("second.weight")
        weight[:4, 0] = 0.0
        weight[4:7, 0] = 0.0
    locked = run_passes(program, "lock-masks{pattern=4x1,select=[second]}")
    (site,) = masked_sites(locked)
    assert int((~site.mask).sum()) == 4
    assert not site.mask[:4, 0].any()


def test_saved_and_loaded(tmp_path: Path) -> None:
    program = run_passes(sparse(), "lock-masks")
    gp.save(program, tmp_path / "program")
    from tests.models import MODELS

    again = gp.load(tmp_path / "program", MODELS["mlp"]())
    assert sparsity_of(masked_sites(again)) == sparsity_of(masked_sites(program)) > 0.8
    assert str(again) == str(program)


def test_beside_insert_masks() -> None:
    program = sparse()
    both = run_passes(program, "lock-masks{select=[first]},insert-masks{select=[second],pattern=4x1}")
    assert {site.name: site.decision.locked for site in masked_sites(both)} == {
        "first.weight": True,
        "second.weight": False,
    }


@given(
    st.sampled_from(["unstructured", "4x1", "1x3", "2:4", "1:4", "channelx1", "1xchannel", "2xchannel"]),
    st.integers(0, 10_000),
    st.floats(0, 1),
)
def test_any_zeros_any_pattern(pattern: str, seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    zero = torch.rand(9, 10, generator=generator) < share
    kind = parse_pattern(pattern)
    kept = kind.locked(zero)
    assert kind.holds(kept)
    assert not (~kept & ~zero).any()  # nothing that is not zero is pruned
    assert torch.equal(kind.locked(~kept), kept)  # what holds the pattern is kept as it is


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "has zeros in pattern unstructured to lock"),
        ("{pattern=4y1}", "unknown sparsity pattern"),
        ("{select=[nothing]}", "matches no site"),
        ("{ragged=no}", "ragged='no' is unknown"),
    ],
)
def test_refusals(options: str, message: str) -> None:
    with pytest.raises(gp.GraphPruneError, match=message):
        gp.transform(traced("mlp"), f"lock-masks{options}")


def test_twice_is_refused() -> None:
    with pytest.raises((SparsityError, PassError), match="has a mask already"):
        run_passes(sparse(), "lock-masks,lock-masks")
