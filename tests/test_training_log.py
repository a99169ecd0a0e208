"""The training log: from a session into its Program, through copies, files and resumed runs, into the artifact."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch

import graphprune as gp
from graphprune.ir.training_log import LIMIT, LogPoint, TrainingLog, format_log, parse_log
from tests.session_net import Net, masked, traced_net, train


@pytest.fixture(scope="module")
def traced() -> gp.Program:
    return traced_net()


def run(program: gp.Program, steps: int, done: int = 0) -> gp.training.Session:
    optimizer = torch.optim.SGD(program.parameters(), lr=0.01)
    session = gp.training.Session(program, optimizer, total_steps=20)
    session.record(loss=torch.tensor(2.5))
    train(program, optimizer, range(done, steps))
    return session


def test_a_session_logs_into_its_program(traced: gp.Program) -> None:
    program = masked(traced)
    assert not program.training_log
    session = run(program, 20)
    points = program.training_log.points
    assert [point.step for point in points] == list(range(20))
    assert {point.session for point in points} == {1}
    assert points[0].loss == 2.5
    assert points[-1].sparsity == session.sparsity


def test_a_second_session_is_told_from_the_first(traced: gp.Program) -> None:
    program = masked(traced)
    run(program, 20).close()
    run(program, 20).close()
    assert [point.session for point in program.training_log.points] == [1] * 20 + [2] * 20


def test_a_session_that_takes_no_step_leaves_no_trace(traced: gp.Program) -> None:
    program = masked(traced)
    run(program, 0).close()
    assert not program.training_log
    run(program, 20)
    assert {point.session for point in program.training_log.points} == {1}


def test_copies_have_logs_of_their_own(traced: gp.Program) -> None:
    program = masked(traced)
    session = run(program, 5)
    clone = copy.deepcopy(program)
    train(program, session.optimizer, range(5, 20))
    assert len(clone.training_log.points) == 5
    assert len(program.training_log.points) == 20
    assert len(gp.transform(program, "fold-masks").training_log.points) == 20


def test_a_resumed_run_has_the_log_of_an_unbroken_one(traced: gp.Program, tmp_path: Path) -> None:
    whole = masked(traced)
    run(whole, 20)
    first = masked(traced)
    state = run(first, 7).state_dict()
    weights = first.state_dict()
    torch.save(state, tmp_path / "state.pt")
    second = masked(traced)
    second.load_state_dict(weights)
    optimizer = torch.optim.SGD(second.parameters(), lr=0.01)
    resumed = gp.training.Session(second, optimizer, total_steps=20)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(second, optimizer, range(7, 20))
    assert [(point.session, point.step) for point in second.training_log.points] == [(1, step) for step in range(20)]
    assert [round(point.sparsity, 6) for point in whole.training_log.points] == pytest.approx(
        [point.sparsity for point in second.training_log.points], abs=1e-6
    )


def test_saved_programs_keep_it(traced: gp.Program, tmp_path: Path) -> None:
    program = masked(traced)
    run(program, 20)
    gp.save(program, tmp_path / "saved")
    loaded = gp.load(tmp_path / "saved", Net())
    assert loaded.training_log.points == parse_log(format_log(program.training_log.points))
    (tmp_path / "saved" / "training.jsonl").unlink()
    assert not gp.load(tmp_path / "saved", Net()).training_log


def test_a_damaged_log_is_refused(traced: gp.Program, tmp_path: Path) -> None:
    program = masked(traced)
    run(program, 20)
    gp.save(program, tmp_path / "saved")
    (tmp_path / "saved" / "training.jsonl").write_text("nonsense\n")
    with pytest.raises(gp.VerifyError, match=r"training\.jsonl cannot be read: line 1"):
        gp.load(tmp_path / "saved", Net())


def test_a_long_log_is_thinned_evenly_and_keeps_its_last_step() -> None:
    log = TrainingLog()
    log.begin()
    for step in range(4 * LIMIT + 2):
        log.write(step, step / (8 * LIMIT), torch.tensor(float(step)))
    points = log.points
    assert LIMIT / 2 < len(points) <= LIMIT + 1
    assert len({b.step - a.step for a, b in itertools.pairwise(points[:-1])}) == 1
    assert points[-1].step == 4 * LIMIT + 1
    assert all(point.loss == point.step for point in points)
    again = TrainingLog(points)
    assert again.points == points
    again.write(4 * LIMIT + 3, 0.5, None)
    assert len(again.points) <= LIMIT + 1
    assert again.points[-1] == LogPoint(1, 4 * LIMIT + 3, 0.5, None)


def test_losses_that_are_not_finite_are_left_out() -> None:
    log = TrainingLog()
    log.begin()
    log.write(0, 0.0, float("nan"))
    log.write(1, 0.0, torch.tensor(float("inf")))
    log.write(2, 0.0, None)
    assert [point.loss for point in log.points] == [None] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "counts"), ({"session": 0}, "counts"), ({"step": 1.5}, "counts"), ({"sparsity": 1.5}, "sparsity"),
        ({"loss": float("nan")}, "finite"), ({"loss": "low"}, "could not convert"), ({"step": 3}, "earlier step"),
    ],
)  # fmt: skip
def test_lines_that_are_no_points_are_refused(change: dict[str, object], message: str) -> None:
    good = {"session": 1, "step": 4, "sparsity": 0.5, "loss": None}
    with pytest.raises(ValueError, match=f"line 2.*{message}"):
        parse_log(f"{json.dumps(good)}\n{json.dumps({**good, 'step': 5, **change})}\n")
