"""Tune: quantize a model as far as a metric allows, site by site, and keep the best that was found."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from graphprune.artifact.evaluation import (
    Metric,
    check_repeats,
    data_fingerprint,
    evaluate,
    fingerprint,
    metric_title,
)
from graphprune.artifact.trial_programs import GROUPS, TrialPrograms, squared_error
from graphprune.artifact.tuned_pipeline import OFF, TunedPipeline, default_pipeline
from graphprune.artifact.tuning import Trial, TuneSettings, Tuning, ranked
from graphprune.errors import GraphPruneError, RecipeError, suggest
from graphprune.ir.batches import bind_batch, each_batch
from graphprune.ir.program import Program
from graphprune.ir.trace import trace
from graphprune.pipeline.base import DataPass
from graphprune.pipeline.recipe import Recipe, Step

ORDERS = ("error", "one-off", "one-on")
"""How sites are ranked: by the error of the outputs, by what the metric gains without one, by what it loses with one alone."""
RELATIVE = 0.01
"""How much worse the metric may be unless it is told, as a fraction of the float model's."""

Watch = Callable[[int, int, str], None]


def tune(
    model: nn.Module | Program,
    metric: Metric,
    data: Iterable[object] | None = None,
    example_inputs: Mapping[str, object] | tuple[object, ...] | Tensor | None = None,
    *,
    pipeline: Recipe | Step | Sequence[Step] | None = None,
    relative: float | None = None,
    absolute: float | None = None,
    lower_is_better: bool = False,
    fallback: Sequence[str] = (OFF,),
    order: str | None = None,
    group: str = "none",
    max_trials: int = 100,
    timeout: float | None = None,
    path: Path | str | None = None,
    name: str | None = None,
    metric_name: str | None = None,
    watch: Watch | None = None,
) -> Tuning:
    """Quantize a model, and let single sites fall back to a higher precision until a metric is good enough.

    Everything is quantized first. Where that is not good enough, sites are ranked and fall back, most sensitive first: their
    number is doubled until the goal is met, then halved in between, which takes a larger number to be no worse. Then each of
    them is quantized again where the goal still holds, least sensitive first. At least one site stays quantized. The metric is
    called once for the float model and once a trial, in eval mode and without gradients.

    Args:
        model: A module with weights, which is traced first, or a Program that is not quantized. It is not changed.
        metric: Function of a Program that returns a finite number; the same one for the same Program.
        data: Calibration batches, as for ``transform``; a pipeline without passes that need them needs none.
        example_inputs: As for ``trace``.
        pipeline: Passes that quantize, in any writing; one of them, ``annotate-quant``, ``dynamic-quant`` or ``insert-fake-quant``,
            decides what. Default: static quantization by the preset ``onnxruntime``, batch normalization folded first.
        relative: How much worse than the float model's the metric may be, as a fraction of it, at least 0. Default 0.01.
        absolute: The same in the unit of the metric, instead of ``relative``.
        lower_is_better: The metric is a loss.
        fallback: Levels that a site may fall back to, precision ascending: settings of a rule of ``annotate-quant``, such as
            ``weights=int8:symmetric:channel activations=none``, or ``off``. All sites reach one before any reaches the next.
        order: What ranks the sites: ``error``, the squared error of the outputs for 32 examples with one site alone quantized,
            which evaluates no metric; ``one-off``, what the metric gains with one site at the highest precision; ``one-on``, what
            it loses with one site alone quantized. Default: ``error`` where there is data, else ``one-off``.
        group: Sites that move together: ``none``; ``input``, those that read one value, such as query, key and value; ``module``,
            those whose modules lie in one module.
        max_trials: Most evaluations of quantized Programs, those that the file held included.
        timeout: Seconds after which no further trial begins.
        path: JSON file that is written after every trial. Where it is there already, with the same model, data, pipeline, metric,
            tolerance and options, the search goes on.
        name: What to call the model in the file; default: its class, in snake case.
        metric_name: What to call the metric; default: ``module:function``.
        watch: Called before each step with how many are done, how many there are at most, and what comes next.

    Returns:
        All trials, those that the file held included; ``best`` is there also where no trial met the goal, ``met`` says so, and
        ``recipe()`` gives its metric again with the same data.

    Raises:
        GraphPruneError: The metric fails or returns no finite number, or the file is of other settings or unreadable.
        RecipeError: An option is out of range, the pipeline decides nothing or twice, data is missing, or nothing can be quantized.
        TraceError: The model cannot be traced, or a batch does not fit it.
        PassError: A pass of the pipeline failed.
    """
    limits = _Limits(max_trials, timeout)
    tolerance = _tolerance(relative, absolute)
    _check_choice("group", group, GROUPS)
    program = model if isinstance(model, Program) else trace(model, example_inputs)
    if any(parameter.is_meta for parameter in program.parameters()):
        raise GraphPruneError("the model has no weights (meta device), so there is nothing to measure; load them first")
    batches = None if data is None else [batch for _, batch in each_batch(data)]
    for number, batch in enumerate(batches or ()):
        bind_batch(program, batch, number)
    order = order or ("one-off" if batches is None else "error")
    _check_choice("order", order, ORDERS)
    if order == "error" and batches is None:
        raise RecipeError("order 'error' runs calibration data; give data, or choose order one-off")
    plan = TunedPipeline.of(default_pipeline(program) if pipeline is None else pipeline)
    plan.check_levels(fallback)
    _check_data(plan, batches)
    plan.check_order(program, batches)
    settings = TuneSettings(
        model=name or program.name,
        weights=fingerprint(program),
        pipeline=plan.text(),
        data="none" if batches is None else f"{len(batches)} batches {data_fingerprint(batches)}",
        metric=metric_name or metric_title(metric),
        lower_is_better=lower_is_better,
        tolerance=tolerance,
        relative=absolute is None,
        fallback=tuple(fallback),
        order=order,
        group=group,
    )
    was_training = program.training
    try:
        program.eval()
        programs = TrialPrograms(program, plan, batches)
        found = _continued(path, Tuning(settings, math.nan, programs.sites(group)))
        return _Search(program, programs, metric, found, limits, path, watch).run()
    finally:
        program.train(was_training)


