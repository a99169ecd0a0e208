"""The ONNX target: names, storage, precision and opsets of the files it writes, and what it refuses."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.errors import LoweringError
from graphprune.ir.program import Program
from graphprune.ir.sites import find_sites
from graphprune.pipeline.target import Support
from graphprune.sparsity.layout import to_logical
from graphprune.targets.onnx import Onnx
from graphprune.targets.onnx_model.draft import open_draft
from graphprune.targets.onnx_model.export import export_parts, inference_copy
from tests.lowered_onnx import (
    difference,
    lower_once,
    made_program,
    random_inputs,
)
from tests.traced import run_passes, traced

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
gs = pytest.importorskip("onnx_graphsurgeon")


def test_names_are_those_of_the_source() -> None:
    folder, lowered, program = lower_once("bert_qa", True)
    graph = onnx.load(folder / "model.onnx").graph
    assert lowered.files == ("model.onnx",)
    assert lowered.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert lowered.outputs == ("start_logits", "end_logits")
    for item in (*graph.input, *graph.output):
        assert [size.dim_param for size in item.type.tensor_type.shape.dim] == ["batch", "sequence"]
    initializers = {item.name for item in graph.initializer}
    used = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    unnamed = [name for name, value in program.named_parameters() if name in used and name not in initializers]
    assert unnamed == []
    assert "bert.encoder.layer.1.output.dense.weight_scale" in initializers


@pytest.mark.slow
def test_t5_names_its_two_sequences() -> None:
    graph = onnx.load(lower_once("t5", False)[0] / "model.onnx").graph
    shapes = {item.name: [size.dim_param for size in item.type.tensor_type.shape.dim] for item in graph.input}
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["decoder_input_ids"] == ["batch", "decoder_sequence"]


def test_a_tied_embedding_is_stored_once() -> None:
    graph = onnx.load(lower_once("tied_embedding", False)[0] / "model.onnx").graph
    assert sum(np.prod(item.dims) >= 32 * 16 for item in graph.initializer) == 1


def test_the_program_is_left_as_it_was(tmp_path: Path) -> None:
    program = made_program("bert_qa", True)
    before, names = str(program), program.interface.names
    Onnx(form="float").lower(program, tmp_path)
    assert (str(program), program.interface.names) == (before, names)


def test_float_option_leaves_quantizers_out(tmp_path: Path) -> None:
    lowered = Onnx(form="float").lower(made_program("conv_bn", True), tmp_path)
    assert lowered.coverage["int8"] == ()
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert not operators & {"QuantizeLinear", "DequantizeLinear"}


def test_large_weights_lie_beside_the_model(tmp_path: Path) -> None:
    program = made_program("gpt2", False)
    lowered = Onnx(external_data_threshold=0).lower(program, tmp_path)
    assert lowered.files == ("model.onnx", "model.onnx.data")
    assert all((tmp_path / name).stat().st_size for name in lowered.files)
    sites, _ = find_sites(program)
    weights = Onnx().weights(tmp_path, {site.name: site.layout.value for site in sites})
    assert len(weights) == len(sites)
    assert Onnx().open(tmp_path)({name: np.ones((2, 5), np.int64) for name in lowered.inputs})


def test_both_files_of_large_weights_are_sealed(tmp_path: Path) -> None:
    folder = gp.export(made_program("conv_bn", False), Onnx(external_data_threshold=0), tmp_path / "out").folder
    for name in ("model.onnx", "model.onnx.data"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(gp.VerifyError, match=rf"{name} was changed"):
            gp.verify(folder)
        (folder / name).write_bytes(content)
    assert gp.verify(folder).passed


def test_lowering_does_not_copy_weights_that_stay_as_they_are() -> None:
    program = made_program("conv_bn", False)
    copied = inference_copy(program, quantized=True)
    model, arrays = export_parts(copied, 18)
    assert not any(item.raw_data for item in model.graph.initializer)
    draft = open_draft(model, arrays)
    weight = next(item for item in draft.graph.tensors().values() if item.name == "conv1.weight")
    assert np.shares_memory(weight.values, program.tensor("conv1.weight").detach().numpy())
    assert not weight.values.flags.writeable


def test_only_the_batch_of_images_is_dynamic() -> None:
    for name, size in (("vit", 32), ("resnet", None)):
        (item,) = onnx.load(lower_once(name, False)[0] / "model.onnx").graph.input
        sizes = item.type.tensor_type.shape.dim
        assert [sizes[0].dim_param, *(dim.dim_param for dim in sizes[1:])] == ["batch", "", "", ""]
        assert sizes[1].dim_value == 3
        assert size is None or sizes[2].dim_value == size


@functools.cache
def _pruned(quantized: bool) -> Program:
    program = traced("bert_qa")
    text = "insert-masks{pattern=1x1,sparsity=0.9,criterion=magnitude,schedule=one-shot,scope=local},fold-masks"
    run_passes(program, text)
    return run_passes(program, "dynamic-quant") if quantized else program


@pytest.mark.parametrize(("opset", "threshold"), [(13, 0), pytest.param(18, 2_000_000_000, marks=pytest.mark.slow)])
def test_sparse_storage_is_smaller_and_loads(opset: int, threshold: int, tmp_path: Path) -> None:
    program = _pruned(False)
    dense = gp.export(program, Onnx(opset=opset), tmp_path / "dense")
    target = Onnx(opset=opset, sparse_storage=True, external_data_threshold=threshold)
    sparse = gp.export(program, target, tmp_path / "sparse")
    names = sparse.manifest.coverage["sparse tensor"]
    assert set(names) == {site.name for site in sparse.manifest.sites if site.sparsity > 0.7} != set()
    assert [site.zeros_sha256 for site in sparse.manifest.sites] == [site.zeros_sha256 for site in dense.manifest.sites]
    sizes = [sum(item.bytes for item in one.manifest.files if "model.onnx" in item.name) for one in (dense, sparse)]
    assert sizes[1] < 0.75 * sizes[0]
    graph = onnx.load(sparse.folder / "model.onnx", load_external_data=False).graph
    assert {item.values.name for item in graph.sparse_initializer} == set(names)
    for item in graph.sparse_initializer:
        indices = onnx.numpy_helper.to_array(item.indices)
        assert (np.diff(indices) > 0).all()
    assert gp.verify(sparse.folder).passed


def test_sparse_storage_of_int8_only_where_it_is_smaller(tmp_path: Path) -> None:
    program = _pruned(True)
    lowered = Onnx(sparse_storage=True).lower(program, tmp_path)
    assert lowered.coverage["float kernel"] == ()  # dense once it is loaded, so the same kernels run
    assert lowered.coverage["sparse tensor"]
    assert difference(tmp_path, lowered, program, 3) < 1e-2
    sites, _ = find_sites(program)
    weights = Onnx().weights(tmp_path, {site.name: site.layout.value for site in sites})
    for site in sites:
        logical = to_logical(program.tensor(site.name).detach(), site.layout).numpy()
        assert weights[site.name].values.dtype == np.int8
        assert np.array_equal(weights[site.name].zeros, logical == 0)
        if site.name in lowered.coverage["sparse tensor"]:
            assert (logical != 0).mean() < 1 / 9


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("bert_qa", "cast-mixed{store=true}"),
        ("gpt2", "cast-mixed{store=true}"),
        ("resnet", "cast-mixed"),
        ("conv_bn", "cast-mixed"),
    ],
)
def test_bfloat16_is_stored_and_computed_in_float32(name: str, recipe: str, tmp_path: Path) -> None:
    program = run_passes(traced(name), recipe)
    lowered = Onnx().lower(program, tmp_path)
    assert lowered.passes["widen-bfloat16"]
    graph = onnx.load(tmp_path / "model.onnx").graph
    narrow = {item.name for item in graph.initializer if item.data_type == onnx.TensorProto.BFLOAT16}
    assert {site.name for site in find_sites(program)[0]} <= narrow | ({"lm_head.weight", "transformer.wte.weight"})
    casts = {node.attribute[0].i for node in graph.node if node.op_type == "Cast"}
    assert onnx.TensorProto.BFLOAT16 not in casts
    assert difference(tmp_path, lowered, program, 3) < 2e-2


def test_a_bfloat16_artifact_is_verified(tmp_path: Path) -> None:
    artifact = gp.export(run_passes(traced("distilbert_qa"), "cast-mixed{store=true}"), "onnx", tmp_path / "out")
    assert {site.stored for site in artifact.manifest.sites} == {"bfloat16", "float32"} or {
        site.stored for site in artifact.manifest.sites
    } == {"bfloat16"}
    assert gp.verify(tmp_path / "out").passed


@pytest.mark.parametrize("opset", [20, 23])
def test_newer_opsets(opset: int, tmp_path: Path) -> None:
    program = made_program("conv_bn", True)
    target = Onnx(opset=opset)
    target.lower(program, tmp_path)
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == opset
    inputs = {key: value.numpy() for key, value in random_inputs(program, 2).items()}
    assert np.allclose(
        target.open(tmp_path)(inputs)["output"], Onnx().open(lower_once("conv_bn", True)[0])(inputs)["output"]
    )


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(LoweringError, match="opset=12"):
        Onnx(opset=12)
    with pytest.raises(LoweringError, match="external_data_threshold"):
        Onnx(external_data_threshold=3_000_000_000)


def test_a_mask_that_is_left_is_refused(tmp_path: Path) -> None:
    program = run_passes(traced("mlp"), "insert-masks{pattern=1x1,sparsity=0.5,criterion=magnitude,schedule=one-shot}")
    with pytest.raises(LoweringError, match="fold-masks"):
        Onnx().lower(program, tmp_path)


def test_an_operator_without_a_form_is_named(tmp_path: Path) -> None:
    program = traced("mlp")
    node = next(program.calls(torch.ops.aten.relu.default))
    node.target = torch.ops.aten.special_i1.default
    program.recompile()
    message = r"aten\.special_i1\.default \(models\.py, line \d+\) cannot be written as ONNX: .* no translation of prims\.bessel_i1"
    with pytest.raises(LoweringError, match=message):
        Onnx().lower(program, tmp_path)


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def refuse(name: str) -> object:
        raise ImportError(name=name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(LoweringError, match=r'pip install "graphprune\[onnx\]"'):
        Onnx().open(tmp_path)({})


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(LoweringError, match="No space left"):
        Onnx().lower(made_program("conv_bn", True), tmp_path)


def test_running_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="holds no"):
        Onnx().open(tmp_path)({})
    with pytest.raises(LoweringError, match="'input_ids' is missing"):
        Onnx().open(lower_once("bert_qa", True)[0])({})
    with pytest.raises(LoweringError, match="cannot read"):
        Onnx().weights(tmp_path, {"a": "out_in"})


def test_capabilities_exploit_int8_and_store_sparsity() -> None:
    capabilities = Onnx.capabilities()
    assert capabilities["int8"] is Support.EXPLOITED
    assert {capabilities[name] for name in ("unstructured", "NxM", "N:M", "channel")} == {Support.STORED}


def test_importing_the_target_needs_no_onnx() -> None:
    import subprocess
    import sys

    code = "import sys, graphprune.targets.onnx; sys.exit(any(name in sys.modules for name in ('onnx', 'onnxruntime')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
