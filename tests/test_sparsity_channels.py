"""Channel patterns against plain loops over the stored weight: linears, Conv1D, and convolutions of every kind."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphprune.errors import SparsityError
from graphprune.sparsity import NM, Block, Channel, Layout, Unstructured, from_logical, parse_pattern, to_logical

WIDTHS = st.integers(1, 5)
SEEDS = st.integers(0, 2**16)
CHANNELS = st.builds(Channel, st.integers(0, 1), WIDTHS)


@st.composite
def stored_weights(draw):
    """A stored shape with its layout and groups: ``(shape, layout, groups)``."""
    layout = draw(st.sampled_from(list(Layout)))
    if layout is not Layout.CONV:
        return (draw(st.integers(1, 9)), draw(st.integers(1, 9))), layout, 1
    groups = draw(st.sampled_from([1, 1, 2, 3, 6]))
    outputs = groups * draw(st.integers(1, 3))
    inputs = 1 if groups == 6 else draw(st.integers(1, 4))  # 6 groups: depthwise, with a multiplier
    kernel = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    return (outputs, inputs, *kernel), layout, groups


def units_of(pattern, shape, layout, groups):
    """Places of every unit's weights in the stored tensor, by looking at what each stored index means."""
    members: dict[int, list[tuple[int, ...]]] = {}
    for place in itertools.product(*(range(size) for size in shape)):
        out, entry = (place[1], place[0]) if layout is Layout.IN_OUT else (place[0], place[1])
        if layout is Layout.CONV:
            group = out // (shape[0] // groups)
            entry = group * shape[1] + entry
        channel = out if pattern.axis == 0 else entry
        members.setdefault(channel // pattern.width, []).append(place)
    return [members[unit] for unit in range(len(members))]


def bound(pattern, shape, groups):
    return pattern.bound(kernel=math.prod(shape[2:]), groups=groups)


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(CHANNELS, stored_weights(), SEEDS)
def test_units_by_brute_force(pattern, weight, seed):
    shape, layout, groups = weight
    values = random(shape, seed)
    logical = to_logical(values, layout)
    units = units_of(pattern, shape, layout, groups)
    geometry = bound(pattern, shape, groups)
    stored = geometry.reduce(logical)
    size = tuple(logical.shape)
    assert tuple(stored.shape) == geometry.score_shape(size) == (len(units),)
    means = torch.stack([torch.stack([values[place] for place in unit]).mean() for unit in units])
    torch.testing.assert_close(stored, means, rtol=1e-5, atol=1e-6)
    assert geometry.unit_scores(stored) is stored
    sizes = geometry.unit_sizes(size)
    counts = torch.tensor([len(unit) for unit in units])
    assert torch.equal(torch.full_like(counts, sizes) if isinstance(sizes, int) else sizes, counts)
    assert torch.equal(
        torch.as_tensor(geometry.score_sizes(size, device=torch.device("cpu"))).expand(len(units)), counts
    )

    prune = stored < 0
    kept = geometry.mask(stored, prune, size)
    wide = geometry.spread(stored, size)
    expected, scores = torch.ones(shape, dtype=torch.bool), torch.empty(shape)
    for unit, gone, score in zip(units, prune.tolist(), stored, strict=True):
        for place in unit:
            expected[place], scores[place] = not gone, score
    assert torch.equal(from_logical(kept, layout, shape), expected)
    assert torch.equal(from_logical(wide, layout, shape), scores)
    assert kept.is_contiguous()
    assert geometry.holds(kept)
    assert torch.equal(geometry.locked(~kept), kept)
    assert geometry.pattern_sparsity(~kept) == pytest.approx(int(counts[prune].sum()) / values.numel())
    assert geometry.max_sparsity(size) == 1.0
    channels = len(units_of(Channel(pattern.axis), shape, layout, groups))
    assert (geometry.misfit(size) is None) == (channels % pattern.width == 0)


@given(CHANNELS, stored_weights(), SEEDS)
def test_holds_and_sparsity_count_whole_units_only(pattern, weight, seed):
    shape, layout, groups = weight
    kept = random(shape, seed) > -0.3
    units = [[bool(kept[place]) for place in unit] for unit in units_of(pattern, shape, layout, groups)]
    geometry = bound(pattern, shape, groups)
    logical = to_logical(kept, layout)
    assert geometry.holds(logical) == all(all(unit) or not any(unit) for unit in units)
    gone = sum(len(unit) for unit in units if not any(unit))
    assert geometry.pattern_sparsity(~logical) == pytest.approx(gone / kept.numel())


@given(CHANNELS, stored_weights(), st.integers(1, 60))
def test_regions_cover_everything_once(pattern, weight, elements):
    shape, layout, groups = weight
    logical = to_logical(random(shape, 0), layout)
    geometry = bound(pattern, shape, groups)
    seen, stored = torch.zeros(logical.shape), torch.zeros(geometry.score_shape(tuple(logical.shape)))
    result, sizes = torch.full_like(stored, float("nan")), torch.zeros_like(stored)
    for part, place in geometry.regions(tuple(logical.shape), elements):
        seen[part] += 1
        stored[place] += 1
        result[place] = geometry.reduce(logical[part])
        sizes[place] = torch.as_tensor(geometry.unit_sizes(tuple(logical[part].shape))).float()
    assert bool((seen == 1).all())
    assert bool((stored == 1).all())
    torch.testing.assert_close(result, geometry.reduce(logical))
    assert torch.equal(sizes.sum(), torch.tensor(float(logical.numel())))


def test_regions_stay_near_the_wanted_size():
    assert len(list(Channel(0).regions((64, 32), 256))) == 8
    assert len(list(Channel(1, 4).regions((64, 32), 512))) == 4
    assert len(list(Channel(1).bound(kernel=4, groups=1).regions((64, 32), 256))) == 1


def test_an_input_channel_is_what_a_convolution_reads():
    """Pruned input channels do not matter: the output is the same whatever they hold."""
    for groups, kernel in itertools.product((1, 2, 4), ((3,), (3, 2), (2, 1, 3))):
        conv = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[len(kernel) - 1](8, 12, kernel, groups=groups)
        logical = to_logical(conv.weight.detach(), Layout.CONV)
        pattern = bound(parse_pattern("channelx1"), conv.weight.shape, groups)
        prune = torch.arange(8) % 3 == 1
        kept = pattern.mask(pattern.reduce(logical), prune, tuple(logical.shape))
        with torch.no_grad():
            conv.weight.mul_(from_logical(kept, Layout.CONV, tuple(conv.weight.shape)))
            x = torch.randn(2, 8, *(5,) * len(kernel))
            y = x.clone()
            y[:, prune] = torch.randn_like(y[:, prune])
            assert torch.equal(conv(x), conv(y))
            y[:, 0] += 1
            assert not torch.allclose(conv(x), conv(y))


def test_depthwise_channels_are_rows_of_their_group():
    pattern = Channel(1).bound(kernel=3, groups=4)
    kept = pattern.mask(torch.zeros(4), torch.tensor([False, True, False, False]), (8, 3))
    assert (~kept).nonzero()[:, 0].unique().tolist() == [2, 3]


@given(CHANNELS)
def test_text_roundtrip_is_unbound(pattern):
    assert parse_pattern(str(pattern)) == pattern
    assert parse_pattern(str(pattern.bound(kernel=9, groups=2))) == pattern
    assert pattern.bound(kernel=1, groups=1) == pattern


def test_text_forms():
    assert parse_pattern("1xchannel") == Channel(0)
    assert parse_pattern(" 8xChannel ") == Channel(0, 8)
    assert parse_pattern("channelx1") == Channel(1)
    assert parse_pattern("channelx16") == Channel(1, 16)
    assert [str(Channel(axis, width)) for axis in (0, 1) for width in (1, 4)] == [
        "1xchannel", "4xchannel", "channelx1", "channelx4",
    ]  # fmt: skip


def test_other_patterns_need_no_geometry():
    for pattern in (Unstructured(), Block(4, 1), NM(2, 4), Channel(0, 2)):
        assert pattern.bound(kernel=9, groups=2) is pattern


def test_misfit():
    assert Channel(1, 4).bound(kernel=9, groups=2).misfit((8, 36)) is None  # 2 groups of 4 inputs
    assert "6 input channels are not a multiple of the 4" in Channel(1, 4).bound(kernel=9, groups=2).misfit((8, 27))
    assert "spans 4 outputs but the weight has only 3" in Channel(0, 4).misfit((3, 8))


def test_refusals():
    with pytest.raises(SparsityError, match="neither 0"):
        Channel(2)
    for text in ("0xchannel", "channelx0"):
        with pytest.raises(SparsityError, match="is empty"):
            parse_pattern(text)
    with pytest.raises(SparsityError, match="0 groups"):
        Channel(1, groups=0)
    with pytest.raises(SparsityError, match="bind it to the weight's own"):
        Channel(1).bound(kernel=9, groups=1).reduce(torch.ones(4, 10))
    with pytest.raises(SparsityError, match="bool choice"):
        Channel(1, 2).mask(torch.ones(2), torch.ones(4, dtype=torch.bool), (4, 4))
