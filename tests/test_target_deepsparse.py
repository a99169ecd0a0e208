"""DeepSparse: the ONNX that it takes (here, on onnxruntime), and the engine itself (marker ``deepsparse``, `make test-deepsparse`)."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.artifact.samples import make_inputs, run_program
from graphprune.errors import LoweringError
from graphprune.pipeline.remote import Remote, interpreter
from graphprune.pipeline.target import Support
from graphprune.targets.deepsparse import DeepSparse
from graphprune.targets.deepsparse_model.engine import Examined, examine, read_log
from graphprune.targets.onnx import Onnx
from tests.test_quant_matrix import pruned
from tests.traced import traced

onnx = pytest.importorskip("onnx", reason="the DeepSparse target writes ONNX: extra onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="the DeepSparse target writes ONNX: extra onnx")

INT8 = "annotate-quant{preset=deepsparse},insert-observers,calibrate{progress=false},insert-fake-quant,freeze-quant"
CHANNELS = "annotate-quant,insert-observers,calibrate{progress=false},insert-fake-quant,freeze-quant"
WEIGHTS = "annotate-quant{activations=none},insert-fake-quant,freeze-quant"
ENGINE = interpreter("deepsparse")
engine = [
    pytest.mark.deepsparse,
    pytest.mark.skipif(
        ENGINE is None, reason="GRAPHPRUNE_DEEPSPARSE_PYTHON is not set: make test-deepsparse makes its environment"
    ),
]


def program_of(name: str, recipe: str = "", pattern: str = "dense") -> gp.Program:
    program = traced(name)
    if name in ("resnet", "conv_bn"):
        program = gp.transform(program, "fold-conv-bn")
    program = pruned(program, pattern)
    if "bert" in name and recipe == INT8:
        recipe = f"expand-attention,{recipe}"
    return gp.transform(program, recipe, data=make_inputs(program)) if recipe else program


def written(program: gp.Program) -> Any:
    from graphprune.targets.deepsparse_model.passes import write_model
    from graphprune.targets.onnx_model.export import inference_copy

    return write_model(inference_copy(program, True))[0]


@functools.cache
def pruned_and_written(name: str, recipe: str) -> tuple[gp.Program, Any]:
    """A Program of half of the 4x1 blocks, its masks folded, and its ONNX; do not change them."""
    program = gp.transform(program_of(name, recipe, "4x1"), "fold-masks")
    return program, written(program)


def on_onnxruntime(model: Any, inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, {name: value.numpy() for name, value in inputs.items()}), strict=True))


def kinds(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def check_numbers(program: gp.Program, model: Any, tolerance: float) -> None:
    names = [item.name for item in model.graph.output]
    for inputs in make_inputs(program):
        expected, found = run_program(program, inputs, names), on_onnxruntime(model, inputs)
        for name, want in expected.items():
            np.testing.assert_allclose(found[name], want, atol=tolerance * max(1.0, float(np.abs(want).max())))


# What is written


@pytest.mark.parametrize("name", ["bert_qa", "vit", "resnet"])
def test_floats_in_the_words_of_the_engine(name: str) -> None:
    program, model = pruned_and_written(name, "")
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 13)]
    assert model.ir_version <= 8
    assert not set(kinds(model)) & {"LayerNormalization", "GatherND", "Where", "And", "GreaterOrEqual", "Range"}
    assert not any(item.data_type == onnx.TensorProto.BOOL for item in model.graph.initializer)
    if name == "resnet":
        assert kinds(model)["GlobalAveragePool"] == 1
        assert not kinds(model)["ReduceMean"]
    check_numbers(program, model, 1e-5)


def test_a_row_that_sees_nothing_gives_zero_attention() -> None:
    program, model = pruned_and_written("bert_qa", "")
    inputs = make_inputs(program)[0]
    inputs["attention_mask"][0] = 0
    expected = run_program(program, inputs, [item.name for item in model.graph.output])
    for name, value in on_onnxruntime(model, inputs).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5)


@pytest.mark.parametrize("name", ["bert_qa", "resnet", "mlp"])
def test_integers_in_the_words_of_the_engine(name: str) -> None:
    program, model = pruned_and_written(name, INT8)
    found = kinds(model)
    assert {item.domain for item in model.opset_import} == {""}
    types = {item.name: item.data_type for item in model.graph.initializer}
    made = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type in ("MatMulInteger", "ConvInteger"):
            assert len(node.input) == 4
            assert all(node.input), "an absent zero-point stops the engine"
        if node.op_type == "Add" and any(made.get(item, node).op_type == "MatMulInteger" for item in node.input):
            assert onnx.TensorProto.INT32 in {types.get(item) for item in node.input}
    assert not any(
        types.get(node.input[1]) == onnx.TensorProto.FLOAT for node in model.graph.node if node.op_type == "MatMul"
    )
    if name == "bert_qa":
        assert found["MatMulInteger"] == 13 + 4  # the products of two attentions too
        assert not found["MatMul"]
    if name == "resnet":
        assert found["ConvInteger"] + found["QLinearConv"] == 6
        pool = next(node for node in model.graph.node if node.op_type == "MaxPool")
        assert made[pool.input[0]].op_type != "QuantizeLinear"
    check_numbers(program, model, 5e-3)


def test_a_scale_a_channel_is_kept() -> None:
    program = program_of("resnet", CHANNELS)
    model = written(program)
    assert kinds(model)["ConvInteger"] == 6
    assert not kinds(model)["QLinearConv"]  # the engine has it for one scale only
    check_numbers(program, model, 5e-3)


@pytest.mark.parametrize("scheme", ["int8:symmetric:channel", "uint8:affine:channel", "int8:symmetric:tensor"])
def test_weights_that_meet_floats_are_stored_as_integers(scheme: str, tmp_path: Path) -> None:
    program = program_of("mlp", WEIGHTS.replace("none}", f"none,weights={scheme}}}"))
    model = written(program)
    assert not kinds(model)["DequantizeLinear"]
    check_numbers(program, model, 1e-5)
    onnx.save(model, tmp_path / "model.onnx")
    stored = DeepSparse().weights(tmp_path, {"first.weight": "out_in"})["first.weight"]
    assert stored.values.dtype == scheme.partition(":")[0]
    assert stored.scale is not None
    real = (stored.values.astype(np.float32) - stored.zero_point.reshape(-1, 1)) * stored.scale.reshape(-1, 1)
    want = program.tensor("first.weight").detach().numpy()
    np.testing.assert_allclose(real, want, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "recipe"), [("bert_qa", INT8), ("resnet", INT8), ("resnet", WEIGHTS), ("bert_qa", "")]
)
def test_pruned_weights_are_zero_in_the_file(name: str, recipe: str, tmp_path: Path) -> None:
    program, model = pruned_and_written(name, recipe)
    onnx.save(model, tmp_path / "model.onnx")
    from graphprune.ir.sites import find_sites
    from graphprune.sparsity.layout import to_logical

    sites, _ = find_sites(program)
    stored = DeepSparse().weights(tmp_path, {site.name: site.layout.value for site in sites})
    assert set(stored) == {site.name for site in sites}
    for site in sites:
        zeros = (to_logical(program.tensor(site.name).detach(), site.layout) == 0).numpy()
        assert (stored[site.name].zeros | ~zeros).all()
        assert stored[site.name].values.dtype == ("int8" if recipe else "float32")


def test_look_ups_out_of_order_are_left() -> None:
    from graphprune.targets.deepsparse_model.masks import gather_in_order
    from graphprune.targets.onnx_model.draft import Draft, surgeon

    helper, info = onnx.helper, onnx.helper.make_tensor_value_info
    nodes = [helper.make_node("GatherND", ["x", "places"], ["y"])]
    graph = helper.make_graph(nodes, "g", [info("x", 1, [2, 3]), info("places", 7, [4, 2])], [info("y", 1, [4])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    assert gather_in_order(Draft(surgeon().import_onnx(model))) == 0


# What is refused


def test_weights_with_a_zero_point_are_refused() -> None:
    recipe = INT8.replace("preset=deepsparse", "preset=deepsparse,weights=uint8:affine:tensor")
    with pytest.raises(LoweringError, match=r"first\.weight has the zero-point \d+; DeepSparse .* Plan int8:symmetric"):
        written(program_of("mlp", recipe))


@pytest.mark.parametrize(("recipe", "row"), [("dynamic-quant", "dynamic uint8"), ("cast-mixed{dtype=float16}", "fp16")])
def test_formats_that_the_engine_lacks_are_refused(recipe: str, row: str, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=f"cannot run {row}"):
        gp.export(program_of("mlp", recipe), "deepsparse", tmp_path / "out")


def test_without_the_engine_the_lines_to_run_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAPHPRUNE_DEEPSPARSE_PYTHON", raising=False)
    (tmp_path / "model.onnx").touch()
    lines = r"GRAPHPRUNE_DEEPSPARSE_PYTHON=\$\(python tools/environment.py deepsparse\).*pip install \"graphprune\[deepsparse\]\""
    with pytest.raises(LoweringError, match=lines):
        DeepSparse().open(tmp_path)
    with pytest.raises(LoweringError, match=lines):
        gp.export(program_of("mlp"), "deepsparse", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_the_engine_takes_in_part_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHPRUNE_DEEPSPARSE_PYTHON", sys.executable)
    found = Examined(0.75, ("CumSum node_cumsum",), ("cumsum: not known",))
    monkeypatch.setattr("graphprune.targets.deepsparse.examine", lambda *_: found)
    program = program_of("mlp")
    with pytest.raises(LoweringError, match=r"takes 75.0% .* leaves CumSum node_cumsum .*allow_fallback=true"):
        DeepSparse().lower(program, tmp_path)
    lowered = DeepSparse(allow_fallback=True).lower(program, tmp_path)
    assert lowered.coverage["fraction_of_supported_ops"] == ("0.75",)
    assert lowered.coverage["left to onnxruntime"] == ("CumSum node_cumsum",)
    assert lowered.coverage["float kernel"] == ("first.weight", "second.weight", "head.weight")


def test_an_engine_that_stops_is_reported(tmp_path: Path) -> None:
    stopping = tmp_path / "python"
    stopping.write_text("#!/bin/sh\necho 'Assertion at src/supported/ops.cc:370' >&2\nkill -ABRT $$\n")
    stopping.chmod(0o755)
    with pytest.raises(LoweringError, match=r"does not take model.onnx: Assertion at src/supported/ops.cc:370"):
        examine(str(stopping), tmp_path / "model.onnx", {"x": [1, 2]})


def test_what_the_engine_says_is_read() -> None:
    said = """[nm_ort] == GetCapability ==
