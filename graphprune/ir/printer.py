"""Print a Program as text: deterministic, without addresses, values or anything that depends on torch's version.

Grammar (EBNF; ``NAME`` is a dotted name, ``INT`` and ``FLOAT`` are Python literals)::

    program  = "graph" "@" NAME "(" [input {"," input}] ")" "[" [property {"," property}] "]" "{" {line} "}"
    input    = "%" NAME ":" type
    line     = "%" value [":" type] "=" right | "return" argument {"," argument}
    value    = NAME (a parameter, buffer or input) | INT (any other node, numbered from 0)
    right    = ("param" | "buffer" | "mode") [facts] | NAME "(" [argument {"," argument}] ")" [facts]
    argument = "%" value | [NAME "="] literal | "[" [argument {"," argument}] "]"
    type     = ("f64" | "f32" | "f16" | "bf16" | "i64" | "i32" | "i16" | "i8" | "u8" | "bool" | "c64") "[" [size {"," size}] "]"
    size     = INT | NAME | expression of both
    facts    = "{" NAME "=" literal {"," NAME "=" literal} "}"

Bool buffers state how many entries are True as ``nnz=kept/all``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor, fx

from graphprune.ir.program import META, Program

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
}


def print_program(program: Program) -> str:
    """The text form of a Program; equal Programs print the same on every machine."""
    return _Printer(program).text()


class _Printer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.sizes = {}
        for item, node in zip(program.interface.inputs, _placeholders(program), strict=True):
            for size, name in zip(node.meta["val"].shape, item.shape, strict=True):
                if isinstance(name, str):
                    self.sizes[str(size)] = name
        self.names: dict[fx.Node, str] = {}
        count = 0
        for node in program.graph.nodes:
            if node.op in ("get_attr", "placeholder"):
                self.names[node] = f"%{node.target}"
            elif node.op != "output":
                self.names[node] = f"%{count}"
                count += 1

    def text(self) -> str:
        inputs = ", ".join(
            f"%{node.target}: {self.type_of(node.meta.get('val'))}" for node in _placeholders(self.program)
        )
        head = f"graph @{self.program.name}({inputs}) [{self.program.properties}] {{"
        body = [f"  {self.line(node)}" for node in self.program.graph.nodes if node.op != "placeholder"]
        return "\n".join([head, *body, "}", ""])

    def line(self, node: fx.Node) -> str:
        if node.op == "output":
            return "return " + ", ".join(self.argument(item) for item in node.args[0])  # type: ignore[union-attr]
        kind = self.type_of(node.meta.get("val"))
        name = self.names[node]
        if node.op == "get_attr":
            return self._attribute(node, name)
        arguments = [self.argument(item) for item in node.args]
        arguments += [f"{key}={self.argument(value)}" for key, value in sorted(node.kwargs.items())]
        return f"{name}{': ' + kind if kind else ''} = {_operator(node)}({', '.join(arguments)}){self._facts(node)}"

    def _attribute(self, node: fx.Node, name: str) -> str:
        if node.target in ("training", "observing"):
            return f"{name} = mode"
        value = self.program.tensor(str(node.target))
        kind = "param" if isinstance(value, torch.nn.Parameter) else "buffer"
        facts: dict[str, object] = {}
        if value.dtype == torch.bool and value.dim() >= 2 and not value.is_meta:
            facts["nnz"] = f"{int(value.sum())}/{value.numel()}"
        return f"{name}: {self.type_of(value)} = {kind}{self._facts(node, facts)}"

    def _facts(self, node: fx.Node, facts: Mapping[str, object] | None = None) -> str:
        entries = dict(facts or {})
        for decision in node.meta.get(META, {}).values():
            entries.update({item.name: getattr(decision, item.name) for item in fields(decision) if item.repr})
        shown = ", ".join(f"{key}={_literal(value)}" for key, value in entries.items() if value is not None)
        return f" {{{shown}}}" if shown else ""

    def argument(self, value: object) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(self.argument(item) for item in value) + "]"
        return _literal(value)

    def type_of(self, value: object) -> str:
        if not isinstance(value, Tensor):
            return ""
        return f"{_DTYPES.get(value.dtype, 'other')}[{','.join(self._size(size) for size in value.shape)}]"

    def _size(self, size: object) -> str:
        text = str(size)
        for symbol in sorted(self.sizes, key=len, reverse=True):
            text = text.replace(symbol, self.sizes[symbol])
        return text.replace(" ", "")


def _placeholders(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "placeholder"]


def _operator(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    name = getattr(node.target, "__name__", str(node.target))
    return name.lstrip("_")


def _literal(value: object) -> str:
    if isinstance(value, torch.dtype):
        return _DTYPES.get(value, str(value).removeprefix("torch."))
    if isinstance(value, (torch.device, torch.layout, torch.memory_format)):
        return str(value).removeprefix("torch.")
    if isinstance(value, float):
        return f"{value:.9g}"
    if value is None or isinstance(value, (bool, int)):
        return str(value).lower() if value is None or isinstance(value, bool) else str(value)
    return str(value).replace(" ", "")
