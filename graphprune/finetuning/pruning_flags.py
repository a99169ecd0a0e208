"""Flags of pruning, as passes."""

from __future__ import annotations

import dataclasses
from typing import Any

from graphprune.errors import RecipeError
from graphprune.finetuning.arguments import Arguments, CompressionArguments
from graphprune.finetuning.configurations import configuration
from graphprune.pipeline.base import Pass
from graphprune.pipeline.plain_yaml import read_value
from graphprune.pipeline.registry import make_pass

_LOCK = "pattern_lock"
_PROGRESSIVE = "_progressive"
_PARTS = 4
"""Parts of a progressive update, as in Neural Compressor."""
_MASKING = ("insert-masks", "lock-masks")


def pruning_passes(arguments: Arguments) -> tuple[Pass, ...]:
    """The masks, from an imported configuration or from flags; flags that were written win."""
    told = arguments.compression
    options = _masking_options(arguments)
    if told.pruning_config is not None:
        steps = tuple(
            step
            for stage in configuration(told.pruning_config).stages
            for step in stage.passes
            if step.name in _MASKING or step.name == "find-prunable"
        )
        if not any(step.name in _MASKING for step in steps):
            raise RecipeError(f"{told.pruning_config} says nothing of pruning")
        return tuple(
            dataclasses.replace(step, **_said(options, arguments)) if step.name == "insert-masks" else step
            for step in steps
        )  # type: ignore[type-var]
    if locks(told):
        pattern = told.pattern if "pattern" in arguments.said else "unstructured"
        return (make_pass("lock-masks", {"pattern": pattern, "exclude": options["exclude"]}, "--pruning_approach"),)
    return (make_pass("insert-masks", options, "--apply_pruning"),)


def locks(told: CompressionArguments) -> bool:
    """Whether the masks keep zeros that are there, and choose none."""
    if told.pruning_config is not None:
        return all(
            step.name != "insert-masks" for stage in configuration(told.pruning_config).stages for step in stage.passes
        )
    return told.pruning_approach == _LOCK


def _masking_options(arguments: Arguments) -> dict[str, Any]:
    """Options of ``insert-masks`` by the flags; times that no flag names are its own defaults."""
    told, said = arguments.compression, arguments.said
    for step, epochs in (("start_step", "warm_epochs"), ("end_step", "cooldown_epochs")):
        if step in said and epochs in said:
            raise RecipeError(f"--{step} and --{epochs} say the same in steps and in epochs; give one")
    options: dict[str, Any] = {
        "pattern": told.pattern,
        "sparsity": told.target_sparsity,
        "criterion": told.pruning_approach.removesuffix(_PROGRESSIVE),
        "schedule": told.sparsity_schedule,
        "scope": told.pruning_scope,
        "exclude": tuple(told.exclude or ()),
        "progressive": _PARTS if told.pruning_approach.endswith(_PROGRESSIVE) else 0,
    }
    if ":" in told.pattern and "target_sparsity" not in said:
        kept, group = (int(part) for part in told.pattern.split(":"))
        options["sparsity"] = 1 - kept / group
    if "start_step" in said or "warm_epochs" in said:
        options["warm_up"] = told.start_step if "start_step" in said else f"{told.warm_epochs:g} epochs"
    if told.end_step is not None:
        options["end"] = told.end_step
    if "cooldown_epochs" in said:
        options["cool_down"] = f"{told.cooldown_epochs:g} epochs"
    frequency = told.pruning_frequency
    options["frequency"] = 0.025 if frequency in (None, "-1") else read_value(str(frequency))
    return options


_FLAG_OF = {
    "pattern": "pattern", "sparsity": "target_sparsity", "criterion": "pruning_approach", "progressive": "pruning_approach",
    "schedule": "sparsity_schedule", "scope": "pruning_scope", "exclude": "exclude", "end": "end_step", "frequency": "pruning_frequency",
}  # fmt: skip


def _said(options: dict[str, Any], arguments: Arguments) -> dict[str, Any]:
    """Options whose flags were written."""
    times = {"warm_up": {"start_step", "warm_epochs"}, "cool_down": {"cooldown_epochs"}}
    return {
        name: value for name, value in options.items() if arguments.said & times.get(name, {_FLAG_OF.get(name, name)})
    }
