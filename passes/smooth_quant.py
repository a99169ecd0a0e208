"""Move outliers of activations into weights, where a scale for each channel can hold them.

Before: ``linear(layer_norm(y, n, gamma, beta), w)``.  After: ``linear(layer_norm(y, n, gamma / s, beta / s), w * s)``, where column j of
every weight that reads the activation is multiplied by ``s_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha)``.  Where no
normalization or layer can take ``1 / s``, because the value is read elsewhere too, or with ``folding=false``:
``linear(mul(x, fc.input_smoothing), w * s)``.  Outputs are equal up to rounding, and zeros stay zero.

Source: Xiao et al., arXiv:2211.10438, section 4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphprune.errors import PassError, suggest
from graphprune.ir.program import Program, is_meta
from graphprune.ir.properties import Property
from graphprune.ir.scaling import (
    Layer,
    divisors_of,
    find_layers,
    multiply,
    only_read_by,
    source_of,
    users_of_parameters,
)
from graphprune.ir.selection import Selection
from graphprune.ir.sites import OPERATORS
from graphprune.ir.watching import watch
from graphprune.pipeline.base import Coverage, DataPass, PassResult
from graphprune.quant.affine import choose_qparams, fake_quantize
from graphprune.quant.schemes import parse_scheme
from graphprune.sparsity.layout import Layout, to_logical

aten = torch.ops.aten
_MOST = 1e5
"""Largest factor, and one over the smallest."""
_ROWS = 512
"""Rows of each activation that are kept to choose alpha by."""
_WEIGHT = parse_scheme("int8:symmetric:channel")
_ACTIVATION = parse_scheme("uint8:affine:tensor")


@dataclass(frozen=True)
class Smoothed:
    """Record on a weight's node, left by ``smooth-quant``: its input channels were scaled."""


@dataclass(frozen=True)
class SmoothQuant(DataPass):
    """Divide activations by a factor for each channel and multiply the weights that read them by it.

    Attributes:
        alpha: How much of the range goes from activations to weights: 0 evens out the weights, 1 the activations; ``auto``
            chooses for each activation what makes the smallest squared error in int8 (weights symmetric, by channel) and
            uint8 (activations affine, by tensor).
        alpha_min: Smallest alpha that ``auto`` tries.
        alpha_max: Largest.
        alpha_step: Step between them, above 0.
        folding: Divide in the normalization or layer that makes the activation, where nothing else reads it; else, or where
            False, by an inserted multiplication.
        select: As for ``find-prunable``; all linear operators where empty.
        exclude: As for ``find-prunable``.
        ops: As for ``find-prunable``.
        include_last: Take the last layer before the output too.
        progress: Show a progress bar.
    """

    name = "smooth-quant"
    forbids = Property.PARTITIONED | Property.OBSERVED | Property.FAKE_QUANT

    alpha: float | str = 0.5
    alpha_min: float = 0.0
    alpha_max: float = 1.0
    alpha_step: float = 0.1
    folding: bool = True
    select: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    include_last: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.alpha, str):
            if self.alpha != "auto":
                raise PassError(
                    f"alpha={self.alpha!r} is neither a number in [0, 1] nor auto{suggest(self.alpha, ['auto'])}"
                )
        elif not 0 <= self.alpha <= 1:
            raise PassError(f"alpha={self.alpha} is not in [0, 1]")
        if not 0 <= self.alpha_min <= self.alpha_max <= 1:
            raise PassError(f"it needs 0 <= alpha_min ({self.alpha_min}) <= alpha_max ({self.alpha_max}) <= 1")
        if not self.alpha_step > 0:
            raise PassError(f"alpha_step={self.alpha_step} is not above 0")

    @torch.no_grad()
    def run_on(self, program: Program, batches: Iterable[object]) -> PassResult:
        """Scale weights in place, and fold or insert what divides their inputs."""
        sites, excluded = Selection(self.select, self.exclude, self.ops, self.include_last).apply(program)
        users = users_of_parameters(program)
        layers, left_out = find_layers(program, sites, users)
        left_out |= {item.name: item.reason for item in excluded}
        groups = _groups(program, layers, left_out)
        if not is_meta(program):
            seen = {group.source: group for group in groups}
            shown = "smoothing" if self.progress else ""
            watch(program, list(seen), batches, lambda node, value: seen[node].see(value, self.alpha == "auto"), shown)
        alphas: list[float] = []
        folded = 0
        for group in groups:
            own = {layer.node: layer for layer in group.layers}
            alone = self.folding and only_read_by(group.source, own)
            divisors = divisors_of(group.source, layers, users) if alone else None
            factor = None
            if not is_meta(program):
                alpha = self._choose(program, group)
                alphas.append(alpha)
                factor = group.factor(program, alpha)
            if divisors is None:
                factor = _insert_division(program, group, factor)
            else:
                folded += 1
                _divide(program, divisors, factor)
            for layer in group.layers:
                if factor is not None:
                    layer.scale_inputs(program, factor)
                program.annotate(layer.weight, Smoothed())
        matched = tuple(layer.site.name for group in groups for layer in group.layers)
        stats: dict[str, int | float] = {
            "weights-smoothed": len(matched),
            "folded": folded,
            "inserted": len(groups) - folded,
        }
        if alphas:
            stats["alpha-mean"] = round(math.fsum(alphas) / len(alphas), 6)
        return PassResult(program, bool(groups), stats, Coverage(matched, left_out))

    def _choose(self, program: Program, group: _Group) -> float:
        """The alpha of a group; of equal errors the smaller one."""
        if not isinstance(self.alpha, str):
            return float(self.alpha)
        steps = math.floor((self.alpha_max - self.alpha_min) / self.alpha_step + 1e-9)
        tried = [round(self.alpha_min + step * self.alpha_step, 9) for step in range(steps + 1)]
        errors = group.errors(program, tried)
        return tried[errors.index(min(errors))]


