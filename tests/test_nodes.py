"""Comparison node by node: the lowered model gets the Program's values, and what is wrong is named where it is."""

from __future__ import annotations

import collections
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import graphprune as gp
from graphprune.artifact.files import sha256
from graphprune.artifact.manifest import FileEntry, Manifest
from graphprune.artifact.node_report import NodeReport, compare_nodes, difference, step_of
from graphprune.artifact.nodes import NODES, Node, Recording
from graphprune.artifact.samples import make_inputs
from graphprune.artifact.verification import examine
from graphprune.cli import app
from graphprune.pipeline.target import NodeValue
from graphprune.targets.onnx import Onnx
from graphprune.targets.onnx_model.kernels import INTEGER_KERNELS
from graphprune.targets.onnx_model.nodes import cut, read_names
from tests.shared_folder import shared_folder
from tests.traced import run_passes, traced

onnx = pytest.importorskip("onnx", reason="the ONNX target needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime")

_FAMILIES = ("bert_qa", "distilbert_qa", "gpt2", "vit", "resnet")
_SITE = "distilbert.transformer.layer.1.ffn.lin1.weight"
_ALSO_INTEGER = {
    *INTEGER_KERNELS,
    "QLinearAdd",
    "QLinearMul",
    "QLinearGlobalAveragePool",
    "QLinearAveragePool",
    "QLinearConcat",
}


@functools.cache
def _quantized(name: str) -> gp.Program:
    program = traced(name)
    run_passes(program, ("fold-conv-bn," if name in ("resnet", "conv_bn") else "") + "annotate-quant,insert-observers")
    gp.training.calibrate(program, [item for seed in (1, 2) for item in make_inputs(program, seed)])
    return run_passes(program, "insert-fake-quant,freeze-quant")


@functools.cache
def _exported(name: str, form: str) -> Path:
    out = shared_folder() / "out"
    return gp.export(_quantized(name), Onnx(form=form), out).folder


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return Path(shutil.copytree(_exported("distilbert_qa", "qdq"), tmp_path / "out"))


def _edit(folder: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Change one initializer of the model file, and make the manifest fit."""
    path = folder / "model.onnx"
    model = onnx.load(path)
    tensor = next(item for item in model.graph.initializer if item.name == name)
    values = onnx.numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    _restate(folder, "model.onnx")


def _restate(folder: Path, name: str) -> None:
    manifest = Manifest.read(folder)
    stated = FileEntry(name=name, bytes=(folder / name).stat().st_size, sha256=sha256(folder / name))
    files = [stated if entry.name == name else entry for entry in manifest.files]
    manifest.model_copy(update={"files": files}).write(folder)


def _nodes(folder: Path) -> NodeReport:
    report = examine(folder, per_node=True).nodes
    assert report is not None
    return report


def _flip(values: np.ndarray) -> None:
    """Flip the lowest bit of the largest integer."""
    flat = values.reshape(-1)
    flat[int(np.argmax(np.abs(flat.astype(np.int32))))] ^= 1


def _kernels(model: object) -> collections.Counter[str]:
    """Integer kernels in onnxruntime's optimized graph."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        options.log_severity_level = 3
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])  # type: ignore[attr-defined]
        optimized = onnx.load(options.optimized_model_filepath)
    return collections.Counter(node.op_type for node in optimized.graph.node if node.op_type in _ALSO_INTEGER)


@pytest.mark.parametrize("name", _FAMILIES)
def test_every_node_is_at_most_one_step_off(name: str) -> None:
    folder = _exported(name, "qdq")
    report = gp.verify(folder, per_node=True)
    assert report.nodes is not None
    assert [check.name for check in report.checks] == ["files", "sparsity", "parity", "nodes"]
    integers = [item for item in report.nodes.nodes if item.node.kind == "integers"]
    assert integers
    assert all(item.steps <= 1 for item in integers)
    assert not report.nodes.not_compared
    named = {weight for item in report.nodes.nodes for weight in item.node.weights}
    assert {site.name for site in report.manifest.sites} <= named
    assert NODES in {entry.name for entry in report.manifest.files}
    assert f"{(folder / NODES).stat().st_size:,} bytes" in str(report)


@pytest.mark.parametrize(
    ("name", "form"), [*((name, "qdq") for name in _FAMILIES), ("distilbert_qa", "integer"), ("resnet", "integer")]
)
def test_the_cut_model_runs_the_same_integer_kernels(name: str, form: str) -> None:
    folder = _exported(name, form)
    names = read_names(folder / "model.onnx")
    recording = Recording.read(folder)
    model = onnx.load(folder / "model.onnx")
    before = _kernels(model)
    cut(model, {names[key]: value for key, value in recording.inner.items()})
    assert sum(before.values()) > 0
    assert _kernels(model) == before


@pytest.mark.parametrize("name", ["distilbert_qa", "resnet"])
def test_the_integer_form_is_compared_too(name: str) -> None:
    report = _nodes(_exported(name, "integer"))
    assert not report.faulty
    assert max(item.steps for item in report.nodes if item.node.kind == "integers") <= 1


