"""Pictures and charts of the report: exact means, round ticks, small pages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from graphprune.ir.training_log import LogPoint
from graphprune.reporting.charts import linear_axis, loss_axis
from graphprune.reporting.curves import draw_curves
from graphprune.reporting.masks import CELLS, corner, density
from graphprune.reporting.page import format_size
from tests.report_pages import LEVELS


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    rows, columns, seed = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(0, 99))
    return np.random.default_rng(seed).random((rows, columns)) < draw(st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))


def parts(size: int, cells: int) -> Iterator[slice]:
    edges = [index * size // cells for index in range(cells + 1)]
    return (slice(first, last) for first, last in itertools.pairwise(edges))


@given(matrices(), st.integers(16, 40))
def test_cells_are_exact_means(zeros: np.ndarray, most: int) -> None:
    picture = density(zeros, most)
    assert len(picture.cells) == picture.rows * picture.columns
    assert max(picture.rows, picture.columns) == min(most, max(zeros.shape))
    levels = iter(LEVELS.index(symbol) for symbol in picture.cells)
    for rows in parts(zeros.shape[0], picture.rows):
        for columns in parts(zeros.shape[1], picture.columns):
            kept, level = 1 - zeros[rows, columns].mean(), next(levels)
            assert (level == 0) == (kept == 0)
            assert (level == 63) == (kept == 1)
            assert abs(level / 63 - kept) <= 1 / 63


@given(matrices())
def test_the_corner_shows_single_weights(zeros: np.ndarray) -> None:
    picture = corner(zeros, 16)
    shown = np.array([symbol == "A" for symbol in picture.cells]).reshape(picture.rows, picture.columns)
    assert np.array_equal(shown, zeros[:16, :16])


def test_bert_base_fits_into_two_megabytes() -> None:
    shapes = [(768, 768)] * 49 + [(3072, 768), (768, 3072)] * 12 + [(2, 768)]
    assert len(shapes) == 74
    zeros = {shape: np.random.default_rng(0).random(shape) < 0.8 for shape in set(shapes)}
    size = {shape: len(density(item).cells) + len(corner(item).cells) for shape, item in zeros.items()}
    assert sum(size[shape] for shape in shapes) < 1_500_000
    assert density(zeros[768, 768]).columns == CELLS


def test_sessions_follow_each_other_on_one_axis() -> None:
    points = [LogPoint(1, step, step / 20, 10.0 / (1 + step)) for step in range(10)]
    points += [LogPoint(2, step, 0.45, None if step == 3 else 0.5) for step in range(0, 10, 3)]
    curves = draw_curves(points)
    assert curves is not None
    assert (curves.sessions, curves.steps, curves.points, curves.reached) == (2, 20, 14, 9)
    assert str(curves.sparsity).count('class="break"') == 1
    assert curves.loss is not None
    assert str(curves.loss).count("<polyline") == 2
    assert draw_curves(()) is None
    silent = draw_curves([LogPoint(1, 0, 0.0, None)])
    assert silent is not None
    assert silent.loss is None


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_hold_the_values(low: float, extent: float) -> None:
    axis = linear_axis(low, low + extent)
    slack = 1e-8 * extent + 1e-9 * abs(low)
    assert axis.low <= low + slack
    assert axis.high >= low + extent - slack
    assert 2 <= len(axis.ticks) <= 9


def test_losses_that_fall_far_are_drawn_by_ratios() -> None:
    assert not loss_axis([3.0, 2.0, 1.0]).logarithmic
    assert loss_axis([3.0, 2.0, 1.0]).low == 0
    assert loss_axis([100.0, 0.01, 0.01, 0.02]).logarithmic
    assert not loss_axis([0.0, 0.0]).logarithmic


def test_sizes_have_decimal_units() -> None:
    assert [format_size(count) for count in (0, 999, 1000, 23_100_000, 4.5e9)] == [
        "0 bytes", "999 bytes", "1.0 kB", "23.1 MB", "4.5 GB",
    ]  # fmt: skip
