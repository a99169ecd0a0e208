"""A session's state: what is resumed, copied, averaged and logged, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import graphprune as gp
from graphprune.ir.masking import masked_sites
from graphprune.training.randomness import random_state, set_random_state
from tests.session_net import batch, masked, traced_net, train


@pytest.fixture(scope="module")
def traced() -> gp.Program:
    return traced_net()


def test_kill_and_resume_is_bit_identical(traced: gp.Program, tmp_path: Path) -> None:
    def start() -> tuple[gp.Program, torch.optim.Optimizer, gp.training.Session]:
        program = masked(traced)
        optimizer = torch.optim.AdamW(program.parameters(), lr=0.01)
        return program, optimizer, gp.training.Session(program, optimizer, total_steps=20)

    whole, whole_optimizer, _session = start()
    train(whole, whole_optimizer, range(20))
    first, first_optimizer, session = start()
    train(first, first_optimizer, range(7))
    state = {"program": first.state_dict(), "optimizer": first_optimizer.state_dict(), "session": session.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    second, second_optimizer, resumed = start()
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(loaded["program"])
    second_optimizer.load_state_dict(loaded["optimizer"])
    resumed.load_state_dict(loaded["session"])
    train(second, second_optimizer, range(7, 20))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_random_state_round_trip() -> None:
    import random

    import numpy as np

    state = random_state()
    drawn = random.random(), np.random.rand(), torch.rand(1)
    set_random_state(state)
    assert (random.random(), np.random.rand(), torch.rand(1)) == drawn


def test_masks_at_their_target_stay_in_a_later_session(traced: gp.Program) -> None:
    program = masked(traced)
    optimizer = torch.optim.SGD(program.parameters(), lr=0.01)
    session = gp.training.Session(program, optimizer, total_steps=20)
    train(program, optimizer, range(20))
    session.close()
    before = [site.mask.clone() for site in masked_sites(program)]
    optimizer = torch.optim.AdamW(program.parameters(), lr=0.01)
    later = gp.training.Session(program, optimizer, total_steps=10)
    train(program, optimizer, range(10))
    assert later.done
    assert all(torch.equal(site.mask, mask) for site, mask in zip(masked_sites(program), before, strict=True))
    assert all((site.weight[~site.mask] == 0).all() for site in masked_sites(program))


def test_log_has_step_sparsity_and_loss(traced: gp.Program, tmp_path: Path) -> None:
    program = masked(traced)
    optimizer = torch.optim.SGD(program.parameters(), lr=0.01)
    session = gp.training.Session(program, optimizer, total_steps=20, log=tmp_path / "log.jsonl")
    session.record(loss=torch.tensor(2.5))
    train(program, optimizer, range(20))
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == list(range(20))
    assert entries[0]["loss"] == 2.5
    assert entries[-1]["sparsity"] == pytest.approx(0.75, abs=1e-3)


def test_a_resumed_run_takes_back_what_a_killed_one_logged(traced: gp.Program, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    program = masked(traced)
    optimizer = torch.optim.SGD(program.parameters(), lr=0.01)
    session = gp.training.Session(program, optimizer, total_steps=20, log=log)
    train(program, optimizer, range(5))
    state = session.state_dict()
    train(program, optimizer, range(5, 9))
    session.close()
    resumed = gp.training.Session(program, optimizer, total_steps=20, log=log)
    resumed.load_state_dict(state)
    train(program, optimizer, range(5, 20))
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(20))


def test_deepcopy_of_a_program_in_training_is_independent(traced: gp.Program) -> None:
    program = masked(traced)
    optimizer = torch.optim.SGD(program.parameters(), lr=0.01)
    gp_session = gp.training.Session(program, optimizer, total_steps=20)
    train(program, optimizer, range(4))
    clone = copy.deepcopy(program)
    kept = [site.mask.clone() for site in masked_sites(clone)]
    train(program, optimizer, range(4, 20))
    assert gp_session.done
    assert all(torch.equal(site.mask, mask) for site, mask in zip(masked_sites(clone), kept, strict=True))


def test_an_average_of_weights_keeps_the_masks(traced: gp.Program) -> None:
    program = masked(traced)
    optimizer = torch.optim.AdamW(program.parameters(), lr=0.05)
    session = gp.training.Session(program, optimizer, total_steps=20)
    average = torch.optim.swa_utils.AveragedModel(program, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for step in range(20):
        train(program, optimizer, range(step, step + 1))
        average.update_parameters(program)
    assert session.done
    shadow = average.module
    assert isinstance(shadow, gp.Program)
    for mine, theirs in zip(masked_sites(program), masked_sites(shadow), strict=True):
        assert torch.equal(mine.mask, theirs.mask)
        assert (theirs.weight[~theirs.mask] != 0).any()  # the average still remembers them ...
    folded = gp.transform(shadow, "fold-masks")
    torch.testing.assert_close(folded.eval()(batch(0)), shadow.eval()(batch(0)), rtol=0, atol=0)
    for site in masked_sites(program):
        assert (folded.get_parameter(site.name)[~site.mask] == 0).all()  # ... and what is used of it does not


def test_a_state_that_does_not_fit_is_refused(traced: gp.Program) -> None:
    program = masked(traced)
    optimizer = torch.optim.SGD(program.parameters(), lr=0.01)
    session = gp.training.Session(program, optimizer, total_steps=20)
    good = session.state_dict()
    mask = good["masks"]["first.weight"]
    for change, message in (
        ({"version": 1}, "version 1"),
        ({"total_steps": 21}, "schedule would jump"),
        ({"masks": {**good["masks"], "first.weight": mask[:, :4]}}, r"first\.weight has shape \(32, 4\)"),
        ({"masks": {name: value for name, value in good["masks"].items() if name != "first.weight"}}, "first.weight"),
        ({"rules": {}}, "same recipe"),
    ):
        with pytest.raises(gp.GraphPruneError, match=message):
            session.load_state_dict({**good, **change})
    session.load_state_dict(good)
