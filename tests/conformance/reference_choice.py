"""Reference: how sparse at which step, and which units then go. Plain NumPy; nothing of graphprune is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.conformance.reference_units import Flags, Matrix

_SLACK = 1e-3
"""In weights: what rounding of fraction times weights may differ by."""


def sparsity_at(schedule: str, progress: float, target: float) -> float:
    """Sparsity after a share ``progress`` of the pruning window, from 0 to ``target``."""
    if progress >= 1.0:
        return target
    if schedule.startswith("acdc"):  # acdc(cycles=2): the first half of each cycle is sparse, the second dense
        cycles = int(schedule.partition("=")[2].rstrip(")"))
        return target if progress * cycles % 1.0 < 0.5 else 0.0
    if schedule == "exponential":
        return 1.0 - (1.0 - target) ** progress
    return (
        target
        * {
            "one-shot": 1.0,
            "constant": 1.0,
            "linear": progress,
            "cosine": 1.0 - math.cos(math.pi / 2 * progress),
            "cube": progress**3,
            "cubic": 1.0 - (1.0 - progress) ** 3,
            "inverse-cubic": 1.0 - (1.0 - progress) ** (1 / 3),
        }[schedule]
    )


@dataclass(frozen=True)
class Candidates:
    """The units of one weight.

    Attributes:
        scores: float32, one a unit; larger = keep.
        sizes: Weights that go with each unit.
        weights: Weights in all, also those in no unit.
    """

    scores: Matrix
    sizes: NDArray[np.int64]
    weights: int

    def order(self) -> NDArray[np.int64]:
        """Units in the order in which they go: ascending score, of equal ones the last first; none of size 0."""
        places = np.arange(len(self.scores))
        order = np.lexsort((-places, self.scores))
        return order[self.sizes[order] > 0]


def nearest(sizes: NDArray[np.int64], goal: float) -> int:
    """How many of the leading ``sizes`` add up nearest to ``goal``; of two equally near the more."""
    totals = np.concatenate(([0], np.cumsum(sizes)))
    distance = np.abs(totals - goal)
    return int(np.flatnonzero(distance == distance.min())[-1])


def within(sizes: NDArray[np.int64], limit: float) -> int:
    """How many of the leading ``sizes`` add up to at most ``limit``."""
    return int(np.count_nonzero(np.cumsum(sizes) <= limit + _SLACK))


def erdos_renyi(shapes: list[tuple[int, ...]], sparsity: float, most: list[float], *, kernel: bool) -> list[float]:
    """Sparsity of each weight: density in proportion to the sum over the product of its sizes, cut off at the bounds.

    The one factor for which the sparsity over all weights comes out is found by halving.
    """
    parts = [shape if kernel else shape[:2] for shape in shapes]
    raw = [sum(part) / math.prod(part) for part in parts]
    weights = [math.prod(shape) for shape in shapes]

    def shares(factor: float) -> list[float]:
        return [min(limit, max(0.0, 1.0 - factor * value)) for limit, value in zip(most, raw, strict=True)]

    low, high = 0.0, 1.0 / min(raw)
    for _ in range(200):
        factor = (low + high) / 2
        pruned = sum(share * size for share, size in zip(shares(factor), weights, strict=True))
        low, high = (factor, high) if pruned > sparsity * sum(weights) else (low, factor)
    return shares(high)


def choose(sites: list[Candidates], sparsity: list[float], scope: str, least: float, most: float) -> list[Flags]:
    """Units to prune, True = prune.

    Local: each weight by itself. Global: each weight gives up its first units up to ``least`` (``sparsity`` where that is less)
    whatever their scores, offers none beyond ``most``, and what it offers in between is ranked together with all others: of
    equal scores the last site and unit go first. The number taken is the nearest to ``sparsity`` over all weights.
    """
    chosen = [np.zeros(len(site.scores), dtype=bool) for site in sites]
    if scope != "global":
        for flags, site, wanted in zip(chosen, sites, sparsity, strict=True):
            order = site.order()
            count = nearest(site.sizes[order], wanted * site.weights)
            flags[order[: min(count, within(site.sizes[order], most * site.weights))]] = True
        return chosen
    offers = []
    goal = 0.0
    for number, (flags, site, wanted) in enumerate(zip(chosen, sites, sparsity, strict=True)):
        order = site.order()
        first = within(site.sizes[order], min(least, wanted) * site.weights)
        last = within(site.sizes[order], most * site.weights)
        flags[order[:first]] = True
        goal += wanted * site.weights - int(site.sizes[order[:first]].sum())
        offers += [(float(site.scores[unit]), -number, -unit) for unit in order[first:last]]
    offers.sort()
    sizes = np.array([sites[-number].sizes[-unit] for _, number, unit in offers], dtype=np.int64)
    for _, number, unit in offers[: nearest(sizes, goal)]:
        chosen[-number][-unit] = True
    return chosen
