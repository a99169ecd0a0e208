"""The Inductor target: a compiled package with the numbers of the Program, integer kernels, and weights that can be read back."""

from __future__ import annotations

import copy
import functools
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import graphprune as gp
from graphprune.artifact.samples import make_inputs, run_program
from graphprune.errors import LoweringError
from graphprune.ir.program import Program
from graphprune.ir.sites import find_sites
from graphprune.ir.trace import trace
from graphprune.pipeline.target import Support
from graphprune.sparsity.layout import to_logical
from graphprune.targets.inductor import Inductor
from graphprune.targets.inductor_model import compiling
from graphprune.targets.inductor_model.package import check_package
from graphprune.targets.inductor_model.rewriting import inference_copy, use_integers
from tests.models import MODELS
from tests.shared_folder import shared_folder
from tests.test_quant_matrix import pruned, quantized
from tests.traced import assert_same, run_passes, traced


def _has_compiler() -> bool:
    try:
        compiling.check_compiler()
    except LoweringError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="target inductor compiles C++, and no compiler is here")
_SPARSITY = {"dense": 0.0, "4x1": 0.5}
_KINDS = ("bert_qa", "distilbert_qa", "vit", "resnet")
_DEFAULT = {("bert_qa", "static", "4x1")}
_SLOW = {
    ("conv_bn", "fp32", "4x1"),
    *((name, way, pattern) for name in _KINDS for way in ("fp32", "static") for pattern in _SPARSITY),
    ("bert_qa", "dynamic", "4x1"), ("bert_qa", "QAT", "dense"), ("gpt2", "static", "4x1"), ("grouped_conv", "static", "dense"),
    ("tied_embedding", "dynamic", "dense"),
}  # fmt: skip


def _program(name: str, way: str, pattern: str) -> Program:
    """As the target's legalizing passes leave it."""
    program = traced(name)
    if name in ("resnet", "conv_bn"):
        program = gp.transform(program, "fold-conv-bn")
    program = pruned(program, pattern)
    if way != "fp32":
        program = quantized(program, way)
    passes = (["freeze-quant"] if way == "QAT" else []) + (["fold-masks"] if pattern != "dense" else [])
    return run_passes(program, ",".join(passes)) if passes else program


@functools.cache
def _exported(name: str, way: str, pattern: str, fresh: bool) -> tuple[Path, Program]:
    """An artifact, compiled and verified once a session."""
    program = _program(name, way, pattern)
    folder = shared_folder() / "out"
    gp.export(program, "inductor", folder, fresh=fresh)
    return folder, program


def _compiled() -> tuple[Path, Program]:
    return _exported("bert_qa", "static", "4x1", True)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "way", "pattern"),
    [*sorted(_DEFAULT), *(pytest.param(*case, marks=pytest.mark.slow) for case in sorted(_SLOW - _DEFAULT))],
)
def test_models_are_compiled_and_verified(name: str, way: str, pattern: str) -> None:
    folder, program = _exported(name, way, pattern, name == "bert_qa")
    manifest = gp.verify(folder).manifest
    sites, _ = find_sites(program)
    integers = way != "fp32"
    assert set(manifest.coverage["integer kernel"]) == ({site.name for site in sites} if integers else set())
    assert bool(manifest.coverage["float kernel"]) is not integers
    assert all(site.zeros_at_zero_point and site.pattern_holds in (True, None) for site in manifest.sites)
    assert manifest.sparsity() == pytest.approx(_SPARSITY[pattern], abs=0.03)
    stored = Inductor().weights(folder, {site.name: site.layout.value for site in sites})
    for site in sites:
        logical = to_logical(program.tensor(site.name).detach(), site.layout).numpy()
        weight = stored[site.name]
        assert np.array_equal(weight.zeros, logical == 0)
        if not integers:
            assert np.array_equal(weight.values, logical)
            continue
        assert weight.values.dtype == np.int8
        assert weight.scale is not None
        real = weight.values.astype(np.float32) * np.asarray(weight.scale).reshape(-1, 1)
        assert np.allclose(real, logical, rtol=1e-6, atol=1e-9)


