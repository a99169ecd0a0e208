"""Distribution: Erdos-Renyi against its fixed point, sensitivity against an exhaustive optimum, and refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from graphprune.errors import SparsityError
from graphprune.sparsity.allocation import Scope, allocate
from graphprune.sparsity.distribution import convex_hull, erdos_renyi, from_sensitivity

SIZE = st.integers(1, 600)
SHAPES = st.lists(
    st.one_of(
        st.tuples(SIZE, SIZE),
        st.tuples(SIZE, SIZE, st.integers(1, 9)),
        st.tuples(SIZE, SIZE, st.integers(1, 7), st.integers(1, 7)),
    ),
    min_size=1,
    max_size=8,
)
FRACTION = st.floats(0, 1)
CURVE = st.dictionaries(st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9, 1.0]), st.floats(0, 100), min_size=1).map(
    lambda points: list(points.items())
)
BERT = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]


def average(targets, weights):
    return math.fsum(target * size for target, size in zip(targets, weights, strict=True)) / sum(weights)


def made_dense(shapes, sparsity, kernel):
    """The rule as the papers' code has it: scale, make dense what is above 1, scale the others again."""
    raw = [sum(s if kernel else s[:2]) / math.prod(s if kernel else s[:2]) for s in shapes]
    sizes = [math.prod(shape) for shape in shapes]
    dense = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in dense]
        budget = (1 - sparsity) * sum(sizes) - sum(sizes[i] for i in dense)
        scale = budget / sum(raw[i] * sizes[i] for i in free) if free else 0.0
        above = [i for i in free if scale * raw[i] > 1]
        if not above:
            return [0.0 if i in dense else 1 - scale * raw[i] for i in range(len(shapes))]
        dense.update(above)


@given(SHAPES, st.floats(0.01, 1), st.booleans())
def test_erdos_renyi_is_the_fixed_point(shapes, sparsity, kernel):
    targets = erdos_renyi(shapes, sparsity, kernel=kernel)
    assert targets == pytest.approx(made_dense(shapes, sparsity, kernel), abs=1e-9)
    assert average(targets, [math.prod(s) for s in shapes]) == pytest.approx(sparsity, abs=1e-9)


@given(SHAPES, FRACTION, FRACTION, st.data(), st.booleans())
def test_erdos_renyi_keeps_bounds_and_the_total(shapes, sparsity, least, data, kernel):
    caps = data.draw(st.lists(FRACTION, min_size=len(shapes), max_size=len(shapes)))
    weights = [math.prod(shape) for shape in shapes]
    assume(min(least, sparsity) <= min(caps))
    if sparsity > average(caps, weights) + 1e-9:
        with pytest.raises(SparsityError, match="at most"):
            erdos_renyi(shapes, sparsity, kernel=kernel, max_sparsity=caps, min_sparsity=least)
        return
    targets = erdos_renyi(shapes, sparsity, kernel=kernel, max_sparsity=caps, min_sparsity=least)
    assert all(min(least, sparsity) <= part <= cap for part, cap in zip(targets, caps, strict=True))
    assert average(targets, weights) == pytest.approx(sparsity, abs=1e-8)
    # Between their bounds all sites have one scale.
    inside = [
        (1 - target) / (sum(part) / math.prod(part))
        for target, cap, shape in zip(targets, caps, shapes, strict=True)
        if min(least, sparsity) + 1e-6 < target < cap - 1e-6
        for part in [shape if kernel else shape[:2]]
    ]
    assert inside == pytest.approx(inside[:1] * len(inside), rel=1e-3)


@given(SHAPES, FRACTION, st.randoms(use_true_random=False))
def test_the_order_of_sites_does_not_matter(shapes, sparsity, random):
    targets = erdos_renyi(shapes, sparsity, kernel=True)
    order = list(range(len(shapes)))
    random.shuffle(order)
    shuffled = erdos_renyi([shapes[i] for i in order], sparsity, kernel=True)
    assert shuffled == pytest.approx([targets[i] for i in order], abs=1e-12)


