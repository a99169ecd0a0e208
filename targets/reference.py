"""The reference target: the Program's own graph, run by torch operator by operator. What others compute is compared with it."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from graphprune.errors import LoweringError
from graphprune.ir import ops
from graphprune.ir.blocks import FLAGS, Holder, executable
from graphprune.ir.interface import is_label
from graphprune.ir.origin import origin
from graphprune.ir.program import Program
from graphprune.ir.sites import find_sites
from graphprune.pipeline.records import read_record
from graphprune.pipeline.target import Lowered, Run, StoredWeight, Support, Target
from graphprune.sparsity.layout import Layout, to_logical

_GRAPH, _WEIGHTS = "graph.json", "weights.safetensors"
_FORMAT = 1
_OPERATORS = ("aten", "graphprune")
"""Namespaces of torch operators that a graph may call; a file cannot name others."""
_FUNCTIONS = ("_operator", "math", "torch", "graphprune.ir.normalize")
"""Modules of the Python functions that compute sizes in a graph."""
_ATTRIBUTES = ("dtype", "device")
_CONSTANTS = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}


@dataclass(frozen=True)
class Reference(Target):
    """Write the Program's graph as JSON and its weights as safetensors, and run them with torch. The oracle, not an engine."""

    name = "reference"
    legalize = ("fold-masks", "freeze-quant")

    @classmethod
    def capabilities(cls) -> Mapping[str, Support]:
        """Float arithmetic of torch, quantizers included: everything is stored and computed, and nothing but float32 is gained.

        Zeros are multiplied like other numbers, quantized weights are float32 numbers on their grid, and what 16 bits gain depends
        on the CPU.
        """
        return {
            "unstructured": Support.STORED,
            "NxM": Support.STORED,
            "N:M": Support.STORED,
            "channel": Support.STORED,
            "fp32": Support.EXPLOITED,
            "fp16": Support.STORED,
            "bf16": Support.STORED,
            "int8": Support.STORED,
            "uint8": Support.STORED,
            "int4": Support.STORED,
            "uint4": Support.STORED,
            "int8 per group": Support.STORED,
            "int4 per group": Support.STORED,
            "dynamic uint8": Support.STORED,
        }

    def lower(self, program: Program, folder: Path) -> Lowered:
        """Write ``graph.json`` and ``weights.safetensors``.

        Raises:
            LoweringError: A mask, gate or observer is left, or an operator cannot be written; names it with its module.
        """
        copied = copy.deepcopy(program).eval()
        labels = frozenset(name for name in copied.interface.names if is_label(name))
        if labels:
            copied.drop_inputs(labels)
        for node in copied.calls(ops.mask, ops.observe, ops.gate):
            raise LoweringError(f"{origin(node)} is left in the graph; run fold-masks and freeze-quant first")
        read = dict.fromkeys(str(node.target) for node in copied.graph.find_nodes(op="get_attr"))
        tensors = {name: copied.tensor(name).detach().contiguous() for name in read if name not in FLAGS}
        first: dict[int, str] = {}
        ties = {name: first.setdefault(id(copied.tensor(name)), name) for name in tensors}
        outputs = tuple(
            name
            for name, leaf in zip(copied.interface.output_names, copied.output.args[0], strict=True)  # type: ignore[arg-type]
            if leaf is not None
        )
        record = {
            "format": _FORMAT,
            "name": copied.name,
            "inputs": list(copied.interface.names),
            "outputs": list(outputs),
            "flags": {name: bool(getattr(copied, name)) for name in read if name in FLAGS},
            "ties": {name: other for name, other in ties.items() if name != other},
            "nodes": [_encode_node(node) for node in copied.graph.nodes],
        }
        (folder / _GRAPH).write_text(json.dumps(record) + "\n", encoding="utf-8")
        save_file({name: value for name, value in tensors.items() if ties[name] == name}, folder / _WEIGHTS)
        sites, _ = find_sites(copied)
        return Lowered(
            (_GRAPH, _WEIGHTS), copied.interface.names, outputs, {"float": tuple(site.name for site in sites)}
        )

    def open(self, folder: Path, threads: int | None = None) -> Run:
        """Load the graph, to run it with torch on the CPU.

        Raises:
            LoweringError: A file is missing or damaged, or names something that no Program calls.
        """
        record, tensors = read_record(folder / _GRAPH, _FORMAT), _read_weights(folder)
        root = Holder()
        for name in (*tensors, *record["ties"]):
            _register(root, name, tensors[record["ties"].get(name, name)])
        for name, value in record["flags"].items():
            setattr(root, name, value)
        try:
            function = executable(_decode_graph(record["nodes"]), record["name"])
        except (KeyError, TypeError, AttributeError, ImportError) as error:
            raise LoweringError(f"{folder / _GRAPH} is damaged: {error!r}; export it again") from error

        @torch.no_grad()
        def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            missing = [name for name in record["inputs"] if name not in inputs]
            if missing:
                raise LoweringError(f"input {missing[0]!r} is missing; {_GRAPH} takes {', '.join(record['inputs'])}")
            before = torch.get_num_threads()
            torch.set_num_threads(threads or before)
            try:
                results = function(root, *(torch.from_numpy(np.asarray(inputs[name])) for name in record["inputs"]))
            finally:
                torch.set_num_threads(before)
            found = [value for value in results if value is not None]
            return {name: _to_numpy(value) for name, value in zip(record["outputs"], found, strict=True)}

        return run

    def weights(self, folder: Path, layouts: Mapping[str, str]) -> dict[str, StoredWeight]:
        """Read weights by site name, all as float32."""
        tensors, ties = _read_weights(folder), read_record(folder / _GRAPH, _FORMAT)["ties"]
        return {
            name: StoredWeight(_to_numpy(to_logical(tensors[ties.get(name, name)], Layout(layout))))
            for name, layout in layouts.items()
            if ties.get(name, name) in tensors
        }


