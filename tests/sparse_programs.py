"""Programs of tiny models whose matrices are nine tenths zeros, for pipelines that lock masks."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from graphprune.ir.program import Program
from graphprune.ir.trace import trace
from tests.models import MODELS


@cache
def sparse_program(name: str) -> Program:
    """``MODELS[name]`` with every weight of its linear layers zero but each tenth; traced once, to be copied by ``gp.transform``."""
    model = MODELS[name]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.view(-1)[torch.arange(module.weight.numel()) % 10 != 0] = 0.0
    return trace(model)
