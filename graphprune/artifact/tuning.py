"""Tuning: which sites of a model stay quantized so that a metric keeps its goal, as data that is saved, shown and made a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from graphprune.artifact.measurements import Measurements
from graphprune.artifact.tuned_pipeline import OFF, TunedPipeline
from graphprune.errors import GraphPruneError
from graphprune.pipeline.recipe import Recipe


@dataclass(frozen=True)
class TuneSettings:
    """What trials must have in common to be put together.

    Attributes:
        model: What the user calls the model.
        weights: Fingerprint of all its parameters.
        pipeline: Text of the pipeline that quantizes everything.
        data: How many calibration batches, and their fingerprint.
        metric: What the user calls the metric, such as ``package.module:function``.
        lower_is_better: Whether a smaller metric is better (a loss), or a larger one (an accuracy).
        tolerance: How much worse than the float model the metric may be, at least 0.
        relative: Whether ``tolerance`` is a fraction of the float model's metric, or in the unit of the metric.
        fallback: Levels that a site may fall back to, precision ascending.
        order: How sites were ranked: ``error``, ``one-off`` or ``one-on``.
        group: Which sites move together: ``none``, ``input`` or ``module``.
    """

    model: str
    weights: str
    pipeline: str
    data: str
    metric: str
    lower_is_better: bool
    tolerance: float
    relative: bool
    fallback: tuple[str, ...]
    order: str
    group: str


@dataclass(frozen=True)
class TunedSite:
    """One operator that can be quantized, or several that move together.

    Attributes:
        name: Name of its first operator, and how many more there are.
        members: Names of its operators, as quantizing passes know them.
        sensitivity: By order: the relative squared error of the outputs with it alone quantized; what the metric gains with it
            alone at the highest precision; what the metric loses with it alone quantized. None: not measured.
    """

    name: str
    members: tuple[str, ...]
    sensitivity: float | None = None


@dataclass(frozen=True)
class Trial:
    """One evaluation of the metric.

    Attributes:
        levels: Levels by the names of sites, without those that are fully quantized.
        value: The metric.
        seconds: How long preparing and evaluating took.
    """

    levels: Mapping[str, str]
    value: float
    seconds: float


@dataclass(frozen=True)
class Tuning(Measurements):
    """What a search for a precision of each site has found so far. Prints as a table.

    Attributes:
        settings: What was searched.
        baseline: The metric of the float model.
        sites: Sites in the order of the graph.
        trials: What was evaluated, in this order.
        stopped: Why the search ended before it was through; empty where it was not stopped.
        notes: What to tell about single sites.
    """

    kind = "tuning"

    settings: TuneSettings
    baseline: float
    sites: tuple[TunedSite, ...]
    trials: tuple[Trial, ...] = ()
    stopped: str = ""
    notes: tuple[str, ...] = ()

    @property
    def goal(self) -> float:
        """The worst metric that is good enough."""
        allowed = self.settings.tolerance * (abs(self.baseline) if self.settings.relative else 1.0)
        return self.baseline + allowed if self.settings.lower_is_better else self.baseline - allowed

    def meets(self, value: float) -> bool:
        """Whether a metric is good enough."""
        return value <= self.goal if self.settings.lower_is_better else value >= self.goal

    def drop(self, value: float) -> float:
        """How much worse than the float model a metric is; negative where it is better."""
        return value - self.baseline if self.settings.lower_is_better else self.baseline - value

    @property
    def best(self) -> Trial | None:
        """Of the trials that meet the goal the one with most sites fully quantized, else the one with the best metric.

        Ties: fewer sites that are off, then the better metric, then the earlier trial. None where there is no trial.
        """

        def rank(trial: Trial) -> tuple[float, ...]:
            drop, fallen = self.drop(trial.value), len(trial.levels)
            off = list(trial.levels.values()).count(OFF)
            return (0, fallen, off, drop) if self.meets(trial.value) else (1, drop, fallen, off)

        return min(self.trials, key=rank, default=None)

    @property
    def met(self) -> bool:
        """Whether some trial met the goal."""
        return self.best is not None and self.meets(self.best.value)

    def trial(self, levels: Mapping[str, str]) -> Trial | None:
        """What was evaluated for these levels, if it was."""
        return next((item for item in self.trials if item.levels == levels), None)

    def with_trial(self, trial: Trial) -> Tuning:
        """Return a copy with one more trial."""
        return replace(self, trials=(*self.trials, trial))

    def with_sensitivity(self, name: str, value: float) -> Tuning:
        """Return a copy in which a site is measured."""
        sites = tuple(replace(item, sensitivity=value) if item.name == name else item for item in self.sites)
        return replace(self, sites=sites)

    def recipe(self, trial: Trial | None = None) -> Recipe:
        """The recipe of a trial, which gives its metric again with the same data.

        Args:
            trial: By default the best one.

        Raises:
            GraphPruneError: Nothing was tried yet.
        """
        trial = trial or self.best
        if trial is None:
            raise GraphPruneError("nothing was tried yet, so there is no recipe; let the search go on")
        return TunedPipeline.of(self.settings.pipeline).recipe(self.members(trial.levels))

    def members(self, levels: Mapping[str, str]) -> dict[str, str]:
        """Levels by the names of operators, for those of sites."""
        return {name: levels[site.name] for site in self.sites if site.name in levels for name in site.members}

    def to_dict(self) -> dict[str, object]:
        """What ``save`` writes, as plain data for JSON; ``goal``, ``met`` and ``best`` are for readers and follow from the rest."""
        best = self.best
        return {
            "format": self.file_format,
            "settings": {**asdict(self.settings), "fallback": list(self.settings.fallback)},
            "baseline": self.baseline,
            "goal": self.goal,
            "met": self.met,
            "best": None if best is None else {"trial": self.trials.index(best), "value": best.value},
            "stopped": self.stopped,
            "sites": [{**asdict(site), "members": list(site.members)} for site in self.sites],
            "trials": [asdict(trial) for trial in self.trials],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tuning:
        """Read ``to_dict`` back."""
        settings = TuneSettings(**{**data["settings"], "fallback": tuple(data["settings"]["fallback"])})
        sites = tuple(
            TunedSite(
                str(item["name"]),
                tuple(map(str, item["members"])),
                None if item["sensitivity"] is None else float(item["sensitivity"]),
            )
            for item in data["sites"]
        )
        trials = tuple(
            Trial({str(k): str(v) for k, v in item["levels"].items()}, float(item["value"]), float(item["seconds"]))
            for item in data["trials"]
        )
        found = Tuning(settings, float(data["baseline"]), sites, trials, str(data["stopped"]))
        numbers = (found.baseline, *(item.value for item in trials), *(site.sensitivity or 0.0 for site in sites))
        if not all(math.isfinite(value) for value in numbers):
            raise ValueError("a value is not finite")
        names = {site.name for site in sites}
        if unknown := sorted({name for item in trials for name in item.levels} - names):
            raise ValueError(f"a trial names {unknown[0]}, which is no site")
        return found

    def summary(self) -> str:
        """One or two sentences: how near the goal the best trial came, and what it leaves quantized."""
        best = self.best
        if best is None:
            return f"float model {_number(self.baseline)}, goal {_number(self.goal)}: nothing was tried yet"
        drop, goal = self.drop(best.value), abs(self.goal - self.baseline)
        base = abs(self.baseline)
        shown = f"drop {100 * drop / base:.2f} %" if base else f"drop {_number(drop)}"
        allowed = f"{100 * goal / base:.4g} %" if base else _number(goal)
        if not self.settings.relative:
            shown, allowed = f"drop {_number(drop)}", _number(goal)
        off = list(best.levels.values()).count(OFF)
        kept = len(self.sites) - len(best.levels)
        between = f", {len(best.levels) - off} in between" if len(best.levels) > off else ""
        text = (
            f"{'goal met' if self.met else 'goal not met'}: best {_number(best.value)} of {_number(self.baseline)}, {shown}, "
            f"goal {allowed}; {kept} of {len(self.sites)} sites quantized{between}, {off} float; {len(self.trials)} trials"
        )
        return f"{text}; {self.stopped}" if self.stopped else text

    def table(self) -> Group:
        """Sites with the level that the best trial gives them, most sensitive first, and the summary."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for title in ("site", "level", "sensitivity"):
            table.add_column(title, overflow="fold", justify="right" if title == "sensitivity" else "left")
        levels = {} if self.best is None else self.best.levels
        for site in ranked(self.sites):
            level = levels.get(site.name, "quantized")
            measured = "-" if site.sensitivity is None else f"{site.sensitivity:.3g}"
            table.add_row(*map(Text, (site.name, "float" if level == OFF else level, measured)))
        meaning = {
            "error": "relative squared error of the outputs with this site alone quantized",
            "one-off": f"what {self.settings.metric} gains with this site alone at the highest precision",
            "one-on": f"what {self.settings.metric} loses with this site alone quantized",
        }[self.settings.order]
        return Group(table, "", Text(f"sensitivity: {meaning}"), Text(self.summary()))


def ranked(sites: tuple[TunedSite, ...]) -> list[TunedSite]:
    """Sites, most sensitive first; ties, and sites that were not measured, in the order of the graph."""
    return sorted(sites, key=lambda site: -math.inf if site.sensitivity is None else site.sensitivity, reverse=True)


def _number(value: float) -> str:
    return f"{value:.4f}" if value == 0 or 1e-2 <= abs(value) < 1e4 else f"{value:.4g}"
