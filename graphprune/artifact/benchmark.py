"""Run artifacts of any targets in turns, and measure latency, throughput, memory and size side by side."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from graphprune.artifact.common_inputs import Sizes, common_sizes, fill
from graphprune.artifact.comparison import Benchmark, BenchmarkSettings, Case, Timed
from graphprune.artifact.contenders import Entry, notes_on, read_entries
from graphprune.artifact.manifest import versions
from graphprune.artifact.samples import Arrays, read_samples
from graphprune.artifact.verification import largest_difference
from graphprune.errors import GraphPruneError, LoweringError, VerifyError, suggest
from graphprune.pipeline.remote import Remote
from graphprune.quant.presets import has_vnni

Watch = Callable[[int, int, str], None]
"""Told how much is done, how much there is to do, and what comes next."""
_TURN = 0.02
"""Seconds that the counted calls of a turn take about, where one call is shorter."""
_MOST_CALLS = 50


def benchmark(
    folders: Sequence[Path | str] | Path | str,
    *,
    batch: int | Sequence[int] | None = None,
    length: int | Sequence[int] | None = None,
    threads: int | None = None,
    rounds: int = 30,
    warmup: int = 3,
    baseline: Path | str | None = None,
    seed: int = 0,
    watch: Watch | None = None,
) -> Benchmark:
    """Run artifacts of one model in turns, each in a process of its own, and compare them.

    In each round every artifact has one turn, in an order that is shuffled anew, while the processes of the others sleep: a turn
    ends when the threads of its runtime do. A turn begins with a call that does not count, since the turns of others left the
    caches cold; then calls are timed, one, or more where a call takes less than 20 ms. Ratios are taken in each round. Before
    all that, every artifact must give the outputs of its own first sample within the tolerance that its manifest states.

    Args:
        folders: Artifacts, of any targets. ``GRAPHPRUNE_<TARGET>_PYTHON`` names the Python of a runtime's own environment.
        batch: Examples in a call, or several such numbers; by default 1, or what the model is fixed to.
        length: Size of input dimensions that are free and not the batch, such as tokens, or several; by default 128.
        threads: Threads of every runtime; by default torch's choice.
        rounds: Rounds that count, at least 1.
        warmup: Calls of each artifact before the first round, at least 1.
        baseline: Which of the folders ratios are over; by default the first.
        seed: Of the order of turns, and of inputs that are floats.
        watch: Told of the progress.

    Returns:
        The measurements, one case for each batch and length; prints as tables.

    Raises:
        VerifyError: A folder is no artifact or is damaged, an artifact does not compute its sample outputs, gives outputs of
            other shapes than the baseline, or ones that are not finite.
        LoweringError: A runtime is not installed, or a model does not run; says which.
        GraphPruneError: A number is out of range, an artifact is given twice, or artifacts cannot be compared.
    """
    limits = _Limits(_threads(threads), rounds, warmup, seed)
    entries = read_entries([folders] if isinstance(folders, (str, Path)) else folders)
    base = entries[0] if baseline is None else _find(entries, baseline)
    ordered = [base, *(entry for entry in entries if entry is not base)]
    wanted = [common_sizes(ordered, b, n) for b in _several(batch, "batch") for n in _several(length, "length")]
    steps = _Steps(watch, len(entries) + len(wanted) * (len(entries) + rounds))
    for entry in entries:
        with steps.step(f"checking {entry.contender.name}"):
            _check_sample(entry, limits.threads)
    cases = [_measure(ordered, sizes, limits, steps) for sizes in wanted]
    names = [entry.contender.name for entry in entries]
    return Benchmark(
        BenchmarkSettings(base.contender.name, limits.threads, rounds, warmup, seed, machine(), dict(versions())),
        tuple(entry.contender for entry in entries),
        tuple(
            Case(s.batch, s.length, s.shapes, tuple(c[name] for name in names))
            for s, c in zip(wanted, cases, strict=True)
        ),
        notes_on(entries),
    )


def machine() -> str:
    """The processor, whether it has instructions for int8, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {'VNNI, ' if has_vnni() else ''}{_cores()} cores"


@dataclass(frozen=True)
class _Limits:
    """How to measure."""

    threads: int
    rounds: int
    warmup: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("rounds", "warmup"):
            if getattr(self, name) < 1:
                raise GraphPruneError(f"{name}={getattr(self, name)} is too small; it is at least 1")


class _Steps:
    """Counts what is done for a watcher."""

    def __init__(self, watch: Watch | None, total: int):
        self._watch, self._total, self._done = watch, total, 0

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        if self._watch is not None:
            self._watch(self._done, self._total, what)
        yield
        self._done += 1
        if self._watch is not None and self._done == self._total:
            self._watch(self._done, self._total, "")


