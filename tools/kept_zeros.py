"""Count the zeros of a sparse checkpoint that later ones kept.

python tools/kept_zeros.py SPARSE OUT/stage1 OUT      # exit code 1 where a zero was lost
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read(folder: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name."""
    try:
        return load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise typer.BadParameter(f"{folder} holds no model.safetensors that can be read: {error}") from error


def find(name: str, state: dict[str, Tensor]) -> Tensor | None:
    """A weight by its name, or by one that a head has put its model's name before, or taken from: ``bert.encoder...``."""
    same = [key for key in state if key == name or key.endswith(f".{name}") or name.endswith(f".{key}")]
    return state[same[0]] if len(same) == 1 else None


def main(
    sparse: Annotated[Path, typer.Argument(help="Folder of the sparse checkpoint.")],
    later: Annotated[list[Path], typer.Argument(help="Folders of checkpoints that were made from it.")],
    least: Annotated[float, typer.Option(help="Zeros that a weight must have to count as pruned.", min=0, max=1)] = 0.1,
) -> None:
    """Print how many zeros of all pruned weights are still there, and how many entries have become zero."""
    pruned = {
        name: weight == 0
        for name, weight in read(sparse).items()
        if weight.dim() > 1 and float((weight == 0).float().mean()) >= least
    }
    if not pruned:
        raise typer.BadParameter(f"no weight of {sparse} has {least:.0%} of zeros or more; lower --least")
    zeros = sum(int(mask.sum()) for mask in pruned.values())
    table = Table("checkpoint")
    for column in ("kept", "lost", "new"):
        table.add_column(column, justify="right")
    lost_in_all = 0
    for folder in later:
        state = read(folder)
        lost = new = 0
        for name, mask in pruned.items():
            weight = find(name, state)
            if weight is None or weight.shape != mask.shape:
                raise typer.BadParameter(f"{folder} has no weight like {name} of {sparse}")
            lost += int((weight[mask] != 0).sum())
            new += int((weight[~mask] == 0).sum())
        lost_in_all += lost
        table.add_row(str(folder), f"{zeros - lost:,}", f"{lost:,}", f"{new:,}")
    console = Console()
    console.print(
        f"{sparse}: {len(pruned)} pruned weights, {zeros:,} zeros", soft_wrap=True, markup=False, highlight=False
    )
    console.print(table)
    raise typer.Exit(lost_in_all > 0)


if __name__ == "__main__":
    typer.run(main)
