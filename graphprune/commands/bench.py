"""The command ``graphprune bench``: artifacts side by side, run in turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from graphprune.commands.console import AsJson, note, quiet_stdout, show
from graphprune.commands.progress import progress


def bench(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="OUT...", help="Artifacts of one model that graphprune export wrote, of any targets."),
    ],
    batch: Annotated[
        list[int] | None,
        typer.Option(
            "--batch", "-b", help="Examples in a call. Repeat it for one table each.", show_default="1, or as traced"
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option("--length", help="Tokens of an example. Repeat it for one table each.", show_default="128"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of every runtime.", show_default="torch's choice")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds; every artifact has one turn in each.")] = 30,
    warmup: Annotated[int, typer.Option(help="Calls of each artifact before the first round.")] = 3,
    baseline: Annotated[
        str | None, typer.Option(metavar="OUT", help="The artifact that ratios are over.", show_default="the first")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of turns, and of inputs that are floats.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write JSON, for graphprune report.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare artifacts in speed, memory and size, each in a process of its own, taking turns.

    GRAPHPRUNE_<TARGET>_PYTHON, such as GRAPHPRUNE_IPEX_PYTHON, names the Python of an environment that a runtime needs for itself.

    [bold]Examples[/]

      graphprune bench dense/ sparse/ dense-int8/ sparse-int8/ --threads 2
      graphprune bench onnx/ openvino/ --batch 1 --batch 16 --length 384 --baseline onnx/ -o bench.json
    """
    with quiet_stdout():
        from graphprune.artifact.benchmark import benchmark

        with progress() as watch:
            found = benchmark(
                folders,
                batch=batch,
                length=length,
                threads=threads,
                rounds=rounds,
                warmup=warmup,
                baseline=baseline,
                seed=seed,
                watch=watch,
            )
        if out is not None:
            found.save(out)
            note(f"written to {out}")
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        show(found)
