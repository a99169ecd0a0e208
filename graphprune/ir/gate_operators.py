"""The operators of hard-concrete gates, as ``torch.library`` custom operators; ``graphprune.ir.gates`` puts them into a Program."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from graphprune.sparsity import hard_concrete
from graphprune.sparsity.layout import Layout, from_logical, logical_shape, to_logical
from graphprune.sparsity.pattern_base import Pattern
from graphprune.sparsity.patterns import parse_pattern


@torch.library.custom_op("graphprune::noise", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _noise(like: Tensor, training: bool) -> Tensor:
    """Draw uniform numbers on [0, 1) in the shape and dtype of ``like``; in eval mode 0.5 everywhere, and nothing is drawn."""
    return torch.rand_like(like) if training else torch.full_like(like, 0.5)


@_noise.register_fake
def _(like: Tensor, training: bool) -> Tensor:
    return torch.empty_like(like)


def _noise_backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
    return None, None


_noise.register_autograd(_noise_backward)


@torch.library.custom_op("graphprune::gate", mutates_args=())
def _gate(
    weight: Tensor, log_alpha: Tensor, noise: Tensor, training: bool, pattern: str, layout: str, groups: int
) -> Tensor:
    """Multiply each unit of a weight by its gate.

    Args:
        weight: As stored, any float dtype.
        log_alpha: Score shape of the pattern, any float dtype.
        noise: Uniform, shape of ``log_alpha``; used while ``training``.
        training: Sample the gates; else take the deterministic ones.
        pattern: Text of the pattern.
        layout: How the weight is stored.
        groups: Groups of the convolution.

    Returns:
        Dtype and shape of ``weight``.
    """
    return weight * spread_gates(_gates(log_alpha, noise, training).to(weight.dtype), weight, pattern, layout, groups)


@_gate.register_fake
def _(
    weight: Tensor, log_alpha: Tensor, noise: Tensor, training: bool, pattern: str, layout: str, groups: int
) -> Tensor:
    return torch.empty_like(weight)


@torch.library.custom_op("graphprune::gate_backward", mutates_args=())
def _gate_gradients(
    grad: Tensor,
    weight: Tensor,
    log_alpha: Tensor,
    noise: Tensor,
    training: bool,
    pattern: str,
    layout: str,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``gate`` with respect to ``weight`` and ``log_alpha``; an operator, so that nothing traces into it."""
    to_weight = grad * spread_gates(_gates(log_alpha, noise, training).to(grad.dtype), weight, pattern, layout, groups)
    bound = bound_pattern(pattern, layout, groups, tuple(weight.shape))
    product = to_logical(grad * weight, Layout(layout))
    product = product.to(torch.promote_types(product.dtype, torch.float32))
    shape = (product.shape[0], product.shape[1])
    sums = bound.reduce(product) * bound.score_sizes(shape, device=grad.device)
    slope = (
        hard_concrete.sample_gradient(log_alpha, noise) if training else hard_concrete.deterministic_gradient(log_alpha)
    )
    return to_weight, (sums * slope).to(log_alpha.dtype)


@_gate_gradients.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    log_alpha: Tensor,
    noise: Tensor,
    training: bool,
    pattern: str,
    layout: str,
    groups: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad), torch.empty_like(log_alpha)


def _gate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, log_alpha, noise, *ctx.rest = inputs
    ctx.save_for_backward(weight, log_alpha, noise)


def _gate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    to_weight, to_alpha = torch.ops.graphprune.gate_backward.default(grad, *ctx.saved_tensors, *ctx.rest)
    return to_weight, to_alpha, None, None, None, None, None


_gate.register_autograd(_gate_backward, setup_context=_gate_setup)
noise = torch.ops.graphprune.noise.default
gate = torch.ops.graphprune.gate.default


def _gates(log_alpha: Tensor, drawn: Tensor, training: bool) -> Tensor:
    return hard_concrete.sample(log_alpha, drawn) if training else hard_concrete.deterministic(log_alpha)


@functools.cache
def bound_pattern(pattern: str, layout: str, groups: int, shape: tuple[int, ...]) -> Pattern:
    """Read a pattern and bind it to the geometry of a weight of a stored shape."""
    kernel = math.prod(shape[2:]) if Layout(layout) is Layout.CONV else 1
    return parse_pattern(pattern).bound(kernel=kernel, groups=groups)


def spread_gates(gates: Tensor, weight: Tensor, pattern: str, layout: str, groups: int) -> Tensor:
    """Repeat each gate over the weights of its unit, in the order in which the weight is stored."""
    shape, order = tuple(weight.shape), Layout(layout)
    spread = bound_pattern(pattern, layout, groups, shape).spread(gates, logical_shape(shape, order))
    return from_logical(spread, order, shape)
