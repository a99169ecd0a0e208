"""Patterns whose units are whole channels: outputs, or true input channels with all their kernel positions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.sparsity.pattern_base import ALL, Pattern, Region, Shape, check_units, matrix_shape


@dataclass(frozen=True)
class Channel(Pattern):
    """Whole outputs or input channels: ``axis`` is the logical dimension that loses entries, ``width`` how many at once.

    ``Channel(0)`` is "1xchannel": one output row (a neuron, a conv filter). ``Channel(1, 4)`` is "channelx4": four consecutive
    input channels. The last unit is smaller where ``width`` does not divide.

    An input channel of a convolution is its column at every kernel position, in the rows of its own group: channel
    ``g * in/groups + c`` is the columns ``p * in/groups + c`` of the rows of group ``g``. A pattern learns that geometry by
    ``bound``; without, every column is a channel. In a grouped convolution ``width`` counts through the groups, so that a
    unit is always ``width`` consecutive channels of the layer's input.

    Attributes:
        axis: 0 = output rows, 1 = input channels.
        width: Consecutive channels that are pruned together, >= 1.
        kernel: Kernel positions of the weight it is bound to.
        groups: Groups of the weight it is bound to.

    Raises:
        SparsityError: ``axis`` is neither 0 nor 1, or a number is below 1.
    """

    axis: int
    width: int = 1
    kernel: int = field(default=1, kw_only=True)
    groups: int = field(default=1, kw_only=True)
    examples = ("channelx1", "1xchannel")

    def __post_init__(self) -> None:
        if self.axis not in (0, 1):
            raise SparsityError(
                f"axis {self.axis} of a channel pattern is neither 0 (output rows) nor 1 (input channels)"
            )
        if self.width < 1:
            raise SparsityError(f"a channel pattern of {self.width} channels is empty; its width is at least 1")
        if min(self.kernel, self.groups) < 1:
            raise SparsityError(f"no weight has {self.kernel} kernel positions and {self.groups} groups")

    @classmethod
    def from_text(cls, text: str) -> Channel | None:
        """Read ``<width>xchannel`` or ``channelx<width>`` without spaces."""
        if match := re.fullmatch(r"(\d+)xchannel", text):
            return cls(0, int(match[1]))
        if match := re.fullmatch(r"channelx(\d+)", text):
            return cls(1, int(match[1]))
        return None

    def __str__(self) -> str:
        return f"{self.width}xchannel" if self.axis == 0 else f"channelx{self.width}"

    def bound(self, *, kernel: int, groups: int) -> Channel:
        """Return the pattern with the geometry of a weight; rows are outputs in any geometry."""
        return self if self.axis == 0 else dataclasses.replace(self, kernel=kernel, groups=groups)

    def misfit(self, shape: Shape) -> str | None:
        """Say that ``width`` does not divide the channels."""
        channels, name = self._channels(shape), ("outputs", "input channels")[self.axis]
        if self.width > channels:
            return f"pattern {self} spans {self.width} {name} but the weight has only {channels}"
        return f"{channels} {name} are not a multiple of the {self.width} of {self}" if channels % self.width else None

    def score_shape(self, shape: Shape) -> tuple[int, ...]:
        """Return the number of units, one for each ``width`` channels."""
        return (-(-self._channels(shape) // self.width),)

    def reduce(self, scores: Tensor) -> Tensor:
        """Return the mean of each unit; channels are equally large, so it is the mean over its channels' means."""
        shape = matrix_shape(scores)
        if self.axis == 0:
            means = scores.mean(1)
        elif self._plain:
            means = scores.mean(0)
        else:
            means = self._split(scores, shape).mean((1, 2)).flatten()
        if self.width == 1:
            return means
        whole = len(means) - len(means) % self.width
        units = means[:whole].view(-1, self.width).mean(1)
        return units if whole == len(means) else torch.cat((units, means[whole:].mean(0, keepdim=True)))

    def unit_sizes(self, shape: Shape) -> int | Tensor:
        """Return the weights of ``width`` channels, one number a unit where the last unit is smaller."""
        channels = self._channels(shape)
        size = shape[0] * shape[1] // max(1, channels)
        if channels % self.width == 0:
            return size * self.width
        sizes = torch.full(self.score_shape(shape), size * self.width, dtype=torch.int64)
        sizes[-1] = size * (channels % self.width)
        return sizes

    def spread(self, stored: Tensor, shape: Shape) -> Tensor:
        """Repeat each unit's score over its channels; contiguous."""
        channels = self._channels(shape)
        if self.width > 1:
            stored = stored[:, None].expand(-1, self.width).reshape(-1)[:channels]
        if self.axis == 0:
            return stored[:, None].expand(shape).contiguous()
        inputs = channels // self.groups
        wide = stored.reshape(self.groups, 1, 1, inputs)
        return wide.expand(self.groups, shape[0] // self.groups, self.kernel, inputs).reshape(shape).contiguous()

    def mask(self, stored: Tensor, prune: Tensor, shape: Shape) -> Tensor:
        """Expand each unit's choice over its channels; ``stored`` is ignored."""
        check_units(prune, self.score_shape(shape), self)
        return self.spread(prune.logical_not(), shape)

    def holds(self, kept: Tensor) -> bool:
        """Say whether each unit is all kept or all pruned."""
        shape = matrix_shape(kept)
        if not kept.numel():
            return True
        first = kept[:, 0] if self.axis == 0 else self._split(kept, shape)[:, 0, 0].flatten()
        whole = self.spread(first[:: self.width].contiguous(), shape)
        return not bool((whole.view(torch.uint8) ^ kept.view(torch.uint8)).any())  # five times as fast as equal on bool

    def pattern_sparsity(self, zero: Tensor) -> float:
        """Return the share of weights in units that are all zero."""
        shape = matrix_shape(zero)
        gone = zero.all(1) if self.axis == 0 else self._split(zero, shape).all(2).all(1).flatten()
        short = -len(gone) % self.width
        pruned = torch.nn.functional.pad(gone, (0, short), value=True).view(-1, self.width).all(1)
        sizes = self.unit_sizes(shape)
        weights = int(pruned.count_nonzero()) * sizes if isinstance(sizes, int) else int(sizes[pruned.cpu()].sum())
        return weights / max(1, zero.numel())

    def regions(self, shape: Shape, elements: int) -> Iterator[Region]:
        """Cut into bands of units; the whole matrix is one part where input channels are no consecutive columns."""
        if self.axis == 1 and not self._plain:
            yield (ALL, ALL), (ALL,)
            return
        step = max(1, elements // max(1, self.width * shape[1 - self.axis])) * self.width
        for start in range(0, shape[self.axis], step):
            part = slice(start, min(start + step, shape[self.axis]))
            stored = slice(start // self.width, -(-part.stop // self.width))
            yield (part, ALL) if self.axis == 0 else (ALL, part), (stored,)

    @property
    def _plain(self) -> bool:
        """Whether every column is an input channel."""
        return self.kernel == self.groups == 1

    def _channels(self, shape: Shape) -> int:
        """Number of channels along the axis; SparsityError where the weight is not of the geometry bound to."""
        if self.axis == 0:
            return shape[0]
        if shape[0] % self.groups or shape[1] % self.kernel:
            raise SparsityError(
                f"pattern {self} is bound to {self.groups} groups and {self.kernel} kernel positions, which do not divide "
                f"a matrix of shape {tuple(shape)}; bind it to the weight's own kernel and groups"
            )
        return self.groups * (shape[1] // self.kernel)

    def _split(self, values: Tensor, shape: Shape) -> Tensor:
        """View a matrix as ``[groups, out/groups, kernel, in/groups]``; any strides allow it."""
        inputs = self._channels(shape) // self.groups
        return values.view(self.groups, shape[0] // self.groups, self.kernel, inputs)
