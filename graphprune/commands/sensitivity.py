"""The command ``graphprune sensitivity``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune.commands.arguments import example_inputs, fractions
from graphprune.commands.console import (
    AsJson,
    Exclude,
    IncludeLast,
    Inputs,
    Model,
    Operators,
    Select,
    load,
    note,
    quiet_stdout,
    show,
)
from graphprune.errors import RecipeError

if TYPE_CHECKING:
    pass

_HEADER = """\
# Written by graphprune sensitivity: {sparsity:g} over {layers} layers, shared so that the sum of the measured drops is least.
# One-shot is what was measured. To prune while you train, set another schedule (cubic) and criterion (snip_momentum).
"""


def sensitivity(
    model: Model,
    metric: Annotated[
        str,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Your function that takes a Program, which is called like the model, and returns a number. The current "
            "directory is searched too.",
            show_default=False,
        ),
    ],
    sparsity: Annotated[
        list[str] | None,
        typer.Option(metavar="S[,S...]", help="Sparsities to try; default 0.5,0.7,0.8,0.9.", show_default=False),
    ] = None,
    pattern: Annotated[str, typer.Option(help="Sparsity pattern.")] = "4x1",
    criterion: Annotated[str, typer.Option(help="What ranks the weights; one that needs no data.")] = "magnitude",
    lower_is_better: Annotated[
        bool, typer.Option("--lower-is-better", help="The metric is a loss: smaller is better.")
    ] = False,
    select: Select = None,
    exclude: Exclude = None,
    op: Operators = None,
    include_last: IncludeLast = False,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="JSON file, written after every measurement; where it exists, go on with it.",
        ),
    ] = Path("sensitivity.json"),
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a heat map: .png, .svg or .pdf. Needs matplotlib.")
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="Sparsity over all these layers to share by what was measured, for --recipe.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a recipe that gives each layer its share of --target.")
    ] = None,
    input_: Inputs = None,
    as_json: AsJson = False,
) -> None:
    """Prune one layer at a time and measure what that does to your metric; share a sparsity by it.

    Nothing is trained. An interrupted sweep goes on where it stopped when the same command is run again.

    [bold]Examples[/]

      graphprune sensitivity ./my-bert --metric my_task:accuracy --plot sensitivity.png
      graphprune sensitivity ./my-bert --metric my_task:accuracy --target 0.8 --recipe recipe.yaml
      graphprune transform ./my-bert --recipe recipe.yaml -o pruned/
    """
    with quiet_stdout():
        from graphprune.artifact.files import written
        from graphprune.artifact.models import find_function
        from graphprune.artifact.sensitivity_plot import check_plot
        from graphprune.artifact.sweep import SPARSITIES
        from graphprune.artifact.sweep import sensitivity as run_sweep

        tried = fractions(sparsity, "--sparsity") or SPARSITIES
        _check_target(target, recipe, tried)
        if plot is not None:
            check_plot(plot)
        function = find_function(metric, "takes a Program and returns a number")
        loaded = load(model)
        with _progress(out) as watch:
            found = run_sweep(
                loaded.model,
                function,
                example_inputs(loaded.model, input_),
                sparsities=tried,
                pattern=pattern,
                criterion=criterion,
                lower_is_better=lower_is_better,
                select=select or (),
                exclude=exclude or (),
                ops=op or (),
                include_last=include_last,
                path=out,
                name=model,
                metric_name=metric,
                in_place=True,
                watch=watch,
            )
        shares = None if target is None else found.targets(target)
        if plot is not None:
            note(f"drawn in {found.plot(plot)}")
        if target is not None and recipe is not None:
            text = _HEADER.format(sparsity=target, layers=len(found.sites)) + found.recipe(target).to_yaml()
            with written(recipe) as temporary:
                temporary.write_text(text, encoding="utf-8")
            note(f"recipe written to {recipe}; graphprune transform {model} --recipe {recipe}")
    if as_json:
        typer.echo(json.dumps({**found.to_dict(), **({} if shares is None else {"targets": shares})}, indent=2))
    else:
        show(found.table(shares))


def _check_target(target: float | None, recipe: Path | None, tried: Sequence[float]) -> None:
    if recipe is not None and target is None:
        raise RecipeError("--recipe needs --target, the sparsity to share")
    if target is not None and not 0.0 < target < 1.0:
        raise RecipeError(f"--target {target} is not in (0, 1); write a fraction, 0.8 for 80 percent")
    if target is not None and target > max(tried):
        raise RecipeError(
            f"--target {target} is above every sparsity to measure ({max(tried):g} at most); add a higher one to --sparsity"
        )


@contextlib.contextmanager
def _progress(out: Path) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on standard error with the time that is left; says where to go on when interrupted."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=86_400) as bar:
        task = bar.add_task("tracing", total=None)

        def watch(done: int, total: int, what: str) -> None:
            if bar.tasks[0].total is None:
                bar.reset(task, total=total, completed=done)  # what a file held takes no time
            bar.update(task, completed=done, total=total, description=what)

        try:
            yield watch
        except KeyboardInterrupt:
            bar.stop()
            if out.exists():
                note(f"what was measured so far is in {out}; the same command goes on from there")
            raise
