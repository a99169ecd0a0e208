"""The ONNX target: the same numbers as the Program, and the kernels that onnxruntime runs for them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from graphprune.ir.sites import find_sites
from graphprune.ir.trace import trace
from graphprune.sparsity.layout import to_logical
from graphprune.targets.onnx import Onnx
from tests.lowered_onnx import (
    QUANTIZED,
    closeness,
    difference,
    lower_once,
    optimized_operators,
    quantized_program,
)
from tests.models import HUGGING_FACE
from tests.traced import run_passes

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
gs = pytest.importorskip("onnx_graphsurgeon")


_LIGHT = [name for name in HUGGING_FACE if name != "t5"]


def _half(names: list[str]) -> list[object]:
    """Each name in one form; in the other where slow tests run."""
    pairs = itertools.product(enumerate(names), enumerate(("qdq", "integer")))
    return [
        pytest.param(name, form, marks=() if (row + column) % 2 == 0 else pytest.mark.slow)
        for (row, name), (column, form) in pairs
    ]


@pytest.mark.parametrize(
    "name",
    [
        *_LIGHT,
        pytest.param("t5", marks=pytest.mark.slow),
        "tied_embedding",
        "grouped_conv",
        "conv_transpose",
        "conv_bn",
    ],
)
def test_float_models_answer_as_their_program(name: str) -> None:
    for batch in (3, 1):
        assert closeness(name, False, batch) < 1e-4


@pytest.mark.parametrize("name", QUANTIZED)
def test_int8_models_answer_as_their_program(name: str) -> None:
    for batch in (3, 1):
        assert closeness(name, True, batch) < 1e-2  # a value on the edge of two integers may fall to either side


@pytest.mark.parametrize("name", ["bert_qa", "resnet"])
def test_integer_operators_answer_as_the_program(name: str) -> None:
    for batch in (3, 1):
        assert closeness(name, True, batch, "integer") < 1e-2


@pytest.mark.parametrize(("name", "form"), _half(["bert_qa", "resnet"]))
def test_every_layer_runs_in_an_integer_kernel(name: str, form: str) -> None:
    folder, lowered, program = lower_once(name, True, form)
    sites, _ = find_sites(program)
    assert lowered.coverage["float kernel"] == ()
    assert set(lowered.coverage["integer kernel"]) == {site.name for site in sites}
    assert optimized_operators(folder)["DequantizeLinear"] == 0
    operators = {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}
    assert operators & {"MatMulIntegerToFloat", "QLinearConv"} if form == "integer" else "DequantizeLinear" in operators


@pytest.mark.parametrize(("name", "form"), _half(["bert_qa", "conv_bn", "tied_embedding"]))
def test_dynamic_quantization(name: str, form: str, tmp_path: Path) -> None:
    program = quantized_program(name, "dynamic-quant")
    lowered = Onnx(form=form).lower(program, tmp_path)
    assert lowered.coverage["float kernel"] == ()
    for batch in (3, 1):
        assert difference(tmp_path, lowered, program, batch) < 1e-2
    operators = optimized_operators(tmp_path)
    assert not {"DequantizeLinear", "MatMulInteger"} & set(operators)
    if name == "bert_qa":
        assert (operators["DynamicQuantizeMatMul"], operators["MatMulIntegerToFloat"]) == (7, 6)
        assert operators["DynamicQuantizeLinear"] == 2  # queries, keys and values of a layer share one


_SMALL = {
    "int4": "annotate-quant{weights=int4:symmetric:channel:group16,activations=none,embeddings=none}",
    "uint4": "annotate-quant{weights=uint4:affine:channel,activations=none,embeddings=uint4:affine:channel}",
    "int8": "annotate-quant{weights=int8:symmetric:channel:group16,activations=none,embeddings=int8:symmetric:channel:group16}",
}


_COMMON = [("bert_qa", "int4", 21, "qdq"), ("gpt2_conv1d", "int8", 21, "integer")]
_ALL = itertools.product(("bert_qa", "gpt2_conv1d"), _SMALL, (18, 21), ("qdq", "integer"))


@pytest.mark.parametrize(
    ("name", "kind", "opset", "form"),
    [
        *_COMMON,
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in _ALL
            if case not in _COMMON and case[2:] != (18, "integer")
        ),
    ],
)
def test_small_weights(name: str, kind: str, opset: int, form: str, tmp_path: Path) -> None:
    program = quantized_program(name, f"{_SMALL[kind]},insert-fake-quant,freeze-quant")
    target = Onnx(opset=opset, form=form)
    lowered = target.lower(program, tmp_path)
    sites, _ = find_sites(program)
    names = {site.name for site in sites}
    assert names <= set(lowered.coverage[kind])
    assert set(lowered.coverage["integer kernel"]) == names
    assert difference(tmp_path, lowered, program, 3) < 2e-2
    weights = target.weights(tmp_path, {site.name: site.layout.value for site in sites})
    for site in sites:
        logical = to_logical(program.tensor(site.name).detach(), site.layout).numpy()
        stored = weights[site.name]
        assert str(stored.values.dtype) == kind
        assert stored.scale is not None
        assert stored.zero_point is not None
        scale, offset = (_spread(np.asarray(item), logical) for item in (stored.scale, stored.zero_point))
        assert np.allclose((stored.values.astype(np.float32) - offset) * scale, logical, rtol=1e-6, atol=1e-8)
        assert np.array_equal(stored.zeros, logical == 0)


def test_a_large_table_is_stored_as_integers(tmp_path: Path) -> None:
    """The exporter folds constants of some size only; a table has a zero-point for each of many rows."""
    model = torch.nn.Sequential(torch.nn.Embedding(5000, 8), torch.nn.Linear(8, 4)).eval()
    program = run_passes(trace(model, (torch.zeros(2, 3, dtype=torch.int64),)), "dynamic-quant")
    lowered = Onnx().lower(program, tmp_path)
    assert lowered.coverage["int8"] == ("1.weight", "0.weight")
    assert lowered.passes["look-up-integers"] == 1
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert not operators & {"QuantizeLinear", "DequantizeLinear"}


def _spread(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Scales of rows or of their parts, for every entry."""
    values = values.astype(np.float32).reshape(len(values), -1) if values.ndim else values.astype(np.float32)
    return np.repeat(values, like.shape[1] // values.shape[1], axis=1) if values.ndim else values


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("quantized", [False, True])
def test_weights_come_back_as_they_were(name: str, quantized: bool) -> None:
    folder, lowered, program = lower_once(name, quantized)
    sites, _ = find_sites(program)
    weights = Onnx().weights(folder, {site.name: site.layout.value for site in sites})
    assert set(weights) == {site.name for site in sites}
    assert set(weights) <= set(lowered.coverage["int8" if quantized else "float"])
    for site in sites:
        logical = to_logical(program.tensor(site.name).detach(), site.layout).numpy()
        stored = weights[site.name]
        assert stored.values.shape == site.shape
        if not quantized:
            assert np.array_equal(stored.values, logical)
            continue
        assert stored.values.dtype == np.int8
        assert stored.scale is not None
        real = stored.values.astype(np.float32) * stored.scale.reshape(-1, 1)
        assert np.allclose(real, logical, rtol=1e-6, atol=0)
        assert np.array_equal(stored.zeros, logical == 0)


def test_every_linear_runs_on_integers() -> None:
    folder, lowered, _ = lower_once("bert_sequence", True)
    operators = optimized_operators(folder)
    assert operators["MatMulIntegerToFloat"] + operators["QGemm"] == len(lowered.coverage["integer kernel"])
    assert operators["DequantizeLinear"] == 0
    assert operators["BiasGelu"] == 2
    assert operators["SkipLayerNormalization"] == 0


def test_gpt2_layers_run_on_integers() -> None:
    folder, lowered, _ = lower_once("gpt2", True)
    operators = optimized_operators(folder)
    assert operators["QGemm"] == len(lowered.coverage["integer kernel"]) - 1
    assert operators["MatMulIntegerToFloat"] == 1  # the output layer, whose weight is the embedding's
    assert lowered.passes["sink-dequantize"] == 1


def test_convolutions_with_quantized_results_run_on_integers() -> None:
    operators = optimized_operators(lower_once("conv_bn", True)[0])
    assert operators["QLinearConv"] == 2
    assert operators["QLinearGlobalAveragePool"] == 1
    assert operators["QGemm"] == 1


def test_normalization_of_llama_is_fused() -> None:
    assert optimized_operators(lower_once("llama", False)[0])["SimplifiedLayerNormalization"] == 5
