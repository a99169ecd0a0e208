"""From flags to a recipe: what is pruned, quantized and distilled, in which stages, and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from graphprune.errors import RecipeError, suggest
from graphprune.finetuning.arguments import Arguments, CompressionArguments
from graphprune.finetuning.configurations import configuration
from graphprune.finetuning.pruning_flags import locks, pruning_passes
from graphprune.pipeline.assignments import assignments
from graphprune.pipeline.base import DataPass, Pass
from graphprune.pipeline.recipe import ONLY, Recipe
from graphprune.pipeline.registry import make_pass, make_target
from graphprune.pipeline.stages import DistillationSettings, Stage
from graphprune.pipeline.target import Target

_APPROACHES = ("dynamic", "static", "aware_training")
_PRESETS = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "ipex": "ipex",
    "deepsparse": "deepsparse",
    "inductor": "onnxruntime",
}
_TRAINED = "moving-average-min-max"
"""The observer that follows a model while it is trained; some presets have one that is read once."""
_BY_FLAGS = (
    "apply_pruning",
    "pruning_config",
    "apply_quantization",
    "quantization_config",
    "apply_distillation",
    "distillation_config",
)
"""Flags that make a recipe; beside --recipe they would be a second one."""


def plan(arguments: Arguments) -> Recipe:
    """The recipe that a command asks for: the one it names, or one made of its flags.

    Flags of distillation that were written win over the recipe's own.

    Raises:
        RecipeError: Flags that contradict each other, that need ``--do_train``, or a configuration that does not read.
    """
    told = arguments.compression
    if told.recipe is not None:
        both = [f"--{name}" for name in _BY_FLAGS if name in arguments.said and name != "apply_distillation"]
        if both:
            raise RecipeError(f"--recipe and {both[0]} are two recipes; write into the recipe what {both[0]} should do")
        recipe = Recipe.load(told.recipe, **assignments(told.recipe_args, "--recipe_args"))
    elif told.recipe_args:
        raise RecipeError("--recipe_args sets variables of a recipe; give --recipe FILE")
    else:
        recipe = Recipe(_stages(arguments))
    stages = tuple(dataclasses.replace(stage, distillation=_distillation(stage, arguments)) for stage in recipe.stages)
    return dataclasses.replace(recipe, stages=stages, target=_target(told) or recipe.target)


def needs_data(passes: Sequence[Pass]) -> bool:
    """Whether a pipeline looks at calibration data."""
    return any(isinstance(step, DataPass) for step in passes)


def _stages(arguments: Arguments) -> tuple[Stage, ...]:
    told, training = arguments.compression, arguments.training.do_train
    approach = _approach(told, training)
    steps: list[Pass] = []
    if told.apply_pruning or told.pruning_config:
        if not training and not locks(told):
            raise RecipeError("--apply_pruning chooses masks while training; add --do_train, or use graphprune prune")
        steps += pruning_passes(arguments)
    if approach == "aware_training":
        if not training:
            raise RecipeError(
                "--quantization_approach aware_training needs --do_train; without it use dynamic or static"
            )
        plan = {"preset": _preset(told), "observer": _TRAINED}
        steps += [
            make_pass("annotate-quant", plan, "--apply_quantization"),
            make_pass("insert-fake-quant", {}, "--apply_quantization"),
        ]
    stages = [Stage(ONLY, tuple(steps), train=training)]
    if approach in ("dynamic", "static"):
        after = _after_training(approach, told)
        stages = (
            [*stages, Stage("quantize", after, train=False)]
            if training
            else [Stage(ONLY, (*steps, *after), train=False)]
        )
    return tuple(stages)


def _approach(told: CompressionArguments, training: bool) -> str | None:
    """How it is quantized; None where it is not."""
    wanted = told.quantization_approach
    if wanted is not None and wanted not in _APPROACHES:
        raise RecipeError(
            f"--quantization_approach {wanted} is unknown{suggest(wanted, _APPROACHES)}; take {', '.join(_APPROACHES)}"
        )
    if not (told.apply_quantization or told.quantization_config or told.use_ipex):
        if wanted is not None:
            raise RecipeError(f"--quantization_approach {wanted} does nothing without --apply_quantization")
        return None
    if told.quantization_config is not None:
        names = {step.name for stage in configuration(told.quantization_config).stages for step in stage.passes}
        found = "dynamic" if "dynamic-quant" in names else "static" if "calibrate" in names else "aware_training"
        if wanted is not None and wanted != found:
            raise RecipeError(f"--quantization_approach {wanted}, but {told.quantization_config} says {found}")
        return found
    return wanted or ("aware_training" if training else "dynamic")


def _after_training(approach: str, told: CompressionArguments) -> tuple[Pass, ...]:
    if told.quantization_config is not None:
        return tuple(step for stage in configuration(told.quantization_config).stages for step in stage.passes)
    preset = _preset(told)
    if approach == "dynamic":
        return (make_pass("dynamic-quant", {}, "--apply_quantization"),)
    return Recipe.of(
        f"annotate-quant{{preset={preset}}},insert-observers,calibrate,insert-fake-quant,freeze-quant"
    ).passes


def _distillation(stage: Stage, arguments: Arguments) -> DistillationSettings | None:
    """What a stage says, what an imported configuration says, and over both the flags that were written."""
    told = arguments.compression
    base = stage.distillation
    wanted = told.apply_distillation or told.distillation_config is not None or told.distill_loss_weight is not None
    if wanted and not arguments.training.do_train:
        raise RecipeError("--apply_distillation is a way of training; add --do_train")
    if base is None and (not wanted or not stage.train):
        if told.teacher_model_name_or_path and not wanted and told.recipe is None:
            raise RecipeError("--teacher_model_name_or_path does nothing without --apply_distillation")
        return None
    if base is None and told.distillation_config is not None:
        base = next(
            (item.distillation for item in configuration(told.distillation_config).stages if item.distillation), None
        )
        if base is None:
            raise RecipeError(f"{told.distillation_config} says nothing of distillation")
    values = base.model_dump(exclude_unset=True) if base is not None else {}
    if told.distill_loss_weight is not None:
        values |= {"task": 0.0, "logits": told.distill_loss_weight, "temperature": 2.0}
    flags = {
        "task": told.task_weight, "logits": told.logits_weight, "hidden": told.hidden_weight, "attentions": told.attention_weight,
        "temperature": told.temperature,
    }  # fmt: skip
    values |= {name: value for name, value in flags.items() if value is not None}
    if told.teacher_model_name_or_path:
        values["teacher"] = tuple(told.teacher_model_name_or_path)
    if values.get("teacher") is None:
        raise RecipeError(
            "distillation needs a teacher: --teacher_model_name_or_path FOLDER (or self, for the model as it is now)"
        )
    return DistillationSettings.model_validate(values)


def _target(told: CompressionArguments) -> Target | None:
    if told.export_target is None and not told.use_ipex:
        if told.export_option:
            raise RecipeError("--export_option sets options of a target; give --export_target")
        return None
    name = told.export_target or "ipex"
    if told.use_ipex and name != "ipex":
        raise RecipeError(f"--use_ipex exports to ipex, --export_target says {name}; give one")
    return make_target(name, assignments(told.export_option, "--export_option"), "--export_target")


def _preset(told: CompressionArguments) -> str:
    return told.quantization_preset or _PRESETS.get(
        "ipex" if told.use_ipex else told.export_target or "onnx", "onnxruntime"
    )
