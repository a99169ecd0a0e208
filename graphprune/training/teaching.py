"""Run a teacher: in eval mode, without gradients, with the inputs that it takes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.ir.interface import is_label, source_signature
from graphprune.ir.program import Program

ROW = "teacher_row"
"""Name of the input that says which row of a teacher's cache an example is; no model takes it."""


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy to learn from, for self-distillation: in eval mode, without gradients.

    Make it before the model is pruned; passes and training leave it as it is.
    """
    teacher = copy.deepcopy(model).eval()
    return teacher.requires_grad_(False)


def load_teacher(name: str) -> nn.Module:
    """Load a Hugging Face model by the class that its config names, in float32 and eval mode.

    Args:
        name: A folder or hub id.

    Raises:
        GraphPruneError: Its config names no class of transformers, or the files cannot be read.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kinds = [kind for kind in config.architectures or [] if hasattr(transformers, kind)]
        if not kinds:
            raise GraphPruneError(
                f"the config of teacher {name} names no class of transformers in architectures; load it yourself"
            )
        model = getattr(transformers, kinds[0]).from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise GraphPruneError(f"teacher {name} cannot be loaded: {error}") from error
    assert isinstance(model, nn.Module)
    return model.eval().requires_grad_(False)


def inner_program(module: nn.Module) -> Program | None:
    """The Program that a module is or wraps, if any."""
    while not isinstance(module, Program):
        inner = getattr(module, "module", None) or getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return None
        module = inner
    return module


def accepted(teacher: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that a teacher's ``forward`` names, without labels; all of them where it names none.

    A teacher without token types, for example, takes the other inputs of a student that has them.
    """
    names = teacher.interface.names if isinstance(teacher, Program) else source_signature(teacher)
    given = {name: value for name, value in inputs.items() if not is_label(name) and name != ROW}
    known = {name: value for name, value in given.items() if name in names}
    return known or given


def run_in_eval(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Call a model in eval mode; its mode is put back."""
    was_training = model.training
    model.eval()
    try:
        return model(**inputs)
    finally:
        model.train(was_training)
