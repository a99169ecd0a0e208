"""Store sparse linear layers without their zeros, and multiply by what is left.

Before: ``linear(x, w, b)``.  After: ``sparse_linear(pack(x), values, columns, starts, b)``.
Before: ``linear(fake_quantize(x), fake_quantize(w), b)``, uint8 by int8.  After: ``sparse_linear_int8(pack_bytes(x), ...)``.
Layers that read the same value share its panels.  The operators, and what a panel is: ``graphprune/ir/sparse_operators.py``.

Floats are equal up to the order of sums. Integers are exact: the sums are those of int8, and the float result is theirs times the scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.errors import PassError
from graphprune.ir import ops
from graphprune.ir.calling import insert_call
from graphprune.ir.program import Program, argument, eliminate_dead
from graphprune.ir.properties import Property
from graphprune.ir.selection import Selection
from graphprune.ir.sites import Site
from graphprune.ir.sparse_operators import pack, pack_bytes, sparse_linear, sparse_linear_int8
from graphprune.pipeline.base import Coverage, Pass, PassResult
from graphprune.sparsity.layout import Layout, to_logical
from graphprune.sparsity.packed import choose_block, pack_matrix

aten = torch.ops.aten
_PARTS = ("values", "columns", "starts")


@dataclass(frozen=True)
class PackLinear(Pass):
    """Store the weights of sparse linear layers packed. For inference: packed weights have no gradient.

    Attributes:
        at_least: Fraction of zeros below which a layer stays dense.
        select: As for ``find-prunable``.
        exclude: As for ``find-prunable``.
        storage: ``float32``, or ``bfloat16`` for half the bytes of weights that are not quantized; products and sums stay float32.
    """

    name = "pack-linear"
    forbids = Property.PARTITIONED | Property.MASKED | Property.OBSERVED

    at_least: float = 0.6
    select: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    storage: str = "float32"

    def __post_init__(self) -> None:
        if self.storage not in ("float32", "bfloat16"):
            raise PassError(f"storage={self.storage} is neither float32 nor bfloat16")
        if not 0 <= self.at_least <= 1:
            raise PassError(f"at_least={self.at_least} is not in [0, 1]")

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        """Rewrite the layers; weights that nothing uses any more are removed."""
        sites, excluded = Selection(self.select, self.exclude, include_last=True).split(program)
        left_out = {item.name: item.reason for item in excluded}
        matched, stored, entries = [], 0, 0
        for site in sites:
            reason = self._obstacle(program, site)
            if reason is not None:
                left_out[site.name] = reason
                continue
            stored += _pack_site(program, site, self.storage)
            entries += site.parameters
            matched.append(site.name)
        if matched:
            eliminate_dead(program.graph)
            for name in matched:
                if program.attribute(name) is None:
                    module, _, leaf = name.rpartition(".")
                    delattr(program.get_submodule(module), leaf)
            program.recompile()
        stats = {"packed": len(matched), "entries": entries, "stored": stored}
        return PassResult(program, bool(matched), stats, Coverage(tuple(matched), left_out))

    def _obstacle(self, program: Program, site: Site) -> str | None:
        """Why a layer stays as it is."""
        if site.layout is Layout.CONV:
            return f"{site.op}: packed weights are of linear layers"
        weight = program.tensor(site.name)
        if weight.dtype is not torch.float32:
            return f"{weight.dtype}: kernels take float32 and int8"
        if site.shape[1] > 2**16:
            return f"{site.shape[1]} inputs: columns are numbers of 16 bits"
        if not weight.numel():
            return "it has no weights"
        zeros = 1 - float(weight.count_nonzero()) / weight.numel()
        if zeros < self.at_least:
            return f"{zeros:.1%} of its weights are zero, less than at_least={self.at_least}"
        uses = [_node(program, use) for use in site.uses]
        if len({_parts(use)[1].target is ops.fake_quantize for use in uses}) > 1:
            return "it is quantized for one of its operators and not for another"
        return next((reason for use in uses if (reason := _unfit(program, use)) is not None), None)


def _node(program: Program, name: str) -> fx.Node:
    found: fx.Node = next(node for node in program.graph.nodes if node.name == name)
    return found


def _parts(node: fx.Node) -> tuple[fx.Node, fx.Node, Any]:
    """Activation, weight and bias of a linear operator."""
    if node.target is aten.addmm.default:
        return argument(node, 1), argument(node, 2), node.args[0]
    return argument(node, 0), argument(node, 1), node.args[2] if len(node.args) > 2 else None


def _unfit(program: Program, node: fx.Node) -> str | None:
    """Why one use of a weight cannot be packed."""
    activation, weight, bias = _parts(node)
    if node.kwargs:
        return "its operator scales the bias or the product"
    if bias is not None and (bias.op != "get_attr" or bias.meta["val"].dim() != 1):
        return "its bias is no vector of the model"
    if weight.target is not ops.fake_quantize:
        return None if weight.op == "get_attr" else f"{weight.target} lies between it and its operator"
    if activation.target is not ops.fake_quantize:
        return "its activations are not quantized, or at run time, and there is no sparse kernel for that"
    bounds, scale = activation.args[3:5], _quantizer(program, activation)[0]
    if tuple(bounds) != (0, 255) or scale.numel() != 1:
        return f"its activations are quantized to {tuple(bounds)}; the kernels take uint8:affine:tensor"
    low, high = weight.args[3:5]
    axis, group = (weight.args[at] if at < len(weight.args) else default for at, default in ((5, -1), (6, 0)))
    signed = isinstance(low, int) and isinstance(high, int) and -128 <= low < 0 < high <= 127
    if not signed or group or _quantizer(program, weight)[1].any():
        return "it is not quantized by int8:symmetric; the kernels take that, with a scale a row or one"
    rows = 1 if node.target in (aten.addmm.default, aten.mm.default, aten.matmul.default) else 0
    return None if axis in (-1, rows) else "it has a scale for each input"


def _quantizer(program: Program, node: fx.Node) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of a quantizer."""
    scale, zero_point = (program.tensor(str(argument(node, at).target)).detach() for at in (1, 2))
    return scale, zero_point


