"""graphprune against Intel Neural Compressor 2.6: mask updates and training steps, in turns."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import environment
import torch

from benchmarks.measuring import Measure, Setting, Unavailable, at_most, bert, medians, random_batch, timed
from benchmarks.training import Trained, adamw, masked, train

WORKER = Path(__file__).with_name("inc_worker.py")


class Worker:
    """A process that makes runs on demand and says what they took; see ``inc_worker.py``. Used with ``with``.

    Args:
        command: Its command line.
        threads: Threads that it may use.

    Attributes:
        ready: What it said first.

    Raises:
        RuntimeError: It ended; the message has the last lines that it wrote to standard error.
    """

    def __init__(self, command: Sequence[str | Path], threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory()  # the library writes a workspace where it runs
        self._errors = Path(self._folder.name, "errors.txt")
        with self._errors.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                cwd=self._folder.name, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, text=True, encoding="utf-8",
            )  # fmt: skip
        try:
            self.ready = self._read()
        except RuntimeError:
            self.__exit__(None, None, None)
            raise

    def run(self, name: str) -> dict[str, Any]:
        """Make a run and return what it took."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"run": name}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; reading tells why
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            last = "\n".join(self._errors.read_text(encoding="utf-8").splitlines()[-5:])
            raise RuntimeError(f"the worker ended with status {status}:\n{last}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()


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
