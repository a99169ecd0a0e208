"""Evaluate a metric on Programs, and name what it was evaluated on; what searches that measure have in common."""

from __future__ import annotations

import hashlib
import math
import numbers
from collections.abc import Callable, Iterable

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from graphprune.errors import GraphPruneError
from graphprune.ir.program import Program

Metric = Callable[[Program], object]
"""A function of a Program, which is called like the model that it was traced from; returns a finite number."""

_REPEATS = 1e-3
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def evaluate(metric: Metric, program: Program, called: str, where: str) -> float:
    """Call a metric on a Program in eval mode and without gradients.

    Args:
        metric: The metric.
        program: Put into eval mode.
        called: What the user calls the metric, for messages.
        where: What is measured, for messages, such as ``of the dense model``.

    Raises:
        GraphPruneError: The metric fails, or returns anything but a finite number.
    """
    program.eval()
    try:
        value = metric(program)
    except GraphPruneError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise GraphPruneError(f"metric {called} {where} failed with {type(error).__name__}: {error}") from error
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        shown = f"{value!r}" if isinstance(value, (numbers.Real, type(None))) else f"a {type(value).__name__}"
        raise GraphPruneError(f"metric {called} {where} returned {shown}; it must return a finite number")
    return float(value) + 0.0  # -0.0 is 0.0


def check_repeats(value: float, before: float, what: str) -> None:
    """Check that a metric gives what it gave when a file was begun, but for rounding on another machine.

    Args:
        value: What it gives now.
        before: What the file holds.
        what: File and metric, for messages, such as ``found.json: metric my_task:f1 of the dense model``.

    Raises:
        GraphPruneError: They differ by more than 0.1 %.
    """
    if not math.isclose(value, before, rel_tol=_REPEATS, abs_tol=1e-12):
        raise GraphPruneError(
            f"{what} was {before:.6g} when the file was begun and is {value:.6g} now, so the metric or its data changed; "
            f"choose another file, or delete it to start anew"
        )


def metric_title(metric: Metric) -> str:
    """``module:function`` of a metric, for those who give no name."""
    return f"{getattr(metric, '__module__', '')}:{getattr(metric, '__qualname__', repr(metric))}"


def fingerprint(program: Program) -> str:
    """Name all parameters' values in 16 hexadecimal digits; the same on every machine and number of threads."""
    digest = hashlib.sha256()
    for name, parameter in program.named_parameters():
        bits = parameter.detach().contiguous().view(_BITS[parameter.element_size()])
        digest.update(
            f"{name} {tuple(parameter.shape)} {parameter.dtype} {int(bits.sum(dtype=torch.int64))}\n".encode()
        )
    return digest.hexdigest()[:16]


def data_fingerprint(batches: Iterable[object]) -> str:
    """Name all tensors of calibration data, their order included, in 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for number, batch in enumerate(batches):
        for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
            if isinstance(leaf, Tensor):
                digest.update(f"{number}{pytree.keystr(path)} {tuple(leaf.shape)} {leaf.dtype}\n".encode())
                digest.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
