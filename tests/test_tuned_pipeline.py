"""The base of a tuning: taken apart and put together again, with levels for single sites."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.artifact.tuned_pipeline import STATIC, TunedPipeline, default_pipeline
from graphprune.ir.quantizing import quantizers
from tests.traced import traced


@pytest.mark.parametrize(
    "text",
    [
        STATIC,
        "dynamic-quant{ops=[linear]}",
        "fold-conv-bn,insert-fake-quant",
        "insert-masks{sparsity=0.5},annotate-quant{rules=[\"op add: off\"]},insert-fake-quant,freeze-quant,fold-masks",
    ],
)  # fmt: skip
def test_parts_make_the_whole(text: str) -> None:
    pipeline = TunedPipeline.of(text)
    assert [step.name for step in pipeline.passes] == [step.name for step in gp.Recipe.of(text).passes]
    assert TunedPipeline.of(pipeline.text()) == pipeline
    assert pipeline.recipe({}).passes == pipeline.passes
    assert "reduce_range" in pipeline.text()


def test_levels_become_rules_behind_those_of_the_pipeline() -> None:
    pipeline = TunedPipeline.of('annotate-quant{rules=["op embedding: on"]}')
    decider = pipeline.decider_with({"a.weight": "off", "b.weight": "weights=none"})
    assert decider.rules == ("op embedding: on", "name a.weight: off", "name b.weight: weights=none")  # type: ignore[union-attr]
    assert TunedPipeline.of("insert-fake-quant{exclude=[a]}").decider_with({"b": "off"}).exclude == ("a", "b")


def test_a_site_that_is_selected_by_name_can_be_left_out() -> None:
    pipeline = TunedPipeline.of("dynamic-quant{select=[first.weight,head.weight]}")
    program = gp.transform(traced("mlp"), pipeline.recipe({"first.weight": "off"}))
    assert [decision.prefix for _, decision in quantizers(program)] == ["head.weight"]


def test_a_name_is_matched_as_it_stands() -> None:
    model = nn.Sequential(OrderedDict({"a[0]": nn.Linear(4, 4), "a0": nn.Linear(4, 4), "a *": nn.Linear(4, 4)}))
    pipeline = TunedPipeline.of("dynamic-quant")
    program = gp.trace(model, (torch.randn(4, 4),))
    for name in ("a[0]", "a0", "a *"):
        recipe = gp.Recipe.parse(pipeline.recipe({f"{name}.weight": "off"}).to_yaml())
        kept = {decision.prefix for _, decision in quantizers(gp.transform(program, recipe)) if decision.weight}
        assert kept == {"a[0].weight", "a0.weight", "a *.weight"} - {f"{name}.weight"}


def test_batch_normalization_decides_the_default() -> None:
    assert default_pipeline(traced("mlp")).text() == STATIC
    assert default_pipeline(traced("conv_bn")).text() == f"fold-conv-bn,{STATIC}"
