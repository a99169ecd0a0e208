"""OBS against brute force, closed forms and float64 linear algebra."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.sparsity import obs, parse_criterion, parse_pattern
from graphprune.sparsity.obs import OBS, Arrangement

UNSTRUCTURED = parse_pattern("unstructured")


def sampled(
    criterion: OBS,
    shape: tuple[int, int],
    text: str = "unstructured",
    *,
    seed: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, gradients ``[samples, out, in]`` and the state after them; float64 so that formulas are seen without rounding."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    mixing = torch.randn(shape[0] * shape[1], shape[0] * shape[1], generator=generator)
    grads = (torch.randn(criterion.samples, mixing.shape[0], generator=generator) @ mixing).view(-1, *shape) * scale
    pattern = parse_pattern(text)
    stored = criterion.initial(pattern, shape, device="cpu").to(dtype)
    for grad in grads:
        assert criterion.accumulate(stored, weight, grad, pattern) is stored
    assert stored is not None
    return weight, grads, stored


def fisher(grads: Tensor, damping: float) -> np.ndarray:
    """The whole damped Fisher matrix of row-major weights, in float64."""
    flat = grads.flatten(1).double().numpy()
    return flat.T @ flat / len(flat) + damping * np.eye(flat.shape[1])


def constrained(matrix: np.ndarray, weight: np.ndarray, pruned: np.ndarray) -> tuple[np.ndarray, float]:
    """Minimize 1/2 d^T F d under d_Q = -w_Q by its KKT system: the change and the cost."""
    size, count = len(weight), int(pruned.sum())
    rows = np.eye(size)[pruned]
    system = np.block([[matrix, rows.T], [rows, np.zeros((count, count))]])
    change = np.linalg.solve(system, np.concatenate([np.zeros(size), -weight[pruned]]))[:size]
    return change, float(change @ matrix @ change) / 2


def test_state_inverts_to_the_inverse_fisher():
    criterion = OBS(samples=40, damping=1e-3, block=16)
    _, grads, stored = sampled(criterion, (2, 8))
    assert stored.shape == (1, 16, 16)
    inverse = torch.cholesky_inverse(obs._factor(stored, criterion.damping))[0].numpy()
    np.testing.assert_allclose(inverse, np.linalg.inv(fisher(grads, 1e-3)), rtol=1e-6, atol=1e-6)
    woodbury = np.eye(16) / criterion.damping  # the paper's form, in float64
    for grad in grads.flatten(1).double().numpy():
        product = woodbury @ grad
        woodbury -= np.outer(product, product) / (criterion.samples + grad @ product)
    np.testing.assert_allclose(inverse, woodbury, rtol=1e-6, atol=1e-6)


def test_one_weight_is_chosen_and_updated_as_by_brute_force():
    criterion = OBS(samples=40, damping=1e-3, block=16)
    for seed in range(10):
        weight, grads, stored = sampled(criterion, (2, 8), seed=seed)
        matrix, flat = fisher(grads, 1e-3), weight.flatten().double().numpy()
        costs = [constrained(matrix, flat, np.arange(16) == index)[1] for index in range(16)]
        scores = criterion.scores(stored, weight, UNSTRUCTURED)
        np.testing.assert_allclose(scores.flatten().numpy(), costs, rtol=1e-6)
        best = int(np.argmin(costs))
        assert int(scores.argmin()) == best
        mask = torch.ones(2, 8, dtype=torch.bool)
        mask.view(-1)[best] = False
        adjusted = criterion.compensate(stored, weight, mask, UNSTRUCTURED)
        change, _ = constrained(matrix, flat, np.arange(16) == best)
        np.testing.assert_allclose(adjusted.flatten().numpy(), flat + change, rtol=1e-5, atol=1e-6)
        assert adjusted.flatten()[best] == 0


@pytest.mark.parametrize("count", [2, 3])
def test_every_choice_gets_the_constrained_minimizer(count):
    criterion = OBS(samples=40, damping=1e-3, block=16)
    weight, grads, stored = sampled(criterion, (2, 8))
    matrix, flat = fisher(grads, 1e-3), weight.flatten().double().numpy()
    for chosen in itertools.islice(itertools.combinations(range(16), count), 0, None, 3):
        pruned = np.isin(np.arange(16), chosen)
        mask = torch.from_numpy(~pruned).view(2, 8)
        adjusted = criterion.compensate(stored, weight, mask, UNSTRUCTURED)
        change, cost = constrained(matrix, flat, pruned)
        np.testing.assert_allclose(adjusted.flatten().numpy(), flat + change, rtol=1e-5, atol=1e-6)
        assert not adjusted[~mask].any()
        moved = adjusted.flatten().double().numpy() - flat
        assert moved @ matrix @ moved / 2 == pytest.approx(cost, rel=1e-5)
        assert cost <= flat[pruned] @ matrix[np.ix_(pruned, pruned)] @ flat[pruned] / 2  # what zeroing alone would cost


@pytest.mark.parametrize(("text", "shape"), [("4x1", (4, 4)), ("1x4", (2, 8)), ("2x2", (4, 4)), ("1xchannel", (4, 4))])
def test_group_scores_are_the_cost_of_the_whole_group(text, shape):
    criterion, pattern = OBS(samples=40, damping=1e-3, block=16), parse_pattern(text)
    weight, grads, stored = sampled(criterion, shape, text)
    matrix, flat = fisher(grads, 1e-3), weight.flatten().double().numpy()
    scores = criterion.scores(stored, weight, pattern)
    assert scores.shape == pattern.score_shape(shape)
    for unit in range(scores.numel()):
        prune = torch.zeros(scores.numel(), dtype=torch.bool)
        prune[unit] = True
        mask = pattern.mask(scores, prune.view(scores.shape), shape)
        change, cost = constrained(matrix, flat, ~mask.flatten().numpy())
        assert float(scores.flatten()[unit]) == pytest.approx(cost, rel=1e-5)
        adjusted = criterion.compensate(stored, weight, mask, pattern)
        np.testing.assert_allclose(adjusted.flatten().numpy(), flat + change, rtol=1e-5, atol=1e-6)


@given(
    st.integers(1, 9),
    st.integers(1, 13),
    st.sampled_from(["unstructured", "4x1", "1x4", "3x2", "2:4", "1:2", "1xchannel", "channelx1"]),
    st.integers(13, 30),
    st.sampled_from([1e-7, 1e-2]),
    st.integers(0, 1000),
)
def test_any_shape_equals_dense_algebra_block_by_block(out, width, text, block, damping, seed):
    criterion, pattern = OBS(samples=8, damping=damping, block=block), parse_pattern(text)
    weight, grads, stored = sampled(criterion, (out, width), text, seed=seed, scale=0.01)
    order = Arrangement.of(pattern, (out, width), block)
    torch.testing.assert_close(order.restore(order.arrange(weight)), weight, rtol=0, atol=0)
    place = order.restore(torch.arange(1, order.blocks * order.size + 1).view(order.blocks, order.size)) - 1
    scores = criterion.scores(stored, weight, pattern)
    assert scores.shape == pattern.score_shape((out, width))
    assert bool((scores >= 0).all())
    assert bool(scores.isfinite().all())
    mask = torch.rand(out, width, generator=torch.Generator().manual_seed(seed)) > 0.4
    adjusted = criterion.compensate(stored, weight, mask, pattern)
    assert adjusted.shape == weight.shape
    assert not bool(adjusted[~mask].any())
    for number in range(order.blocks):
        inside = place // order.size == number
        damped = fisher(grads[:, inside], damping)
        change, _ = constrained(damped, weight[inside].double().numpy(), ~mask[inside].numpy())
        expected = weight[inside].double().numpy() + change
        np.testing.assert_allclose(adjusted[inside].numpy(), expected, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 9), st.integers(1, 13), st.integers(1, 4), st.integers(1, 4))
def test_fisher_blocks_hold_whole_units(out, width, rows, columns):
    pattern = parse_pattern(f"{rows}x{columns}")
    order = Arrangement.of(pattern, (out, width), 20)
    unit = rows * columns
    assert order.size % unit == 0
    assert order.size <= 20
    numbers = torch.arange(order.grid[0] * order.grid[1]).view(order.grid)
    units = numbers.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:out, :width]
    arranged = order.arrange(units + 1)
    for row in arranged.view(-1, unit):
        assert len(set(row.tolist()) - {0}) <= 1


def test_transposed_weights_score_as_contiguous_ones():
    criterion = OBS(samples=30, damping=1e-3, block=12)
    weight, grads, stored = sampled(criterion, (6, 8), "4x1")
    pattern = parse_pattern("4x1")
    strided = weight.t().contiguous().t()
    again = None
    for grad in grads:
        again = criterion.accumulate(again, strided, grad.t().contiguous().t(), pattern)
    torch.testing.assert_close(again, stored.float())
    torch.testing.assert_close(criterion.scores(again, strided, pattern), criterion.scores(again, weight, pattern))


@pytest.mark.parametrize("part", [1, 300])
def test_working_in_parts_changes_nothing(part, monkeypatch):
    criterion = OBS(samples=20, damping=1e-3, block=10)
    weight, _, stored = sampled(criterion, (7, 9))
    mask = torch.rand(7, 9) > 0.5
    whole = criterion.scores(stored, weight, UNSTRUCTURED), criterion.compensate(stored, weight, mask, UNSTRUCTURED)
    monkeypatch.setattr(obs, "_PART", part)
    _, _, again = sampled(criterion, (7, 9))
    torch.testing.assert_close(again, stored, rtol=0, atol=0)
    torch.testing.assert_close(criterion.scores(stored, weight, UNSTRUCTURED), whole[0])
    torch.testing.assert_close(criterion.compensate(stored, weight, mask, UNSTRUCTURED), whole[1])


@pytest.mark.parametrize("text", ["4x1", "2x2", "2:4"])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("samples", [3, 10, 50])
def test_units_of_any_size_of_gradient_too(text, scale, samples):
    criterion, pattern = OBS(samples=samples, block=50), parse_pattern(text)
    weight, _, stored = sampled(criterion, (10, 20), text, scale=scale, dtype=torch.float32)
    scores = criterion.scores(stored, weight, pattern)
    assert bool(scores.isfinite().all())
    assert bool((scores > 0).all())
    adjusted = criterion.compensate(stored, weight, torch.rand(10, 20) > 0.5, pattern)
    assert bool(adjusted.isfinite().all())


@pytest.mark.parametrize("scale", [1e-4, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("samples", [10, 200])
def test_any_size_of_gradient_gives_finite_positive_scores(scale, samples):
    """Sherman-Morrison updates in float32 give NaN or negative scores for the larger ones."""
    criterion = OBS(samples=samples, block=50)
    weight, grads, stored = sampled(criterion, (5, 20), scale=scale, dtype=torch.float32)
    scores = criterion.scores(stored, weight, UNSTRUCTURED)
    assert bool(scores.isfinite().all())
    assert bool((scores > 0).all())
    adjusted = criterion.compensate(stored, weight, torch.rand(5, 20) > 0.5, UNSTRUCTURED)
    assert bool(adjusted.isfinite().all())
    if samples == 200:  # more samples than weights in a block: nothing hangs on the damping
        for block in (slice(0, 50), slice(50, 100)):
            inverse = np.linalg.inv(fisher(grads.flatten(1)[:, block], criterion.damping))
            expected = weight.flatten()[block].double().numpy() ** 2 / (2 * np.diag(inverse))
            np.testing.assert_allclose(scores.flatten()[block].numpy(), expected, rtol=1e-2)


def test_pruned_weights_stay_zero_and_disturb_nobody():
    """Gradients of pruned weights are masked, so a second pruning is that of the smaller network."""
    criterion = OBS(samples=40, damping=1e-3, block=16)
    weight, grads, _ = sampled(criterion, (2, 8))
    old = torch.ones(2, 8, dtype=torch.bool)
    old[0, ::2] = False
    weight, grads = weight * old, grads * old
    stored = None
    for grad in grads:
        stored = criterion.accumulate(stored, weight, grad, UNSTRUCTURED)
    scores = criterion.scores(stored, weight, UNSTRUCTURED)
    assert not bool(scores[~old].any())
    assert bool((scores[old] > 0).all())
    new = old.clone()
    new[1, :3] = False
    adjusted = criterion.compensate(stored, weight, new, UNSTRUCTURED)
    assert not bool(adjusted[~new].any())
    kept = old.flatten().numpy()
    matrix = fisher(grads.flatten(1)[:, old.flatten()], 1e-3)
    change, _ = constrained(matrix, weight[old].double().numpy(), ~new.flatten().numpy()[kept])
    np.testing.assert_allclose(adjusted[old].numpy(), weight[old].double().numpy() + change, rtol=1e-5, atol=1e-6)
    same = criterion.compensate(stored, weight, old, UNSTRUCTURED)
    torch.testing.assert_close(same, weight, rtol=0, atol=0)


def test_no_samples_is_magnitude():
    criterion = OBS(damping=0.5, block=7)
    weight = torch.randn(3, 5)
    stored = criterion.initial(UNSTRUCTURED, (3, 5), device="cpu")
    torch.testing.assert_close(criterion.scores(stored, weight, UNSTRUCTURED), weight.square() / 4)


def test_half_precision_weights():
    criterion = OBS(samples=20, damping=1e-3, block=16)
    weight, _, stored = sampled(criterion, (2, 8))
    adjusted = criterion.compensate(stored, weight.bfloat16(), torch.rand(2, 8) > 0.5, UNSTRUCTURED)
    assert adjusted.dtype == torch.bfloat16
    assert criterion.scores(stored, weight.bfloat16(), UNSTRUCTURED).dtype == torch.float32


def test_text_and_declarations():
    assert parse_criterion("obs(samples=64,block=32,recomputations=4)") == OBS(64, 1e-7, 32, 4)
    assert str(OBS()) == "obs"
    assert OBS.needs_samples
    assert not OBS.needs_gradient
    assert parse_criterion(str(OBS(damping=1e-6))) == OBS(damping=1e-6)


def test_refusals():
    assert OBS().refusal(UNSTRUCTURED) is None
    assert OBS().refusal(parse_pattern("2:4")) is None
    assert OBS().refusal(parse_pattern("4x1")) is None
    assert "set obs(block=1024)" in str(OBS().refusal(parse_pattern("32x32")))
    assert "block=8" in str(OBS(block=7).refusal(parse_pattern("4:8")))
    with pytest.raises(SparsityError, match=r"layer\.weight of shape .*block=60"):
        OBS().initial(parse_pattern("1xchannel"), (4, 60), device="cpu", name="layer.weight")
    channel = parse_pattern("channelx1").bound(kernel=9, groups=1)
    assert "units that are rectangles" in str(OBS().refusal(channel))
    for options in ({"samples": 0}, {"damping": 0.0}, {"block": 0}, {"recomputations": 0}, {"damping": float("nan")}):
        with pytest.raises(SparsityError, match="obs needs"):
            OBS(**options)


def test_misuse():
    weight, mask = torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(SparsityError, match="seen no gradient"):
        OBS().scores(None, weight, UNSTRUCTURED)
    with pytest.raises(SparsityError, match="gradient of shape"):
        OBS().accumulate(None, weight, torch.ones(2, 3), UNSTRUCTURED)
    stored = OBS().accumulate(None, weight, torch.full((2, 2), float("inf")), UNSTRUCTURED)
    with pytest.raises(SparsityError, match="not finite"):
        OBS().scores(stored, weight, UNSTRUCTURED)
    with pytest.raises(SparsityError, match="mask of shape"):
        OBS().compensate(stored, weight, mask[:1], UNSTRUCTURED)
