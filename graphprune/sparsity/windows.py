"""The pruning window: at which optimizer steps masks are updated."""

from __future__ import annotations

import re
from dataclasses import dataclass

from graphprune.errors import SparsityError


@dataclass(frozen=True)
class Window:
    """When masks are updated, in optimizer steps counted from 0.

    Updates are at ``start``, every ``frequency`` steps after it, and always at ``end``, so that the target is
    reached there whether or not ``frequency`` divides the window. ``start == end`` is one update.

    Args:
        start: Step of the first update, >= 0.
        end: Step of the last update, >= ``start``.
        frequency: Steps from one update to the next, >= 1.

    Raises:
        SparsityError: A number is no int or out of its range.
    """

    start: int
    end: int
    frequency: int = 1

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("end", self.end), ("frequency", self.frequency)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise SparsityError(f"pruning window: {name}={value!r} is not an int; it is counted in optimizer steps")
        if not 0 <= self.start <= self.end:
            raise SparsityError(f"pruning window: it needs 0 <= start <= end, got start={self.start}, end={self.end}")
        if self.frequency < 1:
            raise SparsityError(f"pruning window: frequency={self.frequency} is below 1 step")

    def is_update(self, step: int) -> bool:
        """Say whether masks are updated at ``step``."""
        return self.start <= step <= self.end and (step == self.end or (step - self.start) % self.frequency == 0)

    def progress(self, step: int) -> float:
        """Return how much of the window is over, in [0, 1]: 0 up to ``start``, exactly 1 from ``end`` on."""
        if step >= self.end:
            return 1.0
        return 0.0 if step <= self.start else (step - self.start) / (self.end - self.start)

    def update_steps(self) -> tuple[int, ...]:
        """Return every step at which masks are updated, ascending."""
        steps = tuple(range(self.start, self.end, self.frequency))
        return (*steps, self.end)


Time = int | float | str
"""A length of training: an int counts optimizer steps, a float in [0, 1) is a fraction of training, "2 epochs" counts epochs."""


def window(
    total_steps: int,
    *,
    warm_up: Time = 0,
    cool_down: Time = 0,
    end: Time | None = None,
    frequency: Time = 1,
    steps_per_epoch: int | None = None,
) -> Window:
    """Place the pruning window inside a training run of steps ``0 .. total_steps - 1``.

    Args:
        total_steps: Optimizer steps of the run, >= 1.
        warm_up: Length of training before the first update.
        cool_down: Length of training after the last update.
        end: Step of the last update, in place of ``cool_down``.
        frequency: Between updates; at least one step.
        steps_per_epoch: Optimizer steps of an epoch, where a time is in epochs.

    Returns:
        The window from step ``warm_up`` to step ``end``, which is ``total_steps - 1 - cool_down`` where it is not given.

    Raises:
        SparsityError: A time is out of its range, is in epochs of unknown length, or the window is empty.
    """
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise SparsityError(f"pruning window: total_steps={total_steps!r} is not a positive int")
    start = steps("warm_up", warm_up, total_steps, steps_per_epoch)
    every = max(1, steps("frequency", frequency, total_steps, steps_per_epoch))
    if end is not None:
        last = min(steps("end", end, total_steps, steps_per_epoch), total_steps - 1)
        if last < start:
            raise SparsityError(f"pruning window: it would end at step {last}, before it starts at step {start}")
        return Window(start, last, every)
    after = steps("cool_down", cool_down, total_steps, steps_per_epoch)
    if start + after >= total_steps:
        raise SparsityError(
            f"pruning window: warm_up ({start} steps) and cool_down ({after} steps) leave nothing "
            f"of {total_steps} steps; shorten one of them or train longer"
        )
    return Window(start, total_steps - 1 - after, every)


_EPOCHS = re.compile(r"(\d+(?:\.\d+)?) ?epochs?")


def check_time(name: str, value: Time) -> None:
    """Raise SparsityError unless a value is a length of training."""
    steps(name, value, 1, 1)


def steps(name: str, value: Time, total_steps: int, steps_per_epoch: int | None = None) -> int:
    """Return a length of training in optimizer steps, rounded to the nearest.

    Args:
        name: The option, for messages.
        value: The length.
        total_steps: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps of an epoch, where that is known.

    Raises:
        SparsityError: It is no length of training, or is in epochs and nobody said how long one is.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, float) and 0.0 <= value < 1.0:
        return round(value * total_steps)
    match = _EPOCHS.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise SparsityError(
            f"{name}={value!r} is no length of training: write steps (an int >= 0), a fraction (a float in [0, 1)), "
            f"or a text such as '2 epochs'"
        )
    if steps_per_epoch is None:
        raise SparsityError(f"{name}={value!r} is in epochs; tell the session how many steps_per_epoch there are")
    return round(float(match[1]) * steps_per_epoch)
