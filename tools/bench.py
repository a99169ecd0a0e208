"""Measure graphprune's speed and memory goals as ratios of interleaved runs, with medians.

    python tools/bench.py                     # all, on BERT-base; about 15 minutes on 2 cores
    python tools/bench.py --only passes       # one of: passes, step, update, memory, int8
    python tools/bench.py --layers 2          # a smaller BERT, to try it

A ratio is the median of its numerator over the median of its denominator, both measured in turn in one process.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import graphprune as gp
from graphprune.artifact.manifest import versions
from graphprune.ir.masking import masked_sites, rules_of, update_masks
from graphprune.pipeline.instruments import Timing
from graphprune.pipeline.manager import PassManager
from graphprune.pipeline.registry import make_target

PASSES = "find-prunable,insert-masks{frequency=100},insert-fake-quant,fold-masks{allow_unfinished=true},remove-dead"
MASKS = "insert-masks{pattern=4x1,sparsity=0.8,warm_up=0,cool_down=0,frequency=100}"
BATCH, LENGTH = 8, 128


@dataclass(frozen=True)
class Measure:
    """One ratio and its goal."""

    name: str
    ratio: float
    goal: str
    met: bool
    detail: str


def bert(layers: int) -> nn.Module:
    """BERT-base with random weights and fewer or more layers."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, attn_implementation="sdpa"))


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each run; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(repeats + warm_up):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if index >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def at_most(name: str, ratio: float, goal: float, detail: str) -> Measure:
    """A measure that meets its goal where it is not larger."""
    return Measure(name, ratio, f"<= {goal:.4g}", ratio <= goal, detail)


def bench_passes(layers: int, repeats: int) -> Iterator[Measure]:
    """All passes together against torch.export alone, and their growth with the number of nodes."""
    model = bert(layers).train()
    inputs = {name: torch.ones(2, 8, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    program = gp.trace(model, inputs, check=False)
    dynamic = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in inputs}
    spent: list[float] = []
    export = interleaved(
        {
            "export": lambda: torch.export.export(model, (), inputs, dynamic_shapes=dynamic, strict=False),
            "passes": lambda: spent.append(_pass_seconds(program)),
        },
        repeats,
    )["export"]
    ratio = statistics.median(spent[1:]) / export
    yield at_most("passes / torch.export", ratio, 0.15, f"{len(program.graph.nodes)} nodes")
    costs = []
    for count in (layers, 4 * layers):  # on the meta device: the graph's work alone, without that on weights
        with torch.device("meta"):
            large = gp.trace(
                bert(count).train(), {name: value.to("meta") for name, value in inputs.items()}, check=False
            )
        seconds = statistics.median(_pass_seconds(large) for _ in range(repeats))
        costs.append((seconds / len(large.graph.nodes), len(large.graph.nodes)))
    (small, few), (big, many) = costs
    yield at_most("seconds a node, large / small", big / small, 1.5, f"{few} and {many} nodes, no weights; 1 is linear")


def _pass_seconds(program: gp.Program) -> float:
    """Seconds of the passes alone, on a copy."""
    timing = Timing()
    PassManager(gp.Recipe.of(PASSES).passes, (timing,)).run(copy.deepcopy(program), in_place=True)
    return sum(seconds for _, seconds in timing.seconds)


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 30000, (BATCH, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(BATCH, dtype=torch.int64)}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Mapping[str, torch.Tensor]) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def bench_step(layers: int, repeats: int) -> Iterator[Measure]:
    """A training step with masks, and one with scores and mask updates, against the plain model's step."""
    plain = bert(layers).train()
    traced = gp.trace(plain, labels=True, check=False)
    magnitude = gp.transform(traced, MASKS.replace("4x1", "4x1,criterion=magnitude")).train()
    momentum = gp.transform(traced, MASKS).train()
    batch = _batch()
    total = 1_000_000  # no update falls into the measured steps; its cost is added by its frequency
    optimizers = {
        name: _optimizer(model) for name, model in (("plain", plain), ("mask", magnitude), ("snip", momentum))
    }
    sessions = [gp.training.Session(magnitude, optimizers["mask"], total_steps=total)]
    sessions.append(gp.training.Session(momentum, optimizers["snip"], total_steps=total))
    for session in sessions:
        session.step = 1  # step 0 is an update step
    times = interleaved(
        {
            "plain": lambda: _step(plain, optimizers["plain"], batch),
            "mask": lambda: _step(magnitude, optimizers["mask"], batch),
            "snip": lambda: _step(momentum, optimizers["snip"], batch),
        },
        repeats,
    )
    update = _update_seconds(momentum, sessions[1], 3)
    detail = f"batch {BATCH}, {LENGTH} tokens, {layers} layers"
    yield at_most("masked step / plain step", times["mask"] / times["plain"], 1.05, detail)
    every = (times["snip"] + update / 100) / times["plain"]
    yield at_most("snip_momentum step, update every 100 / plain step", every, 1.15, detail)


def _update_seconds(program: gp.Program, session: gp.training.Session, repeats: int) -> float:
    scores = session.state_dict()["scores"]
    ((_, sites),) = rules_of(masked_sites(program)).items()
    return interleaved({"update": lambda: update_masks(sites, 0.8, scores)}, repeats)["update"]


