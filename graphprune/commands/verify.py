"""``graphprune verify``: repeat every check of an artifact, as a whole or node by node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from graphprune.commands.console import AsJson, quiet_stdout, show
from graphprune.errors import RecipeError


def verify(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="An artifact that graphprune export wrote.")],
    per_node: Annotated[
        bool,
        typer.Option(
            "--per-node",
            help="Compare each node of a quantized model with the Program, computed from the Program's own values before it.",
        ),
    ] = False,
    rows: Annotated[
        int | None, typer.Option(min=1, show_default="20", help="With --per-node: how many nodes to show, worst first.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Repeat every check of an artifact from its files alone: whole, sparse as stated, and numerically right.

    [bold]Examples[/]

      graphprune verify artifact/
      graphprune verify artifact/ --per-node --rows 5
    """
    if rows is not None and not per_node:
        raise RecipeError("--rows says how many nodes to show; give --per-node too")
    with quiet_stdout():
        from graphprune.artifact.verification import examine

        report = examine(folder, per_node=per_node, rows=rows or 20)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    elif report.passed or report.nodes is not None:
        show(report)
    report.raise_failures()
