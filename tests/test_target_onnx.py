"""The ONNX target: the same numbers as the Program, int8 weights under their own names, fused by onnxruntime."""

from __future__ import annotations

import collections
import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.errors import LoweringError
from graphprune.ir.program import Program
from graphprune.ir.sites import find_sites
from graphprune.ir.trace import trace
from graphprune.pipeline.target import Lowered, Support
from graphprune.sparsity.layout import to_logical
from graphprune.targets.onnx import Onnx
from graphprune.targets.onnx_model.draft import open_draft
from graphprune.targets.onnx_model.export import export_parts, inference_copy
from tests.models import HUGGING_FACE
from tests.traced import run_passes, traced

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
gs = pytest.importorskip("onnx_graphsurgeon")

_QUANTIZED = ("bert_qa", "bert_sequence", "gpt2", "resnet", "conv_bn", "shared_weight")
_CONVOLUTIONAL = ("resnet", "conv_bn")


def _inputs(program: Program, batch: int, length: int = 7) -> dict[str, torch.Tensor]:
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
def _outputs(program: Program, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    result = program(**inputs)
    items = {"output": result} if isinstance(result, torch.Tensor) else dict(result.items())
    return {name: value.numpy() for name, value in items.items() if value is not None}


@torch.no_grad()
def _randomize(program: Program) -> None:
    """Give biases and running statistics values that matter."""
    generator = torch.Generator().manual_seed(3)
    for name, value in (*program.named_parameters(), *program.named_buffers()):
        if name.endswith("bias") or "running" in name:
            value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + 0.1)


@functools.cache
def _program(name: str, quantized: bool) -> Program:
    program = traced(name, labels=name in ("bert_qa", "gpt2"))
    _randomize(program)
    if quantized:
        run_passes(program, "fold-conv-bn,insert-fake-quant" if name in _CONVOLUTIONAL else "insert-fake-quant")
        program.train()
        with torch.no_grad():
            for _ in range(2):
                program(**{key: value for key, value in _inputs(program, 4, 16).items() if "positions" not in key})
        run_passes(program.eval(), "freeze-quant")
    return program


@functools.cache
def _lowered(name: str, quantized: bool, form: str = "qdq") -> tuple[Path, Lowered, Program]:
    program = _program(name, quantized)
    folder = Path(tempfile.mkdtemp(prefix="graphprune-"))
    return folder, Onnx(form=form).lower(program, folder), program


@functools.cache
def _planned(name: str, recipe: str) -> Program:
    """A Program quantized without data."""
    program = traced(name)
    _randomize(program)
    return run_passes(program, f"fold-conv-bn,{recipe}" if name in _CONVOLUTIONAL else recipe)


