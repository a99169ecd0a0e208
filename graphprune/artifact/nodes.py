"""What a Program computes inside, for one small sample: recorded when it is lowered, so that every node can be judged by itself.

A rounding that falls the other way travels on through a network, so that its outputs say little about single nodes.  A node is
judged by what it makes of the same inputs: every recorded value takes the place of the one that the lowered model computes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor, fx

from graphprune.artifact.samples import Arrays
from graphprune.errors import VerifyError
from graphprune.ir import ops
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.quantizable import Quantizable, find_quantizable
from graphprune.ir.sites import attribute_behind
from graphprune.ir.watching import watch

NODES = "nodes.safetensors"
SIZES = ({0: 1, 1: 8},)
"""Batch and sequence of the sample, where they are dynamic: every recorded value is kept whole."""
_KEY = "graphprune"
_EXACT, _FLOAT16, _SMALL_WEIGHTS = 1e-4, 2e-3, 2e-2
"""Allowed differences of float results, as fractions of their largest value: sums in another order; the same in float16; weights of
four bits or in groups, whose inputs onnxruntime quantizes to int8 by itself."""
_DTYPES = (torch.float32, torch.float16)
aten = torch.ops.aten
_MOVES = (
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.flatten.using_ints,
    aten.unsqueeze.default, aten.squeeze.dim, aten.contiguous.default, aten.dropout.default, aten.relu.default,
    aten.relu_.default, aten.max_pool2d.default,
)  # fmt: skip
"""Operators that runtimes quantize before, where their result is quantized."""


@dataclass(frozen=True)
class Node:
    """One value that is compared.

    Attributes:
        kind: ``integers`` of a static quantizer; ``range``: a float that is quantized by its own range; ``linear``, ``conv`` or
            ``embedding``: the float result of a weight's operator; ``output``: a float output of the model.
        name: Prefix of the quantizer's buffers, name of the weight, or name of the output.
        weights: Weights that its computation from the recorded values before it involves.
        reads: Keys of those values.
        tolerance: Allowed difference as a fraction of the largest value; None: one quantization step.
        scale: Of integers, in the Program.
        zero_point: Of integers, in the Program.
    """

    kind: str
    name: str
    weights: tuple[str, ...]
    reads: tuple[str, ...]
    tolerance: float | None = None
    scale: float | None = None
    zero_point: int | None = None

    @property
    def key(self) -> str:
        """As in ``Target.nodes``."""
        return f"{self.kind}:{self.name}"


@dataclass(frozen=True)
class Recording:
    """What ``nodes.safetensors`` holds.

    Attributes:
        nodes: What is compared, in the order of the graph.
        values: Their values by key, whole.
        inputs: The sample.
        left_out: Values that are not recorded, by key, with the reason.
    """

    nodes: tuple[Node, ...]
    values: Arrays
    inputs: Arrays
    left_out: Mapping[str, str]

    @property
    def inner(self) -> Arrays:
        """The values without the outputs."""
        return {node.key: self.values[node.key] for node in self.nodes if node.kind != "output"}

    def write(self, folder: Path) -> None:
        """Write ``nodes.safetensors``."""
        arrays = {f"value.{key}": value for key, value in self.values.items()}
        arrays |= {f"input.{name}": value for name, value in self.inputs.items()}
        text = json.dumps({"nodes": [asdict(node) for node in self.nodes], "left_out": dict(self.left_out)})
        contiguous = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in arrays.items()}
        safetensors.numpy.save_file(contiguous, folder / NODES, metadata={_KEY: text})

    @classmethod
    def read(cls, folder: Path) -> Recording:
        """Read ``nodes.safetensors``.

        Raises:
            VerifyError: It is missing or damaged.
        """
        path = folder / NODES
        if not path.is_file():
            raise VerifyError(
                f"{folder} has no {NODES}, so nothing can be compared node by node: it was exported with per_node=False, from a "
                f"Program in float, or to a form that computes in float what the Program quantizes. Export it with per_node=True"
            )
        try:
            with safetensors.safe_open(path, framework="np") as file:
                stated = json.loads(file.metadata()[_KEY])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            nodes = tuple(_node(item) for item in stated["nodes"])
            values = {node.key: arrays[f"value.{node.key}"] for node in nodes}
        except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise VerifyError(f"{path} is damaged: {error}; export the artifact again") from None
        inputs = {name.removeprefix("input."): array for name, array in arrays.items() if name.startswith("input.")}
        return cls(nodes, values, inputs, stated.get("left_out", {}))


def record(
    program: Program, known: Collection[str], inputs: Mapping[str, Tensor], outputs: Mapping[str, np.ndarray]
) -> Recording:
    """Record what a Program computes for one sample.

    Args:
        program: Flat, on the CPU, in eval mode; it is left as it is.
        known: Keys that the target's file has; others are left out.
        inputs: The sample.
        outputs: What the Program answers to it, by name, in its order.

    Returns:
        The recording; float outputs are part of it.
    """
    found = _Values(program, known)
    arrays: Arrays = {}

    def see(node: fx.Node, value: Tensor) -> None:
        for item in found.at[node]:
            arrays[item.key] = _integers(item, node, value) if item.kind == "integers" else value.numpy().copy()

    watch(program, set(found.at), [dict(inputs)], see)
    nodes = [item for items in found.at.values() for item in items]
    tolerance = None if Property.FAKE_QUANT in program.properties else _EXACT
    parts = program.output.args[0]
    assert isinstance(parts, (tuple, list))
    leaves = [leaf for leaf in parts if isinstance(leaf, fx.Node)]
    for leaf, (name, value) in zip(leaves, outputs.items(), strict=True):
        if np.issubdtype(value.dtype, np.floating):
            same = found.at.get(leaf)  # an operator whose result is an output is judged once, as that operator
            item = found.item("output", name, [leaf], same[0].tolerance if same else tolerance)
            nodes.append(item)
            arrays[item.key] = value
    return Recording(tuple(nodes), arrays, {name: value.numpy() for name, value in inputs.items()}, found.left_out)


class _Values:
    """The values of a Program that are recorded, and which of them each one is computed from."""

    def __init__(self, program: Program, known: Collection[str]) -> None:
        self.known, self.left_out = known, dict[str, str]()
        self.sites = {item.node: item for item in find_quantizable(program) if item.weight is not None}
        self.keys: dict[fx.Node, str] = {}
        wanted: list[tuple[fx.Node, str, str]] = []
        lost = _quantizes(program) and not any(key.startswith(("integers:", "range:")) for key in known)
        for node in program.graph.nodes:
            for source, kind, name, reason in self._candidates(node):
                key = f"{kind}:{name}"
                if lost:
                    reason = "the file computes in float what the Program quantizes"
                elif reason is None and key not in known:
                    reason = "the file does not say where it is"
                if reason is not None:
                    self.left_out[key] = reason
                elif key in self.keys.values() and source not in self.keys:
                    self.left_out[key] = "several operators go by this name"
                elif source not in self.keys:
                    self.keys[source] = key
                    wanted.append((source, kind, name))
        self.at: dict[fx.Node, list[Node]] = {}
        for source, kind, name in wanted:
            self.at[source] = [self._described(source, kind, name)]

    def _candidates(self, node: fx.Node) -> Iterator[tuple[fx.Node, str, str, str | None]]:
        """Values to record at a node: the value, its kind and name, and a reason against it."""
        if node.target is ops.fake_quantize and attribute_behind(node.args[0]) is None:
            yield node, "integers", _prefix(node), _obstacle(node) or _refusal(node)
        elif node.target is ops.dynamic_fake_quantize:
            names = [self.sites[user].name for user in node.users if user in self.sites]
            name = next((name for name in names if f"range:{name}" in self.known), (*names, node.name)[0])
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if source.op != "placeholder":  # nothing computes an input
                yield source, "range", name, _obstacle(source)
        elif node in self.sites and not _only_quantized(node):  # else it is compared where it is quantized
            yield node, self.sites[node].kind, self.sites[node].name, _obstacle(node)

    def item(self, kind: str, name: str, sources: Collection[fx.Node], tolerance: float | None) -> Node:
        """Describe a value that is computed from others."""
        weights: dict[str, None] = {}
        reads: dict[str, None] = {}
        seen: set[fx.Node] = set()
        waiting = list(sources)
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.keys:
                reads[self.keys[node]] = None
                continue
            if node in self.sites:
                weights[self.sites[node].name] = None
            waiting += node.all_input_nodes
        return Node(kind, name, tuple(weights), tuple(reads), tolerance)

    def _described(self, source: fx.Node, kind: str, name: str) -> Node:
        item = self.item(kind, name, source.all_input_nodes, None)
        if kind == "integers":
            scale, zero_point = (_constant(source, place) for place in (1, 2))
            return replace(item, scale=float(scale), zero_point=int(zero_point))
        if kind == "range":
            weights = (self.sites[source].name, *item.weights) if source in self.sites else item.weights
            return replace(item, weights=weights)
        return replace(item, weights=(name, *item.weights), tolerance=_tolerance(self.sites[source]))


def _quantizes(program: Program) -> bool:
    """Whether a Program quantizes any activation."""
    static = any(attribute_behind(node.args[0]) is None for node in program.calls(ops.fake_quantize))
    return static or any(True for _ in program.calls(ops.dynamic_fake_quantize))


def _integers(item: Node, node: fx.Node, value: Tensor) -> np.ndarray:
    """The integers behind what fake-quantization returned; exact, because a float is nearest to its own multiple of the scale."""
    assert item.scale is not None
    assert item.zero_point is not None
    numbers = torch.round(value.float() / item.scale) + item.zero_point
    return np.asarray(numbers.to(torch.uint8 if _limits(node)[0] >= 0 else torch.int8).numpy())


def _limits(node: fx.Node) -> tuple[int, int]:
    """Smallest and largest integer of a quantizer."""
    low, high = node.args[3:5]
    assert isinstance(low, int)
    assert isinstance(high, int)
    return low, high


def _constant(node: fx.Node, place: int) -> Tensor:
    source = node.args[place]
    assert isinstance(source, fx.Node)
    owner: Any = node.graph.owning_module
    for part in str(source.target).split("."):
        owner = getattr(owner, part)
    assert isinstance(owner, Tensor)
    return owner


def _prefix(node: fx.Node) -> str:
    scale = node.args[1]
    assert isinstance(scale, fx.Node)
    return str(scale.target).removesuffix("_scale")


def _refusal(node: fx.Node) -> str | None:
    """Why the integers of a quantizer are not recorded."""
    low, high = _limits(node)
    if _constant(node, 1).numel() != 1:
        return "it has more than one scale"
    return None if high - low > 15 and low >= -128 and high <= 255 else f"it is quantized to {low} to {high}"


def _obstacle(node: fx.Node) -> str | None:
    """Why a float is not recorded."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype not in _DTYPES:
        return f"its type is {getattr(value, 'dtype', 'unknown')}"
    return None


def _only_quantized(node: fx.Node) -> bool:
    """Whether nothing uses a result but static quantizers, so that the operator itself may write integers."""
    waiting, leaves = [node], 0
    while waiting:
        for user in waiting.pop().users:
            if user.target in _MOVES:
                waiting.append(user)
            elif user.target is ops.fake_quantize:
                leaves += 1
            else:
                return False
    return leaves > 0


def _tolerance(item: Quantizable) -> float:
    assert item.weight is not None
    weight = item.node.args[item.weight]
    if isinstance(weight, fx.Node) and weight.target is ops.fake_quantize:
        low, high = _limits(weight)
        if high - low <= 15 or len(weight.args) > 6:
            return _SMALL_WEIGHTS
    return _FLOAT16 if item.node.meta["val"].dtype == torch.float16 else _EXACT


def _node(stated: Mapping[str, Any]) -> Node:
    return Node(**{**stated, "weights": tuple(stated["weights"]), "reads": tuple(stated["reads"])})
