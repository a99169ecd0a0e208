"""Allocation: exact selection, ties, bounds and refusals, against a plain sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphprune.errors import SparsityError
from graphprune.sparsity import NM, Block, Scope, allocate, select_smallest

SPECIAL = [  # rounded to float32 below
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-40,
    -1e-40,
    1.0000001,
    3e38,
    -3e38,
    math.inf,
    -math.inf,
    1e-3,
    1.0001e-3,
]
VALUES = st.one_of(
    st.sampled_from(torch.tensor(SPECIAL).tolist()),
    st.floats(width=32, allow_nan=False),
    st.integers(-3, 3).map(float),
)
SITES = st.lists(st.lists(VALUES, min_size=1, max_size=12), min_size=1, max_size=5)


def order_of(sites):
    """(site, index) of every score in the order of pruning: smallest first, of equal ones the last first."""
    places = [(site, index) for site, values in enumerate(sites) for index in range(len(values))]
    return sorted(places, key=lambda place: (sites[place[0]][place[1]], -place[0], -place[1]))


def nearest_prefix(sites, sizes, order, goal):
    chosen, total = set(), 0
    for site, index in order:
        size = sizes[site][index]
        if size and abs(total + size - goal) <= abs(total - goal) and total < goal:
            chosen.add((site, index))
            total += size
        elif size:
            break
    return chosen


def as_set(masks):
    return {(site, index) for site, mask in enumerate(masks) for index in mask.flatten().nonzero().flatten().tolist()}


@given(SITES, st.data())
def test_select_smallest_equals_a_sort(sites, data):
    k = data.draw(st.integers(0, sum(map(len, sites))))
    masks = select_smallest([torch.tensor(values) for values in sites], k)
    assert as_set(masks) == set(order_of(sites)[:k])


@given(st.integers(0, 2**16), st.floats(0, 1), st.sampled_from([1, 7, 300]))
def test_select_smallest_on_real_scores(seed, fraction, scale):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(n, 5, generator=generator).mul(scale).round().div(scale) for n in (40, 1, 77)]
    k = int(fraction * sum(part.numel() for part in scores))
    masks = select_smallest(scores, k)
    assert as_set(masks) == set(order_of([part.flatten().tolist() for part in scores])[:k])
    assert [mask.shape for mask in masks] == [part.shape for part in scores]


@given(SITES, st.data(), st.floats(0, 1))
def test_ragged_sizes_to_the_nearest_unit(sites, data, sparsity):
    sizes = [data.draw(st.lists(st.integers(1, 4), min_size=len(v), max_size=len(v))) for v in sites]
    weights = [sum(part) for part in sizes]
    masks = allocate(
        [torch.tensor(v) for v in sites],
        [torch.tensor(part) for part in sizes],
        weights,
        sparsity,
        max_sparsity=1.0,
    )
    expected = nearest_prefix(sites, sizes, order_of(sites), sparsity * sum(weights))
    assert as_set(masks) == expected


@given(SITES, st.floats(0, 1), st.integers(1, 4))
def test_local_gives_every_site_its_share(sites, sparsity, size):
    masks = allocate(
        [torch.tensor(v) for v in sites], [size] * len(sites), [size * len(v) for v in sites], sparsity,
        scope=Scope.LOCAL, max_sparsity=1.0,
    )  # fmt: skip
    for values, mask in zip(sites, masks, strict=True):
        assert abs(int(mask.sum()) - sparsity * len(values)) <= 0.5 + 1e-9
        assert as_set([mask]) == set(order_of([values])[: int(mask.sum())])


@given(SITES, st.data(), st.integers(1, 4))
def test_every_site_has_its_own_target(sites, data, size):
    targets = data.draw(st.lists(st.floats(0, 1), min_size=len(sites), max_size=len(sites)))
    weights = [size * len(values) for values in sites]
    masks = allocate(
        [torch.tensor(v) for v in sites], [size] * len(sites), weights, targets, scope=Scope.LOCAL, max_sparsity=1.0
    )
    for values, mask, target in zip(sites, masks, targets, strict=True):
        assert abs(int(mask.sum()) - target * len(values)) <= 0.5 + 1e-9
        assert as_set([mask]) == set(order_of([values])[: int(mask.sum())])


@given(st.integers(0, 2**16), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_bounds_hold_and_the_budget_is_kept(seed, sparsity, first, second):
    least, most = sorted((first, second))
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(n, generator=generator) * 10.0**e for n, e in ((50, 0), (30, -3), (80, 3), (20, -1))]
    weights = [4 * part.numel() for part in scores]
    arguments = (scores, [4] * 4, weights, sparsity)
    if sparsity * sum(weights) > most * sum(weights) + 1e-3:
        with pytest.raises(SparsityError, match="at most"):
            allocate(*arguments, max_sparsity=most, min_sparsity=least)
        return
    masks = allocate(*arguments, max_sparsity=most, min_sparsity=least)
    counts = [int(mask.sum()) for mask in masks]
    caps = [int(4 * most * len(part) + 1e-3) // 4 for part in scores]
    for count, cap, part in zip(counts, caps, scores, strict=True):
        assert int(4 * min(least, sparsity) * len(part)) // 4 <= count <= cap
    goal = sparsity * 180
    assert abs(sum(counts) - goal) <= 0.5 + 1e-6 or counts == caps
    # Sites strictly between their bounds are cut at one threshold.
    floors = [int(4 * min(least, sparsity) * len(part) + 1e-3) // 4 for part in scores]
    inside = [i for i in range(4) if floors[i] < counts[i] < caps[i]]
    if inside:
        highest = max(float(scores[i][masks[i]].max()) for i in inside if counts[i])
        assert all(bool((scores[i][~masks[i]] >= highest).all()) for i in inside)


def test_caps_push_the_budget_to_the_other_sites():
    scores = [torch.zeros(100), torch.arange(1.0, 101.0)]
    masks = allocate(scores, [1, 1], [100, 100], 0.6, max_sparsity=[0.9, 0.98])
    assert [int(mask.sum()) for mask in masks] == [90, 30]
    masks = allocate(scores, [1, 1], [100, 100], 0.6, max_sparsity=1.0, min_sparsity=0.5)
    assert [int(mask.sum()) for mask in masks] == [70, 50]


def test_ties_keep_the_lowest_site_and_index():
    masks = allocate([torch.zeros(3), torch.zeros(3)], [1, 1], [3, 3], 0.5, max_sparsity=1.0)
    assert [mask.tolist() for mask in masks] == [[False] * 3, [True] * 3]
    masks = allocate([torch.zeros(4), torch.tensor([-0.0, 5.0])], [1, 1], [4, 2], 0.5, max_sparsity=1.0)
    assert [mask.tolist() for mask in masks] == [[False, False, True, True], [True, False]]


def test_a_schedule_of_tied_scores_never_overshoots():
    for sparsity in (0.0064, 0.3, 0.5):
        (mask,) = allocate([torch.zeros(1000)], [1], [1000], sparsity)
        assert int(mask.sum()) == round(1000 * sparsity)


def test_many_chunks_and_shapes():
    torch.manual_seed(0)
    scores = [torch.randn(600, 1000), torch.rand(10, 10) - 1, torch.randn(3, 1000, dtype=torch.float64)]
    masks = select_smallest(scores, 400_000)
    threshold = torch.cat([part.float().flatten() for part in scores]).sort().values[400_000]
    for part, mask in zip(scores, masks, strict=True):
        assert torch.equal(mask, part.float() < threshold)


def test_nm_tail_is_never_pruned():
    pattern, shape = NM(2, 4), (6, 10)
    stored = torch.rand(shape)
    reachable = pattern.max_sparsity(shape)
    (prune,) = allocate([pattern.unit_scores(stored)], [pattern.unit_sizes(shape)], [60], reachable, max_sparsity=1.0)
    kept = pattern.mask(stored, prune, shape)
    assert int((~kept).sum()) == round(60 * reachable)
    assert bool(kept[:, 8:].all())
    with pytest.raises(SparsityError, match=r"at most 0\.4"):
        allocate([pattern.unit_scores(stored)], [pattern.unit_sizes(shape)], [60], 0.5)


def test_mixed_patterns_count_weights():
    torch.manual_seed(0)
    shapes, patterns = [(16, 8), (10, 6), (8, 8)], [Block(4, 1), Block(4, 4), NM(2, 4)]
    stored = [p.reduce(torch.rand(s)) for p, s in zip(patterns, shapes, strict=True)]
    prune = allocate(
        [p.unit_scores(s) for p, s in zip(patterns, stored, strict=True)],
        [p.unit_sizes(s) for p, s in zip(patterns, shapes, strict=True)],
        [a * b for a, b in shapes],
        0.4,
    )
    zeros = sum(int((~p.mask(*rest)).sum()) for p, *rest in zip(patterns, stored, prune, shapes, strict=True))
    assert abs(zeros - 0.4 * sum(a * b for a, b in shapes)) <= 8


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_nan_names_the_site(nan):
    for position in (0, 4):
        bad = torch.arange(5.0)
        bad[position] = nan
        with pytest.raises(SparsityError, match=r"encoder\.fc.*NaN"):
            allocate([torch.ones(3), bad], [1, 1], [3, 5], 0.5, names=("encoder.query", "encoder.fc"))
    quiet = torch.tensor([0x7F800001, -0x007FFFFF], dtype=torch.int32).view(torch.float32)
    with pytest.raises(SparsityError, match="NaN"):
        select_smallest([quiet], 1)


def test_refusals():
    one = [torch.ones(10)]
    with pytest.raises(SparsityError, match="fraction and not percent"):
        allocate(one, [1], [10], 80)
    with pytest.raises(SparsityError, match="is above max_sparsity"):
        allocate(one, [1], [10], 0.5, max_sparsity=0.3, min_sparsity=0.4)
    with pytest.raises(SparsityError, match="give one each"):
        allocate(one, [1], [10, 10], 0.5)
    with pytest.raises(SparsityError, match=r"needs scope 'local', not 'global'"):
        allocate(one, [1], [10], [0.5])
    with pytest.raises(SparsityError, match=r"over 1 sites got 2 sparsities; give one each"):
        allocate(one, [1], [10], [0.5, 0.5], scope=Scope.LOCAL)
    with pytest.raises(SparsityError, match=r"fc: sparsity=80\.0 is not in"):
        allocate(one, [1], [10], [80], scope=Scope.LOCAL, names=["fc"])
    with pytest.raises(SparsityError, match=r"fc: sparsity 0.99 is out of reach: at most 0.98"):
        allocate([*one, *one], [1, 1], [10, 10], [0.5, 0.99], scope=Scope.LOCAL, names=["query", "fc"])
    with pytest.raises(SparsityError, match="unit sizes of shape"):
        allocate(one, [torch.ones(3, dtype=torch.int64)], [10], 0.5)
    with pytest.raises(SparsityError, match="negative"):
        allocate(one, [-1], [10], 0.5)
    with pytest.raises(SparsityError, match=r"fc: sparsity 0.99 is out of reach: at most 0.98"):
        allocate(one, [1], [10], 0.99, scope=Scope.LOCAL, names=["fc"])
    with pytest.raises(SparsityError, match="cannot select 11 of 10"):
        select_smallest(one, 11)


def test_nothing_and_everything():
    scores = [torch.randn(4), torch.randn(2, 3)]
    assert as_set(allocate(scores, [1, 1], [4, 6], 0.0)) == set()
    assert len(as_set(allocate(scores, [1, 1], [4, 6], 1.0, max_sparsity=1.0))) == 10
    assert allocate([], [], [], 0.5) == []
    assert allocate([], [], [], [], scope=Scope.LOCAL) == []
