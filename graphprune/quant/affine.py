"""Scale and zero-point arithmetic, the reference that every kernel, operator and artifact is compared with.

``q = clamp(round(x / scale) + zero_point, qmin, qmax)`` with round-half-to-even, and ``x' = (q - zero_point)
* scale``, all in float32, as ONNX QuantizeLinear and DequantizeLinear define them. Real zero is always
exactly representable. Source: Jacob et al., arXiv:1712.05877, section 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphprune.errors import PassError
from graphprune.quant.schemes import Scheme

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Scales are normal float32 numbers: smaller ones lose digits, or are flushed to zero."""


def choose_qparams(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Choose scale and zero point for a range of real numbers.

    The range is first extended to include 0. Numbers within it come back from ``fake_quantize`` with an error
    of at most half a scale (up to 1e38: beyond, float32 may overflow); 0 comes back as 0.

    Args:
        low: Smallest value, float, of the shape that scales have.
        high: Largest value, same shape, ``>= low``.
        scheme: The scheme.

    Returns:
        ``(scale, zero_point)``, shapes of ``low``: float32, finite and > 0; int32 in ``[qmin, qmax]``, 0 for
        a symmetric scheme. The range [0, 0], of a tensor or channel that is all zero, gets scale 1.0; a zero
        point follows as ``qmin`` where affine.

    Raises:
        PassError: A bound is not finite, ``low > high``, or the shapes differ. The caller adds the site.
    """
    if low.shape != high.shape:
        raise PassError(
            f"quantization range: low is of shape {tuple(low.shape)}, high of {tuple(high.shape)}; give pairs"
        )
    if not bool((low.isfinite() & high.isfinite() & (low <= high)).all()):
        raise PassError("quantization range: it needs finite low <= high; calibrate with data that reaches this tensor")
    below, above = low.detach().double().clamp(max=0.0), high.detach().double().clamp(min=0.0)
    width = 2.0 * torch.maximum(-below, above) if scheme.symmetric else above - below
    steps = 2 * scheme.qmax if scheme.symmetric else scheme.qmax - scheme.qmin
    scale = torch.where(width > 0.0, (width / steps).clamp(min=SMALLEST_SCALE), 1.0).float()
    if scheme.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero_point = (scheme.qmin - below / scale.double()).round().clamp(scheme.qmin, scheme.qmax)
    return scale, zero_point.to(torch.int32)


def dynamic_qparams(x: Tensor) -> tuple[Tensor, Tensor]:
    """Choose uint8 scale and zero point for this very tensor, as ONNX DynamicQuantizeLinear does.

    ``scale = (max(x, 0) - min(x, 0)) / 255`` and ``zero_point = round(clamp(-min(x, 0) / scale, 0, 255))``, halves to
    even, in float32.

    Args:
        x: Any float dtype and shape, finite.

    Returns:
        ``(scale, zero_point)``, scalars: float32 > 0, int32 in [0, 255]. A tensor of zeros, or without entries, gets
        scale 1.0 and zero point 0, as in onnxruntime.

    Source: ONNX operator DynamicQuantizeLinear, version 11.
    """
    if not x.numel():
        return torch.ones((), device=x.device), torch.zeros((), dtype=torch.int32, device=x.device)
    low, high = x.detach().aminmax()
    below, above = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    scale = (above - below) / 255.0
    scale = torch.where(scale == 0.0, 1.0, scale)
    zero_point = (-below / scale).clamp(0.0, 255.0).round()
    return scale, zero_point.to(torch.int32)


def quantize_range(
    x: Tensor, scale: Tensor, zero_point: Tensor, *, qmin: int, qmax: int, axis: int | None = None, group: int = 0
) -> Tensor:
    """Quantize to the integers ``[qmin, qmax]``.

    Args:
        x: Any float dtype, computed with as float32. Infinities saturate; NaN has no integer and must not
            occur.
        scale: Float32 > 0: a scalar, or ``[x.shape[axis]]``, or shape of ``x`` with the other dimension divided by
            ``group``.
        zero_point: Integers in ``[qmin, qmax]``, shape of ``scale``.
        qmin: Smallest integer.
        qmax: Largest integer.
        axis: Dimension of ``x`` that ``scale`` runs along; None for a scalar.
        group: Consecutive entries along the other dimension of a 2-D ``x`` that share a scale; 0: all.

    Returns:
        int32, shape of ``x``. Halves are rounded to even before the zero point is added.

    Raises:
        PassError: ``scale`` or ``zero_point`` does not fit ``x``, ``axis`` and ``group``.
    """
    pieces = split_groups(x, axis, group)
    steps = torch.div(pieces.float(), _along(scale, x, axis, group)).round_()
    integers = steps.add_(_along(zero_point, x, axis, group)).clamp_(qmin, qmax)
    return integers.to(torch.int32).reshape(x.shape)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Quantize by a scheme; see ``quantize_range``.

    Returns:
        int8 or uint8, shape of ``x``; four-bit numbers too take a byte each.
    """
    integers = quantize_range(
        x, scale, zero_point, qmin=scheme.qmin, qmax=scheme.qmax, axis=scheme.axis, group=scheme.group or 0
    )
    return integers.to(scheme.dtype.torch_dtype)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None, group: int = 0) -> Tensor:
    """Return ``(q - zero_point) * scale``.

    Args:
        q: Integers.
        scale: Float32: a scalar, or ``[q.shape[axis]]``, or shape of ``q`` with the other dimension divided by
            ``group``.
        zero_point: Integers, shape of ``scale``.
        axis: Dimension of ``q`` that ``scale`` runs along; None for a scalar.
        group: Consecutive entries along the other dimension of a 2-D ``q`` that share a scale; 0: all.

    Returns:
        Float32, shape of ``q``; exactly 0 where ``q == zero_point``.

    Raises:
        PassError: ``scale`` or ``zero_point`` does not fit ``q``, ``axis`` and ``group``.
    """
    steps = split_groups(q, axis, group).to(torch.int32) - _along(zero_point, q, axis, group)
    return steps.float().mul_(_along(scale, q, axis, group)).reshape(q.shape)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Quantize and dequantize; the plain reference, whose gradient is zero.

    Returns:
        Shape and dtype of ``x``; zeros of ``x`` stay exactly zero.
    """
    axis, group = scheme.axis, scheme.group or 0
    scale, zero_point = _along(scale, x, axis, group), _along(zero_point, x, axis, group)
    # the same as quantize and dequantize, bit for bit, in float32 and in place: integers below 2 ** 24 are exact there
    grid = torch.div(split_groups(x.detach(), axis, group).float(), scale).round_().add_(zero_point)
    return grid.clamp_(scheme.qmin, scheme.qmax).sub_(zero_point).mul_(scale).to(x.dtype).reshape(x.shape)


def split_groups(x: Tensor, axis: int | None, group: int) -> Tensor:
    """View a 2-D tensor with a dimension of its own for the entries of a group.

    Args:
        x: Any dtype.
        axis: Dimension of the channels, 0 or 1.
        group: Consecutive entries along the other dimension; 0: ``x`` is returned as it is, whatever its shape.

    Returns:
        ``[rows, groups, group]`` for axis 0, ``[groups, group, columns]`` for axis 1: the entries of a group are
        along ``2 - axis``.

    Raises:
        PassError: ``x`` is not 2-D, ``axis`` not 0 or 1, or ``group`` does not divide the other dimension.
    """
    if not group:
        return x
    if axis not in (0, 1) or x.ndim != 2 or group < 0 or x.shape[1 - axis] % group:
        raise PassError(
            f"quantization in groups of {group} needs a 2-D tensor, axis 0 or 1, and a group that divides the other "
            f"dimension; got shape {tuple(x.shape)}, axis {axis}"
        )
    rows, columns = x.shape
    return x.reshape((rows, columns // group, group) if axis == 0 else (rows // group, group, columns))


def _along(values: Tensor, x: Tensor, axis: int | None, group: int) -> Tensor:
    """Shape scales so that they broadcast with ``split_groups`` of ``x``."""
    if axis is None:
        if values.numel() != 1:
            raise PassError(
                f"quantization per tensor needs one scale and zero point, got {values.numel()}; give an axis"
            )
        return values.reshape(())
    if group:
        expected = tuple(size // (1 if dim == axis else group) for dim, size in enumerate(x.shape))
        if tuple(values.shape) != expected:
            raise PassError(
                f"quantization of a tensor of shape {tuple(x.shape)} in groups of {group} along axis {1 - axis} needs "
                f"scales and zero points of shape {expected}, got {tuple(values.shape)}"
            )
        return values.unsqueeze(2 - axis)
    if not 0 <= axis < x.ndim or tuple(values.shape) != (x.shape[axis],):
        raise PassError(
            f"quantization along axis {axis} of a tensor of shape {tuple(x.shape)} needs one "
            f"scale and zero point per index of that axis, got shape {tuple(values.shape)}"
        )
    return values.reshape([-1 if dim == axis else 1 for dim in range(x.ndim)])