def _optimized(folder: Path) -> collections.Counter[str]:
    """Operators that onnxruntime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def _closeness(name: str, quantized: bool, batch: int, form: str = "qdq") -> float:
    return _difference(*_lowered(name, quantized, form), batch)


def _difference(folder: Path, lowered: Lowered, program: Program, batch: int) -> float:
    """Largest difference of the outputs, as a fraction of the largest."""
    inputs = {key: value for key, value in _inputs(program, batch).items() if key in lowered.inputs}
    expected = _outputs(program, inputs)
    actual = Onnx().open(folder)({key: value.numpy() for key, value in inputs.items()})
    assert set(actual) == set(lowered.outputs) == set(expected)
    return max(
        float(np.abs(actual[key] - expected[key]).max() / max(1.0, np.abs(expected[key]).max())) for key in expected
    )


@pytest.mark.parametrize("name", [*HUGGING_FACE, "tied_embedding", "grouped_conv", "conv_transpose", "conv_bn"])
def test_float_models_answer_as_their_program(name: str) -> None:
    for batch in (3, 1):
        assert _closeness(name, False, batch) < 1e-4


@pytest.mark.parametrize("name", _QUANTIZED)
def test_int8_models_answer_as_their_program(name: str) -> None:
    for batch in (3, 1):
        assert _closeness(name, True, batch) < 1e-2  # a value on the edge of two integers may fall to either side


@pytest.mark.parametrize("name", ["bert_qa", "resnet"])
def test_integer_operators_answer_as_the_program(name: str) -> None:
    for batch in (3, 1):
        assert _closeness(name, True, batch, "integer") < 1e-2


@pytest.mark.parametrize("name", ["bert_qa", "distilbert_qa", "resnet"])
@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_every_layer_runs_in_an_integer_kernel(name: str, form: str) -> None:
    folder, lowered, program = _lowered(name, True, form)
    sites, _ = find_sites(program)
    assert lowered.coverage["float kernel"] == ()
    assert set(lowered.coverage["integer kernel"]) == {site.name for site in sites}
    assert _optimized(folder)["DequantizeLinear"] == 0
    operators = {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}
    assert operators & {"MatMulIntegerToFloat", "QLinearConv"} if form == "integer" else "DequantizeLinear" in operators


@pytest.mark.parametrize("name", ["bert_qa", "conv_bn", "tied_embedding"])
@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_dynamic_quantization(name: str, form: str, tmp_path: Path) -> None:
    program = _planned(name, "dynamic-quant")
    lowered = Onnx(form=form).lower(program, tmp_path)
    assert lowered.coverage["float kernel"] == ()
    for batch in (3, 1):
        assert _difference(tmp_path, lowered, program, batch) < 1e-2
    operators = _optimized(tmp_path)
    assert not {"DequantizeLinear", "MatMulInteger"} & set(operators)
    if name == "bert_qa":
        assert (operators["DynamicQuantizeMatMul"], operators["MatMulIntegerToFloat"]) == (7, 6)
        assert operators["DynamicQuantizeLinear"] == 2  # queries, keys and values of a layer share one


_SMALL = {
    "int4": "annotate-quant{weights=int4:symmetric:channel:group16,activations=none,embeddings=none}",
    "uint4": "annotate-quant{weights=uint4:affine:channel,activations=none,embeddings=uint4:affine:channel}",
    "int8": "annotate-quant{weights=int8:symmetric:channel:group16,activations=none,embeddings=int8:symmetric:channel:group16}",
}


@pytest.mark.parametrize("name", ["bert_qa", "gpt2_conv1d"])
@pytest.mark.parametrize("kind", _SMALL)
@pytest.mark.parametrize(("opset", "form"), [(18, "qdq"), (21, "qdq"), (21, "integer")])
def test_small_weights(name: str, kind: str, opset: int, form: str, tmp_path: Path) -> None:
    program = _planned(name, f"{_SMALL[kind]},insert-fake-quant,freeze-quant")
    target = Onnx(opset=opset, form=form)
    lowered = target.lower(program, tmp_path)
    sites, _ = find_sites(program)
    names = {site.name for site in sites}
    assert names <= set(lowered.coverage[kind])
    assert set(lowered.coverage["integer kernel"]) == names
    assert _difference(tmp_path, lowered, program, 3) < 2e-2
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


@pytest.mark.parametrize("name", _QUANTIZED)
@pytest.mark.parametrize("quantized", [False, True])
def test_weights_come_back_as_they_were(name: str, quantized: bool) -> None:
    folder, lowered, program = _lowered(name, quantized)
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
    folder, lowered, _ = _lowered("bert_sequence", True)
    operators = _optimized(folder)
    assert operators["MatMulIntegerToFloat"] + operators["QGemm"] == len(lowered.coverage["integer kernel"])
    assert operators["DequantizeLinear"] == 0
    assert operators["BiasGelu"] == 2
    assert operators["SkipLayerNormalization"] == 0


def test_gpt2_layers_run_on_integers() -> None:
    folder, lowered, _ = _lowered("gpt2", True)
    operators = _optimized(folder)
    assert operators["QGemm"] == len(lowered.coverage["integer kernel"]) - 1
    assert operators["MatMulIntegerToFloat"] == 1  # the output layer, whose weight is the embedding's
    assert lowered.passes["sink-dequantize"] == 1


def test_convolutions_with_quantized_results_run_on_integers() -> None:
    operators = _optimized(_lowered("conv_bn", True)[0])
    assert operators["QLinearConv"] == 2
    assert operators["QLinearGlobalAveragePool"] == 1
    assert operators["QGemm"] == 1


def test_normalization_of_llama_is_fused() -> None:
    assert _optimized(_lowered("llama", False)[0])["SimplifiedLayerNormalization"] == 5


def test_names_are_those_of_the_source() -> None:
    folder, lowered, program = _lowered("bert_qa", True)
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


def test_t5_names_its_two_sequences() -> None:
    graph = onnx.load(_lowered("t5", False)[0] / "model.onnx").graph
    shapes = {item.name: [size.dim_param for size in item.type.tensor_type.shape.dim] for item in graph.input}
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["decoder_input_ids"] == ["batch", "decoder_sequence"]


def test_a_tied_embedding_is_stored_once() -> None:
    graph = onnx.load(_lowered("tied_embedding", False)[0] / "model.onnx").graph
    assert sum(np.prod(item.dims) >= 32 * 16 for item in graph.initializer) == 1


def test_the_program_is_left_as_it_was(tmp_path: Path) -> None:
    program = _program("bert_qa", True)
    before, names = str(program), program.interface.names
    Onnx(form="float").lower(program, tmp_path)
    assert (str(program), program.interface.names) == (before, names)


def test_float_option_leaves_quantizers_out(tmp_path: Path) -> None:
    lowered = Onnx(form="float").lower(_program("conv_bn", True), tmp_path)
    assert lowered.coverage["int8"] == ()
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert not operators & {"QuantizeLinear", "DequantizeLinear"}


def test_large_weights_lie_beside_the_model(tmp_path: Path) -> None:
    program = _program("gpt2", False)
    lowered = Onnx(external_data_threshold=0).lower(program, tmp_path)
    assert lowered.files == ("model.onnx", "model.onnx.data")
    assert all((tmp_path / name).stat().st_size for name in lowered.files)
    sites, _ = find_sites(program)
    weights = Onnx().weights(tmp_path, {site.name: site.layout.value for site in sites})
    assert len(weights) == len(sites)
    assert Onnx().open(tmp_path)({name: np.ones((2, 5), np.int64) for name in lowered.inputs})


def test_both_files_of_large_weights_are_sealed(tmp_path: Path) -> None:
    folder = gp.export(_program("conv_bn", False), Onnx(external_data_threshold=0), tmp_path / "out").folder
    for name in ("model.onnx", "model.onnx.data"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(gp.VerifyError, match=rf"{name} was changed"):
            gp.verify(folder)
        (folder / name).write_bytes(content)
    assert gp.verify(folder).passed


def test_lowering_does_not_copy_weights_that_stay_as_they_are() -> None:
    program = _program("conv_bn", False)
    copied = inference_copy(program, quantized=True)
    model, arrays = export_parts(copied, 18)
    assert not any(item.raw_data for item in model.graph.initializer)
    draft = open_draft(model, arrays)
    weight = next(item for item in draft.graph.tensors().values() if item.name == "conv1.weight")
    assert np.shares_memory(weight.values, program.tensor("conv1.weight").detach().numpy())
    assert not weight.values.flags.writeable


def test_only_the_batch_of_images_is_dynamic() -> None:
    for name, size in (("vit", 32), ("resnet", None)):
        (item,) = onnx.load(_lowered(name, False)[0] / "model.onnx").graph.input
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
    assert _difference(tmp_path, lowered, program, 3) < 1e-2
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
    assert _difference(tmp_path, lowered, program, 3) < 2e-2


def test_a_bfloat16_artifact_is_verified(tmp_path: Path) -> None:
    artifact = gp.export(run_passes(traced("distilbert_qa"), "cast-mixed{store=true}"), "onnx", tmp_path / "out")
    assert {site.stored for site in artifact.manifest.sites} == {"bfloat16", "float32"} or {
        site.stored for site in artifact.manifest.sites
    } == {"bfloat16"}
    assert gp.verify(tmp_path / "out").passed


@pytest.mark.parametrize("opset", [20, 23])
def test_newer_opsets(opset: int, tmp_path: Path) -> None:
    program = _program("conv_bn", True)
    target = Onnx(opset=opset)
    target.lower(program, tmp_path)
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == opset
    inputs = {key: value.numpy() for key, value in _inputs(program, 2).items()}
    assert np.allclose(
        target.open(tmp_path)(inputs)["output"], Onnx().open(_lowered("conv_bn", True)[0])(inputs)["output"]
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
        Onnx().lower(_program("conv_bn", True), tmp_path)


def test_running_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="holds no"):
        Onnx().open(tmp_path)({})
    with pytest.raises(LoweringError, match="'input_ids' is missing"):
        Onnx().open(_lowered("bert_qa", True)[0])({})
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
