"""The source model of a Program again: its own class, with the Program's weights."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import fx, nn

from graphprune.errors import GraphPruneError, LoweringError
from graphprune.ir import ops
from graphprune.ir.blocks import FLAGS
from graphprune.ir.origin import origin
from graphprune.ir.program import Program
from graphprune.ir.source import Source

_ADDED = (ops.fake_quantize, ops.dynamic_fake_quantize, ops.observe)
"""Operators whose own buffers the source does not need: what they do to weights is in the weights."""


def resolve(path: str) -> Any:
    """Import what ``package.module:name`` names.

    Raises:
        GraphPruneError: It cannot be imported.
    """
    module, _, name = path.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise GraphPruneError(f"cannot import {path}: {error}; install what defines it, or pass model=") from error
    return value


def build_source(source: Source, config: object | None) -> nn.Module:
    """Build a source model, with the weights that its class starts from.

    Args:
        source: Its class, or its factory.
        config: Its Hugging Face config, where it has one; it becomes the model's own.

    Raises:
        GraphPruneError: It has neither a config nor a factory, or its code cannot be imported.
    """
    if source.factory is not None:
        return resolve(source.factory)()  # type: ignore[no-any-return]
    if config is None or not source.model.startswith("transformers."):
        raise GraphPruneError(
            f"the source {source.model} has no Hugging Face config; load it with model=, or trace it with factory="
        )
    return resolve(source.model)(config, **source.options)  # type: ignore[no-any-return]


def source_model(program: Program) -> nn.Module:
    """Put the weights of a Program back into the class that it was traced from.

    Weights come as the Program holds them: pruned ones are zero, and quantized ones are on their grid where ``freeze-quant`` ran.
    What quantizers do to activations is not in the model. A batch normalization that ``fold-conv-bn`` took away is left as one that
    does nothing, and the bias that it gave to its convolution is registered there. Outputs that ``keep-outputs`` cut are computed again.

    Args:
        program: With its masks folded; not mutated.

    Returns:
        A model of its own, on the CPU, in eval mode. Its parameters have the dtype of the Program's, and float32 where those have
        several (``cast-mixed{store=true}``): what ``cast-mixed`` does is not in the model. A Hugging Face model has a copy of the
        Program's config.

    Raises:
        LoweringError: The Program has masks, or reads a tensor that has no place in the source's class (a factor that ``smooth-quant``
            inserted, say); names it.
        GraphPruneError: The source has neither a Hugging Face config nor a factory, or its code cannot be imported.
    """
    if any(True for _ in program.calls(ops.mask, ops.gate)):
        raise LoweringError(f"{program.name} has masks, which its source's class cannot hold; run fold-masks first")
    model = build_source(program.source, copy.deepcopy(getattr(program, "config", None))).eval()
    state = program.state_dict()
    known = model.state_dict()
    _check_names(program, model)
    for name in known.keys() & state.keys():
        if known[name].shape != state[name].shape:
            raise LoweringError(
                f"{name} has shape {tuple(state[name].shape)}, but {tuple(known[name].shape)} in what {program.source.model} builds "
                f"here; build it with the config that the Program was traced with"
            )
    _add_biases(program, model)
    dtypes = {value.dtype for value in program.parameters() if value.is_floating_point()}
    model.to(dtypes.pop() if len(dtypes) == 1 else torch.float32)
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    _neutralize(program, model)
    return model


def _check_names(program: Program, model: nn.Module) -> None:
    """Raise LoweringError where the Program and the class do not have the same tensors."""
    missing = sorted(model.state_dict().keys() - program.state_dict().keys())
    if missing:
        raise LoweringError(
            f"{program.source.model}, as installed here, has {missing[0]}, which the Program has not: it was traced from another "
            f"version of this class; use the transformers version that it was traced with, or one with the same names"
        )
    known = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    known |= {name for name, _ in program.named_buffers() if name not in program.state_dict()}  # constants of the trace
    for node in program.nodes():
        if node.op == "get_attr" and node.target not in FLAGS and str(node.target) not in known:
            users = [user for user in node.users if user.target not in _ADDED]
            if users and not _is_bias(node, users):
                raise LoweringError(
                    f"{node.target}, read by {origin(users[0])}, has no place in {program.source.model}: a pass inserted it "
                    f"(smooth-quant with folding=false, or where nothing could take the factor). Leave that pass out, or choose a "
                    f"target that lowers the graph, such as onnx"
                )


def _is_bias(node: fx.Node, users: list[fx.Node]) -> bool:
    """Whether a parameter is the bias that ``fold-conv-bn`` gave to a convolution."""
    return all(
        str(user.target).startswith("aten.conv") and len(user.args) > 2 and user.args[2] is node for user in users
    )


def _add_biases(program: Program, model: nn.Module) -> None:
    """Register biases that folding added, under their names, beside their weights."""
    have = dict(model.named_parameters(remove_duplicate=False))
    for name, value in program.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if name in have:
            continue
        module = model.get_submodule(owner)
        if leaf != "bias" or not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            raise LoweringError(
                f"{name}, which fold-conv-bn made, has no place in a {type(module).__name__}; leave fold-conv-bn out"
            )
        module.bias = nn.Parameter(torch.zeros_like(value, device="cpu"))


def remove_idle_normalizations(program: Program, model: nn.Module) -> None:
    """Put nothing in place of the batch normalizations that ``source_model`` left doing nothing.

    Args:
        program: What the model was made of.
        model: From ``source_model``; mutated.
    """
    for name in _idle(program, model):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Identity())


def _idle(program: Program, model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Batch normalizations that the Program has no longer."""
    read = {str(node.target) for node in program.nodes() if node.op == "get_attr"}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.running_mean is not None
        and f"{name}.running_mean" not in read
    }


@torch.no_grad()
def _neutralize(program: Program, model: nn.Module) -> None:
    """Let batch normalizations that the Program has no longer give back what they get."""
    for module in _idle(program, model).values():
        assert module.running_mean is not None
        assert module.running_var is not None
        module.running_mean.zero_()
        module.running_var.fill_(1.0 - module.eps)
        if module.affine:
            module.weight.fill_(1.0)
            module.bias.zero_()
