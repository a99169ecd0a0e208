"""Quantization schemes: which integers stand for real numbers, and how many scales a tensor has."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

import torch

from graphprune.errors import RecipeError, suggest

_EXAMPLES = (
    "int8:symmetric:channel",
    "int8:symmetric:tensor",
    "int8:affine:tensor",
    "uint8:affine:tensor",
    "uint8:affine:channel",
)


class QuantDtype(enum.Enum):
    """An integer type to quantize to."""

    INT8 = "int8"
    UINT8 = "uint8"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of quantized tensors."""
        return torch.int8 if self is QuantDtype.INT8 else torch.uint8


@dataclass(frozen=True)
class Scheme:
    """How a tensor is quantized: ``q = clamp(round(x / scale) + zero_point, qmin, qmax)``.

    Args:
        dtype: The integer type.
        symmetric: Whether the zero point is always 0. Symmetric int8 leaves -128 unused, so that ``-q`` is
            always representable.
        axis: None for one scale per tensor, else the dimension along which every index (channel) has its own.

    Raises:
        RecipeError: Symmetric uint8, which has no negative numbers, or a negative axis.
    """

    dtype: QuantDtype
    symmetric: bool
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.symmetric and self.dtype is QuantDtype.UINT8:
            raise RecipeError("uint8 has no numbers below 0, so it cannot be symmetric; use int8, or affine")
        if self.axis is not None and self.axis < 0:
            raise RecipeError(f"quantization axis {self.axis} is negative; count dimensions from 0, the first")

    @property
    def qmin(self) -> int:
        """Smallest integer in use."""
        if self.dtype is QuantDtype.UINT8:
            return 0
        return -127 if self.symmetric else -128

    @property
    def qmax(self) -> int:
        """Largest integer in use."""
        return 255 if self.dtype is QuantDtype.UINT8 else 127

    def __str__(self) -> str:
        """Return the canonical text, such as "int8:symmetric:channel" (axis 0) or "int8:symmetric:axis1"."""
        where = "tensor" if self.axis is None else "channel" if self.axis == 0 else f"axis{self.axis}"
        return f"{self.dtype.value}:{'symmetric' if self.symmetric else 'affine'}:{where}"


WEIGHT_INT8 = Scheme(QuantDtype.INT8, symmetric=True, axis=0)
"""Weights: [-127, 127], a scale per output channel, zero point 0, so pruned weights stay exactly zero."""

ACTIVATION_UINT8 = Scheme(QuantDtype.UINT8, symmetric=False)
"""Activations: [0, 255], one scale and zero point per tensor."""


def parse_scheme(text: str) -> Scheme:
    """Read "dtype:symmetric|affine:tensor|channel|axisN"; ``parse_scheme(str(s)) == s``.

    Args:
        text: The text; "channel" is axis 0.

    Returns:
        The scheme.

    Raises:
        RecipeError: The text cannot be read, or names an impossible scheme.
    """
    match = re.fullmatch(r"(int8|uint8):(symmetric|affine):(?:(tensor)|(channel)|axis(\d+))", text.strip().lower())
    if match is None:
        raise RecipeError(
            f"unknown quantization scheme {text!r}; write "
            f"dtype:symmetric|affine:tensor|channel|axisN{suggest(text, _EXAMPLES)}"
        )
    axis = None if match[3] else 0 if match[4] else int(match[5])
    return Scheme(QuantDtype(match[1]), match[2] == "symmetric", axis)
