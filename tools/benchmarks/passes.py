"""The cost of the passes themselves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import torch

import graphprune as gp
from benchmarks.measuring import Measure, Setting, at_most, bert, medians, timed
from graphprune.pipeline.instruments import Timing
from graphprune.pipeline.manager import PassManager

PASSES = "find-prunable,insert-masks{frequency=100},insert-fake-quant,fold-masks{allow_unfinished=true},remove-dead"


def bench_passes(setting: Setting) -> Iterator[Measure]:
    """All passes together against torch.export alone, and their growth with the number of nodes."""
    model = bert(setting)
    inputs = {name: torch.ones(2, 8, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    program = gp.trace(model, inputs, check=False)
    dynamic = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in inputs}
    times = medians(
        {
            "export": timed(
                lambda: torch.export.export(model, (), inputs, dynamic_shapes=dynamic, strict=False),
            ),
            "passes": lambda: _pass_seconds(program),
        },
        setting.repeats,
    )
    yield at_most("passes / torch.export", times["passes"] / times["export"], 0.15, f"{len(program.graph.nodes)} nodes")
    meta = {name: value.to("meta") for name, value in inputs.items()}
    costs = []
    for layers in (setting.layers, 4 * setting.layers):  # on the meta device: the graph's work, without that on weights
        with torch.device("meta"):
            large = gp.trace(bert(dataclasses.replace(setting, layers=layers)), meta, check=False)
        seconds = medians({"passes": lambda large=large: _pass_seconds(large)}, setting.repeats, 0)["passes"]
        costs.append((seconds / len(large.graph.nodes), len(large.graph.nodes)))
    (small, few), (big, many) = costs
    yield at_most("seconds a node, large / small", big / small, 1.5, f"{few} and {many} nodes, no weights; 1 is linear")


def _pass_seconds(program: gp.Program) -> float:
    """Seconds of the passes alone, on a copy."""
    timing = Timing()
    PassManager(gp.Recipe.of(PASSES).passes, (timing,)).run(copy.deepcopy(program), in_place=True)
    return sum(seconds for _, seconds in timing.seconds)
