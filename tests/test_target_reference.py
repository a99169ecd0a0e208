"""The reference target: bit for bit what the Program computes, from two files that hold no code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.artifact.samples import make_inputs, run_program
from graphprune.artifact.verification import verify_afresh
from graphprune.errors import LoweringError
from graphprune.ir.sites import find_sites
from graphprune.sparsity.layout import to_logical
from graphprune.targets.reference import Reference
from tests.models import HUGGING_FACE, MODELS
from tests.test_quant_matrix import pruned, quantized
from tests.traced import run_passes, traced

KINDS = ("bert_sequence", "distilbert_qa", "vit", "resnet")


def lowered(program: gp.Program, folder: Path) -> float:
    """Largest difference of outputs to the Program's, on inputs of two sizes."""
    found = Reference().lower(program, folder)
    run = Reference().open(folder)
    worst = 0.0
    for inputs in make_inputs(program):
        given = {name: value for name, value in inputs.items() if name in found.inputs}
        expected = run_program(program, given, found.outputs)
        actual = run({name: value.numpy() for name, value in given.items()})
        assert set(actual) == set(expected)
        worst = max(worst, *(float(np.abs(actual[name] - expected[name]).max()) for name in expected))
    return worst


@pytest.mark.parametrize("pattern", ["dense", "4x1"])
@pytest.mark.parametrize("way", ["float", "static", pytest.param("dynamic", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KINDS)
def test_every_combination(name: str, way: str, pattern: str, tmp_path: Path) -> None:
    program = traced(name)
    if name == "resnet":
        program = gp.transform(program, "fold-conv-bn")
    program = pruned(program, pattern)
    if way != "float":
        program = quantized(program, way)
    manifest = gp.export(program, "reference", tmp_path / "out").manifest
    assert manifest.parity.max_abs == 0.0
    assert {site.stored for site in manifest.sites} == {"float32"}
    assert manifest.sparsity() == pytest.approx(0.5 if pattern == "4x1" else 0.0, abs=0.03)
    assert all(site.zeros_at_zero_point for site in manifest.sites)


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in HUGGING_FACE if name not in (*KINDS, "gpt2")),
        *("gpt2", "conv_transpose", "shared_weight", "tied_embedding"),
    ],
)
def test_every_kind_of_model(name: str, tmp_path: Path) -> None:
    assert lowered(traced(name), tmp_path) == 0.0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_and_small_weights(dtype: str, tmp_path: Path) -> None:
    small = "annotate-quant{weights=int4:symmetric:channel:group16,activations=none},insert-fake-quant,freeze-quant"
    assert lowered(run_passes(traced("bert_sequence"), small), tmp_path) == 0.0
    (tmp_path / "mixed").mkdir()
    program = run_passes(traced("bert_sequence"), f"cast-mixed{{dtype={dtype},store=true}}")
    assert lowered(program, tmp_path / "mixed") == 0.0
    assert Reference().weights(tmp_path / "mixed", {"classifier.weight": "out_in"})["classifier.weight"].values.any()


def test_a_new_process_and_labels(tmp_path: Path) -> None:
    program = quantized(pruned(traced("bert_sequence", labels=True), "4x1"), "static")
    artifact = gp.export(program, "reference", tmp_path / "out")
    assert artifact.manifest.outputs == ["logits"]
    verify_afresh(artifact.folder)


def test_weights_are_the_programs(tmp_path: Path) -> None:
    program = traced("shared_weight")
    Reference().lower(program, tmp_path)
    sites, _ = find_sites(program)
    found = Reference().weights(tmp_path, {site.name: site.layout.value for site in sites} | {"no.such": "out_in"})
    assert set(found) == {site.name for site in sites}
    for site in sites:
        assert np.array_equal(
            found[site.name].values, to_logical(program.tensor(site.name).detach(), site.layout).numpy()
        )


def test_what_is_left_in_the_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"graphprune\.mask\.default .*run fold-masks"):
        Reference().lower(pruned(traced("mlp"), "4x1"), tmp_path)
    program = traced("mlp")
    next(program.calls(torch.ops.aten.relu.default)).target = isinstance
    with pytest.raises(LoweringError, match=r"isinstance.* \(models\.py, line \d+\) cannot be written"):
        Reference().lower(program, tmp_path)


def test_files_cannot_call_what_they_like(tmp_path: Path) -> None:
    Reference().lower(traced("mlp"), tmp_path)
    path = tmp_path / "graph.json"
    record = json.loads(path.read_text())
    call = next(node for node in record["nodes"] if node["op"] == "call_function")
    for target in ("os:system", "builtins:eval", "quantized.linear.default", "aten.no_such.default", "getattr"):
        call["target"], call["args"] = target, [{"node": "x"}, "__class__"]
        path.write_text(json.dumps(record))
        with pytest.raises(LoweringError, match="is damaged"):
            Reference().open(tmp_path)


def test_running_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"holds no graph\.json"):
        Reference().open(tmp_path)
    Reference().lower(traced("mlp"), tmp_path)
    with pytest.raises(LoweringError, match="'x' is missing"):
        Reference().open(tmp_path)({})
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(LoweringError, match=r"cannot read .*weights\.safetensors"):
        Reference().weights(tmp_path, {})
    (tmp_path / "graph.json").write_text("{}")
    with pytest.raises(LoweringError, match="not of the form that this version reads"):
        Reference().open(tmp_path)


def test_threads_are_put_back(tmp_path: Path) -> None:
    Reference().lower(traced("mlp"), tmp_path)
    before = torch.get_num_threads()
    Reference().open(tmp_path, threads=before + 1)({"x": np.zeros((2, 16), dtype=np.float32)})
    assert torch.get_num_threads() == before


def test_names_of_models() -> None:
    assert set(KINDS) <= set(MODELS)
