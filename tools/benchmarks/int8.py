"""Our int8 file against onnxruntime's own."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import graphprune as gp
from benchmarks.measuring import Measure, Setting, at_most, bert, medians, timed
from graphprune.pipeline.registry import make_target


def bench_int8(setting: Setting) -> Iterator[Measure]:
    """Our int8 file and onnxruntime's own quantize_static of our float file, on onnxruntime."""
    logging.getLogger().setLevel(logging.ERROR)
    generator = np.random.default_rng(0)
    samples = []
    for _ in range(8):
        ids = generator.integers(0, 30000, (1, setting.length))
        samples.append({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    example = torch.ones(2, setting.length, dtype=torch.int64)
    dense = gp.trace(bert(setting).eval(), {"input_ids": example, "attention_mask": example}, check=False)
    quantized = gp.transform(dense, "insert-fake-quant")
    gp.training.calibrate(
        quantized, [{key: torch.from_numpy(value) for key, value in item.items()} for item in samples]
    )
    target = make_target("onnx")
    threads = min(2, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = {
            "float": gp.export(dense, target, root / "float").folder,
            "ours": gp.export(quantized, target, root / "ours").folder,
            "static": root / "static",
        }
        _quantize_static(files["float"], files["static"], samples)
        opened = {name: target.open(path, threads) for name, path in files.items()}
        times = medians(
            {name: timed(lambda run=run: run(samples[0])) for name, run in opened.items()}, 10 * setting.repeats, 3
        )
    detail = f"batch 1, {setting.length} tokens, {threads} threads, {setting.layers} layers"
    yield at_most("int8 file / quantize_static file, latency", times["ours"] / times["static"], 1.0, detail)
    yield Measure("int8 file / float file, latency", times["ours"] / times["float"], "no goal", True, detail)


def _quantize_static(source: Path, goal: Path, samples: list[dict[str, np.ndarray]]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rest, None)

    goal.mkdir()
    prepared = str(goal.parent / "prepared.onnx")
    quant_pre_process(str(source / "model.onnx"), prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared, str(goal / "model.onnx"), Reader(),
        quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
