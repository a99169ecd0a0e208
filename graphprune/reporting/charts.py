"""Charts as inline SVG that is as wide as its place: positions in percent, text and lines in pixels, colors by CSS classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_DIGITS = 3  # of positions, in percent


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        low: Value at its beginning.
        high: Value at its end, above ``low``.
        ticks: Values that are labeled, each with its label.
        logarithmic: Equal distances are equal ratios; all values are above 0.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, in percent of the axis."""
        turn: Callable[[float], float] = math.log10 if self.logarithmic else float
        return round(100 * (turn(value) - turn(self.low)) / (turn(self.high) - turn(self.low)), _DIGITS)


@dataclass(frozen=True)
class Line:
    """A line over an axis of steps.

    Attributes:
        points: ``(x, y)`` in the units of the axes.
        css: Class of the line.
        stepped: Each value holds until the next point.
        band: ``(x, low, high)`` of an area behind the line.
    """

    points: Sequence[tuple[float, float]]
    css: str
    stepped: bool = False
    band: Sequence[tuple[float, float, float]] = ()


def linear_axis(low: float, high: float, count: int = 4, *, tight: bool = False) -> Axis:
    """An axis with about ``count`` round ticks.

    Args:
        low: Least value.
        high: Largest value.
        count: Intervals between ticks, roughly.
        tight: End at ``low`` and ``high`` and not at the ticks around them.
    """
    if not high > low:
        low, high = low - 0.5, low + 0.5
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.8)
    first = math.ceil(low / step - 1e-9) if tight else math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if tight else math.ceil(high / step - 1e-9)
    ticks = [index * step for index in range(first, last + 1)]
    begin, end = (low, high) if tight else (ticks[0], ticks[-1])
    return Axis(begin, end, tuple((tick, _short(tick, step)) for tick in ticks))


def loss_axis(values: Sequence[float]) -> Axis:
    """An axis for losses: from 0 where that costs little, by ratios where a linear one would hide most of them."""
    low, high = min(values), max(values)
    middle = sorted(values)[len(values) // 2]
    if low > 0 and high > 20 * middle:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return Axis(
            10.0 ** powers[0], 10.0 ** powers[-1], tuple((10.0**power, f"{10.0**power:g}") for power in powers), True
        )
    return linear_axis(0.0 if 0 <= low < 0.6 * high else low, high)


def _short(value: float, step: float) -> str:
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if step * 10**digits % 1 > 1e-6:  # 2.5 has one digit more than its power
        digits += 1
    return f"{value:,.{digits}f}"


def column_chart(values: Sequence[float], names: Sequence[str], css: Sequence[str], label: str) -> Markup:
    """A column for each value in [0, 1], with its name and value as a tooltip."""
    axis = Axis(0.0, 1.0, tuple((index / 4, f"{index / 4:g}") for index in range(5)))
    slot = 100 / max(1, len(values))
    columns = [
        Markup('<rect class="{}" x="{}%" y="{}%" width="{}%" height="{}%"><title>{}: {:.4f}</title></rect>').format(
            kind, round(slot * index + slot * 0.1, _DIGITS), 100 - axis.place(value), round(slot * 0.8, _DIGITS),
            axis.place(value), name, value,
        )
        for index, (value, name, kind) in enumerate(zip(values, names, css, strict=True))
    ]  # fmt: skip
    return _figure(_grid(axis) + Markup().join(columns), label, "columns")


def line_chart(lines: Sequence[Line], x: Axis, y: Axis, label: str, *, breaks: Sequence[float] = ()) -> Markup:
    """Lines over steps; ``breaks`` are the steps at which one training session ends and the next begins."""
    marks = Markup().join(
        Markup('<line class="break" x1="{0}%" x2="{0}%" y1="0" y2="100%"/>').format(x.place(step)) for step in breaks
    )
    paths = Markup().join(_path(line, x, y) for line in lines)
    plot = Markup('<svg viewBox="0 0 100 100" preserveAspectRatio="none">{}</svg>').format(paths)
    ticks = [
        Markup('<text class="tick-x" x="{}%" y="100%" dy="18">{}</text>').format(x.place(value), text)
        for value, text in x.ticks
    ]
    cursor = Markup('<line class="cursor" y1="0" y2="100%" visibility="hidden"/>')
    return _figure(_grid(y) + marks + plot + Markup().join(ticks) + cursor, label, "lines")


def _path(line: Line, x: Axis, y: Axis) -> Markup:
    band = Markup()
    if line.band:
        upper = [f"{x.place(step)},{_flip(y, high)}" for step, _, high in line.band]
        lower = [f"{x.place(step)},{_flip(y, low)}" for step, low, _ in reversed(line.band)]
        band = Markup('<polygon class="{} band" points="{}"/>').format(line.css, " ".join(upper + lower))
    places: list[str] = []
    before = None
    for step, value in line.points:
        if line.stepped and before is not None:
            places.append(f"{x.place(step)},{before}")
        before = _flip(y, value)
        places.append(f"{x.place(step)},{before}")
    return band + Markup('<polyline class="{}" points="{}"/>').format(line.css, " ".join(places))


def _flip(axis: Axis, value: float) -> float:
    return round(100 - axis.place(value), _DIGITS)


def _grid(axis: Axis) -> Markup:
    return Markup().join(
        Markup(
            '<line class="grid{1}" x1="0" x2="100%" y1="{0}%" y2="{0}%"/>'
            '<text class="tick-y" x="-10" y="{0}%" dy="4">{2}</text>'
        ).format(_flip(axis, value), " base" if value == axis.low else "", text)
        for value, text in axis.ticks
    )


def _figure(content: Markup, label: str, css: str) -> Markup:
    return Markup('<svg class="chart {}" role="img" aria-label="{}">{}</svg>').format(css, escape(label), content)


def bar(share: float, css: str = "", spread: tuple[float, float] | None = None) -> Markup:
    """A horizontal bar.

    Args:
        share: Of its place, in [0, 1].
        css: Class of the bar.
        spread: Ends of a thin line over its end, in [0, 1].
    """
    whisker = Markup()
    if spread is not None:
        ends = (round(100 * value, _DIGITS) for value in spread)
        whisker = Markup('<line class="whisker" x1="{}%" x2="{}%" y1="50%" y2="50%"/>').format(*ends)
    return Markup(
        '<svg class="bar" aria-hidden="true"><rect class="track" width="100%" height="100%"/>'
        '<rect class="fill {}" width="{}%" height="100%"/>{}</svg>'
    ).format(css, round(100 * min(1.0, max(0.0, share)), _DIGITS), whisker)
