"""Wanda: the formula, where weights compete, exact numbers, dead inputs, grouped layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphprune.errors import SparsityError
from graphprune.sparsity import wanda
from graphprune.sparsity.activation import Statistic
from graphprune.sparsity.criteria import parse_criterion
from graphprune.sparsity.patterns import parse_pattern
from graphprune.sparsity.wanda import Wanda, keep_largest_of_rows


def seen(*parts: torch.Tensor, groups: int = 1) -> Statistic:
    statistic = Wanda().statistic(parts[0].shape[-1], "cpu", groups=groups)
    for part in parts:
        Wanda().observe(statistic, part)
    return statistic


def test_the_statistic_is_the_mean_of_the_squares_whatever_the_parts():
    x = torch.randn(50, 6)
    whole, parts = seen(x), seen(x[:7], x[7:7], x[7:40], x[40:])
    torch.testing.assert_close(whole.values, x.square().mean(0)[None])
    torch.testing.assert_close(parts.values, whole.values)
    assert parts.tokens == whole.tokens == 50


def test_single_weights_compete_inside_their_row():
    x, weight = torch.randn(40, 8), torch.randn(5, 8)
    new, mask = Wanda().prune(weight, seen(x), parse_pattern("unstructured"), 0.5)
    scores = weight.abs() * x.square().mean(0).sqrt()
    for row in range(5):
        assert set(scores[row].argsort()[:4].tolist()) == set((~mask[row]).nonzero().flatten().tolist())
    assert torch.equal(new, weight * mask)


def test_n_of_m_drops_the_smallest_of_each_group():
    x, weight = torch.randn(40, 12), torch.randn(5, 12)
    _, mask = Wanda().prune(weight, seen(x), parse_pattern("1:3"), 2 / 3)
    scores = (weight.abs() * x.square().mean(0).sqrt()).view(5, 4, 3)
    assert torch.equal(mask.view(5, 4, 3), scores == scores.amax(2, keepdim=True))


@pytest.mark.parametrize("text", ["4x1", "2x3", "channelx1", "1xchannel"])
def test_blocks_compete_inside_the_layer(text):
    x, weight, pattern = torch.randn(40, 12), torch.randn(8, 12), parse_pattern(text)
    _, mask = Wanda().prune(weight, seen(x), pattern, 0.5)
    scores = pattern.reduce(weight.abs() * x.square().mean(0).sqrt())
    kept = pattern.reduce(mask.float()) > 0
    assert scores[kept].min() > scores[~kept].max()
    assert int(mask.sum()) == 48


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.sampled_from([1, 5, 1000]))
def test_rows_have_exact_and_even_numbers(rows, columns, sparsity, band):
    torch.manual_seed(0)
    scores = torch.randint(0, 3, (rows, columns)).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wanda, "_BAND", band)
        kept = keep_largest_of_rows(scores, sparsity)
    dropped = (~kept).sum(1)
    assert int(dropped.sum()) == round(sparsity * rows * columns)
    assert int(dropped.max() - dropped.min()) <= 1
    for row in range(rows):
        order = sorted(range(columns), key=lambda place: (-float(scores[row, place]), place))
        assert order[: columns - int(dropped[row])] == sorted(
            kept[row].nonzero().flatten().tolist(), key=lambda place: (-float(scores[row, place]), place)
        )


def test_dead_inputs_go_first_and_nothing_is_nan():
    x = torch.randn(30, 4)
    x[:, 2] = 0
    new, mask = Wanda().prune(torch.full((3, 4), 9.0), seen(x), parse_pattern("unstructured"), 0.25)
    assert torch.equal(mask, torch.tensor([[True, True, False, True]]).expand(3, 4))
    assert torch.isfinite(new).all()


def test_groups_have_inputs_of_their_own():
    x, weight = torch.randn(2, 30, 6), torch.randn(8, 6)
    _, mask = Wanda().prune(weight, seen(x, groups=2), parse_pattern("unstructured"), 0.5)
    for group in range(2):
        part = slice(4 * group, 4 * group + 4)
        _, alone = Wanda().prune(weight[part], seen(x[group]), parse_pattern("unstructured"), 0.5)
        assert torch.equal(mask[part], alone)


def test_half_precision_weights_keep_their_dtype():
    new, mask = Wanda().prune(torch.randn(4, 8).bfloat16(), seen(torch.randn(9, 8)), parse_pattern("2:4"), 0.5)
    assert new.dtype == torch.bfloat16
    assert int(mask.sum()) == 16


def test_refusals():
    criterion, pattern = parse_criterion("wanda"), parse_pattern("2:4")
    assert criterion == Wanda()
    assert criterion.needs_activations
    with pytest.raises(SparsityError, match=r"graphprune\.oneshot\.prune"):
        criterion.scores(None, torch.ones(2, 2), pattern)
    with pytest.raises(SparsityError, match="seen no inputs"):
        Wanda().prune(torch.ones(2, 4), Wanda().statistic(4, "cpu"), pattern, 0.5)
    statistic = seen(torch.randn(5, 4))
    with pytest.raises(SparsityError, match="out of reach"):
        Wanda().prune(torch.ones(2, 4), statistic, pattern, 0.6)
    with pytest.raises(SparsityError, match="for a weight of shape"):
        Wanda().prune(torch.ones(2, 8), statistic, pattern, 0.5)
    with pytest.raises(SparsityError, match="groups of 4 features"):
        Wanda().observe(statistic, torch.randn(5, 3))
    Wanda().prune(torch.ones(2, 4), statistic, pattern, 0.5)
    with pytest.raises(SparsityError, match="takes no more inputs"):
        Wanda().observe(statistic, torch.randn(5, 4))
