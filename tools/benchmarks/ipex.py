"""What the IPEX target makes of a BERT against the same model in eager float32, in IPEX's own environment, in turns."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import environment

import graphprune as gp
from benchmarks.measuring import Measure, Setting, Unavailable, medians
from benchmarks.quantization import _dense, _samples, _tensors
from benchmarks.worker import Worker

WORKER = Path(__file__).with_name("ipex_worker.py")
GOAL = 3.5
STATIC = "annotate-quant{preset=ipex},insert-observers,calibrate{progress=false},insert-fake-quant,freeze-quant"
DYNAMIC = "dynamic-quant{ops=[linear]}"


def bench_ipex(setting: Setting) -> Iterator[Measure]:
    """Speed of fp32, static int8 and dynamic int8 on IPEX over eager float32, at batch 1."""
    python = environment.interpreter("ipex")
    if python is None:
        raise Unavailable("IPEX is not installed; `python tools/environment.py ipex` makes an environment for it")
    environment.add_checkout(python)
    yield from compare(setting, [python, "-P", "-W", "ignore", WORKER])


def compare(setting: Setting, command: Sequence[str | Path]) -> Iterator[Measure]:
    """Save Programs here, let IPEX's side lower and run them.

    Args:
        setting: What is measured, at batch 1.
        command: Command line of IPEX's side, without its options.

    Raises:
        RuntimeError: IPEX's side fails; the message has the last lines that it wrote.
    """
    threads = min(2, os.cpu_count() or 1)
    samples = [_tensors(item) for item in _samples(setting, 8, 1)]
    dense = _dense(setting)
    with tempfile.TemporaryDirectory() as folder:
        gp.save(dense, Path(folder, "fp32"))
        gp.save(gp.transform(dense, STATIC, data=samples), Path(folder, "int8"))
        gp.save(gp.transform(dense, DYNAMIC), Path(folder, "dynamic"))
        options = ["--folder", folder, "--length", str(setting.length), "--threads", str(threads)]
        with Worker([*command, *options], threads) as worker:
            versions = ", ".join(f"{name} {version}" for name, version in worker.ready["versions"].items())
            runs = {name: lambda name=name: float(worker.run(name)["seconds"]) for name in worker.ready["runs"]}
            times = medians(runs, 10 * setting.repeats, 3)
    where = (
        f"batch 1, {setting.length} tokens, {setting.layers} layers of {setting.hidden}, {threads} threads; {versions}"
    )
    for name, title, goal in (("int8", "static int8", GOAL), ("dynamic", "dynamic int8", 1.0), ("fp32", "fp32", 1.0)):
        ratio = times["eager"] / times[name]
        yield Measure(
            f"eager fp32 / {title} on IPEX", ratio, f">= {goal:.4g}", ratio >= goal,
            f"{1000 * times['eager']:.1f} and {1000 * times[name]:.1f} ms, {where}",
        )  # fmt: skip
