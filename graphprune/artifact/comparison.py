"""What a benchmark has measured: artifacts side by side, latency, throughput, memory and size, as tables and as a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphprune.artifact.measurements import Measurements

CORNERS = ("dense fp32", "dense int8", "sparse fp32", "sparse int8")
"""What should be compared on each engine, so that sparsity, int8 and the engine can be told apart."""
_STEPS = (
    ("int8 / fp32, dense", "dense int8", "dense fp32"),
    ("int8 / fp32, sparse", "sparse int8", "sparse fp32"),
    ("sparse / dense, fp32", "sparse fp32", "dense fp32"),
    ("sparse / dense, int8", "sparse int8", "dense int8"),
    ("both / neither", "sparse int8", "dense fp32"),
)
_MEGA = 1e6


@dataclass(frozen=True)
class Spread:
    """The median of some values with their quartiles.

    Attributes:
        median: Half of the values are smaller.
        low: The 25th percentile.
        high: The 75th percentile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median and quartiles, interpolated linearly between values; at least one value."""
        low, median, high = np.percentile(np.asarray(values, dtype=np.float64), [25, 50, 75])
        return cls(float(median), float(low), float(high))

    def text(self, digits: int = 2) -> str:
        """Such as ``2.10 [2.05-2.14]``."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}-{self.high:.{digits}f}]"


@dataclass(frozen=True)
class BenchmarkSettings:
    """How it was measured.

    Attributes:
        baseline: Name of the artifact that ratios are over.
        threads: Threads of every runtime.
        rounds: Rounds that count; in each, every artifact has one turn.
        warmup: Calls of each artifact before the first round.
        seed: Of the order of turns, and of inputs that are floats.
        machine: The processor, and how many cores the measuring process may use.
        versions: Of Python and the libraries in the measuring process.
    """

    baseline: str
    threads: int
    rounds: int
    warmup: int
    seed: int = 0
    machine: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """One artifact of a comparison, as its manifest describes it.

    Attributes:
        name: How tables call it: the end of its path that no other artifact of the comparison shares.
        folder: Where it was.
        target: The target that it was lowered to, which is the engine that runs it.
        options: Options of the target.
        sparse: Whether weights were pruned (or, where no pattern is known, at least half of them are zero).
        pattern: Sparsity patterns of the pruned weights, with commas between; empty where dense.
        sparsity: Fraction of the pruned weights in pruned units of their pattern, in [0, 1]; 0 where dense.
        number_format: The format that most weights are stored in: ``fp32``, ``fp16``, ``bf16``, ``int8`` and so on; ``quantized fp32``
            where a quantized model is computed in floats.
        share: Fraction of the weights that are stored in it, in (0, 1].
        model_bytes: Size of the files that the runtime needs.
        folder_bytes: Size of all files, samples among them.
    """

    name: str
    folder: str
    target: str
    options: Mapping[str, Any]
    sparse: bool
    pattern: str
    sparsity: float
    number_format: str
    share: float
    model_bytes: int
    folder_bytes: int

    @property
    def corner(self) -> str:
        """One of ``CORNERS``, or the same with another number format."""
        return (
            f"{'sparse' if self.sparse else 'dense'} {'int8' if self.number_format == 'uint8' else self.number_format}"
        )

    @property
    def weights(self) -> str:
        """Such as ``dense`` or ``sparse 4x1 80.0 %``."""
        return f"sparse {self.pattern} {100 * self.sparsity:.1f} %".replace("  ", " ") if self.sparse else "dense"

    @property
    def numbers(self) -> str:
        """Such as ``int8``, or ``int8 (93 %)`` where other weights have another format."""
        return self.number_format if self.share > 0.995 else f"{self.number_format} ({100 * self.share:.0f} %)"


@dataclass(frozen=True)
class Timed:
    """What was measured of one artifact in one case.

    Attributes:
        artifact: Its name.
        seconds: Latency of a call, one value a round: the median of the calls of its turn.
        difference: The largest absolute difference of its outputs to the baseline's, as a fraction of the baseline's largest
            absolute output.
        peak_bytes: The most memory that its process held, with Python and the libraries in it.
    """

    artifact: str
    seconds: tuple[float, ...]
    difference: float
    peak_bytes: int


