"""How much of a range to give up, so that steps within the rest are finer: by share, by entropy, by squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from graphprune.quant.affine import choose_qparams
from graphprune.quant.schemes import Scheme

THRESHOLDS = 128
"""Most thresholds that ``clip_by_entropy`` tries."""

_TRACE = 1e-4


def absolute(edges: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Turn histograms of values into histograms of their absolute values.

    Args:
        edges: Edges of the bins, ``[rows, bins + 1]``, increasing, evenly spaced by ``w``, multiples of ``w``.
        mass: Mass of each bin, ``[rows, bins]``.

    Returns:
        ``(edges, mass)`` of bins from 0 on, ``[rows, bins + 2]`` and ``[rows, bins + 1]``; of the same width.
    """
    bins = mass.shape[1]
    width = edges[:, 1:2] - edges[:, :1]
    first = (edges[:, :-1] / width).round()
    index = torch.where(first >= 0, first, -1 - first)  # bin -1, just below 0, is the mirror image of bin 0
    folded = mass.new_zeros(mass.shape[0], bins + 1).scatter_add_(1, index.clamp(0, bins).long(), mass)
    return torch.arange(bins + 2, dtype=edges.dtype, device=edges.device) * width, folded


def clip_by_share(edges: Tensor, mass: Tensor, share: Tensor | float) -> Tensor:
    """Return the value below which a share of the mass lies.

    Args:
        edges: Edges of the bins, ``[rows, bins + 1]``, increasing.
        mass: Mass of each bin, ``[rows, bins]``, some of it positive in each row; evenly spread within a bin.
        share: In [0, 1], a number or ``[rows]``.

    Returns:
        ``[rows]``. Where no mass lies between two bins, the end of the lower one.
    """
    summed = mass.cumsum(1)
    total = summed[:, -1:]
    goal = (torch.as_tensor(share, dtype=mass.dtype, device=mass.device).reshape(-1, 1) * total).contiguous()
    index = torch.searchsorted(summed, goal.expand_as(total).contiguous()).clamp(max=mass.shape[1] - 1)
    inside = mass.gather(1, index)
    part = (goal - (summed.gather(1, index) - inside)) / torch.where(inside > 0, inside, 1.0)
    left, right = edges.gather(1, index), edges.gather(1, index + 1)
    return torch.lerp(left, right, part.clamp(0.0, 1.0)).squeeze(1)


