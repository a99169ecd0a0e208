"""Optimal Brain Surgeon: prune what costs the loss least in a local quadratic model, and let the rest make up for it.

At a trained point the loss changes by ``1/2 dw^T F dw`` where ``F`` is the empirical Fisher information. Pruning the weights ``Q``
asks for ``dw_Q = -w_Q``; the other weights are free, so the cheapest change and its cost are

    dw = -F^-1[:, Q] ([F^-1]_QQ)^-1 w_Q        rho_Q = 1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q

and for one weight ``rho = w^2 / (2 [F^-1]_ii)``. ``F`` is taken block by block along its diagonal.
Source: Hassibi and Stork, "Second order derivatives for network pruning", NeurIPS 1992; Kurtic et al., arXiv:2203.07259.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.sparsity.channels import Channel
from graphprune.sparsity.criterion import LAST, Criterion, Device, Moment, seen
from graphprune.sparsity.grouped import NM
from graphprune.sparsity.pattern_base import Pattern, Shape, matrix_shape
from graphprune.sparsity.tiled import Tiled

_PART = 1 << 22
"""Entries of Fisher blocks that are worked on in float64 at a time: 32 MB."""
_EPSILON = torch.finfo(torch.float32).eps
_FLOOR = 1e-13
"""Least damping, as a fraction of a block's trace: with less, a block could be singular in float64."""


