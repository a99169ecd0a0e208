"""The command ``graphprune sensitivity``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from graphprune.commands.arguments import example_inputs, fractions
from graphprune.commands.console import (
    AsJson,
    Exclude,
    IncludeLast,
    Inputs,
    LowerIsBetter,
    MetricName,
    Model,
    Operators,
    Select,
    load,
    note,
    quiet_stdout,
    show,
)
from graphprune.commands.progress import progress
from graphprune.errors import RecipeError

_HEADER = """\
# Written by graphprune sensitivity: {sparsity:g} over {layers} layers, shared so that the sum of the measured drops is least.
# One-shot is what was measured. To prune while you train, set another schedule (cubic) and criterion (snip_momentum).
"""


def sensitivity(
    model: Model,
    metric: MetricName,
    sparsity: Annotated[
        list[str] | None,
        typer.Option(metavar="S[,S...]", help="Sparsities to try; default 0.5,0.7,0.8,0.9.", show_default=False),
    ] = None,
    pattern: Annotated[str, typer.Option(help="Sparsity pattern.")] = "4x1",
    criterion: Annotated[str, typer.Option(help="What ranks the weights; one that needs no data.")] = "magnitude",
    lower_is_better: LowerIsBetter = False,
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
        with progress(out) as watch:
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
