"""Every family of criteria in training: what is zero when, what survives a kill, and what is refused."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import graphprune as gp
from graphprune.errors import SparsityError
from graphprune.ir.masking import MaskedSite, masked_sites, sparsity_of
from graphprune.sparsity import CRITERIA
from tests.families import FAMILIES, STEPS, base, batch, objective, start, train

ROOT = Path(__file__).parents[1]
HOLDING = {"movement", "soft_movement", "block_mask", "retrain_free", "top_kast", "mixed"}


@pytest.fixture(scope="module")
def program() -> gp.Program:
    return base()


def test_every_criterion_has_a_family() -> None:
    assert set(CRITERIA) - set(FAMILIES) == {"wanda", "sparsegpt"}  # they prune once, see test_oneshot.py


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_weights_and_moments_are_zero_in_the_end(program: gp.Program, family: str) -> None:
    masked, optimizer, session = start(program, family)
    train(masked, optimizer, range(STEPS))
    assert session.done
    assert all(rule.reached for rule in session.report().rules)
    for site in masked_sites(masked):
        assert not site.mask.all()
        assert (site.weight[~site.mask] == 0).all()
        for value in optimizer.state[site.weight].values():
            if isinstance(value, Tensor) and value.shape == site.weight.shape:
                assert (value[~site.mask] == 0).all()
        assert site.pattern.holds(site.logical_mask)
    stored = {
        name: value.clone() for name, value in masked.named_parameters() if family != "l0"
    }  # its gates are folded
    fold = gp.transform(masked, "fold-masks")
    torch.testing.assert_close(fold.eval()(batch(0)), masked.eval()(batch(0)), rtol=0, atol=0)
    assert all(torch.equal(value, fold.get_parameter(name)) for name, value in stored.items())


@pytest.mark.parametrize("family", sorted(HOLDING - {"mixed"}))
def test_weights_are_held_under_the_mask_until_the_last_update(program: gp.Program, family: str) -> None:
    masked, optimizer, session = start(program, family)
    last = session.report().rules[0].last
    train(masked, optimizer, range(last))
    sites = masked_sites(masked)
    assert sparsity_of(sites) > 0
    held = [site.weight[~site.mask] for site in sites]
    assert all(bool((values != 0).any()) for values in held if len(values))
    masked.eval()
    output = masked(batch(3))
    with torch.no_grad():
        for site in sites:
            site.weight[~site.mask] += 1.0
    torch.testing.assert_close(masked(batch(3)), output, rtol=0, atol=0)  # what is held has no effect
    train(masked.train(), optimizer, range(last, STEPS))
    assert all((site.weight[~site.mask] == 0).all() for site in sites)


def test_a_held_weight_can_come_back(program: gp.Program) -> None:
    masked, optimizer, session = start(program, "movement")
    seen: list[Tensor] = []
    for step in range(STEPS):
        train(masked, optimizer, range(step, step + 1))
        seen.append(torch.cat([site.mask.flatten() for site in masked_sites(masked)]))
    assert any(bool((later & ~earlier).any()) for earlier, later in itertools.pairwise(seen))
    assert session.done


def test_retrain_free_leaves_the_weights_alone_until_it_has_chosen(program: gp.Program) -> None:
    masked, optimizer, session = start(program, "retrain_free")
    before = [site.weight.clone() for site in masked_sites(masked)]
    last = session.report().rules[0].last
    train(masked, optimizer, range(last))
    assert all(torch.equal(site.weight, old) for site, old in zip(masked_sites(masked), before, strict=True))


def test_rigl_drops_grows_and_keeps_its_size(program: gp.Program) -> None:
    masked, optimizer, _ = start(program, "rigl")
    train(masked, optimizer, range(1))
    sites = masked_sites(masked)
    sizes = [int(site.mask.sum()) for site in sites]
    before = [site.mask.clone() for site in sites]
    train(masked, optimizer, range(1, 4))
    assert [int(site.mask.sum()) for site in sites] == sizes
    moved = [bool((site.mask & ~old).any()) for site, old in zip(sites, before, strict=True)]
    assert any(moved)


def test_rigl_grows_where_the_dense_gradient_is_largest(program: gp.Program) -> None:
    masked = gp.transform(program, FAMILIES["rigl"]).eval()
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.0)
    session = gp.training.Session(masked, optimizer, total_steps=STEPS)
    train(masked, optimizer, range(1))
    site = masked_sites(masked)[0]
    old = site.mask.clone()
    for step in (1, 2):
        train(masked, optimizer, range(step, step + 1))
    objective(masked(batch(3))).backward()
    assert site.weight.grad is not None
    gradient = site.weight.grad.clone()
    assert bool((gradient[~old] != 0).any())
    optimizer.step()
    grown, stayed_out = site.mask & ~old, ~site.mask & ~old
    assert session.step == 4
    assert grown.any()
    assert gradient[grown].abs().min() >= gradient[stayed_out].abs().max()
    assert (site.weight[grown] == 0).all()


def test_top_kast_trains_the_backward_set_only(program: gp.Program) -> None:
    masked, optimizer, _ = start(program, "top_kast", torch.optim.SGD)
    train(masked, optimizer, range(1))
    site = masked_sites(masked)[0]
    before = site.weight.clone()
    train(masked, optimizer, range(1, 2))
    changed = site.weight != before
    assert bool((changed & ~site.mask).any())
    ranked = before.abs().flatten().sort().values
    threshold = ranked[int(0.5 * ranked.numel())]
    assert (before.abs()[changed] >= threshold).all()


def test_acdc_alternates(program: gp.Program) -> None:
    masked, optimizer, session = start(program, "acdc")
    seen = []
    for step in range(STEPS):
        train(masked, optimizer, range(step, step + 1))
        seen.append(round(session.sparsity, 2))
    assert {0.0, 0.75} == set(seen)
    assert seen[0] == 0.0
    assert seen[-1] == 0.75
    assert sum(first != second for first, second in itertools.pairwise(seen)) >= 3


def test_progressive_goes_in_parts_and_whole_blocks(program: gp.Program) -> None:
    masked, optimizer, session = start(program, "progressive")
    seen = []
    for step in range(STEPS):
        train(masked, optimizer, range(step, step + 1))
        seen.append(session.sparsity)
        for site in masked_sites(masked):
            assert site.pattern.holds(site.logical_mask)
    steps = [later - earlier for earlier, later in itertools.pairwise(seen)]
    assert all(step >= -1e-9 for step in steps)
    assert sum(step > 0 for step in steps) >= 5  # three updates alone would give three
    assert max(steps) < 0.4


def test_group_lasso_shrinks_units_and_stays_finite(program: gp.Program) -> None:
    norms = {}
    for regularizer in ("none", '"group_lasso(strength=0.05)"'):
        masked = gp.transform(
            program,
            f"insert-masks{{criterion=magnitude,sparsity=0.5,warm_up=0.8,cool_down=0,regularizer={regularizer}}}",
        )
        with torch.no_grad():
            masked_sites(masked)[0].weight[:4] = 0.0  # a dead unit has norm zero
        optimizer = torch.optim.SGD(masked.parameters(), lr=0.05)
        session = gp.training.Session(masked, optimizer, total_steps=STEPS)
        train(masked, optimizer, range(8))
        session.close()
        assert all(bool(torch.isfinite(value).all()) for value in masked.parameters())
        norms[regularizer] = float(masked_sites(masked)[1].weight.detach().norm())
    assert min(norms, key=lambda name: norms[name]) != "none"


@pytest.mark.slow
def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    """kill -9 in the middle and resume: bit-identical weights and masks for every family of criteria."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    codes = {}
    for mode in ("whole", "break", "resume"):
        command = [sys.executable, "-m", "tests.families", str(tmp_path), mode]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
        codes[mode] = done.returncode
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    assert codes == {"whole": 0, "break": -signal.SIGKILL, "resume": 0}
    for family in FAMILIES:
        want = torch.load(tmp_path / f"{family}-whole.pt", weights_only=True)
        have = torch.load(tmp_path / f"{family}-resume.pt", weights_only=True)
        assert want.keys() == have.keys()
        assert any(name.endswith("_mask") for name in want)
        for name in want:
            assert torch.equal(want[name], have[name]), (family, name)


