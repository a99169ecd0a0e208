"""``graphprune train``: fine-tune with compression, by the flags that the scripts of the field have."""

from __future__ import annotations

import json
import sys

import typer

from graphprune.commands.console import quiet_stdout

train = typer.Typer(
    no_args_is_help=True,
    help="Fine-tune a model while it is pruned, quantized and taught: question answering, classification, named entities.",
)
_ANY = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""The flags are those of transformers' own parser, which has a help text too."""


@train.command(context_settings=_ANY)
def qa(context: typer.Context) -> None:
    """Question answering: SQuAD 1.1 and 2.0, or your own files. ``graphprune train qa --help`` lists the flags."""
    _finetune("qa", context)


@train.command(context_settings=_ANY)
def glue(context: typer.Context) -> None:
    """Classification or regression of sentences and pairs: GLUE, or your own files."""
    _finetune("glue", context)


@train.command(context_settings=_ANY)
def ner(context: typer.Context) -> None:
    """Named entities: CoNLL columns, or your own files."""
    _finetune("ner", context)


def _finetune(name: str, context: typer.Context) -> None:
    with quiet_stdout():
        from transformers.utils import logging

        from graphprune.finetuning.run import finetune

        if not sys.stderr.isatty():
            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        metrics = finetune(name, context.args, f"graphprune train {name}")
    if metrics:  # of several processes, the first one has them
        typer.echo(json.dumps(metrics, indent=2, sort_keys=True))
