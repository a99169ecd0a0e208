"""Templates for ``graphprune recipe new``: one recipe a task, with what the options ask for."""

from __future__ import annotations

from collections.abc import Mapping

from graphprune.errors import RecipeError, suggest
from graphprune.pipeline.plain_yaml import write_yaml
from graphprune.pipeline.recipe import Recipe
from graphprune.pipeline.registry import find_target

TASKS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "qa": (
        "Question answering",
        {
            "per_device_train_batch_size": 12,
            "max_seq_length": 384,
            "doc_stride": 128,
            "learning_rate": 5e-5,
            "num_train_epochs": 6,
        },
    ),
    "glue": (
        "Classification of texts or pairs of texts",
        {"per_device_train_batch_size": 32, "max_seq_length": 128, "learning_rate": 5e-5, "num_train_epochs": 8},
    ),
    "ner": (
        "Named entities",
        {"per_device_train_batch_size": 16, "max_seq_length": 128, "learning_rate": 5e-5, "num_train_epochs": 8},
    ),
}
"""What each task is called, and how it trains."""
_PLANS: Mapping[str, tuple[str, ...]] = {
    "deepsparse": ("expand-attention", "annotate-quant: {preset: deepsparse}"),
    "openvino": ("expand-attention", "annotate-quant: {preset: openvino}"),
    "ipex": ("annotate-quant: {preset: ipex, observer: moving-average-min-max}",),
}
"""Passes before insert-fake-quant, by target; the others take its default plan."""


def new_recipe(
    task: str,
    pattern: str,
    target: str,
    *,
    sparsity: float | None = None,
    quantize: bool = False,
    distill: bool = False,
) -> str:
    """The text of a recipe, comments and all.

    Raises:
        RecipeError: An unknown task, pattern or target, or a sparsity that the pattern cannot have.
    """
    if task not in TASKS:
        raise RecipeError(f"--task {task} is unknown{suggest(task, TASKS)}")
    find_target(target, "--target")
    title, training = TASKS[task]
    amount = _default(pattern) if sparsity is None else sparsity
    prune = _prune(training)
    parts = [
        f"# {title}: prune to {amount:g} in pattern {pattern}"
        f"{', then learn to compute in int8' if quantize else ''}{', from a dense teacher' if distill else ''}, for {target}.",
        f"# Train it with: graphprune train {task} --recipe THIS_FILE --model_name_or_path MODEL ...",
        "# Change a variable without editing it: --recipe_args sparsity=0.7",
        "version: 1",
        f"variables:\n  sparsity: {amount!r}  # fraction of zeros of the pruned layers",
        *(["  epochs: 2  # of the stage quantize, which comes after pruning"] if quantize else []),
        *_distillation(distill),
        *(_staged(task, pattern, target, prune) if quantize else _single(pattern, prune)),
        f"target: {target}",
    ]
    text = "\n".join(parts) + "\n"
    try:
        Recipe.parse(text)
    except RecipeError as error:
        raise RecipeError(f"--pattern {pattern}, --sparsity {amount}: {error}") from None
    return text


def _default(pattern: str) -> float:
    kept, colon, group = pattern.partition(":")
    if colon and kept.isdecimal() and group.isdecimal() and int(group):
        return 1 - int(kept) / int(group)
    return 0.5 if pattern in ("head", "neuron") or "channel" in pattern else 0.8


def _prune(training: Mapping[str, object]) -> list[str]:
    text = write_yaml(dict(training)).rstrip().splitlines()
    return [*text, "lr_scheduler_type: linear", "warmup_ratio: 0.05", "weight_decay: 0.01"]


def _distillation(wanted: bool) -> list[str]:
    if not wanted:
        return []
    return [
        "distillation:  # the teacher is --teacher_model_name_or_path: the same model, fine-tuned and dense",
        "  temperature: 2.0",
        "  logits: 0.9  # weight of the loss against the teacher",
        "  task: 0.1  # weight of the loss against the labels",
    ]


def _masks(pattern: str, indent: str) -> list[str]:
    return [
        f"{indent}- insert-masks:",
        f"{indent}    pattern: {pattern!r}" if ":" in pattern else f"{indent}    pattern: {pattern}",
        f"{indent}    sparsity: ${{sparsity}}",
        f"{indent}    criterion: snip_momentum",
        f"{indent}    schedule: cubic",
        f"{indent}    warm_up: 0.1  # of this stage; the model settles first",
        f"{indent}    cool_down: 0.4  # and recovers with its final masks",
    ]


def _lock(pattern: str) -> str:
    """The pass that keeps the masks; heads and neurons span layers, so their zeros are kept one by one."""
    return "lock-masks" if pattern in ("head", "neuron", "unstructured") else f"lock-masks: {{pattern: {pattern!r}}}"


def _single(pattern: str, training: list[str]) -> list[str]:
    return ["training:", *(f"  {line}" for line in training), "pipeline:", *_masks(pattern, "  ")]


def _staged(task: str, pattern: str, target: str, training: list[str]) -> list[str]:
    own = ("learning_rate", "num_train_epochs", "lr_scheduler", "warmup", "weight_decay")
    shared = [line for line in training if not line.startswith(own)]
    steps = [*_PLANS.get(target, ()), 'insert-fake-quant: {freeze_observers: "1 epoch"}']
    return [
        "training:",
        *(f"  {line}" for line in shared),
        "stages:",
        "  - name: prune",
        "    pipeline:",
        *_masks(pattern, "      "),
        "    training:",
        *(f"      {line}" for line in training if line not in shared),
        "  - name: quantize",
        "    pipeline:",
        f"      - {_lock(pattern)}  # every pruned unit stays",
        *(f"      - {step}" for step in steps),
        "    training: {num_train_epochs: '${epochs}', learning_rate: 1.0e-5, lr_scheduler_type: linear, warmup_ratio: 0.1}",
    ]
