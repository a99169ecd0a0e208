"""Schedules that do not fit into training are refused before it starts."""

from __future__ import annotations

import pytest

from graphprune.errors import RecipeError
from graphprune.pipeline.durations import check_durations, check_stage
from graphprune.pipeline.recipe import Recipe


def recipe(masks: str, training: str = "{num_train_epochs: 4}") -> Recipe:
    return Recipe.parse(f"training: {training}\npipeline:\n  - insert-masks: {{{masks}}}\n")


@pytest.mark.parametrize(
    "masks",
    [
        "warm_up: 1 epochs, cool_down: 2.9 epochs",
        "warm_up: 0.2, end: 4 epochs",
        "warm_up: 0, cool_down: 0",
        "warm_up: 4 epochs, schedule: one-shot, cool_down: 0",
        "end: 2 epochs, cool_down: 9 epochs",  # cool_down counts only without end
    ],
)
def test_what_fits(masks: str) -> None:
    assert check_durations(recipe(masks)) == ()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            "warm_up: 0, end: 5 epochs",
            r"pipeline\[0\].insert-masks.end='5 epochs' comes after the end of training, which is 4 epochs",
        ),
        ("warm_up: 4.5 epochs", "warm_up='4.5 epochs' comes after the end"),
        ("warm_up: 3 epochs, cool_down: 0.3", "leave nothing of a training of 4 epochs"),
        ("warm_up: 0.8, end: 1 epochs", "end='1 epochs' comes before warm_up=0.8"),
    ],
)
def test_what_does_not_fit(masks: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_durations(recipe(masks))


def test_steps_are_compared_with_steps() -> None:
    with pytest.raises(RecipeError, match="end=200 comes after the end of training, which is 100 steps"):
        check_durations(recipe("warm_up: 0, end: 200", "{max_steps: 100, num_train_epochs: 50}"))
    (unknown,) = check_durations(recipe("warm_up: 0, end: 200"))
    assert "pipeline[0].insert-masks.end=200: training is 4 epochs" in unknown
    (stage,) = recipe("warm_up: 0, end: 200").stages
    assert check_stage(stage, steps_per_epoch=50) == ()
    with pytest.raises(RecipeError, match="which is 4 epochs or 196 steps"):
        check_stage(stage, steps_per_epoch=49)
    with pytest.raises(RecipeError, match="which is 100 steps"):
        check_stage(stage, total_steps=100)
    assert check_durations(recipe("warm_up: 1 epochs", "{}")) != ()


def test_frozen_ranges_count_too_and_stages_are_named() -> None:
    text = (
        "stages:\n"
        "  - {name: a, pipeline: [fold-masks], training: {num_train_epochs: 9}}\n"
        "  - {name: b, pipeline: ['insert-fake-quant{freeze_observers=\"3 epochs\"}'], training: {num_train_epochs: 2}}\n"
    )
    with pytest.raises(RecipeError, match=r"stages\[1\].pipeline\[0\].insert-fake-quant.freeze_observers"):
        check_durations(Recipe.parse(text))
