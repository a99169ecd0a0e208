"""Calibration: run data through the observers of a Program without training it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from graphprune.errors import PassError
from graphprune.ir.batches import each_batch, run_batch
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.quantizing import observers, read_observers, unseen


def calibrate(program: Program, batches: Iterable[object], *, progress: bool = False) -> int:
    """Let observers see data in eval mode.

    Args:
        program: A Program with observers (``insert-observers`` or ``insert-fake-quant``). Their records, scales and zero-points
            are mutated; its mode is put back.
        batches: Mappings of inputs by name, tuples of positional inputs, or single tensors.
        progress: Show a progress bar.

    Returns:
        Number of batches seen.

    Raises:
        PassError: There are no observers, because there never were or because they are frozen; there are no batches; NaN or
            infinite values where an observer looks, which is named; or a value that no batch reached.
        TraceError: A batch does not fit the Program; says which.
    """
    if Property.FROZEN in program.properties:
        raise PassError(
            "the Program is frozen: its scales are fixed and its observers gone; calibrate before freeze-quant"
        )
    if "observers" in program.frozen:
        raise PassError("the observers are frozen, by freeze_observers or Program.freeze; calibrate before that")
    if not any(True for _ in observers(program)):
        raise PassError("the Program has no observers to calibrate; run insert-observers or insert-fake-quant first")
    was_training, was_observing = program.training, program.observing
    program.eval()
    program.observing = program.calibrating = True
    seen = 0
    try:
        with torch.no_grad():
            for number, batch in each_batch(batches, "calibrating" if progress else ""):
                run_batch(program, batch, number)
                seen += 1
        read_observers(program)
    finally:
        program.train(was_training)
        program.observing, program.calibrating = was_observing, False
    if missed := unseen(program):
        raise PassError(
            f"no batch reached {missed[0]}{f' and {len(missed) - 1} more' if missed[1:] else ''}; give the inputs that it "
            f"depends on, or exclude it"
        )
    return seen
