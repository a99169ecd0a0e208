"""Choose the masks of one rule's sites: scores, allocation, and what hangs together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.ir.masking import MaskedSite, target_of
from graphprune.ir.sharding import sharded_like
from graphprune.sparsity.allocation import Scope, allocate
from graphprune.sparsity.channels import Channel
from graphprune.sparsity.criterion import Moment
from graphprune.sparsity.layout import from_logical


@dataclass(frozen=True, eq=False)
class _Entry:
    """What competes in an allocation: a site, or all sites of a coupled block.

    Attributes:
        name: For messages.
        places: Indexes of its sites.
        scores: Score of each unit.
        sizes: Weights of each unit.
        weights: All weights.
    """

    name: str
    places: tuple[int, ...]
    scores: Tensor
    sizes: int | Tensor
    weights: int


@torch.no_grad()
def update_masks(
    sites: Sequence[MaskedSite],
    sparsity: float | Sequence[float],
    stored: Mapping[str, Tensor | None],
    *,
    progress: float = 1.0,
) -> None:
    """Choose the masks of one rule's sites anew, write them in place, and let the criterion adjust the weights that are kept.

    Args:
        sites: Sites of one rule.
        sparsity: Sparsity to reach now, a fraction; one over all sites, or one for each.
        stored: Stored scores of each site by name; None or absent for criteria without.
        progress: How much of the pruning window is over, in [0, 1].

    Raises:
        SparsityError: NaN scores, or the sparsity cannot be reached under the caps; names the site.
    """
    for place, mask in _chosen(sites, sparsity, stored, progress):  # one mask at a time: they are large
        site = sites[place]
        adjusted = site.criterion.compensate(stored.get(site.name), site.logical_weight, mask, site.pattern)
        if adjusted is not None:
            value = from_logical(adjusted, site.decision.layout, tuple(site.weight.shape))
            site.weight.copy_(sharded_like(value.to(site.weight.dtype), site.weight))
        write_mask(site, mask)


def write_mask(site: MaskedSite, mask: Tensor) -> None:
    """Write a logical mask ``[out, in]`` into a site's buffer."""
    site.mask.copy_(from_logical(mask, site.decision.layout, tuple(site.mask.shape)))


@torch.no_grad()
def choose_masks(
    sites: Sequence[MaskedSite],
    sparsity: float | Sequence[float],
    stored: Mapping[str, Tensor | None],
    *,
    progress: float = 1.0,
) -> list[Tensor]:
    """Choose the masks of one rule's sites; as ``update_masks``, but nothing is changed.

    Returns:
        Logical masks ``[out, in]``, True = kept.
    """
    masks = dict(_chosen(sites, sparsity, stored, progress))
    return [masks[place] for place in range(len(sites))]


def _chosen(
    sites: Sequence[MaskedSite], sparsity: float | Sequence[float], stored: Mapping[str, Tensor | None], progress: float
) -> Iterator[tuple[int, Tensor]]:
    """Allocate, then yield the index of each site and its mask."""
    decision = sites[0].decision
    scores = scores_of(sites, stored, progress)
    entries = _entries(sites, scores)
    wanted = sparsity
    if not isinstance(sparsity, (int, float)):
        wanted = [sparsity[entry.places[0]] for entry in entries]
    chosen = allocate(
        [entry.scores for entry in entries],
        [entry.sizes for entry in entries],
        [entry.weights for entry in entries],
        wanted,
        scope=Scope.GLOBAL if decision.scope == "global" else Scope.LOCAL,
        max_sparsity=decision.max_sparsity,
        min_sparsity=decision.min_sparsity,
        names=[entry.name for entry in entries],
    )
    for entry, prune in zip(entries, chosen, strict=True):
        prune = _rearranged(sites, stored, entry, prune)
        for place in entry.places:
            units = _units_of(sites[place], prune) if sites[place].decision.coupling else prune
            yield place, sites[place].pattern.mask(scores[place], units, sites[place].shape)


@torch.no_grad()
def part_way(
    sites: Sequence[MaskedSite],
    before: Sequence[Tensor],
    goals: Sequence[Tensor],
    stored: Mapping[str, Tensor | None],
    fraction: float,
) -> list[Tensor]:
    """Choose masks on the way from one choice to the next: of what is to go, the part with the smallest scores.

    Args:
        sites: Sites of one rule.
        before: Logical masks before the update.
        goals: Logical masks that the update chose.
        stored: As for ``update_masks``.
        fraction: Part of the newly pruned weights to prune now, in [0, 1].

    Returns:
        Logical masks. Units go whole, in ascending order of their scores over all sites, to the nearest unit; for N:M,
        single weights go.
    """
    scores = scores_of(sites, stored, 1.0)
    sizes = []
    for site, old, goal, score in zip(sites, before, goals, scores, strict=True):
        gone = site.pattern.reduce((old & ~goal).float()) > 0
        size = site.pattern.score_sizes(site.shape, device=gone.device)
        sizes.append(torch.where(gone.view(score.shape), size, 0))
    chosen = allocate(
        scores,
        sizes,
        [int(size.sum()) for size in sizes],
        fraction,
        max_sparsity=1.0,
        names=[site.name for site in sites],
    )
    return [
        old & ~(site.pattern.spread(prune.float(), site.shape) > 0)
        for site, old, prune in zip(sites, before, chosen, strict=True)
    ]


