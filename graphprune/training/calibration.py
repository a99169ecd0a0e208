"""Calibration: run data through the observers of a Program without training it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from rich.progress import track
from torch import Tensor

from graphprune.errors import PassError
from graphprune.ir.program import Program
from graphprune.ir.quantizing import quantizers


def calibrate(program: Program, batches: Iterable[object], *, progress: bool = False) -> int:
    """Let observers see data in eval mode.

    Args:
        program: A Program with observers (``insert-fake-quant``). Its scales and zero-points are mutated; its mode is put back.
        batches: Mappings of inputs by name, tuples of positional inputs, or single tensors.
        progress: Show a progress bar.

    Returns:
        Number of batches seen.

    Raises:
        PassError: There are no observers, no batches, or NaN or infinite values where an observer looks.
    """
    if not any(True for _ in quantizers(program)):
        raise PassError("the Program has no observers to calibrate; run insert-fake-quant first")
    was_training, was_observing = program.training, program.observing
    program.eval()
    program.observing = True
    seen = 0
    try:
        with torch.no_grad():
            for batch in track(batches, "calibrating", transient=True) if progress else batches:
                if isinstance(batch, Mapping):
                    program(**batch)
                elif isinstance(batch, Tensor):
                    program(batch)
                else:
                    program(*batch)  # type: ignore[misc]
                seen += 1
    finally:
        program.train(was_training)
        program.observing = was_observing
    if not seen:
        raise PassError("calibration got no batches; pass an iterable with at least one")
    return seen