@dataclass(frozen=True)
class Arrangement:
    """The order of a site's weights in its Fisher blocks.

    Units follow one another row by row over the grid, the weights of a unit row by row inside it, and each Fisher block holds
    the same number of whole units. Edge units are filled up to full size, and the last block to full length, with entries that
    have no gradient: they change neither scores nor updates.

    Attributes:
        shape: Logical shape of the weight.
        tile: Rows and columns of one unit.
        size: Weights of a Fisher block, a multiple of the unit's size.
    """

    shape: Shape
    tile: Shape
    size: int

    @classmethod
    def of(cls, pattern: Pattern, shape: Shape, block: int, name: str = "") -> Arrangement:
        """Arrange a weight for a pattern.

        Args:
            pattern: One whose units are rectangles; for N:M the group of ``m`` counts as a unit here.
            shape: Logical shape.
            block: Most weights of a Fisher block.
            name: The site, for the message.

        Raises:
            SparsityError: A unit is larger than the block, or no rectangle.
        """
        tile = _tile(pattern, shape)
        unit = tile[0] * tile[1]
        if unit > block:
            raise SparsityError(
                f"{name or 'a weight'} of shape {shape}: a unit of pattern {pattern} has {unit} weights and a Fisher block {block}; "
                f"set obs(block={unit}), which takes 4 * {unit} bytes a weight, or use another criterion"
            )
        units = -(-shape[0] // tile[0]) * -(-shape[1] // tile[1])
        return cls(shape, tile, min(block // unit, max(1, units)) * unit)

    @property
    def grid(self) -> Shape:
        """Units down and across."""
        return -(-self.shape[0] // self.tile[0]), -(-self.shape[1] // self.tile[1])

    @property
    def blocks(self) -> int:
        """Number of Fisher blocks."""
        return -(-self.grid[0] * self.grid[1] * self.tile[0] * self.tile[1] // self.size)

    def arrange(self, values: Tensor) -> Tensor:
        """Bring ``[out, in]`` into ``[blocks, size]``, filled up with zeros; a view where nothing moves."""
        (down, across), (rows, columns) = self.grid, self.tile
        short = (down * rows - self.shape[0], across * columns - self.shape[1])
        if any(short):
            values = torch.nn.functional.pad(values, (0, short[1], 0, short[0]))
        flat = values.reshape(down, rows, across, columns).transpose(1, 2).reshape(-1)
        missing = self.blocks * self.size - flat.numel()
        return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(self.blocks, self.size)

    def restore(self, arranged: Tensor) -> Tensor:
        """Bring ``[blocks, size]`` back to ``[out, in]``; the inverse of ``arrange``."""
        (down, across), (rows, columns) = self.grid, self.tile
        flat = arranged.reshape(-1)[: down * rows * across * columns]
        whole = flat.view(down, across, rows, columns).transpose(1, 2).reshape(down * rows, across * columns)
        return whole[: self.shape[0], : self.shape[1]]

    def parts(self) -> list[slice]:
        """Cut the Fisher blocks into parts of about ``_PART`` entries."""
        step = max(1, _PART // self.size**2)
        return [slice(start, min(start + step, self.blocks)) for start in range(0, self.blocks, step)]


@dataclass(frozen=True)
class OBS(Criterion):
    """Blocked Optimal Brain Surgeon (oBERT): scores from second-order information, and an update of the weights that stay.

    State: the Fisher information ``1/samples * sum of g g^T`` of each block, float32 ``[blocks, B, B]``, where ``B`` is ``block``
    rounded down to whole units. It is inverted, with ``damping`` on its diagonal, in float64 where scores or updates need it.
    The paper keeps the inverse and updates it with every sample (Sherman-Morrison). Both are the same in exact arithmetic, but in
    float32 the inverse starts at ``1/damping = 1e7`` and loses by cancellation whatever is 1e7 times smaller: measured, it is NaN
    where gradients are of the order of 10 and may be negative where they are of the order of 1, while the sum is right to 1e-5. The
    sum takes a fifth of the time, and processes can average it. Where float32 sums are not positive definite (many more weights
    in a block than independent samples, and large gradients), damping is raised in that block to what rounding asks for.

    A score is the rise of the loss when the whole unit is pruned alone, never divided by the unit's size. N:M patterns are scored
    weight by weight. Pruned weights have no gradient: they are decoupled, stay zero, and score zero.

    Cost: ``4 * B`` bytes a weight, so 17 GB for the 85 million weights of BERT-base and ``B=50``. Each sample reads and writes
    them once: 34 GB of memory traffic there, 2 to 5 s on one CPU core. Scores and updates take about ``B^2`` operations a weight in
    float64: 5 minutes each on one CPU core. Temporaries are a few copies of the largest weight.

    Attributes:
        samples: Gradients of single batches drawn at each mask update; the ``m`` of the average.
        damping: Added to the diagonal of the Fisher information.
        block: Most weights of a Fisher block. The paper uses 50 for single weights and 32 for blocks of four.
        recomputations: At each mask update, the number of equal steps in sparsity, each with Fisher information drawn anew.

    Raises:
        SparsityError: An option is not positive.
    """

    samples: int = 1024
    damping: float = 1e-7
    block: int = 50
    recomputations: int = 1
    name = "obs"
    needs_samples = True

    def __post_init__(self) -> None:
        if min(self.samples, self.block, self.recomputations) < 1 or not 0.0 < self.damping < float("inf"):
            raise SparsityError(
                f"obs needs samples, block and recomputations of at least 1 and damping > 0, got samples={self.samples}, "
                f"damping={self.damping}, block={self.block}, recomputations={self.recomputations}"
            )

    def refusal(self, pattern: Pattern) -> str | None:
        """Refuse patterns whose unit is larger than a Fisher block; a channel's size depends on the
        weight, so ``initial`` looks at it.
        """
        try:
            unit = _area(_tile(pattern, (1, 1)))
        except SparsityError as error:
            return str(error)
        if unit > self.block:
            return f"a unit of {pattern} has {unit} weights and a Fisher block {self.block}; set obs(block={unit})"
        return None

    def initial(self, pattern: Pattern, shape: Shape, *, device: Device, name: str = "") -> Tensor | None:
        """Return zeros, ``[blocks, B, B]``.

        Raises:
            SparsityError: A unit (a whole channel of a wide layer, for example) is larger than a Fisher block.
        """
        order = Arrangement.of(pattern, shape, self.block, name)
        return torch.zeros(order.blocks, order.size, order.size, device=device)

    @torch.no_grad()
    def accumulate(self, stored: Tensor | None, weight: Tensor, grad: Tensor, pattern: Pattern) -> Tensor:
        """Add ``g g^T / samples`` of one sample's gradient."""
        shape = matrix_shape(weight)
        if grad.shape != weight.shape:
            raise SparsityError(
                f"gradient of shape {tuple(grad.shape)} for a weight of shape {shape}; use to_logical on both"
            )
        order = Arrangement.of(pattern, shape, self.block)
        if stored is None:
            stored = torch.zeros(order.blocks, order.size, order.size, device=weight.device)
        gradient = order.arrange(grad.detach().to(stored.dtype))
        for part in order.parts():
            rows = gradient[part]
            stored[part].addcmul_(rows[:, :, None], rows[:, None, :], value=1.0 / self.samples)
        return stored

    @torch.no_grad()
    def scores(self, stored: Tensor | None, weight: Tensor, pattern: Pattern, at: Moment = LAST) -> Tensor:
        """Return ``rho``, float32 in the pattern's score shape, at least 0.

        Raises:
            SparsityError: No sample was seen, or the Fisher information is not finite.
        """
        fisher = seen(self, stored)
        shape = matrix_shape(weight)
        order = Arrangement.of(pattern, shape, self.block)
        arranged = order.arrange(weight.detach())
        unit = 1 if isinstance(pattern, NM) else _area(order.tile)
        result = torch.empty(order.blocks, order.size // unit, device=weight.device)
        for part in order.parts():
            result[part] = _unit_scores(_factor(fisher[part], self.damping), arranged[part].double(), unit)
        if isinstance(pattern, NM):
            return order.restore(result).contiguous()
        return result.view(-1)[: order.grid[0] * order.grid[1]].view(pattern.score_shape(shape))

    @torch.no_grad()
    def compensate(self, stored: Tensor | None, weight: Tensor, mask: Tensor, pattern: Pattern) -> Tensor | None:
        """Return the weight after the joint update for everything that the mask prunes in each Fisher block.

        With ``K`` the kept weights, ``dw_K = F_KK^-1 F_KQ w_Q``, which equals the formula above without an inverse of an inverse.
        Pruned entries are exactly zero. Weights that were pruned before are in ``Q`` with ``w_Q = 0``: they stay zero and ask for no
        change.

        Raises:
            SparsityError: No sample was seen, shapes differ, or the Fisher information is not finite.
        """
        fisher = seen(self, stored)
        if mask.shape != weight.shape:
            raise SparsityError(f"mask of shape {tuple(mask.shape)} for a weight of shape {tuple(weight.shape)}")
        order = Arrangement.of(pattern, matrix_shape(weight), self.block)
        arranged = order.arrange(weight.detach()).clone()
        pruned = order.arrange(mask.logical_not())
        for part in order.parts():
            values, gone = arranged[part], pruned[part]
            touched = (values.ne(0) & gone).any(1).nonzero().flatten()
            if touched.numel():
                gone = gone[touched]
                values[touched] = _joint_update(fisher[part][touched], values[touched].double(), gone, self.damping).to(
                    values.dtype
                )
        return order.restore(arranged.masked_fill_(pruned, 0.0)).contiguous()


def _tile(pattern: Pattern, shape: Shape) -> Shape:
    """Return rows and columns of one unit; SparsityError where units are no rectangles."""
    if isinstance(pattern, NM):
        return 1, pattern.m
    if isinstance(pattern, Tiled):
        return pattern.tile(shape)
    if isinstance(pattern, Channel) and (pattern.axis == 0 or pattern.kernel == pattern.groups == 1):
        other = max(1, shape[1 - pattern.axis])
        return (pattern.width, other) if pattern.axis == 0 else (other, pattern.width)
    raise SparsityError(
        f"obs needs units that are rectangles of the weight, and those of {pattern} here are not; use another criterion"
    )


def _area(tile: Shape) -> int:
    return tile[0] * tile[1]


def _factor(fisher: Tensor, damping: float, pruned: Tensor | None = None) -> Tensor:
    """Return the Cholesky factors of damped Fisher blocks.

    Args:
        fisher: ``[n, B, B]``.
        damping: Added to the diagonal; more where float32 sums are not positive definite with it.
        pruned: Bool ``[n, B]``; these rows and columns become those of the identity.

    Returns:
        Lower triangles, float64 ``[n, B, B]``.
    """
    matrix = fisher.to(torch.float64, copy=True)
    if pruned is not None:
        matrix.masked_fill_(pruned[:, :, None] | pruned[:, None, :], 0.0)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    trace = diagonal.sum(1, keepdim=True)
    if not bool(torch.isfinite(trace).all()):
        raise SparsityError("the Fisher information is not finite; leave out samples whose gradients are not")
    diagonal.add_(damping + trace * _FLOOR)
    if pruned is not None:
        diagonal.masked_fill_(pruned, 1.0)
    rounding = trace * _EPSILON
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    while bool(failed.any()):  # ends: rounding errors are smaller than the trace, and soon that is what was added
        diagonal.add_(rounding * failed.ne(0)[:, None])
        rounding *= 10
        factor, failed = torch.linalg.cholesky_ex(matrix)
    return factor


def _unit_scores(factor: Tensor, weight: Tensor, unit: int) -> Tensor:
    """Return ``rho`` of every unit, ``[n, B / unit]``, from Cholesky factors and weights ``[n, B]``."""
    identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device).expand_as(factor)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)  # F^-1 = inverse^T inverse
    if unit == 1:
        return weight.square() / (2.0 * inverse.square().sum(1))
    count, size, _ = inverse.shape
    columns = inverse.view(count, size, size // unit, unit).permute(0, 2, 3, 1)  # [n, units, unit, B]
    values = weight.reshape(count, size // unit, unit, 1)
    solved: Tensor = torch.cholesky_solve(values, torch.linalg.cholesky(columns @ columns.mT))
    return (values * solved).sum((2, 3)) / 2.0


def _joint_update(fisher: Tensor, weight: Tensor, pruned: Tensor, damping: float) -> Tensor:
    """Return weights ``[n, B]`` (float64) after the update for all pruned ones; these are not set to zero yet."""
    pull = (fisher.double() @ (weight * pruned)[..., None]).masked_fill_(pruned[..., None], 0.0)
    return weight + torch.cholesky_solve(pull, _factor(fisher, damping, pruned))[..., 0]
