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
        low: Smallest value, float, a scalar or ``[channels]``.
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


def quantize_range(
    x: Tensor, scale: Tensor, zero_point: Tensor, *, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    """Quantize to the integers ``[qmin, qmax]``.

    Args:
        x: Any float dtype, computed with as float32. Infinities saturate; NaN has no integer and must not
            occur.
        scale: Float32 > 0: a scalar, or ``[x.shape[axis]]``.
        zero_point: Integers in ``[qmin, qmax]``, shape of ``scale``.
        qmin: Smallest integer.
        qmax: Largest integer.
        axis: Dimension of ``x`` that ``scale`` runs along; None for a scalar.

    Returns:
        int32, shape of ``x``. Halves are rounded to even before the zero point is added.

    Raises:
        PassError: ``scale`` or ``zero_point`` does not fit ``x`` and ``axis``.
    """
    scale, zero_point = _along(scale, x, axis), _along(zero_point, x, axis)
    return (torch.round(x.float() / scale) + zero_point).clamp(qmin, qmax).to(torch.int32)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Quantize by a scheme; see ``quantize_range``.

    Returns:
        int8 or uint8, shape of ``x``.
    """
    integers = quantize_range(x, scale, zero_point, qmin=scheme.qmin, qmax=scheme.qmax, axis=scheme.axis)
    return integers.to(scheme.dtype.torch_dtype)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
    """Return ``(q - zero_point) * scale``.

    Args:
        q: Integers.
        scale: Float32: a scalar, or ``[q.shape[axis]]``.
        zero_point: Integers, shape of ``scale``.
        axis: Dimension of ``q`` that ``scale`` runs along; None for a scalar.

    Returns:
        Float32, shape of ``q``; exactly 0 where ``q == zero_point``.

    Raises:
        PassError: ``scale`` or ``zero_point`` does not fit ``q`` and ``axis``.
    """
    return (q.to(torch.int32) - _along(zero_point, q, axis)).float() * _along(scale, q, axis)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Quantize and dequantize; the plain reference, whose gradient is zero.

    Returns:
        Shape and dtype of ``x``; zeros of ``x`` stay exactly zero.
    """
    scale, zero_point = _along(scale, x, scheme.axis), _along(zero_point, x, scheme.axis)
    # the same as quantize and dequantize, bit for bit, in float32 and in place: integers below 2 ** 24 are exact there
    grid = torch.div(x.detach().float(), scale).round_().add_(zero_point).clamp_(scheme.qmin, scheme.qmax)
    return grid.sub_(zero_point).mul_(scale).to(x.dtype)


def _along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Shape per-channel values so that they broadcast along ``axis`` of ``x``."""
    if axis is None:
        if values.numel() != 1:
            raise PassError(
                f"quantization per tensor needs one scale and zero point, got {values.numel()}; give an axis"
            )
        return values.reshape(())
    if not 0 <= axis < x.ndim or tuple(values.shape) != (x.shape[axis],):
        raise PassError(
            f"quantization along axis {axis} of a tensor of shape {tuple(x.shape)} needs one "
            f"scale and zero point per index of that axis, got shape {tuple(values.shape)}"
        )
    return values.reshape([-1 if dim == axis else 1 for dim in range(x.ndim)])
