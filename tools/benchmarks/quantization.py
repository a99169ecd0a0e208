"""Our int8 files against onnxruntime's own, and what calibration costs."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

import graphprune as gp
from benchmarks.measuring import Measure, Setting, at_most, bert, medians, timed
from graphprune.pipeline.registry import make_target

Samples = list[dict[str, np.ndarray]]
_CALIBRATION = 100
"""Samples of the calibration that is timed."""


def bench_int8(setting: Setting) -> Iterator[Measure]:
    """Static and dynamic int8 files of ours and of onnxruntime, made from our float file, on onnxruntime."""
    logging.getLogger().setLevel(logging.ERROR)
    samples = _samples(setting, 8, 1)
    dense = _dense(setting)
    static = gp.transform(dense, "annotate-quant,insert-observers")
    gp.training.calibrate(static, [_tensors(item) for item in samples])
    programs = {
        "float": dense,
        "static": gp.transform(static, "insert-fake-quant"),
        "dynamic": gp.transform(dense, "dynamic-quant"),
    }
    target = make_target("onnx")
    threads = min(2, os.cpu_count() or 1)
    detail = f"batch 1, {setting.length} tokens, {threads} threads, {setting.layers} layers"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = {name: gp.export(program, target, root / name).folder for name, program in programs.items()}
        files |= {name: root / name for name in ("their static", "their dynamic")}
        _quantize_static(files["float"], files["their static"], samples)
        _quantize_dynamic(files["float"], files["their dynamic"])
        opened = {name: target.open(path, threads) for name, path in files.items()}
        times = medians(
            {name: timed(lambda run=run: run(samples[0])) for name, run in opened.items()}, 10 * setting.repeats, 3
        )
        sizes = {name: (path / "model.onnx").stat().st_size for name, path in files.items()}
    for kind in ("static", "dynamic"):
        theirs = f"quantize_{kind} file"
        yield at_most(f"{kind} int8 file / {theirs}, latency", times[kind] / times[f"their {kind}"], 1.0, detail)
        yield at_most(f"{kind} int8 file / {theirs}, bytes", sizes[kind] / sizes[f"their {kind}"], 1.05, detail)
        yield Measure(f"{kind} int8 file / float file, latency", times[kind] / times["float"], "no goal", True, detail)


def bench_calibration(setting: Setting) -> Iterator[Measure]:
    """Calibration and as many plain forward passes of the same batches."""
    batches = [_tensors(item) for item in _samples(setting, -(-_CALIBRATION // setting.batch), setting.batch)]
    plain = _dense(setting).eval()
    detail = f"{_CALIBRATION} samples, {setting}, {torch.get_num_threads()} threads"

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                plain(**batch)

    runs: dict[str, Callable[[], float]] = {"plain": timed(forward)}
    for observer in ("min-max", "histogram-kl"):
        observed = gp.transform(plain, f"annotate-quant{{observer={observer}}},insert-observers")
        runs[observer] = timed(lambda observed=observed: gp.training.calibrate(observed, batches))  # type: ignore[misc]
    times = medians(runs, min(setting.repeats, 3))
    yield at_most("calibration / forward passes, min-max", times["min-max"] / times["plain"], 1.3, detail)
    yield at_most("calibration / forward passes, histogram-kl", times["histogram-kl"] / times["plain"], 1.3, detail)


def _dense(setting: Setting) -> gp.Program:
    example = torch.ones(2, setting.length, dtype=torch.int64)
    return gp.trace(bert(setting).eval(), {"input_ids": example, "attention_mask": example}, check=False)


def _samples(setting: Setting, count: int, batch: int) -> Samples:
    generator = np.random.default_rng(0)
    ids = (generator.integers(0, 30000, (batch, setting.length)) for _ in range(count))
    return [{"input_ids": item, "attention_mask": np.ones_like(item)} for item in ids]


def _tensors(sample: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in sample.items()}


def _quantize_static(source: Path, goal: Path, samples: Samples) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rest, None)

    quantize_static(
        _prepared(source, goal), str(goal / "model.onnx"), Reader(),
        quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def _quantize_dynamic(source: Path, goal: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(_prepared(source, goal), str(goal / "model.onnx"), weight_type=QuantType.QInt8)


def _prepared(source: Path, goal: Path) -> str:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    goal.mkdir()
    prepared = str(goal / "prepared.onnx")
    quant_pre_process(str(source / "model.onnx"), prepared, skip_symbolic_shape=True)
    return prepared
