"""The IPEX target. What needs IPEX runs in its own environment (`make test-ipex`), with Programs that graphprune's own one saved."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import graphprune as gp
from graphprune.artifact.samples import make_inputs, run_program
from graphprune.errors import LoweringError, VerifyError
from graphprune.ir.quantizing import quantizers
from graphprune.ir.source_model import source_model
from graphprune.targets.ipex import Ipex
from graphprune.targets.ipex_model.layers import find_uses
from graphprune.targets.ipex_model.quantize import write_scales
from graphprune.targets.ipex_model.script import read_script
from tests.ipex_programs import MATRIX, STATIC, make
from tests.traced import traced

INSTALLED = importlib.util.find_spec("intel_extension_for_pytorch") is not None
SAVED = os.environ.get("GRAPHPRUNE_IPEX_PROGRAMS")
"""Folder of ``python -m tests.ipex_programs``; without it they are made here."""


def needs_ipex(test: Any) -> Any:
    missing = pytest.mark.skipif(not INSTALLED, reason="IPEX has an environment of its own: make test-ipex")
    return pytest.mark.ipex(missing(test))


def program_of(name: str) -> gp.Program:
    return gp.load(Path(SAVED) / name) if SAVED else make(name)


def lowered(program: gp.Program, folder: Path, **options: Any) -> gp.Artifact:
    return gp.export(program, Ipex(**options), folder, fresh=False)


# -- in IPEX's environment --------------------------------------------------------------------------------------------


@needs_ipex
@pytest.mark.skipif(SAVED is None, reason="make test-ipex saves Programs in another environment and names their folder")
@pytest.mark.parametrize("name", MATRIX)
def test_programs_of_another_torch_answer_the_same(name: str) -> None:
    assert SAVED is not None
    assert (Path(SAVED) / "torch.txt").read_text().partition("+")[0] != torch.__version__.partition("+")[0]
    program = gp.load(Path(SAVED) / name)
    with np.load(Path(SAVED) / f"{name}.npz") as arrays:
        inputs = {key[3:]: torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith("in ")}
        for key, value in run_program(program, inputs, program.interface.output_names).items():
            assert np.allclose(value, arrays[key], rtol=0, atol=1e-6), key


@needs_ipex
@pytest.mark.parametrize("name", MATRIX)
def test_every_combination(name: str, tmp_path: Path) -> None:
    _, pattern, way = name.split("-")
    manifest = lowered(program_of(name), tmp_path / "out").manifest
    assert gp.verify(tmp_path / "out").passed
    assert manifest.parity.max_abs <= manifest.parity.tolerance * (1e-2 if way == "int8" else 1)
    kind, other = ("integer kernel", "float kernel") if way == "int8" else ("float kernel", "integer kernel")
    assert len(manifest.coverage[kind]) == len(manifest.sites)
    assert not manifest.coverage[other]
    assert {site.stored for site in manifest.sites} == {"int8" if way == "int8" else "float32"}
    assert all(site.zeros_at_zero_point for site in manifest.sites)
    if pattern == "4x1":
        assert manifest.sparsity() == pytest.approx(0.5, abs=0.03)
        assert all(site.pattern_holds for site in manifest.sites if site.pattern)


def stored_scales(path: Path) -> list[tuple[float, int]]:
    """Scale and zero-point of every quantization of an activation in the file."""
    script, _ = read_script(path)
    nodes = [node for node in script.graph.nodes() if node.kind() == "aten::quantize_per_tensor"]
    return [tuple(item.toIValue() for item in list(node.inputs())[1:3]) for node in nodes]


@needs_ipex
def test_scales_that_training_found_are_carried_over(tmp_path: Path) -> None:
    program = program_of("bert_sequence-4x1-qat")
    target = Ipex()
    artifact = lowered(program, tmp_path / "out")
    frozen = gp.transform(program, "fold-masks,freeze-quant")
    wanted, weights = [], {}
    for _, decision in quantizers(frozen):
        scale, zero_point = (frozen.tensor(f"{decision.prefix}_{kind}") for kind in ("scale", "zero_point"))
        if decision.weight:
            weights[decision.prefix] = scale.numpy(), zero_point.numpy()
        else:
            wanted.append((float(scale), int(zero_point)))
    assert sorted(set(stored_scales(tmp_path / "out" / "model.pt"))) == sorted(set(wanted))
    stored = target.weights(tmp_path / "out", {site.name: site.layout for site in artifact.manifest.sites})
    for name, (scale, zero_point) in weights.items():
        assert np.array_equal(stored[name].scale, scale), name
        assert np.array_equal(stored[name].zero_point, zero_point), name
        integers = (frozen.tensor(name).detach().numpy() / scale.reshape(-1, 1)).round().astype(np.int8)
        assert np.array_equal(stored[name].values, integers), name
    found = artifact.manifest.parity
    assert found.max_abs <= 1e-2 * found.tolerance


@needs_ipex
def test_what_the_program_leaves_in_float_stays_in_float(tmp_path: Path) -> None:
    coverage = lowered(program_of("bert_sequence-dense-partly"), tmp_path / "out").manifest.coverage
    floats = {name for name in coverage["float"] if "pooler" in name or name.endswith("output.dense.weight")}
    assert set(coverage["float"]) == set(coverage["float kernel"]) == floats
    assert len(floats) == 5
    assert len(coverage["integer kernel"]) == 9


@needs_ipex
def test_dynamic(tmp_path: Path) -> None:
    manifest = lowered(program_of("bert_sequence-4x1-dynamic"), tmp_path / "out").manifest
    assert {site.stored for site in manifest.sites} == {"int8"}
    assert len(manifest.coverage["integer kernel"]) == len(manifest.sites)
    assert manifest.parity.max_abs <= 1e-2 * manifest.parity.tolerance
    assert manifest.sparsity() == pytest.approx(0.5, abs=0.03)


@needs_ipex
@pytest.mark.parametrize("name", ["bert_sequence-4x1-fp32", "resnet-dense-fp32"])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    manifest = lowered(program_of(name), tmp_path / "out", precision="bf16").manifest
    assert len(manifest.coverage["bf16"]) == len(manifest.sites)
    assert manifest.options == {"precision": "bf16"}
    assert manifest.parity.max_abs > 0


@needs_ipex
def test_a_new_process_runs_it_and_so_does_the_command(tmp_path: Path) -> None:
    from graphprune.cli import app

    gp.save(program_of("bert_sequence-4x1-int8"), tmp_path / "saved")
    arguments = ["export", str(tmp_path / "saved"), "--target", "ipex", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.pt").is_file()


@needs_ipex
def test_another_environment_verifies_it_through_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered(program_of("distilbert_qa-dense-int8"), tmp_path / "out")
    monkeypatch.setenv("GRAPHPRUNE_IPEX_PYTHON", sys.executable)
    monkeypatch.setattr(Ipex, "open", None)  # not in this process
    assert gp.verify(tmp_path / "out").passed


@needs_ipex
@pytest.mark.parametrize("name", ["distilbert_qa-dense-int8", "vit-dense-int8", "resnet-dense-fp32"])
def test_other_shapes_than_the_traced_ones(name: str, tmp_path: Path) -> None:
    program = program_of(name)
    target = Ipex()
    outputs = target.lower(program, tmp_path).outputs
    run = target.open(tmp_path, threads=1)
    for inputs in make_inputs(program, 1, [{0: 1, 1: 5}, {0: 5, 1: 23}, {0: 1, 1: 5}]):
        found = run({key: value.numpy() for key, value in inputs.items()})
        for key, value in run_program(program, inputs, outputs).items():
            assert np.allclose(found[key], value, rtol=0, atol=1e-5), key


@needs_ipex
def test_the_loss_is_cut_away(tmp_path: Path) -> None:
    lower = Ipex().lower(traced("bert_sequence", labels=True), tmp_path)
    assert lower.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert lower.outputs == ("logits",)


@needs_ipex
def test_normalizations_behind_integers_stay(tmp_path: Path) -> None:
    program = traced("resnet")
    program = gp.transform(program, STATIC, data=make_inputs(program))
    coverage = lowered(program, tmp_path / "out").manifest.coverage
    assert coverage["integer kernel"]


@needs_ipex
def test_damaged_files_and_missing_inputs(tmp_path: Path) -> None:
    target = Ipex()
    with pytest.raises(LoweringError, match=r"holds no model\.pt"):
        target.open(tmp_path)
    target.lower(program_of("distilbert_qa-dense-fp32"), tmp_path)
    with pytest.raises(LoweringError, match=r"input 'attention_mask' is missing; model\.pt takes input_ids"):
        target.open(tmp_path)({"input_ids": np.ones((1, 4), np.int64)})
    (tmp_path / "model.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:5000])
    with pytest.raises(LoweringError, match="cannot be loaded"):
        target.open(tmp_path)


@needs_ipex
def test_a_changed_weight_is_seen(tmp_path: Path) -> None:
    folder = lowered(program_of("bert_sequence-4x1-int8"), tmp_path / "out").folder
    other = lowered(program_of("bert_sequence-dense-int8"), tmp_path / "other").folder
    (folder / "model.pt").write_bytes((other / "model.pt").read_bytes())
    with pytest.raises(VerifyError, match=r"model\.pt was changed.*measured sparsity"):
        gp.verify(folder)


# -- everywhere -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.__version__.startswith("2.8."), reason="IPEX's own torch is here, and nothing is missing")
def test_another_torch_is_told_what_to_do(tmp_path: Path) -> None:
    wanted = (
        r"needs torch 2\.8 .*here is torch 2\..*python tools/environment\.py ipex.*pip install \"graphprune\[ipex\]\""
    )
    with pytest.raises(LoweringError, match=wanted):
        gp.export(traced("bert_sequence"), "ipex", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(LoweringError, match=wanted):
        Ipex().open(tmp_path)
    with pytest.raises(LoweringError, match=wanted):
        Ipex().weights(tmp_path, {})


def test_a_missing_package_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    with pytest.raises(LoweringError, match=r"needs no_such_package.*make an environment.*graphprune\[ipex\]"):
        Ipex().library("no_such_package")


def test_options() -> None:
    with pytest.raises(LoweringError, match="precision='bf61' is not known; did you mean 'bf16'"):
        Ipex(precision="bf61")
    assert Ipex().tolerance() is None
    assert Ipex(precision="bf16").tolerance() == 5e-2


@pytest.mark.parametrize(
    ("kind", "passes", "message"),
    [
        (
            "vit",
            "dynamic-quant",
            r"conv2d.* in vit\.embeddings.*\(modeling_vit\.py, line .*dynamic-quant\{ops=\[linear\]\}",
        ),
        ("bert_sequence", "dynamic-quant{weights=int8:affine:channel}", "weight is int8:affine:channel; IPEX takes"),
        ("gpt2", "dynamic-quant{ops=[linear]}", "runs in a Conv1D"),
        ("resnet", STATIC.replace("ipex", "onnxruntime"), "reads is quantized; IPEX multiplies"),
        ("bert_sequence", STATIC.replace("=ipex", "=ipex,ops=[linear,matmul]"), "matmul.*reads is quantized"),
        (
            "bert_sequence",
            STATIC.replace("=ipex", "=ipex,weights=none"),
            "its input is quantized and its weight is not",
        ),
    ],
)
def test_what_ipex_has_no_kernel_for_is_refused(kind: str, passes: str, message: str) -> None:
    program = traced(kind)
    first = "expand-attention," if "matmul" in passes else "fold-conv-bn," if kind == "resnet" else ""
    text = first + passes
    program = gp.transform(program, text, data=make_inputs(program))
    with pytest.raises(LoweringError, match=message):
        find_uses(program, source_model(program))


def summary(name: str, count: int) -> dict[str, Any]:
    """What IPEX writes of a module that runs some layers of one name, and a sum, on one value."""

    def value() -> dict[str, Any]:
        return {"id": 1, "inf_dtype": "torch.quint8", "force_dtype": "torch.quint8", "scale": [9.0], "zero_point": [9]}

    def entry(fqn: str, weights: int) -> dict[str, Any]:
        return {
            "fqn": fqn,
            "input_tensor_infos": [value(), {}],
            "weight_tensor_infos": [value()] * weights,
            "output_tensor_infos": [{}],
        }

    entries = [*(entry(name, 1) for _ in range(count)), entry("model", 0)]
    return {"q_op_infos": {str(index): item for index, item in enumerate(entries)}}


@pytest.fixture(scope="module")
def shared() -> tuple[gp.Program, Any]:
    program = gp.transform(traced("shared_weight"), STATIC, data=[{"x": torch.randn(4, 16)}])
    from tests.models import MODELS

    return program, find_uses(program, MODELS["shared_weight"]())


def test_scales_are_written_by_module(shared: tuple[gp.Program, Any]) -> None:
    program, uses = shared
    assert [use.module for use in uses] == ["body", "body", "again", "head"]
    assert [use.site for use in uses] == ["body.weight", "body.weight", "body.weight", "head.weight"]
    written = {"model": summary("model.head", 1)}
    write_scales(written, [use for use in uses if use.module == "head"], "model.")
    layer, add = written["model"]["q_op_infos"].values()
    assert layer["input_tensor_infos"][0]["scale"] == [float(program.tensor("head.input_scale"))]
    assert layer["weight_tensor_infos"][0]["scale"] == program.tensor("head.weight_scale").tolist()
    assert layer["input_tensor_infos"][0]["force_dtype"] == "torch.quint8"
    assert layer["weight_tensor_infos"][0]["inf_dtype"] == "torch.qint8"
    assert add["input_tensor_infos"][0]["force_dtype"] == "torch.float32"
    assert "scale" not in add["input_tensor_infos"][0]


def test_scales_that_ipex_cannot_tell_apart_are_refused(shared: tuple[gp.Program, Any]) -> None:
    _, uses = shared
    body = [use for use in uses if use.module == "body"]
    with pytest.raises(LoweringError, match="runs 2 times with different scales"):
        write_scales({"model": summary("model.body", 1)}, body, "model.")
    with pytest.raises(LoweringError, match="read one value and quantize it in two ways"):
        write_scales({"model": summary("model.body", 2)}, body, "model.")
    with pytest.raises(LoweringError, match="IPEX does not see a layer there"):
        write_scales({"model": summary("model.other", 1)}, body, "model.")


def test_quantized_programs_are_not_lowered_to_bfloat16() -> None:
    program = traced("bert_sequence")
    program = gp.transform(program, STATIC, data=make_inputs(program))
    target = Ipex(precision="bf16")
    if INSTALLED:
        with pytest.raises(LoweringError, match="is quantized, and precision=bf16"):
            target.lower(program, Path("nowhere"))
