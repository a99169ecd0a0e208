"""Distribution: the sparsity that each site gets, so that the sparsity over all weights is the asked one.

The results are what ``allocate(..., scope=Scope.LOCAL)`` takes as its sparsities. Nothing here looks at scores; of
equal sites each gets the same, whatever their order.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from graphprune.errors import SparsityError

_ROUNDING = 1e-9
"""Slack of a total, as a fraction of all weights: the rounding of its sum."""


def erdos_renyi(
    shapes: Sequence[Sequence[int]],
    sparsity: float,
    *,
    kernel: bool,
    max_sparsity: float | Sequence[float] = 1.0,
    min_sparsity: float = 0.0,
) -> list[float]:
    """Share a sparsity by the Erdos-Renyi rule: small layers stay denser than large ones.

    The density of a site is ``scale * (out + in) / (out * in)``, with ``kernel`` the sum over the product of all
    dimensions; ``scale`` is the one number for which the sparsity over all weights is ``sparsity``, after densities
    are cut off at their bounds. That is the fixed point of making the sites dense whose density would exceed 1 and
    rescaling the others.

    Args:
        shapes: For each site its stored shape ``(out, in / groups, *kernel)``, sizes >= 1; the first two may be
            swapped, since the rule is symmetric in them.
        sparsity: Wanted fraction of zeros over all weights, in [0, 1].
        kernel: Count the dimensions of the convolution kernel (ERK), or only ``out`` and ``in`` (ER). They differ for
            convolutions alone.
        max_sparsity: Most that a site may get, in [0, 1], one for all or one each, such as the pattern's limit.
        min_sparsity: Least that a site must get, in [0, 1]. While ``sparsity`` is lower, ``sparsity`` takes its place.

    Returns:
        For each site its sparsity, within its bounds. Weighted by the sites' sizes they average to ``sparsity`` up to
        float64 rounding.

    Raises:
        SparsityError: A shape has fewer than two dimensions or an empty one, a fraction is out of range, or the bounds
            make ``sparsity`` unreachable (the message says what is reachable).

    Source: Mocanu et al., Nature Communications 9 (2018), for ER; Evci et al., arXiv:1911.11134, section 3, for ERK.
    """
    count = len(shapes)
    caps = [float(max_sparsity)] * count if isinstance(max_sparsity, (int, float)) else [float(c) for c in max_sparsity]
    if len(caps) != count:
        raise SparsityError(f"distribution over {count} sites got {len(caps)} caps; give one each")
    for name, value in (("sparsity", sparsity), ("min_sparsity", min_sparsity), *(("max_sparsity", c) for c in caps)):
        if not 0.0 <= value <= 1.0:
            raise SparsityError(f"{name}={value} is not in [0, 1]; write a fraction and not percent")
    floor = min(min_sparsity, sparsity)
    if caps and floor > min(caps):
        raise SparsityError(f"min_sparsity={min_sparsity} is above max_sparsity={min(caps)}; change one of them")
    for shape in shapes:
        if len(shape) < 2 or min(shape) < 1:
            raise SparsityError(f"a site of shape {tuple(shape)} has no inputs and outputs to compute a density from")
    if not shapes:
        return []
    sites = [
        _Site(_density(shape, kernel), math.prod(shape), 1.0 - cap, 1.0 - floor)
        for shape, cap in zip(shapes, caps, strict=True)
    ]
    total = sum(site.weights for site in sites)
    _check_reachable(sparsity, sum(cap * site.weights for cap, site in zip(caps, sites, strict=True)) / total, count)
    scale = _scale(sites, (1.0 - sparsity) * total)
    return [min(cap, max(floor, 1.0 - site.density(scale))) for cap, site in zip(caps, sites, strict=True)]


def from_sensitivity(
    curves: Sequence[Sequence[tuple[float, float]]], weights: Sequence[int], sparsity: float
) -> list[float]:
    """Share a sparsity so that the sum of what each site costs is least.

    Each curve says what a site costs at a sparsity when only that site is pruned. Costs are taken to add up, which is
    an approximation. A curve is made usable in three steps: ``(0, 0)`` is added, costs become their running maximum
    (pruning more never costs less; measured dips are noise), and the curve is replaced by its lower convex hull, linear
    between its corners. The hulls' pieces are then taken in the order of their slope, cost per weight, until the
    sparsity is reached; that is the exact optimum over the hulls. Pieces of equal slope are taken in equal proportion.

    Args:
        curves: For each site its points ``(sparsity, cost)``: sparsities in (0, 1], each once, in any order; costs
            finite and >= 0. No site goes beyond its largest sparsity: nothing is extrapolated.
        weights: For each site the number of its weights, >= 1.
        sparsity: Wanted fraction of zeros over all weights, in [0, 1].

    Returns:
        For each site its sparsity. Weighted by ``weights`` they average to ``sparsity`` up to float64 rounding.

    Raises:
        SparsityError: Lengths differ, a curve is empty or a number out of range, or the largest sparsities of the
            curves do not reach ``sparsity``.
    """
    if len(curves) != len(weights):
        raise SparsityError(f"distribution over {len(curves)} curves got {len(weights)} weights; give one each")
    if not 0.0 <= sparsity <= 1.0:
        raise SparsityError(f"sparsity={sparsity} is not in [0, 1]; write a fraction and not percent")
    if any(size < 1 for size in weights):
        raise SparsityError(f"a site has {min(weights)} weights; each needs one or more")
    hulls = [convex_hull(curve) for curve in curves]
    if not hulls:
        return []
    total = sum(weights)
    reachable = sum(hull[-1][0] * size for hull, size in zip(hulls, weights, strict=True)) / total
    _check_reachable(sparsity, reachable, len(hulls))
    pieces = sorted(
        (
            _Piece((after[1] - before[1]) / (after[0] - before[0]) / size, index, (after[0] - before[0]) * size)
            for index, (hull, size) in enumerate(zip(hulls, weights, strict=True))
            for before, after in itertools.pairwise(hull)
        ),
        key=lambda piece: piece.slope,
    )
    left = sparsity * total
    pruned = [0.0] * len(hulls)
    for _, group in itertools.groupby(pieces, key=lambda piece: piece.slope):
        equal = list(group)
        available = math.fsum(piece.weights for piece in equal)
        share = min(1.0, max(0.0, left / available))
        for piece in equal:
            pruned[piece.site] += share * piece.weights
        left -= share * available
    return [min(amount / size, hull[-1][0]) for amount, size, hull in zip(pruned, weights, hulls, strict=True)]


def convex_hull(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the lower convex hull of a curve's running maximum, from ``(0, 0)`` on.

    Args:
        curve: Points ``(sparsity, cost)`` as for ``from_sensitivity``.

    Returns:
        Corners with strictly rising sparsities and rising slopes; the first is ``(0, 0)``, the last has the largest
        sparsity of the curve.

    Raises:
        SparsityError: The curve is empty, a sparsity is not in (0, 1] or comes twice, or a cost is negative or not
            finite.
    """
    points = sorted(curve)
    if not points:
        raise SparsityError("a sensitivity curve has no points; measure one sparsity or more")
    hull = [(0.0, 0.0)]
    last, highest = 0.0, 0.0
    for place, cost in points:
        if not last < place <= 1.0:
            raise SparsityError(f"sparsity {place} of a sensitivity curve is not in (0, 1] or comes twice")
        if not 0.0 <= cost < math.inf:
            raise SparsityError(f"cost {cost} at sparsity {place} of a sensitivity curve is negative or not finite")
        last, highest = place, max(highest, cost)
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], (place, highest)):
            hull.pop()
        hull.append((place, highest))
    return hull


