"""One recipe for every family of criteria, on a tiny net: for tests that train all of them.

``python -m tests.families FOLDER break`` trains each family, writes a checkpoint after step 7, trains on, and is then killed by
SIGKILL; ``... FOLDER resume`` goes on from the checkpoints; ``... FOLDER whole`` trains without a break. The last two write
``<family>-<mode>.pt`` with all weights and masks.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.training.sampler import GradientSampler

STEPS, BREAK = 14, 7
_GROWING = "warm_up=2,cool_down=2,frequency=3"

FAMILIES = {
    "magnitude": f"insert-masks{{criterion=magnitude,pattern=2:4,sparsity=0.5,{_GROWING}}}",
    "gradient": f"insert-masks{{criterion=gradient,scope=local,sparsity=0.75,schedule=exponential,{_GROWING}}}",
    "snip": f"insert-masks{{criterion=snip,pattern=unstructured,sparsity=0.8,schedule=cube,{_GROWING}}}",
    "snip_momentum": f"insert-masks{{sparsity=0.75,{_GROWING}}}",
    "taylor": f"insert-masks{{criterion=taylor,pattern=1x4,sparsity=0.75,schedule=cosine,{_GROWING}}}",
    "random": f"insert-masks{{criterion=random,sparsity=0.75,scope=erdos-renyi,{_GROWING}}}",
    "movement": f"insert-masks{{criterion=movement,sparsity=0.75,{_GROWING}}}",
    "soft_movement": f'insert-masks{{criterion="soft_movement(penalty=0.01)",pattern=2x2,sparsity=0.75,{_GROWING}}}',
    "block_mask": f"insert-masks{{criterion=block_mask,sparsity=0.75,{_GROWING}}}",
    "retrain_free": f"insert-masks{{criterion=retrain_free,pattern=channelx1,sparsity=0.5,{_GROWING}}}",
    "obs": f'insert-masks{{criterion="obs(samples=6,damping=0.001,block=16,recomputations=2)",sparsity=0.75,{_GROWING}}}',
    "l0": f'insert-masks{{criterion="l0(strength=0.01)",sparsity=0.75,{_GROWING}}}',
    "rigl": "insert-masks{criterion=rigl,pattern=unstructured,sparsity=0.75,schedule=constant,scope=erdos-renyi-kernel,"
    "warm_up=0,cool_down=2,frequency=3}",
    "top_kast": "insert-masks{criterion=top_kast,pattern=unstructured,sparsity=0.75,schedule=constant,warm_up=0,"
    "cool_down=2,frequency=2}",
    "acdc": 'insert-masks{criterion=magnitude,sparsity=0.75,schedule="acdc(cycles=2)",warm_up=1,cool_down=2,frequency=1}',
    "progressive": "insert-masks{criterion=snip_momentum,sparsity=0.75,progressive=4,warm_up=1,cool_down=2,frequency=5}",
    "group_lasso": f'insert-masks{{criterion=magnitude,regularizer="group_lasso(strength=0.01)",sparsity=0.75,{_GROWING}}}',
    "neuron": f"insert-masks{{pattern=neuron,sparsity=0.5,select=[first,second],{_GROWING}}}",
    "mixed": f"insert-masks{{criterion=movement,sparsity=0.75,select=[first],{_GROWING}}},"
    f"insert-masks{{criterion=magnitude,pattern=2:4,sparsity=0.5,select=[second],{_GROWING}}}",
    "lock": "lock-masks",
    "quantized": f"insert-masks{{criterion=magnitude,pattern=2:4,sparsity=0.5,{_GROWING}}},"
    "insert-fake-quant{momentum=0.1,freeze_observers=9}",
}


class Net(nn.Module):
    """Three linear layers with dropout: [b, 16] to [b, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 16)
        self.dropout = nn.Dropout(0.1)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(torch.relu(self.second(torch.relu(self.first(x))))))


def base() -> gp.Program:
    """The net, traced; a tenth of its weights is zero, for lock-masks."""
    torch.manual_seed(0)
    net = Net().train()
    with torch.no_grad():
        for layer in (net.first, net.second):
            layer.weight[torch.rand_like(layer.weight) < 0.1] = 0.0
    return gp.trace(net, torch.randn(4, 16))


def objective(output: Tensor, batch: object = None) -> Tensor:
    """A loss that needs no labels."""
    return output.square().mean() + 0.1 * output.sin().sum()


def batch(step: int) -> Tensor:
    """Data of a step."""
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step))


def start(
    program: gp.Program, family: str, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
) -> tuple[gp.Program, torch.optim.Optimizer, gp.training.Session]:
    """A masked copy of the net with an optimizer and a session."""
    masked = gp.transform(program, FAMILIES[family]).train()
    steps = optimizer(masked.parameters(), lr=0.02)
    sampler = GradientSampler([batch(100 + index) for index in range(4)], objective) if family == "obs" else None
    return masked, steps, gp.training.Session(masked, steps, total_steps=STEPS, sampler=sampler)


def train(program: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Train on the data of some steps."""
    for step in steps:
        objective(program(batch(step))).backward()
        optimizer.step()
        optimizer.zero_grad()


def _run(folder: Path, mode: str) -> None:
    program = base()
    for family in FAMILIES:
        torch.manual_seed(1)
        masked, optimizer, session = start(program, family)
        place = folder / f"{family}-checkpoint.pt"
        first = 0
        if mode == "resume":
            state = torch.load(place, weights_only=True)
            masked.load_state_dict(state["program"])
            optimizer.load_state_dict(state["optimizer"])
            session.load_state_dict(state["session"])
            first = BREAK
        train(masked, optimizer, range(first, BREAK))
        if mode == "break":
            parts = {"program": masked, "optimizer": optimizer, "session": session}
            torch.save({name: part.state_dict() for name, part in parts.items()}, place)
            train(masked, optimizer, range(BREAK, BREAK + 3))
            continue
        train(masked, optimizer, range(BREAK, STEPS))
        torch.save(masked.state_dict(), folder / f"{family}-{mode}.pt")
    if mode == "break":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _run(Path(sys.argv[1]), sys.argv[2])
