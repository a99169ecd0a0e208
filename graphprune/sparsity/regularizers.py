"""Regularizers: a gradient that draws units towards zero while they are still trained."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.sparsity.pattern_base import Pattern, matrix_shape
from graphprune.sparsity.spelling import format_named, parse_named


class Regularizer(abc.ABC):
    """Base of all regularizers; subclasses are frozen dataclasses whose fields have defaults."""

    name: ClassVar[str]

    def __str__(self) -> str:
        return format_named(self.name, self)

    @abc.abstractmethod
    def gradient(self, weight: Tensor, pattern: Pattern) -> Tensor | None:
        """Return what is added to the gradient of a weight, or None for nothing.

        Args:
            weight: ``[out, in]``, any float dtype.
            pattern: Pattern of the site.

        Returns:
            Shape and dtype of ``weight``; finite wherever the weight is.
        """


@dataclass(frozen=True)
class NoRegularizer(Regularizer):
    """Nothing."""

    name = "none"

    def gradient(self, weight: Tensor, pattern: Pattern) -> Tensor | None:
        """Return None."""
        return None


@dataclass(frozen=True)
class GroupLasso(Regularizer):
    """``strength * sqrt(size) * sum over units of ||W_unit||_2``; its gradient is ``strength * sqrt(size) * W / ||W_unit||``.

    Zero units have gradient zero (the subgradient of smallest norm), so it is finite everywhere. Source: Yuan and Lin, 2006,
    equation 2. (The "group_lasso" of Neural Compressor 2.6 divides by the norm of the gradient, and gives NaN for units that
    receive none.)

    Raises:
        SparsityError: ``strength`` is negative or not finite.
    """

    strength: float = 1e-4
    name = "group_lasso"

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength < float("inf"):
            raise SparsityError(f"group_lasso needs a finite strength >= 0, got {self.strength}")

    @torch.no_grad()
    def gradient(self, weight: Tensor, pattern: Pattern) -> Tensor | None:
        """Return ``strength * sqrt(size) * W / ||W_unit||``, zero where the unit is zero."""
        shape = matrix_shape(weight)
        wide = weight.float()
        size = pattern.score_sizes(shape, device=weight.device)
        norms = (pattern.reduce(wide.square()) * size).sqrt()
        root = size.float().sqrt() if isinstance(size, Tensor) else float(size) ** 0.5
        factor = torch.where(norms > 0, self.strength * root / norms.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        return (wide * pattern.spread(factor, shape)).to(weight.dtype)


REGULARIZERS: Mapping[str, type[Regularizer]] = MappingProxyType({cls.name: cls for cls in (NoRegularizer, GroupLasso)})
"""Every regularizer that text can name."""


def parse_regularizer(text: str) -> Regularizer:
    """Read a regularizer: "none" or "group_lasso(strength=0.001)".

    Raises:
        SparsityError: The text is malformed, or the name, an option or a value is not known.
    """
    return parse_named(text, REGULARIZERS, "regularizer")
