"""What a fine-tuning command is told: flags of the model, the data, the compression and of ``transformers.TrainingArguments``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from graphprune.errors import GraphPruneError, RecipeError, suggest
from graphprune.finetuning.older_flags import RENAMED, translate
from graphprune.tasks.data_settings import DataSettings, flag


@dataclass(frozen=True)
class ModelArguments:
    """Which model is fine-tuned."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str = field(
        metadata={"help": "A folder or hub id; its sparsity is kept by --pruning_approach pattern_lock."}
    )
    config_name: str | None = flag(None, "Config to use, where it is not the model's.")
    tokenizer_name: str | None = flag(None, "Tokenizer to use, where it is not the model's.")
    cache_dir: str | None = flag(None, "Where models of the hub are kept.")
    model_revision: str = flag("main", "Branch, tag or commit of the hub's model.")
    token: str | None = flag(None, "Token for the hub.")


@dataclass(frozen=True)
class CompressionArguments:
    """What is done to the model besides fine-tuning it."""

    _argument_group_name: ClassVar[str] = "compression"

    recipe: str | None = flag(None, "A recipe file: passes, training and distillation, in one or several stages.")
    recipe_args: list[str] | None = flag(None, "NAME=VALUE: variables of the recipe.")

    apply_pruning: bool = flag(False, "Prune while training.")
    target_sparsity: float = flag(0.1, "Fraction of zeros in the pruned weights at the end, in [0, 1).")
    pattern: str = flag("4x1", "Sparsity pattern: 4x1, 2:4, unstructured, 1xchannel, head, neuron, ...")
    pruning_approach: str = flag(
        "snip_momentum",
        "A criterion, with _progressive behind it or not, or pattern_lock, which keeps the zeros that are there.",
    )
    pruning_scope: str = flag("global", "global: layers share the budget; local: each gets the sparsity.")
    pruning_frequency: str | None = flag(None, "Optimizer steps between mask updates; default: a 40th of the window.")
    sparsity_schedule: str = flag("cubic", "How sparsity grows: cubic, linear, exponential, cosine, one-shot, ...")
    start_step: int = flag(0, "Optimizer step of the first mask update.")
    end_step: int | None = flag(
        None, "Optimizer step of the last mask update; default: the end of training, less the cool-down."
    )
    warm_epochs: float = flag(0.0, "Epochs before the first mask update.")
    cooldown_epochs: float = flag(0.0, "Epochs after the last mask update.")
    exclude: list[str] | None = flag(None, "Weights to leave dense: globs over names, such as *.pooler.*")
    pruning_config: str | None = flag(
        None,
        "A pruning configuration of Neural Compressor or SparseML, imported; --target_sparsity and others win over it.",
    )

    apply_quantization: bool = flag(False, "Quantize; while training with --do_train, after it with static or dynamic.")
    quantization_approach: str | None = flag(
        None, "dynamic, static or aware_training; default: aware_training with --do_train, else dynamic."
    )
    quantization_preset: str | None = flag(
        None, "Scheme: onnxruntime, openvino, ipex, deepsparse, tensorrt; default: by --export_target."
    )
    quantization_config: str | None = flag(None, "A quantization configuration of Neural Compressor, imported.")
    num_calibration_samples: int = flag(50, "Training examples that static quantization calibrates with.")

    apply_distillation: bool = flag(False, "Learn from a teacher.")
    teacher_model_name_or_path: list[str] | None = flag(
        None, "Folder or hub id of the teacher, or several; self = the model itself."
    )
    distillation_config: str | None = flag(None, "A distillation configuration of Neural Compressor, imported.")
    generate_teacher_logits: bool = flag(
        False, "Compute the teacher's outputs once, keep them on disk, and use them in this and later runs."
    )
    teacher_cache_dir: str | None = flag(None, "Where they are kept; default: a folder beside --output_dir.")
    temperature: float | None = flag(
        None, "Softens the logits of distillation; default 1 (2 with --distill_loss_weight)."
    )
    task_weight: float | None = flag(None, "Weight of the model's own loss; default 0.5.")
    logits_weight: float | None = flag(None, "Weight of the loss against the teacher's logits; default 0.5.")
    distill_loss_weight: float | None = flag(
        None, "As in Neural Compressor's scripts: this weight for the logits, none for the task."
    )
    hidden_weight: float | None = flag(None, "Weight of the loss against the teacher's hidden states; default 0.")
    attention_weight: float | None = flag(None, "Weight of the loss against the teacher's attention maps; default 0.")

    metric: str | None = flag(None, "Metric of --tolerance_criterion, such as eval_f1; default: the task's.")
    tolerance_criterion: float | None = flag(
        None, "Largest relative drop of the metric that quantization after training may cost; more is an error."
    )
    export_target: str | None = flag(
        None, "Lower the result to this target, into a folder of its name in --output_dir."
    )
    export_option: list[str] | None = flag(None, "NAME=VALUE: options of the target.")
    use_ipex: bool = flag(False, "Quantize by IPEX's scheme and export to the target ipex.")
    verify_loading: bool = flag(False, "Load what was written and compare its outputs; a difference fails the run.")
    keep_conf: bool = flag(False, "Write inc_config.json too.")
    overwrite_output_dir: bool = flag(
        False, "Start anew in a folder that has checkpoints, instead of going on from the last one."
    )


