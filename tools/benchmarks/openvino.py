"""Our OpenVINO int8 file against the one that NNCF makes of the same model, run by the same OpenVINO in turns."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import environment
import numpy as np

import graphprune as gp
from benchmarks.measuring import Measure, Setting, Unavailable, at_most, medians, timed
from benchmarks.quantization import _dense, _samples, _tensors
from graphprune.pipeline.registry import make_target
from graphprune.pipeline.target import Run

WORKER = Path(__file__).with_name("nncf_worker.py")
PASSES = "expand-attention,annotate-quant{preset=openvino},insert-observers"


def bench_openvino(setting: Setting) -> Iterator[Measure]:
    """Latency of int8 on OpenVINO over that of NNCF's quantization, and over float32 on onnxruntime and on OpenVINO."""
    python = environment.interpreter("nncf")
    if python is None:
        raise Unavailable(
            "nncf is not installed; `python tools/environment.py --bare nncf` makes an environment for it"
        )
    yield from compare(setting, [python, "-P", "-W", "ignore", WORKER])


def compare(setting: Setting, command: Sequence[str | Path]) -> Iterator[Measure]:
    """Quantize on both sides, and run what came out in turns.

    Args:
        setting: What is measured, at batch 1.
        command: Command line of NNCF's side, without its options.

    Raises:
        RuntimeError: NNCF's side fails; the message has the last lines that it wrote.
    """
    threads = min(2, os.cpu_count() or 1)
    samples = _samples(setting, 8, 1)
    dense = _dense(setting)
    small = gp.transform(dense, PASSES)
    gp.training.calibrate(small, [_tensors(item) for item in samples])
    small = gp.transform(small, "insert-fake-quant")
    openvino, onnx = make_target("openvino"), make_target("onnx")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        theirs = _quantize(command, setting, threads, root)
        runs = {
            "ours": openvino.open(gp.export(small, openvino, root / "ours").folder, threads),
            "float": openvino.open(gp.export(dense, openvino, root / "dense").folder, threads),
            "nncf": openvino.open(root / "int8", threads),
            "nncf float": openvino.open(root / "float", threads),
            "onnxruntime": onnx.open(gp.export(dense, onnx, root / "onnx").folder, threads),
        }
        times = medians({name: _settled(run, samples[0]) for name, run in runs.items()}, 10 * setting.repeats, 3)
    detail = f"batch 1, {setting.length} tokens, {threads} threads, {setting.layers} layers"
    known = ", ".join(f"{name} {version}" for name, version in theirs.items() if name in ("nncf", "openvino"))
    yield at_most("int8 on OpenVINO / NNCF's int8", times["ours"] / times["nncf"], 1.0, f"{detail}; there: {known}")
    for name, base in {
        "int8 on OpenVINO / float32 on onnxruntime": "onnxruntime",
        "int8 on OpenVINO / float32 on OpenVINO": "float",
    }.items():
        yield Measure(name, times["ours"] / times[base], "no goal", True, detail)
    yield Measure("NNCF's int8 / float32 on onnxruntime", times["nncf"] / times["onnxruntime"], "no goal", True, detail)
    yield Measure(
        "float32 on OpenVINO / OpenVINO's own conversion", times["float"] / times["nncf float"], "no goal", True, detail
    )


def _settled(run: Run, sample: Mapping[str, np.ndarray]) -> Callable[[], float]:
    """Seconds of a call; one before it is not counted, because threads of the runtime before go on spinning for a while."""
    once = timed(lambda: run(sample))

    def clocked() -> float:
        run(sample)
        return once()

    return clocked


def _quantize(command: Sequence[str | Path], setting: Setting, threads: int, root: Path) -> Mapping[str, str]:
    """Let NNCF write ``int8`` and ``float`` into a folder; returns its versions."""
    options = {
        "layers": setting.layers, "hidden": setting.hidden, "length": setting.length, "threads": threads, "out": root,
    }  # fmt: skip
    given = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    done = subprocess.run([*map(str, command), *given], capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-5:])
        raise RuntimeError(f"NNCF's side ended with status {done.returncode}:\n{last}")
    versions: dict[str, str] = json.loads(done.stdout)
    return versions
