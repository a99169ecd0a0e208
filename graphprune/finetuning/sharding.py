"""Training with ``--fsdp``: FSDP2 or an error, a shard for each block, and a whole Program at the end."""

from __future__ import annotations

import copy
from typing import Any

from graphprune.errors import GraphPruneError
from graphprune.ir.blocks import Block
from graphprune.ir.program import Program
from graphprune.ir.sharding import gather_into


def prepare_sharding(trainer: Any, program: Program) -> Program:
    """Make sure that a Trainer will shard a Program with FSDP2, each block of ``partition-blocks`` by itself.

    Args:
        trainer: Whose arguments ask for FSDP; it has not trained yet.
        program: What it will train.

    Returns:
        A whole copy on the CPU, for ``gathered``.

    Raises:
        GraphPruneError: It would not shard, or with FSDP1, whose flat parameters are nothing that masks could follow.
    """
    accelerator = trainer.accelerator
    if not accelerator.is_fsdp2:
        raise GraphPruneError(
            "--fsdp would not shard here: accelerate shards on GPUs and the like, in processes that torchrun or accelerate launch has "
            "started, and a Program needs version 2 (no version: 1 in --fsdp_config); leave --fsdp out, and several processes train "
            "with DistributedDataParallel; docs/scaling.md shows fully_shard on CPUs"
        )
    plugin = accelerator.state.fsdp_plugin
    if program.blocks and plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = [Block.__name__]
    return copy.deepcopy(program).to("cpu")


def gathered(program: Program, plain: Program) -> Program:
    """Write what a sharded Program has learned into its whole copy; every process must call it.

    Args:
        program: Trained.
        plain: What ``prepare_sharding`` returned; mutated.

    Returns:
        The copy.
    """
    gather_into(program, plain)
    plain.frozen = program.frozen
    plain.training_log.replace(program.training_log.points)
    return plain.train(program.training)
