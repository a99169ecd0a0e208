"""Programs lowered to ONNX once for all tests, and how far they are from what they were."""

from __future__ import annotations

import collections
import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from graphprune.ir.program import Program
from graphprune.pipeline.target import Lowered
from graphprune.targets.onnx import Onnx
from tests.shared_folder import shared_folder
from tests.traced import run_passes, traced

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
gs = pytest.importorskip("onnx_graphsurgeon")

QUANTIZED = ("bert_qa", "bert_sequence", "gpt2", "resnet", "conv_bn", "shared_weight")
CONVOLUTIONAL = ("resnet", "conv_bn")


def random_inputs(program: Program, batch: int, length: int = 7) -> dict[str, torch.Tensor]:
    """Random inputs; the second example's mask hides its first tokens."""
    generator = torch.Generator().manual_seed(batch)
    tensors = {}
    for item in program.interface.inputs:
        shape = [
            size if isinstance(size, int) else batch if dim == 0 else length for dim, size in enumerate(item.shape)
        ]
        if item.dtype.is_floating_point:
            tensors[item.name] = torch.randn(shape, generator=generator)
        elif "mask" in item.name:
            tensors[item.name] = torch.ones(shape, dtype=item.dtype)
            tensors[item.name][1:2, :3] = 0
        else:
            top = 2 if "type" in item.name or "label" in item.name or "positions" in item.name else 32
            tensors[item.name] = torch.randint(0, top, shape, generator=generator)
    return tensors


@torch.no_grad()
def outputs_of(program: Program, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    result = program(**inputs)
    items = {"output": result} if isinstance(result, torch.Tensor) else dict(result.items())
    return {name: value.numpy() for name, value in items.items() if value is not None}


@torch.no_grad()
def randomize(program: Program) -> None:
    """Give biases and running statistics values that matter."""
    generator = torch.Generator().manual_seed(3)
    for name, value in (*program.named_parameters(), *program.named_buffers()):
        if name.endswith("bias") or "running" in name:
            value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + 0.1)


@functools.cache
def made_program(name: str, quantized: bool) -> Program:
    program = traced(name, labels=name in ("bert_qa", "gpt2"))
    randomize(program)
    if quantized:
        run_passes(program, "fold-conv-bn,insert-fake-quant" if name in CONVOLUTIONAL else "insert-fake-quant")
        program.train()
        with torch.no_grad():
            for _ in range(2):
                program(
                    **{key: value for key, value in random_inputs(program, 4, 16).items() if "positions" not in key}
                )
        run_passes(program.eval(), "freeze-quant")
    return program


def lower_once(name: str, quantized: bool, form: str = "qdq") -> tuple[Path, Lowered, Program]:
    return _lowered(name, quantized, form)  # all three in place: a cache takes f(a) and f(a, default) for two calls


@functools.cache
def _lowered(name: str, quantized: bool, form: str) -> tuple[Path, Lowered, Program]:
    program = made_program(name, quantized)
    folder = shared_folder()
    return folder, Onnx(form=form).lower(program, folder), program


@functools.cache
def quantized_program(name: str, recipe: str) -> Program:
    """A Program quantized without data."""
    program = traced(name)
    randomize(program)
    return run_passes(program, f"fold-conv-bn,{recipe}" if name in CONVOLUTIONAL else recipe)


def optimized_operators(folder: Path) -> collections.Counter[str]:
    """Operators that onnxruntime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def closeness(name: str, quantized: bool, batch: int, form: str = "qdq") -> float:
    return difference(*lower_once(name, quantized, form), batch)


def difference(folder: Path, lowered: Lowered, program: Program, batch: int) -> float:
    """Largest difference of the outputs, as a fraction of the largest."""
    inputs = {key: value for key, value in random_inputs(program, batch).items() if key in lowered.inputs}
    expected = outputs_of(program, inputs)
    actual = Onnx().open(folder)({key: value.numpy() for key, value in inputs.items()})
    assert set(actual) == set(lowered.outputs) == set(expected)
    return max(
        float(np.abs(actual[key] - expected[key]).max() / max(1.0, np.abs(expected[key]).max())) for key in expected
    )