def test_weights_beside_the_model_are_found(tmp_path: Path) -> None:
    folder = gp.export(_quantized("mlp"), Onnx(external_data_threshold=0), tmp_path / "out").folder
    assert (folder / "model.onnx.data").is_file()
    assert gp.verify(folder, per_node=True).passed


def test_values_quantized_at_run_time_are_compared(tmp_path: Path) -> None:
    program = run_passes(traced("gpt2_conv1d"), "dynamic-quant")
    report = gp.verify(gp.export(program, "onnx", tmp_path / "out").folder, per_node=True).nodes
    assert report is not None
    assert {"range", "linear"} <= {item.node.kind for item in report.nodes}
    assert not report.not_compared


def test_weights_of_four_bits_have_a_tolerance_of_their_own(tmp_path: Path) -> None:
    program = run_passes(
        traced("mlp"),
        "annotate-quant{weights=int4:symmetric:channel:group16,activations=none},insert-fake-quant,freeze-quant",
    )
    report = gp.verify(gp.export(program, Onnx(opset=21), tmp_path / "out").folder, per_node=True).nodes
    assert report is not None
    assert {item.node.tolerance for item in report.nodes} == {2e-2}
    assert 0 < max(item.excess for item in report.nodes) <= 1


def test_a_float_program_is_compared_where_asked(tmp_path: Path) -> None:
    program = traced("conv_bn")
    assert not (gp.export(program, "onnx", tmp_path / "plain").folder / NODES).exists()
    with pytest.raises(gp.VerifyError, match=r"has no nodes\.safetensors, so nothing can be compared node by node"):
        gp.verify(tmp_path / "plain", per_node=True)
    report = gp.verify(gp.export(program, "onnx", tmp_path / "out", per_node=True).folder, per_node=True).nodes
    assert report is not None
    assert {item.node.kind for item in report.nodes} == {"conv", "linear", "output"}


def test_a_form_without_quantizers_has_nothing_to_compare(tmp_path: Path) -> None:
    program = _quantized("mlp")
    assert not (gp.export(program, Onnx(form="float"), tmp_path / "out", tolerance=1.0).folder / NODES).exists()
    with pytest.raises(gp.LoweringError, match=r"nothing that .* computes inside can be found"):
        gp.export(program, Onnx(form="float"), tmp_path / "again", tolerance=1.0, per_node=True)


def test_the_record_can_be_left_out(tmp_path: Path) -> None:
    folder = gp.export(_quantized("mlp"), "onnx", tmp_path / "out", per_node=False).folder
    assert not (folder / NODES).exists()
    assert gp.verify(folder).passed


def test_one_flipped_bit_of_a_weight_names_exactly_its_node(artifact: Path) -> None:
    _edit(artifact, _SITE, _flip)
    assert [item.node.name for item in _nodes(artifact).nodes if not item.passed] == [_SITE]
    with pytest.raises(gp.VerifyError, match=rf"nodes: linear {_SITE}: .* off"):
        gp.verify(artifact, per_node=True)


def test_another_scale_of_a_weight_names_exactly_its_node(artifact: Path) -> None:
    def double(values: np.ndarray) -> None:
        values.reshape(-1)[0] *= 1.01

    _edit(artifact, f"{_SITE}_scale", double)
    assert [item.node.name for item in _nodes(artifact).nodes if not item.passed] == [_SITE]


def test_another_scale_of_an_activation_names_exactly_its_node(artifact: Path) -> None:
    prefix = _SITE.replace("weight", "input")

    def change(values: np.ndarray) -> None:
        values *= np.float32(1.01)

    _edit(artifact, f"{prefix}_scale", change)
    report = _nodes(artifact)
    assert [item.node.name for item in report.faulty] == [prefix]
    assert [(item.node.name, item.follows) for item in report.nodes if not item.passed and not item.faulty] == [
        (_SITE, prefix)
    ]
    assert "its scale is" in report.summary
    assert "in the Program; 1 that read it differ too" in report.summary


def test_a_fault_inside_an_integer_convolution_is_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(_exported("resnet", "qdq"), tmp_path / "out"))
    site = "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight"

    def negate(values: np.ndarray) -> None:
        np.negative(values, out=values)

    _edit(folder, site, negate)
    (worst,) = _nodes(folder).faulty
    assert worst.node.weights == (site,)
    assert worst.node.kind == "integers"
    assert worst.steps > 1
    assert site in str(worst)


