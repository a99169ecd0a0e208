"""A session on a Program with quantizers: gradients, freezing at its time, and going on after a kill."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.errors import SparsityError
from graphprune.ir.masking import masked_sites
from graphprune.ir.quantizing import FreezeTimes
from graphprune.training.freezing_times import FreezingTimes
from tests.models import example
from tests.traced import run_passes, traced

STEPS = 12
FREEZING = "insert-fake-quant{momentum=0.3,freeze_observers=8,freeze_batch_norm=0.5}"
FRACTIONS = "insert-fake-quant{momentum=0.1,freeze_observers=0.8,freeze_batch_norm=0.5}"
MASKS = "insert-masks{pattern=4x1,sparsity=0.5,warm_up=1,cool_down=4,frequency=2}"


class Net(nn.Module):
    """A convolution, a batch normalization that stays one, dropout and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(4)
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.middle = nn.Linear(8, 16)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(self.norm(x))).mean(2)
        return self.head(self.drop(torch.relu(self.middle(x))))


@functools.cache
def base() -> gp.Program:
    return gp.trace(Net().train(), torch.randn(4, 4, 6))


def start(pipeline: str, **options: int) -> tuple[gp.Program, torch.optim.Optimizer, gp.training.Session]:
    program = gp.transform(base(), pipeline).train()
    optimizer = torch.optim.AdamW(program.parameters(), lr=0.02)
    return program, optimizer, gp.training.Session(program, optimizer, **{"total_steps": STEPS, **options})


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 4, 6, generator=generator)
    return x, (x.mean((1, 2)) > 0).long()


def train(program: gp.Program, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x, y = batch(step)
        loss = F.cross_entropy(program(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def buffers(program: gp.Program, *ends: str) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in program.named_buffers() if name.endswith(ends)}


RANGES = ("_low", "_high", "_scale", "_zero_point")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


# -- training ---------------------------------------------------------------------------------------------------------


def test_gradients_reach_weights_through_masks_and_quantizers() -> None:
    text = "insert-masks{pattern=4x1,schedule=one-shot,criterion=magnitude,sparsity=0.5},insert-fake-quant"
    program = run_passes(traced("mlp"), text).train()
    program(*(example("mlp") or ())).square().mean().backward()
    for site in masked_sites(program):
        assert site.weight.grad is not None
        assert bool(site.weight.grad[site.mask].any())
        assert not bool(site.weight.grad[~site.mask].any())


@pytest.mark.parametrize("pipeline", [FRACTIONS, f"{MASKS},{FRACTIONS}"])
def test_the_loss_falls_and_the_frozen_program_answers_alike(pipeline: str) -> None:
    program, optimizer, session = start(pipeline, total_steps=60)
    losses = train(program, optimizer, range(60))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert session.done
    before = program.eval()(batch(100)[0])
    frozen = gp.transform(program, "freeze-quant" + (",fold-masks" if "masks" in pipeline else ""))
    assert torch.equal(frozen(batch(100)[0]), before)  # observers were frozen, so scales stay


# -- freezing ---------------------------------------------------------------------------------------------------------


def test_parts_are_frozen_at_their_step() -> None:
    program, optimizer, session = start(FREEZING)
    assert program.frozen == frozenset()
    train(program, optimizer, range(5))
    assert program.frozen == frozenset()
    statistics, ranges = buffers(program, *STATISTICS), buffers(program, *RANGES)
    train(program, optimizer, range(5, 6))
    assert program.frozen == {"batch-norm"}
    moved = buffers(program, *STATISTICS)
    assert not any(torch.equal(value, statistics[name]) for name, value in moved.items())
    train(program, optimizer, range(6, 8))
    assert program.frozen == {"batch-norm", "observers"}
    assert all(torch.equal(value, moved[name]) for name, value in buffers(program, *STATISTICS).items())
    last = buffers(program, *RANGES)
    assert not torch.equal(last["conv.input_high"], ranges["conv.input_high"])
    train(program, optimizer, range(8, 12))
    program.eval().train()
    program(10 * batch(0)[0])
    assert all(torch.equal(value, last[name]) for name, value in buffers(program, *RANGES).items())
    assert session.step == STEPS


def test_a_session_without_masks_only_counts_and_freezes(tmp_path: Path) -> None:
    program = gp.transform(base(), FREEZING).train()
    optimizer = torch.optim.SGD(program.parameters(), lr=0.01)
    with gp.training.Session(program, optimizer, total_steps=STEPS, log=tmp_path / "log.jsonl") as session:
        train(program, optimizer, range(STEPS))
        assert session.done
        assert session.sparsity == 0.0
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == STEPS


def test_the_report_says_what_is_frozen() -> None:
    program, optimizer, session = start(FREEZING)
    assert session.report().freezing == "batch-norm to be frozen after step 6, observers to be frozen after step 8"
    train(program, optimizer, range(7))
    assert "batch-norm frozen, observers to be frozen after step 8" in str(session.report())
    assert gp.training.SessionReport(0, 1, 0.0, 0, 0, (), ()).freezing == ""


@pytest.mark.parametrize(
    ("options", "at"),
    [
        ("freeze_observers=0", {"observers": 0}),
        ("freeze_observers=0.25", {"observers": 3}),
        ('freeze_observers="2 epochs",freeze_batch_norm="1.5 epochs"', {"observers": 8, "batch-norm": 6}),
        ("freeze_batch_norm=12", {"batch-norm": 12}),
    ],
)
def test_times_are_steps_fractions_or_epochs(options: str, at: dict[str, int]) -> None:
    program, _, session = start(f"insert-fake-quant{{{options}}}", steps_per_epoch=4)
    assert session.state_dict()["freezing"]["at"] == at
    assert program.frozen == {part for part, step in at.items() if step == 0}


def test_the_text_of_a_program_shows_the_times() -> None:
    program = gp.transform(base(), FREEZING)
    assert str(program).splitlines()[-2].endswith("{freeze_observers=8, freeze_batch_norm=0.5}")
    again = gp.transform(program, FREEZING.replace("=8", "=9"))
    assert again.annotation(again.output, FreezeTimes) == FreezeTimes(9, 0.5)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("freeze_observers=13", r"freeze_observers=13 is after 13 steps, and training has 12"),
        (
            "freeze_observers=4,freeze_batch_norm=6",
            r"freeze_observers \(4 steps\) comes before freeze_batch_norm \(6 steps\)",
        ),
        ('freeze_batch_norm="1 epochs"', r"tell the session how many steps_per_epoch there are"),
    ],
)
def test_times_that_do_not_fit(options: str, message: str) -> None:
    with pytest.raises(SparsityError, match=message):
        start(f"insert-fake-quant{{{options}}}")


