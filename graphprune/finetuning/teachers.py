"""Teachers of a stage: loaded, compared with the student, and computed ahead where that is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from graphprune.artifact.checkpoint import load_program
from graphprune.artifact.files import PROGRAM
from graphprune.errors import GraphPruneError
from graphprune.finetuning.explaining import explained
from graphprune.pipeline.stages import DistillationSettings
from graphprune.tasks.task import Task
from graphprune.training.distillation import Distillation
from graphprune.training.teacher_cache import TeacherCache
from graphprune.training.teacher_checks import check_teacher
from graphprune.training.teaching import frozen_copy

SELF = "self"


def make_distillation(
    settings: DistillationSettings,
    model: nn.Module,
    task: Task,
    training: Any,
    cache: Path | None,
    note: Callable[[str], None],
) -> Distillation:
    """Load the teachers of a stage.

    Args:
        settings: Of the stage; names at least one teacher.
        model: The student before its pipeline ran; ``self`` copies it.
        task: Its data.
        training: ``transformers.TrainingArguments``.
        cache: Folder in which the outputs of teachers are kept, computed where they are missing; None computes them in every step.
        note: Told where a cache is and how much of it was computed.

    Raises:
        GraphPruneError: A teacher cannot be loaded, has another tokenizer or other labels, or the cache cannot serve the losses.
    """
    if cache is not None and (settings.hidden or settings.attentions):
        raise GraphPruneError(
            "--generate_teacher_logits keeps logits only; hidden states and attention maps are learned from a teacher that runs "
            "while training, so leave the flag out, or set hidden and attentions to 0"
        )
    names = (settings.teacher,) if isinstance(settings.teacher, str) else settings.teacher or ()
    attention = "eager" if settings.attentions else None  # other implementations return no attention maps
    found: list[nn.Module | TeacherCache] = []
    for name in names:
        compare = {
            "tokenizer": task.tokenizer,
            "teacher_tokenizer": _tokenizer(name, task),
            "max_length": task.max_length,
        }
        if cache is None:
            teacher = frozen_copy(model) if name == SELF else load_teacher(name, task, attention)
            check_teacher(model, teacher, **compare)
            found.append(teacher.to(training.device))
            continue
        check_teacher(model, model if name == SELF else _config(name), **compare)
        kept = TeacherCache.of(
            cache,
            frozen_copy(model) if name == SELF else name,
            task.features("train"),
            tokenizer=task.tokenizer,
            max_length=task.max_length,
            load=functools.partial(load_teacher, task=task),
            collate=task.collator(),
            batch_size=training.per_device_train_batch_size,
            device=training.device,
            show=not training.disable_tqdm,
        )
        note(
            f"outputs of teacher {name}: {kept.computed} of {kept.rows} rows computed, the others read from {kept.folder}"
        )
        found.append(kept)
    return Distillation.from_settings(settings, found)


def load_teacher(name: str, task: Task, attention: str | None = None) -> nn.Module:
    """Load a teacher: a checkpoint's folder, a saved Program, or a hub id.

    Args:
        name: Which.
        task: What for.
        attention: Implementation of attention; None takes the model's own.

    Raises:
        GraphPruneError: It cannot be loaded.
    """
    import transformers

    if (Path(name) / PROGRAM).is_file():
        return load_program(name).eval().requires_grad_(False)
    with explained(f"teacher {name}"):
        loader = getattr(transformers, task.auto_class)
        model: nn.Module = loader.from_pretrained(name, dtype="float32", attn_implementation=attention)
    return model.eval().requires_grad_(False)


def _config(name: str) -> Any:
    """The config of a teacher, without its weights."""
    from transformers import AutoConfig

    with explained(f"teacher {name}"):
        return AutoConfig.from_pretrained(name)


def _tokenizer(name: str, task: Task) -> Any:
    from transformers import AutoTokenizer

    if name == SELF:
        return task.tokenizer
    with explained(f"the tokenizer of teacher {name}, which is compared with the student's,"):
        return AutoTokenizer.from_pretrained(name)
