"""Small ONNX graphs written as text, and what a pass of the ONNX target makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from graphprune.targets.onnx_model.draft import Draft, GraphPass, finish

onnx = pytest.importorskip("onnx")
gs = pytest.importorskip("onnx_graphsurgeon")
onnxruntime = pytest.importorskip("onnxruntime")

SCALES: dict[str, np.ndarray] = {
    "xs": np.array(0.02, np.float32),
    "xz": np.array(120, np.uint8),
    "ys": np.array(0.05, np.float32),
    "yz": np.array(0, np.uint8),
    "zs": np.array(0.03, np.float32),
    "zz": np.array(131, np.uint8),
}
"""Scales and zero-points that graphs may use: of inputs, of results after a Relu, of others."""


@dataclass(frozen=True)
class Case:
    """A graph that a pass rewrites.

    Attributes:
        function: The pass.
        text: The graph in ONNX's text form, without its name.
        arrays: Initializers.
        feeds: Inputs.
        tolerance: Largest difference of outputs before and after; 0 = bitwise equal.
        matches: How many places the pass finds.
        opset: ONNX operator set.
    """

    function: GraphPass
    text: str
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    feeds: Mapping[str, np.ndarray] = field(default_factory=dict)
    tolerance: float = 0.0
    matches: int = 1
    opset: int = 18

    @property
    def name(self) -> str:
        return self.function.__name__

    def model(self) -> Any:
        head = f'<ir_version: 10, opset_import: ["": {self.opset}, "com.microsoft": 1, "graphprune": 1]>'
        model = onnx.parser.parse_model(f"{head} case {self.text}")
        known = {**SCALES, **self.arrays}
        used = {name for node in model.graph.node for name in node.input}
        model.graph.initializer.extend(
            onnx.numpy_helper.from_array(known[name], name) for name in sorted(used & set(known))
        )
        return model


def rewrite(model: Any, function: GraphPass) -> tuple[Any, int, Draft]:
    """The model after a pass, at how many places it changed, and the draft."""
    draft = Draft(gs.import_onnx(model))
    count = function(draft)
    draft.graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return finish(draft), count, draft


def text_of(model: Any) -> str:
    """The graph as text; nodes without their names."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for node in copied.graph.node:
        node.name = ""
    del copied.graph.value_info[:]
    return onnx.printer.to_text(copied.graph)


def run(model: Any, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs in onnxruntime as the graph is written, without optimization."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def integers(*shape: int, low: int = -127, high: int = 127, dtype: type = np.int8, seed: int = 0) -> np.ndarray:
    """Integers from ``low`` to ``high``, both included."""
    return np.random.default_rng(seed).integers(low, high + 1, shape).astype(dtype)


def steps(*shape: int, seed: int = 0) -> np.ndarray:
    """Positive scales, float32."""
    return (np.random.default_rng(seed).random(shape) * 0.01 + 0.001).astype(np.float32)
