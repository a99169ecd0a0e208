"""The sparse-cpu target: packages whose sparse layers run in our kernels, weights that can be read back, and the cost model."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.artifact.samples import make_inputs, run_program
from graphprune.errors import LoweringError
from graphprune.ir.program import Program
from graphprune.ir.sites import find_sites
from graphprune.ir.trace import trace
from graphprune.passes import LowerAttention, RemoveDropout
from graphprune.pipeline.target import PATTERNS, Support
from graphprune.sparsity.layout import to_logical
from graphprune.targets.sparse_cpu import SparseCpu, cost
from graphprune.targets.sparse_cpu.building import CHOICE
from tests.packed_programs import blocked, integers
from tests.shared_folder import shared_folder
from tests.test_quant_matrix import pruned
from tests.test_sparse_kernels import needs_compiler
from tests.traced import run_passes, traced

_ROOT = Path(__file__).parents[1]


_SPARSITY = {"4x1": 0.75, "unstructured": 0.9, "1x4": 0.75, "8x1": 0.75, "16x1": 0.75, "channelx1": 0.5}
_DEFAULT = {("residual", "fp32", "4x1"), ("residual", "static", "4x1")}
_SLOW = {
    *(("bert_qa", "fp32", pattern) for pattern in _SPARSITY),
    ("bert_qa", "static", "4x1"), ("bert_qa", "QAT", "4x1"), ("bert_qa", "dynamic", "4x1"), ("gpt2", "fp32", "4x1"),
    ("gpt2", "static", "4x1"), ("distilbert_qa", "fp32", "4x1"), ("vit", "fp32", "8x1"), ("shared_weight", "static", "4x1"),
    ("conv_bn", "fp32", "4x1"), ("tied_embedding", "fp32", "4x1"),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _own_costs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measured costs of tiny shapes stay out of the user's cache."""
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "_file", lambda: path)
        yield


def _program(name: str, way: str, pattern: str) -> Program:
    """As the target's legalizing passes leave it."""
    if way == "fp32":
        program = blocked(name, _SPARSITY[pattern], pattern)
        return run_passes(program, "fold-conv-bn") if name == "conv_bn" else program
    return integers(name, way, _SPARSITY[pattern])


@functools.cache
def _exported(name: str, way: str, pattern: str) -> tuple[Path, Program]:
    """An artifact with every layer that has zeros in a sparse kernel, compiled and verified once a session."""
    program = _program(name, way, pattern)
    folder = shared_folder() / "out"
    gp.export(program, SparseCpu(all=True), folder, fresh=name == "bert_qa")
    return folder, program


def _sparse_sites(program: Program, way: str) -> set[str]:
    """Linear layers with a zero, where their numbers have a kernel."""
    if way == "dynamic":
        return set()
    found = find_sites(program)[0]
    return {site.name for site in found if site.layout.value != "conv" and not bool(program.tensor(site.name).all())}


@needs_compiler
@pytest.mark.parametrize(
    ("name", "way", "pattern"),
    [*sorted(_DEFAULT), *(pytest.param(*case, marks=pytest.mark.slow) for case in sorted(_SLOW - _DEFAULT))],
)
def test_models_are_compiled_and_verified(name: str, way: str, pattern: str) -> None:
    folder, program = _exported(name, way, pattern)
    artifact = gp.verify(folder)
    assert artifact.passed
    manifest, sites = artifact.manifest, find_sites(program)[0]
    wanted = _sparse_sites(program, way)
    assert wanted or way == "dynamic" or name == "conv_bn"
    assert set(manifest.coverage["sparse kernel"]) == wanted
    assert set(manifest.coverage["dense kernel"]) == {site.name for site in sites} - wanted
    assert all(site.zeros_at_zero_point and site.pattern_holds in (True, None) for site in manifest.sites)
    stored = SparseCpu().weights(folder, {site.name: site.layout.value for site in sites})
    for site in sites:
        logical = to_logical(program.tensor(site.name).detach(), site.layout).numpy()
        weight = stored[site.name]
        assert np.array_equal(weight.zeros, logical == 0)
        if weight.scale is None:
            assert np.array_equal(weight.values, logical)
            continue
        assert weight.values.dtype == np.int8
        real = weight.values.astype(np.float32) * np.asarray(weight.scale).reshape(-1, 1)
        assert np.allclose(real, logical, rtol=1e-6, atol=1e-9)


