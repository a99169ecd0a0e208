"""Observers: pure functions that record the range of the tensors they are shown.

The state is two tensors, so that a caller can keep it in buffers. Nothing seen yet is ``low = +inf, high =
-inf``. A new observer is one small class with a ``combine`` formula; list it in ``OBSERVERS``.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from graphprune.errors import PassError, RecipeError


@dataclass(frozen=True)
class Observer(abc.ABC):
    """Base of all observers.

    Args:
        axis: None for one range per tensor, else the dimension along which every index has its own.
    """

    axis: int | None = None
    name: ClassVar[str]

    def initial(self, channels: int | None = None, *, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return the state before any data: float32 ``(+inf, -inf)``.

        Args:
            channels: Size of the observed axis; None for one range per tensor.
            device: Where the state lives.
        """
        shape = () if channels is None else (channels,)
        return torch.full(shape, float("inf"), device=device), torch.full(shape, float("-inf"), device=device)

    @torch.no_grad()
    def update(self, low: Tensor | None, high: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take one batch into account.

        Args:
            low: Smallest value so far, float32, a scalar or ``[channels]``; not modified. None or +inf:
                nothing seen yet.
            high: Largest value so far, likewise; None or -inf: nothing seen yet.
            x: The batch, any float dtype.

        Returns:
            The new ``(low, high)``, float32, finite.

        Raises:
            PassError: ``x`` is empty or holds NaN or infinity, or its axis does not fit the state. The caller
                adds the site.
        """
        batch_low, batch_high = self._range(x)
        if low is None or high is None:
            return batch_low, batch_high
        if low.shape != batch_low.shape or high.shape != batch_high.shape:
            raise PassError(
                f"observer {self.name}: its range is {tuple(low.shape)}, the batch's {tuple(batch_low.shape)}"
            )
        unseen = low > high
        new_low, new_high = self.combine(low, high, batch_low, batch_high)
        return torch.where(unseen, batch_low, new_low), torch.where(unseen, batch_high, new_high)

    @abc.abstractmethod
    def combine(self, low: Tensor, high: Tensor, batch_low: Tensor, batch_high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new range from the old one and that of a batch; unused where nothing was seen yet."""

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.axis is not None and not 0 <= self.axis < x.ndim:
            raise PassError(f"observer {self.name}: no axis {self.axis} in a tensor of shape {tuple(x.shape)}")
        if not x.numel():
            raise PassError(f"observer {self.name}: a tensor of shape {tuple(x.shape)} has no values to observe")
        if self.axis is None:
            low, high = x.aminmax()
        else:
            dims = [dim for dim in range(x.ndim) if dim != self.axis]
            low, high = (x.amin(dims), x.amax(dims)) if dims else (x, x)  # aminmax(dim) is ten times as slow
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise PassError(f"observer {self.name}: the tensor holds NaN or infinity; check the model and its inputs")
        return low.float(), high.float()


@dataclass(frozen=True)
class MinMax(Observer):
    """The smallest and largest value ever seen."""

    name = "min-max"

    def combine(self, low: Tensor, high: Tensor, batch_low: Tensor, batch_high: Tensor) -> tuple[Tensor, Tensor]:
        """Widen the range to hold that of the batch."""
        return torch.minimum(low, batch_low), torch.maximum(high, batch_high)


@dataclass(frozen=True)
class MovingAverageMinMax(Observer):
    """A moving average of each batch's range: ``new = old + momentum * (batch - old)``; the first batch sets
    it.

    Args:
        momentum: Share of the newest batch, in (0, 1].

    Raises:
        RecipeError: ``momentum`` is out of range.
    """

    momentum: float = 0.01
    name = "moving-average-min-max"

    def __post_init__(self) -> None:
        if not 0.0 < self.momentum <= 1.0:
            raise RecipeError(f"observer {self.name}: momentum={self.momentum} is not in (0, 1]")

    def combine(self, low: Tensor, high: Tensor, batch_low: Tensor, batch_high: Tensor) -> tuple[Tensor, Tensor]:
        """Move the range toward that of the batch."""
        return torch.lerp(low, batch_low, self.momentum), torch.lerp(high, batch_high, self.momentum)


OBSERVERS: Mapping[str, type[Observer]] = MappingProxyType({cls.name: cls for cls in (MinMax, MovingAverageMinMax)})
"""Every observer by name."""
