"""Observers that keep a histogram, and choose by it how much of the range to give up for finer steps.

The bins are ``[j * width, (j + 1) * width)`` for consecutive integers ``j``. ``width`` is the smallest power of two
with which ``bins`` of them hold 0 and all that was seen, so between a half and all of the bins are in use. When the
range grows, pairs of bins merge and none is ever split: the histogram depends neither on the order of the batches nor
on how the data was cut into them (but for the rounding of float32 sums, above 2 ** 24 values in a bin, and for numbers
so small that they are 0 in float32 after division by ``width``).
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from graphprune.errors import PassError, RecipeError
from graphprune.quant.affine import split_groups
from graphprune.quant.clipping import absolute, clip_by_entropy, clip_by_error, clip_by_share
from graphprune.quant.observers import Observer, State
from graphprune.quant.schemes import Scheme

SMALLEST_WIDTH = torch.finfo(torch.float32).tiny
"""Width of the bins while only zeros were seen; smaller numbers share the bins of 0."""

_VALUES_AT_ONCE = 1 << 22


def bin_grid(low: Tensor, high: Tensor, bins: int) -> tuple[list[float], list[float]]:
    """Return the bins of a histogram.

    Args:
        low: Smallest values seen, float32, ``[n]``.
        high: Largest values seen, likewise. A range with ``low > high`` has seen nothing.
        bins: Number of bins, at least 4.

    Returns:
        ``(widths, starts)``, ``n`` numbers each: bin ``i`` holds ``x`` with ``floor(x / width) == start + i``.
    """
    widths, starts = [], []
    for below, above in zip(low.tolist(), high.tolist(), strict=True):
        width, start = _grid_of(min(below, 0.0), max(above, 0.0), bins) if below <= above else (SMALLEST_WIDTH, 0.0)
        widths.append(width)
        starts.append(start)
    return widths, starts


def _grid_of(low: float, high: float, bins: int) -> tuple[float, float]:
    if low == high:
        return SMALLEST_WIDTH, 0.0
    width = max(math.ldexp(1.0, math.frexp((high - low) / bins)[1]), SMALLEST_WIDTH)
    if math.floor(high / width) - math.floor(low / width) >= bins:
        width *= 2.0
    return width, float(math.floor(low / width))


@dataclass(frozen=True)
class HistogramObserver(Observer, abc.ABC):
    """Base of the observers that keep a histogram.

    Args:
        bins: Number of bins, in [64, 32768].

    Raises:
        RecipeError: ``bins`` is out of range, or ``group`` is given.
    """

    bins: int = 2048
    live: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 64 <= self.bins <= 1 << 15:
            raise RecipeError(f"observer {self.name}: bins={self.bins} is not in [64, 32768]")
        super().__post_init__()

    def combine(self, state: State, x: Tensor, low: Tensor, high: Tensor) -> State:
        """Count the values of the batch, after merging bins where the range grew."""
        new_low, new_high = torch.minimum(state.low, low), torch.maximum(state.high, high)
        widths, starts = bin_grid(new_low.reshape(-1), new_high.reshape(-1), self.bins)
        old = bin_grid(state.low.reshape(-1), state.high.reshape(-1), self.bins)
        kept = state.histogram
        if old != (widths, starts):
            kept = self._rebin(kept.reshape(-1, self.bins), old, (widths, starts)).reshape(kept.shape)
        counts = self._count(x.detach(), widths, starts)
        return State(new_low, new_high, kept + counts.reshape(kept.shape))

    def _rebin(
        self, histogram: Tensor, old: tuple[list[float], list[float]], new: tuple[list[float], list[float]]
    ) -> Tensor:
        """Move the mass of ``[rows, bins]`` to new bins; a new bin is made of whole old ones."""
        (width, start), (new_width, new_start) = (
            (torch.tensor(part, dtype=torch.float64, device=histogram.device)[:, None] for part in grid)
            for grid in (old, new)
        )
        index = torch.arange(self.bins, dtype=torch.float64, device=histogram.device)
        target = torch.floor((start + index) * (width / new_width)) - new_start
        # old bins that would land outside are empty
        return torch.zeros_like(histogram).scatter_add_(1, target.clamp_(0, self.bins - 1).long(), histogram)

    def _count(self, x: Tensor, widths: list[float], starts: list[float]) -> Tensor:
        """Count values by bin: ``[rows, bins]``. Multiplying by a power of two and the difference are exact."""
        if self.axis is None:
            index = torch.mul(x.float(), 1.0 / widths[0]).floor_().sub_(starts[0])
            return torch.bincount(index.to(torch.int16).reshape(-1), minlength=self.bins).float()
        rows = x.float().movedim(self.axis, 0).reshape(len(widths), -1)
        inverse, start = (
            torch.tensor(part, device=x.device)[:, None] for part in ([1.0 / width for width in widths], starts)
        )
        index = torch.mul(rows, inverse).floor_().sub_(start).long()
        index += torch.arange(len(widths), device=x.device)[:, None] * self.bins
        return torch.bincount(index.reshape(-1), minlength=len(widths) * self.bins).float()

    def clip(self, state: State, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Choose a range within what was seen, by the histogram."""
        low, high = state.low.reshape(-1), state.high.reshape(-1)
        widths, starts = (
            torch.tensor(part, dtype=torch.float64, device=low.device) for part in bin_grid(low, high, self.bins)
        )
        edges = (starts[:, None] + torch.arange(self.bins + 1, device=low.device)) * widths[:, None]
        mass = state.histogram.reshape(-1, self.bins).double()
        below, above = self.clip_rows(low.double(), high.double(), edges, mass, scheme)
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        below, above = below.float().clamp(min=low, max=high), above.float().clamp(min=low, max=high)
        return below.reshape(state.low.shape), above.reshape(state.low.shape)

    @abc.abstractmethod
    def clip_rows(
        self, low: Tensor, high: Tensor, edges: Tensor, mass: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        """Choose a range for every histogram.

        Args:
            low: Smallest values, float64, ``[rows]``.
            high: Largest values, likewise.
            edges: Edges of the bins, float64, ``[rows, bins + 1]``, increasing; 0 is one of them, or just outside.
            mass: Number of values in each bin, float64, ``[rows, bins]``.
            scheme: How the tensor will be quantized.

        Returns:
            ``(low, high)``, ``[rows]``.
        """

    @torch.no_grad()
    def tensor_range(self, x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """As ``Observer.tensor_range``; some rows at a time, and groups too are seen as rows of their own."""
        shape = scheme.qparams_shape(x.shape)
        if not x.numel():
            raise PassError(f"observer {self.name}: a tensor of shape {tuple(x.shape)} has no values to observe")
        rows = as_rows(x.detach(), scheme)
        by_row = replace(self, axis=0, group=None)
        step = max(1, _VALUES_AT_ONCE // max(rows.shape[1], self.bins))
        pieces = [by_row.rows_range(rows[at : at + step], scheme) for at in range(0, len(rows), step)]
        low, high = (torch.cat(part).reshape(shape) for part in zip(*pieces, strict=True))
        return low, high

    def rows_range(self, rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the range of every row of ``[rows, n]``; here by its histogram."""
        return self.range(self.update(None, rows), scheme)


def as_rows(x: Tensor, scheme: Scheme) -> Tensor:
    """Arrange a tensor so that every row of ``[rows, n]`` shares a scale, in the order of the flattened scales."""
    if scheme.axis is None:
        return x.reshape(1, -1)
    if scheme.group is None:
        return x.movedim(scheme.axis, 0).reshape(x.shape[scheme.axis], -1)
    pieces = split_groups(x, scheme.axis, scheme.group)
    return pieces.movedim(2 - scheme.axis, -1).reshape(-1, scheme.group)


@dataclass(frozen=True)
class Percentile(HistogramObserver):
    """The range that holds a share of all values.

    Half of the rest is cut from either end; all of it from the one end of values that do not pass 0. For symmetric
    schemes ``[-t, t]`` holds the share. Within a bin, values are taken as evenly spread.

    Args:
        fraction: Share of values inside, in (0, 1].

    Raises:
        RecipeError: ``fraction`` is out of range.

    Source: Wu et al., arXiv:2004.09602, section 4.2.
    """

    fraction: float = 0.9999
    name = "percentile"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.fraction <= 1.0:
            raise RecipeError(f"observer {self.name}: fraction={self.fraction} is not in (0, 1]")

    def clip_rows(
        self, low: Tensor, high: Tensor, edges: Tensor, mass: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        """Cut the tails."""
        if scheme.symmetric:
            limit = clip_by_share(*absolute(edges, mass), self.fraction)
            return torch.maximum(-limit, low), torch.minimum(limit, high)
        tail = torch.where((low < 0.0) & (high > 0.0), 0.5, 1.0) * (1.0 - self.fraction)
        below, above = clip_by_share(edges, mass, tail), clip_by_share(edges, mass, 1.0 - tail)
        return torch.where(low >= 0.0, low, below), torch.where(high <= 0.0, high, above)


@dataclass(frozen=True)
class EntropyHistogram(HistogramObserver):
    """The range whose quantized distribution tells most about the real one, by relative entropy.

    See ``clipping.clip_by_entropy``. Meant for activations: a range for each of many channels takes long. By default there
    are more bins than elsewhere, because as many bins as there are integers are always kept: at most a sixteenth of the
    range for 256 integers, where more could be cut off.

    Source: Migacz, 8-bit Inference with TensorRT, GPU Technology Conference 2017.
    """

    bins: int = 8192
    name = "histogram-kl"

    def clip_rows(
        self, low: Tensor, high: Tensor, edges: Tensor, mass: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        """Search a threshold for every row."""
        limits = torch.stack([clip_by_entropy(row, counts, scheme) for row, counts in zip(edges, mass, strict=True)])
        return torch.maximum(-limits, low), torch.minimum(limits, high)


@dataclass(frozen=True)
class MeanSquaredError(HistogramObserver):
    """The range that makes the mean squared error of quantization smallest.

    Ranges ``[p * low, p * high]`` are tried for ``p = 1, 1 - 1/grid, ... 1/grid``; for affine schemes then the ends one
    by one in the same way, low first, the other end as found. See ``clipping.clip_by_error``. Of a histogram, all
    values of a bin are taken as its middle; ``tensor_range`` takes the values themselves.

    Args:
        grid: Number of factors, in [1, 1000].

    Raises:
        RecipeError: ``grid`` is out of range.

    Source: Nagel et al., arXiv:2106.08295, section 3.1 (mean squared error range).
    """

    grid: int = 100
    name = "mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.grid <= 1000:
            raise RecipeError(f"observer {self.name}: grid={self.grid} is not in [1, 1000]")

    def clip_rows(
        self, low: Tensor, high: Tensor, edges: Tensor, mass: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        """Search by the middles of the bins."""
        middles = ((edges[:, 1:] + edges[:, :-1]) * 0.5).float()
        step = max(1, _VALUES_AT_ONCE // self.bins)
        pieces = [
            clip_by_error(
                low[at : at + step], high[at : at + step], middles[at : at + step], mass[at : at + step].float(),
                scheme, self.grid,
            )
            for at in range(0, len(low), step)
        ]  # fmt: skip
        below, above = (torch.cat(part) for part in zip(*pieces, strict=True))
        return below, above

    def rows_range(self, rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Search by the values themselves."""
        low, high = self._batch_range(rows)
        below, above = clip_by_error(low, high, rows.float(), None, scheme, self.grid)
        return below, above
