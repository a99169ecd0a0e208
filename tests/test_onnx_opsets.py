"""Older and newer ONNX operator sets: the same numbers in each, and an error that names what has no form."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import LoweringError
from graphprune.ir.trace import trace
from graphprune.targets.onnx import Onnx
from tests.shared_folder import shared_folder
from tests.traced import run_passes, traced

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from graphprune.targets.onnx_model.opsets import opset_of, to_opset  # noqa: E402

_FAMILIES = ("bert_qa", "distilbert_qa", "gpt2", "t5", "vit", "resnet")
_QUICK = {"bert_qa": ("float", "qdq", "integer"), "gpt2": (), "t5": (), "resnet": ("float", "integer")}
"""Forms that run in the default suite; the others run where slow tests do."""
_F = onnx.TensorProto.FLOAT
_RANDOM = np.random.default_rng(0)
_X = _RANDOM.normal(size=(2, 3, 5)).astype(np.float32)


@functools.cache
def _program(name: str, quantized: bool) -> gp.Program:
    program = traced(name)
    if not quantized:
        return program
    return run_passes(program, "fold-conv-bn,dynamic-quant" if name == "resnet" else "dynamic-quant")


@functools.cache
def _lowered(name: str, form: str, opset: int = 18) -> Path:
    folder = shared_folder()
    Onnx(form=form, opset=opset).lower(_program(name, form != "float"), folder)
    return folder / "model.onnx"


def _run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def _inputs(model: onnx.ModelProto, batch: int = 2, length: int = 7) -> dict[str, np.ndarray]:
    generator, found = np.random.default_rng(1), {}
    for item in model.graph.input:
        free = iter((batch, length))
        shape = [size.dim_value or next(free) for size in item.type.tensor_type.shape.dim]
        if item.type.tensor_type.elem_type == _F:
            found[item.name] = generator.normal(size=shape).astype(np.float32)
        else:
            found[item.name] = (generator.integers(0, 2, shape) if "ids" in item.name else np.ones(shape)).astype(
                np.int64
            )
    return found


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=() if form in _QUICK.get(name, ("float",)) else pytest.mark.slow)
        for name in _FAMILIES
        for form in ("float", "qdq", "integer")
    ],
)
def test_older_opsets_give_the_same_numbers(name: str, form: str) -> None:
    model = onnx.load(_lowered(name, form))
    inputs = _inputs(model)
    expected = _run(model, inputs)
    for opset in range(13, 18):
        written = to_opset(model, opset)
        onnx.checker.check_model(written, full_check=True)
        assert opset_of(written) == opset
        assert written.ir_version <= 8
        assert {item.name for item in model.graph.initializer} >= {
            item.name for item in written.graph.initializer if len(item.dims) > 1
        }
        for actual, want in zip(_run(written, inputs), expected, strict=True):
            assert np.allclose(actual, want, rtol=1e-5, atol=1e-5)
    assert opset_of(model) == 18


@pytest.mark.parametrize(
    ("name", "form"), [("bert_qa", "float"), pytest.param("gpt2", "qdq", marks=pytest.mark.slow), ("resnet", "integer")]
)
def test_the_newest_opset_gives_the_same_numbers(name: str, form: str) -> None:
    model, newest = onnx.load(_lowered(name, form)), onnx.load(_lowered(name, form, 26))
    assert opset_of(newest) == 26
    inputs = _inputs(model)
    for actual, want in zip(_run(newest, inputs), _run(model, inputs), strict=True):
        assert np.allclose(actual, want, rtol=1e-5, atol=1e-5)


def test_an_artifact_of_opset_13_is_verified(tmp_path: Path) -> None:
    artifact = gp.export(_program("bert_qa", True), Onnx(opset=13), tmp_path / "out", per_node=True)
    assert artifact.manifest.coverage["float kernel"] == []
    assert gp.verify(tmp_path / "out", per_node=True).passed


def _model(kind: str, opset: int, inputs: dict[str, np.ndarray], constants: dict[str, Any], **attributes: Any) -> Any:
    """A model of one operator; inputs are dynamic, an empty name is an input that is left out."""
    outputs = attributes.pop("outputs", 1)
    names = [*inputs, *constants]
    node = onnx.helper.make_node(kind, names, [f"y{index}" for index in range(outputs)], name="the_node", **attributes)
    dtype = onnx.helper.np_dtype_to_tensor_dtype
    graph = onnx.helper.make_graph(
        [node],
        "graph",
        [
            onnx.helper.make_tensor_value_info(
                name, dtype(item.dtype), [f"{name}{dim}" if dim == 1 else size for dim, size in enumerate(item.shape)]
            )
            for name, item in inputs.items()
        ],
        [onnx.helper.make_empty_tensor_value_info(f"y{index}") for index in range(outputs)],
        [onnx.numpy_helper.from_array(np.asarray(item), name) for name, item in constants.items() if name],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(model)
    model.graph.output.clear()
    model.graph.output.extend(inferred.graph.output)
    return model


_INT = (_X * 10).astype(np.int32)
_CASES: list[tuple[str, int, int, dict[str, np.ndarray], dict[str, Any], dict[str, Any]]] = [
    ("ReduceMean", 18, 13, {"x": _X}, {"axes": np.array([1])}, {}),
    ("ReduceMax", 20, 13, {"x": _X > 0}, {"axes": np.array([2])}, {"keepdims": 0}),
    ("ReduceMean", 18, 13, {"x": _X}, {}, {"noop_with_empty_axes": 1}),
    ("ReduceLogSumExp", 18, 13, {"x": _X}, {}, {"keepdims": 0}),
    ("Split", 18, 13, {"x": _X}, {}, {"num_outputs": 2, "axis": 2, "outputs": 2}),
    ("Split", 18, 13, {"x": _X}, {}, {"num_outputs": 2, "axis": 1, "outputs": 2}),
    ("LayerNormalization", 17, 13, {"x": _X}, {"s": _X[0, 0], "b": _X[0, 1]}, {}),
    ("LayerNormalization", 17, 13, {"x": _X}, {"s": _X[0, 0]}, {"outputs": 3}),
    ("LayerNormalization", 17, 13, {"x": _X.astype(np.float16)}, {"s": _X[0, 0].astype(np.float16)}, {"axis": 2}),
    ("RMSNormalization", 23, 13, {"x": _X}, {"s": _X[0, 0]}, {}),
    ("Gelu", 20, 13, {"x": _X}, {}, {}),
    ("Gelu", 20, 13, {"x": _X}, {}, {"approximate": "tanh"}),
    ("HardSwish", 14, 13, {"x": _X * 5}, {}, {}),
    ("Mish", 18, 13, {"x": _X}, {}, {}),
    ("Swish", 24, 13, {"x": _X}, {}, {"alpha": 1.5}),
    ("Shape", 18, 13, {"x": _X}, {}, {"start": 1}),
    ("Shape", 18, 13, {"x": _X}, {}, {"start": -3, "end": -1}),
    ("Reshape", 18, 13, {"x": _X}, {"shape": np.array([-1, 3])}, {"allowzero": 1}),
    ("Trilu", 18, 13, {"x": _X}, {}, {"upper": 0}),
    ("Trilu", 18, 13, {"x": _X}, {"k": np.array(1)}, {}),
    ("CastLike", 18, 13, {"x": _X}, {"like": np.array(1)}, {}),
    ("Pad", 18, 13, {"x": _X}, {"pads": np.array([1, 2]), "value": np.float32(3), "axes": np.array([-1])}, {}),
    ("BitwiseNot", 18, 13, {"x": _INT}, {}, {}),
    ("GridSample", 20, 16, {"x": _X[None]}, {"grid": _X[:1, :1, :2, None].repeat(2, 3) / 3}, {"mode": "linear"}),
    ("Identity", 26, 13, {"x": _X}, {}, {}),
    ("Resize", 19, 13, {"x": _X}, {"": np.zeros(0), "scales": np.array([1, 1, 2], np.float32)}, {"mode": "nearest"}),
]


@pytest.mark.parametrize(
    ("kind", "opset", "target", "inputs", "constants", "options"),
    _CASES,
    ids=[f"{c[0]}-{i}" for i, c in enumerate(_CASES)],
)
def test_an_operator_is_written_in_an_older_opset(
    kind: str, opset: int, target: int, inputs: Any, constants: Any, options: Any
) -> None:
    model = _model(kind, opset, inputs, constants, **options)
    before = model.SerializeToString()
    expected = _run(model, inputs)
    for version in range(target, opset):
        written = to_opset(model, version)
        onnx.checker.check_model(written, full_check=True)
        for actual, want in zip(_run(written, inputs), expected, strict=True):
            assert actual.dtype == want.dtype
            tolerance = 2e-3 if actual.dtype == np.float16 else 2e-6
            assert np.allclose(actual.astype(np.float64), want.astype(np.float64), rtol=tolerance, atol=tolerance)
    assert model.SerializeToString() == before


_REFUSED: list[tuple[str, int, int, dict[str, np.ndarray], dict[str, Any], dict[str, Any], str]] = [
    (
        "BitwiseAnd",
        18,
        17,
        {"x": _INT},
        {"m": np.int32(3)},
        {},
        "the operator does not exist there. The lowest .* is 18",
    ),
    (
        "BitwiseNot",
        18,
        13,
        {"x": _INT.astype(np.uint8)},
        {},
        {},
        "only int32 and int64 have another form. The lowest .* is 18",
    ),
    ("ReduceMean", 18, 17, {"x": _X, "axes": np.array([1])}, {}, {}, "its axes are computed"),
    ("ReduceL1", 18, 17, {"x": _X}, {}, {"noop_with_empty_axes": 1}, "it reduces nothing"),
    (
        "Reshape",
        14,
        13,
        {"x": _X[:0]},
        {"shape": np.array([0, 15])},
        {"allowzero": 1},
        "no entries .* The lowest .* is 14",
    ),
    (
        "Pad",
        19,
        18,
        {"x": _X},
        {"pads": np.array([0, 0, 1, 0, 0, 1])},
        {"mode": "wrap"},
        "mode='wrap' does not exist there",
    ),
    ("DequantizeLinear", 21, 20, {"x": _INT.astype(np.int16)}, {"s": np.float32(1)}, {}, r"tensor\(int16\).* is 21"),
    ("CenterCropPad", 18, 17, {"x": _X}, {"shape": np.array([2, 3, 4])}, {}, "the operator does not exist there"),
]


@pytest.mark.parametrize(("kind", "opset", "target", "inputs", "constants", "options", "message"), _REFUSED)
def test_what_has_no_form_is_named(
    kind: str, opset: int, target: int, inputs: Any, constants: Any, options: Any, message: str
) -> None:
    model = _model(kind, opset, inputs, constants, **options)
    with pytest.raises(LoweringError, match=f"{kind} in node the_node has no form in ONNX opset {target}: .*{message}"):
        to_opset(model, target)


def test_only_older_opsets_are_made() -> None:
    model = _model("Relu", 18, {"x": _X}, {})
    for opset in (12, 19):
        with pytest.raises(LoweringError, match=f"opset={opset} cannot be made of opset 18; choose 13 to 18"):
            to_opset(model, opset)
    for opset in (12, 27):
        with pytest.raises(LoweringError, match=f"opset={opset} is not supported; choose 13 to 26"):
            Onnx(opset=opset)


class _Inner(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        if self.kind == "scatter":
            return x.index_put((torch.tensor([0, 0]),), torch.ones(2, 4), accumulate=True)
        if self.kind == "bessel":
            return torch.special.i0e(x)
        return torch.cumprod(x, 0)


class _Outer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = _Inner(kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_an_operator_of_a_model_is_named_with_its_module_and_line(tmp_path: Path) -> None:
    program = trace(_Outer("scatter").eval(), (torch.randn(4, 4),))
    place = r"ScatterND in aten\.index_put\.default in inner \(test_onnx_opsets\.py, line \d+\)"
    with pytest.raises(LoweringError, match=rf"{place} has no form in ONNX opset 15: .* is 16; set opset=16"):
        Onnx(opset=15).lower(program, tmp_path)
    assert Onnx(opset=16).lower(program, tmp_path).files == ("model.onnx",)


@pytest.mark.parametrize(
    ("kind", "operator", "inner"),
    [
        ("bessel", "aten.special_i0e.default", "prims.bessel_i0e.default"),
        ("product", "aten.cumprod.default", "prims.prod.default"),
    ],
)
def test_an_operator_without_a_translation_is_named(kind: str, operator: str, inner: str, tmp_path: Path) -> None:
    program = trace(_Outer(kind).eval(), (torch.randn(4, 4),))
    message = rf"{operator} in inner \(test_onnx_opsets\.py, line \d+\) cannot be written as ONNX: .* no translation of {inner}"
    with pytest.raises(LoweringError, match=message):
        Onnx().lower(program, tmp_path)