@dataclass(frozen=True)
class _Site:
    """What the Erdos-Renyi rule knows of a site: density before scaling, weights, and the bounds of its density."""

    raw: float
    weights: int
    least: float
    most: float

    def density(self, scale: float) -> float:
        return min(self.most, max(self.least, scale * self.raw))


@dataclass(frozen=True)
class _Piece:
    """A straight piece of a hull: its cost per weight, its site, and how many weights it prunes."""

    slope: float
    site: int
    weights: float


def _density(shape: Sequence[int], kernel: bool) -> float:
    sizes = shape if kernel else shape[:2]
    return sum(sizes) / math.prod(sizes)


def _scale(sites: Sequence[_Site], goal: float) -> float:
    """Solve for the scale at which the sites keep ``goal`` weights: piecewise linear and rising, so exactly."""

    def kept(scale: float) -> float:
        return math.fsum(site.weights * site.density(scale) for site in sites)

    corners = sorted({bound / site.raw for site in sites for bound in (site.least, site.most)})
    after = bisect.bisect_left(corners, goal, key=kept)
    if after == 0 or after == len(corners):
        return corners[min(after, len(corners) - 1)]
    low, high = corners[after - 1], corners[after]
    below, above = kept(low), kept(high)
    return low + (high - low) * (goal - below) / (above - below)


def _is_above(left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]) -> bool:
    """Whether ``middle`` lies on or above the line from ``left`` to ``right``."""
    run, rise = right[0] - left[0], right[1] - left[1]
    return (middle[1] - left[1]) * run >= rise * (middle[0] - left[0])


def _check_reachable(sparsity: float, reachable: float, count: int) -> None:
    if sparsity > reachable + _ROUNDING:
        raise SparsityError(
            f"sparsity {sparsity:.6g} over {count} sites is out of reach: at most {reachable:.6g} can be reached; "
            "lower the target, raise max_sparsity (or measure higher sparsities), or choose other patterns"
        )
