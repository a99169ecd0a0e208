"""The command line: ``graphprune COMMAND``, each command a function here or in ``graphprune.commands``.

Results go to standard output, everything else to standard error. Exit code 0: done; 2: an error that is explained in
one message; 3: ``tune`` did not meet its goal; 130: interrupted. Imports of torch wait until a command needs them, so that
``--help`` is quick.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from graphprune.commands.arguments import example_inputs
from graphprune.commands.bench import bench
from graphprune.commands.console import (
    AsJson,
    Exclude,
    IncludeLast,
    Inputs,
    Model,
    Operators,
    Select,
    fail,
    load,
    note,
    quiet_stdout,
    show,
    to_stderr,
)
from graphprune.commands.data import BatchSize, Data, Length, Samples, Seed, calibration_batches
from graphprune.commands.export import export
from graphprune.commands.prune import prune
from graphprune.commands.recipe import recipe as recipe_app
from graphprune.commands.report import report
from graphprune.commands.sensitivity import sensitivity
from graphprune.commands.train import train
from graphprune.commands.tune import tune
from graphprune.commands.verify import verify
from graphprune.errors import GraphPruneError, RecipeError, suggest
from graphprune.pipeline.assignments import assignments

if TYPE_CHECKING:
    from graphprune.pipeline.instruments import Timing
    from graphprune.pipeline.manager import Instrument
    from graphprune.pipeline.recipe import Recipe


class _ExplainedGroup(TyperGroup):
    """Turns expected errors into one message and an exit code, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GraphPruneError as error:
            fail(str(error))
        except BrokenPipeError:
            raise  # the reader of our output went away; click ends quietly
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}")
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_ExplainedGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make PyTorch and Hugging Face models sparse and small with compiler passes, and prove the result right.",
)

PrintAfter = Annotated[
    list[str] | None,
    typer.Option(metavar="PASS|all", help="Write the graph after this pass to standard error. Repeatable."),
]
Reproducer = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="If a pass fails, write the graph and the rest of the recipe here."),
]


def main() -> None:
    """Run the command line; the console entry point."""
    try:
        app(prog_name="graphprune")
    except KeyboardInterrupt:
        sys.exit(130)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"graphprune {version('graphprune')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@app.command()
def inspect(
    model: Model,
    select: Select = None,
    exclude: Exclude = None,
    op: Operators = None,
    include_last: IncludeLast = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Say what this target makes of each pattern, and how it computes each layer where it chooses. Repeatable.",
        ),
    ] = None,
    input_: Inputs = None,
    as_json: AsJson = False,
) -> None:
    """List the weights that can be pruned, what each costs, and why the others are left out. Changes nothing.

    [bold]Examples[/]

      graphprune inspect ./my-bert --exclude '*.attention.*'
      graphprune inspect ./my-bert --target onnx --target deepsparse
      graphprune inspect ./my-sparse-bert --target 'sparse-cpu{tokens=1024}'
      graphprune inspect ./llama-70b/config.json --json    (a config is enough: no weights are needed)
      graphprune inspect my_package.models:build --input x=4x16
    """
    with quiet_stdout():
        from graphprune.artifact.inspection import inspect as run_inspection

        loaded = load(model)
        found = run_inspection(
            loaded.model,
            example_inputs(loaded.model, input_),
            select=select or (),
            exclude=exclude or (),
            ops=op or (),
            include_last=include_last,
            targets=target or (),
        )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        show(found)


app.command()(sensitivity)
app.command()(tune)
app.command()(prune)


