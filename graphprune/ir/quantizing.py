"""Quantizers of a Program: observers that record ranges, and the fake-quantize operators that use them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from graphprune.errors import PassError
from graphprune.ir import ops
from graphprune.ir.masking import masked_sites
from graphprune.ir.program import Program, device_of
from graphprune.ir.quant_operators import bound_observer, write_qparams
from graphprune.ir.quant_plan import DYNAMIC, RESULT, Operand, QuantPlan, planned
from graphprune.ir.quantizable import result_of
from graphprune.ir.sites import attribute_behind
from graphprune.quant.observer_text import parse_observer
from graphprune.quant.observers import State
from graphprune.quant.schemes import parse_scheme
from graphprune.sparsity.windows import Time

RANGE = ("low", "high", "histogram")
"""Buffers of an observer, which freezing takes away."""
QPARAMS = ("scale", "zero_point")
_REQUIRED = 7
"""Position of ``required`` among the arguments of ``observe``."""


@dataclass(frozen=True)
class Quantizer:
    """Decision on an observer and on a fake-quantize operator. Annotated on their nodes.

    Attributes:
        scheme: Text of the scheme, or ``DYNAMIC``.
        prefix: Dotted name that its buffers start with.
        weight: Whether it quantizes a weight; else an activation.
        observer: Text of the observer.
    """

    scheme: str
    prefix: str = field(repr=False)
    weight: bool = field(repr=False)
    observer: str = field(default="min-max", repr=False)


@dataclass(frozen=True)
class Dequantized:
    """Record on a weight's node, left by ``remove-quant``.

    Attributes:
        scheme: Text of the scheme whose grid the weight lies on; "" where it was not quantized.
        quantized_inputs: Whether an operator that uses it read a quantized activation, which is float now.
    """

    scheme: str
    quantized_inputs: bool


@dataclass(frozen=True)
class FreezeTimes:
    """Annotation on the output: lengths of training after which something is frozen; None = never."""

    freeze_observers: Time | None = None
    freeze_batch_norm: Time | None = None


@dataclass(frozen=True)
class Wanted:
    """A value that is to be quantized.

    Attributes:
        value: The value.
        operand: How.
        uses: Where the quantized value goes: ``(user, position)``; None stands for every user.
        owner: The operator that asked first.
        asked_by: Its name in the plan.
    """

    value: fx.Node
    operand: Operand
    uses: tuple[tuple[fx.Node, int], ...] | None
    owner: fx.Node
    asked_by: str


def quantizers(program: Program) -> Iterator[tuple[fx.Node, Quantizer]]:
    """All fake-quantize operators with fixed or learned scales, with their decisions, in graph order."""
    for node in program.calls(ops.fake_quantize):
        yield node, program.annotation(node, Quantizer)  # type: ignore[misc]


def observers(program: Program) -> Iterator[tuple[fx.Node, Quantizer]]:
    """All observers with their decisions, in graph order."""
    for node in program.calls(ops.observe):
        yield node, program.annotation(node, Quantizer)  # type: ignore[misc]


def wanted_values(program: Program) -> list[Wanted]:
    """What the plan asks for, one entry a value and scheme, in graph order of the operators."""
    found: dict[tuple[fx.Node, str, str], Wanted] = {}
    for node, plan in planned(program):
        for operand in plan.operands:
            value, uses = _value(node, operand)
            key = value, operand.scheme, operand.observer
            before = found.get(key)
            if before is None:
                found[key] = Wanted(value, operand, uses, node, plan.name)
            else:
                both = None if uses is None or before.uses is None else (*before.uses, *uses)
                found[key] = replace(before, uses=both)
    return list(found.values())


def _value(node: fx.Node, operand: Operand) -> tuple[fx.Node, tuple[tuple[fx.Node, int], ...] | None]:
    if operand.position == RESULT:
        return _unquantized(result_of(node)), None
    value = node.args[operand.position]
    assert isinstance(value, fx.Node)
    return _unquantized(value), None if operand.weight else ((node, operand.position),)


def _unquantized(value: fx.Node) -> fx.Node:
    """The value in front of a quantizer."""
    while value.target in (ops.fake_quantize, ops.dynamic_fake_quantize):
        value = value.all_input_nodes[0]
    return value


def find_observer(wanted: Wanted, program: Program) -> fx.Node | None:
    """The observer that a value has already for this scheme."""
    return _of_scheme(wanted, program, ops.observe)


def find_quantizer(wanted: Wanted, program: Program) -> fx.Node | None:
    """The fake-quantize operator that a value has already for this scheme."""
    return _of_scheme(wanted, program, ops.fake_quantize, ops.dynamic_fake_quantize)


def _of_scheme(wanted: Wanted, program: Program, *targets: object) -> fx.Node | None:
    for user in wanted.value.users:
        if user.target in targets and user.args[0] is wanted.value:
            decision = program.annotation(user, Quantizer)
            if decision is not None and (decision.scheme, decision.observer) == (
                wanted.operand.scheme, wanted.operand.observer,
            ):  # fmt: skip
                return user
    return None


def quantize_planned(program: Program) -> tuple[list[Wanted], int]:
    """Insert a quantizer, and an observer where its scale is fixed, for each planned value that has none.

    Args:
        program: Mutated; observers that are there, with what they recorded, are used.

    Returns:
        ``(inserted, moved)``: the values that are quantized now, and how many places read a quantizer that was there before.
    """
    inserted: list[Wanted] = []
    moved = 0
    for wanted in wanted_values(program):
        known = find_quantizer(wanted, program)
        if known is not None:
            moved += redirect(wanted, known)
            continue
        observer = None
        if wanted.operand.scheme != DYNAMIC:
            observer = find_observer(wanted, program) or insert_observer(program, wanted)
        insert_quantizer(program, wanted, observer)
        inserted.append(wanted)
    return inserted, moved


def insert_observer(program: Program, wanted: Wanted) -> fx.Node:
    """Put an observer behind a value; nothing is quantized by it yet.

    Args:
        program: Mutated: a node and four or five buffers are added. A weight's range is set from the weight.
        wanted: The value.

    Returns:
        The observer.
    """
    value, operand = wanted.value, wanted.operand
    scheme = parse_scheme(operand.scheme)
    prefix = _weight_name(wanted) if operand.weight else _free_prefix(program, wanted)
    decision = Quantizer(operand.scheme, prefix, operand.weight, operand.observer)
    watching = parse_observer(operand.observer) if operand.weight else bound_observer(operand.observer, operand.scheme)
    shape = scheme.qparams_shape(tuple(value.meta["val"].shape))
    state = watching.initial(shape, device=device_of(program))
    tensors: dict[str, Tensor] = {"low": state.low, "high": state.high}
    if watching.bins and not operand.weight:
        tensors["histogram"] = state.histogram
    tensors |= {"scale": torch.ones_like(state.low), "zero_point": torch.zeros_like(state.low, dtype=torch.int32)}
    nodes: dict[str, fx.Node] = {}
    with program.graph.inserting_after(value):  # each right behind the value, so that the first stands last
        for kind, tensor in tensors.items():
            program.add_buffer(f"{prefix}_{kind}", tensor)
            nodes[kind] = program.graph.create_node("get_attr", f"{prefix}_{kind}")
            nodes[kind].meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    flag: fx.Node | bool = False  # a weight's range that is dear to find stays as it is until freezing
    if watching.live or not operand.weight:
        flag = _flag(program, "observing" if watching.live else "calibrating")
    with program.graph.inserting_after(nodes["low"]):
        inputs = tuple(nodes.get(kind) for kind in (*RANGE, *QPARAMS))
        node = program.graph.call_function(
            ops.observe, (value, *inputs, flag, False, operand.scheme, operand.observer, prefix)
        )
    program.annotate(node, decision)
    _settle(node, wanted)
    if operand.weight and not program.tensor(prefix).is_meta:
        set_weight_range(program, decision)
    return node


def insert_quantizer(program: Program, wanted: Wanted, observer: fx.Node | None) -> fx.Node:
    """Quantize a value by what its observer finds, and let its users read the quantized value.

    Args:
        program: Mutated: a node is added and users are redirected.
        wanted: The value.
        observer: From ``insert_observer``; None where the range is that of each value.

    Returns:
        The fake-quantize operator.
    """
    value = wanted.value
    if observer is None:
        with program.graph.inserting_after(value):
            fake = program.graph.call_function(ops.dynamic_fake_quantize, (value, 0, 255))
        decision = Quantizer(DYNAMIC, "", weight=False, observer=wanted.operand.observer)
    else:
        decision = program.annotation(observer, Quantizer)  # type: ignore[assignment]
        scheme = parse_scheme(decision.scheme)
        axis = -1 if scheme.axis is None else scheme.axis
        group = (scheme.group,) if scheme.group else ()
        with program.graph.inserting_after(observer):
            fake = program.graph.call_function(
                ops.fake_quantize, (value, *observer.args[4:6], scheme.qmin, scheme.qmax, axis, *group)
            )
        observer.update_arg(_REQUIRED, True)
    fake.meta["val"] = value.meta["val"]
    program.annotate(fake, decision)
    _settle(fake, wanted)
    redirect(wanted, fake)
    return fake


def _settle(node: fx.Node, wanted: Wanted) -> None:
    """Say that a node belongs where the operator that asked for it does; so its buffers and it come into the same block."""
    if "nn_module_stack" in wanted.owner.meta:
        node.meta["nn_module_stack"] = wanted.owner.meta["nn_module_stack"]


def redirect(wanted: Wanted, fake: fx.Node) -> int:
    """Let the users of a value read its quantized form.

    Returns:
        How many places changed.
    """
    if wanted.uses is None:
        quantizing = (ops.observe, ops.fake_quantize, ops.dynamic_fake_quantize)
        users = [user for user in wanted.value.users if user.target not in quantizing]
        for user in users:
            user.replace_input_with(wanted.value, fake)
        return len(users)
    changed = [(user, place) for user, place in wanted.uses if user.args[place] is not fake]
    for user, place in changed:
        user.update_arg(place, fake)
    return len(changed)


@torch.no_grad()
def set_weight_range(program: Program, decision: Quantizer) -> None:
    """Set a weight quantizer's range, scale and zero-point from the weight as it is now, under its mask.

    Raises:
        PassError: The weight has NaN or infinite entries; names it.
    """
    weight = program.tensor(decision.prefix).detach()
    mask = next((site.mask for site in masked_sites(program) if site.name == decision.prefix), None)
    if mask is not None and int(torch.count_nonzero(mask)) < mask.numel():
        weight = weight * mask.view(torch.uint8)
    scheme = parse_scheme(decision.scheme)
    try:
        low, high = parse_observer(decision.observer).tensor_range(weight, scheme)
    except PassError as error:
        raise PassError(f"{decision.prefix}: {error}") from None
    held = _buffers(program, decision.prefix)
    for kind, found in (("low", low), ("high", high)):
        if kind in held:  # the range is gone once it is frozen
            held[kind].copy_(found)
    write_qparams(held["scale"], held["zero_point"], (low, high), scheme)


@torch.no_grad()
def read_observers(program: Program) -> None:
    """Set scales from observers that are read once, at the end of calibration. Weights and unseen values are left as they are."""
    for _, decision in observers(program):
        if decision.weight:
            continue
        watching = bound_observer(decision.observer, decision.scheme)
        held = _buffers(program, decision.prefix)
        if watching.live or held["low"].is_meta or bool((held["low"] > held["high"]).any()):
            continue
        state = State(held["low"], held["high"], held["histogram"])
        scheme = parse_scheme(decision.scheme)
        write_qparams(held["scale"], held["zero_point"], watching.range(state, scheme), scheme)


def unseen(program: Program) -> list[str]:
    """Names of observed activations that have seen no data."""
    names = []
    for _, decision in observers(program):
        held = _buffers(program, decision.prefix)
        if not decision.weight and not held["low"].is_meta and bool((held["low"] > held["high"]).any()):
            names.append(decision.prefix)
    return names


def _buffers(program: Program, prefix: str) -> Mapping[str, Tensor]:
    owner, _, leaf = prefix.rpartition(".")
    buffers = program.get_submodule(owner)._buffers
    found = {kind: buffers.get(f"{leaf}_{kind}") for kind in (*RANGE, *QPARAMS)}
    return {kind: tensor for kind, tensor in found.items() if tensor is not None}


def _flag(program: Program, name: str) -> fx.Node:
    flag = program.attribute(name)
    if flag is None:
        with program.graph.inserting_before(next(iter(program.graph.nodes))):
            flag = program.graph.create_node("get_attr", name)
    return flag


def _weight_name(wanted: Wanted) -> str:
    root = attribute_behind(wanted.value)
    assert root is not None
    return str(root.target)


def _free_prefix(program: Program, wanted: Wanted) -> str:
    """``<module>.input`` or ``<module>.output``, then ``<module>.input_1`` and so on; a name that no buffer has yet."""
    stack = list((wanted.owner.meta.get("nn_module_stack") or {}).values())
    module = str(stack[-1][0]) if stack else ""
    roots = [attribute_behind(item) for item in wanted.owner.args]
    module = next((str(root.target).rpartition(".")[0] for root in roots if root is not None), module)
    owner = program.get_submodule(module)
    stem = "output" if wanted.operand.position == RESULT else "input"
    names = (f"{stem}_{number}" if number else stem for number in itertools.count())
    leaf = next(name for name in names if not hasattr(owner, f"{name}_scale"))
    return f"{module}.{leaf}" if module else leaf


def annotate_plan(program: Program, plans: Mapping[fx.Node, QuantPlan]) -> tuple[fx.Node, ...]:
    """Record plans on their operators, where there is none yet.

    Returns:
        Operators that were not planned before.

    Raises:
        PassError: An operator, or a weight that it shares with another one, is planned in another way already; nothing was
            recorded.
    """
    known: dict[fx.Node | None, tuple[str, str]] = {}
    for node, plan in planned(program):
        known.update(_weight_schemes(node, plan))
    clashing = [
        plan.name
        for node, plan in plans.items()
        if program.annotation(node, QuantPlan) not in (None, plan)
        or any(known.get(root, wanted) != wanted for root, wanted in _weight_schemes(node, plan).items())
    ]
    if clashing:
        more = f" and {len(clashing) - 3} more" if clashing[3:] else ""
        raise PassError(
            f"{', '.join(clashing[:3])}{more}: asked for twice, in two ways; put both into one annotate-quant, with a rule"
        )
    new = tuple(node for node in plans if program.annotation(node, QuantPlan) is None)
    for node in new:
        program.annotate(node, plans[node])
    return new


def _weight_schemes(node: fx.Node, plan: QuantPlan) -> dict[fx.Node | None, tuple[str, str]]:
    """Scheme and observer of the weights of a planned operator."""
    return {
        attribute_behind(node.args[operand.position]): (operand.scheme, operand.observer)
        for operand in plan.operands
        if operand.weight
    }
