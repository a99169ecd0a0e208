"""``graphprune report``: one HTML page about an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphprune.commands.console import quiet_stdout


def report(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="An artifact that graphprune export wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The page to write.")] = Path("report.html"),
    bench: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Latencies: what graphprune bench --out wrote, with this artifact in it."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Repeat every check of the artifact for the page.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the page where there is one.")] = False,
) -> None:
    """Write one self-contained HTML page: what was asked of an artifact, and what was measured.

    The page needs no network and no other file. Where a check fails, it is written all the same, says so, and the exit
    code is 2.

    [bold]Examples[/]

      graphprune report artifact/
      graphprune report artifact/ --bench latency.json -o artifact.html
    """
    with quiet_stdout():
        from graphprune.reporting.report import report as write_report

        page = write_report(folder, out, bench=bench, verify=verify, overwrite=force)
    typer.echo(f"{page.path}: {page.path.stat().st_size:,} bytes, {page.verdict}")
    if page.verification is not None:
        page.verification.raise_failures()
