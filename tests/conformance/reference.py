"""Reference: the masks after each step of a recorded run, from the formulas of Neural Compressor 2.6 and of the papers.

Plain NumPy, written separately from graphprune; nothing of it is imported. Scores are float32, as the formulas' own
accumulators are; where graphprune chose to differ from Neural Compressor, ``docs/inc-differences.md`` says how and why, and this
reference follows graphprune's written contract.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.conformance.reference_choice import Candidates, choose, erdos_renyi, nearest, sparsity_at
from tests.conformance.reference_units import Flags, Geometry, Matrix, dropped_in_groups, means, sums, unit_numbers

Stored = NDArray[np.float32]
RATE, PENALTY = 200.0, 1e-3
"""Options of soft movement: scores so large that the slope of the sigmoid differs among them, else the penalty ranks nothing."""


@dataclass(frozen=True)
class Rule:
    """What one run was asked for; steps count from 0, ``end`` is the last update."""

    criterion: str
    pattern: str
    scope: str = "global"
    schedule: str = "cubic"
    sparsity: float = 0.5
    start: int = 2
    end: int = 16
    frequency: int = 3
    least: float = 0.0
    most: float = 1.0
    substeps: int = 0
    targets: tuple[tuple[str, float], ...] = ()

    def is_update(self, step: int) -> bool:
        """At ``start``, every ``frequency`` steps after it, and at ``end``; one-shot only at ``start``."""
        if self.schedule == "one-shot":
            return step == self.start
        return step == self.end or (self.start <= step < self.end and (step - self.start) % self.frequency == 0)

    def progress(self, step: int) -> float:
        """How much of the window is over."""
        return (step - self.start) / (self.end - self.start) if self.end > self.start else 1.0

    def sparsity_of(self, step: int, share: float | None = None) -> float:
        """Sparsity wanted from the update at ``step`` on, in all or of a weight that is to end at ``share``."""
        return sparsity_at(self.schedule, self.progress(step), self.sparsity if share is None else share)

    def shares(self, geometries: Mapping[str, Geometry]) -> dict[str, float]:
        """Sparsity of each weight at the end; in global scope that of all."""
        if not self.scope.startswith("erdos-renyi"):
            return {name: dict(self.targets).get(name, self.sparsity) for name in geometries}
        keep, _, group = self.pattern.partition(":")
        most = min(self.most, 1.0 - int(keep) / int(group)) if group else self.most
        shapes = [geometry.shape for geometry in geometries.values()]
        found = erdos_renyi(shapes, self.sparsity, [most] * len(shapes), kernel=self.scope.endswith("kernel"))
        return dict(zip(geometries, found, strict=True))


@dataclass(frozen=True)
class Moment:
    """One weight at one optimizer step, as stored.

    Attributes:
        before: Before the step.
        grad: Its gradient.
        after: After the optimizer's update, before anything is set to zero.
    """

    before: Stored
    grad: Stored
    after: Stored


class Weight:
    """One weight, its scores so far and its mask."""

    def __init__(self, geometry: Geometry, rule: Rule) -> None:
        self.geometry, self.rule = geometry, rule
        self.units = unit_numbers(rule.pattern, geometry)
        self.grouped = ":" in rule.pattern
        count = int(self.units.max()) + 1
        self.scores: Matrix = np.zeros(self.units.shape if self.grouped else count, dtype=np.float32)
        self.kept: Flags = np.ones(self.units.shape, dtype=bool)
        self.growth = self.scores
        self.gradients: list[NDArray[np.float64]] = []

    def _reduced(self, values: Matrix) -> Matrix:
        return values if self.grouped else means(values, self.units)

    def _summed(self, values: Matrix) -> Matrix:
        return values if self.grouped else sums(values, self.units).astype(np.float32)

    def observe(self, moment: Moment) -> None:
        """Take the gradient of one step into account."""
        weight, grad = self.geometry.matrix(moment.before), self.geometry.matrix(moment.grad)
        product = weight * grad
        match self.rule.criterion.partition("(")[0]:
            case "gradient":
                self.scores = self._reduced(np.abs(grad))
            case "snip":
                self.scores = self._reduced(np.abs(product))
            case "snip_momentum":
                self.scores = np.float32(0.9) * self.scores + self._reduced(np.abs(product))
            case "block_mask":
                self.scores = np.float32(0.9) * self.scores + np.abs(self._summed(product))
            case "retrain_free":
                self.gradients.append(sums(product, self.units))
                self.scores = self.scores + self._summed(product) ** 2
            case "movement":
                self.scores = self.scores - self._summed(product)
            case "soft_movement":
                gate = 1 / (1 + np.exp(-self.scores))
                self.scores = self.scores - np.float32(RATE * PENALTY) * (gate * (1 - gate))
                self.scores = self.scores - np.float32(RATE) * self._summed(product)
            case "taylor":
                self.scores = np.float32(0.9) * self.scores + self._summed(product) ** 2
            case "rigl":
                self.growth = self._reduced(np.abs(grad))

    def decide(self, after: Stored, progress: float) -> None:
        """Criteria that look at the weight itself do so at the update."""
        if self.rule.criterion in ("magnitude", "top_kast", "rigl"):
            self.scores = self._reduced(np.abs(self.geometry.matrix(after)))
        if self.rule.criterion == "rigl" and not self.kept.all():
            kept = np.bincount(self.units.ravel(), weights=self.kept.ravel()) > 0
            count = round(0.3 / 2 * (1 + math.cos(math.pi * progress)) * int(kept.sum()))
            weakest = sorted(np.flatnonzero(kept), key=lambda unit: (self.scores[unit], -unit))[:count]
            kept[weakest] = False
            rank = np.empty(
                len(kept), dtype=np.float32
            )  # those that stay, by whatever; then all others by their gradient
            order = sorted(range(len(kept)), key=lambda unit: (kept[unit], self.growth[unit], -unit))
            rank[order] = np.arange(len(kept))
            self.scores = rank

    def candidates(self) -> Candidates:
        """What this weight offers."""
        if not self.grouped:
            return Candidates(self.scores, np.bincount(self.units.ravel()), self.units.size)
        lost = dropped_in_groups(self.scores, self.rule.pattern)
        counts = np.bincount(self.units[lost].ravel(), minlength=int(self.units.max()) + 1)
        smallest = sums(np.where(lost, self.scores, 0), self.units) / np.maximum(counts, 1)
        return Candidates(smallest.astype(np.float32), counts, self.units.size)

    def rearranged(self, prune: Flags) -> Flags:
        """The exchange of retrain_free: add each channel that stays, least Fisher first; drop whoever leaves the least behind."""
        if not self.gradients or not prune.any():
            return prune
        batches = np.stack(self.gradients).astype(np.float32).astype(np.float64)
        order = np.argsort(self.scores, kind="stable")
        members = [int(unit) for unit in np.flatnonzero(prune)]
        for candidate in (int(unit) for unit in order if not prune[unit]):
            tried = sorted([*members, candidate])
            left = {
                unit: float((batches[:, [other for other in tried if other != unit]].sum(1) ** 2).sum())
                for unit in tried
            }
            drop = min(tried, key=lambda unit: (left[unit], unit))
            if left[drop] < left[candidate] * (1 - 1e-12):
                members = [unit for unit in tried if unit != drop]
        changed = np.zeros_like(prune)
        changed[members] = True
        return changed

    def locked(self, stored: Stored) -> Flags:
        """Keep the zeros that are there: of units that are zero as a whole, or of groups that are sparse enough."""
        zero = self.geometry.matrix(stored) == 0
        zeros = np.bincount(self.units.ravel(), weights=zero.ravel())
        sizes = np.bincount(self.units.ravel())
        if self.grouped:
            keep, group = (int(part) for part in self.rule.pattern.split(":"))
            sizes = np.full(len(sizes), group - keep)
        return ~(zero & (zeros >= sizes)[self.units])

    def mask_of(self, prune: Flags) -> Flags:
        """True = kept, [rows, columns]."""
        gone = prune[self.units]
        return ~(gone & dropped_in_groups(self.scores, self.rule.pattern)) if self.grouped else ~gone


def masks(
    rule: Rule,
    geometries: Mapping[str, Geometry],
    run: Sequence[Mapping[str, Moment]],
    initial: Mapping[str, Stored],
) -> list[dict[str, Flags]]:
    """Masks after each step of a recorded run.

    Args:
        rule: What was asked for.
        geometries: The weights by name, in the order in which the network uses them.
        run: For each optimizer step, each weight's moment.
        initial: The weights before masks were inserted.

    Returns:
        For each step the masks by name, as stored, True = kept.
    """
    weights = {name: Weight(geometry, rule) for name, geometry in geometries.items()}
    if rule.criterion == "lock":
        locked = {name: weight.geometry.stored(weight.locked(initial[name])) for name, weight in weights.items()}
        return [locked] * len(run)
    if rule.schedule == "one-shot" and rule.criterion in ("magnitude", "top_kast"):  # decided where masks are inserted
        for name, weight in weights.items():
            weight.decide(initial[name], 1.0)
        _update(rule, weights, rule.end)
        return [{name: weight.geometry.stored(weight.kept) for name, weight in weights.items()}] * len(run)
    result = []
    parts = Parts(rule, weights)
    for step, moments in enumerate(run):
        for name, weight in weights.items():
            weight.observe(moments[name])
        if rule.is_update(step) or parts.due(step):
            for name, weight in weights.items():
                weight.decide(moments[name].after, rule.progress(step))
        if rule.is_update(step):
            parts.finish()
            before = [weight.kept for weight in weights.values()]
            _update(rule, weights, step)
            if rule.substeps and step < rule.end:
                parts.begin(step, before)
        elif parts.due(step):
            parts.go_on(step)
        result.append({name: weight.geometry.stored(weight.kept) for name, weight in weights.items()})
    return result


class Parts:
    """A progressive update: what is to go, goes in equal parts, by units in ascending order of their scores over all weights.

    Part ``i`` of ``n``, counted from 0, comes ``i * (frequency // n)`` steps after the update and leaves ``(i + 1) / n`` of the
    weights gone, to the nearest unit; for N:M single weights go. The last part is the update's own choice.
    """

    def __init__(self, rule: Rule, weights: Mapping[str, Weight]) -> None:
        self.rule, self.weights = rule, list(weights.values())
        self.before: list[Flags] = []
        self.goals: list[Flags] = []
        self.chosen_at = 0

    def begin(self, step: int, before: list[Flags]) -> None:
        """Take back what the update chose, and do the first part of it."""
        self.before, self.goals, self.chosen_at = before, [weight.kept for weight in self.weights], step
        self.go_on(step)

    def due(self, step: int) -> bool:
        """Whether a part comes now."""
        return bool(self.goals) and (step - self.chosen_at) % (self.rule.frequency // self.rule.substeps) == 0

    def go_on(self, step: int) -> None:
        """Do the part that comes now."""
        part = (step - self.chosen_at) // (self.rule.frequency // self.rule.substeps)
        if part == self.rule.substeps - 1:
            self.finish()
            return
        units = [
            np.arange(weight.units.size).reshape(weight.units.shape) if weight.grouped else weight.units
            for weight in self.weights
        ]
        offers = []
        for number, weight in enumerate(self.weights):
            going = np.unique(units[number][self.before[number] & ~self.goals[number]])
            offers += [(float(weight.scores.ravel()[unit]), -number, -int(unit)) for unit in going]
        offers.sort()
        sizes = np.array([np.count_nonzero(units[-number] == -unit) for _, number, unit in offers], dtype=np.int64)
        count = nearest(sizes, (part + 1) / self.rule.substeps * int(sizes.sum()))
        for number, weight in enumerate(self.weights):
            gone = [-unit for _, place, unit in offers[:count] if -place == number]
            weight.kept = self.before[number] & ~np.isin(units[number], gone)

    def finish(self) -> None:
        """Do what is left of the update."""
        for weight, goal in zip(self.weights, self.goals, strict=bool(self.goals)):
            weight.kept = goal
        self.goals = []


def _update(rule: Rule, weights: Mapping[str, Weight], step: int) -> None:
    shares = rule.shares({name: weight.geometry for name, weight in weights.items()})
    wanted = [rule.sparsity_of(step, shares[name]) for name in weights]
    chosen = choose([weight.candidates() for weight in weights.values()], wanted, rule.scope, rule.least, rule.most)
    for weight, prune in zip(weights.values(), chosen, strict=True):
        weight.kept = weight.mask_of(weight.rearranged(prune))