def _pack_site(program: Program, site: Site, storage: str) -> int:
    """Pack a weight and rewrite all its uses. Returns how many entries are stored."""
    weight = to_logical(program.tensor(site.name), site.layout).contiguous()
    uses = [_node(program, use) for use in site.uses]
    quantizer = _parts(uses[0])[1]
    quantized = quantizer.target is ops.fake_quantize
    scales = torch.ones(len(weight))
    if quantized:
        scales = _quantizer(program, quantizer)[0].float().reshape(-1).expand(len(weight))
        bounds: Any = quantizer.args[3:5]
        weight = torch.round(weight / scales.unsqueeze(1)).clamp_(*bounds).to(torch.int8)
    packed = pack_matrix(weight, choose_block(weight))
    values = packed.values if quantized else packed.values.to(getattr(torch, storage))
    parts = {"values": values, "columns": packed.columns, "starts": packed.starts}
    for name, value in parts.items():
        program.add_buffer(f"{site.name}_{name}", value)
    for number, node in enumerate(uses):
        own = f"{site.name}_{number}" if number else site.name
        result = (
            _write_integers(program, node, site.name, own, weight, scales)
            if quantized
            else _write_floats(program, node, site.name, len(weight))
        )
        node.replace_all_uses_with(result)
        program.graph.erase_node(node)
    return values.numel()


def _attributes(program: Program, names: list[str]) -> list[fx.Node]:
    nodes = []
    for name in names:
        nodes.append(program.graph.get_attr(name))
        nodes[-1].meta["val"] = program.tensor(name).to("meta")
    return nodes


def _sizes(program: Program, node: fx.Node, activation: fx.Node) -> list[Any]:
    """Sizes of the tokens: numbers, or operators that read them where they are free."""
    shape = activation.meta["val"].shape[:-1]
    return [
        size if isinstance(size, int) else insert_call(program.graph, node, aten.sym_size.int, activation, dim)
        for dim, size in enumerate(shape)
    ]


def _panels(program: Program, node: fx.Node, activation: fx.Node, target: Any, *options: float) -> fx.Node:
    """The panels of a value: those that there are, or new ones right behind it."""
    for user in activation.users:
        if user.target is target and user.args == (activation, *options):
            return user
    with program.graph.inserting_after(activation):
        return insert_call(program.graph, node, target, activation, *options)


def _write_floats(program: Program, node: fx.Node, name: str, rows: int) -> fx.Node:
    activation, _, bias = _parts(node)
    panels = _panels(program, node, activation, pack)
    with program.graph.inserting_before(node):
        parts = _attributes(program, [f"{name}_{part}" for part in _PARTS])
        sizes = _sizes(program, node, activation)
        return insert_call(program.graph, node, sparse_linear, panels, *parts, bias, None, sizes, rows)


def _write_integers(program: Program, node: fx.Node, name: str, own: str, weight: Tensor, scales: Tensor) -> fx.Node:
    """``name`` begins the buffers of the weight, ``own`` those of this use, whose activations have their own scale."""
    activation, _, bias = _parts(node)
    value = argument(activation, 0)
    step, zero = (item.item() for item in _quantizer(program, activation))
    program.add_buffer(f"{own}_correction", (weight.sum(dim=1, dtype=torch.int64) * int(zero)).to(torch.int32))
    program.add_buffer(f"{own}_scales", (scales * step).contiguous())
    panels = _panels(program, node, value, pack_bytes, step, int(zero))
    with program.graph.inserting_before(node):
        parts = _attributes(program, [*(f"{name}_{part}" for part in _PARTS), f"{own}_correction", f"{own}_scales"])
        sizes = _sizes(program, node, value)
        return insert_call(program.graph, node, sparse_linear_int8, panels, *parts, bias, None, sizes, len(weight))