def test_a_second_session_on_a_program_is_refused(program: gp.Program) -> None:
    masked, optimizer, session = start(program, "magnitude")
    with pytest.raises(SparsityError, match="another session drives this Program"):
        gp.training.Session(masked, optimizer, total_steps=STEPS)
    session.close()
    gp.training.Session(masked, optimizer, total_steps=STEPS)


def test_training_past_the_session_is_noticed(program: gp.Program) -> None:
    masked, _, session = start(program, "magnitude")
    other = torch.optim.SGD(masked.parameters(), lr=0.01)
    with pytest.raises(SparsityError, match="the optimizer that the session was given does not step"):
        train(masked, other, range(6))
    assert session.step == 0


def test_a_report_counts_what_was_left_out(program: gp.Program) -> None:
    masked = gp.transform(program, FAMILIES["snip_momentum"])
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.01)
    session = gp.training.Session(masked, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        objective(masked(batch(step))).backward()
        if step == 5:
            with torch.no_grad():
                before = [value.clone() for value in masked.parameters()]
                masked_sites(masked)[0].weight.grad[0, 0] = float("inf")
                optimizer.step()
                for value, old in zip(masked.parameters(), before, strict=True):
                    value.copy_(old)
        else:
            optimizer.step()
        optimizer.zero_grad()
    report = session.report()
    assert report.skipped == 1
    assert "1 steps had NaN or infinite gradients" in str(report)
    assert "rule 0: 4x1 by snip_momentum on 2 sites, sparsity 0.7500 of 0.7500" in str(report)


def test_a_frozen_masked_weight_is_reported(program: gp.Program) -> None:
    masked = gp.transform(program, FAMILIES["magnitude"])
    masked.get_parameter("first.weight").requires_grad_(False)
    optimizer = torch.optim.SGD([item for item in masked.parameters() if item.requires_grad], lr=0.01)
    session = gp.training.Session(masked, optimizer, total_steps=STEPS)
    assert "first.weight" in str(session.report())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("progressive=4,frequency=3", "frequency to at least 4"),
        ("progressive=4,frequency=10,pattern=unstructured", "none to divide"),
        ("progressive=4,schedule=one-shot", "only one"),
        ("progressive=-1", "negative"),
        ("criterion=wanda,schedule=one-shot", "scope=local"),
        ("criterion=sparsegpt,scope=local", "schedule=one-shot"),
        ("criterion=block_mask,pattern=2:4,sparsity=0.5", "has none"),
        ("criterion=retrain_free", "whole channels"),
        ('targets=["first=0.5"]', "scope=local"),
        ('targets=["first"],scope=local', "name=sparsity"),
        ('targets=["nothing=0.5"],scope=local', "matches no site"),
        ("warm_up=10,end=5", "comes before"),
        ('warm_up="1 week"', "no length of training"),
        ("regularizer=lasso", "unknown regularizer"),
        ("pattern=64x64", "fits none"),
        ("pattern=2:4,sparsity=0.9", "cannot reach"),
    ],
)
def test_bad_rules_are_refused(program: gp.Program, options: str, message: str) -> None:
    with pytest.raises(gp.GraphPruneError, match=message):
        gp.transform(program, f"insert-masks{{{options}}}")


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("insert-masks{progressive=4,frequency=0.1}", "do not fit"),
        ('insert-masks{warm_up="1 epoch"}', "steps_per_epoch"),
        ('insert-masks{criterion="obs(samples=2)"}', "GradientSampler"),
        ("insert-masks{warm_up=20}", "leave nothing"),
        ("insert-masks{criterion=wanda,schedule=one-shot,scope=local}", "oneshot.prune"),
    ],
)
def test_what_a_session_refuses(program: gp.Program, pipeline: str, message: str) -> None:
    masked = gp.transform(program, pipeline)
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.01)
    with pytest.raises(SparsityError, match=message):
        gp.training.Session(masked, optimizer, total_steps=STEPS)


