"""Train families of criteria on two processes; each sees half of every batch.

``torchrun --nproc-per-node 2 -m tests.distributed_run FOLDER ddp`` (or ``fsdp``) writes ``<family>-<mode>-<rank>.pt`` with
masks and whole weights; ``python -m tests.distributed_run FOLDER single`` trains one process on the whole batches.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import graphprune as gp
from graphprune.ir.masking import masked_sites
from graphprune.ir.sharding import whole
from graphprune.training.sampler import GradientSampler
from tests.blocked import Stack
from tests.families import FAMILIES, STEPS, base, batch

BLOCKS = "blocks"
CHOSEN = (
    BLOCKS,
    "snip_momentum",
    "magnitude",
    "movement",
    "retrain_free",
    "rigl",
    "top_kast",
    "progressive",
    "mixed",
    "obs",
    "l0",
    "lock",
)


def objective(output: Tensor, data: object = None) -> Tensor:
    """A mean over the batch, so that the mean of two halves is that of the whole."""
    return output.square().mean() + output.sin().mean()


def _wrapped(program: gp.Program, mode: str) -> nn.Module:
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(program)
    if mode == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in program.blocks.values():
            fully_shard(block)
        fully_shard(program)
    return program


def _masked(family: str) -> gp.Program:
    if family != BLOCKS:
        return gp.transform(base(), FAMILIES[family])
    torch.manual_seed(0)
    pipeline = "insert-masks{sparsity=0.5,warm_up=2,cool_down=2,frequency=3},partition-blocks{checkpoint=true}"
    return gp.transform(gp.trace(Stack().train(), torch.randn(4, 8)), pipeline)


def _train(family: str, mode: str, rank: int, world: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    program = _masked(family).double().eval()  # no dropout: processes draw other numbers than one
    wrapped = _wrapped(program, mode)
    optimizer = torch.optim.AdamW(program.parameters(), lr=0.02)
    samples = [batch(100 + index).double() for index in range(4)]
    sampler = GradientSampler(samples, objective) if family == "obs" else None
    session = gp.training.Session(wrapped, optimizer, total_steps=STEPS, sampler=sampler)
    for step in range(STEPS):
        data = batch(step).double()[:, : 8 if family == BLOCKS else 16]
        share = len(data) // world
        objective(wrapped(data[rank * share : (rank + 1) * share])).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert session.done
    result = {f"{site.name}_mask": site.mask for site in masked_sites(program)}
    result |= {name: whole(value.detach()) for name, value in program.named_parameters()}
    return result


def main(folder: Path, mode: str) -> None:
    """Train every chosen family and write the results."""
    torch.set_num_threads(1)
    rank, world = 0, 1
    if mode != "single":
        dist.init_process_group("gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    for family in CHOSEN:
        torch.save(_train(family, mode, rank, world), folder / f"{family}-{mode}-{rank}.pt")
    if mode != "single":
        gc.collect()  # what still holds the group may not outlive it
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]), sys.argv[2])
