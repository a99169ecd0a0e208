"""The commands that the product grew from, with local files in place of hub names, on a tiny DistilBERT and a few questions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import graphprune as gp
from graphprune.artifact.manifest import Manifest
from graphprune.cli import app
from graphprune.pipeline.recipe import Recipe
from tests.task_data import squad, tiny_tokenizer, write

pytest.importorskip("datasets", reason="fine-tuning needs the extra train")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

PLACES = ("the red boat", "a small city", "the blue river", "a long river", "the small boat", "a red city")
LENGTH = ["--max_seq_length", "48", "--doc_stride", "8", "--use_cpu"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher, a student that is 90 % sparse, and data."""
    from transformers import DistilBertConfig, DistilBertForQuestionAnswering

    folder = tmp_path_factory.mktemp("seeds")
    tokenizer = tiny_tokenizer()
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    for number, name in enumerate(("student", "teacher", "sparse")):
        torch.manual_seed(number)
        model: Any = DistilBertForQuestionAnswering(config)
        if name == "sparse":
            for key, weight in model.named_parameters():
                if "transformer" in key and weight.dim() == 2:
                    weight.data[torch.rand(weight.shape) < 0.9] = 0
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    paragraphs = [
        (f"she was born in {one} near {two}.", [("where was she born?", [one]), ("what is near?", [two])])
        for one in PLACES
        for two in PLACES
        if one != two
    ]
    write(folder, "train.json", squad(*paragraphs))
    write(folder, "dev.json", squad(*paragraphs[::5]))
    return folder


def run(root: Path, text: str, out: Path) -> dict[str, float]:
    files = f"--train_file {root}/train.json --validation_file {root}/dev.json --output_dir {out}"
    result = CliRunner().invoke(app, ["train", "qa", *text.format(root=root).split(), *files.split(), *LENGTH])
    assert result.exit_code == 0, result.stderr[-3000:]
    found: dict[str, float] = json.loads(result.stdout[result.stdout.index("{\n") :])
    return found


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForQuestionAnswering

    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    return {key: value == 0 for key, value in model.named_parameters() if "transformer" in key and value.dim() == 2}


def test_static_quantization_after_training(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    metrics = run(
        root,
        "--model_name_or_path {root}/student --apply_quantization --quantization_approach static --num_calibration_samples 40 "
        "--do_eval --verify_loading --export_target onnx",
        out,
    )
    assert 0 <= metrics["eval_f1"] <= 100
    manifest = Manifest.read(out / "onnx")
    assert {site.stored for site in manifest.sites} == {"int8"}
    assert manifest.metrics["eval_f1"] == pytest.approx(metrics["eval_f1"])
    assert gp.verify(out / "onnx").passed


@pytest.mark.slow
def test_quantization_aware_training_with_cached_teacher(root: Path, tmp_path: Path) -> None:
    command = (
        "--model_name_or_path {root}/student --apply_distillation --generate_teacher_logits --teacher_model_name_or_path {root}/teacher "
        f"--teacher_cache_dir {tmp_path}/cache --apply_quantization --do_train --do_eval --num_train_epochs 1 --max_train_samples 24 "
        "--verify_loading --pad_to_max_length"
    )
    first = run(root, command, tmp_path / "one")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert files
    second = run(root, command, tmp_path / "two")
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert first["eval_f1"] == second["eval_f1"]
    program = gp.load(tmp_path / "one" / "program")
    assert program.properties & gp.Property.FAKE_QUANT


@pytest.mark.slow
def test_magnitude_pruning_with_quantization_aware_training(root: Path, tmp_path: Path) -> None:
    metrics = run(
        root,
        "--model_name_or_path {root}/student --apply_quantization --apply_pruning --target_sparsity 0.5 --pruning_approach magnitude "
        "--num_train_epochs 2 --do_train --do_eval --verify_loading --gradient_accumulation_steps 2",
        tmp_path / "out",
    )
    assert metrics["sparsity"] == pytest.approx(0.5, abs=0.02)
    program = gp.load(tmp_path / "out" / "program")
    assert program.properties & gp.Property.FAKE_QUANT
    assert program.properties & gp.Property.MASKED


STAGE = (
    "--dataset_config_name x --apply_distillation --generate_teacher_logits --teacher_model_name_or_path {root}/teacher --apply_pruning "
    "--pruning_config {root}/prune_pattern_lock.yml --do_train --do_eval --num_train_epochs 1 --per_device_train_batch_size 12 "
    "--per_device_eval_batch_size 12 --pad_to_max_length --warmup_ratio 0.05 --weight_decay 0.01"
)
LOCK = """version: 1.0
model: {name: bert, framework: pytorch_fx}
pruning: {approach: {weight_compression: {start_epoch: 0, pruners: [!Pruner {prune_type: pattern_lock}]}}}
"""


def test_prune_once_for_all(root: Path, tmp_path: Path) -> None:
    (root / "prune_pattern_lock.yml").write_text(LOCK)
    want = zeros(root / "sparse")
    assert 0.85 < sum(int(item.sum()) for item in want.values()) / sum(item.numel() for item in want.values()) < 0.95
    one, two = tmp_path / "stage1", tmp_path / "stage2"
    run(root, "--model_name_or_path {root}/sparse --learning_rate 1e-3 " + STAGE, one)
    have = zeros(one)
    assert all(torch.equal(have[name], want[name]) for name in want)
    run(root, f"--model_name_or_path {one} --apply_quantization --learning_rate 1e-4 --verify_loading " + STAGE, two)
    assert all((zeros(two)[name] | ~want[name]).all() for name in want)  # rounding may add zeros, and takes none away
    assert gp.load(two / "program").properties & gp.Property.FAKE_QUANT


RECIPE = """
variables: {teacher: self}
distillation: {teacher: "${teacher}", task: 0.0, logits: 1.0, temperature: 2.0}
training: {per_device_train_batch_size: 12}
stages:
  - name: lock
    pipeline: [lock-masks]
    training: {num_train_epochs: 1, learning_rate: 1e-3}
  - name: quantize
    pipeline: [lock-masks, insert-fake-quant]
    training: {num_train_epochs: 1, learning_rate: 1e-4}
target: reference
"""


@pytest.mark.slow
def test_sparse_transfer_by_one_recipe(root: Path, tmp_path: Path) -> None:
    """A sparse checkpoint, a dense teacher made by the same tool, the transfer recipe, and the export."""
    run(root, "--model_name_or_path {root}/teacher --do_train --num_train_epochs 1", tmp_path / "dense")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    out = tmp_path / "out"
    command = f"--model_name_or_path {root}/sparse --recipe {recipe} --recipe_args teacher={tmp_path}/dense --do_train --do_eval"
    metrics = run(root, command, out)
    want = zeros(root / "sparse")
    for folder in (out / "lock", out):
        assert all((zeros(folder)[name] | ~want[name]).all() for name in want)
    assert gp.verify(out / "reference").passed
    exported = CliRunner().invoke(app, ["export", str(out / "program"), "--target", "onnx", "-o", f"{out}/onnx"])
    assert exported.exit_code == 0, exported.stderr
    assert [stage.name for stage in Recipe.load(out / "recipe.yaml").stages] == ["lock", "quantize"]

    shutil.rmtree(out / "reference")
    (out / "stage.json").unlink()  # as if it had ended before: the first stage is not trained again
    before = (out / "lock" / "model.safetensors").stat().st_mtime_ns
    again = run(root, command, out)
    assert (out / "lock" / "model.safetensors").stat().st_mtime_ns == before
    assert again["eval_f1"] == metrics["eval_f1"]
