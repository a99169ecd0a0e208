"""Observers: pure functions that record the range of the tensors they are shown.

The state is three tensors, so that a caller can keep it in buffers. Nothing seen yet is ``low = +inf, high = -inf``
and an empty or zero histogram. Observers that need no histogram are here, the others in ``histograms``; a new one is
a small class, listed in ``observer_text.OBSERVERS``.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from graphprune.errors import PassError, RecipeError
from graphprune.quant.affine import split_groups
from graphprune.quant.schemes import Scheme


class State(NamedTuple):
    """What an observer has seen. Never modified in place.

    Attributes:
        low: Smallest value, float32, of the shape that scales have: ``()``, ``(channels,)``, or by group.
        high: Largest value, likewise.
        histogram: float32, ``[*low.shape, bins]``; ``[0]`` for observers without histogram.
    """

    low: Tensor
    high: Tensor
    histogram: Tensor


@dataclass(frozen=True)
class Observer(abc.ABC):
    """Base of all observers.

    Args:
        axis: None for one range per tensor, else the dimension along which every index has its own.
        group: None, or how many consecutive entries along the other dimension of a 2-D tensor share a range; needs
            ``axis`` 0 or 1. Only observers without histogram take it here; ``tensor_range`` works for all.

    Raises:
        RecipeError: ``group`` where it is not possible.
    """

    axis: int | None = None
    group: int | None = None
    name: ClassVar[str]
    live: ClassVar[bool] = True
    """Whether the range is cheap to read, so that it may be read after every batch; else read it once, at the end."""

    def __post_init__(self) -> None:
        if self.group is None:
            return
        if self.bins:
            raise RecipeError(f"observer {self.name}: it keeps no histograms by group; use min-max, or no group")
        if self.axis not in (0, 1) or self.group < 1:
            raise RecipeError(f"observer {self.name}: group={self.group} needs to be at least 1, and axis 0 or 1")

    @property
    def bins(self) -> int:
        """Bins of the histogram; 0 without one."""
        return 0

    def initial(self, shape: tuple[int, ...] = (), *, device: torch.device | str = "cpu") -> State:
        """Return the state before any data.

        Args:
            shape: Shape of the range, ``Scheme.qparams_shape`` of the tensor that will be observed.
            device: Where the state lives.

        Returns:
            float32: +inf and -inf of ``shape``; zeros ``[*shape, bins]``, or ``[0]`` without histogram.
        """
        histogram = torch.zeros((*shape, self.bins) if self.bins else (0,), device=device)
        return State(
            torch.full(shape, float("inf"), device=device), torch.full(shape, float("-inf"), device=device), histogram
        )

    @torch.no_grad()
    def update(self, state: State | None, x: Tensor) -> State:
        """Take one batch into account.

        Args:
            state: What was seen so far; not modified. None: nothing yet.
            x: The batch, any float dtype.

        Returns:
            The new state; its range is finite.

        Raises:
            PassError: ``x`` is empty or holds NaN or infinity, or its shape does not fit the state or the group. The
                caller adds the site.
        """
        low, high = self._batch_range(x)
        if state is None:
            state = self.initial(tuple(low.shape), device=low.device)
        if state.low.shape != low.shape or state.high.shape != high.shape:
            raise PassError(
                f"observer {self.name}: its range is {tuple(state.low.shape)}, the batch's {tuple(low.shape)}"
            )
        if self.bins and state.histogram.shape != (*low.shape, self.bins):
            raise PassError(
                f"observer {self.name}: its histogram is {tuple(state.histogram.shape)}, not "
                f"{(*low.shape, self.bins)}; start from initial()"
            )
        return self.combine(state, x, low, high)

    @abc.abstractmethod
    def combine(self, state: State, x: Tensor, low: Tensor, high: Tensor) -> State:
        """Return the new state.

        Args:
            state: The old one, of fitting shapes; entries with ``state.low > state.high`` have seen nothing.
            x: The batch.
            low: Its smallest value, float32, finite.
            high: Its largest value, likewise.
        """

    def range(self, state: State, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the range to quantize, for ``choose_qparams``.

        Args:
            state: What was seen.
            scheme: How the tensor will be quantized.

        Returns:
            ``(low, high)``, float32, shape of ``state.low``; within what was seen, extended to 0; finite, ``low <= high``.

        Raises:
            PassError: Nothing was seen yet. The caller adds the site.
        """
        if bool((state.low > state.high).any()):
            raise PassError(f"observer {self.name}: it has seen no data; calibrate with data that reaches this tensor")
        return self.clip(state, scheme)

    def clip(self, state: State, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """``range`` of a state that has seen data: here all that was seen."""
        return state.low, state.high

    @torch.no_grad()
    def tensor_range(self, x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the range to quantize of a tensor that is all there is to see: a weight.

        Args:
            x: The tensor, any float dtype.
            scheme: How it will be quantized; its axis and group are used, not the observer's.

        Returns:
            ``(low, high)``, float32, of ``scheme.qparams_shape(x.shape)``.

        Raises:
            PassError: As ``update``; or the group does not divide ``x``.
        """
        scheme.qparams_shape(x.shape)
        observer = replace(self, axis=scheme.axis, group=scheme.group)
        return observer.range(observer.update(None, x), scheme)

    def _batch_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.axis is not None and not 0 <= self.axis < x.ndim:
            raise PassError(f"observer {self.name}: no axis {self.axis} in a tensor of shape {tuple(x.shape)}")
        if not x.numel():
            raise PassError(f"observer {self.name}: a tensor of shape {tuple(x.shape)} has no values to observe")
        if self.axis is None:
            low, high = x.aminmax()
        elif self.group is not None:
            pieces = split_groups(x, self.axis, self.group)
            low, high = pieces.amin(2 - self.axis), pieces.amax(2 - self.axis)
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

    def combine(self, state: State, x: Tensor, low: Tensor, high: Tensor) -> State:
        """Widen the range to hold that of the batch."""
        return State(torch.minimum(state.low, low), torch.maximum(state.high, high), state.histogram)


@dataclass(frozen=True)
class MovingAverageMinMax(Observer):
    """A moving average of each batch's range: ``new = old + momentum * (batch - old)``; the first batch sets it.

    Args:
        momentum: Share of the newest batch, in (0, 1].

    Raises:
        RecipeError: ``momentum`` is out of range.

    Source: Jacob et al., arXiv:1712.05877, section 3.1.
    """

    momentum: float = 0.01
    name = "moving-average-min-max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.momentum <= 1.0:
            raise RecipeError(f"observer {self.name}: momentum={self.momentum} is not in (0, 1]")

    def combine(self, state: State, x: Tensor, low: Tensor, high: Tensor) -> State:
        """Move the range toward that of the batch."""
        unseen = state.low > state.high
        new_low = torch.where(unseen, low, torch.lerp(state.low, low, self.momentum))
        return State(new_low, torch.where(unseen, high, torch.lerp(state.high, high, self.momentum)), state.histogram)