@dataclass(frozen=True)
class Case:
    """All artifacts with the same inputs.

    Attributes:
        batch: Examples in a call.
        length: Size of the dimensions that are neither fixed nor the batch, such as tokens; None where there are none.
        inputs: Shape of each input by name.
        timed: The measurements, one an artifact.
    """

    batch: int
    length: int | None
    inputs: Mapping[str, tuple[int, ...]]
    timed: tuple[Timed, ...]

    def of(self, name: str) -> Timed:
        """The measurements of one artifact."""
        return next(item for item in self.timed if item.artifact == name)

    def latency(self, name: str) -> Spread:
        """Seconds of a call."""
        return Spread.of(self.of(name).seconds)

    def throughput(self, name: str) -> Spread:
        """Examples a second."""
        return Spread.of([self.batch / value for value in self.of(name).seconds])

    def latency_ratio(self, name: str, base: str) -> Spread:
        """Latency over that of ``base`` in the same round; below 1 is faster."""
        return Spread.of([a / b for a, b in self._pairs(name, base)])

    def throughput_ratio(self, name: str, base: str) -> Spread:
        """Throughput over that of ``base`` in the same round; above 1 is faster."""
        return Spread.of([b / a for a, b in self._pairs(name, base)])

    def _pairs(self, name: str, base: str) -> list[tuple[float, float]]:
        return list(zip(self.of(name).seconds, self.of(base).seconds, strict=True))


