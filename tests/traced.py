"""Traces of the tiny models, made once a session; every caller gets a copy of its own."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

from graphprune.ir.examples import default_inputs
from graphprune.ir.program import Program
from graphprune.ir.trace import trace
from graphprune.pipeline.manager import PassManager
from graphprune.pipeline.recipe import Recipe
from tests.models import MODELS, PLAIN, example


@functools.cache
def _pair(name: str, labels: bool) -> tuple[nn.Module, Program]:
    model = MODELS[name]()
    return model, trace(model, example(name), labels=labels, check=False)


def traced(name: str, *, labels: bool = False) -> Program:
    """A Program of ``MODELS[name]`` in eval mode, with parameters of its own."""
    return copy.deepcopy(_pair(name, labels)[1])


def pair(name: str, *, labels: bool = False) -> tuple[nn.Module, Program]:
    """Copies of a model and of its Program, which share no parameters."""
    model, program = _pair(name, labels)
    return copy.deepcopy(model), copy.deepcopy(program)


def run_passes(program: Program, text: str) -> Program:
    """The Program after a pipeline; the given one is rewritten."""
    return PassManager(Recipe.of(text).passes).run(program, in_place=True).program


@torch.no_grad()
def answer(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Output of a module of one tensor in eval mode."""
    result = module.eval()(*inputs)
    assert isinstance(result, Tensor)
    return result


def inputs_of(name: str, model: nn.Module, batch: int = 3, length: int = 5) -> dict[str, Tensor]:
    """Inputs of another shape than the trace's, by name."""
    if name in PLAIN:
        (first,) = example(name) or ()
        repeated = torch.cat([first, first.flip(0)])[:batch]
        return {"ids" if name == "tied_embedding" else "x": repeated}
    return default_inputs(model, batch=batch, length=length)


def tensors(output: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def assert_same(want: object, have: object, tolerance: float = 1e-5) -> None:
    left, right = tensors(want), tensors(have)
    assert len(left) == len(right) > 0
    for first, second in zip(left, right, strict=True):
        torch.testing.assert_close(second, first, rtol=tolerance, atol=tolerance * max(1.0, float(first.abs().max())))


@torch.no_grad()
def run(module: nn.Module, inputs: dict[str, Tensor]) -> object:
    return module(**inputs)
