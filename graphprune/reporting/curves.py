"""Schedule and loss over training: what the charts of a training log draw, and what is said beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from graphprune.ir.training_log import LogPoint
from graphprune.reporting.charts import Axis, Line, line_chart, linear_axis, loss_axis

_BUCKETS = 240
"""Most points that a loss curve is drawn with; each is the mean of its steps, with a band from the least to the largest."""
_READINGS = 400  # points that the page shows under the pointer


@dataclass(frozen=True)
class Curves:
    """The charts of a training log.

    Attributes:
        sparsity: Chart of the sparsity.
        loss: Chart of the loss; None where no loss was logged.
        readings: ``[[share of the axis, step, session, sparsity, loss], ...]`` as JSON, for the pointer.
        sessions: Training sessions.
        steps: Optimizer steps of all sessions.
        points: Points in the log.
        reached: Step, over all sessions, at which the last sparsity was reached first.
        final: Sparsity of the last point.
        losses: First and last loss, the means of the first and last twentieth; None where no loss was logged.
    """

    sparsity: Markup
    loss: Markup | None
    readings: str
    sessions: int
    steps: int
    points: int
    reached: int
    final: float
    losses: tuple[float, float] | None


def draw_curves(points: Sequence[LogPoint]) -> Curves | None:
    """Draw a training log; None where it is empty."""
    if not points:
        return None
    starts = _starts(points)
    steps = [starts[point.session] + point.step for point in points]
    x = linear_axis(0, max(1, steps[-1]), 5, tight=True)
    breaks = [float(start) for start in list(starts.values())[1:]]
    losses = [(step, point.loss) for step, point in zip(steps, points, strict=True) if point.loss is not None]
    final = points[-1].sparsity
    reached = next(step for step, point in zip(steps, points, strict=True) if point.sparsity >= final)
    thin = range(0, len(points), max(1, len(points) // _READINGS))
    readings = [
        [x.place(steps[index]), points[index].step, points[index].session, points[index].sparsity, points[index].loss]
        for index in thin
    ]
    return Curves(
        sparsity=_sparsity_chart(points, steps, x, breaks),
        loss=_loss_chart(losses, x, breaks) if losses else None,
        readings=json.dumps(readings, separators=(",", ":")),
        sessions=len(starts),
        steps=steps[-1] + 1,
        points=len(points),
        reached=reached,
        final=final,
        losses=(_mean(losses[: max(1, len(losses) // 20)]), _mean(losses[-max(1, len(losses) // 20) :]))
        if losses
        else None,
    )


def _starts(points: Sequence[LogPoint]) -> dict[int, int]:
    """The step, over all sessions, at which each session starts."""
    last: dict[int, int] = {}
    for point in points:
        last[point.session] = point.step
    starts, total = {}, 0
    for session, step in last.items():
        starts[session] = total
        total += step + 1
    return starts


def _sparsity_chart(points: Sequence[LogPoint], steps: Sequence[int], x: Axis, breaks: Sequence[float]) -> Markup:
    ends = (0, len(points) - 1)
    drawn = [
        (float(step), point.sparsity)
        for index, (step, point) in enumerate(zip(steps, points, strict=True))
        if index in ends or point.sparsity != points[index - 1].sparsity
    ]
    high = max(point.sparsity for point in points)
    y = linear_axis(0.0, max(high, 0.01) if high < 0.5 else 1.0)
    label = f"Sparsity over {steps[-1] + 1} optimizer steps, from {points[0].sparsity:.4f} to {points[-1].sparsity:.4f}"
    return line_chart([Line(drawn, "series-sparsity", stepped=True)], x, y, label, breaks=breaks)


def _loss_chart(losses: Sequence[tuple[int, float]], x: Axis, breaks: Sequence[float]) -> Markup:
    y = loss_axis([loss for _, loss in losses])
    lines = []
    edges = [*breaks, float("inf")]
    begin = 0.0
    for end in edges:  # one line a session, so that none joins the end of one with the beginning of the next
        part = [entry for entry in losses if begin <= entry[0] < end]
        begin = end
        if part:
            lines.append(_bucketed(part, len(losses)))
    label = f"Loss over {len(losses)} logged steps, from {losses[0][1]:.4g} to {losses[-1][1]:.4g}"
    return line_chart(lines, x, y, label, breaks=breaks)


def _bucketed(losses: Sequence[tuple[int, float]], total: int) -> Line:
    size = max(1, -(-total // _BUCKETS))
    means, band = [], []
    for start in range(0, len(losses), size):
        part = losses[start : start + size]
        values = [loss for _, loss in part]
        middle = part[len(part) // 2][0]
        means.append((float(middle), sum(values) / len(values)))
        band.append((float(middle), min(values), max(values)))
    return Line(means, "series-loss", band=band if size > 1 else ())


def _mean(losses: Sequence[tuple[int, float]]) -> float:
    return sum(loss for _, loss in losses) / len(losses)