def clip_by_entropy(edges: Tensor, mass: Tensor, scheme: Scheme) -> Tensor:
    """Return the threshold ``t`` for which quantizing to ``[-t, t]``, within what was seen, keeps most information.

    For every threshold, the histogram P, with what is cut off added to the outermost bins, is compared with Q: the
    same bins without what is cut off, where the mass of the bins that are quantized to the same integer is spread
    evenly over those of them that P has mass in. Where only P has mass, Q gets 0.0001 of a value. The smallest
    ``KL(P || Q) = sum P log(P / Q)`` wins, the largest threshold among equals. For symmetric schemes this is done with
    absolute values. Up to 128 evenly spaced thresholds are tried, all edges of bins, from the whole range down to as
    many bins as there are integers, fewer of which nothing would be lost by quantizing.

    The bin at 0, which every quantizer represents exactly, counts at most as much as the larger of its neighbors:
    otherwise the zeros of a ReLU or of padding would decide alone.

    Args:
        edges: Edges of the bins, float64, ``[bins + 1]``, evenly spaced by ``w``, multiples of ``w``.
        mass: Mass of each bin, float64, ``[bins]``.
        scheme: How the tensor will be quantized.

    Returns:
        ``t``, a scalar, > 0.
    """
    width = float(edges[1] - edges[0])
    if scheme.symmetric:
        edges, mass = (part[0] for part in absolute(edges[None], mass[None]))
    used = mass.nonzero()
    if not len(used):
        return edges.abs().max()
    first, last = int(used[0]), int(used[-1])
    edges, mass = edges[first : last + 2], mass[first : last + 1].clone()
    start = round(float(edges[0]) / width)  # the bins are start, start + 1, ...
    count = len(mass)
    _level_zero(mass, -start)
    most = max(-start, start + count)
    integers = scheme.qmax + 1 if scheme.symmetric else scheme.qmax - scheme.qmin + 1
    fewest = next((t for t in range(1, most + 1) if min(start + count, t) - max(start, -t) >= integers), most)
    step = max(1, -(-(most - fewest + 1) // THRESHOLDS))
    thresholds = torch.arange(most, fewest - 1, -step, device=mass.device)
    divergence = torch.stack([_divergence(mass, start, int(t), width, scheme) for t in thresholds.tolist()])
    return thresholds[divergence.argmin()].double() * width


def _level_zero(mass: Tensor, zero: int) -> None:
    """Bring the mass at bin ``zero`` down to that of its neighbors, in place."""
    if 0 <= zero < len(mass) and len(mass) > 1:
        neighbors = torch.cat([mass[max(0, zero - 1) : zero], mass[zero + 1 : zero + 2]])
        mass[zero] = torch.minimum(mass[zero], neighbors.max())


def _divergence(mass: Tensor, start: int, threshold: int, width: float, scheme: Scheme) -> Tensor:
    """KL divergence for one threshold, in bins."""
    left, right = max(-threshold - start, 0), min(threshold - start, len(mass))
    inside = mass[left:right]
    reference = inside.clone()
    reference[0] += mass[:left].sum()
    reference[-1] += mass[right:].sum()
    ends = torch.tensor([(start + left) * width, (start + right) * width], dtype=torch.float64, device=mass.device)
    scale, zero_point = choose_qparams(ends[0], ends[1], scheme)
    middles = (torch.arange(start + left, start + right, device=mass.device, dtype=torch.float64) + 0.5) * width
    level = ((middles / scale).round() + zero_point).clamp(scheme.qmin, scheme.qmax).long() - scheme.qmin
    present = reference > 0
    levels = scheme.qmax - scheme.qmin + 1
    level_mass = mass.new_zeros(levels).index_add_(0, level, inside)
    level_bins = mass.new_zeros(levels).index_add_(0, level, present.to(mass.dtype))
    candidate = (level_mass / level_bins.clamp(min=1.0))[level][present].clamp_(min=_TRACE)
    reference = reference[present]
    reference, candidate = reference / reference.sum(), candidate / candidate.sum()
    return (reference * (reference / candidate).log()).sum()


def clip_by_error(
    low: Tensor, high: Tensor, values: Tensor, weights: Tensor | None, scheme: Scheme, grid: int
) -> tuple[Tensor, Tensor]:
    """Return for every row the range with the smallest sum of squared quantization errors.

    Args:
        low: Smallest values, ``[rows]``.
        high: Largest values, likewise.
        values: What is quantized, float32, ``[rows, n]``.
        weights: How much each value counts, shape of ``values``; None: all the same.
        scheme: How it is quantized; its axis and group do not matter.
        grid: Number of factors.

    Returns:
        ``(low, high)``, float32, ``[rows]``, with 0 in between: of the range extended to 0, ``[p * low, p * high]`` for
        one of ``p = 1, 1 - 1/grid, ... 1/grid``; for affine schemes then each end with its own. The range tried first,
        the widest, wins a tie.
    """
    factors = [1.0 - index / grid for index in range(grid)]
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    best = _squared_error(low, high, values, weights, scheme)
    below, above = low, high
    searches = ((True, True),) if scheme.symmetric else ((True, True), (True, False), (False, True))
    for move_low, move_high in searches:
        base_low, base_high = below, above
        for factor in factors:
            new_low = low * factor if move_low else base_low
            new_high = high * factor if move_high else base_high
            error = _squared_error(new_low, new_high, values, weights, scheme)
            better = error < best
            best = torch.where(better, error, best)
            below, above = torch.where(better, new_low, below), torch.where(better, new_high, above)
    return below, above


def _squared_error(low: Tensor, high: Tensor, values: Tensor, weights: Tensor | None, scheme: Scheme) -> Tensor:
    scale, zero_point = (part[:, None] for part in choose_qparams(low, high, scheme))
    grid = torch.div(values, scale).round_()
    grid.clamp_(scheme.qmin - zero_point, scheme.qmax - zero_point).mul_(scale).sub_(values).square_()
    if weights is not None:
        grid.mul_(weights)
    return grid.sum(1, dtype=torch.float64)
