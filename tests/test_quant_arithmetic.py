"""Schemes, scales and zero points, observers."""

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
    MinMax,
    MovingAverageMinMax,
    QuantDtype,
    Scheme,
    choose_qparams,
    dequantize,
    fake_quantize,
    parse_scheme,
    quantize,
    quantize_range,
)

SCHEMES = [
    Scheme(QuantDtype.INT8, symmetric=True),
    Scheme(QuantDtype.INT8, symmetric=False),
    Scheme(QuantDtype.UINT8, symmetric=False),
]
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def test_presets():
    assert (WEIGHT_INT8.qmin, WEIGHT_INT8.qmax, WEIGHT_INT8.axis) == (-127, 127, 0)
    assert (ACTIVATION_UINT8.qmin, ACTIVATION_UINT8.qmax, ACTIVATION_UINT8.axis) == (0, 255, None)
    assert Scheme(QuantDtype.INT8, symmetric=False).qmin == -128


@pytest.mark.parametrize("scheme", [*SCHEMES, WEIGHT_INT8, Scheme(QuantDtype.INT8, symmetric=True, axis=1)])
def test_scheme_text(scheme):
    assert parse_scheme(str(scheme)) == scheme
    assert str(WEIGHT_INT8) == "int8:symmetric:channel"


def test_scheme_refusals():
    with pytest.raises(RecipeError, match="cannot be symmetric"):
        parse_scheme("uint8:symmetric:tensor")
    with pytest.raises(RecipeError, match="did you mean 'int8:symmetric:channel'"):
        parse_scheme("int8:symetric:channel")
    with pytest.raises(RecipeError, match="negative"):
        Scheme(QuantDtype.INT8, symmetric=True, axis=-1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@given(values=st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=20))
def test_roundtrip_within_half_a_scale(scheme, values):
    x = torch.tensor(values)
    scale, zero_point = choose_qparams(x.min(), x.max(), scheme)
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    assert bool(scale.isfinite())
    assert float(scale) > 0
    assert scheme.qmin <= int(zero_point) <= scheme.qmax
    if scheme.symmetric:
        assert int(zero_point) == 0
    q = quantize(x, scale, zero_point, scheme)
    assert q.dtype == scheme.dtype.torch_dtype
    assert scheme.qmin <= int(q.min())
    assert int(q.max()) <= scheme.qmax
    back = dequantize(q, scale, zero_point)
    error = (back.double() - x.double()).abs()
    assert bool((error <= float(scale) * 0.5 * (1 + 1e-4)).all())
    assert torch.equal(fake_quantize(x, scale, zero_point, scheme), back)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@given(low=FLOATS, high=FLOATS)
def test_zero_is_exact_whatever_the_range(scheme, low, high):
    low, high = sorted((low, high))
    scale, zero_point = choose_qparams(torch.tensor(low), torch.tensor(high), scheme)
    zeros = torch.tensor([0.0, -0.0])
    assert quantize(zeros, scale, zero_point, scheme).tolist() == [int(zero_point)] * 2
    assert fake_quantize(zeros, scale, zero_point, scheme).tolist() == [0.0, 0.0]


@given(st.integers(0, 2**16), st.sampled_from([0, 1]))
def test_masks_survive(seed, axis):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(6, 8, generator=generator) < 0.4
    weight = torch.randn(6, 8, generator=generator) * mask
    scheme = Scheme(QuantDtype.INT8, symmetric=True, axis=axis)
    low, high = MinMax(axis=axis).update(None, None, weight)
    scale, zero_point = choose_qparams(low, high, scheme)
    assert scale.shape == (weight.shape[axis],)
    assert not zero_point.any()
    q = quantize(weight, scale, zero_point, scheme)
    assert bool((q[~mask] == 0).all())
    assert bool((fake_quantize(weight, scale, zero_point, scheme)[~mask] == 0).all())
    largest = q.abs().amax(1 - axis)
    assert bool(((largest == 127) | (largest == 0)).all())


