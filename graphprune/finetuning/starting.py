"""What a stage starts from: a model with its config and tokenizer, and the task that fits them."""

from __future__ import annotations

from torch import nn

from graphprune.finetuning.arguments import ModelArguments
from graphprune.finetuning.explaining import explained
from graphprune.tasks.data_settings import DataSettings
from graphprune.tasks.ner import NerTask, tokenizer_arguments
from graphprune.tasks.task import Task, make_task


def load_start(
    name: str, told: ModelArguments, start: str, settings: DataSettings, attention: str | None
) -> tuple[Task, nn.Module]:
    """Load a model and make its task.

    Args:
        name: Of the task.
        told: Flags of the model; ``config_name``, ``tokenizer_name`` and ``model_revision`` are those of the first stage.
        start: Folder or hub id.
        settings: Of the data.
        attention: Implementation of attention; None takes the model's own.

    Raises:
        GraphPruneError: It cannot be loaded, or does not fit the data.
    """
    import transformers

    first = start == told.model_name_or_path
    options = {"cache_dir": told.cache_dir, "revision": told.model_revision if first else "main", "token": told.token}
    with explained(start):
        config = transformers.AutoConfig.from_pretrained((told.config_name if first else None) or start, **options)
        extra = tokenizer_arguments(config.model_type) if name == NerTask.name else {}
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            (told.tokenizer_name if first else None) or start, **options, **extra
        )
        task = make_task(name, settings, tokenizer, config)
        for key, value in task.config_changes().items():
            setattr(config, key, value)
        model = getattr(transformers, task.auto_class).from_pretrained(
            start,
            config=config,
            dtype="float32",
            ignore_mismatched_sizes=first,
            attn_implementation=attention,
            **options,
        )
    return task, model