def _runs_like_its_program(folder: Path, program: Program, sizes: tuple[int, ...], tolerance: float) -> None:
    (inputs,) = make_inputs(program, sizes=[dict(enumerate(sizes))])
    outputs = SparseCpu().open(folder)({name: value.numpy() for name, value in inputs.items()})
    expected = run_program(program, inputs, tuple(outputs))
    for name, want in expected.items():
        assert outputs[name].shape == want.shape
        assert np.abs(outputs[name] - want).max() < tolerance * np.abs(want).max()


@needs_compiler
@pytest.mark.parametrize(("way", "tolerance"), [("fp32", 1e-5), ("static", 5e-2)])
@pytest.mark.parametrize("batch", [1, 15, 64, 65, 200])
def test_the_batch_is_free(batch: int, way: str, tolerance: float) -> None:
    _runs_like_its_program(*_exported("residual", way, "4x1"), (batch,), tolerance)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("way", "tolerance"), [("fp32", 1e-5), ("static", 5e-2)])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 20), (5, 3), (2, 64)])
def test_batch_and_length_are_free(sizes: tuple[int, int], way: str, tolerance: float) -> None:
    _runs_like_its_program(*_exported("bert_qa", way, "4x1"), sizes, tolerance)


@needs_compiler
@pytest.mark.parametrize("isa", ["portable", pytest.param("torch", marks=pytest.mark.slow)])
def test_one_package_runs_on_every_instruction_set(isa: str, tmp_path: Path) -> None:
    folder, program = _exported("residual", "fp32", "4x1")
    (inputs, _) = make_inputs(program)
    given = {name: value.numpy() for name, value in inputs.items()}
    np.savez(tmp_path / "inputs.npz", **given)
    code = (
        "import numpy as np; from pathlib import Path; from graphprune.targets.sparse_cpu import SparseCpu\n"
        f"run = SparseCpu().open(Path({str(folder)!r}))\n"
        f"np.savez({str(tmp_path / 'outputs.npz')!r}, **run(dict(np.load({str(tmp_path / 'inputs.npz')!r}))))"
    )
    environment = {**os.environ, CHOICE: isa, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=_ROOT, env=environment, check=True)
    have = np.load(tmp_path / "outputs.npz")
    for name, want in SparseCpu().open(folder)(given).items():
        assert np.abs(have[name] - want).max() <= 1e-5 * np.abs(want).max()


@needs_compiler
def test_the_note_says_where_weights_are() -> None:
    folder, _ = _exported("residual", "static", "4x1")
    note = json.loads((folder / "model.json").read_text())
    names = {"stem.weight", "branch1.weight", "branch2.weight"}
    assert set(note["sparse"]) == names
    assert note["decisions"] == {}  # all=True asks for no measurement
    parts = {"values", "columns", "starts", "scales", "rows", "features", "step"}
    assert all(place.keys() == parts for place in note["sparse"].values())


@needs_compiler
def test_inputs_that_do_not_fit_are_refused() -> None:
    folder, _ = _exported("residual", "fp32", "4x1")
    run = SparseCpu().open(folder)
    with pytest.raises(LoweringError, match=r"input 'x' is missing"):
        run({})
    with pytest.raises(LoweringError, match=r"'x' is float64 with 2 dimensions.*takes float32"):
        run({"x": np.ones((2, 16))})


def test_an_empty_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphprune.targets.sparse_cpu.target.load_kernels", lambda: "portable")
    with pytest.raises(LoweringError, match=r"holds no model\.pt2"):
        SparseCpu().open(tmp_path)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_a_dense_model_runs_on_dense_kernels(name: str, tmp_path: Path) -> None:
    manifest = gp.export(traced(name), SparseCpu(all=True), tmp_path / "out").manifest
    assert not manifest.coverage.get("sparse kernel")
    assert manifest.coverage["dense kernel"]
    assert gp.verify(tmp_path / "out").passed


