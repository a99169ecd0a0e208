"""Flags of the fine-tuning commands: those of older scripts work, and what they ask for becomes a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphprune.errors import RecipeError
from graphprune.finetuning.arguments import Arguments, parse_arguments
from graphprune.finetuning.older_flags import translate
from graphprune.finetuning.plan import plan
from graphprune.passes import InsertMasks, LockMasks
from graphprune.pipeline.recipe import Recipe
from graphprune.pipeline.stages import DistillationSettings

pytest.importorskip("accelerate", reason="fine-tuning needs the extra train")


def told(text: str) -> Arguments:
    return parse_arguments(["--model_name_or_path", "m", "--train_file", "t.json", *text.split()], "run_qa.py")


def masks(text: str) -> InsertMasks:
    (step,) = plan(told(f"--do_train --apply_pruning {text}")).stages[0].passes
    assert isinstance(step, InsertMasks)
    return step


# -- words --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--no_cuda", "--use_cpu"),
        ("--do_prune --pruning_pattern=2:4", "--apply_pruning --pattern=2:4"),
        ("--warmup_ratio 0.05 --seed 3", "--warmup_steps 0.05 --seed 3"),
        ("--warmup_ratio=0", "--warmup_steps 0"),
        ("--evaluation_strategy epoch", "--eval_strategy epoch"),
        ("--save_onnx_model --output-dir x-y", "--export_target onnx --output_dir x-y"),
        ("--exclude *.a-b.* --seed -1", "--exclude *.a-b.* --seed -1"),
    ],
)
def test_older_flags_are_todays(old: str, new: str) -> None:
    assert translate(old.split()) == new.split()


def test_what_was_written_is_known() -> None:
    arguments = told("--do_prune False --warmup_ratio 0.1 --learning_rate=1e-3")
    assert arguments.said == {
        "model_name_or_path", "train_file", "apply_pruning", "warmup_steps", "learning_rate",
    }  # fmt: skip
    assert arguments.compression.apply_pruning is False
    assert arguments.training.warmup_steps == 0.1


def test_flags_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "flags.json"
    path.write_text(
        json.dumps({"model_name_or_path": "m", "dataset_name": "squad", "apply_pruning": True, "output_dir": "o"})
    )
    arguments = parse_arguments([str(path)], "run_qa.py")
    assert arguments.compression.apply_pruning
    assert arguments.said == {"model_name_or_path", "dataset_name", "apply_pruning", "output_dir"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--target_sparsty 0.5", r"unknown flag --target_sparsty; did you mean '--target_sparsity'"),
        ("--learning_rate fast", "learning_rate.*invalid float value: 'fast'"),
        ("--warmup_ratio 7", "--warmup_ratio 7: it is a fraction of training"),
        ("--dataset_name squad", "dataset_name and train_file"),
    ],
)
def test_words_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        told(text)


# -- pruning ------------------------------------------------------------------------------------------------------------


def test_pruning_flags() -> None:
    found = masks("--target_sparsity 0.5 --start_step 10 --end_step 90 --pruning_approach magnitude_progressive")
    assert (found.sparsity, found.warm_up, found.end, found.criterion, found.progressive) == (
        0.5,
        10,
        90,
        "magnitude",
        4,
    )
    found = masks("--pattern 2:4 --warm_epochs 1 --cooldown_epochs 2.5 --pruning_frequency 50 --pruning_scope local")
    assert (found.sparsity, found.warm_up, found.cool_down, found.frequency) == (0.5, "1 epochs", "2.5 epochs", 50)
    assert masks("--pruning_frequency -1").frequency == masks("").frequency == 0.025
    assert masks("").sparsity == 0.1


def test_pattern_lock() -> None:
    assert plan(told("--do_train --apply_pruning --pruning_approach pattern_lock")).passes == (LockMasks(),)
    locked = plan(told("--do_train --apply_pruning --pruning_approach pattern_lock --pattern 4x1"))
    assert locked.passes == (LockMasks(pattern="4x1"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--apply_pruning", "--apply_pruning chooses masks while training; add --do_train"),
        ("--do_train --apply_pruning --start_step 3 --warm_epochs 1", "--start_step and --warm_epochs say the same"),
        ("--do_train --apply_pruning --target_sparsity 80", "sparsity=80"),
        ("--do_train --apply_pruning --pruning_approach snip_momentun", "did you mean"),
        ("--do_train --apply_pruning --recipe r.yaml", "--recipe and --apply_pruning are two recipes"),
        ("--do_train --recipe_args a=1", "--recipe_args sets variables of a recipe"),
    ],
)
def test_pruning_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        plan(told(text))
    assert type(caught.value).__name__ in ("RecipeError", "SparsityError")


# -- quantization -------------------------------------------------------------------------------------------------------


def steps(text: str) -> list[list[str]]:
    return [[step.name for step in stage.passes] for stage in plan(told(text)).stages]


def test_quantization_while_training_and_after_it() -> None:
    static = ["annotate-quant", "insert-observers", "calibrate", "insert-fake-quant", "freeze-quant"]
    assert steps("--do_train --apply_quantization") == [["annotate-quant", "insert-fake-quant"]]
    assert steps("--do_eval --apply_quantization") == [["dynamic-quant"]]
    assert steps("--do_eval --apply_quantization --quantization_approach static") == [static]
    both = "--do_train --apply_pruning --apply_quantization --quantization_approach"
    assert steps(f"{both} static") == [["insert-masks"], static]
    assert steps(f"{both} aware_training") == [["insert-masks", "annotate-quant", "insert-fake-quant"]]
    assert [stage.train for stage in plan(told(f"{both} dynamic")).stages] == [True, False]


def test_the_scheme_is_that_of_the_target() -> None:
    assert "preset=ipex" in str(plan(told("--do_train --apply_quantization --use_ipex")).passes[0])
    assert "preset=openvino" in str(plan(told("--do_train --apply_quantization --export_target openvino")).passes[0])
    recipe = plan(told("--do_train --export_target onnx --export_option opset=18"))
    assert recipe.target is not None
    assert vars(recipe.target)["opset"] == 18


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--do_eval --apply_quantization --quantization_approach aware_training", "aware_training needs --do_train"),
        ("--do_eval --quantization_approach static", "does nothing without --apply_quantization"),
        ("--do_eval --apply_quantization --quantization_approach statc", "did you mean 'static'"),
        ("--do_train --export_option opset=18", "give --export_target"),
        ("--do_train --use_ipex --export_target onnx", "--use_ipex exports to ipex"),
    ],
)
def test_quantization_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(told(text))


# -- distillation -------------------------------------------------------------------------------------------------------


def taught(text: str) -> DistillationSettings | None:
    return plan(told(f"--do_train {text}")).stages[0].distillation


def test_distillation_flags() -> None:
    given = "--apply_distillation --teacher_model_name_or_path t"
    assert taught(given) == DistillationSettings(teacher=("t",))
    assert taught(f"{given} u --temperature 2 --task_weight 0 --hidden_weight 1") == DistillationSettings(
        teacher=("t", "u"), temperature=2.0, task=0.0, hidden=1.0
    )
    inc = taught("--teacher_model_name_or_path t --distill_loss_weight 4.5")
    assert inc == DistillationSettings(teacher=("t",), task=0.0, logits=4.5, temperature=2.0)
    assert taught("") is None


def test_a_recipe_with_flags_over_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "variables: {s: 0.8}\npipeline: ['insert-masks{sparsity=${s}}']\ndistillation: {teacher: a, temperature: 3}\ntarget: onnx\n"
    )
    recipe = plan(told(f"--do_train --recipe {path} --recipe_args s=0.5 --teacher_model_name_or_path b"))
    assert recipe.stages[0].passes == (InsertMasks(sparsity=0.5),)
    assert recipe.stages[0].distillation == DistillationSettings(teacher=("b",), temperature=3.0)
    assert recipe.target is not None
    assert Recipe.parse(recipe.to_yaml()).stages == recipe.stages


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--do_train --apply_distillation", "distillation needs a teacher"),
        ("--do_eval --apply_distillation --teacher_model_name_or_path t", "a way of training; add --do_train"),
        ("--do_train --teacher_model_name_or_path t", "does nothing without --apply_distillation"),
    ],
)
def test_distillation_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(told(text))


def test_bfloat16_on_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers refuses it there without --use_cpu; whoever has no GPU need not say so."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    training = told("--output_dir out --bf16").training
    assert training.bf16
    assert training.device.type == "cpu"