@dataclass(frozen=True)
class Arguments:
    """All that a command was told.

    Attributes:
        model: Of the model.
        data: Of the data.
        compression: Of the compression.
        training: Every flag of ``transformers.TrainingArguments``.
        said: Names of the flags that were written, which win over a recipe.
    """

    model: ModelArguments
    data: DataSettings
    compression: CompressionArguments
    training: Any
    said: frozenset[str]


def parse_arguments(argv: Sequence[str], prog: str) -> Arguments:
    """Read a command line, or the JSON file that is its only word.

    Args:
        argv: The words after the command.
        prog: Name of the command, for the help text.

    Raises:
        RecipeError: An unknown flag (with a close match), or a value that does not fit.
        SystemExit: ``--help`` was asked for.
    """
    parser = _parser(prog)
    if len(argv) == 1 and argv[0].endswith(".json"):
        try:
            model, data, compression, training = parser.parse_json_file(argv[0])
            return Arguments(model, data, compression, training, _said_in(Path(argv[0])))
        except (OSError, ValueError, TypeError) as error:
            raise RecipeError(f"{argv[0]}: {error}") from error
    words = translate(argv)
    if "--bf16" in words and "--use_cpu" not in words and not torch.accelerator.is_available():
        words.append("--use_cpu")  # which transformers asks for before it computes bfloat16 there
    flags = {option: action.dest for action in parser._actions for option in action.option_strings}
    known = [word.partition("=")[0] for word in words if word.startswith("--")]
    for word in known:
        if word not in flags:
            spelled = [*(option for option in flags if "-" not in option[2:]), *RENAMED]
            raise RecipeError(f"unknown flag {word}{suggest(word, spelled)}; {prog} --help lists all of them")
    try:
        model, data, compression, training = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error
    return Arguments(model, data, compression, training, frozenset(flags[word] for word in known))


def _parser(prog: str) -> Any:
    try:
        import accelerate  # noqa: F401 - TrainingArguments needs it and says so late
        from transformers import HfArgumentParser, TrainingArguments
    except ImportError as error:
        raise GraphPruneError(f'{error}; run: pip install "graphprune[train]"') from error

    class Parser(HfArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> Any:
            raise RecipeError(f"{message}; {prog} --help says what each flag takes")

    classes: Any = (ModelArguments, DataSettings, CompressionArguments, TrainingArguments)
    return Parser(
        classes, prog=prog, allow_abbrev=False, description="Flags may also come from a JSON file: its path alone."
    )


def _said_in(path: Path) -> frozenset[str]:
    return frozenset(json.loads(path.read_text(encoding="utf-8")))
