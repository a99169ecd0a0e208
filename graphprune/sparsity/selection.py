"""Exact selection of the smallest scores of many tensors, without ever putting them into one.

Scores are ordered by their float32 bits: a histogram of the high 16 bits, summed over the tensors, tells in
which bucket the threshold lies. The few members of that bucket are sorted; where they are many, because scores
are equal, a histogram of their low 16 bits tells the threshold instead. Passes go in chunks that stay in cache,
so the extra memory is a few MB whatever the number of scores. Negative scores are ordered too, and -0.0 equals 0.0.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.errors import SparsityError

_CHUNK = 1 << 18
_FEW = 1 << 20
"""Weights in a bucket that are sorted, 8 MB or so; more are counted."""
_HALF = 1 << 15
_BUCKETS = 1 << 16
_INFINITY = 0x7F80
"""High 16 bits of float32 infinity; any larger magnitude is NaN."""


@dataclass(frozen=True, eq=False)
class Units:
    """The prunable units of one site.

    Attributes:
        name: The site, for messages.
        scores: Flat contiguous float32 ``[units]``; larger = keep.
        sizes: Weights per unit: an int >= 1, or flat int64 ``[units]`` on the device of ``scores``, entries
            >= 0 (a unit of size 0 is never pruned).
        levels: The distinct positive sizes, ascending.
    """

    name: str
    scores: Tensor
    sizes: int | Tensor
    levels: tuple[int, ...]

    @property
    def total(self) -> int:
        """Weights in all units."""
        return self.sizes * self.scores.numel() if isinstance(self.sizes, int) else int(self.sizes.sum())

    def size_of(self, chosen: Tensor) -> int:
        """Return the weights in the units chosen by a flat bool tensor."""
        if isinstance(self.sizes, int):
            return self.sizes * int(chosen.count_nonzero())
        return sum(level * int((chosen & (self.sizes == level)).count_nonzero()) for level in self.levels)


def make_units(name: str, scores: Tensor, sizes: int | Tensor) -> Units:
    """Check and flatten the scores and sizes of one site.

    Args:
        name: The site, for messages.
        scores: Any shape, any float dtype; compared as float32, not modified, no copy where it is contiguous
            float32.
        sizes: Weights per unit, >= 0: an int or an int tensor of the shape of ``scores``.

    Returns:
        The flat form.

    Raises:
        SparsityError: A size is negative, or the shapes differ.
    """
    flat = scores.detach().to(torch.float32).reshape(-1).contiguous()
    if isinstance(sizes, int):
        if sizes < 0:
            raise SparsityError(f"{name}: unit size {sizes} is negative")
        return (
            Units(name, flat, sizes, (sizes,))
            if sizes
            else Units(name, flat, torch.zeros_like(flat, dtype=torch.int64), ())
        )
    if sizes.shape != scores.shape:
        raise SparsityError(
            f"{name}: unit sizes of shape {tuple(sizes.shape)} for unit scores of shape {tuple(scores.shape)}"
        )
    flat_sizes = sizes.to(device=flat.device, dtype=torch.int64).reshape(-1)
    levels = tuple(int(level) for level in torch.unique(flat_sizes))
    if levels and levels[0] < 0:
        raise SparsityError(f"{name}: unit size {levels[0]} is negative")
    if len(levels) == 1 and levels[0] > 0:
        return Units(name, flat, levels[0], levels)
    return Units(name, flat, flat_sizes, tuple(level for level in levels if level))


def histogram(units: Units) -> Tensor:
    """Return the weights per bucket of scores, in ascending order of the scores.

    Args:
        units: A site.

    Returns:
        CPU int64 ``[65536]``.

    Raises:
        SparsityError: A score is NaN; the message names the site.
    """
    counts = torch.zeros(_BUCKETS, dtype=torch.int64, device=units.scores.device)
    seen = counts if isinstance(units.sizes, int) else torch.zeros_like(counts)
    for bits, sizes in _chunks(units):
        keys = (bits >> 16).add_(_HALF)
        if sizes is None:
            counts += torch.bincount(keys, minlength=_BUCKETS)
            continue
        seen += torch.bincount(keys, minlength=_BUCKETS)
        for level in units.levels:
            counts.add_(torch.bincount(keys[sizes == level], minlength=_BUCKETS), alpha=level)
    _refuse_nan(units, seen)
    if isinstance(units.sizes, int):
        counts *= units.sizes
    return torch.cat((counts[:_HALF].flip(0), counts[_HALF:])).cpu()


def cut(sites: Sequence[Units], counts: Tensor, goal: float, *, exceed: bool = True) -> list[Tensor]:
    """Choose the units with the smallest scores whose weights add up to ``goal``, to the nearest unit.

    Args:
        sites: The sites, in order.
        counts: Sum of their ``histogram``.
        goal: Weights to prune, >= 0.
        exceed: Whether the nearest sum may be above ``goal``; else it is the largest one that is not.

    Returns:
        Flat bool tensors, True = prune. Of equal scores the lowest (site, index) are kept. Where the sums
        below and above ``goal`` are equally near, the one above is taken.
    """
    goal = min(goal, float(counts.sum()))
    if goal <= 0.0:
        return [torch.zeros_like(site.scores, dtype=torch.bool) for site in sites]
    place, below = _crossing(counts, goal)
    if int(counts[place]) <= _FEW:
        return _cut_sorted(sites, place, goal - below, exceed)
    threshold = _threshold(sites, place, goal - below)
    chosen = [_below(site, threshold) for site in sites]
    left = goal - sum(site.size_of(mask) for site, mask in zip(sites, chosen, strict=True))
    for site, mask in reversed(list(zip(sites, chosen, strict=True))):
        left = _take_ties(site, mask, threshold, left, exceed)
        if left <= 0.0:
            break
    return chosen


def _below(site: Units, threshold: float) -> Tensor:
    """Mark the units with smaller scores; those of size 0 never."""
    mask = site.scores < threshold
    return mask if isinstance(site.sizes, int) else mask.logical_and_(site.sizes > 0)


def _cut_sorted(sites: Sequence[Units], place: int, left: float, exceed: bool) -> list[Tensor]:
    """Mark all units below a bucket, and of its members, in ascending order, those whose weights add up to ``left``."""
    low, high = _edges(place)
    chosen, found = [], []
    for number, site in enumerate(sites):
        mask = _below(site, low)
        inside = (site.scores <= high).logical_xor_(mask)  # what is below the bucket is in both
        if not isinstance(site.sizes, int):
            inside.logical_and_(site.sizes > 0)
        places = inside.nonzero().flatten()
        sizes = torch.full_like(places, site.sizes) if isinstance(site.sizes, int) else site.sizes[places]
        found.append((torch.full_like(places, number), places, site.scores[places] + 0.0, sizes))
        chosen.append(mask)
    device = sites[0].scores.device
    numbers, places, scores, sizes = (
        torch.cat([part.to(device) for part in parts]) for parts in zip(*found, strict=True)
    )
    order = scores.flip(0).sort(stable=True).indices  # of equal scores the last one goes first
    order = len(order) - 1 - order
    count = _prefix(sizes[order], left, exceed)
    for number in torch.unique(numbers[order[:count]]).tolist():
        picked = order[:count][numbers[order[:count]] == number]
        chosen[number][places[picked].to(chosen[number].device)] = True
    return chosen


def _prefix(sizes: Tensor, left: float, exceed: bool) -> int:
    """Return how many of some units, in order, come nearest to ``left`` weights; of two equally near sums the larger."""
    sums = sizes.cumsum(0)
    count = int(torch.searchsorted(sums, math.floor(left), right=True))
    if exceed and count < len(sums):
        above, under = int(sums[count]) - left, left - (int(sums[count - 1]) if count else 0)
        count += above <= under
    return count


def _edges(place: int) -> tuple[float, float]:
    """Return the smallest and the largest score of a bucket of the ordered histogram, both inside."""
    if place >= _HALF:
        first = (place - _HALF) << 16
        low, high = _number(first), _number(first | _BUCKETS - 1)
    else:
        first = ((-1 - place) << 16) & 0xFFFFFFFF
        low, high = _number(first | _BUCKETS - 1), _number(first | (first == 0x80000000))  # -0.0 counts as 0.0
    return (float("-inf") if math.isnan(low) else low), (float("inf") if math.isnan(high) else high)


def _number(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def select_smallest(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Mark exactly the ``k`` smallest entries of several tensors.

    Args:
        scores: Float tensors of any shapes; compared as float32.
        k: How many, between 0 and the number of all entries.

    Returns:
        Bool tensors of the same shapes, ``k`` entries True. Of equal scores the lowest (tensor, flattened
        index) stay False.

    Raises:
        SparsityError: ``k`` is out of range, or a score is NaN.
    """
    sites = [make_units(f"scores[{index}]", tensor, 1) for index, tensor in enumerate(scores)]
    total = sum(site.total for site in sites)
    if not 0 <= k <= total:
        raise SparsityError(f"cannot select {k} of {total} scores")
    chosen = cut(sites, sum_histograms(histogram(site) for site in sites), float(k))
    return [mask.view(tensor.shape) for mask, tensor in zip(chosen, scores, strict=True)]