def initial_scores(sites: Sequence[MaskedSite]) -> dict[str, Tensor | None]:
    """What each site's criterion stores before it has seen anything, by the site's name, beside the mask."""
    return {
        site.name: site.criterion.initial(site.pattern, site.shape, device=site.mask.device, name=site.name)
        for site in sites
    }


def choose_without_data(sites: Sequence[MaskedSite]) -> None:
    """Bring one rule's sites to their target at once, by a criterion that needs no data."""
    shares = [site.decision.share for site in sites if site.decision.share is not None]
    update_masks(sites, shares or target_of(sites), initial_scores(sites))


def scores_of(sites: Sequence[MaskedSite], stored: Mapping[str, Tensor | None], progress: float) -> list[Tensor]:
    """The scores of one rule's sites, as their criterion gives them now."""
    return [
        site.criterion.scores(
            stored.get(site.name), site.logical_weight, site.pattern, Moment(site.logical_mask, progress)
        )
        for site in sites
    ]


def _entries(sites: Sequence[MaskedSite], scores: Sequence[Tensor]) -> list[_Entry]:
    blocks: dict[str, list[int]] = {}
    for place, site in enumerate(sites):
        blocks.setdefault(site.decision.coupling or site.name, []).append(place)
    entries = []
    for name, places in blocks.items():
        if not sites[places[0]].decision.coupling:
            site, score = sites[places[0]], scores[places[0]]
            unit_scores, sizes = site.pattern.unit_scores(score), site.pattern.unit_sizes(site.shape)
            entries.append(_Entry(site.name, (places[0],), unit_scores, sizes, site.weight.numel()))
            continue
        scored = [place for place in places if _scores_block(sites[place])]
        parts = [part for place in scored for part in _part_scores(sites[place], scores[place])]
        size = sum(width * _across(sites[place]) for place in places for _, width in sites[place].decision.parts)
        weights = sum(sites[place].weight.numel() for place in places)
        entries.append(_Entry(name, tuple(places), torch.stack(parts).mean(0), size, weights))
    return entries


def _channel(site: MaskedSite) -> Channel:
    pattern = site.pattern
    assert isinstance(pattern, Channel)  # insert-masks couples sites by channels only
    return pattern


def _scores_block(site: MaskedSite) -> bool:
    """Whether a coupled site's scores count: those of the consumer alone where a mask variable is meant."""
    return not site.criterion.freezes_weights or _channel(site).axis == 1


def _across(site: MaskedSite) -> int:
    return site.shape[1 - _channel(site).axis]


def _count(site: MaskedSite) -> int:
    """Units of a coupled site."""
    total = site.shape[_channel(site).axis]
    return total // sum(width for _, width in site.decision.parts)


def _part_scores(site: MaskedSite, score: Tensor) -> list[Tensor]:
    """The score of each unit in each part of a coupled site."""
    step, count = _channel(site).width, _count(site)
    return [
        score[start // step : (start + count * width) // step].view(count, width // step).mean(1)
        for start, width in site.decision.parts
    ]


def _units_of(site: MaskedSite, prune: Tensor) -> Tensor:
    """The choice of units of a block, as channels of one of its sites."""
    step = _channel(site).width
    chosen = torch.zeros(site.shape[_channel(site).axis] // step, dtype=torch.bool, device=prune.device)
    for start, width in site.decision.parts:
        repeated = prune.repeat_interleave(width // step)
        chosen[start // step : start // step + len(repeated)] = repeated
    return chosen


def _rearranged(
    sites: Sequence[MaskedSite], stored: Mapping[str, Tensor | None], entry: _Entry, prune: Tensor
) -> Tensor:
    """Let the criterion rearrange the choice within an entry, by the site whose scores count."""
    site = next((sites[place] for place in entry.places if _rearranges(sites[place])), None)
    return prune if site is None else site.criterion.rearrange(stored.get(site.name), prune)


def _rearranges(site: MaskedSite) -> bool:
    return not site.decision.coupling or _scores_block(site)
