"""Compare a Program with the model that it was traced from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from graphprune.errors import TraceError
from graphprune.ir.program import Program

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class NoDropout(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Run train mode with every dropout probability taken as zero, in any model and however it calls dropout.

    On the CPU, dropout draws a Bernoulli mask and divides by the keep probability; elsewhere it is one operator.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.bernoulli_.float:
            return args[0].fill_(args[1])
        if func is torch.ops.aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        return func(*args, **(kwargs or {}))


def check_parity(model: nn.Module, program: Program, arguments: Mapping[str, object]) -> None:
    """Run model and Program on the same input in eval mode and in train mode without dropout, and compare all outputs.

    Buffers (running statistics) are put back afterwards, also those that the two share.

    Args:
        model: The source.
        program: Its trace.
        arguments: Example tensors and constants by name.

    Raises:
        TraceError: Some output differs by more than 1e-4 of the output's scale in float32 (1e-10 in float64, 5e-2 in
            bfloat16, 1e-2 in float16); names mode, output and difference.
    """
    for training in (False, True):
        model.train(training)
        program.train(training)
        expected = _run(model, arguments)
        actual = _run(program, arguments)
        mode = "train" if training else "eval"
        if len(expected) != len(actual):
            raise TraceError(f"{mode} mode: the model returns {len(expected)} tensors and its trace {len(actual)}")
        for index, (want, have) in enumerate(zip(expected, actual, strict=True)):
            problem = _difference(want, have)
            if problem:
                raise TraceError(
                    f"{mode} mode: output {index} of the trace differs from the model's: {problem}. The model may branch on "
                    f"its mode, draw random numbers or keep state outside its buffers; move that out of forward"
                )


def _run(module: Callable[..., Any] | nn.Module, arguments: Mapping[str, object]) -> list[Tensor]:
    assert isinstance(module, nn.Module)
    saved = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    devices = [0] if torch.cuda.is_available() else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices), NoDropout():  # type: ignore[no-untyped-call]
        torch.manual_seed(0)
        output = module(**arguments)
        for name, buffer in module.named_buffers():
            buffer.copy_(saved[name])
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _difference(want: Tensor, have: Tensor) -> str | None:
    if want.shape != have.shape or want.dtype != have.dtype:
        return f"{have.dtype} {list(have.shape)} instead of {want.dtype} {list(want.shape)}"
    if not want.is_floating_point():
        return None if torch.equal(want, have) else "integer entries differ"
    tolerance = _TOLERANCE.get(want.dtype, 1e-4)
    scale = float(want[torch.isfinite(want)].abs().max()) if torch.isfinite(want).any() else 1.0
    if torch.allclose(have, want, rtol=tolerance, atol=tolerance * max(scale, 1e-6), equal_nan=True):
        return None
    return f"largest difference {float((have - want).abs().max()):.3g} at scale {scale:.3g}"
