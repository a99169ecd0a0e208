"""Whether the times of a recipe's passes fit into the training that its stages ask for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from graphprune.errors import RecipeError
from graphprune.pipeline.base import Pass
from graphprune.pipeline.recipe import Recipe
from graphprune.pipeline.stages import Stage

_TIMES = ("warm_up", "cool_down", "end", "freeze_observers", "freeze_batch_norm")
_EPOCHS = re.compile(r"(\d+(?:\.\d+)?) ?epochs?")
_SLACK = 1e-9


@dataclass(frozen=True)
class Length:
    """How long a stage trains, as far as that is known: in epochs, in optimizer steps, or both."""

    epochs: float | None = None
    steps: int | None = None

    @classmethod
    def of(cls, stage: Stage, total_steps: int | None = None, steps_per_epoch: int | None = None) -> Length:
        """The length that a stage says, or that the caller counted. ``max_steps`` wins over epochs, as in the Trainer."""
        steps = total_steps if total_steps is not None else stage.training.max_steps
        epochs = stage.training.num_train_epochs if steps is None else None
        if steps_per_epoch is not None:
            steps = round(epochs * steps_per_epoch) if steps is None and epochs is not None else steps
            epochs = steps / steps_per_epoch if steps is not None else epochs
        return cls(epochs, steps)

    def share(self, time: object) -> float | None:
        """A time as a fraction of training; None where that is not known."""
        if isinstance(time, float):
            return time
        if isinstance(time, int):
            return 0.0 if time == 0 else None if self.steps is None else time / self.steps
        match = _EPOCHS.fullmatch(time) if isinstance(time, str) else None
        if match is None:
            return None
        return 0.0 if not float(match[1]) else None if self.epochs is None else float(match[1]) / self.epochs

    def __str__(self) -> str:
        parts = [f"{self.epochs:g} epochs"] if self.epochs is not None else []
        return (
            " or ".join([*parts, *([f"{self.steps} steps"] if self.steps is not None else [])]) or "of unknown length"
        )


def check_durations(recipe: Recipe) -> tuple[str, ...]:
    """Check every stage of a recipe.

    Returns:
        Times that could not be compared with the length of training, each with its path and why.

    Raises:
        RecipeError: A schedule ends after training, starts after it, or leaves no time; names the path.
    """
    several = len(recipe.stages) > 1
    unknown: list[str] = []
    for index, stage in enumerate(recipe.stages):
        unknown += check_stage(stage, f"stages[{index}].pipeline" if several else "pipeline")
    return tuple(unknown)


def check_stage(
    stage: Stage, where: str = "pipeline", *, total_steps: int | None = None, steps_per_epoch: int | None = None
) -> tuple[str, ...]:
    """Check one stage.

    Args:
        stage: The stage.
        where: Path of its pipeline, for messages.
        total_steps: Optimizer steps of the run, where the caller counted them.
        steps_per_epoch: Optimizer steps of an epoch, where the caller counted them.

    Returns:
        Times that could not be compared, each with its path and why.

    Raises:
        RecipeError: As for ``check_durations``.
    """
    length = Length.of(stage, total_steps, steps_per_epoch)
    unknown: list[str] = []
    for index, step in enumerate(stage.passes):
        unknown += _check(step, f"{where}[{index}].{step.name}", length)
    return tuple(unknown)


def _check(step: Pass, path: str, length: Length) -> list[str]:
    times = {name: getattr(step, name) for name in _TIMES if getattr(step, name, None) is not None}
    shares = {name: length.share(time) for name, time in times.items()}
    if getattr(step, "end", None) is not None:
        shares.pop("cool_down", None)
    for name in ("warm_up", "end", "freeze_observers", "freeze_batch_norm"):
        share = shares.get(name)
        if share is not None and share > 1 + _SLACK:
            raise RecipeError(
                f"{path}.{name}={times[name]!r} comes after the end of training, which is {length}; make it earlier, or train longer"
            )
    _check_window(path, times, shares, length)
    unknown = [name for name, share in shares.items() if share is None]
    return [f"{path}.{name}={times[name]!r}: training is {length}" for name in unknown]


def _check_window(path: str, times: dict[str, object], shares: dict[str, float | None], length: Length) -> None:
    start, end, after = shares.get("warm_up"), shares.get("end"), shares.get("cool_down")
    if start is not None and end is not None and end < start - _SLACK:
        raise RecipeError(
            f"{path}.end={times['end']!r} comes before warm_up={times['warm_up']!r}, in a training of {length}"
        )
    if start is not None and after is not None and start + after >= 1 - _SLACK and after > 0:
        raise RecipeError(
            f"{path}: warm_up={times['warm_up']!r} and cool_down={times['cool_down']!r} leave nothing of a training of {length}; "
            f"shorten one of them or train longer"
        )
