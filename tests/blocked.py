"""Partitioned Programs for tests, and what it means that they compute the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.ir.program import Program
from graphprune.ir.trace import trace
from tests.traced import run_passes, tensors, traced

BLOCKS = {
    "bert_sequence": ("bert.encoder.layer.0", "bert.encoder.layer.1"),
    "gpt2": ("transformer.h.0", "transformer.h.1"),
    "llama": ("model.layers.0", "model.layers.1"),
    "resnet": ("resnet.encoder.stages.0", "resnet.encoder.stages.1"),
    "t5": ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"),
}
MASKS = "insert-masks{pattern=4x1,sparsity=0.5,frequency=1,warm_up=0,cool_down=0}"


def partitioned(name: str, options: str = "", *, labels: bool = False) -> Program:
    return run_passes(traced(name, labels=labels), f"partition-blocks{options}")


def train_step(program: Program, inputs: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of one step with dropout, from the same random state at each call."""
    program.zero_grad()
    torch.manual_seed(7)
    outputs = [item for item in tensors(program.train()(**inputs)) if item.is_floating_point()]
    sum(item.float().square().mean() for item in outputs).backward()  # type: ignore[union-attr]
    gradients = {name: item.grad for name, item in program.named_parameters() if item.grad is not None}
    return outputs, gradients


def assert_steps_equal(flat: Program, other: Program, inputs: dict[str, Tensor]) -> None:
    """Outputs, gradients and buffers of a step in train mode, and outputs in eval mode, are bitwise equal."""
    want, have = train_step(flat, inputs), train_step(other, inputs)
    assert all(torch.equal(a, b) for a, b in zip(want[0], have[0], strict=True))
    assert want[1].keys() == have[1].keys()
    assert all(torch.equal(value, have[1][name]) for name, value in want[1].items())
    assert all(torch.equal(value, other.tensor(name)) for name, value in flat.named_buffers())
    with torch.no_grad():
        want_eval, have_eval = tensors(flat.eval()(**inputs)), tensors(other.eval()(**inputs))
    assert all(torch.equal(a, b) for a, b in zip(want_eval, have_eval, strict=True))


class Layer(nn.Module):
    """What is repeated in the models below."""

    def __init__(self, width: int = 8, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)
        self.norm = norm or nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Layers one after the other, with a quirk named by ``case``: [b, 8] to [b, 4]."""

    def __init__(self, case: str = "", depth: int = 2) -> None:
        super().__init__()
        self.case = case
        norms = [nn.BatchNorm1d(8) if case == "batch-norm" else None for _ in range(depth)]
        self.layers = nn.ModuleList(Layer(norm=norm) for norm in norms)
        self.head = nn.Linear(8, 4)
        if case == "tied":
            self.layers[1].up.weight = self.layers[0].up.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.case == "in-place":
            x = x * 1
        for layer in self.layers:
            if self.case == "in-place":
                x = F.relu(x, inplace=True)
            x = layer(x)
        if self.case == "twice":
            x = self.layers[0](x)
        if self.case == "weight":
            x = x + self.layers[1].down.weight.sum(1)
        return self.head(x)


def stack(case: str = "", depth: int = 2) -> Program:
    torch.manual_seed(0)
    return trace(Stack(case, depth), torch.randn(4, 8), check=False)
