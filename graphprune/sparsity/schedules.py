"""Schedules: how sparse to be at a point of the pruning window (see ``windows``).

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
    resets_moments: ClassVar[bool] = False
    """Whether the optimizer's moments start anew when pruned weights come back."""
    initial: float = 0.0
    """Least sparsity at the start of the window; where more is there, that counts."""

    def __str__(self) -> str:
        return format_named(self.name, self)

    def sparsity(self, progress: float, initial: float, target: float) -> float:
        """Return the sparsity wanted at a point of the window.

        Args:
            progress: Fraction of the window that is over, in [0, 1].
            initial: Sparsity at the start, in [0, 1].
            target: Sparsity at the end, ``initial <= target <= 1``.

        Returns:
            Sparsity in [initial, target]; exactly ``target`` where ``progress`` is 1. A schedule whose own ``initial`` is larger
            than the argument starts from that, at most at ``target``.

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
        start = min(target, max(initial, self.initial))
        return target if progress == 1.0 else min(target, max(start, self.curve(progress, start, target)))

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
class Rising(Schedule):
    """A schedule that may begin with a jump: ``cubic(initial=0.5)`` prunes to 0.5 at the first update and rises from there.

    Raises:
        SparsityError: ``initial`` is not in [0, 1).
    """

    initial: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.initial < 1.0:
            raise SparsityError(f"{self.name}: initial={self.initial} is not in [0, 1); it is a fraction of zeros")


@dataclass(frozen=True)
class OneShot(FractionSchedule):
    """The target at once: already the first update of the window reaches it."""

    name = "one-shot"

    def fraction(self, progress: float) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class Linear(Rising, FractionSchedule):
    """``s0 + (s1 - s0) * t``."""

    name = "linear"

    def fraction(self, progress: float) -> float:
        """Return ``t``."""
        return progress


@dataclass(frozen=True)
class Cubic(Rising, FractionSchedule):
    """``s0 + (s1 - s0) * (1 - (1 - t)**3)``: fast first, slow near the target.

    Source: Zhu and Gupta, arXiv:1710.01878. (The "cube" of Neural Compressor is another curve, ``t**3``.)
    """

    name = "cubic"

    def fraction(self, progress: float) -> float:
        """Return ``1 - (1 - t)**3``."""
        return 1.0 - (1.0 - progress) ** 3


@dataclass(frozen=True)
class Cube(Rising, FractionSchedule):
    """``s0 + (s1 - s0) * t**3``: slow first, fast at the end. Source: "cube" of Neural Compressor 2.6."""

    name = "cube"

    def fraction(self, progress: float) -> float:
        """Return ``t**3``."""
        return progress**3


@dataclass(frozen=True)
class InverseCubic(Rising, FractionSchedule):
    """``s0 + (s1 - s0) * (1 - (1 - t)**(1/3))``: slow first, steep at the end.

    Source: "inverse_cubic" of SparseML's pruning modifiers.
    """

    name = "inverse-cubic"

    def fraction(self, progress: float) -> float:
        """Return ``1 - (1 - t)**(1/3)``."""
        return float(1.0 - (1.0 - progress) ** (1 / 3))


@dataclass(frozen=True)
class Constant(FractionSchedule):
    """The target from the first update on, and further updates at it: for criteria that drop and grow."""

    name = "constant"

    def fraction(self, progress: float) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class AcDc(FractionSchedule):
    """Alternate between compressed and dense training; the window ends compressed.

    The window is cut into ``cycles`` equal parts; the first half of each is compressed at the target, the second half dense.
    Give the dense training before it as warm-up, the last compressed training as cool-down, and a frequency of half a part or
    less. Use it with the criterion ``magnitude``. Source: Peste et al., arXiv:2106.12379, section 3.

    Raises:
        SparsityError: ``cycles`` is below 1.
    """

    cycles: int = 4
    name = "acdc"
    resets_moments = True

    def __post_init__(self) -> None:
        if self.cycles < 1:
            raise SparsityError(f"acdc needs at least 1 cycle, got {self.cycles}")

    def fraction(self, progress: float) -> float:
        """Return 1 in compressed phases and 0 in dense ones."""
        return 1.0 if progress * self.cycles % 1.0 < 0.5 else 0.0


@dataclass(frozen=True)
class Exponential(Rising):
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
class Cosine(Rising, FractionSchedule):
    """``s0 + (s1 - s0) * (1 - cos(pi/2 * t))``: slow first. Source: "cos" of Neural Compressor 2.6."""

    name = "cosine"

    def fraction(self, progress: float) -> float:
        """Return ``1 - cos(pi/2 * t)``."""
        return 1.0 - math.cos(math.pi / 2 * progress)


SCHEDULES: Mapping[str, type[Schedule]] = MappingProxyType(
    {cls.name: cls for cls in (OneShot, Linear, Cubic, Cube, InverseCubic, Exponential, Cosine, Constant, AcDc)}
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