def _to_numpy(value: Tensor) -> np.ndarray:
    return (value.float() if value.is_floating_point() else value).numpy()


def _register(root: nn.Module, name: str, value: Tensor) -> None:
    *path, leaf = name.split(".")
    module = root
    for part in path:
        if part not in module._modules:
            module.add_module(part, Holder())
        module = module.get_submodule(part)
    module.register_buffer(leaf, value)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise LoweringError(f"cannot read {folder / _WEIGHTS}: {error}; export it again") from error


# -- the graph as JSON ------------------------------------------------------------------------------------------------


def _encode_node(node: fx.Node) -> dict[str, object]:
    try:
        return {
            "name": node.name,
            "op": node.op,
            "target": _encode_target(node.target),
            "args": [_encode(value) for value in node.args],
            "kwargs": {key: _encode(value) for key, value in node.kwargs.items()},
        }
    except TypeError as error:
        raise LoweringError(
            f"{origin(node)} cannot be written: {error}; leave out the pass that inserted it, or choose another target"
        ) from error


def _encode_target(target: Any) -> str:
    if isinstance(target, (str, torch._ops.OpOverload)):
        return str(target)
    if target is getattr:
        return "getattr"
    module, name = getattr(target, "__module__", None), getattr(target, "__name__", None)
    if module not in _FUNCTIONS:
        raise TypeError(f"{module}.{name} is no operator of torch")
    return f"{module}:{name}"


def _encode(value: object) -> object:
    """JSON as it is for numbers, texts, None and lists; an object of one key that says its type for all else."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, slice):
        return {"slice": [_encode(item) for item in (value.start, value.stop, value.step)]}
    kind = _CONSTANTS.get(type(value))
    if kind is None:
        raise TypeError(f"it has an argument of type {type(value).__name__}")
    return {kind: str(value).removeprefix("torch.")}


def _decode_graph(records: list[dict[str, Any]]) -> fx.Graph:
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    for record in records:
        target = _decode_target(record["target"]) if record["op"] == "call_function" else record["target"]
        args = tuple(_decode(value, nodes) for value in record["args"])
        kwargs = {key: _decode(value, nodes) for key, value in record["kwargs"].items()}
        if target is getattr and args[1] not in _ATTRIBUTES:
            raise KeyError(f"getattr {args[1]}")
        nodes[record["name"]] = graph.create_node(record["op"], target, args, kwargs, record["name"])
    return graph


def _decode_target(text: str) -> Callable[..., Any]:
    if text == "getattr":
        return getattr
    module, colon, name = text.partition(":")
    if colon:
        if module not in _FUNCTIONS:
            raise KeyError(text)
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
    namespace, name, overload = text.split(".")
    if namespace not in _OPERATORS:
        raise KeyError(text)
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)  # type: ignore[no-any-return]


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "slice":
        return slice(*(_decode(item, nodes) for item in content))
    if kind == "device":
        return torch.device(content)
    if kind not in _CONSTANTS.values():
        raise KeyError(kind)
    return getattr(torch, content)
