"""What the commands share: results on standard output, notes and errors on standard error, and common arguments."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphprune.artifact.models import LoadedModel

_WIDE = 10_000  # columns where output is not a terminal: tables are not folded, so that grep and awk work

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="package.module:factory (a function that returns an nn.Module), a folder with config.json with or without "
        "weights, a config .json, a saved Program, or a Hugging Face hub id.",
        show_default=False,
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="NAME=SHAPE[:DTYPE]",
        help="Example input of a model that brings none, such as x=4x16 or ids=4x8:int64; the first size, the batch, "
        "is 2 or more. Repeat for each input.",
    ),
]
MetricName = Annotated[
    str,
    typer.Option(
        "--metric",
        metavar="MODULE:FUNCTION",
        help="Your function that takes a Program, which is called like the model, and returns a number. The current "
        "directory is searched too.",
        show_default=False,
    ),
]
LowerIsBetter = Annotated[bool, typer.Option("--lower-is-better", help="The metric is a loss: smaller is better.")]
Select = Annotated[
    list[str] | None,
    typer.Option(help="Take only these: a glob over module or weight names, or re: and an expression. Repeatable."),
]
Exclude = Annotated[list[str] | None, typer.Option(help="Leave these out; same form as --select.")]
Operators = Annotated[
    list[str] | None, typer.Option("--op", help="Take only this operator: linear, conv2d, ... Repeatable.")
]
IncludeLast = Annotated[bool, typer.Option("--include-last", help="Take the last layer before the output too.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send whatever libraries and the user's own code print to standard error; standard output is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def fail(message: str) -> NoReturn:
    """End with exit code 2 and one message."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def note(message: str) -> None:
    """Tell the user something on standard error."""
    typer.echo(f"note: {message}", err=True)


def to_stderr(text: str) -> None:
    """Write a line to standard error."""
    typer.echo(text, err=True)


def show(renderable: RenderableType) -> None:
    """Print for people: fitted to a terminal, uncut elsewhere."""
    from rich.console import Console

    console = Console(soft_wrap=False)
    if console.is_terminal:
        console.print(renderable)
        return
    with (wide := Console(width=_WIDE, color_system=None)).capture() as capture:
        wide.print(renderable)
    typer.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def load(text: str) -> LoadedModel:
    """Find and build the model that a text names, and pass on what there is to note about it."""
    from graphprune.artifact.models import load_model

    loaded = load_model(text)
    for item in loaded.notes:
        note(f"{text}: {item}")
    return loaded
