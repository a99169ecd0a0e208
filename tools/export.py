"""Lower a saved Program to a target: the target-specific export tool, thin over ``graphprune.export``.

python tools/export.py out/demo/program --target onnx --out out/onnx --option opset=18 --force
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import graphprune as gp
from graphprune.artifact.advice import advise
from graphprune.artifact.models import search_current_directory
from graphprune.commands.arguments import assignments, numbers
from graphprune.commands.console import note
from graphprune.pipeline.registry import make_target


def export(
    program: Annotated[Path, typer.Argument(help="Folder that graphprune.save (or the demo) wrote.")],
    target: Annotated[str, typer.Option(help="Name of a target; see: graphprune targets.")] = "onnx",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the artifact.")] = Path("out"),
    option: Annotated[list[str] | None, typer.Option(help="Option of the target as key=value; repeatable.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Allowed difference, as a fraction of the outputs.")] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the folder where there is one.")] = False,
    per_node: Annotated[
        bool | None,
        typer.Option(
            "--per-node/--no-per-node",
            show_default="where quantized",
            help="Record what the Program computes inside, for graphprune verify --per-node.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="What you measured, as name=value, for the manifest; repeatable.")
    ] = None,
) -> None:
    """Lower a saved Program, measure the file, verify it, and say what was measured and what the target will not make faster."""
    try:
        goal = make_target(target, assignments(option, "--option"), "target")
        search_current_directory()  # the saved Program may name a factory there
        loaded = gp.load(program)
        for text in advise(loaded, goal):
            note(text)
        artifact = gp.export(
            loaded,
            goal,
            out,
            tolerance=tolerance,
            overwrite=force,
            per_node=per_node,
            fresh=True,
            metrics=numbers(metric, "--metric"),
        )
    except gp.GraphPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    Console().print(gp.verify(artifact.folder))


if __name__ == "__main__":
    typer.run(export)
