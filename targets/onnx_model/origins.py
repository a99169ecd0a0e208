"""Where in the user's code the nodes of an exported model come from, and what to say of an operator that has no ONNX form."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import fx

from graphprune.ir.origin import described, origin
from graphprune.ir.program import Program

if TYPE_CHECKING:
    import onnx

ORIGIN = "graphprune.origin"
"""Metadata key of a node of an exported model: operator, module and source line. graphsurgeon drops it, so no file has it."""
_SCOPES, _TRACE, _NODE = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node"
_TARGET = re.compile(r"target=torch\.ops\.([\w.]+)")
_OPERATOR = re.compile(r"OpOverload\(op='([\w.]+)', overload='(\w+)'\)")


def origins_of(model: Any) -> dict[str, str]:
    """Read from an ``onnx_ir`` model of ``torch.onnx`` where each node comes from, by the names of nodes."""
    found = {}
    for node in model.graph:
        target = _TARGET.search(node.metadata_props.get(_NODE, ""))
        try:
            scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        except (ValueError, SyntaxError):
            scopes = []
        modules = [item for item in scopes[:-1] if item]  # the last one is the node itself
        trace = node.metadata_props.get(_TRACE, "")
        if node.name and (target or modules or trace):
            found[node.name] = described(target[1] if target else node.op_type, modules, trace)
    return found


def write_origins(model: onnx.ModelProto, origins: Mapping[str, str]) -> None:
    """Write into a model's nodes where they come from."""
    for node in model.graph.node:
        if node.name in origins:
            node.metadata_props.add(key=ORIGIN, value=origins[node.name])


def read_origins(model: onnx.ModelProto) -> dict[str, str]:
    """What ``write_origins`` wrote, by the names of nodes."""
    return {node.name: item.value for node in model.graph.node for item in node.metadata_props if item.key == ORIGIN}


def explain(program: Program, error: Exception) -> str:
    """Say why a Program cannot be written as ONNX, and because of which operator."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [line for line in str(root).strip().splitlines() if line.strip()]
    first = f"{type(root).__name__}: {lines[0] if lines else ''}"
    node = _culprit(error)
    if node is None:
        return (
            f"{program.name} cannot be written as ONNX. {first}. Print the Program to find the operator; one without an ONNX form has "
            f"to be rewritten in the model or by a pass before lowering"
        )
    missing = _OPERATOR.search(str(root))
    known = _source(program, node)
    place = origin(node if known is None else known)
    inner = f"{missing[1]}.{missing[2]}" if missing else ""
    reason = f"torch.onnx has no translation of {inner}" if missing else first
    if inner and not place.startswith(inner):
        reason += ", which it is made of"
    return (
        f"{place} cannot be written as ONNX: {reason}. Rewrite it in the model with other operators, or by a pass before "
        f"lowering"
    )


def _culprit(error: BaseException) -> fx.Node | None:
    """The node that ``torch.onnx`` was at when it failed, read off the frames of the error; None where there is none."""
    found = None
    chain: BaseException | None = error
    while chain is not None:
        trace = chain.__traceback__
        while trace is not None:
            value = trace.tb_frame.f_locals.get("node")
            found = value if isinstance(value, fx.Node) and value.op == "call_function" else found
            trace = trace.tb_next
        chain = chain.__cause__
    return found


def _source(program: Program, node: fx.Node) -> fx.Node | None:
    """The Program's node that one of the exporter's graph was made of: the same operator, or the last one, at the same place."""
    stack = node.meta.get("stack_trace")
    twins = [item for item in program.graph.nodes if item.op == "call_function"]
    if not stack:
        return next((item for item in twins if item.target is node.target), None)
    twins = [item for item in twins if item.meta.get("stack_trace") == stack]
    same = [item for item in twins if item.target is node.target]
    sources: list[Any] = node.meta.get("from_node") or []
    names = set()
    while sources:
        names.add(str(sources[-1].target))
        sources = sources[-1].from_node
    named = [item for item in twins if str(item.target) in names]
    return next(iter(same or named or twins[-1:]), None)