@app.command()
def transform(
    model: Model,
    pipeline: Annotated[
        str | None, typer.Option("--pipeline", "-p", metavar="PIPELINE", help="Passes as text, separated by commas.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="Passes as a YAML recipe.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Set a variable of the recipe. Repeatable.")
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Trace with labels, so that the Program returns a loss.")
    ] = False,
    input_: Inputs = None,
    data: Data = None,
    samples: Samples = 128,
    length: Length = 512,
    batch: BatchSize = 16,
    seed: Seed = 0,
    print_after: PrintAfter = None,
    diff: Annotated[bool, typer.Option("--diff", help="Write what each pass changed to standard error.")] = False,
    dump: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the graph after each pass to a numbered file.")
    ] = None,
    time_: Annotated[bool, typer.Option("--time", help="Write the seconds of each pass to standard error.")] = False,
    reproducer: Reproducer = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Save the Program, for graphprune export.")
    ] = None,
) -> None:
    """Trace a model, run passes on it and print the graph. Without passes, the graph as traced.

    What each pass did, and what it left out and why, goes to standard error.

    [bold]Examples[/]

      graphprune transform ./my-bert -p 'insert-masks{pattern=4x1,sparsity=0.8},insert-fake-quant'
      graphprune transform ./my-bert --recipe recipe.yaml --set sparsity=0.9 --diff -o pruned/
      graphprune transform ./my-bert -p 'smooth-quant{alpha=auto}' --data texts.txt -o smooth/
    """
    with quiet_stdout():
        from graphprune.artifact.checkpoint import save_program
        from graphprune.ir.printer import print_program
        from graphprune.pipeline.base import DataPass
        from graphprune.pipeline.instruments import Timing
        from graphprune.pipeline.transform import transform as run_transform

        steps = _recipe(pipeline, recipe, assignments(set_, "--set"))
        timing = Timing()
        instruments = [*_instruments(steps, print_after or [], diff, dump), timing]
        batches = calibration_batches(data, model, samples=samples, length=length, batch=batch, seed=seed)
        if batches is not None and not any(isinstance(step, DataPass) for step in steps.passes):
            note(f"no pass of this pipeline needs data; {data} is not used")
        loaded = load(model)
        program = run_transform(
            loaded.model,
            steps,
            example_inputs(loaded.model, input_),
            labels=labels,
            factory=loaded.factory,
            in_place=True,
            instruments=instruments,
            reproducer=reproducer,
            data=batches,
        )
        text = print_program(program)
        if time_:
            _write_times(timing)
        if out is not None:
            save_program(program, out)
            note(f"saved in {out}")
    typer.echo(text, nl=False)


app.add_typer(train, name="train")
app.add_typer(recipe_app, name="recipe")
app.command()(export)
app.command()(verify)
app.command()(bench)
app.command()(report)


@app.command()
def passes() -> None:
    """List the installed passes with their options and defaults, and what they require and establish."""
    from graphprune.commands.tables import passes_table

    show(passes_table())


@app.command()
def targets(as_json: AsJson = False) -> None:
    """List the installed targets, what each does with sparsity and number formats, and its libraries."""
    from graphprune.commands.tables import describe_targets, targets_table

    if as_json:
        typer.echo(json.dumps(describe_targets(), indent=2))
    else:
        show(targets_table())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for everything that the demo writes.")] = Path(
        "demo-out"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run stopped.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A much shorter training; the numbers mean nothing.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of data and training.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")] = None,
) -> None:
    """Prune, quantize, fine-tune, export and verify a small real model on this machine, offline.

    [bold]Example[/]

      graphprune demo --out demo-out --resume
    """
    from graphprune.demo.run import run_demo

    run_demo(out, resume=resume, quick=quick, seed=seed, threads=threads)


def _recipe(pipeline: str | None, path: Path | None, variables: Mapping[str, object]) -> Recipe:
    from graphprune.pipeline.recipe import Recipe

    if pipeline is not None and path is not None:
        raise RecipeError("give --pipeline or --recipe, not both")
    if path is not None:
        return Recipe.load(path, **variables)
    if variables:
        raise RecipeError("--set sets variables of a recipe; give --recipe FILE, or write the value in the pipeline")
    return Recipe.of(pipeline or ())


def _instruments(steps: Recipe, after: list[str], diff: bool, dump: Path | None) -> list[Instrument]:
    from graphprune.pipeline.instruments import Diff, Dump, PrintAfter, ReportCoverage

    names = [step.name for step in steps.passes]
    for name in after:
        if name != "all" and name not in names:
            raise RecipeError(f"--print-after: {name!r} is not in the pipeline{suggest(name, [*names, 'all'])}")
    found: list[Instrument] = [ReportCoverage(to_stderr)]
    if after:
        found.append(PrintAfter(to_stderr, frozenset() if "all" in after else frozenset(after)))
    if diff:
        found.append(Diff(to_stderr))
    if dump is not None:
        found.append(Dump(dump))
    return found


def _write_times(timing: Timing) -> None:
    for name, seconds in timing.seconds:
        to_stderr(f"{seconds:9.3f} s  {name}")
    to_stderr(f"{sum(seconds for _, seconds in timing.seconds):9.3f} s  all passes")