@dataclass
class _Runner:
    """An artifact that is loaded."""

    entry: Entry
    remote: Remote
    inputs: Arrays
    calls: int = 1

    def outputs(self) -> Arrays:
        """Outputs of the inputs that are timed.

        Raises:
            VerifyError: One is not finite.
        """
        with self._named():
            found = self.remote.run(self.inputs)
        for name, value in found.items():
            if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
                raise VerifyError(f"{self.entry.folder}: output {name} is not finite, so its speed means nothing")
        return found

    def warm_up(self, calls: int) -> None:
        """Call it some times, and see how many calls make a turn."""
        shortest = max(min(self._time(calls)), 1e-9)
        self.calls = min(_MOST_CALLS, max(1, math.ceil(_TURN / shortest)))

    def turn(self) -> float:
        """Median seconds of a call, the first not counted."""
        return statistics.median(self._time(self.calls + 1)[1:])

    def _time(self, calls: int) -> list[float]:
        with self._named():
            return self.remote.time(self.inputs, calls)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except LoweringError as error:
            if str(self.entry.folder) in str(error):
                raise
            sizes = ", ".join(f"{name} {list(value.shape)}" for name, value in self.inputs.items())
            raise LoweringError(
                f"{self.entry.folder} ({self.entry.manifest.target}) does not run with {sizes}: {error}"
            ) from error


def _measure(entries: Sequence[Entry], sizes: Sizes, limits: _Limits, steps: _Steps) -> dict[str, Timed]:
    """Measurements of one case by name; the baseline is the first entry."""
    base = entries[0]
    inputs = fill(sizes.shapes, read_samples(base.folder)[0][0], limits.seed)
    with ExitStack() as stack:
        runners: list[_Runner] = []
        differences: dict[str, float] = {}
        expected: Arrays = {}
        for entry in entries:
            with steps.step(f"loading {entry.contender.name}"):
                remote = stack.enter_context(Remote(entry.target, entry.folder, threads=limits.threads))
                runner = _Runner(entry, remote, inputs)
                outputs = runner.outputs()
                expected = expected or outputs
                differences[entry.contender.name] = _difference(base, entry, expected, outputs)
                runner.warm_up(limits.warmup)
                runners.append(runner)
        seconds: dict[str, list[float]] = {entry.contender.name: [] for entry in entries}
        shuffled, order = list(runners), random.Random(limits.seed)
        for number in range(1, limits.rounds + 1):
            with steps.step(f"batch {sizes.batch}, round {number} of {limits.rounds}"):
                order.shuffle(shuffled)
                for runner in shuffled:
                    seconds[runner.entry.contender.name].append(runner.turn())
        return {
            name: Timed(name, tuple(seconds[name]), differences[name], runner.remote.peak_memory())
            for name, runner in zip(seconds, runners, strict=True)
        }


def _check_sample(entry: Entry, threads: int) -> None:
    """Raise VerifyError where an artifact does not compute the outputs of its first sample.

    In a process that is not measured, since some runtimes keep memory for each size of their inputs.
    """
    given, expected = read_samples(entry.folder)[0]
    parity = entry.manifest.parity
    with Remote(entry.target, entry.folder, threads=threads) as remote:
        outputs = remote.run(given)
    try:
        difference, where = largest_difference(outputs, expected)
    except VerifyError as error:
        raise VerifyError(f"{entry.folder}: {error}; see graphprune verify {entry.folder}") from None
    if not difference <= parity.tolerance:
        raise VerifyError(
            f"{entry.folder} does not compute its own sample outputs: {where} differs by {difference:.3g}, allowed are "
            f"{parity.tolerance:.3g}; how fast it is means nothing. See graphprune verify {entry.folder}"
        )


def _difference(base: Entry, entry: Entry, expected: Arrays, outputs: Arrays) -> float:
    """The largest absolute difference, as a fraction of the baseline's largest output."""
    try:
        difference, _ = largest_difference(outputs, expected)
    except VerifyError as error:
        raise VerifyError(f"{entry.folder} cannot be compared with {base.folder}: {error}") from None
    scale = max(float(np.abs(value.astype(np.float64)).max(initial=0.0)) for value in expected.values())
    return difference / max(scale, 1e-12)


def _find(entries: Sequence[Entry], wanted: Path | str) -> Entry:
    """The entry of a folder, or of a name in tables."""
    for entry in entries:
        if Path(wanted).resolve() == entry.folder.resolve() or str(wanted) == entry.contender.name:
            return entry
    known = [str(entry.folder) for entry in entries]
    raise GraphPruneError(
        f"baseline {wanted} is not among the artifacts{suggest(str(wanted), known)}; give one of {', '.join(known)}"
    )


def _several(value: int | Sequence[int] | None, name: str) -> tuple[int | None, ...]:
    values: tuple[int | None, ...] = (value,) if value is None or isinstance(value, int) else tuple(value) or (None,)
    for item in values:
        if item is not None and item < 1:
            raise GraphPruneError(f"{name}={item} is too small; it is at least 1")
    if len(set(values)) != len(values):
        raise GraphPruneError(f"{name} is given twice with the same number: {', '.join(map(str, values))}")
    return values


def _threads(asked: int | None) -> int:
    cores = _cores()
    if asked is None:
        return max(1, min(torch.get_num_threads(), cores))
    if asked < 1:
        raise GraphPruneError(f"threads={asked} is too small; it is at least 1")
    if asked > cores:
        raise GraphPruneError(
            f"threads={asked} is more than the {cores} cores that this process may use; threads that wait for each other are not "
            f"worth measuring"
        )
    return asked


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
