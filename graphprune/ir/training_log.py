"""What training was like: step, sparsity and loss, kept with a Program, thinned so that it stays small."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

LIMIT = 5_000
"""Most points that are kept of one session."""
_PENDING = 512  # losses that wait on their device, so that no step has to wait for one


@dataclass(frozen=True)
class LogPoint:
    """One optimizer step.

    Attributes:
        session: Which training session, counted from 1.
        step: Optimizer step of this session, counted from 0.
        sparsity: Fraction of masked weights after the step, in [0, 1].
        loss: Loss of the step; None where there was none, or where it was not finite.
    """

    session: int
    step: int
    sparsity: float
    loss: float | None


class TrainingLog:
    """Points of all sessions that trained a Program, in order.

    Of a session with more than ``LIMIT`` steps every second, fourth, ... step is kept, and its last one. ``copy.deepcopy`` gives an
    independent log.
    """

    def __init__(self, points: Iterable[LogPoint] = ()) -> None:
        self._done: list[LogPoint] = []
        self._session = 0
        self._stride = 1
        self._last: tuple[int, float, float | Tensor | None] | None = None
        self._open: list[tuple[int, float, float | Tensor | None]] = []
        for point in points:
            if point.session != self._session:
                self.begin()
                self._session = point.session
            self.write(point.step, point.sparsity, point.loss)
        self._stride = max(1, math.gcd(*(entry[0] for entry in self._open[:-1])))  # what was thinned goes on as thin

    def __bool__(self) -> bool:
        return bool(self._done or self._last)

    @property
    def points(self) -> tuple[LogPoint, ...]:
        """All points; makes the process wait for losses that are still computed."""
        self._settle()
        return (*self._done, *self._current())

    def begin(self) -> None:
        """Begin a session; what is written from now on is part of it."""
        if self._last is None and self._session:
            return  # nothing was written to the one before
        self._settle()
        self._done += self._current()
        self._session, self._stride, self._last, self._open = self._session + 1, 1, None, []

    def write(self, step: int, sparsity: float, loss: float | Tensor | None) -> None:
        """Append a step of the session that was begun last.

        Args:
            step: Above that of the last one.
            sparsity: In [0, 1].
            loss: One number; a tensor is read later.
        """
        self._last = (step, sparsity, loss)
        if step % self._stride:
            return
        self._open.append(self._last)
        if len(self._open) > LIMIT:
            self._stride *= 2
            self._open = [entry for entry in self._open if entry[0] % self._stride == 0]
        if len(self._open) % _PENDING == 0:
            self._settle()

    def replace(self, points: Iterable[LogPoint]) -> None:
        """Take other points in place of all, as a resumed session does; its steps go on in the last session among them."""
        self.__dict__.update(TrainingLog(points).__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainingLog:
        self._settle()
        clone = TrainingLog()
        clone.__dict__.update({**self.__dict__, "_done": list(self._done), "_open": list(self._open)})
        memo[id(self)] = clone
        return clone

    def _current(self) -> list[LogPoint]:
        entries = [*self._open]
        if self._last is not None and (not entries or entries[-1][0] != self._last[0]):
            entries.append(self._last)
        return [LogPoint(self._session, step, sparsity, _number(loss)) for step, sparsity, loss in entries]

    def _settle(self) -> None:
        """Read all losses that are tensors, those of one device together."""
        waiting: dict[torch.device, list[Tensor]] = {}
        for _, _, loss in self._open:
            if isinstance(loss, Tensor):
                waiting.setdefault(loss.device, []).append(loss.detach().reshape(()).float())
        read = {device: iter(torch.stack(losses).tolist()) for device, losses in waiting.items()}
        self._open = [
            (step, sparsity, _number(next(read[loss.device]) if isinstance(loss, Tensor) else loss))
            for step, sparsity, loss in self._open
        ]


def _number(loss: float | Tensor | None) -> float | None:
    value = None if loss is None else float(loss)
    return value if value is not None and math.isfinite(value) else None


def format_log(points: Iterable[LogPoint]) -> str:
    """JSON lines, one a point; ``parse_log`` reads them back."""
    return "".join(json.dumps({**asdict(point), "sparsity": round(point.sparsity, 6)}) + "\n" for point in points)


def parse_log(text: str) -> tuple[LogPoint, ...]:
    """Read JSON lines.

    Raises:
        ValueError: A line is not what ``format_log`` writes; says which.
    """
    points: list[LogPoint] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            points.append(_point(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"line {number} is no point of a training log: {error}") from None
        if points[1:] and (points[-1].session, points[-1].step) <= (points[-2].session, points[-2].step):
            raise ValueError(f"line {number} is of an earlier step than the line before it")
    return tuple(points)


def _point(entry: Mapping[str, Any]) -> LogPoint:
    session, step, sparsity, loss = entry["session"], entry["step"], entry["sparsity"], entry["loss"]
    if type(session) is not int or type(step) is not int or session < 1 or step < 0:
        raise ValueError("session and step must be counts")
    if not 0.0 <= float(sparsity) <= 1.0:
        raise ValueError("sparsity must lie in [0, 1]")
    if loss is not None and not math.isfinite(float(loss)):
        raise ValueError("loss must be finite")
    return LogPoint(session, step, float(sparsity), None if loss is None else float(loss))