def test_erdos_renyi_of_a_transformer_layer():
    # Densities in the ratio (384 + 384) / 384^2 : (384 + 1536) / (384 * 1536) = 8 : 5; 4 * 1 + 8 * 1 units of weight.
    targets = erdos_renyi(BERT, 0.8, kernel=True)
    square, wide = 1 - 0.2 * 12 / (4 + 8 * 5 / 8), 1 - 5 / 8 * 0.2 * 12 / (4 + 8 * 5 / 8)
    assert targets == pytest.approx([square] * 4 + [wide] * 2)
    assert targets == erdos_renyi(BERT, 0.8, kernel=False)


def test_kernels_count_only_where_asked():
    shapes = [(64, 64, 3, 3), (64, 64)]
    assert erdos_renyi(shapes, 0.5, kernel=False) == pytest.approx([0.5, 0.5])
    dense, sparse = erdos_renyi(shapes, 0.5, kernel=True)[::-1]
    assert dense < 0.5 < sparse


def test_targets_go_into_allocate():
    torch.manual_seed(0)
    targets = erdos_renyi(BERT, 0.8, kernel=True, max_sparsity=0.81)
    weights = [a * b for a, b in BERT]
    masks = allocate(
        [torch.rand(shape) for shape in BERT], [1] * 6, weights, targets, scope=Scope.LOCAL, max_sparsity=0.81
    )
    for mask, target, size in zip(masks, targets, weights, strict=True):
        assert abs(int(mask.sum()) - target * size) <= 1
    assert sum(int(mask.sum()) for mask in masks) == pytest.approx(0.8 * sum(weights), abs=6)


def cost_of(curve, place):
    """A convexified curve, interpolated."""
    for (x0, y0), (x1, y1) in itertools.pairwise(convex_hull(curve)):
        if place <= x1 + 1e-12:
            return y0 + (y1 - y0) * max(0.0, place - x0) / (x1 - x0)
    raise AssertionError(f"{place} lies beyond the curve")


@given(CURVE)
def test_the_hull_is_convex_and_below_the_curve(curve):
    hull = convex_hull(curve)
    assert hull[0] == (0.0, 0.0)
    assert hull[-1] == (max(curve)[0], max(cost for _, cost in curve))
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(hull)]
    assert all(0 <= a <= b * (1 + 1e-9) + 1e-9 for a, b in itertools.pairwise(slopes))
    highest = 0.0
    for place, cost in sorted(curve):
        highest = max(highest, cost)
        assert cost_of(curve, place) <= highest + 1e-9 * (1 + highest)
    assert all(corner in {(0.0, 0.0), *((x, max(c for p, c in curve if p <= x)) for x, _ in curve)} for corner in hull)


@given(st.lists(st.tuples(CURVE, st.integers(1, 5)), min_size=1, max_size=3), FRACTION)
def test_sensitivity_finds_the_cheapest_share(sites, sparsity):
    curves, weights = [list(curve) for curve, _ in sites], [size for _, size in sites]
    tops = [max(curve)[0] for curve in curves]
    if sparsity > average(tops, weights) + 1e-9:
        with pytest.raises(SparsityError, match="at most"):
            from_sensitivity(curves, weights, sparsity)
        return
    targets = from_sensitivity(curves, weights, sparsity)
    assert all(-1e-12 <= target <= top for target, top in zip(targets, tops, strict=True))
    assert average(targets, weights) == pytest.approx(sparsity, abs=1e-9)
    found = math.fsum(cost_of(curve, target) for curve, target in zip(curves, targets, strict=True))
    # An optimum has all sites but one at corners of their hulls: try them all.
    best = math.inf
    for free in range(len(sites)):
        others = [[x for x, _ in convex_hull(curve)] for i, curve in enumerate(curves) if i != free]
        for corners in itertools.product(*others):
            shares = [*corners[:free], 0.0, *corners[free:]]
            rest = (sparsity * sum(weights) - sum(s * w for s, w in zip(shares, weights, strict=True))) / weights[free]
            if -1e-9 <= rest <= tops[free] + 1e-9:
                shares[free] = min(max(rest, 0.0), tops[free])
                best = min(best, sum(cost_of(c, s) for c, s in zip(curves, shares, strict=True)))
    assert found <= best + 1e-6 * (1 + best)


