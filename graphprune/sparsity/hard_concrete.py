"""The hard-concrete gate: a random gate in [0, 1] that is exactly 0 or 1 with a probability that can be trained.

A sigmoid of logistic noise around ``log_alpha`` is stretched to ``(GAMMA, ZETA)`` and cut to [0, 1], so both ends have mass, and
the expected number of gates that are not zero is a smooth function of ``log_alpha``.
Source: Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", arXiv:1712.01312, sections 2.2 and 2.3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETA = 2 / 3
"""Temperature."""
GAMMA = -0.1
"""Lower end of the stretched interval, below 0."""
ZETA = 1.1
"""Upper end, above 1."""
SHIFT = -BETA * math.log(-GAMMA / ZETA)
"""A gate is not zero with probability ``sigmoid(log_alpha + SHIFT)``; about 1.6."""
OPEN = 2.5
"""A ``log_alpha`` from which on the deterministic gate is exactly 1 (it is from 2.398)."""
_SMALLEST = 1e-6
"""Noise is kept this far from 0 and 1, where its logit would be infinite."""


def sample(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Return a sample of each gate, differentiable in ``log_alpha``.

    Args:
        log_alpha: Any float dtype and shape.
        noise: Uniform on [0, 1), same shape.

    Returns:
        ``clamp(sigmoid((logit(noise) + log_alpha) / BETA) * (ZETA - GAMMA) + GAMMA, 0, 1)``, shape and dtype of
        ``log_alpha``. Value and gradient are finite for every ``log_alpha`` but NaN; the gradient is 0 where the gate is cut.
    """
    return _stretched(_drawn(log_alpha, noise)).clamp(0.0, 1.0)


def sample_gradient(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Return the derivative of ``sample`` with respect to ``log_alpha``, 0 where the gate is cut."""
    return _slope(_drawn(log_alpha, noise)) / BETA


def deterministic(log_alpha: Tensor) -> Tensor:
    """Return the gate that is used when nothing is trained: ``clamp(sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)``."""
    return _stretched(torch.sigmoid(log_alpha)).clamp(0.0, 1.0)


def deterministic_gradient(log_alpha: Tensor) -> Tensor:
    """Return the derivative of ``deterministic``, 0 where the gate is cut."""
    return _slope(torch.sigmoid(log_alpha))


def expected_l0(log_alpha: Tensor) -> Tensor:
    """Return the probability that each gate is not zero, ``sigmoid(log_alpha - BETA * log(-GAMMA / ZETA))``, in [0, 1]."""
    return torch.sigmoid(log_alpha + SHIFT)


def expected_l0_gradient(log_alpha: Tensor) -> Tensor:
    """Return the derivative of ``expected_l0``, ``p * (1 - p)``, in [0, 1/4]."""
    probability = expected_l0(log_alpha)
    return probability * (1.0 - probability)


def _drawn(log_alpha: Tensor, noise: Tensor) -> Tensor:
    wide = torch.promote_types(log_alpha.dtype, torch.float32)  # in 16 bits 1 - _SMALLEST would be 1
    return torch.sigmoid((torch.logit(noise.to(wide), eps=_SMALLEST) + log_alpha) / BETA).to(log_alpha.dtype)


def _stretched(drawn: Tensor) -> Tensor:
    return drawn * (ZETA - GAMMA) + GAMMA


def _slope(drawn: Tensor) -> Tensor:
    """The derivative of the cut gate along the sigmoid's argument."""
    gate = _stretched(drawn)
    return drawn * (1.0 - drawn) * (ZETA - GAMMA) * ((gate >= 0.0) & (gate <= 1.0))