def bench_update(layers: int, repeats: int) -> Iterator[Measure]:
    """One global 4x1 mask update of all sites against a forward and backward pass."""
    program = gp.transform(gp.trace(bert(layers).train(), labels=True, check=False), MASKS, in_place=True).train()
    optimizer = _optimizer(program)
    session = gp.training.Session(program, optimizer, total_steps=1_000_000)
    batch = _batch()
    _step(program, optimizer, batch)
    scores = session.state_dict()["scores"]
    ((_, sites),) = rules_of(masked_sites(program)).items()

    def forward_backward() -> None:
        program(**batch).loss.backward()
        program.zero_grad()

    times = interleaved({"pass": forward_backward, "update": lambda: update_masks(sites, 0.8, scores)}, repeats)
    weights = sum(site.weight.numel() for site in sites)
    yield at_most(
        "mask update / forward-backward", times["update"] / times["pass"], 0.1, f"{weights:,} weights, global 4x1"
    )


def bench_memory(layers: int, repeats: int) -> Iterator[Measure]:
    """Bytes that masks and scores keep for each masked weight."""
    program = gp.transform(gp.trace(bert(layers).train(), labels=True, check=False), MASKS, in_place=True).train()
    optimizer = _optimizer(program)
    session = gp.training.Session(program, optimizer, total_steps=1_000_000)
    _step(program, optimizer, _batch())
    sites = masked_sites(program)
    weights = sum(site.weight.numel() for site in sites)
    masks = sum(site.mask.numel() * site.mask.element_size() for site in sites)
    scores = sum(item.numel() * item.element_size() for item in session.state_dict()["scores"].values())
    yield at_most("mask bytes / weight", masks / weights, 1.0, "bool buffers")
    yield at_most("4x1 score bytes / weight", scores / weights, 1.0, "float32 a block")


def bench_int8(layers: int, repeats: int) -> Iterator[Measure]:
    """Our int8 file and onnxruntime's own quantize_static of our float file, on onnxruntime."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.getLogger().setLevel(logging.ERROR)
    generator = np.random.default_rng(0)

    def sample() -> dict[str, np.ndarray]:
        ids = generator.integers(0, 30000, (1, LENGTH))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    samples = [sample() for _ in range(8)]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rest, None)

    ids = torch.ones(2, LENGTH, dtype=torch.int64)
    dense = gp.trace(bert(layers).eval(), {"input_ids": ids, "attention_mask": ids}, check=False)
    quantized = gp.transform(dense, "insert-fake-quant")
    gp.training.calibrate(
        quantized, [{key: torch.from_numpy(value) for key, value in item.items()} for item in samples]
    )
    target = make_target("onnx")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        float_file = gp.export(dense, target, root / "float").folder
        ours = gp.export(quantized, target, root / "ours").folder
        (root / "static").mkdir()
        quant_pre_process(str(float_file / "model.onnx"), str(root / "prepared.onnx"), skip_symbolic_shape=True)
        quantize_static(
            str(root / "prepared.onnx"), str(root / "static" / "model.onnx"), Reader(),
            quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        threads = min(2, os.cpu_count() or 1)
        runs = {
            name: target.open(path, threads)
            for name, path in (("float", float_file), ("ours", ours), ("static", root / "static"))
        }
        times = interleaved({name: lambda run=run: run(samples[0]) for name, run in runs.items()}, 10 * repeats, 3)
    detail = f"batch 1, {LENGTH} tokens, {threads} threads, {layers} layers"
    yield at_most("int8 file / quantize_static file, latency", times["ours"] / times["static"], 1.0, detail)
    yield Measure("int8 file / float file, latency", times["ours"] / times["float"], "no goal", True, detail)


BENCHES: dict[str, Callable[[int, int], Iterator[Measure]]] = {
    "passes": bench_passes,
    "step": bench_step,
    "update": bench_update,
    "memory": bench_memory,
    "int8": bench_int8,
}


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"One of: {', '.join(BENCHES)}; repeatable.")] = None,
    layers: Annotated[int, typer.Option(help="Layers of the BERT; 12 is BERT-base.", min=1)] = 12,
    repeats: Annotated[int, typer.Option(help="Rounds of interleaved runs.", min=1)] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Measure and print the ratios; the exit code is 1 where a goal is missed."""
    unknown = [name for name in only or () if name not in BENCHES]
    if unknown:
        print(f"error: unknown measure {unknown[0]!r}; known: {', '.join(BENCHES)}", file=sys.stderr)
        raise typer.Exit(2)
    console = Console(stderr=as_json, log_path=False)
    measures: list[Measure] = []
    for name in only or BENCHES:
        with console.status(f"measuring {name}"):
            for item in BENCHES[name](layers, repeats):
                measures.append(item)
                console.log(f"{item.name}: {item.ratio:.3f} (goal {item.goal})")
    if as_json:
        print(json.dumps({"versions": dict(versions()), "measures": [asdict(item) for item in measures]}, indent=2))
    else:
        table = Table("ratio of medians", "measured", "goal", "met", "detail")
        for item in measures:
            table.add_row(item.name, f"{item.ratio:.3f}", item.goal, "yes" if item.met else "[red]NO", item.detail)
        console.print(table)
        known = ", ".join(f"{name} {version}" for name, version in versions().items())
        console.print(f"{torch.get_num_threads()} threads; {known}")
    raise typer.Exit(0 if all(item.met for item in measures) else 1)


if __name__ == "__main__":
    typer.run(main)
