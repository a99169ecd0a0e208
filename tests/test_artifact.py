"""Artifacts: what the manifest says is what the files are, and every kind of damage is found and named."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.artifact.files import sha256, written
from graphprune.artifact.manifest import FileEntry, Manifest
from graphprune.artifact.verification import largest_difference, verify_afresh
from graphprune.pipeline.target import Run
from graphprune.targets.onnx import Onnx
from tests.models import MODELS

onnx = pytest.importorskip("onnx", reason="the ONNX target needs the extra onnx")
SITE = "bert.encoder.layer.1.intermediate.dense.weight"
PIPELINE = "insert-masks{pattern=4x1,sparsity=0.8,criterion=magnitude,schedule=one-shot}"


@pytest.fixture(scope="module")
def program() -> gp.Program:
    return gp.transform(MODELS["bert_qa"]().eval(), PIPELINE, labels=True)


@pytest.fixture(scope="module")
def quantized(program: gp.Program) -> gp.Program:
    copied = gp.transform(program, "insert-fake-quant")
    gp.training.calibrate(copied, [{"input_ids": torch.randint(0, 99, (4, 8))} for _ in range(2)])
    return copied


@pytest.fixture(scope="module")
def exported(quantized: gp.Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gp.export(quantized, "onnx", tmp_path_factory.mktemp("artifact") / "out").folder


@pytest.fixture
def artifact(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "out"))


def edit_weight(folder: Path, site: str, change: object) -> None:
    """Change one initializer of the model file, and make the manifest's size and hash fit."""
    path = folder / "model.onnx"
    model = onnx.load(path)
    tensor = next(item for item in model.graph.initializer if item.name.startswith(site) and len(item.dims) == 2)
    values = onnx.numpy_helper.to_array(tensor).copy()
    change(values)  # type: ignore[operator]
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    manifest = Manifest.read(folder)
    hashed = FileEntry(name="model.onnx", bytes=path.stat().st_size, sha256=sha256(path))
    files = [hashed if entry.name == "model.onnx" else entry for entry in manifest.files]
    manifest.model_copy(update={"files": files}).write(folder)


