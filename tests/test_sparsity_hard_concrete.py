"""Hard-concrete gates: formulas, gradients, probabilities, and no value that is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from graphprune.sparsity.hard_concrete import (
    OPEN,
    deterministic,
    deterministic_gradient,
    expected_l0,
    expected_l0_gradient,
    sample,
    sample_gradient,
)


def uniform(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


def test_formulas():
    u, a = 0.3, 0.7
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + a) / (2 / 3)))
    have = float(sample(torch.tensor(a, dtype=torch.float64), torch.tensor(u, dtype=torch.float64)))
    assert have == pytest.approx(min(1, max(0, s * 1.2 - 0.1)), abs=1e-12)
    assert float(deterministic(torch.tensor(a))) == pytest.approx(1.2 / (1 + math.exp(-a)) - 0.1, abs=1e-6)
    want = 1 / (1 + math.exp(-(a - 2 / 3 * math.log(0.1 / 1.1))))
    assert float(expected_l0(torch.tensor(a))) == pytest.approx(want, abs=1e-6)


def test_gradients():
    log_alpha = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)
    noise = uniform(41)
    assert torch.autograd.gradcheck(lambda value: sample(value, noise), log_alpha)
    assert torch.autograd.gradcheck(deterministic, log_alpha)
    assert torch.autograd.gradcheck(expected_l0, log_alpha)
    for function, closed in (
        (lambda value: sample(value, noise), lambda value: sample_gradient(value, noise)),
        (deterministic, deterministic_gradient),
        (expected_l0, expected_l0_gradient),
    ):
        (gradient,) = torch.autograd.grad(function(log_alpha).sum(), log_alpha)
        torch.testing.assert_close(closed(log_alpha.detach()), gradient)


@pytest.mark.parametrize("log_alpha", [-3.0, -1.6, 0.0, 1.0, 3.0])
def test_probability_of_a_gate_that_is_not_zero(log_alpha):
    gates = sample(torch.full((200_000,), log_alpha, dtype=torch.float64), uniform(200_000))
    share = float((gates != 0).double().mean())
    assert share == pytest.approx(float(expected_l0(torch.tensor(log_alpha))), abs=0.005)
    # symmetric: as many gates at 1 for a as at 0 for -a
    opposite = sample(torch.full((200_000,), -log_alpha, dtype=torch.float64), uniform(200_000))
    assert float((opposite == 1).double().mean()) == pytest.approx(1 - share, abs=0.005)


def test_an_open_gate_is_exactly_one_and_a_closed_one_zero():
    assert float(deterministic(torch.tensor(OPEN))) == 1.0
    assert float(deterministic(torch.tensor(-OPEN))) == 0.0


@given(
    st.floats(allow_nan=False, width=32),
    st.sampled_from([0.0, 1e-30, 1e-7, 0.5, 1 - 2**-24, 1.0]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@example(-math.inf, 1 - 2**-24, torch.bfloat16)  # in 16 bits this noise is 1
@example(math.inf, 0.0, torch.bfloat16)
def test_finite_everywhere(value, noise, dtype):
    log_alpha = torch.tensor([value], dtype=dtype, requires_grad=True)
    for function in (
        lambda item: sample(item, torch.tensor([noise], dtype=dtype)),
        deterministic,
        expected_l0,
        expected_l0_gradient,
    ):
        result = function(log_alpha)
        (gradient,) = torch.autograd.grad(result.sum(), log_alpha)
        assert result.dtype == dtype
        assert 0 <= float(result.detach()) <= 1
        assert bool(gradient.isfinite().all())
