"""Check that a Program keeps its rules: those of every graph, and those of each property that it has."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from graphprune.errors import VerifyError
from graphprune.ir import ops
from graphprune.ir.blocks import FLAGS, Block, is_result, placeholders, results
from graphprune.ir.printer import numbered_lines
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.quant_plan import RESULT, planned
from graphprune.ir.quantizing import observers, quantizers
from graphprune.ir.sites import attribute_behind
from graphprune.quant.schemes import parse_scheme


def verify(program: Program) -> None:
    """Check a Program; every pass is followed by this.

    Raises:
        VerifyError: A rule is broken. The message names property, node and rule and shows the lines around it.
    """
    _check_blocks(program)
    for graph in program.graphs():
        _check_graph(program, graph)
    _check_interface(program)
    for flag, check in _CHECKS.items():
        if flag in program.properties:
            check(program)


def _fail(program: Program, rule: Property | str, node: fx.Node | None, message: str) -> VerifyError:
    name = "graph" if isinstance(rule, str) else str(rule)
    where = f" at {node.target if node.op == 'get_attr' else node.name}" if node is not None else ""
    return VerifyError(f"{name}{where}: {message}{_context(program, node)}")


def _context(program: Program, node: fx.Node | None) -> str:
    """The lines of IR around a node, where the Program still prints."""
    if node is None:
        return ""
    try:
        lines = numbered_lines(program)
    except (AttributeError, KeyError, ValueError, TypeError):
        return ""
    index = next((row for row, (shown, _) in enumerate(lines) if shown is node), 0)
    return "\n" + "\n".join(("> " if row == index else "  ") + lines[row][1] for row in _around(index, len(lines)))


def _around(index: int, count: int) -> range:
    return range(max(0, index - 3), min(count, index + 4))


def _check_blocks(program: Program) -> None:
    """Blocks are called once each, with as many values as they take, and read nothing but what lies in them and their inputs."""
    paths = [str(node.target) for node in program.graph.find_nodes(op="call_module")]
    for node in program.graph.find_nodes(op="call_module"):
        path = str(node.target)
        try:
            block = program.get_submodule(path)
        except AttributeError:
            raise _fail(program, "graph", node, f"no module has the name {path}") from None
        if not isinstance(block, Block):
            raise _fail(program, "graph", node, f"{path} is no block; partition-blocks makes blocks")
        if Property.PARTITIONED not in program.properties:
            raise _fail(program, "graph", node, "a Program with blocks has the property partitioned")
        if paths.count(path) > 1:
            raise _fail(program, Property.PARTITIONED, node, f"block {path} is called more than once")
        taken, given = len(placeholders(block.graph)), len(node.args)
        if taken != given or node.kwargs or len(node.all_input_nodes) != given:
            raise _fail(
                program,
                Property.PARTITIONED,
                node,
                f"block {path} takes {taken} values, each another one; {given} given",
            )
        if len(results(block.graph)) > 1 and not all(is_result(user) for user in node.users):
            raise _fail(
                program,
                Property.PARTITIONED,
                node,
                f"block {path} gives several results, and something uses them as one",
            )
        for item in block.graph.nodes:
            if item.op == "call_module":
                raise _fail(
                    program, Property.PARTITIONED, node, f"block {path} calls {item.target}; blocks do not nest"
                )
            if item.op == "get_attr" and item.target != "training" and not str(item.target).startswith(f"{path}."):
                raise _fail(program, Property.PARTITIONED, item, f"{item.target} lies outside of block {path}")


def _check_graph(program: Program, graph: fx.Graph) -> None:
    seen: set[fx.Node] = set()
    names: set[str] = set()
    outputs = 0
    for node in graph.nodes:
        if node.name in names:
            raise _fail(program, "graph", node, "two nodes have this name")
        names.add(node.name)
        for used in node.all_input_nodes:
            if used not in seen:
                raise _fail(program, "graph", node, f"uses {used.name} before it is computed")
        if node.op == "get_attr" and node.target not in FLAGS:
            _check_attribute(program, node)
        if node.target in ops.OURS and node.target is not ops.observe and not node.users:
            raise _fail(program, "graph", node, f"the result of {node.target} is not used")
        outputs += node.op == "output"
        seen.add(node)
    if outputs != 1:
        raise _fail(program, "graph", None, f"a graph has one output, this one has {outputs}")


def _check_interface(program: Program) -> None:
    inputs = tuple(node.target for node in placeholders(program.graph))
    if inputs != program.interface.names:
        raise _fail(program, "graph", None, f"inputs {inputs} differ from the interface {program.interface.names}")


def _check_attribute(program: Program, node: fx.Node) -> None:
    try:
        program.tensor(str(node.target))
    except AttributeError:
        raise _fail(program, "graph", node, "no parameter or buffer has this name") from None


def _buffer(program: Program, flag: Property, node: fx.Node, argument: object, role: str) -> Tensor:
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        raise _fail(program, flag, node, f"its {role} must be a buffer of the Program")
    return program.tensor(str(argument.target))


def _check_masked(program: Program) -> None:
    masks: dict[str, str] = {}
    weights: dict[str, str] = {}
    for node in program.calls(ops.mask):
        mask = _buffer(program, Property.MASKED, node, node.args[1], "mask")
        weight = node.args[0]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            raise _fail(program, Property.MASKED, node, "its first argument must be a weight")
        if mask.dtype != torch.bool:
            raise _fail(program, Property.MASKED, node, f"the mask is {mask.dtype}, not bool")
        if mask.shape != program.tensor(str(weight.target)).shape:
            raise _fail(program, Property.MASKED, node, "mask and weight differ in shape")
        name, owner = str(node.args[1].target), str(weight.target)  # type: ignore[union-attr]
        if masks.setdefault(owner, name) != name or weights.setdefault(name, owner) != owner:
            raise _fail(program, Property.MASKED, node, "a weight has one mask and a mask has one weight")


def _check_fake_quant(program: Program) -> None:
    for node, decision in quantizers(program):
        if decision is None:
            raise _fail(program, Property.FAKE_QUANT, node, "it carries no decision; insert it with insert-fake-quant")
        scale = _buffer(program, Property.FAKE_QUANT, node, node.args[1], "scale")
        zero_point = _buffer(program, Property.FAKE_QUANT, node, node.args[2], "zero-point")
        scheme = parse_scheme(decision.scheme)
        low, high = node.args[3:5]
        named = (scheme.qmin, scheme.qmax, -1 if scheme.axis is None else scheme.axis, scheme.group or 0)
        if (low, high, *_where(node)) != named:
            raise _fail(program, Property.FAKE_QUANT, node, f"it does not quantize by its scheme {scheme}")
        if scale.is_meta:
            continue
        smallest, largest = (float(bound) for bound in scale.aminmax())
        if not (smallest > 0 and largest < math.inf):
            raise _fail(program, Property.FAKE_QUANT, node, "scale must be finite and positive")
        smallest, largest = (float(bound) for bound in zero_point.aminmax())
        if not (low <= smallest and largest <= high):  # type: ignore[operator]
            raise _fail(program, Property.FAKE_QUANT, node, f"zero-point must lie in [{low}, {high}]")
        if scheme.symmetric and (smallest or largest):
            raise _fail(program, Property.FAKE_QUANT, node, "the zero-point of a symmetric scheme is 0")
        if scale.shape != zero_point.shape:
            raise _fail(program, Property.FAKE_QUANT, node, "scale and zero-point differ in shape")
        value = node.args[0].meta.get("val")  # type: ignore[union-attr]
        wanted = () if value is None else scheme.qparams_shape(tuple(value.shape))
        if value is not None and tuple(scale.shape) != wanted:
            raise _fail(
                program,
                Property.FAKE_QUANT,
                node,
                f"scale has shape {tuple(scale.shape)}, its scheme asks for {wanted}",
            )


def _where(node: fx.Node) -> tuple[object, object]:
    """Axis and group of a fake-quantize operator, -1 and 0 where they are left out."""
    given = node.args[5:]
    return (given[0] if given else -1), (given[1] if len(given) > 1 else 0)


def _check_planned(program: Program) -> None:
    for node, plan in planned(program):
        for operand in plan.operands:
            if operand.position == RESULT:
                continue
            value = node.args[operand.position] if operand.position < len(node.args) else None
            if not isinstance(value, fx.Node):
                raise _fail(program, Property.PLANNED, node, f"argument {operand.position} is planned and no value")
            if operand.weight and attribute_behind(value) is None:
                raise _fail(
                    program, Property.PLANNED, node, f"argument {operand.position} is planned as a weight and is none"
                )


def _check_observed(program: Program) -> None:
    for node, decision in observers(program):
        if decision is None:
            raise _fail(program, Property.OBSERVED, node, "it carries no decision; insert it with insert-observers")
        if node.args[8:10] != (decision.scheme, decision.observer):
            raise _fail(program, Property.OBSERVED, node, "it does not observe as its decision says")
        low, high, scale, zero_point = (
            _buffer(program, Property.OBSERVED, node, node.args[place], role)
            for place, role in ((1, "range"), (2, "range"), (4, "scale"), (5, "zero-point"))
        )
        if not low.shape == high.shape == scale.shape == zero_point.shape:
            raise _fail(program, Property.OBSERVED, node, "its range, scale and zero-point differ in shape")
        if node.args[3] is not None:
            histogram = _buffer(program, Property.OBSERVED, node, node.args[3], "histogram")
            if histogram.shape[:-1] != low.shape:
                raise _fail(program, Property.OBSERVED, node, "it needs one histogram for each range")


def _check_frozen(program: Program) -> None:
    for node in program.calls(ops.observe):
        raise _fail(program, Property.FROZEN, node, "a frozen graph has no observers")


_CHECKS: dict[Property, Callable[[Program], None]] = {
    Property.MASKED: _check_masked,
    Property.FAKE_QUANT: _check_fake_quant,
    Property.FROZEN: _check_frozen,
    Property.PLANNED: _check_planned,
    Property.OBSERVED: _check_observed,
}
