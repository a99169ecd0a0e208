"""What a quantization plan holds, as tests look at it, and a network whose sums end convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.ir.program import Program
from graphprune.ir.quant_plan import planned
from graphprune.ir.trace import trace
from graphprune.passes import AnnotateQuant
from tests.traced import run_passes


def plans(program: Program, text: str = "annotate-quant") -> dict[str, str]:
    """What is planned, by name of the operator; ``:number`` marks the second use of a weight."""
    found: dict[str, str] = {}
    for _, plan in planned(run_passes(program, text)):
        again = sum(name.partition(":")[0] == plan.name for name in found)
        found[f"{plan.name}:{again + 1}" if again else plan.name] = plan.quantize
    return found


def left_out(program: Program, **options: object) -> dict[str, str]:
    return dict(AnnotateQuant(**options).run(program).coverage.left_out)  # type: ignore[arg-type]


class Residuals(nn.Module):
    """A residual block of two convolutions, and a sum that no convolution ends in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(x + self.second(x))
        pooled = x.mean((2, 3))
        return self.head(pooled) + pooled


def residuals() -> Program:
    return trace(Residuals().eval(), torch.randn(2, 3, 6, 6))


# -- golden, nothing to do --------------------------------------------------------------------------------------------