def test_the_manifest_has_what_the_contract_asks(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert {"target", "recipe", "versions", "files", "sites", "parity", "coverage"} <= set(manifest)
    assert {"max_abs", "tolerance", "worst_node"} <= set(manifest["parity"])
    for entry in manifest["files"]:
        assert (artifact / entry["name"]).stat().st_size == entry["bytes"]
    site = next(item for item in manifest["sites"] if item["name"] == SITE)
    assert site["pattern"] == "4x1"
    assert site["pattern_holds"]
    assert site["zeros_at_zero_point"]
    assert site["stored"] == "int8"
    assert manifest["recipe"].startswith("insert-masks{")
    assert (artifact / "config.json").is_file()


def test_verify_passes_and_prints_every_check(artifact: Path) -> None:
    report = gp.verify(artifact)
    assert report.passed
    assert [check.name for check in report.checks] == ["files", "sparsity", "parity"]
    assert "0.8" in str(report)


def test_measured_sparsity_is_that_of_the_masks(program: gp.Program, exported: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(exported)
    assert manifest.sparsity() == pytest.approx(0.8, abs=0.002)


def test_a_block_made_nonzero_is_found_and_its_layer_named(artifact: Path) -> None:
    def fill(values: np.ndarray) -> None:
        blocks = values.T if values.shape[0] < values.shape[1] else values  # stored [in, out] or [out, in]
        zero = np.argwhere((blocks.reshape(-1, 4, blocks.shape[1]) == 0).all(1))[0]
        blocks[zero[0] * 4 : zero[0] * 4 + 4, zero[1]] = 1

    edit_weight(artifact, SITE, fill)
    with pytest.raises(gp.VerifyError, match=SITE.replace(".", r"\.")):
        gp.verify(artifact)


def test_a_flipped_bit_is_found(artifact: Path) -> None:
    path = artifact / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(gp.VerifyError, match=r"files: model\.onnx was changed"):
        gp.verify(artifact)


@pytest.mark.parametrize("name", ["model.onnx", "sample-inputs/inp_0001.npz", "config.json"])
def test_a_missing_file_is_named(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    with pytest.raises(gp.VerifyError, match=f"{name} is missing"):
        gp.verify(artifact)


def test_a_file_that_does_not_belong_is_named(artifact: Path) -> None:
    (artifact / "extra.bin").write_bytes(b"x")
    with pytest.raises(gp.VerifyError, match=r"extra\.bin is not in the manifest"):
        gp.verify(artifact)


def test_moved_zeros_are_found(artifact: Path) -> None:
    def swap(values: np.ndarray) -> None:
        flat = values.reshape(-1)
        zero, other = np.flatnonzero(flat == 0)[0], np.flatnonzero(flat != 0)[0]
        flat[zero], flat[other] = flat[other], flat[zero]

    edit_weight(artifact, SITE, swap)
    with pytest.raises(gp.VerifyError, match=SITE.replace(".", r"\.")):
        gp.verify(artifact)


def test_changed_values_are_found_by_parity(artifact: Path) -> None:
    def negate(values: np.ndarray) -> None:
        np.negative(values, out=values)

    edit_weight(artifact, SITE, negate)
    edit_weight(artifact, "qa_outputs.weight", negate)
    with pytest.raises(gp.VerifyError, match="parity: largest difference"):
        gp.verify(artifact)


def test_damaged_manifests(artifact: Path) -> None:
    (artifact / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(gp.VerifyError, match="is damaged"):
        gp.verify(artifact)
    (artifact / "manifest.json").unlink()
    with pytest.raises(gp.VerifyError, match="is no artifact"):
        gp.verify(artifact)
    with pytest.raises(gp.VerifyError, match="is no folder"):
        gp.verify(artifact / "nowhere")


def test_a_program_is_left_as_it_is(program: gp.Program, tmp_path: Path) -> None:
    before = str(program), {name: value.clone() for name, value in program.state_dict().items()}
    gp.export(program, "onnx", tmp_path / "out")
    assert str(program) == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in program.state_dict().items())


def test_an_artifact_is_replaced_as_a_whole(program: gp.Program, artifact: Path) -> None:
    with pytest.raises(gp.GraphPruneError, match="overwrite=True"):
        gp.export(program, Onnx(opset=18), artifact)
    gp.export(program, Onnx(opset=18), artifact, overwrite=True)
    assert gp.verify(artifact).manifest.sites[0].stored == "float32"


def test_a_folder_of_somebody_else_is_left_alone(program: gp.Program, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(gp.GraphPruneError, match="did not write"):
        gp.export(program, "onnx", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_lowering_that_fails_leaves_nothing(
    program: gp.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Onnx, "lower", full)
    with pytest.raises(gp.GraphPruneError, match="No space left on device"):
        gp.export(program, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_lowered_model_that_computes_something_else_is_refused(
    program: gp.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Onnx.open

    def wrong(self: Onnx, folder: Path, threads: int | None = None) -> Run:
        run = original(self, folder, threads)
        return lambda inputs: {name: value + 1 for name, value in run(inputs).items()}

    monkeypatch.setattr(Onnx, "open", wrong)
    monkeypatch.setattr(Onnx, "any_graph", False)  # the search for the operator has tests of its own
    with pytest.raises(gp.VerifyError, match="the onnx export differs from the Program by 1 at"):
        gp.export(program, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unfinished_training_is_not_exported(tmp_path: Path) -> None:
    program = gp.transform(MODELS["bert_qa"]().eval(), "insert-masks")
    with pytest.raises(gp.SparsityError, match="train to the end of"):
        gp.export(program, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def no_file_over(size: int) -> Iterator[None]:
    """Let the operating system refuse to write past ``size`` bytes of any file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, *(pytest.param(size, marks=pytest.mark.slow) for size in (512, 4096)), 60_000])
def test_a_refused_write_is_one_error_and_leaves_nothing(program: gp.Program, tmp_path: Path, size: int) -> None:
    def save_state(path: Path) -> None:
        with written(path) as temporary:
            torch.save(program.state_dict(), temporary)

    for number, write in enumerate((lambda path: gp.save(program, path), save_state)):
        with pytest.raises(gp.GraphPruneError, match=r"cannot write .*; nothing was left there"), no_file_over(size):
            write(tmp_path / str(number))
    with pytest.raises(gp.GraphPruneError, match="cannot write"), no_file_over(size):
        gp.export(program, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), written(tmp_path / "a") as path:
        path.write_text("half") and 1 / 0
    assert list(tmp_path.iterdir()) == []
    with written(tmp_path / "b" / "c") as path:
        path.write_text("whole")
    assert (tmp_path / "b" / "c").read_text() == "whole"


def test_largest_difference_knows_nan_and_infinity() -> None:
    value = np.array([1.0, np.inf, np.nan])
    assert largest_difference({"a": value}, {"a": value}) == (0.0, "a")
    assert largest_difference({"a": np.array([1.0, 2.0, np.nan])}, {"a": value})[0] == np.inf
    with pytest.raises(gp.VerifyError, match="output a is missing"):
        largest_difference({}, {"a": value})


def test_an_edited_manifest_is_refused(artifact: Path) -> None:
    path = artifact / "manifest.json"
    path.write_text(path.read_text().replace('"tolerance"', '"tolerance" ').replace("insert-masks{", "insert-masks{ "))
    with pytest.raises(gp.VerifyError, match="it was edited after it was written"):
        gp.verify(artifact)


def test_another_tolerance_in_the_manifest_is_refused(artifact: Path) -> None:
    path = artifact / "manifest.json"
    content = json.loads(path.read_text())
    content["parity"]["tolerance"] = 1e9
    path.write_text(json.dumps(content))
    with pytest.raises(gp.VerifyError, match="edited"):
        gp.verify(artifact)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../b", "..\\b"])
def test_a_path_that_escapes_the_folder_is_refused(artifact: Path, name: str) -> None:
    manifest = Manifest.read(artifact)
    escaping = FileEntry(name=name, bytes=1, sha256="0" * 64)
    manifest.model_copy(update={"files": [*manifest.files, escaping]}).write(artifact)
    with pytest.raises(gp.VerifyError, match="lies outside of the artifact"):
        gp.verify(artifact)


def test_a_link_out_of_the_folder_is_named(artifact: Path, tmp_path: Path) -> None:
    (artifact / "config.json").rename(tmp_path / "config.json")
    (artifact / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(gp.VerifyError, match=r"config\.json is a link to a place outside"):
        gp.verify(artifact)


def test_files_of_another_artifact_are_named(artifact: Path, program: gp.Program, tmp_path: Path) -> None:
    other = gp.export(program, "onnx", tmp_path / "other").folder
    shutil.copy(other / "model.onnx", artifact / "model.onnx")
    shutil.copy(other / "sample-inputs" / "inp_0001.npz", artifact / "inp_0001.npz")
    with pytest.raises(
        gp.VerifyError, match=r"model\.onnx was changed; inp_0001\.npz is not in the manifest, perhaps a file"
    ):
        gp.verify(artifact)


def test_an_artifact_is_verified_in_a_new_process_too(artifact: Path) -> None:
    verify_afresh(artifact)
    (artifact / "config.json").write_text("{}")
    with pytest.raises(gp.VerifyError, match=r"in a new process: .*config\.json was changed"):
        verify_afresh(artifact)


@pytest.mark.parametrize(("allowed", "expected"), [(2.0**-7, 5e-2), (0.1, 0.1)])
def test_a_target_allows_more_but_never_less(
    allowed: float, expected: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Onnx, "tolerance", lambda _: allowed)
    program = gp.transform(MODELS["mlp"]().eval(), "insert-fake-quant", (torch.randn(2, 16),))
    gp.training.calibrate(program, [(torch.randn(4, 16),)])
    folder = gp.export(program, "onnx", tmp_path / "out").folder
    manifest = Manifest.read(folder)
    outputs = [value for path in (folder / "sample-outputs").iterdir() for value in np.load(path).values()]
    largest = max(float(np.abs(value).max()) for value in outputs)
    assert manifest.parity.tolerance == pytest.approx(expected * largest)
