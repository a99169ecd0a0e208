"""``graphprune recipe``: import recipes of other tools, show, check and begin recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune.commands.console import fail, note, to_stderr
from graphprune.errors import RecipeError
from graphprune.pipeline.assignments import assignments

if TYPE_CHECKING:
    from graphprune.importing import Imported
    from graphprune.pipeline.recipe import Recipe

recipe = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Read, check and begin recipes, and import those of Neural Compressor and SparseML.",
)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A recipe in YAML.", show_default=False)]
Variables = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Set a variable of the recipe. Repeatable.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="FILE", help="Write here, to a new file; default: standard output.", show_default=False
    ),
]


@recipe.command("import")
def import_(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="YAML of Neural Compressor 1.x or 2.x, WeightPruningConfig as JSON, YAML or Python, inc_config.json; or a SparseML "
            "recipe in YAML, JSON or markdown.",
            show_default=False,
        ),
    ],
    out: Out = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail, and write nothing, where anything cannot be carried.")
    ] = False,
) -> None:
    """Turn a file of another tool into a recipe. What it could not carry goes to standard error, by line of the file.

    Files are recognized by their content. Nothing in them is run: Python is parsed, and YAML makes no objects.

    [bold]Examples[/]

      graphprune recipe import prune_pattern_lock.yml
      graphprune recipe import recipe.md -o recipe.yaml --strict
    """
    from graphprune.importing import import_recipe

    imported = import_recipe(file)
    _report(imported, file)
    if strict and imported.not_carried:
        count = len(imported.not_carried)
        parts = "one part" if count == 1 else f"{count} parts"
        fail(f"{file}: {parts} cannot be carried; without --strict the rest is written")
    _write(imported.yaml, out)


@recipe.command()
def show(file: File, set_: Variables = None) -> None:
    """Print a recipe as it will run: variables put in, every stage with its passes, training and distillation.

    [bold]Example[/]

      graphprune recipe show recipe.yaml --set sparsity=0.9
    """
    loaded = _load(file, assignments(set_, "--set"))
    for line in _variables(loaded):
        typer.echo(f"# {line}")
    typer.echo(loaded.to_yaml(), nl=False)


@recipe.command()
def check(file: File, set_: Variables = None) -> None:
    """Say whether a recipe is valid, and whether its schedules fit into the training that it asks for.

    [bold]Example[/]

      graphprune recipe check recipe.yaml
    """
    from graphprune.pipeline.durations import check_durations

    loaded = _load(file, assignments(set_, "--set"))
    try:
        unknown = check_durations(loaded)
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from None
    for text in unknown:
        note(f"{text}; it is compared when training starts")
    names = ", ".join(stage.name for stage in loaded.stages)
    passes = sum(len(stage.passes) for stage in loaded.stages)
    target = f", target {loaded.target.name}" if loaded.target is not None else ""
    stages = f"{len(loaded.stages)} stage{'s' if len(loaded.stages) > 1 else ''} ({names})"
    typer.echo(f"{file}: valid; {stages}, {passes} pass{'es' if passes != 1 else ''}{target}")


@recipe.command()
def new(
    task: Annotated[str, typer.Option(help="qa, glue or ner.")] = "glue",
    pattern: Annotated[
        str, typer.Option(help="Sparsity pattern: 4x1, 2:4, unstructured, channelx1, head, ...")
    ] = "4x1",
    target: Annotated[str, typer.Option(help="Where it is for; graphprune targets lists them.")] = "onnx",
    sparsity: Annotated[
        float | None,
        typer.Option(help="Fraction of zeros; default: what is usual for the pattern.", show_default=False),
    ] = None,
    quantize: Annotated[bool, typer.Option("--quantize", help="Add a stage of quantization-aware training.")] = False,
    distill: Annotated[bool, typer.Option("--distill", help="Learn from a dense teacher.")] = False,
    out: Out = None,
) -> None:
    """Begin a recipe from a template.

    [bold]Examples[/]

      graphprune recipe new --task qa --pattern 4x1 --target onnx --quantize --distill -o recipe.yaml
      graphprune recipe new --task ner --pattern 2:4
    """
    from graphprune.commands.templates import new_recipe

    _write(new_recipe(task, pattern, target, sparsity=sparsity, quantize=quantize, distill=distill), out)


def _load(file: Path, variables: Mapping[str, object]) -> Recipe:
    from graphprune.pipeline.recipe import Recipe

    return Recipe.load(file, **variables)


def _variables(loaded: Recipe) -> list[str]:
    """Each variable with its value, and what it was computed from."""
    from graphprune.pipeline.expressions import substitute

    lines = []
    for name, value in loaded.variables.items():
        computed = substitute(value, loaded.variables, f"variables.{name}")
        lines.append(f"{name} = {computed}" + (f"  ({value})" if computed != value else ""))
    return lines


def _report(imported: Imported, file: Path) -> None:
    for text in imported.notes:
        note(text)
    if not imported.not_carried:
        note(f"{file}: everything was carried")
        return
    to_stderr(f"not carried from {file}:")
    wide = max(len(entry.key) for entry in imported.not_carried)
    for entry in imported.not_carried:
        to_stderr(f"  line {entry.line:<4} {entry.key:<{wide}}  {entry.reason}")


def _write(text: str, out: Path | None) -> None:
    """Print, or write a new file whole."""
    if out is None:
        typer.echo(text, nl=False)
        return
    from graphprune.artifact.files import written

    if out.exists():
        raise RecipeError(f"{out} exists already, and may hold your changes; remove it, or name another file")
    with written(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    note(f"written to {out}")
