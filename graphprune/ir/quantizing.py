"""Quantizers of a Program: a fake-quantize operator with the observer that feeds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from graphprune.ir import ops
from graphprune.ir.program import Program
from graphprune.quant.affine import choose_qparams
from graphprune.quant.observers import MinMax
from graphprune.quant.schemes import Scheme, parse_scheme

BUFFERS = ("low", "high", "scale", "zero_point")


@dataclass(frozen=True)
class Quantizer:
    """Decision on a fake-quantize operator. Annotated on its node.

    Attributes:
        scheme: Text of the scheme.
        prefix: Dotted name that its buffers start with.
        weight: Whether it quantizes a weight; else an activation.
    """

    scheme: str
    prefix: str = field(repr=False)
    weight: bool = field(repr=False)


def quantizers(program: Program) -> Iterator[tuple[fx.Node, Quantizer]]:
    """All fake-quantize operators with their decisions, in graph order."""
    for node in program.calls(ops.fake_quantize):
        yield node, program.annotation(node, Quantizer)  # type: ignore[misc]


def insert_quantizer(program: Program, value: fx.Node, decision: Quantizer, momentum: float) -> fx.Node:
    """Put an observer and a fake-quantize operator behind a value; the caller makes users use it.

    Args:
        program: Mutated: two nodes and four buffers are added.
        value: What to quantize.
        decision: Scheme and names.
        momentum: Share of each new batch in the observed range, in (0, 1].

    Returns:
        The fake-quantize node.
    """
    scheme = parse_scheme(decision.scheme)
    example = value.meta["val"]
    channels = None if scheme.axis is None else int(example.shape[scheme.axis])
    anchor = next(program.parameters())
    low, high = MinMax(scheme.axis).initial(channels, device=anchor.device)
    zero_point = torch.zeros_like(low, dtype=torch.int32)
    tensors = dict(zip(BUFFERS, (low, high, torch.ones_like(low), zero_point), strict=True))
    nodes = {}
    with program.graph.inserting_after(value):
        for kind, tensor in tensors.items():
            program.add_buffer(f"{decision.prefix}_{kind}", tensor)
            nodes[kind] = program.graph.create_node("get_attr", f"{decision.prefix}_{kind}")
            with torch.utils._python_dispatch._disable_current_modes():
                nodes[kind].meta["val"] = tensor.to("meta")
    observing = program.attribute("observing")
    if observing is None:
        with program.graph.inserting_before(next(iter(program.graph.nodes))):
            observing = program.graph.create_node("get_attr", "observing")
    last = next(iter(nodes.values()))
    with program.graph.inserting_after(last):
        fake = program.graph.call_function(
            ops.fake_quantize,
            (
                value, nodes["scale"], nodes["zero_point"], scheme.qmin, scheme.qmax,
                -1 if scheme.axis is None else scheme.axis,
            ),
        )  # fmt: skip
        observe = program.graph.call_function(
            ops.observe, (value, *nodes.values(), observing, decision.scheme, momentum)
        )
    fake.meta["val"] = example
    assert observe.next is fake
    program.annotate(fake, decision)
    return fake


@torch.no_grad()
def set_weight_range(program: Program, prefix: str, weight: torch.Tensor, scheme: Scheme) -> None:
    """Set a weight quantizer's range, scale and zero-point from the weight as it is now."""
    low, high = MinMax(scheme.axis).update(None, None, weight)
    scale, zero_point = choose_qparams(low, high, scheme)
    owner, _, leaf = prefix.rpartition(".")
    buffers = program.get_submodule(owner)._buffers
    for kind, value in zip(BUFFERS, (low, high, scale, zero_point), strict=True):
        buffer = buffers.get(f"{leaf}_{kind}")
        if buffer is not None:  # the range is gone once it is frozen
            buffer.copy_(value)
