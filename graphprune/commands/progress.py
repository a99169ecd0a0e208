"""The progress bar of commands that measure for a long time and go on from a file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from graphprune.commands.console import note

Watch = Callable[[int, int, str], None]


@contextlib.contextmanager
def progress(out: Path) -> Iterator[Watch]:
    """A progress bar on standard error with the time that is left; says where to go on when interrupted.

    Args:
        out: The file that is written after every measurement.

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
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=86_400) as bar:
        task = bar.add_task("tracing", total=None)
        started = False

        def watch(done: int, total: int, what: str) -> None:
            nonlocal started
            if not started or total != bar.tasks[0].total:
                bar.reset(task, total=total, completed=done)  # what a file held takes no time
                started = True
            bar.update(task, completed=done, description=what)

        try:
            yield watch
        except KeyboardInterrupt:
            bar.stop()
            if out.exists():
                note(f"what was measured so far is in {out}; the same command goes on from there")
            raise
