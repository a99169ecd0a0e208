"""The command ``graphprune tune``."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune.commands.arguments import example_inputs
from graphprune.commands.console import (
    AsJson,
    Inputs,
    LowerIsBetter,
    MetricName,
    Model,
    load,
    note,
    quiet_stdout,
    show,
)
from graphprune.commands.data import BatchSize, Data, Length, Samples, Seed, calibration_batches
from graphprune.commands.progress import progress
from graphprune.errors import RecipeError

if TYPE_CHECKING:
    from graphprune.artifact.tuning import Tuning
    from graphprune.pipeline.recipe import Recipe

NOT_MET = 3
"""Exit code where no trial met the goal."""


def tune(
    model: Model,
    metric: MetricName,
    data: Data = None,
    relative: Annotated[
        float | None,
        typer.Option(help="How much worse the metric may be, as a fraction of the float model's; default 0.01."),
    ] = None,
    absolute: Annotated[
        float | None, typer.Option(help="The same in the metric's own unit, instead of --relative.")
    ] = None,
    lower_is_better: LowerIsBetter = False,
    pipeline: Annotated[
        str | None,
        typer.Option(
            "--pipeline",
            "-p",
            metavar="PIPELINE",
            help="Passes that quantize, as text; default: static quantization by the preset onnxruntime.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same as a YAML recipe.", show_default=False)
    ] = None,
    fallback: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LEVEL",
            help="What a site may fall back to: off (the default), or settings such as 'weights=int8:symmetric:channel "
            "activations=none'. Repeat it for several levels, precision ascending.",
            show_default=False,
        ),
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(
            help="What ranks the sites: error (of the outputs; the default where there is data), one-off or one-on (the "
            "metric with one site not, or alone, quantized).",
            show_default=False,
        ),
    ] = None,
    group: Annotated[
        str, typer.Option(help="Sites that move together: none, input (those that read one value), module.")
    ] = "none",
    max_trials: Annotated[int, typer.Option(min=1, help="Most evaluations of quantized models.")] = 100,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Begin no trial after this time.", show_default=False)
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FILE", help="JSON file, written after every trial; where it exists, go on with it."
        ),
    ] = Path("tune.json"),
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write the recipe that was found; default: beside --out, as .yaml."),
    ] = None,
    input_: Inputs = None,
    samples: Samples = 128,
    length: Length = 512,
    batch: BatchSize = 16,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Quantize a model as far as your metric allows, and write the recipe for it.

    Sites fall back to a higher precision, most sensitive first, until the metric is good enough. The best that was found is kept
    where the goal is not met, too. An interrupted search goes on where it stopped when the same command is run again. Exit code 0:
    the goal is met; 3: it is not.

    [bold]Examples[/]

      graphprune tune ./my-bert --metric my_task:accuracy --data texts.txt --relative 0.005
      graphprune tune ./my-bert --metric my_task:loss --lower-is-better --absolute 0.02 -p dynamic-quant
      graphprune transform ./my-bert --recipe tune.yaml --data texts.txt -o int8/
    """
    with quiet_stdout():
        from graphprune.artifact.files import written
        from graphprune.artifact.models import find_function
        from graphprune.artifact.tune import tune as run_tuning

        steps = _base(pipeline, base)
        recipe = recipe or out.with_suffix(".yaml")
        _check_places(out, recipe, base)
        function = find_function(metric, "takes a Program and returns a number")
        batches = calibration_batches(data, model, samples=samples, length=length, batch=batch, seed=seed)
        loaded = load(model)
        with progress(out) as watch:
            found = run_tuning(
                loaded.model,
                function,
                batches,
                example_inputs(loaded.model, input_),
                pipeline=steps,
                relative=relative,
                absolute=absolute,
                lower_is_better=lower_is_better,
                fallback=fallback or ("off",),
                order=order,
                group=group,
                max_trials=max_trials,
                timeout=timeout,
                path=out,
                name=model,
                metric_name=metric,
                watch=watch,
            )
        for text in found.notes:
            note(text)
        if found.best is not None:
            with written(recipe) as temporary:
                temporary.write_text(_yaml(found, steps), encoding="utf-8")
            options: list[object] = [item for text in input_ or () for item in ("--input", text)]
            if data is not None:
                options += ["--data", data, "--samples", samples, "--length", length, "--batch", batch, "--seed", seed]
            again = shlex.join(["graphprune", "transform", model, "--recipe", str(recipe), *map(str, options)])
            note(f"recipe written to {recipe}, which gives this number again: {again}")
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        show(found)
    if not found.met:
        raise typer.Exit(NOT_MET)


def _base(pipeline: str | None, path: Path | None) -> Recipe | None:
    from graphprune.pipeline.recipe import Recipe

    if pipeline is not None and path is not None:
        raise RecipeError("give --pipeline or --base, not both")
    if path is not None:
        return Recipe.load(path)
    return None if pipeline is None else Recipe.of(pipeline)


def _check_places(out: Path, recipe: Path, base: Path | None) -> None:
    if recipe == out:
        raise RecipeError(f"--recipe and --out are both {out}; give two files")
    if base is not None and recipe.resolve() == base.resolve():
        raise RecipeError(f"the recipe that is found would take the place of --base {base}; give another --recipe")


def _yaml(found: Tuning, base: Recipe | None) -> str:
    recipe = replace(found.recipe(), target=None if base is None else base.target)
    return f"# Written by graphprune tune for {found.settings.metric}.\n# {found.summary()}\n{recipe.to_yaml()}"
