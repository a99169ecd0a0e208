"""Observers with a histogram, against plain NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphprune.quant import (
    ACTIVATION_UINT8,
    EntropyHistogram,
    MeanSquaredError,
    MinMax,
    Percentile,
    choose_qparams,
    fake_quantize,
    parse_scheme,
)
from graphprune.quant.histograms import bin_grid

INT8 = parse_scheme("int8:symmetric:tensor")
INT4 = parse_scheme("int4:symmetric:tensor")
UINT4 = parse_scheme("uint4:affine:tensor")
FLOATS = st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=False)


def _edges(state, bins):
    (width,), (start,) = bin_grid(state.low.reshape(1), state.high.reshape(1), bins)
    return (start + np.arange(bins + 1)) * width


def _mixture(seed, count=4000):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator)
    x[: count // 50] *= 8.0
    return [x, x.abs(), -x.abs(), x.relu(), torch.nn.functional.gelu(x)][seed % 5]


@given(st.lists(st.lists(FLOATS, min_size=1, max_size=9), min_size=1, max_size=6), st.randoms())
def test_histograms_know_no_order_and_no_batches(batches, random):
    observer = Percentile(bins=64)
    together = observer.update(None, torch.tensor([value for batch in batches for value in batch]))
    shuffled = list(batches)
    random.shuffle(shuffled)
    for order in (batches, shuffled):
        state = observer.initial()
        for batch in order:
            state = observer.update(state, torch.tensor(batch))
        assert all(torch.equal(one, other) for one, other in zip(state, together, strict=True))
    assert float(together.histogram.sum()) == sum(len(batch) for batch in batches)


@given(st.lists(FLOATS, min_size=1, max_size=30), st.sampled_from([64, 100, 2048]))
def test_histogram_equals_numpy(values, bins):
    x = torch.tensor(values)
    state = Percentile(bins=bins).update(None, x)
    edges = _edges(state, bins)
    assert edges[0] <= min(0.0, x.min())
    assert edges[-1] > max(0.0, x.max())
    width = edges[1] - edges[0]
    assert math.frexp(width)[0] == 0.5  # a power of two
    assert width == torch.finfo(torch.float32).tiny or width * bins < 4.1 * (max(0.0, x.max()) - min(0.0, x.min()))
    expected = np.bincount(np.searchsorted(edges, x.double().numpy(), side="right") - 1, minlength=bins)
    assert state.histogram.tolist() == expected.tolist()


def test_histograms_by_channel():
    x = torch.randn(3, 5, 40) * torch.tensor([1.0, 0.0, 100.0])[:, None, None]
    x[0] += 3.0
    state = Percentile(axis=0).initial((3,))
    for index in (0, 3, 4):
        state = Percentile(axis=0).update(state, x[:, index : index + (3 if index == 0 else 1)])
    for channel in range(3):
        alone = Percentile().update(None, x[channel])
        assert torch.equal(state.histogram[channel], alone.histogram)
        assert float(state.low[channel]) == alone.low
    moved = Percentile(axis=1).update(None, x.transpose(0, 1))
    assert torch.equal(moved.histogram, state.histogram)
    low, high = Percentile(axis=0, fraction=0.9).range(state, INT8)
    for channel in range(3):
        alone = Percentile().update(None, x[channel])
        expected = Percentile(fraction=0.9).range(alone, INT8)
        assert torch.equal(torch.stack([low[channel], high[channel]]), torch.stack(expected))


@given(st.integers(0, 2**16), st.sampled_from([0.5, 0.9, 0.99, 0.999]))
def test_percentile_equals_numpy_within_a_bin(seed, fraction):
    x = _mixture(seed)
    observer = Percentile(fraction=fraction)
    state = observer.update(None, x)
    width = np.diff(_edges(state, observer.bins))[0]
    both = float(x.min()) < 0.0 < float(x.max())
    tail = (1.0 - fraction) / (2.0 if both else 1.0)
    low, high = (float(part) for part in observer.range(state, ACTIVATION_UINT8))
    values = x.double().numpy()
    assert _is_quantile(low, values, tail if values.min() < 0 else 0.0, width)
    assert _is_quantile(high, values, 1.0 - tail if values.max() > 0 else 1.0, width)
    inside = ((values >= low - width) & (values <= high + width)).mean()
    assert inside >= fraction - 1e-3
    low, high = (float(part) for part in observer.range(state, INT8))
    assert _is_quantile(max(-low, high), np.abs(values), fraction, width)


def _is_quantile(found, values, share, width):
    """Whether a share of the values is below ``found``, to within a bin; between two values any will do."""
    before, after = (
        np.quantile(values, min(max(share + nudge, 0.0), 1.0), method="inverted_cdf") for nudge in (-1e-9, 1e-9)
    )
    return before - width <= found <= after + width


def test_percentile_of_everything_and_of_nothing():
    x = torch.tensor([-3.0, 1.0, 2.0])
    for scheme in (INT8, ACTIVATION_UINT8):
        state = Percentile(fraction=1.0).update(None, x)
        low, high = (float(part) for part in Percentile(fraction=1.0).range(state, scheme))
        assert max(-low, high) == 3.0
        for observer in (Percentile(), EntropyHistogram(), MeanSquaredError()):
            zero = observer.update(None, torch.zeros(5))
            assert [float(part) for part in observer.range(zero, scheme)] == [0.0, 0.0]
            constant = observer.update(None, torch.full((5,), 7.0))
            assert float(observer.range(constant, scheme)[1]) == pytest.approx(7.0, rel=0.01)


def _error(x, weights, low, high, scheme):
    scale, zero_point = choose_qparams(torch.tensor(low), torch.tensor(high), scheme)
    difference = fake_quantize(x, scale, zero_point, scheme).double() - x.double()
    return float((difference**2 * weights).sum())


def _search(x, weights, scheme, grid):
    """The definition of the squared error search, one candidate at a time; returns the smallest error."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    found = (_error(x, weights, low, high, scheme), low, high)
    for ends in ("both",) if scheme.symmetric else ("both", "low", "high"):
        _, base_low, base_high = found
        for index in range(grid):
            factor = 1.0 - index / grid
            candidate = (base_low if ends == "high" else low * factor, base_high if ends == "low" else high * factor)
            error = _error(x, weights, *candidate, scheme)
            if error < found[0] * (1 - 1e-6):
                found = (error, *candidate)
    return found[0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scheme", [INT4, UINT4, INT8, ACTIVATION_UINT8], ids=str)
def test_mse_equals_brute_force(seed, scheme):
    observer = MeanSquaredError(bins=128, grid=20)
    x = _mixture(seed, 500)
    chosen = [float(part) for part in observer.tensor_range(x, scheme)]
    ones = torch.ones(len(x), dtype=torch.float64)
    assert _error(x, ones, *chosen, scheme) == pytest.approx(_search(x, ones, scheme, 20), rel=1e-3)
    state = observer.update(None, x)
    edges = torch.from_numpy(_edges(state, 128))
    middles = ((edges[1:] + edges[:-1]) / 2).float()
    low, high = (float(part) for part in observer.range(state, scheme))
    assert min(float(x.min()), 0.0) <= low <= high <= max(float(x.max()), 0.0)
    full = _error(middles, state.histogram.double(), float(x.min()), float(x.max()), scheme)
    assert _error(middles, state.histogram.double(), low, high, scheme) <= full


@pytest.mark.parametrize("text", ["int4:symmetric:axis1", "uint4:affine:channel", "int4:symmetric:channel:group8"])
def test_mse_by_channel_equals_slices(text):
    x = torch.randn(6, 16) ** 3
    scheme = parse_scheme(text)
    low, high = MeanSquaredError(grid=20).tensor_range(x, scheme)
    rows = x.T if scheme.axis == 1 else x.reshape(-1, scheme.group or 16)
    for row, below, above in zip(rows, low.reshape(-1), high.reshape(-1), strict=True):
        alone = MeanSquaredError(grid=20).tensor_range(row, UINT4 if "affine" in text else INT4)
        assert [float(part) for part in alone] == [float(below), float(above)]
    narrow, wide = (
        fake_quantize(x, *choose_qparams(*part, scheme), scheme)
        for part in ((low, high), MinMax().tensor_range(x, scheme))
    )
    assert float((narrow - x).square().sum()) < float((wide - x).square().sum())


def _entropy_threshold(histogram, edges, scheme, tried=128):
    """The definition of the entropy search in plain Python; returns threshold and every candidate's divergence."""
    width = edges[1] - edges[0]
    mass = {round(edge / width): float(count) for edge, count in zip(edges[:-1], histogram, strict=True)}
    if scheme.symmetric:
        folded: dict[int, float] = {}
        for index, count in mass.items():
            key = index if index >= 0 else -1 - index
            folded[key] = folded.get(key, 0.0) + count
        mass = folded
    used = [index for index, count in mass.items() if count]
    first, last = min(used), max(used)
    if first <= 0 <= last and last > first:
        neighbors = [mass[index] for index in (-1, 1) if first <= index <= last]
        mass[0] = min(mass[0], max(neighbors))
    most = max(-first, last + 1)
    integers = scheme.qmax + 1 if scheme.symmetric else scheme.qmax - scheme.qmin + 1
    enough = [t for t in range(1, most + 1) if min(last + 1, t) - max(first, -t) >= integers]
    fewest = enough[0] if enough else most
    step = max(1, math.ceil((most - fewest + 1) / tried))
    results = {}
    for threshold in range(most, fewest - 1, -step):
        left, right = max(first, -threshold), min(last, threshold - 1)
        inside = {index: mass[index] for index in range(left, right + 1)}
        reference = dict(inside)
        reference[left] += sum(mass[index] for index in range(first, left))
        reference[right] += sum(mass[index] for index in range(right + 1, last + 1))
        scale, zero = choose_qparams(torch.tensor(left * width), torch.tensor((right + 1) * width), scheme)
        levels: dict[int, list[int]] = {}
        for index in inside:
            level = round((index + 0.5) * width / float(scale)) + int(zero)
            levels.setdefault(min(max(level, scheme.qmin), scheme.qmax), []).append(index)
        candidate = {}
        for members in levels.values():
            present = [index for index in members if reference[index] > 0]
            for index in present:
                candidate[index] = max(sum(inside[member] for member in members) / len(present), 1e-4)
        total, other = sum(reference.values()), sum(candidate.values())
        divergence = 0.0
        for index, count in reference.items():
            if count > 0:
                divergence += count / total * math.log(count / total * other / candidate[index])
        results[threshold * width] = divergence
    return min(results, key=results.__getitem__), results


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scheme", [INT4, UINT4], ids=str)
def test_entropy_equals_brute_force(seed, scheme):
    observer = EntropyHistogram(bins=64)
    state = observer.update(None, _mixture(seed, 2000))
    threshold, results = _entropy_threshold(state.histogram.tolist(), _edges(state, 64).tolist(), scheme)
    low, high = (float(part) for part in observer.range(state, scheme))
    expected = max(-max(-threshold, float(state.low)), min(threshold, float(state.high)))
    found = max(-low, high)
    assert found == expected or results.get(found, math.inf) == pytest.approx(results[threshold], rel=1e-6)


def test_entropy_cuts_outliers_and_ignores_how_many_zeros_there_are():
    x = torch.randn(20000).abs()
    x[:3] = 30.0
    for scheme in (ACTIVATION_UINT8, INT8):
        chosen = []
        for zeros in (0, 20000):
            state = EntropyHistogram().update(None, torch.cat([x, torch.zeros(zeros)]))
            chosen.append(float(EntropyHistogram().range(state, scheme)[1]))
        assert chosen[0] == chosen[1]
        assert 3.0 < chosen[0] < 10.0


def test_entropy_by_channel():
    x = torch.randn(2, 2000) * torch.tensor([[1.0], [5.0]])
    observer = EntropyHistogram(axis=0)
    low, high = observer.range(observer.update(None, x), parse_scheme("int8:symmetric:channel"))
    for row in range(2):
        alone = EntropyHistogram().range(EntropyHistogram().update(None, x[row]), INT8)
        assert [float(part) for part in alone] == [float(low[row]), float(high[row])]