def test_targets_of_single_sites(program: gp.Program) -> None:
    masked = gp.transform(
        program, 'insert-masks{scope=local,sparsity=0.5,targets=["first=0.25","re:seco=0.75"],warm_up=0,cool_down=0}'
    )
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.01)
    session = gp.training.Session(masked, optimizer, total_steps=STEPS)
    train(masked, optimizer, range(STEPS))
    found = {site.name: sparsity_of([site]) for site in masked_sites(masked)}
    assert found == {"first.weight": 0.25, "second.weight": 0.75}
    assert session.done


def test_epochs_need_their_length(program: gp.Program) -> None:
    masked = gp.transform(program, 'insert-masks{warm_up="0.5 epochs",cool_down="1 epoch",frequency=1}')
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.01)
    session = gp.training.Session(masked, optimizer, total_steps=12, steps_per_epoch=4)
    assert (session.report().rules[0].first, session.report().rules[0].last) == (2, 7)


def _site(program: gp.Program, name: str) -> MaskedSite:
    return next(site for site in masked_sites(program) if site.name == name)


def test_neurons_go_in_both_layers(program: gp.Program) -> None:
    masked, optimizer, _ = start(program, "neuron")
    train(masked, optimizer, range(STEPS))
    rows = _site(masked, "first.weight").mask.any(1)
    columns = _site(masked, "second.weight").mask.any(0)
    assert torch.equal(rows, columns)
    assert int(rows.sum()) == 16
