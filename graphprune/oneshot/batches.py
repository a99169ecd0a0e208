"""Calibration data as a Program takes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.ir.program import Program


def bind_batches(program: Program, batches: Iterable[object], criteria: Iterable[str]) -> list[dict[str, Tensor]]:
    """Bring batches into inputs by name, with inputs that stand for left-out ones filled in.

    Args:
        program: What will take them.
        batches: Mappings of inputs by name, tuples of positional inputs, or single tensors.
        criteria: Those that need data, for the message.

    Returns:
        One dict a batch; all have the same names.

    Raises:
        SparsityError: There are none, or they differ in what they hold.
        TraceError: An input does not fit the Program.
    """
    found: list[dict[str, Tensor]] = []
    for batch in batches:
        if isinstance(batch, Mapping):
            found.append(program.interface.bind((), dict(batch)))
        else:
            found.append(program.interface.bind((batch,) if isinstance(batch, Tensor) else tuple(batch), {}))  # type: ignore[arg-type]
        if set(found[-1]) != set(found[0]):
            raise SparsityError(
                f"batch {len(found) - 1} holds {', '.join(found[-1])} and batch 0 {', '.join(found[0])}; give all the same inputs"
            )
    if not found:
        raise SparsityError(
            f"criterion {', '.join(sorted(set(criteria)))} needs calibration data and there are no batches; give at least one"
        )
    return found
