"""Latency and size side by side: what a benchmark file says of an artifact and of those that it ran against."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from graphprune.artifact.comparison import Benchmark, Case, Contender, Spread
from graphprune.artifact.contenders import describe
from graphprune.artifact.manifest import Manifest
from graphprune.errors import GraphPruneError
from graphprune.reporting.charts import bar


@dataclass(frozen=True)
class Measured:
    """A benchmark, and which of its artifacts the page is about.

    Attributes:
        benchmark: All measurements.
        name: How the benchmark calls the artifact.
    """

    benchmark: Benchmark
    name: str


@dataclass(frozen=True)
class Row:
    """One artifact of one case.

    Attributes:
        name: How the benchmark calls it.
        detail: Engine, weights and number format.
        ours: It is the artifact that the page is about.
        drawn: Bar of its median, with a line from the first to the third quartile.
        median: Of the latency in seconds.
        shown: The median in milliseconds.
        ratio: Throughput over that of the baseline in the same round, median.
        base: It is the baseline.
    """

    name: str
    detail: str
    ours: bool
    drawn: Markup
    median: float
    shown: str
    ratio: float
    base: bool


@dataclass(frozen=True)
class Group:
    """One case.

    Attributes:
        title: Batch and length.
        rows: Its artifacts.
    """

    title: str
    rows: tuple[Row, ...]


def read_benchmark(path: Path | str, folder: Path, manifest: Manifest) -> Measured:
    """Read what ``graphprune bench --out`` wrote, and find an artifact in it.

    Raises:
        GraphPruneError: The file cannot be read or is none, or the artifact is not among those that it measured.
    """
    benchmark = Benchmark.load(path)
    wanted = _marks(describe(folder, manifest))
    found = [item for item in benchmark.artifacts if _marks(item) == wanted]
    if len(found) > 1:  # alike in all that a benchmark says of them, so their places decide
        place = folder.resolve()
        found = [item for item in found if Path(item.folder).resolve() == place] or [
            item for item in found if Path(item.folder).name == place.name
        ]
    if len(found) != 1:
        names = ", ".join(item.name for item in benchmark.artifacts)
        raise GraphPruneError(
            f"{path} measured {names}, and none of them is {folder} as it is now; run graphprune bench with it"
            if not found
            else f"{path} measured {len(found)} artifacts that cannot be told from {folder}; run graphprune bench with it alone"
        )
    return Measured(benchmark, found[0].name)


def _marks(item: Contender) -> tuple[object, ...]:
    """What an artifact is known by, wherever it lies."""
    options = json.dumps(dict(item.options), sort_keys=True, default=str)
    return (item.target, options, item.pattern, item.sparsity, item.number_format, item.share, item.model_bytes)


def headline(measured: Measured) -> tuple[Spread, str] | None:
    """Throughput over that of the baseline in the first case, with a note; None where this is the baseline."""
    base = measured.benchmark.settings.baseline
    if base == measured.name or not measured.benchmark.cases:
        return None
    case = measured.benchmark.cases[0]
    return case.throughput_ratio(measured.name, base), f"throughput over {base}; {_title(case)}"


def latency_groups(measured: Measured) -> list[Group]:
    """Latencies of every case, as bars from zero."""
    benchmark = measured.benchmark
    groups = []
    for case in benchmark.cases:
        longest = max(case.latency(item.name).high for item in benchmark.artifacts)
        rows = []
        for item in benchmark.ordered:
            spread = case.latency(item.name)
            ours = item.name == measured.name
            rows.append(
                Row(
                    name=item.name,
                    detail=f"{item.target}, {_weights(item)}, {item.numbers}",
                    ours=ours,
                    drawn=bar(
                        spread.median / longest,
                        "" if ours else "muted",
                        spread=(spread.low / longest, spread.high / longest),
                    ),
                    median=spread.median,
                    shown=_milliseconds(spread.median),
                    ratio=case.throughput_ratio(item.name, benchmark.settings.baseline).median,
                    base=item.name == benchmark.settings.baseline,
                )
            )
        groups.append(Group(_title(case), tuple(rows)))
    return groups


def model_sizes(measured: Measured, shown: Callable[[float], str]) -> Sequence[tuple[str, int, str, Markup]]:
    """Name, bytes, bytes as text and bar of the model files of every artifact."""
    benchmark = measured.benchmark
    longest = max(1, *(item.model_bytes for item in benchmark.artifacts))
    return [
        (
            item.name,
            item.model_bytes,
            shown(item.model_bytes),
            bar(item.model_bytes / longest, "" if item.name == measured.name else "muted"),
        )
        for item in benchmark.ordered
    ]


def _title(case: Case) -> str:
    return f"batch {case.batch}" + ("" if case.length is None else f", length {case.length}")


def _milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f} ms"


def _weights(item: Contender) -> str:
    return f"sparse {item.pattern} {item.sparsity:.4f}".replace("  ", " ") if item.sparse else "dense"
