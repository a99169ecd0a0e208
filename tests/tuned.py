"""A model with one layer that integers break, and metrics that see it; for the tests of tuning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graphprune as gp
from tests.models import MODELS, example

INPUT = torch.randn(64, 16, generator=torch.Generator().manual_seed(3))
BATCHES = [{"x": part} for part in torch.randn(48, 16, generator=torch.Generator().manual_seed(4)).split(16)]
SITES = ("first.weight", "second.weight", "head.weight")


@torch.no_grad()
def fragile() -> nn.Module:
    """The mlp with a weight in each row of `second` that is huge and multiplies zero: all others round to zero beside it."""
    model = MODELS["mlp"]()
    for parameter in (model.first.weight, model.first.bias):
        parameter[0] = 0.0  # type: ignore[index,union-attr]
    model.second.weight[:, 0] = 1e4  # type: ignore[index,union-attr]
    return model


@torch.no_grad()
def _wanted() -> Tensor:
    return fragile()(INPUT)


@torch.no_grad()
def error(program: gp.Program) -> float:
    """The relative error of the outputs, plus 1; lower is better."""
    wanted = _wanted()
    return 1.0 + float((program(INPUT) - wanted).norm() / wanted.norm())


def likeness(program: gp.Program) -> float:
    """100 minus the relative error in percent; higher is better."""
    return 100.0 * (2.0 - error(program))


def fragile_example() -> tuple[Tensor, ...] | None:
    """Example inputs of ``fragile``."""
    return example("mlp")
