"""``graphprune train glue`` on two processes gives the masks and weights of one with the same global batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import graphprune as gp
from graphprune.cli import app
from tests.distributed_glue import command, start, write_files

for library in ("datasets", "accelerate", "torchmetrics"):
    pytest.importorskip(library, reason="fine-tuning needs the extra train")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

PRUNED = ("--apply_pruning", "--target_sparsity", "0.5", "--pruning_frequency", "2", "--cooldown_epochs", "0.5")
EIGHT = ("--per_device_train_batch_size", "8")
FOUR = ("--per_device_train_batch_size", "4")
TWO_TWICE = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2")
STEPS = 12
"""Of 48 examples, 8 at a time, twice."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("glue")
    write_files(folder)
    alone(folder, "one", *EIGHT, *PRUNED)
    return folder


def alone(folder: Path, name: str, *flags: str) -> None:
    result = CliRunner().invoke(app, command(folder, name, *flags))
    assert result.exit_code == 0, result.stderr[-3000:]


def together(folder: Path, name: str, *flags: str, how: tuple[str, ...] = ()) -> dict[str, Any]:
    done = start(command(folder, name, *flags), 2, *how)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)  # so the first process prints, and nobody else
    return found


def check(folder: Path, name: str, atol: float = 1e-5) -> None:
    """Masks and weights are those of one process; the schedule reached its end."""
    one, two = (load_file(folder / item / "model.safetensors") for item in ("one", name))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value == 0, two[key] == 0), key
        torch.testing.assert_close(value, two[key], rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}")
    assert any((value == 0).float().mean() > 0.3 for value in two.values())
    log = [json.loads(line) for line in (folder / name / "session.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(STEPS))
    assert log[-1]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    other = [json.loads(line)["sparsity"] for line in (folder / "one" / "session.jsonl").read_text().splitlines()]
    assert [entry["sparsity"] for entry in log] == other


def test_two_processes_that_accumulate_are_one(folder: Path) -> None:
    metrics = together(folder, "accumulated", *TWO_TWICE, *PRUNED, "--export_target", "reference", "--verify_loading")
    check(folder, "accumulated")
    assert metrics["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert gp.verify(folder / "accumulated" / "reference").passed
    assert not list((folder / "accumulated").rglob("*.tmp"))


def test_one_process_that_accumulates_is_the_same(folder: Path) -> None:
    alone(folder, "alone", *FOUR, "--gradient_accumulation_steps", "2", *PRUNED)
    check(folder, "alone")


def test_mixed_precision_ends_with_training(folder: Path) -> None:
    """What was trained under autocast is compared in float32 with what was written."""
    alone(folder, "bf16", *EIGHT, *PRUNED, "--bf16", "--verify_loading")


def test_sharding_in_one_process_is_refused(folder: Path) -> None:
    result = CliRunner().invoke(app, command(folder, "refused", *EIGHT, *PRUNED, "--fsdp"))
    assert result.exit_code == 2
    assert "--fsdp shards a model over several processes, and this is one" in result.stderr


@pytest.mark.slow
def test_two_processes_broken_off_and_resumed(folder: Path) -> None:
    flags = (*FOUR, *PRUNED, "--save_strategy", "epoch")
    together(folder, "resumed", *flags)
    check(folder, "resumed")
    for item in ("stage.json", "model.safetensors"):
        (folder / "resumed" / item).unlink()
    shutil.rmtree(folder / "resumed" / "checkpoint-12")
    done = start(command(folder, "resumed", *flags), 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("note: going on from") == 1
    check(folder, "resumed")


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [False, True])
def test_sharded_processes_are_one(folder: Path, blocks: bool) -> None:
    """accelerate shards on GPUs only; here it is told that it does on CPUs."""
    recipe = folder / "recipe.yaml"
    times = "frequency: 2, cool_down: 0.5 epochs"
    recipe.write_text(f"pipeline:\n  - insert-masks: {{sparsity: 0.5, {times}}}\n" + "  - partition-blocks\n" * blocks)
    flags = (*TWO_TWICE, "--recipe", str(recipe), "--fsdp", "--save_strategy", "epoch", "--verify_loading")
    name = f"sharded-{blocks}"
    together(folder, name, *flags, how=("fsdp",))
    check(folder, name)
    (folder / name / "stage.json").unlink()
    shutil.rmtree(folder / name / "checkpoint-12")
    together(folder, name, *flags, how=("fsdp",))
    check(folder, name)


@pytest.mark.slow
def test_stages_wait_for_each_other(folder: Path) -> None:
    recipe = folder / "stages.yaml"
    recipe.write_text(
        "stages:\n"
        "  - name: prune\n    pipeline: ['insert-masks{sparsity=0.5,frequency=2,warm_up=0,cool_down=0.25}']\n"
        "  - name: lock\n    pipeline: [lock-masks]\n"
        "  - name: quantize\n    pipeline: [dynamic-quant]\n    train: false\n"
    )
    alone(folder, "stages-one", *EIGHT, "--recipe", str(recipe))
    together(folder, "stages-two", *FOUR, "--recipe", str(recipe))
    for stage in ("prune", "lock", "."):
        one, two = (load_file(folder / f"stages-{count}" / stage / "model.safetensors") for count in ("one", "two"))
        for key, value in one.items():
            assert torch.equal(value == 0, two[key] == 0), key
            torch.testing.assert_close(value, two[key], rtol=0, atol=1e-5, msg=key)


@pytest.mark.slow
def test_two_processes_train_quantizers(folder: Path) -> None:
    metrics = together(
        folder, "quantized", *FOUR, *PRUNED, "--apply_quantization", "--export_target", "onnx", "--verify_loading"
    )
    assert metrics["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert gp.verify(folder / "quantized" / "onnx").passed


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(folder: Path) -> None:
    done = start(command(folder, "failed", *FOUR, *PRUNED), 2, "fail", timeout=120)
    assert done.returncode != 0
    assert "error: the second process failed" in done.stderr
    assert not (folder / "failed" / "stage.json").exists()


@pytest.mark.slow
def test_sharding_on_cpus_is_refused(folder: Path) -> None:
    """accelerate would train with DistributedDataParallel there, and say nothing."""
    done = start(command(folder, "unsharded", *FOUR, *PRUNED, "--fsdp"), 2, timeout=120)
    assert done.returncode != 0
    assert "error: --fsdp would not shard here" in done.stderr


@pytest.mark.slow
def test_what_several_processes_cannot_do(folder: Path) -> None:
    flags = ("--apply_quantization", "--quantization_approach", "dynamic", "--tolerance_criterion", "0.01")
    done = start(command(folder, "tried", *FOUR, *flags), 2, timeout=120)
    assert done.returncode != 0
    assert "--tolerance_criterion tries one quantization after the other in one process, and these are 2" in done.stderr
    quantized_after = ("--apply_quantization", "--quantization_approach", "dynamic", "--fsdp")
    done = start(command(folder, "after", *FOUR, *quantized_after), 2, "fsdp", timeout=120)
    assert done.returncode != 0
    assert "--fsdp shards models that are trained, and a stage here only evaluates or quantizes" in done.stderr