@needs_compiler
@pytest.mark.slow
def test_weights_in_half_the_bytes(tmp_path: Path) -> None:
    program = blocked("residual")
    gp.export(program, SparseCpu(all=True, storage="bfloat16"), tmp_path / "out")
    assert gp.verify(tmp_path / "out").passed
    weight = SparseCpu().weights(tmp_path / "out", {"stem.weight": "out_in"})["stem.weight"]
    assert np.array_equal(weight.values, program.tensor("stem.weight").detach().bfloat16().float().numpy())


@needs_compiler
@pytest.mark.slow
def test_nothing_but_zeros_and_one_feature(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1), nn.Linear(1, 3)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2], model[3]):
            layer.weight.zero_()
        model[3].weight[1] = 2.0
    artifact = gp.export(trace(model, (torch.randn(4, 8),)), SparseCpu(all=True), tmp_path / "out")
    assert len(artifact.manifest.coverage["sparse kernel"]) == 3
    assert gp.verify(tmp_path / "out").passed


# -- refusals and what it says of itself ---------------------------------------------------------------------------


@needs_compiler
def test_a_mask_that_is_left_is_refused(tmp_path: Path) -> None:
    with pytest.raises(gp.GraphPruneError, match="fold-masks"):
        SparseCpu().lower(pruned(traced("mlp"), "4x1"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_four_bits_are_refused(tmp_path: Path) -> None:
    recipe = "annotate-quant{weights=int8:symmetric:channel:group16,activations=none,embeddings=none},insert-fake-quant,freeze-quant"
    with pytest.raises(LoweringError, match=r"cannot run int8"):
        gp.export(gp.transform(traced("mlp"), recipe), "sparse-cpu", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tokens", [0, -1])
def test_options_out_of_range_are_refused(tokens: int) -> None:
    with pytest.raises(LoweringError, match=rf"tokens={tokens} is below 1"):
        SparseCpu(tokens=tokens)


def test_other_storage_is_refused() -> None:
    with pytest.raises(LoweringError, match="storage=float16 is neither float32 nor bfloat16"):
        SparseCpu(storage="float16")


def test_other_attention_is_refused() -> None:
    with pytest.raises(LoweringError, match="attention=float16 is none of auto, float32, bfloat16"):
        SparseCpu(attention="float16")


@pytest.mark.parametrize(("way", "option", "rounded"), [
    ("fp32", "auto", False), ("static", "auto", True), ("static", "float32", False), ("fp32", "bfloat16", True),
])  # fmt: skip
def test_attention_is_rounded_where_layers_are_quantized(way: str, option: str, rounded: bool) -> None:
    passes = SparseCpu(attention=option).passes(_program("residual", way, "4x1"), ())
    assert passes == (RemoveDropout(), LowerAttention(rounded))


def test_capabilities_exploit_what_has_a_kernel() -> None:
    capabilities = SparseCpu.capabilities()
    assert {name: capabilities[name] for name in PATTERNS} == {
        "unstructured": Support.EXPLOITED,
        "NxM": Support.EXPLOITED,
        "N:M": Support.STORED,
        "channel": Support.EXPLOITED,
    }
    assert capabilities["fp32"] is capabilities["int8"] is capabilities["uint8"] is Support.EXPLOITED
    assert {capabilities[name] for name in ("int4", "uint4", "int8 per group", "int4 per group")} == {Support.REFUSED}
    assert set(SparseCpu.remarks) <= set(capabilities)


def test_it_is_found_by_name() -> None:
    from graphprune.pipeline.registry import known_targets

    assert known_targets()["sparse-cpu"] is SparseCpu


def test_names_of_patterns() -> None:
    assert {pattern for _, _, pattern in _DEFAULT | _SLOW} == set(_SPARSITY)
