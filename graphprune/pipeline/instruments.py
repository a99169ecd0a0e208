"""Observers of a pipeline: print the IR, show what changed, take times, dump numbered files, show progress."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import Progress

from graphprune.ir.printer import print_program
from graphprune.ir.program import Program
from graphprune.pipeline.base import Pass, PassResult


@dataclass
class PrintAfter:
    """Write the IR after passes.

    Attributes:
        write: Takes the text.
        names: Passes to print after; empty means all.
    """

    write: Callable[[str], object]
    names: frozenset[str] = frozenset()

    def before_pass(self, index: int, step: Pass, program: Program) -> None:
        """Nothing to do."""

    def after_pass(self, index: int, step: Pass, result: PassResult) -> None:
        """Write the IR."""
        if not self.names or step.name in self.names:
            self.write(f"// after [{index}] {step}\n{print_program(result.program)}")


@dataclass
class Diff:
    """Write what each pass changed, as a unified diff of the IR."""

    write: Callable[[str], object]
    _before: str = ""

    def before_pass(self, index: int, step: Pass, program: Program) -> None:
        """Keep the text before."""
        self._before = print_program(program)

    def after_pass(self, index: int, step: Pass, result: PassResult) -> None:
        """Write the difference."""
        after = print_program(result.program)
        lines = difflib.unified_diff(
            self._before.splitlines(),
            after.splitlines(),
            f"before [{index}] {step}",
            f"after [{index}] {step}",
            lineterm="",
            n=1,
        )
        self.write("\n".join(lines))


@dataclass
class ReportCoverage:
    """Write what each pass did, and every name that it left out with the reason.

    Attributes:
        write: Takes the text.
    """

    write: Callable[[str], object]

    def before_pass(self, index: int, step: Pass, program: Program) -> None:
        """Nothing to do."""

    def after_pass(self, index: int, step: Pass, result: PassResult) -> None:
        """Write one line for the pass and one for each reason."""
        done = ", ".join(f"{name} {value}" for name, value in result.stats.items())
        self.write(f"[{index}] {step.name}: {done or ('changed' if result.changed else 'nothing to do')}")
        reasons: dict[str, list[str]] = {}
        for name, reason in result.coverage.left_out.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            self.write(f"    left out {shown}: {reason}")


@dataclass
class Timing:
    """Take the time of each pass, in seconds.

    Attributes:
        seconds: ``(name, seconds)`` of each pass that ran, in order.
    """

    seconds: list[tuple[str, float]] = field(default_factory=list)
    _start: float = 0.0

    def before_pass(self, index: int, step: Pass, program: Program) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def after_pass(self, index: int, step: Pass, result: PassResult) -> None:
        """Stop the clock; the time of the verifier is in it."""
        self.seconds.append((step.name, time.perf_counter() - self._start))


@dataclass
class Dump:
    """Write the IR after each pass to ``folder/03-fold-masks.ir``, and before the first to ``00-input.ir``."""

    folder: Path

    def before_pass(self, index: int, step: Pass, program: Program) -> None:
        """Write the input before the first pass."""
        if index == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "00-input.ir").write_text(print_program(program))

    def after_pass(self, index: int, step: Pass, result: PassResult) -> None:
        """Write the IR."""
        (self.folder / f"{index + 1:02d}-{step.name}.ir").write_text(print_program(result.program))


@dataclass
class ShowProgress:
    """Advance a progress bar with each pass."""

    progress: Progress
    total: int

    def __post_init__(self) -> None:
        self._task = self.progress.add_task("passes", total=self.total)

    def before_pass(self, index: int, step: Pass, program: Program) -> None:
        """Name the pass."""
        self.progress.update(self._task, description=step.name)

    def after_pass(self, index: int, step: Pass, result: PassResult) -> None:
        """Advance."""
        self.progress.advance(self._task)
