"""Equalize the ranges of channels between layers that follow each other.

Before: ``linear(relu(linear(x, w1, b1)), w2)``.  After: the same graph with ``w1 / s`` and ``b1 / s`` (rows) and ``w2 * s`` (columns),
where ``s = sqrt(r1 * r2) / r2`` makes the largest weights of channel i, ``r1`` of the first and ``r2`` of the second layer, equal.
Convolutions and linear layers with nothing between them but what is positively homogeneous in each channel (relu, leaky
relu, dropout, pooling, flattening).  Outputs are equal up to rounding, and zeros stay zero.

Source: Nagel et al., arXiv:1906.04721, section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphprune.errors import PassError
from graphprune.ir.program import Program, is_meta
from graphprune.ir.properties import Property
from graphprune.ir.scaling import (
    Layer,
    channels_after,
    find_layers,
    operator_name,
    outputs_obstacle,
    readers,
    users_of_parameters,
)
from graphprune.ir.selection import Selection
from graphprune.ir.sites import OPERATORS
from graphprune.pipeline.base import Coverage, Pass, PassResult

_MOST = 2.0**10
"""Largest factor, and one over the smallest: a channel of next to nothing shall not blow up the bias and so the activations."""


@dataclass(frozen=True)
class Equalize(Pass):
    """Give channels the same range in the layer that makes them and in the one that reads them, without data.

    For weights that share a scale (per tensor) and for activations that do. Needs neither data nor training.

    Attributes:
        iterations: Most rounds over all pairs of layers; a layer is in two pairs of a chain.
        tolerance: Relative change of a factor below which it is left alone, above 0.
        select: As for ``find-prunable``; both layers of a pair must be among them.
        exclude: As for ``find-prunable``.
        ops: As for ``find-prunable``.
    """

    name = "equalize"
    forbids = Property.PARTITIONED | Property.OBSERVED | Property.FAKE_QUANT

    iterations: int = 20
    tolerance: float = 1e-3
    select: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise PassError(f"iterations={self.iterations} is below 1")
        if not 0 < self.tolerance < 1:
            raise PassError(f"tolerance={self.tolerance} is not in (0, 1)")

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        """Scale weights and biases in place; the graph stays as it is."""
        sites, excluded = Selection(self.select, self.exclude, self.ops, include_last=True).apply(program)
        users = users_of_parameters(program)
        layers, left_out = find_layers(program, sites, users)
        left_out |= {item.name: item.reason for item in excluded}
        pairs: list[_Pair] = []
        for layer in layers.values():
            found = outputs_obstacle(layer, users) or _next_layer(layer, layers)
            if isinstance(found, str):
                left_out[layer.site.name] = found
            else:
                pairs.append(found)
        in_pairs = {item.site.name for pair in pairs for item in (pair.first, pair.second)}
        rounds = 0 if is_meta(program) else self._converge(program, pairs)
        scaled = [pair for pair in pairs if bool((pair.factor != 1).any())]
        for pair in scaled:
            pair.apply(program)
        stats = {"pairs": len(pairs), "pairs-scaled": len(scaled), "rounds": rounds}
        matched = tuple(site.name for site in sites if site.name in in_pairs)
        reasons = {name: reason for name, reason in left_out.items() if name not in in_pairs}
        return PassResult(program, bool(scaled), stats, Coverage(matched, reasons))

    def _converge(self, program: Program, pairs: list[_Pair]) -> int:
        """Find the factors of all pairs; those of neighbors depend on each other, so it takes rounds."""
        rows = {pair.first.node: pair for pair in pairs}
        columns = {pair.second.node: pair for pair in pairs}
        for number in range(self.iterations):
            moved = False
            for pair in pairs:
                first = pair.first.largest_of_outputs(_scaled(program, pair.first, rows, columns))
                second = pair.each(pair.second.largest_of_inputs(_scaled(program, pair.second, rows, columns)))
                pair.factor = pair.factor.to(first.device)
                some = (first > 0) & (second > 0)
                factor = torch.where(some, (first / second).sqrt() * pair.factor, pair.factor)
                factor = factor.clamp(1 / _MOST, _MOST)
                if bool(((factor / pair.factor).log().abs() > self.tolerance).any()):
                    pair.factor, moved = factor, True
            if not moved:
                return number
        return self.iterations


@dataclass(eq=False)
class _Pair:
    """Two layers, the number of input channels of the second that one channel becomes, and the factors found so far."""

    first: Layer
    second: Layer
    repeat: int
    factor: Tensor

    def each(self, largest: Tensor) -> Tensor:
        """The largest of the input channels that stand for each channel."""
        return largest.view(-1, self.repeat).amax(1)

    def apply(self, program: Program) -> None:
        self.first.scale_outputs(program, 1 / self.factor)
        self.second.scale_inputs(program, self.factor.repeat_interleave(self.repeat))


def _scaled(program: Program, layer: Layer, rows: dict[fx.Node, _Pair], columns: dict[fx.Node, _Pair]) -> Tensor:
    """A layer's weight with the factors found so far, float64."""
    weight = layer.shown(program).double()
    if layer.node in rows:
        weight = weight * layer.along_outputs(1 / rows[layer.node].factor.to(weight.device))
    if layer.node in columns:
        pair = columns[layer.node]
        weight = weight * layer.along_inputs(pair.factor.to(weight.device).repeat_interleave(pair.repeat))
    return weight


def _next_layer(layer: Layer, layers: dict[fx.Node, Layer]) -> _Pair | str:
    """Follow a layer's output to the one layer that reads it, or say what is in the way."""
    value, axis, repeat = layer.node, layer.axis, 1
    while True:
        found = readers(value)
        if len(found) != 1:
            return "its output is read by several operators" if found else "its output is not used"
        (user,) = found
        second = layers.get(user)
        if second is not None and second.x is value and axis == second.input_axis:
            return _Pair(layer, second, repeat, torch.ones(layer.outputs, dtype=torch.float64))
        after = channels_after(user, axis)
        if after is None:
            return _obstacle(user)
        value, axis, repeat = user, after[0], repeat * after[1]


def _obstacle(user: fx.Node) -> str:
    name = operator_name(user)
    if user.op == "output":
        return "its output is an output of the model"
    if name == "batch_norm":
        return "its output reaches batch normalization; run fold-conv-bn before equalize"
    if user.target in OPERATORS:
        return "its output reaches a layer that is not taken, or along another dimension than its input channels"
    return f"its output reaches {name}, through which channels are not scaled one by one"
