"""What the processes of one run owe each other: the first one writes and prints, the others wait for its files."""

from __future__ import annotations

import gc

import torch

from graphprune.errors import GraphPruneError
from graphprune.finetuning.arguments import Arguments
from graphprune.ir.sharding import first_process
from graphprune.pipeline.recipe import Recipe


def check_processes(arguments: Arguments, recipe: Recipe) -> None:
    """Refuse what does not go with the number of processes.

    Raises:
        GraphPruneError: ``--tolerance_criterion`` in several processes, or ``--fsdp`` in one, or without training.
    """
    processes = arguments.training.world_size
    if arguments.compression.tolerance_criterion is not None and processes > 1:
        raise GraphPruneError(
            f"--tolerance_criterion tries one quantization after the other in one process, and these are {processes}; train without "
            f"it, then quantize what was trained with a command of its own"
        )
    if arguments.training.fsdp and processes == 1:
        raise GraphPruneError(
            "--fsdp shards a model over several processes, and this is one; start it with torchrun or accelerate launch, as "
            "docs/scaling.md shows, or leave --fsdp out"
        )
    if arguments.training.fsdp and not (arguments.training.do_train and all(stage.train for stage in recipe.stages)):
        raise GraphPruneError(
            "--fsdp shards models that are trained, and a stage here only evaluates or quantizes; do that with a command of its own, "
            "without --fsdp"
        )


def is_distributed() -> bool:
    """Whether this process belongs to a group, as under torchrun."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def wait_for_all() -> None:
    """Go on when every process is here; at once where there is only one."""
    if is_distributed():
        torch.distributed.barrier()


def leave_group() -> bool:
    """Leave the group of processes, so that this one can end without the others.

    Returns:
        Whether it was the first.
    """
    first = first_process()
    if is_distributed():
        gc.collect()  # a wrapped model that still holds the group may not outlive it
        torch.distributed.destroy_process_group()
    return first
