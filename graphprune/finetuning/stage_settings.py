"""Settings of a stage: flags that were written, then what the recipe says, then the defaults."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from graphprune.pipeline.stages import TrainingSettings

_OF_DATA = ("max_seq_length", "doc_stride", "pad_to_max_length")


def stage_training(training: Any, settings: TrainingSettings, said: frozenset[str], folder: Path) -> Any:
    """Arguments of a stage: what was written on the command line, then what the recipe says, then the defaults.

    Args:
        training: ``transformers.TrainingArguments`` of the command line.
        settings: Of the stage.
        said: Names of the flags that were written.
        folder: Of the stage.
    """
    left = {*said, *_OF_DATA}
    values: dict[str, Any] = {name: value for name, value in settings.said().items() if name not in left}
    ratio = values.pop("warmup_ratio", None)
    if ratio is not None and "warmup_steps" not in said:
        values.setdefault("warmup_steps", ratio)
    if "num_train_epochs" in said:
        values.pop("max_steps", None)
    values |= {"output_dir": str(folder), "label_names": training.label_names, "remove_unused_columns": False}
    values["dataloader_pin_memory"] = training.dataloader_pin_memory and training.device.type == "cuda"
    if values.get("bf16") and training.device.type == "cpu":
        values["use_cpu"] = True  # which transformers asks for before it computes bfloat16 there
    return dataclasses.replace(training, **values)


def total_steps(training: Any, examples: int) -> tuple[int, int]:
    """Optimizer steps of a run and of an epoch, as the Trainer counts them: accumulation and the number of processes included."""
    batches = math.ceil(examples / max(1, training.train_batch_size * training.world_size))
    epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    steps = math.ceil(float(training.num_train_epochs) * epoch)
    return (int(training.max_steps) if training.max_steps > 0 else steps), epoch


def data_settings(data: Any, settings: TrainingSettings, said: frozenset[str]) -> Any:
    """Data settings of a stage, in the same order of precedence."""
    values = {name: value for name, value in settings.said().items() if name in _OF_DATA and name not in said}
    return dataclasses.replace(data, **values)
