"""Calibration data for commands: the options, and what they read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune.commands.console import note

if TYPE_CHECKING:
    from torch import Tensor

Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Calibration data for passes that need it: one text a line, where MODEL is a folder with a tokenizer; or .npz or "
        ".safetensors with one array for each input, examples along dimension 0.",
        show_default=False,
    ),
]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Texts or examples to draw from the data.")]
Length = Annotated[int, typer.Option("--length", min=1, help="Most tokens of a text.")]
BatchSize = Annotated[int, typer.Option("--batch", min=1, help="Most examples in a batch of the data.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the draw from the data.")]


def calibration_batches(
    path: Path | None, model: str, *, samples: int, length: int, batch: int, seed: int
) -> list[dict[str, Tensor]] | None:
    """Read what ``--data`` names and say how much it is; None where the option is not given.

    Raises:
        GraphPruneError: The file cannot be read, or texts are given and the model has no tokenizer.
    """
    if path is None:
        return None
    from graphprune.oneshot.calibration_data import read_batches

    batches = read_batches(path, model, samples=samples, length=length, batch=batch, seed=seed)
    examples = sum(len(next(iter(item.values()))) for item in batches)
    note(f"{examples} examples in {len(batches)} batches from {path}")
    return batches
