"""The three operators that graphprune adds to a graph, as ``torch.library`` custom operators.

They have fake rules, so that a Program can be exported again, and gradients, so that it can be trained.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from graphprune.errors import PassError
from graphprune.ir.gate_operators import gate as gate
from graphprune.ir.gate_operators import noise as noise
from graphprune.quant.affine import choose_qparams
from graphprune.quant.observers import MovingAverageMinMax
from graphprune.quant.schemes import parse_scheme


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


@torch.library.custom_op("graphprune::fake_quantize", mutates_args=())
def _fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int = -1
) -> Tensor:
    """Quantize and dequantize in float: ``(clamp(round(x / scale) + zero_point, min, max) - zero_point) * scale``.

    Args:
        x: Any float dtype and shape.
        scale: float32, ``[]`` per tensor or ``[x.shape[axis]]`` per channel; finite and positive.
        zero_point: int32, shape of ``scale``.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        axis: Channel dimension of ``x``; -1 = per tensor.

    Returns:
        Dtype and shape of ``x``. Its gradient is passed straight through inside the range and is zero outside
        (Bengio et al., arXiv:1308.3432; Jacob et al., arXiv:1712.05877, section 3).
    """
    wide, scale = x.float(), scale.float()
    if axis < 0:
        out = torch.fake_quantize_per_tensor_affine(wide, scale, zero_point, quant_min, quant_max)
    else:
        out = torch.fake_quantize_per_channel_affine(wide, scale, zero_point, axis, quant_min, quant_max)
    return out.to(x.dtype) if x.dtype != torch.float32 else out


@_fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int = -1) -> Tensor:
    return torch.empty_like(x)


def _fake_quantize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, ctx.quant_min, ctx.quant_max, ctx.axis = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _fake_quantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    x, scale, zero_point = ctx.saved_tensors
    low = (ctx.quant_min - 0.5 - zero_point) * scale
    high = (ctx.quant_max + 0.5 - zero_point) * scale
    if ctx.axis >= 0:
        shape = [-1 if dim == ctx.axis else 1 for dim in range(x.dim())]
        low, high = low.view(shape), high.view(shape)
    inside = (x >= low) & (x <= high)
    return grad * inside.view(torch.uint8), None, None, None, None, None


_fake_quantize.register_autograd(_fake_quantize_backward, setup_context=_fake_quantize_setup)


@torch.library.custom_op("graphprune::observe", mutates_args=("low", "high", "scale", "zero_point"))
def _observe(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    observing: bool,
    scheme: str,
    momentum: float,
) -> None:
    """Follow the range of ``x`` by a moving average and set scale and zero-point from it.

    Args:
        x: Float, any shape.
        low: float32, ``[]`` or ``[channels]``; ``+inf`` until something was observed. Mutated while ``observing``.
        high: As ``low``; ``-inf`` until something was observed. Mutated while ``observing``.
        scale: float32, shape of ``low``. Mutated while ``observing``.
        zero_point: int32, shape of ``low``. Mutated while ``observing``.
        observing: Whether to look at ``x`` at all.
        scheme: Text of the scheme, such as ``uint8:affine:tensor``.
        momentum: In (0, 1]; 1 takes the last range as it is.

    Raises:
        PassError: ``x`` has NaN or infinite entries, or nothing was observed yet and ``observing`` is False.
    """
    if not observing:
        if bool((high < low).any()):
            raise PassError(
                "an activation quantizer has seen no data; train a step or run graphprune.training.calibrate first"
            )
        return
    kind = parse_scheme(scheme)
    new_low, new_high = MovingAverageMinMax(kind.axis, momentum).update(low.float(), high.float(), x.detach())
    new_scale, new_zero_point = choose_qparams(new_low, new_high, kind)
    low.copy_(new_low)
    high.copy_(new_high)
    scale.copy_(new_scale)
    zero_point.copy_(new_zero_point)


@_observe.register_fake
def _(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    observing: bool,
    scheme: str,
    momentum: float,
) -> None:
    return None


mask = mask_operator = torch.ops.graphprune.mask.default
fake_quantize = torch.ops.graphprune.fake_quantize.default
observe = torch.ops.graphprune.observe.default
OURS = (mask, fake_quantize, observe, gate, noise)
