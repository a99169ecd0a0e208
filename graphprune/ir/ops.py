"""The operators that graphprune adds to a graph, as ``torch.library`` custom operators.

They have fake rules, so that a Program can be exported again, and gradients, so that it can be trained.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from graphprune.ir.gate_operators import gate as gate
from graphprune.ir.gate_operators import noise as noise
from graphprune.ir.quant_operators import dynamic_fake_quantize as dynamic_fake_quantize
from graphprune.ir.quant_operators import fake_quantize as fake_quantize
from graphprune.ir.quant_operators import observe as observe


@torch.library.custom_op("graphprune::mask", mutates_args=())
def _mask(weight: Tensor, mask: Tensor, dense_gradient: bool = False) -> Tensor:
    """Multiply a weight by its mask.

    Args:
        weight: Any float dtype, any shape.
        mask: Bool, shape of ``weight``; True = kept.
        dense_gradient: Let the gradient reach pruned entries too, for criteria that score them.

    Returns:
        ``weight`` where kept, zero elsewhere; dtype and shape of ``weight``.
    """
    return weight * mask.view(torch.uint8)  # eight times as fast as multiplying by bool


@_mask.register_fake
def _(weight: Tensor, mask: Tensor, dense_gradient: bool = False) -> Tensor:
    return torch.empty_like(weight)


def _mask_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask, ctx.dense_gradient = inputs
    ctx.save_for_backward(mask)


def _mask_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (mask,) = ctx.saved_tensors
    return (grad if ctx.dense_gradient else grad * mask.view(torch.uint8)), None, None


_mask.register_autograd(_mask_backward, setup_context=_mask_setup)


class _Kept(torch.autograd.Function):
    """The mask operator for a weight that is zero already where it is pruned: forward does nothing."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, dense_gradient: bool) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.dense_gradient = dense_gradient
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        if not ctx.dense_gradient:
            grad.mul_(mask.view(torch.uint8))  # nobody else holds it: it comes fresh from a matrix product or a sum
        return grad, None, None


def apply_mask(weight: Tensor, mask: Tensor, dense_gradient: bool = False) -> Tensor:
    """What a Program runs for the mask operator: the same result, without the product where it is known to change nothing.

    See ``mark_clean``. Saves the time of the product and the memory of a masked copy of every weight.
    """
    if torch.compiler.is_compiling() or getattr(mask, "_graphprune_clean", None) != _state(weight, mask):
        return cast(Tensor, mask_operator(weight, mask, dense_gradient))
    return _Kept.apply(weight, mask, dense_gradient)  # type: ignore[no-any-return,no-untyped-call]


def mark_clean(weight: Tensor, mask: Tensor) -> None:
    """Remember that ``weight`` is zero wherever ``mask`` is False, until either of them is changed in place or replaced."""
    mask._graphprune_clean = _state(weight, mask)  # type: ignore[attr-defined]


def _state(weight: Tensor, mask: Tensor) -> tuple[int, int, int]:
    return weight.data_ptr(), weight._version, mask._version


mask = mask_operator = torch.ops.graphprune.mask.default
OURS = (mask, fake_quantize, dynamic_fake_quantize, observe, gate, noise)