@dataclass(eq=False)
class _Group:
    """Layers that read one activation, and what was seen of it.

    Attributes:
        source: The activation, before views of it.
        layers: The layers, in graph order.
        low: Smallest value of each channel so far, float32 ``[channels]``.
        high: Largest.
        rows: A random sample of rows, ``[rows, channels]``.
        keys: The random number of each row; the smallest ones stay.
    """

    source: fx.Node
    layers: list[Layer]
    low: Tensor | None = None
    high: Tensor | None = None
    rows: Tensor | None = None
    keys: Tensor | None = None
    generator: torch.Generator | None = None

    def see(self, value: Tensor, keep_rows: bool) -> None:
        """Take one batch's values into account."""
        rows = value.detach().reshape(-1, value.shape[-1]).float()
        low, high = rows.amin(0), rows.amax(0)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise PassError(
                f"the input of {self.layers[0].site.name} has NaN or infinite values with this data; look at the model and the data"
            )
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        if keep_rows:
            self._sample(rows)

    def _sample(self, rows: Tensor) -> None:
        self.generator = self.generator or torch.Generator().manual_seed(0)
        keys = torch.rand(len(rows), generator=self.generator).to(rows.device)
        if self.rows is not None and self.keys is not None:
            rows, keys = torch.cat([self.rows, rows]), torch.cat([self.keys, keys])
        self.keys, kept = keys.topk(min(_ROWS, len(keys)), largest=False)
        self.rows = rows[kept]

    def factor(self, program: Program, alpha: float) -> Tensor:
        """``s``, float64 ``[channels]``; 1 where the activation or all weights of a channel are zero."""
        assert self.low is not None
        assert self.high is not None
        x = torch.maximum(-self.low, self.high).double()
        largest = [layer.largest_of_inputs(layer.shown(program)) for layer in self.layers]
        w = torch.stack(largest).amax(0).double().to(x.device)
        s = (x**alpha / w ** (1 - alpha)).clamp(1 / _MOST, _MOST)
        return torch.where((x > 0) & (w > 0), s, 1.0)

    def errors(self, program: Program, alphas: list[float]) -> list[float]:
        """Squared error of the layers' outputs for the rows that were kept, by alpha."""
        assert self.rows is not None
        assert self.low is not None
        assert self.high is not None
        weights = [to_logical(layer.shown(program).float(), layer.site.layout) for layer in self.layers]
        exact = [self.rows @ weight.T for weight in weights]
        errors = []
        for alpha in alphas:
            s = self.factor(program, alpha).float()
            x = fake_quantize(
                self.rows / s, *choose_qparams((self.low / s).amin(), (self.high / s).amax(), _ACTIVATION), _ACTIVATION
            )
            error = 0.0
            for weight, wanted in zip(weights, exact, strict=True):
                scaled = weight * s
                rounded = fake_quantize(scaled, *choose_qparams(scaled.amin(1), scaled.amax(1), _WEIGHT), _WEIGHT)
                error += float((x @ rounded.T - wanted).double().square().sum())
            errors.append(error)
        return errors


def _groups(program: Program, layers: dict[fx.Node, Layer], left_out: dict[str, str]) -> list[_Group]:
    """Layers by the activation that they read; adds the reason why others are left out."""
    groups: dict[fx.Node, _Group] = {}
    for layer in layers.values():
        source = source_of(layer.x)
        if layer.site.layout is Layout.CONV:
            left_out[layer.site.name] = "a convolution: only linear layers are smoothed"
        elif program.annotation(layer.weight, Smoothed) is not None:
            left_out[layer.site.name] = "smoothed already"
        else:
            groups.setdefault(source, _Group(source, [])).layers.append(layer)
    return list(groups.values())


def _divide(program: Program, divisors: list[Layer | str], factor: Tensor | None) -> None:
    """Scale what makes an activation, unless there are no values."""
    if factor is None:
        return
    for item in divisors:
        if isinstance(item, Layer):
            item.scale_outputs(program, 1 / factor)
        else:
            multiply(program.tensor(item), 1 / factor)


def _insert_division(program: Program, group: _Group, factor: Tensor | None) -> Tensor | None:
    """Multiply the activation by a buffer.

    Returns:
        The factor whose inverse the buffer holds, rounded to the weights' dtype as it is.
    """
    first = group.layers[0]
    weight = program.tensor(first.site.name)
    value = weight.new_empty(first.inputs) if factor is None else (1 / factor).to(weight.device, weight.dtype)
    name = _free_name(program, first.site.module)
    program.add_buffer(name, value)
    with program.graph.inserting_before(first.node):
        buffer = program.graph.create_node("get_attr", name)
    buffer.meta["val"] = value.to("meta")
    made: dict[fx.Node, fx.Node] = {}
    for layer in group.layers:
        if layer.x not in made:
            with program.graph.inserting_before(layer.node):
                made[layer.x] = program.graph.call_function(aten.mul.Tensor, (layer.x, buffer))
            made[layer.x].meta["val"] = layer.x.meta["val"]
        layer.node.update_arg(OPERATORS[layer.node.target].weight - 1, made[layer.x])
    return None if factor is None else 1 / value.double()


def _free_name(program: Program, module: str) -> str:
    """``<module>.input_smoothing``, or with a number behind it."""
    owner = program.get_submodule(module)
    leaves = (f"input_smoothing_{number}" if number else "input_smoothing" for number in itertools.count())
    leaf = next(name for name in leaves if not hasattr(owner, name))
    return f"{module}.{leaf}" if module else leaf
