"""Allocation: how a sparsity is shared among sites, as an exact choice of units."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.sparsity.selection import Units, cut, histogram, make_units, sum_histograms

_SLACK = 1e-3
"""Slack of a bound in weights: far below one weight, far above the rounding of fraction times weights."""


class Scope(enum.Enum):
    """``GLOBAL`` ranks the units of all sites together; ``LOCAL`` gives every site its own sparsity."""

    GLOBAL = "global"
    LOCAL = "local"


@dataclass(frozen=True, eq=False)
class _Bounds:
    """Weights that may (cap) and must (floor) be pruned at one site."""

    cap: float
    floor: float


def allocate(
    unit_scores: Sequence[Tensor],
    unit_sizes: Sequence[int | Tensor],
    weights: Sequence[int],
    sparsity: float | Sequence[float],
    *,
    scope: Scope = Scope.GLOBAL,
    max_sparsity: float | Sequence[float] = 0.98,
    min_sparsity: float = 0.0,
    names: Sequence[str] = (),
) -> list[Tensor]:
    """Choose the units to prune, so that the sparsity over all weights is the asked one to the nearest unit.

    Takes time linear in the number of units and a few MB of memory beside the result.

    Args:
        unit_scores: For each site its ``Pattern.unit_scores``; any shapes, compared as float32.
        unit_sizes: For each site its ``Pattern.unit_sizes``.
        weights: For each site the number of its weights, >= the sum of its unit sizes.
        sparsity: Wanted fraction of zeros in [0, 1], over all weights (global) or at every site (local); or, local
            only, one fraction a site, such as ``distribution`` computes.
        scope: Whether sites compete.
        max_sparsity: Most that a site may get, in [0, 1], one for all or one each; rounded down to whole
            units. What a capped site cannot take, the other sites take.
        min_sparsity: Least that a site must get, in [0, 1]; rounded down to whole units. While ``sparsity``
            is lower (early in a schedule), ``sparsity`` takes its place.
        names: Site names for messages.

    Returns:
        Bool tensors, shapes of ``unit_scores``, True = prune. Deterministic: of equal scores the lowest
        (site, flattened index) are kept. Only where caps, rounded down to units, forbid it is the sparsity
        lower than the nearest unit.

    Raises:
        SparsityError: A score is NaN (the message names the site); an argument is out of range or of the
            wrong length; or the caps make ``sparsity`` unreachable (the message says what is reachable).
    """
    count = len(unit_scores)
    labels = tuple(names) or tuple(f"site {index}" for index in range(count))
    limits = (
        [float(max_sparsity)] * count
        if isinstance(max_sparsity, (int, float))
        else [float(part) for part in max_sparsity]
    )
    if not len(unit_sizes) == len(weights) == len(labels) == len(limits) == count:
        raise SparsityError(
            f"allocation over {count} sites got {len(unit_sizes)} sizes, {len(weights)} weights, "
            f"{len(limits)} caps and {len(labels)} names; give one each"
        )
    targets = _targets(sparsity, scope, labels)
    _check_fractions(min_sparsity, limits, labels)
    sites = [make_units(*site) for site in zip(labels, unit_scores, unit_sizes, strict=True)]
    bounds = [
        _Bounds(
            cap=min(limit * size, float(site.total)) + _SLACK,
            floor=min(min_sparsity, target) * size + _SLACK,
        )
        for site, limit, size, target in zip(sites, limits, weights, targets, strict=True)
    ]
    if scope is Scope.LOCAL:
        chosen = [_share_alone(*entry) for entry in zip(sites, bounds, weights, targets, strict=True)]
    else:
        chosen = _share_global(sites, bounds, sum(weights), targets[0]) if targets else []
    return [mask.view(scores.shape) for mask, scores in zip(chosen, unit_scores, strict=True)]


def _targets(sparsity: float | Sequence[float], scope: Scope, labels: Sequence[str]) -> list[float]:
    """The sparsity asked of each site; under ``GLOBAL`` the one over all of them, repeated."""
    if isinstance(sparsity, (int, float)):
        if not 0.0 <= sparsity <= 1.0:
            raise SparsityError(f"sparsity={sparsity} is not in [0, 1]; write a fraction and not percent")
        return [float(sparsity)] * len(labels)
    if scope is not Scope.LOCAL:
        raise SparsityError(f"a sparsity for each site needs scope {Scope.LOCAL.value!r}, not {scope.value!r}")
    targets = [float(part) for part in sparsity]
    if len(targets) != len(labels):
        raise SparsityError(f"allocation over {len(labels)} sites got {len(targets)} sparsities; give one each")
    for label, target in zip(labels, targets, strict=True):
        if not 0.0 <= target <= 1.0:
            raise SparsityError(f"{label}: sparsity={target} is not in [0, 1]; write a fraction and not percent")
    return targets


def _check_fractions(least: float, limits: Sequence[float], labels: Sequence[str]) -> None:
    if not 0.0 <= least <= 1.0:
        raise SparsityError(f"min_sparsity={least} is not in [0, 1]; write a fraction and not percent")
    for label, limit in zip(labels, limits, strict=True):
        if not 0.0 <= limit <= 1.0:
            raise SparsityError(f"{label}: max_sparsity={limit} is not in [0, 1]; write a fraction and not percent")
        if least > limit:
            raise SparsityError(f"{label}: min_sparsity={least} is above max_sparsity={limit}; change one of them")


def _share_alone(site: Units, bound: _Bounds, weights: int, sparsity: float) -> Tensor:
    if sparsity * weights > bound.cap:
        raise SparsityError(
            f"{site.name}: sparsity {sparsity:.6g} is out of reach: "
            f"at most {(bound.cap - _SLACK) / max(1, weights):.6g} can be "
            "reached here; lower the target, raise max_sparsity, or choose another pattern"
        )
    counts = histogram(site)
    (mask,) = cut([site], counts, sparsity * weights)
    if site.size_of(mask) > bound.cap:
        (mask,) = cut([site], counts, bound.cap, exceed=False)
    return mask


def _share_global(sites: Sequence[Units], bounds: Sequence[_Bounds], weights: int, sparsity: float) -> list[Tensor]:
    """Cut all sites at one threshold; build the bounds of sites that come near theirs into the scores, and cut again.

    The units that a floor takes come first, whatever their scores, and those beyond a cap never: so the result is the nearest to
    the goal that the bounds allow, and does not depend on the order of the sites.
    """
    reachable = sum(bound.cap - _SLACK for bound in bounds)
    goal = sparsity * weights
    if goal > reachable + _SLACK:
        raise SparsityError(
            f"sparsity {sparsity:.6g} over {len(sites)} sites is out of reach: "
            f"at most {reachable / max(1, weights):.6g} can be reached; "
            "lower the target, raise max_sparsity, or choose other patterns"
        )
    counts = sum_histograms(histogram(site) for site in sites)
    bounded = list(sites)
    room = sum(site.total for site in sites)
    free = set(range(len(sites)))
    while True:
        chosen = cut(bounded, counts, min(goal, float(room)))
        near = [index for index in free if not _is_inside(sites[index], bounds[index], chosen[index])]
        if not near:
            return chosen
        for index in near:
            own = histogram(sites[index])
            bounded[index], most = _bounded(sites[index], bounds[index], own)
            counts += histogram(bounded[index]) - own
            room += most - sites[index].total
        free.difference_update(near)


def _is_inside(site: Units, bound: _Bounds, chosen: Tensor) -> bool:
    """Whether a choice is so far from both bounds that they cannot have mattered."""
    size, largest = site.size_of(chosen), max(site.levels, default=0)
    return (bound.floor < 1 or bound.floor <= size - largest) and (
        size + largest <= bound.cap or site.total <= bound.cap
    )


def _bounded(site: Units, bound: _Bounds, counts: Tensor) -> tuple[Units, int]:
    """The site with scores that hold its bounds, and how many weights it can lose; ``counts`` is its histogram."""
    scores, most = site.scores, site.total
    if site.total > bound.cap:
        (last,) = cut([site], counts, bound.cap, exceed=False)
        scores, most = torch.where(last, scores, torch.inf), site.size_of(last)
    if bound.floor >= 1:
        (first,) = cut([site], counts, bound.floor, exceed=False)
        scores = torch.where(first, -torch.inf, scores)
    return replace(site, scores=scores), most