Printing GraphViewer net:
Node 0: Conv first
Node 1: ReduceMean mean
Node 2: Split split
Node 3: Gemm last

[nm_ort 7f >DIAGNOSE< unsupported src/ops.cc:130] Unsupported ReduceMean mean, keepdims != 1
[nm_ort] == Beginning new subgraph ==
[nm_ort] Printing subgraph:
Node 0: Conv first

[nm_ort] == Beginning new subgraph ==
[nm_ort] Printing subgraph:
Node 2: Split split

[nm_ort] ==== FAILED TO COMPILE ====
Message: Invalid node split
[nm_ort] == Beginning new subgraph ==
[nm_ort] Printing subgraph:
Node 3: Gemm last
"""
    left, reasons = read_log(said)
    assert left == ("ReduceMean mean", "Split split")
    assert reasons == ("ReduceMean mean, keepdims != 1", "Invalid node split")


def test_every_row_of_the_table_is_stated() -> None:
    table = DeepSparse.capabilities()
    assert set(table) == set(Onnx.capabilities())
    assert {table[name] for name in ("unstructured", "NxM", "N:M", "channel", "int8", "fp32")} == {Support.EXPLOITED}
    assert table["dynamic uint8"] is Support.REFUSED


def test_importing_the_target_needs_nothing() -> None:
    code = "import sys, graphprune.targets.deepsparse; sys.exit(any(n in sys.modules for n in ('onnx', 'deepsparse')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What the engine does


def with_engine(test: Any) -> Any:
    for mark in engine:
        test = mark(test)
    return test


@with_engine
@pytest.mark.parametrize("pattern", ["dense", "4x1"])
@pytest.mark.parametrize("recipe", ["", INT8], ids=["fp32", "int8"])
@pytest.mark.parametrize("name", ["bert_qa", "distilbert_qa", "vit", "resnet"])
def test_the_matrix_runs_in_the_engine(name: str, recipe: str, pattern: str, tmp_path: Path) -> None:
    program = program_of(name, recipe, pattern)
    manifest = gp.export(program, "deepsparse", tmp_path / "out").manifest
    assert manifest.coverage["fraction_of_supported_ops"] == ["1"]
    assert not manifest.coverage["left to onnxruntime"]
    assert bool(manifest.coverage["integer kernel"]) == bool(recipe)
    assert {site.stored for site in manifest.sites} == {"int8" if recipe else "float32"}
    assert not (recipe and manifest.coverage["float kernel"])
    if pattern == "4x1":
        assert manifest.sparsity() == pytest.approx(0.5, abs=0.03)
        assert all(site.pattern_holds and site.zeros_at_zero_point for site in manifest.sites if site.pattern)


@with_engine
def test_sizes_of_every_kind_run_in_one_process(tmp_path: Path) -> None:
    program = program_of("bert_qa")
    folder = tmp_path / "out"
    gp.export(program, "deepsparse", folder)
    before = (folder / "model.onnx").read_bytes()
    with Remote(DeepSparse(), folder, threads=1) as remote:
        for batch, sequence in [(1, 8), (4, 24), (1, 8), (3, 1)]:
            inputs = make_inputs(program, sizes=({0: batch, 1: sequence},))[0]
            inputs["attention_mask"][0] = 0
            expected = run_program(program, inputs, ["start_logits", "end_logits"])
            found = remote.run({name: value.numpy() for name, value in inputs.items()})
            for name, want in expected.items():
                np.testing.assert_allclose(found[name], want, atol=1e-5)
        with pytest.raises(LoweringError, match="'attention_mask' is missing"):
            remote.run({"input_ids": np.zeros((1, 8), np.int64)})
        given = {name: np.zeros(8, np.int64) for name in inputs}
        with pytest.raises(LoweringError, match=r"has sizes \[8\]; model.onnx takes \[batch, sequence\]"):
            remote.run(given)
    assert (folder / "model.onnx").read_bytes() == before


class Summing(nn.Module):
    """A cumulative sum, which the engine does not know, between two linear layers: [b, 16] to [b, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cumsum(self.first(x), 1))


