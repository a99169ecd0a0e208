"""Layouts and patterns: shapes, reductions, masks and text, for dimensions that divide and that do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphprune.errors import SparsityError
from graphprune.sparsity import (
    NM,
    Block,
    Channel,
    Layout,
    Unstructured,
    from_logical,
    logical_shape,
    parse_pattern,
    to_logical,
)

TILED = st.one_of(
    st.just(Unstructured()),
    st.builds(Block, st.integers(2, 6), st.integers(1, 5)),
    st.builds(Block, st.just(1), st.integers(2, 5)),
    st.builds(Channel, st.integers(0, 1), st.integers(1, 4)),
)
GROUPED = st.integers(1, 5).flatmap(lambda n: st.builds(NM, st.just(n), st.integers(n + 1, 9)))
PATTERNS = st.one_of(TILED, GROUPED)
SHAPES = st.tuples(st.integers(1, 13), st.integers(1, 17))
SEEDS = st.integers(0, 2**16)


def scores_for(shape, seed, levels=0):
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(0, levels, shape, generator=generator).float()
    return torch.randn(shape, generator=generator)


def blocks_of(pattern, shape):
    """Every unit of a tiled pattern as (row slice, column slice), in flattened order."""
    rows, columns = {Unstructured: (1, 1)}.get(type(pattern)) or (
        (pattern.rows, pattern.columns)
        if isinstance(pattern, Block)
        else ((pattern.width, shape[1]) if pattern.axis == 0 else (shape[0], pattern.width))
    )
    return [
        (slice(r, min(r + rows, shape[0])), slice(c, min(c + columns, shape[1])))
        for r in range(0, shape[0], rows)
        for c in range(0, shape[1], columns)
    ]


@pytest.mark.parametrize(
    ("layout", "shape", "expected"),
    [
        (Layout.OUT_IN, (6, 4), (6, 4)),
        (Layout.IN_OUT, (4, 6), (6, 4)),
        (Layout.CONV, (6, 4, 3), (6, 12)),
        (Layout.CONV, (6, 4, 3, 2), (6, 24)),
        (Layout.CONV, (6, 4, 3, 2, 2), (6, 48)),
    ],
)
def test_layout_roundtrip(layout, shape, expected):
    weight = torch.arange(torch.Size(shape).numel()).view(shape).float()
    logical = to_logical(weight, layout)
    assert tuple(logical.shape) == logical_shape(shape, layout) == expected
    back = from_logical(logical, layout, shape)
    assert torch.equal(back, weight)
    assert back.is_contiguous()
    assert back.stride() == weight.stride()


def test_conv_input_channel_is_fastest():
    weight = torch.randn(2, 3, 4, 5)
    logical = to_logical(weight, Layout.CONV)
    for channel in range(3):
        for row in range(4):
            for column in range(5):
                assert torch.equal(logical[:, (row * 5 + column) * 3 + channel], weight[:, channel, row, column])


def test_layouts_are_views_where_possible():
    linear, gpt2, pointwise = torch.randn(3, 4), torch.randn(3, 4), torch.randn(4, 3, 1, 1)
    nhwc = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    for weight, layout in [
        (linear, Layout.OUT_IN),
        (gpt2, Layout.IN_OUT),
        (pointwise, Layout.CONV),
        (nhwc, Layout.CONV),
    ]:
        assert to_logical(weight, layout).data_ptr() == weight.data_ptr()


def test_layout_refuses_wrong_dimensions():
    with pytest.raises(SparsityError, match="2 dimensions"):
        to_logical(torch.ones(2, 2, 2), Layout.OUT_IN)
    with pytest.raises(SparsityError, match=r"in/groups, \*kernel"):
        logical_shape((2, 2), Layout.CONV)
    with pytest.raises(SparsityError, match="is no in_out weight"):
        from_logical(torch.ones(2, 3), Layout.IN_OUT, (2, 3))


@given(PATTERNS)
def test_text_roundtrip(pattern):
    assert parse_pattern(str(pattern)) == pattern


def test_text_forms():
    assert parse_pattern("1x1") == parse_pattern(" Unstructured ") == Unstructured()
    assert parse_pattern("4x1") == Block(4, 1)
    assert parse_pattern("2:4") == NM(2, 4)
    assert parse_pattern("channelx1") == Channel(1)
    assert parse_pattern("1xchannel") == Channel(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unstructred", "did you mean 'unstructured'"),
        ("xchannel", "1xchannel"),
        ("", "known: "),
        ("0x4", "is empty"),
        ("4:2", "0 < n < m"),
        ("4:4", "0 < n < m"),
    ],
)
def test_text_refusals(text, message):
    with pytest.raises(SparsityError, match=message):
        parse_pattern(text)


def test_impossible_patterns():
    with pytest.raises(SparsityError, match="Unstructured"):
        Block(1, 1)
    with pytest.raises(SparsityError, match="neither 0"):
        Channel(2)


def test_misfit():
    assert Block(4, 1).misfit((8, 3)) is None
    assert "10 outputs are not a multiple of the 4 rows" in Block(4, 1).misfit((10, 3))
    assert "has only 3 inputs" in Block(1, 4).misfit((10, 3))
    assert "6 inputs are not a multiple of m=4" in NM(2, 4).misfit((1, 6))
    assert "spans 4 inputs" in NM(2, 4).misfit((1, 3))
    for pattern in (Unstructured(), Channel(0), Channel(1)):
        assert pattern.misfit((7, 5)) is None


@given(TILED, SHAPES, SEEDS)
def test_tiled_units(pattern, shape, seed):
    scores = scores_for(shape, seed)
    blocks = blocks_of(pattern, shape)
    stored = pattern.reduce(scores)
    assert tuple(stored.shape) == pattern.score_shape(shape)
    torch.testing.assert_close(stored.flatten(), torch.stack([scores[block].mean() for block in blocks]))
    assert pattern.unit_scores(stored) is stored
    sizes = pattern.unit_sizes(shape)
    counts = torch.tensor([scores[block].numel() for block in blocks])
    assert torch.equal(torch.full_like(counts, sizes) if isinstance(sizes, int) else sizes.flatten(), counts)
    prune = stored < 0
    kept = pattern.mask(stored, prune, shape)
    expected = torch.ones(shape, dtype=torch.bool)
    for block, gone in zip(blocks, prune.flatten().tolist(), strict=True):
        expected[block] = not gone
    assert torch.equal(kept, expected)
    assert kept.is_contiguous()
    assert pattern.holds(kept)
    pruned = sum(count for count, gone in zip(counts.tolist(), prune.flatten().tolist(), strict=True) if gone)
    assert pattern.pattern_sparsity(~kept) == pruned / scores.numel()
    assert pattern.max_sparsity(shape) == 1.0


@given(TILED, SHAPES, SEEDS)
def test_tiled_holds_only_whole_units(pattern, shape, seed):
    kept = scores_for(shape, seed, levels=2).bool()
    expected = all(bool(kept[block].all()) or not bool(kept[block].any()) for block in blocks_of(pattern, shape))
    assert pattern.holds(kept) == expected


@given(GROUPED, SHAPES, SEEDS, st.sampled_from([0, 3]))
def test_nm_units(pattern, shape, seed, levels):
    scores = scores_for(shape, seed, levels)
    dropped = pattern.m - pattern.n
    full = shape[1] // pattern.m
    assert pattern.reduce(scores) is scores
    units = pattern.unit_scores(scores)
    assert tuple(units.shape) == (shape[0], -(-shape[1] // pattern.m))
    sizes = pattern.unit_sizes(shape)
    prune = scores_for(tuple(units.shape), seed + 1) < 0
    kept = pattern.mask(scores, prune, shape)
    for row in range(shape[0]):
        for group in range(units.shape[1]):
            values = scores[row, group * pattern.m : (group + 1) * pattern.m].tolist()
            places = sorted(range(len(values)), key=lambda place: (values[place], -place))[:dropped]
            wanted = [True] * len(values)
            if group < full:
                torch.testing.assert_close(
                    units[row, group].item(), sum(values[p] for p in places) / dropped, rtol=1e-5, atol=1e-6
                )
                for place in places if prune[row, group] else ():
                    wanted[place] = False
            else:
                assert units[row, group] == float("inf")
            assert (sizes if isinstance(sizes, int) else sizes[row, group]) == (dropped if group < full else 0)
            assert kept[row, group * pattern.m : (group + 1) * pattern.m].tolist() == wanted
    assert pattern.holds(kept)
    every = pattern.mask(scores, torch.ones_like(prune), shape)
    assert pattern.pattern_sparsity(~every) == pytest.approx(pattern.max_sparsity(shape))


def test_nm_of_a_large_group_sorts_to_the_same_mask():
    scores = scores_for((3, 80), 0, levels=4)
    pattern = NM(30, 40)
    prune = torch.ones(3, 2, dtype=torch.bool)
    kept = pattern.mask(scores, prune, (3, 80))
    for row in range(3):
        for start in (0, 40):
            values = scores[row, start : start + 40].tolist()
            gone = sorted(range(40), key=lambda place: (values[place], -place))[:10]
            assert sorted(gone) == (~kept[row, start : start + 40]).nonzero().flatten().tolist()
    torch.testing.assert_close(pattern.unit_scores(scores)[0, 0], scores[0, :40].sort().values[:10].mean())


def test_nm_holds():
    pattern = NM(2, 4)
    assert pattern.holds(torch.tensor([[1, 1, 1, 1, 0, 1, 1, 0]]).bool())
    assert pattern.holds(torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0]]).bool())
    assert not pattern.holds(torch.tensor([[1, 1, 1, 0, 0, 1, 1, 0]]).bool())
    assert pattern.holds(torch.tensor([[0, 1, 1, 0, 1, 1, 1]]).bool())  # a short last group stays dense
    assert NM(1, 4).holds(torch.tensor([[1, 1, 1, 1, 0, 1, 0, 0]]).bool())
    assert not NM(1, 4).holds(torch.tensor([[0, 1, 1, 0]]).bool())


@given(PATTERNS, SHAPES, st.integers(1, 40))
def test_regions_cover_everything_once(pattern, shape, elements):
    weights = torch.zeros(shape)
    values = scores_for(shape, 0)
    stored = torch.zeros(pattern.score_shape(shape))
    result = torch.full_like(stored, float("nan"))
    for part, place in pattern.regions(shape, elements):
        weights[part] += 1
        stored[place] += 1
        result[place] = pattern.reduce(values[part])
    assert bool((weights == 1).all())
    assert bool((stored == 1).all())
    torch.testing.assert_close(result, pattern.reduce(values))


def test_wrong_shapes_are_refused():
    with pytest.raises(SparsityError, match="to_logical"):
        Block(2, 2).reduce(torch.ones(2, 2, 2))
    with pytest.raises(SparsityError, match="bool choice"):
        Block(2, 2).mask(torch.ones(2, 2), torch.ones(2, 3, dtype=torch.bool), (4, 4))
    with pytest.raises(SparsityError, match="bool choice"):
        NM(2, 4).mask(torch.ones(2, 4), torch.ones(2, 1), (2, 4))
