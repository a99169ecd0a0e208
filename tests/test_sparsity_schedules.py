"""Schedules and the pruning window."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from graphprune.errors import SparsityError
from graphprune.sparsity import (
    SCHEDULES,
    AcDc,
    Constant,
    Cosine,
    Cube,
    Cubic,
    Exponential,
    InverseCubic,
    Linear,
    OneShot,
    Window,
    parse_schedule,
    window,
)

FRACTIONS = st.floats(0, 1)
ALL = st.sampled_from([cls() for cls in SCHEDULES.values()])


@given(ALL, FRACTIONS, FRACTIONS, FRACTIONS, FRACTIONS)
def test_monotone_within_ends(schedule, first, second, initial, target):
    assume(initial <= target)
    early, late = (schedule.sparsity(t, initial, target) for t in sorted((first, second)))
    assert initial <= early <= target
    assert early <= late + 1e-12 or isinstance(schedule, AcDc)
    assert late <= target
    assert schedule.sparsity(1.0, initial, target) == target
    if not isinstance(schedule, (OneShot, Constant, AcDc)):
        assert schedule.sparsity(0.0, initial, target) == initial


def test_formulas():
    initial, target, t = 0.1, 0.8, 0.3
    assert OneShot().sparsity(0.0, initial, target) == target
    assert Linear().sparsity(t, initial, target) == pytest.approx(0.1 + 0.7 * 0.3)
    assert Cubic().sparsity(t, initial, target) == pytest.approx(0.1 + 0.7 * (1 - 0.7**3))
    assert Cube().sparsity(t, initial, target) == pytest.approx(0.1 + 0.7 * 0.3**3)
    assert Constant().sparsity(0.0, initial, target) == target
    assert Exponential().sparsity(t, initial, target) == pytest.approx(1 - 0.9 * (0.2 / 0.9) ** 0.3)
    assert Cosine().sparsity(t, initial, target) == pytest.approx(0.1 + 0.7 * (1 - math.cos(math.pi / 2 * 0.3)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("exponential", [0.275, 0.475, 0.619, 0.724, 0.8]),
        ("linear", [0.16, 0.32, 0.48, 0.64, 0.8]),
        ("cosine", [0.039, 0.153, 0.330, 0.553, 0.8]),
    ],
)
def test_neural_compressor_curves(name, expected):
    """The published events for a target of 0.8 in five updates."""
    schedule = parse_schedule(name)
    assert [schedule.sparsity(k / 5, 0.0, 0.8) for k in range(1, 6)] == pytest.approx(expected, abs=1e-3)


def test_acdc_alternates_and_ends_compressed() -> None:
    schedule = parse_schedule("acdc(cycles=2)")
    phases = [schedule.sparsity(step / 8, 0.0, 0.9) for step in range(9)]
    assert phases == [0.9, 0.9, 0.0, 0.0, 0.9, 0.9, 0.0, 0.0, 0.9]
    with pytest.raises(SparsityError, match="at least 1 cycle"):
        parse_schedule("acdc(cycles=0)")


def test_times_in_steps_fractions_and_epochs() -> None:
    assert window(100, warm_up="1 epoch", cool_down="2.5 epochs", frequency="0.5 epochs", steps_per_epoch=10) == Window(
        10, 74, 5
    )
    assert window(100, warm_up=0.1, end=0.5, frequency=0.02) == Window(10, 50, 2)
    assert window(100, end=500) == Window(0, 99, 1)
    with pytest.raises(SparsityError, match=r"end at step 5, before it starts at step 10"):
        window(100, warm_up=10, end=5)
    with pytest.raises(SparsityError, match="steps_per_epoch"):
        window(100, warm_up="1 epoch")
    with pytest.raises(SparsityError, match="no length of training"):
        window(100, warm_up="1 day")


def test_a_schedule_may_begin_with_a_jump():
    schedule = parse_schedule("cubic(initial=0.7)")
    assert schedule == Cubic(initial=0.7)
    assert str(schedule) == "cubic(initial=0.7)"
    assert schedule.sparsity(0.0, 0.0, 0.9) == 0.7
    assert schedule.sparsity(0.5, 0.0, 0.9) == pytest.approx(0.7 + 0.2 * (1 - 0.5**3))
    assert schedule.sparsity(0.0, 0.8, 0.9) == 0.8  # more is there
    assert schedule.sparsity(0.0, 0.0, 0.5) == schedule.sparsity(0.5, 0.0, 0.5) == 0.5  # a site with a lower target
    assert Exponential(initial=0.5).sparsity(0.0, 0.0, 0.8) == pytest.approx(0.5)
    assert InverseCubic().sparsity(0.875, 0.0, 1.0) == pytest.approx(0.5)
    for text in ("linear(initial=1)", "linear(initial=-0.1)", "one-shot(initial=0.1)"):
        with pytest.raises(SparsityError, match="initial"):
            parse_schedule(text)


def test_text():
    assert set(SCHEDULES) >= {"one-shot", "linear", "cubic", "exponential", "cosine"}
    for name, cls in SCHEDULES.items():
        assert parse_schedule(name) == cls()
        assert str(cls()) == name
    with pytest.raises(SparsityError, match="did you mean 'cubic'"):
        parse_schedule("cubik")


@pytest.mark.parametrize(
    "arguments",
    [(-0.1, 0, 1), (1.1, 0, 1), (0.5, 0.6, 0.5), (0.5, 0, 80), (0.5, -0.1, 0.5), (math.nan, 0, 1)],
)
def test_ranges(arguments):
    with pytest.raises(SparsityError):
        Linear().sparsity(*arguments)


@given(st.integers(0, 50), st.integers(0, 60), st.integers(1, 70))
def test_window_updates(start, length, frequency):
    place = Window(start, start + length, frequency)
    steps = [step for step in range(start + length + 20) if place.is_update(step)]
    assert tuple(steps) == place.update_steps()
    assert steps[0] == start
    assert steps[-1] == start + length
    assert all(later - earlier == frequency for earlier, later in pairwise(steps[:-1]))
    progress = [place.progress(step) for step in range(start + length + 20)]
    assert progress == sorted(progress)
    assert progress[start + length] == 1.0
    if length:
        assert progress[start] == 0.0
    if start:
        assert progress[0] == 0.0


def test_last_update_reaches_the_target_where_the_frequency_does_not_divide():
    place = Window(1, 20, 5)
    assert place.update_steps() == (1, 6, 11, 16, 20)
    assert Exponential().sparsity(place.progress(20), 0.0, 0.8) == 0.8
    assert Window(3, 3).update_steps() == (3,)
    assert Window(3, 3).progress(3) == 1.0
    assert Window(3, 3).progress(2) == 0.0


@pytest.mark.parametrize("arguments", [(-1, 2, 1), (3, 2, 1), (0, 2, 0), (0, 2.0, 1), (True, 2, 1)])
def test_window_refusals(arguments):
    with pytest.raises(SparsityError, match="pruning window"):
        Window(*arguments)


def test_window_in_a_run():
    assert window(100, warm_up=0.1, cool_down=0.2, frequency=5) == Window(10, 79, 5)
    assert window(100, warm_up=7, cool_down=0, frequency=1) == Window(7, 99, 1)
    assert window(1, warm_up=0, cool_down=0.0, frequency=1) == Window(0, 0, 1)


@pytest.mark.parametrize(
    ("total", "before", "after", "message"),
    [
        (10, 0.5, 0.5, "leave nothing"),
        (10, 11, 0, "leave nothing"),
        (10, 1.0, 0, "no length of training"),
        (10, 0, -1, "no length of training"),
        (10, True, 0, "no length of training"),
        (0, 0, 0, "total_steps"),
    ],
)
def test_window_infeasible(total, before, after, message):
    with pytest.raises(SparsityError, match=message):
        window(total, warm_up=before, cool_down=after, frequency=1)
