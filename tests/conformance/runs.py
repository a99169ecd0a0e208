"""Twenty recorded optimizer steps of a small network whose masks a session drives."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.ir.masking import masked_sites
from tests.conformance.reference import Moment, Rule
from tests.conformance.reference_units import Flags, Geometry, dropped_in_groups, unit_numbers
from tests.traced import run_passes

STEPS = 20
BATCH = 4


class Net(nn.Module):
    """A convolution, a grouped one and a linear layer before the head: [b, 8, 4, 4] to [b, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 16, 3, groups=2)
        self.fc = nn.Linear(16, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = F.relu(self.grouped(x))
        return self.head(F.relu(self.fc(x.mean((2, 3)))))


GEOMETRIES = {
    "conv.weight": Geometry("conv", (8, 8, 3, 3)),
    "grouped.weight": Geometry("conv", (16, 4, 3, 3), groups=2),
    "fc.weight": Geometry("linear", (24, 16)),
}
"""The weights that are pruned, in the order in which the network uses them."""


@dataclass
class Run:
    """What one run left behind.

    Attributes:
        moments: For each step what the reference is given.
        masks: For each step the masks after it, as stored, True = kept.
        weights: For each step the weights after it, with the session's work done.
        optimizer: The optimizer, for its moments.
        program: The Program.
        session: The session.
        initial: The weights before masks were inserted.
    """

    moments: list[dict[str, Moment]]
    masks: list[dict[str, Flags]]
    weights: list[dict[str, NDArray[np.float32]]]
    optimizer: torch.optim.Optimizer
    program: gp.Program
    session: gp.training.Session
    initial: dict[str, NDArray[np.float32]]


@functools.cache
def _source() -> gp.Program:
    torch.manual_seed(0)
    return gp.trace(Net().train(), torch.randn(BATCH, 8, 4, 4))


@functools.cache
def _batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 8, 4, 4, generator=generator), torch.randint(0, 3, (BATCH,), generator=generator)


def options(rule: Rule) -> str:
    """The pass that asks for a rule, as text."""
    if rule.criterion == "lock":
        return f"lock-masks{{pattern={rule.pattern}}}"
    text = (
        f'pattern={rule.pattern},criterion="{rule.criterion}",schedule="{rule.schedule}",scope={rule.scope},'
        f"sparsity={rule.sparsity},warm_up={rule.start},cool_down={STEPS - 1 - rule.end},frequency={rule.frequency},"
        f"min_sparsity={rule.least},max_sparsity={rule.most},progressive={rule.substeps}"
    )
    targets = ",".join(f'"{name}={share}"' for name, share in rule.targets)
    return f"insert-masks{{{text},targets=[{targets}]}}"


def source() -> gp.Program:
    """A Program of the network without masks, with parameters of its own."""
    return copy.deepcopy(_source())


def sparse_source(pattern: str, share: float) -> gp.Program:
    """The same with zeros already: whole units of a pattern, in place of N:M N in every other group, and single weights."""
    program = source()
    random = np.random.default_rng(0)
    for name, geometry in GEOMETRIES.items():
        units = unit_numbers(pattern, geometry)
        gone = random.random(units.max() + 1)[units] < share / 2
        if ":" in pattern:
            gone &= dropped_in_groups(random.random(units.shape).astype(np.float32), pattern)
        gone |= random.random(units.shape) < share / 2
        with torch.no_grad():
            program.get_parameter(name).mul_(torch.from_numpy(np.ascontiguousarray(geometry.stored(~gone))))
    return program


def train(program: gp.Program, optimizer: torch.optim.Optimizer, steps: range = range(STEPS)) -> None:
    """Take optimizer steps on batches that depend on the step only."""
    for step in steps:
        inputs, labels = _batch(step)
        F.cross_entropy(program(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def record(rule: Rule, program: gp.Program | None = None, *, make: type = torch.optim.SGD, **settings: float) -> Run:
    """Train a network for 20 steps and write down everything that the reference needs.

    The two recording hooks are on the optimizer before the session's own, so they see weights and gradients as the backward
    pass left them, and the optimizer's update before anything is set to zero.
    """
    program = program or source()
    parameters = {name: item for name, item in program.named_parameters() if name in GEOMETRIES}
    initial = {name: item.detach().numpy().copy() for name, item in parameters.items()}
    program = run_passes(program, options(rule)).train()
    optimizer = make(program.parameters(), **(settings or {"lr": 0.3}))
    before: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    moments: list[dict[str, Moment]] = []

    def copied(tensor: Tensor) -> NDArray[np.float32]:
        return tensor.detach().numpy().copy()

    def note_before(*_: object) -> None:
        for name, item in parameters.items():
            before[name] = (copied(item), np.zeros(0) if item.grad is None else copied(item.grad))

    def note_after(*_: object) -> None:
        moments.append({name: Moment(*before[name], copied(item)) for name, item in parameters.items()})

    optimizer.register_step_pre_hook(note_before)
    optimizer.register_step_post_hook(note_after)
    session = gp.training.Session(program, optimizer, total_steps=STEPS)
    sites = masked_sites(program)
    masks, weights = [], []
    for step in range(STEPS):
        train(program, optimizer, range(step, step + 1))
        masks.append({site.name: site.mask.numpy().copy() for site in sites})
        weights.append({site.name: copied(site.weight) for site in sites})
    return Run(moments, masks, weights, optimizer, program, session, initial)
