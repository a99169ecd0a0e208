"""The progress bar of commands that measure for a long time and go on from a file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from graphprune.commands.console import note

Watch = Callable[[int, int, str], None]


@contextlib.contextmanager
def progress(out: Path | None = None) -> Iterator[Watch]:
    """A progress bar on standard error with the time that is left; says where to go on when interrupted.

    Args:
        out: The file that is written after every measurement, if there is one.

    Yields:
        A function to call with how many measurements are done, how many there are at most, and what comes next.
    """
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
    bar = Progress(*columns, console=Console(stderr=True), speed_estimate_period=86_400)
    task = bar.add_task("tracing", total=None)
    begun = started = False
    if out is not None:
        bar.start()
        begun = True

    def watch(done: int, total: int, what: str) -> None:
        nonlocal begun, started
        if not begun:
            bar.start()  # an error before the first measurement comes without a bar
            begun = True
        if not started or total != bar.tasks[0].total:
            bar.reset(task, total=total, completed=done)  # what a file held takes no time
            started = True
        bar.update(task, completed=done, description=what)

    try:
        yield watch
    except KeyboardInterrupt:
        if begun:
            bar.stop()
            begun = False
        if out is not None and out.exists():
            note(f"what was measured so far is in {out}; the same command goes on from there")
        raise
    finally:
        if begun:
            bar.stop()
