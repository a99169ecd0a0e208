"""TorchScript of a source model: tracing it, and reading the weights of layers out of the file."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from graphprune.errors import LoweringError
from graphprune.ir.interface import Interface
from graphprune.ir.program import Program

NOTE = "graphprune.json"
"""Name of the file inside the archive that says which weight each operator has, and how the model is called."""
_OPERATORS = {
    "aten::linear": 1,
    "aten::_convolution": 1,
    "aten::addmm": 2,
    "aten::matmul": 1,
    "quantized::linear_dynamic": 1,
}
"""Operators with a weight and its place among their inputs."""
_WARM_UP = 2
"""Runs that TorchScript profiles and fuses in, for each shape; before them int8 is computed in float."""
_SIZES = {0: 2}
_OTHER = 16


class Answers(nn.Module):
    """A source model that takes the Program's inputs by position and returns its outputs as a tuple.

    Attributes:
        model: The source model; names of its modules start with ``model.`` here.
    """

    def __init__(self, model: nn.Module, interface: Interface, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.interface = interface
        self.outputs = tuple(outputs)
        self.train(model.training)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Run the model."""
        given = dict(zip(self.interface.names, values, strict=True))
        leaves, tree = pytree.tree_flatten(self.model(**given, **self.interface.constants))
        named = dict(zip(replace(self.interface, output=tree).output_names, leaves, strict=True))
        return tuple(named[name] for name in self.outputs)


def example_inputs(program: Program) -> tuple[Tensor, ...]:
    """Tensors to trace with: fixed sizes as traced, 2 for a dynamic first dimension, 16 for others; ones, and random floats.

    Masks end in padding: without any, transformers' models leave the mask out when they are called, and not when they are traced.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for item in program.interface.inputs:
        shape = [size if isinstance(size, int) else _SIZES.get(dim, _OTHER) for dim, size in enumerate(item.shape)]
        if item.dtype.is_floating_point:
            tensors.append(torch.randn(shape, generator=generator).to(item.dtype))
        else:
            tensors.append(torch.ones(shape, dtype=item.dtype))
            if "mask" in item.name:
                tensors[-1][-1, shape[-1] // 2 :] = 0
    return tuple(tensors)


def write_script(
    model: nn.Module, example: tuple[Tensor, ...], path: Path, note: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], set[str]]:
    """Trace a model, freeze it and save it.

    Args:
        model: In eval mode.
        example: Its inputs.
        path: The file.
        note: What ``read_script`` will return, with ``weights`` added: the weight of each operator that has one, in graph order.
        weights: Weights by name, as they are to be stored. Nothing is folded into them.

    Returns:
        ``(found, integers)``: weights that are in the file, by name, and names of those that the runtime multiplies as integers.

    Raises:
        LoweringError: The model cannot be traced.
    """
    jit: Any = torch.jit
    with torch.no_grad(), quiet():
        try:
            script: Any = jit.trace(model, example, strict=False, check_trace=False)
            frozen: Any = jit.freeze(script, optimize_numerics=False)
        except Exception as error:  # tracing raises whatever the model's code raises
            raise LoweringError(
                f"{type(model).__name__} cannot be traced by torch.jit: {error}; choose another target, such as onnx"
            ) from error
    names: dict[str, list[str]] = {}
    for name, value in weights.items():
        names.setdefault(_digest(value), []).append(name)
    known = {digest: list(alike) for digest, alike in names.items()}
    found: dict[str, Tensor] = {}
    order = []
    for node in _weighted(frozen.graph):
        value = _constant(node)
        alike = names.get(_digest(value), [""])
        order.append(alike.pop(0) if len(alike) > 1 else alike[0])  # one weight may have several operators
        found[order[-1]] = value
    frozen.save(str(path), _extra_files={NOTE: json.dumps({**note, "weights": order})})
    integers = {name for digest in _integer_products(path, example) for name in known.get(digest, ())}
    return {name: value for name, value in found.items() if name}, integers


def warm_up(script: Any, values: Sequence[Tensor]) -> None:
    """Run a model until it is fused for the shapes of these inputs."""
    with quiet():  # IPEX announces that its next release, which never came, would do without TorchScript
        for _ in range(_WARM_UP):
            script(*values)


def _integer_products(path: Path, example: tuple[Tensor, ...]) -> set[str]:
    """Digests of the weights that the runtime multiplies as integers, once it has fused what it can."""
    script, _ = read_script(path)
    with torch.no_grad():
        warm_up(script, example)
        script(*example)
    jit: Any = torch.jit
    found = set()
    for node in jit.last_executed_optimized_graph().nodes():
        if node.kind() == "ipex::LlgaFusionGroup":
            found |= {
                _digest(_constant(item)) for item in _weighted(node.g("Subgraph")) if _constant(item).is_quantized
            }
        elif node.kind() == "quantized::linear_dynamic":
            found.add(_digest(_constant(node)))
    return found


def read_script(path: Path) -> tuple[Any, dict[str, Any]]:
    """Load a model and its note.

    Raises:
        LoweringError: It is missing or damaged.
    """
    if not path.is_file():
        raise LoweringError(f"{path.parent} holds no {path.name}; lower a Program into it first")
    extra = {NOTE: ""}
    try:
        with quiet():
            script = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)  # type: ignore[no-untyped-call]
        note: dict[str, Any] = json.loads(extra[NOTE])
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LoweringError(f"{path} cannot be loaded: {reason}; lower the Program again") from error
    return script, note


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights by name, as they lie in the file: float32, bfloat16 or ``torch.qint8`` with scales.

    Raises:
        LoweringError: The file is missing or damaged, or has other operators than its note says.
    """
    script, note = read_script(path)
    nodes = list(_weighted(script.graph))
    if len(nodes) != len(note["weights"]):
        raise LoweringError(
            f"{path} has {len(nodes)} operators with a weight and says {len(note['weights'])}; lower the Program again"
        )
    found: dict[str, Tensor] = {}
    for name, node in zip(note["weights"], nodes, strict=True):
        if name:
            found.setdefault(name, _constant(node))
    return found


def _weighted(graph: Any) -> Iterator[Any]:
    for node in graph.nodes():
        if node.kind() in _OPERATORS and _constant(node) is not None:
            yield node


def _constant(node: Any) -> Any:
    """The weight of an operator, None where it is computed."""
    value = list(node.inputs())[_OPERATORS[node.kind()]].node()
    if value.kind() == "aten::dequantize":
        value = next(iter(value.inputs())).node()
    if value.kind() != "prim::Constant":
        return None
    constant = value.output().toIValue()
    if node.kind() == "quantized::linear_dynamic":
        return torch.ops.quantized.linear_unpack(constant)[0]
    return constant if isinstance(constant, Tensor) else None


def _digest(value: Tensor) -> str:
    """Of a weight's shape and numbers, and of the scales where it is quantized."""
    parts = [value.detach()]
    if value.is_quantized:
        parts = [value.int_repr()]
        if value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
            parts.append(value.q_per_channel_scales().float())
        else:
            parts.append(torch.tensor(value.q_scale()))
    digest = hashlib.sha256(f"{tuple(value.shape)} {value.dtype}".encode())
    for part in parts:
        digest.update(
            part.contiguous(memory_format=torch.contiguous_format).flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what tracing and IPEX say about code that they cannot see through: outputs are compared afterwards."""
    names = ("torch.jit", "IPEX", "transformers.modeling_utils", "transformers.configuration_utils")
    loggers = [logging.getLogger(name) for name in names]
    levels = [item.level for item in loggers]
    for item in loggers:
        item.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for item, level in zip(loggers, levels, strict=True):
            item.setLevel(level)