@with_engine
def test_what_is_left_to_onnxruntime_is_named(tmp_path: Path) -> None:
    program = gp.trace(Summing().eval(), (torch.ones(2, 16),))
    with pytest.raises(LoweringError, match=r"leaves CumSum .*allow_fallback=true"):
        gp.export(program, "deepsparse", tmp_path / "out")
    manifest = gp.export(program, DeepSparse(allow_fallback=True), tmp_path / "out").manifest
    assert float(manifest.coverage["fraction_of_supported_ops"][0]) < 1
    assert manifest.coverage["left to onnxruntime"][0].startswith("CumSum")


@with_engine
def test_channels_and_weights_alone_run_in_the_engine(tmp_path: Path) -> None:
    for number, (name, recipe) in enumerate([("resnet", CHANNELS), ("bert_qa", WEIGHTS), ("bert_qa", CHANNELS)]):
        manifest = gp.export(program_of(name, recipe), "deepsparse", tmp_path / str(number)).manifest
        assert manifest.coverage["fraction_of_supported_ops"] == ["1"]


@with_engine
def test_nothing_is_sent(tmp_path: Path) -> None:
    code = (
        "import socket\n"
        "def refuse(*_): raise SystemExit('a connection was tried')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from graphprune.targets.deepsparse_model.engine import stay_offline\n"
        "stay_offline()\n"
        "import deepsparse, threading\n"
        "[item.join(5) for item in threading.enumerate() if item is not threading.current_thread()]\n"
    )
    done = subprocess.run([str(ENGINE), "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "a connection" not in done.stderr