def test_a_damaged_record_is_one_clear_error(artifact: Path) -> None:
    content = (artifact / NODES).read_bytes()
    (artifact / NODES).write_bytes(content[: len(content) // 2])
    with pytest.raises(gp.VerifyError, match=r"says: files: nodes\.safetensors was changed$"):
        gp.verify(artifact, per_node=True)
    for damaged in (content[: len(content) // 2], b"", content.replace(b'"graphprune"', b'"graphprune_"', 1)):
        (artifact / NODES).write_bytes(damaged)
        _restate(artifact, NODES)
        with pytest.raises(
            gp.VerifyError, match=r"says: nodes: .*nodes\.safetensors is damaged: .*; export the artifact again$"
        ):
            gp.verify(artifact, per_node=True)


def test_a_file_that_does_not_say_where_values_are_is_not_guessed_at(artifact: Path) -> None:
    model = onnx.load(artifact / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, artifact / "model.onnx")
    report = compare_nodes(Onnx(), artifact)
    assert {item.node.kind for item in report.nodes if item.passed} == {"output"}
    assert "the file does not say any more where it is" in report.summary
    model.metadata_props.add(key="graphprune.nodes", value="[1")
    onnx.save(model, artifact / "model.onnx")
    with pytest.raises(gp.VerifyError, match=r"metadata graphprune\.nodes is damaged"):
        compare_nodes(Onnx(), artifact)


def test_a_weight_of_several_operators_is_listed_and_not_guessed_at(tmp_path: Path) -> None:
    folder = gp.export(traced("shared_weight"), "onnx", tmp_path / "out", per_node=True).folder
    report = gp.verify(folder, per_node=True).nodes
    assert report is not None
    assert report.not_compared == {"linear:body.weight": "the file does not say where it is"}
    assert "1 not compared" in report.summary


def test_parity_is_stated_in_steps(artifact: Path, tmp_path: Path) -> None:
    parity = json.loads((artifact / "manifest.json").read_text())["parity"]
    assert 0 <= parity["steps"] <= 1
    plain = gp.export(traced("mlp"), "onnx", tmp_path / "plain")
    assert plain.manifest.parity.steps is None
    manifest = Manifest.read(artifact)
    unsaid = manifest.parity.model_copy(update={"steps": None})
    manifest.model_copy(update={"parity": unsaid}).write(artifact)
    assert gp.verify(artifact).passed


def test_differences_are_measured_in_steps() -> None:
    node = Node("integers", "a.input", (), (), scale=0.5, zero_point=3)
    want = np.array([0, 3, 255], np.uint8)
    found = difference(node, want, NodeValue(np.array([1, 3, 253], np.uint8), 0.5, 3))
    assert (found.size, found.differing, found.steps, found.max_abs, found.passed) == (3, 2, 2.0, 1.0, False)
    assert (
        difference(node, want, NodeValue(want, 0.5, 4)).problem
        == "its zero-point is 4 in the file and 3 in the Program"
    )
    assert "another shape" in difference(node, want, NodeValue(want[:2])).skipped
    assert difference(node, want, None).problem
    floats = np.array([0.0, 255.0, -255.0], np.float32)
    assert step_of(floats) == 2.0
    linear = replace(node, kind="linear", tolerance=1e-4)
    assert difference(linear, floats, NodeValue(floats + np.float32(0.02))).passed
    assert not difference(linear, floats, NodeValue(floats + np.float32(0.03))).passed
    assert not difference(linear, floats, NodeValue(np.full(3, np.nan, np.float32))).passed
    assert difference(replace(node, kind="output"), floats, NodeValue(floats + 1)).steps == 0.5
    assert difference(linear, np.zeros(3, np.float32), NodeValue(np.zeros(3, np.float32))).passed


def test_the_record_reads_back_as_written(artifact: Path, tmp_path: Path) -> None:
    recording = Recording.read(artifact)
    recording.write(tmp_path)
    again = Recording.read(tmp_path)
    assert again.nodes == recording.nodes
    assert all(np.array_equal(again.values[key], value) for key, value in recording.values.items())
    assert {value.dtype for key, value in again.values.items() if key.startswith("integers:")} == {np.dtype(np.uint8)}


def test_the_command_prints_worst_nodes_first(artifact: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["verify", str(artifact), "--per-node", "--rows", "3"])
    assert done.exit_code == 0
    assert "the 3 worst" in done.stdout
    _edit(artifact, _SITE, _flip)
    done = runner.invoke(app, ["verify", str(artifact), "--per-node", "--rows", "3"])
    assert done.exit_code == 2
    rows = [line for line in done.stdout.splitlines() if ".weight" in line or ".input" in line]
    assert "FAILED" in next(line for line in rows if line.lstrip("│ ").startswith(_SITE))
    assert f"nodes: linear {_SITE}" in done.stderr
    done = runner.invoke(app, ["verify", str(artifact), "--per-node", "--json"])
    assert done.exit_code == 2
    stated = json.loads(done.stdout)
    assert not stated["passed"]
    assert stated["nodes"]["nodes"][0]["name"] == _SITE
    assert runner.invoke(app, ["verify", str(artifact), "--rows", "3"]).exit_code == 2


@pytest.mark.parametrize(
    "name",
    [
        *("residual", "attention", "tied_embedding"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("mlp", "shared_weight", "gpt2_conv1d", "grouped_conv")
        ),
    ],
)
def test_small_models_pass(name: str, tmp_path: Path) -> None:
    report = gp.verify(gp.export(_quantized(name), "onnx", tmp_path / "out").folder, per_node=True).nodes
    assert report is not None
    assert not report.not_compared
