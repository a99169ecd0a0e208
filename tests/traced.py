"""Traces of the tiny models, made once a session; every caller gets a copy of its own."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

from graphprune.ir.program import Program
from graphprune.ir.trace import trace
from graphprune.pipeline.manager import PassManager
from graphprune.pipeline.recipe import Recipe
from tests.models import MODELS, example


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
