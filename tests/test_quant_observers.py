"""Observers without histogram, their text form, and what all observers have in common."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphprune.errors import PassError, RecipeError
from graphprune.quant import (
    ACTIVATION_UINT8,
    OBSERVERS,
    WEIGHT_INT8,
    EntropyHistogram,
    MeanSquaredError,
    MinMax,
    MovingAverageMinMax,
    Percentile,
    format_observer,
    parse_observer,
    parse_scheme,
)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ALL = [cls() for cls in OBSERVERS.values()]


@given(st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=5))
def test_min_max_equals_all_at_once(batches):
    everything = torch.tensor(batches)
    state, by_channel = MinMax().initial(), MinMax(axis=1).initial((3,))
    for batch in batches:
        state = MinMax().update(state, torch.tensor(batch))
        by_channel = MinMax(axis=1).update(by_channel, torch.tensor([batch]))
    assert (float(state.low), float(state.high)) == (everything.min(), everything.max())
    assert torch.equal(by_channel.low, everything.amin(0))
    assert torch.equal(by_channel.high, everything.amax(0))


def test_moving_average():
    observer = MovingAverageMinMax(momentum=0.25)
    state = observer.update(observer.initial(), torch.tensor([-1.0, 3.0]))
    assert [float(state.low), float(state.high)] == [-1.0, 3.0]
    before = [part.clone() for part in state]
    new = observer.update(state, torch.tensor([-3.0, 7.0]))
    assert [float(new.low), float(new.high)] == [-1.5, 4.0]
    assert all(torch.equal(old, part) for old, part in zip(before, state, strict=True))
    assert [float(part) for part in observer.range(new, ACTIVATION_UINT8)] == [-1.5, 4.0]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", [MinMax, MovingAverageMinMax])
def test_groups_equal_slices(kind, axis):
    x = torch.randn(8, 12)
    scheme = parse_scheme(f"int4:affine:axis{axis}:group4")
    observer = kind(axis=axis, group=4)
    state = observer.update(observer.initial(scheme.qparams_shape(x.shape)), x)
    for index in range(x.shape[1 - axis] // 4):
        piece = x.narrow(1 - axis, 4 * index, 4)
        assert torch.equal(state.low.select(1 - axis, index), piece.amin(1 - axis))
        assert torch.equal(state.high.select(1 - axis, index), piece.amax(1 - axis))
    assert torch.equal(kind().tensor_range(x, scheme)[0], state.low)


@pytest.mark.parametrize("observer", ALL, ids=format_observer)
@pytest.mark.parametrize("text", ["int8:symmetric:tensor", "int8:symmetric:axis1", "int4:affine:axis1:group4"])
def test_the_range_of_a_weight(observer, text):
    scheme = parse_scheme(text)
    weight = torch.randn(8, 6)
    weight[:, 2] = 0.0
    weight[:, 3].abs_()
    low, high = observer.tensor_range(weight, scheme)
    seen_low, seen_high = MinMax().tensor_range(weight, scheme)
    assert low.shape == high.shape == scheme.qparams_shape(weight.shape)
    assert low.dtype == high.dtype == torch.float32
    assert bool((seen_low.clamp(max=0.0) <= low).all())
    assert bool((low <= high).all())
    assert bool((high <= seen_high.clamp(min=0.0)).all())


@pytest.mark.parametrize("observer", ALL, ids=format_observer)
def test_state(observer):
    state = observer.initial()
    assert state.low.dtype == state.high.dtype == state.histogram.dtype == torch.float32
    assert (float(state.low), float(state.high)) == (math.inf, -math.inf)
    assert state.histogram.shape == (observer.bins or 0,)
    assert observer.live == (observer.bins == 0)
    with pytest.raises(PassError, match="has seen no data"):
        observer.range(state, ACTIVATION_UINT8)
    x = torch.tensor([[-1.0, 2.0], [0.5, 3.0]])
    with_start, without = observer.update(state, x), observer.update(None, x)
    assert all(torch.equal(one, other) for one, other in zip(with_start, without, strict=True))
    assert not state.histogram.any()
    by_row = type(observer)(axis=0).update(type(observer)(axis=0).initial((2,)), x)
    assert by_row.low.tolist() == [-1.0, 0.5]
    assert by_row.histogram.shape == ((2, observer.bins) if observer.bins else (0,))


@pytest.mark.parametrize("observer", ALL, ids=format_observer)
def test_refusals(observer):
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(PassError, match="NaN or infinity"):
            observer.update(None, torch.tensor([[1.0, bad]]))
        with pytest.raises(PassError, match="NaN or infinity"):
            observer.tensor_range(torch.tensor([[1.0, bad]]), WEIGHT_INT8)
    for empty in (torch.ones(1, 0), torch.ones(0, 1)):
        with pytest.raises(PassError, match="no values"):
            observer.update(None, empty)
        with pytest.raises(PassError, match="no values"):
            observer.tensor_range(empty, WEIGHT_INT8)
    with pytest.raises(PassError, match="its range is"):
        observer.update(observer.initial((9,)), torch.ones(2, 2))
    with pytest.raises(PassError, match="no axis 3"):
        type(observer)(axis=3).update(None, torch.ones(2, 2))
    with pytest.raises(PassError, match="has 6 entries, not a multiple of group 4"):
        observer.tensor_range(torch.ones(2, 6), parse_scheme("int4:symmetric:channel:group4"))
    if observer.bins:
        with pytest.raises(PassError, match="start from initial"):
            observer.update(MinMax().initial(), torch.ones(2))
        with pytest.raises(RecipeError, match="no histograms by group"):
            type(observer)(axis=0, group=4)
    else:
        with pytest.raises(RecipeError, match="axis 0 or 1"):
            type(observer)(group=4)
        with pytest.raises(PassError, match="group that divides"):
            type(observer)(axis=0, group=4).update(None, torch.ones(2, 6))


@pytest.mark.parametrize("observer", ALL, ids=format_observer)
def test_half_precision_and_vectors(observer):
    state = observer.update(None, torch.tensor([1.0, 2.0]).half())
    assert all(part.dtype == torch.float32 for part in state)
    state = type(observer)(axis=0).update(None, torch.tensor([1.0, -2.0]).bfloat16())
    assert torch.equal(state.low, state.high)
    assert state.low.tolist() == [1.0, -2.0]


def test_impossible_options():
    for kind, options in (
        (MovingAverageMinMax, {"momentum": 0.0}),
        (Percentile, {"fraction": 1.5}),
        (Percentile, {"bins": 8}),
        (EntropyHistogram, {"bins": 1 << 16}),
        (MeanSquaredError, {"grid": 0}),
    ):
        with pytest.raises(RecipeError, match=next(iter(options))):
            kind(**options)


@given(
    st.sampled_from(
        [
            MinMax(),
            MovingAverageMinMax(momentum=0.5),
            Percentile(fraction=0.25, bins=128),
            EntropyHistogram(bins=4096),
            MeanSquaredError(grid=7),
            *ALL,
        ]
    )
)
def test_text(observer):
    assert parse_observer(format_observer(observer)) == observer
    assert parse_observer(f" {format_observer(observer)} ", axis=1) == type(observer)(
        **{**vars(observer), "axis": 1, "group": None}
    )


def test_texts():
    assert parse_observer("percentile( fraction = 0.999 )") == Percentile(fraction=0.999)
    assert parse_observer("min-max()", axis=0, group=8) == MinMax(axis=0, group=8)
    assert format_observer(Percentile(axis=1, fraction=0.999)) == "percentile(fraction=0.999)"
    assert format_observer(MinMax(axis=0, group=2)) == "min-max"
    for text, message in {
        "percentil": "did you mean 'percentile'",
        "percentile(": "write name or name",
        "percentile(share=1)": "unknown option 'share'",
        "min-max(axis=1)": "unknown option 'axis'; it has no options",
        "mse(grid=1,grid=2)": "given twice",
        "mse(grid=1.5)": "no number of its kind.*grid=100",
        "percentile(fraction=2)": "not in",
    }.items():
        with pytest.raises(RecipeError, match=message):
            parse_observer(text)
