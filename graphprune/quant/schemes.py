"""Quantization schemes: which integers stand for real numbers, and how many scales a tensor has."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphprune.errors import PassError, RecipeError, suggest

_EXAMPLES = (
    "int8:symmetric:channel",
    "int8:symmetric:channel:reduced",
    "int8:symmetric:tensor",
    "int8:affine:tensor",
    "uint8:affine:tensor",
    "uint8:affine:channel",
    "int4:symmetric:channel:group32",
    "int4:affine:channel:group32",
    "uint4:affine:channel:group32",
)
_TEXT = re.compile(r"(u?int[48]):(symmetric|affine):(?:(tensor)|(channel)|axis([0-9]+))(?::group([0-9]+))?(:reduced)?")


class QuantDtype(enum.Enum):
    """An integer type to quantize to."""

    INT8 = "int8"
    UINT8 = "uint8"
    INT4 = "int4"
    UINT4 = "uint4"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of quantized tensors; four-bit numbers take a byte each until a target packs them."""
        return torch.int8 if self.signed else torch.uint8

    @property
    def bits(self) -> int:
        """Bits of a number, 8 or 4."""
        return 8 if self in (QuantDtype.INT8, QuantDtype.UINT8) else 4

    @property
    def signed(self) -> bool:
        """Whether it has numbers below 0."""
        return self in (QuantDtype.INT8, QuantDtype.INT4)


@dataclass(frozen=True)
class Scheme:
    """How a tensor is quantized: ``q = clamp(round(x / scale) + zero_point, qmin, qmax)``.

    Args:
        dtype: The integer type.
        symmetric: Whether the zero point is always 0. The smallest number stays unused then (-128 of int8, -8 of
            int4), so that ``-q`` is always representable.
        axis: None for one scale per tensor, else the dimension along which every index (channel) has its own.
        group: None, or how many consecutive entries along the other dimension of a 2-D weight share a scale, even
            and at least 2; needs ``axis`` 0 or 1.
        reduced: Use one bit less: [-64, 64] symmetric, [-64, 63] affine int8, [0, 127] uint8. For CPUs without VNNI,
            whose products of two 8-bit pairs saturate at 16 bits.

    Raises:
        RecipeError: A symmetric unsigned type, which has no negative numbers; a negative axis; a group without axis
            0 or 1, odd, or below 2; four bits reduced.
    """

    dtype: QuantDtype
    symmetric: bool
    axis: int | None = None
    group: int | None = None
    reduced: bool = False

    def __post_init__(self) -> None:
        kind = self.dtype.value
        if self.symmetric and not self.dtype.signed:
            raise RecipeError(f"{kind} has no numbers below 0, so it cannot be symmetric; use {kind[1:]}, or affine")
        if self.axis is not None and self.axis < 0:
            raise RecipeError(f"quantization axis {self.axis} is negative; count dimensions from 0, the first")
        if self.group is not None:
            if self.axis not in (0, 1):
                where = "none" if self.axis is None else str(self.axis)
                raise RecipeError(
                    f"quantization in groups of {self.group} is for 2-D weights and needs a channel axis of 0 or 1, "
                    f"got {where}; write for example {kind}:affine:channel:group32"
                )
            if self.group < 2 or self.group % 2:
                raise RecipeError(
                    f"a quantization group of {self.group} is not an even number of at least 2; int4 packs two "
                    "numbers in a byte, so use for example group32"
                )
        if self.reduced and self.dtype.bits != 8:
            raise RecipeError(f"{kind} cannot be reduced, which takes one bit off 8-bit numbers; leave :reduced out")

    @property
    def qmin(self) -> int:
        """Smallest integer in use."""
        if not self.dtype.signed:
            return 0
        half = 1 << (self._bits - 1)
        return -half if self.reduced or not self.symmetric else 1 - half

    @property
    def qmax(self) -> int:
        """Largest integer in use."""
        if not self.dtype.signed:
            return (1 << self._bits) - 1
        half = 1 << (self._bits - 1)
        return half if self.reduced and self.symmetric else half - 1

    @property
    def _bits(self) -> int:
        return self.dtype.bits - self.reduced

    def qparams_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape that scale and zero point have for a tensor.

        Args:
            shape: Shape of the tensor.

        Returns:
            ``()`` per tensor; ``(shape[axis],)`` per channel; in groups ``shape`` with the dimension that is not
            ``axis`` divided by ``group``.

        Raises:
            PassError: The tensor has no such axis; or, in groups, is not 2-D, or its other dimension is not a
                multiple of the group. The caller adds the site.
        """
        sizes = tuple(shape)
        if self.axis is None:
            return ()
        if self.axis >= len(sizes):
            raise PassError(f"quantization {self}: no axis {self.axis} in a tensor of shape {sizes}")
        if self.group is None:
            return (sizes[self.axis],)
        if len(sizes) != 2:
            raise PassError(f"quantization {self}: groups are for 2-D weights, not for a tensor of shape {sizes}")
        grouped = sizes[1 - self.axis]
        if grouped % self.group:
            raise PassError(
                f"quantization {self}: dimension {1 - self.axis} of a weight of shape {sizes} has {grouped} entries, "
                f"not a multiple of group {self.group}; choose a group that divides it, or exclude this weight"
            )
        count = grouped // self.group
        return (sizes[0], count) if self.axis == 0 else (count, sizes[1])

    def __str__(self) -> str:
        """Return the canonical text: "int8:symmetric:channel" (axis 0), "int4:affine:axis1:group64",
        "int8:symmetric:channel:reduced".
        """
        where = "tensor" if self.axis is None else "channel" if self.axis == 0 else f"axis{self.axis}"
        group = "" if self.group is None else f":group{self.group}"
        reduced = ":reduced" if self.reduced else ""
        return f"{self.dtype.value}:{'symmetric' if self.symmetric else 'affine'}:{where}{group}{reduced}"


WEIGHT_INT8 = Scheme(QuantDtype.INT8, symmetric=True, axis=0)
"""Weights: [-127, 127], a scale per output channel, zero point 0, so pruned weights stay exactly zero."""

ACTIVATION_UINT8 = Scheme(QuantDtype.UINT8, symmetric=False)
"""Activations: [0, 255], one scale and zero point per tensor."""


def parse_scheme(text: str) -> Scheme:
    """Read "dtype:symmetric|affine:tensor|channel|axisN[:groupN][:reduced]"; ``parse_scheme(str(s)) == s``.

    Args:
        text: The text; "channel" is axis 0.

    Returns:
        The scheme.

    Raises:
        RecipeError: The text cannot be read, or names an impossible scheme.
    """
    match = _TEXT.fullmatch(text.strip().lower())
    if match is None:
        raise RecipeError(
            f"unknown quantization scheme {text!r}; write "
            f"dtype:symmetric|affine:tensor|channel|axisN[:groupN][:reduced]{suggest(text, _EXAMPLES)}"
        )
    axis = None if match[3] else 0 if match[4] else int(match[5])
    group = None if match[6] is None else int(match[6])
    return Scheme(QuantDtype(match[1]), match[2] == "symmetric", axis, group, match[7] is not None)
