"""Schedules: how sparse to be at a point of the pruning window, and the window itself.

Progress is a fraction of the window in [0, 1]. A new schedule is one small class, usually a
``FractionSchedule`` with one formula; list it in ``SCHEDULES`` so that text can name it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from graphprune.errors import SparsityError
from graphprune.sparsity.spelling import format_named, parse_named


class Schedule(abc.ABC):
    """Base of all schedules; subclasses are frozen dataclasses whose fields have defaults."""

    name: ClassVar[str]

    def __str__(self) -> str:
        return format_named(self.name, self)

    def sparsity(self, progress: float, initial: float, target: float) -> float:
        """Return the sparsity wanted at a point of the window.

        Args:
            progress: Fraction of the window that is over, in [0, 1].
            initial: Sparsity at the start, in [0, 1].
            target: Sparsity at the end, ``initial <= target <= 1``.

        Returns:
            Sparsity in [initial, target]; exactly ``target`` where ``progress`` is 1.

        Raises:
            SparsityError: An argument is out of its range.
        """
        if not 0.0 <= progress <= 1.0:
            raise SparsityError(f"schedule {self}: progress {progress} is not in [0, 1]")
        if not 0.0 <= initial <= target <= 1.0:
            raise SparsityError(
                f"schedule {self}: cannot go from sparsity {initial} to {target}; it needs "
                "0 <= initial <= target <= 1, as fractions and not percent"
            )
        return target if progress == 1.0 else min(target, max(initial, self.curve(progress, initial, target)))

    @abc.abstractmethod
    def curve(self, progress: float, initial: float, target: float) -> float:
        """Return the sparsity for checked arguments with ``progress < 1``."""


class FractionSchedule(Schedule):
    """A schedule that has gone the same fraction of the way whatever the ends are."""

    def curve(self, progress: float, initial: float, target: float) -> float:
        """Interpolate by ``fraction``."""
        return initial + (target - initial) * self.fraction(progress)

    @abc.abstractmethod
    def fraction(self, progress: float) -> float:
        """Return the fraction of the way from initial to target, in [0, 1]."""


@dataclass(frozen=True)
class OneShot(FractionSchedule):
    """The target at once: already the first update of the window reaches it."""

    name = "one-shot"

    def fraction(self, progress: float) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class Linear(FractionSchedule):
    """``s0 + (s1 - s0) * t``."""

    name = "linear"

    def fraction(self, progress: float) -> float:
        """Return ``t``."""
        return progress


@dataclass(frozen=True)
class Cubic(FractionSchedule):
    """``s0 + (s1 - s0) * (1 - (1 - t)**3)``: fast first, slow near the target.

    Source: Zhu and Gupta, arXiv:1710.01878. (The "cube" of Neural Compressor is another curve, ``t**3``.)
    """

    name = "cubic"

    def fraction(self, progress: float) -> float:
        """Return ``1 - (1 - t)**3``."""
        return 1.0 - (1.0 - progress) ** 3


@dataclass(frozen=True)
class Exponential(Schedule):
    """``1 - (1 - s0) * ((1 - s1) / (1 - s0))**t``: the density shrinks by the same factor in equal times.

    A target of 1 is reached right after the start, because no finite factor leads to density 0. Source:
    "exp", the default of Neural Compressor 2.6.
    """

    name = "exponential"

    def curve(self, progress: float, initial: float, target: float) -> float:
        """Return ``1 - (1 - s0) * ((1 - s1) / (1 - s0))**t``."""
        if initial == 1.0:
            return 1.0
        shrink: float = ((1.0 - target) / (1.0 - initial)) ** progress
        return initial + (1.0 - initial) * (1.0 - shrink)


@dataclass(frozen=True)
class Cosine(FractionSchedule):
    """``s0 + (s1 - s0) * (1 - cos(pi/2 * t))``: slow first. Source: "cos" of Neural Compressor 2.6."""

    name = "cosine"

    def fraction(self, progress: float) -> float:
        """Return ``1 - cos(pi/2 * t)``."""
        return 1.0 - math.cos(math.pi / 2 * progress)


SCHEDULES: Mapping[str, type[Schedule]] = MappingProxyType(
    {cls.name: cls for cls in (OneShot, Linear, Cubic, Exponential, Cosine)}
)
"""Every schedule that text can name."""


def parse_schedule(text: str) -> Schedule:
    """Read a schedule by its name, with options in parentheses where it has some.

    Args:
        text: The text; ``str(schedule)`` is the canonical form.

    Returns:
        The schedule.

    Raises:
        SparsityError: The text is malformed, or the name, an option or a value is not known.
    """
    return parse_named(text, SCHEDULES, "schedule")


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


def window(total_steps: int, *, warm_up: float, cool_down: float, frequency: int) -> Window:
    """Place the pruning window inside a training run of steps ``0 .. total_steps - 1``.

    Args:
        total_steps: Optimizer steps of the run, >= 1.
        warm_up: Steps before the first update: an int counts steps, a float in [0, 1) is a fraction of
            ``total_steps`` (rounded to the nearest step).
        cool_down: Steps after the last update, in the same two forms.
        frequency: Steps between updates, >= 1.

    Returns:
        The window from step ``warm_up`` to step ``total_steps - 1 - cool_down``.

    Raises:
        SparsityError: A number is out of its range, or warm-up and cool-down leave no step.
    """
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise SparsityError(f"pruning window: total_steps={total_steps!r} is not a positive int")
    before, after = _steps("warm_up", warm_up, total_steps), _steps("cool_down", cool_down, total_steps)
    if before + after >= total_steps:
        raise SparsityError(
            f"pruning window: warm_up ({before} steps) and cool_down ({after} steps) leave nothing "
            f"of {total_steps} steps; shorten one of them or train longer"
        )
    return Window(before, total_steps - 1 - after, frequency)


def _steps(name: str, value: float, total: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, float) and 0.0 <= value < 1.0:
        return round(value * total)
    raise SparsityError(
        f"pruning window: {name}={value!r} is neither steps (an int >= 0) nor a fraction (a float in [0, 1))"
    )
