"""Attention heads and feed-forward neurons against a reference: what several weights lose together, after each of 20 steps."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.ir.masking import masked_sites
from tests.conformance.reference import Rule
from tests.conformance.reference_choice import Candidates, choose
from tests.conformance.runs import STEPS
from tests.traced import run_passes

HEADS, WIDTH, NEURONS = 4, 4, 24
FEATURES = HEADS * WIDTH


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(FEATURES, FEATURES) for _ in range(4))
        self.up, self.down = nn.Linear(FEATURES, NEURONS), nn.Linear(NEURONS, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(x)))


class Encoder(nn.Module):
    """Two layers of attention and feed-forward and a head: [b, s, 16] to [b, s, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(FEATURES, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@dataclass
class Block:
    """Weights that lose their units together.

    Attributes:
        rows: Weights of which a unit is rows.
        columns: Weights of which a unit is columns.
        count: Units.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    count: int

    def units(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """[units, weights of the unit]."""
        return (values if name in self.rows else values.T).reshape(self.count, -1)

    @property
    def names(self) -> tuple[str, ...]:
        return self.rows + self.columns


def _blocks(pattern: str) -> list[Block]:
    if pattern == "head":
        names = ("query", "key", "value")
        return [
            Block(tuple(f"layers.{i}.{name}.weight" for name in names), (f"layers.{i}.out.weight",), HEADS)
            for i in range(2)
        ]
    return [Block((f"layers.{i}.up.weight",), (f"layers.{i}.down.weight",), NEURONS) for i in range(2)]


@functools.cache
def _source() -> gp.Program:
    torch.manual_seed(0)
    return gp.trace(Encoder().train(), torch.randn(4, 5, FEATURES))


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("criterion", ["magnitude", "snip", "snip_momentum"])
@pytest.mark.parametrize("pattern", ["head", "neuron"])
def test_blocks(pattern: str, criterion: str, scope: str) -> None:
    rule = Rule(criterion, pattern, scope, "linear", 0.5)
    text = (
        f"insert-masks{{pattern={pattern},criterion={criterion},scope={scope},schedule=linear,sparsity=0.5,"
        f"warm_up={rule.start},end={rule.end},frequency={rule.frequency},max_sparsity=1}}"
    )
    program = run_passes(copy.deepcopy(_source()), text).train()
    optimizer = torch.optim.SGD(program.parameters(), lr=0.05)
    blocks = _blocks(pattern)
    scores = {name: np.zeros(block.count, dtype=np.float32) for block in blocks for name in block.names}
    parameters = {name: program.get_parameter(name) for name in scores}
    wanted = {name: np.ones(parameter.shape, dtype=bool) for name, parameter in parameters.items()}

    def accumulate(*_: object) -> None:
        for block in blocks:
            for name in block.names:
                product = np.abs(parameters[name].detach().numpy() * parameters[name].grad.numpy())  # type: ignore[union-attr]
                reduced = block.units(name, product).mean(1, dtype=np.float64).astype(np.float32)
                scores[name] = reduced + np.float32(0.9 if criterion == "snip_momentum" else 0) * scores[name]

    def update(step: int) -> None:
        candidates = []
        for block in blocks:
            if criterion == "magnitude":
                for name in block.names:
                    scores[name] = np.abs(block.units(name, parameters[name].detach().numpy())).mean(1)
            size = sum(wanted[name].size // block.count for name in block.names)
            score = np.mean([scores[name] for name in block.names], axis=0, dtype=np.float64).astype(np.float32)
            candidates.append(Candidates(score, np.full(block.count, size), size * block.count))
        chosen = choose(candidates, [rule.sparsity_of(step)] * len(blocks), scope, 0.0, 1.0)
        for block, prune in zip(blocks, chosen, strict=True):
            for name in block.rows:
                wanted[name] = np.broadcast_to(~_spread(prune, len(wanted[name]))[:, None], wanted[name].shape)
            for name in block.columns:
                wanted[name] = np.broadcast_to(~_spread(prune, wanted[name].shape[1]), wanted[name].shape)

    taken = iter(range(STEPS))

    def after(*_: object) -> None:
        step = next(taken)
        if rule.is_update(step):
            update(step)

    optimizer.register_step_pre_hook(accumulate)
    optimizer.register_step_post_hook(after)
    session = gp.training.Session(program, optimizer, total_steps=STEPS)
    assert {site.name for site in masked_sites(program)} == set(scores)
    for step in range(STEPS):
        x = torch.randn(4, 5, FEATURES, generator=torch.Generator().manual_seed(step))
        program(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for site in masked_sites(program):
            assert np.array_equal(site.mask.numpy(), wanted[site.name]), f"step {step}: {site.name}"
            assert not site.weight[~site.mask].any()
    assert session.done
    assert session.sparsity == 0.5


def _spread(prune: NDArray[np.bool_], size: int) -> NDArray[np.bool_]:
    return np.repeat(prune, size // len(prune))
