"""Write quantizers as the quantize and dequantize operators that Inductor turns into integer kernels.

Before: ``linear(fake_quantize(x, s, z, 0, 255), fake_quantize(w, ws, wz, -127, 127, 0), b)``.
After: ``linear(dequantize_per_tensor(quantize_per_tensor(x, s, z), s, z), dequantize_per_channel(w_integers, ws, wz, 0), b)``.

Inductor's x86 patterns (``torch/_inductor/fx_passes/quantization.py``) make ``onednn.qlinear_pointwise`` and ``onednn.qconv_pointwise`` of
that: activations of 8 bits with one scale, weights int8 with zero-point 0 and a scale a channel, and a dequantize for each use, because
the pattern wants its own. ``addmm(b, x, w)`` with ``w`` stored ``[in, out]`` becomes such a ``linear`` too.

A weight that has no integer kernel (its activation is not quantized, it has zero-points, a convolution with dynamic activations) keeps the
values of its grid in float, because Inductor would dequantize it again at every call. Embedding tables of 8 bits stay integers: only the
rows that are looked up are dequantized.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from graphprune.errors import LoweringError
from graphprune.ir import ops
from graphprune.ir.interface import is_label
from graphprune.ir.origin import origin
from graphprune.ir.program import Program, eliminate_dead
from graphprune.ir.sites import OPERATORS, attribute_behind
from graphprune.sparsity.layout import Layout

aten = torch.ops.aten
_BYTES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
_NATIVE = frozenset({"aten", "prims", "prim", "quantized_decomposed", "onednn", "mkldnn"})
"""Namespaces whose operators run without Python."""


def integers_of(scale: str) -> str:
    """Name of the integers of a weight, by the name of its scale."""
    return f"{scale.removesuffix('_scale')}_integers"


def inference_copy(program: Program, also: tuple[object, ...] = ()) -> tuple[Program, tuple[str, ...]]:
    """A copy in eval mode, without the loss, that answers with a tuple of its tensors, and their names.

    Args:
        program: Left as it is.
        also: Operators of no namespace of torch's that have kernels where the package runs.

    Raises:
        LoweringError: A mask, gate or observer is left, or an operator needs Python to run.
    """
    program = copy.deepcopy(program).eval()
    labels = frozenset(name for name in program.interface.names if is_label(name))
    if labels:
        program.drop_inputs(labels)
    for node in program.calls(ops.mask, ops.observe, ops.gate):
        raise LoweringError(f"{origin(node)} is left in the graph; run fold-masks and freeze-quant first")
    for node in program.nodes():
        target = node.target
        ours = target in (ops.fake_quantize, ops.dynamic_fake_quantize, *also)
        if isinstance(target, torch._ops.OpOverload) and target.namespace not in _NATIVE and not ours:
            raise LoweringError(
                f"{origin(node)} is an operator of {target.namespace}, which a package that runs without Python cannot call; write it with "
                f"operators of torch, or choose another target"
            )
    leaves = program.output.args[0]
    assert isinstance(leaves, (tuple, list))
    kept = [(name, leaf) for name, leaf in zip(program.interface.output_names, leaves, strict=True) if leaf is not None]
    program.output.args = (tuple(leaf for _, leaf in kept),)
    program.interface = dataclasses.replace(program.interface, output=pytree.tree_structure((0,) * len(kept)))
    program.recompile()
    return program, tuple(name for name, _ in kept)


def use_integers(program: Program) -> dict[str, int]:
    """Rewrite all quantizers; see the module.

    Args:
        program: From ``inference_copy``; mutated: integers of weights become buffers, scales of one value get one a channel.

    Returns:
        At how many places what was done: ``integer-weights``, ``float-weights``, ``integer-tables``, ``quantized-values``.

    Raises:
        LoweringError: A number format that has no form here.
    """
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers quantized_decomposed
    counts = dict.fromkeys(("integer-weights", "float-weights", "integer-tables", "quantized-values"), 0)
    for node in list(program.calls(ops.fake_quantize)):
        if attribute_behind(node) is not None:
            _rewrite_weight(program, node, counts)
    for node in list(program.calls(ops.fake_quantize)):
        _rewrite_value(program, node)
        counts["quantized-values"] += 1
    for node in list(program.calls(ops.dynamic_fake_quantize)):
        _rewrite_dynamic(program, node)
        counts["quantized-values"] += 1
    eliminate_dead(program.graph)
    program.recompile()
    return counts


def _rewrite_weight(program: Program, node: fx.Node, counts: dict[str, int]) -> None:
    weight, scale, zero_point, low, high, *rest = cast(tuple[Any, ...], node.args)
    axis, group = rest[0] if rest else -1, rest[1] if len(rest) > 1 else 0
    if group or ((low, high) not in ((0, 255), (0, 127)) and not (low <= -64 and high <= 127)):
        raise LoweringError(
            f"{weight.target} is quantized to {low} to {high}{' in groups' if group else ''}; Inductor's integer kernels "
            f"take 8 bits with a scale a channel: plan int8:symmetric:channel"
        )
    symmetric = low < 0 and not bool(program.tensor(str(zero_point.target)).any())
    for user in list(node.users):
        form = _form(user, node, axis, symmetric)
        if form is None:
            user.replace_input_with(node, weight)
            counts["float-weights"] += 1
            continue
        integers = _integers(program, node, form is Layout.IN_OUT)
        with program.graph.inserting_before(user):
            attributes = [program.graph.get_attr(integers)]
            attributes += [program.graph.get_attr(str(item.target)) for item in (scale, zero_point)]
            dtype = program.tensor(integers).dtype
            table = program.graph.call_function(
                torch.ops.quantized_decomposed.dequantize_per_channel.default,
                (*attributes, 0, *_BYTES[dtype], dtype),
            )
            if form is Layout.IN_OUT:
                _make_linear(program, user, node, table)
            else:
                user.replace_input_with(node, table)
        counts["integer-tables" if user.target is aten.embedding.default else "integer-weights"] += 1
    program.graph.erase_node(node)


def _form(user: fx.Node, weight: fx.Node, axis: int, symmetric: bool) -> Layout | None:
    """How an operator would read a weight's integers; None where it has no integer kernel for them."""
    if user.target is aten.embedding.default:
        return Layout.OUT_IN if axis in (0, -1) else None
    operator = OPERATORS.get(user.target)
    if operator is None or user.args[operator.weight] is not weight or not symmetric or "conv3d" in operator.name:
        return None
    activation = user.args[1 if user.target is aten.addmm.default else 0]
    static = isinstance(activation, fx.Node) and activation.target is ops.fake_quantize
    dynamic = isinstance(activation, fx.Node) and activation.target is ops.dynamic_fake_quantize
    rows = 1 if operator.layout is Layout.IN_OUT else 0
    if axis not in (rows, -1) or not (static or (dynamic and operator.layout is not Layout.CONV)):
        return None
    if user.target is aten.addmm.default and user.kwargs:
        return None  # beta and alpha
    return operator.layout


