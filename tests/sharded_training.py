"""What tests/test_fsdp.py runs in several processes: each trains partitioned Programs, sharded block by block.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.sharded_training FOLDER

The first process writes the whole parameters, and every process the losses of its part of the batch and what it holds.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import graphprune as gp
from tests.models import HUGGING_FACE

STEPS = 3
CASES = {
    "bert_sequence": "partition-blocks",
    "t5": "partition-blocks{checkpoint=true}",
}
_WITHOUT_DROPOUT = {
    "bert_sequence": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
}


def build(name: str, *passes: str) -> gp.Program:
    """A Program in train mode that draws no random numbers; the same in every process."""
    import transformers

    torch.manual_seed(0)
    model, config, options = HUGGING_FACE[name]
    made = getattr(transformers, model)(getattr(transformers, config)(**options, **_WITHOUT_DROPOUT[name]))
    return gp.transform(gp.trace(made, labels=True, check=False), passes).train()


def batch(name: str, step: int) -> dict[str, Tensor]:
    """Four examples."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 99, (4, 6), generator=generator)
    if name == "bert_sequence":
        return {"input_ids": ids, "labels": torch.randint(0, 2, (4,), generator=generator)}
    return {"input_ids": ids, "labels": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})


def train(name: str, program: nn.Module, part: slice) -> list[float]:
    """Losses of a part of each batch; gradients are averaged over processes by whatever wraps the Program."""
    optimizer = torch.optim.AdamW(
        program.parameters(), lr=1e-2, eps=1e-4
    )  # gradients that are rounding noise stay noise
    losses = []
    for step in range(STEPS):
        loss = program(**{key: value[part] for key, value in batch(name, step).items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def local(value: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def held(program: nn.Module) -> int:
    """Bytes of parameters in this process."""
    return sum(local(item).nbytes for item in program.parameters())


def main(folder: Path) -> None:
    """Train every case in this process's share."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    for name, passes in CASES.items():
        program = build(name, passes)
        for block in program.blocks.values():
            fully_shard(block, mesh=mesh)
        fully_shard(program, mesh=mesh)
        share = 4 // count
        losses = train(name, program, slice(rank * share, (rank + 1) * share))
        state = program.state_dict()
        report = {
            "losses": losses,
            "held": held(program),
            "sharded": [key for key, value in state.items() if isinstance(value, DTensor)],
            "keys": list(state),
            "copied": [
                key
                for key, value in program.named_parameters()
                if local(state[key]).data_ptr() != local(value).data_ptr()
            ],
        }
        (folder / f"{name}-{rank}.json").write_text(json.dumps(report))
        whole = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}
        if rank == 0:
            whole = {key: value.detach().clone().contiguous() for key, value in whole.items()}
            safetensors.torch.save_file(whole, folder / f"{name}.safetensors")
        dist.barrier()
    gc.collect()  # what still holds the group may not outlive it
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
