"""The OpenVINO target: the same numbers as the Program, int8 weights under their own names, multiplied as integers."""

from __future__ import annotations

import collections
import functools
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.artifact.samples import make_inputs, run_program
from graphprune.errors import LoweringError
from graphprune.ir.sites import find_sites
from graphprune.pipeline.legalize import legalized
from graphprune.pipeline.target import FORMATS, PATTERNS, Support
from graphprune.sparsity.layout import to_logical
from graphprune.targets.onnx_model.draft import Draft
from graphprune.targets.openvino import OpenVino
from graphprune.targets.openvino_model.moves import lift_pairs
from tests.traced import traced

pytest.importorskip("openvino", reason="the OpenVINO target needs the extra openvino")
gs = pytest.importorskip("onnx_graphsurgeon", reason="the OpenVINO target needs the extra openvino")

STATIC = "annotate-quant{preset=openvino},insert-observers,calibrate{progress=false},insert-fake-quant,freeze-quant"
SPARSITY = {"dense": 0.0, "4x1": 0.5, "2:4": 0.5, "1x1": 0.5}
KINDS = ("bert_sequence", "distilbert_qa", "vit", "resnet")
MATRIX = [(name, kind, pattern) for name in KINDS for kind in ("fp32", "int8") for pattern in ("dense", "4x1")]
FAST = {("vit", "fp32", "dense"), ("resnet", "int8", "4x1")}


@functools.cache
def _made(name: str, kind: str, pattern: str = "dense") -> gp.Program:
    """A pruned and quantized Program; ``kind`` is ``fp32``, ``int8`` or the pipeline text that quantizes."""
    program = traced(name)
    if name in ("resnet", "conv_bn"):
        program = gp.transform(program, "fold-conv-bn")
    if pattern != "dense":
        rule = f"pattern={pattern},sparsity=0.5,criterion=magnitude,schedule=one-shot,scope=local"
        program = gp.transform(program, f"insert-masks{{{rule}}}")
    if kind == "int8":
        attention = "" if name in ("resnet", "conv_bn", "mlp") else "expand-attention,"
        program = gp.transform(program, attention + STATIC, data=make_inputs(program))
    elif kind != "fp32":
        program = gp.transform(program, kind)
    return program


def _executed(target: OpenVino, folder: Path) -> collections.Counter[tuple[str, str]]:
    """Operators that OpenVINO runs, with the precision of their results."""
    compiled = target._compile(target._read(folder), 1)
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        told = {key: str(node.get_rt_info()[key].astype(str)) for key in ("layerType", "outputPrecisions")}
        found[told["layerType"], told["outputPrecisions"]] += 1
    return found


def _difference(target: OpenVino, folder: Path, program: gp.Program, threads: int | None = 1) -> float:
    """Largest difference of the outputs for samples of two sizes, as a fraction of the largest output."""
    run, worst = target.open(folder, threads), 0.0
    for sample in make_inputs(program):
        answers = run({name: np.asarray(value) for name, value in sample.items()})
        for name, want in run_program(program, sample, tuple(answers)).items():
            worst = max(worst, float(np.abs(answers[name] - want).max() / np.abs(want).max()))
    return worst


@pytest.mark.parametrize(
    ("name", "kind", "pattern"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in MATRIX],
)
def test_every_combination(name: str, kind: str, pattern: str, tmp_path: Path) -> None:
    program = _made(name, kind, pattern)
    artifact = gp.export(program, "openvino", tmp_path / "out")
    manifest = artifact.manifest
    assert gp.verify(tmp_path / "out").passed
    assert manifest.parity.max_abs <= manifest.parity.tolerance
    assert {site.stored for site in manifest.sites} == {"int8" if kind == "int8" else "float32"}
    coverage = {key: set(names) for key, names in manifest.coverage.items()}
    assert coverage["float kernel" if kind == "int8" else "integer kernel"] == set()
    assert coverage["int8" if kind == "int8" else "float"] >= {site.name for site in manifest.sites}
    rows = [site for site in manifest.sites if site.pattern is not None]
    assert bool(rows) == (pattern != "dense")
    assert all(site.pattern_holds and site.zeros_at_zero_point for site in rows)
    if rows:
        assert manifest.sparsity() == pytest.approx(SPARSITY[pattern], abs=0.03)