def sum_histograms(counts: Iterable[Tensor]) -> Tensor:
    """Add up histograms; zeros for none."""
    total = torch.zeros(_BUCKETS, dtype=torch.int64)
    for count in counts:
        total += count
    return total


def _chunks(units: Units) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield float32 bits as int32, with -0.0 turned into 0.0, and the sizes where they differ."""
    for start in range(0, units.scores.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        sizes = None if isinstance(units.sizes, int) else units.sizes[part]
        yield (units.scores[part] + 0.0).view(torch.int32), sizes


def _refuse_nan(units: Units, seen: Tensor) -> None:
    """Look only where a NaN can be: at or beyond infinity in either half of the unordered histogram."""
    suspects = seen[_INFINITY:_HALF].sum() + seen[_HALF + _INFINITY :].sum()
    if int(suspects) and bool(units.scores.isnan().any()):
        raise SparsityError(
            f"{units.name}: its scores contain NaN, so nothing can be ranked; look for a diverged loss "
            "or a gradient that was not finite"
        )


def _threshold(sites: Sequence[Units], place: int, goal: float) -> float:
    """Return the score in a bucket at which the cumulated weights of its members first reach ``goal > 0``."""
    high = place - _HALF if place >= _HALF else -1 - place  # larger bits are smaller numbers where the sign bit is set
    fine = torch.zeros(_BUCKETS, dtype=torch.int64)
    for site in sites:
        for bits, sizes in _chunks(site):
            inside = (bits >> 16) == high
            low = bits[inside].bitwise_and_(_BUCKETS - 1)
            if not low.numel():
                continue
            if sizes is not None:
                sizes = sizes[inside]
            for level in site.levels:
                picked = low if sizes is None else low[sizes == level]
                fine.add_(torch.bincount(picked, minlength=_BUCKETS).cpu(), alpha=level)
    place, _ = _crossing(fine.flip(0) if high < 0 else fine, goal)
    low_bits = _BUCKETS - 1 - place if high < 0 else place
    return float(torch.tensor((high << 16) | low_bits, dtype=torch.int32).view(torch.float32))


def _crossing(counts: Tensor, goal: float) -> tuple[int, int]:
    """Return the first index at which the running sum reaches ``goal``, and the sum before it."""
    sums = counts.cumsum(0)
    place = min(int(torch.searchsorted(sums, math.ceil(goal))), len(sums) - 1)
    return place, int(sums[place] - counts[place])


def _take_ties(site: Units, chosen: Tensor, threshold: float, left: float, exceed: bool) -> float:
    """Choose units at the threshold, highest index first; return the weights that are still missing."""
    ties = site.scores == threshold
    if not isinstance(site.sizes, int):
        ties.logical_and_(site.sizes > 0)
    weights = site.size_of(ties)
    if weights <= left:
        chosen.logical_or_(ties)
        return left - weights
    places = ties.nonzero().flatten().flip(0)
    sizes = torch.full_like(places, site.sizes) if isinstance(site.sizes, int) else site.sizes[places]
    count = _prefix(sizes, left, exceed)
    chosen[places[:count]] = True
    return 0.0
