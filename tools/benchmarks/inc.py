"""graphprune against Intel Neural Compressor 2.6: mask updates and training steps, in turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import environment
import torch

from benchmarks.measuring import Measure, Setting, Unavailable, at_most, bert, medians, random_batch, timed
from benchmarks.training import Trained, adamw, masked, train
from benchmarks.worker import Worker

WORKER = Path(__file__).with_name("inc_worker.py")


def bench_inc(setting: Setting) -> Iterator[Measure]:
    """A mask update and a training step with snip_momentum of both, on the same BERT with the same number of threads."""
    python = environment.interpreter("inc")
    if python is None:
        raise Unavailable("neural-compressor 2.6 is not installed; `make bench-inc` makes an environment for it")
    options = {
        "layers": setting.layers,
        "hidden": setting.hidden,
        "batch": setting.batch,
        "length": setting.length,
        "threads": torch.get_num_threads(),
    }
    command = [
        python,
        "-W",
        "ignore",
        WORKER,
        *(part for key, value in options.items() for part in (f"--{key}", str(value))),
    ]
    yield from compare(setting, command)


def compare(setting: Setting, command: Sequence[str | Path]) -> Iterator[Measure]:
    """Let graphprune and a worker take turns.

    Raises:
        RuntimeError: The two do not mask the same number of weights with the same sparsity, or the worker fails.
    """
    threads = torch.get_num_threads()
    plain, ours, batch = bert(setting), Trained(masked(setting)), random_batch(setting)
    optimizer = adamw(plain)
    with Worker(command, threads) as worker:
        ready = worker.ready
        if (ready["weights"], ready["threads"]) != (ours.weights, threads):
            raise RuntimeError(
                f"not comparable: {ready['weights']} weights and {ready['threads']} threads there, "
                f"{ours.weights} and {threads} here"
            )
        last: dict[str, Any] = {}

        def theirs(name: str, key: str) -> float:
            last.update(worker.run(name))
            return float(last[key])

        times = medians(
            {
                "plain": timed(lambda: train(plain, optimizer, batch)),
                "inc plain": lambda: theirs("plain", "seconds"),
                "step": timed(lambda: ours.step(batch)),
                "inc step": lambda: theirs("step", "seconds"),
                "update": lambda: ours.update(batch),
                "inc update": lambda: theirs("update", "update"),
            },
            setting.repeats,
        )
    if abs(last["sparsity"] - ours.session.sparsity) > 1e-3:
        raise RuntimeError(f"not comparable: sparsity {last['sparsity']} there, {ours.session.sparsity} here")
    versions = ", ".join(f"{name} {version}" for name, version in ready["versions"].items())
    yield at_most(
        "mask update / Neural Compressor's", times["update"] / times["inc update"], 1 / 50,
        f"{times['update']:.3f} and {times['inc update']:.3f} s, {ours.weights:,} weights, global 4x1, {threads} threads",
    )  # fmt: skip
    overhead, theirs_overhead = times["step"] / times["plain"], times["inc step"] / times["inc plain"]
    yield Measure(
        "snip_momentum step / plain step", overhead, f"<= {theirs_overhead:.4g}, Neural Compressor's",
        overhead <= theirs_overhead, f"{setting}; there: {versions}",
    )  # fmt: skip