@needs_compiler
@pytest.mark.parametrize("sizes", [(1, 1), (1, 20), (5, 3), (2, 64)])
def test_sizes_are_free(sizes: tuple[int, int]) -> None:
    folder, program = _compiled()
    (inputs,) = make_inputs(program, sizes=[dict(enumerate(sizes))])
    outputs = Inductor().open(folder)({name: value.numpy() for name, value in inputs.items()})
    expected = run_program(program, inputs, tuple(outputs))
    for name, want in expected.items():
        assert outputs[name].shape == want.shape
        assert np.abs(outputs[name] - want).max() < 5e-2 * np.abs(want).max()


@needs_compiler
def test_the_package_runs_without_graphprune() -> None:
    folder, program = _compiled()
    (inputs, _) = make_inputs(program)
    model = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        calls = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("wrapper.cpp"))
    with torch.no_grad():
        assert_same(tuple(program(**inputs).values()), tuple(model(**inputs)), 5e-2)
    called = [line for line in calls.splitlines() if "CHECK(aoti_torch_cpu__qlinear_pointwise" in line]
    assert len(called) == len(find_sites(program)[0])
    assert "aoti_torch_cpu_addmm" not in calls
    assert "aoti_torch_call_dispatcher" not in calls


@needs_compiler
def test_inputs_that_do_not_fit_are_refused() -> None:
    folder, program = _compiled()
    run = Inductor().open(folder)
    given = {name: value.numpy() for name, value in make_inputs(program)[0].items()}
    with pytest.raises(LoweringError, match="'attention_mask' is missing"):
        run({"input_ids": given["input_ids"]})
    with pytest.raises(LoweringError, match=r"'input_ids' is int32 with 2 dimensions.*takes int64"):
        run({**given, "input_ids": given["input_ids"].astype(np.int32)})
    with pytest.raises(LoweringError, match=r"size 65 in dimension 1.*at most 64"):
        run({name: np.ones((1, 65), np.int64) for name in given})


