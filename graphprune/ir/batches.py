"""Calibration data: what a batch may be, and how a Program takes one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.progress import track
from torch import Tensor

from graphprune.errors import PassError, TraceError
from graphprune.ir.program import Program, device_of


def each_batch(batches: Iterable[object], progress: str = "") -> Iterator[tuple[int, object]]:
    """Count batches while they are gone through.

    Args:
        batches: Mappings of inputs by name, tuples or lists of positional inputs, or single tensors.
        progress: What a progress bar says; empty shows none.

    Yields:
        ``(number, batch)``, numbers from 0.

    Raises:
        PassError: There is none, or ``batches`` is a single batch itself.
    """
    if isinstance(batches, (Mapping, Tensor)):
        raise PassError(
            f"calibration data is a {type(batches).__name__}, one batch and not several; give a list: [batch]"
        )
    number = -1
    for number, batch in enumerate(track(batches, progress, transient=True) if progress else batches):
        yield number, batch
    if number < 0:
        raise PassError("calibration got no batches; give an iterable with at least one that was not used up before")


def bind_batch(program: Program, batch: object, number: int = 0) -> dict[str, Tensor]:
    """Bring a batch into inputs by name, on the Program's device; inputs that stand for left-out ones are filled in.

    Args:
        program: What will take them.
        batch: A mapping of inputs by name, a tuple or list of positional inputs, or a single tensor.
        number: Which batch it is, for messages.

    Raises:
        PassError: It is nothing of that kind, a tensor has no entries, or a float one has NaN.
        TraceError: An input is unknown or does not fit the Program.
    """
    given: dict[str, object] = {}
    positional: tuple[object, ...] = ()
    if isinstance(batch, Mapping):
        given = {str(name): value for name, value in batch.items()}
    elif isinstance(batch, Tensor):
        positional = (batch,)
    elif isinstance(batch, (tuple, list)):
        positional = tuple(batch)
    else:
        raise PassError(
            f"batch {number} is a {type(batch).__name__}; give a mapping of inputs by name, a tuple of inputs, or a tensor"
        )
    try:
        bound = program.interface.bind(positional, given)
    except TraceError as error:
        raise TraceError(f"batch {number}: {error}") from error
    device = device_of(program)
    for name, value in bound.items():
        if not value.numel():
            raise PassError(
                f"batch {number}: input {name!r} of shape {tuple(value.shape)} has no entries; leave it out"
            )
        if value.is_floating_point() and bool(value.isnan().any()):
            raise PassError(f"batch {number}: input {name!r} has NaN; repair the data or leave the batch out")
    return {name: value.to(device) for name, value in bound.items()}


def run_batch(program: Program, batch: object, number: int = 0) -> Any:
    """Run a Program on a batch, in the mode that it is in.

    Args:
        program: The Program.
        batch: As for ``bind_batch``.
        number: Which batch it is, for messages.

    Returns:
        The source's output, as for a call of the Program.

    Raises:
        PassError: As for ``bind_batch``.
        TraceError: As for ``bind_batch``, or an input that every output needs is missing.
    """
    bound = bind_batch(program, batch, number)
    try:
        return program(**bound)
    except TraceError as error:
        raise TraceError(f"batch {number}: {error}") from error