def test_insensitive_sites_are_pruned_first():
    flat, steep = [(0.5, 0.0), (0.9, 1.0)], [(0.5, 4.0), (0.9, 9.0)]
    assert from_sensitivity([flat, steep], [100, 100], 0.25) == pytest.approx([0.5, 0.0])
    assert from_sensitivity([flat, steep], [100, 100], 0.45) == pytest.approx([0.9, 0.0])
    assert from_sensitivity([flat, steep], [100, 100], 0.7) == pytest.approx([0.9, 0.5])


def test_equal_sites_share_equally():
    curve = [(0.5, 1.0), (0.9, 5.0)]
    assert from_sensitivity([curve] * 3, [10] * 3, 0.3) == pytest.approx([0.3] * 3)
    assert from_sensitivity([curve] * 3, [10] * 3, 0.9) == pytest.approx([0.9] * 3)
    costs_per_weight = [[(0.5, size)] for size in (1.0, 2.0, 4.0)]
    assert from_sensitivity(costs_per_weight, [10, 20, 40], 0.3) == pytest.approx([0.3] * 3)
    assert from_sensitivity([curve] * 2, [10, 30], 0.375) == pytest.approx([0.0, 0.5])  # the larger is cheaper a weight


def test_dips_and_bulges_are_smoothed():
    assert convex_hull([(0.5, 2.0), (0.7, 1.0), (0.9, 3.0)]) == [(0.0, 0.0), (0.7, 2.0), (0.9, 3.0)]
    assert convex_hull([(0.5, 3.0), (1.0, 4.0)]) == [(0.0, 0.0), (1.0, 4.0)]


def test_no_sites_and_nothing_to_prune():
    assert erdos_renyi([], 0.5, kernel=True) == []
    assert from_sensitivity([], [], 0.5) == []
    assert erdos_renyi(BERT, 0.0, kernel=True) == pytest.approx([0.0] * 6)
    assert erdos_renyi(BERT, 0.8, kernel=True, max_sparsity=0.8, min_sparsity=0.9) == pytest.approx([0.8] * 6)
    assert erdos_renyi(BERT, 1.0, kernel=True) == pytest.approx([1.0] * 6)
    assert from_sensitivity([[(0.5, 1.0)]], [4], 0.0) == [0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: erdos_renyi(BERT, 80, kernel=True), "fraction and not percent"),
        (lambda: erdos_renyi(BERT, 0.9, kernel=True, max_sparsity=0.85), "at most 0.85 can be reached"),
        (lambda: erdos_renyi(BERT, 0.9, kernel=True, max_sparsity=[0.9]), "got 1 caps"),
        (lambda: erdos_renyi(BERT, 0.5, kernel=True, max_sparsity=0.3, min_sparsity=0.4), "is above max_sparsity"),
        (lambda: erdos_renyi([(4,)], 0.5, kernel=True), "no inputs and outputs"),
        (lambda: erdos_renyi([(4, 0)], 0.5, kernel=True), "no inputs and outputs"),
        (lambda: from_sensitivity([[(0.5, 1.0)]], [], 0.5), "give one each"),
        (lambda: from_sensitivity([[(0.5, 1.0)]], [4], 50), "fraction and not percent"),
        (lambda: from_sensitivity([[(0.5, 1.0)]], [4], 0.6), "at most 0.5"),
        (lambda: from_sensitivity([[(0.5, 1.0)]], [0], 0.5), "has 0 weights"),
        (lambda: from_sensitivity([[]], [4], 0.5), "no points"),
        (lambda: from_sensitivity([[(0.5, -1.0)]], [4], 0.5), "negative or not finite"),
        (lambda: from_sensitivity([[(0.5, math.nan)]], [4], 0.5), "negative or not finite"),
        (lambda: from_sensitivity([[(0.5, 1.0), (0.5, 2.0)]], [4], 0.5), "comes twice"),
        (lambda: from_sensitivity([[(50, 1.0)]], [4], 0.5), r"not in \(0, 1\]"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(SparsityError, match=message):
        call()
