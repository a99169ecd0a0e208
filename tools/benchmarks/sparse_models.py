"""Whole models: the sparse-cpu artifact and what else runs the same model, each in a process of its own, in turns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

from benchmarks.measuring import medians
from benchmarks.sparse_artifacts import DENSE_INT8, EAGER, ONNXRUNTIME, Contender, Store
from benchmarks.sparse_roofline import Peaks, model_work
from graphprune.artifact.manifest import Manifest
from graphprune.artifact.samples import read_samples
from graphprune.artifact.verification import largest_difference
from graphprune.errors import VerifyError
from graphprune.pipeline.registry import make_target
from graphprune.pipeline.remote import Remote

PATTERN = "4x1"
_WORDS = 30000
_TURN, _MOST_CALLS = 0.05, 20
"""Seconds that the counted calls of a turn take about, where one call is shorter, and how many calls that may be."""
_LONG = 0.5
"""Seconds of a call from which on it matters no more that others had the caches."""


@dataclass(frozen=True)
class Row:
    """The speed of a sparse-cpu artifact over that of others: their median seconds divided by its own, so that above 1 is faster.

    Attributes:
        model: Which.
        pattern: Of its zeros.
        sparsity: Fraction of zeros.
        format: ``fp32`` or ``int8``.
        batch: Sequences in a call.
        sequence: Tokens of each.
        threads: Of every runtime.
        over_onnxruntime_fp32: Over the dense float32 model on onnxruntime.
        over_torch_dense: Over the dense float32 model in eager torch.
        over_deepsparse: Over the same sparse model on DeepSparse, in the same number format; None where it was not measured.
        over_openvino_int8: Of int8, over the faster of our and NNCF's dense int8 model on OpenVINO; None where neither was measured.
    """

    model: str
    pattern: str
    sparsity: float
    format: str
    batch: int
    sequence: int
    threads: int
    over_onnxruntime_fp32: float
    over_torch_dense: float
    over_deepsparse: float | None
    over_openvino_int8: float | None


@dataclass(frozen=True)
class Measured:
    """A row with what only people read.

    Attributes:
        row: The ratios.
        seconds: Median seconds of a call.
        of_peak: Share of the machine's arithmetic; None where its peak was not measured.
        of_memory: Share of its memory bandwidth.
    """

    row: Row
    seconds: float
    of_peak: float | None
    of_memory: float | None


@dataclass(frozen=True)
class Shape:
    """Sizes of a call.

    Attributes:
        batch: Sequences.
        sequence: Tokens of each.
        threads: Of every runtime.
    """

    batch: int
    sequence: int
    threads: int


def measure_models(
    store: Store, contenders: Sequence[Contender], shape: Shape, repeats: int, peaks: Peaks | None
) -> list[Measured]:
    """Let artifacts take turns.

    Args:
        store: Where they are.
        contenders: Which; ``ONNXRUNTIME`` and ``EAGER`` among them.
        shape: Sizes of a call.
        repeats: Rounds that count.
        peaks: Of the machine with these threads.

    Returns:
        A row for each sparse-cpu artifact.

    Raises:
        VerifyError: One does not compute what its artifact says, or no finite numbers.
        LoweringError: One does not run.
    """
    ids = np.random.default_rng(0).integers(0, _WORDS, (shape.batch, shape.sequence))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with _started(store, contenders, shape.threads) as processes:
        turns = {item: _Turns(process, inputs) for item, process in processes.items()}
        seconds = medians({item.name: turn for item, turn in turns.items()}, repeats, warm_up=0)
    times = {item: seconds[item.name] for item in contenders}
    return [_measured(store, item, times, shape, peaks) for item in contenders if item.runtime == "sparse-cpu"]


@contextmanager
def _started(store: Store, contenders: Sequence[Contender], threads: int) -> Iterator[dict[Contender, Remote]]:
    """A process for each, checked against the sample of its artifact."""
    with ExitStack() as stack:

        def start(contender: Contender) -> Remote:
            folder = store.folder(contender)
            process = stack.enter_context(Remote(make_target(contender.target), folder, threads=threads))
            if contender.runtime != "nncf":
                _check(process, store, contender)
            return process

        with ThreadPoolExecutor(2) as pool:
            yield dict(zip(contenders, pool.map(start, contenders), strict=True))


def _check(process: Remote, store: Store, contender: Contender) -> None:
    folder = store.folder(contender)
    given, expected = read_samples(folder)[0]
    parity = Manifest.read(folder).parity
    difference, where = largest_difference(process.run(given), expected)
    if not difference <= parity.tolerance:
        raise VerifyError(
            f"{folder} does not compute its own sample outputs: {where} differs by {difference:.3g}, allowed are "
            f"{parity.tolerance:.3g}; how fast it is means nothing. Make it anew with --fresh"
        )


class _Turns:
    """Calls of one process; a turn is the median of some."""

    def __init__(self, process: Remote, inputs: Mapping[str, np.ndarray]):
        self._process, self._inputs = process, inputs
        for name, value in process.run(inputs).items():
            if not np.isfinite(value).all():
                raise VerifyError(f"output {name} is not finite, so its speed means nothing")
        shortest = max(min(process.time(inputs, 2)), 1e-6)
        self._uncounted = int(shortest < _LONG)
        self._calls = min(_MOST_CALLS, max(1, math.ceil(_TURN / shortest)))

    def __call__(self) -> float:
        return statistics.median(self._process.time(self._inputs, self._uncounted + self._calls)[self._uncounted :])


def _measured(
    store: Store, contender: Contender, times: Mapping[Contender, float], shape: Shape, peaks: Peaks | None
) -> Measured:
    mine, integers = times[contender], contender.number_format == "int8"
    theirs = times.get(Contender("deepsparse", contender.number_format, contender.sparsity))
    dense = [times[item] for item in DENSE_INT8 if item in times] if integers else []
    row = Row(
        str(store.model),
        PATTERN,
        contender.sparsity,
        contender.number_format,
        shape.batch,
        shape.sequence,
        shape.threads,
        times[ONNXRUNTIME] / mine,
        times[EAGER] / mine,
        None if theirs is None else theirs / mine,
        min(dense) / mine if dense else None,
    )
    model = store.model
    work = model_work(
        model.layers, model.hidden, contender.sparsity, shape.batch, shape.sequence, contender.number_format
    )
    if peaks is None:
        return Measured(row, mine, None, None)
    return Measured(row, mine, work.of_peak(peaks, mine), work.of_memory(peaks, mine))