def _integers(program: Program, node: fx.Node, transposed: bool) -> str:
    """Make a weight's integers, and scale and zero-point of each row, buffers; once. Returns the integers' name."""
    arguments = cast(tuple[Any, ...], node.args)
    weight, scale, zero_point = (str(item.target) for item in arguments[:3])
    name = integers_of(scale)
    if any(name == known for known, _ in program.named_buffers()):
        return name
    low, high = arguments[3:5]
    axis = arguments[5] if len(arguments) > 5 else -1
    values = program.tensor(weight).detach().float()
    if transposed:
        values = values.t()
    scales, zeros = program.tensor(scale).detach().float(), program.tensor(zero_point)
    if axis == -1:
        scales, zeros = (item.reshape(1).repeat(values.shape[0]) for item in (scales, zeros))
        for known, item in ((scale, scales), (zero_point, zeros)):
            program.remove_buffer(known)
            program.add_buffer(known, item)
    along = (-1, *([1] * (values.dim() - 1)))
    grid = torch.round(values / scales.view(along)).add_(zeros.view(along)).clamp_(low, high)
    program.add_buffer(name, grid.to(torch.int8 if low < 0 else torch.uint8).contiguous())
    return name


def _make_linear(program: Program, user: fx.Node, weight: fx.Node, table: fx.Node) -> None:
    """Put ``linear(x, table, b)`` in place of ``addmm(b, x, w)``, ``mm(x, w)`` or ``matmul(x, w)``."""
    bias, value = (user.args[0], user.args[1]) if user.target is aten.addmm.default else (None, user.args[0])
    linear = program.graph.call_function(aten.linear.default, (value, table, bias))
    linear.meta = dict(user.meta)
    user.replace_all_uses_with(linear)
    program.graph.erase_node(user)


