"""Print a Program as text: deterministic, without addresses, values or anything that depends on torch's version.

Grammar (EBNF; ``NAME`` is a dotted name, ``INT`` and ``FLOAT`` are Python literals)::

    program  = "graph" "@" NAME "(" [input {"," input}] ")" "[" [property {"," property}] "]" "{" {line} "}"
    input    = "%" NAME ":" type
    line     = "%" value [":" type] "=" right | block | "return" argument {"," argument}
    block    = result {"," result} "=" "block" "@" NAME "(" [argument {"," argument}] ")" ["[" "checkpoint" "]"] "{" {line} "}"
    result   = "%" value [":" type]
    value    = NAME (a parameter, buffer or input) | INT (any other node, numbered from 0)
    right    = ("param" | "buffer" | "mode") [facts] | NAME "(" [argument {"," argument}] ")" [facts]
    argument = "%" value | [NAME "="] literal | "[" [argument {"," argument}] "]"
    type     = ("f64" | "f32" | "f16" | "bf16" | "i64" | "i32" | "i16" | "i8" | "u8" | "bool" | "c64") "[" [size {"," size}] "]"
    size     = INT | NAME | expression of both
    facts    = "{" NAME "=" literal {"," NAME "=" literal} "}"

Bool buffers state how many entries are True as ``nnz=kept/all``. The lines of a block are those of its own graph; inside, its
inputs have the names that they have outside, and its last line returns what it gives out, in the order of its results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

import torch
from torch import Tensor, fx

from graphprune.ir.blocks import FLAGS, is_result, placeholders, results
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


def numbered_lines(program: Program) -> list[tuple[fx.Node | None, str]]:
    """The lines of the text form, each with the node that it shows; None for heads and closing braces."""
    return list(_Printer(program).lines())


class _Printer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.blocks = program.blocks
        self.sizes = {}
        for item, node in zip(program.interface.inputs, placeholders(program.graph), strict=True):
            for size, name in zip(node.meta["val"].shape, item.shape, strict=True):
                if isinstance(name, str):
                    self.sizes[str(size)] = name
        self.names: dict[fx.Node, str] = {}
        self.count = 0
        self._name(program.graph)

    def _name(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op in ("get_attr", "placeholder"):
                self.names.setdefault(node, f"%{node.target}")
            elif node.op == "call_module":
                block = self.blocks[str(node.target)]
                self.names.update(
                    zip(placeholders(block.graph), (self.names[item] for item in node.all_input_nodes), strict=True)
                )
                self._name(block.graph)
                several = len(results(block.graph)) > 1
                for item in [user for user in node.users if is_result(user)] if several else [node]:
                    self._number(item)
            elif node.op != "output" and node not in self.names:
                self._number(node)

    def _number(self, node: fx.Node) -> None:
        self.names[node] = f"%{self.count}"
        self.count += 1

    def text(self) -> str:
        return "\n".join([*(line for _, line in self.lines()), ""])

    def lines(self) -> Iterator[tuple[fx.Node | None, str]]:
        inputs = ", ".join(
            f"%{node.target}: {self.type_of(node.meta.get('val'))}" for node in placeholders(self.program.graph)
        )
        yield None, f"graph @{self.program.name}({inputs}) [{self.program.properties}] {{"
        yield from self._body(self.program.graph, "  ")
        yield None, "}"

    def _body(self, graph: fx.Graph, indent: str) -> Iterator[tuple[fx.Node | None, str]]:
        for node in graph.nodes:
            if node.op == "call_module":
                yield node, f"{indent}{self._block_head(node)}"
                yield from self._body(self.blocks[str(node.target)].graph, f"{indent}  ")
                yield None, f"{indent}}}"
            elif node.op != "placeholder" and not is_result(node):
                yield node, f"{indent}{self.line(node)}"

    def _block_head(self, node: fx.Node) -> str:
        block = self.blocks[str(node.target)]
        picked = {user.args[1]: user for user in node.users if is_result(user)}
        count = len(results(block.graph))
        shown = [picked[index] for index in range(count) if index in picked] if count > 1 else [node]
        left = ", ".join(f"{self.names[item]}{self._colon(item)}" for item in shown)
        inputs = ", ".join(self.names[item] for item in node.all_input_nodes)
        return f"{left} = block @{node.target}({inputs}) {'[checkpoint] ' if block.checkpoint else ''}{{"

    def _colon(self, node: fx.Node) -> str:
        kind = self.type_of(node.meta.get("val"))
        return f": {kind}" if kind else ""

    def line(self, node: fx.Node) -> str:
        if node.op == "output":
            return "return " + ", ".join(self.argument(item) for item in results(node.graph)) + self._facts(node)
        name = self.names[node]
        if node.op == "get_attr":
            return self._attribute(node, name)
        arguments = [self.argument(item) for item in node.args]
        arguments += [f"{key}={self.argument(value)}" for key, value in sorted(node.kwargs.items())]
        return f"{name}{self._colon(node)} = {_operator(node)}({', '.join(arguments)}){self._facts(node)}"

    def _attribute(self, node: fx.Node, name: str) -> str:
        if node.target in FLAGS:
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