@pytest.mark.parametrize("value", [-1, 1.5, "soon"])
def test_times_that_are_none(value: object) -> None:
    from graphprune.passes import InsertFakeQuant

    for name in ("freeze_observers", "freeze_batch_norm"):
        with pytest.raises(SparsityError, match=f"{name}=.* is no length of training"):
            InsertFakeQuant(**{name: value})  # type: ignore[arg-type]


def test_an_optimizer_of_something_else() -> None:
    program = gp.transform(base(), FRACTIONS)
    with pytest.raises(SparsityError, match="the optimizer holds no parameter of this Program"):
        gp.training.Session(program, torch.optim.SGD(Net().parameters(), lr=0.1), total_steps=3)
    train_past = torch.optim.SGD(program.parameters(), lr=0.1)
    session = gp.training.Session(program, torch.optim.SGD(program.parameters(), lr=0.1), total_steps=30)
    with pytest.raises(SparsityError, match="the optimizer that the session was given does not step"):
        train(program.train(), train_past, range(6))
    assert session.step == 0


def test_observers_that_freeze_before_any_data() -> None:
    program, _, _ = start("insert-fake-quant{freeze_observers=0}")
    with pytest.raises(gp.PassError, match="has seen no data; train a step or calibrate first"):
        program(batch(0)[0])
    slow = run_passes(copy.deepcopy(base()), "annotate-quant{observer=percentile},insert-fake-quant").train()
    with pytest.raises(gp.PassError, match="has seen no data; calibrate first"):
        slow(batch(0)[0])


# -- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [5, 7, 9])
@pytest.mark.parametrize("pipeline", [FREEZING, f"{MASKS},{FREEZING}"])
def test_kill_and_resume_is_bit_identical(pipeline: str, stop: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole, whole_optimizer, _session = start(pipeline)
    train(whole, whole_optimizer, range(STEPS))
    torch.manual_seed(1)
    first, first_optimizer, session = start(pipeline)
    train(first, first_optimizer, range(stop))
    parts = {"program": first, "optimizer": first_optimizer, "session": session}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "state.pt")
    second, second_optimizer, resumed = start(pipeline)
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(loaded["program"])
    second_optimizer.load_state_dict(loaded["optimizer"])
    resumed.load_state_dict(loaded["session"])
    assert second.frozen == first.frozen
    train(second, second_optimizer, range(stop, STEPS))
    assert second.frozen == whole.frozen == {"observers", "batch-norm"}
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_state_takes_back_what_was_frozen_later() -> None:
    program, optimizer, session = start(FREEZING)
    train(program, optimizer, range(3))
    state = session.state_dict()
    train(program, optimizer, range(3, 10))
    assert program.frozen
    session.load_state_dict(state)
    assert program.frozen == frozenset()
    assert program.observing


def test_a_state_with_other_times_is_refused() -> None:
    _, _, session = start(FREEZING)
    state = session.state_dict()
    _, _, other = start(FREEZING.replace("freeze_observers=8", "freeze_observers=9"))
    with pytest.raises(SparsityError, match=r"the state freezes at steps .*same recipe"):
        other.load_state_dict(state)


@given(
    observers=st.none() | st.integers(0, 15) | st.floats(0, 0.99),
    batch_norm=st.none() | st.integers(0, 15) | st.floats(0, 0.99),
)
def test_every_time_is_a_step_of_the_run_or_refused(
    observers: int | float | None, batch_norm: int | float | None
) -> None:
    program = base()
    program.annotate(program.output, FreezeTimes(observers, batch_norm))
    try:
        at = FreezingTimes(program, STEPS, None).at
    except SparsityError:
        late = [time for time in (observers, batch_norm) if isinstance(time, int) and time > STEPS]
        assert late or None not in (observers, batch_norm)
        return
    finally:
        program.forget(program.output, FreezeTimes)
    assert all(0 <= step <= STEPS for step in at.values())
    assert at.get("batch-norm", 0) <= at.get("observers", STEPS)
