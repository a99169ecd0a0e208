"""Recipes with several stages, training and distillation: what is merged, what is written back, what is refused."""

from __future__ import annotations

import pytest

from graphprune.errors import RecipeError
from graphprune.passes import FoldMasks, InsertMasks, LockMasks
from graphprune.pipeline.recipe import Recipe
from graphprune.pipeline.stages import DistillationSettings, Stage, TrainingSettings

TWO = """
version: 1
variables: {teacher: self, rate: 1.8e-4, epochs: 8}
training: {per_device_train_batch_size: 12, seed: 42}
distillation: {teacher: "${teacher}", temperature: 2.0, logits: 1.0, task: 0.0}
stages:
  - name: lock
    pipeline: [lock-masks]
    training: {num_train_epochs: "${epochs}", learning_rate: "${rate}", warmup_ratio: 0.05}
  - name: quantize
    pipeline: lock-masks,insert-fake-quant
    training: {num_train_epochs: "${epochs / 4}", learning_rate: 1e-5, seed: 7}
    distillation: {temperature: 1.0}
  - name: alone
    pipeline: [fold-masks]
    distillation: null
    train: false
target: onnx
"""


def test_stages_add_to_what_is_said_for_all() -> None:
    recipe = Recipe.parse(TWO)
    assert [stage.name for stage in recipe.stages] == ["lock", "quantize", "alone"]
    lock, quantize, alone = recipe.stages
    assert lock.passes == (LockMasks(),)
    assert lock.training.said() == {
        "num_train_epochs": 8, "learning_rate": 1.8e-4, "warmup_ratio": 0.05, "per_device_train_batch_size": 12, "seed": 42,
    }  # fmt: skip
    assert lock.distillation == DistillationSettings(teacher="self", temperature=2.0, logits=1.0, task=0.0)
    assert (quantize.training.seed, quantize.training.num_train_epochs) == (7, 2.0)
    assert quantize.distillation == DistillationSettings(teacher="self", temperature=1.0, logits=1.0, task=0.0)
    assert alone == Stage(
        "alone", (FoldMasks(),), TrainingSettings(per_device_train_batch_size=12, seed=42), None, False
    )
    assert recipe.stage("alone") is alone
    assert recipe.target is not None


def test_it_is_written_back() -> None:
    recipe = Recipe.parse(TWO)
    again = Recipe.parse(recipe.to_yaml())
    assert again.stages == recipe.stages
    assert again.target == recipe.target
    assert str(recipe) == recipe.to_yaml()
    layers = "pipeline: fold-masks\ndistillation: {layers: [[1, 2], [a.b, c.d]], hidden: 1, teacher: [x, y]}"
    one = Recipe.parse(layers)
    assert one.stages[0].distillation is not None
    assert one.stages[0].distillation.layers == ((1, 2), ("a.b", "c.d"))
    assert one.stages[0].distillation.teacher == ("x", "y")
    assert Recipe.parse(one.to_yaml()) == one


def test_variables_are_set_from_outside() -> None:
    assert Recipe.parse(TWO, rate=1e-3).stages[0].training.learning_rate == 1e-3
    with pytest.raises(RecipeError, match=r"variable 'rat' is not in the recipe; did you mean 'rate'\?"):
        Recipe.parse(TWO, rat=1e-3)


def test_one_pipeline_is_a_stage() -> None:
    recipe = Recipe.parse("pipeline: ['insert-masks{sparsity=0.5}']\ntraining: {max_steps: 10}")
    assert recipe.stages == (Stage("main", (InsertMasks(sparsity=0.5),), TrainingSettings(max_steps=10)),)
    assert recipe.passes == recipe.stages[0].passes


def test_several_stages_have_no_one_pipeline() -> None:
    with pytest.raises(RecipeError, match=r"3 stages \(lock, quantize, alone\)"):
        _ = Recipe.parse(TWO).passes
    with pytest.raises(RecipeError, match="there is no stage 'lok'; did you mean 'lock'"):
        Recipe.parse(TWO).stage("lok")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 1", "either a pipeline or stages; this one has neither"),
        ("pipeline: a\nstages: []", "either a pipeline or stages; this one has both"),
        ("stages: []", "stages: there is none"),
        ("stages: [{name: a, pipeline: fold-masks}, {name: a, pipeline: fold-masks}]", "the name 'a' is given twice"),
        ("stages: [{name: a/b, pipeline: fold-masks}]", r"stages\[0\]\.name: String should match"),
        ("stages: [{name: a, pipelin: fold-masks, pipeline: fold-masks}]", r"'stages\[0\]\.pipelin'; did you mean 'pipeline'"),
        ("stages: [{name: a, pipeline: [fold-maks]}]", r"stages\[0\]\.pipeline\[0\]"),
        ("pipeline: fold-masks\ntraining: {learning_rat: 1}", "unknown key 'training.learning_rat'; did you mean 'learning_rate'"),
        ("pipeline: fold-masks\ntraining: {learning_rate: fast}", "training.learning_rate: .*not 'fast'"),
        ("pipeline: fold-masks\ntraining: {max_steps: 0}", "training.max_steps: .* greater than or equal to 1"),
        ("pipeline: fold-masks\ndistillation: {loss: kd}", "distillation.loss: .*'kl', 'ce' or 'mse'"),
        ("pipeline: fold-masks\ndistillation: {temperature: 0}", "distillation.temperature: .* greater than 0"),
        ("stages: [{name: a, pipeline: fold-masks, distillation: {hiden: 1}}]",
         r"unknown key 'stages\[0\]\.distillation\.hiden'; did you mean 'hidden'"),
        ("pipeline: fold-masks\ntraining: {seed: '${sed}'}", "training.seed: unknown variable 'sed'"),
    ],
)  # fmt: skip
def test_refusals_say_where(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(text)