@pytest.mark.parametrize("pattern", ["2:4", "1x1"])
def test_other_patterns_are_stored(pattern: str, tmp_path: Path) -> None:
    artifact = gp.export(_made("mlp", "int8", pattern), OpenVino(sparse_rate=0.4), tmp_path / "out")
    sites = [site for site in artifact.manifest.sites if site.pattern is not None]
    assert sites
    assert all(site.pattern_holds and site.zeros_at_zero_point for site in sites)
    assert artifact.manifest.options["sparse_rate"] == 0.4
    assert artifact.manifest.sparsity() == pytest.approx(0.5, abs=0.01)


def test_attention_runs_on_integers(tmp_path: Path) -> None:
    """Every matrix product, those of attention among them, reads integers; what lies between is quantized by what makes it."""
    program = _made("bert_sequence", "int8", "4x1")
    target = OpenVino()
    lowered = target.lower(legalized(program, target.legalize), tmp_path)
    found = _executed(target, tmp_path)
    assert found["Subgraph", "u8"] == 2  # attention of two layers, whose result is quantized in it
    assert not found["Subgraph", "f32"]
    assert not found["MatMul", "f32"]
    assert found["FullyConnected", "i8"] == 6  # queries, keys and values
    assert not found["Transpose", "f32"]
    assert sum(count for (kind, _), count in found.items() if kind == "FakeQuantize") == 5  # behind norms
    assert lowered.passes["lift-pairs"] > 0


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_weights_come_back_as_they_were(kind: str, tmp_path: Path) -> None:
    program, target = _made("resnet", kind, "4x1"), OpenVino()
    legal = legalized(program, target.legalize)
    target.lower(legal, tmp_path)
    _compare_weights(legal, target, tmp_path, "int8" if kind == "int8" else "float32")


_SMALL = {
    "int4": "annotate-quant{weights=int4:symmetric:channel:group16,activations=none,embeddings=none}",
    "uint4": "annotate-quant{weights=uint4:affine:channel,activations=none}",
    "int8": "annotate-quant{weights=int8:symmetric:channel:group16,activations=none,embeddings=none}",
    "uint8": "annotate-quant{weights=uint8:affine:channel,activations=none}",
}


@pytest.mark.parametrize("name", ["mlp", "gpt2_conv1d"])
@pytest.mark.parametrize("kind", _SMALL)
def test_small_weights(name: str, kind: str, tmp_path: Path) -> None:
    program, target = _made(name, f"{_SMALL[kind]},insert-fake-quant,freeze-quant"), OpenVino()
    lowered = target.lower(program, tmp_path)
    sites, _ = find_sites(program)
    assert {site.name for site in sites} == set(lowered.coverage[kind])
    assert _difference(target, tmp_path, program) < 1e-5
    _compare_weights(program, target, tmp_path, kind)


def _compare_weights(program: gp.Program, target: OpenVino, folder: Path, kind: str) -> None:
    sites, _ = find_sites(program)
    weights = target.weights(folder, {**{site.name: site.layout.value for site in sites}, "nowhere": "out_in"})
    assert set(weights) == {site.name for site in sites}
    for site in sites:
        stored, logical = weights[site.name], to_logical(program.tensor(site.name).detach(), site.layout).numpy()
        assert str(stored.values.dtype) == kind
        real = stored.values.astype(np.float32)
        if stored.scale is not None:
            scale, offset = (_spread(np.asarray(item), logical) for item in (stored.scale, stored.zero_point))
            real = (real - offset) * scale
        assert np.allclose(real, logical, rtol=1e-6, atol=1e-8)
        assert np.array_equal(stored.zeros, logical == 0)