@needs_compiler
def test_a_damaged_package_is_refused(tmp_path: Path) -> None:
    folder, _ = _compiled()
    content = bytearray((folder / "model.pt2").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "model.pt2").write_bytes(content)
    with pytest.raises(LoweringError, match="damaged at"):
        Inductor().open(tmp_path)
    (tmp_path / "model.pt2").write_bytes(content[: len(content) // 2])
    with pytest.raises(LoweringError, match="is damaged"):
        Inductor().weights(tmp_path, {})
    (tmp_path / "model.pt2").write_bytes((folder / "model.pt2").read_bytes())
    with pytest.raises(LoweringError, match=r"model\.json cannot be read"):
        Inductor().open(tmp_path)
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(LoweringError, match=r"model\.json cannot be read"):
        Inductor().weights(tmp_path, {})


def _package(path: Path, **metadata: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data/aotinductor/model/x.wrapper_metadata.json", json.dumps(metadata))
    return path


def test_a_package_for_another_cpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    _package(tmp_path / "model.pt2", AOTI_CPU_ISA="AVX512 AVX512_VNNI")
    with pytest.raises(LoweringError, match="compiled for a CPU with AVX512_VNNI, which this one lacks"):
        Inductor().open(tmp_path)
    _package(tmp_path / "model.pt2", AOTI_MACHINE="sparc")
    with pytest.raises(LoweringError, match="compiled for sparc"):
        Inductor().weights(tmp_path, {})
    check_package(_package(tmp_path / "model.pt2", AOTI_CPU_ISA="AVX512"))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"holds no model\.pt2"):
        Inductor().open(tmp_path)


# -- without compiling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "way", "counts"),
    [
        ("bert_qa", "static", (13, 0, 3)),
        ("bert_qa", "dynamic", (13, 0, 3)),
        ("gpt2", "static", (9, 0, 2)),
        ("conv_bn", "static", (3, 0, 0)),
        ("conv_bn", "dynamic", (1, 2, 0)),
        ("grouped_conv", "static", (4, 0, 0)),
        ("shared_weight", "static", (4, 0, 0)),
        ("tied_embedding", "dynamic", (2, 0, 1)),
    ],
)
def test_the_integer_form_computes_the_same(name: str, way: str, counts: tuple[int, int, int]) -> None:
    program = _program(name, way, "dense")
    before = str(program)
    copied, _ = inference_copy(program)
    found = use_integers(copied)
    assert (found["integer-weights"], found["float-weights"], found["integer-tables"]) == counts
    assert not list(copied.calls(torch.ops.graphprune.fake_quantize.default))
    for inputs in make_inputs(program):
        with torch.no_grad():
            assert_same(program(**inputs), copied(**inputs), 2e-2)
    assert str(program) == before


def test_each_use_of_a_value_dequantizes_it() -> None:
    copied, _ = inference_copy(_program("bert_qa", "static", "dense"))
    use_integers(copied)
    operators = torch.ops.quantized_decomposed
    quantize = list(copied.calls(operators.quantize_per_tensor.default))
    dequantize = list(copied.calls(operators.dequantize_per_tensor.default))
    assert (len(quantize), len(dequantize)) == (9, 13)
    assert all(len(node.users) == 1 for node in dequantize)


def test_weights_with_zero_points_stay_float() -> None:
    recipe = "annotate-quant{weights=int8:affine:channel,embeddings=none}"
    program = traced("mlp")
    batches = make_inputs(program)
    program = gp.transform(
        program, f"{recipe},insert-observers,calibrate{{progress=false}},insert-fake-quant,freeze-quant", data=batches
    )
    copied, _ = inference_copy(program)
    assert use_integers(copied)["float-weights"] == 3
    with torch.no_grad():
        assert_same(program(**batches[0]), copied(**batches[0]), 1e-2)


def test_four_bits_and_groups_are_refused(tmp_path: Path) -> None:
    for weights in ("int4:symmetric:channel", "int8:symmetric:channel:group16"):
        recipe = f"annotate-quant{{weights={weights},activations=none,embeddings=none}},insert-fake-quant,freeze-quant"
        program = run_passes(traced("mlp"), recipe)
        with pytest.raises(LoweringError, match=r"cannot run int"):
            gp.export(program, "inductor", tmp_path / "out")
        with pytest.raises(LoweringError, match="plan int8:symmetric:channel"):
            use_integers(inference_copy(program)[0])
    assert not (tmp_path / "out").exists()


def test_a_mask_that_is_left_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="run fold-masks"):
        Inductor().lower(pruned(traced("mlp"), "4x1"), tmp_path)


@torch.library.custom_op("graphprune_tests::twice", mutates_args=())
def _twice(x: Tensor) -> Tensor:
    return x + x


@_twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class _Foreign(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.graphprune_tests.twice(self.inner(x))  # type: ignore[no-any-return]


def test_an_operator_that_needs_python_is_named(tmp_path: Path) -> None:
    program = trace(_Foreign().eval(), (torch.zeros(2, 8),))
    with pytest.raises(LoweringError, match=r"graphprune_tests.twice.default .*test_target_inductor.py, line \d+"):
        Inductor().lower(program, tmp_path)


@needs_compiler
def test_an_operator_that_does_not_compile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("LoweringException: no rule\n  target: aten.relu.default")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(LoweringError, match=r"at aten.relu.default .*models.py, line \d+.*no rule"):
        Inductor().lower(traced("mlp"), tmp_path)


def test_no_compiler_is_one_clear_error(tmp_path: Path) -> None:
    import torch._inductor.config as config

    with (
        config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(LoweringError, match=r"no-such-compiler cannot be run.*apt-get install g\+\+.*CXX"),
    ):
        Inductor().lower(traced("mlp"), tmp_path)


def test_capabilities_exploit_int8_and_store_sparsity() -> None:
    capabilities = Inductor.capabilities()
    assert capabilities["int8"] is capabilities["dynamic uint8"] is Support.EXPLOITED
    assert {capabilities[name] for name in ("unstructured", "NxM", "N:M", "channel")} == {Support.STORED}
    assert {capabilities[name] for name in ("int4", "uint4", "int8 per group")} == {Support.REFUSED}


def test_names_of_models() -> None:
    assert {name for name, _, _ in _DEFAULT | _SLOW} <= set(MODELS)
    assert copy.deepcopy(Inductor()) == Inductor()
