"""Lower a saved Program to a target: the target-specific export tool, thin over ``graphprune.export``.

python tools/export.py out/demo/program --target onnx --out out/onnx --option opset=18
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import graphprune as gp
from graphprune.pipeline.registry import make_target
from graphprune.pipeline.text import parse_pipeline


def export(
    program: Annotated[Path, typer.Argument(help="Folder that graphprune.save (or the demo) wrote.")],
    target: Annotated[str, typer.Option(help="Name of a target; see: graphprune targets.")] = "onnx",
    out: Annotated[Path, typer.Option(help="Folder of the artifact.")] = Path("out"),
    option: Annotated[list[str] | None, typer.Option(help="Option of the target as key=value; repeatable.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Allowed difference, as a fraction of the outputs.")] = None,
) -> None:
    """Lower a saved Program, measure the file, verify it, and say what was measured."""
    try:
        ((_, options),) = parse_pipeline(f"{target}{{{','.join(option or [])}}}")
        artifact = gp.export(gp.load(program), make_target(target, options), out, tolerance=tolerance)
    except gp.GraphPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    Console().print(gp.verify(artifact.folder))


if __name__ == "__main__":
    typer.run(export)
