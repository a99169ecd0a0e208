"""The operators of quantization: one quantizes and dequantizes, one does so by the range at hand, one records ranges."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import PassError
from graphprune.quant.affine import choose_qparams, dynamic_qparams, split_groups
from graphprune.quant.affine import fake_quantize as reference
from graphprune.quant.observer_text import parse_observer
from graphprune.quant.observers import Observer, State
from graphprune.quant.schemes import Scheme, parse_scheme


@torch.library.custom_op("graphprune::fake_quantize", mutates_args=())
def _fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int = -1, group: int = 0
) -> Tensor:
    """Quantize and dequantize in float: ``(clamp(round(x / scale) + zero_point, min, max) - zero_point) * scale``.

    Args:
        x: Any float dtype and shape.
        scale: float32, ``[]`` per tensor, ``[x.shape[axis]]`` per channel, per group the shape of ``x`` with the grouped
            dimension divided by ``group``; finite and positive.
        zero_point: int32, shape of ``scale``.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        axis: Channel dimension of ``x``; -1 = per tensor.
        group: Consecutive entries along the other dimension of a matrix that share a scale; 0 = all of them.

    Returns:
        Dtype and shape of ``x``. Its gradient is passed straight through inside the range and is zero outside
        (Bengio et al., arXiv:1308.3432; Jacob et al., arXiv:1712.05877, section 3).
    """
    wide = x.float()
    out = torch.empty_like(wide, memory_format=torch.contiguous_format if group else torch.preserve_format)
    grid = _split(out, axis, group)  # perhaps a view; the result is none, so that operators behind it may work in place
    scales, zero_points = _spread(scale.float(), x, axis, group), _spread(zero_point, x, axis, group)
    torch.div(_split(wide, axis, group), scales, out=grid).round_().add_(zero_points).clamp_(quant_min, quant_max)
    grid.sub_(zero_points).mul_(scales)
    return out.to(x.dtype) if x.dtype != torch.float32 else out


def _split(x: Tensor, axis: int, group: int) -> Tensor:
    """``x`` with its grouped dimension split into ``[groups, group]``."""
    return split_groups(x, axis, group) if group else x


def _spread(values: Tensor, x: Tensor, axis: int, group: int) -> Tensor:
    """Scales so that they broadcast over ``_split``."""
    if group:
        return values.unsqueeze(2 - axis)
    return values if axis < 0 else values.view([-1 if dim == axis else 1 for dim in range(x.dim())])


@_fake_quantize.register_fake
def _(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int = -1, group: int = 0
) -> Tensor:
    return torch.empty_like(x)


def _fake_quantize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what is in range, and neither ``x``, for a fourth of the memory, nor scales, which observers change in place."""
    x, scale, zero_point, quant_min, quant_max, axis, group = inputs
    low = _spread((quant_min - 0.5 - zero_point) * scale, x, axis, group)
    high = _spread((quant_max + 0.5 - zero_point) * scale, x, axis, group)
    parts = _split(x, axis, group)
    ctx.save_for_backward(((parts >= low) & (parts <= high)).view(x.shape))


def _fake_quantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (inside,) = ctx.saved_tensors
    return grad * inside.view(torch.uint8), None, None, None, None, None, None


_fake_quantize.register_autograd(_fake_quantize_backward, setup_context=_fake_quantize_setup)


@torch.library.custom_op("graphprune::dynamic_fake_quantize", mutates_args=())
def _dynamic_fake_quantize(x: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Quantize to uint8 by the range that ``x`` has, extended to 0, and dequantize, as ONNX's DynamicQuantizeLinear does.

    Args:
        x: Any float dtype and shape, not empty.
        quant_min: 0.
        quant_max: 255.

    Returns:
        Dtype and shape of ``x``; zeros stay exactly zero. The gradient is passed straight through: nothing is out of range.
    """
    scale, zero_point = dynamic_qparams(x.float())
    return reference(x, scale, zero_point, _DYNAMIC)


_DYNAMIC = parse_scheme("uint8:affine:tensor")


@_dynamic_fake_quantize.register_fake
def _(x: Tensor, quant_min: int, quant_max: int) -> Tensor:
    return torch.empty_like(x)


def _dynamic_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


_dynamic_fake_quantize.register_autograd(_dynamic_backward)


@torch.library.custom_op("graphprune::observe", mutates_args=("low", "high", "histogram", "scale", "zero_point"))
def _observe(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    histogram: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    observing: bool,
    required: bool,
    scheme: str,
    observer: str,
    name: str,
) -> None:
    """Record the range of ``x``; where the observer is cheap to read, set scale and zero-point from it too.

    Args:
        x: Float, any shape.
        low: float32, shape of ``scale``; ``+inf`` until something was observed. Mutated while ``observing``.
        high: As ``low``; ``-inf`` until something was observed. Mutated while ``observing``.
        histogram: float32 ``[*scale.shape, bins]``, None for observers without one. Mutated while ``observing``.
        scale: float32. Mutated while ``observing``, unless the observer is read once, at the end of calibration.
        zero_point: int32, shape of ``scale``. Mutated likewise.
        observing: Whether to look at ``x`` at all.
        required: Whether something quantizes by this range, so that there must be one.
        scheme: Text of the scheme.
        observer: Text of the observer.
        name: What is observed, for messages.

    Raises:
        PassError: ``x`` has NaN or infinite entries, or nothing was observed yet where a range is needed.
    """
    if not observing:
        if required and bool((high < low).any()):
            way_out = "train a step or calibrate first" if parse_observer(observer).live else "calibrate first"
            raise PassError(f"{name} has seen no data; {way_out}")
        return
    kind = parse_scheme(scheme)
    watching = bound_observer(observer, scheme)
    try:
        state = watching.update(State(low.float(), high.float(), _empty(low) if histogram is None else histogram), x)
    except PassError as error:
        raise PassError(f"{name}: {error}") from None
    low.copy_(state.low)
    high.copy_(state.high)
    if histogram is not None:
        histogram.copy_(state.histogram)
    if watching.live:
        write_qparams(scale, zero_point, watching.range(state, kind), kind)


@_observe.register_fake
def _(x: Tensor, *rest: object) -> None:
    return None


def write_qparams(scale: Tensor, zero_point: Tensor, bounds: tuple[Tensor, Tensor], scheme: Scheme) -> None:
    """Write scale and zero-point for a range."""
    new_scale, new_zero_point = choose_qparams(*bounds, scheme)
    scale.copy_(new_scale)
    zero_point.copy_(new_zero_point)


@functools.cache
def bound_observer(text: str, scheme: str) -> Observer:
    """The observer of a text, for the channels or groups of a scheme."""
    kind = parse_scheme(scheme)
    return replace(parse_observer(text), axis=kind.axis, group=kind.group)


def _empty(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=like.device)


fake_quantize = torch.ops.graphprune.fake_quantize.default
dynamic_fake_quantize = torch.ops.graphprune.dynamic_fake_quantize.default
observe = torch.ops.graphprune.observe.default
