"""SparseGPT against exact solutions: column-wise least squares, the error it reports, and brute force over all masks.

With the loss ``|(W - W') X^T|^2`` and without damping, exactly true are:

* given its mask, the new weight is what exact least squares gives when columns are fixed one after the other from the left;
* its loss is at least that of the full least squares for the mask (which may change the columns on the left too), and that is at
  least the best over all masks of the same sparsity;
* all three are equal where only the first column can be pruned.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.sparsity.activation import Statistic
from graphprune.sparsity.channels import Channel
from graphprune.sparsity.criteria import parse_criterion
from graphprune.sparsity.patterns import parse_pattern
from graphprune.sparsity.sparsegpt import SparseGPT

EXACT = SparseGPT(damping=0.0)


def inputs(tokens: int, features: int) -> Tensor:
    """Correlated inputs of different sizes."""
    mix = torch.randn(features, features, dtype=torch.float64) * torch.rand(features, dtype=torch.float64)
    return torch.randn(tokens, features, dtype=torch.float64) @ mix


def seen(x: Tensor, criterion: SparseGPT = EXACT) -> Statistic:
    groups = x.shape[0] if x.ndim == 3 else 1
    statistic = criterion.statistic(x.shape[-1], "cpu", groups=groups, dtype=torch.float64)
    criterion.observe(statistic, x)
    return statistic


def loss(weight: Tensor, new: Tensor, x: Tensor) -> float:
    return float(((weight - new) @ x.T).square().sum())


def refit(weight: Tensor, new: Tensor, x: Tensor, free: Tensor) -> Tensor:
    """The row ``new`` with its entries in ``free`` chosen so that ``new @ x.T`` is nearest to ``weight @ x.T``."""
    fitted = new.clone()
    if free.any():
        rest = (weight - torch.where(free, 0.0, new)) @ x.T
        fitted[free] = torch.linalg.lstsq(x[:, free], rest[:, None]).solution[:, 0]
    return fitted


def column_by_column(weight: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    """Fix the columns from the left, and after each pruned one solve exactly for all columns to its right."""
    result = []
    for row, kept in zip(weight, mask, strict=True):
        new = row.clone()
        for column in range(len(row)):
            if not kept[column]:
                new[column] = 0.0
                new = refit(row, new, x, torch.arange(len(row)) > column)
        result.append(new)
    return torch.stack(result)


def best_for(weight: Tensor, mask: Tensor, x: Tensor) -> float:
    """Loss of the full least squares for a mask."""
    rows = [refit(row, row * kept, x, kept) for row, kept in zip(weight, mask, strict=True)]
    return loss(weight, torch.stack(rows), x)


@pytest.mark.parametrize("text", ["unstructured", "2:4", "1:4", "1:2", "1x2", "2x1", "2x4", "channelx1", "1xchannel"])
def test_the_update_is_least_squares_from_the_left(text):
    x, weight = inputs(40, 8), torch.randn(2, 8, dtype=torch.float64)
    new, mask = EXACT.prune(weight, seen(x), parse_pattern(text), 0.75 if text == "1:4" else 0.5)
    torch.testing.assert_close(new, column_by_column(weight, mask, x))


def test_brute_force_over_all_masks_is_never_worse():
    """The greedy choice and the one-sided update cost something, but only some: 4 of 16 weights, all 1820 masks."""
    ratios = []
    for seed in range(6):
        torch.manual_seed(seed)
        x, weight = inputs(40, 8), torch.randn(2, 8, dtype=torch.float64)
        new, mask = EXACT.prune(weight, seen(x), parse_pattern("unstructured"), 0.25)
        assert int((~mask).sum()) == 4
        first, second = ([best_without(row, count, x) for count in range(5)] for row in weight)
        best = min(first[count] + second[4 - count] for count in range(5))  # rows do not touch each other
        reached, fitted = loss(weight, new, x), best_for(weight, mask, x)
        assert reached >= fitted * (1 - 1e-9)
        assert fitted >= best * (1 - 1e-9)
        ratios.append(reached / best)
    assert max(ratios) > 1.01
    assert sum(ratios) / len(ratios) < 10


def best_without(row: Tensor, count: int, x: Tensor) -> float:
    """Least loss of one row with some number of entries pruned, over all choices of them."""
    masks = [
        torch.tensor([place not in gone for place in range(len(row))])[None]
        for gone in itertools.combinations(range(len(row)), count)
    ]
    return min(best_for(row[None], mask, x) for mask in masks)


def test_equal_to_the_optimum_where_the_first_column_is_pruned():
    x, weight = inputs(40, 8), torch.randn(2, 8, dtype=torch.float64)
    weight[:, 0] *= 1e-3
    new, mask = EXACT.prune(weight, seen(x), parse_pattern("channelx1"), 1 / 8)
    assert mask[:, 1:].all()
    best = min(best_for(weight, (torch.arange(8) != column).expand(2, 8), x) for column in range(8))
    assert loss(weight, new, x) == pytest.approx(best_for(weight, mask, x), rel=1e-9)
    assert loss(weight, new, x) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("text", ["unstructured", "2:4", "3:5", "4x1", "1x4", "3x3", "channelx2", "2xchannel"])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_blocks_change_only_when_choices_are_made(text, block):
    """The update is exact whatever the width of blocks: given the mask, it is that of one column at a time."""
    x, weight = inputs(90, 20), torch.randn(8, 20, dtype=torch.float64)
    criterion, pattern = SparseGPT(damping=0.0, block=block), parse_pattern(text)
    new, mask = criterion.prune(weight, seen(x), pattern, 0.4)
    assert pattern.holds(mask)
    sizes = pattern.unit_sizes((8, 20))
    largest = sizes if isinstance(sizes, int) else int(sizes.max())
    assert abs(int((~mask).sum()) - 0.4 * 160) <= largest / 2
    torch.testing.assert_close(new, column_by_column(weight, mask, x))


def test_the_joint_score_of_a_unit_is_its_exact_cost():
    """One unit of four columns is to go: the one whose removal costs least, given that nothing to its left changes."""
    for seed in range(10):
        torch.manual_seed(seed)
        x, weight = inputs(60, 12), torch.randn(1, 12, dtype=torch.float64)
        new, _ = EXACT.prune(weight, seen(x), parse_pattern("1x4"), 1 / 3)
        costs = []
        for unit in range(3):
            gone = (torch.arange(12) // 4 == unit)[None]
            costs.append(loss(weight, column_by_column(weight, ~gone, x), x))
        assert loss(weight, new, x) == pytest.approx(min(costs), rel=1e-9)


def test_the_moments_are_a_mean_whatever_the_parts():
    x = inputs(50, 6)
    whole, parts = seen(x), EXACT.statistic(6, "cpu", dtype=torch.float64)
    for part in (x[:3], x[3:3], x[3:31], x[31:]):
        EXACT.observe(parts, part)
    torch.testing.assert_close(whole.values[0], 2 * x.T @ x / 50)
    torch.testing.assert_close(parts.values, whole.values)


def test_layers_with_the_same_inputs_share_a_statistic():
    x, pattern = inputs(50, 8), parse_pattern("2:4")
    shared = seen(x)
    for weight in torch.randn(3, 4, 8, dtype=torch.float64):
        expected = EXACT.prune(weight, seen(x), pattern, 0.5)
        for have, want in zip(EXACT.prune(weight, shared, pattern, 0.5), expected, strict=True):
            assert torch.equal(have, want)


def test_dead_inputs_go_first_and_kept_ones_keep_their_weight():
    x = inputs(50, 8)
    x[:, [2, 5]] = 0
    weight = torch.randn(3, 8, dtype=torch.float64)
    new, mask = EXACT.prune(weight, seen(x), parse_pattern("unstructured"), 0.25)
    assert torch.equal(~mask, torch.zeros_like(mask).index_fill_(1, torch.tensor([2, 5]), True))
    assert torch.equal(new, weight * mask)  # they cost nothing, so nothing is made up for
    new, mask = EXACT.prune(weight, seen(x), parse_pattern("unstructured"), 0.125)
    assert torch.equal(new[mask], weight[mask])
    new, _ = SparseGPT().prune(weight, seen(torch.zeros(9, 8)), parse_pattern("2:4"), 0.5)
    assert torch.isfinite(new).all()


def test_dead_inputs_do_not_enter_the_damping():
    x = inputs(50, 4) * 1e-6
    wide = torch.cat([x, torch.zeros(50, 4, dtype=torch.float64)], 1)
    weight = torch.randn(3, 8, dtype=torch.float64)
    criterion = SparseGPT()
    statistic, alone = seen(wide, criterion), seen(x, criterion)
    criterion.finish(statistic)
    criterion.finish(alone)
    torch.testing.assert_close(statistic.values[:, :4, :4], alone.values)
    assert torch.isfinite(criterion.prune(weight, statistic, parse_pattern("2:4"), 0.5)[0]).all()


def test_groups_are_pruned_alone():
    x, weight = torch.stack([inputs(40, 8), inputs(40, 8)]), torch.randn(6, 8, dtype=torch.float64)
    new, mask = EXACT.prune(weight, seen(x), parse_pattern("2:4"), 0.5)
    for group in range(2):
        part = slice(3 * group, 3 * group + 3)
        alone = EXACT.prune(weight[part], seen(x[group]), parse_pattern("2:4"), 0.5)
        assert torch.equal(new[part], alone[0])
        assert torch.equal(mask[part], alone[1])


def test_better_than_wanda_and_magnitude_on_correlated_inputs():
    x, weight = inputs(400, 64).float(), torch.randn(32, 64)
    losses = []
    for name in ("sparsegpt", "wanda"):
        criterion = parse_criterion(name)
        statistic = criterion.statistic(64, "cpu")
        criterion.observe(statistic, x)
        losses.append(loss(weight, criterion.prune(weight, statistic, parse_pattern("2:4"), 0.5)[0], x))
    kept = parse_pattern("2:4").mask(weight.abs(), torch.ones(32, 16, dtype=torch.bool), (32, 64))
    assert losses[0] < losses[1] < loss(weight, weight * kept, x)


def test_text_and_declarations():
    assert parse_criterion("sparsegpt(damping=0.1,block=64)") == SparseGPT(0.1, 64)
    assert str(SparseGPT()) == "sparsegpt"
    assert SparseGPT.needs_activations
    assert not SparseGPT.needs_gradient


def test_refusals():
    weight = torch.randn(6, 8, dtype=torch.float64)
    for text in ("sparsegpt(damping=-1)", "sparsegpt(block=0)"):
        with pytest.raises(SparsityError, match="damping >= 0 and block >= 1"):
            parse_criterion(text)
    with pytest.raises(SparsityError, match="larger damping"):
        EXACT.prune(weight, seen(torch.ones(1, 8)), parse_pattern("2:4"), 0.5)
    with pytest.raises(SparsityError, match="seen no inputs"):
        EXACT.prune(weight, EXACT.statistic(8, "cpu"), parse_pattern("2:4"), 0.5)
    with pytest.raises(SparsityError, match="choose wanda"):
        EXACT.prune(weight, seen(inputs(20, 8)), Channel(1, kernel=4), 0.5)
    with pytest.raises(SparsityError, match="4 rows of pattern"):
        EXACT.prune(weight, seen(torch.stack([inputs(40, 8)] * 2)), parse_pattern("4x1"), 0.5)