def _spread(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Scales of rows or of their parts, for every entry."""
    values = values.astype(np.float32).reshape(len(values), -1) if values.ndim else values.astype(np.float32)
    return np.repeat(values, like.shape[1] // values.shape[1], axis=1) if values.ndim else values


def test_dynamic_quantization(tmp_path: Path) -> None:
    program = _made("mlp", "dynamic-quant")
    exact, free = OpenVino(), OpenVino(dynamic_group=32)
    for target, folder in ((exact, tmp_path / "exact"), (free, tmp_path / "free")):
        folder.mkdir()
        target.lower(program, folder)
    assert _difference(exact, tmp_path / "exact", program) < 1e-5
    assert _difference(free, tmp_path / "free", program) < 5e-2
    assert gp.export(program, free, tmp_path / "out").manifest.options["dynamic_group"] == 32


def test_half_weights(tmp_path: Path) -> None:
    program = _made("mlp", "fp32")
    sizes = {}
    for half in (False, True):
        target, folder = OpenVino(half=half), tmp_path / str(half)
        target.lower(program, _empty(folder))
        sizes[half] = (folder / "model.bin").stat().st_size
        assert _difference(target, folder, program) < (5e-3 if half else 1e-5)
    assert sizes[True] < 0.6 * sizes[False]
    stored = OpenVino().weights(tmp_path / "True", {"head.weight": "out_in"})
    assert stored["head.weight"].values.dtype == np.float16
    assert gp.export(program, OpenVino(half=True), tmp_path / "out").manifest.parity.max_abs > 0


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_floats_in_fewer_bits(precision: str, tmp_path: Path) -> None:
    manifest = gp.export(_made("mlp", "fp32"), OpenVino(precision=precision), tmp_path / "out").manifest
    assert manifest.options["precision"] == precision
    assert manifest.parity.max_abs <= manifest.parity.tolerance


def test_tables_of_four_bits(tmp_path: Path) -> None:
    scheme = "uint4:affine:channel"
    plan = f"annotate-quant{{weights={scheme},activations=none,embeddings={scheme}}},insert-fake-quant,freeze-quant"
    program = _made("tied_embedding", plan)
    assert set(OpenVino().lower(program, tmp_path).coverage["uint4"]) == {"embedding.weight", "feed.weight"}
    assert _difference(OpenVino(), tmp_path, program) < 1e-5


def test_a_float16_program(tmp_path: Path) -> None:
    program = gp.transform(traced("mlp"), "cast-mixed{dtype=float16}")
    target = OpenVino()
    target.lower(program, _empty(tmp_path / "out"))
    assert _difference(target, tmp_path / "out", program) < 5e-3


def test_a_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    program, target = _made("tied_embedding", "int8"), OpenVino()
    lowered = target.lower(legalized(program, target.legalize), tmp_path)
    assert lowered.coverage["float kernel"] == ()
    assert (tmp_path / "model.bin").stat().st_size < 2 * 32 * 16 * 2
    assert _difference(target, tmp_path, program) < 1e-2


def test_the_same_program_gives_the_same_file(tmp_path: Path) -> None:
    program, digests = _made("conv_bn", "int8"), []
    for name in ("first", "second"):
        OpenVino().lower(legalized(program, OpenVino().legalize), _empty(tmp_path / name))
        digests.append(
            [hashlib.sha256((tmp_path / name / item).read_bytes()).digest() for item in ("model.xml", "model.bin")]
        )
    assert digests[0] == digests[1]
    text = (tmp_path / "first" / "model.xml").read_text()
    assert "model.onnx" not in text
    assert sorted(item.name for item in (tmp_path / "first").iterdir()) == ["model.bin", "model.xml"]


def test_options_reach_the_runtime(tmp_path: Path) -> None:
    OpenVino().lower(_made("mlp", "fp32"), tmp_path)
    target = OpenVino(sparse_rate=0.8, hint="throughput", dynamic_group=64)
    compiled = target._compile(target._read(tmp_path), 2)
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 2
    assert compiled.get_property("CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE") == pytest.approx(0.8)
    assert str(compiled.get_property("PERFORMANCE_HINT")).endswith("THROUGHPUT")
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 64
    assert (target.tolerance(), OpenVino().tolerance(), OpenVino(half=True).tolerance()) == (5e-2, None, 5e-3)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"precision": "bf61"}, "precision='bf61' is not known; did you mean 'bf16'"),
        ({"hint": "latenci"}, "did you mean 'latency'"),
        ({"sparse_rate": 80.0}, "sparse_rate=80.0 is not in"),
        ({"dynamic_group": -1}, "dynamic_group=-1 is negative"),
    ],
)
def test_options_that_cannot_be_are_refused(option: dict[str, object], message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        OpenVino(**option)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_a_missing_package_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LoweringError, match=rf'needs {name}, .*run: pip install "graphprune\[openvino\]"'):
        OpenVino().lower(_made("mlp", "fp32"), tmp_path)
    with pytest.raises(LoweringError, match=r'pip install "graphprune\[openvino\]"'):
        OpenVino().open(tmp_path)


class _Determinant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.det(self.linear(x))


def test_an_operator_without_a_form_is_named(tmp_path: Path) -> None:
    program = gp.trace(_Determinant().eval(), (torch.randn(2, 4, 4),))
    with pytest.raises(LoweringError, match=r"no form for aten.det.default \(test_target_openvino.py, line \d+\)"):
        OpenVino().lower(program, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"holds no model.xml"):
        OpenVino().open(tmp_path)
    OpenVino().lower(_made("mlp", "fp32"), tmp_path)
    with pytest.raises(LoweringError, match="input 'x' is missing"):
        OpenVino().open(tmp_path)({})
    with pytest.raises(LoweringError, match=r"model.xml does not run"):
        OpenVino().open(tmp_path)({"x": np.zeros((2, 3), np.float32)})
    text = (tmp_path / "model.xml").read_text()
    (tmp_path / "model.xml").write_text(text[: len(text) // 2])
    with pytest.raises(LoweringError, match=r"cannot read .*model.xml: .*lower the Program again"):
        OpenVino().weights(tmp_path, {"head.weight": "out_in"})
    (tmp_path / "model.xml").write_text(text)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(LoweringError, match="cannot read"):
        OpenVino().open(tmp_path)
    (tmp_path / "model.bin").unlink()
    with pytest.raises(LoweringError, match=r"holds no model.bin"):
        OpenVino().open(tmp_path)


def test_bfloat16_is_refused(tmp_path: Path) -> None:
    program = gp.transform(traced("mlp"), "cast-mixed{dtype=bfloat16}")
    with pytest.raises(LoweringError, match="target openvino cannot run bf16"):
        gp.export(program, "openvino", tmp_path / "out")


def test_the_table_has_every_row() -> None:
    table = OpenVino.capabilities()
    assert set(table) == {*PATTERNS, *FORMATS}
    assert table["int8"] is Support.EXPLOITED
    assert {table[name] for name in PATTERNS} == {Support.STORED}
    assert set(OpenVino.remarks) <= set(table)


def test_importing_needs_no_openvino_and_running_reports_nothing(tmp_path: Path) -> None:
    OpenVino().lower(_made("mlp", "fp32"), tmp_path)
    code = (
        "import sys; from pathlib import Path; from graphprune.targets.openvino import OpenVino\n"
        "assert 'openvino' not in sys.modules\n"
        "OpenVino().open(Path(sys.argv[1]))\n"
        "assert not any(name.startswith('openvino_telemetry') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pairs_are_lifted_over_moves_and_stay_where_others_look() -> None:
    def graph(shared: bool) -> Draft:
        x = gs.Variable("x", np.float32, (2, 3))
        scale, zero = gs.Constant("s", np.array(0.1, np.float32)), gs.Constant("z", np.array(3, np.uint8))
        moved, integers, real, out = (gs.Variable(name) for name in ("moved", "integers", "real", "out"))
        nodes = [
            gs.Node("Transpose", "move", {"perm": [1, 0]}, [x], [moved]),
            gs.Node("QuantizeLinear", "q", {}, [moved, scale, zero], [integers]),
            gs.Node("DequantizeLinear", "dq", {}, [integers, scale, zero], [real]),
            gs.Node("Relu", "end", {}, [real], [out]),
        ]
        return Draft(gs.Graph(nodes, inputs=[x], outputs=[out, moved] if shared else [out], opset=21))

    draft = graph(False)
    assert lift_pairs(draft) == 1
    draft.graph.toposort()
    assert [node.op for node in draft.graph.nodes] == ["QuantizeLinear", "DequantizeLinear", "Transpose", "Relu"]
    assert lift_pairs(draft) == 0
    assert lift_pairs(graph(True)) == 0


def test_a_scalar_is_not_shared(tmp_path: Path) -> None:
    """OpenVINO cannot compile an attention in which two operators read one scalar; with a single layer the mask is part of it."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        attn_implementation="sdpa",
    )  # fmt: skip
    example = torch.ones(2, 8, dtype=torch.int64)
    model = BertModel(config, add_pooling_layer=False).eval()
    program = gp.trace(model, {"input_ids": example, "attention_mask": example}, check=False)
    assert OpenVino().lower(program, tmp_path).passes["part-scalars"] > 0
    assert _difference(OpenVino(), tmp_path, program) < 1e-4


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder
