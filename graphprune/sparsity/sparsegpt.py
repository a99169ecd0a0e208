"""SparseGPT: prune column after column, and let the columns to the right make up for the error.

With ``H`` the second moments of the inputs and ``U`` the upper triangular factor of ``H^-1 = U^T U``, removing ``w_j`` of a row, with
all columns before ``j`` left as they are, costs ``(w_j / U_jj)**2`` and is best made up for by
``w[j:] -= w_j / U_jj * U[j, j:]``. Columns ``P`` that are removed together cost ``|w_P U_PP^-1|**2``, which ranks blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.sparsity.activation import ActivationCriterion, Statistic
from graphprune.sparsity.channels import Channel
from graphprune.sparsity.grouped import NM, drop_smallest
from graphprune.sparsity.pattern_base import Pattern, Shape
from graphprune.sparsity.selection import cut, histogram, make_units
from graphprune.sparsity.tiled import Tiled


@dataclass(frozen=True)
class SparseGPT(ActivationCriterion):
    """Prune by the error of the layer's output, and update the kept weights to make up for it.

    Statistic: ``[groups, in, in]``, ``H = 2 * mean over tokens of x x^T``. ``damping`` times the mean of its diagonal is added to the
    diagonal. Units are chosen in windows of ``block`` columns, rounded to whole units; the members of an N:M group when its
    first column is reached; channels once over the whole matrix. An input that was always zero costs nothing to prune, and a weight of
    it that is kept keeps its value.

    Source: Frantar and Alistarh, arXiv:2301.00774, algorithm 1. It differs in two points: as many units are pruned as asked for (not
    those up to a threshold), and dead inputs do not enter the mean of the diagonal.

    Raises:
        SparsityError: ``damping`` is negative, or ``block`` is below 1.
    """

    damping: float = 0.01
    block: int = 128
    name = "sparsegpt"

    def __post_init__(self) -> None:
        if not (0.0 <= self.damping < float("inf") and self.block >= 1):
            raise SparsityError(
                f"sparsegpt needs damping >= 0 and block >= 1, got damping={self.damping}, block={self.block}"
            )

    def statistic(
        self, features: int, device: torch.device | str, *, groups: int = 1, dtype: torch.dtype = torch.float32
    ) -> Statistic:
        """Return zeros ``[groups, features, features]``."""
        return Statistic(torch.zeros(groups, features, features, device=device, dtype=dtype))

    def add(self, statistic: Statistic, x: Tensor) -> None:
        """Move the mean of ``2 x x^T``."""
        total = statistic.tokens + x.shape[1]
        statistic.values.baddbmm_(x.transpose(1, 2), x, beta=statistic.tokens / total, alpha=2 / total)

    def refusal(self, pattern: Pattern) -> str | None:
        """Refuse units that are not made of consecutive columns: input channels of a convolution."""
        if isinstance(pattern, Channel) and pattern.axis == 1 and not pattern.kernel == pattern.groups == 1:
            return (
                f"sparsegpt removes consecutive columns, and those of {pattern} are not, in a convolution; choose wanda"
            )
        return None

    def problem(self, pattern: Pattern, shape: Shape, groups: int, sparsity: float) -> str | None:
        """Refuse units that lie in several groups of a convolution too."""
        found = super().problem(pattern, shape, groups, sparsity)
        rows = shape[0] // groups
        if found is None and groups > 1 and rows % _tile(pattern, shape)[0]:
            found = (
                f"sparsegpt prunes each group of a convolution alone, and its {rows} outputs are not a multiple of the "
                f"{_tile(pattern, shape)[0]} rows of pattern {pattern}; choose wanda or another pattern"
            )
        return found

    @torch.no_grad()
    def prune(self, weight: Tensor, statistic: Statistic, pattern: Pattern, sparsity: float) -> tuple[Tensor, Tensor]:
        """Prune and update; the update is computed in the statistic's dtype."""
        shape = self.check(weight, statistic, pattern, sparsity)
        rows = shape[0] // statistic.groups
        self.finish(statistic)
        assert statistic.dead is not None
        changed = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        mask = torch.empty(shape, dtype=torch.bool, device=weight.device)
        budget = _Budget(sparsity / max(pattern.max_sparsity(shape), 1e-9))
        for group in range(statistic.groups):
            part = slice(group * rows, (group + 1) * rows)
            dead = statistic.dead[group]
            work = weight[part].to(statistic.values.dtype).masked_fill(dead, 0.0).contiguous()
            mask[part] = _Sweep(work, statistic.values[group], pattern, self.block).run(budget)
            changed[part] = torch.where(dead, weight[part], work.to(weight.dtype))
        return changed.masked_fill_(~mask, 0.0), mask

    @torch.no_grad()
    def finish(self, statistic: Statistic) -> None:
        """Replace ``H`` by ``U`` in place, once.

        Raises:
            SparsityError: ``H`` is not positive definite.
        """
        if statistic.dead is not None:
            return
        moments = statistic.values
        diagonal = moments.diagonal(dim1=1, dim2=2)
        dead = diagonal == 0
        mean = diagonal.sum(1, keepdim=True) / (~dead).sum(1, keepdim=True).clamp(min=1)
        diagonal.add_(mean * self.damping).copy_(torch.where(dead, mean.masked_fill(mean == 0, 1.0), diagonal))
        lower, failed = torch.linalg.cholesky_ex(moments.flip(1, 2))  # H = R R^T with R upper, so that U = R^-1
        if bool(failed.any()):
            raise SparsityError(
                f"sparsegpt: the second moments of the inputs are not positive definite with damping={self.damping}; give more "
                f"or other calibration data, or a larger damping"
            )
        one = torch.eye(moments.shape[1], dtype=moments.dtype, device=moments.device)
        inverse = torch.linalg.solve_triangular(lower, one, upper=False)
        del lower, one
        moments.copy_(inverse.flip(1, 2))
        statistic.dead = dead

    def workspace(self, shape: Shape, groups: int = 1) -> int:
        """Three matrices of the size of ``H`` while it is inverted, or four of the weight's size while columns are pruned."""
        return max(3 * 4 * groups * shape[1] ** 2, 4 * 4 * shape[0] * shape[1])


@dataclass
class _Budget:
    """How many weights are to be pruned; what one window could not take to the nearest unit, the next one takes.

    Attributes:
        fraction: Of the weights that the pattern could prune.
        seen: Those of the windows so far.
        pruned: How many of them were pruned.
    """

    fraction: float
    seen: int = 0
    pruned: int = 0

    def choose(self, scores: Tensor, sizes: int | Tensor) -> Tensor:
        """Mark the units of a window with the smallest scores."""
        units = make_units("sparsegpt", scores, sizes)
        self.seen += units.total
        (chosen,) = cut([units], histogram(units), self.fraction * self.seen - self.pruned)
        self.pruned += units.size_of(chosen)
        return chosen.view(scores.shape)


class _Sweep:
    """One pass over the columns of ``work`` ``[rows, in]``, which is changed in place."""

    def __init__(self, work: Tensor, factor: Tensor, pattern: Pattern, block: int) -> None:
        self.work, self.factor, self.pattern = work, factor, pattern
        self.rows, self.columns = work.shape
        self.kept = torch.ones_like(work, dtype=torch.bool)
        self.chosen = torch.zeros(0)
        tile = _tile(pattern, (self.rows, self.columns))
        self.unit = tile[1]
        self.window = max(self.unit, block // self.unit * self.unit)
        self.step = self.window if isinstance(pattern, NM) else min(self.window, block)
        if 1 < self.rows <= tile[0]:
            self.window = self.columns  # whole columns compete over all of the matrix

    def run(self, budget: _Budget) -> Tensor:
        """Prune all columns; returns the mask, True = kept."""
        for start in range(0, self.columns, self.window):
            window = slice(start, min(start + self.window, self.columns))
            self._choose(window, budget)
            for first in range(start, window.stop, self.step):
                part = slice(first, min(first + self.step, window.stop))
                errors = self._eliminate(part, part.start - start)
                self.work[:, part.stop :].addmm_(errors, self.factor[part, part.stop :], alpha=-1)
        return self.kept

    def _choose(self, window: slice, budget: _Budget) -> None:
        """Choose the units of a window: of an N:M pattern the groups, else the weights too."""
        width = window.stop - window.start
        shape = self.rows, width
        sizes = self.pattern.unit_sizes(shape)
        if isinstance(self.pattern, NM):
            scores = self.pattern.unit_scores(self._single_costs(window))
            self.chosen = budget.choose(scores, sizes)
            return
        stored = self.pattern.reduce(self._joint_costs(window))
        prune = budget.choose(self.pattern.unit_scores(stored), sizes)
        self.kept[:, window] = self.pattern.mask(stored, prune, shape)

    def _single_costs(self, part: slice) -> Tensor:
        return (self.work[:, part] / self.factor.diagonal()[part]).square_()

    def _joint_costs(self, window: slice) -> Tensor:
        """The cost of removing each unit's columns together, as one share for each weight, ``[rows, width]``."""
        if self.unit == 1:
            return self._single_costs(window)
        width = window.stop - window.start
        count = -(-width // self.unit)
        missing = count * self.unit - width
        padded = torch.nn.functional.pad(self.work[:, window], (0, missing))
        square = torch.eye(count * self.unit, dtype=self.work.dtype, device=self.work.device)
        square[:width, :width] = self.factor[window, window]
        grid = square.view(count, self.unit, count, self.unit).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        rows = padded.view(self.rows, count, self.unit).transpose(0, 1)
        shares: Tensor = torch.linalg.solve_triangular(grid, rows, upper=True, left=False).square_()
        return shares.transpose(0, 1).reshape(self.rows, -1)[:, :width]

    def _eliminate(self, part: slice, offset: int) -> Tensor:
        """Remove the pruned weights of some columns and update those to their right in the part; returns the errors."""
        work = self.work[:, part].contiguous()
        factor = self.factor[part, part]
        errors = torch.zeros_like(work)
        for column in range(work.shape[1]):
            place = part.start + column
            if isinstance(self.pattern, NM) and (offset + column) % self.unit == 0:
                self._choose_members(work, factor, part, column, (offset + column) // self.unit)
            error = work[:, column].masked_fill(self.kept[:, place], 0.0).div_(factor[column, column])
            work[:, column:].addr_(error, factor[column, column:], alpha=-1)
            errors[:, column] = error
        self.work[:, part] = work
        return errors

    def _choose_members(self, work: Tensor, factor: Tensor, part: slice, column: int, group: int) -> None:
        assert isinstance(self.pattern, NM)
        stop = column + self.pattern.m
        if stop > work.shape[1]:
            return  # a short last group stays dense
        costs = (work[:, column:stop] / factor.diagonal()[column:stop]).square_()
        dropped = drop_smallest(costs[:, None], self.pattern.m - self.pattern.n)[:, 0]
        self.kept[:, part.start + column : part.start + stop] = ~(dropped & self.chosen[:, group, None])


def _tile(pattern: Pattern, shape: Shape) -> Shape:
    """Rows and columns of one unit."""
    if isinstance(pattern, NM):
        return 1, pattern.m
    if isinstance(pattern, Tiled):
        return pattern.tile(shape)
    assert isinstance(pattern, Channel)
    return (pattern.width, max(1, shape[1])) if pattern.axis == 0 else (max(1, shape[0]), pattern.width)