def test_degenerate_and_extreme_ranges():
    zero = torch.zeros(())
    for scheme in SCHEMES:
        scale, zero_point = choose_qparams(zero, zero, scheme)
        assert float(scale) == 1.0
        assert int(zero_point) == (0 if scheme.symmetric else scheme.qmin)
        most = torch.tensor(torch.finfo(torch.float32).max)
        assert bool(choose_qparams(-most, most, scheme)[0].isfinite())
        tiny = torch.tensor(1e-45)
        assert float(choose_qparams(-tiny, tiny, scheme)[0]) == torch.finfo(torch.float32).tiny
    scale, zero_point = choose_qparams(torch.tensor(2.0), torch.tensor(5.1), ACTIVATION_UINT8)
    assert float(scale) == pytest.approx(0.02)
    assert int(zero_point) == 0


def test_rounding_saturation_and_dtype():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, math.inf, -math.inf])
    one, zero = torch.tensor(1.0), torch.tensor(0)
    q = quantize_range(x, one, zero, qmin=-127, qmax=127)
    assert q.dtype == torch.int32
    assert q.tolist() == [0, 2, 2, 0, -2, 127, -127, 127, -127]
    half = torch.tensor([0.25, 1.0]).bfloat16()
    assert fake_quantize(half, torch.tensor(0.5), torch.tensor(3), ACTIVATION_UINT8).dtype == torch.bfloat16


def test_qparams_refusals():
    for low, high in ((1.0, 0.0), (math.nan, 1.0), (0.0, math.inf)):
        with pytest.raises(PassError, match="finite low <= high"):
            choose_qparams(torch.tensor(low), torch.tensor(high), ACTIVATION_UINT8)
    with pytest.raises(PassError, match="low is of shape"):
        choose_qparams(torch.zeros(2), torch.zeros(3), WEIGHT_INT8)
    with pytest.raises(PassError, match="give an axis"):
        quantize(torch.ones(2, 2), torch.ones(2), torch.zeros(2), ACTIVATION_UINT8)
    with pytest.raises(PassError, match="along axis 0"):
        quantize(torch.ones(2, 2), torch.ones(3), torch.zeros(3), WEIGHT_INT8)


@given(st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=5))
def test_min_max_equals_all_at_once(batches):
    low, high = MinMax().initial()
    for batch in batches:
        low, high = MinMax().update(low, high, torch.tensor(batch))
    everything = torch.tensor(batches)
    assert float(low) == everything.min()
    assert float(high) == everything.max()
    low, high = MinMax(axis=1).initial(3)
    for batch in batches:
        low, high = MinMax(axis=1).update(low, high, torch.tensor([batch]))
    assert torch.equal(low, everything.amin(0))
    assert torch.equal(high, everything.amax(0))


def test_moving_average():
    observer = MovingAverageMinMax(momentum=0.25)
    state = observer.update(*observer.initial(), torch.tensor([-1.0, 3.0]))
    assert [float(part) for part in state] == [-1.0, 3.0]
    before = [part.clone() for part in state]
    new = observer.update(*state, torch.tensor([-3.0, 7.0]))
    assert [float(part) for part in new] == [-1.5, 4.0]
    assert all(torch.equal(old, part) for old, part in zip(before, state, strict=True))
    assert MovingAverageMinMax().momentum == 0.01
    assert set(OBSERVERS) >= {"min-max", "moving-average-min-max"}


@pytest.mark.parametrize("observer", [MinMax(), MinMax(axis=0), MovingAverageMinMax()], ids=repr)
def test_observer_refusals(observer):
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(PassError, match="NaN or infinity"):
            observer.update(None, None, torch.tensor([[1.0, bad]]))
    with pytest.raises(PassError, match="no values"):
        observer.update(None, None, torch.ones(1, 0))
    with pytest.raises(PassError, match="its range is"):
        observer.update(torch.zeros(9), torch.zeros(9), torch.ones(2, 2))
    with pytest.raises(PassError, match="no axis 3"):
        MinMax(axis=3).update(None, None, torch.ones(2, 2))
    with pytest.raises(RecipeError, match="momentum"):
        MovingAverageMinMax(momentum=0.0)


def test_observing_half_precision_and_vectors():
    low, high = MinMax().update(None, None, torch.tensor([1.0, 2.0]).half())
    assert low.dtype == high.dtype == torch.float32
    low, high = MinMax(axis=0).update(None, None, torch.tensor([1.0, -2.0]))
    assert torch.equal(low, high)
    assert low.tolist() == [1.0, -2.0]