def _rewrite_value(program: Program, node: fx.Node) -> None:
    """Quantize a value once and dequantize it for each use."""
    value, scale, zero_point, low, high, *rest = cast(tuple[Any, ...], node.args)
    bounds = (low, high)
    if (rest and rest[0] != -1) or min(bounds) < -128 or max(bounds) > 255 or (bounds[0] < 0 and bounds[1] > 127):
        raise LoweringError(
            f"{origin(value)} is quantized to {low} to {high} along {rest}; Inductor's integer kernels take values of 8 "
            f"bits with one scale: plan uint8:affine:tensor"
        )
    step, zero = (program.tensor(str(item.target)).item() for item in (scale, zero_point))
    dtype = torch.uint8 if bounds[0] >= 0 else torch.int8
    graph = program.graph
    with graph.inserting_before(node):
        wide = _wide(graph, value)
        if bounds not in (_BYTES[dtype], (-127, 127)):  # a kernel that quantizes its result knows whole bytes only
            limits = ((bounds[0] - zero) * step, (bounds[1] - zero) * step)
            wide = graph.call_function(aten.clamp.default, (wide, *limits))
        quantized = graph.call_function(
            torch.ops.quantized_decomposed.quantize_per_tensor.default, (wide, step, int(zero), *_BYTES[dtype], dtype)
        )
    _dequantize(
        program, node, torch.ops.quantized_decomposed.dequantize_per_tensor.default, (quantized, step, int(zero)), dtype
    )


def _rewrite_dynamic(program: Program, node: fx.Node) -> None:
    """Quantize a value by its own range, with the arithmetic of ``graphprune.quant.affine.dynamic_qparams``."""
    value = node.args[0]
    assert isinstance(value, fx.Node)
    graph = program.graph
    with graph.inserting_before(node):
        wide = _wide(graph, value)
        below = graph.call_function(aten.clamp.default, (graph.call_function(aten.amin.default, (wide,)), None, 0.0))
        above = graph.call_function(aten.clamp.default, (graph.call_function(aten.amax.default, (wide,)), 0.0))
        width = graph.call_function(aten.sub.Tensor, (above, below))
        scale = graph.call_function(aten.div.Tensor, (width, 255.0))
        empty = graph.call_function(aten.eq.Scalar, (scale, 0.0))
        scale = graph.call_function(aten.masked_fill.Scalar, (scale, empty, 1.0))
        steps = graph.call_function(aten.div.Tensor, (graph.call_function(aten.neg.default, (below,)), scale))
        zero = graph.call_function(aten.round.default, (graph.call_function(aten.clamp.default, (steps, 0.0, 255.0)),))
        zero = graph.call_function(aten.to.dtype, (zero, torch.int64))
        quantized = graph.call_function(
            torch.ops.quantized_decomposed.quantize_per_tensor.tensor, (wide, scale, zero, 0, 255, torch.uint8)
        )
    _dequantize(
        program,
        node,
        torch.ops.quantized_decomposed.dequantize_per_tensor.tensor,
        (quantized, scale, zero),
        torch.uint8,
    )


def _dequantize(
    program: Program, node: fx.Node, operator: object, arguments: tuple[object, ...], dtype: torch.dtype
) -> None:
    """Give each user of a quantizer a dequantize operator of its own, and erase the quantizer."""
    graph = program.graph
    for user in list(node.users):
        with graph.inserting_before(user):
            value = graph.call_function(operator, (*arguments, *_BYTES[dtype], dtype))  # type: ignore[arg-type]
            kind = _dtype(node)
            if kind is not torch.float32:
                value = graph.call_function(aten.to.dtype, (value, kind))
        user.replace_input_with(node, value)
    graph.erase_node(node)


def _wide(graph: fx.Graph, value: fx.Node) -> fx.Node:
    return value if _dtype(value) is torch.float32 else graph.call_function(aten.to.dtype, (value, torch.float32))


def _dtype(node: fx.Node) -> torch.dtype:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else torch.float32