def _check_data(plan: TunedPipeline, batches: Sequence[object] | None) -> None:
    needing = [step.name for step in plan.passes if isinstance(step, DataPass)]
    if needing and batches is None:
        raise RecipeError(
            f"{needing[0]} needs calibration data: give data=batches, on the command line --data FILE; without any, tune the "
            f"pipeline 'dynamic-quant'"
        )


def _tolerance(relative: float | None, absolute: float | None) -> float:
    if relative is not None and absolute is not None:
        raise RecipeError("give a relative or an absolute tolerance, not both")
    name = "relative" if absolute is None else "absolute"
    value = absolute if absolute is not None else RELATIVE if relative is None else relative
    if not (0.0 <= value < math.inf) or (name == "relative" and value >= 1.0):
        raise RecipeError(
            f"{name} tolerance {value} is out of range; write "
            f"{'a fraction in [0, 1), 0.01 for one percent' if name == 'relative' else 'a number of 0 or more'}"
        )
    return float(value)


def _check_choice(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise RecipeError(f"{option} {value!r} is unknown{suggest(value, known)}")


def _continued(path: Path | str | None, fresh: Tuning) -> Tuning:
    """What an earlier search of the same settings left in a file, or ``fresh``."""

    def differs(found: Tuning) -> str:
        if [(site.name, site.members) for site in found.sites] == [(site.name, site.members) for site in fresh.sites]:
            return ""
        return f"has {len(found.sites)} other sites than the {len(fresh.sites)} that the pipeline quantizes now"

    return replace(fresh.continued(path, "tuned", differs), stopped="")


class _Stopped(Exception):
    """A limit was reached; its text says which."""


class _Limits:
    """Where a search stops."""

    def __init__(self, max_trials: int, timeout: float | None) -> None:
        if max_trials < 1:
            raise RecipeError(f"max_trials={max_trials} is below 1")
        if timeout is not None and not timeout > 0:
            raise RecipeError(f"timeout={timeout} is not above 0; leave it out for none")
        self.max_trials, self.timeout = max_trials, timeout
        self._begun = time.monotonic()

    def check(self, trials: int) -> None:
        """Raise ``_Stopped`` where no further trial may begin."""
        if trials >= self.max_trials:
            raise _Stopped(f"stopped after {trials} trials, as max_trials says")
        self.check_time()

    def check_time(self) -> None:
        """Raise ``_Stopped`` where the time is over."""
        if self.timeout is not None and time.monotonic() - self._begun > self.timeout:
            raise _Stopped(f"stopped after {self.timeout:g} s, as timeout says")


class _Search:
    """The search. It is the same at every run, and trials that a file held are not repeated, so that it goes on where it stopped."""

    def __init__(
        self,
        program: Program,
        programs: TrialPrograms,
        metric: Metric,
        found: Tuning,
        limits: _Limits,
        path: Path | str | None,
        watch: Watch | None,
    ) -> None:
        self.program, self.programs, self.metric, self.limits = program, programs, metric, limits
        self.path, self.watch = path, watch
        self.fallback = found.settings.fallback
        self.float_at = {level: programs.float_at(level) for level in self.fallback}
        self.found = replace(found, notes=tuple(self._notes()))
        self.checked = False

    def run(self) -> Tuning:
        """Search until the goal is met as well as it can be, or a limit is reached."""
        if math.isnan(self.found.baseline):
            self._check_baseline()
        try:
            if not self._meets({}):
                self._rank()
                order = [site.name for site in ranked(self.found.sites)]
                levels = self._first_meeting(self._path(order))
                if levels is not None:
                    self._take_back(levels, order)
        except _Stopped as stop:
            self.found = replace(self.found, stopped=str(stop))
        if self.path is not None:
            self.found.save(self.path)
        self._tell(len(self.found.trials), "done")
        return self.found

    def _notes(self) -> Iterable[str]:
        for level, left in self.float_at.items():
            if level != OFF and left:
                listed = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3])
                more = f"; and {len(left) - 3} more" if len(left) > 3 else ""
                yield f"{len(left)} of {len(self.programs.names)} operators are float at the level {level!r} ({listed}{more})"

    def _path(self, order: Sequence[str]) -> list[dict[str, str]]:
        """Levels from the first site that falls back to the last that may: each of the order to one level, then to the next."""
        path = []
        for place, level in enumerate(self.fallback):
            below = dict.fromkeys(order, self.fallback[place - 1]) if place else {}
            path += [{**below, **dict.fromkeys(order[: count + 1], level)} for count in range(len(order))]
        return [levels for levels in path if self._quantizes(levels)]

    def _quantizes(self, levels: Mapping[str, str]) -> bool:
        """Whether any operator is quantized."""
        return any(
            site.name not in levels or any(name not in self.float_at[levels[site.name]] for name in site.members)
            for site in self.found.sites
        )

    def _first_meeting(self, path: Sequence[dict[str, str]]) -> dict[str, str] | None:
        """The shortest way along the path that meets the goal, found by doubling and halving; None where its end does not."""
        failing, meeting = -1, 0
        while path and not self._meets(path[meeting]):
            if meeting == len(path) - 1:
                return None
            failing, meeting = meeting, min(2 * meeting + 1, len(path) - 1)
        while meeting - failing > 1:
            middle = (failing + meeting) // 2
            failing, meeting = (failing, middle) if self._meets(path[middle]) else (middle, meeting)
        return path[meeting] if path else None

    def _take_back(self, levels: dict[str, str], order: Sequence[str]) -> None:
        """Quantize sites again, least sensitive first, where the goal holds."""
        for name in reversed(order):
            if name not in levels:
                continue
            others = {key: level for key, level in levels.items() if key != name}
            lower = [{**others, name: level} for level in self.fallback[: self.fallback.index(levels[name])]]
            levels = next((tried for tried in (others, *lower) if self._meets(tried)), levels)

    def _rank(self) -> None:
        """Measure the sensitivity of each site, where the file did not hold it."""
        todo = [site for site in self.found.sites if site.sensitivity is None]
        order, highest = self.found.settings.order, self.fallback[-1]
        if len(self.found.sites) == 1 or not todo:
            return
        want = self.programs.outputs(self.programs.start) if order == "error" else []
        for site in todo:
            others = {item.name: highest for item in self.found.sites if item.name != site.name}
            if order == "error":
                self.limits.check_time()
                done = len(self.found.sites) - sum(item.sensitivity is None for item in self.found.sites)
                self._tell(done, f"ranking {site.name}", len(self.found.sites))
                value = squared_error(want, self.programs.outputs(self._build(dict.fromkeys(others, OFF))))
            elif order == "one-on":
                value = self.found.drop(self._trial(others).value)
            else:
                value = self.found.drop(self._trial({}).value) - self.found.drop(
                    self._trial({site.name: highest}).value
                )
            self.found = self.found.with_sensitivity(site.name, value)
            self._save()

    def _meets(self, levels: Mapping[str, str]) -> bool:
        return self.found.meets(self._trial(levels).value)

    def _trial(self, levels: Mapping[str, str]) -> Trial:
        """Evaluate the metric for some levels, unless it was; levels are kept in the order of the graph."""
        known = self.found.trial(levels)
        if known is not None:
            return known
        self.limits.check(len(self.found.trials))
        self._check_baseline()
        levels = {site.name: levels[site.name] for site in self.found.sites if site.name in levels}
        what = f"with {len(self.found.sites) - len(levels)} of {len(self.found.sites)} sites quantized"
        self._tell(len(self.found.trials), f"{what}{self._state()}")
        begun = time.monotonic()
        value = evaluate(self.metric, self._build(levels), self.found.settings.metric, what)
        trial = Trial(levels, value, round(time.monotonic() - begun, 3))
        self.found = self.found.with_trial(trial)
        self._save()
        return trial

    def _build(self, levels: Mapping[str, str]) -> Program:
        return self.programs.build(self.found.members(levels))

    def _check_baseline(self) -> None:
        """Evaluate the float model once a run: for the goal, or to see that the metric is the one of the file."""
        if self.checked:
            return
        self._tell(len(self.found.trials), "float model")
        called = self.found.settings.metric
        value = evaluate(self.metric, self.program, called, "of the float model")
        if math.isnan(self.found.baseline):
            self.found = replace(self.found, baseline=value)
        else:
            check_repeats(value, self.found.baseline, f"{self.path}: metric {called} of the float model")
        if not value and self.found.settings.relative:
            raise RecipeError(
                f"metric {called} of the float model is 0, of which no fraction can be taken; give an absolute tolerance"
            )
        self.checked = True

    def _save(self) -> None:
        if self.path is not None:
            self.found.save(self.path)

    def _state(self) -> str:
        best = self.found.best
        return "" if best is None else f"; best {best.value:.6g}, goal {self.found.goal:.6g}"

    def _tell(self, done: int, what: str, total: int | None = None) -> None:
        if self.watch is not None:
            self.watch(done, self.limits.max_trials if total is None else total, what)