@dataclass(frozen=True)
class Benchmark(Measurements):
    """Artifacts side by side. Prints as tables, and is a JSON file by ``save`` and ``load``.

    Attributes:
        settings: How it was measured.
        artifacts: What was compared.
        cases: The measurements, one case for each batch size and length.
        notes: What a reader must know: corners that are missing, patterns that an engine does not exploit.
    """

    kind = "benchmark"

    settings: BenchmarkSettings
    artifacts: tuple[Contender, ...]
    cases: tuple[Case, ...]
    notes: tuple[str, ...] = ()

    def artifact(self, name: str) -> Contender:
        """One artifact by its name."""
        return next(item for item in self.artifacts if item.name == name)

    @property
    def ordered(self) -> tuple[Contender, ...]:
        """Artifacts by engine, engines as given; in each the four corners first, in the order of ``CORNERS``."""
        engines = list(dict.fromkeys(item.target for item in self.artifacts))

        def place(item: Contender) -> tuple[int, int]:
            corner = CORNERS.index(item.corner) if item.corner in CORNERS else len(CORNERS)
            return engines.index(item.target), corner

        return tuple(sorted(self.artifacts, key=place))

    def to_dict(self) -> dict[str, object]:
        """What ``save`` and ``--json`` write; spreads and ratios are for readers and follow from ``seconds``."""
        return {
            "format": self.file_format,
            "settings": {**asdict(self.settings), "versions": dict(self.settings.versions)},
            "artifacts": [{**asdict(item), "corner": item.corner} for item in self.artifacts],
            "cases": [self._case(case) for case in self.cases],
            "notes": list(self.notes),
        }

    def _case(self, case: Case) -> dict[str, object]:
        base = self.settings.baseline
        results = [
            {
                "artifact": item.artifact,
                "latency": asdict(case.latency(item.artifact)),
                "throughput": asdict(case.throughput(item.artifact)),
                "latency_ratio": asdict(case.latency_ratio(item.artifact, base)),
                "throughput_ratio": asdict(case.throughput_ratio(item.artifact, base)),
                "difference": item.difference,
                "peak_bytes": item.peak_bytes,
                "seconds": list(item.seconds),
            }
            for item in case.timed
        ]
        shapes = {name: list(shape) for name, shape in case.inputs.items()}
        return {"batch": case.batch, "length": case.length, "inputs": shapes, "results": results}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Benchmark:
        """Read ``to_dict`` back."""
        settings = BenchmarkSettings(**data["settings"])
        rows = ({key: value for key, value in item.items() if key != "corner"} for item in data["artifacts"])
        artifacts = tuple(Contender(**row) for row in rows)
        cases = tuple(_read_case(item) for item in data["cases"])
        names = [item.name for item in artifacts]
        if settings.baseline not in names or len(set(names)) != len(names):
            raise ValueError("the baseline is no artifact of it, or two artifacts have one name")
        for case in cases:
            if [item.artifact for item in case.timed] != names:
                raise ValueError("a case has other artifacts than the benchmark")
            if len({len(item.seconds) for item in case.timed}) != 1 or not case.timed[0].seconds:
                raise ValueError("a case has artifacts with different numbers of rounds")
            if not all(value > 0 and math.isfinite(value) for item in case.timed for value in item.seconds):
                raise ValueError("a time is not above zero")
        return cls(settings, artifacts, cases, tuple(map(str, data["notes"])))

    def table(self) -> Group:
        """One table a case, one of the steps between corners, and the notes."""
        parts: list[RenderableType] = []
        for case in self.cases:
            parts += [Text(self._title(case), style="bold"), self._measured(case), ""]
            steps = self._steps(case)
            if steps is not None:
                parts += [Text("throughput ratios on one engine"), steps, ""]
        explained = (
            f"Ratios are medians over {self.settings.rounds} rounds of the ratio to {self.settings.baseline} in the same round; in "
            f"brackets the 25th and 75th percentile. differs: largest difference to its outputs, as a fraction of their largest. peak: "
            f"of the whole process, Python and libraries with it."
        )
        parts += [Text(explained), Text(f"{self.settings.machine}; {self._threads}")]
        return Group(*parts, *(Text(f"note: {text}") for text in self.notes))

    def _title(self, case: Case) -> str:
        length = "" if case.length is None else f", length {case.length}"
        return f"batch {case.batch}{length}, {self._threads}"

    @property
    def _threads(self) -> str:
        return f"{self.settings.threads} thread{'' if self.settings.threads == 1 else 's'}"

    def _measured(self, case: Case) -> Table:
        titles = (
            "throughput ratio",
            "latency ratio",
            "latency ms",
            "examples/s",
            "differs",
            "peak MB",
            "model MB",
            "folder MB",
        )
        table = _table(("engine", "artifact", "weights", "numbers"), titles)
        base = self.settings.baseline
        for item in self.ordered:
            timed, latency = case.of(item.name), case.latency(item.name)
            milliseconds = Spread(*(1e3 * value for value in (latency.median, latency.low, latency.high)))
            cells = (
                item.target,
                item.name,
                item.weights,
                item.numbers,
                case.throughput_ratio(item.name, base).text(),
                case.latency_ratio(item.name, base).text(),
                milliseconds.text(_digits(milliseconds.median)),
                f"{case.throughput(item.name).median:.4g}",
                "-" if item.name == base else f"{timed.difference:.1e}",
                f"{timed.peak_bytes / _MEGA:.0f}",
                _megabytes(item.model_bytes),
                _megabytes(item.folder_bytes),
            )
            table.add_row(*map(Text, cells), style="bold" if item.name == base else None)
        return table

    def _steps(self, case: Case) -> Table | None:
        """What int8 and sparsity give on each engine, where both sides of a ratio were measured; None where none were."""
        table = _table(("engine",), tuple(title for title, _, _ in _STEPS))
        found = False
        for engine in dict.fromkeys(item.target for item in self.ordered):
            first: dict[str, str] = {}
            for item in self.ordered:
                if item.target == engine:
                    first.setdefault(item.corner, item.name)
            known = [upper in first and lower in first for _, upper, lower in _STEPS]
            found = found or any(known)
            cells = [
                case.throughput_ratio(first[upper], first[lower]).text() if both else "-"
                for (_, upper, lower), both in zip(_STEPS, known, strict=True)
            ]
            table.add_row(*map(Text, (engine, *cells)))
        return table if found else None


def _read_case(data: Mapping[str, Any]) -> Case:
    timed = tuple(
        Timed(
            str(row["artifact"]),
            tuple(float(value) for value in row["seconds"]),
            float(row["difference"]),
            int(row["peak_bytes"]),
        )
        for row in data["results"]
    )
    shapes = {str(name): tuple(int(size) for size in shape) for name, shape in data["inputs"].items()}
    length = data["length"]
    return Case(int(data["batch"]), None if length is None else int(length), shapes, timed)


def _table(left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in left:
        table.add_column(title, overflow="fold", no_wrap=title == "engine")
    for title in right:
        table.add_column(title, overflow="fold", justify="right")
    return table


def _digits(value: float) -> int:
    """Digits after the point that leave three that matter."""
    return max(0, 2 - math.floor(math.log10(value))) if 0 < value < 100 else 0 if value >= 100 else 3


def _megabytes(size: int) -> str:
    value = size / _MEGA
    return f"{value:.{_digits(value)}f}" if value >= 0.01 else f"{value:.4f}"
