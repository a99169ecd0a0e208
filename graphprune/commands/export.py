"""``graphprune export``: lower a saved Program to a target, and verify what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphprune.commands.arguments import numbers
from graphprune.commands.console import note, quiet_stdout
from graphprune.pipeline.assignments import assignments


def export(
    program: Annotated[Path, typer.Argument(metavar="DIR", help="A saved Program: transform -o, or graphprune.save.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="OUT", help="Folder of the artifact.", show_default=False)
    ],
    target: Annotated[str, typer.Option(help="Where to lower to; see graphprune targets.")] = "onnx",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Set an option of the target. Repeatable.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0.0, help="Allowed difference, as a fraction of the outputs.", show_default="by format"),
    ] = None,
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
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="What you measured of the model, for the manifest. Repeatable."),
    ] = None,
) -> None:
    """Lower a saved Program to a target, and verify what was written against the Program.

    [bold]Example[/]

      graphprune export pruned/ --target onnx -o artifact/ --option opset=18
    """
    with quiet_stdout():
        from graphprune.artifact.advice import advise
        from graphprune.artifact.checkpoint import load_program
        from graphprune.artifact.export import export as run_export
        from graphprune.artifact.models import search_current_directory
        from graphprune.pipeline.registry import make_target

        goal = make_target(target, assignments(option, "--option"), "target")
        search_current_directory()  # the saved Program may name a factory there
        loaded = load_program(program)
        for text in advise(loaded, goal):
            note(text)
        artifact = run_export(
            loaded,
            goal,
            out,
            tolerance=tolerance,
            overwrite=force,
            per_node=per_node,
            fresh=True,
            metrics=numbers(metric, "--metric"),
        )
    manifest = artifact.manifest
    parity = manifest.parity
    size = sum(item.bytes for item in manifest.files)
    typer.echo(
        f"{artifact.folder}: {manifest.target}, {size:,} bytes, {len(manifest.sites)} weights measured, "
        f"largest difference to the Program {parity.max_abs:.3g} (tolerance {parity.tolerance:.3g}); verified"
    )
