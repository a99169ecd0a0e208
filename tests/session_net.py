"""A small net to train under a session, and how."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import graphprune as gp


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 16)
        self.unused = nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


PIPELINE = "insert-masks{pattern=4x1,sparsity=0.75,frequency=2,warm_up=0,cool_down=0.4}"


@functools.cache
def traced_net() -> gp.Program:
    """The net, traced once; nobody changes it."""
    torch.manual_seed(0)
    return gp.trace(Net().train(), torch.randn(4, 16))


def masked(traced: gp.Program, pipeline: str = PIPELINE) -> gp.Program:
    return gp.transform(traced, pipeline).train()


def batch(step: int) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step))


def train(program: gp.Program, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        loss = program(batch(step)).square().mean() + 0.01 * program(batch(step)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
